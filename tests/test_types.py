"""Types: words, coercion of what models write, and the law that text gives the value back."""

import dataclasses
import datetime as dt
import enum
import importlib.util
import ipaddress
import json
import pathlib
import re
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NewType, Optional, TypeVar

import attrs
import pytest
from attrs import validators as check
from hypothesis import given
from strategies import Cat, Colour, Dog, Options, Pair, Person, Point, Tree, same, typed_values
from toolz import concat

import lmopt
from lmopt import Field, SignatureError, coerce, read, sample, words, write


@given(typed_values())
def test_text_gives_the_value_back(pair):
    tp, value = pair
    back = read(tp, write(tp, value))
    assert type(back) is type(value)
    assert back == value
    assert back == same(tp, back) or tp is str


@given(typed_values())
def test_a_sample_of_each_type_is_a_value_of_it(pair):
    tp, _ = pair
    text = write(tp, sample(tp))
    assert write(tp, read(tp, text)) == text
    assert words(tp)


@attrs.frozen
class Positive:
    n: int = attrs.field(validator=check.gt(0))


READ = [
    (str, "null", "null"),
    (str, ' "a" ', ' "a" '),
    (int, "5", 5),
    (int, "+5", 5),
    (int, "007", 7),
    (int, "1,000", 1000),
    (int, "5.0", 5),
    (int, '"5"', 5),
    (int, "```json\n5\n```", 5),
    (float, "5", 5.0),
    (float, "$1,234.50", 1234.5),
    (float, "1e3", 1000.0),
    (float, "-.5", -0.5),
    (int, "5.7", ValueError),
    (int, "1,00", ValueError),
    (int, "five", ValueError),
    (int, "true", ValueError),
    (int, "", ValueError),
    (int, "1_000", 1000),
    (int, "NaN", ValueError),
    (int, "9" * 5000, ValueError),
    (bool, "true", True),
    (bool, "True", True),
    (bool, "yes", True),
    (bool, " No ", False),
    (bool, "1", ValueError),
    (bool, "maybe", ValueError),
    (int | None, "null", None),
    (int | None, "None", None),
    (int | None, "7", 7),
    (str | None, "null", None),
    (str | None, '"null"', "null"),
    (str | None, "1e3", "1e3"),
    (str | None, "hello", "hello"),
    (int | str, "5", 5),
    (int | str, '"5"', "5"),
    (int | str, "five", "five"),
    (Optional[Literal["a"]], "A", "a"),
    (Literal["billing", "bug"], "billing", "billing"),
    (Literal["billing", "bug"], '"Billing".', "billing"),
    (Literal["billing", "bug"], "refund", ValueError),
    (Literal["a", "A"], "A", "A"),
    (Literal["a", "A"], "`A`", ValueError),
    (Literal[1, "1"], "1", 1),
    (Literal[1, "1"], '"1"', "1"),
    (Colour, "red", Colour.RED),
    (Colour, "RED", Colour.RED),
    (Colour, "Deep_Blue", Colour.DEEP_BLUE),
    (Colour, "2", Colour.DEEP_BLUE),
    (Colour, "green", ValueError),
    (list[int], "[1, 2]", [1, 2]),
    (list[int], '["1"]', [1]),
    (list[int], "1, 2", [1, 2]),
    (list[int], "1,000, 2,000", [1000, 2000]),
    (list[str], "Rome, Oslo", ["Rome", "Oslo"]),
    (list[str], "Well, that is what he said to me.", ValueError),
    (list[int], "[1", ValueError),
    (list[int], '["x"]', ValueError),
    (list[str], '["a", 5, true]', ["a", "5", "true"]),
    (list[str], '["a", null]', ValueError),
    (list, '[1, "a"]', [1, "a"]),
    (tuple[str, ...], '["a"]', ("a",)),
    (dict[str, int], '{"a": 1}', {"a": 1}),
    (dict[int, str], '{"1": "a"}', {1: "a"}),
    (dict, "[1]", ValueError),
    (Person, '{"name": "Ann", "age": "7"}', Person("Ann", 7)),
    (Person, '{"name": "Ann", "hair": "red"}', Person("Ann")),
    (Person, '{"age": 7}', ValueError),
    (Person, "Ann", ValueError),
    (Person | None, "null", None),
    (list[Person], '[{"name": "Ann", "tags": ["x"]}]', [Person("Ann", 0, ["x"])]),
    (list[Person], '[{"name": "Ann", "age": "x"}]', ValueError),
    (Positive, '{"n": 1}', Positive(1)),
    (Positive, '{"n": 0}', ValueError),
    (Any, "5", 5),
    (Any, "hello", "hello"),
    (list[int], "[" * 100_000, ValueError),
    # what models write instead of JSON
    (list[str], "['a', 'b']", ["a", "b"]),
    (list[str], '["a", "b",]', ["a", "b"]),
    (list[str], "['it\\'s', 'a \"b\"']", ["it's", 'a "b"']),
    (list[str], "['a\\\\', 'b\\\"c', 'd\\n']", ["a\\", 'b"c', "d\n"]),
    (list[str], "[a, b]", ["a", "b"]),
    (list[bool], "[True, false, FALSE]", [True, False, False]),
    (list[int | None], "[1, None, null]", [1, None, None]),
    (tuple[int, ...], "(1, 2)", (1, 2)),
    (dict[str, int], "{a: 1, 'b': 2,}", {"a": 1, "b": 2}),
    (dict[str, bool], "{'x': True}", {"x": True}),
    (dict[int, str], "{1: 'a'}", {1: "a"}),
    (Person, "{name: Ann, age: 7}", Person("Ann", 7)),
    (Person, 'Sure! Here it is:\n{"name": "Ann"}\nAnything else?', Person("Ann")),
    (Person, "Here:\n```json\n{'name': 'Ann',}\n```", Person("Ann")),
    (Person, "```\n{name: 'Ann'}\n```", Person("Ann")),
    (list[int], "The list is [1, 2].", [1, 2]),
    (list[str], "[[1]", ValueError),
    (list[str], '["a", "b', ValueError),
    (list[str], '["a", "b"', ValueError),
    (Person, '{"name": "Ann"', ValueError),
    (Person, '{"name": "Ann", "age": 7', ValueError),
    (dict[str, int], '{"a" 1}', ValueError),
    (list[int], "[1 2]", ValueError),
    (list[int], "[1,,2]", ValueError),
    (Any, "see [1] for details", "see [1] for details"),
    (str | None, "see [1] for details", "see [1] for details"),
    (str | None, "None", None),
    # a single item where a list is meant
    (list[str], "a", ["a"]),
    (list[int], "5", [5]),
    (list[Person], '{"name": "Ann"}', [Person("Ann")]),
    (list[int], "none of them", ValueError),
    (list[int], "null", ValueError),
    (list[str], "", ValueError),
    (set[int], "[1, 1, 2]", {1, 2}),
    (frozenset[str], '["a"]', frozenset({"a"})),
    (tuple[int, str], '[1, "a"]', (1, "a")),
    (tuple[int, str], "[1]", ValueError),
    (tuple[int, str], '[1, "a", 2]', ValueError),
    # moments and decimals
    (dt.date, "2026-11-22", dt.date(2026, 11, 22)),
    (dt.date, '"2026-11-22"', dt.date(2026, 11, 22)),
    (dt.date, "22 November", ValueError),
    (dt.datetime, "2026-11-22T10:00:00Z", dt.datetime(2026, 11, 22, 10, tzinfo=dt.UTC)),
    (dt.time, "10:30", dt.time(10, 30)),
    (dt.time, "half past ten", ValueError),
    (Decimal, "0.10", Decimal("0.10")),
    (Decimal, "$1,234.50", Decimal("1234.50")),
    (Decimal, "ten", ValueError),
    (list[Decimal], '[0.5, "0.10"]', [Decimal("0.5"), Decimal("0.10")]),
    # classes of every kind
    (Point, '{"x": "1"}', Point(1)),
    (Pair, '{"left": "a"}', Pair("a")),
    (Options, '{"name": "a", "size": "3", "more": 1}', {"name": "a", "size": 3}),
    (Options, '{"size": 3}', ValueError),
    (Tree, '{"label": "a", "children": [{"label": "b"}]}', Tree("a", [Tree("b")])),
    (Cat | Dog, '{"name": "Tom"}', Cat("Tom")),
    (Cat | Dog, '{"name": "Rex", "barks": false}', Dog("Rex", False)),
    (list[int] | list[str], '["a"]', ["a"]),
    (int | list[int], "[1]", [1]),
    (dict[str, int], '[{"key": "a", "value": 1}]', {"a": 1}),
    (Annotated[int, check.ge(0)], "5", 5),
    (Annotated[int, check.ge(0)], "-5", ValueError),
    (Annotated[str, check.max_len(3)], "abcd", ValueError),
]


