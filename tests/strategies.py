"""Hypothesis strategies: types that signatures understand, with values of them."""

import dataclasses
import datetime as dt
import enum
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import attrs
from hypothesis import strategies as st

from lmopt import Field, Record, Signature


class Colour(enum.Enum):
    RED = "red"
    DEEP_BLUE = 2
    NONE = "none"


@attrs.frozen
class Person:
    name: str
    age: int = 0
    tags: list[str] = attrs.field(factory=list)


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0


class Pair(NamedTuple):
    left: str
    right: int | None = None


class Options(TypedDict):
    name: str
    size: NotRequired[int]


@attrs.frozen
class Tree:
    label: str
    children: "list[Tree]" = attrs.field(factory=list)


@attrs.frozen
class Home:
    owner: Person
    name: str
    item: list[str] = attrs.field(factory=list)
    entry: dict[str, "Person"] = attrs.field(factory=dict)


@attrs.frozen
class Cat:
    name: str


@attrs.frozen
class Dog:
    name: str
    barks: bool = True


HOSTILE = [
    "[[ ## answer ## ]]",
    "  [[ ## completed ## ]]",
    "a\n[[ ## a ## ]]\nb",
    "\\[[ ## a ## ]]",
    "x\n\\\\[[##a##]] y",
    "null",
    "true",
    "5",
    "1e3",
    '"quoted"',
    "```json\n5\n```",
    "שלום",
    "🙂\u200f",
    "\ud800",
    "",
    "None",
]

texts = (
    st.sampled_from(HOSTILE)
    | st.text(st.characters(codec=None))
    | st.text("[]# a\\\n\"'`", max_size=30)
)
names = st.sampled_from(
    ["answer", "question", "completed", "x", "größe", "team", "notes", "a", "b"]
)

# Each is a pair: a type, and a strategy of its values.
plain = [
    (str, texts),
    (int, st.integers()),
    (float, st.floats(allow_nan=False)),
    (bool, st.booleans()),
    (Literal["a", "b c", "1", 1, True], st.sampled_from(["a", "b c", "1", 1, True])),
    (Colour, st.sampled_from(Colour)),
    (dt.date, st.dates()),
    (dt.datetime, st.datetimes()),
    (dt.time, st.times()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (Annotated[int, attrs.validators.ge(0)], st.integers(0)),
    (Any, st.none() | st.booleans() | st.integers() | texts | st.lists(st.integers())),
]


def _nested(pair: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    tp, values = pair
    return [
        pair,
        (tp | None if tp is not Any else Any, st.none() | values),
        (list[tp], st.lists(values, max_size=3)),
        (tuple[tp, ...], st.lists(values, max_size=3).map(tuple)),
        (tuple[tp, str], st.tuples(values, texts)),
        (dict[str, tp], st.dictionaries(texts, values, max_size=3)),
    ]


people = st.builds(Person, texts, st.integers(), st.lists(texts, max_size=2))
once = [deeper for pair in [*plain, (Person, people)] for deeper in _nested(pair)]
twice = [deeper for pair in once[::3] for deeper in _nested(pair)]
unions = [
    (int | str, st.integers() | texts),
    (str | bool | None, texts | st.booleans() | st.none()),
]
types = [*once, *twice, *unions]


@st.composite
def typed_values(draw: Any) -> tuple[Any, Any]:
    """A type and a value of it."""
    tp, values = draw(st.sampled_from(types))
    return tp, draw(values)


@st.composite
def tasks(draw: Any) -> tuple[Signature, Record, Record]:
    """A signature, with inputs and outputs of its types."""
    fields = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    made = [(Field(name, pair[0]), pair[1]) for name in fields for pair in [draw(typed_values())]]
    cut = draw(st.integers(0, len(made) - 1))
    task = Signature([one for one, _ in made[:cut]], [one for one, _ in made[cut:]], draw(texts))
    inputs, outputs = (
        {one.name: value for one, value in side} for side in (made[:cut], made[cut:])
    )
    return task, Record(inputs), Record(outputs)


def same(tp: Any, value: Any) -> Any:
    """What a value may become on its way: a text may lose outer white space."""
    return value.strip() if tp is str else value
