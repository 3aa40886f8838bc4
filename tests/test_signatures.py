"""Signatures: three forms, pure edits, and errors that name the place."""

import dataclasses
import enum
import typing
from typing import Annotated, Any, Literal

import attrs
import pytest
from attrs import validators
from hypothesis import given
from hypothesis import strategies as st
from strategies import Person, names

import lmopt
from lmopt import Field, Signature, SignatureError, signature


def test_text():
    made = signature("question, context: list[str] -> answer: float, ok: bool | None")
    assert [(one.name, one.type) for one in made.inputs] == [
        ("question", str),
        ("context", list[str]),
    ]
    assert [(one.name, one.type) for one in made.outputs] == [
        ("answer", float),
        ("ok", bool | None),
    ]
    assert (
        made.instructions
        == "Given the fields `question`, `context`, produce the fields `answer`, `ok`."
    )
    assert str(made) == "question, context -> answer, ok"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "-> x: Literal['a->b', \"c, d\", 3, -1, None, True]",
            Literal["a->b", "c, d", 3, -1, None, True],
        ),
        ("-> x: dict[str, Any]", dict[str, Any]),
        ("-> x: Optional[int]", int | None),
        ("-> x: Union[int, str]", int | str),
        ("-> x: List[Dict[str, int]]", typing.List[typing.Dict[str, int]]),
        ("-> x: list[Person]", list[Person]),
        ("-> x: tuple[int, ...]", tuple[int, ...]),
        ("\n  a,\n  b: int ->\n  x: None\n", None),
        ("größe -> x", str),
    ],
)
def test_types_in_text(text, expected):
    assert signature(text, types={"Person": Person}).outputs[0].type == expected


def test_instructions_and_no_inputs():
    assert signature("-> joke").instructions == "Produce the fields `joke`."
    assert signature("q -> a", instructions="Be brief.").instructions == "Be brief."
    assert signature(Signature((), (Field("a"),), "Say it.")).instructions == "Say it."
    assert signature(Signature((), (Field("a"),))).instructions == "Produce the fields `a`."


def team(ticket: str, urgent: bool = False) -> Literal["billing", "bug"]:
    """Route the ticket.

    Be quick.
    """


@attrs.frozen
class Verdict:
    label: Literal["yes", "no"]
    score: float = attrs.field(metadata={"desc": "0 to 1"})


def judge(claim) -> Verdict:
    """Judge the claim."""


def test_function():
    made = signature(team)
    assert [one.name for one in made.inputs] == ["ticket", "urgent"]
    assert [one.required for one in made.inputs] == [True, False]
    assert made.inputs[1].default is False
    assert made.outputs == (Field("team", Literal["billing", "bug"]),)
    assert made.instructions == "Route the ticket.\n\nBe quick."


def test_a_returned_class_gives_one_output_per_attribute():
    assert signature(judge).outputs == (
        Field("label", Literal["yes", "no"]),
        Field("score", float, "0 to 1"),
    )
    assert signature(judge).inputs == (Field("claim", str),)


def local_types():
    class Colour(enum.Enum):
        RED = 1

    def pick(name: "Colour") -> "Colour": ...

    return pick, Colour


def test_types_of_a_function_can_be_passed():
    pick, colour = local_types()
    with pytest.raises(
        SignatureError, match="wrong annotation: 'pick'; expected types; pass types="
    ):
        signature(pick)
    assert signature(pick, types={"Colour": colour}).outputs[0].type is colour