def test_the_table_is_long():
    assert len(READ) >= 80


@pytest.mark.parametrize(("tp", "text", "expected"), READ)
def test_reading_what_models_write(tp, text, expected):
    if expected is ValueError:
        with pytest.raises(ValueError, match="is not|has no|is refused|Exceeds the limit"):
            read(tp, text)
    else:
        value = read(tp, text)
        assert value == expected and type(value) is type(expected)


def test_the_place_of_a_wrong_part_is_named():
    with pytest.raises(ValueError, match="at age: 'x' is not a value of type int"):
        read(Person, '{"name": "Ann", "age": "x"}')
    with pytest.raises(ValueError, match=r"at \[1\]: at age: 'x' is not a value of type int"):
        coerce(list[Person], [{"name": "Ann"}, {"name": "Bob", "age": "x"}])


WORDS = [
    (str, "str"),
    (bool, "true or false"),
    (Colour, 'one of "red", 2, "none"'),
    (list, "list[any]"),
    (int | None, "int or null"),
    (dict[str, list[int]], "dict[str, list[int]]"),
    (Person, "{name: str, age: int, tags: list[str]}"),
    (dt.date, "date YYYY-MM-DD"),
    (tuple[int, str], "[int, str]"),
    (Tree, "Tree {label: str, children: list[Tree]}"),
    (list[Tree | None], "list[Tree {label: str, children: list[Tree]} or null]"),
    (Annotated[int, "in years", check.ge(0)], "int (in years, >= 0)"),
]


