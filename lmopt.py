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
8 Drivers · 9 Modules · 10 LMs · 11 Middleware · 12 Evaluation · 13 Storage

Arguments that mean the same everywhere:
    task: what `signature` takes; `instructions` and `types` are those of `signature` too.
    lm: what answers the requests: a function from `Request` to `Response`, plain or `async def`.
    inputs: exactly the input fields of the program; one that is missing or unknown is a DataError.
    params: prompts instead of the program's own.
    adapter: the format of messages and replies.
    settings: sampling options of the steps that are made: temperature, max_tokens, top_p, stop,
        rollout, extra.
    name: of the program; its path where it runs alone.
    program: of a module that runs another one, whose prompts then stand under its name.
    options: of a module: what else `predict` takes, for the steps that are made.
    interpreter: what runs code, such as `subprocess_python()`.
    n, m, k, most, max_steps, max_tries: how many; less than 1 is a SignatureError.
    workers: threads; by default what the LM declares as `concurrency`, else this thread only.
    executor: any `concurrent.futures.Executor` to run on instead of threads; one with other
        processes needs a program, an LM, a metric and rows that pickle.
    seed: of every random choice; any integer, 0 included.
    progress: called as tqdm is, with an iterable, `total=` and `desc=`; by default `meter`, where
        standard error is a terminal; False for none.
    watch: called with each `Event` as it ends, in the thread in which it does.
"""

from __future__ import annotations

import ast
import builtins
import codecs
import collections.abc as abc
import contextvars
import functools
import importlib
import inspect
import io
import itertools
import json as jsonlib  # `json` is an adapter here
import math
import operator
import os
import random
import re
import sys
import threading
import time
import types as pytypes
import typing
import warnings
import weakref
from collections import Counter, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import aclosing, closing, contextmanager, nullcontext, suppress
from datetime import date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from enum import Enum, EnumMeta
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar, Union

import attrs
from attrs import evolve, field, frozen
from toolz import (  # type: ignore[import-untyped]
    concat,
    first,
    get_in,
    groupby,
    keyfilter,
    merge,
    merge_with,
    partition,
    partition_all,
    partitionby,
    pluck,
    unique,
    valfilter,
    valmap,
)

# What only some calls need (asyncio, sqlite3, subprocess, httpx, ...) is imported where it is used:
# importing lmopt stays cheap.
if TYPE_CHECKING:
    import asyncio
    import sqlite3
    from concurrent.futures import Executor, Future

    import httpx

__version__ = "0.1.0"

__all__ = [
    # 1. Errors
    "LmoptError", "SignatureError", "ParamsError", "DataError", "MetricError", "ParseError",
    "LMError", "RateLimited", "ContextWindowExceeded", "Unauthorized", "LMTimeout",
    "Refused", "BudgetExceeded", "ReplayMiss",
    # 2. Records
    "Record", "Prediction", "Event", "Usage", "jsonable", "canonical", "as_text", "seeded",
    "factory", "Trace",
    # 4. Signatures
    "Field", "Signature", "signature",
    # 5. Messages
    "Image", "Audio", "File", "Message", "History", "Tool", "ToolCall", "Request", "Response",
    "LM", "transcript", "spans",
    # 6. Adapters
    "Adapter", "Part", "chat", "xml", "plain", "two_step", "strict", "render_outputs",
    # 7. Programs
    "Prompt", "Params", "Program", "program", "Run", "Call", "Sleep", "invoke", "preview",
    # 8. Drivers
    "Watch", "Chunk", "run", "arun", "stream", "astream", "replay", "run_many", "gathered",
    "through", "running", "drive", "adrive", "emit", "aemit",
    # 9. Modules
    "predict", "text", "chain_of_thought", "pipeline", "react", "Turn", "program_of_thought",
    "code_act", "recursive", "Result", "Cell", "subprocess_python", "best_of_n", "refine", "vote",
    "majority", "multi_chain_comparison", "sampled", "ensemble", "parallel", "each", "retrieve",
    "knn_demos", "surviving", "fitting", "unit",
    # 10. LMs
    "scripted_lm", "mock_lm", "stub_lm", "toy_lm", "openai_lm", "anthropic_lm", "Embedder",
    "embedder", "connect", "PROVIDERS",
    # 11. Middleware
    "Layer", "Middleware", "middleware", "identity", "retry", "throttle", "timeout", "cache",
    "record", "ReplayLM", "replay_lm", "budget", "budget_left", "route", "fallback", "log",
    # 12. Evaluation
    "Score", "Row", "Evaluation", "Metric", "evaluate", "aevaluate", "evaluating", "scoring",
    "rows_of", "Progress", "meter", "Comparison", "compare", "normalize", "exact_match", "f1",
    "contains", "passage_match", "Judge", "judge", "semantic_f1", "complete_and_grounded",
    # 13. Storage
    "save", "load", "write_whole", "dumps", "loads", "diff", "read_examples",
]  # fmt: skip

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")
M = TypeVar("M", bound="Media")
R = TypeVar("R", bound="Record")

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
    that an optimizer had when this error stopped it, `rows` what an evaluation had, and `trace`
    what a run had done until then.
    """

    best: Params | None = None
    rows: tuple[Row, ...] = ()
    trace: tuple[Event, ...] = ()

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


class ParseError(LmoptError, ValueError):
    """A reply does not hold the fields asked for; its raw text is in `response.text`."""

    field: str | None = None
    told: str = ""  # what a model is told of it
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


class Refused(LMError):
    """The model, or a filter of its provider, refuses to answer; `response` holds what it said."""

    response: Response | None = None


class BudgetExceeded(LmoptError, RuntimeError):
    """The next call would spend more than was allowed."""


class ReplayMiss(LmoptError, LookupError):
    """An LM that only answers from a record has no answer for this request."""


def stops(error: Exception) -> bool:
    """Tell whether an error would fail every row alike, so that it must stop an evaluation.

    A request that the provider refuses (HTTP 400, 413, 422) concerns its own row only, and so does
    one that it could not answer just then. What an LM function raises that is no error of ours is
    an error of that code.

    >>> stops(Unauthorized("no key")), stops(ParseError("no answer")), stops(ZeroDivisionError())
    (True, False, False)
    >>> stops(LMError("no", status=400)), stops(LMError("no", retryable=True)), stops(LMError("no"))
    (False, False, True)
    """
    if not isinstance(error, LmoptError):
        return bool(getattr(error, "of_lm", False))
    of_one_row = isinstance(error, LMError) and (error.status in (400, 413, 422) or error.retryable)
    return not (of_one_row or isinstance(error, _PASSING))


_PASSING = (ParseError, ContextWindowExceeded, Refused)


# == 2. Records ====================================================================================

Fields = Mapping[str, Any]
Dataset = Iterable[Fields]
Path_ = str | os.PathLike[str]
_Turn = Callable[[Any], Any] | None


def jsonable(value: Any, *, other: _Turn = None, media: _Turn = None) -> Any:
    """Return a value as plain JSON data: dicts, lists, strings, numbers, booleans and None.

    Of an attrs object, the attributes that take part in equality are written.

    Args:
        other: called with a value of an unknown type; without it that is a DataError.
        media: called with each image, audio or file; without it they are written out.

    >>> jsonable(Record(tags={"b", "a"}, who=Usage(calls=1)))["tags"]
    ['a', 'b']
    """
    kind: Any = type(value)
    if kind in (str, int, float, bool, type(None)):
        return value
    turn = partial(jsonable, other=other, media=media)
    if isinstance(value, Media):
        return media(value) if media else {value.kind: value.url, "name": value.name}
    if simpler := _simpler(kind):
        return turn(simpler(value))
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(turn(key)): turn(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [turn(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(turn, value), key=canonical)
    if other is not None:
        return other(value)
    raise DataError(f"a {kind.__name__} has no JSON form", value, "plain data", "convert it first")


def _is_text_like(kind: Any) -> bool:
    """Whether values of a class are made from a text and written as one: addresses, URLs, IDs."""
    return isinstance(kind, type) and (
        kind.__module__ in ("uuid", "pathlib", "ipaddress")
        or (hasattr(kind, "__get_pydantic_core_schema__") and not hasattr(kind, "model_fields"))
    )


# The simpler value that stands for one in JSON, by its class or by an attribute that this has.
_SIMPLER: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (Enum, lambda value: value.value),
    ((date, clock), lambda value: value.isoformat()),
    (timedelta, lambda value: value.total_seconds()),
    (Decimal, str),
    ("as_posix", lambda value: value.as_posix()),
    ("get_secret_value", lambda value: value.get_secret_value()),
    ("tolist", lambda value: value.tolist()),  # of numpy and pandas
    ("_asdict", lambda value: value._asdict()),
)


@lru_cache(maxsize=1000)
def _simpler(kind: Any) -> Callable[[Any], Any] | None:
    """What makes the simpler value of one of a class, or None where there is none."""
    for mark, simpler in _SIMPLER:
        if hasattr(kind, mark) if isinstance(mark, str) else issubclass(kind, mark):
            return simpler
    if getattr(kind, "__pydantic_root_model__", False):
        return operator.attrgetter("root")
    if attrs.has(kind):
        known = [a for a in attrs.fields(kind) if a.eq]
        return lambda value: {a.alias: getattr(value, a.name) for a in known}
    names: Any = getattr(kind, "__dataclass_fields__", getattr(kind, "model_fields", None))
    if names is not None:
        return lambda value: {name: getattr(value, name) for name in names}
    return str if _is_text_like(kind) else None


def canonical(value: Any, *, other: _Turn = None) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, the same on every machine.

    >>> canonical({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    return _encodable(_SORTED.encode(jsonable(value, other=other)))


def as_text(value: Any) -> str:
    """Return a text as it is, and anything else as JSON.

    >>> as_text("hello"), as_text([1, None])
    ('hello', '[1, null]')
    """
    return value if isinstance(value, str) else _dump(jsonable(value, other=repr))


_SORTED = jsonlib.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _dump(data: Any, **layout: Any) -> str:
    return _encodable(jsonlib.dumps(data, ensure_ascii=False, **layout))


def _encodable(text: str) -> str:
    # A lone surrogate cannot be encoded; its backslash escape is what JSON would write for it.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _sha256(text: str) -> str:
    from hashlib import sha256

    return sha256(text.encode()).hexdigest()


def _named(kind: str, mapping: Any) -> dict[str, Any]:
    """Copy a mapping whose keys are names."""
    try:
        data = dict(mapping)
    except (TypeError, ValueError) as error:
        what = f"a {kind} needs names"
        raise DataError(what, mapping, "a mapping", "pass a dict or name=value") from error
    if wrong := [name for name in data if not isinstance(name, str)]:
        raise DataError("a name is no text", wrong[0], "a str", "rename the field")
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
        return name in self._data  # seven times as fast as what Mapping makes of a missing name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return canonical(self, other=repr) == canonical(other, other=repr)

    def __hash__(self) -> int:
        return hash(canonical(self, other=repr))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._data.items())
        return f"{type(self).__name__}({fields})"

    def __setattr__(self, name: str, value: object = None) -> None:
        what = f"a {type(self).__name__} never changes"
        todo = f"make a new one: record | {{{name!r}: value}}"
        raise AttributeError(explain(what, name, "no assignment", todo))

    __delattr__ = __setattr__

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
        data = {} if name == "_data" else self._data  # an object that is being made has none yet
        if name in data:
            return data[name]
        known = f"one of: {', '.join(data) or 'none'}"
        raise AttributeError(explain("no such field", name, known, "correct the name"))

    def __or__(self, other: Fields) -> Record:
        return Record({**self._data, **other})

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._data]

    def to_json(self) -> str:
        """Return the fields as one line of JSON, in their own order."""
        return _dump(jsonable(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Return a record from the text of a JSON object; DataError where it is none."""
        try:
            data = jsonlib.loads(text)
        except (ValueError, RecursionError) as error:
            todo = f"correct it: {error}"
            raise DataError("this is no JSON", text, "one JSON object", todo) from error
        if isinstance(data, dict):
            return cls(data)
        raise DataError("no JSON object", text, "{...}", "wrap the value in an object")


class Prediction(Record):
    """The record that a program returns, with the `trace` of how it came about.

    Two predictions are equal when their fields are.

    >>> Prediction({"answer": "4"}).usage.calls
    0
    """

    __slots__ = ("trace",)
    trace: Trace

    def __init__(self, mapping: Any = (), /, *, trace: Iterable[Event] = (), **fields: Any) -> None:
        super().__init__(mapping, **fields)
        object.__setattr__(self, "trace", Trace(trace))

    @property
    def usage(self) -> Usage:
        """What the LM requests of the trace cost together."""
        return usage(self.trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Prediction, trace=self.trace), (self._data,)

    def _repr_html_(self) -> str:
        fields = "".join(_folded(f"{name}: {_line(value)}", value) for name, value in self.items())
        return fields + self.trace._repr_html_()


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

    def __str__(self) -> str:
        read, written = self.input_tokens, self.output_tokens
        calls = f"{self.calls} call{'s' * (self.calls > 1)}" if self.calls else ""
        tokens = f"{read}+{written} tokens" if read + written else ""
        return ", ".join(filter(None, (calls, tokens, f"${self.cost:.4f}" if self.cost else "")))

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(sum, zip(attrs.astuple(self), attrs.astuple(other), strict=True)))


def _owned(data: dict[str, Any], kind: type[R] = Record) -> R:  # type: ignore[assignment]
    """Make a record of a dict that is nobody else's and has names for keys: no check, no copy."""
    made = kind.__new__(kind)
    object.__setattr__(made, "_data", data)
    return made


def _tuple(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(values)


def _record(value: Fields) -> Record:
    return value if type(value) is Record else Record(value)


def _records(values: Dataset) -> tuple[Record, ...]:
    return tuple(map(_record, values))


@frozen
class Event:
    """One finished run of a step, one LM request, or one other effect.

    A trace lists them in the order in which they were yielded, a step after what it did. When it
    began, how long it took and the ids, by which spans are made of them, take no part in equality.
    """

    path: str  # of the step; for "lm" of the step that asked; for "call" with the function's name
    kind: Literal["step", "lm", "call"]
    inputs: Any = None  # the fields given to a step, or the arguments of a call
    outputs: Any = None  # the fields a step returned, or the result of a call
    request: Request | None = None  # of an "lm" event
    response: Response | None = None  # of an "lm" event that succeeded
    error: str = ""  # class and message where it failed, else ""
    parent: str = ""  # path of the step in which it happened, "" for the program itself
    seconds: float = field(default=0.0, eq=False)  # how long it took
    began: float = field(default=0.0, eq=False)  # when, in seconds since 1970
    id: int = field(default=0, eq=False)  # of all events of a run, from 1
    parent_id: int = field(default=0, eq=False)  # of the step in which it happened, or 0
    program: str = field(default="", eq=False)  # the name of the program that a step ran

    @property
    def name(self) -> str:
        """What to call it in a list of events."""
        if self.kind == "lm":
            return f"lm {self.response.model}".rstrip() if self.response else "lm"
        return self.path.rpartition(".")[2] + "()" * (self.kind == "call") or self.program or "run"

    def told(self, inside: Iterable[Event] = ()) -> tuple[str, str, str]:
        """Return how long it took, what it cost with what was inside, and what came of it."""
        spent = evolve(self.response.usage, calls=0) if self.response else usage(inside)
        cached = " (cached)" if self.response and self.response.cached else ""
        made = self.response.text if self.response else self.outputs
        came = _pairs(made) if isinstance(made, Mapping) else _line(made)
        took = f"{self.seconds:.2f} s" if self.seconds else ""
        return took, f"{spent}{cached}", f"failed: {_line(self.error)}" if self.error else came


class Trace(tuple[Event, ...]):
    """The events of a run, in the order in which they were yielded, a step after what it did.

    Printed, it is the tree of its steps, with seconds, calls, tokens and dollars; texts are cut.

    >>> asked = Event("hop", "lm", response=Response("Paris", usage=Usage(1, 12, 3)), parent="hop")
    >>> print(Trace([asked, Event("hop", "step", outputs=Record(city="Paris"))]))
    hop   1 call, 12+3 tokens  city: Paris
      lm  12+3 tokens          Paris
    """

    __slots__ = ()

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return Trace(found) if isinstance(place, slice) else found

    def tree(self) -> Iterator[tuple[int, Event, list[Event]]]:
        """Yield how deep each event is, the event, and those inside of it; a step comes first."""
        trees: list[list[tuple[int, Event, list[Event]]]] = []  # each begins with its outer event
        for event in self:
            start = len(trees)
            while event.kind == "step" and start and trees[start - 1][0][1].parent == event.path:
                start -= 1
            below = [(depth + 1, one, inside) for depth, one, inside in concat(trees[start:])]
            trees[start:] = [[(0, event, [one for _, one, _ in below]), *below]]
        return iter(concat(trees))

    def to_json(self) -> str:
        """Return the trace as JSON, without times."""
        return _dump(jsonable(self, other=repr), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """Return the trace of a text that `to_json` wrote, fit for `replay`; may be a DataError."""
        try:
            return cls(coerce(tuple[Event, ...], jsonlib.loads(text)))
        except (ValueError, RecursionError) as error:
            todo = f"save one with to_json ({error})"
            raise DataError("this is no trace", text, "a list of events", todo) from error

    def __str__(self) -> str:
        rows = [("  " * depth + one.name, *one.told(inside)) for depth, one, inside in self.tree()]
        return _columns(rows)

    def _repr_html_(self) -> str:
        page = ""
        for depth, one, inside in self.tree():
            head = f"{one.name} {' '.join(one.told(inside))}"
            facts = {"inputs": one.inputs, "outputs": one.outputs, "error": one.error}
            told = "\n".join(f"{name}: {as_text(value)}" for name, value in facts.items() if value)
            full = transcript(Trace([one])) if one.request else told
            page += f'<div style="margin-left: {depth}em">{_folded(head, full)}</div>'
        return page


def _columns(rows: Iterable[Sequence[str]]) -> str:
    """A text table: each column as wide as its longest cell; one that is empty is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def _line(value: Any, limit: int = 60) -> str:
    """A value on one line, cut."""
    text = as_text(round(value, 4) if isinstance(value, float) else value)
    plain = "".join(one if one.isprintable() else " " for one in text[: 4 * limit])
    return cut(" ".join(plain.split()) + "…" * (len(text) > 4 * limit), limit)


def _pairs(fields: Fields) -> str:
    return ", ".join(f"{name}: {_line(value, 40)}" for name, value in fields.items())


def _folded(head: str, full: Any) -> str:
    """A line of HTML, and all of it on a click."""
    from html import escape

    look = "white-space: pre-wrap; overflow-wrap: anywhere"
    text = f'<pre style="{look}">{escape(as_text(full))}</pre>'
    return f"<details><summary>{escape(head)}</summary>{text}</details>"


_UNASKED = ("BudgetExceeded", "ReplayMiss")  # errors of requests that no LM was sent


def usage(trace: Iterable[Event]) -> Usage:
    """Sum what the LM requests of a trace cost.

    >>> usage([Event("predict", "lm", response=Response("hi", usage=Usage(input_tokens=3)))])
    Usage(calls=1, input_tokens=3, output_tokens=0, cached_tokens=0, cost=0.0)
    """
    asked = [one for one in trace if one.kind == "lm" and not one.error.startswith(_UNASKED)]
    spent = sum((one.response.usage for one in asked if one.response is not None), Usage())
    return evolve(spent, calls=len(asked))


def seeded(seed: int, *purpose: object) -> random.Random:
    """Return the random generator of one purpose, so that no order of threads can matter.

    >>> seeded(0, "shuffle", 1).random() == seeded(0, "shuffle", 1).random()
    True
    """
    return random.Random("/".join(map(str, (seed, *purpose))))


def factory(make: Callable[P, T]) -> Callable[P, T]:
    """Have what a function makes pickle as how it was made: by that function and its arguments.

    So what it makes may hold closures, and still be sent to other processes. For functions at the
    top level of a module that return a program, a middleware, a metric or an adapter. An argument
    that is a function without a name in a module is a DataError when it is pickled.

    >>> @factory
    ... def twice(program: Program) -> Program:
    ...     return pipeline(first=program, second=program)
    >>> twice(predict("text -> text_")).made[1]
    (<program predict(text) with prompts for predict>,)
    """

    @functools.wraps(make)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> T:
        # What can be read once only is kept, to be read again.
        given = tuple(tuple(one) if isinstance(one, Iterator) else one for one in args)
        named = {n: tuple(v) if isinstance(v, Iterator) else v for n, v in kwargs.items()}
        made: Any = make(*given, **named)  # type: ignore[arg-type]
        remade: T = evolve(made, made=(remembering, given, named))
        return remade

    return remembering


class Made:
    """What a `factory` makes: a record that pickles as how it was made."""

    __slots__ = ()
    made: Any  # the factory, its arguments, and those by name; or why it cannot be sent

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again(), ()

    def _again(self) -> partial[Any]:
        """What makes an equal record in another process."""
        if not isinstance(self.made, tuple):
            what = self.made or "nothing tells how this was made, so that it cannot be sent"
            raise DataError(what, self, "what a factory made", "make it there, or by a @factory")
        make, args, kwargs = self.made
        given = inspect.signature(make).bind(*args, **kwargs).arguments
        for name, found in valfilter(bool, valmap(_nameless, given)).items():
            what = f"the argument {name!r} of {make.__name__.lstrip('_')} cannot be sent elsewhere"
            todo = "define it with `def` at the top level of a module"
            raise DataError(what, found[0], "a function with a name", todo)
        return partial(make, *args, **kwargs)


def _nameless(value: Any) -> list[Any]:
    """The lambdas, and the functions from inside of others, that a value is or holds."""
    if isinstance(value, partial):
        value = (value.func, *value.args)
    elif attrs.has(type(value)) and not isinstance(value, Made):
        value = attrs.astuple(value, recurse=False)
    if isinstance(value, (list, tuple)):
        return list(concat(map(_nameless, value)))
    return [value] if "<" in getattr(value, "__qualname__", "") else []


def _made() -> Any:
    return field(default=None, eq=False, repr=False, kw_only=True)


# == 3. Types ======================================================================================
# A type is seen as a shape: what kind it is, and its parts. Each function below has one case for
# each kind. Nothing is remembered between calls, because types that compare equal may read
# differently: Literal["a", "b"] and Literal["b", "a"].

Shape = tuple[str, tuple[Any, ...]]
"""One of scalar, choice, union, noted, row, list, dict, object; and its parts."""

STRUCTURED = ("row", "list", "dict", "object")
"""The kinds that are written as a JSON list or object."""

_LISTS = (
    list, tuple, set, frozenset,
    abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable,
)  # fmt: skip
_DICTS = (dict, abc.Mapping, abc.MutableMapping, Record)


def _same_as(tp: Any) -> Any:
    """The type that another one stands for: a name, a type variable, a class around one value."""
    if isinstance(tp, TypeVar):
        return tp.__bound__ or Any
    if getattr(tp, "__pydantic_root_model__", False):
        return tp.model_fields["root"].annotation
    return getattr(tp, "__supertype__", None) or getattr(tp, "__value__", None)


def shape(tp: Any) -> Shape:
    """Return what kind a type is of, and its parts.

    Raises:
        SignatureError: the type is not understood.

    >>> shape(dict[str, int]), shape(Literal["a", "b"])
    (('dict', (<class 'str'>, <class 'int'>)), ('choice', ('a', 'b')))
    """
    origin, args = typing.get_origin(tp) or tp, typing.get_args(tp)
    if (isinstance(tp, type) or tp in (None, Any)) and tp in _SCALARS:
        return "scalar", _SCALARS[tp]
    if origin is Literal or isinstance(tp, EnumMeta):
        return "choice", args or tuple(tp)
    if origin in (Union, pytypes.UnionType):
        return "union", args
    if hasattr(tp, "__metadata__"):
        return "noted", (tp.__origin__, *_notes(tp.__metadata__))
    if (same := _same_as(tp)) is not None:
        return "noted", (same,)
    if (scalar := _class_of_texts(tp)) is not None:
        return "scalar", scalar
    if origin is tuple and tp is not tuple and args[1:] != (...,):
        return "row", args
    if origin in _LISTS:
        return "list", args[:1] or (Any,)
    if origin in _DICTS:
        return "dict", args or (str, Any)
    if (known := _attributes(tp)) is not None:
        return "object", known
    expected = "str, int, float, bool, Literal, an Enum, X | None, list, dict, a class"
    raise SignatureError("unknown type", tp, expected, "use one of these")


def _kind(tp: Any) -> str:
    """What kind of type it is, whatever is noted on it."""
    kind, parts = shape(tp)
    return _kind(parts[0]) if kind == "noted" else kind


def _has_media(tp: Any, inside: tuple[Any, ...] = ()) -> bool:
    kind, parts = shape(tp)
    if kind in ("scalar", "choice") or tp in inside:
        return kind == "scalar" and parts[2] is _to_media
    inner = [one.type for one in parts] if kind == "object" else parts
    inner = inner[:1] if kind == "noted" else inner
    return any(_has_media(one, (*inside, tp)) for one in inner)


def words(tp: Any, inside: tuple[Any, ...] = ()) -> str:
    """Describe a type in the few words that a prompt has room for.

    Args:
        tp: the type.
        inside: the classes around it, so that one that holds itself comes to an end.
    Raises:
        SignatureError: the type, or a type inside it, is not understood.

    >>> words(Literal["billing", "bug"]), words(list[float | None])
    ('one of "billing", "bug"', 'list[float or null]')
    """
    kind, parts = shape(tp)
    if kind == "scalar":
        return str(parts[0])
    if kind == "choice":
        return "one of " + ", ".join(_dump(jsonable(one)) for one in parts)
    if kind == "noted":
        notes = list(concat([one] if isinstance(one, str) else _limits(one) for one in parts[1:]))
        return words(parts[0], inside) + (f" ({', '.join(notes)})" if notes else "")
    if kind == "object":
        return _object_words(tp, parts, inside)
    inner = [words(one, inside) for one in parts if one is not Media]  # that is never written
    if kind == "union":
        return " or ".join(inner)
    return f"{'' if kind == 'row' else kind}[{', '.join(inner)}]"


def _object_words(tp: Any, parts: Iterable[_Attribute], inside: tuple[Any, ...]) -> str:
    if tp in inside:
        return str(tp.__name__)
    noted = {a.name: Annotated[a.type, a.desc] if a.desc else a.type for a in parts}
    known = [f"{name}: {words(kind, (*inside, tp))}" for name, kind in noted.items()]
    body = "{" + ", ".join(known) + "}"
    recursive = re.search(rf"\b{tp.__name__}\b", body)
    return f"{tp.__name__} {body}" if recursive else body


def sample(tp: Any, inside: tuple[Any, ...] = ()) -> Any:
    """Invent a plain value of a type, always the same one; `inside` is as in `words`.

    >>> sample(list[Literal["a", "b"]])
    ['a']
    """
    kind, parts = shape(tp)
    if kind == "scalar":
        return parts[3]
    if kind == "choice":
        return jsonable(parts[0])
    if tp is History or (kind == "list" and parts[0] in inside):
        return []
    if kind == "noted":
        return sample(parts[0], inside)
    if kind == "union":
        return sample(next(one for one in parts if one not in inside), inside)
    if kind == "object":
        return {a.name: sample(a.type, (*inside, tp)) for a in parts}
    values = [sample(one, inside) for one in parts]
    return {str(values[0]): values[1]} if kind == "dict" else values


_Defs = dict[Any, dict[str, Any]]  # the schemas of the classes met so far


def json_schema(tp: Any) -> dict[str, Any]:
    """Return the JSON schema of a type (draft 2020-12), within what strict providers accept.

    Every property is required and no other is allowed; an open dict is a list of key and value.

    Raises:
        SignatureError: the type, or a type inside it, is not understood.

    >>> json_schema(list[int | None])
    {'type': 'array', 'items': {'anyOf': [{'type': 'integer'}, {'type': 'null'}]}}
    """
    return _with_defs(_schema, tp)


def _with_defs(schema_of: Callable[[Any, _Defs], dict[str, Any]], given: Any) -> dict[str, Any]:
    defs: _Defs = {}
    made = schema_of(given, defs)
    named = {_def_name(one, defs): schema for one, schema in defs.items()}
    return {**made, "$defs": named} if defs else made


def _def_name(tp: Any, defs: _Defs) -> str:
    """The name of a class; numbered where another class has it already."""
    place = [one for one in defs if one.__name__ == tp.__name__].index(tp)
    return f"{tp.__name__}{place + 1}" if place else str(tp.__name__)


@frozen
class _Held:
    """In an annotation: the schema to hold a model to, narrower than that of the type."""

    schema: Fields


def _fields_schema(fields: Iterable[Field | _Attribute], defs: _Defs) -> dict[str, Any]:
    """The schema of an object with these attributes."""
    notes = {one.name: {"description": one.desc} if one.desc else {} for one in fields}
    return _closed({one.name: {**_schema(one.type, defs), **notes[one.name]} for one in fields})


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    rules = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **rules}


_JSON_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def _schema(tp: Any, defs: _Defs) -> dict[str, Any]:
    kind, parts = shape(tp)
    if kind == "scalar":
        return dict(parts[1])
    if kind == "choice":
        values = [jsonable(choice) for choice in parts]
        kinds = list(unique(_JSON_NAMES.get(type(value), "null") for value in values))
        return {"type": kinds if kinds[1:] else kinds[0], "enum": values}
    if kind == "object":
        if tp not in defs:
            defs[tp] = {}  # it may hold itself
            defs[tp] = _fields_schema(parts, defs)
        return {"$ref": f"#/$defs/{_def_name(tp, defs)}"}
    if kind == "noted":
        held = [one.schema for one in parts if isinstance(one, _Held)]
        return dict(held[0]) if held else _schema(parts[0], defs)
    inner = [_schema(one, defs) for one in parts]
    if kind == "union":
        return {"anyOf": inner}
    if kind == "list":
        return {"type": "array", "items": inner[0]}
    if kind == "dict":
        return {"type": "array", "items": _closed({"key": inner[0], "value": inner[1]})}
    items = {"anyOf": list(unique(inner, key=canonical))} if inner else {"type": "null"}
    return {"type": "array", "items": items, "minItems": len(inner), "maxItems": len(inner)}


def coerce(tp: Any, data: Any) -> Any:
    """Make a value of a type from JSON data, forgiving what models commonly write.

    Raises:
        ValueError: the data is not such a value; says what was expected, and where.

    >>> coerce(list[int], ["1,000", 2.0]), coerce(bool, "Yes"), coerce(list[int], 3)
    ([1000, 2], True, [3])
    """
    kind, parts = shape(tp)
    data = data.tolist() if hasattr(data, "tolist") else data  # of numpy and pandas
    return parts[2](tp, data) if kind == "scalar" else _COERCE[kind](tp, parts, data)


def read(tp: Any, text: str, *, name: str = "") -> Any:
    """Make a value of a type from the text of a reply: `str` verbatim, anything else as JSON.

    What a person can read in one way only is read: markdown lists, a choice in a short sentence,
    JSON with a slip of the pen. What is cut off never is.

    Args:
        name: of the field; an object that holds nothing but it stands for its value.
    Raises:
        ValueError: the text is no such value.

    >>> read(str, "null"), read(str | None, "null"), read(list[str], "- a\\n- b"), read(int, "*7*")
    ('null', None, ['a', 'b'], 7)
    """
    return text if tp is str else _first_value(tp, _meant(tp, text, name), text)


def _first_value(tp: Any, meant: Iterable[Any], text: Any) -> Any:
    """The first of the readings that is a value; the first error says most of what was wrong."""
    wrong = []
    for data in meant:
        try:
            value = coerce(tp, data)
        except ValueError as error:
            wrong.append(error)
        else:
            # 1e3 is a number in JSON, but where a text is wanted it is these very characters.
            verbatim = isinstance(value, str) and not isinstance(data, str)
            return text if verbatim and isinstance(text, str) else value
    raise wrong[0]


def write(tp: Any, value: Any) -> str:
    """Return the text of a value, such that `read(tp, write(tp, value))` is the value.

    >>> write(int, 7), write(list[str], ["a"]), write(str | None, "null"), write(bool, True)
    ('7', '["a"]', '"null"', 'true')
    """
    data = jsonable(value)
    if not isinstance(data, str):
        return _dump(data)
    if tp is str:
        return data
    with suppress(ValueError):
        if data == data.strip() and jsonable(read(tp, data)) == data:
            return data
    return _dump(data)


# -- From text to JSON data --

_BARE = {"true": True, "false": False, "null": None, "none": None}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_NOTHING = object()


def _free(tp: Any) -> bool:
    """Whether any text is a value of a type as it stands, so that nothing is to be guessed."""
    kind, parts = shape(tp)
    if kind in ("union", "noted"):
        return any(map(_free, parts if kind == "union" else parts[:1]))
    return tp in (str, Any)


def _meant(tp: Any, text: str, name: str) -> Iterator[Any]:
    """What a text may be meant as, the most exact reading first."""
    plain = text.strip()
    if tp is Decimal or (tp is int and re.fullmatch(r"[-+\d]\d*\.\d{3}", plain)):
        yield text  # digit by digit: JSON would make a float of it
        return
    for data in _loaded(text):
        yield from _opened(tp, data, name)
    if plain.lower() in _BARE:
        yield _BARE[plain.lower()]
    if _free(tp):
        yield text
        return
    if _kind(tp) == "list":
        yield from _bullets(plain)
    for data in _one_of(tp, text):
        yield from _opened(tp, data, name)
    for as_list in (True, False):
        yield from _markup(plain, as_list)
    yield text
    if copied := re.fullmatch(rf"\{{+(?:{name}\s*[:=])?([^{{}}:\"']*)\}}+", plain):
        yield copied[1].strip()


def _loaded(text: str) -> list[Any]:
    """The value of a JSON text; none where it is no JSON."""
    try:
        return [jsonlib.loads(text)]
    except (ValueError, RecursionError):
        return []


def _opened(tp: Any, data: Any, name: str) -> Iterator[Any]:
    """The data, and what it holds where it is but a wrapping."""
    yield data
    if _free(tp):
        return
    if isinstance(data, dict) and list(data) == [name]:
        yield data[name]
    if isinstance(data, list) and len(data) == 1 and _kind(tp) != "list":
        yield data[0]
    if isinstance(data, str) and data.lstrip()[:1] in [*"[{"]:
        yield from _meant(tp, data, name)  # JSON in JSON


# What says that a value is not the answer, or not surely.
_DENIAL = (
    r"(?i)\b(?:not?|never|neither|nor|none|cannot|without|except|exclud\w+|wrong|incorrect|invalid|"
    r"opposite|unless|whether|might|maybe|unlikely|instead|rather|but|false)\b|n['’]t\b"
)


def _one_of(tp: Any, text: str) -> list[Any]:
    """The JSON data in a fence, or in a text that says nothing against it.

    Several objects or lists below each other are those of one list. Where several of the kind that
    is wanted stand in prose, none is surely the one that is meant.
    """
    fences = text.split("```")
    if len(fences) == 3 and not re.search(rf"{_DENIAL}|\d", fences[0] + fences[2]):
        inside = fences[1].partition("\n")[2]
        return _loaded(inside) or _one_of(tp, inside)
    if (kind := _kind(tp)) not in (*STRUCTURED, "union"):
        return []
    found, between = _bracketed(text)
    if kind == "list" and found[1:]:
        return _joined(tp, found) if not between.strip(" \t\r\n,;") else []
    wanted = list if kind in ("list", "row") else dict
    fitting = [one for one in found if isinstance(one, wanted)]
    unsure = re.search(_DENIAL, between) or any(one != fitting[0] for one in fitting)
    return [] if unsure else found


def _joined(tp: Any, found: list[Any]) -> list[Any]:
    """Objects below each other as one list; so lists, unless one is a draft of another."""
    kind, parts = shape(tp)
    nested = kind == "list" and _kind(parts[0]) in ("list", "row")
    if nested or not all(isinstance(one, list) for one in found):
        return [found]
    items = list(concat(found))
    return [items] if len(set(map(canonical, items))) == len(items) else []


def _not_deep(value: Any, most: int = 100) -> Any:
    """The value; deeper ones would break whoever compares, writes or hashes them."""
    if isinstance(value, (dict, list)):
        if value and not most:
            raise ValueError("lists or objects in each other, deeper than 100")
        for one in value.values() if isinstance(value, dict) else value:
            _not_deep(one, most - 1)
    return value


# A few words that are no sentence.
_WORD = r"[^\s,.;:!?(){}\[\]<>\"|]+"
_WORDS = (
    r"(?i)(?!.*\b(?:i|you|it|yes|no|none|nothing|empty|not|sorry|and|or|maybe|n/a)\b)"
    rf"{_WORD}(?: {_WORD}){{0,2}}"
)
_WORDS_OR_NUMBER = rf"{_WORDS}|[-+]?[\d,]+(?:\.\d+)?"
_BULLET = r"([ \t]*+)(?:[-*+•]|\d{1,3}[.)])[ \t]++(?:\[[ xX]\][ \t]++)?(.*)"


def _bullets(text: str) -> Iterator[list[Any]]:
    """The items of a list in Markdown, perhaps below a line that announces it; or with commas."""
    lines = [line for line in text.splitlines() if line.strip()]
    intro = lines.pop(0) if lines[1:] and lines[0].endswith(":") else ""
    marked = [match for line in lines if (match := re.fullmatch(_BULLET, line))]
    one_level = len({match[1] for match in marked}) == 1
    if one_level and len(marked) == len(lines) and not re.search(_DENIAL, intro):
        if marked[1:] or not text[:1].isdigit():  # a date or a name may begin with "1. "
            yield [match[2].strip() for match in marked]
    elif ", " in text and all(re.fullmatch(_WORDS_OR_NUMBER, one) for one in text.split(", ")):
        yield text.split(", ")
    elif text[:1] in [*"\"'"]:
        yield from _loaded(f"[{text}]")


def _closed_at(text: str, start: int) -> int:
    """Where the bracket that opens at a place is closed; 0 where it is not."""
    depth = 0
    for mark in re.compile(r"[][{}()]").finditer(text, start):
        depth += 1 if mark[0] in _CLOSING else -1
        if depth == 0:
            return mark.end()
    return 0


def _bracketed(text: str, *, alone: bool = True) -> tuple[list[Any], str]:
    """The lists and objects that stand alone in a text, none where one is cut off; and what stands
    between them.

    Alone stands what begins a line or a sentence, or follows a colon, and is followed by no more
    words on its line.
    """
    made, between, at = list[Any](), list[str](), 0
    for _ in range(16):  # more are no answer, and each costs a reading
        if not (opening := re.compile(r"[\[{]|\A\s*\(").search(text, at)):
            break
        start = opening.end() - 1
        value, end, whole = scan(text, start)
        if not whole and text[end:].strip():
            value, end, whole = scan(text, start, forgiving=True)
        before = re.search(r"(?:\A|[\n:=.!?,;]|\b(?:is|are)|[\]}])[ \t]*\Z", text[:start][-40:])
        if not whole and (before or not (end := _closed_at(text, start))):
            return [], text  # what is damaged may be the answer
        after = re.compile(r"[ \t]*(?:\Z|[\n.,;!<`]|[\[{])").match(text, end)
        taken = whole and ((before and after) or not alone)
        made += [value] if taken else []
        between.append(text[at : start if taken else end])
        at = end
    return made, "".join([*between, text[at:]])


def _elements(text: str) -> list[tuple[str, str, str]]:
    """The outermost tags of a text: name, attributes, what is between; none if one stays open."""
    made: list[tuple[str, str, str]] = []
    opened, depth = None, 0
    for tag in re.finditer(r"<(/?)(\w[\w.-]*+)([^<>]*+)>", text):
        if tag[1]:
            depth -= 1
            if depth == 0 and opened:
                made.append((opened[2], opened[3], text[opened.end() : tag.start()].strip()))
        elif not tag[3].endswith("/"):
            opened, depth = (tag, 1) if depth == 0 else (opened, depth + 1)
        if not 0 <= depth <= 20:
            return []
    return made if depth == 0 else []


def _markup(text: str, as_list: bool) -> Iterator[Any]:
    """What tags are meant as: a list of what they hold, or objects by their names."""
    if not (found := _elements(text) if text[:1] == "<" else []):
        return
    values = [next(_markup(inner, as_list), inner) for _, _, inner in found]
    if as_list and len({tag for tag, _, _ in found}) == 1:
        yield values
    rows: list[dict[str, Any]] = [{}]
    for (tag, attributes, _), value in zip(found, values, strict=True):
        named = re.search(r"""(?:key|name)=["'](\w+)["']""", attributes)
        key = named[1] if named else tag
        rows += [{}] if key in rows[-1] else []
        rows[-1][key] = value
    yield rows if rows[1:] else rows[0]
    yield values


# A quote ends a string where what follows may follow a string; others stand around a word in it.
_FOLLOWS = (
    r"""(?=\s*+(?:[]}:]|\Z|//|/\*|["“]|,\s*+(?:["'“{[\]}]|[-\d]|\w++\s*:|true|false|null)))"""
)
_QUOTED = rf'(?<=[\s(\["])"\w(?:[^"\\]|\\.)*+(?<![\s(\[])"(?!{_FOLLOWS})'


@lru_cache(maxsize=2)  # compiled where it is used: importing stays cheap
def _tokens(forgiving: bool) -> Callable[..., re.Match[str] | None]:
    """What matches punctuation, a string with its end if it has one, or a word: a group for each.

    To forgive is to read comments, triple and smart quotes, a quote inside a string, bare words
    with blanks.
    """
    if forgiving:
        pattern = (
            r"(?:\s++|//[^\n]*+|/\*.*?\*/|\#[^\n]*+)*+(?:(?P<mark>[][{}:,])"
            r"|\"{3}(?P<triple>.*?)\"{3}|[“”„](?P<smart>[^“”]*+)[“”]"
            rf"|\"(?P<double>(?:[^\"\\]|\\.|{_QUOTED})*+)\"{_FOLLOWS}"
            rf"|'(?P<single>(?:[^'\\]|\\.|'(?!{_FOLLOWS}))*+)'"
            r"|(?P<bare>[^\s\"'“”„\[\]{}:,#/][^\"“”\[\]{}:,\n]*+))"
        )
    else:
        pattern = (
            r"\s*+(?:(?P<mark>[][{}():,])|\"(?P<double>(?:[^\"\\]|\\.)*+)\"?"
            r"|'(?P<single>(?:[^'\\]|\\.)*+)'?|(?P<bare>[^][{}():,\s\"']++))"
        )
    return re.compile(pattern, re.DOTALL).match


_Item = tuple[Any, int, Any, int]  # its key, where the value begins, the value, where it ends
_Memo = dict[int, tuple[list[_Item], int]]
"""Of each list or object, by where it begins: the items that are whole, and where to go on."""


def scan(
    text: str, start: int = 0, memo: _Memo | None = None, *, forgiving: bool = False
) -> tuple[Any, int, bool]:
    """Read the JSON value, or what is meant as one, that begins at a place of a text.

    Args:
        memo: what was read of a beginning of this text before; kept, so that nothing whole is read
            twice while the text grows.
        forgiving: of slips of the pen: comments, quotes inside strings, missing commas.
    Returns:
        what is sure of the value by the end of the text, how far it was read, and whether that is
        all of it: False where more must come, and where it is none.

    >>> scan('{"a": [1, 2')
    ({'a': [1]}, 11, False)
    """
    if forgiving and len(text) > 30_000:  # nobody mends that by hand
        return _NOTHING, len(text), False
    try:
        return _scan(text, start, {} if memo is None else memo, forgiving)
    except RecursionError:
        return _NOTHING, start, False


def _scan(text: str, start: int, memo: _Memo, forgiving: bool) -> tuple[Any, int, bool]:
    token = _tokens(forgiving)(text, start)
    if token is None or (token["mark"] and token["mark"] not in _CLOSING):
        return _NOTHING, start, False
    kind, end = token.lastgroup or "", token.end()
    said = token[kind]
    if kind == "bare":  # at the very end it may go on
        whole = end < len(text) and said.strip() != "..."  # that is the place of a value, copied
        return _bare(said) if whole else _NOTHING, end, whole
    if kind != "mark":
        whole = token.end(kind) < end
        return _string(kind, said, whole), end, whole
    items, end, whole, _ = _items(text, start, end, _CLOSING[said], memo, forgiving)
    if said == "{":
        return {key: value for key, _, value, _ in items}, end, whole
    return [item[2] for item in items], end, whole


def _items(
    text: str, start: int, at: int, closing: str, memo: _Memo, forgiving: bool = False
) -> tuple[list[_Item], int, bool, int]:
    """Read the items of a list or an object.

    Returns:
        the items, how far it read, whether that is all of them, and how many of them are sure: none
        where what follows can be no item, as then what was read may have been meant otherwise.
    """
    token_at = _tokens(forgiving)
    items, at = memo.get(start, ([], at))
    shown = items
    while not (token := token_at(text, at)) or token["mark"] != closing:
        key, begin = None, at
        if closing == "}":
            key, end, whole = _scan(text, at, memo, forgiving)
            colon = token_at(text, end)
            if not whole or not colon or colon["mark"] != ":":
                break
            key, begin = key if isinstance(key, str) else _dump(key), colon.end()
        value, end, whole = _scan(text, begin, memo, forgiving)
        token = token_at(text, end)
        if not whole or not token or not (forgiving or token["mark"] in (",", closing)):
            shown = items if value is _NOTHING else [*items, (key, begin, value, end)]
            break
        items.append((key, begin, value, end))
        at = token.end() if token["mark"] == "," else end
        memo[start] = items, at
    else:
        return items, token.end(), True, len(items)
    goes_on = re.compile(r"\s*+\\?\Z").match(text, end)  # the text stopped too, if in an escape
    return shown, end, False, len(items) if goes_on else 0


def _bare(word: str) -> Any:
    """A bare word: a constant, a number, or else a text without its quotes."""
    plain = re.sub(r"\s+(?://|#).*", "", word.strip())  # a comment
    if plain.lower() in _BARE:
        return _BARE[plain.lower()]
    try:
        return jsonlib.loads(re.sub(r"\A(-?)\.(?=\d)", r"\g<1>0.", plain))
    except ValueError:
        return word.strip().strip("“”")


_HALF = r"(?s)\\u(?:[dD][89abAB]..(?:\\(?:u.{0,3})?)?|.{0,3})\Z"
_ESCAPE = r"(?s)\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|.)"


def _string(kind: str, said: str, ended: bool) -> str:
    """The text of a string; one in single quotes is first written as JSON would.

    Of one that is not ended, an escape or a pair of surrogates that is not whole is left out.
    """
    if "\\" not in said or kind in ("triple", "smart"):
        return said
    if kind == "single":
        swap = {"\\'": "'", '"': '\\"'}
        said = re.sub(r"\\.|\"", lambda match: swap.get(match[0], match[0]), said)
    sure = said if ended else re.sub(_HALF, "", said)
    try:
        return str(jsonlib.loads(f'"{sure}"', strict=False))
    except ValueError:  # an escape that JSON does not know stays as it is
        return re.sub(_ESCAPE, lambda one: str(first([*_loaded(f'"{one[0]}"'), one[0]])), sure)


# -- From JSON data to values --


def _not(expected: str, value: Any) -> ValueError:
    return ValueError(f"{cut(repr(value), 80)} is not {expected}")


def _build(data: Any, make: Callable[..., T], *parts: Any) -> T:
    """Build a value; whatever a constructor, converter or validator raises, the data is refused."""
    try:
        return make(*parts)
    except Exception as error:
        raise ValueError(f"{cut(repr(data), 80)} is refused: {_plain_words(error)}") from error


def _plain_words(error: Exception) -> str:
    """What an error says, without the internals that attrs and pydantic add."""
    if hasattr(error, "errors") and hasattr(error, "error_count"):
        found = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
        return "; ".join(f"{place}: {text}" if place else text for place, text in found)
    return str(error.args[0] if len(error.args) > 1 else error)


def _at(place: str, tp: Any, data: Any) -> Any:
    """Coerce a part, and name its place where that fails."""
    try:
        return coerce(tp, data)
    except ValueError as error:
        raise ValueError(f"at {place}: {error}") from error


_ANSWER = r"(?i)\A\s*(?:(?:the|my|final)\s+)*(?:answer|result|value)\s*[*_]*(?:\s+is\b|\s*[:=])"
_AROUND = " \t\r\n*_`\"'“”[]{}"


def _plain(data: Any) -> Any:
    """A text without what a person would not take for a part of it: marks, a label, a full stop."""
    if not isinstance(data, str):
        return data
    text = re.sub(_ANSWER, "", data.strip(_AROUND))
    return text.strip(_AROUND).rstrip(".").strip(_AROUND)


_CURRENCY = r"(?:[$€£¥₹]|\b(?:USD|EUR|GBP|CHF|JPY|INR|euros?|dollars?|Rs)\b\.?)?"
_UNIT = (
    r"(?:%|°[CF]?|percent|km/h|m/s|km|cm|mm|miles?|mi|ft|feet|kg|mg|g|lbs?|oz|"
    r"s|secs?|seconds?|mins?|minutes?|h|hrs?|hours?|days?|weeks?|months?|years?(?: old)?|yrs?|"
    r"stars?|points?|pts|items?|pieces?|people|persons?|words?|mph|px|[KMG]B|"
    r"[$€£¥]|USD|EUR|GBP|CHF|euros?|dollars?)"
)
_NUMBER = (
    rf"(?i){_CURRENCY}[ \t]*([-+]?)[ \t]*{_CURRENCY}[ \t]*"
    r"(\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:_\d+)*(?:\.\d*)?|\.\d+)"
    rf"(e[-+]?\d+)?(?:[ \t]*{_UNIT})?"
)


def _digits(data: Any) -> str | None:
    """The digits of a number in a text, without currency, unit and commas; None if it is none."""
    found = re.fullmatch(_NUMBER, _plain(data)) if isinstance(data, str) else None
    return re.sub("[,_]", "", "".join(filter(None, found.groups()))) if found else None


def _to_number(tp: Any, data: Any) -> Any:
    value, text = data, _plain(data) if isinstance(data, str) else ""
    if (digits := _digits(data)) is not None:
        value = int(digits) if digits.lstrip("+-").isdecimal() else float(digits)
    elif tp is float and re.fullmatch(r"\d+\s*/\s*[1-9]\d*", text):
        value = operator.truediv(*map(float, text.split("/")))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise _not(f"a value of type {tp.__name__}", data)
    grouped = isinstance(data, str) and re.search(r"\d\.\d{3}\b", data)  # 1.000 may be a thousand
    if tp is int and isinstance(value, float) and (grouped or not value.is_integer()):
        raise _not("a whole number", data)
    return _build(data, tp, value)


def _to_decimal(tp: Any, data: Any) -> Decimal:
    digits = _digits(repr(data) if type(data) in (int, float) else data)
    if digits is None and not isinstance(data, Decimal):
        raise _not("a decimal number", data)
    return _build(data, Decimal, digits or data)


# What a date is written with that does not tell one from another.
_TRIMMINGS = (
    r"(?i)\A(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+|(?<=\d)(?:st|nd|rd|th)\b|\bof\b|"
    r"(?<=[a-z])\.|,"
)
_DATES = ("%Y-%m-%d", "%d-%m-%Y", "%m-%d-%Y", "%d month %m %Y", "month %m %d %Y")
_MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
_CLOCK = r"\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|\+\d\d:?\d\d|(?<=:\d\d:\d\d)-\d\d:?\d\d)?"


def _day(text: str) -> str:
    """A date in words or digits that has one reading, as YYYY-MM-DD; any other text as it is."""
    if len(text) > 40 or re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        return text

    def numbered(name: re.Match[str]) -> str:  # whatever language `strptime` speaks here
        known = [n for n, one in enumerate(_MONTHS, 1) if one.startswith(name[0].lower())]
        return f"month {known[0]}" if known else name[0]

    plain = re.sub(r"(?<=\d)[/.](?=\d)", "-", re.sub(_TRIMMINGS, " ", text)).strip()
    spelled, readings = re.sub(r"[A-Za-z]{3,9}", numbered, plain), set[str]()
    for form in _DATES:
        with suppress(ValueError):
            readings.add(datetime.strptime(spelled, form).date().isoformat())
    return first(readings) if len(readings) == 1 else text


def _to_moment(tp: Any, data: Any) -> Any:
    if type(data) is tp:
        return data
    try:
        text = _plain(data)
        if tp is clock and not re.fullmatch(_CLOCK, text):  # 10:00-11:00 is a span, 10.30 a number
            raise ValueError(text)
        found: Any = re.fullmatch(rf"(.*?)([T ]{_CLOCK})?", text)
        day, at = _day(found[1]), found[2] or ""
        return tp.fromisoformat(day if tp is date else day + at)
    except (AttributeError, TypeError, ValueError):
        raise _not(f"a {_SCALARS[tp][0]}", data) from None


_SAID = {**_BARE, "yes": True, "no": False, "n/a": None}


def _to_constant(tp: Any, data: Any) -> bool | None:
    said = _SAID.get(_loose(data), data) if isinstance(data, str) else data
    if type(said) is (tp or type(None)):
        return said
    raise _not(_SCALARS[tp][0], data)


def _to_text(tp: Any, data: Any) -> str:
    if isinstance(data, (str, bool, int, float)):
        return data if isinstance(data, str) else _dump(data)
    raise _not("a text", data)


def _to_seconds(tp: Any, data: Any) -> timedelta:
    if isinstance(data, str) and re.search(r"[^\W\d_]", data):
        raise _not("a number of seconds", data)  # 5 minutes are not 5
    return data if isinstance(data, tp) else _build(data, timedelta, 0, _to_number(float, data))


def _to_text_like(tp: Any, data: Any) -> Any:
    if isinstance(data, tp):
        return data
    ours = tp.__module__ in ("uuid", "pathlib", "ipaddress")
    make = tp if ours else sys.modules["pydantic"].TypeAdapter(tp).validate_python
    return _build(data, make, _to_text(str, data))


def _to_media(tp: Any, data: Any) -> Any:
    if isinstance(data, tp):
        return data
    given = {"url": data} if isinstance(data, str) else data
    for kind in (tp, Image, Audio, File) if isinstance(given, Mapping) else ():
        url = given.get(kind.kind, given.get("url") if kind is tp else None)
        if url and issubclass(kind, tp):
            return _build(data, kind, url, given.get("name", ""))
    raise _not(f"the URL or data URI of {tp.kind}", data)


_ANYTHING = {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")]}
_TEXT = {"type": "string"}
_DECIMAL = {**_TEXT, "pattern": r"^-?[0-9]+(\.[0-9]+)?$"}  # else models write words
_TIME = {**_TEXT, "format": "date-time"}

_Scalar = tuple[str, dict[str, Any], Callable[[Any, Any], Any], Any]

# Of each type without parts: its words, its schema, (type, data) -> value, and a sample.
_SCALARS: dict[Any, _Scalar] = {
    str: ("str", _TEXT, _to_text, "text"),
    int: ("int", {"type": "integer"}, _to_number, 1),
    float: ("float", {"type": "number"}, _to_number, 1.0),
    bool: ("true or false", {"type": "boolean"}, _to_constant, True),
    None: ("null", {"type": "null"}, _to_constant, None),
    type(None): ("null", {"type": "null"}, _to_constant, None),
    Decimal: ("decimal number", _DECIMAL, _to_decimal, "1"),
    date: ("date YYYY-MM-DD", {**_TEXT, "format": "date"}, _to_moment, "2000-01-01"),
    datetime: ("time in ISO 8601", _TIME, _to_moment, "2000-01-01T00:00:00"),
    clock: ("time HH:MM:SS", {**_TEXT, "format": "time"}, _to_moment, "00:00:00"),
    timedelta: ("number of seconds", {"type": "number"}, _to_seconds, 1.0),
    Any: ("any", _ANYTHING, lambda tp, data: data, "text"),
}

# A text from which a value can be made, of the classes that do not take any.
_SAMPLES = {
    "UUID": "00000000-0000-0000-0000-000000000000", "IPv4Address": "127.0.0.1",
    "IPv6Address": "::1", "IPv4Network": "127.0.0.0/8", "IPv6Network": "::/64",
    "EmailStr": "ann@example.org", "AnyUrl": "https://example.org/",
    "HttpUrl": "https://example.org/",
}  # fmt: skip


def _class_of_texts(tp: Any) -> _Scalar | None:
    """The same of a class whose values are written as one text; None of any other type."""
    if isinstance(tp, type) and issubclass(tp, Media):
        return tp.kind, _TEXT, _to_media, f"data:{tp.kind}/x;base64,AA=="
    if _is_text_like(tp):
        return tp.__name__, _TEXT, _to_text_like, _SAMPLES.get(tp.__name__, "text")
    return None


def _to_choice(tp: Any, parts: tuple[Any, ...], data: Any) -> Any:
    """Find the choice whose value is the data; or that reads like it; or that a sentence names."""
    text, values = canonical(data, other=repr), list(map(jsonable, parts))
    for choice in parts:
        if canonical(choice) == text:
            return choice
    pairs = zip(values, [getattr(choice, "name", "") for choice in parts], strict=True)
    names = [[_loose(one) for one in pair if one != ""] for pair in pairs]
    alike = [_loose(data) in own for own in names]
    if isinstance(data, str) and not any(alike):
        # A number, or a letter as "a" is, cannot be told in a sentence.
        alike = [
            isinstance(value, str) and len(value) > 1 and _says(data, own, names)
            for value, own in zip(values, names, strict=True)
        ]
    if not isinstance(data, str) or sum(alike) != 1:
        raise _not(words(tp), data)
    return parts[alike.index(True)]


def _loose(text: Any) -> str:
    return " ".join(re.split(r"[\s_-]+", str(_plain(text)).strip("()").casefold()))


_SUBJECT = (
    r"(?:the |my |final |correct |best |predicted )*"
    r"(?:answer|label|category|class|choice|option|result|prediction|classification|it)"
)
_MARK = r"[]\[(){}<>*`\"'“”]"


def _says(data: str, names: list[str], known: list[list[str]]) -> bool:
    """Whether a text says one of these names, and no other, in one of the few forms that are clear:
    "The answer is warm", "warm: because ...", "[[ warm ]]".
    """
    text = re.sub(r"[\s_-]+", " ", data[:1000]).strip()
    others = [re.escape(one) for one in concat(known) if one not in names]
    for name in names:
        word = rf"(?<!\w){re.escape(name)}(?![\w+-])"
        said = rf"{_MARK}*\s*{word}\s*{_MARK}*"
        forms = (
            rf"{_SUBJECT}\s*(?:\bis|[:=])[:\s]*{said}[.!]?",
            rf"{said}\s*[:,.;(]?\s*(?:because|since|as)\b.*",
            rf"{_MARK}+\s*{word}\s*{_MARK}+(?:\s*\{{\w+\}})?",
        )
        if any(re.fullmatch(form, text, re.IGNORECASE) for form in forms):
            rest = re.sub(word, "", text, flags=re.IGNORECASE)
            other = rf"(?<!\w)(?:{'|'.join(others) or '(?!)'})(?!\w)"
            return not re.search(other, rest, re.IGNORECASE)
    return False


def _to_union(tp: Any, parts: tuple[Any, ...], data: Any) -> Any:
    """Take the first alternative that gives the data back as it is, else the first that takes it.

    A class wins where the data has its attributes and no others; text comes last. So the shape of
    the data is what tells alternatives apart.
    """
    if type(data) in parts and not isinstance(data, dict):
        return data
    made = []
    for alternative in sorted(parts, key=lambda one: (one is str, one is date)):
        kind, known = shape(alternative)
        named = kind == "object" and isinstance(data, Mapping)
        with suppress(ValueError):
            made.append(coerce(alternative, data))
            if named and {*data} <= {one.name for one in known}:
                return made[-1]
    if not made:
        raise _not(words(tp), data)
    text = canonical(data, other=repr)
    return next((value for value in made if canonical(value, other=repr) == text), made[0])


def _to_noted(tp: Any, parts: tuple[Any, ...], data: Any) -> Any:
    """Coerce, then check what the annotation demands."""
    if isinstance(tp, type):  # a class around one value
        return data if isinstance(data, tp) else _build(data, tp, coerce(parts[0], data))
    value = coerce(parts[0], data)
    for note in parts[1:]:
        if callable(note):  # as attrs calls its validators
            _build(data, note, None, _Attribute("value", parts[0]), value)
        elif not _allowed(note, value):
            raise ValueError(f"{cut(repr(data), 80)} is refused: expected {words(tp)}")
    return value


def _to_row(tp: Any, parts: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)) or len(data) != len(parts):
        raise _not(f"a JSON list of {len(parts)}, {words(tp)}", data)
    return tuple(_at(f"[{n}]", *pair) for n, pair in enumerate(zip(parts, data, strict=True)))


def _to_items(tp: Any, parts: tuple[Any, ...], data: Any) -> Any:
    """Make a list, tuple or set; a single item stands for a list of one."""
    if not isinstance(data, (list, tuple, set, frozenset)):
        # A few words may be one item; a sentence, or what may be several, is none.
        one_item = not isinstance(data, str) or re.fullmatch(_WORDS, data.strip())
        if data is None or not one_item:
            raise _not(f"a JSON list, {words(tp)}", data)
        data = [data]
    items = [_at(f"[{index}]", parts[0], item) for index, item in enumerate(data)]
    kind: Any = typing.get_origin(tp) or tp
    return _build(data, kind, items) if kind in (tuple, set, frozenset) else items


def _to_dict(tp: Any, parts: tuple[Any, ...], data: Any) -> Any:
    pair = {"key", "value"}
    if isinstance(data, list) and all(isinstance(one, dict) and {*one} == pair for one in data):
        given = pluck(["key", "value"], data)  # as the schema asks for it
    elif isinstance(data, Mapping):
        given = data.items()
    else:
        raise _not(f"a JSON object, {words(tp)}", data)
    pairs = [(_at("a key", parts[0], k), _at(f"{k!r}", parts[1], value)) for k, value in given]
    made: Any = _build(data, Record if tp is Record else dict, pairs)
    if len(made) < len(pairs):
        raise _not("a JSON object whose keys differ", data)
    return made


def _to_object(tp: Any, parts: tuple[_Attribute, ...], data: Any) -> Any:
    made: Any = typing.get_origin(tp) or tp
    if not _is_typed_dict(made) and isinstance(data, made):
        return data
    given = data if isinstance(data, Mapping) else {}
    found = {a.alias: given[n] for a in parts for n in (a.alias, a.name) if n in given}
    if not isinstance(data, Mapping) or (data and not found):  # it is about something else
        raise _not(f"a JSON object, {words(tp)}", data)
    asked = [a for a in parts if a.required or a.alias in found]
    for a in asked:
        if a.alias not in found and not _takes_none(a.type):
            raise ValueError(f"{cut(repr(data), 80)} has no {a.name!r}; expected {words(tp)}")
    values = {a.alias: _at(a.name, a.type, found.get(a.alias)) for a in asked}
    return _build(data, partial(made, **values))


def _takes_none(tp: Any) -> bool:
    kind, parts = shape(tp)
    return tp in (None, Any, type(None)) or (kind == "union" and any(map(_takes_none, parts)))


_COERCE: dict[str, Callable[[Any, tuple[Any, ...], Any], Any]] = {
    "choice": _to_choice, "union": _to_union, "noted": _to_noted, "row": _to_row,
    "list": _to_items, "dict": _to_dict, "object": _to_object,
}  # fmt: skip


# -- The attributes of classes --


class _Attribute(typing.NamedTuple):
    """One attribute of a class, whatever kind of class it is."""

    name: str
    type: Any
    required: bool = True
    desc: str = ""
    alias: str = ""  # by which the constructor takes it


def _attributes(tp: Any) -> tuple[_Attribute, ...] | None:
    """The attributes that a class is made from; None for a type that is no such class."""
    return _attributes_of(tp) if isinstance(tp, type) else _attributes_of.__wrapped__(tp)


@lru_cache(maxsize=1000)
def _attributes_of(tp: Any) -> tuple[_Attribute, ...] | None:
    made: Any = typing.get_origin(tp) or tp
    for fits, read_one in _CLASSES if isinstance(made, type) else ():
        if fits(made):
            names, args = getattr(made, "__parameters__", ()), typing.get_args(tp)
            given = dict(zip(names, args, strict=False))
            hints = {n: one.annotation for n, one in getattr(made, "model_fields", {}).items()}
            hints = hints or typing.get_type_hints(made, include_extras=True)
            found = read_one(made, {n: _filled(hint, given, made) for n, hint in hints.items()})
            return tuple(map(_described_attribute, found))
    return None


def _filled(hint: Any, given: Mapping[Any, Any], tp: Any) -> Any:
    """A hint with types for type variables, and the class for pydantic's mark of a generic one."""
    if isinstance(hint, TypeVar):
        return given.get(hint, hint)
    if type(hint).__name__ == "PydanticRecursiveRef":
        return tp
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    inner = tuple(_filled(one, given, tp) for one in args)
    if inner == args:
        return hint
    made: Any = Union if origin is pytypes.UnionType else origin
    return made[inner if inner[1:] else inner[0]]


def _described_attribute(one: _Attribute) -> _Attribute:
    kind, desc = described(one.type, one.desc)
    return one._replace(type=kind, desc=desc, alias=one.alias or one.name)


def described(tp: Any, desc: str = "") -> tuple[Any, str]:
    """Return a type without the texts in its annotation, and those as its description.

    >>> described(Annotated[int, "in years"])
    (<class 'int'>, 'in years')
    """
    if not hasattr(tp, "__metadata__"):
        return tp, desc
    notes = list(_notes(tp.__metadata__))
    texts = [desc, *[one for one in notes if isinstance(one, str)]]
    rest = [one for one in notes if not isinstance(one, str)]
    bare = Annotated[(tp.__origin__, *rest)] if rest else tp.__origin__
    return bare, ", ".join(filter(None, texts))


def _notes(metadata: Iterable[Any]) -> Iterator[Any]:
    """What an annotation says, with that of pydantic's `Field` in its parts."""
    for one in metadata:
        if hasattr(one, "metadata") and hasattr(one, "description"):
            yield from filter(None, [one.description])
            yield from _notes(one.metadata)
        elif one is not None:
            yield one


def _class_fields(tp: Any, hints: Fields) -> Iterator[_Attribute]:
    """Of an attrs class or a dataclass, what `jsonable` writes of it."""
    from dataclasses import MISSING, fields

    for a in attrs.fields(tp) if attrs.has(tp) else fields(tp):
        if a.init and getattr(a, "eq", True):
            told = [str(a.metadata.get("desc", "")), *_limits(getattr(a, "validator", None))]
            default = getattr(a, "default_factory", MISSING) if a.default is MISSING else a.default
            required = default is MISSING or default is attrs.NOTHING
            name, desc = getattr(a, "alias", None) or a.name, ", ".join(filter(None, told))
            yield _Attribute(name, hints.get(a.name, Any), required, desc)


# What notes and validators demand, by the attribute that holds the limit: words, and the check.
_DEMANDS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "gt": ("> {}", operator.gt),
    "ge": (">= {}", operator.ge),
    "lt": ("< {}", operator.lt),
    "le": ("<= {}", operator.le),
    "multiple_of": ("a multiple of {}", lambda value, limit: value % limit == 0),
    "min_length": ("length at least {}", lambda value, limit: len(value) >= limit),
    "max_length": ("length at most {}", lambda value, limit: len(value) <= limit),
    "pattern": ("matching {}", lambda value, pattern: re.search(pattern, value)),
}


def _demanded(note: Any) -> list[tuple[str, Callable[[Any, Any], Any], Any]]:
    found = [(*row, getattr(note, name, None)) for name, row in _DEMANDS.items()]
    return [(said, check, limit) for said, check, limit in found if limit is not None]


def _allowed(note: Any, value: Any) -> bool:
    """Whether a value is within what a note of annotated-types or pydantic demands."""
    if type(note).__name__ == "Predicate":
        return bool(note.func(value))
    return all(check(value, limit) for _, check, limit in _demanded(note))


def _limits(validator: Any) -> list[str]:
    """Word what a validator or a note demands; the docstring words a function of your own."""
    if inner := getattr(validator, "_validators", None):
        return list(concat(map(_limits, inner)))
    if hasattr(validator, "validator"):
        return _limits(validator.validator)
    if hasattr(validator, "bound"):
        return [f"{validator.compare_op} {validator.bound}"]
    if hasattr(validator, "options"):
        return [f"one of {', '.join(_dump(jsonable(one)) for one in validator.options)}"]
    if inspect.isfunction(validator):
        return (inspect.getdoc(validator) or "").split("\n")[:1]
    found = _demanded(validator)
    return [said.format(getattr(limit, "pattern", limit)) for said, _, limit in found]


def _is_typed_dict(tp: Any) -> bool:
    return hasattr(tp, "__required_keys__") and hasattr(tp, "__total__")  # also a backported one


def _typed_dict(tp: Any, hints: Fields) -> Iterator[_Attribute]:
    for name, kind in hints.items():
        outer = str(typing.get_origin(kind)).endswith(("Required", "ReadOnly"))
        inner = typing.get_args(kind)[0] if outer else kind
        yield _Attribute(name, inner, name in tp.__required_keys__)


def _named_tuple(tp: Any, hints: Fields) -> Iterator[_Attribute]:
    for name in tp._fields:
        yield _Attribute(name, hints.get(name, Any), name not in tp._field_defaults)


def _pydantic_model(tp: Any, hints: Fields) -> Iterator[_Attribute]:
    for name, info in tp.model_fields.items():
        kind = Annotated[(hints[name], *info.metadata)] if info.metadata else hints[name]
        alias = info.validation_alias
        choices = [one for one in getattr(alias, "choices", [alias]) if isinstance(one, str)]
        desc = info.description or ""
        yield _Attribute(name, kind, info.is_required(), desc, first([*choices, name]))


_CLASSES: tuple[tuple[Callable[[Any], bool], Callable[..., Iterator[_Attribute]]], ...] = (
    (lambda tp: attrs.has(tp) or hasattr(tp, "__dataclass_fields__"), _class_fields),
    (_is_typed_dict, _typed_dict),
    (lambda tp: issubclass(tp, tuple) and hasattr(tp, "_fields"), _named_tuple),
    (lambda tp: hasattr(tp, "model_fields") and hasattr(tp, "model_validate"), _pydantic_model),
)


# == 4. Signatures =================================================================================


@frozen
class Field:
    """One input or output of a signature.

    Attributes:
        default: for a field that may be left out.

    >>> Field("age", int, "in years")
    Field(name='age', type=<class 'int'>, desc='in years')
    """

    name: str = field()  # a Python identifier
    type: Any = str  # any type that `words` understands
    desc: str = ""  # what it holds, shown in the prompt
    default: Any = field(factory=lambda: attrs.NOTHING, repr=False)
    words: str = field(init=False, eq=False, repr=False)
    holds_media: bool = field(init=False, eq=False, repr=False)  # or a part of it does

    @name.validator
    def _check(self, attribute: Any, name: Any) -> None:
        if not (isinstance(name, str) and name.isidentifier()):
            raise SignatureError("a bad field name", name, "a Python identifier", "rename it")

    @words.default
    def _words(self) -> str:
        try:
            return words(self.type)
        except (SignatureError, NameError, RecursionError) as error:
            what = f"the type of field {self.name!r} is not understood ({error})"
            raise SignatureError(what, self.type, "a known type", "correct it") from error

    @holds_media.default
    def _holds_media(self) -> bool:
        return _has_media(self.type)

    @property
    def is_history(self) -> bool:
        """Whether it holds earlier turns, which become messages of their own."""
        parts = typing.get_args(self.type)
        return self.type is History or (History in parts and {*parts} <= {History, type(None)})

    @property
    def required(self) -> bool:
        """Whether the field must be given."""
        return self.default is attrs.NOTHING


@frozen
class Signature:
    """What a step takes, what it returns, and what it is to do.

    Edits return a new signature. The name of every field is its own, across both sides. Outputs
    that are the attributes of a class `made` must make one of it; `coerce(made, prediction)` does.

    Raises:
        SignatureError: a name stands twice, or there is no output.

    >>> s = Signature((Field("ticket"),), (Field("team"),)).with_field("team", desc="who helps")
    >>> s.prepend(Field("reasoning")).without("team").outputs
    (Field(name='reasoning', type=<class 'str'>, desc=''),)
    """

    inputs: tuple[Field, ...] = field(converter=_tuple)
    outputs: tuple[Field, ...] = field(converter=_tuple)
    instructions: str = ""
    made: Any = field(default=None, repr=False)  # the class that the outputs are attributes of
    wanted: tuple[str, ...] = field(init=False, eq=False, repr=False)  # names of the outputs
    shown: tuple[str, ...] = field(init=False, eq=False, repr=False)  # of all but a history

    @wanted.default
    def _wanted(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.outputs)

    @shown.default
    def _shown(self) -> tuple[str, ...]:
        return *(one.name for one in self.inputs if not one.is_history), *self.wanted

    def __attrs_post_init__(self) -> None:
        names = [one.name for one in self.inputs + self.outputs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise SignatureError("a field stands twice", twice[0], "distinct names", "rename one")
        if not self.outputs:
            known = "'inputs -> outputs'"
            raise SignatureError("no output field", str(self), known, "name at least one")

    def __str__(self) -> str:
        return f"{', '.join(one.name for one in self.inputs)} -> {', '.join(self.wanted)}"

    def with_instructions(self, instructions: str) -> Signature:
        """Return the signature with other instructions."""
        return evolve(self, instructions=instructions)

    def with_field(self, name: str, **changes: Any) -> Signature:
        """Return the signature with changes (`type`, `desc`, `default`, `name`) to one field."""
        return self._map(name, lambda one: [evolve(one, **changes)])

    def without(self, name: str) -> Signature:
        """Return the signature without a field."""
        return self._map(name, lambda one: [])

    def prepend(self, new: Field, *, to: Literal["inputs", "outputs"] = "outputs") -> Signature:
        """Return the signature with a new first input or output."""
        changes: dict[str, Any] = {to: (new, *getattr(self, to))}
        return evolve(self, **changes)

    def append(self, new: Field, *, to: Literal["inputs", "outputs"] = "outputs") -> Signature:
        """Return the signature with a new last input or output."""
        changes: dict[str, Any] = {to: (*getattr(self, to), new)}
        return evolve(self, **changes)

    def _map(self, name: str, edit: Callable[[Field], list[Field]]) -> Signature:
        known = [one.name for one in self.inputs + self.outputs]
        if name not in known:
            raise SignatureError("no such field", name, f"one of {', '.join(known)}", "correct it")

        def edited(side: Sequence[Field]) -> list[Field]:
            return [*concat(edit(one) if one.name == name else [one] for one in side)]

        return evolve(self, inputs=edited(self.inputs), outputs=edited(self.outputs))


Task = str | Signature | Callable[..., Any]
"""What `signature` takes."""


def signature(
    task: Task, *, instructions: str | None = None, types: Fields | None = None
) -> Signature:
    """Make a signature from a text, from an annotated function, or from a signature.

    Args:
        task: "input, other: type -> output: type" (a field without a type is a `str`); or a
            function, whose parameters are the inputs, whose docstring is the instructions, and
            whose return type is the output, named as the function; a returned class gives one
            output per attribute.
        instructions: what to do; without them a text asks for its outputs in one sentence.
        types: your own types, by the names they have in the text; known without it are Python's
            built-in and `typing` names, date, datetime, time, Decimal, Image, Audio, File, History.
    Raises:
        SignatureError: wrong syntax, an unknown name, a duplicate field.

    >>> signature("question, context: list[str] -> answer: float").instructions
    'Given the fields `question`, `context`, produce the fields `answer`.'
    """
    if isinstance(task, Signature):
        made = task
    elif isinstance(task, str):
        made = _parse_signature(task, types or {})
    elif callable(task):
        made = _inspect_function(task, types or {})
    else:
        todo = "write 'question -> answer'"
        raise SignatureError("no signature", task, "a text or a function", todo)
    if instructions is None and made.instructions:
        return made
    given, wanted = made.shown[: -len(made.wanted)], "`, `".join(made.wanted)
    start = f"Given the fields `{'`, `'.join(given)}`, produce" if given else "Produce"
    asked = f"{start} the fields `{wanted}`."
    return made.with_instructions(asked if instructions is None else instructions)


def _parse_signature(text: str, types: Fields) -> Signature:
    # An arrow in a Literal is none.
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: "_" * len(quoted[0]), text)
    if bare.count("->") != 1:
        raise SignatureError("not one arrow", text, "'inputs -> outputs'", "write 'q -> a'")
    arrow = bare.index("->")
    inputs, outputs = text[:arrow].strip(), text[arrow + 2 :].strip()
    return Signature(_parse_side(inputs, types), _parse_side(outputs, types))


def _parse_side(text: str, types: Fields) -> list[Field]:
    """Read one side as what it looks like: the parameters of a Python function."""
    try:
        parsed: Any = ast.parse(f"def side({text}): ...").body[0]
    except SyntaxError as error:
        todo = f"correct it ({error.msg})"
        raise SignatureError("wrong syntax", text, "'name, name: type'", todo) from error
    given, untyped = parsed.args, ast.Name("str")
    if given.vararg or given.kwonlyargs or given.kwarg or given.posonlyargs or given.defaults:
        todo = "remove stars, slashes and defaults"
        raise SignatureError("wrong syntax", text, "'name, name: type'", todo)
    return [_field(one.arg, _resolve(one.annotation or untyped, text, types)) for one in given.args]


def _resolve(node: ast.expr, text: str, types: Fields) -> Any:
    """Evaluate an annotation by hand: names, brackets, `|`, and constants; nothing is executed."""
    match node:
        case ast.Name(id=name):
            return _named_type(name, text, types)
        case ast.Constant(value=value):
            return value
        case ast.Attribute(value=outer, attr=name):  # a class inside of one
            with suppress(SignatureError):
                if isinstance(found := vars(_resolve(outer, text, types)).get(name), type):
                    return found
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
                wrong = ("a wrong type", ast.unparse(node), "a type", f"correct it ({error})")
                raise SignatureError(*wrong) from error
    raise SignatureError("a wrong type", ast.unparse(node), "names and brackets", f"see {text!r}")


def _named_type(name: str, text: str, types: Fields) -> Any:
    ours = (History, Image, Audio, File, date, datetime, clock, Decimal)
    known = {one.__name__: one for one in ours} | dict(types)
    if name in known:
        return known[name]
    if isinstance(built_in := getattr(builtins, name, None), type):
        return built_in
    if name in typing.__all__:
        return getattr(typing, name)
    todo = f"pass types={{{name!r}: {name}}}"
    raise SignatureError("unknown type name", name, f"a known type in {text!r}", todo)


# One pattern for each style of docstring: where the parameters stand, and what one looks like.
_STYLES = (
    (r":param ", r"^:param(?:\s+[^\s:]+)?\s+(\w+):[ \t]*(.*(?:\n[ \t]+\S.*)*)"),
    (
        r"(?:Args|Arguments|Parameters):[ \t]*\n",
        r"^[ ]{2,8}\*{0,2}(\w+)(?:[ ]*\([^)]*\))?:[ \t]*(.*(?:\n[ ]{5,}\S.*)*)",
    ),
    (r"Parameters[ \t]*\n-{3,}", r"^(\w+)[ ]*(?::.*)?\n((?:[ \t]+\S.*\n?)+)"),
)


def _documented(doc: str) -> tuple[str, dict[str, str]]:
    """Read a docstring: what the function does, and the text of each parameter."""
    for heading, parameter in _STYLES:
        if found := re.search(rf"^{heading}", doc, re.MULTILINE):
            texts = re.findall(parameter, doc[found.start() :], re.MULTILINE)
            return doc[: found.start()].strip(), {n: " ".join(text.split()) for n, text in texts}
    return doc.strip(), {}


def _inspect_function(function: Callable[..., Any], types: Fields) -> Signature:
    name = getattr(function, "__name__", "")
    if isinstance(function, type):
        todo = f"write a function that returns it, or 'text -> found: {name}' with types="
        raise SignatureError("a class is no task", name, "a text or a function", todo)
    about, texts = _documented(inspect.getdoc(function) or "")
    hints = _hints(function, types)
    inputs, result = _parameters(function, hints, texts=texts), hints.get("return", str)
    parts = None if isinstance(result, EnumMeta) else _attributes(result)
    if parts is None:
        return Signature(inputs, [_field(name, result)], about)
    return Signature(inputs, [Field(a.name, a.type, a.desc) for a in parts], about, made=result)


def _hints(function: Callable[..., Any], types: Fields | None = None) -> dict[str, Any]:
    """The types of a function's parameters, and of what it returns."""
    try:
        return typing.get_type_hints(function, localns=dict(types or {}), include_extras=True)
    except (NameError, TypeError) as error:
        todo = f"pass types= for names it cannot see ({error})"
        raise SignatureError("a wrong annotation", _name_of(function), "types", todo) from error


def _field(name: str, tp: Any, desc: str = "", default: Any = attrs.NOTHING) -> Field:
    kind, told = described(tp, desc)
    return Field(name, kind, told, default)


def _parameters(
    function: Callable[..., Any], hints: Fields, *, texts: Fields | None = None, skip: int = 0
) -> list[Field]:
    fields, texts = [], texts or {}
    for one in list(inspect.signature(function).parameters.values())[skip:]:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY):
            todo = "name each input, so that no expected output can slip in"
            raise SignatureError("a parameter without a name", str(one), "a name", todo)
        default = attrs.NOTHING if one.default is one.empty else one.default
        fields.append(_field(one.name, hints.get(one.name, str), texts.get(one.name, ""), default))
    return fields


# == 5. Messages ===================================================================================


@frozen
class ToolCall:
    """A tool that a model wants called, with its arguments.

    Attributes:
        attached: what the provider sent with it, such as signed thoughts, and wants back.
    """

    id: str
    name: str
    arguments: Record = field(converter=_record)
    attached: Record = field(default=Record(), converter=_record, eq=False, repr=False)


MEDIA_LIMIT = 20 * 2**20
"""How many bytes an image, audio or file may have; most providers refuse more."""


def _check_size(shown: str, size: int) -> None:
    if size > MEDIA_LIMIT:
        raise DataError("too large", shown, f"at most {MEDIA_LIMIT:,} bytes", "make it smaller")


@frozen
class Media:
    """What is not text: see `Image`, `Audio` and `File`. Making one reads and fetches nothing.

    Attributes:
        url: http(s) URL or data URI.
    Raises:
        DataError: neither a URL nor a data URI, or too large.
    """

    kind: typing.ClassVar[str] = "media"
    url: str = field(repr=lambda url: repr(cut(url, 40)))
    name: str = ""  # of a file

    @url.validator
    def _check(self, attribute: Any, url: Any) -> None:
        if not isinstance(url, str) or not re.match(r"(?i)https?://|data:", url):
            todo = "read a file with from_path, wrap bytes with from_bytes"
            raise DataError("neither a URL nor a data URI", url, "http://, https:// or data:", todo)
        _check_size(url[:50], len(url) * 3 // 4 - 75)

    @classmethod
    def from_bytes(cls: type[M], data: bytes, media_type: str, *, name: str = "") -> M:
        """Make one of bytes, with their media type, such as "image/png"."""
        from base64 import b64encode

        text = b64encode(data).decode()
        return cls(f"data:{media_type};base64,{text}", name)

    @classmethod
    def from_path(cls: type[M], path: Path_, *, media_type: str = "") -> M:
        """Read a file; its media type is guessed by its name.

        Raises:
            DataError: the type cannot be guessed, or the file is too large.
            OSError: the file cannot be read.
        """
        import mimetypes

        file = Path(path)
        guessed = media_type or mimetypes.guess_type(file.name)[0]
        if guessed is None:
            raise DataError("unknown media type", file.name, "a known ending", "pass media_type=")
        _check_size(str(file), file.stat().st_size)
        return cls.from_bytes(file.read_bytes(), guessed, name=file.name)


class Image(Media):
    """A picture, as an input or inside one.

    >>> Image("https://example.org/cat.png")
    Image(url='https://example.org/cat.png', name='')
    """

    __slots__ = ()
    kind = "image"


class Audio(Media):
    """A recording, as an input or inside one; providers take it as data, not by URL.

    >>> Audio.from_bytes(b"RIFF", "audio/wav").url
    'data:audio/wav;base64,UklGRg=='
    """

    __slots__ = ()
    kind = "audio"


class File(Media):
    """A document, as an input or inside one; providers take it as data, not by URL.

    >>> File.from_bytes(b"%PDF", "application/pdf", name="a.pdf").name
    'a.pdf'
    """

    __slots__ = ()
    kind = "file"


@frozen
class Message:
    """One message of a conversation.

    Attributes:
        content: its text; or its text and then the media that it names as "[image 1]".

    >>> Message("user", "Hello").content
    'Hello'
    """

    role: str  # "system", "user", "assistant", or "tool" for the result of a call
    content: str | tuple[Any, ...]
    tool_calls: tuple[ToolCall, ...] = ()  # what an assistant wants called
    tool_call_id: str | None = None  # which call a tool's result answers

    @property
    def text(self) -> str:
        """What of the content is text."""
        return self.content if isinstance(self.content, str) else str(self.content[0])


def transcript(said: Iterable[Message] | Prediction | Trace, *, every: bool = False) -> str:
    """Return a conversation as one readable text: messages, or what was said in a run.

    Args:
        said: messages; or a prediction or a trace, of which the last LM call is shown, its reply
            included.
        every: all calls of the run, one after the other.

    >>> print(transcript([Message("user", "Hello"), Message("assistant", "Hi")]))
    --- user ---
    Hello
    --- assistant ---
    Hi
    """
    if not isinstance(said, (Prediction, Trace)):
        return "\n".join(f"--- {one.role} ---\n{_uttered(one)}" for one in said)
    trace = said.trace if isinstance(said, Prediction) else said
    asked = [event for event in trace if event.request is not None][0 if every else -1 :]
    heads = [f"===== {n}. {one.path} =====\n" * every for n, one in enumerate(asked, start=1)]
    return "\n".join(map(operator.add, heads, map(_exchange, asked)))


def _uttered(message: Message) -> str:
    calls = [f"{one.name}({as_text(one.arguments)})" for one in message.tool_calls]
    return "\n".join(filter(None, [message.text, *calls]))


def _exchange(event: Event) -> str:
    """The messages of an LM call and its reply, or why there is none."""
    asked = event.request.messages if event.request else ()
    if event.response is None:
        return f"{transcript(asked)}\n--- failed ---\n{event.error}"
    reply = Message("assistant", event.response.text, event.response.tool_calls)
    return transcript([*asked, reply])


@frozen
class History:
    """Earlier turns of a conversation, as an input: they become messages of their own.

    Attributes:
        turns: records with the input and output fields that the step had then.

    >>> History([{"question": "2+2?", "answer": "4"}]).turns[0].answer
    '4'
    """

    turns: tuple[Record, ...] = field(default=(), converter=_records)


def _fit_name(name: str) -> str:
    """A name that providers take; they refuse dots, blanks, and more than 64 characters."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", str(name)).strip("_")[:64] or "tool"


@frozen
class Tool:
    """A function that a model may call.

    Made by `Tool.of` from a typed function, a bound method or a callable object, or by
    `Tool.from_mcp` from the description of a remote one. Calling it checks the arguments, makes
    values of the parameters' types of them, and calls the function.

    Attributes:
        function: what is called with the arguments by name.

    >>> def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    >>> Tool.of(add).schema["required"]
    ['a']
    """

    name: str = field(converter=_fit_name)  # by which a model calls it
    desc: str  # what it does
    schema: Fields  # JSON schema of its arguments
    fields: tuple[Field, ...] = field(eq=False, repr=False)  # its parameters
    function: Callable[..., Any] = field(eq=False, repr=False)
    open: bool = False  # whether it takes arguments of other names too

    @classmethod
    def of(cls, function: Any, *, name: str = "", desc: str = "") -> Tool:
        """Make a tool of a function; its docstring (Google, NumPy or reST style) describes it.

        A tool of LangChain, any object with `name`, `description`, `args_schema` and `invoke`, is
        taken as well.

        Raises:
            SignatureError: it has a parameter of an unknown type, or it is no function.
        """
        if isinstance(function, Tool):
            return function
        if hasattr(function, "args_schema") and hasattr(function, "invoke"):
            return _duck_tool(function, name, desc)
        if not callable(function):
            todo = "pass a function, or an object with name, description, args_schema and invoke"
            raise SignatureError("this is no tool", function, "a function", todo)
        return _typed_tool(function, name, desc)

    @classmethod
    def from_mcp(cls, description: Any, call: Callable[[str, dict[str, Any]], Any]) -> Tool:
        """Make a tool of an MCP tool description; `call(name, arguments)` calls it.

        Calling it returns the text of the outcome, or an image, audio or file.

        Args:
            description: a mapping or an object with name, description and the schema of the input.
            call: sends the call, and returns the result; it may be `async`.
        """
        schema = _either(description, "inputSchema", "input_schema") or {}
        name = str(_either(description, "name"))
        about = str(_either(description, "description") or "")
        return _schema_tool(name, about, schema, partial(_call_mcp, call, name))

    def __call__(self, /, **arguments: Any) -> Any:
        """Call the function with these arguments, checked."""
        return self.function(**self.checked(arguments))

    def checked(self, arguments: Fields, places: Sequence[Any] = ()) -> dict[str, Any]:
        """Return the arguments, by name or by place, as values of the parameters' types.

        A null for what may be left out is left out.

        Raises:
            DataError: one is missing, unknown or of a wrong type; worded for a model to act on.
        """
        known = {one.name: one for one in self.fields}
        expected = ", ".join(f"{f.name}: {f.words}" for f in self.fields) or "no arguments"
        if len(places) > len(known):
            raise DataError(f"too many arguments of {self.name}", places, expected, "drop some")
        arguments = {**dict(zip(known, places, strict=False)), **arguments}
        for name, value in arguments.items():
            if name not in known and not self.open:
                raise DataError(f"{self.name} has no argument {name!r}", value, expected, "drop it")
        for one in self.fields:
            if one.required and one.name not in arguments:
                what = f"{self.name} lacks the argument {one.name!r}"
                raise DataError(what, arguments, expected, "give it")
        return {
            name: self._value(known[name], value) if name in known else value
            for name, value in arguments.items()
            if value is not None or name not in known or known[name].required
        }

    def _value(self, one: Field, value: Any) -> Any:
        try:
            return _first_value(one.type, _opened(one.type, value, one.name), value)
        except ValueError as error:
            what = f"{self.name} cannot take the argument {one.name!r} ({error})"
            raise DataError(what, value, one.words, "correct it") from error


def _typed_tool(function: Callable[..., Any], name: str, desc: str) -> Tool:
    inner: Any = getattr(function, "func", function)  # of a partial
    typed = inner if inspect.isroutine(inner) or isinstance(inner, type) else type(inner).__call__
    try:
        hints = typing.get_type_hints(typed, include_extras=True)
        known = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        expected = "types that can be resolved"
        raise SignatureError("a wrong annotation", repr(function), expected, str(error)) from error
    fields, (about, texts) = list[Field](), _documented(inspect.getdoc(function) or "")
    for one in known:
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            kind, text = hints.get(one.name, Any), texts.get(one.name, "")
            default = attrs.NOTHING if one.default is one.empty else one.default
            fields.append(_field(one.name, kind, text, default))
    by_place = [one.name for one in known if one.kind == one.POSITIONAL_ONLY]
    made = partial(_placed, function, by_place) if by_place else function
    more = any(one.kind == one.VAR_KEYWORD for one in known)
    schema = _tool_schema(fields, more)
    return Tool(name or _name_of(inner), desc or about, schema, tuple(fields), made, more)


def _placed(function: Callable[..., Any], names: Sequence[str], /, **arguments: Any) -> Any:
    """Call a function that takes some arguments by their place only."""
    given = [arguments.pop(name) for name in names if name in arguments]
    return function(*given, **arguments)


def _tool_schema(fields: Sequence[Field], more: bool) -> dict[str, Any]:
    made = _with_defs(_fields_schema, fields)
    for one in fields:
        if not one.required and one.default is not None:
            with suppress(DataError):
                made["properties"][one.name]["default"] = jsonable(one.default)
    required = [one.name for one in fields if one.required]
    return {**made, "required": required, "additionalProperties": more}


# -- tools that a JSON schema describes --


def _either(value: Any, *names: str) -> Any:
    """What a mapping or an object has under one of these names."""
    get = value.get if isinstance(value, Mapping) else partial(getattr, value)
    return next((found for name in names if (found := get(name, None)) is not None), None)


def _schema_tool(name: str, desc: str, schema: Fields, call: Callable[[Fields], Any]) -> Tool:
    """A tool that is called with one mapping; names that are none in Python are mapped back."""
    given, needed = schema.get("properties") or {}, schema.get("required") or ()
    names = {re.sub(r"\W", "_", one): one for one in given}
    properties = {made: given[own] for made, own in names.items()}
    required = [made for made, own in names.items() if own in needed]
    fields = []
    for made, one in properties.items():
        default = attrs.NOTHING if made in required else one.get("default")
        fields.append(_field(made, _schema_type(one, schema), one.get("description", ""), default))
    shown = {**schema, "type": "object", "properties": properties, "required": required}
    return Tool(name, desc, shown, tuple(fields), partial(_renamed, call, names))


def _renamed(call: Callable[[Fields], Any], names: Fields, /, **arguments: Any) -> Any:
    return call({names[name]: value for name, value in arguments.items()})


def _duck_tool(tool: Any, name: str, desc: str) -> Tool:
    schema = tool.args_schema
    asked = schema if isinstance(schema, Mapping) else schema.model_json_schema()
    only_async = getattr(tool, "coroutine", None) and getattr(tool, "func", None) is None
    call = tool.ainvoke if only_async else tool.invoke
    return _schema_tool(name or tool.name, desc or inspect.cleandoc(tool.description), asked, call)


def _call_mcp(call: Callable[[str, dict[str, Any]], Any], name: str, arguments: Fields) -> Any:
    result = call(name, jsonable(dict(arguments)))

    async def later() -> Any:
        return _mcp_outcome(await result)

    return later() if inspect.isawaitable(result) else _mcp_outcome(result)


def _mcp_outcome(result: Any) -> Any:
    """The text of what an MCP tool returned, its only image, audio or file, or its structure."""
    parts = _either(result, "content")
    if not isinstance(parts, (list, tuple)):
        return result
    made = [_mcp_part(one) for one in parts]
    text = "\n".join(one for one in made if isinstance(one, str))
    if _either(result, "isError", "is_error"):
        raise RuntimeError(text or "the tool failed")
    media = [one for one in made if isinstance(one, Media)]
    structured = _either(result, "structuredContent", "structured_content")
    return text or (media[0] if media else "" if structured is None else structured)


def _mcp_part(part: Any) -> Any:
    kinds = {"image": Image, "audio": Audio, "resource": File}
    kind, inner = _either(part, "type"), _either(part, "resource") or part
    data, media_type = _either(inner, "data", "blob"), _either(inner, "mimeType", "mime_type")
    if kind in kinds and data is not None:
        return kinds[kind](f"data:{media_type or 'application/octet-stream'};base64,{data}")
    return str(_either(inner, "text", "uri") or "")


def _schema_type(schema: Any, root: Fields, inside: tuple[str, ...] = ()) -> Any:
    """The type that a JSON schema describes; Any for what has no name here."""
    if not isinstance(schema, Mapping):
        return Any
    if ref := schema.get("$ref"):
        found = get_in(str(ref).lstrip("#/").split("/"), root, {})
        return Any if ref in inside else _schema_type(found, root, (*inside, ref))
    turn = partial(_schema_type, root=root, inside=inside)
    kind, choices = schema.get("type"), schema.get("enum")
    if choices or "const" in schema:
        return Literal[tuple(choices or [schema["const"]])]
    several = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf", ())[:1]
    if isinstance(kind, list):
        several = [{**schema, "type": one} for one in kind]
    if several:
        return Union[tuple(map(turn, several))]  # noqa: UP007
    if kind == "array":
        return list[turn(schema.get("items", {}))]  # type: ignore[misc]
    if kind == "object" and schema.get("properties"):
        return _typed_mapping(schema, turn)
    plain_types = {name: tp for tp, name in _JSON_NAMES.items()} | {"null": None, "object": dict}
    return plain_types.get(kind, Any)  # type: ignore[arg-type]


def _typed_mapping(schema: Fields, turn: Callable[[Any], Any]) -> Any:
    required, made = schema.get("required") or (), dict[str, Any]()
    for name, one in schema["properties"].items():
        kind = Annotated[turn(one), one["description"]] if one.get("description") else turn(one)
        made[name] = kind if name in required else typing.NotRequired[kind]
    make: Any = typing.TypedDict
    return make(re.sub(r"\W", "_", str(schema.get("title") or "Object")), made)


def _hidden() -> Any:
    return field(default=None, eq=False, repr=False, kw_only=True)


@frozen
class Request:
    """What an LM is asked: the messages, and how to answer them.

    Attributes:
        tools: that the model may call: `Tool`s, or definitions as the provider takes them.
        extra: further options, sent to the provider as they are.
        step: path of the step that asks. This and what follows take no part in equality or key.

    >>> Request([Message("user", "Hello")]).key[:8]
    'ebd51c78'
    """

    messages: tuple[Message, ...] = field(converter=_tuple)  # the conversation so far
    model: str | None = None  # instead of the LM's own
    temperature: float | None = None  # of sampling, 0 or more
    max_tokens: int | None = None  # of the reply
    top_p: float | None = None  # share of probability to sample from, 0 to 1
    stop: tuple[str, ...] = field(default=(), converter=_tuple)  # texts that end the reply
    schema: Fields | None = None  # JSON schema that the reply must follow
    tools: tuple[Any, ...] = field(default=(), converter=_tuple)
    tool_choice: Any = None  # which of them to call, as JSON
    rollout: int = 0  # tells apart deliberate re-samples of one prompt
    extra: Record = field(default=Record(), converter=_record)
    step: str | None = _hidden()
    signature: Signature | None = _hidden()  # of that step
    inputs: Record | None = _hidden()  # of that step
    adapter: Adapter | None = _hidden()  # that laid out the messages
    # called with each piece of text as it arrives; with an empty one where the answer starts over
    on_text: Callable[[str], None] | None = _hidden()

    @property
    def key(self) -> str:
        """The SHA-256 of all that can change the answer, in canonical JSON."""
        return _sha256(_encodable(_SORTED.encode(self.said())))

    def said(self) -> dict[str, Any]:
        """Return all that can change the answer, as JSON data."""
        said: dict[str, Any] = {"messages": [_said(one) for one in self.messages]}
        for name in ("model", "temperature", "max_tokens", "top_p", "schema", "tool_choice"):
            if (value := getattr(self, name)) is not None:
                said[name] = jsonable(value)
        for name in ("stop", "tools", "rollout", "extra"):
            if value := getattr(self, name):
                said[name] = jsonable(value)
        return said


def _said(message: Message) -> dict[str, Any]:
    """What a message has; what it does not is left out, so that a new field keeps old keys."""
    if not message.tool_calls and message.tool_call_id is None and type(message.content) is str:
        return {"role": message.role, "content": message.content}
    return {name: value for name, value in jsonable(message).items() if value not in (None, [])}


_ENDS = {
    "stop": ("end_turn", "stop_sequence", "eos", "pause_turn"),
    "length": ("max_tokens", "model_length", "model_context_window_exceeded", "max_output_tokens"),
    "tool_calls": ("tool_use", "function_call"),
    "refusal": (
        "content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii",
        "image_safety", "guardrail_intervened",
    ),
}  # fmt: skip


def _ended(reason: str | None) -> str:
    """Why a reply ended, in one spelling for all providers; what none of them says is kept."""
    said = (reason or "stop").lower()
    return next((known for known, names in _ENDS.items() if said in names), said)


@frozen
class Response:
    """What an LM answered.

    Attributes:
        tool_calls: that the model asks for.
        cached: whether it was answered from a cache; takes no part in equality.
    """

    text: str  # of the reply
    tool_calls: tuple[ToolCall, ...] = field(default=(), converter=_tuple)
    usage: Usage = Usage()  # what it cost; an answer from a cache keeps what it once cost
    model: str = ""  # that answered
    finish_reason: str = field(default="stop", converter=_ended)  # see `_ENDS`
    reasoning: str = ""  # the model's own thoughts, where the provider shows them
    logprobs: Any = None  # as the provider gives them
    cached: bool = field(default=False, eq=False)


LM = Callable[[Request], Response]
"""A language model is any function from a request to a response."""


def spans(trace: Iterable[Event]) -> list[Record]:
    """Return a trace as the spans of OpenTelemetry, plain data for any exporter.

    Names and attributes are those of its conventions for generative AI: a request is `chat`, a call
    `execute_tool`, a step `invoke_agent`. Prompts, replies, arguments and results are in them. The
    name of the provider, which the conventions want, is yours to add.

    Returns:
        a record for each event: name, kind ("CLIENT" or "INTERNAL"), trace_id, span_id (of a step,
        before those of what it did), parent_id ("" for the run itself), start and end (nanoseconds
        since 1970), attributes (texts, numbers and lists of texts), and error ("" where it went
        well).
    Raises:
        DataError: a trace that was read from a file has no times; or events of several runs.
    Reference: github.com/open-telemetry/semantic-conventions-genai.

    >>> one, two = spans(predict("q -> a")(stub_lm(), q="?").trace)
    >>> one.name, two.name, one.parent_id == two.span_id
    ('chat', 'invoke_agent predict', True)
    """
    events = tuple(trace)
    ids = {event.id for event in events}
    if 0 in ids or len(ids) < len(events):
        what = "a trace without times" if 0 in ids else "events of several runs"
        todo = "take that of a prediction: prediction.trace"
        raise DataError(what, events[:1], "the trace of a run", todo)
    facts = [[one.began, one.id, one.path, one.inputs, one.outputs] for one in events]
    run_id = _sha256(canonical(facts, other=repr))[:32]
    return [_span(event, run_id) for event in events]


def _span(event: Event, run_id: str) -> Record:
    operation, named, facts = _genai(event)
    known = {"operation.name": operation, **facts}
    attributes = {f"gen_ai.{n}": v for n, v in known.items() if v not in (None, "", [])}
    if event.error:
        attributes["error.type"] = event.error.partition(":")[0]
    began = round(event.began * 1e9)
    return Record(
        name=f"{operation} {named}".rstrip(),
        kind="CLIENT" if event.kind == "lm" else "INTERNAL",
        trace_id=run_id,
        span_id=f"{event.id:016x}",
        parent_id=f"{event.parent_id:016x}" if event.parent_id else "",
        start=began,
        end=began + round(event.seconds * 1e9),
        attributes=attributes,
        error=event.error,
    )


def _genai(event: Event) -> tuple[str, str, dict[str, Any]]:
    """The operation of an event, what it was done with, and its attributes."""
    asked, answer, named = event.request, event.response, event.name.removesuffix("()")
    if asked is not None:
        return "chat", asked.model or (answer.model if answer else ""), _genai_chat(asked, answer)
    given, made = event.inputs, "" if event.error else canonical(event.outputs, other=repr)
    if event.kind == "call":
        told = canonical(given if given["args"] else given["kwargs"], other=repr)
        facts = {"tool.name": named, "tool.call.arguments": told, "tool.call.result": made}
        return "execute_tool", named, facts
    asks = _genai_said([Message("user", canonical(given, other=repr))])
    says = made and _genai_said([Message("assistant", made)], finish_reason="stop")
    facts = {"agent.name": named, "input.messages": asks, "output.messages": says}
    return "invoke_agent", named, facts


def _genai_chat(asked: Request, answer: Response | None) -> dict[str, Any]:
    sampling = ("model", "temperature", "max_tokens", "top_p")
    facts: dict[str, Any] = {
        **{f"request.{name}": getattr(asked, name) for name in sampling},
        "request.stop_sequences": list(asked.stop),
        "input.messages": _genai_said(asked.messages),
    }
    if answer is None:
        return facts
    reply = Message("assistant", answer.text, answer.tool_calls)
    return facts | {
        "response.model": answer.model,
        "response.finish_reasons": [answer.finish_reason],
        "usage.input_tokens": answer.usage.input_tokens,
        "usage.output_tokens": answer.usage.output_tokens,
        "usage.cache_read.input_tokens": answer.usage.cached_tokens or None,
        "output.messages": _genai_said([reply], finish_reason=answer.finish_reason),
    }


def _genai_said(messages: Iterable[Message], **more: str) -> str:
    """Messages as JSON, with what else is to stand in each."""
    said = []
    for one in messages:
        calls = [{"type": "tool_call", **jsonable(call)} for call in one.tool_calls]
        parts = [{"type": "text", "content": one.text}, *calls]
        if one.tool_call_id is not None:
            result = {"id": one.tool_call_id, "response": one.text}
            parts = [{"type": "tool_call_response", **result}]
        said.append({"role": one.role, "parts": parts, **more})
    return canonical(said)


# == 6. Adapters ===================================================================================


class Part(typing.NamedTuple):
    """What a reply, or the beginning of one, holds of a field."""

    text: str  # as far as it is sure, without the markers of the format
    closed: bool  # whether nothing can be added to it any more
    data: Any = _NOTHING  # as JSON data, where the format has that; else it is read from the text


@frozen(eq=False)
class Adapter(Made):
    """How a signature becomes messages, and how a reply becomes fields again.

    Attributes:
        render: (signature, prompt, inputs) -> messages; pure, and the same up to the last message
            for all inputs, so that a provider can cache the prefix.
        parse: (signature, response) -> record of typed outputs; for any text at all it returns or
            raises `ParseError`, never anything else.
            It may also return a flow, whose effects then stand in the trace.
        schema: signature -> the JSON schema of a reply, for providers that can be held to one.
        fields: (signature, text, more, memo) -> what the text holds, a `Part` by field: the one
            reading of a reply; where more may come, of its beginning. A part that is not closed
            only grows. The memo is for `scan`, of a text that grows.
    """

    name: str  # of the format
    render: Callable[[Signature, Prompt, Fields], tuple[Message, ...]] = field(repr=False)
    parse: Callable[[Signature, Response], Any] = field(repr=False)
    schema: Callable[[Signature], dict[str, Any]] | None = field(default=None, repr=False)
    calls: int = 1  # how many LM calls one answer takes
    fields: Callable[..., Mapping[str, Part]] | None = field(default=None, repr=False)
    made: Any = _made()


def render_outputs(adapter: Adapter, task: Signature, values: Fields) -> str:
    """Return the reply that a model would write for these outputs: what `parse` reads back.

    >>> print(render_outputs(chat, signature("question -> answer"), {"answer": "4"}))
    [[ ## answer ## ]]
    4
    <BLANKLINE>
    [[ ## completed ## ]]
    """
    messages = adapter.render(task, Prompt(demos=(Record(values),)), {})
    return next(one.text for one in reversed(messages) if one.role == "assistant")


# -- marked formats: each field between markers, a text or JSON --


class _Marks(typing.NamedTuple):
    """The markers of some fields in a format."""

    form: _Format
    labels: dict[str, str]  # by name
    names: dict[str, str]  # by label, and by name and label in small letters
    mark: re.Pattern[str]
    ending: re.Pattern[str]  # a mark, or what ends a reply wherever it stands: slower
    look: re.Pattern[str]


@lru_cache(maxsize=256)
def _marks(form: _Format, names: tuple[str, ...]) -> _Marks:
    nice = [name.replace("_", " ").strip() or name for name in names]
    shown = [text[:1].upper() + text[1:] for text in nice] if form.nice else names
    labels = dict(zip(names, shown if len(set(shown)) == len(shown) else names, strict=True))
    spelled = {one: one for one in names} | {label: name for name, label in labels.items()}
    known = "|".join(re.escape(one) for one in sorted(spelled, key=len, reverse=True)) or r"\w+"
    small = {one.casefold(): name for one, name in reversed(spelled.items())}

    def pattern(text: str) -> re.Pattern[str]:
        return re.compile(text.replace("NAMES", known), re.MULTILINE | re.IGNORECASE)

    ending = form.mark if form.tags else rf"{form.mark}|(?<!\\){_END}"
    look = rf"(^[ \t]*+|(?<!\\)(?=\\*+{_END}))(\\*(?:{form.look}|{_END}))"
    return _Marks(form, labels, small | spelled, *map(pattern, (form.mark, ending, look)))


# What ends the reply wherever it stands: the last marker of the chat format, a token of the model.
_END = r"(?:\[\[ ## completed ## \]\]|(?:</s>|<\|\w+\|>)(?=\s*\Z))"


def _mark(form: _Format, task: Signature, texts: Mapping[str, str]) -> str:
    """Write texts between their markers; what looks like a marker in one of them is escaped."""
    marks = _marks(form, task.shown)
    made = [form.field.format(marks.labels[n], _escaped(marks, one)) for n, one in texts.items()]
    return form.joint.join(made)


def _escaped(marks: _Marks, text: str) -> str:
    if marks.form.tags:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if "[[" in text or "</s>" in text or "<|" in text or (marks.form.nice and ":" in text):
        return marks.look.sub(r"\1\\\2", text)
    return text


def _unescaped(marks: _Marks, text: str) -> str:
    if not marks.form.tags:
        return marks.look.sub(lambda one: one[1] + one[2].removeprefix("\\"), text)
    from html import unescape

    # An ampersand that no semicolon ends is one, as in a link.
    return re.sub(r"&#?\w+;", lambda entity: unescape(entity[0]), text)


_UNKNOWN = "(unknown)"


def _reply(form: _Format, task: Signature, values: Fields) -> str:
    known = {f.name: write(f.type, values[f.name]) for f in task.outputs if f.name in values}
    return _mark(form, task, dict.fromkeys(task.wanted, _UNKNOWN) | known) + form.end


def _structure(form: _Format, task: Signature) -> str:
    """How a reply looks: the outputs only, as models repeat the inputs where these are shown."""
    if not form.shown:
        return form.start
    places = {one.name: _place(one.type) for one in task.outputs}
    return f"{form.start}\n\n{_mark(form, task, places)}{form.end}"


def _place(tp: Any) -> str:
    """What stands for a value in a structure: bare words, as brackets around them are copied."""
    kind, parts = shape(tp)
    if kind == "noted":
        return _place(parts[0])
    if kind == "object":
        return "{" + ", ".join(f"{_dump(one.name)}: ..." for one in parts) + "}"
    if kind == "list" and _kind(parts[0]) == "object":
        return f"[{_place(parts[0])}]"
    if kind == "union":
        return " or ".join(unique(map(_place, parts)))
    a_list, an_object = "a JSON list", "a JSON object"
    known = {"choice": "one of the choices", "list": a_list, "row": a_list, "dict": an_object}
    return "text" if tp is str else known.get(kind) or words(tp)


def _pieces(marks: _Marks, text: str) -> list[tuple[str, str, bool]]:
    """The text before the first marker and behind each: its field, and whether a marker ends it."""
    ends = text.count("[[ ## completed") > text.count("\n[[ ## completed")
    ends = ends or ("<" in text and ("</s>" in text or "<|" in text))
    found = (marks.ending if ends else marks.mark).finditer(text)
    made: list[tuple[str, str, bool]] = []
    name, at = "", 0
    for one in _outermost(found) if marks.form.tags else found:
        begin, end = one.span()
        made.append((name, text[at:begin], True))
        label, at = one["name"] or "", end
        name = marks.names.get(label) or marks.names.get(label.casefold(), label)
    return [*made, (name, text[at:], False)]


def _outermost(tags: Iterable[re.Match[str]]) -> Iterator[re.Match[str]]:
    """The tags that stand in no other one; what is inside is text, the same tag too."""
    opened, depth = "", 0
    for tag in tags:
        label = tag[tag.lastgroup or 0].casefold()
        if label == opened:
            depth += -1 if tag["shut"] else 1
        if (opened and not depth) or (not opened and tag["name"]):
            opened, depth = ("", 0) if opened else (label, 1)
            yield tag


def _fields(
    form: _Format, task: Signature, text: str, more: bool, memo: _Memo | None = None
) -> dict[str, Part]:
    """Read a reply; of two fields that are equal, the first."""
    marks = _marks(form, task.shown)
    found: dict[str, Part] = {}
    for name, piece, ended in _pieces(marks, text):
        if name in task.wanted and name not in found:
            said = (piece if ended or not more else _sure(marks, piece)).strip()
            said = _unescaped(marks, said) if "\\" in said or "&" in said else said
            found[name] = Part(said, ended or not (more or form.tags))
    return found


# The end of a text that may be the start of a tag or of an entity, or of what ends a reply.
_UNSURE = r"(?:<(?:/?\w[^<>]*+|/)?|&(?:#\w*|[^\s<&;#]{0,32}))\Z"
_UNENDED = r"(?<!\\)\\*+(?:\[(?:\[[ #\w\]]*+)?|<(?:/s?|\|\w*+\|?)?)?\Z"


def _sure(marks: _Marks, text: str) -> str:
    """The text without an end that may become a marker, or something escaped."""
    if marks.form.tags:
        return re.sub(_UNSURE, "", text, count=1)
    text = text[:-99] + re.sub(_UNENDED, "", text[-99:], count=1)
    line = text[text.rfind("\n") + 1 :]
    begun = line.lstrip(" \t").lstrip("\\").lstrip("*_#>- ").casefold()
    starts = [*map(str.casefold, marks.names)] if marks.form.nice else ["[["]
    unsure = any(one.startswith(begun) or begun.startswith(one) for one in starts)
    return text[: len(text) - len(line)] if unsure else text


# -- messages of any format --

_PARTIAL = "This example is not complete: some of its fields are unknown."


def _system(form: _Format, task: Signature, prompt: Prompt) -> str:
    lines, inputs = list[str](), [one for one in task.inputs if not one.is_history]
    for side, fields, note in (("Input", inputs, ""), ("Output", task.outputs, form.note)):
        lines += [f"{side} fields:"] if fields else []
        for number, one in enumerate(fields, start=1):
            desc = prompt.texts.get(one.name, one.desc)
            shown = one.words + (note if _kind(one.type) in STRUCTURED else "")
            lines.append(f"{number}. `{one.name}` ({shown})" + (f": {desc}" if desc else ""))
    told = f"Instructions:\n{prompt.instructions}"
    return "\n\n".join(["\n".join(lines), form.structure(form, task), told])


def _turn(form: _Format, task: Signature, values: Record, note: str = "") -> Iterator[Message]:
    """A question and its answer, as a demonstration or from a history."""
    yield Message("user", _content(_marks(form, task.shown), task, values, before=note))
    yield Message("assistant", form.reply(form, task, values))


def _content(
    marks: _Marks, task: Signature, values: Fields, *, before: str = "", after: str = ""
) -> str | tuple[Any, ...]:
    """Lay out the inputs; media become "[image 1]" in the text, and follow it."""
    media: list[Media] = []
    form, texts = marks.form, []
    for one in task.inputs:
        if (label := marks.labels.get(one.name)) and one.name in values:
            value = values[one.name]
            said = _numbered(one, value, media) if one.holds_media else write(one.type, value)
            texts.append(form.field.format(label, _escaped(marks, said)))
    text = "\n\n".join([one for one in (before, form.joint.join(texts), after) if one])
    return (text, *media) if media else text


def _numbered(one: Field, value: Any, media: list[Media]) -> str:
    """Write a value that has images, audio and files, or their URLs; they join those before."""

    def number(found: Media) -> str:
        media.append(found)
        return f"[{found.kind} {len(media)}]"

    try:
        made = coerce(one.type, value)
    except ValueError as error:
        what = f"the input {one.name!r} cannot be read ({error})"
        raise DataError(what, value, one.words, "pass Image(url) or the like") from error
    return write(Any, jsonable(made, media=number))


@attrs.define(hash=True)
class _Asked:
    """What is rendered once; by identity, as two that are equal may differ to the letter."""

    form: _Format = field(eq=id)
    task: Signature = field(eq=id)
    prompt: Prompt = field(eq=id)


@lru_cache(maxsize=128)
def _frame(asked: _Asked) -> tuple[tuple[Message, ...], str, list[str], _Marks]:
    """What does not depend on the inputs: the system message and the demonstrations, the last line
    of what is asked, which inputs are a history, and the markers.
    """
    form, task, prompt = asked.form, asked.task, asked.prompt
    shown, marks = set(task.shown), _marks(form, task.shown)
    # Complete demonstrations stand last: what a model saw last it follows best.
    demos = sorted(prompt.demos, key=lambda demo: shown <= demo.keys())
    notes = ["" if shown <= demo.keys() else _PARTIAL for demo in demos]
    turns = concat(_turn(form, task, *pair) for pair in zip(demos, notes, strict=True))
    wanted = [marks.labels[name] for name in task.wanted]
    facts = {"fields": _listed(task), "first": wanted[0], "last": wanted[-1]}
    ending = form.ending.format(labels=", ".join(wanted), **facts)
    past = [one.name for one in task.inputs if one.is_history]
    return (Message("system", _system(form, task, prompt)), *turns), ending, past, marks


def _render(form: _Format, task: Signature, prompt: Prompt, inputs: Fields) -> tuple[Message, ...]:
    said, ending, past, marks = _frame(_Asked(form, task, prompt))
    for name in past:
        turns = _history(inputs.get(name)).turns
        said = (*said, *concat(_past(form, task, turn) for turn in turns))
    return (*said, Message("user", _content(marks, task, inputs, after=ending)))


def _past(form: _Format, task: Signature, turn: Record) -> Iterator[Message]:
    """An earlier turn: the fields of this step, or a message as providers have them."""
    if turn.keys() == {"role", "content"}:
        yield Message(turn["role"], turn["content"])
    elif turn.keys() & set(task.shown):
        yield from _turn(form, task, turn)
    else:
        expected = f"the fields {', '.join(task.shown)}, or role and content"
        raise DataError("a turn of the history has no known field", turn, expected, "correct it")


def _history(value: Any) -> History:
    if value is None:
        return History()
    try:
        turns = {"turns": value} if isinstance(value, (list, tuple)) else value
        made: History = coerce(History, turns)
        return made
    except ValueError as error:
        todo = f"pass History([...]) ({error})"
        raise DataError("this is no history", value, "earlier turns", todo) from error


def _read(
    form: _Format, task: Signature, text: str, more: bool = False, memo: _Memo | None = None
) -> Mapping[str, Part]:
    """Read a reply, or the beginning of one; where it is in another format, in that."""
    if "<" in text:
        text = _without_thought(form, task, text)
    found = form.fields(form, task, text, more, memo)
    if more:
        return found
    found = found or _elsewhere(form, task, text)
    if form.nice and task.wanted[0] not in found:  # a base model just goes on
        _, start, _ = _pieces(_marks(form, task.shown), text)[0]
        found |= {task.wanted[0]: Part(start.strip(), True)} if start.strip() else {}
    return found or _only_value(form, task, text)


def _elsewhere(form: _Format, task: Signature, text: str) -> dict[str, Part]:
    """Read a reply that is in another format, if all of it is."""
    for other in (_JSON, _CHAT, _XML, _LABELS):
        parts = other.fields(other, task, text, False) if other.name != form.name else {}
        if _is_read(task, parts) and _starts(other, task, text):
            return parts
    return {}


def _starts(form: _Format, task: Signature, text: str) -> bool:
    """Whether a text is in a format from its start or second line on, and says nothing twice."""
    if form is _JSON:
        return bool(_loaded(text) or _one_of(dict[str, Any], text))
    (_, start, _), *pieces = _pieces(_marks(form, task.shown), text)
    names = [name for name, _, _ in pieces if name in task.wanted]
    if form.tags:
        return not start.strip()
    return "\n" not in start.strip() and len(set(names)) == len(names)


def _is_read(task: Signature, parts: Mapping[str, Part]) -> bool:
    """Whether a reply has all that is needed."""
    needed = {one.name for one in task.outputs if one.required} or parts.keys()
    return bool(parts) and all(name in parts and parts[name].closed for name in needed)


_THOUGHT_TAG = r"(?s)\s*+<(think|thinking|thought|reasoning)>(?:.*?</\1>|.*+)"
# Where the template of the model has opened it, the reply only closes it.
_THOUGHT_SHUT = r"(?s).*?</think>(?=\s*(?:\n|\{|\[\[|<|```|\Z))"


def _without_thought(form: _Format, task: Signature, text: str) -> str:
    """The text with blanks for a thought before the answer; places stay as they are."""
    thought, start = re.match(_THOUGHT_TAG, text), text.lstrip()
    if thought and form.tags and thought[1] in task.shown:
        return text
    if not (thought or start[:1] == "{" or _marks(form, task.shown).mark.match(start)):
        thought = re.match(_THOUGHT_SHUT, text)
    end = thought.end() if thought else 0
    return " " * end + text[end:]


def _only_value(form: _Format, task: Signature, text: str) -> dict[str, Part]:
    """A reply that is nothing but the value of the only field, where that is no free text."""
    one, marks = task.outputs[0], [_marks(each, task.shown) for each in (form, _LABELS)]
    if task.wanted[1:] or _free(one.type) or any(_pieces(each, text)[1:] for each in marks):
        return {}
    try:
        read(one.type, text.strip(), name=one.name)
    except (ValueError, RecursionError):
        return {}
    return {one.name: Part(text.strip(), True)}


def _parse(form: _Format, task: Signature, response: Response) -> Record:
    found = _read(form, task, response.text, response.finish_reason == "length")
    values = {}
    for one in task.outputs:
        part = found.get(one.name)
        if part is None and not one.required:
            values[one.name] = one.default
            continue
        if part is None or not part.closed:
            raise _missing(one, part, response)
        try:
            plain_text = one.type is str and part.data is _NOTHING
            values[one.name] = part.text if plain_text else _not_deep(_value(one, part))
        except (ValueError, RecursionError) as error:
            what = f"the field `{one.name}` cannot be read ({error})"
            given = part.text if part.data is _NOTHING else part.data
            facts = {"field": one.name, "told": f"{what}; expected {one.words}"}
            wrong = (what, given, one.words, "correct it")
            raise ParseError(*wrong, **facts, response=response) from error
    if task.made is not None:
        _check_together(task, values, response)
    return _owned(values)


def _check_together(task: Signature, values: dict[str, Any], response: Response) -> None:
    """Let the class that the outputs are attributes of check them."""
    names = {one.name for one in _attributes(task.made) or ()}
    try:
        if names and names <= values.keys():
            coerce(task.made, {name: values[name] for name in names})
    except ValueError as error:
        what = f"the fields do not go together ({error})"
        wrong = (what, values, f"a {task.made.__name__}", "correct them")
        raise ParseError(*wrong, told=what, response=response) from error


def _value(one: Field, part: Part) -> Any:
    """The value of a field: read from a text, or made of JSON data."""
    data = part.data
    # A number is taken to the letter where it can be: JSON makes a float of 1.10.
    if data is _NOTHING or (one.type in (str, Decimal) and isinstance(data, (int, float))):
        return read(one.type, part.text, name=one.name)
    if one.type is str and data and isinstance(data, (list, dict)):  # a list of lines is a text
        lines = isinstance(data, list) and all(isinstance(line, str) for line in data)
        return "\n".join(data) if lines else _dump(data)
    return _first_value(one.type, _opened(one.type, data, one.name), data)


def _missing(one: Field, part: Part | None, response: Response) -> ParseError:
    what = f"the field `{one.name}` is {'not complete' if part else 'missing'}"
    wrong, told = (what, response.text, one.words, "write it"), f"{what}; expected {one.words}"
    if response.finish_reason == "length":
        what, told = "the reply was cut off", "it was too long, and cut off"
        wrong = (what, response.text[-80:], "a complete reply", "raise max_tokens")
    return ParseError(*wrong, field=one.name, told=told, response=response)


def _listed(task: Signature) -> str:
    return ", ".join([f"`{one.name}`" for one in task.outputs])


def _known_adapter(name: str) -> Adapter:
    return ADAPTERS[name]


def _adapter(form: _Format, **more: Any) -> Adapter:
    parse, fields = partial(_parse, form), partial(_read, form)
    made: Any = (_known_adapter, (form.name,), {})
    return Adapter(form.name, partial(_render, form), parse, fields=fields, made=made, **more)


# -- the formats --


@frozen(eq=False, repr=False, kw_only=True)
class _Format:
    """A format is a row: what tells one from another. It is equal to nothing but itself."""

    name: str
    start: str  # of the structure in the system message
    ending: str  # the last line of what is asked
    field: str  # a field, given its label and its text
    joint: str  # between two fields
    mark: str  # pattern of a marker: its label as `name`, or as `shut` where it closes a field
    look: str = ""  # pattern of what looks like one
    end: str = ""  # of a reply
    tags: bool = False  # whether markers close a field, and & < > in it are escaped
    shown: bool = True  # whether the structure shows the fields
    nice: bool = False  # labels are what a person would write
    note: str = ", as JSON"  # behind the type of an output that is a list or an object
    structure: Callable[[_Format, Signature], str] = _structure
    reply: Callable[[_Format, Signature, Fields], str] = _reply
    fields: Callable[..., dict[str, Part]] = _fields


_CHAT = _Format(
    name="chat",
    start="The reply has each value below its header, in this structure:",
    # With the names of all fields small models do not end after the first; with the headers of all
    # they write the list of them.
    ending="Reply with {fields} in this structure, starting with [[ ## {first} ## ]] "
    "and ending with [[ ## completed ## ]].",
    field="[[ ## {} ## ]]\n{}",
    joint="\n\n",
    # The white space is possessive: a line of a million blanks must not be scanned twice.
    mark=r"^[ \t]*+\[\[(?=[^\]\n]*#)[ \t]*+#*+[ \t]*+(?P<name>NAMES|completed)"
    r"[ \t]*+#*+[ \t]*+\]\]:?",
    look=r"\[\[[ \t]*+(?:##|#|(?:NAMES|completed)[ \t]*+#)",
    end="\n\n[[ ## completed ## ]]",
)
chat = _adapter(_CHAT)
"""The default format: each value below a `[[ ## name ## ]]` header, as LMs already know it."""


def sections(text: str) -> dict[str, str]:
    """Return the text below each header of the chat format; of two that are equal, the first.

    >>> sections("[[ ## a ## ]] 1\\n\\n[[ ## b ## ]]\\n2")
    {'a': '1', 'b': '2'}
    """
    marks = _marks(_CHAT, ())
    pieces = unique(_pieces(marks, text), key=first)
    return {name: _unescaped(marks, piece.strip()) for name, piece, _ in pieces if name}


_XML = _Format(
    name="xml",
    start="The reply has each value in a tag, with &amp; &lt; &gt; for & < >, in this structure:",
    ending="Reply with {fields} in this structure, starting with <{first}> "
    "and ending with </{last}>.",
    field="<{0}>\n{1}\n</{0}>",
    joint="\n",
    mark=r"<(?:(?P<name>NAMES)|/(?P<shut>NAMES))(?:\s[^<>]*+)?>",
    tags=True,
)
xml = _adapter(_XML)
"""Each value in a tag of its name."""

_PLAIN = _Format(
    name="plain",
    start="The reply has this form:",
    ending="Reply in this form, one field a line: {labels}.",
    field="{}: {}",
    joint="\n",
    mark=r"^[ \t]*+(?:[*#]++[ \t]++)?[*_]*+(?P<name>NAMES)[*_]*+[ \t]*+:[*_]*+",
    look=r"(?:[*#]++[ \t]++)?[*_]*+(?:NAMES)[*_]*+[ \t]*+:",
    nice=True,
)
plain = _adapter(_PLAIN)
"""A label before each value, as in "Question: ..."; for base models and small ones."""


# Not to be asked for, but read: the headers and labels that models make of those they were shown.
# Those of the first line, and of a title, need no mark at their end.
_LABELS = evolve(
    _CHAT,
    name="labels",
    mark=r"^(?P<bare>\A\s*+|#++[ \t]++)?[ \t]*+(?:[-*>]++[ \t]++)?(?:\[{1,2}[ \t]*+)?#*+[ \t]*+"
    r"[*_`]*+(?P<name>NAMES|completed)[*_`]*+[ \t]*+"
    r"(?:#*+[ \t]*+\]{1,2}:?|[=:#]++[*_`]*+|(?<=[*_`])$|(?(bare)$(?!\s*\Z)|(?!)))"
    r"|\[/(?:NAMES)\]|</?(?:NAMES)>",
)


def _json_structure(form: _Format, task: Signature) -> str:
    fields = ", ".join(f"{_dump(one.name)}: {_place(one.type)}" for one in task.outputs)
    return f"{form.start}\n\n{{{fields}}}"


def _json_reply(form: _Format, task: Signature, values: Fields) -> str:
    return _dump({f.name: jsonable(values.get(f.name, _UNKNOWN)) for f in task.outputs})


def _json_fields(
    form: _Format, task: Signature, text: str, more: bool, memo: _Memo | None = None
) -> dict[str, Part]:
    """Read the first object that has one of the fields, in a fence if there is one in a fence."""
    found, twice, bare = dict[str, Part](), False, text.lstrip().startswith("{")
    fence = None if bare else re.search(r"```\w*[ \t]*\n\s*+(?=\{)", text)
    at = fence.end() if fence else 0
    with suppress(RecursionError):
        while not found and (at := text.find("{", at) + 1):
            drafted = more and not fence and text[: at - 1].strip()  # and the answer is cut off
            items, _, whole, sure = _items(text, at - 1, at, "}", {} if memo is None else memo)
            for place, (key, begin, value, until) in enumerate(items):
                if key in task.wanted:
                    said = (value if isinstance(value, str) else text[begin:until]).strip()
                    closed = place < sure and (whole or more) and not drafted
                    part = found.setdefault(key, Part(said, closed, value))
                    twice = twice or part.data != value
                at = until
    alone = bare or (fence and text.count("```") == 2)  # all that may be meant
    if more or (alone and not twice and _is_read(task, found)):
        return found
    unsure = {name: part._replace(closed=False) for name, part in found.items()}
    return {} if twice else _json_whole(task, text) or unsure


def _json_whole(task: Signature, text: str) -> dict[str, Part]:
    """An object that has all the fields, with slips of the pen, or in a list, or in a text."""
    inside, _ = _bracketed(text, alone=False)
    if re.search(_DENIAL, text[text.rfind("}") + 1 :]):
        return {}
    made = list[dict[str, Part]]()
    opened = concat(_opened(dict, data, "") for data in _loaded(text) or inside)
    for one in [data for data in opened if isinstance(data, dict)]:
        given = {**{str(key).casefold(): value for key, value in one.items()}, **one}
        named = {n: given.get(n, given.get(n.casefold(), _NOTHING)) for n in task.wanted}
        known = valfilter(lambda value: value is not _NOTHING, named)
        with suppress(ValueError):
            parts = {n: Part(as_text(v), True, v) for n, v in _not_deep(known).items()}
            made += [parts] if _is_read(task, parts) else []
    # Of several, none is surely the answer.
    return made[0] if made and all(one == made[0] for one in made) else {}


def _json_schema(task: Signature) -> dict[str, Any]:
    bare = [_Attribute(one.name, one.type) for one in task.outputs]  # the prompt describes them
    return _with_defs(_fields_schema, bare)


_JSON = evolve(
    _CHAT,
    name="json",
    start="The reply is one JSON object, in this structure:",
    ending="Reply with one JSON object with these fields in order: {fields}.",
    note="",
    structure=_json_structure,
    reply=_json_reply,
    fields=_json_fields,
)
json = _adapter(_JSON, schema=_json_schema)
"""The outputs as one JSON object; its schema goes into the request too."""


@factory
def strict(adapter: Adapter) -> Adapter:
    """Make of an adapter one that reads only what it would have written itself, but for blanks.

    For research: how well a model keeps to a format.

    >>> strict(plain).parse(signature("q -> n: int"), Response("N: 4"))
    Record(n=4)
    """

    def parse(task: Signature, response: Response) -> Record:
        values: Record = adapter.parse(task, response)
        written = render_outputs(adapter, task, values)
        if "".join(written.split()) != "".join(response.text.split()):
            wrong = ("not the format", response.text, written, "write exactly that")
            told = "it was not exactly in the structure"
            raise ParseError(*wrong, told=told, response=response)
        return values

    return evolve(adapter, parse=parse)


@factory
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
    start = "Answer in your own words. Say clearly what the value of each output field is."
    ending = "Give a value for: {labels}."
    form = evolve(_PLAIN, name="two_step", start=start, ending=ending, shown=False, note="")

    def extract(task: Signature, response: Response) -> Flow:
        source = "text"
        while source in [one.name for one in task.outputs]:
            source += "_"
        reader = Signature((Field(source),), task.outputs, _EXTRACT, task.made)
        given = Record({source: response.text})
        messages = chat.render(reader, Prompt(_EXTRACT), given)
        request = Request(messages, signature=reader, inputs=given, adapter=chat)
        return chat.parse(reader, (yield invoke(lm, request)))

    return Adapter("two_step", partial(_render, form), extract, calls=2)


_EXTRACT = "Copy the value of each output field from the text, word by word where it is a text."


ADAPTERS = pytypes.MappingProxyType({one.name: one for one in (chat, json, xml, plain)})
"""Those that the setting `adapter` of a prompt may name."""


# == 7. Programs ===================================================================================

Flow = Generator[Any, Any, Any]
"""What a program body is: it yields effects, is sent their outcomes, and returns the outputs."""


def _number(low: float, high: float, kind: Any = (int, float)) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high


# Of each setting: what it must be, in words and as a check.
_FITTING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number, 0 or more", _number(0, math.inf)),
    "max_tokens": ("a whole number, 1 or more", _number(1, math.inf, int)),
    "top_p": ("a number from 0 to 1", _number(0, 1)),
    "rollout": ("a whole number, 0 or more", _number(0, math.inf, int)),
    "extra": ("a mapping", lambda value: isinstance(value, Mapping)),
    "stop": ("texts", lambda value: all(isinstance(one, str) for one in value)),
    "adapter": (f"one of {', '.join(ADAPTERS)}", lambda value: value in ADAPTERS),
}


SETTINGS = tuple(_FITTING)


def _settings(mapping: Fields) -> Record:
    for name, value in mapping.items():
        if name not in _FITTING:
            known, todo = ", ".join(SETTINGS), "put an option of your provider into extra={...}"
            raise ParamsError("unknown setting", name, f"one of {known}", todo)
        expected, fits = _FITTING[name]
        if value is not None and not fits(value):
            what = "unknown adapter" if name == "adapter" else f"a wrong {name}"
            raise ParamsError(what, value, expected, "correct the setting")
    if isinstance(mapping.get("stop"), str):
        return Record(mapping) | {"stop": (mapping["stop"],)}
    return _record(mapping)


# Of each setting: what it must be, in words and as a check.


@frozen
class Prompt:
    """All that can be learned of one step.

    Attributes:
        demos: demonstrations, records with the fields of the step's signature.
        texts: descriptions that replace those of fields, by name.
        settings: sampling options: temperature, max_tokens, top_p, stop, rollout, extra.
    Raises:
        ParamsError: an unknown setting.

    >>> Prompt("Answer briefly.", settings={"temperature": 0.2}).settings.temperature
    0.2
    """

    instructions: str = ""  # what to do
    demos: tuple[Record, ...] = field(default=(), converter=_records)
    texts: Record = field(default=Record(), converter=_record)
    model: str | None = None  # the weights to use, instead of the LM's own
    settings: Record = field(default=Record(), converter=_settings)


class Params(_Frozen[Prompt]):
    """An immutable mapping from the path of each step to its prompt.

    >>> params = predict("question -> answer").params
    >>> params.replace("predict", instructions="Answer in one word.")["predict"].instructions
    'Answer in one word.'
    """

    __slots__ = ("_digest",)
    _digest: str

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
        if not hasattr(self, "_digest"):
            object.__setattr__(self, "_digest", _sha256(canonical(self)))
        return self._digest

    def to_json(self) -> str:
        """Return the parameters as the text that `save` writes."""
        return dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Params:
        """Return the parameters of a text that `to_json` wrote; may raise `ParamsError`."""
        return loads(text)

    def __str__(self) -> str:
        return "\n".join(f"{path}\n{_indented(prompt)}" for path, prompt in self.items())

    def _repr_html_(self) -> str:
        shown = [(f"{n}: {_line(p.instructions)}", _prompt_lines(p)) for n, p in self.items()]
        return "".join(_folded(head, "\n".join(lines)) for head, lines in shown)


def _indented(prompt: Prompt, most: int = 5) -> str:
    """A prompt to be read: its first demonstrations, and long lines cut."""
    shown = [f"demo: {_pairs(demo)}" for demo in prompt.demos[:most]]
    more = len(prompt.demos) - most
    shown += [f"... and {more} more demonstrations"] * (more > 0)
    lines = [*_prompt_lines(evolve(prompt, demos=())), *shown]
    return "\n".join(f"  {cut(line, 118)}" for line in lines)


def _prompt_lines(prompt: Prompt | None) -> list[str]:
    if prompt is None:
        return []
    rest = _compact(jsonable(evolve(prompt, instructions="", demos=())))
    return [
        *f"instructions: {prompt.instructions}".split("\n"),
        *(f"demo: {demo.to_json()}" for demo in prompt.demos),
        *(f"{name}: {_dump(value)}" for name, value in rest.items() if value),
    ]


def _compact(prompt: dict[str, Any]) -> dict[str, Any]:
    blank = jsonable(Prompt())
    return {n: v for n, v in prompt.items() if v != blank[n] or n == "instructions"}


def _check_paths(paths: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for path in paths:
        if path not in names:
            expected = f"one of {', '.join(names) or 'none: the program has no prompts'}"
            raise ParamsError("no such path", path, expected, "correct the path")


@frozen(eq=False)
class Program(Made):
    """A description of what to do: call it with an LM, or let a driver run it.

    Made by `predict`, `program` and the like; never changed: `with_params` returns a new one.
    Pickled, it is how it was made, and the parameters it has now.

    Attributes:
        outputs: the names of its outputs, where they are known before it runs.
    """

    name: str  # of the program; of a step that runs alone, also its path
    inputs: tuple[Field, ...] = field(converter=_tuple)  # the fields it takes
    body: Callable[..., Flow]  # (steps, **inputs) -> flow
    steps: Record = field(default=Record(), converter=_record)  # the programs it may run, by name
    max_calls: int = 1  # how many LM calls one run makes at most
    outputs: tuple[str, ...] = field(default=(), converter=_tuple)
    signature: Signature | None = None  # of a step that asks an LM itself, else None
    prompt: Prompt | None = None  # of a step that has one itself, else None
    made: Any = _made()
    takes: dict[str, Field] = field(init=False, repr=False)  # the inputs by name

    @takes.default
    def _takes(self) -> dict[str, Field]:
        return {one.name: one for one in self.inputs}

    def __call__(self, lm: LM, /, **inputs: Any) -> Prediction:
        """Run the program in this thread; the same as `run(program, lm, inputs)`."""
        try:
            made: Prediction = _Here(_checked_lm(lm)).drive(_begun(self, inputs))
            return made
        except Exception as error:
            _tidy(error)
            raise

    def flow(self, /, **inputs: Any) -> Flow:
        """Return the body as a generator, to be stepped by hand: it yields effects."""
        return _begin(self, self.root, check_inputs(self, inputs))

    @property
    def root(self) -> str:
        """The path of the program when it runs alone."""
        return self.name if self.prompt is not None else ""

    @property
    def leaves(self) -> dict[str, Program]:
        """The steps that have a prompt, by path."""
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

    def __reduce__(self) -> tuple[Any, ...]:
        again = self._again()
        made = again()
        named = again.func is not _by_name or made.body is self.body
        if not named or made._shape() != self._shape():
            todo = "define it under a name of its own, and change it by with_params only"
            what = "this program cannot be sent elsewhere"
            raise DataError(what, self.name, "a program that can be made again", todo)
        return _restored, (again, self.params)

    def _shape(self) -> tuple[Any, ...]:
        return self.name, self.inputs, self.outputs, self.max_calls, tuple(self.steps)

    def __repr__(self) -> str:
        takes, steps = (", ".join(f.name for f in self.inputs)), ", ".join(self.leaves)
        return f"<program {self.name}({takes}) with prompts for {steps or 'nothing'}>"


def _restored(again: Callable[[], Program], params: Params) -> Program:
    return again().with_params(params)


def _typed(program: Program, prompt: Prompt) -> Prompt:
    """The prompt with demonstrations of the signature's types, which a file cannot hold."""
    known = program.signature.inputs + program.signature.outputs if program.signature else ()
    types = {one.name: one.type for one in known if one.type not in (str, History)}
    if not types or not prompt.demos:
        return prompt

    def typed(name: str, value: Any) -> Any:
        try:
            made = coerce(types[name], value)
        except ValueError:
            return value
        return made if canonical(made) == canonical(value) else value

    demos = [demo | {n: typed(n, demo[n]) for n in types if n in demo} for demo in prompt.demos]
    return evolve(prompt, demos=demos)


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


def check_inputs(program: Program, inputs: Fields) -> Record:
    """Return the inputs as a record in the program's order, with its defaults filled in.

    Raises:
        DataError: a field is missing, or is not one of the program's.

    >>> check_inputs(predict("question -> answer"), {"question": "2+2?"})
    Record(question='2+2?')
    """
    known = program.takes
    if inputs.keys() == known.keys():  # as most often
        return _owned({name: inputs[name] for name in known})
    for name in inputs:
        if name not in known:
            expected = f"the inputs {', '.join(known) or '(none)'}"
            raise DataError("unknown field", name, expected, "correct the name")
    return select_inputs(program, inputs)


def select_inputs(program: Program, example: Fields) -> Record:
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        todo = f"yield it first: made = yield steps.{self.name or 'step'}(...); made.{name}"
        raise AttributeError(explain("a step that has not run", name, "its prediction", todo))


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


@frozen
class Call:
    """The effect of calling a function: a tool, a search, another LM. Its name is in the trace."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Fields = field(factory=dict)
    name: str = field(default=attrs.Factory(lambda self: _name_of(self.function), takes_self=True))

    @property
    def request(self) -> Request | None:
        """What is asked, where the function is another LM."""
        return self.args[0] if self.args and isinstance(self.args[0], Request) else None


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
    """What a body is given first: `steps.name(field=value)` is the effect of running that step.

    `steps["name"]` is its program.
    """

    def __init__(self, programs: Record) -> None:
        self._programs = programs

    def __getitem__(self, name: str) -> Program:
        made: Program = self._programs[name]
        return made

    def __getattr__(self, name: str) -> Callable[..., Run]:
        step = vars(self)["_programs"].get(name)
        if step is None:
            known = f"one of {', '.join(self._programs) or '(none)'}"
            raise AttributeError(explain("no such step", name, known, "name it in program(...)"))
        return lambda **inputs: Run(step, check_inputs(step, inputs), name)


class Step(typing.NamedTuple):
    """What the body of a program that has a prompt itself, and thus no steps, is given first."""

    prompt: Prompt
    path: str


def _begin(program: Program, path: str, inputs: Record) -> Flow:
    own = Steps(program.steps) if program.prompt is None else Step(program.prompt, path)
    return program.body(own, **inputs._data)


def program(
    steps: Mapping[str, Program] = pytypes.MappingProxyType({}),
    /,
    *,
    inputs: Iterable[Field] | None = None,
    outputs: Iterable[str] = (),
    max_calls: int | None = None,
    name: str = "",
    signature: Signature | None = None,
    prompt: Prompt | None = None,
    **named: Program,
) -> Callable[[Callable[..., Flow]], Program]:
    """Make a program from a generator function: its first parameter takes the steps.

    Args:
        steps: the programs that the body may run, by the names they have there; or by keyword.
        inputs: what it takes; by default the further parameters of the function.
        outputs: the names of what it returns, where they are known.
        max_calls: how many LM calls one run makes at most; by default each step runs once. A body
            that runs a step more often must say so, for a `Plan` to hold.
        name: by default that of the function.
        signature: of a step that asks an LM itself.
        prompt: of a step that has one itself; its body is given a `Step` first, with `prompt`
            and `path`.
    Raises:
        SignatureError: the body is no generator function, or a step is no program.

    >>> @program(draft=predict("topic -> text"), check=predict("text -> verdict"))
    ... def careful(steps, topic):
    ...     draft = yield steps.draft(topic=topic)
    ...     return (yield steps.check(text=draft.text))
    >>> list(careful.params)
    ['draft', 'check']
    """
    known = {**steps, **named}
    for path, step in known.items():
        if not isinstance(step, Program):
            todo = f"write {path}=predict(...)"
            raise SignatureError(f"the step {path!r} is none", step, "a program", todo)
    most = sum(step.max_calls for step in known.values()) if max_calls is None else max_calls

    def make(body: Callable[..., Flow]) -> Program:
        called = name or _name_of(body)
        if not inspect.isgeneratorfunction(body):
            todo = "yield what it wants done: answer = yield steps.answer(question=question)"
            raise SignatureError("a body that never yields", called, "a generator", todo)
        hints: Fields = {}
        with suppress(SignatureError):  # of names that are there for a type checker only
            hints = _hints(body)
        takes = _parameters(body, hints, skip=1) if inputs is None else inputs
        made: Any = (_by_name, (body.__module__, body.__qualname__), {})
        return Program(called, takes, body, known, most, outputs, signature, prompt, made=made)

    return make


def _by_name(module: str, name: str) -> Program:
    """The program that stands under this name, that of its body, in a module."""
    with suppress(AttributeError):
        found = operator.attrgetter(name)(importlib.import_module(module))
        if isinstance(found, Program):
            return found
    todo = "define it at the top level of a module, or in a function decorated with @factory"
    raise DataError("this program cannot be sent elsewhere", name, "a name of a module", todo)


def preview(program: Program, /, **inputs: Any) -> tuple[Message, ...]:
    """Return the exact messages of a program's first LM request; no LM is needed.

    Raises:
        DataError: wrong inputs; or the program does something else first.

    >>> preview(predict("question -> answer"), question="2+2?")[-1].role
    'user'
    """
    effect: Any = next(_begun(program, inputs), None)
    while isinstance(effect, tuple) and effect:
        effect = next(effect[0], None)
    if isinstance(effect, Request):
        return effect.messages
    todo = "preview one of its steps: preview(program.steps['name'], ...)"
    raise DataError("no LM request to show", effect, "a request first", todo)


# == 8. Drivers ====================================================================================
# `_interpret` turns a program into a flow of leaf effects and collects the trace. A driver performs
# leaf effects in its own way: in this thread or on several, in an event loop, in lock-step; a flow
# around the flow makes it stream, replay, or pass through middleware. Each of the three drivers,
# `_Here`, `_There` and `_Along`, has one method for each effect: see `_HOW`.

Outcome = tuple[Any, BaseException | None]
"""How an effect ended: with a value, or with an error."""

_GENERATOR = pytypes.GeneratorType


def _resume(flow: Flow, value: Any = None, error: BaseException | None = None) -> tuple[bool, Any]:
    """Resume a flow with an outcome: (True, its next effect), or (False, what it returns)."""
    try:
        return True, flow.send(value) if error is None else flow.throw(error)
    except StopIteration as end:
        return False, end.value


def _finished(flow: Flow, perform: Callable[[Any], Any]) -> Any:
    """Perform the effects of a flow one after the other; return what the flow returns."""
    try:
        going, effect = _resume(flow)
        while going:
            try:
                value, error = perform(effect), None
            except Exception as failure:
                value, error = None, failure
            going, effect = _resume(flow, value, error)
        return effect
    finally:
        flow.close()


def through(flow: Flow, change: Callable[[Any], Flow]) -> Flow:
    """Run a flow whose effects are each performed by another flow, `change(effect)`.

    >>> def lower(effect):
    ...     return (yield effect).lower()
    >>> flow = through(_once("HELLO"), lower)
    >>> next(flow)
    'HELLO'
    """
    # The loop of `_finished` once more: a generator around it would cost each effect its time.
    try:
        going, effect = _resume(flow)
        while going:
            try:
                value, error = (yield from change(effect)), None
            except Exception as failure:
                value, error = None, failure
            going, effect = _resume(flow, value, error)
        return effect
    finally:
        flow.close()


def _caught(change: Callable[[Any], Flow], effect: Any) -> Flow:
    """Have an effect performed by a flow; return the outcome."""
    try:
        return (yield from change(effect)), None
    except Exception as error:
        return None, error


def running(program: Program, inputs: Record, watch: Watch | None = None) -> Flow:
    """Return the flow of leaf effects of one run, its inputs not checked.

    >>> next(running(predict("q -> a"), Record(q="?"))).step
    'predict'
    """
    events: list[Event] = []
    try:
        return (yield from _interpret(program, inputs, program.root, _beginning(watch), events))
    except Exception as error:
        _note(error, trace=Trace(events))
        raise


Watch = Callable[[Event], Any]
"""Called with each event of a run as it ends, in the thread that it ends in."""

# The path of a step, the id of its event, further ids, and who is told of events.
_Place = tuple[str, int, Iterator[int], Watch | None]


def _beginning(watch: Watch | None = None) -> _Place:
    """Where a run begins."""
    return "", 0, itertools.count(1), watch


def _interpret(
    program: Program, inputs: Record, path: str, parent: _Place, events: list[Event]
) -> Flow:
    """Run a program: yield leaf effects, append what happened to `events`, return a prediction."""
    start, place = len(events), (path, next(parent[2]), *parent[2:])
    what = path, "step", inputs, None, place[1], program.name

    def body() -> Flow:
        flow = _begin(program, path, inputs)
        outputs = yield from through(flow, partial(_reduce, place, events))
        if type(outputs) is Record or isinstance(outputs, Mapping):
            return _record(outputs)
        todo = "return a prediction or a dict"
        raise SignatureError(f"{program.name} returned no fields", outputs, "a mapping", todo)

    outputs = yield from _logged(body(), what, parent, events)
    made = _owned(outputs._data, Prediction)
    object.__setattr__(made, "trace", Trace(events[start:]))
    return made


def _reduce(place: _Place, events: list[Event], effect: Any) -> Flow:
    """Reduce one effect to leaf effects."""
    path, _, ids, _ = place
    if isinstance(effect, (Request, Call)) and (asked := _asked(effect)):
        return _logged(effect, (path, "lm", None, asked, next(ids), ""), place, events)
    if isinstance(effect, Call):
        given, name = Record(args=effect.args, kwargs=effect.kwargs), _join(path, effect.name)
        return _logged(effect, (name, "call", given, None, next(ids), ""), place, events)
    if isinstance(effect, Run):
        name = _join(path, effect.name or effect.program.name)
        return _interpret(effect.program, effect.inputs, name, place, events)
    if isinstance(effect, (tuple, list)):
        return _together(place, events, effect)
    if type(effect) is _GENERATOR:  # a part of the body, which catches its own errors
        return through(effect, partial(_reduce, place, events))
    if isinstance(effect, Sleep):
        return _once(effect)
    todo = "yield steps.name(...), a Request, invoke(...), Sleep(...) or a tuple of these"
    raise SignatureError("no effect was yielded", effect, "an effect", todo)


def _asked(effect: Any) -> Request | None:
    """The request that an effect sends, to the LM of the run or to another one."""
    return effect if isinstance(effect, Request) else getattr(effect, "request", None)


def _once(effect: Any) -> Flow:
    return (yield effect)


# Of an event: its path, kind, inputs, request, id, and the name of the program.
_What = tuple[str, Any, Any, Request | None, int, str]


def _logged(effect: Any, what: _What, parent: _Place, events: list[Event]) -> Flow:
    """Have an effect, or a flow, performed, and append the event of it, however it ends."""
    since, began, error = time.time(), time.perf_counter(), None
    (path, kind, given, request, number, name), (outer, outer_number, _, watch) = what, parent
    try:
        outcome = (yield from effect) if type(effect) is _GENERATOR else (yield effect)
    except Exception as failure:
        outcome, error = None, failure
        if request is not None and not isinstance(error, LmoptError):
            _note(error, of_lm=True)  # see `stops`
    made, answer = (outcome, None) if request is None else (None, outcome)
    facts = given, made, request, answer, "" if error is None else describe(error), outer
    times = time.perf_counter() - began, since
    events.append(Event(path, kind, *facts, *times, number, outer_number, name))
    if watch is not None:
        try:
            watch(events[-1])
        except Exception as failure:
            raise _WatchFailed(failure) from None
    if error is not None:
        raise error
    return outcome


class _WatchFailed(BaseException):
    """Who watches a run has failed, and nothing in the run: no program catches this."""


def _note(error: Exception, **facts: Any) -> None:
    """Tell more of an error, where its class allows that."""
    with suppress(TypeError):
        vars(error).update(facts)


def _together(place: _Place, events: list[Event], effects: Sequence[Any]) -> Flow:
    """Have several effects performed at once; results and events in the order of the effects."""
    traces: list[list[Event]] = [[] for _ in effects]
    pairs = zip(traces, effects, strict=True)
    outcomes = yield tuple(_caught(partial(_reduce, place, trace), one) for trace, one in pairs)
    events.extend(concat(traces))
    return tuple(_succeeded(outcomes))


# -- what remains of effects: the leaves --


@frozen(eq=False, repr=False)
class _Wait:
    """The effect of waiting until a future is done, whatever comes of it."""

    future: Future[Any]


@frozen(eq=False, repr=False)
class _Within:
    """The effect of a flow that may take some seconds only; then it is an `LMTimeout`."""

    flow: Flow
    seconds: float
    step: str | None = None

    def late(self) -> LMTimeout:
        what, expected = "the LM did not answer in time", f"an answer in {self.seconds} s"
        return LMTimeout(what, self.step or "a request", expected, "ask again", retryable=True)


@frozen(eq=False, repr=False)
class _Many:
    """The effect of driving a flow for each item; results in their order.

    Attributes:
        watch: results -> the same results, as a progress bar takes them.
    """

    flow: Callable[[Any], Flow]  # item -> flow
    items: Iterable[Any]  # as many as there are, lazily
    lm: Any  # what answers the requests in them
    tell: Callable[[Any], Any]  # called with each result in its turn; what it raises ends all of it
    watch: Callable[[Iterable[Any]], Iterable[Any]] | None = None

    def told(self, results: Iterable[Any]) -> None:
        """Tell of results as they come."""
        for result in self.watch(results) if self.watch else results:
            self.tell(result)


def gathered(flow: Callable[[Any], Flow], items: Iterable[Any], lm: Any) -> Flow:
    """Drive a flow for each item, as a part of another flow; returns the results in a list.

    >>> ask = lambda text: (yield Request([Message("user", text)]))
    >>> [one.text for one in drive(gathered(ask, "ab", stub_lm()), None)]
    ['text', 'text']
    """
    results: list[Any] = []
    try:
        yield _Many(flow, items, lm, results.append)
    except Exception as error:
        _note(error, results=tuple(results))
        raise
    return results


def _deep(flow: Flow, change: Callable[[Any], Flow]) -> Flow:
    """Have the leaf effects of a flow, and of the flows inside of them, performed by `change`."""

    def into(effect: Any) -> Flow:
        if isinstance(effect, tuple):
            return (yield tuple(_deep(one, change) for one in effect))
        if isinstance(effect, _Within):
            return (yield evolve(effect, flow=_deep(effect.flow, change)))
        return (yield from change(effect))

    return through(flow, into)


def _instead(lm: Any, effect: Any) -> Flow:
    """Have another LM asked."""
    return (yield invoke(lm, effect) if isinstance(effect, Request) else effect)


def _layered(flow: Flow, lm: Any) -> Flow:
    """A flow whose requests go through the middleware of an LM; its own go to the innermost one."""
    while hasattr(lm, "inner"):
        flow, lm = _deep(flow, partial(_pass, lm)), lm.inner
    return flow


def _pass(layer: Any, effect: Any) -> Flow:
    if isinstance(effect, Request):
        return (yield from layer.flow(effect))
    ours = getattr(getattr(effect, "function", None), "__module__", "") == __name__
    if isinstance(effect, Call) and layer.middleware.around and not (effect.request or ours):
        return (yield from layer.middleware.around(effect))
    return (yield effect)


def _innermost(lm: Any) -> Any:
    return _innermost(lm.inner) if hasattr(lm, "inner") else lm


def _response(value: Any) -> Response:
    if isinstance(value, Response):
        return value
    todo = f"return Response({cut(repr(value), 40)})"
    raise DataError("the LM returned no response", value, "a Response", todo)


_HOW = {
    Request: "ask", Call: "call", Sleep: "sleep", _Wait: "wait", _Within: "within", _Many: "many",
    tuple: "together",
}  # fmt: skip


def _how(effect: Any) -> str:
    """By which method of a driver an effect is performed."""
    try:
        return _HOW[type(effect)]
    except KeyError:
        todo = "give drivers a flow of leaf effects: of `running`, `evaluating`, `gathered`"
        raise SignatureError("no leaf effect", effect, "a Request, a Call", todo) from None


# -- in this thread, or on several --


class _Here:
    """Performs effects in this thread, several at once on up to `workers` threads or an executor.

    What must be awaited is: each thread has an event loop for it, which it closes at its end.
    """

    __slots__ = ("executor", "full", "lm", "loops", "sent", "workers")

    def __init__(self, lm: Any, workers: int | None = 1, executor: Executor | None = None) -> None:
        self.full, self.lm, self.workers, self.executor = lm, _innermost(lm), workers, executor
        self.loops: dict[int, Any] = {}  # by thread
        self.sent: dict[int, _Sent] = {}

    def drive(self, flow: Flow) -> Any:
        """Run a flow to its end, and close what it was awaited on."""
        try:
            layered = flow if self.lm is self.full else _layered(flow, self.full)
            return _finished(layered, self.perform)
        except _WatchFailed as failed:
            raise failed.args[0] from None
        finally:
            if self.loops:
                self.close()

    def finish(self, flow: Flow) -> Any:
        """Run a flow to its end."""
        return _finished(flow, self.perform)

    def perform(self, effect: Any) -> Any:
        """Perform one leaf effect."""
        return getattr(self, _HOW.get(type(effect)) or _how(effect))(effect)

    def ask(self, request: Request) -> Response:
        value = _asks(self.lm)(request)
        return value if type(value) is Response else _response(self.ready(value, "the LM"))

    def call(self, effect: Call) -> Any:
        return self.ready(effect.function(*effect.args, **effect.kwargs), effect.name)

    def sleep(self, effect: Sleep) -> None:
        time.sleep(effect.seconds)

    def wait(self, effect: _Wait) -> None:
        effect.future.exception()  # waits; what it is does not matter

    def together(self, flows: tuple[Flow, ...]) -> Any:
        """Finish flows in lock-step, on threads, or one after the other."""
        if hasattr(self.lm, "batch"):
            return _finished(_Along(self).together(flows), _round)
        workers = self.workers or 1
        with _threads(workers, self.close) as submit:
            return tuple(_in_order(submit, self.finish, flows, workers))

    def within(self, effect: _Within) -> Any:
        """Ask in another thread; after the time is up it is left alone, for nothing can stop it."""
        from concurrent.futures import wait

        asked = _alone(_Here(self.lm).drive, effect.flow)
        if not wait([asked], effect.seconds).done:
            raise effect.late()
        return asked.result()

    def many(self, effect: _Many) -> Any:
        """Drive the flows on an executor, in lock-step, on threads or in this one."""
        if self.executor is None and hasattr(effect.lm, "batch"):
            return _finished(_Along(self).many(effect), _round)
        inside, workers = _Here(effect.lm), workers_for(effect.lm, self.workers)
        pool: Any = _threads(workers, inside.close)
        work: Any = lambda item: inside.finish(_layered(effect.flow(item), effect.lm))  # noqa: E731
        if self.executor is not None:
            pool = nullcontext(self.executor.submit)
            work = partial(_driven, effect.flow, _sent(self, effect.lm))
        with (
            closing(inside),
            pool as submit,
            closing(_in_order(submit, work, effect.items, workers)) as results,
        ):
            return effect.told(results)

    def ready(self, value: Any, name: str) -> Any:
        """Return a result; wait for one that must be awaited."""
        if not inspect.isawaitable(value):
            return value
        import asyncio

        if asyncio._get_running_loop() is not None:
            getattr(value, "close", bool)()  # it will never be awaited
            what = "an asynchronous function in a synchronous run in an event loop"
            raise DataError(what, name, "a plain one", "run the program with `await arun(...)`")
        thread = threading.get_ident()
        if thread not in self.loops:
            self.loops[thread] = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        return self.loops[thread].run(_awaited(value))

    def close(self) -> None:
        """Close the event loop of this thread, if it has one."""
        if loop := self.loops.pop(threading.get_ident(), None):
            loop.close()


async def _awaited(value: Awaitable[T]) -> T:
    return await value


def _driven(flow: Callable[[T], Flow], sent: _Sent, item: T) -> Any:
    """Drive one flow wherever an executor runs it."""
    return _Here(_first_copy(sent).lm).drive(flow(item))


@frozen
class _Sent:
    """An LM as it goes to an executor: another process keeps the first copy that it gets.

    So its connections, and limits such as those of `throttle`, hold for all rows there.
    """

    lm: Any = field(eq=False)
    token: str = field(factory=lambda: os.urandom(16).hex())


@lru_cache(maxsize=32)
def _first_copy(sent: _Sent) -> _Sent:
    return sent


def _sent(driver: Any, lm: Any) -> _Sent:
    """What is sent of an LM; the same for all that one driver does."""
    made: _Sent = driver.sent.setdefault(id(lm), _Sent(lm))
    return made


# -- in an event loop --


class _There:
    """Performs effects in the running event loop, requests up to a limit at once."""

    def __init__(
        self, lm: Any, workers: int | None = None, executor: Executor | None = None
    ) -> None:
        import asyncio

        self.full, self.lm, self.workers, self.executor = lm, _innermost(lm), workers, executor
        self.limit = asyncio.Semaphore(workers_for(lm, workers))
        self.known: dict[int, _There] = {}  # one for each LM, so that limits hold
        self.sent: dict[int, _Sent] = {}

    def asking(self, lm: Any) -> _There:
        """What performs effects with another LM."""
        other = self.known.setdefault(id(lm), _There(lm, self.workers))
        other.known = self.known
        return other

    async def drive(self, flow: Flow) -> Any:
        """Run a flow to its end."""
        try:
            return await self.finish(_layered(flow, self.full))
        except _WatchFailed as failed:
            raise failed.args[0] from None

    async def finish(self, flow: Flow) -> Any:
        """Do what `_finished` does, where performing is awaited."""
        try:
            going, effect = _resume(flow)
            while going:
                going, effect = _resume(flow, *await self.attempt(effect))
            return effect
        finally:
            flow.close()

    async def attempt(self, effect: Any) -> Outcome:
        """Perform one leaf effect; return the outcome."""
        try:
            return await getattr(self, _how(effect))(effect), None
        except Exception as error:
            return None, error

    async def ask(self, request: Request) -> Response:
        async with self.limit:
            return _response(await _acall(_asks(self.lm), request))

    async def call(self, effect: Call) -> Any:
        async with self.asking(effect.function).limit if effect.request else nullcontext():
            return await _acall(effect.function, *effect.args, **effect.kwargs)

    async def sleep(self, effect: Sleep) -> None:
        import asyncio

        await asyncio.sleep(effect.seconds)

    async def wait(self, effect: _Wait) -> None:
        import asyncio

        await asyncio.wait([asyncio.wrap_future(effect.future)])

    async def together(self, flows: tuple[Flow, ...]) -> tuple[Any, ...]:
        import asyncio

        outcomes = await asyncio.gather(*map(self.finish, flows), return_exceptions=True)
        for one in outcomes:
            if isinstance(one, BaseException):
                raise one
        return tuple(outcomes)

    async def within(self, effect: _Within) -> Any:
        """Ask as long as there is time, and then no longer."""
        import asyncio

        limit = asyncio.timeout(effect.seconds)
        try:
            async with limit:
                return await self.finish(effect.flow)
        except TimeoutError:
            if not limit.expired():
                raise
        raise effect.late()

    async def many(self, effect: _Many) -> None:
        """Drive the flows as tasks, or on an executor, some ahead of the one that is waited for."""
        import asyncio

        inside, workers = self.asking(effect.lm), workers_for(effect.lm, self.workers)
        arrived, waiting, rows = deque[Any](), deque[Any](), asyncio.Semaphore(workers)

        def came() -> Iterator[Any]:
            while arrived:
                yield arrived.popleft()

        async def driven(item: Any) -> Any:
            async with rows:
                return await inside.drive(effect.flow(item))

        async def take(most: int) -> None:
            while len(waiting) > most:
                arrived.append(await waiting.popleft())
                effect.tell(next(shown))

        shown = iter((effect.watch or iter)(came()))
        try:
            for item in effect.items:
                if self.executor is None:
                    waiting.append(asyncio.ensure_future(driven(item)))
                else:
                    work = partial(_driven, effect.flow, _sent(self, effect.lm))
                    waiting.append(asyncio.wrap_future(self.executor.submit(work, item)))
                await take(_AHEAD * max(workers, 16))
            await take(0)
            next(shown, None)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


async def _acall(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Await what can be awaited; call anything else in a thread, so that the loop goes on.

    A thread of our own: `asyncio.run` would wait for one of `to_thread`, even after a timeout.
    """
    import asyncio

    made = getattr(function, "acall", function)
    if inspect.iscoroutinefunction(made):
        return await made(*args, **kwargs)
    called = _alone(contextvars.copy_context().run, made, *args, **kwargs)
    value = await asyncio.wrap_future(called)
    return await value if inspect.isawaitable(value) else value


# -- in lock-step: merged flows are a flow, whose effects are lists of what they wait for --


def _merged(flows: Iterable[Flow], here: _Here) -> Flow:
    """Yield what flows wait for, until all have ended; return the outcome of each, in order."""
    run = partial(through, change=_Along(here).perform)
    parts, ended = dict(enumerate(_caught(run, flow) for flow in flows)), dict[int, Outcome]()
    try:
        while parts:
            stepped = {place: _resume(part) for place, part in parts.items()}
            ended |= {place: made for place, (going, made) in stepped.items() if not going}
            waits = {place: made for place, (going, made) in stepped.items() if going}
            parts = {place: parts[place] for place in waits}
            if waits:
                yield list(concat(waits.values()))
        return [ended[place] for place in sorted(ended)]
    finally:
        for part in parts.values():
            part.close()
        here.close()


class _Along:
    """Performs effects of merged flows: yields what each waits for, as long as it does."""

    def __init__(self, here: _Here) -> None:
        self.here = here

    def perform(self, effect: Any) -> Flow:
        """Return the flow that performs one leaf effect."""
        made: Flow = getattr(self, _how(effect))(effect)
        return made

    def ask(self, request: Request) -> Flow:
        from concurrent.futures import Future

        if not hasattr(self.here.lm, "batch"):
            return self.here.ask(request)
        answer = Future[Any]()
        while not answer.done():
            yield [(self.here.lm, request, answer)]
        return _response(answer.result())

    def call(self, effect: Call) -> Flow:
        yield from ()
        return self.here.call(effect)

    def sleep(self, effect: Sleep) -> Flow:
        due = time.monotonic() + effect.seconds
        while time.monotonic() < due:
            yield [due]

    def wait(self, effect: _Wait) -> Flow:
        while not effect.future.done():
            yield [effect.future]

    def within(self, effect: _Within) -> Flow:
        return through(effect.flow, self.perform)  # a batch takes the time it takes

    def many(self, effect: _Many) -> Flow:
        flows = (_layered(effect.flow(item), effect.lm) for item in effect.items)
        return effect.told(_succeeded((yield from _merged(flows, _Here(effect.lm)))))

    def together(self, flows: tuple[Flow, ...]) -> Flow:
        return tuple(_succeeded((yield from _merged(flows, self.here))))


def _round(waits: list[Any]) -> None:
    """Send what is asked, as one batch for each LM; where nothing is, wait for the first."""
    asked = [one for one in waits if isinstance(one, tuple)]
    for together in groupby(lambda one: id(one[0]), asked).values():
        (lm, *_), requests, answers = zip(*together, strict=True)
        for answer, made in zip(answers, _batch(lm, requests), strict=True):
            if isinstance(made, Exception):
                answer.set_exception(made)
            else:
                answer.set_result(made)
    if not asked:
        _rest(waits)


def _succeeded(outcomes: Iterable[Outcome]) -> Iterator[Any]:
    for value, error in outcomes:
        if error is not None:
            raise error
        yield value


def _batch(lm: Any, requests: Sequence[Request]) -> list[Any]:
    answers = list(lm.batch(list(requests)))
    if len(answers) == len(requests):
        return answers
    expected, todo = f"{len(requests)} answers", "return a response or an error for each request"
    raise DataError("a batch of another size", len(answers), expected, todo)


def _rest(waits: list[Any]) -> None:
    """Sleep until the first that sleeps, or until another thread has what one waits for.

    Who would wake up within a hundredth of a second after it wakes up with it, to be in its batch.
    """
    from concurrent.futures import FIRST_COMPLETED, wait

    times = [one for one in waits if isinstance(one, float)]
    futures = [one for one in waits if not isinstance(one, float)]
    due = max((one for one in times if one <= min(times) + 0.01), default=math.inf)
    left = max(due - time.monotonic(), 0.0)
    if futures:
        wait(futures, None if left == math.inf else left, return_when=FIRST_COMPLETED)
    else:
        time.sleep(left)


def _asks(lm: Any) -> Callable[[Request], Any]:
    """What asks an LM."""
    if callable(lm):
        return lm  # type: ignore[no-any-return]
    if hasattr(lm, "acall"):
        return lm.acall  # type: ignore[no-any-return]
    if not hasattr(lm, "batch"):
        todo = 'make one: connect("openai/gpt-4o"); pass inputs by name: qa(lm, question=q)'
        raise DataError("this is no LM", lm, "a function from a Request to a Response", todo)

    def ask(request: Request) -> Any:
        (answer,) = _batch(lm, [request])
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


# -- one run, or any flow --


def _checked_lm(lm: Any) -> Any:
    """The LM, unless it is clearly none; None where nothing asks one."""
    if lm is None or (callable(lm) and getattr(lm, "__module__", "") != __name__):
        return lm
    if isinstance(lm, Middleware):
        raise DataError("this goes around an LM", lm, "an LM", "apply it: retry()(lm)")
    if inspect.isfunction(lm) and lm.__module__ == __name__ and lm.__name__ in __all__:
        todo = f"call it: {lm.__name__}(...)"
        raise DataError("this makes an LM, and is none", lm.__name__, "an LM", todo)
    _asks(lm)
    return lm


_BETWEEN = (__name__, f"{__name__}_optimizers", "concurrent.futures._base", "toolz.itertoolz")


class _Tidied:
    """Drops our own frames from the traceback of an error that leaves it: see `_tidy`."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            _tidy(error)


def _tidy(error: Exception) -> None:
    """Drop the frames that stand between the user's call and the user's code.

    Where Python runs in development mode (`-X dev`) all of them are kept.
    """
    seen: BaseException | None = None if sys.flags.dev_mode else error
    known: list[BaseException] = []
    while seen is not None and seen not in known:  # errors may be each other's cause
        known.append(seen)
        frames, place = [], seen.__traceback__
        while place is not None:
            frames.append(place)
            place = place.tb_next
        kept = [one for one in frames if one.tb_frame.f_globals.get("__name__") not in _BETWEEN]
        for one, after in zip(kept, [*kept[1:], None], strict=False):
            one.tb_next = after
        seen.__traceback__ = kept[0] if kept else None
        seen = seen.__cause__ or seen.__context__


def drive(flow: Flow, lm: Any, *, workers: int | None = 1, executor: Executor | None = None) -> Any:
    """Perform the leaf effects of a flow in this thread, until it returns.

    Such a flow is that of `running`, `evaluating` or `gathered`, or made of these.

    >>> drive(_once(invoke(max, 1, 2)), stub_lm())
    2
    """
    with _Tidied():
        return _Here(_checked_lm(lm), workers, executor).drive(flow)


async def adrive(
    flow: Flow, lm: Any, *, workers: int | None = None, executor: Executor | None = None
) -> Any:
    """Do what `drive` does, in the running event loop."""
    with _Tidied():
        return await _There(_checked_lm(lm), workers, executor).drive(flow)


def emit(flow: Flow, kind: type[T], lm: Any, **options: Any) -> Iterator[T]:
    """Do what `drive` does, lazily; yield the effects of a class, which are their own outcome.

    >>> list(emit(through(_once(1), _once), int, stub_lm()))
    [1]
    """
    here = _Here(_checked_lm(lm), **options)

    def performed(effect: Any) -> Flow:
        if isinstance(effect, kind):
            yield effect
            return effect
        return here.perform(effect)

    with _Tidied(), closing(here):
        yield from through(_layered(flow, lm), performed)


async def aemit(flow: Flow, kind: type[T], lm: Any, **options: Any) -> AsyncIterator[T]:
    """Do what `emit` does, in the running event loop."""
    there, flow = _There(_checked_lm(lm), **options), _layered(flow, lm)
    with _Tidied(), closing(flow):
        going, effect = _resume(flow)
        while going:
            outcome: Outcome = effect, None
            if isinstance(effect, kind):
                yield effect
            else:
                outcome = await there.attempt(effect)
            going, effect = _resume(flow, *outcome)


_Params = Mapping[str, Prompt] | None


def _begun(
    program: Program, inputs: Fields, params: _Params = None, watch: Watch | None = None
) -> Flow:
    """The flow of leaf effects of one run; what is wrong with its inputs is raised now."""
    ready = program if params is None else program.with_params(params)
    return running(ready, check_inputs(ready, inputs), watch)


def run(
    program: Program,
    lm: LM,
    inputs: Fields,
    *,
    params: _Params = None,
    workers: int = 1,
    watch: Watch | None = None,
) -> Prediction:
    """Run a program once, in this thread; `workers` threads are for effects it yields together.

    Raises whatever the program, its tools or the LM raise.

    Calls: what the program makes, `program.max_calls` at most.

    >>> tell = lambda event: print(event.kind, event.path)
    >>> run(predict("question -> answer"), stub_lm(), {"question": "2+2?"}, watch=tell).answer
    lm predict
    step predict
    'text'
    """
    made: Prediction = drive(_begun(program, inputs, params, watch), lm, workers=workers)
    return made


async def arun(
    program: Program, lm: Any, inputs: Fields, *, params: _Params = None, watch: Watch | None = None
) -> Prediction:
    """Do what `run` does, in the running event loop.

    An LM or a tool is awaited where it is an `async def` or has an `acall`; any other one is called
    in a thread, so that the loop goes on. Effects that the program yields together are performed
    together, LM requests up to the LM's `concurrency` at once. A run that is cancelled leaves no
    task and no connection behind.

    >>> import asyncio
    >>> asyncio.run(arun(predict("question -> answer"), stub_lm(), {"question": "2+2?"})).answer
    'text'
    """
    made: Prediction = await adrive(_begun(program, inputs, params, watch), lm)
    return made


# -- text as it arrives --


@frozen
class Chunk:
    """A piece of an output field, as it arrives.

    Attributes:
        call: counts the answers of that step from 0: a higher one starts over, after a reply that
            could not be used or when the step runs again.
    """

    path: str  # of the step that asked
    field: str  # that the text belongs to; "" where the reply has no fields
    text: str  # more of it, without the markers of the format
    call: int = 0
    value: Any = None  # of a list or an object, what there is of it so far, as JSON data


def stream(
    program: Program, lm: LM, inputs: Fields, *, params: _Params = None, watch: Watch | None = None
) -> Generator[Chunk | Prediction, None, None]:
    """Run a program in a thread of its own, and yield the text of its fields as it arrives.

    What an LM does not stream, an answer from a cache for one, comes in one piece. Joined, the
    pieces of a text are the field; those of a list or an object are what the model wrote. Who stops
    early closes the generator, and with it the connection.

    Yields a `Chunk` for each piece of text; at the end the `Prediction`. Otherwise as `run`.

    >>> for item in stream(predict("question -> answer"), stub_lm(), {"question": "2+2?"}):
    ...     print(item)
    Chunk(path='predict', field='answer', text='text', call=0, value=None)
    Prediction(answer='text')
    """
    return _streamed(_begun(program, inputs, params, watch), lm)


class _Abandoned(BaseException):
    """Nobody listens any more; no program catches this."""


def _streamed(flow: Flow, lm: LM) -> Generator[Chunk | Prediction, None, None]:
    arrived: SimpleQueue[Any] = SimpleQueue()
    left = False

    def tell(chunk: Chunk) -> None:
        if left:
            raise _Abandoned
        arrived.put(chunk)

    done = _alone(_Here(lm).drive, _telling(flow, tell))
    done.add_done_callback(arrived.put)
    try:
        with _Tidied():
            yield from iter(arrived.get, done)
            yield done.result()
    finally:
        left = True


def astream(
    program: Program, lm: Any, inputs: Fields, *, params: _Params = None, watch: Watch | None = None
) -> AsyncGenerator[Chunk | Prediction, None]:
    """Do what `stream` does, in the running event loop.

    >>> import asyncio
    >>> async def main():
    ...     return [one async for one in astream(predict("q -> a"), stub_lm(), {"q": "?"})]
    >>> asyncio.run(main())[-1]
    Prediction(a='text')
    """
    return _astreamed(_begun(program, inputs, params, watch), lm)


async def _astreamed(flow: Flow, lm: Any) -> AsyncGenerator[Chunk | Prediction, None]:
    import asyncio

    arrived: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(chunk: Chunk) -> None:  # from any thread
        if done.done():
            raise _Abandoned
        loop.call_soon_threadsafe(arrived.put_nowait, chunk)

    done = asyncio.ensure_future(_There(lm).drive(_telling(flow, tell)))
    done.add_done_callback(arrived.put_nowait)
    try:
        with _Tidied():
            while (item := await arrived.get()) is not done:
                yield item
            yield done.result()
    finally:
        done.cancel()
        await asyncio.gather(done, return_exceptions=True)


def _telling(flow: Flow, tell: Callable[[Chunk], None]) -> Flow:
    """A flow that tells of the text of its answers as it arrives."""
    calls: Counter[str] = Counter()

    def told(effect: Any) -> Flow:
        if (request := _asked(effect)) is None:
            return (yield effect)
        reader = _Reader(request, tell, calls)
        asks = evolve(request, on_text=reader)
        response = (
            yield asks if effect is request else evolve(effect, args=(asks, *effect.args[1:]))
        )
        reader.end(response)
        return response

    return _deep(flow, told)


class _Reader:
    """Called with the pieces of one reply; tells what is new in its fields."""

    def __init__(
        self, request: Request, tell: Callable[[Chunk], None], calls: Counter[str]
    ) -> None:
        self._tell, self._calls, self._path = tell, calls, request.step or ""
        task, known = request.signature, request.adapter and request.adapter.fields
        unread = lambda text, more, memo: {"": Part(text, not more)}  # noqa: E731
        self._fields = partial(known, task) if known and task else unread
        outputs = task.outputs if task else ()
        self._structured = [one.name for one in outputs if _kind(one.type) in STRUCTURED]
        self._begin()

    def _begin(self) -> None:
        """Start over with an empty reply."""
        self._pieces, self._size, self._due = list[str](), 0, 1
        self._memos: dict[str, _Memo] = {"": {}}  # of the reply, and of each field
        self._restart()

    def _restart(self) -> None:
        self._told: dict[str, str] = {}
        self._call = self._calls[self._path]
        self._calls[self._path] += 1

    def __call__(self, piece: str) -> None:
        if not piece and self._size:
            return self._begin()
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size >= self._due:
            self._read(True)

    def _read(self, more: bool) -> None:
        """Read all that is there, after each hundredth more, so that it takes n log n in all."""
        self._pieces = ["".join(self._pieces)]
        self._due = self._size + self._size // 100 + 1
        parts = self._fields(self._pieces[0], more, self._memos[""])
        if not all(part.text.startswith(self._told.get(n, "")) for n, part in parts.items()):
            self._restart()  # what was told has turned out to be none
        for name, part in parts.items():
            new = part.text[len(self._told.get(name, "")) :]
            self._told[name] = part.text
            if new:
                value = self._value(name, part) if name in self._structured else None
                self._tell(Chunk(self._path, name, new, self._call, value))

    def _value(self, name: str, part: Part) -> Any:
        """What there is so far of a list or an object, where the text begins as one."""
        if part.data is not _NOTHING:
            return part.data
        value = scan(part.text, 0, self._memos.setdefault(name, {}))[0]
        return value if isinstance(value, (list, dict)) else None

    def end(self, response: Any) -> None:
        """Read what of the answer was not streamed."""
        if isinstance(response, Response):
            so_far = "".join(self._pieces)
            if not so_far.endswith(response.text) or not so_far:  # else a thought was taken out
                if not response.text.startswith(so_far):
                    self._begin()
                self._pieces = [response.text]
            self._read(False)


# -- again, from a trace --


def replay(
    program: Program, trace: Iterable[Event], lm: LM | None = None, *, upto: int | None = None
) -> Prediction:
    """Run a program again from the trace of a run: no LM is asked, no tool is called, no time lost.

    Args:
        program: the program, or one that was changed since.
        trace: of the whole run; `prediction.trace`, or the same from JSON.
        lm: what answers the requests that the trace does not.
        upto: replay the first so many events of the trace, and go on live from there; by default
            all of them.
    Raises:
        ReplayMiss: the program does something else than the trace says; tells what.
        Exception: what the run raised, by the name of its class.
    Calls: none, but for what comes after `upto`.

    >>> qa = predict("question -> answer")
    >>> trace = qa(stub_lm(), question="2+2?").trace
    >>> replay(qa, trace)
    Prediction(answer='text')
    """
    events = tuple(trace)
    if not events or events[-1].kind != "step":
        todo = "pass the whole trace of a run: prediction.trace"
        raise DataError("this is no trace of a run", events[-1:], "a step at its end", todo)
    left = deque(one for one in events[:upto] if one.kind != "step")
    flow = _deep(_begun(program, events[-1].inputs), partial(_replayed, left))
    made: Prediction = drive(flow, _no_lm if lm is None else lm)
    if left:
        what, todo = "the program ended before its trace", "replay the program that made the trace"
        raise ReplayMiss(what, f"{left[0].kind} at {left[0].path}", "no further event", todo)
    return made


def _no_lm(request: Request) -> Response:
    todo = "pass the LM to go on with: replay(program, trace, lm)"
    raise ReplayMiss("the trace has no answer to", request.messages[-1:], "none to be asked", todo)


def _replayed(left: deque[Event], effect: Any) -> Flow:
    """Perform an effect as the next event says, as long as there is one."""
    if not left:
        return (yield effect)
    if _how(effect) == "sleep":
        return None
    event, written = left.popleft(), partial(canonical, other=lambda value: type(value).__name__)
    done = written(event.request or [event.inputs["args"], event.inputs["kwargs"]])
    wanted = written(_asked(effect) or [effect.args, effect.kwargs])
    if done != wanted:
        pairs = enumerate(zip(done, wanted, strict=False))
        start = max(next((n for n, (a, b) in pairs if a != b), 0) - 40, 0)
        what, todo = "the program does something else than its trace", "see the first difference"
        raise ReplayMiss(what, wanted[start:], repr(cut(done[start:])), todo)
    if event.error:
        raise _raised_again(event.error)
    return event.response if event.kind == "lm" else event.outputs


def _raised_again(text: str) -> Exception:
    """Make an error of its class and message; one of an unknown class is a plain Exception.

    Its constructor, which may want anything, is not called.
    """
    name, _, message = text.partition(": ")
    known = {**vars(builtins), **globals()}.get(name)
    base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
    kind: Any = type(name, (base,), {"__str__": lambda self: message})
    error: Exception = kind.__new__(kind)
    return error


# -- many runs --


def run_many(
    program: Program,
    lm: LM,
    inputs_list: Iterable[Fields],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    watch: Watch | None = None,
) -> list[Prediction]:
    """Run a program on many inputs; results stand in the order of the inputs.

    An LM that has `.batch(requests)`, which returns a response or an exception for each of them, is
    driven in lock-step: all runs advance together, and what they ask goes out as one batch.

    Raises:
        Exception: that of the first run, in order, that failed; no further one is begun then. Its
            `results` are those before. Ctrl-C waits for nothing; what was recorded is kept.
        DataError: `watch` together with `executor`, whose processes cannot call it.
    Calls: `program.max_calls` at most for each of the inputs.

    >>> done = run_many(predict("question -> answer"), stub_lm(), [{"question": "a"}] * 2)
    >>> [prediction.answer for prediction in done]
    ['text', 'text']
    """
    _check_watch(watch, executor)
    checked = [check_inputs(program, inputs) for inputs in inputs_list]
    flow = gathered(partial(running, program, watch=watch), checked, lm)
    made: list[Prediction] = drive(flow, lm, workers=workers, executor=executor)
    return made


def _check_watch(watch: Any, executor: Any) -> None:
    if watch is not None and not callable(watch):
        raise DataError("this watches nothing", watch, "a function", "pass one of an Event")
    if watch is not None and executor is not None:
        todo = "leave one out, or read prediction.trace"
        raise DataError("other processes cannot call this", watch, "no executor", todo)


def workers_for(lm: Any, workers: int | None) -> int:
    """Return how many runs go on at once: as asked, else as the LM declares, else one.

    An `async def` that declares nothing is asked 16 times at once. Less than one is a DataError.

    >>> workers_for(stub_lm(), None)
    1
    """
    default = 16 if inspect.iscoroutinefunction(lm) else 1
    count: int = getattr(lm, "concurrency", default) if workers is None else workers
    if not isinstance(count, int) or count < 1:
        raise DataError("no workers", count, "a whole number, 1 or more", "leave workers out")
    return count


_AHEAD = 4  # submitted for each worker, so that one slow run does not leave the others idle


def _in_order(
    submit: Callable[..., Future[V]] | None,
    function: Callable[[T], V],
    items: Iterable[T],
    many: int,
) -> Generator[V, None, None]:
    """Map over items, lazily, some submitted ahead; after an error no further item is begun."""
    if submit is None:
        yield from map(function, items)
        return
    waiting: deque[Future[V]] = deque()
    try:
        for item in items:
            waiting.append(submit(function, item))
            if len(waiting) >= _AHEAD * max(many, 16):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def _threads(workers: int, at_end: Callable[[], None]) -> Iterator[Callable[..., Any] | None]:
    """What submits to threads, or None for one worker, which is this thread.

    They end with the process, where `ThreadPoolExecutor` would have it wait for them; and Ctrl-C
    does not wait for them either. Each calls `at_end` before it ends.
    """
    if workers == 1:
        yield None
        return
    jobs: SimpleQueue[Any] = SimpleQueue()

    def serve() -> None:
        for _ in itertools.starmap(_settle, iter(jobs.get, None)):
            pass
        at_end()

    def submit(function: Callable[..., V], item: Any) -> Future[V]:
        jobs.put(job := _job(function, item))
        return job[0]

    threads = [threading.Thread(target=serve, name="lmopt", daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield submit
    finally:
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        for _ in threads:
            jobs.put(None)
        for thread in () if interrupted else threads:
            thread.join()


def _alone(function: Callable[..., V], /, *args: Any, **kwargs: Any) -> Future[V]:
    """Call a function in a thread that does nothing else."""
    job = _job(function, *args, **kwargs)
    threading.Thread(target=_settle, args=job, name="lmopt", daemon=True).start()
    return job[0]


def _job(function: Callable[..., V], *args: Any, **kwargs: Any) -> tuple[Future[V], Any]:
    """A future, and a call for it; what the caller has set holds in the thread too."""
    from concurrent.futures import Future

    return Future(), partial(contextvars.copy_context().run, function, *args, **kwargs)


def _settle(future: Future[V], call: Callable[[], V]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except StopIteration as error:  # a future of asyncio takes none, and would never end
            future.set_exception(RuntimeError(f"a function raised {error!r}"))
        except BaseException as error:
            future.set_exception(error)


# == 9. Modules ====================================================================================
# Each is a factory around `program`: its body is a closure over the arguments.


@factory
def predict(
    task: Task,
    *,
    instructions: str | None = None,
    types: Fields | None = None,
    adapter: Adapter = chat,
    retries: int = 2,
    tools: Iterable[Tool] = (),
    name: str = "predict",
    **settings: Any,
) -> Program:
    """Make the program that asks an LM once for the outputs of a signature.

    Where a reply does not hold them, it is asked again with what was wrong, and the last time in
    the `json` format.

    Args:
        retries: how many times a reply that cannot be read is asked again, 0 or more.
        tools: described behind the instructions; what the prompt's `texts` say under "tool.NAME"
            takes the place of a description. Nothing calls them: see `react`.
    Raises:
        SignatureError: the signature is wrong.
        ParamsError: an unknown setting.
        ParseError: (when it runs) the last reply could not be read either.
    Calls: 1 for a run, and up to `retries` more.

    >>> predict("question -> answer")(scripted_lm([{"answer": "4"}]), question="2+2?").answer
    '4'
    """
    made = signature(task, instructions=instructions, types=types)
    if not isinstance(adapter, Adapter):
        todo = f"write adapter=lmopt.{adapter}" if adapter in list(ADAPTERS) else "pass lmopt.json"
        raise SignatureError("this is no adapter", adapter, "chat, json, xml, plain or own", todo)
    if retries < 0:
        raise SignatureError("too few retries", retries, "0 or more", "raise retries")
    known = tuple(tools)

    def ask(step: Step, form: Adapter, inputs: dict[str, Any]) -> Request:
        prompt = _with_tools(step.prompt, known) if known else step.prompt
        chosen = prompt.settings._data
        return Request(
            form.render(made, prompt, inputs),
            prompt.model,
            schema=form.schema(made) if form.schema else None,
            step=step.path,
            signature=made,
            inputs=_owned(inputs),
            adapter=form,
            **(_sampling(chosen) if chosen else {}),
        )

    def body(step: Step, /, **inputs: Any) -> Flow:
        chosen = step.prompt.settings._data.get("adapter")
        form = ADAPTERS[chosen] if chosen else adapter
        request = ask(step, form, inputs)
        for left in range(retries, -1, -1):
            response = _unrefused((yield request))
            try:
                fields = form.parse(made, response)
                return (yield from fields) if type(fields) is _GENERATOR else fields
            except ParseError as error:
                error.request = request
                if not left:
                    raise
                form = json if left == 1 else form
                request = _told(ask(step, form, inputs), error)

    prompt = Prompt(made.instructions, texts=_tool_texts(known), settings=settings)
    return _leaf(body, made, prompt, name, (retries + 1) * adapter.calls)


@factory
def text(initial: str, *, name: str = "text") -> Program:
    """Make a step that asks no LM: its one output, `text`, is its instructions.

    So that a regular expression, a query or a piece of code can be learned as instructions are.

    Calls: none.

    >>> text("[0-9]+")(stub_lm()).text
    '[0-9]+'
    """

    def body(step: Step) -> Flow:
        yield ()
        return {"text": step.prompt.instructions}

    return _leaf(body, Signature((), (Field("text"),), initial), Prompt(initial), name, 0)


def _leaf(
    body: Callable[..., Flow], task: Signature, prompt: Prompt, name: str, max_calls: int
) -> Program:
    """A program that has a prompt itself, and the inputs and outputs of a task."""
    known: Any = {"inputs": task.inputs, "outputs": [one.name for one in task.outputs]}
    return program(name=name, max_calls=max_calls, signature=task, prompt=prompt, **known)(body)


def _sampling(settings: Fields) -> dict[str, Any]:
    """Those settings that are options of a request."""
    return {n: value for n, value in settings.items() if n in SETTINGS and n != "adapter"}


def _tool_texts(tools: Iterable[Tool]) -> dict[str, str]:
    return {f"tool.{one.name}": one.desc for one in tools}


def _with_tools(prompt: Prompt, tools: tuple[Tool, ...]) -> Prompt:
    """The prompt with a list of tools behind its instructions."""
    lines = [f"{prompt.instructions}\n\nTools:"]
    for number, tool in enumerate(tools, start=1):
        given = [f"{f.name}: {f.words}" + ("" if f.required else ", optional") for f in tool.fields]
        desc = prompt.texts.get(f"tool.{tool.name}", tool.desc)
        lines.append(f"{number}. `{tool.name}({'; '.join(given)})`" + (f": {desc}" if desc else ""))
        lines += [f"   - `{one.name}`: {one.desc}" for one in tool.fields if one.desc]
    return evolve(prompt, instructions="\n".join(lines))


def _unrefused(response: Response) -> Response:
    """The response, unless it is none: what is refused is refused again."""
    if response.finish_reason == "refusal":
        said, todo = response.text or "refusal", "change what is asked, or ask another model"
        raise Refused("the model refuses to answer", said, "an answer", todo, response=response)
    return response


def _told(request: Request, error: ParseError) -> Request:
    """The request once more, told what was wrong; not shown the reply, which small models copy."""
    *before, asked = request.messages
    content, _, ending = asked.text.rpartition("\n\n")
    told = f"An earlier reply could not be used: {error.told or error}."
    text = "\n\n".join(filter(None, [content, told, ending]))
    last = text if isinstance(asked.content, str) else (text, *asked.content[1:])
    return evolve(request, messages=(*before, evolve(asked, content=last)))


def _task(task: Task, options: dict[str, Any]) -> tuple[Signature, dict[str, Any]]:
    """The signature of a task, and the options that are for `predict` and not for `signature`."""
    own = keyfilter(("instructions", "types").__contains__, options)
    return signature(task, **own), {n: v for n, v in options.items() if n not in own}


@factory
def chain_of_thought(task: Task, *, name: str = "chain_of_thought", **options: Any) -> Program:
    """Make a `predict`, with its options, that writes its `reasoning` before the outputs.

    Calls: those of `predict`.
    Reference: Wei et al. 2022, arXiv 2201.11903.

    >>> [f.name for f in chain_of_thought("question -> answer").signature.outputs]
    ['reasoning', 'answer']
    """
    made, options = _task(task, options)
    thought = Field("reasoning", desc="the steps that lead to the answer")
    return predict(made.prepend(thought), name=name, **options)


@factory
def pipeline(**steps: Program) -> Program:
    """Make the program that runs steps one after the other, each on all fields known by then.

    Its inputs are what a step needs and no earlier step makes; its outputs are all that they make.

    Raises:
        SignatureError: what a step returns is not known before it runs, and others follow it.
    Calls: those of the steps.

    >>> pipeline(draft=predict("topic -> text"), check=predict("text -> verdict")).inputs
    (Field(name='topic', type=<class 'str'>, desc=''),)
    """
    made, takes = list[str](), list[Field]()
    for index, (name, step) in enumerate(steps.items(), start=1):
        if not step.outputs and index < len(steps):
            raise SignatureError("a step with unknown outputs", name, "predict", "write a @program")
        takes += [one for one in step.inputs if one.name not in made]
        made += step.outputs

    def body(own: Steps, /, **given: Any) -> Flow:
        known: dict[str, Any] = {}
        for name in steps:
            known |= yield _fed(own, name, {**given, **known})
        return known

    return _around(body, steps, inputs=takes, name="pipeline")


def _fed(steps: Steps, name: str, known: Fields) -> Run:
    """The effect of running a step on those of the known fields that it takes."""
    return Run(steps[name], select_inputs(steps[name], known), name)


def _attempted(effect: Any, *mild: type[Exception]) -> Flow:
    """The outcome of an effect, or its error; what stops an evaluation is raised, if not mild."""
    try:
        return (yield effect)
    except Exception as error:
        if stops(error) and not isinstance(error, mild):
            raise
        return error


def _alone_in(program: Any) -> dict[str, Program]:
    """The steps of a module that runs one other program."""
    if not isinstance(program, Program):
        todo = "make one: predict('question -> answer')"
        raise SignatureError("this is no program", program, "a program", todo)
    return {program.name: program}


def _around(
    body: Callable[..., Flow], steps: Mapping[str, Program], times: Any = (), **changes: Any
) -> Program:
    """A program with the inputs and outputs of its steps, which run so many times, else once."""
    known, often = steps.values(), dict(times)
    options = {
        "inputs": unique(concat(one.inputs for one in known), key=operator.attrgetter("name")),
        "outputs": unique(concat(one.outputs for one in known)),
        "max_calls": sum(often.get(name, 1) * one.max_calls for name, one in steps.items()),
    }
    return program(steps, **{**options, **changes})(body)


def _at_least_one(name: str, count: int) -> None:
    if count < 1:
        raise SignatureError(f"too small a {name}", count, "1 or more", f"raise {name}")


# -- agents: think, act, observe --


@frozen
class Turn:
    """One step of an agent: what it thought, which tool it called, and what it observed."""

    thought: str
    tool: str
    arguments: Record = field(converter=_record)
    observation: str | Media
    attached: Record = field(default=Record(), converter=_record, eq=False, repr=False)


@frozen
class Cell:
    """One step of an agent that writes code: what was run, and what came of it."""

    code: str
    output: str


Tools = Iterable[Callable[..., Any] | Tool]
_THOUGHT = Field("thought", desc="what is known, and what to do next")
_CODE = Field("code", desc="Python code")
_TRAJECTORY = Field("trajectory", list[Turn], "the steps so far")
_HISTORY = Field("history", list[Cell], "the code so far, and what came of it")
_UNUSABLE: Fields = {"trajectory": partial(Turn, "", "", {}), "history": partial(Cell, "")}


def _agent(
    task: Signature,
    steps: dict[str, Program],  # "act", whose last input is what happened, "answer", and more
    turn: Callable[..., Flow],  # (what "act" made, turns so far, state) -> new ones, is it done
    max_steps: int,
    name: str,
    begin: Callable[[Steps, Fields], tuple[Fields, Any]] = lambda steps, inputs: (inputs, None),
    **times: int,
) -> Program:
    """The program that acts until it is done, or has the outputs; else answers from what it saw."""
    _at_least_one("max_steps", max_steps)
    past = steps["act"].inputs[-1].name

    def remembering(steps: Steps, name: str, given: Fields, seen: list[Any]) -> Flow:
        """Run a step on what was seen; where that is too long, forget the oldest of it."""
        while True:
            try:
                return (yield Run(steps[name], {**given, past: tuple(seen)}, name))
            except ContextWindowExceeded:
                if not seen:
                    raise
                del seen[0]

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        given, state = begin(steps, inputs)
        seen, done = list[Any](), list[Any]()
        ended: Any = False
        while not ended and len(done) < max_steps:
            try:
                made = yield from remembering(steps, "act", given, seen)
            except ParseError as error:
                turns = [_UNUSABLE[past](f"The reply could not be used: {error.told or error}.")]
            else:
                turns, ended = yield from turn(made, done, state)
            seen += turns
            done += turns
        if not isinstance(ended, Mapping):
            ended = yield from remembering(steps, "answer", given, seen)
        return {**ended, past: tuple(done)}

    often = {"act": 2 * max_steps, **times}
    outputs = [*steps["answer"].outputs, past]
    return _around(body, steps, often, inputs=task.inputs, outputs=outputs, name=name)


@factory
def react(
    task: Task,
    tools: Tools,
    *,
    max_steps: int = 20,
    native: bool = False,
    approve: Callable[[ToolCall], Any] | None = None,
    name: str = "react",
    **options: Any,
) -> Program:
    """Make the agent that thinks, calls a tool and observes, until it can answer.

    Whatever goes wrong in a step is what it observes: an unknown tool, wrong arguments, a tool that
    raises, a reply that cannot be read. Where the prompt gets too long, the oldest turn is
    forgotten. At the end, by `finish` or after `max_steps`, the outputs are read from the
    trajectory, which is in the prediction too. An LM or a budget that fails ends the run.

    Args:
        tools: functions with types and docstrings, or `Tool`s. Their descriptions are among the
            `texts` of the step "act", as "tool.NAME".
        native: use the tool calls of the provider, several at once where the model asks for them.
        approve: asked before each call; anything but True is why not, and is what is observed.
    Raises:
        SignatureError: no tools, two of one name, or one called "finish".
    Calls: one for each step, `max_steps` more where the prompt gets too long, and the answer.
    Reference: Yao et al. 2022, arXiv 2210.03629.

    >>> def population(city: str) -> int:
    ...     '''Return how many people live in a city.'''
    ...     return 2_100_000
    >>> look = {"thought": "Look.", "tool": "population", "arguments": {"city": "Paris"}}
    >>> end, answer = {"thought": "Done.", "tool": "finish"}, {"reasoning": "", "answer": 2_100_000}
    >>> agent = react("question -> answer: int", [population])
    >>> agent(scripted_lm([look, end, answer]), question="How many live in Paris?").answer
    2100000
    """
    made, options = _task(task, options)
    known = _tools(tools, "finish")
    if not known:
        raise SignatureError("wrong tools", [], "one tool or more", "pass a function")
    seen = made.append(_TRAJECTORY, to="inputs")
    act = (_act_natively if native else _act)(seen, known, options)
    steps = {"act": act, "answer": chain_of_thought(seen, name="answer", **options)}

    def called(thought: str, call: ToolCall, last: Sequence[Turn]) -> Flow:
        observed = yield from _observed(known, call, approve)
        for one in last:
            same = (one.tool, one.arguments) == (call.name, call.arguments)
            if same and isinstance(observed, str) and str(one.observation).startswith(observed):
                observed += "\n(The same call as before, and the same result.)"
        return Turn(thought, call.name, call.arguments, observed, call.attached)

    def turn(step: Any, done: Sequence[Turn], _: None) -> Flow:
        calls = step["calls"] if native else [_meant_call(known, step.tool, step.arguments)]
        if not calls or calls[0].name == "finish":
            return [Turn(step.thought, "finish", {}, "")], True
        left = max_steps - len(done)
        return (yield [called(step.thought, one, done[-1:]) for one in calls[:left]]), False

    return _agent(made, steps, turn, max_steps, name)


def _tools(tools: Tools, *reserved: str) -> Record:
    """Tools by name."""
    if callable(tools) or isinstance(tools, (str, Mapping)):
        raise SignatureError("tools are no list", tools, "a list of tools", "write [tool, ...]")
    made = [Tool.of(one) for one in tools]
    names = Counter([*reserved, *(one.name for one in made)])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        todo = "name them: Tool.of(function, name=...)"
        raise SignatureError("wrong tools", twice[:1], "tools of different names", todo)
    return Record({one.name: one for one in made})


def _act(seen: Signature, tools: Record, options: Fields) -> Program:
    """The step that names one tool in a reply."""
    names = _Held({"type": "string", "enum": [*tools, "finish"]})
    shapes = [*unique([*(one.schema for one in tools.values()), _closed({})], key=canonical)]
    held = Annotated[dict[str, Any], _Held({"anyOf": shapes})]
    called = Field("tool", Annotated[str, names], "the name of the tool to call, or finish")
    given = Field("arguments", held, "of the tool, by name", default=Record())
    told = (
        f"{seen.instructions}\n\nWork in steps. In each step, think and call one tool; what it "
        f"returns is added to the trajectory. When the trajectory holds all that is needed for "
        f"{_listed(seen)}, call finish, with no arguments."
    )
    return _acting(Signature(seen.inputs, (_THOUGHT, called, given), told), tools, options)


def _acting(task: Signature, tools: Record, options: Fields) -> Program:
    return predict(task, **{"retries": 1, **options, "tools": tools.values(), "name": "act"})


def _meant_call(tools: Record, name: str, arguments: Fields) -> ToolCall:
    """The call that a model means where it writes `look()`, functions.look or look(city="Lyon")."""
    inner = arguments.get("tool"), arguments.get("arguments")
    taken = [one.name for one in tools[name].fields] if name in tools else []
    if inner[0] in tools and isinstance(inner[1], Mapping) and "arguments" not in taken:
        name, arguments = str(inner[0]), inner[1]
    plain = re.match(r"\W*(?:functions?\.|tools?\.)?([\w-]+)\W*(?:\((.*)\))?\W*\Z", name, re.DOTALL)
    if plain is None or name in tools or plain[1] not in (*tools, "finish"):
        return ToolCall("", name, arguments)
    if plain[2] and not arguments:
        named = re.sub(r"(\w+)\s*=(?!=)", r"\1: ", plain[2])
        with suppress(ValueError):
            arguments = read(dict[str, Any], f"{{{named}}}")
    return ToolCall("", plain[1], arguments)


def _act_natively(seen: Signature, tools: Record, options: Fields) -> Program:
    """The step that calls tools as the provider does."""
    told = (
        f"{seen.instructions}\n\nCall tools until you know all that is needed for {_listed(seen)}. "
        f"Then answer in a few words, without a call."
    )
    made = Signature(seen.inputs, (Field("thought"), Field("calls", list[ToolCall])), told)

    def body(step: Step, /, **inputs: Any) -> Flow:
        prompt, asked = step.prompt, made.without("trajectory")
        said = [Message("system", prompt.instructions)]
        said.append(
            Message("user", _content(_marks(_CHAT, asked.shown), asked, inputs) or "Begin.")
        )
        for number, turn in enumerate(inputs["trajectory"], start=1):
            call = ToolCall(f"call_{number}", turn.tool, turn.arguments, turn.attached)
            said.append(Message("assistant", turn.thought, tool_calls=(call,)))
            seen, shown = turn.observation, []
            if isinstance(seen, Media):
                shown = [Message("user", (f"[{seen.kind} 1]", seen))]
                seen = "See the next message."
            said += [Message("tool", seen, tool_call_id=call.id), *shown]
        known = [evolve(t, desc=prompt.texts.get(f"tool.{t.name}", t.desc)) for t in tools.values()]
        facts: dict[str, Any] = {"step": step.path, "inputs": Record(inputs), "tools": known}
        request = Request(said, prompt.model, **facts, **_sampling(prompt.settings))
        response = _unrefused((yield request))
        calls = response.tool_calls or _written_calls(tools, response.text)
        return {"thought": response.text or response.reasoning, "calls": calls}

    prompt = Prompt(told, texts=_tool_texts(tools.values()), settings=_sampling(options))
    return _leaf(body, made, prompt, "act", 1)


def _written_calls(tools: Record, text: str) -> tuple[ToolCall, ...]:
    """The calls that a model wrote as JSON into its text."""
    made = []
    for one in concat(one if isinstance(one, list) else [one] for one in _bracketed(text)[0]):
        if isinstance(one, dict) and one.get("name") in tools:
            given = one.get("arguments", one.get("parameters")) or {}
            made += [ToolCall("", one["name"], given)] if isinstance(given, dict) else []
    return tuple(made)


def _observed(tools: Record, call: ToolCall, approve: Callable[[ToolCall], Any] | None) -> Flow:
    """What a tool returns, or what went wrong."""
    allowed = approve is None or (yield invoke(approve, call))
    if allowed is not True:
        return f"This call was not approved{f': {allowed}' if allowed else '.'}"
    if call.name not in tools:
        return f"There is no tool {call.name!r}; there are {', '.join([*tools, 'finish'])}."
    tool: Tool = tools[call.name]
    try:
        given = tool.checked(call.arguments)
    except DataError as error:
        return f"Wrong arguments: {error}"
    # What is yours to correct is the tool's to tell; what ends a run is not.
    made = yield from _attempted(Call(tool.function, (), given, tool.name), ValueError)
    if isinstance(made, Exception):
        return f"The tool failed: {describe(made)}"
    return made if isinstance(made, Media) else as_text(made)


# -- agents that write code; who runs it is injected --


@frozen
class Result:
    """What came of running code.

    Attributes:
        calls: functions outside that it waits for, as (name, args, kwargs); run it again, from the
            state it was run from, with the answers among `state["answers"]`.
    """

    output: str = ""  # what it printed, and the value of a last expression
    error: str = ""  # class and message of what it raised, "" where it ended well
    state: Any = None  # to go on with, as JSON data
    calls: tuple[Any, ...] = ()
    answer: Fields | None = None  # the fields that it submitted
    wall: str = field(default="", eq=False)  # what kept the code in, see `subprocess_python`


Interpreter = Callable[[str, Any], Result]
"""interpreter(code, state) -> Result. The state is JSON data: `variables` (name -> value), the
names of the outside `functions`, the `cells` that ran before, and the `answers` of outside calls in
their order, each {"value": ...} or {"error": ...}. Nothing else is remembered between two calls."""


_CALLS_OUTSIDE = 100  # for one piece of code: answering some takes one more run of it


def _ran(code: str, result: Result) -> Cell:
    shown = [text for text in (result.output, result.error and f"Error: {result.error}") if text]
    return Cell(code, "\n".join(shown) or "(no output: print what you want to see)")


def _state(variables: Fields, functions: Iterable[str]) -> dict[str, Any]:
    given = {name: jsonable(value) for name, value in variables.items()}
    return {"variables": given, "functions": list(functions), "cells": [], "answers": []}


def _session(
    interpreter: Interpreter, variables: Fields, tools: Record, **more: Callable[..., Flow]
) -> Callable[[str], Flow]:
    """The flow that runs a piece of code where those before it left off, and returns the result."""

    def outside(tool: Tool, /, *args: Any, **kwargs: Any) -> Flow:
        return (yield Call(tool.function, (), tool.checked(kwargs, args), tool.name))

    functions = {name: partial(outside, tool) for name, tool in tools.items()} | more
    state = _state(variables, functions)

    def answered(name: str, args: Sequence[Any], kwargs: Fields) -> Flow:
        try:
            if name not in functions:
                raise DataError("no such tool", name, f"one of {[*functions]}", "correct the name")
            return {"value": jsonable((yield from functions[name](*args, **kwargs)), other=repr)}
        except Exception as error:
            if stops(error) and not isinstance(error, ValueError):
                raise
            return {"error": describe(error)}

    def run(code: str) -> Flow:
        nonlocal state
        fenced = re.search(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:\n```|\Z)", code, re.DOTALL)
        bare, asked = fenced[1] if fenced else code, state
        for left in range(_CALLS_OUTSIDE, -1, -1):
            made = yield Call(interpreter, (bare, asked), {}, "interpreter")
            result: Result = coerce(Result, made)  # from a saved trace it is plain data
            if not result.calls:
                state = state if result.state is None else result.state
                return result
            if left < len(result.calls):
                what = f"more than {_CALLS_OUTSIDE} calls of {result.calls[0][0]} and others"
                return evolve(result, error=f"RuntimeError: {what}", calls=())
            answers = yield [answered(*one) for one in result.calls]
            asked = {**asked, "answers": [*asked["answers"], *answers]}

    return run


@factory
def program_of_thought(
    task: Task,
    interpreter: Interpreter,
    *,
    max_tries: int = 3,
    name: str = "program_of_thought",
    **options: Any,
) -> Program:
    """Make the program that writes code for a task, has it run, and answers from its output.

    Code that raises is shown to the model with its error, and written anew.

    Raises:
        ParseError: (when it runs) the code of all `max_tries` failed; says how the last one did.
    Calls: those of `predict` for each try, and of the answer.
    Reference: Chen et al. 2022, arXiv 2211.12588.

    >>> def fake(code, state):
    ...     return Result("4") if code == "print(2 + 2)" else Result(error="NameError: x")
    >>> lm = scripted_lm([{"code": "x"}, {"code": "print(2 + 2)"}, {"reasoning": "", "answer": 4}])
    >>> program_of_thought("question -> answer: int", fake)(lm, question="2+2?").answer
    4
    """
    made, options = _task(task, options)
    _at_least_one("max_tries", max_tries)
    told = (
        f"{made.instructions}\n\nWrite Python code that prints all that is needed for "
        f"{_listed(made)}. The inputs are variables of it. Do not repeat a failed attempt."
    )
    tried = Field("attempts", list[Cell], "earlier code and its errors")
    worked = Field("ran", list[Cell], "the code that was run, and its output")
    code = predict(Signature((*made.inputs, tried), (_CODE,), told), name="code", **options)
    answer = chain_of_thought(made.append(worked, to="inputs"), name="answer", **options)

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        attempts: tuple[Cell, ...] = ()
        for _ in range(max_tries):
            wrote = yield steps.code(**inputs, attempts=attempts)
            result = yield from _session(interpreter, inputs, Record())(wrote.code)
            attempts = (*attempts, _ran(wrote.code, result))
            if not result.error:
                return (yield steps.answer(**inputs, ran=attempts[-1:]))
        what, todo = f"the code failed in all {max_tries} tries; the last error", "raise max_tries"
        raise ParseError(what, result.error, "code that runs", todo, field="code")

    known, takes, makes = {"code": code, "answer": answer}, made.inputs, answer.outputs
    return _around(body, known, {"code": max_tries}, inputs=takes, outputs=makes, name=name)


@factory
def code_act(
    task: Task,
    tools: Tools,
    interpreter: Interpreter,
    *,
    max_steps: int = 5,
    name: str = "code_act",
    **options: Any,
) -> Program:
    """Make the agent that acts by writing code, which may call tools, until it can answer.

    The tools run here, not where the code runs: a call of one ends the code, and it is run again
    with the answer. What goes wrong in a step is what it observes, as in `react`.

    Calls: as `react`.
    Reference: Wang et al. 2024, arXiv 2402.01030.

    >>> fake = lambda code, state: Result("4")
    >>> act = {"thought": "Add.", "code": "print(2 + 2)", "finished": True}
    >>> lm = scripted_lm([act, {"reasoning": "", "answer": 4}])
    >>> code_act("question -> answer: int", [], fake)(lm, question="2+2?").answer
    4
    """
    made, options = _task(task, options)
    known = _tools(tools)
    told = (
        f"{made.instructions}\n\nWork in steps. In each step, write Python code that brings you "
        f"nearer to {_listed(made)}, and print what you want to see. The inputs are variables, the "
        "tools are functions, and what earlier code defined is there still."
    )
    finished = Field("finished", bool, "whether nothing is left to do after this code")
    seen = made.append(_HISTORY, to="inputs")
    acting = Signature(seen.inputs, (_THOUGHT, _CODE, finished), told)
    answer = chain_of_thought(seen, name="answer", **options)
    steps = {"act": _acting(acting, known, options), "answer": answer}

    def begin(steps: Steps, inputs: Fields) -> tuple[Fields, Any]:
        return inputs, _session(interpreter, inputs, known)

    def turn(step: Any, done: Sequence[Cell], run_code: Callable[[str], Flow]) -> Flow:
        result = yield from run_code(step.code)
        return [_ran(step.code, result)], step.finished and not result.error

    return _agent(made, steps, turn, max_steps, name, begin)


@factory
def recursive(
    task: Task,
    interpreter: Interpreter,
    *,
    tools: Tools = (),
    max_steps: int = 20,
    max_queries: int = 50,
    preview_chars: int = 500,
    name: str = "recursive",
    **options: Any,
) -> Program:
    """Make a recursive language model: it explores its inputs by code, and asks itself about parts.

    The inputs are variables of a session, of any length; the prompt has only their names, types,
    lengths and beginnings. Code may call `query(prompt, ...)`, which asks the LM, several prompts
    at once, and `submit(field=value, ...)`, which ends it. What goes wrong, a wrong type of a
    submitted value included, is what it observes. After `max_steps` the outputs are read from what
    it saw.

    Args:
        tools: further functions that the code may call.
        max_queries: how many prompts a run may ask about, 0 or more; one more raises in the code.
        preview_chars: how much of each input is shown, 0 or more.
    Raises:
        SignatureError: two tools of one name, or one called "query" or "submit".
    Calls: as `react`, and `max_queries`.
    Reference: Zhang et al. 2025, arXiv 2512.24601.

    >>> fake = lambda code, state: Result(answer={"count": 3})
    >>> lm = scripted_lm([{"thought": "Count.", "code": "submit(count=text.count('a'))"}])
    >>> recursive("text -> count: int", fake)(lm, text="banana").count
    3
    """
    made, options = _task(task, options)
    known = _tools(tools, "query", "submit")
    about = Field("variables", desc="the inputs: name, type, length and beginning")
    given = ", ".join(f"{one.name}=..." for one in made.outputs)
    types = ", ".join(f"{one.name}: {one.words}" for one in made.outputs)
    told = (
        f"{made.instructions}\n\nThe inputs are variables of a Python session; only their "
        "beginnings are shown. Work in steps. In each step, write code that explores them, and "
        "print what you want to see. query(prompt) asks a language model about a text that you put "
        "into the prompt, and returns its answer; query(a, b, c) asks about several at once, and "
        f"returns a list; at most {max_queries} prompts in all. When you are sure, call "
        f"submit({given}) in your code, with {types}."
    )
    acting = Signature((about, _HISTORY), (_THOUGHT, _CODE), told)
    asked = Signature((Field("prompt"),), (Field("reply"),), "Do what the prompt says.")
    reading = Signature((about, _HISTORY), made.outputs, made.instructions)
    steps = {
        "act": _acting(acting, known, options),
        "query": predict(asked, **{**options, "adapter": plain, "retries": 0, "name": "query"}),
        "answer": predict(reading, name="answer", **options),
    }

    def begin(steps: Steps, inputs: Fields) -> tuple[Fields, Any]:
        query, lines = _queries(steps, max_queries), list[str]()
        for one in made.inputs:
            text = write(one.type, inputs[one.name])
            shown = cut(text, preview_chars)
            lines.append(f"{one.name} ({one.words}), {len(text)} characters: {shown}")
        return {"variables": "\n".join(lines)}, _session(interpreter, inputs, known, query=query)

    def turn(step: Any, done: Sequence[Cell], run_code: Callable[[str], Flow]) -> Flow:
        result = yield from run_code(step.code)
        if result.answer is None:
            return [_ran(step.code, result)], False
        submitted = Response(_dump(jsonable(dict(result.answer), other=repr)))
        try:
            return [_ran(step.code, result)], json.parse(made, submitted)
        except ParseError as error:
            return [Cell(step.code, f"What was submitted could not be used: {error}")], False

    return _agent(made, steps, turn, max_steps, name, begin, query=max_queries)


def _queries(steps: Steps, left: int) -> Callable[..., Flow]:
    """What `query` does in the code of one run."""

    def query(*prompts: Any) -> Flow:
        nonlocal left
        if not all(isinstance(one, str) for one in prompts):
            raise DataError("wrong arguments of query", prompts, "texts", "pass prompts")
        if len(prompts) > left:
            raise DataError("too many queries", len(prompts), f"{left} at most", "do with less")
        left -= len(prompts)
        texts = [one.reply for one in (yield [steps.query(prompt=one) for one in prompts])]
        return texts[0] if len(texts) == 1 else texts

    return query


# -- running code of a model --

# What runs in the process of `subprocess_python`: a job as JSON in, what came of it as JSON out.
_RUNNER = r"""
import ast, contextlib, io, json, os, random, sys, traceback
sys.dont_write_bytecode = True
job = json.loads(sys.stdin.readline())
state, limit, home = job["state"], job["output_limit"], os.getcwd()
reply, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(nothing, descriptor)
with contextlib.suppress(ImportError):  # on Windows
    import resource
    for name, most in job["limits"].items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
if not job["network"]:
    with contextlib.suppress(Exception):  # where the kernel allows it
        import ctypes
        ctypes.CDLL(None).unshare(0x50000000)  # a user and a network namespace of its own

class Pending(BaseException):
    "Ends the code until somebody outside has answered a call."

class Cut(io.StringIO):
    "Keeps the beginning of what is written."
    lost = 0

    def write(self, text):
        kept = super().write(text[: max(limit - self.tell(), 0)])
        self.lost += len(text) - kept
        return len(text)

    def shown(self):
        return self.getvalue() + (f"\n[{self.lost} more characters]" if self.lost else "")

asked, submitted, answers = [], [], iter(state["answers"])

def outside(name):
    def call(*args, **kwargs):
        known = next(answers, None)
        if known is None:
            asked.append(json.loads(json.dumps([name, args, kwargs])))
            raise Pending
        if "error" in known:
            raise RuntimeError(known["error"])
        return known["value"]

    call.__name__ = name
    return call

def submit(**fields):
    submitted.append(json.loads(json.dumps(fields)))
    raise Pending

names = {"__name__": "__main__", "submit": submit, **state["variables"]}
names |= {name: outside(name) for name in state["functions"]}
places = [home, os.devnull, sys.prefix, sys.base_prefix, *filter(None, sys.path), "/usr/lib",
          "/usr/share/zoneinfo", "/dev/urandom"]
places = [os.path.realpath(one) for one in places]  # to read from; to write to, the first two
changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
looking = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.chdir", "os.add_dll_directory")
forbidden = (
    "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.startfile",
    "os.putenv", "pty.spawn", "subprocess.", "ctypes.", "winreg.", "signal.", "syslog.",
    "sys.settrace", "sys.setprofile", "sys._current", "gc.get", "sqlite3.", "webbrowser.",
    *(() if job["network"] else ("socket.",)),
)

def guard(event, args):
    if event.startswith(forbidden):
        raise PermissionError(f"{event} is not allowed here")
    if not event.startswith(("open", "os.", "shutil.")):
        return
    if event == "open":
        args, reads = args[:1], not (args[2] or 0) & changing
    else:
        args, reads = args[:2], event in looking
    for path in args:
        if isinstance(path, (str, bytes)):
            real = os.path.realpath(os.fsdecode(path))
            near = places if reads else places[:2]
            if not any(real == one or real.startswith(one + os.sep) for one in near):
                raise PermissionError(f"{real} is outside of the folder of this code")

for name in ("_posixsubprocess", "_ctypes", "ctypes", "_multiprocessing", "_testcapi"):
    sys.modules[name] = None
sys.addaudithook(guard)

cells = [*state["cells"], job["code"]]
for code in cells:
    random.seed(0)
    error, out = Cut(), Cut()
    submitted.clear()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            tree = ast.parse(code)
            last = [tree.body.pop()] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
            exec(compile(tree, "<code>", "exec"), names)
            exec(compile(ast.Interactive(last), "<code>", "single"), names)  # shows its value
    except Pending:
        if asked:
            break
    except BaseException as failure:
        said = "(it cannot be shown)"
        with contextlib.suppress(BaseException):
            said = str(failure)
        lines = [line for frame, line in traceback.walk_tb(failure.__traceback__)
                 if frame.f_code.co_filename == "<code>"]
        error.write(f"{type(failure).__name__}: {said}" + (f" (line {lines[-1]})" if lines else ""))
with open(reply, "w") as file:
    json.dump({
        "output": out.shown(), "error": error.shown(), "calls": asked,
        "answer": submitted[0] if submitted else None,
        "state": None if asked else {**state, "cells": cells},
    }, file)
os._exit(0)
"""


def subprocess_python(
    *,
    timeout: float = 10.0,
    memory_mb: int = 512,
    output_limit: int = 10_000,
    network: bool = False,
    command: Sequence[str] | None = None,
) -> Interpreter:
    """Make an interpreter that runs Python code in a fresh process.

    The process is isolated, in an empty folder of its own that is deleted afterwards, with
    nothing of this process's environment, in a process group of its own that is killed at the end.
    Memory, time and the size of files are limited, output and errors are cut. The code may not
    start processes, use the network, or touch files outside of its folder and Python's own. What
    earlier code defined is there again, because that code is run again: it should be deterministic.

    Where bubblewrap (`bwrap`) is installed and may make namespaces, the process sees no files but
    its folder and Python's own, no network, and no other process. Else **there is no wall**: what
    keeps honest mistakes of a model from doing harm are Python's audit hooks, which code that means
    to break out gets around, and limits of the kernel (not on Windows). `Result.wall` says which it
    was: "bubblewrap", "process", or "command". Run what you do not trust behind the first, or in a
    container, where the same protocol works:

        subprocess_python(
            command=["docker", "run", "--rm", "-i", "--network=none", "--memory=256m",
                     "--pids-limit=64", "--read-only", "--tmpfs=/tmp", "--workdir=/tmp",
                     "python:3.13-slim", "python", "-I", "-c"]
        )

    Args:
        timeout: seconds for each piece of code, with what ran before it.
        memory_mb: of the process, in megabytes; 0 for no limit.
        output_limit: how many characters of output and of an error are kept.
        network: allow it.
        command: what starts Python, the script being its last argument.
    Raises:
        OSError: (when it runs) the process cannot be started.
    Calls: none.

    >>> run_code = subprocess_python()
    >>> first = run_code("x = 20\\nprint('hello')", None)
    >>> first.output, run_code("x + 1", first.state).output
    ('hello\\n', '21\\n')
    """
    memory, seconds = memory_mb * 2**20 or -1, math.ceil(timeout) + 1
    limits = {"AS": memory, "CPU": seconds, "FSIZE": 64 * 2**20, "CORE": 0, "NOFILE": 64}
    job = {"limits": limits, "output_limit": output_limit, "network": network}
    return partial(_in_subprocess, tuple(command or ()), job, timeout)


# Not -I, with which the seed of hashes would be ignored: the same code is to do the same again.
_PYTHON = (sys.executable, "-sP", "-c")


@lru_cache(maxsize=2)
def _wall(network: bool) -> tuple[str, ...]:
    """What starts a process behind bubblewrap; nothing, where there is none that may do so."""
    import shutil
    import subprocess

    shown = {"/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache"}
    shown |= {sys.prefix, sys.base_prefix, os.path.realpath(sys.executable)}
    if network:
        shown |= {"/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl"}
    spaces = ("--unshare-all", *(["--share-net"] if network else []), "--die-with-parent")
    binds = concat(("--ro-bind-try", one, one) for one in sorted(shown))
    outer = ("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", *binds)
    wall = (shutil.which("bwrap") or "bwrap", *spaces, *outer)
    tried = [*wall, "--chdir", "/", *_PYTHON, "print('in')"]
    with suppress(FileNotFoundError):
        done = subprocess.run(tried, capture_output=True, timeout=30, check=False)
        return wall if done.stdout.strip() == b"in" else ()
    return ()


def _in_subprocess(
    command: tuple[str, ...], job: Fields, timeout: float, code: str, state: Any
) -> Result:
    import tempfile
    from subprocess import DEVNULL, PIPE, Popen

    line = canonical({**job, "code": code, "state": state or _state({}, ())}) + "\n"
    own = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    own |= {name: value for name, value in os.environ.items() if name == "SYSTEMROOT"}
    with tempfile.TemporaryDirectory(prefix="lmopt", ignore_cleanup_errors=True) as folder:
        kind, start = "command", command
        if not command:
            wall = _wall(job["network"])
            inside = (*wall, "--bind", folder, folder, "--chdir", folder) if wall else ()
            kind, start = "bubblewrap" if wall else "process", (*inside, *_PYTHON)
        ends: Any = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "start_new_session": True}
        process = Popen([*start, _RUNNER], cwd=folder, env=None if command else own, **ends)
        text, late = _talk(process, line.encode(), timeout, 10 * job["output_limit"] + 2**20)
    try:
        made = jsonlib.loads(b"" if late else text)
        return Result(**{**made, "calls": tuple(map(tuple, made["calls"])), "wall": kind})
    except (ValueError, LookupError, TypeError):
        crash = f"MemoryError or a crash: the process ended with {process.returncode}"
        slow = f"TimeoutError: the code took longer than {timeout} s"
        return Result(error=slow if late else crash, wall=kind)


def _talk(process: Any, line: bytes, timeout: float, most: int) -> tuple[bytes, bool]:
    """Give a process its job; return what it writes, and whether it took too long."""
    began = time.monotonic()

    def kill() -> None:
        """End it with all that it may have started."""
        with suppress(OSError):
            getattr(os, "killpg", os.kill)(process.pid, 9)  # SIGKILL; on Windows, of it alone

    timer = threading.Timer(timeout, kill)
    timer.start()
    with process:
        try:
            with suppress(OSError), process.stdin:  # it may end before it has read the job
                process.stdin.write(line)
            return process.stdout.read(most), time.monotonic() - began >= timeout
        finally:
            timer.cancel()
            kill()


# -- samplers: several attempts, told apart by `rollout` --


def sampled(program: Program, index: int, count: int) -> Program:
    """Return a program whose requests ask for sample `index` of `count`: another `rollout`.

    Sample 0 of a fresh program is the program itself. Samples of samples are told apart too.

    >>> sampled(predict("q -> a"), 2, 5).prompt.settings
    Record(rollout=2)
    """
    changed = {}
    for path, prompt in program.params.items():
        rollout = prompt.settings.get("rollout", 0) * count + index
        if rollout:
            changed[path] = evolve(prompt, settings=prompt.settings | {"rollout": rollout})
    return program.with_params(changed) if changed else program


Reward = Callable[[Record, Prediction], Any]
"""reward(inputs, prediction) -> a number, or a `Score`."""


@factory
def best_of_n(
    program: Program, n: int, reward: Reward, *, threshold: float = 1.0, name: str = "best_of_n"
) -> Program:
    """Make the program that runs another up to `n` times, and returns what is rewarded most.

    It stops at the first attempt whose reward reaches the threshold; ties go to the earlier one. An
    attempt that fails counts as none; if all fail, the last error is raised. With `n=1` nothing is
    rewarded. Set a temperature: attempts differ in `rollout` only.

    Raises:
        MetricError: (when it runs) the reward raised, or is no number; says for which prediction.
    Calls: `n` times those of the program.

    >>> lm = scripted_lm([{"word": "a"}, {"word": "abc"}, {"word": "ab"}])
    >>> longest = best_of_n(predict("-> word"), 3, lambda inputs, made: len(made.word) / 9)
    >>> longest(lm).word
    'abc'
    """
    return _attempting(program, n, reward, threshold, name)


@factory
def refine(
    program: Program,
    n: int,
    reward: Reward,
    *,
    threshold: float = 1.0,
    name: str = "refine",
    **options: Any,
) -> Program:
    """Make the program that attempts, is told what was wrong with it, and attempts again.

    After an attempt below the threshold, hints go into the next one, behind the instructions of
    each step; the prompts themselves stay as they are. The hints are what the reward says of single
    steps (`Score.steps`); where it says nothing of them, an LM is asked. Otherwise as `best_of_n`.

    Calls: `n` times those of the program, and the hints between them.
    Reference: Madaan et al. 2023, arXiv 2303.17651, with the hints per step.

    >>> lm = scripted_lm([{"word": "a"}, {"advice": {"predict": "Longer."}}, {"word": "abc"}])
    >>> longer = refine(predict("-> word"), 2, lambda inputs, made: len(made.word) / 3)
    >>> longer(lm).word
    'abc'
    """
    adviser = predict(_ADVISE, name="advise", **options)
    return _attempting(program, n, reward, threshold, name, advise=adviser)


def _attempting(
    program: Program, n: int, reward: Reward, threshold: float, name: str, **adviser: Program
) -> Program:
    """The program that runs another until its reward is high enough, with advice in between."""
    _at_least_one("n", n)
    known, times = {**_alone_in(program), **adviser}, {program.name: n, "advise": n - 1}

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        step, tried = steps[program.name], list[Any]()
        hints: Fields = {}
        for index in range(n):
            attempt = _hinted(sampled(step, index, n), hints if adviser else {})
            made = yield from _attempted(Run(attempt, inputs, program.name))
            if isinstance(made, Exception):
                hints = dict.fromkeys(step.leaves, f"An attempt failed: {describe(made)}")
                continue
            if n == 1:
                return made
            score = _rewarded(reward, Record(inputs), made)
            tried.append((score.value, made))
            if score.value >= threshold:
                break
            if adviser and index < n - 1:
                hints = score.steps or (yield from _advice(steps, program.name, made, score))
        if not tried:
            raise made
        return max(tried, key=first)[1]  # of equals, the earliest

    takes, makes = program.inputs, program.outputs
    return _around(body, known, times, inputs=takes, outputs=makes, name=name)


def _rewarded(reward: Reward, inputs: Record, made: Prediction) -> Score:
    """The reward of an attempt; one that is wrong is the user's error."""
    rest = {"inputs": dict(inputs), "prediction": dict(made)}, "a number", "correct the reward"
    try:
        result = reward(inputs, made)
        score = result if isinstance(result, Score) else Score(float(result))
    except Exception as error:
        if stops(error):
            raise
        what = f"the reward raised {type(error).__name__} ({error}) for"
        raise MetricError(what, *rest) from error
    if math.isnan(score.value):
        raise MetricError("the reward is no number for", *rest)
    return score


def _hinted(program: Program, hints: Fields) -> Program:
    told = {
        path: evolve(prompt, instructions=f"{prompt.instructions}\n\nHint: {hints[path]}")
        for path, prompt in program.params.items()
        if hints.get(path)
    }
    return program.with_params(told) if told else program


_ADVISE = Signature(
    (
        Field("steps", dict[str, str], "the steps of the program, and the instructions of each"),
        Field("attempt", list[Any], "what each step was given and what it made, in order"),
        Field("score", float, "of the attempt; higher is better"),
        Field("feedback", str, "what is known of what was wrong"),
    ),
    (Field("advice", dict[str, str], "for each step that should do better: how"),),
    "A program made an attempt that is not good enough. Say which of its steps are to blame, and "
    "tell each of them what to do differently next time. Leave out the steps that did well.",
)


def _advice(steps: Steps, name: str, made: Prediction, score: Score) -> Flow:
    """Ask for hints; where the reply cannot be used, there are none."""
    step, place = steps[name], made.trace[-1].path if made.trace else name
    local = {place if step.prompt else f"{place}.{one}": one for one in step.leaves}
    told = {path: prompt.instructions for path, prompt in step.params.items()}
    attempt = [
        jsonable({"step": local[e.path], "given": e.inputs, "made": e.outputs}, other=repr)
        for e in made.trace
        if e.kind == "step" and e.path in local
    ]
    facts = {"steps": told, "attempt": attempt, "score": score.value, "feedback": score.feedback}
    try:
        return (yield steps.advise(**facts)).advice
    except ParseError:
        return {}


def vote(predictions: Sequence[Prediction], *, field: str | None = None) -> Prediction:
    """Return the earliest prediction with the value that most have, compared after `normalize`.

    Args:
        field: whose values count; by default the last one.
    Raises:
        DataError: there is no prediction, or one lacks the field.

    >>> vote([Prediction(a=one) for one in ("Paris", "Rome", "paris.")]).a
    'Paris'
    """
    if not predictions:
        raise DataError("nobody votes", predictions, "one prediction or more", "add attempts")
    chosen = field or list(predictions[0])[-1]
    for one in predictions:
        if chosen not in one:
            known = f"one of {', '.join(one)}"
            raise DataError("no such field to vote on", chosen, known, "correct the name")
    values = [normalize(one[chosen]) for one in predictions]
    return predictions[values.index(max(values, key=values.count))]


@factory
def majority(
    program: Program, n: int = 5, *, field: str | None = None, name: str = "majority"
) -> Program:
    """Make the program that runs another `n` times at once, and returns what most runs say.

    The runs differ in `rollout` only. One that fails has no vote, see `surviving`.

    Args:
        field: whose values count; by default the last output.
    Calls: `n` times those of the program.
    Reference: Wang et al. 2022, arXiv 2203.11171 (self-consistency).

    >>> lm = scripted_lm([{"answer": "4"}, {"answer": "5"}, {"answer": "4."}])
    >>> majority(predict("question -> answer"), 3)(lm, question="2+2?").answer
    '4'
    """
    _at_least_one("n", n)

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        samples = [sampled(steps[program.name], index, n) for index in range(n)]
        made = yield from surviving([Run(one, inputs, program.name) for one in samples])
        return vote(made, field=field)

    return _around(body, _alone_in(program), {program.name: n}, name=name)


def surviving(runs: Iterable[Run]) -> Flow:
    """Run programs at once, as a part of a body; return the predictions of those that succeed.

    If all fail, the last error is raised; what would fail alike everywhere, such as a dead key, is
    raised at once.

    >>> @program(a=predict("q -> a"), b=predict("q -> a"))
    ... def either(steps, q):
    ...     return (yield from surviving([steps.a(q=q), steps.b(q=q)]))[0]
    >>> either(scripted_lm([*["What?"] * 3, {"a": "yes"}]), q="?").a
    'yes'
    """
    made = yield [_attempted(one) for one in runs]
    alive = [one for one in made if not isinstance(one, Exception)]
    if not alive:
        raise made[-1]
    return alive


@factory
def multi_chain_comparison(
    task: Task, *, m: int = 3, name: str = "multi_chain_comparison", **options: Any
) -> Program:
    """Make the program that reasons `m` times, compares the attempts, and then answers.

    The attempts differ in `rollout` only. One that fails is left out, see `surviving`.

    Calls: those of `predict`, `m + 1` times.
    Reference: Yoran et al. 2023, arXiv 2304.13007.

    >>> lm = scripted_lm([{"reasoning": "?", "answer": n} for n in (4, 5, 4)])
    >>> multi_chain_comparison("question -> answer: int", m=2)(lm, question="2+2?").answer
    4
    """
    made, options = _task(task, options)
    _at_least_one("m", m)
    others = Field("attempts", list[Any], "answers of others, some of which may be wrong")
    told = f"{made.instructions}\n\nWeigh the attempts against each other, then answer."
    weighing = made.append(others, to="inputs").with_instructions(told)
    attempt = chain_of_thought(made, name="attempt", **options)
    compare = chain_of_thought(weighing, name="compare", **options)

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        samples = [sampled(steps["attempt"], index, m) for index in range(m)]
        tried = yield from surviving([Run(one, inputs, "attempt") for one in samples])
        shown = [jsonable(dict(one)) for one in tried]
        return (yield steps.compare(**inputs, attempts=shown))

    known = {"attempt": attempt, "compare": compare}
    return _around(body, known, {"attempt": m}, inputs=made.inputs, name=name)


# -- combinators: programs side by side, over lists, with what they need --


@factory
def ensemble(
    programs: Iterable[Program],
    reduce: Callable[[list[Prediction]], Any] = vote,
    *,
    size: int | None = None,
    seed: int = 0,
    name: str = "ensemble",
) -> Program:
    """Make the program that runs several programs at once, and reduces what they predict to one.

    One that fails is left out, see `surviving`.

    Args:
        programs: one or more; their prompts stand under "p0", "p1" and so on.
        reduce: list of predictions -> a prediction, or any mapping of fields.
        size: run so many of them only, drawn for each input.
    Calls: those of the programs that run.

    >>> three = ensemble([predict("question -> answer")] * 3)
    >>> list(three.params)
    ['p0', 'p1', 'p2']
    """
    known = {f"p{place}": one for place, one in enumerate(programs)}
    count = len(known) if size is None else size
    if not 1 <= count <= len(known):
        todo = "pass programs, and a size of at most their number"
        raise SignatureError("wrong size of an ensemble", count, f"1 to {len(known)}", todo)

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        names = list(known)
        if count < len(names):
            rng = seeded(seed, "ensemble", canonical(inputs, other=repr))
            names = sorted(rng.sample(names, count), key=names.index)
        return reduce((yield from surviving([_fed(steps, one, inputs) for one in names])))

    dearest = sorted((one.max_calls for one in known.values()), reverse=True)
    return _around(body, known, max_calls=sum(dearest[:count]), name=name)


@factory
def parallel(**programs: Program) -> Program:
    """Make the program that runs several programs at once, and returns the fields of all.

    Each gets the inputs that it needs. The first error, in order, is raised.

    Raises:
        SignatureError: two make the same field.
    Calls: those of the programs.

    >>> both = parallel(topic=predict("text -> topic"), mood=predict("text -> mood"))
    >>> both(stub_lm(), text="Hello")
    Prediction(topic='text', mood='text')
    """
    made = Counter(concat(one.outputs for one in programs.values()))
    twice = [one for one, count in made.items() if count > 1]
    if twice:
        raise SignatureError("two programs make one field", twice[0], "different outputs", "rename")

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        return merge({}, *map(dict, (yield [_fed(steps, one, inputs) for one in programs])))

    return _around(body, programs, name="parallel")


@factory
def each(program: Program, field: str, *, most: int = 100, name: str = "each") -> Program:
    """Make the program that runs another on every item of a list, all at once.

    Its input `field` is a list, of `most` items at most; its outputs are lists, in the same order.
    The first error, in order, is raised.

    Raises:
        SignatureError: the program has no such input.
        DataError: (when it runs) too long a list.
    Calls: those of the program for each item.

    >>> labels = each(predict("text -> label"), "text")
    >>> labels(mock_lm(lambda i: {"label": i.text.upper()}), text=["a", "b"]).label
    ('A', 'B')
    """
    alone = _alone_in(program)
    if field not in program.takes:
        known = f"one of {', '.join(program.takes)}"
        raise SignatureError("no such input", field, known, "correct the name")
    _at_least_one("most", most)
    many = pytypes.GenericAlias(list, (program.takes[field].type,))
    takes = [evolve(one, type=many) if one.name == field else one for one in program.inputs]

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        items, step = list(inputs[field]), steps[program.name]
        if len(items) > most:
            raise DataError("too long a list", len(items), f"{most} items at most", "raise most")
        made = yield [Run(step, {**inputs, field: one}, program.name) for one in items]
        names = list(made[0]) if made else step.outputs
        return {one: tuple(result[one] for result in made) for one in names}

    return _around(body, alone, {program.name: most}, inputs=takes, name=name)


@factory
def retrieve(
    search: Callable[[str, int], Iterable[Any]], k: int = 3, *, name: str = "retrieve"
) -> Program:
    """Make the step that finds passages for a query: query -> passages.

    Args:
        search: (query, k) -> passages, the best first.
        k: how many; what is returned beyond that is left out.
    Calls: none.

    >>> find = retrieve(lambda query, k: [f"about {query}"], 1)
    >>> find(stub_lm(), query="tea").passages
    ('about tea',)
    """
    _at_least_one("k", k)

    def body(steps: Steps, /, query: str) -> Flow:
        found = yield Call(search, (query, k), {}, "search")
        return {"passages": tuple(found)[:k]}

    asked = Field("query", desc="what to look for")
    return program(inputs=[asked], outputs=["passages"], max_calls=0, name=name)(body)


def fitting(leaf: Program, examples: Dataset) -> tuple[Record, ...]:
    """Return those fields of examples that are a step's, as demonstrations of it.

    Left out is what has none of the step's outputs, or none of its inputs where it has some. A
    null or an empty cell is no value where the field's type has none. A `text` has none.

    >>> fitting(predict("q -> a"), [Record(q="2+2?", a="4", source="me"), Record(q="?")])
    (Record(q='2+2?', a='4'),)
    """
    task = leaf.signature
    if task is None or not leaf.max_calls:
        return ()
    types = {one.name: one.type for one in task.inputs + task.outputs}
    known = [
        Record({n: row[n] for n, tp in types.items() if n in row and not _is_blank(tp, row[n])})
        for row in examples
    ]
    inputs = {one.name for one in task.inputs}
    made = [row for row in known if row.keys() - inputs]
    return tuple(row for row in made if not inputs or row.keys() & inputs)


def _is_blank(tp: Any, value: Any) -> bool:
    return (value is None and not _takes_none(tp)) or (value == "" and not _free(tp))


Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""embed(texts) -> vectors, all of one length, such as an `embedder`."""


def knn_demos(
    program: Program, examples: Dataset, k: int, embed: Embed, *, name: str = "knn_demos"
) -> Program:
    """Make the program that runs another with the `k` examples that are most like the input.

    The examples are embedded now, the inputs when it runs. The nearest one stands last, where a
    model heeds it most. A step keeps its own demonstrations where no example fits it.

    Args:
        examples: with the inputs of the program, and outputs of its steps.
    Raises:
        DataError: there are no examples, or one lacks an input.
    Calls: those of the program; and one of `embed` now, one in each run.
    Reference: Liu et al. 2021, arXiv 2101.06804.

    >>> embed = lambda texts: [[one.count("dog"), one.count("cat")] for one in texts]
    >>> data = [{"animal": "dog", "sound": "woof"}, {"animal": "cat", "sound": "meow"}]
    >>> qa = knn_demos(predict("animal -> sound"), data, 1, embed)
    >>> qa(toy_lm(), animal="old cat").sound
    'meow'
    """
    _at_least_one("k", k)
    rows = _records(examples)
    if not rows:
        raise DataError("no examples", rows, "one or more", "add examples")
    texts = [_asked_text(program, row) for row in rows]
    vectors = list(map(unit, drive(_once(invoke(embed, texts)), None)))
    return _knn_demos(program, rows, vectors, k, embed, name)


@factory
def _knn_demos(
    program: Program, rows: Sequence[Record], vectors: list[Any], k: int, embed: Embed, name: str
) -> Program:
    """`knn_demos` with the vectors at hand: sent elsewhere, it embeds nothing anew."""

    def body(steps: Steps, /, **inputs: Any) -> Flow:
        step = steps[program.name]
        (vector,) = yield Call(embed, ([_asked_text(step, inputs)],), {}, "embed")
        likeness = [math.fsum(map(operator.mul, unit(vector), one)) for one in vectors]
        order = sorted(range(len(rows)), key=likeness.__getitem__, reverse=True)
        nearest = [rows[place] for place in reversed(order[:k])]
        changed = {
            path: evolve(prompt, demos=fitting(step.leaves[path], nearest) or prompt.demos)
            for path, prompt in step.params.items()
        }
        return (yield Run(step.with_params(changed), inputs, program.name))

    return _around(body, _alone_in(program), name=name)


def _asked_text(program: Program, example: Fields) -> str:
    """The inputs of a program, as the text that is embedded."""
    given = select_inputs(program, example)
    return "\n".join(f"{one.name}: {write(one.type, given[one.name])}" for one in program.inputs)


def unit(vector: Sequence[float]) -> tuple[float, ...]:
    """Return a vector of length 1 in the same direction; one of length 0 stays.

    >>> unit([3, 4])
    (0.6, 0.8)
    """
    length = math.hypot(*vector) or 1.0
    return tuple(one / length for one in vector)


# == 10. LMs =======================================================================================
# First those that need no network, then the wire.


class _Scripted:
    """Replies in order, for one program run at a time."""

    def __init__(self, replies: Iterable[Any]) -> None:
        self._replies, self._numbers = tuple(replies), itertools.count()

    def __reduce__(self) -> tuple[Any, ...]:
        what, todo = "replies in their order cannot go to several processes", "use mock_lm there"
        raise DataError(what, self._replies[:1], "an LM that answers by what it is asked", todo)

    def __call__(self, request: Request) -> Response:
        index = next(self._numbers)  # of several threads each gets its own
        if index < len(self._replies):
            return _answer(self._replies[index], request)
        asked = request.messages[-1].text if request.messages else ""
        problem = f"scripted_lm has given all of its {len(self._replies)} replies; one more request"
        raise ReplayMiss(problem, asked, "no further request", "script one more reply")


def _answer(answer: Any, request: Request) -> Response:
    """Make a response of a text, of fields in the format that was asked for, or of an error."""
    if isinstance(answer, BaseException):
        raise answer
    if isinstance(answer, Mapping):
        if request.signature is None or request.adapter is None:
            todo = "answer with a text or a Response"
            raise DataError("fields for a request without a step", answer, "text", todo)
        _check_outputs(request.signature, answer)
        usual = {one.name: one.default for one in request.signature.outputs if not one.required}
        answer = render_outputs(request.adapter, request.signature, {**usual, **answer})
    return answer if isinstance(answer, Response) else Response(str(answer))


def _check_outputs(task: Signature, answer: Fields) -> None:
    missing = [one.name for one in task.outputs if one.required and one.name not in answer]
    unknown = [name for name in answer if name not in task.wanted]
    wrong = [f"lacks {', '.join(missing)}"] if missing else []
    wrong += [f"has {', '.join(unknown)}, which the step does not ask for"] if unknown else []
    if wrong:
        expected = f"the fields {', '.join(task.wanted)}"
        what = f"the scripted reply {' and '.join(wrong)}"
        raise DataError(what, dict(answer), expected, "correct the names")


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
    return _answer(function(request.inputs), request)


def stub_lm() -> LM:
    """Make an LM that answers every step with sample values of the types it asks for.

    >>> predict("text -> tags: list[int]")(stub_lm(), text="hello").tags
    [1]
    """
    return _stub


def _stub(request: Request) -> Response:
    if request.signature is None:
        return Response("text")
    return _answer({one.name: sample(one.type) for one in request.signature.outputs}, request)


def toy_lm(*, seed: int = 0) -> LM:
    """Make a small LM that really learns in context, from nothing but the messages it is sent.

    It knows the `chat` format and no data. For each output field it weighs the values that it sees:
    those of the demonstrations, by how alike their words are to the question's, rare and long
    words counting more; those of rules in the instructions (a line like: if the text mentions
    "refund", answer "billing"); and the allowed values of the type. With a temperature, or without
    one but with a `rollout`, it samples. Good for teaching and for tests of optimizers; no stand-in
    for a real LM.

    Equal requests get equal answers.

    >>> qa = predict("animal -> sound").with_params(
    ...     {"predict": Prompt(demos=[{"animal": "a big dog", "sound": "woof"}])}
    ... )
    >>> qa(toy_lm(), animal="my dog").sound
    'woof'
    """
    return _Toy(seed)


@frozen
class _Toy:
    seed: int

    @property
    def identity(self) -> str:
        return f"toy/{self.seed}"

    def __call__(self, request: Request) -> Response:
        system, said = _apart(request)
        turns = [one.text for one in said] or [""]
        asking = [n for n in range(0, len(turns), 2) if "[[ ##" in turns[n]]
        last = asking[-1] if asking else len(turns) - 1
        demos = [_toy_demo(given, made) for given, made in partition(2, turns[:last])]
        question = _toy_question(turns[last])
        asked = _toy_words(question)
        alike = _toy_alike(asked, tuple(known for known, _ in demos))
        found = _toy_rules((system or "").rpartition("Instructions:")[2])
        rules = [(answer, 4.0) for signs, answer in found if any(one <= asked for one in signs)]
        fields = re.findall(_TOY_FIELD, (system or "").partition("Output fields:")[2])
        reply: dict[str, str] = {}
        for name, kind in fields:
            shown = [made.get(name, _UNKNOWN) for _, made in demos]
            seen = [*(rules if name == fields[-1][0] else ()), *zip(shown, alike, strict=True)]
            if name == "instructions":
                reply[name] = self._write(request, sections(turns[last]))
            elif votes := _toy_votes(kind, asked, seen):
                reply[name] = self._sample(request, votes)
            else:
                reply[name] = _toy_guess(kind, question)
        text = _CHAT.reply(_CHAT, _toy_task(tuple(reply)), reply) if reply else question
        read_ = sum(one.text.count(" ") + 1 for one in request.messages)
        return Response(text, usage=Usage(1, read_, text.count(" ") + 1), model="toy")

    def _sample(self, request: Request, votes: Mapping[str, float]) -> str:
        usual = float(request.rollout != 0)
        spread = usual if request.temperature is None else request.temperature
        top = max(votes, key=lambda value: votes[value])
        if spread <= 0:
            return top
        weights = [(weight / votes[top]) ** (2 / spread) for weight in votes.values()]
        return seeded(self.seed, "toy", request.key).choices(list(votes), weights)[0]

    def _write(self, request: Request, given: Mapping[str, str]) -> str:
        """Write instructions: the current ones, and a rule for each answer that cases expect."""
        rng = seeded(self.seed, "write", request.key)
        words_of: dict[str, Counter[str]] = {}
        read_ = concat(map(_loaded, given.values()))
        for case in concat(one for one in read_ if isinstance(one, list)):
            if isinstance(case, dict) and case.get("expected"):
                answer = str(list(case["expected"].values())[-1])
                shown = " ".join(map(str, dict(case.get("inputs") or {}).values())).lower()
                found = set(re.findall(r"[^\W\d_]{3,}", shown))
                words_of.setdefault(answer, Counter()).update(found)
        lines = given.get("current", "").splitlines()
        for answer, counts in words_of.items():
            others = sum((one for label, one in words_of.items() if label != answer), Counter())
            words = ((n - 2 * others[word], len(word), word) for word, n in counts.items())
            best = [word for gain, _, word in sorted(words, reverse=True) if gain > 0][:4]
            chosen = sorted(rng.sample(best, min(3, len(best))))
            signs = " or ".join(f'"{word}"' for word in chosen)
            rule = f'If the text mentions {signs}, answer "{answer}".'
            lines += [rule] if signs and rule not in lines else []
        return "\n".join(lines)


_TOY_FIELD = r"(?m)^\d+\. `(\w+)` \((.*?)(?:, as JSON)?\)(?::|$)"


@lru_cache(maxsize=256)
def _toy_task(names: tuple[str, ...]) -> Signature:
    return Signature((), list(map(Field, names)))


def _toy_question(turn: str) -> str:
    """The inputs in the last message, without the sentence that asks for a reply."""
    rest, _, ending = turn.rpartition("\n")
    text = rest if ending.startswith("Reply ") else turn
    return " ".join(sections(text).values()) or text


@lru_cache(maxsize=4096)
def _toy_demo(given: str, made: str) -> tuple[frozenset[str], dict[str, str]]:
    """The words and the outputs of a demonstration."""
    outputs = sections(made)
    return _toy_words(*sections(given).values(), *outputs.values()), outputs


def _toy_words(*texts: str) -> frozenset[str]:
    """The first letters of each word, which most of its forms share."""
    return frozenset(word[:5] for text in texts for word in re.findall(r"[^\W_]+", text.lower()))


def _toy_alike(asked: frozenset[str], known: tuple[frozenset[str], ...]) -> list[float]:
    """Weigh how alike each demonstration is: shared words, rare and long ones more, in a cosine."""
    rare, sizes = _toy_rare(known)
    shared = [math.fsum([rare[word] for word in asked & one]) for one in known]
    return [(common / size) ** 1.5 for common, size in zip(shared, sizes, strict=True)]


@lru_cache(maxsize=256)
def _toy_rare(known: tuple[frozenset[str], ...]) -> tuple[dict[str, float], list[float]]:
    """What each word of the demonstrations weighs, and each of them."""
    rare = {
        word: math.log((len(known) + 1) / (n + 0.5)) * max(len(word) - 2, 0.2)
        for word, n in Counter(concat(known)).items()
    }
    return rare, [math.sqrt(math.fsum([rare[word] for word in one]) or 1) for one in known]


@lru_cache(maxsize=256)
def _toy_rules(instructions: str) -> list[tuple[list[frozenset[str]], str]]:
    """Find the rules: in a line, the last quoted text is the answer to each of the others."""
    quoted = [re.findall(r'"([^"]+)"', line) for line in instructions.splitlines()]
    return [(list(map(_toy_words, signs)), answer) for *signs, answer in filter(None, quoted)]


def _toy_votes(
    kind: str, asked: frozenset[str], seen: Iterable[tuple[str, float]]
) -> dict[str, float]:
    """Weigh the values seen, and a little each allowed one, more if the question has its words."""
    closed = kind.startswith("one of ")
    allowed = jsonlib.loads(f"[{kind.removeprefix('one of ')}]") if closed else []
    votes = {one: 0.01 + 0.1 * len(_toy_words(one) & asked) for one in map(str, allowed)}
    for value, weight in seen:
        if value in votes or not (closed or value == _UNKNOWN):
            votes[value] = votes.get(value, 0.01) + weight
    return votes


def _toy_guess(kind: str, question: str) -> str:
    """Answer with nothing to go by: a number of the question, or its first words."""
    if kind == "str":
        return " ".join(question.split()[:8])
    if kind in ("int", "float"):
        return str(first([*re.findall(r"\d+", question), "0"]))
    empty = {"l": "[]", "d": "{}"}.get(kind[:1], "null")
    return "false" if kind == "true or false" else empty


# -- the wire: one exchange is a flow, whose effect is a call of the end point --

_COMPACT = jsonlib.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=jsonable)
_SECRET = "(?i)auth|key|token|secret|cookie"


class _Hidden(dict[str, str]):
    """Headers with a key, which no frame, log or report shows."""

    def __repr__(self) -> str:
        return "***"


@frozen(eq=False, repr=False)
class _Endpoint:
    """Where to post JSON, and idle clients to do it with: called, it posts; awaited, it does too.

    One client for each call under way, kept alive between calls: a shared one slows down with the
    number of connections. Clients are made where they are used, never sent to another process.
    """

    url: str
    key: str | Callable[[], str] | None
    key_name: str
    headers: Record
    timeout: float
    client: Any
    signs: Record = Record({"Authorization": "Bearer {}"})  # our own headers: the key is put in
    # By process or event loop: clients, and what closes them when the loop ends.
    _idle: dict[Any, tuple[deque[Any], Any]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        weakref.finalize(self, _close, self._idle)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without secrets: a key is looked up again where it arrives."""
        headers = {n: text for n, text in self.headers.items() if not re.search(_SECRET, n)}
        secret = isinstance(self.key, str) or len(headers) < len(self.headers)
        key = partial(_lost_key, self.key_name) if secret else self.key
        kept = self.url, key, self.key_name, Record(headers), self.timeout, self.client, self.signs
        return type(self), kept

    def __deepcopy__(self, memo: Any) -> _Endpoint:
        return self

    @property
    def name(self) -> str:
        """The URL without what may be secret in it."""
        return re.sub(r"(?<=//)[^/@]*@|\?.*", "", self.url)

    def close(self) -> None:
        _close(self._idle)

    def exchange(self, payload: Any, take: Callable[[str], None] | None = None) -> Flow:
        """Post JSON; return the body of the answer, without secrets.

        Where the answer is a stream, the data of each event goes to `take` as it arrives.
        """
        headers, hide = self._headers()
        content = _encodable(_COMPACT.encode(payload)).encode()
        feed = take and _events(lambda data: take(data if _is_good(data) else hide(data)))
        answer = yield Call(self, (hide, content, headers, feed))
        if isinstance(answer, LMError):
            raise answer
        return answer

    def read(self, body: bytes, decode: Callable[[Any], T]) -> T:
        """Decode the body of an answer; what cannot be read is the provider's error."""
        try:
            data = jsonlib.loads(body)
            if (error := _fault(data)) is None:
                return decode(data)
            raise _said_error(self.name, error)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            kind = type(error).__name__
        # Out here, so that no error with the whole body hangs on it.
        text = self._headers()[1](body.decode("utf-8", "backslashreplace"))
        what = f"{self.name} sent an answer that cannot be read ({kind})"
        facts = {"status": 200, "body": cut(text), "retryable": True}
        expected, todo = "a completion as JSON in UTF-8", "ask again, or check base_url"
        raise LMError(what, text, expected, todo, **facts)

    def _headers(self) -> tuple[dict[str, str], Callable[[str], str]]:
        """The headers of a request, and what hides the secrets in a text."""
        given = {name.lower() for name in self.headers}
        key = "" if "authorization" in given else self._key()
        own = {n: form.format(key) for n, form in self.signs.items() if key or "{}" not in form}
        ours = {"Content-Type": "application/json", **own}
        kept = {name: text for name, text in ours.items() if name.lower() not in given}
        both = {**own, **self.headers}
        secrets = [str(text) for name, text in both.items() if re.search(_SECRET, name)]
        return _Hidden({**kept, **self.headers}), lambda text: _hide(secrets, text)

    def _key(self) -> str:
        given = self.key() if callable(self.key) else self.key
        key = (given or os.environ.get(self.key_name) or "").strip()
        if self.key_name and not key:
            todo = f"set it, or pass api_key= to the LM of {self.name}"
            raise Unauthorized("no API key", self.key_name, "an API key", todo)
        return key

    def __call__(self, *posted: Any) -> Any:
        """Post, in this thread; return what `_post` does."""
        import httpx

        if isinstance(self.client, httpx.AsyncClient):
            raise DataError("this client needs an event loop", self.client, "a Client", "use acall")
        idle, _ = self._idle.setdefault(os.getpid(), (deque(), None))
        post: Any = self._post(idle, httpx.Client, *posted)
        return _resume(post)[1]  # at its end: with a plain client it waits for nothing

    async def acall(self, *posted: Any) -> Any:
        """Post, in the running event loop."""
        import asyncio

        import httpx

        if isinstance(self.client, httpx.Client):
            todo = "call it outside of the loop"
            raise DataError("this client blocks an event loop", self.client, "AsyncClient", todo)
        loop = asyncio.get_running_loop()
        if loop not in self._idle:
            for other in [one for one in self._idle if getattr(one, "is_closed", bool)()]:
                del self._idle[other]  # which was closed without `asyncio.run`
            self._idle[loop] = deque(), _keeper(self._idle, loop)
            await anext(self._idle[loop][1])
        return await self._post(self._idle[loop][0], httpx.AsyncClient, *posted)

    async def _post(self, idle: deque[Any], kind: Any, hide: Any, *asked: Any) -> bytes | LMError:
        """Post; return the body of the answer, or the error: no frame shall hold one with a key."""
        import httpx

        try:
            client, used = idle.pop(), True
        except IndexError:
            limits, trusted = httpx.Limits(keepalive_expiry=60.0), httpx.create_ssl_context
            client = self.client or kind(limits=limits, verify=_once_made(trusted))
            used = False
        try:
            status, wait, body = await self._answer(client, used, *asked)
        except (httpx.RequestError, httpx.InvalidURL) as error:  # its connection is closed
            return self._unreached(error, hide)
        if client is not self.client:
            idle.append(client)
        if status != 200:
            return _http_error(self.name, status, wait, hide(body.decode("utf-8", "replace")))
        text = body.decode("latin-1")  # as bytes are
        return body if _is_good(text) else hide(text).encode("latin-1")

    async def _answer(
        self, client: Any, used: bool, content: bytes, headers: dict[str, str], feed: Any
    ) -> tuple[int, float | None, bytes]:
        """Send a request, on to where the server says; return status, Retry-After and body."""
        import httpx

        url = _once_made(httpx.URL, self.url)
        for _ in range(_MOVES):
            response = await _send(client, used, self._request(client, url, content, headers))
            body = await _body(response, feed)
            if (place := _moved(response)) is None:
                return response.status_code, _delay(response.headers), body
            url = place
        return response.status_code, None, b"moved too often"

    def _request(self, client: Any, url: httpx.URL, content: bytes, headers: dict[str, str]) -> Any:
        import httpx

        try:
            if client is self.client:
                return client.build_request("POST", url, content=content, headers=headers)
            # Our own clients have no settings to merge, which takes as long as all the rest of it.
            extensions = {"timeout": httpx.Timeout(self.timeout).as_dict()}
            known = {**_HEADERS, **headers}
            return httpx.Request("POST", url, content=content, headers=known, extensions=extensions)
        except UnicodeError as error:
            raise httpx.LocalProtocolError(str(error)) from None

    def _unreached(self, error: Exception, hide: Callable[[str], str]) -> LMError:
        """The error of a request that got no answer: whether asking again may help."""
        import httpx

        kind = type(error).__name__
        if isinstance(error, httpx.TimeoutException):
            what, expected = f"{self.name} did not answer in time", f"an answer in {self.timeout} s"
            todo = "ask again, with a longer timeout or fewer calls at once (concurrency)"
            return LMTimeout(what, kind, expected, todo, retryable=True)
        what, expected, todo = _UNREACHED.get(kind, _UNREACHED["other"])
        passing = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)
        parts = f"{what.format(self.name)} ({kind})", hide(str(error)), expected, todo
        return LMError(*parts, retryable=isinstance(error, passing))


# What went wrong, what was expected and what to do, by the name of httpx's error.
_UNREACHED = {
    "DecodingError": (
        "{} sent what cannot be decompressed", "gzip, deflate or plain", "see the server"),
    "LocalProtocolError": (
        "a request to {} cannot be sent", "headers in one line of ASCII",
        "correct the key or headers"),
    "other": (
        "{} cannot be reached", "an HTTP answer", "see that it runs, and that base_url is right"),
}  # fmt: skip
_ERROR = r'"error"\s*:(?!\s*null)'  # good answers may have one that is null


def _is_good(data: str) -> bool:
    """Whether this is an answer, or the data of an event of one, which is left as it is."""
    return data.lstrip().startswith("{") and not re.search(_ERROR, data)


_MOVES = 4  # how many times a request is sent on to where the server says


async def _send(client: Any, used: bool, request: httpx.Request) -> Any:
    """Send a request; again where a connection that was used before ended without an answer."""
    import httpx

    async def send() -> Any:
        made = client.send(request, stream=True)
        return await made if inspect.isawaitable(made) else made

    began = time.perf_counter()
    try:
        return await send()
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        if not used or time.perf_counter() - began > 1.0:  # the server may have worked on it
            raise
    return await send()


async def _body(response: httpx.Response, feed: Callable[[bytes], bool] | None) -> bytes:
    """Read the body of an answer; a stream is fed to who asked for one, until that was all."""
    import httpx

    pieces: list[bytes] = []
    kind = response.headers.get("content-type", "")
    streams = response.status_code == 200 and kind.startswith("text/event-stream")
    take: Callable[[bytes], Any] = feed if feed and streams else pieces.append
    if isinstance(response.stream, httpx.SyncByteStream):
        with closing(response):
            any(map(take, response.iter_bytes()))
    else:
        async with aclosing(response):
            async for piece in response.aiter_bytes():
                if take(piece):
                    break
    return b"".join(pieces)


def _moved(response: httpx.Response) -> httpx.URL | None:
    """Where a request is to be sent instead: at the same origin only, as it has a key."""
    if response.status_code not in (307, 308):
        return None
    here, place = response.url, response.url.join(response.headers.get("location", ""))
    same = (place.scheme, place.host, place.port) == (here.scheme, here.host, here.port)
    return place if same else None


def _delay(headers: Mapping[str, str]) -> float | None:
    """How many seconds the provider asks to wait; it says milliseconds, seconds or a date."""
    from email.utils import parsedate_to_datetime

    after = headers.get("retry-after", "")
    with suppress(ValueError, LookupError):
        after = str(float(headers["retry-after-ms"]) / 1000)
    with suppress(ValueError):
        return max(0.0, float(after))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    return None


_HEADERS = {"Accept-Encoding": "gzip, deflate", "User-Agent": f"lmopt/{__version__}"}


@lru_cache(maxsize=64)
def _once_made(make: Callable[..., Any], *given: Any) -> Any:
    """What a function makes of this, made once: URLs and certificates take longer than a call."""
    return make(*given)


async def _keeper(idle: dict[Any, tuple[deque[Any], Any]], loop: Any) -> AsyncIterator[None]:
    """Close the clients of an event loop when it ends: `asyncio.run` closes all generators then."""
    try:
        yield
    finally:
        for client in idle.pop(loop)[0]:
            await client.aclose()


def _close(idle: dict[Any, tuple[deque[Any], Any]]) -> None:
    clients, _ = idle.get(os.getpid(), (deque(), None))
    while clients:
        clients.pop().close()


def _lost_key(name: str) -> str:
    """Stand for a key that did not travel with a pickled LM."""
    if name in os.environ:
        return os.environ[name]
    todo = f"set {name or 'no secret header'}, or pass api_key=FUNCTION, which is called there"
    raise Unauthorized("the API key does not travel to other processes", name, "a key", todo)


def _hide(secrets: Iterable[str], text: str) -> str:
    """Blot secrets out of a text, piece by piece: a line break inside may be shown escaped."""
    for piece in concat(secret.split() for secret in secrets):
        if len(piece) >= 8:  # shorter ones are names like "none", and parts of many words
            text = text.replace(piece, "***")
    return text


def _http_error(url: str, status: int, wait: float | None, text: str) -> LMError:
    """Map a failed HTTP answer to the error of whose fault it is."""
    kinds: dict[int, tuple[type[LMError], str]] = {
        401: (Unauthorized, "check the API key"),
        403: (Unauthorized, "check what the API key may do"),
        408: (LMTimeout, "ask again"),
        429: (RateLimited, "wait, or raise the quota"),
    }
    kind, todo = kinds.get(status, (LMError, "ask again" if status >= 500 else "see the answer"))
    if status in (400, 413, 422, 500) and re.search(_TOO_LONG, text, re.IGNORECASE):
        kind, todo = ContextWindowExceeded, "shorten the prompt: fewer or shorter demonstrations"
    passes = (status in (408, 409, 429) or status >= 500) and "insufficient_quota" not in text
    retryable = passes and kind is not ContextWindowExceeded
    problem = explain(f"{url} answered {status}", text, "200", todo)
    return kind(problem, status=status, body=cut(text), retryable=retryable, retry_after=wait)


# In the words of OpenAI, vLLM, llama.cpp, Anthropic, Gemini, Groq and others.
_TOO_LONG = (
    r"context.?(length|window|size)|(prompt|input|messages?)\b.{0,40}?\btoo (long|large)"
    r"|input token count|reduce the length of the (messages|prompt|input)"
)


def _fault(data: Any) -> Any:
    """The error that an answer, or one of its events, holds in place of a completion, or None."""
    if isinstance(data, list):
        return next(filter(None, map(_fault, data)), None)
    if not isinstance(data, dict):
        return None
    if data.get("type") == "error" and "message" in data:
        return data
    inside = [data.get("response"), get_in(["choices", 0], data)]  # a whole answer in an event
    return data.get("error") or _fault(inside)


def _said_error(url: str, error: Any) -> LMError:
    """The error that came with status 200, or in the midst of a stream."""
    known = error if isinstance(error, dict) else {}
    kinds = [str(known.get(name)) for name in ("code", "type", "status")]
    codes = [int(one) for one in kinds if one.isdecimal()]
    status = first([*codes, *(_STATUS[one] for one in kinds if one in _STATUS), 500])
    return _http_error(url, status, None, _dump(error))


# What an error in the midst of an answer would have been as a status.
_STATUS = {"overloaded_error": 529, "rate_limit_error": 429, "rate_limit_exceeded": 429}
_STATUS |= {"authentication_error": 401, "permission_error": 403, "invalid_request_error": 400}
_STATUS |= {"RESOURCE_EXHAUSTED": 429, "INVALID_ARGUMENT": 400, "UNAUTHENTICATED": 401}
_STATUS |= {"exceed_context_size_error": 400, "invalid_api_key": 401, "not_found_error": 404}


def _priced(spent: Usage, price: tuple[float, ...]) -> Usage:
    # What was cached costs its own price, if it has one.
    read_, made, again = (*price, price[0])[:3]
    fresh = spent.input_tokens - spent.cached_tokens
    cost = fresh * read_ + spent.cached_tokens * again + spent.output_tokens * made
    return evolve(spent, cost=cost / 1e6)


@frozen(eq=False, repr=False)
class _Dialect:
    """How a provider writes requests and answers: pure functions, tested without sockets."""

    tool: Callable[[Tool], dict[str, Any]]
    write: Callable[[Request], dict[str, Any]]  # what of a request it writes in its own way
    answer: Callable[[Any], dict[str, Any]]  # the fields of a response that it tells in its own way
    piece: Callable[[Any], str]  # the text in one event
    assemble: Callable[[list[Any]], Any]  # all events into the answer without a stream
    limit: str = "max_tokens"  # its name of it
    stream: Record = Record(stream=True)  # what a request adds that asks for a stream of events

    def encode(self, request: Request) -> dict[str, Any]:
        tools = [self.tool(one) if isinstance(one, Tool) else one for one in request.tools]
        options = {
            "model": request.model,
            "temperature": request.temperature,
            self.limit: request.max_tokens,
            "top_p": request.top_p,
            "tools": tools or None,
            "tool_choice": request.tool_choice,
            **self.write(request),
        }
        given: dict[str, Any] = valfilter(lambda value: value is not None, options)
        return given | dict(request.extra)

    def named(self, known: dict[str, Any], request: Request) -> dict[str, Any]:
        """The body of a request; of two names of the token limit, that of the request's wins."""
        asked = self.encode(request)
        if any(name in asked for name in _LIMITS):
            known = keyfilter(lambda name: name not in _LIMITS, known)
        return {**known, **asked}

    def decode(self, data: Any) -> Response:
        fields = self.answer(data)
        return Response(**fields, usage=_spent(data.get("usage")), model=data.get("model") or "")


def _spent(told: Any) -> Usage:
    """What an answer cost, in the words of any dialect."""

    def count(*names: str) -> int:
        return sum(int(get_in(name.split("."), told) or 0) for name in names)

    again, beside = "cache_read_input_tokens", "cache_creation_input_tokens"
    return Usage(
        calls=1,
        input_tokens=count("prompt_tokens") or count("input_tokens", again, beside),
        output_tokens=count("completion_tokens") or count("output_tokens"),
        cached_tokens=count("prompt_tokens_details.cached_tokens")
        or count("input_tokens_details.cached_tokens", again),
        cost=float(get_in(["cost"], told) or 0.0),  # OpenRouter tells
    )


_LIMITS = ("max_tokens", "max_completion_tokens")


def _limit_renamed(payload: dict[str, Any], error: LMError) -> dict[str, Any]:
    """The body with the other name of the token limit, where the server does not know this one."""
    for name, other in (_LIMITS, _LIMITS[::-1]):
        if error.status in (400, 422) and name in payload and other in error.body:
            return {other if key == name else key: value for key, value in payload.items()}
    raise error


def _thought_apart(response: Response, request: Request) -> Response:
    """The response with a thought before the answer as its reasoning, where a provider left it."""
    found = re.match(r"\s*<think>(.*?)</think>\s*", response.text, re.DOTALL)
    asked_for = request.signature is not None and "think" in request.signature.shown
    if not found or asked_for or response.reasoning:
        return response
    return evolve(response, text=response.text[found.end() :], reasoning=found[1].strip())


_ALIKE = "several samples of one prompt are asked for at temperature 0, where they are all alike"


class _Flowing:
    """What a flow does: called, in this thread; with `acall`, in the running event loop."""

    __slots__ = ()
    flow: Any
    concurrency: int = 1
    asks: Any = None  # the LM of the requests in the flow

    def __call__(self, *given: Any) -> Any:
        return _Here(self.asks, self.concurrency).drive(self.flow(*given))

    async def acall(self, *given: Any) -> Any:
        """Do the same in the running event loop."""
        return await _There(self.asks).drive(self.flow(*given))


@frozen(eq=False, repr=False)
class _Wired(_Flowing):
    """A model behind an end point."""

    kind: typing.ClassVar[str] = "LM"
    end: _Endpoint
    model: str
    defaults: Record
    concurrency: int

    @property
    def url(self) -> str:
        """Where it posts, without what may be secret in it."""
        return self.end.name

    def __repr__(self) -> str:
        return f"<{self.kind} {self.model} at {self.url}>"

    def close(self) -> None:
        """Close the idle connections; the next call opens new ones."""
        self.end.close()


@frozen(eq=False, repr=False)
class _HttpLM(_Wired):
    """An LM behind a URL: an end point and a dialect."""

    dialect: _Dialect
    price: tuple[float, ...] | None

    @property
    def identity(self) -> str:
        """What beside a request decides the answer: end point, model and defaults."""
        query = self.end.url.partition("?")[2]
        place = f"{self.url}?{_sha256(query)[:12]}" if query else self.url  # it may hold a key
        return canonical([place, self.model, self.defaults])

    def flow(self, request: Request) -> Flow:
        payload = self.dialect.named({"model": self.model, **self.defaults}, request)
        if request.rollout and payload.get("temperature") == 0:
            warnings.warn(_ALIKE, stacklevel=2)  # Python says it once
        take, events = None, list[Any]()
        decode: Callable[[Any], Response] = self.dialect.decode
        if request.on_text is not None:
            request.on_text("")  # a new answer begins
            payload |= self.dialect.stream
            take = self._taking(events, request.on_text)
        try:
            body = yield from self.end.exchange(payload, take)
        except LMError as error:
            body = yield from self.end.exchange(_limit_renamed(payload, error), take)
        if take and not body:  # who was asked for a stream may answer without
            body, decode = _dump(events).encode(), self._whole
        response = _thought_apart(self.end.read(body, decode), request)
        if self.price is None:
            return response
        return evolve(response, usage=_priced(response.usage, self.price))

    def _taking(self, events: list[Any], on_text: Callable[[str], None]) -> Callable[[str], None]:
        """Make what keeps events, and tells their text, characters cut in halves put together."""
        decoder = codecs.getincrementaldecoder("utf-16-le")("surrogatepass")

        def take(data: str) -> None:
            try:
                event = _DONE if data == "[DONE]" else jsonlib.loads(data)
                piece = self.dialect.piece(event).encode("utf-16-le", "surrogatepass")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                event, piece = {"error": data}, b""
            events.append(event)
            if text := decoder.decode(piece):
                on_text(text)

        return take

    def _whole(self, events: list[Any]) -> Response:
        """Read a stream, as JSON once more: halves of characters that were sent apart are one."""
        answer = self.dialect.assemble(events)
        return self.dialect.decode(jsonlib.loads(jsonlib.dumps(answer)))


_DONE = {"type": "[DONE]"}  # what ends a stream, as an event


def _events(take: Callable[[str], None]) -> Callable[[bytes], bool]:
    """Make what splits server-sent events, however they are cut, and gives the data of each.

    It says whether the last one has come.

    Reference: the event stream format of the HTML standard, section 9.2.
    """

    def split() -> Generator[bool, bytes, None]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        decode = io.IncrementalNewlineDecoder(decoder, translate=True).decode
        fields, begun, ended = dict[str, list[str]](), list[str](), False
        while True:
            *lines, rest = decode((yield ended)).split("\n")
            for last in lines:
                line, begun = "".join((*begun, last)), []
                name, _, value = line.partition(":")
                if line:
                    fields.setdefault(name, []).append(value.removeprefix(" "))
                    continue
                text, kind, fields = "\n".join(fields.get("data", ())), fields.get("event"), {}
                ended = ended or text.strip() == "[DONE]"
                if kind == ["error"] and '"error"' not in text:
                    text = _dump({"error": first([*_loaded(text), text])})
                if text:
                    take(text.strip() if ended else text)
            begun.append(rest)

    running = split()
    next(running)
    return running.send


# -- three dialects: chat completions, Responses, and that of Anthropic --


def _apart(request: Request) -> tuple[str | None, list[Message]]:
    """The text of the system, and the other messages."""
    kinds = groupby(lambda one: one.role == "system", request.messages)
    return "\n\n".join(one.text for one in kinds.get(True, ())) or None, kinds.get(False, [])


def _in_parts(one: Message, text: str, media: Callable[[Media], Any]) -> Any:
    """The content of a message: its text, or that and its media, each a part."""
    if one.text is one.content:
        return one.text
    return [{"type": text, "text": one.text}, *map(media, one.content[1:])]


def _attached(calls: Iterable[ToolCall], kind: str, what: Any) -> tuple[ToolCall, ...]:
    """The calls of a message, the first of them with what this dialect attached to the message."""
    made = tuple(calls)
    if not made or not what:
        return made
    return evolve(made[0], attached=made[0].attached | {kind: what}), *made[1:]


def _detached(one: Message, kind: str) -> list[Any]:
    return [call.attached[kind] for call in one.tool_calls if kind in call.attached]


def _inline(one: Media) -> tuple[str, str]:
    """The media type and the base64 text of a data URI."""
    head, _, data = one.url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        what, todo = f"{one.kind} by URL cannot be sent", f"use {type(one).__name__}.from_path"
        raise DataError(what, one.url, "a data URI in base64", todo)
    return head.removeprefix("data:").removesuffix(";base64"), data


def _openai_tool(one: Tool) -> dict[str, Any]:
    function = {"name": one.name, "description": one.desc, "parameters": one.schema}
    return {"type": "function", "function": function}


def _openai_write(request: Request) -> dict[str, Any]:
    form = {"name": "reply", "strict": True, "schema": request.schema}
    return {
        "messages": [_openai_message(one) for one in request.messages],
        "stop": list(request.stop) or None,
        "seed": request.rollout or None,  # else the samples of a prompt are one and the same
        "response_format": {"type": "json_schema", "json_schema": form} if request.schema else None,
    }


def _openai_message(one: Message) -> dict[str, Any]:
    calls = [
        {
            **keyfilter(lambda name: name not in _OF_MESSAGE, dict(call.attached)),
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments.to_json()},
        }
        for call in one.tool_calls
    ]
    made = {"role": one.role, "content": _in_parts(one, "text", _openai_media)}
    more = {"tool_calls": calls, "tool_call_id": one.tool_call_id}
    return {**merge(*_detached(one, "message"), made), **valfilter(bool, more)}


def _openai_media(one: Media) -> dict[str, Any]:
    if isinstance(one, Image):
        return {"type": "image_url", "image_url": {"url": one.url}}
    kind, data = _inline(one)
    if isinstance(one, Audio):
        form = kind.partition("/")[2].removeprefix("x-")
        return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
    return {"type": "file", "file": {"filename": one.name or "file", "file_data": one.url}}


def _openai_answer(data: Any) -> dict[str, Any]:
    choice = data["choices"][0]
    message = choice["message"]
    said, thought = _parted(message.get("content") or message.get("refusal"))
    wanted_back = {n: message[n] for n in _WANTED_BACK if message.get(n)}
    called = message.get("tool_calls") or ()
    calls = [_openai_call(one.get("id"), one["function"], one) for one in called]
    return {
        "text": said,
        "tool_calls": _attached(calls, "message", wanted_back),
        "finish_reason": "refusal" if message.get("refusal") else choice.get("finish_reason"),
        "reasoning": message.get("reasoning_content") or message.get("reasoning") or thought,
        "logprobs": choice.get("logprobs"),
    }


# What DeepSeek and OpenRouter attach to a message with calls, and want back with it.
_WANTED_BACK = ("reasoning_content", "reasoning_details")


def _parted(content: Any) -> tuple[str, str]:
    """The text and the thoughts of a content, which may be a list of parts."""
    kinds = groupby(lambda part: part["type"] == "thinking", _as_parts(content) or ())
    thoughts = [_parted(part["thinking"])[0] for part in kinds.get(True, ())]
    return "".join(part["text"] for part in kinds.get(False, ())), "".join(thoughts)


def _as_parts(content: Any) -> Any:
    if content and isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content


def _openai_call(ident: str | None, called: Any, told: Any) -> ToolCall:
    said = called.get("arguments") or "{}"
    given = said if isinstance(said, dict) else first(_meant(dict, said, ""))
    # What is no object cannot be told from a wrong argument: the tool will say what it expects.
    arguments = given if isinstance(given, dict) else {"arguments": said}
    attached = keyfilter(lambda name: name not in _OF_CALL, told)
    return ToolCall(ident or "", called["name"], arguments, attached)


_OF_CALL = ("id", "type", "index", "function")
_OF_MESSAGE = ("message", "anthropic", "responses")  # attached to the message of the call


def _openai_piece(event: Any) -> str:
    choices = event.get("choices")
    return _parted((choices[0].get("delta") or {}).get("content"))[0] if choices else ""


def _openai_assemble(events: list[Any]) -> Any:
    """Put the events of a stream together to the answer without a stream."""
    every = concat(one.get("choices") or () for one in events)
    choices = [one for one in every if not one.get("index")]  # the first of several
    ends = [one["finish_reason"] for one in choices if one.get("finish_reason")]
    if not ends and _DONE not in events:
        raise ValueError("the stream ended early")
    deltas = [one.get("delta") or {} for one in choices]
    if any(isinstance(one.get("content"), list) for one in deltas):
        deltas = [{**one, "content": _as_parts(one.get("content"))} for one in deltas]
    message = _added([{}, *deltas])
    message["tool_calls"] = _openai_calls(message.get("tool_calls") or ())
    logprobs = _added(one.get("logprobs") for one in choices)
    choice = {"message": message, "finish_reason": first([*ends[-1:], None]), "logprobs": logprobs}
    last_of = {name: one[name] for one in events for name in ("model", "usage") if one.get(name)}
    return {"choices": [choice], **last_of}


def _added(deltas: Iterable[Any]) -> Any:
    """Add deltas up: texts and lists are joined, objects field by field; of others the last."""
    every = list(deltas)
    told = [one for one in every if one not in (None, "", [])]
    kinds = set(map(type, told))
    if kinds == {dict}:
        return merge_with(_added, *told)
    if kinds == {list}:
        return list(concat(told))
    return "".join(told) if kinds == {str} else first([*told[-1:], *every[-1:], None])


def _openai_calls(parts: Iterable[Any]) -> list[Any]:
    """Put the pieces of calls together: by id, or by index, which may be the same for all."""
    calls: list[dict[str, Any]] = []
    under_way: dict[Any, dict[str, Any]] = {}  # by index
    for part in parts:
        told, index, ident = part.get("function") or {}, part.get("index"), part.get("id") or ""
        made = next((one for one in calls if ident and one["id"] == ident), under_way.get(index))
        if made is None or _is_another(made, ident, told.get("name")):
            made = {"id": "", "function": {"name": "", "arguments": ""}}
            calls.append(made)
        under_way[index] = made
        known, given = made["function"], told.get("arguments") or ""
        given = known["arguments"] + (given if isinstance(given, str) else _dump(given))
        called = {"name": told.get("name") or known["name"], "arguments": given}
        made |= {**part, "id": ident or made["id"], "function": called}
    return calls


def _is_another(made: dict[str, Any], ident: str, name: str | None) -> bool:
    """Whether a piece begins another call than the one that is under way."""
    known = made["function"]
    if ident and made["id"]:
        return bool(ident != made["id"])
    if not name or not known["name"]:
        return False
    return name != known["name"] or bool(_loaded(known["arguments"]))  # the one before is whole


_STREAM = Record(stream=True, stream_options={"include_usage": True})
_CHAT_COMPLETIONS = _Dialect(
    _openai_tool, _openai_write, _openai_answer, _openai_piece, _openai_assemble, stream=_STREAM
)


def _responses_tool(one: Tool) -> dict[str, Any]:
    return {"type": "function", "name": one.name, "description": one.desc, "parameters": one.schema}


def _responses_write(request: Request) -> dict[str, Any]:
    system, said = _apart(request)
    form = {"type": "json_schema", "name": "reply", "strict": True, "schema": request.schema}
    return {
        "instructions": system,
        "input": list(concat(map(_responses_items, said))),
        "text": {"format": form} if request.schema else None,
    }


def _responses_items(one: Message) -> list[dict[str, Any]]:
    """A message as items of the input: what was said, what was attached, calls, or a result."""
    if one.role == "tool":
        return [{"type": "function_call_output", "call_id": one.tool_call_id, "output": one.text}]
    content = _in_parts(one, "input_text", _responses_media)
    calls = [
        {"type": "function_call", "call_id": call.id, "name": call.name,
         "arguments": call.arguments.to_json()}
        for call in one.tool_calls
    ]  # fmt: skip
    said = [{"role": one.role, "content": content}] if content or not calls else []
    return [*said, *concat(_detached(one, "responses")), *calls]


def _responses_media(one: Media) -> dict[str, Any]:
    if isinstance(one, Image):
        return {"type": "input_image", "image_url": one.url}
    made = _openai_media(one)
    return {"type": f"input_{one.kind}", **made.get("file", made)}


def _responses_answer(data: Any) -> dict[str, Any]:
    status, why = data.get("status", "completed"), get_in(["incomplete_details", "reason"], data)
    if status not in ("completed", "incomplete"):
        raise ValueError(f"its status is {status}")
    items = groupby("type", data["output"])
    parts = groupby("type", concat(pluck("content", items.get("message", ()))))
    refused = "".join(pluck("refusal", parts.get("refusal", ())))
    calls = [_openai_call(one.get("call_id"), one, {}) for one in items.get("function_call", ())]
    thoughts = concat(item.get("summary") or () for item in items.get("reasoning", ()))
    usual = "length" if status == "incomplete" else "tool_calls" if calls else "stop"
    return {
        "text": "".join(pluck("text", parts.get("output_text", ()))) or refused,
        "tool_calls": _attached(calls, "responses", items.get("reasoning")),
        "finish_reason": "refusal" if "refusal" in parts else why or usual,
        "reasoning": "\n".join(pluck("text", thoughts)),
    }


def _responses_piece(event: Any) -> str:
    return event["delta"] if event.get("type") == "response.output_text.delta" else ""


def _responses_assemble(events: list[Any]) -> Any:
    """The whole answer, which the last event of a stream holds."""
    ends = [one["response"] for one in events if one.get("type") in _WHOLE]
    if not ends:
        raise ValueError("the stream ended early")
    return ends[-1]


_WHOLE = ("response.completed", "response.incomplete")
_RESPONSES = _Dialect(
    _responses_tool,
    _responses_write,
    _responses_answer,
    _responses_piece,
    _responses_assemble,
    limit="max_output_tokens",
)


def _anthropic_tool(one: Tool) -> dict[str, Any]:
    return {"name": one.name, "description": one.desc, "input_schema": one.schema}


def _anthropic_write(request: Request) -> dict[str, Any]:
    system, said = _apart(request)
    rounds = partitionby(lambda one: one.role == "tool", said)
    form = {"type": "json_schema", "schema": request.schema}
    return {
        "system": system,
        "messages": list(concat(map(_anthropic_turns, rounds))),
        "stop_sequences": list(request.stop) or None,
        "output_config": {"format": form} if request.schema else None,
    }


def _anthropic_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as they are, but the results of one round of calls in one message of the user."""
    if messages[0].role != "tool":
        return [{"role": one.role, "content": _anthropic_content(one)} for one in messages]
    results = [
        {"type": "tool_result", "tool_use_id": one.tool_call_id, "content": one.text}
        for one in messages
    ]
    return [{"role": "user", "content": results}]


def _anthropic_content(one: Message) -> Any:
    content = _in_parts(one, "text", _anthropic_media)
    if not one.tool_calls:
        return content
    said = [part for part in _as_parts(content) or () if part.get("text") != ""]
    calls = [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": jsonable(call.arguments)}
        for call in one.tool_calls
    ]
    return [*concat(_detached(one, "anthropic")), *said, *calls]


def _anthropic_media(one: Media) -> dict[str, Any]:
    if isinstance(one, Audio):
        raise DataError("audio cannot be sent", one, "an image or a file", "use another provider")
    source = {"type": "url", "url": one.url}
    if one.url.startswith("data:"):
        kind, data = _inline(one)
        source = {"type": "base64", "media_type": kind, "data": data}
    title = {"title": one.name} if one.name and isinstance(one, File) else {}
    return {"type": "image" if isinstance(one, Image) else "document", "source": source, **title}


def _anthropic_answer(data: Any) -> dict[str, Any]:
    parts = groupby("type", data["content"])
    calls = [ToolCall(one["id"], one["name"], one["input"]) for one in parts.get("tool_use", ())]
    thoughts = parts.get("thinking", [])
    signed = thoughts + parts.get("redacted_thinking", [])
    return {
        "text": "".join(pluck("text", parts.get("text", ()))),
        "tool_calls": _attached(calls, "anthropic", signed),
        "finish_reason": data.get("stop_reason"),
        "reasoning": "".join(pluck("thinking", thoughts)),
    }


def _anthropic_piece(event: Any) -> str:
    """The text in one event of a stream."""
    text = (event.get("delta") or {}).get("text")
    return text if isinstance(text, str) else ""


def _anthropic_assemble(events: list[Any]) -> Any:
    """Put the events of a stream together to the answer without a stream."""
    kinds = groupby("type", events)
    if "message_stop" not in kinds:
        raise ValueError("the stream ended early")
    (start,) = kinds["message_start"]
    ends = kinds.get("message_delta", [])
    reasons = filter(None, ((one.get("delta") or {}).get("stop_reason") for one in ends))
    reason = next(reasons, None)
    deltas = groupby("index", kinds.get("content_block_delta", ()))
    content = [
        _anthropic_block(one["content_block"], pluck("delta", deltas.get(one["index"], ())), reason)
        for one in kinds.get("content_block_start", ())
    ]
    usage = _added(one.get("usage") for one in [start["message"], *ends])
    return {**start["message"], "content": content, "stop_reason": reason, "usage": usage}


def _anthropic_block(start: Any, deltas: Iterable[Any], reason: str | None) -> Any:
    """One part of the content: its start, and what was added to it."""
    made = _added([start, *(keyfilter(lambda name: name != "type", one) for one in deltas)])
    given = made.pop("partial_json", "")
    if given and _ended(reason) != "length":  # else the call was cut off
        made["input"] = jsonlib.loads(given)
    return made


_MESSAGES = _Dialect(
    _anthropic_tool, _anthropic_write, _anthropic_answer, _anthropic_piece, _anthropic_assemble
)

_OPENAI = "https://api.openai.com/v1"
_APIS = {"chat": ("/chat/completions", _CHAT_COMPLETIONS), "responses": ("/responses", _RESPONSES)}


def openai_lm(
    model: str,
    *,
    base_url: str = _OPENAI,
    api: Literal["chat", "responses"] = "chat",
    api_key: str | Callable[[], str] | None = None,
    concurrency: int = 16,
    timeout: float = 60.0,
    headers: Mapping[str, str] | None = None,
    price: tuple[float, ...] | None = None,
    client: httpx.Client | httpx.AsyncClient | None = None,
    **defaults: Any,
) -> LM:
    """Make an LM that speaks the OpenAI chat-completions format over HTTP.

    It serves OpenAI, vLLM, SGLang, Ollama, LM Studio, llama.cpp, OpenRouter and whatever else has
    that end point. It also answers in an event loop (`acall`), and in pieces where a request has
    `on_text`. A value of it pickles and shows no key; connections open at the first call.

    Args:
        model: as the provider names it.
        base_url: of the provider, without "/chat/completions" or "/responses".
        api: "responses" for OpenAI's newer format, which has no `stop` and no seed.
        api_key: by default, at OpenAI only, the environment variable OPENAI_API_KEY. A key does
            not travel to other processes; a function that returns it does.
        concurrency: how many calls `evaluate` and the optimizers make at once, 1 or more.
        timeout: seconds to wait for the provider.
        headers: further HTTP headers.
        price: US dollars for a million tokens read, for a million written, and, where that is
            cheaper, for a million read from the provider's cache.
        client: an `httpx.Client`, or an `AsyncClient` for `acall`, to use instead of our own.
        **defaults: fields of the request body where a request does not set them.
    Raises:
        LMError: (when asked) `Unauthorized`, `RateLimited`, `ContextWindowExceeded`, `LMTimeout` or
            itself; `retryable` tells whether asking again may help. No error holds the key.
    Calls: one HTTP request for each call; one more where a connection that was kept open turns out
        to be closed, or the server wants another name for `max_tokens`.

    >>> openai_lm("gpt-4o-mini", api_key="secret", temperature=0).model
    'gpt-4o-mini'
    """
    if api not in _APIS:
        raise DataError("unknown api", api, "'chat' or 'responses'", "correct api")
    if price is not None and not (len(price) in (2, 3) and all(one >= 0 for one in price)):
        todo = "write price=(0.15, 0.60): a million tokens read, and written"
        raise DataError("no price", price, "two or three numbers, 0 or more", todo)
    path, dialect = _APIS[api]
    own = _url_at(base_url, "").partition("?")[0] == _OPENAI  # whose the key in the environment is
    url, signed = _without_password(base_url)
    kept, name = Record({**signed, **(headers or {})}), "OPENAI_API_KEY" if own else ""
    end = _Endpoint(_url_at(url, path), api_key, name, kept, timeout, client)
    if api == "responses":
        defaults = {dialect.limit if n == "max_tokens" else n: v for n, v in defaults.items()}
    elif own:
        dialect = evolve(dialect, limit=_LIMITS[1])
    known, workers = Record(jsonable(defaults)), workers_for(None, concurrency)
    return _HttpLM(end, model, known, workers, dialect, price)


def _without_password(url: str) -> tuple[str, dict[str, str]]:
    """A URL, and the header of the user and password that stood in it: URLs are logged."""
    found = re.match(r"(?i)\s*(https?://)([^/?]+)@", url)
    if not found:
        return url, {}
    from base64 import b64encode
    from urllib.parse import unquote

    secret = b64encode(unquote(found[2]).encode()).decode()
    return found[1] + url[found.end() :], {"Authorization": f"Basic {secret}"}


def _url_at(base_url: str, path: str) -> str:
    """The URL of a path below a base URL, which may end in one already, and may have a query."""
    base, mark, query = base_url.strip().partition("?")
    base = re.sub(r"/(chat/completions|responses|messages|embeddings)$", "", base.rstrip("/"))
    return f"{base if base.endswith(path) else base + path}{mark}{query}"


def embedder(
    model: str,
    *,
    base_url: str = _OPENAI,
    api_key: str | Callable[[], str] | None = None,
    batch_size: int = 128,
    concurrency: int = 4,
    **options: Any,
) -> Embedder:
    """Make a function from texts to vectors, behind the OpenAI embeddings end point.

    Args:
        model: as the provider names it.
        base_url: of the provider, without "/embeddings".
        batch_size: texts in one HTTP request, 1 or more.
        concurrency: requests at once, 1 or more.
        **options: `timeout`, `headers` and `client` of `openai_lm`, and further fields of the
            request body, such as `dimensions`.
    Raises:
        LMError: (when asked) as `openai_lm`.
    Calls: one HTTP request for each batch of texts.

    >>> embed = embedder("text-embedding-3-small", api_key="secret")
    >>> embed([])
    []
    """
    if batch_size < 1:
        raise DataError("too small a batch", batch_size, "1 or more", "raise batch_size")
    options |= {"base_url": base_url, "api_key": api_key, "concurrency": concurrency}
    made = typing.cast(_HttpLM, openai_lm(model, **options))
    end = evolve(made.end, url=_url_at(made.end.url, "/embeddings"))
    return Embedder(end, model, made.defaults, concurrency, batch_size)


Vector = tuple[float, ...]


@frozen(eq=False, repr=False)
class Embedder(_Wired):
    """Texts to vectors: of one text its vector, of several a list of vectors in their order."""

    kind = "embedder"
    batch_size: int

    def flow(self, texts: str | Sequence[str]) -> Flow:
        """Return the flow of one call."""
        if isinstance(texts, str):
            return (yield from self.flow([texts]))[0]
        for text in texts:
            if not isinstance(text, str):
                raise DataError("only texts have vectors", text, "a str", "convert it first")
        vectors: list[Vector] = []
        batches = partition_all(self.batch_size, texts)
        for together in partition_all(self.concurrency, batches):
            vectors += concat((yield tuple(map(self._one, together))))
        return vectors

    def _one(self, texts: tuple[str, ...]) -> Flow:
        payload = {"model": self.model, **self.defaults, "input": texts}
        body = yield from self.end.exchange(payload)
        return self.end.read(body, partial(_vectors, len(texts)))


def _vectors(count: int, data: Any) -> list[Vector]:
    by_index = {one["index"]: tuple(map(float, one["embedding"])) for one in data["data"]}
    return [by_index[index] for index in range(count)]


_ANTHROPIC = "https://api.anthropic.com/v1"
_VERSION = re.compile(r"/v\d+(/|$|\?)|/messages/?($|\?)")


def anthropic_lm(
    model: str,
    *,
    base_url: str = _ANTHROPIC,
    api_key: str | Callable[[], str] | None = None,
    **options: Any,
) -> LM:
    """Make an LM that speaks the Anthropic Messages format over HTTP.

    Args:
        model: as the provider names it.
        base_url: of the provider, without "/messages".
        api_key: by default, at Anthropic only, the environment variable ANTHROPIC_API_KEY.
        **options: what else `openai_lm` takes; `max_tokens`, which this format demands, is 4096
            unless it is given. The API version is 2023-06-01, the last one with a temperature;
            `headers={"anthropic-version": ...}` asks for another.
    Raises:
        LMError: (when asked) as `openai_lm`.
    Calls: one HTTP request for each call; it never retries by itself.

    >>> anthropic_lm("claude-sonnet-4-5", api_key="secret").url
    'https://api.anthropic.com/v1/messages'
    """
    made = typing.cast(_HttpLM, openai_lm(model, base_url=base_url, api_key=api_key, **options))
    below = _url_at(made.end.url, "" if _VERSION.search(base_url) else "/v1")
    name = "ANTHROPIC_API_KEY" if below.partition("?")[0] == _ANTHROPIC else ""
    signs = Record({"anthropic-version": "2023-06-01", "x-api-key": "{}"})
    end = evolve(made.end, url=_url_at(below, "/messages"), signs=signs, key_name=name)
    defaults = Record({"max_tokens": 4096}) | made.defaults
    return evolve(made, end=end, dialect=_MESSAGES, defaults=defaults)


# Providers that speak the format of OpenAI: base URL, and the environment variable of the key.
PROVIDERS = {
    "openai": (_OPENAI, "OPENAI_API_KEY"),
    "deepseek": ("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "groq": ("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": ("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "together": ("https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    "llamacpp": ("http://localhost:8080/v1", ""),
    "lmstudio": ("http://localhost:1234/v1", ""),
    "ollama": ("http://localhost:11434/v1", ""),
    "vllm": ("http://localhost:8000/v1", ""),
}


def connect(name: str, **options: Any) -> LM:
    """Make the LM of a name: "PROVIDER/MODEL", or "toy".

    Args:
        name: the provider is "anthropic", "azure" or one of `PROVIDERS`. At Azure the model is the
            deployment; the resource is `base_url=`, or in AZURE_OPENAI_ENDPOINT.
        **options: for the maker of that LM, such as `temperature`, `api_key` or `base_url`.
    Raises:
        DataError: an unknown provider, no model, or no Azure resource.

    >>> connect("ollama/llama3.2").url
    'http://localhost:11434/v1/chat/completions'
    """
    provider, _, model = name.partition("/")
    if name == "toy":
        return toy_lm(**options)
    makers: dict[str, Callable[..., LM]] = {"anthropic": anthropic_lm, "azure": _azure_lm}
    if provider in makers and model:
        return makers[provider](model, **options)
    if provider in PROVIDERS and model:
        base_url, key_name = PROVIDERS[provider]
        made = typing.cast(_HttpLM, openai_lm(model, **{"base_url": base_url, **options}))
        if "base_url" in options:
            return made
        return evolve(made, end=evolve(made.end, key_name=key_name))
    known = f"PROVIDER/MODEL, of {', '.join(['anthropic', 'azure', *PROVIDERS])}, or 'toy'"
    raise DataError("unknown LM", name, known, "or make it with openai_lm(base_url=...)")


def _azure_lm(deployment: str, *, base_url: str = "", **options: Any) -> LM:
    """An LM at Azure: its key has a header of its own."""
    base_url = base_url or os.environ.get("AZURE_OPENAI_ENDPOINT", "")
    if not base_url:
        todo = "pass base_url='https://NAME.openai.azure.com', or set AZURE_OPENAI_ENDPOINT"
        raise DataError("no resource at Azure", base_url, "its URL", todo)
    if "/openai" not in base_url:
        base_url = _url_at(base_url, "/openai/v1")
    made = typing.cast(_HttpLM, openai_lm(deployment, base_url=base_url, **options))
    end = evolve(made.end, signs=Record({"api-key": "{}"}), key_name="AZURE_OPENAI_API_KEY")
    limit = _LIMITS[1] if made.dialect.limit in _LIMITS else made.dialect.limit
    return evolve(made, end=end, dialect=evolve(made.dialect, limit=limit))


# == 11. Middleware ================================================================================
# A middleware is a function LM -> LM, made of a flow: request -> generator that yields the request
# (its outcome is the inner LM's response) and other effects, and returns a response. The drivers
# perform it, so each is defined once for threads, event loops and batches.


@frozen(eq=False, repr=False)
class Middleware(Made):
    """A function LM -> LM.

    Attributes:
        flow: (layer, request) -> flow of one call; `layer.inner` is the inner LM.
        identity: inner LM -> what decides the answers of the outer one.
        holds: (layer, request) -> whether it, or a layer below, answers that without asking an LM.
        around: call of a tool -> flow that performs it, where a driver runs a program.
        left: what of a budget is left.
    """

    flow: Callable[[Layer, Request], Flow]
    identity: Callable[[Any], str] = lambda inner: identity(inner)
    holds: Callable[[Layer, Request], bool] = lambda layer, request: _held(layer.inner, request)
    around: Callable[[Call], Flow] | None = None
    left: Callable[[], dict[str, float]] = dict
    made: Any = _made()

    def __call__(self, inner: Any) -> Layer:
        """Return the outer LM."""
        return Layer(self, inner, self.identity(inner))


@frozen(eq=False)
class Layer:
    """An LM made of a middleware around another LM, whose it is what it does not define."""

    middleware: Middleware
    inner: Any
    identity: str

    def flow(self, request: Request) -> Flow:
        """Return the flow of one call: it yields the request, and other effects."""
        return self.middleware.flow(self, request)

    def __call__(self, request: Request) -> Response:
        """Answer in this thread."""
        made: Response = _Here(self.inner).drive(self.flow(request))
        return made

    async def acall(self, request: Request) -> Response:
        """Answer in the running event loop."""
        made: Response = await _There(self.inner).drive(self.flow(request))
        return made

    @property
    def concurrency(self) -> int:
        """How many calls it likes at once."""
        return workers_for(self.inner, None)

    @property
    def batch(self) -> Callable[[Sequence[Request]], list[Any]]:
        """Answer many requests in lock-step, where the inner LM does."""
        _ = self.inner.batch  # an AttributeError where it does not

        def answered(requests: Sequence[Request]) -> list[Any]:
            flows = tuple(_caught(self.flow, one) for one in requests)
            return [error or value for value, error in _Here(self.inner).drive(_once(flows))]

        return answered

    def __reduce__(self) -> tuple[Any, ...]:
        return self.middleware, (self.inner,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def middleware(flow: Callable[[Request], Flow]) -> Middleware:
    """Make a function LM -> LM of a flow, a generator function that yields the request.

    It may yield requests, `invoke(...)` and `Sleep(...)`, and returns the response.

    >>> @middleware
    ... def loud(request):
    ...     response = yield request
    ...     return evolve(response, text=response.text.upper())
    >>> loud(stub_lm())(Request([Message("user", "Hello")])).text
    'TEXT'
    """
    # What a layer below holds says nothing: it may be asked something else.
    return Middleware(lambda layer, request: flow(request), holds=lambda *call: False)


def _held(lm: Any, request: Request) -> bool:
    """Whether a layer of an LM answers a request from what it holds."""
    return isinstance(lm, Layer) and lm.middleware.holds(lm, request)


def identity(lm: Any) -> str:
    """Return what beside a request decides the answers of an LM: its `identity`, or else its name.

    To the name belongs what it holds: plain values, and functions. Where other things decide, such
    as the weights of a model, give the LM an `identity` of its own.

    >>> identity(openai_lm("m", base_url="http://localhost/v1", temperature=0))
    '["http://localhost/v1/chat/completions","m",{"temperature":0}]'
    """
    return str(lm.identity) if hasattr(lm, "identity") else _who(lm)


def _who(value: Any, depth: int = 3) -> str:
    """The name of a function or a class, and the plain values, functions and LMs that it holds."""
    if isinstance(value, pytypes.MethodType):
        return f"{_who(value.__self__, depth)}.{value.__func__.__name__}"
    if isinstance(value, partial):
        name, held = _who(value.func), dict[Any, Any](enumerate(value.args), **value.keywords)
    else:
        named = value if isinstance(value, pytypes.FunctionType) else type(value)
        module = str(named.__module__).replace("__mp_main__", "__main__")  # as workers call it
        name, held = f"{module}.{named.__qualname__}", _held_by(value)
    said: dict[str, Any] = {}
    for key, one in held.items():
        if isinstance(one, (str, int, float)):
            said[str(key)] = one
        elif hasattr(one, "identity"):
            said[str(key)] = str(one.identity)
        elif depth and callable(one) and not isinstance(one, type):
            said[str(key)] = _who(one, depth - 1)
    return name + (canonical(said) if said else "")


def _held_by(value: Any) -> dict[Any, Any]:
    """The attributes of an object, but for its state; of a function what it closes over."""
    if not isinstance(value, pytypes.FunctionType):
        slots = concat(getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
        names = [*slots, *getattr(value, "__dict__", {})]
        return {n: getattr(value, n) for n in names if hasattr(value, n) and not n.startswith("_")}
    held: dict[Any, Any] = {}
    if "<" in value.__qualname__:  # others may have that name too
        code = value.__code__
        held = {"names": " ".join(code.co_names), **dict(enumerate(code.co_consts))}
    with suppress(ValueError):  # a cell that is empty yet
        held |= inspect.getclosurevars(value).nonlocals
    return held


@factory
def retry(
    *, attempts: int = 5, base: float = 1.0, longest: float = 60.0, seed: int = 0
) -> Middleware:
    """Ask again after an error that may pass: `LMError.retryable`.

    It waits at random between 0 and `base` seconds, and each time up to twice as long; and before
    that as long as the provider asks for.

    Args:
        attempts: how many times to ask in all, 1 or more.
        base: the longest wait after the first attempt, in seconds.
        longest: wait of all, in seconds; a provider that asks for more gets no further attempt.
    Raises:
        LMError: (when asked) that of the last attempt, or one that would not pass.
    Calls: `attempts` at most.
    Reference: "full jitter", Brooker 2015, Exponential Backoff And Jitter.

    >>> lm = retry(base=0.0)(scripted_lm([LMError("busy", retryable=True), "Hello"]))
    >>> lm(Request([Message("user", "Hi")])).text
    'Hello'
    """
    if attempts < 1:
        raise DataError("too few attempts", attempts, "1 or more", "raise attempts")

    def flow(layer: Layer, request: Request) -> Flow:
        for attempt in range(attempts - 1):
            try:
                return (yield request)
            except LMError as error:
                asked_for = error.retry_after or 0.0
                if not error.retryable or asked_for > longest:
                    raise
            most = min(base * 2**attempt, longest)
            jitter = seeded(seed, "retry", request.key, attempt).uniform(0.0, most)
            yield Sleep(asked_for + jitter)
        return (yield request)

    return Middleware(flow)


def _limited(least: int, **given: float | None) -> dict[str, float]:
    """The limits that are given, checked."""
    known = {name: limit for name, limit in given.items() if limit is not None}
    if not known or not all(limit >= least for limit in known.values()):
        todo = f"pass one of {', '.join(given)}"
        raise DataError("no limit to keep", given, f"{least} or more", todo)
    return known


@factory
def throttle(
    *,
    per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Middleware:
    """Wait before a call that would be too many in any minute.

    Args:
        per_minute: requests in any 60 seconds, 1 or more.
        tokens_per_minute: tokens, read and written, in any 60 seconds. Before a call they are
            estimated: four characters each, and `max_tokens`; after it they are known. A request
            that is larger than this by itself waits until it is the only one.
        clock: what tells the time, in seconds.
    Raises:
        DataError: neither is given, or one is less than 1.
    Calls: none of its own. The limit holds for all threads of this process.

    >>> lm = throttle(per_minute=500)(stub_lm())
    >>> lm(Request([Message("user", "Hi")])).text
    'text'
    """
    _limited(1, per_minute=per_minute, tokens_per_minute=tokens_per_minute)
    most, tokens = per_minute or math.inf, tokens_per_minute or math.inf
    begun, lock = list[list[float]](), threading.Lock()  # of the last minute: when, and tokens

    def enter(call: list[float]) -> float:
        """Book a call, or tell how many seconds to wait."""
        with lock:
            call[0] = now = clock()
            begun[:] = [one for one in begun if now < one[0] + 60]
            full = len(begun) >= most or sum(pluck(1, begun)) + call[1] > tokens
            if begun and full:
                return min(max(begun[0][0] + 60 - now, 0.001), 60.0)
            begun.append(call)
            return 0.0

    def flow(layer: Layer, request: Request) -> Flow:
        written = sum(len(one.text) for one in request.messages) / 4 + (request.max_tokens or 0)
        call = [0.0, written]
        while seconds := enter(call):
            yield Sleep(seconds)
        response = yield request
        call[1] = response.usage.input_tokens + response.usage.output_tokens or written
        return response

    return Middleware(flow)


@factory
def timeout(seconds: float) -> Middleware:
    """Give up on a call after some seconds in all, however slowly it drips.

    In an event loop the call is cancelled and its connection closed. Elsewhere it goes on in a
    thread of its own, to which nobody listens; a batch takes the time it takes.

    Args:
        seconds: more than 0.
    Raises:
        LMTimeout: (when asked) the time is up; retryable.

    >>> timeout(5.0)(stub_lm())(Request([Message("user", "Hi")])).text
    'text'
    """
    if not seconds > 0:
        raise DataError("no time at all", seconds, "more than 0 seconds", "raise it")

    def flow(layer: Layer, request: Request) -> Flow:
        return (yield _Within(_once(request), seconds, request.step))

    return Middleware(flow)


# -- what was answered before: caches and cassettes --


def _recalling(
    find: Callable[[str, str], str | None], keep: Callable[[str, Request, str], str]
) -> Middleware:
    """Answer from a store, or ask and keep the answer; equal requests at once are sent once."""
    under_way: dict[tuple[Any, ...], Future[None]] = {}  # each with a future of its end
    failed: list[str] = []  # what is asked after that would be paid for and lost

    def flow(layer: Layer, request: Request) -> Flow:
        from concurrent.futures import Future

        call = layer.identity, request.key
        place = os.getpid(), *call  # a process that was forked waits for none of its parent's
        while (text := find(*call)) is None:
            mine = Future[None]()
            ended = under_way.setdefault(place, mine)
            if ended is not mine:
                yield _Wait(ended)
                continue
            try:
                if find(*call) is None:  # it may have been kept since
                    return (yield from ask(layer.identity, request))
            finally:
                under_way.pop(place).set_result(None)
        return _kept_response(text)

    def ask(lm: str, request: Request) -> Flow:
        if failed:
            what = "not asked, since an earlier answer could not be kept"
            todo = "mend that, and make the LM anew; nothing more is paid for"
            raise DataError(what, failed[0], "a store that can be written", todo)
        response = yield request
        made = _response_text(response)
        try:
            text = yield invoke(keep, lm, request, made)
        except (OSError, DataError) as error:  # a full disk is no wrong answer
            failed.append(str(error))
            what, todo = "an answer could not be kept", f"see the disk ({error})"
            raise DataError(what, response.text, "a file", todo, response=response) from error
        return response if text == made else _kept_response(text)

    def holds(layer: Layer, request: Request) -> bool:
        return find(layer.identity, request.key) is not None or _held(layer.inner, request)

    return Middleware(flow, holds=holds)


def _response_text(response: Response) -> str:
    blank = jsonable(Response(""))
    return _dump({n: v for n, v in jsonable(response).items() if v != blank[n] or n == "text"})


def _kept_response(text: str) -> Response:
    try:
        data = jsonlib.loads(text)
        if not isinstance(data["text"], str):
            raise TypeError(f"its text is {data['text']!r}")
        spent = Usage(**data.pop("usage", {}))
        calls = [ToolCall(**one) for one in data.pop("tool_calls", ())]
        return Response(**data, usage=spent, tool_calls=calls, cached=True)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        todo = f"delete what is kept there ({error!r})"
        raise DataError("what was kept is no response", text, "a response", todo) from error


@factory
def cache(store: Path_ | MutableMapping[str, str]) -> Middleware:
    """Ask each request once, and answer it from a store from then on.

    The key is made of all that can change an answer: the request, its `rollout` included, and the
    LM's `identity`. Equal requests at once are sent once. An answer keeps the usage it once cost.
    An error is never kept. The first answer that is kept stands, whoever else was asking.

    Args:
        store: the path of an SQLite file, for any number of threads and processes at once; or any
            mutable mapping from text to text.
    Raises:
        DataError: the file is no SQLite file, or what is kept there is no response.
    Calls: one for each request that is not in the store.

    >>> lm = cache({})(scripted_lm(["Hello"]))
    >>> hello = Request([Message("user", "Hi")])
    >>> lm(hello).cached, lm(hello).cached
    (False, True)
    """
    kept: Any = {} if store == ":memory:" else store
    if isinstance(kept, (str, os.PathLike)):
        kept = _Sqlite(os.fspath(kept))

    def find(lm: str, key: str) -> Any:
        return kept.get(f"{_sha256(lm)}{key}")

    def keep(lm: str, request: Request, text: str) -> Any:
        return kept.setdefault(f"{_sha256(lm)}{request.key}", text)

    return _recalling(find, keep)


class _Sqlite:
    """Texts by key in an SQLite file; in each process a connection to read by, and one to write."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._locks: dict[tuple[int, bool], threading.Lock] = {}
        self._connections: dict[tuple[int, bool], sqlite3.Connection] = {}
        weakref.finalize(self, _disconnect, self._connections)
        self.get("")

    def _ask(self, command: str, *values: str, write: bool = False) -> list[tuple[Any, ...]]:
        import sqlite3

        mine = os.getpid(), write  # what a process was forked with is of no use to it
        with self._locks.setdefault(mine, threading.Lock()):
            try:
                if mine not in self._connections:
                    self._connections[mine] = _connect(self._path)
                return self._connections[mine].execute(command, values).fetchall()
            except sqlite3.DatabaseError as error:
                todo = f"see the file ({error})"
                raise DataError("this cache cannot be used", self._path, "SQLite", todo) from error

    def get(self, key: str) -> str | None:
        """The text of a key, None where there is none."""
        rows = self._ask("SELECT value FROM calls WHERE key = ?", key)
        return rows[0][0] if rows else None

    def setdefault(self, key: str, text: str) -> str:
        """Keep a text where there is none yet; return the one that stands."""
        self._ask("INSERT OR IGNORE INTO calls VALUES (?, ?)", key, text, write=True)
        return str(self.get(key))


def _connect(path: str) -> sqlite3.Connection:
    """Open the file so that writers wait for each other, and readers for nobody."""
    import sqlite3

    made = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
    try:
        with suppress(sqlite3.OperationalError):  # another one that opens it turns it to WAL
            made.execute("PRAGMA journal_mode = WAL")
        made.execute("PRAGMA synchronous = NORMAL")
        made.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    except sqlite3.DatabaseError as error:
        made.close()
        if "readonly" not in str(error):
            raise
        place = Path(path).resolve().as_uri()  # what it holds can be read all the same
        return sqlite3.connect(f"{place}?immutable=1", uri=True, check_same_thread=False)
    return made


def _disconnect(connections: dict[tuple[int, bool], sqlite3.Connection]) -> None:
    for (process, _), connection in connections.items():
        if process == os.getpid():
            connection.close()


@factory
def record(path: Path_) -> Middleware:
    """Answer from a cassette what it holds, and append to it what it does not.

    A cassette is a file of JSON Lines, one for each call, with the request, the response and the
    LM's `identity`. Each is flushed to the disk before the answer is used, so that a run that is
    killed and started again pays for no recorded call twice. Any number of threads and processes
    may share one; the first answer to a request stands. Fit to be committed beside a test.

    Args:
        path: of the file; it is made with the first call.
    Raises:
        DataError: there is no such folder; or a line of the file is no recorded call; says which. A
            last line that was torn by a kill is dropped with a warning, and its call made again.
    Calls: one for each request that is not on the cassette.

    >>> import tempfile
    >>> hello = Request([Message("user", "Hi")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = record(Path(folder, "calls.jsonl"))(scripted_lm(["Hello"]))(hello)
    ...     replay_lm(Path(folder, "calls.jsonl"))(hello).text
    'Hello'
    """
    folder = Path(path).resolve().parent
    if not folder.is_dir():  # found out now, not after the first call is paid for
        raise DataError("no such folder for a cassette", str(folder), "a folder", "make it first")
    tape = _Cassette(os.fspath(path))
    return _recalling(tape.find, tape.keep)


_LINE = b'{"key": "'  # how each line begins


class _Cassette:
    """A file of recorded calls, and where in it each of them stands."""

    def __init__(self, path: str) -> None:
        self.path, self._locks = path, dict[int, threading.Lock]()
        self.places: dict[str, dict[str, int]] = {}  # by request and by LM, the offset of the line
        self._end, self._torn, self._node = 0, -1, 0
        self._update()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    @contextmanager
    def _open(self, mode: str) -> Iterator[Any]:
        """Open the file, and keep other threads and processes away from it."""
        mine = self._locks.setdefault(os.getpid(), threading.Lock())  # a fork's is held by nobody
        with mine, Path(self.path).open(mode) as file:
            _lock(file, True)
            try:
                yield file
            finally:
                _lock(file, False)

    def _update(self, *, anew: bool = False) -> None:
        """Read what the file holds by now, if it is there."""
        with suppress(FileNotFoundError), self._open("rb") as file:
            self._read(file, anew)

    def _read(self, file: Any, anew: bool = False) -> None:
        """Take in the lines that were added since; a last one that is torn is left out."""
        node, size = os.fstat(file.fileno()).st_ino, file.seek(0, os.SEEK_END)
        if anew or node != self._node or size < self._end:  # another file stands there now
            self.places, self._end, self._torn, self._node = {}, 0, -1, node
        file.seek(self._end)
        for line in file:
            try:
                call = jsonlib.loads(line)
                _ = call["request"]["messages"], call["response"]["text"] + call["lm"] + call["key"]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                if not line.endswith(b"\n") and line[:9] == _LINE[: len(line)]:
                    return self._tear()
                file.seek(0)
                what = f"line {file.read(self._end).count(10) + 1} is no recorded call"
                shown, todo = line.decode("utf-8", "replace"), f"restore or delete it ({error!r})"
                raise DataError(f"{self.path}: {what}", shown, "a call as JSON", todo) from error
            self.places.setdefault(call["key"], {}).setdefault(call["lm"], self._end)
            self._end += len(line)

    def _tear(self) -> None:
        """Warn of what a writer that was killed left behind, once."""
        if self._torn != self._end:
            what = f"{self.path}: the last line was torn, and is dropped; its call is made again"
            warnings.warn(what, stacklevel=6)
        self._torn = self._end

    def all(self) -> list[tuple[str, str]]:
        """The LM and the request's key of each call, in their order."""
        return [(lm, key) for key, lms in self.places.items() for lm in lms]

    def call(self, lm: str, key: str) -> Any:
        """Read a call: key, lm, step, request, response. None if it does not stand there."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            place = self.places[key][lm]
            with Path(self.path).open("rb") as file:
                file.seek(place)
                call = jsonlib.loads(file.readline())
            if (call["lm"], call["key"]) == (lm, key):
                return call
        return None

    def find(self, lm: str, key: str) -> str | None:
        """The text of the response of an LM to a request, if the file holds it by now."""
        call = self.call(lm, key)
        if call is None:
            self._update(anew=lm in self.places.get(key, ()))
            call = self.call(lm, key)
        return call and _dump(call["response"])

    def keep(self, lm: str, request: Request, text: str) -> str:
        """Append a call, unless another process was faster; return the response that stands."""
        call = {"key": request.key, "lm": lm, "step": request.step, "request": request.said()}
        line = f'{_dump(call)[:-1]}, "response": {text}}}\n'.encode()
        with self._open("ab+") as file:
            self._read(file)
            if known := self.call(lm, request.key):
                return _dump(known["response"])
            self._append(file, line)
            self._read(file)
        return text

    def _append(self, file: Any, line: bytes) -> None:
        """Write a line, after what is left of one that was torn is gone."""
        file.truncate(self._end)
        file.seek(max(self._end - 1, 0))
        whole = file.read(1) in (b"\n", b"")
        file.write(line if whole else b"\n" + line)
        file.flush()
        os.fsync(file.fileno())
        self._end += not whole


def _lock(file: Any, hold: bool) -> None:
    """Take, or give back, the lock that all processes ask for before they touch a cassette."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(1 << 40)  # a byte that nobody will ever write
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if hold else msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if hold else fcntl.LOCK_UN)


def replay_lm(path: Path_, *, strict: bool = False, lm: Any = None) -> ReplayLM:
    """Make an LM that only answers from a cassette; nothing is sent anywhere.

    Args:
        path: of a cassette that `record` wrote.
        strict: as a context manager, fail at the end if a recorded call was never asked for.
        lm: whose answers to give, where several LMs were asked the same; it is not asked.
    Raises:
        OSError: there is no such file.
        DataError: a line of it is no recorded call; says which.
        ReplayMiss: (when asked) the request is not on the cassette; shows the nearest one, and what
            differs. Or, at the end, a call was never asked for.
    Calls: none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tape = Path(folder, "calls.jsonl")
    ...     answer = predict("q -> a")(record(tape)(stub_lm()), q="?")
    ...     with replay_lm(tape, strict=True) as lm:
    ...         predict("q -> a")(lm, q="?") == answer
    True
    """
    tape = _Cassette(os.fspath(path))
    if not tape.places and not Path(path).exists():
        what, todo = "there is no such cassette; record it first", "lm = lmopt.record(path)(lm)"
        raise FileNotFoundError(explain(what, os.fspath(path), "a file that `record` wrote", todo))
    return ReplayLM(tape, strict, None if lm is None else identity(lm))


@frozen
class ReplayLM:
    """An LM that only answers from a cassette."""

    tape: _Cassette = field(repr=False)
    strict: bool
    whose: str | None
    used: set[tuple[str, str]] = field(factory=set, init=False, repr=False, eq=False)

    @property
    def identity(self) -> str:
        """That of the recorded LM, so that a cache before it knows its answers."""
        return self.whose or first([*concat(self.tape.places.values()), "replay_lm"])

    def __call__(self, request: Request) -> Response:
        """Answer from the cassette."""
        key = request.key
        lms = [lm for lm in self.tape.places.get(key, ()) if self.whose in (None, lm)]
        if len(lms) != 1:
            raise _missed(self.tape, request, lms)
        self.used.add((lms[0], key))
        return _kept_response(self.tape.find(lms[0], key) or "")

    def __enter__(self) -> ReplayLM:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        calls = self.tape.all()
        left = [one for one in calls if one not in self.used]
        if self.strict and kind is None and left:
            what = f"{len(left)} of {len(calls)} recorded calls were not asked for; the first"
            said = self.tape.call(*left[0])["request"]["messages"][-1:]
            raise ReplayMiss(what, said, "all of them", "record again")


def _missed(tape: _Cassette, request: Request, several: list[str]) -> ReplayMiss:
    """Word a miss: what was asked, the nearest call on the cassette, and what differs."""
    from difflib import unified_diff

    last_ = request.messages[-1].text if request.messages else ""
    if several:
        todo = "say whose answer: replay_lm(path, lm=...)"
        return ReplayMiss("several LMs answered this request", last_, f"one of {several}", todo)

    def words_of(said: dict[str, Any]) -> Counter[str]:
        return Counter(re.findall(r"\w+", _dump(said)))

    def likeness(said: dict[str, Any]) -> float:
        words = words_of(said)
        return (asked & words).total() / (asked | words).total()

    asked, shown = words_of(request.said()), "it is empty"
    if calls := tape.all():
        nearest = max((tape.call(*one)["request"] for one in calls), key=likeness)
        texts = (_dump(one, indent=1).replace("\\n", "\n") for one in (nearest, request.said()))
        old, new = (text.split("\n") for text in texts)
        changes = unified_diff(old, new, "recorded", "asked", n=0, lineterm="")
        shown = cut("the nearest one differs in\n" + "\n".join(changes), 2000)
    what, todo = f"a request that is not on {tape.path}", f"record it; {shown}"
    return ReplayMiss(what, last_, "a recorded one", todo)


# -- what a call may cost, and what becomes of it --


def budget(
    *, calls: int | None = None, tokens: int | None = None, usd: float | None = None
) -> Middleware:
    """Refuse a call that would spend more than is allowed.

    Each call is reserved before it is made: as one call, and as the tokens and dollars of the
    dearest call so far. Calls never overshoot; tokens and dollars only by what calls take beyond
    that, the first ones of all above all. One that was answered from a cache below is free.

    Args:
        calls: LM calls in all, failed ones included, 0 or more.
        tokens: read and written, in all, 0 or more.
        usd: US dollars in all, 0 or more; the LM must know its `price`.
    Raises:
        DataError: nothing is limited, a limit is negative, or the LM has no price, so that dollars
            would never be spent: told when it is put around the LM, or by its first answer.
        BudgetExceeded: (when asked) the call would be too much; says what was spent.
    Calls: none of its own. The limit holds for all threads of this process; it does not pickle.

    >>> lm = budget(calls=1)(stub_lm())
    >>> hello = Request([Message("user", "Hi")])
    >>> lm(hello).text
    'text'
    >>> lm(hello)
    Traceback (most recent call last):
    lmopt.BudgetExceeded: the budget is spent: {'calls': 1}; expected at most {'calls': 1}; raise it
    """
    purse = _Purse(_limited(0, calls=calls, tokens=tokens, usd=usd))

    def check(lm: Any, priced: object) -> None:
        if usd is not None and not priced:
            what = "a budget in dollars for an LM without a price"
            todo = "say what a million tokens cost: price=(0.15, 0.60)"
            raise DataError(what, _innermost(lm), "a price", todo)

    def whose(inner: Any) -> str:
        check(inner, getattr(inner, "price", 0) is not None)
        return identity(inner)

    def flow(layer: Layer, request: Request) -> Flow:
        try:
            yield from purse.reserve()
        except BudgetExceeded:
            if _held(layer.inner, request):
                return (yield request)
            raise
        response = None
        try:
            response = yield request
            free = not any(getattr(layer.inner, "price", None) or [True])
            check(layer.inner, response.usage.cost or response.cached or free)
            return response
        finally:
            purse.settle(response)

    made = "a budget cannot be sent to another process"
    return Middleware(flow, whose, left=purse.left, made=made)


def budget_left(lm: Any) -> dict[str, float]:
    """Return what the budgets around an LM leave, {} where there are none.

    >>> budget_left(retry()(budget(calls=3)(stub_lm())))
    {'calls': 3}
    """
    if not isinstance(lm, Layer):
        return {}
    left: dict[str, float] = merge_with(min, budget_left(lm.inner), lm.middleware.left())
    return left


class _Purse:
    """What was spent, and what is reserved for the calls under way."""

    def __init__(self, limits: dict[str, float]) -> None:
        from concurrent.futures import Future

        self.limits, self.under_way, self.lock = limits, 0, threading.Lock()
        self.spent: dict[str, float] = {"calls": 0, "tokens": 0, "usd": 0}
        self.dearest: dict[str, float] = {"calls": 1, "tokens": 0, "usd": 0}
        self.future, self.settled = Future, Future[None]()  # of the next call to end

    def left(self) -> dict[str, float]:
        return {name: limit - self.spent[name] for name, limit in self.limits.items()}

    def reserve(self) -> Flow:
        """Reserve a call; where only calls under way are in the way, wait for them."""
        while True:
            with self.lock:
                ahead, left = self.under_way + 1, self.left()
                if all(n > 0 and n >= ahead * self.dearest[name] for name, n in left.items()):
                    self.under_way += 1
                    return
                if not self.under_way:
                    shown = {name: round(self.spent[name], 6) for name in left}
                    most = f"at most {self.limits}"
                    raise BudgetExceeded("the budget is spent", shown, most, "raise it")
                ended = self.settled
            yield _Wait(ended)

    def settle(self, response: Response | None) -> None:
        """Book what a call took; a failed one is a call without a known price."""
        used = Usage() if response is None else response.usage
        took = {"calls": 1, "tokens": used.input_tokens + used.output_tokens, "usd": used.cost}
        with self.lock:
            self.under_way -= 1
            if response is None or not response.cached:
                self.spent = merge_with(sum, self.spent, took)
                self.dearest = merge_with(max, self.dearest, took)
            ended, self.settled = self.settled, self.future()
        ended.set_result(None)


def route(lms: Mapping[str, LM], default: LM | None = None) -> LM:
    """Make one LM of several, by the model that a request names: `Prompt.model`.

    So the steps of a program can use different models, trained ones among them.

    Args:
        lms: by the name of their model.
        default: answers requests that name no model, or another one.
    Raises:
        LMError: (when asked) nothing serves the model that is named.
    Calls: none of its own.

    >>> lm = route({"small": scripted_lm(["from the small one"])}, stub_lm())
    >>> lm(Request([Message("user", "Hi")], model="small")).text
    'from the small one'
    """
    return _routed(dict(lms))(default)


@factory
def _routed(lms: dict[str, LM]) -> Middleware:
    def flow(layer: Layer, request: Request) -> Flow:
        chosen = lms.get(request.model or "", layer.inner)
        if chosen is None:
            todo = "load parameters of this program's models, or add the LM to route"
            raise LMError("nothing serves this model", request.model, f"one of {list(lms)}", todo)
        return (yield request if chosen is layer.inner else invoke(chosen, request))

    named = {name: identity(lm) for name, lm in lms.items()}
    return Middleware(flow, lambda inner: canonical([identity(inner), named]))


@factory
def fallback(*others: LM, when: Callable[[LMError], bool] | None = None) -> Middleware:
    """Ask another LM where one fails.

    Args:
        *others: asked in this order after the first.
        when: tells which errors to go on after; by default those that may pass (`retryable`) and a
            prompt that is too long. A wrong key is raised: it would fail for ever.
    Raises:
        LMError: (when asked) that of the last LM, or one not to go on after.
    Calls: one of each LM at most.

    >>> lm = fallback(scripted_lm(["Hello"]))(scripted_lm([LMError("down", retryable=True)]))
    >>> lm(Request([Message("user", "Hi")])).text
    'Hello'
    """
    goes_on = when or (lambda one: one.retryable or isinstance(one, ContextWindowExceeded))

    def flow(layer: Layer, request: Request) -> Flow:
        *before, last_ = request, *(invoke(other, request) for other in others)
        for effect in before:
            try:
                return (yield effect)
            except LMError as error:
                if not goes_on(error):
                    raise
        return (yield last_)

    return Middleware(flow, lambda inner: canonical([identity(one) for one in (inner, *others)]))


@factory
def log(write: Callable[[Record], Any] | None = None) -> Middleware:
    """Write down each call as a record: who asked, what it took, and how it ended.

    In a program that a driver runs, calls of tools too. Texts of prompts and replies, arguments and
    results are not written, and no keys.

    Args:
        write: called with the record of each call that has ended; by default it goes as JSON to
            the logger "lmopt" of `logging`, at level INFO, or WARNING where the call failed.

    >>> seen = []
    >>> lm = log(seen.append)(stub_lm())
    >>> _ = lm(Request([Message("user", "Hi")], step="predict"))
    >>> seen[0].step, seen[0].error
    ('predict', '')
    """
    say = write or _write_log

    def told(effect: Any, facts: Callable[[Any], Fields]) -> Flow:
        began, outcome, failure = time.perf_counter(), None, ""
        try:
            outcome = yield effect
            return outcome
        except BaseException as error:  # a call that is cancelled, too
            failure = describe(error)
            raise
        finally:
            seconds = round(time.perf_counter() - began, 6)
            say(Record({**facts(outcome), "seconds": seconds, "error": failure}))

    def of_request(request: Request, response: Response | None) -> Fields:
        blank = {
            "model": request.model or "",
            "usage": Usage(),
            "finish_reason": "",
            "cached": False,
        }
        came = {name: getattr(response, name, "") or value for name, value in blank.items()}
        return {"step": request.step or "", "key": request.key, **came}

    return Middleware(
        lambda layer, request: told(request, partial(of_request, request)),
        around=lambda call: told(call, lambda outcome: {"call": call.name}),
    )


def _write_log(entry: Record) -> None:
    import logging

    level = logging.WARNING if entry.error else logging.INFO
    logging.getLogger("lmopt").log(level, "%s", entry.to_json())


# == 12. Evaluation ================================================================================


@frozen
class Score:
    """What a metric returns where a number is not enough."""

    value: float  # 0 (wrong) to 1 (right)
    feedback: str = ""  # what was wrong and how to do better, for reflective optimizers
    steps: Record = field(default=Record(), converter=_record)  # the same for single steps, by path
    usage: Usage = field(default=Usage(), eq=False, repr=False)  # what it cost to find out


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
    judged: Usage = field(default=Usage(), eq=False, repr=False)  # what the metric cost
    silent: LMError | None = field(default=None, eq=False, repr=False)  # the LM gave no answer

    def flat(self) -> dict[str, Any]:
        """Return all of it as one flat mapping."""
        given, notes = self.example, {"feedback": self.feedback, "error": self.error}
        made = {(f"predicted {n}" if n in given else n): v for n, v in self.prediction.items()}
        return {"score": self.score, **given, **made, **{n: v for n, v in notes.items() if v}}


_Z95 = 1.959963984540054  # the normal quantile of 0.975


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
        """What all runs cost together, and what it cost to judge them."""
        return sum((row.prediction.usage + row.judged for row in self.rows), Usage())

    def records(self) -> list[Record]:
        """Return each row as one flat record, all with the same fields."""
        rows = [row.flat() for row in self.rows]
        names = dict.fromkeys(concat(rows))
        return [Record({name: row.get(name, "") for name in names}) for row in rows]

    def table(self, limit: int = 20) -> str:
        """Return the first rows as a text table, cells cut to 30 characters."""
        rows, left = self.records()[:limit], len(self.rows) - limit
        cells = [[_line(value, 30) for value in row.values()] for row in rows]
        return _columns([list(rows[0]), *cells]) + f"\n... and {left} more rows" * (left > 0)

    def to_csv(self) -> str:
        """Return the rows as CSV, with a header; structured values as JSON."""
        import csv
        import io

        rows, out = self.records(), io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([list(rows[0]), *(map(as_text, row.values()) for row in rows)])
        return out.getvalue()

    def to_json(self) -> str:
        """Return the rows as a JSON list of objects."""
        return _dump(jsonable(self.records(), other=repr), indent=1)

    def _repr_html_(self) -> str:
        rows, left = self.records()[:100], len(self.rows) - 100
        table = f"<tr>{''.join(_tagged('th', name) for name in rows[0])}</tr>"
        for row, flat in zip(self.rows, rows, strict=False):
            look = ' style="background: #f003"' if row.error else ""
            table += f"<tr{look}>{''.join(_tagged('td', one) for one in flat.values())}</tr>"
        rest = f"<p>and {left} more rows</p>" * (left > 0)
        return f"{_tagged('div', repr(self))}<table>{table}</table>{rest}"

    def __repr__(self) -> str:
        low, high = self.interval
        counts = f"{len(self.rows)} rows, {len(self.errors)} errors"
        shown = f"; first: {self.errors[0].error}" if self.errors else ""
        return f"<score {self.score:.3f}, 95% {low:.3f} to {high:.3f}, {counts}{cut(shown)}>"


def _tagged(tag: str, value: Any) -> str:
    """A value in HTML; a long text is cut, and whole on a click."""
    from html import escape

    text = as_text(value)
    return f"<{tag}>{_folded(_line(value), text) if text[60:] else escape(text)}</{tag}>"


def evaluate(
    program: Program,
    dataset: Dataset,
    metric: Metric,
    *,
    lm: LM,
    workers: int | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> Evaluation:
    """Run a program on a data set and score each prediction; rows stand in the order of the data.

    A row in which the program itself fails (a reply that cannot be read, a tool that raises) gets
    `failure_score`; so does one that the LM could not answer just then, unless that happens three
    times in a row. What would fail on every row (a dead key, a spent budget, an error of an LM's
    own code, a wrong metric) is no wrong answer: it is raised at once.

    Args:
        dataset: examples with at least the inputs of the program.
        metric: (example, prediction) -> 0 to 1, bool, or `Score`; called on the workers.
        **options: params, failure_score, max_errors, progress and watch; see `scoring`.
    Raises:
        DataError: no examples, or one lacks an input; more than `max_errors` rows failed, or all
            alike (two or more, where `max_errors` is not given), and no reply is to blame.
        MetricError: the metric raised, or returned no number from 0 to 1; says for which row.
        LMError: the LM could not be asked.
    Calls: `program.max_calls` at most for each example.

    >>> qa = predict("question -> answer")
    >>> lm = mock_lm(lambda inputs: {"answer": "4"})
    >>> data = [{"question": "2+2?", "answer": "4"}, {"question": "2+3?", "answer": "5"}]
    >>> evaluate(qa, data, exact_match, lm=lm).score
    0.5
    """
    _check_watch(options.get("watch"), executor)
    flow = evaluating(program, dataset, metric, lm=lm, **options)
    made: Evaluation = drive(flow, lm, workers=workers, executor=executor)
    return made


async def aevaluate(
    program: Program,
    dataset: Dataset,
    metric: Any,
    *,
    lm: Any,
    workers: int | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> Evaluation:
    """Do what `evaluate` does, in the running event loop; `workers` are calls at once.

    >>> import asyncio
    >>> task = aevaluate(predict("q -> a"), [{"q": "?", "a": "text"}], exact_match, lm=stub_lm())
    >>> asyncio.run(task).score
    1.0
    """
    _check_watch(options.get("watch"), executor)
    flow = evaluating(program, dataset, metric, lm=lm, **options)
    made: Evaluation = await adrive(flow, lm, workers=workers, executor=executor)
    return made


def evaluating(
    program: Program,
    dataset: Dataset,
    metric: Any,
    *,
    lm: Any,
    params: _Params = None,
    **options: Any,
) -> Flow:
    """Return the flow of an evaluation, to be a part of another one; see `evaluate`.

    Args:
        **options: failure_score, max_errors, progress and watch; see `scoring`.

    >>> flow = evaluating(predict("q -> a"), [{"q": "?"}], exact_match, lm=stub_lm())
    >>> [row for _, row in next(flow).items]
    [Record(q='?')]
    """
    _check_metric(metric)
    examples = check_dataset(program, dataset)
    ready = program if params is None else program.with_params(params)
    rows = yield from scoring([(ready, one) for one in examples], metric, lm=lm, **options)
    (error, *others), passing = {row.error for row in rows}, tuple(p.__name__ for p in _PASSING)
    alike = error and not others and rows[1:] and not error.startswith(passing)
    if alike and not options.get("max_errors"):
        what, expected = f"all {len(rows)} rows failed alike", "a program that runs"
        raise DataError(what, error, expected, "correct the program", rows=rows)
    return Evaluation(rows)


def _check_metric(metric: Any) -> None:
    if not (callable(metric) or hasattr(metric, "flow")):
        todo = "write evaluate(program, dataset, metric, lm=lm)"
        raise DataError("this is no metric", metric, "a function of example and prediction", todo)


def scoring(
    jobs: Sequence[tuple[Program, Record]],
    metric: Any,
    *,
    lm: Any,
    failure_score: float = 0.0,
    max_errors: int | None = None,
    progress: Progress = None,
    silent: list[int] | None = None,
    desc: str = "evaluate",
    watch: Watch | None = None,
) -> Flow:
    """Return the flow that runs programs, each on its example, and scores them; it returns rows.

    Args:
        silent: holds how many rows in a row the LM could not answer, for who scores in parts.
        failure_score: of a row in which the program failed, 0 to 1.
        max_errors: stop when more rows than this have failed.
        desc: what progress says is done.

    >>> jobs = [(predict("q -> a"), Record(q="?", a="text"))]
    >>> [row.score for row in drive(scoring(jobs, exact_match, lm=stub_lm()), None)]
    [1.0]
    """
    _check_metric(metric)
    if progress is None:
        with suppress(ValueError):  # standard error may be closed, or none
            progress = getattr(sys.stderr, "isatty", bool)() and meter
    if progress and not callable(progress):
        raise DataError("this shows no progress", progress, "a function", "pass tqdm.tqdm")
    shown = partial(progress, total=len(jobs), desc=desc) if progress else None
    patience, count = _PATIENCE if silent else min(_PATIENCE, len(jobs)), silent or [0]
    rows, failed = list[Row](), list[Row]()

    def take(row: Any) -> None:
        if isinstance(row, MetricError):
            raise row
        count[0] = count[0] + 1 if row.silent else 0
        if count[0] >= patience:
            raise row.silent
        rows.append(evolve(row, silent=None) if row.silent else row)
        if row.error:
            failed.append(row)
        if max_errors is not None and len(failed) > max_errors:
            what = f"{len(failed)} of {len(rows)} rows failed; the last"
            raise DataError(what, row.error, f"at most {max_errors}", "correct the program")

    try:
        yield _Many(partial(_row, metric, failure_score, watch), jobs, lm, take, shown)
    except LmoptError as error:
        error.rows = tuple(rows)
        raise
    return tuple(rows)


Progress = Callable[..., Iterable[Any]] | Literal[False] | None
"""What shows how far a run of many is: called as tqdm is; None for `meter`, False for nothing."""


def meter(results: Iterable[Any], *, total: int = 0, desc: str = "") -> Iterator[Any]:
    """Pass results on, and show on standard error how many, how fast, and their mean score so far.

    One line, drawn over itself four times a second at most, and wiped out at the end.

    >>> list(meter([1, 2], total=2))
    [1, 2]
    """
    from shutil import get_terminal_size

    began, drawn, scored = time.monotonic(), 0.0, list[Row]()
    draw = partial(print, "\r\x1b[K", sep="", end="", file=sys.stderr, flush=True)
    try:
        for count, result in enumerate(results, start=1):
            yield result
            scored += [result] * isinstance(result, Row)
            now = time.monotonic()
            if now - drawn > 0.25:
                drawn = now
                line = f"{desc}: {count} of {total}, {count / max(now - began, 1e-9):.3g} a second"
                if scored:
                    low, high = (made := Evaluation(tuple(scored))).interval
                    line += f", score {made.score:.3f} ({low:.3f} to {high:.3f})"
                draw(cut(line, get_terminal_size().columns - 1))
    finally:
        if drawn:
            draw()


_PATIENCE = 3  # so many rows in a row that the LM could not answer are no accident


def check_dataset(program: Program, dataset: Dataset) -> tuple[Record, ...]:
    """Return a data set as records of the program's types, after checking that each has its inputs.

    So the cells of a CSV file become numbers and dates, and a label that is none of a `Literal` is
    found before any call.

    Args:
        dataset: mappings; or a DataFrame.
    Raises:
        DataError: it is empty, an example lacks an input, or a value is not of the type of the
            program's field of that name; says which.

    >>> check_dataset(predict("text -> n: int"), [{"text": "one two", "n": "2"}])
    (Record(text='one two', n=2),)
    """
    if not isinstance(program, Program):
        todo = "write evaluate(program, dataset, metric, lm=lm)"
        raise DataError("this is no program", program, "a Program", todo)
    examples, types = list(rows_of(dataset)), _known_types(program)
    if not examples:
        raise DataError("an empty data set", [], "at least one example", "add examples")
    for place, example in enumerate(examples):
        try:
            select_inputs(program, example)
            examples[place] = _read_as(types, example)
        except DataError as error:
            raise DataError(f"example {place}: {error}") from error
    return tuple(examples)


def rows_of(dataset: Any) -> tuple[Record, ...]:
    """Return a data set as records: mappings, or a DataFrame.

    >>> rows_of([{"q": "?"}])
    (Record(q='?'),)
    """
    if isinstance(dataset, (str, os.PathLike, Mapping)):
        todo = "read a file with read_examples, and put a single example into a list"
        raise DataError("this is no data set", dataset, "examples in a list", todo)
    if hasattr(dataset, "columns") and hasattr(dataset, "to_dict"):  # a DataFrame; nan is not equal
        rows = dataset.to_dict("records")
        dataset = [{n: None if v != v else v for n, v in row.items()} for row in rows]
    return _records(dataset)


def _known_types(program: Program) -> dict[str, Any]:
    """The types of fields, by name, that are not just text and mean the same in every step."""
    tasks = [leaf.signature for leaf in program.leaves.values() if leaf.signature]
    fields = groupby(operator.attrgetter("name"), concat(t.inputs + t.outputs for t in tasks))
    same = {n: found[0].type for n, found in fields.items() if len({f.words for f in found}) == 1}
    own = {one.name: one.type for one in program.inputs}
    names = {*own, *(program.outputs or same)}
    typed = {**same, **valfilter(lambda tp: tp is not str, own)}  # what a body says of its inputs
    return {n: tp for n, tp in typed.items() if n in names and tp not in (str, Any)}


def _read_as(types: Fields, example: Record) -> Record:
    changes = {}
    for name, tp in types.items():
        value = example.get(name)
        if value is None or (isinstance(value, str) and (not value or _free(tp))):
            continue
        try:
            data = first([*_loaded(value), value]) if isinstance(value, str) else value
            changes[name] = _history(data) if tp is History else coerce(tp, data)
        except ValueError as error:
            what = f"the field {name!r} cannot be read ({error})"
            raise DataError(what, value, words(tp), "correct the data") from error
    return example | changes if changes else example


def _row(
    metric: Any, failure_score: float, watch: Watch | None, job: tuple[Program, Record]
) -> Flow:
    """Run a program on an example and score it; returns the row, or a MetricError to be raised."""
    (program, example), events = job, list[Event]()
    inputs = select_inputs(program, example)
    try:
        began = _beginning(watch)
        prediction = yield from _interpret(program, inputs, program.root, began, events)
    except Exception as error:
        if stops(error):
            raise
        silent = error if isinstance(error, LMError) and error.retryable else None
        made, told = Prediction(trace=events), describe(error)
        return Row(example, made, failure_score, error=told, silent=silent)
    shown = {"example": dict(example), "prediction": dict(prediction)}
    try:
        asked = getattr(metric, "flow", lambda *pair: _once(Call(metric, pair)))
        result = yield from asked(example, prediction)
    except (LMError, BudgetExceeded, ReplayMiss):
        raise  # of a judge
    except Exception as error:
        what = f"the metric raised {type(error).__name__} ({error}) for"
        todo = f"correct {'the data, or ' * isinstance(error, DataError)}the metric"
        wrong = MetricError(what, shown, "a score", todo)
        wrong.__cause__ = error
        return wrong
    score = result if isinstance(result, Score) else Score(result)
    value = float(score.value) if hasattr(score.value, "__float__") else math.nan
    if not -1e-9 <= value <= 1 + 1e-9:  # cosines exceed 1 by rounding
        what = f"the metric returned {cut(repr(result), 60)} for"
        return MetricError(what, shown, "a number from 0 to 1", "correct or rescale it")
    value = min(max(value, 0.0), 1.0)
    return Row(example, prediction, value, score.feedback, "", score.steps, score.usage)


@frozen
class Comparison:
    """How much better the second of two evaluations is, row by row."""

    difference: float  # mean score of the second minus that of the first, -1 to 1
    interval: tuple[float, float]  # its 95 % interval
    p_value: float  # how probable such a difference is when there is none
    better: int  # number of rows in which the second scores higher
    worse: int  # number of rows in which it scores lower
    rows: int  # number of rows

    def __str__(self) -> str:
        low, high = self.interval
        found = f"{self.difference:+.3f} (95% {low:+.3f} to {high:+.3f}, p = {self.p_value:.2g})"
        return f"{found}: of {self.rows} rows {self.better} better, {self.worse} worse"


_SAME = 1e-9  # scores that differ by less are equal


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two evaluations of the same examples: what going from `a` to `b` gains.

    The test is that of random signs (Fisher 1935), exact where few rows differ or all that do by as
    much, as with scores of 0 and 1 (McNemar's), else in its normal approximation; the interval
    excludes 0 exactly where p < 0.05. Other examples are a DataError.

    >>> rows = [Row(Record(n=n), Prediction(), 0.0) for n in range(9)]
    >>> c = compare(Evaluation(tuple(rows)), Evaluation(tuple(evolve(r, score=1.0) for r in rows)))
    >>> c.difference, round(c.p_value, 4)
    (1.0, 0.0039)
    """
    from statistics import NormalDist

    if [row.example for row in a.rows] != [row.example for row in b.rows]:
        sizes, todo = (len(a.rows), len(b.rows)), "evaluate both on one data set"
        raise DataError("different examples", sizes, "the same, in the same order", todo)
    if not a.rows:
        raise DataError("no rows to compare", 0, "one or more", "evaluate more examples")
    gains = [after.score - before.score for before, after in zip(a.rows, b.rows, strict=True)]
    gains = [gain if abs(gain) > _SAME else 0.0 for gain in gains]  # scores are rounded sums
    n, mean = len(gains), math.fsum(gains) / len(gains)
    error = math.sqrt(math.fsum(gain * gain for gain in gains)) / n
    p = _chance([gain for gain in gains if gain])
    if 0.0 < p < 1.0:
        error = abs(mean) / -NormalDist().inv_cdf(p / 2)
    interval = (max(-1.0, mean - _Z95 * error), min(1.0, mean + _Z95 * error))
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Comparison(mean, interval, p, better, worse, n)


def _chance(gains: Sequence[float]) -> float:
    """How probable a sum as far from 0 is where each gain could as well be a loss."""
    count, total = len(gains), abs(math.fsum(gains))
    sizes = [abs(one) for one in gains]
    if count <= 1000 and max(sizes, default=0.0) - min(sizes, default=0.0) < _SAME:
        lost = min(sum(one > 0 for one in gains), sum(one < 0 for one in gains))
        ways = sum(math.comb(count, number) for number in range(lost + 1))
        return float(min(1.0, 2 * ways / 2**count))
    if count <= 12:
        signs = itertools.product((1, -1), repeat=count)
        sums = [math.fsum(map(operator.mul, one, sizes)) for one in signs]
        return sum(abs(one) >= total - _SAME for one in sums) / len(sums)
    error = math.sqrt(math.fsum(one * one for one in sizes))
    return math.erfc(total / error / math.sqrt(2))


# -- metrics: each compares one field, `field=`, or all that example and prediction share --


def _shared(example: Fields, prediction: Fields, name: str | None) -> list[tuple[Any, Any]]:
    """Pair the expected and the predicted value of one field, or of all that both have."""
    names = [one for one in prediction if one in example and name in (None, one)]
    if not names:
        expected = f"a field of {list(example)} and of {list(prediction)}"
        raise DataError("no field to compare", name or "(any)", expected, "name it: field=")
    return [(example[one], prediction[one]) for one in names]


def normalize(value: Any) -> str:
    """Return a text without what seldom matters: case, accents' form, punctuation, articles.

    Signs and points of numbers stay, and so does a text that is nothing but an article.

    >>> normalize("The  Eiffel-Tower!"), normalize("$1,234.50"), normalize("-5"), normalize("A")
    ('eiffel tower', '1234.50', '-5', 'a')
    """
    import unicodedata

    text = value if isinstance(value, str) else _dump(jsonable(value))
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3})|['’]", "", text)
    tokens = re.findall(r"(?<!\w)-?\d+(?:\.\d+)?|\w+|[^\w\s!-/:-@\[-`{-~]", text)
    return " ".join([one for one in tokens if one not in ("a", "an", "the")] or tokens)


def exact_match(example: Fields, prediction: Fields, *, field: str | None = None) -> float:
    """Score 1 where the predicted values equal the expected ones after `normalize`, else 0.

    >>> exact_match({"answer": "Paris"}, {"answer": "paris."})
    1.0
    """
    pairs = _shared(example, prediction, field)
    return float(all(normalize(expected) == normalize(made) for expected, made in pairs))


def f1(example: Fields, prediction: Fields, *, field: str | None = None) -> float:
    """Score the overlap of words, 0 to 1: the harmonic mean of precision and recall.

    Of several fields it is the mean.

    Reference: Rajpurkar et al. 2016, arXiv 1606.05250.

    >>> f1({"answer": "Paris"}, {"answer": "Paris, France"})
    0.6666666666666666
    """
    shares = []
    for pair in _shared(example, prediction, field):
        wanted, given = (Counter(normalize(one).split()) for one in pair)
        total = wanted.total() + given.total()
        shares.append(2 * (wanted & given).total() / total if total else 1.0)
    return math.fsum(shares) / len(shares)


def contains(example: Fields, prediction: Fields, *, field: str | None = None) -> float:
    """Score 1 where the expected words stand in the predicted text, in a row, after `normalize`.

    >>> contains({"answer": "Paris"}, {"answer": "It is Paris, of course."})
    1.0
    """
    pairs = _shared(example, prediction, field)
    return float(all(f" {normalize(words)} " in f" {normalize(text)} " for words, text in pairs))


def passage_match(
    example: Fields, prediction: Fields, *, field: str = "answer", context: str = "context"
) -> float:
    """Score 1 where a passage, of the list `context`, has the expected answer, or one of several.

    >>> passage_match({"answer": "Paris"}, {"context": ["Rome is old.", "Paris is the capital."]})
    1.0
    """
    for given, name in ((example, field), (prediction, context)):
        if name not in given:
            known = f"one of {', '.join(given)}"
            raise DataError("no field to compare", name, known, "name it: field=, context=")
    wanted = example[field]
    answers = [wanted] if isinstance(wanted, str) else wanted
    pairs = [({field: answer}, {field: one}) for one in prediction[context] for answer in answers]
    return float(any(contains(*pair) for pair in pairs))


@frozen(eq=False)
class Judge(Made):
    """A metric that a program computes; it is called as (example, prediction).

    Attributes:
        fill: (example, prediction) -> the inputs of the program.
    """

    program: Program  # what judges; it has prompts, which can be optimized as any
    lm: LM = field(repr=False)  # what answers its requests
    fill: Callable[[Fields, Fields], Fields] = field(repr=False)
    measure: Callable[[Prediction], Score] = field(repr=False)  # prediction of the program -> score
    made: Any = _made()

    def __call__(self, example: Fields, prediction: Fields) -> Score:
        """Score a prediction; makes the LM calls of the program, and raises what it raises."""
        made: Score = drive(self.flow(example, prediction), self.lm)
        return made

    async def acall(self, example: Fields, prediction: Fields) -> Score:
        """Do the same in the running event loop."""
        made: Score = await adrive(self.flow(example, prediction), self.lm)
        return made

    def flow(self, example: Fields, prediction: Fields) -> Flow:
        """Return the flow that scores a prediction, to be a part of another one."""
        flow = _begun(self.program, self.fill(example, prediction))
        made = yield from _deep(flow, partial(_instead, self.lm))
        return evolve(self.measure(made), usage=made.usage)

    @property
    def params(self) -> Params:
        """The prompts of the program."""
        return self.program.params

    def with_params(self, params: Mapping[str, Prompt]) -> Judge:
        """Return the metric with other prompts."""
        return evolve(self, program=self.program.with_params(params))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._again(), self.params)


@factory
def judge(lm: LM, criterion: str, **options: Any) -> Judge:
    """Make the metric that asks an LM how well a prediction meets a criterion, with feedback.

    It sees the whole example and the whole prediction, and grades from 1 to 5, which is 0 to 1.

    Args:
        criterion: what a good prediction is like, in words.
        **options: what `predict` takes.
    Calls: those of `predict` for each prediction.
    Reference: Zheng et al. 2023, arXiv 2306.05685.

    >>> polite = judge(scripted_lm([{"feedback": "Rude.", "grade": 2}]), "The answer is polite.")
    >>> polite({"question": "Where?"}, {"answer": "Go away."})
    Score(value=0.25, feedback='Rude.', steps=Record())
    """
    grade = Field("grade", Literal[1, 2, 3, 4, 5], "5 is perfect, 1 is useless")
    feedback = Field("feedback", desc="what is wrong with the prediction, and how to do better")
    told = f"Judge the prediction for the example by this criterion: {criterion}"
    task = Signature((Field("example", dict), Field("prediction", dict)), (feedback, grade), told)
    return Judge(
        predict(task, name="judge", **options),
        lm,
        lambda example, made: {"example": dict(example), "prediction": dict(made)},
        lambda made: Score((made.grade - 1) / 4, made.feedback),
    )


def _compared(told: str, names: Sequence[str], **shares: str) -> Signature:
    """The signature of a step that estimates shares, each 0 to 1."""
    outputs = [Field(name, float, f"share of {desc}, 0 to 1") for name, desc in shares.items()]
    return Signature(map(Field, names), outputs, told)


@factory
def semantic_f1(
    lm: LM, *, field: str = "answer", threshold: float | None = None, **options: Any
) -> Judge:
    """Make the metric that compares long answers by their ideas: the F1 of precision and recall.

    Args:
        field: what to compare; the other fields of the example are the question.
        threshold: score 1 from here on and 0 below; by default the F1 itself.
        **options: what `predict` takes.
    Calls: those of `predict` for each prediction.

    >>> reply = {"reasoning": "", "recall": 1.0, "precision": 0.5}
    >>> metric = semantic_f1(scripted_lm([reply]))
    >>> round(metric({"question": "?", "answer": "a"}, {"answer": "a and b"}).value, 3)
    0.667
    """
    task = _compared(
        "Compare the ideas of the answer with those of the expected answer.",
        ["question", "expected", "answer"],
        recall="the expected ideas that are in the answer",
        precision="the answer's ideas that are expected",
    )
    program = chain_of_thought(task, name="semantic_f1", **options)
    return Judge(program, lm, partial(_question, field, ""), partial(_harmonic, threshold))


@factory
def complete_and_grounded(
    lm: LM,
    *,
    field: str = "answer",
    context: str = "context",
    threshold: float | None = None,
    **options: Any,
) -> Judge:
    """Make the metric of retrieval: the answer says all that is expected, and nothing unfounded.

    It is the F1 of completeness, against the expected answer, and groundedness, in the passages.

    Args:
        context: the field of the passages, in the prediction or else in the example.
        **options: what `predict` takes; the other arguments are those of `semantic_f1`.
    Calls: those of `predict` for each prediction, twice.

    >>> replies = [{"reasoning": "", "completeness": 1}, {"reasoning": "", "groundedness": 0.5}]
    >>> metric = complete_and_grounded(scripted_lm(replies))
    >>> made = {"answer": "a", "context": ["a", "b"]}
    >>> round(metric({"question": "?", "answer": "a"}, made).value, 3)
    0.667
    """
    complete = _compared(
        "Find how much of the expected answer the answer covers.",
        ["question", "expected", "answer"],
        completeness="the expected ideas in the answer",
    )
    grounded = _compared(
        "Find how much of the answer the context supports.",
        ["question", "context", "answer"],
        groundedness="the answer's claims that it supports",
    )
    steps = {"complete": complete, "grounded": grounded}
    program = pipeline(**valmap(partial(chain_of_thought, **options), steps))
    return Judge(program, lm, partial(_question, field, context), partial(_harmonic, threshold))


def _question(field: str, context: str, example: Fields, prediction: Fields) -> dict[str, Any]:
    """The inputs of a judge that compares one field."""
    known = {**example, **prediction}
    if context and known.get(context) is None:
        raise DataError("no passages", context, f"one of {', '.join(known)}", "name them: context=")
    ((expected, made),) = _shared(example, prediction, field)
    asked = {n: v for n, v in example.items() if n not in (field, context)}
    shown = first(asked.values()) if len(asked) == 1 else asked
    given = {"question": shown, "expected": expected, "answer": made}
    given |= {"context": known[context]} if context else {}
    return {name: as_text(value) for name, value in given.items()}


def _harmonic(threshold: float | None, made: Prediction) -> Score:
    """The F1 of the shares that a judge estimates, each taken between 0 and 1."""
    from statistics import harmonic_mean

    shares = {n: min(max(one, 0.0), 1.0) for n, one in made.items() if isinstance(one, float)}
    value = harmonic_mean(list(shares.values()))
    feedback = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    return Score(value if threshold is None else float(value >= threshold), feedback)


# == 13. Storage ===================================================================================

_FORMAT = "lmopt params 1"


def dumps(params: Mapping[str, Prompt]) -> str:
    """Return parameters as JSON text, stable and fit to be compared line by line.

    A demonstration that holds a value without a JSON form is a DataError.

    >>> loads(dumps(predict("question -> answer").params))["predict"].demos
    ()
    """
    prompts = {path: _compact(jsonable(prompt)) for path, prompt in params.items()}
    return _dump({"format": _FORMAT, "params": prompts}, indent=2) + "\n"


def loads(text: str) -> Params:
    """Return the parameters of a text that `dumps` wrote; ParamsError where it is none.

    >>> loads(dumps({"predict": Prompt("Be brief.")}))["predict"].instructions
    'Be brief.'
    """
    what = "these are no parameters"
    try:
        data = jsonlib.loads(text, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ParamsError(what, text, "JSON", f"restore the file ({error})") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ParamsError(what, text, f"format {_FORMAT!r}", "save them with this version")
    prompts = data.get("params")
    try:
        if not isinstance(prompts, dict):
            raise ValueError("params are no object")
        made = _not_deep(coerce(dict[str, dict[str, Any]], prompts))
        for name in sorted(set(concat(made.values())) - set(jsonable(Prompt()))):
            raise ValueError(f"{name!r} is no part of a prompt")
        return Params(coerce(dict[str, Prompt], made))
    except (ValueError, TypeError, RecursionError) as error:
        todo = f"correct it ({error})"
        raise ParamsError("a wrong prompt", prompts, words(Prompt), todo) from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(pluck(0, pairs))
    if len(names) < len(pairs):
        raise ValueError(f"{names.most_common(1)[0][0]!r} stands there twice")
    return dict(pairs)


def save(params: Mapping[str, Prompt], path: Path_) -> None:
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
    if not isinstance(params, Mapping):
        raise ParamsError("these are no parameters", params, "Params", "write save(params, path)")
    write_whole(dumps(params), path)


def write_whole(text: str, path: Path_) -> None:
    """Write a text to a file, whole or not at all: a crash leaves the old one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole("text", Path(folder, "file"))
    ...     Path(folder, "file").read_text()
    'text'
    """
    target = Path(path).resolve()
    draft = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def load(path: Path_) -> Params:
    """Return the parameters of a file that `save` wrote; ParamsError where it is none.

    >>> load("none.json")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'none.json'
    """
    try:
        return loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        todo = f"restore it ({error})"
        raise ParamsError("this is no text", str(path), "UTF-8", todo) from error
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from error


def diff(a: Mapping[str, Prompt], b: Mapping[str, Prompt]) -> str:
    """Return what changed from one set of parameters to another, "" for nothing.

    Demonstrations that only moved are neither removed nor added.

    >>> old = predict("question -> answer").params
    >>> print(diff(old, old.replace("predict", instructions="Answer briefly.")))
    --- predict
    +++ predict
    -instructions: Given the fields `question`, produce the fields `answer`.
    +instructions: Answer briefly.
    """
    from difflib import unified_diff

    lines: list[str] = []
    for path in dict.fromkeys([*a, *b]):
        before, after, moved = a.get(path), b.get(path), False
        if before and after:
            old, new = _told_apart(before.demos), _told_apart(after.demos)
            kept, added = [one for one in old if one in new], [one for one in new if one not in old]
            moved = kept != [one for one in new if one in old]
            after = evolve(after, demos=[new[one] for one in kept + added])
        sides = _prompt_lines(before), _prompt_lines(after)
        found = [*unified_diff(*sides, path, path, n=0, lineterm="")]
        head = [f"--- {path}", f"+++ {path}"] if moved and not found else []
        lines += head + found + ["demonstrations in another order"] * moved
    return "\n".join(line for line in lines if not line.startswith("@@"))


def _told_apart(demos: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """Demonstrations by their text, and by how many equal ones stand before each."""
    texts = [one.to_json() for one in demos]
    return {(text, texts[:n].count(text)): demos[n] for n, text in enumerate(texts)}


def read_examples(path: Path_) -> tuple[Record, ...]:
    """Return the examples of a file: .csv, .json (a list) or .jsonl.

    The values of a CSV file, with commas, semicolons or tabs, are texts; `check_dataset` makes them
    values of a program's types.

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
        raise DataError("unknown kind of file", str(file), ", ".join(readers), "convert it")
    raw = file.read_bytes()
    try:
        return tuple(readers[file.suffix.lower()](raw.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        what = f"{file}: line {raw[: error.start].count(10) + 1} is no UTF-8"
        raise DataError(what, raw[error.start :][:20], "UTF-8", "convert it") from error
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
        what, line = f"line {error.lineno}: this is no JSON", text.split("\n")[error.lineno - 1]
        raise DataError(what, line, "JSON", str(error)) from error
    except RecursionError as error:
        raise DataError(
            "lists in lists, too deep", text, "a list of objects", "correct it"
        ) from error
    if not isinstance(data, list):
        raise DataError("line 1: no list", data, "a list of objects", "wrap it in [...]")
    for index, item in enumerate(data):
        if not isinstance(item, dict):
            raise DataError(f"item {index} is no object", item, "{...}", "correct it")
        yield Record(item)


def _read_csv(text: str) -> Iterator[Record]:
    import csv
    import io

    mark = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=mark)
    rows = filter(None, reader)
    most = csv.field_size_limit(len(text) + 1)  # a cell may be a whole document
    try:
        names = next(rows, [])
        if not names:
            raise DataError("an empty file", text, "a line with the names", "add rows")
        if len(set(names)) < len(names):
            what = f"line {reader.line_num} names a column twice"
            raise DataError(what, names, "distinct names", "rename one")
        for cells in rows:
            if len(cells) != len(names):
                what = f"line {reader.line_num} has {len(cells)} cells"
                raise DataError(what, cells, f"{len(names)}: {names}", "quote the commas")
            yield Record(zip(names, cells, strict=True))
    except csv.Error as error:
        what = f"line {reader.line_num} is no CSV"
        raise DataError(what, str(error), "cells and commas", "correct it") from error
    finally:
        csv.field_size_limit(most)
