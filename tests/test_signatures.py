"""Signatures: three forms, pure edits, and errors that name the place."""

import enum
import typing
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Person, names

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