def even(instance, attribute, value):
    """an even number"""
    if value % 2:
        raise ValueError("odd")


@attrs.frozen
class Limited:
    age: int = attrs.field(
        validator=[
            check.instance_of(int),
            check.ge(0),
            check.lt(150),
        ],
        metadata={"desc": "in years"},
    )
    name: str = attrs.field(
        default="a",
        validator=check.and_(check.min_len(1), check.max_len(9)),
    )
    size: str | None = attrs.field(default=None, validator=check.optional(check.in_(["S", "M"])))
    code: str = attrs.field(default="A1", validator=check.matches_re("[A-Z][0-9]"))
    pairs: int = attrs.field(default=2, validator=even, converter=int)


def test_constraints_reach_the_prompt_in_words_and_are_enforced():
    assert words(Limited) == (
        "{age: int (in years, >= 0, < 150), name: str (length at least 1, length at most 9), "
        'size: str or null (one of "S", "M"), code: str (matching [A-Z][0-9]), '
        "pairs: int (an even number)}"
    )
    assert read(Limited, '{"age": 7}') == Limited(7)
    for wrong in (
        {"age": 200},
        {"age": 1, "name": ""},
        {"age": 1, "size": "L"},
        {"age": 1, "code": "x"},
        {"age": 1, "pairs": 3},
    ):
        with pytest.raises(ValueError, match="is refused: "):
            coerce(Limited, wrong)


def never(instance, attribute, value):
    """never"""
    raise KeyError(value)


@attrs.frozen
class Refusing:
    x: int = attrs.field(validator=never)


@attrs.frozen
class Converting:
    x: Any = attrs.field(converter=lambda value: value.strip())


REFUSED = [
    (set[Any], "[[1]]"),
    (frozenset[dict[str, int]], '[{"a": 1}]'),
    (dict[list[str], int], '{"a": 1}'),
    (Decimal, "1e9999999999999999999"),
    (list[Decimal], '["1e9999999999999999999"]'),
    (Refusing, '{"x": 1}'),
    (Converting, '{"x": 1}'),
    (Annotated[int, never], "1"),
]


@pytest.mark.parametrize(("tp", "text"), REFUSED)
@pytest.mark.parametrize("adapter", [lmopt.chat, lmopt.json, lmopt.xml, lmopt.plain])
def test_whatever_refuses_a_value_it_is_a_parse_error(adapter, tp, text):
    data = text if text[0] in "[{" else json.dumps(text)
    replies = {
        "chat": f"[[ ## x ## ]]\n{text}",
        "json": f'{{"x": {data}}}',
        "xml": f"<x>{text}</x>",
    }
    task = lmopt.Signature((), (Field("x", tp),))
    with pytest.raises(lmopt.ParseError, match="`x` cannot be read .* is refused: "):
        adapter.parse(task, lmopt.Response(replies.get(adapter.name, f"X: {text}")))


