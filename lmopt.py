# MIT License
#
# Copyright (c) 2026 The lmopt authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""Program language models with pure functions over immutable prompts.

A program describes what to do by yielding effects; a driver performs them; all that can be learned
is one immutable value, `Params`, which the optimizers of `lmopt_optimizers` map to a better one.

>>> qa = predict("question -> answer")
>>> qa(scripted_lm([{"answer": "Paris"}]), question="What is the capital of France?").answer
'Paris'

Sections: 1 Errors · 2 Records · 3 Types · 4 Signatures · 5 Messages · 6 Adapters · 7 Programs ·
8 Drivers · 9 Modules · 10 LMs · 11 Evaluation · 12 Storage
"""

from __future__ import annotations

import ast
import base64
import builtins
import csv
import dataclasses
import difflib
import email.utils
import enum
import hashlib
import html
import inspect
import io
import json as jsonlib  # `json` is an adapter here
import math
import mimetypes
import os
import random
import re
import statistics
import threading
import time
import types as pytypes
import typing
import unicodedata
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import date, datetime
from datetime import time as clock
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import attrs
from attrs import evolve, field, frozen
from toolz import (  # type: ignore[import-untyped]
    concat,
    first,
    get_in,
    groupby,
    partition,
    partitionby,
    unique,
    valfilter,
)

if TYPE_CHECKING:
    import httpx

__version__ = "0.1.0"

__all__ = [
    # 1. Errors
    "LmoptError", "SignatureError", "ParamsError", "DataError", "MetricError", "ParseError",
    "LMError", "RateLimited", "ContextWindowExceeded", "Unauthorized", "LMTimeout",
    "BudgetExceeded", "ReplayMiss",
    # 2. Records
    "Record", "Prediction", "Event", "Usage", "jsonable", "canonical", "seeded",
    # 4. Signatures
    "Field", "Signature", "signature",
    # 5. Messages
    "Image", "Audio", "File", "Message", "History", "Tool", "ToolCall", "Request", "Response",
    "LM", "transcript",
    # 6. Adapters
    "Adapter", "chat", "xml", "plain", "two_step", "render_outputs",
    # 7. Programs
    "Prompt", "Params", "Program", "program", "Run", "Call", "Sleep", "invoke", "preview",
    # 8. Drivers
    "run", "run_many",
    # 9. Modules
    "predict", "chain_of_thought", "pipeline",
    # 10. LMs
    "scripted_lm", "mock_lm", "stub_lm", "toy_lm", "openai_lm", "anthropic_lm",
    "connect",
    # 11. Evaluation
    "Score", "Row", "Evaluation", "Metric", "evaluate", "Comparison", "compare", "normalize",
    "exact_match", "f1",
    # 12. Storage
    "save", "load", "dumps", "loads", "diff", "read_examples",
]  # fmt: skip

T = TypeVar("T")
V = TypeVar("V")
M = TypeVar("M", bound="Media")

# == 1. Errors =====================================================================================
# Split by whose fault it is: yours, the model's, the world's, and those that are yours to plan for.


def cut(text: str, limit: int = 200) -> str:
    """Shorten a text to `limit` characters.

    >>> cut("abcdef", 4)
    'abc…'
    """
    return text if len(text) <= limit else text[: limit - 1] + "…"


def explain(what: str, value: object, expected: str, todo: str) -> str:
    """Word an error: what was wrong, the value (cut), what was expected, what to do.

    >>> explain("unknown colour", "rde", "'red' or 'blue'", "correct the name")
    "unknown colour: 'rde'; expected 'red' or 'blue'; correct the name"
    """
    return f"{what}: {cut(repr(value))}; expected {expected}; {todo}"


def describe(error: BaseException) -> str:
    """Return class and message of an error.

    >>> describe(ValueError("no"))
    'ValueError: no'
    """
    return f"{type(error).__name__}: {error}"


class LmoptError(Exception):
    """Base of every error raised here: made of a message, or of the four parts of `explain`.

    Facts beyond the message are attributes, which the classes declare; `best` holds the parameters
    that an optimizer had when this error stopped it.
    """

    best: Params | None = None

    def __init__(self, *parts: Any, **facts: Any) -> None:
        super().__init__(explain(*parts) if len(parts) > 1 else parts[0])
        vars(self).update(facts)


class SignatureError(LmoptError, ValueError):
    """A signature or a program is declared wrongly."""


class ParamsError(LmoptError, ValueError):
    """Parameters do not fit the program, or their file cannot be read."""


class DataError(LmoptError, ValueError):
    """An example, an input or a data file is not what was declared."""


class MetricError(DataError):
    """A metric raised, or returned no score; `rows` holds what was already evaluated."""

    rows: tuple[Row, ...] = ()


class ParseError(LmoptError, ValueError):
    """A reply does not hold the fields asked for; its raw text is in `response.text`."""

    field: str | None = None
    request: Request | None = None
    response: Response | None = None


class LMError(LmoptError, RuntimeError):
    """A language model could not be asked; `retryable` tells whether asking again may help."""

    status: int | None = None
    body: str = ""
    retryable: bool = False
    retry_after: float | None = None


class RateLimited(LMError):
    """The provider says: not so fast (HTTP 429); wait `retry_after` seconds if it is given."""


class ContextWindowExceeded(LMError):
    """The prompt is longer than the model can read."""


class Unauthorized(LMError, PermissionError):
    """The API key is missing, wrong, or not allowed to do this (HTTP 401, 403)."""


class LMTimeout(LMError, TimeoutError):
    """The provider did not answer in time."""


class BudgetExceeded(LmoptError, RuntimeError):
    """The next call would spend more than was allowed."""


class ReplayMiss(LmoptError, LookupError):
    """An LM that only answers from a record has no answer for this request."""


# == 2. Records ====================================================================================


def jsonable(
    value: Any,
    *,
    other: Callable[[Any], Any] | None = None,
    media: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a value as plain JSON data: dicts, lists, strings, numbers, booleans and None.

    Of an attrs object, the attributes that take part in equality are written.

    Args:
        value: any value of the types that signatures understand.
        other: called with a value that is none of them; without it that is an error.
        media: called with each image, audio or file; without it they are written out.

    Raises:
        DataError: the value has no JSON form.

    >>> jsonable(Record(tags={"b", "a"}, who=Usage(calls=1)))["tags"]
    ['a', 'b']
    """
    if type(value) in (str, int, float, bool, type(None)):
        return value
    turn = partial(jsonable, other=other, media=media)
    if isinstance(value, Media) and media:
        return media(value)
    for fits, simpler in _SIMPLER:
        if fits(value):
            return turn(simpler(value))
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(turn(key)): turn(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [turn(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((turn(item) for item in value), key=canonical)
    if other is not None:
        return other(value)
    kind = type(value).__name__
    raise DataError(f"a {kind} has no JSON form", value, "plain data", "convert it first")


def _attrs_dict(value: Any) -> dict[str, Any]:
    known = [a for a in attrs.fields(type(value)) if a.eq]
    return {a.alias or a.name: getattr(value, a.name) for a in known}


def _dataclass_dict(value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}


# What kind of value it is, and the simpler value that stands for it in JSON.
_SIMPLER: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any]], ...] = (
    (lambda value: isinstance(value, enum.Enum), lambda value: value.value),
    (lambda value: isinstance(value, (date, clock)), lambda value: value.isoformat()),
    (lambda value: isinstance(value, Decimal), str),
    (
        lambda value: isinstance(value, Media),
        lambda value: {value.kind: value.url, "name": value.name},
    ),
    (lambda value: attrs.has(type(value)), _attrs_dict),
    (lambda value: hasattr(type(value), "__dataclass_fields__"), _dataclass_dict),
    (lambda value: hasattr(type(value), "model_dump"), lambda value: value.model_dump(mode="json")),
    (lambda value: hasattr(type(value), "_asdict"), lambda value: value._asdict()),
)