WRONG = [
    ("question answer", "not one arrow: 'question answer'; expected 'inputs -> outputs'; write"),
    ("a -> b -> c", "not one arrow"),
    ("a ->", "no output field: 'a -> '; expected 'inputs -> outputs'; name at least one"),
    ("a, a -> b", "a field stands twice: 'a'; expected distinct names; rename one"),
    ("a -> a", "a field stands twice: 'a'"),
    ("a, b: -> c", "wrong syntax: 'a, b:'; expected 'name, name: type'; correct it"),
    ("a b -> c", "wrong syntax: 'a b'"),
    ("*a -> b", "wrong syntax: .*; remove stars"),
    ("a = 1 -> b", "wrong syntax: .*; remove stars, slashes and defaults"),
    (
        "a: Persn -> b",
        r"unknown type name: 'Persn'; expected a known type in 'a: Persn'; pass types=",
    ),
    ("a: os.path -> b", "a wrong type: 'os.path'; expected names and brackets"),
    ("a: int[str] -> b", r"a wrong type: 'int\[str\]'; expected a type; correct it"),
    ("a: __import__('os') -> b", "a wrong type: .*; expected names and brackets"),
    ("a: complex -> b", "the type of field 'a' is not understood"),
    ("a: 5 -> b", "the type of field 'a' is not understood"),
    (5, "no signature: 5; expected a text or a function; write 'question -> answer'"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(SignatureError, match=message):
        signature(text)


def star(*things: str) -> str: ...


def test_a_function_with_nameless_parameters_is_refused():
    with pytest.raises(
        SignatureError, match=r"a parameter without a name: '\*things: str'; .*; name each"
    ):
        signature(star)


@pytest.mark.parametrize("name", ["", "two words", "1st", 5, "a-b"])
def test_a_field_needs_a_name(name):
    with pytest.raises(
        SignatureError, match="a bad field name: .*; expected a Python identifier; rename"
    ):
        Field(name)


fields = st.builds(Field, names, st.sampled_from([str, int, list[str]]), st.text(max_size=5))
signatures = st.lists(fields, min_size=2, max_size=5, unique_by=lambda one: one.name).map(
    lambda made: Signature(made[:-1], made[-1:], "Do it.")
)


@given(signatures)
def test_edits_are_pure_and_undo_each_other(made):
    before = (made.inputs, made.outputs, made.instructions)
    assert made.append(Field("new")).without("new") == made
    assert made.prepend(Field("new"), to="inputs").inputs[0].name == "new"
    name = made.inputs[0].name
    assert made.with_field(name, desc="other").with_field(name, desc=made.inputs[0].desc) == made
    assert made.with_instructions("x").with_instructions("Do it.") == made
    assert (made.inputs, made.outputs, made.instructions) == before


def test_edits_of_a_field_that_is_not_there():
    for edit in (Signature.without, Signature.with_field):
        with pytest.raises(
            SignatureError, match="no such field: 'c'; expected one of a, b; correct"
        ):
            edit(signature("a -> b"), "c")
    with pytest.raises(SignatureError, match="stands twice"):
        signature("a -> b").append(Field("a"))


@attrs.frozen
class Writer:
    name: str
    age: Annotated[int, "in years", attrs.validators.ge(0)] = attrs.field(
        validator=attrs.validators.le(150)
    )


@dataclasses.dataclass
class Span:
    start: int
    end: int

    def __post_init__(self):
        if self.end < self.start:
            raise ValueError("the end comes before the start")


def person(text: Annotated[str, "a letter"], most: Annotated[int, validators.ge(1)] = 3) -> Writer:
    """Find who wrote it.

    Args:
        text: by hand.
        most: how many words to read.
    """


def span(text: str) -> Span:
    """Find the span."""


def test_annotations_and_docstrings_describe_the_fields_of_a_function():
    task = lmopt.signature(person)
    assert task.instructions == "Find who wrote it."
    assert [(f.name, f.words, f.desc) for f in (*task.inputs, *task.outputs)] == [
        ("text", "str", "by hand., a letter"),
        ("most", "int (>= 1)", "how many words to read."),
        ("name", "str", ""),
        ("age", "int (>= 0)", "<= 150, in years"),
    ]
    told = lmopt.signature("a: Annotated[int, 'in km'] -> b", types={"Annotated": Annotated})
    assert (told.inputs[0].words, told.inputs[0].desc) == ("int", "in km")


@pytest.mark.parametrize(
    ("adapter", "form"),
    [
        (lmopt.chat, "[[ ## start ## ]]\n%s\n[[ ## end ## ]]\n%s"),
        (lmopt.json, '{"start": %s, "end": %s}'),
    ],
)
def test_a_class_that_the_outputs_make_checks_them_together(adapter, form):
    find = lmopt.predict(span, adapter=adapter, retries=1)
    assert find(lmopt.scripted_lm([form % (1, 2)]), text="x") == {"start": 1, "end": 2}
    made = find(lmopt.scripted_lm([form % (2, 1), '{"start": 1, "end": 2}']), text="x")
    assert lmopt.coerce(Span, made) == Span(1, 2) and made.usage.calls == 2
    wrong = "the fields do not go together .*the end comes before the start"
    with pytest.raises(lmopt.ParseError, match=wrong):
        adapter.parse(find.signature, lmopt.Response(form % (2, 1)))
    thought = lmopt.chain_of_thought(span)
    with pytest.raises(lmopt.ParseError, match="do not go together"):
        thought(lmopt.scripted_lm([{"reasoning": "", "start": 2, "end": 1}] * 3), text="x")


class Outside:
    class Within(enum.Enum):
        A = "a"


def test_a_class_inside_of_one_is_named_with_a_dot():
    task = lmopt.signature("x -> y: list[Outside.Within]", types={"Outside": Outside})
    assert task.outputs[0].words == 'list[one of "a"]'
    for text in ("x -> y: Outside.Without", "x -> y: Outside.__doc__", "x -> y: os.path"):
        with pytest.raises(SignatureError, match="expected names and brackets"):
            lmopt.signature(text, types={"Outside": Outside})