SCHEMAS = [tp for tp, _, _ in READ] + [
    Limited,
    list[Tree],
    dict[str, list[Person]],
    Cat | Dog | None,
]


@pytest.mark.parametrize("tp", SCHEMAS)
def test_each_schema_is_strict_and_accepts_a_sample(tp):
    schema = lmopt.json_schema(tp)
    pending = [schema]
    while pending:  # the rules of strict providers
        node = pending.pop()
        parts = [*node.values(), *concat(part for part in node.values() if isinstance(part, list))]
        pending += [part for part in parts if isinstance(part, dict)]
        if node.get("type") == "object":
            assert node["additionalProperties"] is False
            assert node["required"] == list(node["properties"])
    assert json.loads(json.dumps(schema)) == schema
    assert len(words(tp)) < len(json.dumps(schema)) or len(words(tp)) < 40
    if importlib.util.find_spec("jsonschema"):
        import jsonschema

        jsonschema.Draft202012Validator.check_schema(schema)
        assert "dict" in words(tp) or jsonschema.Draft202012Validator(schema).is_valid(sample(tp))


def test_a_schema_that_holds_itself():
    assert lmopt.json_schema(Tree) == {
        "$ref": "#/$defs/Tree",
        "$defs": {
            "Tree": {
                "type": "object",
                "properties": {
                    "label": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
                },
                "required": ["label", "children"],
                "additionalProperties": False,
            }
        },
    }


def test_two_classes_of_one_name_have_two_schemas():
    def make(kind):
        return attrs.make_class("Thing", {"x": attrs.field(type=kind)})

    schema = lmopt.json_schema(tuple[make(int), make(str)])
    assert list(schema["$defs"]) == ["Thing", "Thing2"]


def test_words_are_at_most_half_as_long_as_the_schema_of_nested_types():
    for tp in (list[Person], dict[str, list[Limited]], Tree, Cat | Dog | None):
        assert len(words(tp)) * 2 <= len(json.dumps(lmopt.json_schema(tp), separators=(",", ":")))


def test_pydantic_models_are_met_by_duck_typing():
    pydantic = pytest.importorskip("pydantic")

    class Address(pydantic.BaseModel):
        street: str
        number: int = pydantic.Field(gt=0, description="of the house")

    class User(pydantic.BaseModel):
        name: str
        homes: list[Address] = pydantic.Field(default_factory=list)
        born: dt.date | None = None

    assert words(Address) == "{street: str, number: int (> 0, of the house)}"
    home = '{"street": "A", "number": "1,000"}'
    user = read(User, f'{{"name": "Ann", "homes": [{home}], "born": "2000-01-02"}}')
    address = Address(street="A", number=1000)
    assert user == User(name="Ann", homes=[address], born=dt.date(2000, 1, 2))
    assert read(User, write(User, user)) == user
    with pytest.raises(ValueError, match="is refused"):
        coerce(Address, {"street": "A", "number": -1})
    assert lmopt.json_schema(Address)["$defs"]["Address"]["required"] == ["street", "number"]


@pytest.mark.parametrize(("tp", "expected"), WORDS)
def test_words(tp, expected):
    assert words(tp) == expected


class Odd:
    pass


@pytest.mark.parametrize("tp", [Odd, list[Odd], dict[str, Odd | None], complex, 5, "str"])
def test_an_unknown_type_is_refused_when_the_field_is_made(tp):
    with pytest.raises(SignatureError, match="the type of field 'x' is not understood .*expected"):
        Field("x", tp)


@attrs.frozen
class Lost:
    owner: "Nobody"  # noqa: F821


@pytest.mark.parametrize("tp", [Lost])
def test_a_type_that_cannot_be_described_is_a_signature_error(tp):
    with pytest.raises(SignatureError, match="the type of field 'x' is not understood"):
        Field("x", tp)


class Level(enum.IntEnum):
    LOW = 1


class Shout(str):
    pass


@attrs.frozen
class Counted:
    name: str
    size: int = attrs.field(init=False)

    @size.default
    def _size(self) -> int:
        return len(self.name)


@dataclasses.dataclass
class Numbered:
    name: str
    number: int = dataclasses.field(init=False, default=7)


@pytest.mark.parametrize("tp", [Counted, Numbered])
def test_an_attribute_that_is_not_given_is_not_asked_for(tp):
    assert words(tp) == "{name: str}"
    assert read(tp, write(tp, tp("abc"))) == tp("abc")


