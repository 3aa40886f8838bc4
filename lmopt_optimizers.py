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
"""Optimizers: functions (program, trainset, metric) -> better parameters.

>>> from lmopt import exact_match, predict, toy_lm
>>> qa = predict("animal -> sound")
>>> data = [{"animal": "dog", "sound": "woof"}, {"animal": "cat", "sound": "meow"}]
>>> params = labeled_few_shot(k=2)(qa, data, exact_match)
>>> qa.with_params(params)(toy_lm(), animal="my old cat").sound
'meow'

Sections: 1 Contract · 2 Parts · 3 Few-shot · 4 Instructions · 5 Settings · 6 Combinators · 7 Report

Arguments that mean the same everywhere stand in `Options`, and for those that bootstrap in
`Teaching`; `lm` runs the program, and the teacher where there is no `teacher_lm`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import random
import re
import statistics
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from attrs import evolve, field, frozen
from toolz import first, groupby, interleave, take, unique  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from concurrent.futures import Executor

if TYPE_CHECKING or not __package__:
    import lmopt
else:  # both modules were copied into a package
    from . import lmopt

__all__ = [
    # 1. Contract
    "Trial", "Plan", "Size", "Options", "Optimizer", "optimizer", "best", "Want", "Hunt",
    # 2. Parts
    "split", "spread", "labeled", "labeled_demos", "step_demos", "resampled", "race", "cases",
    "description", "proposer", "Propose", "cleaned", "tpe", "pareto", "relayed",
    # 3. Few-shot
    "labeled_few_shot", "Teaching", "fitting_count", "bootstrap", "passed", "bootstrap_few_shot",
    "random_search", "tpe_search", "knn_few_shot",
    # 4. Instructions
    "copro", "TIPS", "mipro", "gepa", "simba", "infer_rules", "avatar",
    # 5. Settings
    "tune",
    # 6. Combinators
    "chain", "best_of", "only", "limit", "if_better",
    # 7. Report
    "summary", "report",
]  # fmt: skip

# == 1. Contract ===================================================================================
# An optimizer is a value with two functions. `search` is a flow, as a program body is: it yields
# what it wants scored, run or written, in the words of its `Hunt`, and is sent what came of it.
# `bound` tells beforehand what that costs at most. Every random choice is drawn from
# `lmopt.seeded(seed, purpose, ...)`, so that the order in which threads finish cannot matter.

Examples = tuple[lmopt.Record, ...]
Propose = lmopt.Program | Callable[[lmopt.Record], str]
"""Who writes instructions: a program with the inputs of `proposer()` and the output `instructions`,
or any function from a record of those inputs to a text, a person at a keyboard included."""


@frozen
class Trial:
    """One set of parameters that an optimizer tried.

    Attributes:
        score: on the rows that the optimizer scores on, 0 to 1; None where it does not score.
        evaluation: where the score comes from; shorter than the data where the trial lost early.
        out: whether it lost early; its score, of fewer rows, then compares with no other.
    """

    params: lmopt.Params  # the parameters
    score: float | None = None
    note: str = ""  # what they are, and what happened
    parent: int | None = None  # index of the trial they were made from, None for the start
    calls: int = 0  # how many LM calls the optimizer had made by then
    evaluation: lmopt.Evaluation | None = field(default=None, repr=False)
    out: bool = False


@frozen
class Plan:
    """At most how many program runs, LM calls and metric calls something takes.

    >>> Plan(runs=2, calls=6, metrics=2) + Plan(runs=1, calls=3)
    Plan(runs=3, calls=9, metrics=2)
    """

    runs: int = 0
    calls: int = 0
    metrics: int = 0

    def __add__(self, other: Plan) -> Plan:
        runs, calls = self.runs + other.runs, self.calls + other.calls
        return Plan(runs, calls, self.metrics + other.metrics)


class Options(TypedDict, total=False):
    """What every optimizer takes.

    Attributes:
        valset: rows to score on, none of them in the training set; by default half of that.
        progress: called as tqdm is, for the rows of each evaluation.
    """

    valset: lmopt.Dataset | None
    propose: Propose | None  # who writes instructions; by default `proposer()`
    prompt_lm: lmopt.LM | None  # answers the proposer; by default `lm`
    seed: int  # of all choices, 0 included
    workers: int | None  # threads, as in `lmopt.evaluate`; they do not change the result
    executor: Executor | None  # what to run rows on instead; the outermost optimizer decides both
    progress: Callable[..., Iterable[Any]] | None
    within: str  # the only step, or program with steps, that may change; see `only`


def _given(valset: lmopt.Dataset | None) -> Examples | None:
    return None if valset is None else tuple(map(lmopt.Record, valset))


def _tops(within: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(None, [within])) if isinstance(within, str) else within


@frozen(eq=False, repr=False)
class _Options:
    valset: Examples | None = field(default=None, converter=_given)
    propose: Propose | None = None
    prompt_lm: Any = None
    seed: int = 0
    workers: int | None = None
    executor: Executor | None = None
    progress: Callable[..., Iterable[Any]] | None = None
    within: tuple[str, ...] = field(default=(), converter=_tops)

    def part(self, examples: Examples) -> tuple[Examples, Examples]:
        """Rows to learn from, and rows to score on; never the same."""
        if self.valset is None:
            return split(examples, seed=self.seed)
        known = set(examples)
        both = [row for row in unique(self.valset) if row in known]
        if both or not self.valset:
            what = (
                f"{len(both)} rows are in both trainset and valset" if both else "an empty valset"
            )
            todo = "take them out of one, or leave valset out"
            raise lmopt.DataError(what, both[:1], "rows of its own", todo)
        return examples, self.valset

    def paths(self, program: lmopt.Program) -> list[str]:
        """The steps that may change: those at or below each path that limits it."""
        found = list(program.params)
        for top in self.within:
            known = found
            found = [one for one in known if one == top or one.startswith(f"{top}.")]
            if not found:
                expected = f"one of {', '.join(known)}"
                raise lmopt.ParamsError("no such path", top, expected, "correct the path")
        return found


@frozen(eq=False, repr=False)
class Size:
    """How large a search is: its program, how many steps may change, and rows on either side."""

    program: lmopt.Program
    steps: int
    train: int
    val: int
    options: _Options

    def plan(self, runs: int, texts: int = 0) -> Plan:
        """Return the plan of so many runs of the program and so many texts to be proposed."""
        writer = self.options.propose or proposer()
        each = writer.max_calls if isinstance(writer, lmopt.Program) else 0
        return Plan(runs, runs * self.program.max_calls + texts * each, runs)


@frozen(eq=False)
class Optimizer:
    """A function (program, trainset, metric) -> params, whose trials can be watched.

    Made by `optimizer`. In an event loop: `await optimize.arun(...)`, `optimize.atrials(...)`.

    Attributes:
        parts: whether some rows are held out to score on; else it gets all.
    """

    name: str  # of its factory
    lm: Any = field(repr=False)  # runs the program
    search: Callable[[Hunt], lmopt.Flow] = field(repr=False)  # hunt -> flow
    bound: Callable[[Size], Plan] = field(repr=False)  # size -> plan
    parts: bool = field(default=True, repr=False)
    options: _Options = field(default=_Options(), repr=False)  # see `Options`

    def __call__(
        self, program: lmopt.Program, trainset: lmopt.Dataset, metric: lmopt.Metric
    ) -> lmopt.Params:
        """Return the parameters of the best trial; of equals, the earliest.

        A spent budget and Ctrl-C end the search with the best so far, and a warning that says so.
        Any other error is raised, with the best so far as its attribute `best`.

        Raises:
            DataError: the training set is empty, or an example lacks an input.
            LMError: the LM could not be asked.
            MetricError: the metric raised, or returned no score.
        """
        best = [Trial(program.params)]
        with _keeping(best):
            for trial in self.trials(program, trainset, metric):
                best[0] = _better(best[0], trial)
        return best[0].params

    async def arun(
        self, program: lmopt.Program, trainset: lmopt.Dataset, metric: Any
    ) -> lmopt.Params:
        """Do the same in the running event loop."""
        best = [Trial(program.params)]
        with _keeping(best):
            async for trial in self.atrials(program, trainset, metric):
                best[0] = _better(best[0], trial)
        return best[0].params

    def trials(
        self, program: lmopt.Program, trainset: lmopt.Dataset, metric: lmopt.Metric
    ) -> Iterator[Trial]:
        """Return an iterator of trials, made as they are asked for; the first is the start."""
        flow, chosen = self.flow(program, trainset, metric), self.options
        return lmopt.emit(flow, Trial, self.lm, workers=chosen.workers, executor=chosen.executor)

    def atrials(
        self, program: lmopt.Program, trainset: lmopt.Dataset, metric: Any
    ) -> AsyncIterator[Trial]:
        """Do the same in the running event loop."""
        flow, chosen = self.flow(program, trainset, metric), self.options
        return lmopt.aemit(flow, Trial, self.lm, workers=chosen.workers, executor=chosen.executor)

    def flow(
        self, program: lmopt.Program, trainset: lmopt.Dataset, metric: lmopt.Metric
    ) -> lmopt.Flow:
        """Return the search as a flow of effects and trials, to be a part of another one."""
        examples, chosen = lmopt.check_dataset(program, trainset), self.options
        if chosen.valset:
            chosen = evolve(chosen, valset=lmopt.check_dataset(program, chosen.valset))
        return _searching(evolve(self, options=chosen), program, examples, metric)

    def plan(self, program: lmopt.Program, trainset: lmopt.Dataset) -> Plan:
        """Return what a search costs at most; makes no LM call."""
        return self.bounded(program, len(lmopt.check_dataset(program, trainset)))

    def bounded(self, program: lmopt.Program, size: int) -> Plan:
        """Return what a search with so many examples costs at most."""
        given = self.options.valset
        train = (size + 1) // 2 if self.parts and given is None else size
        steps = len(self.options.paths(program))
        return self.bound(Size(program, steps, train, len(given or ()) or train, self.options))


def optimizer(
    name: str,
    lm: Any,
    search: Callable[[Hunt], lmopt.Flow],
    bound: Callable[[Size], Plan],
    *,
    parts: bool = True,
    **options: Unpack[Options],
) -> Optimizer:
    """Make an optimizer of a search and of what it costs at most.

    Args:
        name: of it.
        lm: runs the program.
        search: hunt -> flow; it yields `hunt.start()` first.
        bound: size -> plan.
        parts: whether some rows are held out to score on; else it gets all.
    Raises:
        TypeError: an unknown option.

    >>> def search(hunt):
    ...     yield hunt.start()
    ...     for path in hunt.paths:
    ...         best = hunt.top.params
    ...         yield hunt.trial(best.replace(path, instructions="Say woof."), f"woof at {path}")
    >>> woof = optimizer("woof", lmopt.toy_lm(), search, lambda size: size.plan(2 * size.val))
    >>> rows = [{"q": "1", "a": "woof"}, {"q": "2", "a": "woof"}]
    >>> [t.note for t in woof.trials(lmopt.predict("q -> a"), rows, lmopt.exact_match)]
    ['start', 'woof at predict']
    """
    _check_options(name, options)
    return Optimizer(name, lm, search, bound, parts, _Options(**options))


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    unknown = [one for one in options if one not in Options.__annotations__]
    if unknown:
        import difflib

        make = globals().get(name, optimizer)
        known = [*inspect.signature(make).parameters, *Teaching.__annotations__][1:]
        near = difflib.get_close_matches(unknown[0], known, 1)
        todo = f"did you mean {near[0]}?" if near else "leave it out"
        what = f"{name} has no option of this name"
        raise TypeError(lmopt.explain(what, unknown[0], ", ".join(unique(known)), todo))


@contextmanager
def _keeping(best: list[Trial]) -> Iterator[None]:
    try:
        yield
    except (lmopt.BudgetExceeded, KeyboardInterrupt) as error:
        kept = best[0].note or "the start"
        what = (
            f"the search was ended by {lmopt.describe(error)}; its best so far is returned: {kept}"
        )
        warnings.warn(what, stacklevel=4)
    except Exception as error:
        with suppress(AttributeError):
            error.best = best[0].params  # type: ignore[attr-defined]
        raise


def _better(best: Trial, trial: Trial) -> Trial:
    """Take the higher score; where there are no scores, each trial improves on the one before."""
    if trial.out:
        return best
    if best.score is None or trial.score is None or trial.score > best.score:
        return trial
    return best


def best(trials: Iterable[Trial]) -> Trial:
    """Return the best of the trials of a search; of equals, the earliest.

    >>> params = lmopt.predict("q -> a").params
    >>> best([Trial(params, 0.5), Trial(params, 0.7, "good"), Trial(params, 0.7, "late")]).note
    'good'
    """
    return functools.reduce(_better, trials)


# -- how a search says what it wants --


@frozen(eq=False, repr=False)
class Want:
    """What a search wants: a method of its hunt, by name, and what is given to it."""

    name: str
    given: lmopt.Fields
    flow: Callable[[], lmopt.Flow] = field(repr=False)


def _wanted(method: Callable[..., lmopt.Flow]) -> Callable[..., Want]:
    """Make a method return what is wanted, to be yielded, instead of its flow."""
    known = inspect.signature(method)

    @functools.wraps(method)
    def want(self: Hunt, *args: Any, **kwargs: Any) -> Want:
        given = dict(known.bind(self, *args, **kwargs).arguments)
        del given["self"]
        return Want(method.__name__, given, partial(method, self, *args, **kwargs))

    return want


def _searching(
    optimizer: Optimizer, program: lmopt.Program, examples: Examples, metric: lmopt.Metric
) -> lmopt.Flow:
    """Run a search: yield the effects of what it wants, and its trials."""
    chosen = optimizer.options
    train, val = chosen.part(examples) if optimizer.parts else (examples, chosen.valset or examples)
    hunt = Hunt(program, train, val, metric, optimizer.lm, chosen)
    yield from lmopt.through(optimizer.search(hunt), _satisfy)


def _satisfy(want: Any) -> lmopt.Flow:
    """Perform what a search yields; a trial is passed on."""
    if isinstance(want, (list, tuple)):
        outcomes = yield tuple(one.flow() for one in want)
    else:
        outcomes = [(yield from want.flow()) if isinstance(want, Want) else (yield want)]
    for made in outcomes:
        if isinstance(made, Trial) and isinstance(want, (Want, list, tuple)):
            yield made
    return tuple(outcomes) if isinstance(want, (list, tuple)) else outcomes[0]


class Hunt:
    """What a search sees of itself, and the words for what it wants, each to be yielded.

    Attributes:
        program: to be improved.
        train: rows to learn from.
        val: rows to score on.
        trials: all so far, in order.
        calls: LM calls so far.
        runs: runs of the program so far.
        paths: of the steps that may change.
    """

    def __init__(
        self,
        program: lmopt.Program,
        train: Examples,
        val: Examples,
        metric: lmopt.Metric,
        lm: Any,
        options: _Options = _Options(),
    ) -> None:
        self.program, self.train, self.val, self.metric, self.lm = program, train, val, metric, lm
        self.options, self.seed, self.paths = options, options.seed, options.paths(program)
        self.trials: list[Trial] = []
        self.calls, self.runs, self.best = 0, 0, 0
        self._seen: dict[str, int] = {}
        self._unused: list[Exception] = []  # proposals since the last trial
        self._done: dict[tuple[str, str], dict[int, lmopt.Row]] = {}

    @property
    def top(self) -> Trial:
        """The best trial so far."""
        return self.trials[self.best]

    def knows(self, params: lmopt.Params) -> bool:
        """Whether equal parameters were tried before."""
        return params.digest in self._seen

    @_wanted
    def start(self) -> lmopt.Flow:
        """The program as it is, scored; sent: the trial."""
        return self.trial(self.program.params, "start", None, False).flow()

    @_wanted
    def trial(
        self, params: lmopt.Params, note: str, parent: int | None = None, race: bool = True
    ) -> lmopt.Flow:
        """Parameters scored against the best so far; equal ones get the score they have.

        They were made from trial number `parent`, by default the best one. A `race` ends where they
        cannot win any more; sent: the trial.
        """
        params = self._allowed(params)
        parent = self.best if parent is None and self.trials else parent
        if self.knows(params):
            known = self.trials[self._seen[params.digest]]
            note = f"{note}; tried before"
            return self._book(evolve(known, note=note, parent=parent, calls=self.calls))
        beat = self.top.evaluation if race and self.trials else None
        result = yield from self._raced(params, beat)
        return self._scored(params, note, parent, result)

    @_wanted
    def unscored(self, params: lmopt.Params, note: str) -> lmopt.Flow:
        """Parameters that are better by what they are made of; sent: the trial."""
        yield from ()
        parent = len(self.trials) - 1 if self.trials else None
        return self._book(Trial(self._allowed(params), None, note, parent, self.calls))

    @_wanted
    def rows(self, params: lmopt.Params, places: Iterable[int] | None = None) -> lmopt.Flow:
        """Runs on rows of the training half, by default all; sent: the evaluation."""
        return self._score("train", self._allowed(params), places)

    @_wanted
    def held(self, params: lmopt.Params, places: Iterable[int] | None = None) -> lmopt.Flow:
        """Runs on held-out rows, by default all; sent: the evaluation."""
        return self._score("val", self._allowed(params), places)

    @_wanted
    def teach(
        self, teacher: lmopt.Program, rows: Examples, params: lmopt.Params, lm: Any
    ) -> lmopt.Flow:
        """Runs of another program, or with another LM; sent: the evaluation."""
        asked = self.lm if lm is None else lm
        return self._counted(teacher, rows, params, asked)

    @_wanted
    def cases(self, path: str, shown: int) -> lmopt.Flow:
        """What a step of the best trial did on the first rows of the training half, worst first."""
        places = range(min(shown, len(self.train)))
        result = yield from self._score("train", self.top.params, places)
        return cases(self.program, path, result.rows)

    @_wanted
    def propose(
        self,
        path: str,
        cases: Sequence[Any],
        *,
        tips: Sequence[str] = ("",),
        data: str = "",
        params: lmopt.Params | None = None,
    ) -> lmopt.Flow:
        """Instructions for a step, one text for each tip, from what it did; sent: the texts.

        Those that are empty, or equal to an earlier one, are left out.
        """
        chosen = self.top.params if params is None else params
        told = {
            "program": description(self.program.with_params(self.top.params)),
            "step": path,
            "current": chosen[path].instructions,
            "cases": cases,
            "attempts": _attempts(self.trials, path),
            "data": data,
        }
        writer = self.options.propose or proposer()
        asked = [lmopt.Record({**told, "tip": tip}) for tip in tips]
        if isinstance(writer, lmopt.Program):
            made = [one["instructions"] for one in (yield from self._asked(writer, asked))]
        else:
            made = []
            for one in asked:
                made.append((yield lmopt.invoke(writer, one)))
        return [text for text in unique(map(cleaned, made)) if text]

    @_wanted
    def ask(self, program: lmopt.Program, inputs: lmopt.Fields) -> lmopt.Flow:
        """A run of another program on the LM that writes; sent: the prediction, or None."""
        return first([*(yield from self._asked(program, [inputs])), None])

    def _asked(self, program: lmopt.Program, given: Sequence[lmopt.Fields]) -> lmopt.Flow:
        """Run a program on the LM that writes; equal requests are told apart by their rollout.

        A reply that cannot be used is left out, and noted in the next trial.
        """
        asked = self.options.prompt_lm or self.lm
        samples = [lmopt.sampled(program, index, 1 << 16) for index in range(len(given))]
        pairs = list(zip(samples, given, strict=True))
        made = yield from lmopt.gathered(_sample, pairs, asked)
        self.calls += sum(lmopt.usage(one.trace).calls for one in made)
        self._unused += [one for one in made if isinstance(one, Exception)]
        return [one for one in made if not isinstance(one, Exception)]

    def _allowed(self, params: lmopt.Params) -> lmopt.Params:
        """The parameters, but for changes of steps that must stay."""
        kept = {path: prompt for path, prompt in params.items() if path in self.paths}
        return lmopt.Params({**self.program.params, **kept})

    def _score(
        self, half: str, params: lmopt.Params, places: Iterable[int] | None = None
    ) -> lmopt.Flow:
        """Evaluate parameters on some rows; nothing is run twice."""
        rows = self.train if half == "train" else self.val
        wanted = list(range(len(rows)) if places is None else places)
        done = self._done.setdefault((half, params.digest), {})
        missing = list(unique(place for place in wanted if place not in done))
        if missing:
            asked = tuple(rows[place] for place in missing)
            result = yield from self._counted(self.program, asked, params, self.lm)
            done.update(zip(missing, result.rows, strict=True))
        return lmopt.Evaluation(tuple(done[place] for place in wanted))

    def _counted(
        self, program: lmopt.Program, rows: Examples, params: lmopt.Params, lm: Any
    ) -> lmopt.Flow:
        shown = self.options.progress
        flow = lmopt.evaluating(program, rows, self.metric, lm=lm, params=params, progress=shown)
        result = yield from flow
        self.calls, self.runs = self.calls + result.usage.calls, self.runs + len(rows)
        return result

    def _raced(self, params: lmopt.Params, beat: lmopt.Evaluation | None) -> lmopt.Flow:
        """Score on all held-out rows; see `race`."""
        size = len(self.val)
        step = max(16, -(-size // 8)) if beat is not None else size
        for end in range(step, size + step, step):
            result = yield from self._score("val", params, range(min(end, size)))
            if beat is not None and _lost(result, beat, size):
                break
        return result

    def _scored(
        self, params: lmopt.Params, note: str, parent: int | None, result: lmopt.Evaluation
    ) -> Trial:
        run, size = len(result.rows), len(self.val)
        out = f"; out after {run} of {size} rows" if run < size else ""
        note += out + _failures([row.error for row in result.errors])
        return self._book(Trial(params, result.score, note, parent, self.calls, result, run < size))

    def _book(self, trial: Trial) -> Trial:
        if self._unused:
            reason = lmopt.cut(str(self._unused[0]), 80)
            what = f"{len(self._unused)} texts could not be used ({reason})"
            trial, self._unused = evolve(trial, note=f"{trial.note}; {what}"), []
        self._seen.setdefault(trial.params.digest, len(self.trials))
        self.trials.append(trial)
        if not trial.out and (trial.score or 0.0) > (self.top.score or 0.0):
            self.best = len(self.trials) - 1
        return trial


def _sample(asked: tuple[lmopt.Program, lmopt.Fields]) -> lmopt.Flow:
    try:
        return (yield from lmopt.running(asked[0], lmopt.select_inputs(*asked)))
    except lmopt.LmoptError as error:
        if lmopt.stops(error):
            raise
        return error


def _failures(errors: list[str]) -> str:
    return f"; {len(errors)} failed (first: {lmopt.cut(errors[0], 80)})" if errors else ""


def _attempts(trials: Sequence[Trial], path: str, most: int = 10) -> list[dict[str, Any]]:
    """The last texts that were tried for a step, worst first, with their scores."""
    scores = {one.params[path].instructions: one.score for one in trials}
    ordered = sorted(list(scores.items())[-most:], key=lambda one: one[1] or 0.0)
    return [{"instructions": text, "score": round(score or 0.0, 3)} for text, score in ordered]


def _lost(result: lmopt.Evaluation, beat: lmopt.Evaluation, size: int) -> bool:
    if result.total + size - len(result.rows) <= beat.total:
        return True
    pairs = zip(result.rows, beat.rows, strict=False)
    gains = [row.score - other.score for row, other in pairs]
    return math.fsum(gains) < -3 * math.sqrt(math.fsum(gain * gain for gain in gains))


def relayed(flow: lmopt.Flow, tell: Callable[[Trial], Trial | None]) -> lmopt.Flow:
    """Run the flow of another search as a part of one; `tell` makes of each trial the one to emit.

    >>> inner = labeled_few_shot(k=1).flow(lmopt.predict("q -> a"), [{"q": "?"}], None)
    >>> [one.note for one in relayed(inner, lambda trial: evolve(trial, note="x"))]
    ['x', 'x']
    """

    def change(effect: Any) -> lmopt.Flow:
        if not isinstance(effect, Trial):
            return (yield effect)
        if (made := tell(effect)) is not None:
            yield made
        return effect

    return lmopt.through(flow, change)


# == 2. Parts ======================================================================================


def split(
    examples: Iterable[lmopt.Record], *, seed: int = 0, share: float = 0.5
) -> tuple[Examples, Examples]:
    """Part examples at random into those to learn from and those to score on.

    Args:
        examples: at least two that differ; of equal ones, only the first is used.
        seed: of the order.
        share: of the first part, between 0 and 1; each part gets at least one example.
    Raises:
        DataError: there are fewer than two different examples.

    >>> train, val = split([lmopt.Record(n=n) for n in range(10)], share=0.3)
    >>> len(train), len(val), set(train) & set(val)
    (3, 7, set())
    """
    if not 0 <= share <= 1:
        todo = "write share=0.8 for 80 %"
        raise lmopt.DataError("no share", share, "a number from 0 to 1", todo)
    rows = list(unique(examples))
    if len(rows) < 2:
        todo = "add examples, or pass a valset"
        raise lmopt.DataError("too few examples to split", rows, "two that differ", todo)
    lmopt.seeded(seed, "split").shuffle(rows)
    size = min(max(round(share * len(rows)), 1), len(rows) - 1)
    return tuple(rows[:size]), tuple(rows[size:])


def spread(
    examples: Iterable[lmopt.Record], k: int, *, by: Iterable[str], seed: int = 0
) -> Examples:
    """Draw at most `k` examples, in turns from those that differ in the fields `by`.

    Where all differ, as with free text, that is a plain random sample; with labels, each label
    comes equally often.

    >>> rows = [lmopt.Record(n=n, label="odd" if n in (3, 5) else "even") for n in range(8)]
    >>> sorted(row.label for row in spread(rows, 4, by=["label"]))
    ['even', 'even', 'odd', 'odd']
    """
    rows, names = list(examples), tuple(by)
    lmopt.seeded(seed, "spread").shuffle(rows)
    alike = groupby(lambda row: _values(row, names), rows)
    return tuple(take(k, interleave(alike.values())))


def _values(row: lmopt.Fields, names: Iterable[str]) -> str:
    return lmopt.canonical([row.get(name) for name in names], other=repr)


def labeled_demos(
    program: lmopt.Program, examples: Iterable[lmopt.Record], k: int, *, seed: int = 0
) -> lmopt.Params:
    """Return the program's parameters with `k` examples as demonstrations of each step.

    A step gets those fields of an example that it has itself, where that is at least one input and
    one output; other steps keep no demonstrations.

    >>> qa = lmopt.predict("question -> answer")
    >>> rows = [lmopt.Record(question="2+2?", answer="4", source="me")]
    >>> labeled_demos(qa, rows, 8)["predict"].demos
    (Record(question='2+2?', answer='4'),)
    """
    params, rows = program.params, tuple(examples)
    for path, leaf in program.leaves.items():
        demos = labeled(leaf, rows, k, seed=seed)
        params = params.replace(path, demos=demos)
    return params


def labeled(
    leaf: lmopt.Program, examples: Iterable[lmopt.Record], k: int, *, seed: int = 0
) -> Examples:
    """Return `k` demonstrations of one step from labelled examples, spread over its outputs.

    >>> labeled(lmopt.predict("q -> a"), [lmopt.Record(q="2+2?", a="4"), lmopt.Record(q="?")], 2)
    (Record(q='2+2?', a='4'),)
    """
    outputs = [one.name for one in leaf.signature.outputs] if leaf.signature else []
    return spread(lmopt.fitting(leaf, examples), k, by=outputs, seed=seed)


def step_demos(
    program: lmopt.Program, row: lmopt.Row, *, index: int = 0, seed: int = 0
) -> dict[str, lmopt.Record]:
    """Return what each step did in one run, as demonstrations by path.

    Of a step that ran more than once, one run is drawn; `index` is that of the row, so that it is
    not always the same one.

    >>> qa = lmopt.predict("question -> answer")
    >>> row = lmopt.Row(lmopt.Record(), qa(lmopt.stub_lm(), question="2+2?"), 1.0)
    >>> step_demos(qa, row)
    {'predict': Record(question='2+2?', answer='text')}
    """
    leaves = program.leaves
    ran = [one for one in row.prediction.trace if one.kind == "step" and not one.error]
    runs = groupby(lambda event: event.path, [one for one in ran if one.path in leaves])
    drawn = {
        path: lmopt.seeded(seed, "demo", path, index).choice(events)
        for path, events in runs.items()
    }
    return {path: event.inputs | event.outputs for path, event in drawn.items()}


def resampled(
    params: lmopt.Params, rollout: int, *, temperature: float | None = 1.0
) -> lmopt.Params:
    """Return parameters that ask for another sample of every answer; rollout 0 changes nothing.

    >>> resampled(lmopt.predict("q -> a").params, 2)["predict"].settings
    Record(rollout=2, temperature=1.0)
    """
    if rollout == 0:
        return params
    for path, prompt in params.items():
        settings = prompt.settings | {"rollout": rollout, "temperature": temperature}
        params = params.replace(path, settings=settings)
    return params


def race(
    program: lmopt.Program,
    dataset: lmopt.Dataset,
    metric: lmopt.Metric,
    *,
    lm: lmopt.LM,
    beat: lmopt.Evaluation | None = None,
    workers: int | None = None,
) -> lmopt.Evaluation:
    """Evaluate a program, and stop as soon as it cannot score more than another one did.

    It stops where even full marks on all rows that are left would not be enough, and where it is
    clearly worse, by three standard errors row by row. It looks after every eighth of the rows,
    never after less than 16, whatever the number of workers.

    Args:
        dataset: the rows, the same ones that `beat` was scored on.
        beat: the evaluation to be beaten; without it every row is evaluated.
    Returns:
        the evaluation of the rows that were run; its score is then at most that of `beat`.
    Calls: `program.max_calls` at most for each row.

    >>> qa, rows = lmopt.predict("question -> answer"), [{"question": "?", "answer": "no"}] * 64
    >>> best = lmopt.evaluate(qa, rows, lambda row, made: 0.9, lm=lmopt.stub_lm())
    >>> len(race(qa, rows, lmopt.exact_match, lm=lmopt.stub_lm(), beat=best).rows)
    16
    """
    rows = lmopt.check_dataset(program, dataset)
    flow = Hunt(program, (), rows, metric, lm)._raced(program.params, beat)
    made: lmopt.Evaluation = lmopt.drive(flow, lm, workers=workers)
    return made


def cases(
    program: lmopt.Program, path: str, rows: Iterable[lmopt.Row], k: int = 8
) -> list[dict[str, Any]]:
    """Return what a step did in evaluated rows, worst first: the evidence for better instructions.

    Each has the inputs and outputs of the step, what the example expects of it (or of the whole,
    where it says nothing of this step), and the feedback: that of the metric on this step, on the
    whole, or the error.

    >>> qa = lmopt.predict("q -> a")
    >>> rows = lmopt.evaluate(qa, [{"q": "2+2?", "a": "4"}], lmopt.exact_match, lm=lmopt.stub_lm())
    >>> cases(qa, "predict", rows.rows)
    [{'inputs': {'q': '2+2?'}, 'outputs': {'a': 'text'}, 'expected': {'a': '4'}, 'score': 0.0}]
    """
    known, leaf = {one.name for one in program.inputs}, program.leaves[path]
    own = {one.name for one in leaf.signature.outputs} if leaf.signature else set()
    found = []
    for row in sorted(rows, key=lambda row: row.score):
        wanted = {name: value for name, value in row.example.items() if name not in known}
        expected = {name: value for name, value in wanted.items() if name in own} or wanted
        feedback = row.steps.get(path, "") or row.feedback or row.error
        for event in row.prediction.trace:
            if event.kind == "step" and event.path == path:
                case = {"inputs": event.inputs, "outputs": event.outputs, "expected": expected}
                told = {"feedback": feedback} if feedback else {}
                found.append(lmopt.jsonable({**case, "score": row.score, **told}, other=repr))
    return found[:k]


def description(program: lmopt.Program) -> str:
    """Return what a program is made of, in words: its inputs, its steps and their instructions.

    >>> print(description(lmopt.predict("question -> answer")))
    predict takes question: str.
    Step predict takes question and makes answer. Its instructions: Given the fields `question`, \