def canonical(value: Any, *, other: Callable[[Any], Any] | None = None) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, the same on every machine.

    >>> canonical({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    data = jsonable(value, other=other)
    return _dump(data, sort_keys=True, separators=(",", ":"))


def _dump(data: Any, **layout: Any) -> str:
    # A lone surrogate cannot be encoded; its backslash escape is what JSON would write for it.
    text = jsonlib.dumps(data, ensure_ascii=False, **layout)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _named(kind: str, mapping: Any) -> dict[str, Any]:
    """Copy a mapping whose keys are names."""
    try:
        data = dict(mapping)
    except (TypeError, ValueError) as error:
        todo = "pass a dict or name=value"
        raise DataError(f"a {kind} needs names", mapping, "a mapping", todo) from error
    for name in data:
        if not isinstance(name, str):
            raise DataError("a name is no text", name, "a str", "rename the field")
    return data


class _Frozen(Mapping[str, V]):
    """An immutable mapping from names; equal when it would be written as the same JSON."""

    __slots__ = ("_data",)
    _data: dict[str, V]

    def __init__(self, mapping: Any = (), /, **fields: V) -> None:
        ours = _Frozen in type(mapping).__mro__  # isinstance of an abstract class is slow
        data = mapping._data if ours else _named(type(self).__name__, mapping)
        object.__setattr__(self, "_data", {**data, **fields} if fields else data)

    def __getitem__(self, name: str) -> V:
        return self._data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __contains__(self, name: object) -> bool:
        return name in self._data

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return canonical(self, other=repr) == canonical(other, other=repr)

    def __hash__(self) -> int:
        return hash(canonical(self, other=repr))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._data.items())
        return f"{type(self).__name__}({fields})"

    def __setattr__(self, name: str, value: object) -> None:
        kind = type(self).__name__
        todo = f"make a new one: record | {{{name!r}: value}}"
        raise AttributeError(explain(f"a {kind} never changes", name, "no assignment", todo))

    def __delattr__(self, name: str) -> None:
        setattr(self, name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data,)


class Record(_Frozen[Any]):
    """An immutable mapping with attribute access: an example, inputs, outputs, a demonstration.

    A name that the class itself defines wins over a field of that name: `record["items"]` always
    reaches the field. Values are kept as they are given; do not change a list inside a record.

    >>> r = Record(question="2+2?", answer=4)
    >>> r.answer, r | {"answer": 5}, Record.from_json(r.to_json()) == r
    (4, Record(question='2+2?', answer=5), True)
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        # Pickle and copy look for special names on an object that has no _data yet.
        if name.startswith("_") and (name == "_data" or name not in self._data):
            raise AttributeError(name)
        try:
            return self._data[name]
        except KeyError:
            known = ", ".join(self._data) or "none"
            problem = explain("no such field", name, f"one of: {known}", "correct the name")
            raise AttributeError(problem) from None

    def __or__(self, other: Mapping[str, Any]) -> Record:
        return Record({**self._data, **other})

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._data]

    def to_json(self) -> str:
        """Return the fields as one line of JSON, in their own order."""
        return _dump(jsonable(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Return a record from the text of a JSON object.

        Raises:
            DataError: the text is not one JSON object.
        """
        try:
            data = jsonlib.loads(text)
        except ValueError as error:
            raise DataError(
                "this is no JSON", text, "one JSON object", f"correct it: {error}"
            ) from error
        if not isinstance(data, dict):
            raise DataError("no JSON object", text, "{...}", "wrap the value in an object")
        return cls(data)


class Prediction(Record):
    """The record that a program returns, with the `trace` of how it came about.

    Two predictions are equal when their fields are.

    >>> Prediction({"answer": "4"}).usage.calls
    0
    """

    __slots__ = ("trace",)
    trace: tuple[Event, ...]

    def __init__(self, mapping: Any = (), /, *, trace: Iterable[Event] = (), **fields: Any) -> None:
        super().__init__(mapping, **fields)
        object.__setattr__(self, "trace", tuple(trace))

    @property
    def usage(self) -> Usage:
        """What the LM requests of the trace cost together."""
        return usage(self.trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return _prediction, (self._data, self.trace)


def _prediction(data: dict[str, Any], trace: tuple[Event, ...]) -> Prediction:
    return Prediction(data, trace=trace)


@frozen
class Usage:
    """What LM calls cost: calls, tokens, and US dollars where the price is known.

    >>> Usage(calls=1, input_tokens=9) + Usage(calls=1, output_tokens=2)
    Usage(calls=2, input_tokens=9, output_tokens=2, cached_tokens=0, cost=0.0)
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        mine, theirs = attrs.astuple(self), attrs.astuple(other)
        return Usage(*(a + b for a, b in zip(mine, theirs, strict=True)))


def _owned(data: dict[str, Any]) -> Record:
    """Make a record of a dict that is nobody else's and has names for keys: no check, no copy."""
    made = Record.__new__(Record)
    object.__setattr__(made, "_data", data)
    return made


def _tuple(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(values)


def _record(value: Mapping[str, Any]) -> Record:
    return value if type(value) is Record else Record(value)


def _records(values: Iterable[Mapping[str, Any]]) -> tuple[Record, ...]:
    return tuple(map(_record, values))


@frozen
class Event:
    """One finished run of a step, one LM request, or one other effect.

    A trace lists them in the order in which they were yielded, a step after what it did.

    Attributes:
        path: of the step; for "lm" of the step that asked; for "call" with the function's name.
        kind: "step", "lm" or "call".
        inputs: the fields given to a step, or the arguments of a call.
        outputs: the fields a step returned, or the result of a call.
        request: of an "lm" event.
        response: of an "lm" event that succeeded.
        error: class and message where it failed, else "".
        parent: path of the step in which it happened, "" for the program itself.
        seconds: how long it took; takes no part in equality.
    """

    path: str
    kind: Literal["step", "lm", "call"]
    inputs: Any = None
    outputs: Any = None
    request: Request | None = None
    response: Response | None = None
    error: str = ""
    parent: str = ""
    seconds: float = field(default=0.0, eq=False)


def usage(trace: Iterable[Event]) -> Usage:
    """Sum what the LM requests of a trace cost.

    >>> usage([Event("predict", "lm", response=Response("hi", usage=Usage(input_tokens=3)))])
    Usage(calls=1, input_tokens=3, output_tokens=0, cached_tokens=0, cost=0.0)
    """
    events = list(trace)
    answers = [event.response or event.outputs for event in events]  # an LM may also be invoked
    spent = sum((one.usage for one in answers if isinstance(one, Response)), Usage())
    asked = [e for e in events if e.kind == "lm" or isinstance(e.outputs, Response)]
    return evolve(spent, calls=len(asked))


def seeded(seed: int, *purpose: object) -> random.Random:
    """Return the random generator of one purpose, so that no order of threads can matter.

    Args:
        seed: any integer, 0 included.
        purpose: what the choices are for, and an index where there are several.

    >>> seeded(0, "shuffle", 1).random() == seeded(0, "shuffle", 1).random()
    True
    """
    return random.Random("/".join(map(str, (seed, *purpose))))


# == 3. Types ======================================================================================
# One row of `_KINDS` for each kind of type: how to recognise it, describe it in words and in JSON
# schema, make a value from what a model wrote, and invent a value. Nothing is remembered between
# calls, because types that compare equal may read differently: Literal["a", "b"] and ["b", "a"].


@frozen
class _Kind:
    """A kind of type: five functions of the type."""

    fits: Callable[[Any], bool]
    words: Callable[[Any, _Inside], str]
    schema: Callable[[Any, _Defs], dict[str, Any]]
    coerce: Callable[[Any, Any], Any]  # (type, JSON data) -> value, or ValueError
    sample: Callable[[Any, _Inside], Any]
    structured: bool = False  # written as a JSON list or object


_Inside = tuple[
    Any, ...
]  # the classes around a type, so that one that holds itself comes to an end
_Defs = dict[Any, dict[str, Any]]  # the schemas of the classes met so far


def _kind(tp: Any) -> _Kind:
    for kind in _KINDS:
        if kind.fits(tp):
            return kind
    known = "str, int, float, bool, Literal, an Enum, X | None, list, dict, a class with attributes"
    raise SignatureError("unknown type", tp, known, "use one of these")


def words(tp: Any) -> str:
    """Describe a type in the few words that a prompt has room for.

    Raises:
        SignatureError: the type, or a type inside it, is not understood.

    >>> words(Literal["billing", "bug"]), words(list[float | None])
    ('one of "billing", "bug"', 'list[float or null]')
    """
    return _words(tp, ())


def _words(tp: Any, inside: _Inside) -> str:
    return _kind(tp).words(tp, inside)


def json_schema(tp: Any) -> dict[str, Any]:
    """Return the JSON schema of a type (draft 2020-12), within what strict providers accept.

    Every property is required and no other is allowed; an open dict is a list of key and value.

    Raises:
        SignatureError: the type, or a type inside it, is not understood.

    >>> json_schema(list[int | None])
    {'type': 'array', 'items': {'anyOf': [{'type': 'integer'}, {'type': 'null'}]}}
    """
    defs: _Defs = {}
    made = _schema(tp, defs)
    named = {_def_name(one, defs): schema for one, schema in defs.items()}
    return {**made, "$defs": named} if defs else made


def _schema(tp: Any, defs: _Defs) -> dict[str, Any]:
    return _kind(tp).schema(tp, defs)


def coerce(tp: Any, data: Any) -> Any:
    """Make a value of a type from JSON data, forgiving what models commonly write.

    Raises:
        ValueError: the data is not such a value; says what was expected, and where.

    >>> coerce(list[int], ["1,000", 2.0]), coerce(bool, "Yes"), coerce(list[int], 3)
    ([1000, 2], True, [3])
    """
    return _kind(tp).coerce(tp, data)


def read(tp: Any, text: str) -> Any:
    """Make a value of a type from the text of a reply: `str` verbatim, anything else as JSON.

    Raises:
        ValueError: the text is no such value.

    >>> read(str, "null"), read(str | None, "null"), read(list[str], "['a',]"), read(int, "7")
    ('null', None, ['a'], 7)
    """
    if tp is str:
        return text
    if tp is Decimal:
        return coerce(tp, text)  # digit by digit: JSON would make a float of it
    # Prose is a value as it stands where a text is one of the alternatives.
    free = tp is Any or (_is_union(tp) and str in typing.get_args(tp))
    data = _data(text, lenient=not free)
    try:
        value = coerce(tp, data)
    except ValueError:
        with suppress(ValueError):
            return coerce(tp, text)
        raise  # what was wrong with the data says more than that the text is none
    # 1e3 is a number in JSON, but where a text is wanted it is these very characters.
    return text if isinstance(value, str) and not isinstance(data, str) else value


def write(tp: Any, value: Any) -> str:
    """Return the text of a value, such that `read(tp, write(tp, value))` is the value.

    >>> write(int, 7), write(list[str], ["a"]), write(str | None, "null"), write(bool, True)
    ('7', '["a"]', '"null"', 'true')
    """
    data = jsonable(value)
    if not isinstance(data, str):
        return _dump(data)
    return data if tp is str or _reads_back(tp, data) else _dump(data)


def _reads_back(tp: Any, text: str) -> bool:
    try:
        return text == text.strip() and jsonable(read(tp, text)) == text
    except ValueError:
        return False


def sample(tp: Any) -> Any:
    """Invent a plain value of a type, always the same one.

    >>> sample(list[Literal["a", "b"]])
    ['a']
    """
    return _sample(tp, ())


def _sample(tp: Any, inside: _Inside) -> Any:
    return _kind(tp).sample(tp, inside)


# -- From text to JSON data --

# Punctuation, a string in double or single quotes, or a bare word.
_TOKEN = re.compile(
    r"""[\s]*+(?:([][{}():,])|"((?:[^"\\]|\\.)*+)"|'((?:[^'\\]|\\.)*+)'|([^][{}():,\s"']++))""",
    re.DOTALL,
)
_BARE = {"true": True, "false": False, "null": None, "none": None}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def _data(text: str, *, lenient: bool = True) -> Any:
    """Return the JSON data that a text is, holds in a fenced block, or is meant to be; else it.

    Lenient, it looks for an opening bracket in prose, and forgives single quotes, trailing commas,
    bare keys and Python's constants; an end that is missing it never forgives.
    """
    fenced = [block.partition("\n")[2] for block in text.split("```", 2)[1:2]]
    for candidate in (text, *fenced):
        with suppress(ValueError, RecursionError):
            return jsonlib.loads(candidate)
    if text.strip().lower() in _BARE:
        return _BARE[text.strip().lower()]
    for candidate in (*fenced, text) if lenient else ():
        opening = re.search(r"[\[{]|\A\s*\(", candidate)
        with suppress(ValueError, RecursionError):
            if opening:
                return _relaxed(candidate, opening.end() - 1)[0]
    return text


def _relaxed(text: str, start: int) -> tuple[Any, int]:
    """Read one value that begins at `start`; return it and where it ends."""
    token = _TOKEN.match(text, start)
    if token is None:
        raise ValueError("the text ends too early")
    mark, double, single, bare = token.groups()
    if mark is None:
        return (_bare(bare) if bare is not None else _string(double, single)), token.end()
    if mark not in _CLOSING:
        raise ValueError(f"{mark!r} where a value should be")
    items, end = _relaxed_items(text, token.end(), _CLOSING[mark])
    return (dict(items) if mark == "{" else items), end


def _relaxed_items(text: str, start: int, closing: str) -> tuple[list[Any], int]:
    items: list[Any] = []
    while not (token := _TOKEN.match(text, start)) or token[1] != closing:
        value, start = _relaxed(text, start)
        if closing == "}":
            start = _after(":", text, start)
            content, start = _relaxed(text, start)
            value = (value if isinstance(value, str) else _dump(value), content)
        items.append(value)
        token = _TOKEN.match(text, start)
        if token and token[1] == ",":
            start = token.end()
        elif not token or token[1] != closing:
            raise ValueError(f"no comma and no {closing!r}")
    return items, token.end()


def _after(mark: str, text: str, start: int) -> int:
    token = _TOKEN.match(text, start)
    if not token or token[1] != mark:
        raise ValueError(f"no {mark!r}")
    return token.end()


def _bare(word: str) -> Any:
    """A bare word: a constant, a number, or else a text without its quotes."""
    try:
        return _BARE[word.lower()] if word.lower() in _BARE else jsonlib.loads(word)
    except ValueError:
        return word


def _string(double: str | None, single: str | None) -> str:
    """The text of a string; one in single quotes is first written as JSON would."""
    swap = {"\\'": "'", '"': '\\"'}
    other = re.sub(r"\\.|\"", lambda match: swap.get(match[0], match[0]), single or "")
    text: str = jsonlib.loads(f'"{other if double is None else double}"', strict=False)
    return text


# -- From JSON data to values --


def _not(expected: str, value: Any) -> ValueError:
    return ValueError(f"{cut(repr(value), 80)} is not {expected}")


def _build(data: Any, make: Callable[..., T], *parts: Any, **named: Any) -> T:
    """Build a value; whatever a constructor, converter or validator raises, the data is refused."""
    try:
        return make(*parts, **named)
    except Exception as error:
        raise ValueError(f"{cut(repr(data), 80)} is refused: {error}") from error


def _at(place: str, tp: Any, data: Any) -> Any:
    """Coerce a part, and name its place where that fails."""
    try:
        return coerce(tp, data)
    except ValueError as error:
        raise ValueError(f"at {place}: {error}") from error


_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d*)?([eE][-+]?\d+)?")


def _digits(data: Any) -> str | None:
    """The digits of a number in a text, without currency and commas; None if it is none."""
    text = data.strip().lstrip("$€£") if isinstance(data, str) else ""
    return text.replace(",", "") if _NUMBER.fullmatch(text) else None


def _to_number(tp: Any, data: Any) -> Any:
    value = data
    if (digits := _digits(data)) is not None:
        value = int(digits) if digits.lstrip("+-").isdecimal() else float(digits)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _not(f"a value of type {tp.__name__}", data)
    if tp is int and isinstance(value, float) and not value.is_integer():
        raise _not("a whole number", data)
    return tp(value)


def _to_decimal(tp: Any, data: Any) -> Decimal:
    if isinstance(data, Decimal):
        return data
    plain = _data(data) if isinstance(data, str) and not _digits(data) else data
    number = repr(plain) if type(plain) in (int, float) else plain
    if (digits := _digits(number)) is None:
        raise _not("a decimal number", data)
    return _build(data, Decimal, digits)


def _to_moment(tp: Any, data: Any) -> Any:
    if type(data) is tp:
        return data
    try:
        return tp.fromisoformat(data.strip())
    except (AttributeError, ValueError):
        raise _not(_MOMENTS[tp], data) from None


_MOMENTS = {date: "a date YYYY-MM-DD", datetime: "a time in ISO 8601", clock: "a time HH:MM:SS"}
_FORMATS = {date: "date", datetime: "date-time", clock: "time"}
_SAMPLES = {date: "2000-01-01", datetime: "2000-01-01T00:00:00", clock: "00:00:00"}


def _to_bool(tp: Any, data: Any) -> bool:
    known = {"true": True, "yes": True, "false": False, "no": False}
    if isinstance(data, bool):
        return data
    if isinstance(data, str) and data.strip().lower() in known:
        return known[data.strip().lower()]
    raise _not("true or false", data)


def _to_none(tp: Any, data: Any) -> None:
    if data is not None and str(data).strip().lower() not in ("null", "none"):
        raise _not("null", data)


def _to_text(tp: Any, data: Any) -> str:
    if isinstance(data, str):
        return data
    if isinstance(data, (bool, int, float)):
        return _dump(data)
    raise _not("a text", data)


def _to_any(tp: Any, data: Any) -> Any:
    return data


def _choices(tp: Any) -> tuple[Any, ...]:
    return tuple(tp) if isinstance(tp, enum.EnumMeta) else typing.get_args(tp)


def _choice_words(tp: Any, inside: _Inside) -> str:
    return "one of " + ", ".join(_dump(jsonable(choice)) for choice in _choices(tp))


def _choice_schema(tp: Any, defs: _Defs) -> dict[str, Any]:
    values = [jsonable(choice) for choice in _choices(tp)]
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    kinds = list(dict.fromkeys(names[type(value)] for value in values))
    return {"type": kinds if kinds[1:] else kinds[0], "enum": values}


def _to_choice(tp: Any, data: Any) -> Any:
    """Find the choice whose value is the data, or failing that, reads like it."""
    text = canonical(data, other=repr)
    exact = [choice for choice in _choices(tp) if canonical(choice) == text]
    alike = [choice for choice in _choices(tp) if _loose(data) in map(_loose, _names(choice))]
    if not exact and (len(alike) != 1 or not isinstance(data, str)):
        raise _not(_choice_words(tp, ()), data)
    return first(exact or alike)


def _names(choice: Any) -> list[Any]:
    return [jsonable(choice), *([choice.name] if isinstance(choice, enum.Enum) else [])]


def _loose(text: Any) -> str:
    return str(text).strip(" \t\n\"'`.").casefold()


def _is_union(tp: Any) -> bool:
    return typing.get_origin(tp) in (Union, pytypes.UnionType)


def _to_union(tp: Any, data: Any) -> Any:
    """Take the first alternative that gives the data back as it is, else the first that takes it.

    Text comes last. So the shape of the data is what tells alternatives apart.
    """
    if type(data) in typing.get_args(tp):
        return data
    made = []
    for alternative in sorted(typing.get_args(tp), key=lambda one: one is str):
        with suppress(ValueError):
            made.append(coerce(alternative, data))
    if not made:
        raise _not(words(tp), data)
    text = canonical(data, other=repr)
    exact = (value for value in made if canonical(value, other=repr) == text)
    return next(exact, made[0])


def _item(tp: Any) -> Any:
    return first(typing.get_args(tp) or (Any,))


def _list_words(tp: Any, inside: _Inside) -> str:
    return f"list[{_words(_item(tp), inside)}]"


def _list_schema(tp: Any, defs: _Defs) -> dict[str, Any]:
    return {"type": "array", "items": _schema(_item(tp), defs)}


def _to_items(tp: Any, data: Any) -> Any:
    """Make a list, tuple or set; a single item stands for a list of one."""
    if not isinstance(data, (list, tuple, set, frozenset)):
        if data is None or (isinstance(data, str) and data.lstrip()[:1] in ("", *"[{`")):
            raise _not(f"a JSON list, {words(tp)}", data)
        data = [data]
    items = [_at(f"[{index}]", _item(tp), item) for index, item in enumerate(data)]
    kind: Any = _origin(tp)
    return items if kind is list else _build(data, kind, items)


def _row_words(tp: Any, inside: _Inside) -> str:
    return f"[{', '.join(_words(part, inside) for part in typing.get_args(tp))}]"


def _row_schema(tp: Any, defs: _Defs) -> dict[str, Any]:
    parts = [_schema(part, defs) for part in typing.get_args(tp)]
    items = {"anyOf": list(unique(parts, key=canonical))} if parts else {"type": "null"}
    return {"type": "array", "items": items, "minItems": len(parts), "maxItems": len(parts)}


def _to_row(tp: Any, data: Any) -> tuple[Any, ...]:
    parts = typing.get_args(tp)
    if not isinstance(data, (list, tuple)) or len(data) != len(parts):
        raise _not(f"a JSON list of {len(parts)}, {words(tp)}", data)
    return tuple(_at(f"[{n}]", *pair) for n, pair in enumerate(zip(parts, data, strict=True)))


def _sample_row(tp: Any, inside: _Inside) -> list[Any]:
    return [_sample(part, inside) for part in typing.get_args(tp)]


def _pair(tp: Any) -> tuple[Any, Any]:
    return typing.get_args(tp) or (str, Any)


def _dict_words(tp: Any, inside: _Inside) -> str:
    return f"dict[{', '.join(_words(part, inside) for part in _pair(tp))}]"


def _dict_schema(tp: Any, defs: _Defs) -> dict[str, Any]:
    key, value = (_schema(part, defs) for part in _pair(tp))
    return {"type": "array", "items": _closed({"key": key, "value": value})}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _sample_dict(tp: Any, inside: _Inside) -> dict[str, Any]:
    key, value = (_sample(part, inside) for part in _pair(tp))
    return {str(key): value}


def _to_dict(tp: Any, data: Any) -> dict[Any, Any]:
    key, value = _pair(tp)
    if isinstance(data, list) and all(
        isinstance(one, dict) and one.keys() == {"key", "value"} for one in data
    ):
        data = {_hashable(one["key"]): one["value"] for one in data}  # as the schema asks for it
    if not isinstance(data, Mapping):
        raise _not(f"a JSON object, {words(tp)}", data)
    pairs = [(_at("a key", key, k), _at(f"{k!r}", value, one)) for k, one in data.items()]
    return _build(data, dict, pairs)


def _hashable(key: Any) -> Any:
    return key if isinstance(key, (str, int, float, bool)) else _dump(key)


def _to_record(tp: Any, data: Any) -> Record:
    return Record(_to_dict(dict, data))


@frozen
class _Attribute:
    """One attribute of a class, whatever kind of class it is."""

    name: str
    type: Any
    required: bool = True
    desc: str = ""


def _attributes(tp: Any) -> tuple[_Attribute, ...] | None:
    """The attributes that a class is made from; None for a type that is no such class."""
    if not isinstance(tp, type):
        return None
    read_one = next((make for fits, make in _CLASSES if fits(tp)), None)
    return (
        None
        if read_one is None
        else tuple(read_one(tp, typing.get_type_hints(tp, include_extras=True)))
    )


def _attrs_class(tp: Any, hints: Mapping[str, Any]) -> Iterator[_Attribute]:
    for a in attrs.fields(tp):
        if a.init:
            limits = [str(a.metadata.get("desc", "")), *_limits(a.validator)]
            desc = ", ".join(filter(None, limits))
            required = a.default is attrs.NOTHING
            yield _Attribute(a.alias or a.name, hints.get(a.name, Any), required, desc)


def _limits(validator: Any) -> list[str]:
    """Word what an attrs validator demands; one of your own is worded by its docstring."""
    if validator is None or isinstance(validator, type(attrs.validators.instance_of(int))):
        return []
    if inner := getattr(validator, "_validators", None):
        return list(concat(map(_limits, inner)))
    named: dict[str, Callable[[Any], str]] = {
        "bound": lambda v: f"{v.compare_op} {v.bound}",
        "min_length": lambda v: f"length at least {v.min_length}",
        "max_length": lambda v: f"length at most {v.max_length}",
        "options": lambda v: f"one of {', '.join(_dump(jsonable(one)) for one in v.options)}",
        "pattern": lambda v: f"matching {v.pattern.pattern}",
        "validator": lambda v: ", ".join(_limits(v.validator)),
    }
    for name, worded in named.items():
        if hasattr(validator, name):
            return [worded(validator)]
    return (inspect.getdoc(validator) or "").split("\n")[:1]


def _data_class(tp: Any, hints: Mapping[str, Any]) -> Iterator[_Attribute]:
    missing = dataclasses.MISSING
    for a in dataclasses.fields(tp):
        if a.init:
            required = a.default is missing and a.default_factory is missing
            yield _Attribute(a.name, hints[a.name], required, str(a.metadata.get("desc", "")))


def _typed_dict(tp: Any, hints: Mapping[str, Any]) -> Iterator[_Attribute]:
    for name, kind in hints.items():
        outer = typing.get_origin(kind) in (typing.Required, typing.NotRequired)
        yield _Attribute(name, _item(kind) if outer else kind, name in tp.__required_keys__)


def _named_tuple(tp: Any, hints: Mapping[str, Any]) -> Iterator[_Attribute]:
    for name in tp._fields:
        yield _Attribute(name, hints.get(name, Any), name not in tp._field_defaults)


def _pydantic_model(tp: Any, hints: Mapping[str, Any]) -> Iterator[_Attribute]:
    for name, info in tp.model_fields.items():
        desc = ", ".join([info.description or "", *map(repr, info.metadata)]).strip(", ")
        yield _Attribute(name, info.annotation, info.is_required(), desc)


_CLASSES: tuple[tuple[Callable[[Any], bool], Callable[..., Iterator[_Attribute]]], ...] = (
    (attrs.has, _attrs_class),
    (dataclasses.is_dataclass, _data_class),
    (typing.is_typeddict, _typed_dict),
    (lambda tp: issubclass(tp, tuple) and hasattr(tp, "_fields"), _named_tuple),
    (lambda tp: hasattr(tp, "model_fields") and hasattr(tp, "model_validate"), _pydantic_model),
)


def _object_words(tp: Any, inside: _Inside) -> str:
    if tp in inside:
        return str(tp.__name__)
    parts = [_attribute_words(one, (*inside, tp)) for one in _attributes(tp) or ()]
    body = "{" + ", ".join(parts) + "}"
    recursive = re.search(rf"\b{tp.__name__}\b", body)
    return f"{tp.__name__} {body}" if recursive else body


def _attribute_words(one: _Attribute, inside: _Inside) -> str:
    desc = f" ({one.desc})" if one.desc else ""
    return f"{one.name}: {_words(one.type, inside)}{desc}"


def _object_schema(tp: Any, defs: _Defs) -> dict[str, Any]:
    if tp not in defs:
        defs[tp] = {}  # it may hold itself
        properties = {}
        for one in _attributes(tp) or ():
            note = {"description": one.desc} if one.desc else {}
            properties[one.name] = {**_schema(one.type, defs), **note}
        defs[tp] = _closed(properties)
    return {"$ref": f"#/$defs/{_def_name(tp, defs)}"}


def _def_name(tp: Any, defs: _Defs) -> str:
    """The name of a class; numbered where another class has it already."""
    alike = [one for one in defs if one.__name__ == tp.__name__]
    place = alike.index(tp)
    return f"{tp.__name__}{place + 1}" if place else str(tp.__name__)


def _to_object(tp: Any, data: Any) -> Any:
    if not typing.is_typeddict(tp) and isinstance(data, tp):
        return data
    if not isinstance(data, Mapping):
        raise _not(f"a JSON object, {words(tp)}", data)
    known = _attributes(tp) or ()
    missing = [a.name for a in known if a.required and a.name not in data]
    if missing:
        raise ValueError(f"{cut(repr(data), 80)} has no {missing[0]!r}; expected {words(tp)}")
    given = {a.name: _at(a.name, a.type, data[a.name]) for a in known if a.name in data}
    return _build(data, tp, **given)


def _sample_object(tp: Any, inside: _Inside) -> dict[str, Any]:
    return {a.name: _sample(a.type, (*inside, tp)) for a in _attributes(tp) or ()}


def _noted_words(tp: Any, inside: _Inside) -> str:
    notes = concat([one] if isinstance(one, str) else _limits(one) for one in tp.__metadata__)
    return f"{_words(tp.__origin__, inside)} ({', '.join(notes)})"


def _to_noted(tp: Any, data: Any) -> Any:
    """Coerce, then ask the attrs validators in the annotation."""
    value = coerce(tp.__origin__, data)
    checks: list[Any] = list(filter(callable, tp.__metadata__))
    for check in checks:
        _build(data, check, None, _Attribute("value", tp.__origin__), value)
    return value


def _origin(tp: Any) -> Any:
    return typing.get_origin(tp) or tp


def _is_media(tp: Any) -> bool:
    return isinstance(tp, type) and issubclass(tp, Media)


def _to_media(tp: Any, data: Any) -> Any:
    if isinstance(data, tp):
        return data
    given = {"url": data} if isinstance(data, str) else data
    if not isinstance(given, Mapping) or not (url := given.get(tp.kind, given.get("url"))):
        raise _not(f"the URL or data URI of {tp.kind}", data)
    return tp(url, given.get("name", ""))


def _is(*types: Any) -> Callable[[Any], bool]:
    return lambda tp: any(tp is one for one in types)


def _made_of(*origins: Any) -> Callable[[Any], bool]:
    return lambda tp: any(_origin(tp) is one for one in origins)


def _is_row(tp: Any) -> bool:
    return typing.get_origin(tp) is tuple and typing.get_args(tp)[1:] != (...,)


def _scalar(tp: Any, name: str, kind: str, coerce: Callable[[Any, Any], Any], value: Any) -> _Kind:
    """A kind of a single type that has no parts."""
    return _Kind(_is(tp), lambda *_: name, lambda *_: {"type": kind}, coerce, lambda *_: value)


def _moment(tp: Any) -> _Kind:
    schema = {"type": "string", "format": _FORMATS[tp]}
    name = _MOMENTS[tp].partition(" ")[2]
    return _Kind(_is(tp), lambda *_: name, lambda *_: schema, _to_moment, lambda *_: _SAMPLES[tp])


_SCALARS = {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")]}

_KINDS = (
    _scalar(str, "str", "string", _to_text, "text"),
    _scalar(int, "int", "integer", _to_number, 1),
    _scalar(float, "float", "number", _to_number, 1.0),
    _scalar(bool, "true or false", "boolean", _to_bool, True),
    _scalar(None, "null", "null", _to_none, None),
    _scalar(type(None), "null", "null", _to_none, None),
    _scalar(Decimal, "decimal number", "string", _to_decimal, "1"),
    *map(_moment, _MOMENTS),
    _Kind(_is(Any), lambda *_: "any", lambda *_: _SCALARS, _to_any, lambda *_: "text"),
    _Kind(
        lambda tp: _origin(tp) is Literal or isinstance(tp, enum.EnumMeta),
        _choice_words,
        _choice_schema,
        _to_choice,
        lambda tp, inside: jsonable(_choices(tp)[0]),
    ),
    _Kind(
        _is_union,
        lambda tp, inside: " or ".join(_words(one, inside) for one in typing.get_args(tp)),
        lambda tp, defs: {"anyOf": [_schema(one, defs) for one in typing.get_args(tp)]},
        _to_union,
        lambda tp, inside: _sample(
            next(one for one in typing.get_args(tp) if one not in inside), inside
        ),
    ),
    _Kind(
        lambda tp: hasattr(tp, "__metadata__"),
        _noted_words,
        lambda tp, defs: _schema(tp.__origin__, defs),
        _to_noted,
        lambda tp, inside: _sample(tp.__origin__, inside),
    ),
    _Kind(
        _is_media,
        lambda tp, inside: str(tp.kind),
        lambda *_: {"type": "string"},
        _to_media,
        lambda tp, inside: f"data:{tp.kind}/x;base64,AA==",
    ),
    _Kind(_is_row, _row_words, _row_schema, _to_row, _sample_row, structured=True),
    _Kind(
        _made_of(list, tuple, set, frozenset),
        _list_words,
        _list_schema,
        _to_items,
        lambda tp, inside: [] if _item(tp) in inside else [_sample(_item(tp), inside)],
        structured=True,
    ),
    _Kind(
        _made_of(dict, Mapping), _dict_words, _dict_schema, _to_dict, _sample_dict, structured=True
    ),
    _Kind(_is(Record), _dict_words, _dict_schema, _to_record, _sample_dict, structured=True),
    _Kind(
        lambda tp: _attributes(tp) is not None,
        _object_words,
        _object_schema,
        _to_object,
        _sample_object,
        structured=True,
    ),
)


# == 4. Signatures =================================================================================


def _check_name(name: str) -> None:
    if not (isinstance(name, str) and name.isidentifier()):
        raise SignatureError("a bad field name", name, "a Python identifier", "rename the field")


@frozen
class Field:
    """One input or output of a signature.

    Attributes:
        name: a Python identifier.
        type: any type that `words` understands.
        desc: what it holds, shown in the prompt.
        default: for an input that may be left out.

    >>> Field("age", int, "in years")
    Field(name='age', type=<class 'int'>, desc='in years')
    """

    name: str = field(validator=lambda self, attribute, name: _check_name(name))
    type: Any = str
    desc: str = ""
    default: Any = field(factory=lambda: attrs.NOTHING, repr=False)
    words: str = field(init=False, eq=False, repr=False)
    holds_media: bool = field(init=False, eq=False, repr=False)

    @words.default
    def _words(self) -> str:
        try:
            return words(self.type)
        except (SignatureError, NameError, RecursionError) as error:
            what = f"the type of field {self.name!r} is not understood ({error})"
            raise SignatureError(what, self.type, "a known type", "correct it") from error

    @holds_media.default
    def _holds_media(self) -> bool:
        return bool(re.search(r"\b(image|audio|file)\b", self.words))

    @property
    def required(self) -> bool:
        """Whether the input must be given."""
        return self.default is attrs.NOTHING


@frozen
class Signature:
    """What a step takes, what it returns, and what it is to do.

    Edits return a new signature. The name of every field is its own, across both sides.

    Raises:
        SignatureError: a name stands twice, or there is no output.

    >>> s = Signature((Field("ticket"),), (Field("team"),)).with_field("team", desc="who helps")
    >>> s.prepend(Field("reasoning")).without("team").outputs
    (Field(name='reasoning', type=<class 'str'>, desc=''),)
    """

    inputs: tuple[Field, ...] = field(converter=_tuple)
    outputs: tuple[Field, ...] = field(converter=_tuple)
    instructions: str = ""

    def __attrs_post_init__(self) -> None:
        names = Counter(one.name for one in self.inputs + self.outputs)
        for name, times in names.items():
            if times > 1:
                raise SignatureError("a field stands twice", name, "distinct names", "rename one")
        if not self.outputs:
            todo = "name at least one field after the arrow"
            raise SignatureError("no output field", str(self), "'inputs -> outputs'", todo)

    def __str__(self) -> str:
        sides = (", ".join(one.name for one in side) for side in (self.inputs, self.outputs))
        return " -> ".join(sides)

    def with_instructions(self, instructions: str) -> Signature:
        """Return the signature with other instructions."""
        return evolve(self, instructions=instructions)

    def with_field(self, name: str, **changes: Any) -> Signature:
        """Return the signature with changes (`type`, `desc`, `default`, `name`) to one field."""
        self._check(name)
        return self._map(lambda side: (evolve(f, **changes) if f.name == name else f for f in side))

    def without(self, name: str) -> Signature:
        """Return the signature without a field."""
        self._check(name)
        return self._map(lambda side: (f for f in side if f.name != name))

    def prepend(self, new: Field, *, to: Literal["inputs", "outputs"] = "outputs") -> Signature:
        """Return the signature with a new first input or output."""
        return self._set(to, (new, *getattr(self, to)))

    def append(self, new: Field, *, to: Literal["inputs", "outputs"] = "outputs") -> Signature:
        """Return the signature with a new last input or output."""
        return self._set(to, (*getattr(self, to), new))

    def _set(self, side: str, fields: tuple[Field, ...]) -> Signature:
        changes: dict[str, Any] = {side: fields}
        return evolve(self, **changes)

    def _map(self, edit: Callable[[tuple[Field, ...]], Iterable[Field]]) -> Signature:
        return evolve(self, inputs=edit(self.inputs), outputs=edit(self.outputs))

    def _check(self, name: str) -> None:
        known = [one.name for one in self.inputs + self.outputs]
        if name not in known:
            raise SignatureError("no such field", name, f"one of {', '.join(known)}", "correct it")


def signature(
    task: str | Signature | Callable[..., Any],
    *,
    instructions: str | None = None,
    types: Mapping[str, Any] | None = None,
) -> Signature:
    """Make a signature from a text, from an annotated function, or from a signature.

    Args:
        task: "input, other: type -> output: type" (a field without a type is a `str`); or a
            function, whose parameters are the inputs, whose docstring is the instructions, and
            whose return type is the output, named as the function; a returned attrs class gives one
            output per attribute.
        instructions: what to do; without them a text asks for its outputs in one sentence.
        types: your own types, by the names they have in the text; known without it are Python's
            built-in and `typing` names, date, datetime, time, Decimal, Image, Audio, File, History.

    Raises:
        SignatureError: wrong syntax, an unknown name, a duplicate field.

    >>> signature("question, context: list[str] -> answer: float").instructions
    'Given the fields `question`, `context`, produce the fields `answer`.'
    """
    if isinstance(task, str):
        made = _parse_signature(task, types or {})
    elif isinstance(task, Signature):
        made = task
    elif callable(task):
        made = _inspect_function(task, types or {})
    else:
        todo = "write 'question -> answer'"
        raise SignatureError("no signature", task, "a text or a function", todo)
    if instructions is not None:
        return made.with_instructions(instructions)
    return made if made.instructions else made.with_instructions(_request_outputs(made))


def _request_outputs(made: Signature) -> str:
    inputs = [one for one in made.inputs if one.type is not History]  # that is not one to name
    given, wanted = (", ".join(f"`{f.name}`" for f in side) for side in (inputs, made.outputs))
    start = f"Given the fields {given}, produce" if given else "Produce"
    return f"{start} the fields {wanted}."


def _parse_signature(text: str, types: Mapping[str, Any]) -> Signature:
    quoted = re.compile(r"'[^']*'|\"[^\"]*\"")
    bare = quoted.sub(lambda match: "_" * len(match[0]), text)  # an arrow in a Literal is none
    if bare.count("->") != 1:
        todo = "write 'question -> answer'"
        raise SignatureError("not one arrow", text, "'inputs -> outputs'", todo)
    arrow = bare.index("->")
    inputs, outputs = text[:arrow].strip(), text[arrow + 2 :].strip()
    return Signature(_parse_side(inputs, types), _parse_side(outputs, types))


def _parse_side(text: str, types: Mapping[str, Any]) -> list[Field]:
    """Read one side as what it looks like: the parameters of a Python function."""
    try:
        parsed = ast.parse(f"def side({text}): ...").body[0]
    except SyntaxError as error:
        todo = f"correct it ({error.msg})"
        raise SignatureError("wrong syntax", text, "'name, name: type'", todo) from error
    given = typing.cast(ast.FunctionDef, parsed).args
    if given.vararg or given.kwonlyargs or given.kwarg or given.posonlyargs or given.defaults:
        todo = "remove stars, slashes and defaults"
        raise SignatureError("wrong syntax", text, "'name, name: type'", todo)
    return [
        Field(one.arg, _resolve(one.annotation, text, types) if one.annotation else str)
        for one in given.args
    ]


def _resolve(node: ast.expr, text: str, types: Mapping[str, Any]) -> Any:
    """Evaluate an annotation by hand: names, brackets, `|`, and constants; nothing is executed."""
    match node:
        case ast.Name(id=name):
            return _named_type(name, text, types)
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            return -value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(_resolve(part, text, types) for part in parts)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_resolve(left, text, types), _resolve(right, text, types)]  # noqa: UP007
        case ast.Subscript(value=outer, slice=inner):
            try:
                return _resolve(outer, text, types)[_resolve(inner, text, types)]
            except TypeError as error:
                todo = f"correct it ({error})"
                place = ast.unparse(node)
                raise SignatureError("a wrong type", place, "a type", todo) from error
    place = ast.unparse(node)
    raise SignatureError("a wrong type", place, "names and brackets", f"see {text!r}")


def _named_type(name: str, text: str, types: Mapping[str, Any]) -> Any:
    if name in types:
        return types[name]
    ours = (History, Image, Audio, File, date, datetime, clock, Decimal)
    if name in (known := {one.__name__: one for one in ours}):
        return known[name]
    built_in = getattr(builtins, name, None)
    if isinstance(built_in, type):
        return built_in
    if name in typing.__all__:
        return getattr(typing, name)
    todo = f"pass types={{{name!r}: {name}}}"
    raise SignatureError("unknown type name", name, f"a known type in {text!r}", todo)


def _inspect_function(function: Callable[..., Any], types: Mapping[str, Any]) -> Signature:
    name = getattr(function, "__name__", "")
    try:
        hints = typing.get_type_hints(function, localns=dict(types))
        inputs = _parameters(function, hints)
    except (NameError, TypeError) as error:
        todo = f"pass types= for names it cannot see ({error})"
        raise SignatureError("a wrong annotation", name, "types", todo) from error
    result = hints.get("return", str)
    parts = None if isinstance(result, enum.EnumMeta) else _attributes(result)
    outputs = [Field(one.name, one.type, one.desc) for one in parts or [_Attribute(name, result)]]
    return Signature(inputs, outputs, inspect.getdoc(function) or "")


def _parameters(function: Callable[..., Any], hints: Mapping[str, Any]) -> list[Field]:
    fields = []
    for one in inspect.signature(function).parameters.values():
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY):
            todo = "name each input, so that no expected output can slip in"
            raise SignatureError("a parameter without a name", str(one), "a name", todo)
        default = attrs.NOTHING if one.default is one.empty else one.default
        fields.append(Field(one.name, hints.get(one.name, str), default=default))
    return fields


# == 5. Messages ===================================================================================


@frozen
class ToolCall:
    """A tool that a model wants called, with its arguments."""

    id: str
    name: str
    arguments: Record = field(converter=_record)


MEDIA_LIMIT = 20 * 2**20
"""How many bytes an image, audio or file may have; most providers refuse more."""


def _check_url(url: str) -> None:
    if not isinstance(url, str) or not re.match(r"(https?://|data:)", url, re.IGNORECASE):
        todo = "read a file with from_path, wrap bytes with from_bytes"
        raise DataError("neither a URL nor a data URI", url, "http://, https:// or data:", todo)
    if len(url) > MEDIA_LIMIT * 4 // 3 + 100:
        raise DataError("too large", url[:50], f"at most {MEDIA_LIMIT:,} bytes", "make it smaller")


@frozen
class Media:
    """What is not text: see `Image`, `Audio` and `File`. Making one reads and fetches nothing.

    Attributes:
        url: http(s) URL or data URI.
        name: of a file.

    Raises:
        DataError: neither a URL nor a data URI, or too large.
    """

    kind: typing.ClassVar[str] = "media"
    url: str = field(
        validator=lambda self, attribute, url: _check_url(url), repr=lambda url: repr(cut(url, 40))
    )
    name: str = ""

    @classmethod
    def from_bytes(cls: type[M], data: bytes, media_type: str, *, name: str = "") -> M:
        """Make one of bytes, with their media type, such as "image/png"."""
        text = base64.b64encode(data).decode()
        return cls(f"data:{media_type};base64,{text}", name)

    @classmethod
    def from_path(cls: type[M], path: str | os.PathLike[str], *, media_type: str = "") -> M:
        """Read a file; its media type is guessed by its name.

        Raises:
            DataError: the type cannot be guessed, or the file is too large.
            OSError: the file cannot be read.
        """
        file = Path(path)
        guessed = media_type or mimetypes.guess_type(file.name)[0]
        if guessed is None:
            raise DataError("unknown media type", file.name, "a known ending", "pass media_type=")
        if file.stat().st_size > MEDIA_LIMIT:
            limit = f"at most {MEDIA_LIMIT:,} bytes"
            raise DataError("too large", str(file), limit, "make it smaller")
        return cls.from_bytes(file.read_bytes(), guessed, name=file.name)


@frozen
class Image(Media):
    """A picture, as an input or inside one.

    >>> Image("https://example.org/cat.png")
    Image(url='https://example.org/cat.png', name='')
    """

    kind = "image"


@frozen
class Audio(Media):
    """A recording, as an input or inside one; providers take it as data, not by URL.

    >>> Audio.from_bytes(b"RIFF", "audio/wav").url
    'data:audio/wav;base64,UklGRg=='
    """

    kind = "audio"


@frozen
class File(Media):
    """A document, as an input or inside one; providers take it as data, not by URL.

    >>> File.from_bytes(b"%PDF", "application/pdf", name="a.pdf").name
    'a.pdf'
    """

    kind = "file"


@frozen
class Message:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant", or "tool" for the result of a call.
        content: its text; or its text and then the media that it names as "[image 1]".
        tool_calls: what an assistant wants called.
        tool_call_id: which call a tool's result answers.

    >>> Message("user", "Hello").content
    'Hello'
    """

    role: str
    content: str | tuple[Any, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """What of the content is text."""
        return self.content if isinstance(self.content, str) else str(self.content[0])


def transcript(messages: Iterable[Message]) -> str:
    """Return messages as one readable text.

    >>> print(transcript([Message("user", "Hello"), Message("assistant", "Hi")]))
    --- user ---
    Hello
    --- assistant ---
    Hi
    """
    return "\n".join(f"--- {one.role} ---\n{one.text}" for one in messages)


@frozen
class History:
    """Earlier turns of a conversation, as an input: they become messages of their own.

    Attributes:
        turns: records with the input and output fields that the step had then.

    >>> History([{"question": "2+2?", "answer": "4"}]).turns[0].answer
    '4'
    """

    turns: tuple[Record, ...] = field(default=(), converter=_records)


@frozen
class Tool:
    """A function that a model may call.

    Made by `Tool.of` from a typed function, a bound method or a callable object, or by
    `Tool.from_mcp` from the description of a remote one. Calling it checks the arguments, makes
    values of the parameters' types of them, and calls the function.

    Attributes:
        name: by which a model calls it.
        desc: what it does.
        schema: JSON schema of its arguments.
        fields: its parameters.
        function: what is called with the arguments by name.

    >>> def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    >>> Tool.of(add).schema["required"]
    ['a']
    """

    name: str
    desc: str
    schema: Mapping[str, Any]
    fields: tuple[Field, ...] = field(eq=False, repr=False)
    function: Callable[..., Any] = field(eq=False, repr=False)

    @classmethod
    def of(cls, function: Callable[..., Any], *, name: str = "", desc: str = "") -> Tool:
        """Make a tool of a function; its docstring (Google, NumPy or reST style) describes it.

        Raises:
            SignatureError: it has a parameter without a name, or of an unknown type.
        """
        if isinstance(function, Tool):
            return function
        about, texts = _described(inspect.getdoc(function) or "")
        fields = [evolve(f, desc=texts.get(f.name, "")) for f in _tool_fields(function)]
        inner = getattr(function, "func", function)  # of a partial
        called = name or getattr(inner, "__name__", type(inner).__name__)
        return cls(called, desc or about, _arguments_schema(fields), tuple(fields), function)

    @classmethod
    def from_mcp(cls, description: Any, call: Callable[[str, dict[str, Any]], Any]) -> Tool:
        """Make a tool of an MCP tool description; `call(name, arguments)` calls it.

        Args:
            description: a mapping or an object with name, description and inputSchema.
            call: sends the call, and returns the result.
        """
        get = description.get if isinstance(description, Mapping) else partial(getattr, description)
        schema = get("inputSchema", None) or {"type": "object", "properties": {}}
        required = schema.get("required", ())
        fields = tuple(
            Field(
                name,
                _schema_type(one),
                one.get("description", ""),
                attrs.NOTHING if name in required else one.get("default"),
            )
            for name, one in schema.get("properties", {}).items()
        )
        name = get("name", "")
        return cls(
            name, get("description", "") or "", schema, fields, partial(_call_mcp, call, name)
        )

    def __call__(self, /, **arguments: Any) -> Any:
        """Call the function with these arguments, checked."""
        return self.function(**self.checked(arguments))

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments as values of the parameters' types.

        Raises:
            DataError: one is missing, unknown or of a wrong type; worded for a model to act on.
        """
        known = {one.name: one for one in self.fields}
        expected = ", ".join(f"{f.name}: {f.words}" for f in self.fields) or "no arguments"
        for name, value in arguments.items():
            if name not in known:
                raise DataError(f"{self.name} has no argument {name!r}", value, expected, "drop it")
        for one in self.fields:
            if one.required and one.name not in arguments:
                what = f"{self.name} lacks the argument {one.name!r}"
                raise DataError(what, dict(arguments), expected, "give it")
        return {name: self._value(known[name], value) for name, value in arguments.items()}

    def _value(self, one: Field, value: Any) -> Any:
        try:
            return coerce(one.type, value)
        except ValueError as error:
            what = f"{self.name} cannot take the argument {one.name!r} ({error})"
            raise DataError(what, value, one.words, "correct it") from error


def _tool_fields(function: Callable[..., Any]) -> list[Field]:
    inner: Any = getattr(function, "func", function)
    typed = inner if inspect.isroutine(inner) else type(inner).__call__
    try:
        hints = typing.get_type_hints(typed, include_extras=True)
    except (NameError, TypeError) as error:
        known = "types that can be resolved"
        raise SignatureError("a wrong annotation", repr(function), known, str(error)) from error
    any_of = {name: hints.get(name, Any) for name in inspect.signature(function).parameters}
    return _parameters(function, any_of)


def _arguments_schema(fields: Iterable[Field]) -> dict[str, Any]:
    defs: _Defs = {}
    made = {}
    for one in fields:
        note = {"description": one.desc} if one.desc else {}
        made[one.name] = {**_schema(one.type, defs), **note}
    required = [one.name for one in fields if one.required]
    named = {_def_name(one, defs): schema for one, schema in defs.items()}
    return {**_closed(made), "required": required, **({"$defs": named} if defs else {})}


def _call_mcp(call: Callable[[str, dict[str, Any]], Any], name: str, /, **arguments: Any) -> Any:
    return call(name, arguments)


def _schema_type(schema: Mapping[str, Any]) -> Any:
    """The type that a JSON schema describes; Any for what has no name here."""
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if schema.get("type") == "array":
        item: Any = _schema_type(schema.get("items", {}))
        return list[item]
    plain_types = {"string": str, "integer": int, "number": float, "boolean": bool, "object": dict}
    kind = schema.get("type")
    return plain_types.get(kind, Any) if isinstance(kind, str) else Any


# One pattern for each style of docstring: where the parameters stand, and what one looks like.
_STYLES = (
    (r":param ", r"^:param(?:\s+[^\s:]+)?\s+(\w+):[ \t]*(.*(?:\n[ \t]+\S.*)*)"),
    (
        r"(?:Args|Arguments|Parameters):[ \t]*\n",
        r"^[ ]{2,8}\*{0,2}(\w+)(?:[ ]*\([^)]*\))?:[ \t]*(.*(?:\n[ ]{5,}\S.*)*)",
    ),
    (r"Parameters[ \t]*\n-{3,}", r"^(\w+)[ ]*(?::.*)?\n((?:[ \t]+\S.*\n?)+)"),
)


def _described(doc: str) -> tuple[str, dict[str, str]]:
    """Read a docstring: what the function does, and the text of each parameter."""
    for heading, parameter in _STYLES:
        if found := re.search(rf"^{heading}", doc, re.MULTILINE):
            rest = doc[found.start() :] if heading == ":param " else doc[found.end() :]
            texts = re.findall(parameter, rest, re.MULTILINE)
            return doc[: found.start()].strip(), {n: " ".join(text.split()) for n, text in texts}
    return doc.strip(), {}


def _hidden() -> Any:
    return field(default=None, eq=False, repr=False, kw_only=True)


@frozen
class Request:
    """What an LM is asked: the messages, and how to answer them.

    Attributes:
        messages: the conversation so far.
        model: instead of the LM's own.
        temperature: of sampling, 0 or more.
        max_tokens: of the reply.
        top_p: share of probability to sample from, 0 to 1.
        stop: texts that end the reply.
        schema: JSON schema that the reply must follow.
        tools: that the model may call: `Tool`s, or definitions as the provider takes them.
        tool_choice: which of them to call, as JSON.
        rollout: tells apart deliberate re-samples of one prompt.
        extra: further options, sent to the provider as they are.
        step: path of the step that asks. This and what follows take no part in equality or key.
        signature: of that step.
        inputs: of that step.
        adapter: that laid out the messages.
        on_text: called with each piece of text as it arrives.

    >>> Request([Message("user", "Hello")]).key[:8]
    'ebd51c78'
    """

    messages: tuple[Message, ...] = field(converter=_tuple)
    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = field(default=(), converter=_tuple)
    schema: Mapping[str, Any] | None = None
    tools: tuple[Any, ...] = field(default=(), converter=_tuple)
    tool_choice: Any = None
    rollout: int = 0
    extra: Record = field(default=Record(), converter=_record)
    step: str | None = _hidden()
    signature: Signature | None = _hidden()
    inputs: Record | None = _hidden()
    adapter: Adapter | None = _hidden()
    on_text: Callable[[str], None] | None = _hidden()

    @property
    def key(self) -> str:
        """The SHA-256 of all that can change the answer, in canonical JSON."""
        blank = jsonable(Request(()))
        said = {name: value for name, value in jsonable(self).items() if value != blank[name]}
        # What a message does not have is left out, so that a new field keeps old keys as they are.
        said["messages"] = [_said(one) for one in said.get("messages", [])]
        return hashlib.sha256(canonical(said).encode()).hexdigest()


def _said(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value not in (None, [])}


@frozen
class Response:
    """What an LM answered.

    Attributes:
        text: of the reply.
        tool_calls: that the model asks for.
        usage: what it cost; an answer from a cache keeps what it once cost.
        model: that answered.
        finish_reason: "stop"; "length" where the reply was cut off.
        reasoning: the model's own thoughts, where the provider shows them.
        logprobs: as the provider gives them.
        cached: whether it was answered from a cache.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = Usage()
    model: str = ""
    finish_reason: str = "stop"
    reasoning: str = ""
    logprobs: Any = None
    cached: bool = False


LM = Callable[[Request], Response]
"""A language model is any function from a request to a response."""


# == 6. Adapters ===================================================================================


@frozen
class Adapter:
    """How a signature becomes messages, and how a reply becomes fields again.

    Attributes:
        name: of the format.
        render: (signature, prompt, inputs) -> messages; pure, and the same up to the last message
            for all inputs, so that a provider can cache the prefix.
        parse: (signature, response) -> record of typed outputs; for any text at all it returns or
            raises `ParseError`, never anything else.
            It may also return a flow, whose effects then stand in the trace.
        schema: signature -> the JSON schema of a reply, for providers that can be held to one.
        calls: how many LM calls one answer takes.
    """

    name: str
    render: Callable[[Signature, Prompt, Mapping[str, Any]], tuple[Message, ...]] = field(
        repr=False
    )
    parse: Callable[[Signature, Response], Any] = field(repr=False)
    schema: Callable[[Signature], dict[str, Any]] | None = field(default=None, repr=False)
    calls: int = 1


def render_outputs(adapter: Adapter, task: Signature, values: Mapping[str, Any]) -> str:
    """Return the reply that a model would write for these outputs: what `parse` reads back.

    >>> print(render_outputs(chat, signature("question -> answer"), {"answer": "4"}))
    [[ ## answer ## ]]
    4
    <BLANKLINE>
    [[ ## completed ## ]]
    """
    messages = adapter.render(task, Prompt(demos=(Record(values),)), {})
    return next(one.text for one in reversed(messages) if one.role == "assistant")


@frozen(eq=False)
class _Format:
    """What tells one adapter from another; equal to nothing but itself."""

    name: str
    structure: Callable[[Signature], str]  # how a reply is laid out, for the system message
    inputs: Callable[[Sequence[Field], Mapping[str, Any]], list[str]]
    reply: Callable[[Signature, Mapping[str, Any]], str]
    ending: Callable[[Signature], str]  # the last line of what is asked
    split: Callable[[Signature, str], Mapping[str, Any]]  # a reply into what each field holds
    read: Callable[[Any, Any], Any]  # (type, what the field holds) -> value
    whole: Callable[[Signature, str], bool]  # whether a reply that was cut off is complete
    note: str = ""  # behind the type of an output that is a list or an object


_PARTIAL = "This example is not complete: some of its fields are unknown."
_UNKNOWN = "(unknown)"


def _field_lines(
    title: str, fields: Sequence[Field], texts: Mapping[str, str], note: str
) -> list[str]:
    return [title, *(_field_line(n, one, texts, note) for n, one in enumerate(fields, start=1))]


def _field_line(index: int, one: Field, texts: Mapping[str, str], note: str) -> str:
    desc = texts.get(one.name, one.desc)
    shown = one.words + (note if _kind(one.type).structured else "")
    return f"{index}. `{one.name}` ({shown})" + (f": {desc}" if desc else "")


def _system(form: _Format, task: Signature, prompt: Prompt) -> str:
    known = _field_lines("Input fields:", task.inputs, prompt.texts, "") if task.inputs else []
    known += _field_lines("Output fields:", task.outputs, prompt.texts, form.note)
    parts = ["\n".join(known), form.structure(task), f"Instructions:\n{prompt.instructions}"]
    return "\n\n".join(parts)


def _complete(task: Signature, demo: Record) -> bool:
    return all(one.name in demo for one in task.inputs + task.outputs)


def _demo(form: _Format, task: Signature, demo: Record) -> tuple[Message, Message]:
    note = [] if _complete(task, demo) else [_PARTIAL]
    question = _content(form, task.inputs, demo, before=note)
    return Message("user", question), Message("assistant", form.reply(task, demo))


def _content(
    form: _Format,
    fields: Sequence[Field],
    values: Mapping[str, Any],
    *,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> str | tuple[Any, ...]:
    """Lay out the inputs; media become "[image 1]" in the text, and follow it."""
    media: list[Media] = []

    def number(one: Media) -> str:
        media.append(one)
        return f"[{one.kind} {len(media)}]"

    if any(one.holds_media for one in fields):
        shown = {f.name: jsonable(values[f.name], media=number) for f in fields if f.name in values}
        values, fields = shown, [evolve(one, type=Any) for one in fields]
    text = "\n\n".join([*before, *form.inputs(fields, values), *after])
    return (text, *media) if media else text


class _Itself:
    """A value that is equal to nothing but itself."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@frozen
class _Frame:
    """What of the messages does not depend on the inputs, and which inputs need more than text."""

    prefix: tuple[Message, ...]  # the system message and the demonstrations
    ending: str  # the last line of what is asked
    plain: bool  # whether no input is a history, an image, an audio or a file


@lru_cache(maxsize=128)
def _frame(form: _Format, task: _Itself, prompt: _Itself) -> _Frame:
    """Render the frame once for each signature and prompt.

    Remembered by identity, because equal is not the same to the letter.
    """
    shown = _without_history(task.value)
    system = Message("system", _system(form, shown, prompt.value))
    # Complete demonstrations stand last: what a model saw last it follows best.
    demos = sorted(prompt.value.demos, key=partial(_complete, shown))
    turns = concat(_demo(form, shown, demo) for demo in demos)
    plain = shown is task.value and not any(one.holds_media for one in shown.inputs)
    return _Frame((system, *turns), form.ending(shown), plain)


def _render(
    form: _Format, task: Signature, prompt: Prompt, inputs: Mapping[str, Any]
) -> tuple[Message, ...]:
    frame = _frame(form, _Itself(task), _Itself(prompt))
    if frame.plain:
        content = "\n\n".join([*form.inputs(task.inputs, inputs), frame.ending])
        return (*frame.prefix, Message("user", content))
    past = [inputs[f.name] for f in task.inputs if f.type is History and f.name in inputs]
    shown = _without_history(task)
    asked = _content(form, shown.inputs, inputs, after=(frame.ending,))
    return (*frame.prefix, *_past_turns(form, shown, past), Message("user", asked))


def _without_history(task: Signature) -> Signature:
    kept = [one for one in task.inputs if one.type is not History]
    return evolve(task, inputs=kept) if len(kept) < len(task.inputs) else task


def _history(value: Any) -> History:
    try:
        made: History = coerce(History, value)
        return made
    except ValueError as error:
        todo = f"pass History([...]) ({error})"
        raise DataError("this is no history", value, "earlier turns", todo) from error


def _past_turns(form: _Format, shown: Signature, past: Iterable[Any]) -> Iterator[Message]:
    for turn in concat(_history(one).turns for one in past):
        yield Message("user", _content(form, shown.inputs, turn))
        yield Message("assistant", form.reply(shown, turn))


def _parse(form: _Format, task: Signature, response: Response) -> Record:
    text = response.text
    if response.finish_reason == "length" and not form.whole(task, text):
        what, expected = "the reply was cut off", "a complete reply"
        raise ParseError(what, text[-80:], expected, "raise max_tokens", response=response)
    found = form.split(task, text)
    return _owned({one.name: _parse_field(form, one, found, response) for one in task.outputs})


def _parse_field(form: _Format, one: Field, found: Mapping[str, Any], response: Response) -> Any:
    facts = {"field": one.name, "response": response}
    if one.name not in found:
        what = f"the field `{one.name}` is missing"
        raise ParseError(what, response.text, one.words, "write it", **facts)
    try:
        return form.read(one.type, found[one.name])
    except (ValueError, RecursionError) as error:
        what = f"the field `{one.name}` cannot be read ({error})"
        raise ParseError(what, found[one.name], one.words, "correct it", **facts) from error


def _adapter(form: _Format) -> Adapter:
    return Adapter(form.name, partial(_render, form), partial(_parse, form))


def _listed(task: Signature) -> str:
    return ", ".join([f"`{one.name}`" for one in task.outputs])


# -- chat: each value below a header --

# The white space is possessive: a line of a million blanks must not be scanned twice.
_HEADER = re.compile(r"^[ \t]*+\[\[[ \t]*+##[ \t]*+(\w+)[ \t]*+##[ \t]*+\]\]", re.MULTILINE)
_FAKE = re.compile(r"^([ \t]*+)(\\*\[\[[ \t]*+##)", re.MULTILINE)
_ESCAPED = re.compile(r"^([ \t]*+)\\(\\*\[\[[ \t]*+##)", re.MULTILINE)
_END = "[[ ## completed ## ]]"


def _section(name: str, text: str) -> str:
    """Write a value below its header; a line of it that looks like a header gets a backslash."""
    if "[[" in text:
        text = _FAKE.sub(r"\1\\\2", text)
    return f"[[ ## {name} ## ]]\n{text}"


def sections(text: str) -> dict[str, str]:
    """Return the text below each header of the chat format; of two that are equal, the first.

    >>> sections("[[ ## a ## ]] 1\\n\\n[[ ## b ## ]]\\n2")
    {'a': '1', 'b': '2'}
    """
    _, *parts = _HEADER.split(text)
    found: dict[str, str] = {}
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        value = value.strip()
        found.setdefault(name, _ESCAPED.sub(r"\1\2", value) if "\\[[" in value else value)
    return found


def _chat_structure(task: Signature) -> str:
    layout = [_section(f.name, f"{{{f.name}}}") for f in task.inputs + task.outputs]
    start = "Each value stands below its header, in this structure:"
    return "\n\n".join([start, *layout, _END])


def _chat_inputs(fields: Sequence[Field], values: Mapping[str, Any]) -> list[str]:
    return [_section(f.name, write(f.type, values[f.name])) for f in fields if f.name in values]


def _chat_reply(task: Signature, values: Mapping[str, Any]) -> str:
    texts = _texts(task, values)
    return "\n\n".join([*(_section(name, text) for name, text in texts.items()), _END])


def _texts(task: Signature, values: Mapping[str, Any]) -> dict[str, str]:
    return {
        f.name: write(f.type, values[f.name]) if f.name in values else _UNKNOWN
        for f in task.outputs
    }


def _chat_ending(task: Signature) -> str:
    return f"Reply with these fields in order, each below its header: {_listed(task)}. Then {_END}"


def _chat_split(task: Signature, text: str) -> Mapping[str, Any]:
    return sections(text)


def _chat_whole(task: Signature, text: str) -> bool:
    return "completed" in sections(text)


chat = _adapter(
    _Format(
        "chat",
        _chat_structure,
        _chat_inputs,
        _chat_reply,
        _chat_ending,
        _chat_split,
        read,
        _chat_whole,
        note=", as JSON",
    )
)
"""The default format: each value below a `[[ ## name ## ]]` header, as LMs already know it."""


# -- json: one object --


def _json_structure(task: Signature) -> str:
    inputs = [_section(f.name, f"{{{f.name}}}") for f in task.inputs]
    start = ["Each input stands below its header, in this structure:", *inputs] if inputs else []
    fields = ", ".join(f"{_dump(f.name)}: {{{f.name}}}" for f in task.outputs)
    return "\n\n".join(
        [*start, "The reply is one JSON object, in this structure:", f"{{{fields}}}"]
    )


def _json_reply(task: Signature, values: Mapping[str, Any]) -> str:
    data = {f.name: jsonable(values.get(f.name, _UNKNOWN)) for f in task.outputs}
    return _dump(data)


def _json_ending(task: Signature) -> str:
    return f"Reply with one JSON object with these fields in order: {_listed(task)}."


def _json_split(task: Signature, text: str) -> Mapping[str, Any]:
    data = _data(text)
    return data if isinstance(data, dict) else {}


def _json_whole(task: Signature, text: str) -> bool:
    return bool(_json_split(task, text))


def _json_read(tp: Any, data: Any) -> Any:
    value = coerce(tp, data)
    if isinstance(data, str) and _kind(tp).structured:
        raise _not(words(tp), data)
    return value


def _json_schema(task: Signature) -> dict[str, Any]:
    """The schema of a reply, for providers that can be held to one."""
    defs: _Defs = {}
    made = _closed({one.name: _schema(one.type, defs) for one in task.outputs})
    named = {_def_name(one, defs): schema for one, schema in defs.items()}
    return {**made, "$defs": named} if defs else made


json = evolve(
    _adapter(
        _Format(
            "json",
            _json_structure,
            _chat_inputs,
            _json_reply,
            _json_ending,
            _json_split,
            _json_read,
            _json_whole,
        )
    ),
    schema=_json_schema,
)
"""The outputs as one JSON object; its schema goes into the request too."""


# -- xml: each value in a tag, lists and objects nested --


def _xml_text(tp: Any, data: Any) -> str:
    """Write JSON data of a type as nested elements; whatever has no parts as escaped text."""
    parts = _xml_parts(tp, data)
    if parts is None:
        return html.escape(write(tp, data), quote=False)
    return "".join(f"<{tag}>{_xml_text(kind, one)}</{tag.split()[0]}>" for tag, kind, one in parts)


def _xml_parts(tp: Any, data: Any) -> list[tuple[str, Any, Any]] | None:
    """The (tag, type, data) of the parts of a value; None for a value without parts."""
    if isinstance(data, list) and _is_row(tp):
        return [("item", kind, one) for kind, one in zip(typing.get_args(tp), data, strict=True)]
    if isinstance(data, list) and _origin(tp) in (list, tuple, set, frozenset):
        return [("item", _item(tp), one) for one in data]
    if isinstance(data, dict) and _origin(tp) in (dict, Mapping, Record):
        return [(f'entry key="{html.escape(k)}"', _pair(tp)[1], one) for k, one in data.items()]
    if isinstance(data, dict) and (known := _attributes(tp)) is not None:
        return [(one.name, one.type, data[one.name]) for one in known if one.name in data]
    return None


def _children(text: str, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """The elements of these names that stand side by side: name, key, and what is inside.

    Tags of other names are text. One that is not closed ends it: what follows may be inside.
    """
    known = "|".join(map(re.escape, names))
    tag = re.compile(rf'<(/?)({known})(?:\s+key="([^"]*)")?\s*>')
    opening, depth = None, 0
    for match in tag.finditer(text):
        if opening is None:
            if match[1]:
                continue
            opening = match
        if match[2] == opening[2]:
            depth += -1 if match[1] else 1
        if depth == 0:
            inner = text[opening.end() : match.start()]
            yield opening[2], html.unescape(opening[3] or ""), inner
            opening = None


def _xml_data(tp: Any, text: str) -> Any:
    """Read nested elements of a type as JSON data; JSON in place of elements is taken too."""
    data: Any = None
    if _is_row(tp) or _origin(tp) in (list, tuple, set, frozenset):
        inner = [one for _, _, one in _children(text, ["item"])]
        parts = typing.get_args(tp) if _is_row(tp) else ()
        kinds = parts if len(parts) == len(inner) else [_item(tp)] * len(inner)
        data = [_xml_data(kind, one) for kind, one in zip(kinds, inner, strict=True)]
    elif _origin(tp) in (dict, Mapping, Record):
        data = {key: _xml_data(_pair(tp)[1], one) for _, key, one in _children(text, ["entry"])}
    elif known := {one.name: one.type for one in _attributes(tp) or ()}:
        data = {name: _xml_data(known[name], one) for name, _, one in _children(text, known)}
    if data or (data is not None and not text.strip()):
        return data
    return jsonable(read(tp, html.unescape(text)))


def _xml_field(one: Field, text: str) -> str:
    return f"<{one.name}>\n{text}\n</{one.name}>"


def _xml_inputs(fields: Sequence[Field], values: Mapping[str, Any]) -> list[str]:
    return [
        _xml_field(one, _xml_text(one.type, jsonable(values[one.name])))
        for one in fields
        if one.name in values
    ]


def _xml_reply(task: Signature, values: Mapping[str, Any]) -> str:
    texts = [
        _xml_text(one.type, jsonable(values[one.name])) if one.name in values else _UNKNOWN
        for one in task.outputs
    ]
    return "\n".join(_xml_field(one, text) for one, text in zip(task.outputs, texts, strict=True))


def _xml_structure(task: Signature) -> str:
    start = "Each value stands in a tag, with &amp; &lt; &gt; for & < >, in this structure:"
    layout = [_xml_field(one, f"{{{one.name}}}") for one in task.inputs + task.outputs]
    rule = (
        'A list has its values in <item> tags, a dict in <entry key="...">, an object in its own.'
    )
    nested = [rule] if any(_kind(one.type).structured for one in task.outputs) else []
    return "\n\n".join([start, *layout, *nested])


def _xml_split(task: Signature, text: str) -> Mapping[str, Any]:
    found: dict[str, str] = {}
    for name, _, inner in _children(text, [one.name for one in task.outputs]):
        found.setdefault(name, inner)
    return found


def _xml_read(tp: Any, text: str) -> Any:
    if not _kind(tp).structured:
        return read(tp, html.unescape(text).strip())
    return coerce(tp, _xml_data(tp, text.strip()))


def _xml_ending(task: Signature) -> str:
    return f"Reply with these fields in order, each in its tag: {_listed(task)}."


def _xml_whole(task: Signature, text: str) -> bool:
    return len(_xml_split(task, text)) == len(task.outputs)


xml = _adapter(
    _Format(
        "xml",
        _xml_structure,
        _xml_inputs,
        _xml_reply,
        _xml_ending,
        _xml_split,
        _xml_read,
        _xml_whole,
    )
)
"""Each value in a tag of its name, lists and objects nested."""


# -- plain: for base models and small ones --


def _nice(fields: Sequence[Field]) -> dict[str, str]:
    """What a person would write before a value; the bare name where two would be the same."""
    words_ = {one.name: one.name.replace("_", " ").strip() or one.name for one in fields}
    nice = {name: text[:1].upper() + text[1:] for name, text in words_.items()}
    return nice if len(set(nice.values())) == len(nice) else {name: name for name in nice}


def _label_line(labels: Iterable[str], *, escaped: bool = False) -> re.Pattern[str]:
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    slash = r"\\" if escaped else ""
    return re.compile(rf"^([ \t]*+){slash}(\\*(?:{names})[ \t]*+:)", re.MULTILINE)


def _plain_lines(labels: Mapping[str, str], texts: Mapping[str, str]) -> str:
    fake = _label_line(labels.values())
    safe = {name: fake.sub(r"\1\\\2", text) for name, text in texts.items()}
    return "\n".join(f"{labels[name]}: {text}" for name, text in safe.items())


def _plain_inputs(fields: Sequence[Field], values: Mapping[str, Any]) -> list[str]:
    given = {one.name: write(one.type, values[one.name]) for one in fields if one.name in values}
    return [_plain_lines(_nice(fields), given)] if given else []


def _plain_reply(task: Signature, values: Mapping[str, Any]) -> str:
    return _plain_lines(_nice(task.outputs), _texts(task, values))


def _plain_structure(task: Signature) -> str:
    lines = _plain_lines(_nice(task.outputs), {f.name: f"{{{f.name}}}" for f in task.outputs})
    return f"The reply has this form:\n\n{lines}"


def _plain_split(task: Signature, text: str) -> Mapping[str, Any]:
    labels = _nice(task.outputs)
    names = "|".join(re.escape(one) for one in sorted(labels.values(), key=len, reverse=True))
    start, *parts = re.split(rf"^[ \t]*+({names})[ \t]*+:", text, flags=re.MULTILINE)
    escaped = _label_line(labels.values(), escaped=True)
    found: dict[str, str] = {}
    for label, value in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(label, escaped.sub(r"\1\2", value.strip()))
    if start.strip():  # a base model goes on where the question ended
        found.setdefault(next(iter(labels.values())), start.strip())
    return {name: found[label] for name, label in labels.items() if label in found}


def _plain_ending(task: Signature) -> str:
    return f"Reply with: {', '.join(_nice(task.outputs).values())}."


def _plain_whole(task: Signature, text: str) -> bool:
    return False  # nothing tells where the last value ends


plain = _adapter(
    _Format(
        "plain",
        _plain_structure,
        _plain_inputs,
        _plain_reply,
        _plain_ending,
        _plain_split,
        read,
        _plain_whole,
        note=", as JSON",
    )
)
"""A label before each value, as in "Question: ..."; for base models and small ones."""


# -- two_step: a free answer, and a second LM that reads it --


def two_step(lm: LM) -> Adapter:
    """Make an adapter that lets the model answer freely, and has `lm` read the fields out of it.

    For models that reason well and keep to formats badly. The second call is an effect of the flow:
    it stands in the trace, and its cost in the usage.

    Args:
        lm: reads the answer, in the `chat` format.

    Calls: 2 for each answer.

    >>> qa = predict("question -> answer: int", adapter=two_step(scripted_lm([{"answer": 4}])))
    >>> qa(scripted_lm(["Two and two make four."]), question="2+2?").answer
    4
    """
    form = _Format(
        "two_step", _free_structure, _plain_inputs, _plain_reply, _free_ending, _plain_split, read,
        _plain_whole,
    )  # fmt: skip
    return Adapter("two_step", partial(_render, form), partial(_extract, lm), calls=2)


def _free_structure(task: Signature) -> str:
    return "Answer in your own words. Say clearly what the value of each output field is."


def _free_ending(task: Signature) -> str:
    return f"Give a value for: {', '.join(_nice(task.outputs).values())}."


def _extract(lm: LM, task: Signature, response: Response) -> Flow:
    source = "text"
    while source in [one.name for one in task.outputs]:
        source += "_"
    reader = Signature((Field(source),), task.outputs, _EXTRACT)
    given = Record({source: response.text})
    messages = chat.render(reader, Prompt(_EXTRACT), given)
    request = Request(messages, signature=reader, inputs=given, adapter=chat)
    return chat.parse(reader, (yield invoke(lm, request)))


_EXTRACT = "Copy the value of each output field from the text, word by word where it is a text."


# == 7. Programs ===================================================================================

Flow = Generator[Any, Any, Any]
"""What a program body is: it yields effects, is sent their outcomes, and returns the outputs."""

SETTINGS = ("temperature", "max_tokens", "top_p", "stop", "rollout", "extra")


def _settings(mapping: Mapping[str, Any]) -> Record:
    for name in mapping:
        if name not in SETTINGS:
            known = ", ".join(SETTINGS)
            todo = "put an option of your provider into extra={...}"
            raise ParamsError("unknown setting", name, f"one of {known}", todo)
    return _record(mapping)


@frozen
class Prompt:
    """All that can be learned of one step.

    Attributes:
        instructions: what to do.
        demos: demonstrations, records with the fields of the step's signature.
        texts: descriptions that replace those of fields, by name.
        model: the weights to use, instead of the LM's own.
        settings: sampling options: temperature, max_tokens, top_p, stop, rollout, extra.

    Raises:
        ParamsError: an unknown setting.

    >>> Prompt("Answer briefly.", settings={"temperature": 0.2}).settings.temperature
    0.2
    """

    instructions: str = ""
    demos: tuple[Record, ...] = field(default=(), converter=_records)
    texts: Record = field(default=Record(), converter=_record)
    model: str | None = None
    settings: Record = field(default=Record(), converter=_settings)


class Params(_Frozen[Prompt]):
    """An immutable mapping from the path of each step to its prompt.

    >>> params = predict("question -> answer").params
    >>> params.replace("predict", instructions="Answer in one word.")["predict"].instructions
    'Answer in one word.'
    """

    __slots__ = ()

    def replace(self, path: str, **changes: Any) -> Params:
        """Return the parameters with changes to the prompt of one step.

        Raises:
            ParamsError: there is no such path.
        """
        _check_paths([path], self)
        return Params({**self._data, path: evolve(self[path], **changes)})

    @property
    def digest(self) -> str:
        """The SHA-256 of their canonical JSON: equal for equal parameters, on every machine."""
        return hashlib.sha256(canonical(self).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the parameters as the text that `save` writes."""
        return dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Params:
        """Return the parameters of a text that `to_json` wrote; may raise `ParamsError`."""
        return loads(text)


def _check_paths(paths: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for path in paths:
        if path not in names:
            expected = f"one of {', '.join(names) or 'none: the program has no prompts'}"
            raise ParamsError("no such path", path, expected, "correct the path")


@frozen(eq=False)
class Program:
    """A description of what to do: call it with an LM, or let a driver run it.

    Made by `predict`, `program` and the like; never changed: `with_params` returns a new one.

    Attributes:
        name: of the program; of a step that runs alone, also its path.
        inputs: the fields it takes.
        begin: (program, path, inputs) -> flow.
        steps: the programs it may run, by name.
        max_calls: how many LM calls one run makes at most; a body that runs a step more than once
            must say so, for a `Plan` to hold.
        outputs: the names of its outputs, where they are known before it runs.
        signature: of a step that asks an LM itself, else None.
        prompt: of such a step.
    """

    name: str
    inputs: tuple[Field, ...]
    begin: Callable[[Program, str, Record], Flow]
    steps: Record = field(default=Record(), converter=_record)
    max_calls: int = 1
    outputs: tuple[str, ...] = ()
    signature: Signature | None = None
    prompt: Prompt | None = None

    def __call__(self, lm: LM, /, **inputs: Any) -> Prediction:
        """Run the program in this thread; the same as `run(program, lm, inputs)`."""
        return run(self, lm, inputs)

    def flow(self, /, **inputs: Any) -> Flow:
        """Return the body as a generator, to be stepped by hand: it yields effects."""
        return self.begin(self, self.root, check_inputs(self, inputs))

    @property
    def root(self) -> str:
        """The path of the program when it runs alone."""
        return self.name if self.prompt is not None else ""

    @property
    def leaves(self) -> dict[str, Program]:
        """The steps that ask an LM, by path."""
        return dict(_leaves(self, self.root))

    @property
    def params(self) -> Params:
        """The prompts of all steps, by path."""
        return Params({path: leaf.prompt for path, leaf in self.leaves.items()})

    def with_params(self, params: Mapping[str, Prompt]) -> Program:
        """Return the program with other prompts; those not named stay.

        Raises:
            ParamsError: a path that the program does not have.
        """
        _check_paths(params, self.leaves)
        return _with_params(self, self.root, params)

    def __repr__(self) -> str:
        takes, steps = (", ".join(f.name for f in self.inputs)), ", ".join(self.leaves)
        return f"<program {self.name}({takes}) with prompts for {steps or 'nothing'}>"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _leaves(program: Program, path: str) -> Iterator[tuple[str, Program]]:
    if program.prompt is not None:
        yield path, program
    for name, step in program.steps.items():
        yield from _leaves(step, _join(path, name))


def _with_params(program: Program, path: str, params: Mapping[str, Prompt]) -> Program:
    if program.prompt is not None:
        return evolve(program, prompt=_typed(program, params.get(path, program.prompt)))
    steps = {n: _with_params(step, _join(path, n), params) for n, step in program.steps.items()}
    return evolve(program, steps=steps)


def _typed(program: Program, prompt: Prompt) -> Prompt:
    """The prompt with demonstrations of the signature's types, which a file cannot hold."""
    task = program.signature
    if task is None or not prompt.demos:
        return prompt
    types = {f.name: f.type for f in task.inputs + task.outputs if f.type not in (str, History)}
    if not types:
        return prompt
    demos = [
        demo | {name: _typed_value(tp, demo[name]) for name, tp in types.items() if name in demo}
        for demo in prompt.demos
    ]
    return evolve(prompt, demos=demos)


def _typed_value(tp: Any, value: Any) -> Any:
    """Make a value of what was written; only if that would be written as the same."""
    try:
        made = coerce(tp, value)
        return made if canonical(made) == canonical(value) else value
    except ValueError:
        return value


def check_inputs(program: Program, inputs: Mapping[str, Any]) -> Record:
    """Return the inputs as a record in the program's order, with its defaults filled in.

    Raises:
        DataError: a field is missing, or is not one of the program's.

    >>> check_inputs(predict("question -> answer"), {"question": "2+2?"})
    Record(question='2+2?')
    """
    known = [f.name for f in program.inputs]
    for name in inputs:
        if name not in known:
            expected = f"the inputs {', '.join(known) or '(none)'}"
            raise DataError("unknown field", name, expected, "correct the name")
    return select_inputs(program, inputs)


def select_inputs(program: Program, example: Mapping[str, Any]) -> Record:
    """Return those fields of an example that are the program's inputs, defaults filled in.

    Raises:
        DataError: an input is missing.

    >>> select_inputs(predict("question -> answer"), {"question": "2+2?", "answer": "4"})
    Record(question='2+2?')
    """
    chosen = {f.name: example.get(f.name, f.default) for f in program.inputs}
    missing = [name for name, value in chosen.items() if value is attrs.NOTHING]
    if missing:
        expected, todo = f"the fields {', '.join(chosen)}", f"add the input {missing[0]!r}"
        raise DataError(f"missing field {missing[0]!r} in", dict(example), expected, todo)
    return _owned(chosen)


@frozen
class Run:
    """The effect of running a program as a step; its outcome is the `Prediction`."""

    program: Program
    inputs: Record = field(converter=_record)
    name: str = ""


@frozen
class Call:
    """The effect of calling a function that is no LM: a tool, a search, an interpreter."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(factory=dict)


@frozen
class Sleep:
    """The effect of waiting for some seconds."""

    seconds: float


def invoke(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Call:
    """Return the effect of calling `function(*args, **kwargs)`; its outcome is the result.

    >>> invoke(max, 1, 2).args
    (1, 2)
    """
    return Call(function, args, kwargs)


class Steps:
    """The steps that a program body may yield: `steps.name(field=value)` makes a `Run`."""

    def __init__(self, steps: Mapping[str, Program]) -> None:
        vars(self).update({name: partial(_step, name, step) for name, step in steps.items()})

    def __getattr__(self, name: str) -> Any:
        known = f"one of {', '.join(vars(self)) or '(none)'}"
        raise AttributeError(explain("no such step", name, known, "name it in program(...)"))


def _step(name: str, step: Program, /, **inputs: Any) -> Run:
    return Run(step, check_inputs(step, inputs), name)


def program(
    *, max_calls: int | None = None, **steps: Program
) -> Callable[[Callable[..., Flow]], Program]:
    """Make a program from a generator function: its first parameter takes the steps.

    Args:
        max_calls: how many LM calls one run makes at most; by default each step runs once.
        **steps: the programs that the body may run, by the names they have there.

    Raises:
        SignatureError: the body is no generator function, or a step is no program.

    >>> @program(draft=predict("topic -> text"), check=predict("text -> verdict"))
    ... def careful(steps, topic):
    ...     draft = yield steps.draft(topic=topic)
    ...     return (yield steps.check(text=draft.text))
    >>> list(careful.params)
    ['draft', 'check']
    """
    for name, step in steps.items():
        if not isinstance(step, Program):
            todo = f"write {name}=predict(...)"
            raise SignatureError(f"the step {name!r} is none", step, "a program", todo)
    calls = sum(step.max_calls for step in steps.values()) if max_calls is None else max_calls

    def make(body: Callable[..., Flow]) -> Program:
        name = getattr(body, "__name__", "program")
        if not inspect.isgeneratorfunction(body):
            todo = "yield what it wants done: answer = yield steps.answer(question=question)"
            raise SignatureError("a body that never yields", name, "a generator", todo)
        inputs = _parameters(body, {})[1:]
        return Program(name, tuple(inputs), partial(_begin_body, body), Record(steps), calls)

    return make


def _begin_body(body: Callable[..., Flow], program: Program, path: str, inputs: Record) -> Flow:
    return body(Steps(program.steps), **inputs)


def preview(program: Program, /, **inputs: Any) -> tuple[Message, ...]:
    """Return the exact messages of a program's first LM request; no LM is needed.

    Raises:
        DataError: wrong inputs; or the program does something else first.

    >>> preview(predict("question -> answer"), question="2+2?")[-1].role
    'user'
    """
    effect = next(program.flow(**inputs), None)
    while isinstance(effect, (Run, tuple, list)):
        if isinstance(effect, Run):
            step = effect.program
            effect = next(step.begin(step, effect.name, effect.inputs), None)
        else:
            effect = first(effect) if effect else None
    if isinstance(effect, Request):
        return effect.messages
    todo = "preview one of its steps: preview(program.steps['name'], ...)"
    raise DataError("no LM request to show", effect, "a request first", todo)


# == 8. Drivers ====================================================================================
# `_interpret` turns a program into a flow of leaf effects (Request, Call, Sleep, or a tuple of such
# flows, to be performed concurrently) and collects the trace. A driver performs leaf effects.


def _interpret(
    program: Program, inputs: Record, path: str, parent: str, events: list[Event]
) -> Flow:
    """Run a program: yield leaf effects, append what happened to `events`, return a prediction."""
    start, body = len(events), _advance(program, inputs, path, events)
    outputs = yield from _logged(body, events, path, "step", parent, inputs)
    return Prediction(outputs, trace=events[start:])


def _advance(program: Program, inputs: Record, path: str, events: list[Event]) -> Flow:
    """Step a body to its end; an effect that fails is raised at its `yield`."""
    flow = program.begin(program, path, inputs)
    try:
        effect = next(flow)
        while True:
            try:
                outcome = yield from _reduce(effect, path, events)
            except Exception as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(outcome)
    except StopIteration as end:
        return _check_outputs(program, end.value)
    finally:
        flow.close()


def _check_outputs(program: Program, outputs: Any) -> Record:
    if type(outputs) is Record or isinstance(outputs, Mapping):
        return _record(outputs)
    todo = "return a prediction or a dict"
    raise SignatureError(f"{program.name} returned no fields", outputs, "a mapping", todo)


def _reduce(effect: Any, path: str, events: list[Event]) -> Flow:
    """Reduce one effect to leaf effects."""
    if isinstance(effect, Request):
        return _logged(_once(effect), events, path, "lm", path, request=effect)
    if isinstance(effect, Run):
        name = _join(path, effect.name or effect.program.name)
        return _interpret(effect.program, effect.inputs, name, path, events)
    if isinstance(effect, Call):
        name = getattr(effect.function, "__name__", type(effect.function).__name__)
        given = Record(args=effect.args, kwargs=effect.kwargs)
        return _logged(_once(effect), events, _join(path, name), "call", path, given)
    if isinstance(effect, Sleep):
        return _once(effect)
    if isinstance(effect, (tuple, list)):
        return _together(effect, path, events)
    todo = "yield steps.name(...), a Request, invoke(...), Sleep(...) or a tuple of these"
    raise SignatureError("no effect was yielded", effect, "an effect", todo)


def _once(effect: Any) -> Flow:
    return (yield effect)


def _logged(
    flow: Flow,
    events: list[Event],
    path: str,
    kind: Literal["step", "lm", "call"],
    parent: str,
    inputs: Record | None = None,
    request: Request | None = None,
) -> Flow:
    """Run a flow to its end, and append the event of it, whether it succeeds or fails."""
    began, outcome, failure = time.perf_counter(), None, ""
    try:
        outcome = yield from flow
    except Exception as error:
        failure = describe(error)
        raise
    finally:
        seconds = time.perf_counter() - began
        outputs, response = (None, outcome) if request else (outcome, None)
        made = Event(path, kind, inputs, outputs, request, response, failure, parent, seconds)
        events.append(made)
    return outcome


def _together(effects: Sequence[Any], path: str, events: list[Event]) -> Flow:
    """Have several effects performed at once; results and events in the order of the effects."""
    traces: list[list[Event]] = [[] for _ in effects]
    flows = tuple(
        _caught(effect, path, trace) for effect, trace in zip(effects, traces, strict=True)
    )
    outcomes = yield flows
    events.extend(concat(traces))
    for _, error in outcomes:
        if error is not None:
            raise error
    return tuple(value for value, _ in outcomes)


def _caught(effect: Any, path: str, events: list[Event]) -> Flow:
    try:
        return (yield from _reduce(effect, path, events)), None
    except Exception as error:
        return None, error


def _drive(flow: Flow, lm: LM, workers: int = 1) -> Any:
    """Perform the leaf effects of a flow in this thread; tuples on up to `workers` threads."""
    try:
        effect = next(flow)
        while True:
            try:
                outcome = _perform(effect, lm, workers)
            except Exception as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(outcome)
    except StopIteration as end:
        return end.value
    finally:
        flow.close()


def _perform(effect: Any, lm: LM, workers: int) -> Any:
    if isinstance(effect, Request):
        return _ask(lm, effect)
    if isinstance(effect, Call):
        return effect.function(*effect.args, **effect.kwargs)
    if isinstance(effect, Sleep):
        return time.sleep(effect.seconds)
    return tuple(ordered_map(partial(_drive, lm=lm, workers=workers), effect, workers=workers))


def _ask(lm: LM, request: Request) -> Response:
    response = lm(request)
    if isinstance(response, Response):
        return response
    todo = f"return Response({cut(repr(response), 40)})"
    raise DataError("the LM returned no response", response, "a Response", todo)


def run(
    program: Program,
    lm: LM,
    inputs: Mapping[str, Any],
    *,
    params: Mapping[str, Prompt] | None = None,
    workers: int = 1,
) -> Prediction:
    """Run a program once, in this thread.

    Args:
        program: the program.
        lm: what answers its requests.
        inputs: exactly its input fields.
        params: prompts instead of its own.
        workers: threads for effects that it yields together.

    Raises:
        DataError: a field is missing or unknown.
        Exception: what the program, its tools or the LM raise.

    Calls: what the program makes, `program.max_calls` at most.

    >>> run(predict("question -> answer"), stub_lm(), {"question": "2+2?"}).answer
    'text'
    """
    ready = program if params is None else program.with_params(params)
    return _run(ready, lm, check_inputs(ready, inputs), [], workers)


def _run(
    program: Program, lm: LM, inputs: Record, events: list[Event], workers: int = 1
) -> Prediction:
    result: Prediction = _drive(_interpret(program, inputs, program.root, "", events), lm, workers)
    return result


def run_many(
    program: Program,
    lm: LM,
    inputs_list: Iterable[Mapping[str, Any]],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
) -> list[Prediction]:
    """Run a program on many inputs; results stand in the order of the inputs.

    Args:
        program: the program.
        lm: what answers its requests.
        inputs_list: for each run exactly its input fields.
        workers: threads; by default what the LM declares as `concurrency`, else this thread only.
        executor: any `concurrent.futures.Executor` to run on instead.

    Raises:
        Exception: that of the first run, in order, that failed; no further one is begun then.

    Calls: `program.max_calls` at most for each of the inputs.

    >>> done = run_many(predict("question -> answer"), stub_lm(), [{"question": "a"}] * 2)
    >>> [prediction.answer for prediction in done]
    ['text', 'text']
    """
    checked = [check_inputs(program, inputs) for inputs in inputs_list]
    work = partial(_run_one, program, lm)
    return list(ordered_map(work, checked, workers=workers_for(lm, workers), executor=executor))


def _run_one(program: Program, lm: LM, inputs: Record) -> Prediction:
    return _run(program, lm, inputs, [])


def workers_for(lm: LM, workers: int | None) -> int:
    """Return how many runs go on at once: as asked, else as the LM declares, else one.

    Raises:
        DataError: less than one.

    >>> workers_for(stub_lm(), None)
    1
    """
    count: int = getattr(lm, "concurrency", 1) if workers is None else workers
    if count < 1:
        raise DataError("no workers", count, "1 or more", "leave workers out")
    return count


_AHEAD = 4  # submitted for each worker, so that one slow run does not leave the others idle


def ordered_map(
    function: Callable[[T], V],
    items: Iterable[T],
    *,
    workers: int = 1,
    executor: Executor | None = None,
) -> Generator[V, None, None]:
    """Map over items on several threads or on an executor, lazily; results in order.

    After an error no further item is begun; Ctrl-C does not wait for those that are under way. Who
    stops early closes the iterator.

    >>> list(ordered_map(abs, [-3, -2, -1], workers=2))
    [3, 2, 1]
    """
    if executor is None and workers == 1:
        yield from map(function, items)
        return
    pool = executor or ThreadPoolExecutor(workers, thread_name_prefix="lmopt")
    waiting: deque[Future[V]] = deque()
    patient = True
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _AHEAD * max(workers, 16):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:
        patient = False
        raise
    finally:
        for future in waiting:
            future.cancel()
        if executor is None:
            pool.shutdown(wait=patient, cancel_futures=True)


# == 9. Modules ====================================================================================


def predict(
    task: str | Signature | Callable[..., Any],
    *,
    instructions: str | None = None,
    types: Mapping[str, Any] | None = None,
    adapter: Adapter = chat,
    retries: int = 2,
    name: str = "predict",
    **settings: Any,
) -> Program:
    """Make the program that asks an LM once for the outputs of a signature.

    A reply that does not hold them is answered with what was wrong, and asked again.

    Args:
        task: what `signature` takes.
        instructions: instead of those of the signature.
        types: your own types in the text of the signature.
        adapter: the format of messages and replies.
        retries: how many times a reply that cannot be read is asked again, 0 or more.
        name: of the program; its path where it runs alone.
        **settings: sampling options: temperature, max_tokens, top_p, stop, rollout, extra.

    Raises:
        SignatureError: the signature is wrong.
        ParamsError: an unknown setting.
        ParseError: (when it runs) the last reply could not be read either.

    Calls: 1 for a run, and up to `retries` more.

    >>> predict("question -> answer")(scripted_lm([{"answer": "4"}]), question="2+2?").answer
    '4'
    """
    made = signature(task, instructions=instructions, types=types)
    if retries < 0:
        raise SignatureError("too few retries", retries, "0 or more", "raise retries")
    prompt = Prompt(made.instructions, settings=settings)
    begin = partial(_predict, adapter, retries)
    outputs = tuple(one.name for one in made.outputs)
    calls = (retries + 1) * adapter.calls
    return Program(name, made.inputs, begin, Record(), calls, outputs, made, prompt)


def _predict(adapter: Adapter, retries: int, program: Program, path: str, inputs: Record) -> Flow:
    task, prompt = program.signature, program.prompt
    assert task is not None and prompt is not None  # a leaf has both
    request = Request(
        adapter.render(task, prompt, inputs),
        prompt.model,
        schema=adapter.schema(task) if adapter.schema else None,
        step=path,
        signature=task,
        inputs=inputs,
        adapter=adapter,
        **prompt.settings._data,
    )
    for left in range(retries, -1, -1):
        response = yield request
        try:
            fields = adapter.parse(task, response)
            return (yield from fields) if inspect.isgenerator(fields) else fields
        except ParseError as error:
            error.request = request
            if not left:
                raise
            request = evolve(request, messages=request.messages + _ask_again(response, error))


def _ask_again(response: Response, error: ParseError) -> tuple[Message, Message]:
    problem = (
        f"Your reply cannot be used: {error}. Reply again with every field, in the same structure."
    )
    # Some providers refuse an empty message.
    return Message("assistant", response.text.strip() or "(empty)"), Message("user", problem)


def chain_of_thought(
    task: str | Signature | Callable[..., Any],
    *,
    instructions: str | None = None,
    types: Mapping[str, Any] | None = None,
    name: str = "chain_of_thought",
    **options: Any,
) -> Program:
    """Make a `predict` that writes its `reasoning` before the outputs.

    Args:
        task: what `signature` takes.
        instructions: instead of those of the signature.
        types: your own types in the text of the signature.
        name: of the program; its path where it runs alone.
        **options: what else `predict` takes.

    Calls: those of `predict`.

    Reference: Wei et al. 2022, arXiv 2201.11903.

    >>> [f.name for f in chain_of_thought("question -> answer").signature.outputs]
    ['reasoning', 'answer']
    """
    made = signature(task, instructions=instructions, types=types)
    thought = Field("reasoning", desc="the steps that lead to the answer")
    return predict(made.prepend(thought), name=name, **options)


def pipeline(**steps: Program) -> Program:
    """Make the program that runs steps one after the other, each on all fields known by then.

    Its inputs are what a step needs and no earlier step makes; its outputs are all that they make.

    Args:
        **steps: programs whose inputs and outputs have the same names where they meet.

    Raises:
        SignatureError: what a step returns is not known before it runs, and others follow it.

    Calls: those of the steps.

    >>> pipeline(draft=predict("topic -> text"), check=predict("text -> verdict")).inputs
    (Field(name='topic', type=<class 'str'>, desc=''),)
    """
    made: tuple[str, ...] = ()
    inputs: list[Field] = []
    for index, (name, step) in enumerate(steps.items(), start=1):
        if not step.outputs and index < len(steps):
            todo = "write a body with @program instead"
            raise SignatureError("a step with unknown outputs", name, "predict", todo)
        inputs += [one for one in step.inputs if one.name not in made]
        made += step.outputs
    calls = sum(step.max_calls for step in steps.values())
    needed = tuple(unique(inputs, key=lambda one: one.name))
    return Program("pipeline", needed, _pipeline, Record(steps), calls, tuple(unique(made)))


def _pipeline(program: Program, path: str, inputs: Record) -> Flow:
    made = Record()
    for name, step in program.steps.items():
        outputs = yield Run(step, select_inputs(step, inputs | made), name)
        made = made | outputs
    return made


# == 10. LMs =======================================================================================
# First those that need no network, then the wire.


class _Scripted:
    """Replies in order, for one program run at a time."""

    def __init__(self, replies: Iterable[Any]) -> None:
        self._replies, self._left, self._lock = tuple(replies), 0, threading.Lock()

    def __call__(self, request: Request) -> Response:
        with self._lock:
            index, self._left = self._left, self._left + 1
        if index < len(self._replies):
            return _reply(self._replies[index], request)
        asked = request.messages[-1].text if request.messages else ""
        problem = f"scripted_lm has given all of its {len(self._replies)} replies; one more request"
        raise ReplayMiss(problem, asked, "no further request", "script one more reply")


def _reply(answer: Any, request: Request) -> Response:
    """Make a response of a text, of fields in the format that was asked for, or of an error."""
    if isinstance(answer, BaseException):
        raise answer
    if isinstance(answer, Mapping):
        if request.signature is None or request.adapter is None:
            todo = "answer with a text or a Response"
            raise DataError("fields for a request without a step", answer, "text", todo)
        answer = render_outputs(request.adapter, request.signature, answer)
    return answer if isinstance(answer, Response) else Response(str(answer))


def scripted_lm(replies: Iterable[Any]) -> LM:
    """Make an LM that gives these replies in order, for one program run at a time.

    Args:
        replies: texts, mappings of output fields, responses, or exceptions to raise.

    Raises:
        ReplayMiss: (when asked) all replies have been given.

    >>> scripted_lm(["Hello"])(Request([Message("user", "Hi")])).text
    'Hello'
    """
    return _Scripted(replies)


def mock_lm(function: Callable[[Record], Any]) -> LM:
    """Make an LM that answers with `function(inputs)`, in whatever format was asked for.

    Args:
        function: inputs -> mapping of output fields; or a text, a response, an exception.

    Raises:
        DataError: (when asked) the request does not come from a step with a signature.

    >>> lm = mock_lm(lambda inputs: {"answer": inputs.question.upper()})
    >>> predict("question -> answer")(lm, question="hi").answer
    'HI'
    """
    return partial(_mock, function)


def _mock(function: Callable[[Record], Any], request: Request) -> Response:
    if request.inputs is None:
        todo = "use scripted_lm for bare requests"
        raise DataError("a request without inputs", request.messages, "a step's", todo)
    return _reply(function(request.inputs), request)


def stub_lm() -> LM:
    """Make an LM that answers every step with sample values of the types it asks for.

    >>> predict("text -> tags: list[int]")(stub_lm(), text="hello").tags
    [1]
    """
    return _stub


def _stub(request: Request) -> Response:
    if request.signature is None:
        return Response("text")
    return _reply({one.name: sample(one.type) for one in request.signature.outputs}, request)


def toy_lm(*, seed: int = 0) -> LM:
    """Make a small LM that really learns in context, from nothing but the messages it is sent.

    It knows the `chat` format and no data. For each output field it weighs the values that it sees:
    those of the demonstrations, by how alike their words are to the question's, rare and long
    words counting more; those of rules in the instructions (a line like: if the text mentions
    "refund", answer "billing"); and the allowed values of the type. With a temperature, or without
    one but with a `rollout`, it samples. Good for teaching and for tests of optimizers; no stand-in
    for a real LM.

    Args:
        seed: of its sampling; equal requests get equal answers.

    >>> qa = predict("animal -> sound").with_params(
    ...     {"predict": Prompt(demos=[{"animal": "a big dog", "sound": "woof"}])}
    ... )
    >>> qa(toy_lm(), animal="my dog").sound
    'woof'
    """
    return partial(_toy, seed)


_TOY_FIELD = re.compile(r"^\d+\. `(\w+)` \((.*?)(?:, as JSON)?\)(?::|$)", re.MULTILINE)


def _toy(seed: int, request: Request) -> Response:
    system = "\n".join(one.text for one in request.messages if one.role == "system")
    turns = [one.text for one in request.messages if one.role != "system"]
    last = max((n for n in range(0, len(turns), 2) if "[[ ##" in turns[n]), default=len(turns) - 1)
    demos = [_toy_demo(given, made) for given, made in partition(2, turns[: max(last, 0)])]
    question = _toy_question(turns[last]) if turns else ""
    asked = _toy_words(question)
    alike = _toy_alike(asked, [known for known, _ in demos])
    rules = _toy_rules(system.rpartition("Instructions:")[2], asked)
    fields = _TOY_FIELD.findall(system.partition("Output fields:")[2])
    reply = []
    for index, (name, kind) in enumerate(fields, start=1):
        votes = _toy_prior(kind, asked)
        for value, weight in rules if index == len(fields) else []:
            _toy_vote(votes, kind, value, weight)
        for weight, (_, made) in zip(alike, demos, strict=True):
            _toy_vote(votes, kind, made.get(name, _UNKNOWN), weight)
        value = _toy_sample(seed, request, votes) if votes else _toy_guess(kind, question)
        reply.append(_section(name, value))
    text = "\n\n".join([*reply, _END]) if reply else question
    read = sum(one.text.count(" ") + 1 for one in request.messages)
    spent = Usage(calls=1, input_tokens=read, output_tokens=text.count(" ") + 1)
    return Response(text, usage=spent, model="toy")


def _toy_question(turn: str) -> str:
    """The inputs in the last message, without the sentence that asks for a reply."""
    rest, _, ending = turn.rpartition("\n")
    text = rest if ending.startswith("Reply with ") else turn
    return " ".join(sections(text).values()) or text


@lru_cache(maxsize=4096)
def _toy_demo(given: str, made: str) -> tuple[frozenset[str], dict[str, str]]:
    """The words and the outputs of a demonstration."""
    outputs = sections(made)
    return _toy_words(*sections(given).values(), *outputs.values()), outputs


def _toy_words(*texts: str) -> frozenset[str]:
    """The first letters of each word, which most of its forms share."""
    return frozenset(word[:5] for text in texts for word in re.findall(r"[^\W_]+", text.lower()))


def _toy_alike(asked: frozenset[str], known: Sequence[frozenset[str]]) -> list[float]:
    """Weigh how alike each demonstration is: shared words, rare and long ones more, in a cosine."""
    times = Counter(concat(known))
    rare = {
        word: math.log((len(known) + 1) / (n + 0.5)) * max(len(word) - 2, 0.2)
        for word, n in times.items()
    }
    sizes = [math.sqrt(sum([rare[word] for word in one]) or 1) for one in known]
    shared = [sum([rare[word] for word in asked & one]) for one in known]
    return [(common / size) ** 1.5 for common, size in zip(shared, sizes, strict=True)]


def _toy_rules(instructions: str, asked: frozenset[str]) -> list[tuple[str, float]]:
    """Find the rules that hold here: a line whose last quoted text is the answer to the others."""
    quoted = [re.findall(r'"([^"]+)"', line) for line in instructions.splitlines()]
    return [
        (answer, 4.0)
        for *signs, answer in filter(None, quoted)
        if any(_toy_words(sign) <= asked for sign in signs)
    ]


def _toy_prior(kind: str, asked: frozenset[str]) -> dict[str, float]:
    """Give each allowed value of a type a small weight, more where the question has its words."""
    if not kind.startswith("one of "):
        return {}
    values = [str(value) for value in jsonlib.loads(f"[{kind.removeprefix('one of ')}]")]
    return {value: 0.01 + 0.1 * len(_toy_words(value) & asked) for value in values}


def _toy_vote(votes: dict[str, float], kind: str, value: str, weight: float) -> None:
    if value in votes or not (kind.startswith("one of ") or value == _UNKNOWN):
        votes[value] = votes.get(value, 0.01) + weight


def _toy_sample(seed: int, request: Request, votes: Mapping[str, float]) -> str:
    spread = request.temperature if request.temperature is not None else float(request.rollout != 0)
    top = max(votes, key=lambda value: votes[value])
    if spread <= 0:
        return top
    weights = [(weight / votes[top]) ** (2 / spread) for weight in votes.values()]
    return seeded(seed, "toy", request.key).choices(list(votes), weights)[0]


def _toy_guess(kind: str, question: str) -> str:
    """Answer with nothing to go by: a number of the question, or its first words."""
    number = re.search(r"\d+", question)
    plain = {"int": "0", "float": "0", "true or false": "false"}
    if kind in ("int", "float") and number:
        return number[0]
    opening = {"l": "[]", "d": "{}", "n": "null"}.get(kind[:1], "null")
    return plain.get(kind) or (" ".join(question.split()[:8]) if kind == "str" else opening)


@frozen
class _HttpLM:
    """An LM behind a URL: two pure functions for its format, and idle clients to ask with.

    One client for each call under way, kept alive between calls: a shared one slows down with the
    number of connections. Clients are made where they are used, never sent to another process.
    """

    url: str
    model: str
    encode: Callable[[Request], dict[str, Any]]
    decode: Callable[[Any], Response]
    authorize: Callable[[str], dict[str, str]]
    key: str | None = field(repr=False)
    key_name: str = field(repr=False)
    headers: Record = field(repr=False)
    defaults: Record
    concurrency: int
    timeout: float
    price: tuple[float, float] | None
    client: httpx.Client | None = field(repr=False, eq=False)
    _idle: dict[int, deque[httpx.Client]] = field(factory=dict, init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        weakref.finalize(self, _close, self._idle)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, a.name) for a in attrs.fields(type(self)) if a.init)

    @property
    def identity(self) -> str:
        """What beside a request decides the answer: end point, model and defaults."""
        return canonical([self.url, self.model, self.defaults])

    def close(self) -> None:
        """Close the idle connections; the next call opens new ones."""
        _close(self._idle)

    def __call__(self, request: Request) -> Response:
        payload = {"model": self.model, **self.defaults, **self.encode(request)}
        key = (self.key or os.environ.get(self.key_name) or "").strip()
        if self.key_name and not key:
            todo = f"set it, or pass api_key= to the LM of {self.url}"
            raise Unauthorized("no API key", self.key_name, "an API key", todo)
        hide = partial(_hide, [key, *map(str, self.headers.values())])
        headers = {"Content-Type": "application/json", **self.authorize(key), **self.headers}
        status, after, body = self._post(_dump(jsonable(payload)).encode(), headers, hide)
        if status != 200:
            raise _http_error(self.url, status, after, hide(body.decode("utf-8", "replace")))
        response = self._decoded(body, hide)
        return evolve(response, usage=_priced(response.usage, self.price))

    def _decoded(self, body: bytes, hide: Callable[[str], str]) -> Response:
        try:
            return self.decode(jsonlib.loads(body))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            text = hide(body.decode("utf-8", "backslashreplace"))
            what = f"{self.url} sent an answer that cannot be read ({type(error).__name__})"
            facts = {"status": 200, "body": cut(text), "retryable": True}
            expected, todo = "a completion as JSON in UTF-8", "ask again, or check base_url"
            raise LMError(what, text, expected, todo, **facts) from None

    def _post(
        self, content: bytes, headers: dict[str, str], hide: Callable[[str], str]
    ) -> tuple[int, str, bytes]:
        import httpx

        try:
            response = self._send(content, headers)
            return response.status_code, response.headers.get("retry-after", ""), response.content
        except httpx.TimeoutException:
            what = f"{self.url} did not answer in time"
            expected = f"an answer in {self.timeout} s"
            failure: LMError = LMTimeout(what, None, expected, "ask again", retryable=True)
        except (httpx.RequestError, httpx.InvalidURL, UnicodeError) as error:
            what, shown = f"{self.url} cannot be reached ({type(error).__name__})", hide(str(error))
            failure = LMError(what, shown, "an HTTP answer", "check it and base_url")
            failure.retryable = isinstance(error, httpx.TransportError) and not isinstance(
                error, httpx.UnsupportedProtocol
            )
        raise failure  # out here, so that no httpx error with the headers hangs on it

    def _send(self, content: bytes, headers: dict[str, str]) -> httpx.Response:
        import httpx

        if self.client is not None:
            return self.client.post(self.url, content=content, headers=headers)
        idle = self._idle.setdefault(os.getpid(), deque())
        try:
            client = idle.pop()
        except IndexError:
            client = httpx.Client(timeout=self.timeout)
        try:
            response = client.post(self.url, content=content, headers=headers)
        except BaseException:
            client.close()
            raise
        idle.append(client)
        return response


def _close(idle: dict[int, deque[httpx.Client]]) -> None:
    clients = idle.get(os.getpid(), deque())
    while clients:
        clients.pop().close()


def _hide(secrets: Iterable[str], text: str) -> str:
    """Blot secrets out of a text, piece by piece: a line break inside may be shown escaped."""
    for piece in concat(secret.split() for secret in secrets):
        if len(piece) >= 8:  # shorter ones are names like "none", and parts of many words
            text = text.replace(piece, "***")
    return text


def _http_error(url: str, status: int, after: str, text: str) -> LMError:
    """Map a failed HTTP answer to the error of whose fault it is."""
    kinds: dict[int, tuple[type[LMError], str]] = {
        401: (Unauthorized, "check the API key"),
        403: (Unauthorized, "check what the API key may do"),
        408: (LMTimeout, "ask again"),
        429: (RateLimited, "wait, or raise the quota"),
    }
    kind, todo = kinds.get(status, (LMError, "ask again" if status >= 500 else "see the answer"))
    if status in (400, 413) and re.search(r"context.?(length|window)|too long", text, re.I):
        kind, todo = ContextWindowExceeded, "shorten the prompt: fewer or shorter demonstrations"
    retryable = (status in (408, 409, 429) or status >= 500) and "insufficient_quota" not in text
    problem = explain(f"{url} answered {status}", text, "200", todo)
    wait = _seconds(after)
    return kind(problem, status=status, body=cut(text), retryable=retryable, retry_after=wait)


def _seconds(after: str) -> float | None:
    """Read a Retry-After header: seconds, or the date to wait for."""
    try:
        return max(0.0, float(after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except ValueError:
        return None


def _priced(spent: Usage, price: tuple[float, float] | None) -> Usage:
    if price is None:
        return spent
    cost = spent.input_tokens * price[0] + spent.output_tokens * price[1]
    return evolve(spent, cost=cost / 1e6)


def _openai_encode(request: Request) -> dict[str, Any]:
    """Write a request in the OpenAI chat-completions format."""
    options = {
        "model": request.model,
        "messages": [_openai_message(one) for one in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "top_p": request.top_p,
        "stop": list(request.stop) or None,
        "tools": [_openai_tool(one) for one in request.tools] or None,
        "tool_choice": request.tool_choice,
        "response_format": request.schema
        and {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": request.schema},
        },
    }
    given: dict[str, Any] = valfilter(lambda value: value is not None, options)
    return given | dict(request.extra)


def _openai_decode(data: Any) -> Response:
    """Read a response in the OpenAI chat-completions format."""
    choice = data["choices"][0]
    message = choice["message"]
    spent = data.get("usage") or {}
    text = message.get("content") or message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    return Response(
        text,
        tool_calls=tuple(map(_openai_tool_call, message.get("tool_calls") or ())),
        usage=Usage(
            calls=1,
            input_tokens=spent.get("prompt_tokens") or 0,
            output_tokens=spent.get("completion_tokens") or 0,
            cached_tokens=get_in(["prompt_tokens_details", "cached_tokens"], spent) or 0,
        ),
        model=data.get("model") or "",
        finish_reason=choice.get("finish_reason") or "stop",
        reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
        logprobs=choice.get("logprobs"),
    )


def _openai_message(one: Message) -> dict[str, Any]:
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments.to_json()},
        }
        for call in one.tool_calls
    ]
    content: Any = one.text
    if one.text is not one.content:
        content = [{"type": "text", "text": one.text}, *map(_openai_media, one.content[1:])]
    made = {"role": one.role, "content": content, "tool_call_id": one.tool_call_id}
    return {
        n: v for n, v in (made | {"tool_calls": calls}).items() if v or n in ("role", "content")
    }


def _openai_media(one: Media) -> dict[str, Any]:
    if isinstance(one, Image):
        return {"type": "image_url", "image_url": {"url": one.url}}
    kind, data = _inline(one)
    if isinstance(one, Audio):
        form = kind.partition("/")[2].removeprefix("x-")
        return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
    return {"type": "file", "file": {"filename": one.name or "file", "file_data": one.url}}


def _inline(one: Media) -> tuple[str, str]:
    """The media type and the base64 text of a data URI."""
    head, _, data = one.url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        what, todo = f"{one.kind} by URL cannot be sent", f"use {type(one).__name__}.from_path"
        raise DataError(what, one.url, "a data URI in base64", todo)
    return head.removeprefix("data:").removesuffix(";base64"), data


def _openai_tool(one: Any) -> Any:
    if not isinstance(one, Tool):
        return one
    function = {"name": one.name, "description": one.desc, "parameters": one.schema}
    return {"type": "function", "function": function}


def _openai_tool_call(data: Any) -> ToolCall:
    called = data["function"]
    given = _data(called["arguments"] or "{}")
    # What is no object cannot be told from a wrong argument: the tool will say what it expects.
    arguments = given if isinstance(given, dict) else {"arguments": called["arguments"]}
    return ToolCall(data.get("id") or "", called["name"], arguments)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


_OPENAI = "https://api.openai.com/v1"


def openai_lm(
    model: str,
    *,
    base_url: str = _OPENAI,
    api_key: str | None = None,
    concurrency: int = 16,
    timeout: float = 60.0,
    headers: Mapping[str, str] | None = None,
    price: tuple[float, float] | None = None,
    client: httpx.Client | None = None,
    **defaults: Any,
) -> LM:
    """Make an LM that speaks the OpenAI chat-completions format over HTTP.

    It serves OpenAI, vLLM, SGLang, Ollama, LM Studio, llama.cpp, OpenRouter and whatever else has
    that end point. A value of it pickles and shows no key; connections open at the first call.

    Args:
        model: as the provider names it.
        base_url: of the provider, without "/chat/completions".
        api_key: by default, at OpenAI only, the environment variable OPENAI_API_KEY.
        concurrency: how many calls `evaluate` and the optimizers make at once, 1 or more.
        timeout: seconds to wait for the provider.
        headers: further HTTP headers.
        price: US dollars for a million tokens read, and for a million written.
        client: an `httpx.Client` to use instead of our own.
        **defaults: fields of the request body where a request does not set them.

    Raises:
        LMError: (when asked) `Unauthorized`, `RateLimited`, `ContextWindowExceeded`, `LMTimeout` or
            itself; `retryable` tells whether asking again may help. No error holds the key.

    Calls: one HTTP request for each call; it never retries by itself.

    >>> openai_lm("gpt-4o-mini", api_key="secret", temperature=0).model
    'gpt-4o-mini'
    """
    return _HttpLM(
        url=base_url.rstrip("/") + "/chat/completions",
        model=model,
        encode=_openai_encode,
        decode=_openai_decode,
        authorize=_bearer,
        key=api_key,
        key_name="OPENAI_API_KEY" if base_url == _OPENAI else "",
        headers=Record(headers or {}),
        defaults=Record(jsonable(defaults)),
        concurrency=concurrency,
        timeout=timeout,
        price=price,
        client=client,
    )


def _anthropic_encode(request: Request) -> dict[str, Any]:
    """Write a request in the Anthropic Messages format; its schema has no place there."""
    said = [one for one in request.messages if one.role != "system"]
    options = {
        "model": request.model,
        "system": "\n\n".join(one.text for one in request.messages if one.role == "system") or None,
        "messages": list(concat(map(_anthropic_turn, partitionby(_is_result, said)))),
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "top_p": request.top_p,
        "stop_sequences": list(request.stop) or None,
        "tools": [_anthropic_tool(one) for one in request.tools] or None,
        "tool_choice": request.tool_choice,
    }
    given: dict[str, Any] = valfilter(lambda value: value is not None, options)
    return given | dict(request.extra)


def _is_result(one: Message) -> bool:
    return one.role == "tool"


def _anthropic_turn(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as they are, but the results of one round of calls in one message of the user."""
    if not _is_result(messages[0]):
        return [{"role": one.role, "content": _anthropic_content(one)} for one in messages]
    results = [
        {"type": "tool_result", "tool_use_id": one.tool_call_id, "content": one.text}
        for one in messages
    ]
    return [{"role": "user", "content": results}]


def _anthropic_content(one: Message) -> str | list[dict[str, Any]]:
    media = [] if one.text is one.content else list(one.content[1:])
    if not media and not one.tool_calls:
        return one.text
    text = [{"type": "text", "text": one.text}] if one.text else []
    calls = [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": jsonable(call.arguments)}
        for call in one.tool_calls
    ]
    return [*text, *map(_anthropic_media, media), *calls]


def _anthropic_media(one: Media) -> dict[str, Any]:
    if isinstance(one, Audio):
        raise DataError("audio cannot be sent", one, "an image or a file", "use another provider")
    source = {"type": "url", "url": one.url}
    if one.url.startswith("data:"):
        kind, data = _inline(one)
        source = {"type": "base64", "media_type": kind, "data": data}
    title = {"title": one.name} if one.name and isinstance(one, File) else {}
    return {"type": "image" if isinstance(one, Image) else "document", "source": source, **title}


def _anthropic_tool(one: Any) -> Any:
    if not isinstance(one, Tool):
        return one
    return {"name": one.name, "description": one.desc, "input_schema": one.schema}


_STOPPED = {"max_tokens": "length", "tool_use": "tool_calls"}


def _anthropic_decode(data: Any) -> Response:
    """Read a response in the Anthropic Messages format."""
    parts = groupby(lambda part: part["type"], data["content"])
    spent = data.get("usage") or {}
    read_, made_ = spent.get("cache_read_input_tokens"), spent.get("cache_creation_input_tokens")
    return Response(
        "".join(part["text"] for part in parts.get("text", ())),
        tool_calls=tuple(
            ToolCall(part["id"], part["name"], part["input"]) for part in parts.get("tool_use", ())
        ),
        usage=Usage(
            calls=1,
            input_tokens=(spent.get("input_tokens") or 0) + (read_ or 0) + (made_ or 0),
            output_tokens=spent.get("output_tokens") or 0,
            cached_tokens=read_ or 0,
        ),
        model=data.get("model") or "",
        finish_reason=_STOPPED.get(data.get("stop_reason"), "stop"),
        reasoning="".join(part["thinking"] for part in parts.get("thinking", ())),
    )


def _api_key(key: str) -> dict[str, str]:
    return {"anthropic-version": "2023-06-01", **({"x-api-key": key} if key else {})}


_ANTHROPIC = "https://api.anthropic.com/v1"


def anthropic_lm(
    model: str, *, base_url: str = _ANTHROPIC, api_key: str | None = None, **options: Any
) -> LM:
    """Make an LM that speaks the Anthropic Messages format over HTTP.

    Args:
        model: as the provider names it.
        base_url: of the provider, without "/messages".
        api_key: by default, at Anthropic only, the environment variable ANTHROPIC_API_KEY.
        **options: what else `openai_lm` takes; `max_tokens`, which this format demands, is 4096
            unless it is given.

    Raises:
        LMError: (when asked) as `openai_lm`.

    Calls: one HTTP request for each call; it never retries by itself.

    >>> anthropic_lm("claude-sonnet-4-5", api_key="secret").url
    'https://api.anthropic.com/v1/messages'
    """
    made = typing.cast(_HttpLM, openai_lm(model, base_url=base_url, api_key=api_key, **options))
    return evolve(
        made,
        url=base_url.rstrip("/") + "/messages",
        encode=_anthropic_encode,
        decode=_anthropic_decode,
        authorize=_api_key,
        key_name="ANTHROPIC_API_KEY" if base_url == _ANTHROPIC else "",
        defaults=Record({"max_tokens": 4096}) | made.defaults,
    )


def connect(name: str, **options: Any) -> LM:
    """Make the LM of a name: "openai/MODEL", "anthropic/MODEL", "ollama/MODEL" or "toy".

    Args:
        name: provider and model.
        **options: for the maker of that LM, such as `temperature` or `api_key`.

    Raises:
        DataError: an unknown provider, or no model.

    >>> connect("ollama/llama3.2").url
    'http://localhost:11434/v1/chat/completions'
    """
    provider, _, model = name.partition("/")
    if name == "toy":
        return toy_lm(**options)
    if provider == "openai" and model:
        return openai_lm(model, **options)
    if provider == "anthropic" and model:
        return anthropic_lm(model, **options)
    if provider == "ollama" and model:  # on this machine
        return openai_lm(model, **{"base_url": "http://localhost:11434/v1", **options})
    known = "'openai/MODEL', 'anthropic/MODEL', 'ollama/MODEL' or 'toy'"
    raise DataError("unknown LM", name, known, "or make it with openai_lm(base_url=...)")


# == 11. Evaluation ================================================================================


@frozen
class Score:
    """What a metric returns where a number is not enough.

    Attributes:
        value: 0 (wrong) to 1 (right).
        feedback: what was wrong and how to do better, for reflective optimizers.
        steps: the same for single steps, by path.
    """

    value: float
    feedback: str = ""
    steps: Record = field(default=Record(), converter=_record)


Metric = Callable[[Record, Prediction], "float | bool | Score"]
"""metric(example, prediction) -> how good it is, 0 to 1; `prediction.trace` tells how it came."""


@frozen
class Row:
    """One example of an evaluation; where the program failed, `prediction` only has the trace."""

    example: Record
    prediction: Prediction
    score: float
    feedback: str = ""
    error: str = ""
    steps: Record = Record()


_Z95 = statistics.NormalDist().inv_cdf(0.975)


@frozen
class Evaluation:
    """The rows of an evaluation and what follows from them.

    >>> wrong, right = (Row(Record(), Prediction(), score) for score in (0.0, 1.0))
    >>> Evaluation((wrong, right, right, right))
    <score 0.750, 95% 0.301 to 0.954, 4 rows, 0 errors>
    """

    rows: tuple[Row, ...]

    @property
    def score(self) -> float:
        """The mean of the rows' scores, 0 to 1."""
        return self.total / len(self.rows)

    @property
    def total(self) -> float:
        """The sum of the rows' scores."""
        return math.fsum(row.score for row in self.rows)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score, by Wilson 1927.

        Made for scores that are 0 or 1; for scores between them it is wider than need be.
        """
        n, z, p = len(self.rows), _Z95, self.score
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def errors(self) -> tuple[Row, ...]:
        """The rows in which the program failed."""
        return tuple(row for row in self.rows if row.error)

    @property
    def usage(self) -> Usage:
        """What all runs cost together."""
        return sum((row.prediction.usage for row in self.rows), Usage())

    def records(self) -> list[Record]:
        """Return each row as one flat record, all with the same fields."""
        rows = [_flat(row) for row in self.rows]
        names = dict.fromkeys(concat(rows))
        return [Record({name: row.get(name, "") for name in names}) for row in rows]

    def table(self, limit: int = 20) -> str:
        """Return the first rows as a text table, cells cut to 30 characters."""
        rows = self.records()[:limit]
        cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        left = len(self.rows) - len(rows)
        return "\n".join([*lines, f"... and {left} more rows"] if left else lines)

    def to_csv(self) -> str:
        """Return the rows as CSV, with a header; structured values as JSON."""
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(self.records()[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: _shown(v) for n, v in row.items()} for row in self.records())
        return out.getvalue()

    def to_json(self) -> str:
        """Return the rows as a JSON list of objects."""
        return _dump(jsonable(self.records(), other=repr), indent=1)

    def _repr_html_(self) -> str:
        rows = self.records()[:100]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        body = "".join(f"<tr>{''.join(map(_html_cell, row.values()))}</tr>" for row in rows)
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>"

    def __repr__(self) -> str:
        low, high = self.interval
        counts = f"{len(self.rows)} rows, {len(self.errors)} errors"
        shown = f"; first: {self.errors[0].error}" if self.errors else ""
        return f"<score {self.score:.3f}, 95% {low:.3f} to {high:.3f}, {counts}{cut(shown)}>"


def _flat(row: Row) -> dict[str, Any]:
    given = dict(row.example)
    made = {(f"predicted {n}" if n in given else n): v for n, v in row.prediction.items()}
    notes = {"feedback": row.feedback, "error": row.error}
    return {"score": row.score, **given, **made, **{n: note for n, note in notes.items() if note}}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else _dump(jsonable(value, other=repr))


def _cell(value: Any) -> str:
    return cut(" ".join(_shown(value).split()), 30)


def _html_cell(value: Any) -> str:
    return f"<td>{html.escape(_cell(value))}</td>"


def evaluate(
    program: Program,
    dataset: Iterable[Mapping[str, Any]],
    metric: Metric,
    *,
    lm: LM,
    params: Mapping[str, Prompt] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    failure_score: float = 0.0,
    max_errors: int | None = None,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> Evaluation:
    """Run a program on a data set and score each prediction.

    A row in which the program itself fails (a reply that cannot be read, a tool that raises) gets
    `failure_score`. What would fail on every row (a dead key, a spent budget, a wrong metric) is no
    wrong answer: it is raised at once.

    Args:
        program: the program.
        dataset: examples with at least the inputs of the program.
        metric: (example, prediction) -> 0 to 1, bool, or `Score`; called on the workers.
        lm: what answers the requests.
        params: prompts instead of the program's own.
        workers: threads; by default what the LM declares as `concurrency`, else this thread only.
        executor: any `concurrent.futures.Executor` to run on instead.
        failure_score: of a row in which the program failed, 0 to 1.
        max_errors: stop when more rows than this have failed.
        progress: called as tqdm is, with an iterable, `total=` and `desc=`.

    Returns:
        the evaluation, its rows in the order of the data set.

    Raises:
        DataError: no examples, or one lacks an input; more than `max_errors` rows failed.
        MetricError: the metric raised, or returned no number from 0 to 1; says for which row.
        LMError: the LM could not be asked.

    Calls: `program.max_calls` at most for each example.

    >>> qa = predict("question -> answer")
    >>> lm = mock_lm(lambda inputs: {"answer": "4"})
    >>> data = [{"question": "2+2?", "answer": "4"}, {"question": "2+3?", "answer": "5"}]
    >>> evaluate(qa, data, exact_match, lm=lm).score
    0.5
    """
    ready = program if params is None else program.with_params(params)
    examples = check_dataset(ready, dataset)
    work = partial(_row, ready, lm, metric, failure_score)
    threads = workers_for(lm, workers)
    rows: list[Row] = []
    failed = 0
    with closing(ordered_map(work, examples, workers=threads, executor=executor)) as pending:
        for row in (progress or _same_items)(pending, total=len(examples), desc="evaluate"):
            if isinstance(row, MetricError):
                row.rows = tuple(rows)
                raise row
            rows.append(row)
            failed += bool(row.error)
            if max_errors is not None and failed > max_errors:
                what, todo = f"{failed} of {len(rows)} rows failed; the last", "correct the program"
                known = f"at most {max_errors}"
                raise DataError(what, row.error, known, todo, rows=tuple(rows))
    return Evaluation(tuple(rows))


def _same_items(items: Iterable[T], **_: Any) -> Iterable[T]:
    return items


def check_dataset(program: Program, dataset: Iterable[Mapping[str, Any]]) -> tuple[Record, ...]:
    """Return a data set as records, after checking that each has the program's inputs.

    Raises:
        DataError: it is empty, or an example lacks an input; says which.

    >>> check_dataset(predict("question -> answer"), [{"question": "2+2?"}])
    (Record(question='2+2?'),)
    """
    examples = _records(dataset)
    if not examples:
        raise DataError("an empty data set", [], "at least one example", "add examples")
    for index, example in enumerate(examples):
        try:
            select_inputs(program, example)
        except DataError as error:
            raise DataError(f"example {index}: {error}") from error
    return examples


def _row(
    program: Program, lm: LM, metric: Metric, failure_score: float, example: Record
) -> Row | MetricError:
    events: list[Event] = []
    try:
        prediction = _run(program, lm, select_inputs(program, example), events)
    except Exception as error:
        if stops(error):
            raise
        failed = Prediction(trace=events)
        return Row(example, failed, failure_score, error=describe(error))
    try:
        score = _measure(metric, example, prediction)
    except MetricError as error:
        return error
    return Row(example, prediction, score.value, score.feedback, "", score.steps)


def stops(error: Exception) -> bool:
    """Tell whether an error would fail every row alike, so that it must stop an evaluation.

    >>> stops(Unauthorized("no key")), stops(ParseError("no answer")), stops(ZeroDivisionError())
    (True, False, False)
    """
    return isinstance(error, LmoptError) and not isinstance(
        error, (ParseError, ContextWindowExceeded)
    )


def _measure(metric: Metric, example: Record, prediction: Prediction) -> Score:
    row = {"example": dict(example), "prediction": dict(prediction)}
    try:
        result = metric(example, prediction)
    except (LMError, BudgetExceeded, ReplayMiss):
        raise  # of a judge
    except Exception as error:
        what = f"the metric raised {type(error).__name__} ({error}) for"
        raise MetricError(what, row, "a score", "correct the metric") from error
    score = result if isinstance(result, Score) else Score(result)
    if not (hasattr(score.value, "__float__") and 0.0 <= float(score.value) <= 1.0):
        what = f"the metric returned {cut(repr(result), 60)} for"
        raise MetricError(what, row, "a number from 0 to 1", "correct or rescale it")
    return evolve(score, value=float(score.value))


@frozen
class Comparison:
    """How much better the second of two evaluations is, row by row.

    Attributes:
        difference: mean score of the second minus that of the first, -1 to 1.
        interval: its 95 % interval.
        p_value: how probable such a difference is when there is none.
        better: number of rows in which the second scores higher.
        worse: number of rows in which it scores lower.
        rows: number of rows.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    better: int
    worse: int
    rows: int


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two evaluations of the same examples: what going from `a` to `b` gains.

    The test is that of random signs (Fisher 1935) in its normal approximation, which for scores of
    0 and 1 is McNemar's; the interval is the one that excludes 0 exactly where p < 0.05.

    Raises:
        DataError: the evaluations are not of the same examples.

    >>> rows = [Row(Record(n=n), Prediction(), 0.0) for n in range(9)]
    >>> c = compare(Evaluation(tuple(rows)), Evaluation(tuple(evolve(r, score=1.0) for r in rows)))
    >>> c.difference, round(c.p_value, 4)
    (1.0, 0.0027)
    """
    if [row.example for row in a.rows] != [row.example for row in b.rows]:
        sizes = (len(a.rows), len(b.rows))
        todo = "evaluate both on one data set"
        raise DataError("different examples", sizes, "the same, in the same order", todo)
    gains = [after.score - before.score for before, after in zip(a.rows, b.rows, strict=True)]
    n, mean = len(gains), math.fsum(gains) / len(gains)
    error = math.sqrt(math.fsum(gain * gain for gain in gains)) / n
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else 1.0
    interval = (max(-1.0, mean - _Z95 * error), min(1.0, mean + _Z95 * error))
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Comparison(mean, interval, p, better, worse, n)


def _labels(
    example: Mapping[str, Any], prediction: Mapping[str, Any], name: str | None
) -> list[tuple[Any, Any]]:
    """Pair the expected and the predicted value of one field, or of all that both have."""
    names = [name] if name else [one for one in prediction if one in example]
    for one in names or ["(any)"]:
        if one not in example or one not in prediction:
            expected = f"a field of {list(example)} and of {list(prediction)}"
            raise DataError("no field to compare", one, expected, "name it: field=")
    return [(example[one], prediction[one]) for one in names]


def normalize(value: Any) -> str:
    """Return a text without what seldom matters: case, accents' form, punctuation, articles.

    Signs and points of numbers stay, and so does a text that is nothing but an article.

    >>> normalize("The  Eiffel-Tower!"), normalize("$1,234.50"), normalize("-5"), normalize("A")
    ('eiffel tower', '1234.50', '-5', 'a')
    """
    text = value if isinstance(value, str) else _dump(jsonable(value))
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3})|['’]", "", text)
    tokens = re.findall(r"(?<!\w)-?\d+(?:\.\d+)?|\w+|[^\w\s!-/:-@\[-`{-~]", text)
    return " ".join([one for one in tokens if one not in ("a", "an", "the")] or tokens)


def exact_match(
    example: Mapping[str, Any], prediction: Mapping[str, Any], *, field: str | None = None
) -> float:
    """Score 1 where the predicted values equal the expected ones after `normalize`, else 0.

    Args:
        example: with the expected values.
        prediction: with the values of the program.
        field: the one to compare; by default all that both have must match.

    Raises:
        DataError: they have no such field in common.

    >>> exact_match({"answer": "Paris"}, {"answer": "paris."})
    1.0
    """
    pairs = _labels(example, prediction, field)
    return float(all(normalize(expected) == normalize(made) for expected, made in pairs))


def f1(
    example: Mapping[str, Any], prediction: Mapping[str, Any], *, field: str | None = None
) -> float:
    """Score the overlap of words: the harmonic mean of precision and recall, 0 to 1.

    Args:
        example: with the expected values.
        prediction: with the values of the program.
        field: the one to compare; by default the mean over all that both have.

    Raises:
        DataError: they have no such field in common.

    Reference: Rajpurkar et al. 2016, arXiv 1606.05250.

    >>> f1({"answer": "Paris"}, {"answer": "Paris, France"})
    0.6666666666666666
    """
    return statistics.fmean(_overlap(*pair) for pair in _labels(example, prediction, field))


def _overlap(expected: Any, made: Any) -> float:
    wanted, given = Counter(normalize(expected).split()), Counter(normalize(made).split())
    total = wanted.total() + given.total()
    return 2 * (wanted & given).total() / total if total else 1.0


# == 12. Storage ===================================================================================


def dumps(params: Mapping[str, Prompt]) -> str:
    """Return parameters as JSON text, stable and fit to be compared line by line.

    Raises:
        DataError: a demonstration holds a value that has no JSON form.

    >>> loads(dumps(predict("question -> answer").params))["predict"].demos
    ()
    """
    prompts = {path: _compact(jsonable(prompt)) for path, prompt in params.items()}
    return _dump({"format": _FORMAT, "params": prompts}, indent=2) + "\n"


_FORMAT = "lmopt params 1"


def _compact(prompt: dict[str, Any]) -> dict[str, Any]:
    blank = jsonable(Prompt())
    return {n: v for n, v in prompt.items() if v != blank[n] or n == "instructions"}


def loads(text: str) -> Params:
    """Return the parameters of a text that `dumps` wrote.

    Raises:
        ParamsError: it is not such a text; says where.

    >>> loads(dumps({"predict": Prompt("Be brief.")}))["predict"].instructions
    'Be brief.'
    """
    try:
        data = jsonlib.loads(text)
    except (ValueError, RecursionError) as error:
        todo = f"restore the file ({error})"
        raise ParamsError("these are no parameters", text, "JSON", todo) from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        todo = "save parameters with this version"
        raise ParamsError("these are no parameters", text, f"format {_FORMAT!r}", todo)
    prompts: Any = data.get("params")
    try:
        params = Params(coerce(dict[str, Prompt], prompts))
        for name in set(concat(prompts.values())) - set(jsonable(Prompt())):
            raise ValueError(f"{name!r} is no part of a prompt")
        return params
    except ValueError as error:
        todo = f"correct it ({error})"
        raise ParamsError("a wrong prompt", prompts, words(Prompt), todo) from error


def save(params: Mapping[str, Prompt], path: str | os.PathLike[str]) -> None:
    """Write parameters to a file, whole or not at all: a crash leaves the old one.

    Raises:
        DataError: a demonstration holds a value that has no JSON form; nothing was written.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"predict": Prompt("Be brief.")}, Path(folder, "params.json"))
    ...     load(Path(folder, "params.json"))["predict"].instructions
    'Be brief.'
    """
    text, target = dumps(params), Path(path).resolve()
    draft = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Params:
    """Return the parameters of a file that `save` wrote.

    Raises:
        ParamsError: it is not such a file.
        OSError: the file cannot be read.

    >>> load("none.json")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'none.json'
    """
    try:
        return loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ParamsError(
            "this is no text", str(path), "UTF-8", f"restore the file ({error})"
        ) from error
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from error


def diff(a: Mapping[str, Prompt], b: Mapping[str, Prompt]) -> str:
    """Return what changed from one set of parameters to another, "" for nothing.

    >>> old = predict("question -> answer").params
    >>> print(diff(old, old.replace("predict", instructions="Answer briefly.")))
    --- predict
    +++ predict
    -instructions: Given the fields `question`, produce the fields `answer`.
    +instructions: Answer briefly.
    """
    changes = [_changes(path, a.get(path), b.get(path)) for path in dict.fromkeys([*a, *b])]
    return "\n".join(filter(None, changes))


def _changes(path: str, a: Prompt | None, b: Prompt | None) -> str:
    lines = difflib.unified_diff(_prompt_lines(a), _prompt_lines(b), path, path, n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith("@@"))


def _prompt_lines(prompt: Prompt | None) -> list[str]:
    if prompt is None:
        return []
    rest = _compact(jsonable(evolve(prompt, instructions="", demos=())))
    return [
        *f"instructions: {prompt.instructions}".split("\n"),
        *(f"demo: {demo.to_json()}" for demo in prompt.demos),
        *(f"{name}: {_dump(value)}" for name, value in rest.items() if value),
    ]


def read_examples(path: str | os.PathLike[str]) -> tuple[Record, ...]:
    """Return the examples of a file: .csv (all values texts), .json (a list) or .jsonl.

    Raises:
        DataError: another kind of file, or something in it is wrong; says the line.
        OSError: the file cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "rows.csv").write_text("text,label\\nhello,greeting\\n")
    ...     read_examples(Path(folder, "rows.csv"))
    (Record(text='hello', label='greeting'),)
    """
    file = Path(path)
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_lines}
    if file.suffix.lower() not in readers:
        known = ", ".join(readers)
        raise DataError("unknown kind of file", str(file), known, "convert it")
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        problem = explain(
            f"line {line} is no UTF-8", raw[error.start :][:20], "UTF-8", "convert it"
        )
        raise DataError(f"{file}: {problem}") from error
    try:
        return tuple(readers[file.suffix.lower()](text))
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _read_lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield Record.from_json(line)
            except DataError as error:
                raise DataError(f"line {number}: {error}") from error


def _read_json(text: str) -> Iterator[Record]:
    try:
        data = jsonlib.loads(text)
    except jsonlib.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"line {error.lineno}: this is no JSON", line, "JSON", str(error)
        ) from error
    if not isinstance(data, list):
        raise DataError("line 1: no list", data, "a list of objects", "wrap it in [...]")
    for index, item in enumerate(data):
        if not isinstance(item, dict):
            raise DataError(f"item {index} is no object", item, "{...}", "correct it")
        yield Record(item)


def _read_csv(text: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if names and cells and len(cells) != len(names):
                what = f"line {reader.line_num} has {len(cells)} cells"
                raise DataError(what, cells, f"{len(names)}: {names}", "quote the commas")
            if names and cells:
                yield Record(zip(names, cells, strict=True))
            names = names or cells
            if len(set(names)) < len(names):
                what = f"line {reader.line_num} names a column twice"
                raise DataError(what, names, "distinct names", "rename one")
    except csv.Error as error:
        what = f"line {reader.line_num} is no CSV"
        raise DataError(what, str(error), "cells and commas", "correct it") from error