def test_a_value_that_is_one_already_stays():
    assert coerce(list[Person], [Person("Ann")]) == [Person("Ann")]
    day = dt.date(2026, 1, 2)
    assert coerce(list[dt.date], [day]) == [day]
    assert coerce(Decimal | None, Decimal("0.10")) == Decimal("0.10")
    assert coerce(list[Decimal], [Decimal("1")]) == [Decimal("1")]
    assert write(str, Shout("HI")) == "HI" and write(list[str], [Shout("HI")]) == '["HI"]'


def test_an_int_enum_is_written_as_its_value():
    assert write(Level, Level.LOW) == "1" and read(Level, "1") is Level.LOW
    assert lmopt.jsonable(Level.LOW) == 1


LABEL = Literal["warm", "cold", "TWO", "c1", "c2", "not_sure"]
SAID = [
    # lists in Markdown, in lines, with commas
    (list[str], "- a\n- b", ["a", "b"]),
    (list[str], "* a\n\n* b", ["a", "b"]),
    (list[str], "The cities are:\n1. Rome\n2) Oslo", ["Rome", "Oslo"]),
    (list[str], "- [ ] a\n- [x] b", ["a", "b"]),
    (list[str], "- [home](https://e.org)\n- [b](https://e.org/b)",
     ["[home](https://e.org)", "[b](https://e.org/b)"]),
    (list[str], "Rome\nOslo", ValueError),
    (list[dict[str, str]], '{"k": "v1"} {"k": "v2"}', [{"k": "v1"}, {"k": "v2"}]),
    (list[dict[str, str]], '{"k": "v1"}\n{"k": "v2', ValueError),
    (list[int], "[1]\n[2, 3]", [1, 2, 3]),
    (list[dict[str, str]], '[{"k": "v1"}]\n[{"k": "v2"}]', [{"k": "v1"}, {"k": "v2"}]),
    (list[int], "As in [1], it is [2, 3].", [2, 3]),
    (dict[str, int], 'First {"a": 1}, then {"a": 2}', ValueError),
    (dict[str, int], 'It is {"a": 1}, yes, {"a": 1}', {"a": 1}),
    (list[str], "[...]", ValueError),
    # slips of the pen; what is damaged is not read in part
    (Person, '{"name": "Ann "the cat" Lee", "age": 7}', Person('Ann "the cat" Lee', 7)),
    (Person, "{ // who\n name: Ann Lee,\n age: 7 # years\n}", Person("Ann Lee", 7)),
    (dict[str, str], '{"a": """x"y""", “b”: “z”}', {"a": 'x"y', "b": "z"}),
    (list[Person], '[{"name": "Ann"}, {"name: }, {"name": "Bob"}]', ValueError),
    (dict[str, int], '[{"key": "a", "value": 1}, {"key": "a", "value": 2}]', ValueError),
    # a choice
    (LABEL, "**warm**", "warm"),
    (LABEL, "The answer is TWO", "TWO"),
    (LABEL, "The answer is: *two*.", "TWO"),
    (LABEL, '"c1": because it is not cool', "c1"),
    (LABEL, "Not sure", "not_sure"),
    (LABEL, "c1 or c2", ValueError),
    (LABEL, "It is not warm", ValueError),
    (LABEL, "warm, not cold", ValueError),
    (LABEL, "I feel warm and happy", ValueError),
    (Literal["A", "B"], "A problem with this is its price", ValueError),
    (Literal["A", "B"], "A) because", ValueError),
    (Literal["A", "B"], "(B)", "B"),
    # truth and numbers
    (bool, "Answer: **True**", True),
    (bool, "True.", True),
    (float, "12.11.", 12.11),
    (float, "1/5", 0.2),
    (int, "4/5", ValueError),
    (int, "**5**", 5),
    (int, "[5]", 5),
    (int, "5%", 5),
    (float, "5 km", 5.0),
    (int, "52 years old", 52),
    (float, "-2,000.00", -2000.0),
    (float, "Euro 45", 45.0),
    (float, "45 €", 45.0),
    (float, "-$5.50", -5.5),
    (int, "5 million", ValueError),
    (int, "5m", ValueError),
    (int, "5 or 6", ValueError),
    (int, "2 x", ValueError),
    (float, "1.234,56", ValueError),
    (Decimal, "Euro 45.10", Decimal("45.10")),
    # dates that have one reading
    (dt.date, "2024-01-02T00:00:00", dt.date(2024, 1, 2)),
    (dt.date, "2024/1/2", dt.date(2024, 1, 2)),
    (dt.date, "15 January 2025", dt.date(2025, 1, 15)),
    (dt.date, "March 3rd 2025", dt.date(2025, 3, 3)),
    (dt.date, "Monday, Nov. 20, 2024", dt.date(2024, 11, 20)),
    (dt.date, "2nd of May 2024", dt.date(2024, 5, 2)),
    (dt.date, "25/12/2024", dt.date(2024, 12, 25)),
    (dt.date, "3/3/2024", dt.date(2024, 3, 3)),
    (dt.date, "2024-3-1", dt.date(2024, 3, 1)),
    (dt.date, "Sept. 5, 2024", dt.date(2024, 9, 5)),
    (dt.date, "31 February 2024", ValueError),
    (dt.date, "12/11/2024", ValueError),
    (dt.date, "2025-15-15", ValueError),
    (dt.date, "20 Nox 2024", ValueError),
    (dt.date, "{2026-07-05}", dt.date(2026, 7, 5)),
    (dt.datetime, "2024/01/02 10:30", dt.datetime(2024, 1, 2, 10, 30)),
    # null attributes may be left out; the shape of the data tells a class from a dict
    (Pair, '{"left": "a"}', Pair("a", None)),
    (dict | Point, '{"x": 1, "y": 2}', Point(1, 2.0)),
    (dict | Point, '{"x": 1, "z": 2}', {"x": 1, "z": 2}),
    (list[Point], "<p><x>1</x><y>2</y></p><p><x>3</x></p>", [Point(1, 2.0), Point(3)]),
]  # fmt: skip