produce the fields `answer`.
    """
    takes = ", ".join(f"{one.name}: {one.words}" for one in program.inputs)
    lines = [f"{program.name} takes {takes or 'nothing'}."]
    for path, leaf in program.leaves.items():
        task, prompt = leaf.signature, program.params[path]
        if task is not None:
            given, made = (", ".join(one.name for one in s) for s in (task.inputs, task.outputs))
            does = f"takes {given or 'nothing'} and makes {made}"
            lines.append(f"Step {path} {does}. Its instructions: {prompt.instructions}")
    return "\n".join(lines)


_PROPOSE = lmopt.Signature(
    (
        lmopt.Field("program", str, "what the program does, step by step"),
        lmopt.Field("step", str, "the step to write instructions for"),
        lmopt.Field("current", str, "its instructions now"),
        lmopt.Field("data", str, "what the data is like", default=""),
        lmopt.Field("cases", list[Any], "what the step did, worst first", default=()),
        lmopt.Field("attempts", list[Any], "earlier instructions and scores", default=()),
        lmopt.Field("tip", str, "how to go about it", default=""),
    ),
    (lmopt.Field("instructions", str, "the new instructions, and nothing else"),),
    "Write better instructions for one step of a program that asks a language model. Find out from "
    "the cases what goes wrong, and say what to do instead, in general terms and with the facts "
    "that the feedback and the expected values give. Keep what works. Do not repeat an attempt.",
)


def proposer(**options: Any) -> lmopt.Program:
    """Make the program that writes instructions: the default of every `propose=`.

    Args:
        **options: what `predict` takes, such as an adapter or a temperature, by default 1.
    Calls: those of `predict`.

    >>> [one.name for one in proposer().inputs]
    ['program', 'step', 'current', 'data', 'cases', 'attempts', 'tip']
    """
    return lmopt.predict(_PROPOSE, name="propose", **{"temperature": 1.0, **options})


def cleaned(text: Any) -> str:
    """Return instructions without what a model may put around them: a fence, quotes, a title.

    >>> cleaned("New instructions:\\n```\\nAnswer briefly.\\n```")
    'Answer briefly.'
    """
    plain, before = str(text).strip(), ""
    while plain != before:
        before = plain
        plain = re.sub(r"\A\[\[ ## \w+ ## \]\]|\[\[ ## completed ## \]\]\Z", "", plain).strip()
        plain = re.sub(r"\A[#*\s]*(?:the )?(?:new |improved |better )*instructions?\s*:[*\s]*", "",
                       plain, flags=re.IGNORECASE)  # fmt: skip
        if whole := re.fullmatch(r"```\w*\n(.*?)\n?```|([\"'])([^\"']*)\2", plain, re.DOTALL):
            plain = (whole[1] or whole[3] or "").strip()
    return plain


def tpe(
    history: Sequence[tuple[Sequence[int], float]],
    sizes: Sequence[int],
    rng: random.Random,
    *,
    gamma: float = 0.25,
    startup: int = 5,
    samples: int = 24,
) -> tuple[int, ...]:
    """Choose what to try next of categorical choices: a tree-structured Parzen estimator.

    The best `gamma` of what was tried, and the rest, each give a distribution of every choice, with
    one count for each option as a prior. Of some samples of the first, the one is taken that is
    most probable under it and least under the second; of what was tried already only if all was.

    Args:
        history: choices tried, as one index for each dimension, and their scores.
        sizes: how many options each dimension has, 1 or more.
        rng: of all randomness.
        gamma: share of the best, between 0 and 1.
        startup: tries that are plain random before that.
        samples: how many to choose from.
    Reference: Bergstra et al. 2011, NeurIPS 24. Independent dimensions, as there.

    >>> tried = [((0,), 0.0), ((1,), 1.0), ((2,), 0.0)] * 3
    >>> tpe(tried, [4], random.Random(0), startup=3)
    (3,)
    """
    known = {tuple(choice) for choice, _ in history}
    drawn = [tuple(rng.randrange(size) for size in sizes) for _ in range(samples)]
    if len(history) >= startup:
        order = sorted(history, key=lambda one: -one[1])
        best = max(1, math.ceil(gamma * len(order)))
        good, bad = (_counts(part, sizes) for part in (order[:best], order[best:]))
        drawn = [
            tuple(rng.choices(range(size), w)[0] for size, w in zip(sizes, good, strict=True))
            for _ in range(samples)
        ]
        drawn.sort(key=lambda choice: -_advantage(choice, good, bad))
    return next((choice for choice in drawn if choice not in known), drawn[0])


def _counts(
    tried: Sequence[tuple[Sequence[int], float]], sizes: Sequence[int]
) -> list[list[float]]:
    """The probability of each option of each dimension."""
    made = []
    for dimension, size in enumerate(sizes):
        counts = Counter(choice[dimension] for choice, _ in tried)
        made.append([(counts[option] + 1.0) / (len(tried) + size) for option in range(size)])
    return made


def _advantage(
    choice: Sequence[int], good: Sequence[Sequence[float]], bad: Sequence[Sequence[float]]
) -> float:
    return math.fsum(
        math.log(g[option] / b[option]) for option, g, b in zip(choice, good, bad, strict=True)
    )


def pareto(scores: Sequence[Sequence[float]]) -> list[int]:
    """Weigh candidates by on how many rows each is among the best; 0 where another one is so too.

    Args:
        scores: of each candidate, one for each row.
    Returns:
        for each candidate the number of rows it leads, 0 where it is dominated: each of those rows
        is led by another one that stays.
    Reference: Agrawal et al. 2025, arXiv 2507.19457, algorithm 2.

    >>> pareto([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    [0, 2, 1]
    """
    tops = [max(column) for column in zip(*scores, strict=True)]
    leads = [{row for row, value in enumerate(one) if value == tops[row]} for one in scores]
    alive = set(range(len(scores)))
    for one in sorted(alive, key=lambda index: (math.fsum(scores[index]), -index)):
        others = set().union(*(leads[other] for other in alive if other != one))
        if leads[one] <= others:
            alive.discard(one)
    return [len(leads[index]) if index in alive else 0 for index in range(len(scores))]


# == 3. Few-shot ===================================================================================


def _check(least: int = 0, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            what, todo = f"{name} is too small", f"raise {name}"
            raise lmopt.DataError(what, value, f"{least} or more", todo)


def labeled_few_shot(*, k: int = 16, seed: int = 0) -> Optimizer:
    """Use labelled examples as demonstrations.

    Each step gets up to `k` examples, 0 or more, in turns from those with different outputs.

    Calls: none.

    >>> qa = lmopt.predict("question -> answer")
    >>> rows = [{"question": "2+2?", "answer": "4"}]
    >>> labeled_few_shot(k=4)(qa, rows, lmopt.exact_match)["predict"].demos
    (Record(question='2+2?', answer='4'),)
    """
    _check(k=k)

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.unscored(hunt.program.params, "start")
        params = labeled_demos(hunt.program, hunt.train, k, seed=seed)
        yield hunt.unscored(params, f"up to {k} labelled examples")

    return optimizer("labeled_few_shot", None, search, lambda size: Plan(), parts=False, seed=seed)


class Teaching(Options, total=False):
    """What optimizers that bootstrap take.

    Attributes:
        max_labeled: by default as many as fit into the prompt. Searches try fewer too: 4, 16, 64 …
        max_prompt_tokens: of the prompt of a step with its demonstrations, four characters a token.
        rounds: how many times an example is tried, each time but the first with a new rollout at
            temperature 1; 1 or more.
        teacher: a program with the same steps, or other parameters; by default the program.
    """

    max_bootstrapped: int  # how many runs of the teacher to take, 0 or more
    max_labeled: int | None  # labelled examples fill the demonstrations of a step up to so many
    max_prompt_tokens: int
    rounds: int
    threshold: float  # score from which a run is taken, 0 to 1; 0 is a threshold
    teacher: lmopt.Program | Mapping[str, lmopt.Prompt] | None
    teacher_lm: lmopt.LM | None  # runs the teacher


@frozen(eq=False, repr=False)
class _Teaching:
    max_bootstrapped: int = 4
    max_labeled: int | None = None
    max_prompt_tokens: int = 8000
    rounds: int = 1
    threshold: float = 1.0
    teacher: lmopt.Program | Mapping[str, lmopt.Prompt] | None = None
    teacher_lm: Any = None

    def __attrs_post_init__(self) -> None:
        _check(max_bootstrapped=self.max_bootstrapped, max_labeled=self.max_labeled or 0)
        _check(1, rounds=self.rounds, max_prompt_tokens=self.max_prompt_tokens)

    def most(self, program: lmopt.Program, examples: Examples) -> int:
        """How many demonstrations a step has at most."""
        fit = fitting_count(program, examples, self.max_prompt_tokens)
        return fit if self.max_labeled is None else min(self.max_labeled, fit)

    def guide(self, program: lmopt.Program) -> lmopt.Program:
        """The program that shows how it is done; it must have the steps of the one that learns."""
        if not isinstance(self.teacher, lmopt.Program):
            return program.with_params(self.teacher or {})
        if list(self.teacher.params) != list(program.params):
            known, expected = list(self.teacher.params), f"the steps {', '.join(program.params)}"
            todo = "give the steps the same names"
            raise lmopt.ParamsError("a teacher with other steps", known, expected, todo)
        return self.teacher

    def plan(self, size: Size) -> Plan:
        runs = self.rounds * size.train if self.max_bootstrapped else 0
        return Plan(runs, runs * self.guide(size.program).max_calls, runs)


def fitting_count(program: lmopt.Program, examples: Examples, tokens: int) -> int:
    """Return how many examples fit into the prompt of each step, as demonstrations of mean length.

    Args:
        tokens: of the prompt, of four characters each.

    >>> rows = tuple(lmopt.Record(q="a" * 100, a=str(n)) for n in range(100))
    >>> fitting_count(lmopt.predict("q -> a"), rows, 1000)
    24
    """
    counts = [len(examples)]
    for leaf in program.leaves.values():
        empty, *sized = [
            sum(len(one.text) for one in _rendered(leaf, demos))
            for demos in [(), *([one] for one in lmopt.fitting(leaf, examples[:100]))]
        ]
        if sized:
            mean = statistics.fmean(sized) - empty
            counts.append(max(int((4 * tokens - empty) / mean), 0))
    return min(counts)


def _rendered(leaf: lmopt.Program, demos: Iterable[lmopt.Record]) -> tuple[lmopt.Message, ...]:
    task = leaf.signature
    assert task is not None and leaf.prompt is not None  # it is a leaf
    return lmopt.chat.render(task, evolve(leaf.prompt, demos=tuple(demos)), {})


def _rungs(most: int) -> list[int]:
    """How many demonstrations to try: as many as may be, and then fewer."""
    return [most, *reversed([4**n for n in range(1, 10) if 4**n < most])]


def _taught(options: lmopt.Fields) -> tuple[_Teaching, dict[str, Any]]:
    """Part the options into those of teaching, and those of every optimizer."""
    names = Teaching.__annotations__.keys() - Options.__annotations__.keys()
    given = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return _Teaching(**given), rest


def bootstrap(
    teacher: lmopt.Program,
    examples: Examples,
    *,
    wanted: int,
    threshold: float = 1.0,
    rounds: int = 1,
    max_labeled: int = 16,
    seed: int = 0,
) -> lmopt.Flow:
    """Say on which examples to run a teacher until `wanted` runs reach the threshold.

    A flow that yields (parameters of the teacher, block of examples), and is sent the evaluation.
    A block is as large as the number of runs still wanted, so that none is wasted. No demonstration
    of the teacher has the inputs of an example of the block.

    >>> qa, rows = lmopt.predict("q -> a"), tuple(lmopt.Record(q=q, a="no") for q in "abcde")
    >>> params, block = next(bootstrap(qa, rows, wanted=3))
    >>> len(block), len(params["predict"].demos)
    (3, 2)
    """
    left = examples
    for number in range(rounds):
        failed: Examples = ()
        while left and wanted:
            block, left = left[:wanted], left[wanted:]
            guide = _unspoilt(teacher, examples, block, max_labeled, seed)
            result = yield resampled(guide, number), block
            taken = passed(result, threshold)
            wanted -= len(taken)
            failed += tuple(row.example for row in result.rows if row not in taken)
        left = failed


def _unspoilt(
    teacher: lmopt.Program, examples: Examples, block: Examples, k: int, seed: int
) -> lmopt.Params:
    """The teacher's parameters for a block, with no demonstration that gives an answer away."""
    params = teacher.params
    if not any(prompt.demos for prompt in params.values()):
        asked = set(block)
        others = [row for row in examples if row not in asked]
        params = labeled_demos(teacher, others, k, seed=seed)
    for path, leaf in teacher.leaves.items():
        names = [one.name for one in leaf.inputs]
        given = {_values(row, names) for row in block}
        demos = [demo for demo in params[path].demos if _values(demo, names) not in given]
        params = params.replace(path, demos=demos)
    return params


def passed(evaluation: lmopt.Evaluation, threshold: float) -> tuple[lmopt.Row, ...]:
    """Return the rows that did not fail and reach a threshold, 0 included.

    >>> rows = (lmopt.Row(lmopt.Record(), lmopt.Prediction(), score) for score in (0.0, 1.0))
    >>> len(passed(lmopt.Evaluation(tuple(rows)), 0.0))
    2
    """
    return tuple(row for row in evaluation.rows if not row.error and row.score >= threshold)


def _lessons(
    hunt: Hunt, examples: Examples, given: _Teaching, seed: int, *, emit: bool = False
) -> lmopt.Flow:
    """Bootstrap; return the parameters and a note, and emit a trial after each block on demand."""
    teacher = given.guide(hunt.program)
    given = evolve(given, max_labeled=given.most(hunt.program, examples))
    names = ("threshold", "rounds", "max_labeled")
    options = {name: getattr(given, name) for name in names}
    blocks = bootstrap(teacher, examples, wanted=given.max_bootstrapped, seed=seed, **options)
    taken: tuple[lmopt.Row, ...] = ()
    tried, errors, note = 0, list[str](), f"up to {given.max_labeled} labelled examples"
    block = next(blocks, None)
    while block is not None:
        result = yield hunt.teach(teacher, block[1], block[0], given.teacher_lm)
        taken, tried = taken + passed(result, given.threshold), tried + len(result.rows)
        errors += [row.error for row in result.errors]
        note = f"{len(taken)} of {tried} runs reached the threshold{_failures(errors)}"
        if emit:
            yield hunt.unscored(_few_shot(hunt.program, examples, given, seed, taken), note)
        block = _next(blocks, result)
    params = _few_shot(hunt.program, examples, given, seed, taken)
    if emit and not tried:
        yield hunt.unscored(params, note)
    return params, note


def _next(flow: lmopt.Flow, value: Any) -> Any:
    try:
        return flow.send(value)
    except StopIteration:
        return None


def _few_shot(
    program: lmopt.Program,
    examples: Examples,
    given: _Teaching,
    seed: int,
    taken: tuple[lmopt.Row, ...],
) -> lmopt.Params:
    """The program's parameters with demonstrations from runs, filled up with labelled ones."""
    made = [step_demos(program, row, index=index, seed=seed) for index, row in enumerate(taken)]
    seen = {row.example for row in taken}
    others = [example for example in examples if example not in seen]
    params = program.params
    for path, leaf in program.leaves.items():
        demos = tuple(demo[path] for demo in made if path in demo)
        more = labeled(leaf, others, max((given.max_labeled or 0) - len(demos), 0), seed=seed)
        params = params.replace(path, demos=demos + more)
    return params


def bootstrap_few_shot(lm: lmopt.LM, **options: Unpack[Teaching]) -> Optimizer:
    """Run a teacher on the training set, and use what it did where it did well as demonstrations.

    The demonstrations of every step come from the traces of those runs; labelled examples fill them
    up. A teacher without demonstrations gets labelled ones, never of the examples it is run on.

    Calls: `rounds` runs of the teacher at most for each example; it stops when it has enough.
    Reference: Khattab et al. 2023, arXiv 2310.03714. Here examples run in blocks as large as the
    number of runs still wanted, which wastes none, and a score must reach 1 by default: half a
    right answer teaches the wrong half too.

    >>> qa = lmopt.predict("question -> answer")
    >>> rows = [{"question": "2+2?", "answer": "4"}, {"question": "2+3?", "answer": "5"}]
    >>> optimize = bootstrap_few_shot(lmopt.mock_lm(lambda inputs: {"answer": "4"}), max_labeled=0)
    >>> optimize(qa, rows, lmopt.exact_match)["predict"].demos
    (Record(question='2+2?', answer='4'),)
    """
    given, rest = _taught(options)

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.unscored(hunt.program.params, "start")
        yield from _lessons(hunt, tuple(unique(hunt.train)), given, hunt.seed, emit=True)

    return optimizer("bootstrap_few_shot", lm, search, given.plan, parts=False, **rest)


def random_search(
    lm: lmopt.LM,
    *,
    candidates: int = 16,
    stop_at: float | None = None,
    **options: Unpack[Teaching],
) -> Optimizer:
    """Try random sets of demonstrations, and keep the one that scores best on held-out rows.

    Tried are, in this order: the start; labelled examples, as many as fit, and fewer (64, 16, 4);
    `bootstrap_few_shot` on the examples as they stand; and the same on `candidates` random orders,
    each with a random number of runs to take, and of labelled examples beside them. Equal
    parameters are scored once; one that cannot win any more stops early (see `race`).

    Args:
        candidates: how many random sets, 0 or more.
        stop_at: score at which to stop, 0 to 1.
    Raises:
        DataError: (when it searches) fewer than two examples and no valset; rows in both sets.
    Calls: a run for each of the held-out rows and candidates, and those of bootstrapping.
    Reference: Khattab et al. 2023, arXiv 2310.03714. Here the rows that score are never among those
    that demonstrate.

    >>> qa = lmopt.predict("animal -> sound")
    >>> dogs = [{"animal": f"dog {number}", "sound": "woof"} for number in range(4)]
    >>> cats = [{"animal": f"cat {number}", "sound": "meow"} for number in range(4, 8)]
    >>> optimize = random_search(lmopt.toy_lm(), candidates=2)
    >>> [trial.score for trial in optimize.trials(qa, dogs + cats, lmopt.exact_match)][:2]
    [0.0, 1.0]
    """
    _check(candidates=candidates)
    given, rest = _taught(options)

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.start()
        for lesson in _draws(hunt, given, candidates):
            if stop_at is not None and (hunt.top.score or 0.0) >= stop_at:
                return
            params, note = yield from _lessons(hunt, *lesson)
            if not hunt.knows(params):
                yield hunt.trial(params, note)

    def bound(size: Size) -> Plan:
        most = size.train if given.max_labeled is None else min(given.max_labeled, size.train)
        plan = size.plan((candidates + 2 + len(_rungs(most))) * size.val)
        return sum([given.plan(size)] * (candidates + 1), plan)

    return optimizer("random_search", lm, search, bound, **rest)


_Lesson = tuple[Examples, "_Teaching", int]  # the examples, in their order, and a seed


def _draws(hunt: Hunt, given: _Teaching, count: int) -> Iterator[_Lesson]:
    """Lessons: labels alone, in several numbers; then runs on the examples as they stand; then on
    random orders of them."""
    most, rungs = given.max_bootstrapped, _rungs(given.most(hunt.program, hunt.train))
    for rung in rungs:
        yield hunt.train, evolve(given, max_bootstrapped=0, max_labeled=rung), hunt.seed
    if most:
        yield hunt.train, given, hunt.seed
    for index in range(count):
        rng = lmopt.seeded(hunt.seed, "random_search", index)
        order = tuple(rng.sample(hunt.train, len(hunt.train)))
        size = rng.randint(1, most) if most else 0
        lesson = evolve(given, max_bootstrapped=size, max_labeled=rng.choice(rungs))
        yield order, lesson, rng.getrandbits(32)


def _sets(hunt: Hunt, given: _Teaching, count: int) -> lmopt.Flow:
    """Sets of demonstrations to choose from: those of the program, and those of lessons."""
    sets = [hunt.program.params]
    for lesson in _draws(hunt, given, count):
        sets += [(yield from _lessons(hunt, *lesson))[0]]
    return sets


def tpe_search(
    lm: lmopt.LM, *, trials: int = 16, sets: int = 8, **options: Unpack[Teaching]
) -> Optimizer:
    """Choose a set of demonstrations for each step by itself, by a seeded TPE.

    Tried first are the start and the labelled examples; then combinations of labelled sets and
    bootstrapped ones, as those of `random_search`.

    Args:
        trials: combinations to try, 1 or more.
        sets: bootstrapped sets to choose from, 1 or more.
    Calls: a run for each held-out row and combination, and those of bootstrapping.
    Reference: Bergstra et al. 2011; the search of DSPy with Optuna, arXiv 2310.03714. Here a set is
    chosen, not a single demonstration, and the sampler is ours: see `tpe`.

    >>> tpe_search(lmopt.toy_lm(), trials=2)
    Optimizer(name='tpe_search')
    """
    _check(1, trials=trials, sets=sets)
    given, rest = _taught(options)

    def search(hunt: Hunt) -> lmopt.Flow:
        start, known = (yield hunt.start()), (yield from _sets(hunt, given, sets - 1))
        labelled = yield hunt.trial(known[1], "labelled", 0)
        tried = enumerate((start, labelled))
        history = [((n,) * len(hunt.paths), one.score or 0.0) for n, one in tried]
        for number in range(trials):
            rng = lmopt.seeded(hunt.seed, "tpe", number)
            choice = tpe(history, [len(known)] * len(hunt.paths), rng)
            params = start.params
            for path, index in zip(hunt.paths, choice, strict=True):
                params = params.replace(path, demos=known[index][path].demos)
            trial = yield hunt.trial(params, f"sets {choice}", 0)
            history.append((choice, trial.score or 0.0))

    def bound(size: Size) -> Plan:
        return sum([given.plan(size)] * sets, size.plan((trials + 2) * size.val))

    return optimizer("tpe_search", lm, search, bound, **rest)


def knn_few_shot(
    embed: Callable[[Sequence[str]], Sequence[Sequence[float]]], *, k: int = 16
) -> Optimizer:
    """Use as demonstrations the `k` examples that stand for the others best.

    Examples are taken one after the other, each the one that brings all examples nearest to one
    that was taken. To choose demonstrations for each input instead, make the program `knn_demos`.

    Args:
        embed: texts -> vectors, all of one length, such as an `embedder`.
        k: how many, 1 or more.
    Calls: none of an LM; one of `embed`.
    Reference: the facility location of Lin and Bilmes 2011, ACL; DSPy's KNNFewShot for the idea to
    choose demonstrations by nearness.

    >>> embed = lambda texts: [[one.count("dog"), one.count("cat")] for one in texts]
    >>> rows = [{"animal": a, "sound": s} for a, s in (("dog", "w"), ("dog!", "w"), ("cat", "m"))]
    >>> optimize = knn_few_shot(embed, k=2)
    >>> demos = optimize(lmopt.predict("animal -> sound"), rows, lmopt.exact_match)["predict"].demos
    >>> [demo.animal for demo in demos]
    ['dog', 'cat']
    """
    _check(1, k=k)

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.unscored(hunt.program.params, "start")
        rows, params = list(unique(hunt.train)), hunt.program.params
        given = [lmopt.select_inputs(hunt.program, row).values() for row in rows]
        texts = ["\n".join(map(lmopt.as_text, one)) for one in given]
        vectors = yield lmopt.invoke(embed, texts)
        chosen = _facilities([lmopt.unit(one) for one in vectors], k)
        for path, leaf in hunt.program.leaves.items():
            demos = lmopt.fitting(leaf, [rows[place] for place in chosen])
            params = params.replace(path, demos=demos)
        yield hunt.unscored(params, f"{len(chosen)} examples that stand for all")

    return optimizer("knn_few_shot", None, search, lambda size: Plan(), parts=False)


def _facilities(vectors: Sequence[Sequence[float]], k: int) -> list[int]:
    """Take greedily what brings all vectors nearest to one that is taken."""
    alike = [[math.fsum(map(mul, a, b)) for b in vectors] for a in vectors]
    near, chosen = [-1.0] * len(vectors), []
    for _ in range(min(k, len(vectors))):
        gains = [
            -math.inf if one in chosen else math.fsum(map(max, near, alike[one]))
            for one in range(len(vectors))
        ]
        best = max(range(len(vectors)), key=lambda one: gains[one])
        chosen.append(best)
        near = list(map(max, near, alike[best]))
    return chosen


# == 4. Instructions ===============================================================================
# Each search takes a start, has texts proposed from what went wrong, and lets them race on held-out
# rows. The proposer is an ordinary program: see `proposer`.


def copro(
    lm: lmopt.LM, *, breadth: int = 10, depth: int = 3, shown: int = 16, **options: Unpack[Options]
) -> Optimizer:
    """Improve instructions step by step, by coordinate ascent over proposals.

    In each round, for each step, `breadth` texts are proposed from what went wrong on `shown` rows
    of the training half, and from the earlier proposals with their scores, the failed ones too.

    Args:
        breadth: proposals in a round for each step, 1 or more.
        depth: rounds, 1 or more.
        shown: rows to look at for what goes wrong, 1 or more.
    Calls: for each round and step, runs on `shown` rows, `breadth` proposals and their scoring.
    Reference: Opsahl-Ong et al. 2024, arXiv 2406.11695, and OPRO, Yang et al. 2023, arXiv
    2309.03409. Here proposals see failures, not only the instructions, and rows to score on are
    held out.

    >>> rows = [{"text": f"a {w} {n}", "kind": w} for n in range(6) for w in ("dog", "oak")]
    >>> task = lmopt.predict("text -> kind")
    >>> [trial.score for trial in copro(lmopt.toy_lm(), breadth=1, depth=1).trials(
    ...     task, rows, lmopt.exact_match)]
    [0.0, 1.0]
    """
    _check(1, breadth=breadth, depth=depth, shown=shown)

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.start()
        for number in range(depth):
            for path in hunt.paths:
                seen, base = (yield hunt.cases(path, shown)), hunt.best
                for text in (yield hunt.propose(path, seen, tips=[""] * breadth)):
                    params = hunt.trials[base].params.replace(path, instructions=text)
                    yield hunt.trial(params, f"round {number + 1}, {path}", base)

    def bound(size: Size) -> Plan:
        rounds = depth * size.steps
        runs = size.val * (1 + rounds * breadth) + rounds * min(shown, size.train)
        return size.plan(runs, rounds * breadth)

    return optimizer("copro", lm, search, bound, **options)


TIPS = (
    "",
    "Be creative.",
    "Be simple and clear.",
    "Describe the task and its values in detail.",
    "Say for whom this matters, and how much.",
    "Let the model speak as an expert of the field.",
)
"""What `mipro` suggests to the proposer, one at a time; the first is to suggest nothing."""

_SIZES = {"light": (6, 100), "medium": (12, 300), "heavy": (18, 1000)}


def _sized(auto: str) -> tuple[int, int]:
    """How many candidates, and rows to score on."""
    if auto not in _SIZES:
        raise lmopt.DataError("no size", auto, ", ".join(_SIZES), "correct auto")
    return _SIZES[auto]


def mipro(
    lm: lmopt.LM,
    *,
    auto: Literal["light", "medium", "heavy"] | None = "light",
    candidates: int | None = None,
    trials: int | None = None,
    minibatch: int = 35,
    full_every: int = 5,
    **options: Unpack[Teaching],
) -> Optimizer:
    """Search instructions and demonstrations together.

    Sets of demonstrations are bootstrapped, instructions are proposed from a summary of the data,
    the program's description, its failures and tips; then a seeded TPE chooses a pair for each
    step. A pair is scored on a minibatch; after every `full_every` of them the one with the highest
    mean is scored on all held-out rows, which alone decide. `max_labeled=0` with
    `max_bootstrapped=0` leaves demonstrations alone.

    Args:
        auto: 6, 12 or 18 candidates, and at most 100, 300 or 1,000 rows to score on.
        candidates: sets of demonstrations, and about half as many texts, 2 or more; beats `auto`.
        trials: pairs to try, 1 or more; by default as in the paper's code.
        minibatch: rows for a first score, 1 or more.
        full_every: minibatches between full scores, 1 or more.
    Calls: bootstrapping, proposals, `minibatch` runs for each trial, and the full scores.
    Reference: Opsahl-Ong et al. 2024, arXiv 2406.11695. Here the best pair of the minibatches races
    the best so far, and no proposal is thrown away.

    >>> mipro(lmopt.toy_lm(), candidates=2, trials=3)
    Optimizer(name='mipro')
    """
    sized, most = (6, 1000) if auto is None else _sized(auto)
    count, (given, rest) = candidates or sized, _taught(options)
    _check(2, candidates=count if candidates is None else candidates)
    _check(1, minibatch=minibatch, full_every=full_every)
    fixed = not given.max_bootstrapped and given.max_labeled == 0
    texts = count if fixed else max(count // 2, 2)

    def tries(steps: int) -> int:
        choices = steps * (1 if fixed else 2)
        return trials or int(max(2 * choices * math.log2(count), 1.5 * count))

    def search(hunt: Hunt) -> lmopt.Flow:
        hunt.val = hunt.val[:most]
        yield hunt.start()
        sets = [hunt.program.params] if fixed else (yield from _sets(hunt, given, count - 3))
        wording = yield from _wording(hunt, texts)
        yield from _pairs(hunt, sets, wording, tries(len(wording)), minibatch, full_every)

    def bound(size: Size) -> Plan:
        size, many = evolve(size, val=min(size.val, most)), tries(size.steps)
        full = 1 - (-many // full_every)
        runs = many * min(minibatch, size.val) + full * size.val + min(16, size.train)
        plan = size.plan(runs, size.steps * (texts - 1)) + Plan(calls=3)
        return sum([] if fixed else [given.plan(size)] * (count - 2), plan)

    return optimizer("mipro", lm, search, bound, **rest)


def _wording(hunt: Hunt, count: int) -> lmopt.Flow:
    """For each step, its instructions and those that are proposed, each with another tip."""
    examples = lmopt.jsonable(hunt.train[:20], other=repr)
    made = yield hunt.ask(lmopt.predict(_SUMMARY, name="summary"), {"examples": examples})
    wording = {}
    for path in hunt.paths:
        rng = lmopt.seeded(hunt.seed, "tips", path)
        tips = [rng.choice(TIPS) for _ in range(count - 1)]
        seen = yield hunt.cases(path, 16)
        data = made.summary if made else ""
        told = yield hunt.propose(path, seen, tips=tips, data=data)
        wording[path] = [hunt.program.params[path].instructions, *told]
    return wording


_SUMMARY = lmopt.Signature(
    (lmopt.Field("examples", list[Any], "some of the data"),),
    (lmopt.Field("summary", str, "two or three sentences"),),
    "Say what this data is like: its task, topics, form and values.",
)


def _pairs(
    hunt: Hunt,
    sets: Sequence[lmopt.Params],
    wording: Mapping[str, Sequence[str]],
    tries: int,
    minibatch: int,
    full_every: int,
) -> lmopt.Flow:
    """Choose an instruction and a set of demonstrations for each step, by TPE over minibatches."""
    sizes = [size for texts in wording.values() for size in (len(texts), len(sets))]
    first = (0,) * len(sizes)
    history: list[tuple[tuple[int, ...], float]] = [(first, hunt.top.score or 0.0)]
    scores: dict[tuple[int, ...], list[float]] = {}
    tried = {first}
    for number in range(tries):
        rng = lmopt.seeded(hunt.seed, "pairs", number)
        choice = tpe(history, sizes, rng)
        places = sorted(rng.sample(range(len(hunt.val)), min(minibatch, len(hunt.val))))
        result = yield hunt.held(_paired(hunt, sets, wording, choice), places)
        history.append((choice, result.score))
        scores.setdefault(choice, []).append(result.score)
        left = [one for one in scores if one not in tried]
        if left and (number % full_every == full_every - 1 or number == tries - 1):
            best = max(left, key=lambda one: math.fsum(scores[one]) / len(scores[one]))
            tried.add(best)
            note = f"pairs {best} after {number + 1} minibatches"
            trial = yield hunt.trial(_paired(hunt, sets, wording, best), note, 0)
            history.append((best, trial.score or 0.0))


def _paired(
    hunt: Hunt,
    sets: Sequence[lmopt.Params],
    wording: Mapping[str, Sequence[str]],
    choice: Sequence[int],
) -> lmopt.Params:
    params = hunt.program.params
    for place, (path, texts) in enumerate(wording.items()):
        text, demos = texts[choice[2 * place]], sets[choice[2 * place + 1]][path].demos
        params = params.replace(path, instructions=text, demos=demos)
    return params


def gepa(
    lm: lmopt.LM,
    *,
    max_runs: int | None = None,
    auto: Literal["light", "medium", "heavy"] = "light",
    minibatch: int = 3,
    merge: bool = True,
    max_merges: int = 5,
    stop: Callable[[Trial], bool] | None = None,
    **options: Unpack[Options],
) -> Optimizer:
    """Evolve instructions by reflection on feedback, from a Pareto front of candidates.

    A candidate is drawn from those that are best on some held-out row, more often the more rows it
    leads. It runs on a minibatch of the training half; one of its steps, in turn, gets new
    instructions from what it did there and the feedback on it. Where the child does better on the
    minibatch, it is scored on all held-out rows and joins. Two candidates of the front are merged,
    step by step, where each has changed what the other has not.

    Args:
        max_runs: program runs in all; the search ends before one more would be too many.
        auto: how many, by the number of steps and held-out rows, where that is not given.
        minibatch: rows to reflect on, 1 or more.
        merge: whether to merge.
        max_merges: at most so often.
        stop: called with each trial; True ends the search.
    Calls: those of `max_runs` runs, and at most one proposal for every two minibatches.
    Reference: Agrawal et al. 2025, arXiv 2507.19457. Here scores that are known are used again, and
    the budget is never overshot.

    >>> gepa(lmopt.toy_lm(), max_runs=100)
    Optimizer(name='gepa')
    """
    _check(1, minibatch=minibatch)
    count, _ = _sized(auto)

    def budget(steps: int, val: int) -> int:
        rounds = int(max(4 * steps * math.log2(count), 1.5 * count))
        return max_runs if max_runs is not None else 12 * rounds + (rounds // 3 + 2) * val

    def search(hunt: Hunt) -> lmopt.Flow:
        size, most = len(hunt.val), budget(len(hunt.paths), len(hunt.val))
        if most < size:
            raise lmopt.DataError("too few runs", max_runs, f"{size} or more", "raise max_runs")
        trial = yield hunt.start()
        merges, idle, turns = max_merges if merge else 0, 0, Counter[int]()
        batch = min(minibatch, len(hunt.train))
        for number in itertools.count():
            full = hunt.runs + 2 * batch + size > most
            if full or idle > 50 or (trial and stop and stop(trial)):
                return
            rng, merged = lmopt.seeded(hunt.seed, "gepa", number), None
            if trial and merges and number:
                merged = yield from _merging(hunt, rng)
                merges -= merged is not None
            trial = merged or (yield from _mutating(hunt, rng, _batch(hunt, number, batch), turns))
            idle = 0 if trial else idle + 1

    def bound(size: Size) -> Plan:
        runs = budget(size.steps, size.val)
        return size.plan(runs, max(runs - size.val, 0) // 2 + 1)

    return optimizer("gepa", lm, search, bound, **options)


def _front(hunt: Hunt) -> list[int]:
    rows = [one.evaluation.rows for one in hunt.trials if one.evaluation]
    return pareto([[row.score for row in one] for one in rows])


def _batch(hunt: Hunt, number: int, size: int) -> list[int]:
    """The next places of a stream of training rows that is shuffled anew for each pass."""
    count, places = len(hunt.train), []
    for place in range(number * size, (number + 1) * size):
        order = list(range(count))
        lmopt.seeded(hunt.seed, "epoch", place // count).shuffle(order)
        places.append(order[place % count])
    return places


def _mutating(
    hunt: Hunt, rng: random.Random, places: Sequence[int], turns: Counter[int]
) -> lmopt.Flow:
    """Reflect on one step of a candidate of the front, as a part of `gepa`.

    Its steps take turns. Returns the trial of the child, None where it does no better on these rows
    than the candidate.
    """
    parent = rng.choices(range(len(hunt.trials)), _front(hunt))[0]
    params = hunt.trials[parent].params
    before = yield hunt.rows(params, places)
    path = hunt.paths[turns[parent] % len(hunt.paths)]
    turns[parent] += 1
    if all(row.score >= 1.0 for row in before.rows):
        return None
    seen = cases(hunt.program, path, before.rows)
    for text in (yield hunt.propose(path, seen, params=params))[:1]:
        child = params.replace(path, instructions=text)
        if not hunt.knows(child) and (yield hunt.rows(child, places)).total > before.total:
            turns[len(hunt.trials)] = turns[parent]
            return (yield hunt.trial(child, f"new instructions of {path}", parent, race=False))
    return None


def _merging(hunt: Hunt, rng: random.Random) -> lmopt.Flow:
    """Take from each of two candidates the steps that it alone has changed, as a part of `gepa`.

    Returns the trial of the child, None where there is nothing new to merge.
    """
    alive = [index for index, weight in enumerate(_front(hunt)) if weight]
    pairs = list(itertools.combinations(alive, 2))
    rng.shuffle(pairs)
    for one, other in pairs:
        low, high = sorted((one, other), key=lambda index: hunt.trials[index].score or 0.0)
        child = _mixed(*(hunt.trials[index].params for index in (0, low, high)))
        if child is not None and not hunt.knows(child):
            better = max(one, other, key=lambda index: hunt.trials[index].score or 0.0)
            return (yield hunt.trial(child, f"merged from {one} and {other}", better, race=False))
    return None


def _mixed(start: lmopt.Params, low: lmopt.Params, high: lmopt.Params) -> lmopt.Params | None:
    changed = [path for path, prompt in low.items() if prompt != start[path]]
    taken = {path: low[path] for path in changed if high[path] == start[path]}
    return lmopt.Params({**high, **taken}) if taken and len(taken) < len(start) else None


def simba(
    lm: lmopt.LM,
    *,
    steps: int = 8,
    candidates: int = 6,
    minibatch: int = 32,
    max_demos: int = 4,
    temperature: float = 0.2,
    **options: Unpack[Options],
) -> Optimizer:
    """Learn from the rows on which runs differ most, by a demonstration or by new instructions.

    In each step, programs of the pool run `candidates` times on a minibatch of the training half,
    each with a rollout of its own. Where the best and the worst run of a row lie farthest apart, a
    program of the pool gets the best run as a demonstration, or instructions that contrast the two.
    The best of these on the minibatch is scored on the held-out rows and joins the pool.

    Args:
        steps: how many, 1 or more.
        candidates: runs of a row, and programs made in a step, 1 or more.
        minibatch: rows of a step, 1 or more.
        max_demos: demonstrations of a step of the program; with 0 only instructions are written.
        temperature: of the choice from the pool, more than 0.
    Calls: for each step 2 * `candidates` * `minibatch` runs, proposals, and a scoring.
    Reference: SIMBA of DSPy, https://dspy.ai. Here the start has its true score in the pool, and a
    winner is scored at once.

    >>> simba(lmopt.toy_lm(), steps=1)
    Optimizer(name='simba')
    """
    _check(1, steps=steps, candidates=candidates, minibatch=minibatch)
    _check(max_demos=max_demos)

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.start()
        for number in range(steps):
            rng = lmopt.seeded(hunt.seed, "simba", number)
            places = sorted(rng.sample(range(len(hunt.train)), min(minibatch, len(hunt.train))))
            pool = [hunt.trials[_drawn(hunt, temperature, rng)].params for _ in range(candidates)]
            asked = [resampled(p, number * candidates + place) for place, p in enumerate(pool)]
            runs = yield [hunt.rows(one, places) for one in asked]
            made: list[tuple[lmopt.Params, str, int]] = []
            for bucket in _buckets(runs)[:candidates]:
                parent = _drawn(hunt, temperature, rng)
                made += yield from _learned(hunt, bucket, parent, max_demos, rng)
            scores = yield [hunt.rows(params, places) for params, _, _ in made]
            if made:
                best = max(range(len(made)), key=lambda place: scores[place].score)
                params, what, parent = made[best]
                yield hunt.trial(params, f"step {number + 1}, {what}", parent)

    def bound(size: Size) -> Plan:
        runs = 2 * candidates * min(minibatch, size.train) + size.val
        return size.plan(size.val + steps * runs, steps * candidates)

    return optimizer("simba", lm, search, bound, **options)


def _drawn(hunt: Hunt, temperature: float, rng: random.Random) -> int:
    """Draw a trial, better ones more often."""
    scores = [one.score or 0.0 for one in hunt.trials]
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return rng.choices(range(len(scores)), weights)[0]


def _buckets(runs: Sequence[lmopt.Evaluation]) -> list[list[lmopt.Row]]:
    """The runs of each row, best first; rows whose runs differ most first."""
    rows = [
        sorted(same, key=lambda row: -row.score)
        for same in zip(*(one.rows for one in runs), strict=True)
    ]
    return sorted(rows, key=lambda same: (same[-1].score - same[0].score, -same[0].score))


def _learned(
    hunt: Hunt, runs: Sequence[lmopt.Row], parent: int, max_demos: int, rng: random.Random
) -> lmopt.Flow:
    """What a program of the pool learns from the runs of one row, the best of which comes first."""
    params = hunt.trials[parent].params
    if max_demos and rng.random() < 0.5:
        return [(_with_demo(hunt, params, runs[0], max_demos, rng), "a demonstration", parent)]
    path = rng.choice(hunt.paths)
    seen = cases(hunt.program, path, [runs[-1], runs[0]])
    tips = ["The cases are a bad and a good run of one input."]
    texts = yield hunt.propose(path, seen, tips=tips, params=params)
    return [(params.replace(path, instructions=text), "instructions", parent) for text in texts]


def _with_demo(
    hunt: Hunt, params: lmopt.Params, row: lmopt.Row, most: int, rng: random.Random
) -> lmopt.Params:
    """The parameters with a run as one more demonstration of each step; old ones make room."""
    for path, demo in step_demos(hunt.program, row).items():
        old = list(params[path].demos)
        while len(old) >= most:
            old.pop(rng.randrange(len(old)))
        params = params.replace(path, demos=(*old, demo))
    return params


def infer_rules(
    lm: lmopt.LM,
    *,
    candidates: int = 10,
    rules: int = 10,
    shown: int = 40,
    **options: Unpack[Teaching],
) -> Optimizer:
    """Have rules inferred from labelled examples, and keep those that score best.

    The demonstrations are those of `bootstrap_few_shot`, or those of the start where these score no
    better; each candidate has other rules, inferred from another draw of the training half.

    Args:
        candidates: how many sets of rules, 1 or more.
        rules: how many rules to ask for.
        shown: examples to infer them from, 1 or more.
    Calls: bootstrapping, a proposal for each candidate and step, and the scoring.
    Reference: InferRules of DSPy, https://dspy.ai. Here the candidate that scored best is returned.

    >>> infer_rules(lmopt.toy_lm(), candidates=2)
    Optimizer(name='infer_rules')
    """
    _check(1, candidates=candidates, shown=shown)
    given, rest = _taught(options)
    tips = [f"Keep the instructions; add {rules} short rules that the cases show."]

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.start()
        shown_too, _ = yield from _lessons(hunt, hunt.train, given, hunt.seed)
        yield hunt.trial(shown_too, "demonstrations", 0)
        base = hunt.top.params  # with the demonstrations or without
        for number in range(candidates):
            rng = lmopt.seeded(hunt.seed, "rules", number)
            seen = _labelled_cases(
                hunt.program, rng.sample(hunt.train, min(shown, len(hunt.train)))
            )
            params = base
            for path in hunt.paths:
                for text in (yield hunt.propose(path, seen, tips=tips, params=base)):
                    params = params.replace(path, instructions=text)
            yield hunt.trial(params, f"rules {number + 1}", hunt.best)

    def bound(size: Size) -> Plan:
        return size.plan((candidates + 2) * size.val, candidates * size.steps) + given.plan(size)

    return optimizer("infer_rules", lm, search, bound, **rest)


def _labelled_cases(program: lmopt.Program, rows: Iterable[lmopt.Record]) -> list[Any]:
    """Examples as cases: what goes in, and what is expected."""
    names = {one.name for one in program.inputs}
    parts = [
        {
            "inputs": {name: value for name, value in row.items() if name in names},
            "expected": {name: value for name, value in row.items() if name not in names},
        }
        for row in rows
    ]
    made: list[Any] = lmopt.jsonable(parts, other=repr)
    return made


def avatar(
    lm: lmopt.LM,
    *,
    rounds: int = 10,
    upper: float = 1.0,
    lower: float = 0.0,
    shown: int = 10,
    **options: Unpack[Options],
) -> Optimizer:
    """Rewrite instructions from a contrast of runs that went well and runs that went badly.

    Made for agents, whose trajectories are among what is shown; good for any program.

    Args:
        rounds: how many, 1 or more; it ends before where no run goes badly.
        upper: score from which a run went well, 0 to 1.
        lower: score up to which it went badly, 0 to 1.
        shown: runs of either kind at most, 1 or more.
    Calls: for each round, runs on the training half, a proposal for each step, and a scoring.
    Reference: Wu et al. 2024, arXiv 2406.11200. Here new instructions are measured before they are
    kept.

    >>> avatar(lmopt.toy_lm(), rounds=1)
    Optimizer(name='avatar')
    """
    _check(1, rounds=rounds, shown=shown)

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.start()
        for number in range(rounds):
            base, params = hunt.best, hunt.top.params
            rows = (yield hunt.rows(params)).rows
            bad = [row for row in rows if row.score <= lower][:shown]
            good = [row for row in rows if row.score >= upper][:shown]
            if not bad:
                return
            tips = [f"The first {len(bad)} cases went badly, the others well."]
            for path in hunt.paths:
                seen = cases(hunt.program, path, [*bad, *good], 2 * shown)
                for text in (yield hunt.propose(path, seen, tips=tips)):
                    params = params.replace(path, instructions=text)
            yield hunt.trial(params, f"round {number + 1}", base)

    def bound(size: Size) -> Plan:
        return size.plan(size.val + rounds * (size.val + size.train), rounds * size.steps)

    return optimizer("avatar", lm, search, bound, **options)


# == 5. Settings ===================================================================================


def tune(
    lm: lmopt.LM,
    space: Mapping[str, Sequence[Any]],
    *,
    trials: int = 20,
    **options: Unpack[Options],
) -> Optimizer:
    """Choose settings by trying them: all combinations where they are few, else by TPE.

    Every step gets the same. Without a `valset` it scores on all of the training set, for nothing
    is learned of it.

    Args:
        space: choices by name: a sampling setting, `adapter` (chat, json, xml or plain), `model`,
            or `demos`, the number of demonstrations to keep.
        trials: how many combinations to try at most, 1 or more.
    Raises:
        DataError: there is nothing to choose from.
        ParamsError: an unknown setting.
    Calls: those of scoring each combination.

    >>> optimize = tune(lmopt.toy_lm(), {"temperature": [0.0, 0.7], "adapter": ["chat"]})
    >>> optimize.plan(lmopt.predict("q -> a"), [{"q": "?"}] * 5).runs
    15
    """
    names, choices = list(space), [list(one) for one in space.values()]
    if not names or not all(choices):
        raise lmopt.DataError("nothing to choose from", dict(space), "name=[...]", "add choices")
    _check(1, trials=trials)
    for name, options_ in zip(names, choices, strict=True):
        if name not in ("model", "demos"):
            lmopt.Prompt(settings={name: options_[0]})  # complains now
    grid = math.prod(map(len, choices))

    def search(hunt: Hunt) -> lmopt.Flow:
        start = yield hunt.start()
        history: list[tuple[Sequence[int], float]] = []
        every = itertools.product(*(range(len(one)) for one in choices))
        for number in range(min(grid, trials)):
            rng = lmopt.seeded(hunt.seed, "tune", number)
            choice = next(every) if grid <= trials else tpe(history, [*map(len, choices)], rng)
            chosen = {n: c[i] for n, c, i in zip(names, choices, choice, strict=True)}
            note = ", ".join(f"{n}={v}" for n, v in chosen.items())
            trial = yield hunt.trial(_tuned(start.params, chosen), note, 0)
            history.append((choice, trial.score or 0.0))

    def bound(size: Size) -> Plan:
        return size.plan((1 + min(grid, trials)) * size.val)

    return optimizer("tune", lm, search, bound, parts=False, **options)


def _tuned(params: lmopt.Params, chosen: lmopt.Fields) -> lmopt.Params:
    special = {name: value for name, value in chosen.items() if name in ("model", "demos")}
    settings = {name: value for name, value in chosen.items() if name not in special}
    for path, prompt in params.items():
        demos = prompt.demos[: special.get("demos", len(prompt.demos))]
        model = special.get("model", prompt.model)
        params = params.replace(path, demos=demos, model=model, settings=prompt.settings | settings)
    return params


# == 6. Combinators ================================================================================


def _inside(outer: _Options, optimizer: Optimizer) -> Optimizer:
    """An optimizer inside another one: it may change no more than that."""
    tops = outer.within + optimizer.options.within
    return evolve(optimizer, options=evolve(optimizer.options, within=tops))


def _inner(hunt: Hunt, optimizer: Optimizer, params: lmopt.Params | None = None) -> lmopt.Flow:
    """The flow of an optimizer inside another one."""
    allowed = _inside(hunt.options, optimizer)
    return allowed.flow(hunt.program.with_params(params or {}), hunt.train, hunt.metric)


def _bounds(size: Size, optimizers: Iterable[Optimizer]) -> Plan:
    """What optimizers inside another one cost at most."""
    inner = [_inside(size.options, one) for one in optimizers]
    return sum((one.bounded(size.program, size.train) for one in inner), Plan())


def _shared(optimizers: Iterable[Optimizer], **options: Unpack[Options]) -> Options:
    """The options of a combinator: what runs rows for it is by default what does for its parts."""
    chosen = [one.options for one in optimizers]
    workers = max([one.workers for one in chosen if one.workers], default=None)
    executor = next((one.executor for one in chosen if one.executor), None)
    return {"workers": workers, "executor": executor, **options}


def _best(hunt: Hunt, optimizer: Optimizer) -> lmopt.Flow:
    """Run an optimizer on the training half; return its best trial."""
    best, spent = Trial(hunt.program.params), hunt.calls

    def tell(trial: Trial) -> None:
        nonlocal best
        best, hunt.calls = _better(best, trial), spent + trial.calls

    yield from relayed(_inner(hunt, optimizer), tell)
    return best


def chain(*optimizers: Optimizer) -> Optimizer:
    """Run optimizers one after the other, each on the best of the one before.

    Their scores should be on the same rows: give them one `valset`, or the same seed.

    Args:
        *optimizers: none of them is the identity.
    Calls: those of all.
    Reference: Soylu et al. 2024, arXiv 2407.10930 (BetterTogether).

    >>> len(list(chain().trials(lmopt.predict("q -> a"), [{"q": "?"}], lmopt.exact_match)))
    1
    """

    def search(hunt: Hunt) -> lmopt.Flow:
        if not optimizers:
            yield hunt.unscored(hunt.program.params, "start")
        best: int | None = None
        for one in optimizers:
            best = yield from _link(hunt, one, best)

    lm = next((one.lm for one in optimizers if one.lm is not None), None)
    bound, shared = partial(_bounds, optimizers=optimizers), _shared(optimizers)
    return optimizer("chain", lm, search, bound, parts=False, **shared)


def _link(hunt: Hunt, optimizer: Optimizer, best: int | None) -> lmopt.Flow:
    """Run one optimizer from the best trial so far; return the place of the best one after it."""
    spent, places = hunt.calls, list[int]()
    start = None if best is None else hunt.trials[best]

    def tell(trial: Trial) -> Trial | None:
        nonlocal best
        hunt.calls = spent + trial.calls
        if start and not places and (trial.score is None or start.score is not None):
            places.append(best or 0)  # it starts with the best so far
            return None
        parent = best if trial.parent is None else places[trial.parent]
        made = evolve(trial, parent=parent, calls=hunt.calls)
        places.append(len(hunt.trials))
        hunt.trials.append(made)
        if best is None or _better(hunt.trials[best], made) is made:
            best = places[-1]
        return made

    yield from relayed(_inner(hunt, optimizer, start.params if start else None), tell)
    return best


def best_of(*optimizers: Optimizer, lm: lmopt.LM, **options: Unpack[Options]) -> Optimizer:
    """Run several optimizers from the same start, and keep what scores best on held-out rows.

    Args:
        *optimizers: each gets the training half.
        lm: runs the program to score what they return.
    Calls: those of all, and a scoring for each.

    >>> both = best_of(labeled_few_shot(k=1), labeled_few_shot(k=4), lm=lmopt.toy_lm())
    >>> both.plan(lmopt.predict("q -> a"), [{"q": "?", "a": "!"}] * 8).runs
    12
    """

    def search(hunt: Hunt) -> lmopt.Flow:
        yield hunt.start()
        for one in optimizers:
            best = yield from _best(hunt, one)
            yield hunt.trial(best.params, one.name, 0)

    def bound(size: Size) -> Plan:
        return size.plan((1 + len(optimizers)) * size.val) + _bounds(size, optimizers)

    return optimizer("best_of", lm, search, bound, **_shared(optimizers, **options))


def only(path: str, optimizer: Optimizer) -> Optimizer:
    """Let an optimizer change one step, or all steps below a path; the others stay as they are.

    Args:
        path: of the step, or of a program that has steps.
        optimizer: what changes it.
    Raises:
        ParamsError: (when it searches) there is no such path.
    Calls: those of the optimizer.

    >>> task = lmopt.pipeline(x=lmopt.predict("q -> a"), y=lmopt.predict("a -> b"))
    >>> rows = [{"q": "1", "a": "2", "b": "3"}]
    >>> params = only("y", labeled_few_shot(k=1))(task, rows, lmopt.exact_match)
    >>> [len(prompt.demos) for prompt in params.values()]
    [0, 1]
    """
    return _inside(_Options(within=path), optimizer)


class _Enough(BaseException):
    """The search has gone on as long as it may; no `Exception`: what is inside is closed."""


def limit(
    optimizer: Optimizer, *, trials: int | None = None, calls: int | None = None
) -> Optimizer:
    """Stop an optimizer early.

    Args:
        optimizer: what to stop.
        trials: after so many, the start included; 1 or more.
        calls: after the trial with which it has made so many LM calls; to stop within a trial, give
            its LM a `budget`.
    Calls: those of the optimizer at most.

    >>> short = limit(random_search(lmopt.toy_lm()), trials=2)
    >>> rows = [{"q": str(n), "a": "x"} for n in range(8)]
    >>> len(list(short.trials(lmopt.predict("q -> a"), rows, lmopt.exact_match)))
    2
    """
    if trials is None and calls is None:
        raise lmopt.DataError("no limit", None, "trials= or calls=", "pass one")
    _check(1, trials=1 if trials is None else trials)

    def search(hunt: Hunt) -> lmopt.Flow:
        count = 0

        def change(effect: Any) -> lmopt.Flow:
            nonlocal count
            outcome = yield effect
            if isinstance(effect, Trial):
                count += 1
                if count == trials or (calls is not None and effect.calls >= calls):
                    raise _Enough
            return outcome

        with suppress(_Enough):
            yield from lmopt.through(_inner(hunt, optimizer), change)

    bound = partial(_bounds, optimizers=[optimizer])
    name = f"limit({optimizer.name})"
    return evolve(optimizer, name=name, search=search, bound=bound, parts=False)


def if_better(
    optimizer: Optimizer, *, lm: lmopt.LM, level: float = 0.05, **options: Unpack[Options]
) -> Optimizer:
    """Keep the start unless a paired test on held-out rows says that the result is better.

    Args:
        optimizer: gets the training half.
        lm: runs both on the held-out rows.
        level: how probable a difference may be by chance, between 0 and 1.
    Calls: those of the optimizer, and two scorings.

    >>> rows = [{"animal": f"{a} {n}", "sound": a[:2]} for n in range(20) for a in ("dog", "cat")]
    >>> sure = if_better(labeled_few_shot(k=4), lm=lmopt.toy_lm())
    >>> [trial.note for trial in sure.trials(lmopt.predict("animal -> sound"), rows,
    ...     lmopt.exact_match)]
    ['start', 'labeled_few_shot is better: p = 7.74e-06']
    """

    def search(hunt: Hunt) -> lmopt.Flow:
        before = yield hunt.start()
        best = yield from _best(hunt, optimizer)
        after = yield hunt.held(best.params)
        found = lmopt.compare(before.evaluation, after)
        sure = found.difference > 0 and found.p_value < level
        verdict = "is better" if sure else "is not surely better"
        note = f"{optimizer.name} {verdict}: p = {found.p_value:.3g}"
        kept, shown = (best.params, after) if sure else (before.params, before.evaluation)
        yield Trial(kept, shown.score, note, 0, hunt.calls, shown)

    def bound(size: Size) -> Plan:
        return size.plan(2 * size.val) + _bounds(size, [optimizer])

    shared = _shared([optimizer], **options)
    return Optimizer("if_better", lm, search, bound, options=_Options(**shared))


# == 7. Report =====================================================================================


def summary(trials: Iterable[Trial]) -> str:
    """Return a table of trials as text: score, its interval, calls, parent and note.

    >>> print(summary([Trial(lmopt.predict("q -> a").params, note="start")]))
       #  score  95 %           calls  from  note
       0      -  -                  0     -  start
    """
    shown = list(trials)
    lines, top = ["   #  score  95 %           calls  from  note"], _place_of_best(shown)
    for place, one in enumerate(shown):
        score = "-" if one.score is None else f"{one.score:.3f}"
        low, high = one.evaluation.interval if one.evaluation else (0.0, 0.0)
        interval = f"{low:.3f} to {high:.3f}" if one.evaluation else "-"
        parent = "-" if one.parent is None else str(one.parent)
        star = "*" if place == top and one.score is not None else " "
        row = (
            f"{star}{place:>3}  {score:>5}  {interval:<14} {one.calls:>5}  {parent:>4}  {one.note}"
        )
        lines.append(row)
    return "\n".join(lines)


def _place_of_best(trials: Sequence[Trial]) -> int:
    found = best(trials) if trials else None
    return next((place for place, one in enumerate(trials) if one is found), 0)


def report(trials: Iterable[Trial], *, title: str = "Optimization") -> str:
    """Return trials as one HTML page that needs nothing else: no network, no script.

    It has the score against the calls with 95 % intervals, the tree of candidates, the difference
    of each prompt from its parent's, the rows of start and best side by side, and the cost. No
    trials are a DataError.

    >>> page = report([Trial(lmopt.predict("q -> a").params, 0.5, "start")])
    >>> page.startswith("<!doctype html>"), "<svg" in page
    (True, True)
    """
    shown = list(trials)
    if not shown:
        raise lmopt.DataError("no trials to report", shown, "one or more", "run the search first")
    top = _place_of_best(shown)
    parts = [
        f"<h1>{_escape(title)}</h1>",
        _headline(shown, top),
        f'<h2>Score against calls</h2>\n<div class="wide">{_chart(shown, top)}</div>',
        f"<h2>Candidates</h2>\n{_tree(shown, top)}",
        f"<h2>Start and best, row by row</h2>\n{_side_by_side(shown[0], shown[top])}",
    ]
    return _PAGE.format(title=_escape(title), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem;
  color: #222; background: #fff; }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.2rem; margin-top: 2rem }}
svg {{ width: 100%; min-width: 32rem; height: auto; }}
ul {{ padding-left: 1.2rem; border-left: 1px solid #ccc; list-style: none; }}
summary {{ cursor: pointer; overflow-wrap: anywhere; }} .best > summary {{ font-weight: bold }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: .5rem; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
ins, del {{ text-decoration: none }} ins {{ background: #dcf5dc }} del {{ background: #fbdcdc }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; width: 100%; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .5rem; text-align: left;
  vertical-align: top; }}
.up {{ background: #eefaee }} .down {{ background: #fdeeee }}
</style></head><body>
{body}
</body></html>
"""


def _escape(text: str) -> str:
    from html import escape

    return escape(text)


def _headline(trials: Sequence[Trial], top: int) -> str:
    start, end = trials[0].score, trials[top].score
    scores = "" if start is None or end is None else f"from {start:.3f} to <b>{end:.3f}</b>, "
    scored = [one for one in unique(trials, key=lambda one: one.params.digest) if one.evaluation]
    spent = sum((one.evaluation.usage for one in scored), lmopt.Usage())
    tokens = f"{spent.input_tokens + spent.output_tokens:,} tokens for scoring"
    cost = f", {spent.cost:.4f} US dollars" if spent.cost else ""
    calls = max(one.calls for one in trials)
    return f"<p>{scores}{len(trials)} trials, {calls:,} calls, {tokens}{cost}.</p>"


def _chart(trials: Sequence[Trial], top: int) -> str:
    """Score against calls, each with its interval, and the best so far as a line."""
    most = max(1, *(one.calls for one in trials))
    steps: list[str] = []
    marks = [_grid(level) for level in (0.0, 0.25, 0.5, 0.75, 1.0)]
    marks.append(f'<text x="780" y="285" text-anchor="end">{most:,} calls</text>')
    highest = -1.0
    for place, one in enumerate(trials):
        if one.score is None:
            continue
        x, y = round(50 + 730 * one.calls / most, 1), _height(one.score)
        if one.evaluation is not None:
            low, high = map(_height, one.evaluation.interval)
            marks.append(f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}" stroke="#9bc"/>')
        if one.score > highest:
            steps += [f"{x},{_height(max(highest, 0.0))}", f"{x},{y}"] if steps else [f"{x},{y}"]
            highest = one.score
        tip = _escape(f"{place}: {one.score:.3f} after {one.calls} calls, {one.note}")
        fill = "#c40" if place == top else "#27a"
        marks.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}"><title>{tip}</title></circle>')
    if steps:
        points = " ".join([*steps, f"780,{_height(highest)}"])
        marks.append(f'<polyline points="{points}" fill="none" stroke="#27a"/>')
    look = 'font-size="12" font-family="sans-serif" role="img" aria-label="score against calls"'
    return f'<svg viewBox="0 0 800 295" {look}>{"".join(marks)}</svg>'


def _height(score: float) -> float:
    return round(260 - 240 * score, 1)


def _grid(level: float) -> str:
    y = _height(level)
    line = f'<line x1="50" x2="780" y1="{y}" y2="{y}" stroke="#ddd"/>'
    return f'{line}<text x="44" y="{y + 4}" text-anchor="end">{level:.2f}</text>'


def _tree(trials: Sequence[Trial], top: int, parent: int | None = None) -> str:
    """Candidates below those they were made from, each with what it changed."""
    places = [place for place, one in enumerate(trials) if one.parent == parent]
    items = [f"<li>{_leaf(trials, n, top)}{_tree(trials, n, top)}</li>" for n in places]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _leaf(trials: Sequence[Trial], place: int, top: int) -> str:
    one = trials[place]
    score = "not scored" if one.score is None else f"{one.score:.3f}"
    head = f"{place}: {score}, {_escape(one.note)}"
    if one.parent is None:
        lines = [f"{path}: {prompt.instructions}" for path, prompt in one.params.items()]
        body = _escape("\n".join(lines))
    else:
        lines = lmopt.diff(trials[one.parent].params, one.params).split("\n")
        body = "\n".join(map(_colored, lines)) or "nothing changed"
    kind = ' class="best" open' if place == top else ""
    return f"<details{kind}><summary>{head}</summary><pre>{body}</pre></details>"


def _colored(line: str) -> str:
    marked = not line.startswith(("+++", "---"))
    tag = {"+": "ins", "-": "del"}.get(line[:1], "") if marked else ""
    return f"<{tag}>{_escape(line)}</{tag}>" if tag else _escape(line)


def _side_by_side(start: Trial, top: Trial, most: int = 200) -> str:
    """The rows that both were scored on."""
    if start.evaluation is None or top.evaluation is None:
        return "<p>The trials were not scored.</p>"
    pairs = list(zip(start.evaluation.rows, top.evaluation.rows, strict=False))
    body = []
    for before, after in pairs[:most]:
        kind = "up" if after.score > before.score else "down" if after.score < before.score else ""
        cells = [_shown(before.example)]
        for row in (before, after):
            cells += [_shown(row.prediction, row.error), f"{row.score:g}"]
        body.append(f'<tr class="{kind}">{"".join(f"<td>{one}</td>" for one in cells)}</tr>')
    left = f"<p>and {len(pairs) - most} more rows</p>" if len(pairs) > most else ""
    head = "".join(f"<th>{one}</th>" for one in ("example", "start", "", "best", ""))
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>{left}'


def _shown(record: lmopt.Fields, error: str = "") -> str:
    fields = [f"{name}: {lmopt.cut(lmopt.as_text(value), 160)}" for name, value in record.items()]
    return _escape("\n".join(fields) or error).replace("\n", "<br>")
