"""Types: words, coercion of what models write, and the law that text gives the value back."""

import enum
from typing import Any, Literal, Optional

import attrs
import pytest
from hypothesis import given
from strategies import Colour, Person, same, typed_values

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
    n: int = attrs.field(validator=attrs.validators.gt(0))


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
    (float, "-.5", ValueError),
    (int, "5.7", ValueError),
    (int, "1,00", ValueError),
    (int, "five", ValueError),
    (int, "true", ValueError),
    (int, "", ValueError),
    (int, "1_000", ValueError),
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
    (list[int], "1, 2", ValueError),
    (list[int], "[1", ValueError),
    (list[int], '["x"]', ValueError),
    (list[str], '["a", 5, true]', ["a", "5", "true"]),
    (list[str], '["a", null]', ValueError),
    (list, '[1, "a"]', [1, "a"]),
    (tuple[str, ...], '["a"]', ("a",)),
    (dict[str, int], '{"a": 1}', {"a": 1}),
    (dict[int, str], '{"1": "a"}', {1: "a"}),
    (dict, "[]", ValueError),
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
]


@pytest.mark.parametrize(("tp", "text", "expected"), READ)
def test_reading_what_models_write(tp, text, expected):
    if expected is ValueError:
        with pytest.raises(ValueError, match="is not|has no|is refused|Exceeds the limit"):
            read(tp, text)
    else:
        value = read(tp, text)
        assert value == expected and type(value) is type(expected)


def test_the_place_of_a_wrong_part_is_named():
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
]


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
class Tree:
    children: "list[Tree]"


@attrs.frozen
class Lost:
    owner: "Nobody"  # noqa: F821


@pytest.mark.parametrize("tp", [Tree, Lost])
def test_a_type_that_cannot_be_described_is_a_signature_error(tp):
    with pytest.raises(SignatureError, match="the type of field 'x' is not understood"):
        Field("x", tp)


class Level(enum.IntEnum):
    LOW = 1


class Shout(str):
    pass


def test_a_value_that_is_one_already_stays():
    assert coerce(list[Person], [Person("Ann")]) == [Person("Ann")]
    assert write(str, Shout("HI")) == "HI" and write(list[str], [Shout("HI")]) == '["HI"]'


def test_an_int_enum_is_written_as_its_value():
    assert write(Level, Level.LOW) == "1" and read(Level, "1") is Level.LOW
    assert lmopt.jsonable(Level.LOW) == 1