@pytest.mark.parametrize(("tp", "text", "expected"), SAID)
def test_reading_what_a_person_would_understand(tp, text, expected):
    if expected is ValueError:
        with pytest.raises(ValueError, match="is not|has no|is refused"):
            read(tp, text)
    else:
        value = read(tp, text)
        assert value == expected and type(value) is type(expected)


T = TypeVar("T")
Age = NewType("Age", int)


@attrs.frozen
class Box(Generic[T]):
    value: T
    more: Sequence[T] = ()


@dataclasses.dataclass
class Crate(Generic[T]):
    data: T


BOXED = [
    (Box[int], '{"value": "1", "more": [2]}', Box(1, [2]), "{value: int, more: list[int]}"),
    (Box, '{"value": "a", "more": []}', Box("a", []), "{value: any, more: list[any]}"),
    (Crate[str], '{"data": "a"}', Crate("a"), "{data: str}"),
    (Age, "7", 7, "int"),
    (Sequence[str], '["a"]', ["a"], "list[str]"),
    (uuid.UUID, "00000000-0000-0000-0000-00000000000a", uuid.UUID(int=10), "UUID"),
    (pathlib.PurePosixPath, "a/b", pathlib.PurePosixPath("a/b"), "PurePosixPath"),
    (ipaddress.IPv4Address, "127.0.0.1", ipaddress.IPv4Address("127.0.0.1"), "IPv4Address"),
    (dt.timedelta, "90", dt.timedelta(seconds=90), "number of seconds"),
    (dict[uuid.UUID, int], f'{{"{uuid.UUID(int=1)}": 1}}', {uuid.UUID(int=1): 1},
     "dict[UUID, int]"),
]  # fmt: skip


@pytest.mark.parametrize(("tp", "text", "value", "told"), BOXED)
def test_types_around_plain_values_and_generic_classes(tp, text, value, told):
    assert read(tp, text) == value and words(tp) == told
    assert read(tp, write(tp, value)) == value
    assert write(tp, read(tp, write(tp, sample(tp)))) == write(tp, sample(tp))
    assert lmopt.json_schema(tp)


def test_what_is_no_such_value_is_refused_in_its_words():
    with pytest.raises(ValueError, match="'x' is refused: badly formed hexadecimal UUID"):
        read(uuid.UUID, "x")


@attrs.frozen
class Bounded:
    """Stands in for the notes of annotated-types: what they demand, by attribute."""

    ge: float | None = None
    max_length: int | None = None
    multiple_of: int | None = None
    pattern: str | None = None


@pytest.mark.parametrize(
    ("note", "right", "wrong", "told"),
    [
        (Bounded(ge=3), 3, 2, ">= 3"),
        (Bounded(multiple_of=2), 4, 3, "a multiple of 2"),
        (Bounded(max_length=2), "ab", "abc", "length at most 2"),
        (Bounded(pattern="^a"), "ab", "ba", "matching ^a"),
    ],
)
def test_what_an_annotation_demands_is_told_and_enforced(note, right, wrong, told):
    tp = Annotated[type(right), note, "in km"]
    assert words(tp) == f"{words(type(right))} ({told}, in km)"
    assert coerce(tp, right) == right
    with pytest.raises(ValueError, match=f"is refused: expected .*{re.escape(told)}"):
        coerce(tp, wrong)


def test_pydantic_aliases_limits_and_types():
    pydantic = pytest.importorskip("pydantic")

    class Trip(pydantic.BaseModel):
        distance: int = pydantic.Field(alias="distance-km", ge=3, description="km")
        page: pydantic.HttpUrl | None = None
        key: pydantic.SecretStr = "x"

    class Trips(pydantic.RootModel[list[Trip]]):
        pass

    assert words(Trip) == "{distance: int (>= 3, km), page: HttpUrl or null, key: SecretStr}"
    for name in ("distance", "distance-km"):
        assert coerce(Trip, {name: 5}).distance == 5
    with pytest.raises(ValueError, match="at distance: 1 is refused: expected int \\(>= 3"):
        coerce(Trip, {"distance": 1})
    assert words(Trips) == f"list[{words(Trip)}]"

    class Node(pydantic.BaseModel, Generic[T]):
        value: T
        inside: "list[Node[T]]" = pydantic.Field(default_factory=list)

    assert "{value: int, inside: list[" in words(Node[int])
    nested = read(Node[int], '{"value": "1", "inside": [{"value": 2}]}')
    assert nested.inside[0].value == 2
    made = read(Trips, '[{"distance": 5, "page": "https://e.org", "key": "k"}]')
    assert read(Trips, write(Trips, made)) == made
    far = Annotated[int, pydantic.Field(ge=3, description="km")]
    assert words(far) == "int (km, >= 3)" and coerce(far, 3) == 3
    with pytest.raises(ValueError, match="is refused"):
        coerce(pydantic.PositiveInt, -1)


def test_values_of_numpy_and_pandas():
    numpy = pytest.importorskip("numpy")
    assert coerce(list[int], numpy.array([1, 2])) == [1, 2]
    assert coerce(bool, numpy.bool_(True)) is True and coerce(float, numpy.float32(0.5)) == 0.5
    assert lmopt.canonical({"a": numpy.int64(1), "b": numpy.arange(2)}) == '{"a":1,"b":[0,1]}'
    task = lmopt.predict("x: Any -> y: int")
    metric = lambda example, made: numpy.float64(1.0000000000000002)  # noqa: E731
    rows = [{"x": numpy.int64(1), "y": numpy.int64(1)}]
    assert lmopt.evaluate(task, rows, metric, lm=lmopt.stub_lm()).score == 1.0
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": ["a", "b"], "y": [1.0, None]})
    assert lmopt.check_dataset(task, frame) == ({"x": "a", "y": 1}, {"x": "b", "y": None})


def test_names_of_attributes_are_anything():
    names = (
        "data",
        "cls",
        "tp",
        "make",
        "parts",
        "name",
        "inputs",
        "lm",
        "params",
        "program",
        "path",
    )
    for name in (*names, "step", "text", "value", "mapping", "task", "request", "memo"):
        kind = attrs.make_class("Kind", {name: attrs.field(type=str)})
        task = lmopt.predict(f"{name} -> made: Kind, {name}2", types={"Kind": kind})
        made = task(lmopt.stub_lm(), **{name: "x"})
        assert made.made == kind("text") and made[f"{name}2"] == "text"


@attrs.frozen
class Loose:
    name: str | None = None
    age: int | None = None


FEELING = Literal["positive", "negative", "neutral"]

# What a careful person would not take for a value: a second call costs less than a wrong one.
UNCLEAR: list[tuple[Any, list[str]]] = [
    (Loose, ['{"Name": "A", "Age": 5}', '{"error": "cannot"}', "I use {} here", "<p>no</p>"]),
    (list[Loose], ['{"people": [{"name":"A"},{"name":"B"}]}']),
    (
        int,
        [
            "The answer is 500 [1].",
            "**500** (see [2])",
            "arr[0] = 7",
            "[1](http://x.y)",
            "[5] [6]",
            "[1] + [2]",
            "[5]/2",
            "-[5]",
            "not [5]",
            "5 mil",
            "5 mio",
            "5 tn",
            "5 T",
            "5 grand",
            "5 lakhs",
            "5 thousands",
            "5万",
            "10²",
            "5½",
            "5 squared",
            "5i",
            "5 not",
            "5 wrong",
            "5 negative",
            "5 less",
            "5 minus",
            "5 below",
            "12 am",
            "5 BC",
            "5 cents",
            "5!",
            "1.000",
            "EUR 1.000",
            "3\nRecheck.\nAnswer: 4",
            "1,5",
        ],
    ),
    (bool, ["Not [true]", "It is never [true]", 'not ["yes"]', "Answers [true] [false]"]),
    (
        dt.date,
        [
            "not [2024-01-02]",
            '["2024-01-02"] is excluded',
            "before 2 January 2024",
            "after 2 January 2024",
            "circa 2 January 2024",
            "10 2 January 2024",
            "Not, Jan 2 2024",
            "2024-01-02T10:00 or 2024-01-03",
            "2024-01-02 10:00 until 2025",
        ],
    ),
    (dt.time, ["10:00-11:00", "10-12", "10.30"]),
    (dt.timedelta, ["5 minutes", "2 hours"]),
    (
        list[int],
        [
            "See [1]",
            "[1] foo",
            "a[0]",
            "I exclude [1, 2]",
            "[1, 2] is wrong; see",
            "I found [] nothing",
            "[1]\n[1, 2]",
            "100,200,300",
            "1. 000",
        ],
    ),
    (
        list[str],
        [
            'Not this: ["a"]',
            "I am not able\nto answer this",
            "Yes, I do",
            "In short, no",
            "Sorry, none found",
            "red, green, and blue",
            "Not these:\n- a\n- b",
            "- a\n  - b",
            "1. FC Köln",
            "none",
            "None",
            "N/A",
            "nothing",
            "There are none.",
            '{"error": "none"}',
            '{"q": ["a"]}',
            '["draft"]\n["draft", "final"]',
            "The first line\nthe second line",
            "| a | b |\n|---|---|",
        ],
    ),
    (dict, ["I use {} for blanks", 'not {"a": 1}', '{"a": 1} is wrong']),
    (
        Person,
        [
            'not {"name": "A", "age": 5}',
            '{"name": "A", "age": 5} is wrong',
            '{"name":"A","age":5} or {"name":"B","age":6}',
        ],
    ),
    (list[Person], ['{"name":"A","age":5} or {"name":"B","age":6}']),
    (
        FEELING,
        [
            "It isn't 'positive'",
            'The sentiment is not "positive"',
            "anything but **positive**",
            "It's the opposite of **positive**.",
            "cannot be positive",
            "It is not: positive",
            "Incorrect: positive",
            "Ruled out: positive",
            "wrong answer: positive",
            "What it is not is positive",
            "*positive* is incorrect",
            "un(positive)",
            "Neither; 'positive'",
            "Positive: no",
            "positive: false",
            "positive: 20%",
            "Positive (unlikely)",
            "positive, wrong",
            "positive. Wait, no.",
            "might be positive",
            "unless it is positive",
            "Whether it is positive",
            'I cannot decide. It could be "positive"',
        ],
    ),
    (
        Literal["yes", "no"],
        [
            "There is no",
            "the reason is no",
            "No. 1 reason: it works",
            "no. 5",
            "there is [no] reason to doubt",
            "It is not 'no'",
            "I can't say (no)",
            "Yes: I don't think so",
        ],
    ),
    (
        Literal["A", "B", "C", "D"],
        [
            "It is a",
            "This is a",
            '"a" dog',
            "A (incorrect)",
            "A: wrong",
            "A. Smith is wrong",
            "Grade: A-",
            "A- (good)",
        ],
    ),
    (Literal[-1, 0, 1], ["-1: bad", "is -1 or so"]),
    (Literal[1, 2, 3], ["rating: -1", "is -1", "1.5", "1,5", "1:30"]),
]


@pytest.mark.parametrize(("tp", "texts"), UNCLEAR)
def test_what_is_not_clear_is_refused(tp, texts):
    for text in texts:
        with pytest.raises(ValueError, match="is not|has no|is refused"):
            print(text, read(tp, text, name="x"))
