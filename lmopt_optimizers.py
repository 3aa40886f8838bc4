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

Sections: 1 Contract · 2 Parts · 3 Few-shot · 4 Instructions · 5 Settings · 6 Weights ·
7 Combinators · 8 Laws · 9 Report · 10 Command line

Arguments that mean the same everywhere stand in `Options`, and for those that bootstrap in
`Teaching`; `lm` runs the program, and the teacher where there is no `teacher_lm`. Counts are 1 or
more, scores and levels 0 to 1, where nothing else is said.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import (
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from html import escape as _escape
from operator import add, mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from attrs import astuple, define, evolve, field, frozen
from attrs.converters import optional
from toolz import first, groupby, interleave, keyfilter, pipe, take, unique  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from concurrent.futures import Executor

if TYPE_CHECKING or not __package__:
    import lmopt
    from lmopt import LM, Dataset, Evaluation, Fields, Flow, Metric, Params, Program, Record, Row
else:  # both modules were copied into a package
    from . import lmopt
    from .lmopt import LM, Dataset, Evaluation, Fields, Flow, Metric, Params, Program, Record, Row

__all__ = [
    # 1. Contract
    "Trial", "Plan", "Size", "Options", "Optimizer", "optimizer", "best", "CallsSpent",
    "Want", "Hunt",
    # 2. Parts
    "split", "spread", "labeled", "labeled_demos", "unspoilt", "step_demos", "resampled", "race",
    "cases", "description", "proposer", "Propose", "cleaned", "tpe", "pareto", "relayed",
    # 3. Few-shot
    "labeled_few_shot", "Teaching", "fitting_count", "bootstrap", "passed", "bootstrap_few_shot",
    "random_search", "tpe_search", "knn_few_shot",
    # 4. Instructions
    "auto", "copro", "TIPS", "mipro", "gepa", "simba", "infer_rules", "avatar",
    # 5. Settings
    "tune",
    # 6. Weights
    "Trainer", "chat_examples", "finetune", "grpo", "rewarded", "write_examples", "jsonl_trainer",
    "openai_trainer",
    # 7. Combinators
    "chain", "best_of", "only", "limit", "if_better",
    # 8. Laws
    "check_optimizer",
    # 9. Report
    "summary", "report",
    # 10. Command line
    "lm_options", "lm_of", "main",
]  # fmt: skip

# == 1. Contract ===================================================================================
# An optimizer is a value with two functions. `search` is a flow, as a program body is: it yields
# what it wants scored, run or written, in the words of its `Hunt`, and is sent what came of it.
# `bound` tells beforehand what that costs at most. Every random choice is drawn from
# `lmopt.seeded(seed, purpose, ...)`, so that the order in which threads finish cannot matter.

Examples = tuple[Record, ...]
Propose = Program | Callable[[Record], str]
"""Who writes instructions: a program with the inputs of `proposer()` and the output `instructions`,
or any function from a record of those inputs to a text, a person at a keyboard included."""


@frozen
class Trial:
    """One set of parameters that an optimizer tried.

    Attributes:
        score: on the rows that the optimizer scores on, 0 to 1; None where it does not score.
        evaluation: where the score comes from; shorter than the data where the trial lost early.
        out: whether it lost early, was ended by the budget, or its runs take too many tokens; its
            score then compares with no other.
        final: whether it is the last word of the search, whatever the scores say.
    """

    params: Params  # the parameters
    score: float | None = None
    note: str = ""  # what they are, and what happened
    parent: int | None = None  # index of the trial they were made from, None for the start
    calls: int = 0  # how many LM calls the optimizer had made by then
    evaluation: Evaluation | None = field(default=None, repr=False)
    out: bool = False
    final: bool = False

    @property
    def tokens(self) -> float | None:
        """How many tokens one run takes on average, read and written; None where none was run."""
        if self.evaluation is None:
            return None
        spent = self.evaluation.usage
        return (spent.input_tokens + spent.output_tokens) / len(self.evaluation.rows)

    @property
    def usd(self) -> float | None:
        """What one run costs on average, where the LM has a price; None where none was run."""
        shown = self.evaluation
        return None if shown is None else shown.usage.cost / len(shown.rows)

    def _repr_html_(self) -> str:
        shown = self.evaluation._repr_html_() if self.evaluation else ""
        score = "" if self.score is None else f"{self.score:.3f}: "
        return f"<p>{_escape(score + self.note)}</p>{self.params._repr_html_()}{shown}"


@frozen
class Plan:
    """At most how many program runs, LM calls and metric calls something takes.

    Attributes:
        usual: LM calls where each reply can be read at once, and no trial loses early.
        tokens: of `usual` calls, read and written: an estimate from the rendered prompts, with as
            many demonstrations as are tried, four characters a token, replies as long as examples.
        usd: what those tokens cost; None where the LM has no price.

    >>> Plan(runs=2, calls=6, metrics=2, usual=2) + Plan(runs=1, calls=3, usual=1)
    Plan(runs=3, calls=9, metrics=2, usual=3, trainings=0, tokens=0, usd=None)
    """

    runs: int = 0
    calls: int = 0
    metrics: int = 0
    usual: int = 0
    trainings: int = 0  # of weights
    tokens: int = 0
    usd: float | None = None

    def __str__(self) -> str:
        said = {
            f"at most {self.runs} runs and {self.calls} LM calls, usually {self.usual}": 1,
            f"about {round(self.tokens, 2 - len(str(self.tokens))):,} tokens": self.tokens,
            f"about ${self.usd or 0.0:.2f}": self.usd,
            f"{self.trainings} trainings": self.trainings,
        }
        return ", ".join(text for text, there in said.items() if there)

    def __add__(self, other: Plan) -> Plan:
        counts = map(add, astuple(self)[:-1], astuple(other)[:-1])
        paid = [one for one in (self, other) if one.usual]  # what asks nothing costs nothing
        known = paid and all(one.usd is not None for one in paid)
        return evolve(Plan(*counts), usd=sum(one.usd or 0.0 for one in paid) if known else None)

    def within(self, calls: int | None, each: int = 1) -> Plan:
        """Return the plan of what ends after so many calls, of which a run makes `each` or more."""
        if calls is None:
            return self
        runs, usual = calls // each if each else self.runs, min(calls, self.usual)
        share = usual / self.usual if self.usual else 1.0
        tokens, usd = round(share * self.tokens), self.usd and share * self.usd
        kept = evolve(self, usual=usual, tokens=tokens, usd=usd, calls=min(self.calls, calls))
        return evolve(kept, runs=min(self.runs, runs), metrics=min(self.metrics, runs))


class Options(TypedDict, total=False):
    """What every optimizer takes.

    Attributes:
        valset: rows to score on, none of them in the training set; by default half of that.
        calls: LM calls in all, proposals and a step's retries too; never exceeded (what middleware
            asks again is not counted). Rows to score on are at most a tenth of that, or 24; what
            the calls do not suffice for is not done.
        max_labeled: labelled examples to use as demonstrations; by default as many as fit into the
            prompt. Searches try fewer too (64, 16, 4); 0 leaves the demonstrations alone.
        max_prompt_tokens: of the prompt of a step with its demonstrations, four characters a token.
        max_tokens_per_run: a trial whose runs take more on average, read and written, is out.
        progress: as in `lmopt.evaluate`, for the rows of each evaluation; its `desc` tells the best
            score so far, calls and dollars spent and left, and what is done now.
    """

    valset: Dataset | None
    calls: int | None
    max_labeled: int | None
    max_prompt_tokens: int
    max_tokens_per_run: float | None
    propose: Propose | None  # who writes instructions; by default `proposer()`
    prompt_lm: LM | None  # answers the proposer; by default `lm`
    seed: int  # of all choices, 0 included
    workers: int | None  # threads, as in `lmopt.evaluate`; they do not change the result
    executor: Executor | None  # what to run rows on instead; the outermost optimizer decides both
    progress: lmopt.Progress
    within: str  # the only step, or program with steps, that may change; see `only`


_Lengths = Sequence[tuple[float, float]]
"""Of each step, how many characters its prompt has without demonstrations, and one of them on
average, 0 where no example fits."""


def _within(top: str | tuple[str, ...]) -> tuple[str, ...]:
    return (top,) if isinstance(top, str) else top


@frozen(eq=False, repr=False)
class _Options:
    valset: Examples | None = field(default=None, converter=optional(lmopt.rows_of))
    calls: int | None = None
    max_labeled: int | None = None
    max_prompt_tokens: int = 8000
    max_tokens_per_run: float | None = None
    propose: Propose | None = None
    prompt_lm: Any = None
    seed: int = 0
    workers: int | None = None
    executor: Executor | None = None
    progress: lmopt.Progress = None
    within: tuple[str, ...] = field(default=(), converter=_within)
    sized: bool = True  # whether the calls decide how many rows to score on
    max_bootstrapped: int = 4
    rounds: int = 1
    threshold: float = 1.0
    teacher: Program | Mapping[str, lmopt.Prompt] | None = None
    teacher_lm: Any = None

    def __attrs_post_init__(self) -> None:
        _check(max_labeled=self.max_labeled or 0, calls=self.calls or 0)
        _check(max_bootstrapped=self.max_bootstrapped)
        _check(1, max_prompt_tokens=self.max_prompt_tokens, rounds=self.rounds)
        if self.propose is not None and not callable(self.propose):
            todo = "pass proposer(), or a function from what it is told to a text"
            raise lmopt.DataError("this writes nothing", self.propose, "a program", todo)

    def part(self, examples: Examples) -> tuple[Examples, Examples]:
        """Rows to learn from, and rows to score on; never the same."""
        if self.valset is None:
            return split(examples, seed=self.seed)
        known = set(examples)
        both = [row for row in unique(self.valset) if row in known]
        what = f"{len(both)} rows are in both trainset and valset" if both else "an empty valset"
        if both or not self.valset:
            todo = "take them out of one, or leave valset out"
            raise lmopt.DataError(what, both[:1], "rows of its own", todo)
        return examples, self.valset

    def paths(self, program: Program) -> list[str]:
        """The steps that may change: those at or below each path that limits it."""
        found = list(program.params)
        for top in filter(None, self.within):
            known, found = found, [one for one in found if f"{one}.".startswith(f"{top}.")]
            if not found:
                expected = f"one of {', '.join(known)}"
                raise lmopt.ParamsError("no such path", top, expected, "correct the path")
        return found

    def most(self, program: Program, examples: Examples) -> int:
        """How many labelled demonstrations a step has at most."""
        return self.fit(_lengths(program, examples), len(examples))

    def fit(self, lengths: _Lengths, count: int) -> int:
        """Do the same of so many examples, of such lengths."""
        room = min(self.max_prompt_tokens, int(self.max_tokens_per_run or self.max_prompt_tokens))
        fit = [int((4 * room - empty) / each) for empty, each in lengths if each]
        known = [] if self.max_labeled is None else [self.max_labeled]
        return max(min([count, *fit, *known]), 0)

    def guide(self, program: Program, own: Mapping[str, lmopt.Prompt] = Record()) -> Program:
        """The program that shows how it is done, by default the one that learns, with `own`."""
        if not isinstance(self.teacher, Program):
            return program.with_params(own if self.teacher is None else self.teacher)
        known, wanted = list(self.teacher.params), list(program.params)
        if known != wanted:
            expected, todo = f"the steps {', '.join(wanted)}", "give the steps the same names"
            raise lmopt.ParamsError("a teacher with other steps", known, expected, todo)
        return self.teacher


def _check(least: int = 0, **values: int) -> None:
    for name, value in values.items():
        whole = isinstance(value, int)
        if not whole or value < least:
            wrong, todo = ("too small", "raise") if whole else ("no whole number", "correct")
            raise lmopt.DataError(f"{name} is {wrong}", value, f"{least} or more", f"{todo} {name}")


@frozen(eq=False, repr=False)
class Size:
    """How large a search is: its program, how many steps may change, and rows on either side."""

    program: Program
    steps: int
    train: int
    val: int
    options: _Options
    lengths: _Lengths = ()
    lm: Any = None  # who answers

    @property
    def rungs(self) -> int:
        """How many numbers of labelled demonstrations are tried at most."""
        most = self.options.max_labeled
        return len(_rungs(self.train if most is None else min(most, self.train)))

    def plan(self, runs: int, texts: int = 0) -> Plan:
        """Return the plan of so many runs of the program and so many texts to be proposed."""
        writer = self.options.propose or proposer()
        each = writer.max_calls if isinstance(writer, Program) else 0
        asked = Plan(runs, runs * self.program.max_calls, runs, runs * _usual_calls(self.program))
        paid = evolve(self, lm=self.options.prompt_lm or self.lm)
        return self.priced(asked) + paid.priced(Plan(calls=texts * each, usual=texts * bool(each)))

    def lessons(self, count: int = 1) -> Plan:
        """Return the plan of bootstrapping so many times."""
        given = self.options
        taught = evolve(self, program=given.guide(self.program), lm=given.teacher_lm or self.lm)
        each = taught.plan(given.rounds * self.train if given.max_bootstrapped else 0)
        return sum([each] * count, Plan())

    def priced(self, plan: Plan) -> Plan:
        """Return a plan with the tokens of its usual calls, and what they cost."""
        if not self.lengths:
            return plan
        most = self.options.fit(self.lengths, self.train)
        read = statistics.fmean(empty + (most + 1) * each for empty, each in self.lengths) / 4
        made = statistics.fmean(each for _, each in self.lengths) / 4
        price = getattr(self.lm, "price", None)
        usd = plan.usual * ((read * price[0] + made * price[1]) / 1e6) if price else None
        return evolve(plan, tokens=round(plan.usual * (read + made)), usd=usd)


def _usual_calls(program: Program) -> int:
    """How many LM calls a run makes where each reply can be read at once."""
    most = max([leaf.max_calls for leaf in program.leaves.values()], default=1)
    return -(-program.max_calls // max(most, 1))


@frozen(eq=False)
class Optimizer:
    """A function (program, trainset, metric) -> params, whose trials can be watched.

    Made by `optimizer`. In an event loop: `await optimize.arun(...)`, `optimize.atrials(...)`.
    """

    name: str  # of its factory
    lm: Any = field(repr=False)
    search: Callable[[Hunt], Flow] = field(repr=False)
    bound: Callable[[Size], Plan] = field(repr=False)
    parts: bool = field(default=True, repr=False)
    options: _Options = field(default=_Options(), repr=False)  # see `Options`

    def __call__(self, program: Program, trainset: Dataset, metric: Metric) -> Params:
        """Return the parameters of the best trial; see `best`.

        A spent budget and Ctrl-C end the search with the best so far, and a warning that says so.
        Any other error is raised, with the best so far as its attribute `best`.

        Raises:
            DataError: the training set is empty, or an example lacks an input.
            LMError: the LM could not be asked.
            MetricError: the metric raised, or returned no score.
        """
        made = [Trial(program.params, note="the start")]
        with _ending(made):
            made.extend(self._emitted(lmopt.emit, program, trainset, metric))  # kept if it raises
        return best(made).params

    async def arun(self, program: Program, trainset: Dataset, metric: Any) -> Params:
        """Do the same in the running event loop."""
        made = [Trial(program.params, note="the start")]
        with _ending(made):
            async for trial in self._emitted(lmopt.aemit, program, trainset, metric):
                made.append(trial)  # noqa: PERF401  # kept, however it ends
        return best(made).params

    def trials(self, program: Program, trainset: Dataset, metric: Metric) -> Iterator[Trial]:
        """Return an iterator of trials, made as they are asked for; the first is the start.

        A spent budget ends it with a warning, the last trial being the one under way.
        """
        return _watched(self._emitted(lmopt.emit, program, trainset, metric))

    def atrials(self, program: Program, trainset: Dataset, metric: Any) -> AsyncIterator[Trial]:
        """Do the same in the running event loop."""
        return _awatched(self._emitted(lmopt.aemit, program, trainset, metric))

    def _emitted(self, emit: Callable[..., Any], *task: Any) -> Any:
        how = {"workers": self.options.workers, "executor": self.options.executor}
        return emit(self.flow(*task), Trial, self.lm, **how)

    def flow(self, program: Program, trainset: Dataset, metric: Metric) -> Flow:
        """Return the search as a flow of effects and trials, to be a part of another one."""
        examples, chosen = lmopt.check_dataset(program, trainset), self.options
        if chosen.valset:
            chosen = evolve(chosen, valset=lmopt.check_dataset(program, chosen.valset))
        train, val = chosen.part(examples) if self.parts else (examples, chosen.valset or examples)
        hunt = Hunt(program, train, val, metric, self.lm, chosen, self.name)
        if chosen.calls is not None and chosen.sized and self.parts:
            runs = chosen.calls // max(_usual_calls(program), 1)
            hunt.fewer(runs // 10, min(24, runs // 3))
        return hunt._performed(self.search(hunt))

    def plan(self, program: Program, trainset: Dataset) -> Plan:
        """Return what a search costs at most; makes no LM call."""
        examples = lmopt.check_dataset(program, trainset)
        return self.bounded(program, len(examples), _lengths(program, examples))

    def bounded(self, program: Program, size: int, lengths: _Lengths = ()) -> Plan:
        """Return what a search with so many examples, of such lengths, costs at most."""
        given, steps = self.options.valset, len(self.options.paths(program))
        train = (size + 1) // 2 if self.parts and given is None else size
        sizes = (steps, train, len(given or ()) or train)
        plan = self.bound(Size(program, *sizes, self.options, lengths, self.lm))
        if not isinstance(plan, Plan):
            todo = "return size.plan(...)"
            raise TypeError(lmopt.explain("this bound returned no plan", plan, "a Plan", todo))
        return plan.within(self.options.calls, min(program.max_calls, 1))


def optimizer(
    name: str,
    lm: Any,
    search: Callable[[Hunt], Flow],
    bound: Callable[[Size], Plan],
    *,
    parts: bool = True,
    **options: Unpack[Teaching],
) -> Optimizer:
    """Make an optimizer of a search and of what it costs at most.

    Args:
        search: hunt -> flow; it yields `hunt.start()` first.
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
    return Optimizer(name, lm, search, bound, parts, _options(name, **options))


def _options(name: str, **options: Any) -> _Options:
    """The options of an optimizer, if it takes them: one of ours, or one of the user's own."""
    takes = inspect.signature(globals()[name] if name in __all__ else Optimizer).parameters
    kind = Teaching if "Teaching" in str(takes.get("options")) else Options
    known = sorted({*takes, *kind.__annotations__} - {"lm", "options"})
    for one in [given for given in options if given not in known]:
        import difflib

        near = difflib.get_close_matches(one, known, 1)
        todo = f"did you mean {near[0]}?" if near else "leave it out"
        what = f"{name} has no option of this name"
        raise TypeError(lmopt.explain(what, one, ", ".join(known), todo))
    return _Options(**options)


@contextmanager
def _ending(made: Sequence[Trial] = ()) -> Iterator[None]:
    """End a search with a warning where it may end, by Ctrl-C only where its best is kept."""
    ends = (lmopt.BudgetExceeded, KeyboardInterrupt) if made else lmopt.BudgetExceeded
    try:
        yield
    except ends as error:
        kept = "its trials so far are all"
        if made:
            kept = f"its best so far is returned: {best(made).note}"
        warnings.warn(f"the search was ended by {lmopt.describe(error)}; {kept}", stacklevel=4)
    except Exception as error:
        with suppress(AttributeError, lmopt.DataError):  # it takes none; there are none
            error.best = best(made).params  # type: ignore[attr-defined]
        raise


def _watched(trials: Iterator[Trial]) -> Iterator[Trial]:
    with _ending():
        yield from trials


async def _awatched(trials: AsyncIterator[Trial]) -> AsyncIterator[Trial]:
    with _ending():
        async with aclosing(trials):  # type: ignore[type-var]
            async for trial in trials:
                yield trial


def best(trials: Iterable[Trial], *, level: float = 0.7) -> Trial:
    """Return the best trial of a search: of those that are as good, the one that costs least a run.

    As good are those that no paired test tells from the highest score, and that do no worse than
    the start; on fewer than 50 rows, which no test says much of, those with an equal score. Of
    equal ones it is the earliest. Where there are no scores, it is the last trial; a `final` trial
    is the best whatever the scores.

    Args:
        level: the p-value from which two trials are as good, 0 to 1; 0.05 is the usual test, and
            with 1 only equal scores are.
    Reference: Breiman et al. 1984, the rule of the standard error, of which this is two fifths.

    >>> params = lmopt.predict("q -> a").params
    >>> best([Trial(params, 0.5), Trial(params, 0.7, "good"), Trial(params, 0.7, "late")]).note
    'good'
    """
    made = list(trials)
    if not made:
        raise lmopt.DataError("no trials", made, "one or more", "give the search more calls")
    able = [made[0], *(one for one in made[1:] if not one.out)]
    scored = [one for one in able if one.score is not None]
    top = max(scored, key=lambda one: one.score or 0.0) if scored else able[-1]
    top = next((one for one in reversed(able) if one.final), top)
    if top.final or top.evaluation is None:
        return top
    least = next((one.score for one in scored if not one.out), 0.0)
    alike = [one for one in made if one is top or _as_good(one, top, least, level)]
    kept = min(alike, key=lambda one: (one.tokens, -(one.score or 0.0)))
    if kept.score == top.score:
        return kept
    note = f"{kept.note}; no test tells it from the best ({top.note}: {top.score:.3f}), which costs"
    return evolve(kept, note=f"{note} {top.tokens:.0f} tokens a run, not {kept.tokens:.0f}")


def _as_good(trial: Trial, top: Trial, least: float | None, level: float) -> bool:
    shown, most = trial.evaluation, top.evaluation
    if shown is None or most is None or trial.out or (trial.score or 0.0) < (least or 0.0):
        return False
    if [row.example for row in shown.rows] != [row.example for row in most.rows]:
        return False
    tested = level < 1.0 and len(shown.rows) >= 50
    return trial.score == top.score or (tested and lmopt.compare(shown, most).p_value >= level)


# -- how a search says what it wants --


@frozen(eq=False, repr=False)
class Want:
    """What a search wants: a method of its hunt, by name, and what is given to it."""

    name: str
    given: Fields
    flow: Callable[[], Flow] = field(repr=False)


def _wanted(method: Callable[..., Flow]) -> Callable[..., Want]:
    """Make a method return what is wanted, to be yielded, instead of its flow."""
    known = inspect.signature(method)

    @functools.wraps(method)
    def want(self: Hunt, *args: Any, **kwargs: Any) -> Want:
        given = dict(known.bind(self, *args, **kwargs).arguments)
        del given["self"]
        return Want(method.__name__, given, partial(method, self, *args, **kwargs))

    return want


def _each(flow: Callable[[Any], Flow], items: Iterable[Any]) -> Flow:
    """Run a flow for each item, one after the other; return what they return."""
    made = []
    for item in items:
        made.append((yield from flow(item)))  # noqa: PERF401
    return tuple(made)


class CallsSpent(lmopt.BudgetExceeded):
    """The calls that a search was given are used."""

    used = 0


_Tried = tuple[Params, str]  # parameters, and what they are
_Some = Params | Sequence[Params]
_Job = tuple[dict[Any, Row], Any, Program, Record]
"""Where to put the row, by which name, and what to run on what."""
_FOLDS = 4


@define(eq=False, repr=False)
class Hunt:
    """What a search sees of itself, and the words for what it wants, each to be yielded.

    No row is answered with itself among the demonstrations: where it is one of them, the row runs
    without it, and without those of every fourth row beside it.
    """

    program: Program  # to be improved
    train: Examples  # rows to learn from
    val: Examples  # rows to score on; `whole` where they were more before
    metric: Any
    lm: Any
    options: _Options = _Options()
    name: str = "search"  # of the optimizer
    trials: list[Trial] = field(factory=list, init=False)  # all so far, in order
    calls: int = field(default=0, init=False)  # LM calls so far
    usd: float = field(default=0.0, init=False)  # what they cost, where the LM has a price
    runs: int = field(default=0, init=False)  # of the program so far
    whole: Examples = field(init=False)
    seed: int = field(init=False)
    most: int | None = field(init=False)  # LM calls that it may make
    paths: list[str] = field(init=False)  # of the steps that may change
    _unused: list[str] = field(factory=list, init=False)  # why proposals were of no use
    _silent: list[int] = field(factory=lambda: [0], init=False)  # requests in a row without answer
    _done: dict[Any, dict[Any, Row]] = field(factory=partial(defaultdict, dict), init=False)
    _ready: dict[Any, list[Program]] = field(factory=dict, init=False)  # for each fold

    def __attrs_post_init__(self) -> None:
        self.whole, self.seed, self.most = self.val, self.options.seed, self.options.calls
        self.paths = self.options.paths(self.program)

    @property
    def best(self) -> int:
        """Where the best trial so far stands among them."""
        scores = [-1.0 if one.out else one.score or 0.0 for one in self.trials]
        return scores.index(max(scores))

    @property
    def top(self) -> Trial:
        """The best trial so far."""
        return self.trials[self.best]

    @property
    def left(self) -> float:
        """LM calls that it may still make."""
        return math.inf if self.most is None else self.most - self.calls

    @property
    def counts(self) -> list[int]:
        """Numbers of labelled demonstrations to try: as many as fit, and then fewer."""
        return _rungs(self.options.most(self.program, self.train))

    def place(self, params: Params) -> int | None:
        """Where equal parameters were tried first among the trials, if they were."""
        known = (n for n, one in enumerate(self.trials) if one.params.digest == params.digest)
        return next(known, None)

    def knows(self, params: Params) -> bool:
        """Whether equal parameters were tried before."""
        return self.place(params) is not None

    def new(self, made: Iterable[_Tried]) -> list[_Tried]:
        """Those of several (parameters, note) that were not tried before, equal ones once."""
        return [one for one in unique(made, lambda one: one[0].digest) if not self.knows(one[0])]

    def fewer(self, rows: int, least: int = 24) -> None:
        """Score on so many held-out rows from now on, but not on fewer than `least`."""
        self.val = self.val[: max(rows, least, 1)]

    def labelled(self, count: int) -> Params:
        """The program's parameters with so many labelled examples as demonstrations."""
        return labeled_demos(self.program, self.train, count, seed=self.seed)

    @_wanted
    def start(self) -> Flow:
        """The program as it is, scored; sent: the trial."""
        size = len(self.val)
        few = f", scored on {size} of {len(self.whole)} rows" if self.whole[size:] else ""
        return self.trial(self.program.params, f"start{few}", None, False).flow()

    @_wanted
    def demos(self, most: int | None = None) -> Flow:
        """Labelled examples as demonstrations, in at most so many numbers, raced; sent: the trials.

        First as many as fit, then fewer.
        """
        room = self.left / max(2 * len(self.val) * _usual_calls(self.program), 1)
        most = most if self.most is None else max(int(min(room, most or room)), 1)
        made = [(self.labelled(n), f"{n} labelled examples") for n in self.counts[:most]]
        return self.contest(self.new(made), 0).flow()

    @_wanted
    def trial(
        self, params: Params, note: str, parent: int | None = None, race: bool = True
    ) -> Flow:
        """Parameters scored against the best so far; equal ones get the score they have.

        They were made from trial number `parent`, by default the best one. A `race` ends where they
        will hardly win any more; sent: the trial.
        """
        (made,) = yield from self.contest([(params, note)], parent, race).flow()
        return made

    @_wanted
    def contest(self, made: Iterable[_Tried], parent: int | None = None, race: bool = True) -> Flow:
        """Several (parameters, note) scored together, and against the best so far; sent: trials.

        They run on ever more held-out rows, as in successive halving (Jamieson and Talwalkar 2016,
        arXiv 1502.07943): only the better half goes on, two at least, and none that is far behind
        the best, row by row: by two standard errors at first, by one at the end.
        """
        parent = self.best if parent is None and self.trials else parent
        entered = [(self._allowed(params), note) for params, note in made]
        beat = self.top.evaluation if race and self.trials and not self.top.out else None

        def booked(lost: str) -> tuple[Trial, ...]:
            return tuple(filter(None, [self._entered(*one, parent, lost) for one in entered]))

        try:
            yield from self._raced([one for one, _ in self.new(entered)], beat, race)
        except lmopt.BudgetExceeded:
            booked("ended with the budget")
            raise
        return booked("out")

    @_wanted
    def unscored(self, params: Params, note: str) -> Flow:
        """Parameters that are better by what they are made of; sent: the trial."""
        yield from ()
        return self._book(Trial(params, None, note, len(self.trials) - 1 if self.trials else None))

    @_wanted
    def last(self, params: Params, note: str, shown: Evaluation | None, parent: int = 0) -> Flow:
        """The last word of the search, whatever other trials scored; sent: the trial."""
        yield from ()
        score = shown.score if shown else None
        return self._book(Trial(params, score, note, parent, evaluation=shown, final=True))

    @_wanted
    def rows(self, params: _Some, places: Iterable[int] | None = None, half: str = "train") -> Flow:
        """Runs on rows of the training half, by default all; sent: the evaluation.

        Of several parameters, which run together: an evaluation of each. Nothing is run twice.
        """
        rows, jobs = getattr(self, half), list[_Job]()
        several = list(map(self._allowed, [params] if isinstance(params, Params) else params))
        wanted = list(range(len(rows)) if places is None else places)
        for one in several:
            done = self._done[half, one.digest]
            new = [place for place in unique(wanted) if place not in done]
            key = half, len(rows), one.digest
            if key not in self._ready:
                folds = [unspoilt(self.program, one, rows[n::_FOLDS]) for n in range(_FOLDS)]
                self._ready[key] = list(map(self.program.with_params, folds))
            jobs += [(done, n, self._ready[key][n % _FOLDS], rows[n]) for n in new]
        doing = "looking at rows to learn from" if half == "train" else "scoring"
        yield from self._run(jobs, self.lm, doing)
        made = [self._known(half, one, wanted) for one in several]
        return made[0] if isinstance(params, Params) else made

    @_wanted
    def held(self, params: _Some, places: Iterable[int] | None = None) -> Flow:
        """The same on held-out rows."""
        return self.rows(params, places, "val").flow()

    @_wanted
    def teach(self, teacher: Program, rows: Examples, params: Params, lm: Any = None) -> Flow:
        """Runs of another program, or with another LM, on any rows; sent: the evaluation."""
        ready = teacher.with_params(params)
        done = self._done[id(teacher.body), id(lm), params.digest]
        jobs = [(done, row, ready, row) for row in rows if row not in done]
        yield from self._run(jobs, self.lm if lm is None else lm, "the teacher runs")
        return Evaluation(tuple(done[row] for row in rows))

    @_wanted
    def cases(self, path: str, shown: int, *, params: Params | None = None, count: int = 1) -> Flow:
        """What a step does, by default of the best trial, as `count` lists of `shown` cases each.

        Each list draws its own rows, from those that were run before and as many new ones as are
        needed: three quarters of them failures where there are so many, spread over what was
        expected; worst first.
        """
        chosen = self.top.params if params is None else params
        known = self._done["train", chosen.digest]
        order = lmopt.seeded(self.seed, "evidence").sample(range(len(self.train)), len(self.train))
        fresh = [place for place in order if place not in known][: shown * count]
        yield from self.rows(chosen, fresh).flow()
        every = cases(self.program, path, known.values(), None)
        purpose = (self.seed, "cases", path, len(self.trials))
        return [_drawn(every, shown, lmopt.seeded(*purpose, number)) for number in range(count)]

    @_wanted
    def propose(
        self,
        path: str,
        seen: Sequence[Sequence[Any]],
        *,
        tips: Sequence[str] = ("",),
        data: str = "",
        params: Params | None = None,
    ) -> Flow:
        """Instructions for a step, by default of the best trial; sent: the texts.

        One text for each list of cases, with the next of the tips. Those that are empty, or equal
        to an earlier one, are left out.
        """
        chosen = self.top.params if params is None else params
        told = {
            "program": description(self.program.with_params(chosen)),
            "step": path,
            "current": chosen[path].instructions,
            "attempts": _attempts(self.trials, path),
            "data": data,
        }
        asked = []
        for one, tip in zip(seen, itertools.cycle(tips), strict=False):
            shown, images = _pictured(_fitting(one, 2 * self.options.max_prompt_tokens))
            asked.append(Record({**told, "cases": shown, "images": images, "tip": tip}))
        writer = self.options.propose or proposer()
        made = yield from self._written(writer, asked)
        wrong = [one for one in made if not isinstance(one, (str, type(None)))]
        if wrong:
            raise lmopt.DataError("propose wrote no text", wrong[0], "a text", "return a str")
        own = getattr(writer, "params", None) or {}
        echoes = {"", *(prompt.instructions for prompt in own.values())}
        texts = list(map(cleaned, made))
        what = "an empty text, or what the writer itself was told"
        self._unused += [what for text in texts if text in echoes]
        return [text for text in unique(texts) if text not in echoes]

    def _written(self, writer: Any, asked: Sequence[Record]) -> Flow:
        """What is written for what is told; the default writer is shown images too."""
        if not isinstance(writer, Program):
            told = [lmopt.select_inputs(proposer(), one) for one in asked]
            return (yield from _each(lambda one: (yield lmopt.invoke(writer, one)), told))
        made = []
        if self.options.propose is None and any(one.images for one in asked):
            made = yield from self._asked(_SEEING, asked)
        if not made:  # there are none, or the LM takes none
            made = yield from self._asked(writer, asked)
        return [one["instructions"] for one in made]

    @_wanted
    def trained(self, trainer: Any, examples: Sequence[Any], base: str, settings: Fields) -> Flow:
        """Weights trained on examples from those of a base model; sent: the model's name."""
        if hasattr(trainer, "flow"):
            model = yield from trainer.flow(examples, base, **settings)
        else:
            model = yield lmopt.invoke(trainer, examples, base, **settings)
        if not isinstance(model, str):
            todo = "return the name of the trained model"
            raise lmopt.DataError("this trainer returned no name", model, "a str", todo)
        return model

    @_wanted
    def ask(self, program: Program, inputs: Fields) -> Flow:
        """A run of another program on the LM that writes; sent: the prediction, or None."""
        return first([*(yield from self._asked(program, [Record(inputs)])), None])

    def _asked(self, program: Program, given: Sequence[Record]) -> Flow:
        """Run a program on the LM that writes, equal requests too; leave out what is of no use."""
        jobs = [(lmopt.sampled(program, n, 1 << 16), one) for n, one in enumerate(given)]
        jobs = jobs[: self._room(program)]
        if given and not jobs:
            raise self._spent()
        how: Any = {"lm": self.options.prompt_lm or self.lm, "progress": False}
        rows = yield from lmopt.scoring(jobs, _unjudged, silent=self._silent, **how)
        self._spend(row.prediction.usage for row in rows)
        self._unused += [row.error.partition(": ")[2] for row in rows if row.error]
        return [row.prediction for row in rows if not row.error]

    def _performed(self, search: Any) -> Flow:
        """Run a search: yield the effects of what it wants, and its trials."""
        if not isinstance(search, Generator):
            todo = "yield what it wants: made = yield hunt.trial(...)"
            raise TypeError(lmopt.explain("this search is no flow", search, "a generator", todo))
        yield from lmopt.through(search, self._satisfy)
        if wasted := self._wasted("proposed texts could not be used at the end"):
            warnings.warn(wasted, stacklevel=2)

    def _satisfy(self, want: Any) -> Flow:
        """Perform what a search yields, several things one after the other; pass its trials on."""
        if isinstance(want, (list, tuple)):
            return (yield from _each(self._satisfy, want))
        if not isinstance(want, Want):
            return (yield want)
        known = len(self.trials)
        try:
            return (yield from want.flow())
        finally:  # when the budget is spent, too
            for trial in self.trials[known:]:  # noqa: UP028  # a list cannot be sent anything
                yield trial

    def _allowed(self, params: Params) -> Params:
        """The parameters, but for changes of steps that must stay."""
        start, changed = self.program.params, keyfilter(self.paths.__contains__, params)
        whole = len(changed) == len(params) == len(start)  # then its digest need not be made again
        return params if whole else Params({**start, **changed})

    def _known(self, half: str, params: Params, places: Iterable[int]) -> Evaluation:
        """What is known of parameters on rows, until the first that was not run."""
        done = self._done[half, params.digest]
        run = itertools.takewhile(done.__contains__, places)
        return Evaluation(tuple([done[place] for place in run]))

    def _run(self, jobs: Sequence[_Job], lm: Any, doing: str) -> Flow:
        """Run and score jobs, in blocks for which the calls left suffice, whatever the workers."""
        rows: tuple[Row, ...] = ()
        while len(rows) < len(jobs):
            block = jobs[len(rows) :][: self._room(jobs[len(rows)][2])]
            if not block:
                raise self._spent(rows)
            pairs, made = [job[2:] for job in block], tuple[Row, ...]()
            how: Any = {"lm": lm, "progress": self.options.progress, "desc": self._told(doing)}
            try:
                made = yield from lmopt.scoring(pairs, self.metric, silent=self._silent, **how)
            except lmopt.LmoptError as error:
                made, error.rows = error.rows, (*rows, *error.rows)
                raise
            finally:
                self._spend(row.prediction.usage for row in made)
                self.runs += len(made)
                for (done, name, *_), row in zip(block, made, strict=False):
                    done[name] = row
            rows += made

    def _spend(self, costs: Iterable[lmopt.Usage]) -> None:
        spent = sum(costs, lmopt.Usage())
        self.calls, self.usd = self.calls + spent.calls, self.usd + spent.cost

    def _told(self, doing: str) -> str:
        """What progress says: what is done now, the best score so far, what is spent and left."""
        score = self.top.score if self.trials else None
        left = lmopt.budget_left(self.lm).get("usd")
        facts = [
            f"{self.name}: {doing}",
            "" if score is None else f"best {score:.3f}",
            f"{self.calls} calls" if self.most is None else f"{self.calls} of {self.most} calls",
            f"${self.usd:.2f}" if self.usd else "",
            "" if left is None else f"${left:.2f} left",
        ]
        return ", ".join(filter(None, facts))

    def _room(self, program: Program) -> int | None:
        """How many runs the calls that are left are enough for; None is any number."""
        return None if self.most is None else int(self.left // max(program.max_calls, 1))

    def _spent(self, rows: tuple[Row, ...] = ()) -> CallsSpent:
        what, known = "the search has used its calls", f"at most {self.most}"
        return CallsSpent(what, self.calls, known, "raise calls", rows=rows, used=self.calls)

    def _raced(self, alive: Sequence[Params], beat: Evaluation | None, race: bool = True) -> Flow:
        """Score parameters on held-out rows, and go on with those that may win; see `contest`."""
        size = len(self.val)
        looks = [rows for rows in (16 << n for n in range(32)) if race and rows < 0.75 * size]
        for end in [*looks, size]:
            results = yield from self.rows(alive, range(end), "val").flow()
            alive = [alive[place] for place in _ahead(results, beat, size)]
            if not alive:
                return

    def _entered(self, params: Params, note: str, parent: int | None, lost: str) -> Trial | None:
        """Book what was run of parameters as a trial; what was not run at all is none."""
        known, again = self.place(params), f"{note}; tried before"
        if known is not None:
            return self._book(evolve(self.trials[known], note=again, parent=parent))
        size, most = len(self.val), self.options.max_tokens_per_run
        shown = self._known("val", params, range(size))
        run = len(shown.rows)
        if not run:
            return None
        note += f"; {lost} after {run} of {size} rows" if run < size else ""
        note += _failures([row.error for row in shown.errors])
        made = Trial(params, shown.score, note, parent, evaluation=shown, out=run < size)
        if most is not None and (made.tokens or 0.0) > most:
            takes = f"{made.tokens:.0f} tokens"
            if not self.trials:
                what = f"a run of the start takes {takes}, more than {most:g}"
                warnings.warn(f"{what}, which is max_tokens_per_run", stacklevel=2)
            else:
                made = evolve(made, out=True, note=f"{note}; out with {takes} a run")
        return self._book(made)

    def _book(self, trial: Trial) -> Trial:
        note = "; ".join(filter(None, [trial.note, self._wasted("texts could not be used")]))
        params = self._allowed(trial.params)
        self.trials.append(evolve(trial, params=params, note=note, calls=self.calls))
        return self.trials[-1]

    def _wasted(self, what: str) -> str:
        """Say that of as many proposals as were of no use since it was said last, and why."""
        why, self._unused = self._unused, []
        return f"{len(why)} {what} ({lmopt.cut(why[0], 80)})" if why else ""


def _unjudged(given: Any, made: Any) -> float:
    return 1.0


def _failures(errors: list[str]) -> str:
    return f"; {len(errors)} failed (first: {lmopt.cut(errors[0], 80)})" if errors else ""


def _attempts(trials: Sequence[Trial], path: str, most: int = 10) -> list[dict[str, Any]]:
    """The best texts that were tried for a step, worst first, with their scores."""
    scores: dict[str, float] = {}
    for one in trials:
        text = one.params[path].instructions
        scores[text] = max(scores.get(text, 0.0), one.score or 0.0)
    ordered = sorted(scores, key=lambda text: scores[text])[-most:]
    return [{"instructions": text, "score": round(scores[text], 3)} for text in ordered]


def _drawn(every: Sequence[Any], count: int, rng: random.Random) -> list[Any]:
    """Draw cases: mostly failures, spread over what was expected; worst first."""
    bad, good = (
        _in_turns([one for one in every if (one["score"] < 1.0) is failed], ["expected"], rng)
        for failed in (True, False)
    )
    taken = bad[: max(count - count // 4, count - len(good))]
    return sorted([*taken, *good[: count - len(taken)]], key=lambda one: one["score"])


def _fitting(cases: Sequence[Any], most: int) -> list[Any]:
    """As many of the cases as have so many characters together, at least one."""
    sizes = itertools.accumulate(len(lmopt.canonical(_pictured(one)[0])) for one in cases)
    return [one for one, size in zip(cases, sizes, strict=True) if size <= most] or [*cases[:1]]


def _ahead(results: Sequence[Evaluation], beat: Evaluation | None, size: int) -> list[int]:
    """Which go on: the better half, but none that will hardly beat the best of them all."""
    order = sorted(range(len(results)), key=lambda place: -results[place].total)
    rivals = [one for one in (beat, *(results[place] for place in order[:1])) if one is not None]
    kept = order[: max((len(order) + 1) // 2, 2)]  # of two, a few rows do not tell the better
    return sorted(
        place for place in kept if not any(_lost(results[place], rival, size) for rival in rivals)
    )


def _lost(result: Evaluation, beat: Evaluation, size: int) -> bool:
    """Whether one will hardly score higher: by what is left, or by two standard errors to one."""
    if result is beat:
        return False
    done = len(result.rows)
    gains = [row.score - other.score for row, other in zip(result.rows, beat.rows, strict=False)]
    room = size - done - math.fsum(row.score for row in beat.rows[done:])
    behind = -math.fsum(gains)
    error = math.sqrt(math.fsum(gain * gain for gain in gains))
    return behind >= room or behind > (2 - done / size) * error


def relayed(flow: Flow, tell: Callable[[Trial], Trial | None]) -> Flow:
    """Run the flow of another search as a part of one; `tell` makes of each trial the one to emit.

    >>> inner = labeled_few_shot(k=1).flow(lmopt.predict("q -> a"), [{"q": "?"}], None)
    >>> [one.note for one in relayed(inner, lambda trial: evolve(trial, note="x"))]
    ['x', 'x']
    """

    def change(effect: Any) -> Flow:
        if not isinstance(effect, Trial):
            return (yield effect)
        if (made := tell(effect)) is not None:
            yield made
        return effect

    return lmopt.through(flow, change)


# == 2. Parts ======================================================================================


def split(
    examples: Iterable[Record], *, seed: int = 0, share: float = 0.5
) -> tuple[Examples, Examples]:
    """Part examples at random into those to learn from and those to score on.

    Args:
        examples: at least two that differ; of equal ones, only the first is used.
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


def spread(examples: Iterable[Record], k: int, *, by: Iterable[str], seed: int = 0) -> Examples:
    """Draw at most `k` examples, in turns from those that differ in the fields `by`.

    Where all differ, as with free text, that is a plain random sample; with labels, each label
    comes equally often.

    >>> rows = [lmopt.Record(n=n, label="odd" if n in (3, 5) else "even") for n in range(8)]
    >>> sorted(row.label for row in spread(rows, 4, by=["label"]))
    ['even', 'even', 'odd', 'odd']
    """
    return tuple(take(k, _in_turns(list(examples), tuple(by), lmopt.seeded(seed, "spread"))))


def _in_turns(rows: list[Any], names: Sequence[str], rng: random.Random) -> list[Any]:
    """Rows in a random order, in turns from those that differ in some fields."""
    rng.shuffle(rows)
    return list(interleave(groupby(lambda row: _values(row, names), rows).values()))


def _values(row: Fields, names: Iterable[str]) -> str:
    return lmopt.canonical([row.get(name) for name in names], other=repr)


def _redemoed(
    program: Program,
    params: Params,
    choose: Callable[[str, Program], Sequence[Record] | None],
) -> Params:
    """The parameters with the demonstrations that are chosen for each step; None leaves its own."""
    for path, leaf in program.leaves.items():
        if (demos := choose(path, leaf)) is not None:
            params = params.replace(path, demos=demos)
    return params


def labeled_demos(program: Program, examples: Iterable[Record], k: int, *, seed: int = 0) -> Params:
    """Return the program's parameters with `k` examples as demonstrations of each step.

    A step gets those fields of an example that it has itself, where that is at least one input and
    one output; other steps keep the demonstrations they have, and with `k=0` all do.

    >>> qa = lmopt.predict("question -> answer")
    >>> rows = [lmopt.Record(question="2+2?", answer="4", source="me")]
    >>> labeled_demos(qa, rows, 8)["predict"].demos
    (Record(question='2+2?', answer='4'),)
    """
    rows = tuple(examples)
    choose = lambda _, leaf: labeled(leaf, rows, k, seed=seed) or None  # noqa: E731
    return _redemoed(program, program.params, choose)


def labeled(leaf: Program, examples: Iterable[Record], k: int, *, seed: int = 0) -> Examples:
    """Return `k` demonstrations of one step from labelled examples, spread over its outputs.

    >>> labeled(lmopt.predict("q -> a"), [lmopt.Record(q="2+2?", a="4"), lmopt.Record(q="?")], 2)
    (Record(q='2+2?', a='4'),)
    """
    outputs = [one.name for one in leaf.signature.outputs] if leaf.signature else []
    return spread(lmopt.fitting(leaf, examples), k, by=outputs, seed=seed)


def unspoilt(program: Program, params: Params, rows: Iterable[Record]) -> Params:
    """Return parameters without the demonstrations that give away the answer to one of the rows.

    These have its inputs, as far as the step takes inputs of the program; a later step, as far as
    the rows have its inputs.

    >>> qa, rows = lmopt.predict("q -> a"), [lmopt.Record(q=q, a="no") for q in "abc"]
    >>> [demo.q for demo in unspoilt(qa, labeled_demos(qa, rows, 3), rows[:1])["predict"].demos]
    ['b', 'c']
    """
    known = list(rows)
    for path, leaf in program.leaves.items():
        own = [one.name for one in leaf.inputs]
        common = [name for name in own if all(name in row for row in known)]
        names = [name for name in own if name in program.takes] or common
        if names and params[path].demos:
            asked = {_values(row, names) for row in known}
            demos = [demo for demo in params[path].demos if _values(demo, names) not in asked]
            params = params.replace(path, demos=demos)
    return params


def step_demos(program: Program, row: Row, *, index: int = 0, seed: int = 0) -> dict[str, Record]:
    """Return what each step did in one run, as demonstrations by path.

    Of a step that ran more than once, one run is drawn; `index` is that of the row, so that it is
    not always the same one.

    >>> qa = lmopt.predict("question -> answer")
    >>> row = lmopt.Row(lmopt.Record(), qa(lmopt.stub_lm(), question="2+2?"), 1.0)
    >>> step_demos(qa, row)
    {'predict': Record(question='2+2?', answer='text')}
    """
    asks = {path for path, leaf in program.leaves.items() if leaf.max_calls}
    ran = [one for one in row.prediction.trace if one.kind == "step" and not one.error]
    demos = {}
    for path, events in groupby(lambda event: event.path, ran).items():
        if path in asks:
            drawn = lmopt.seeded(seed, "demo", path, index).choice(events)
            demos[path] = drawn.inputs | drawn.outputs
    return demos


def resampled(params: Params, rollout: int, *, temperature: float | None = 1.0) -> Params:
    """Return parameters that ask for another sample of every answer; rollout 0 changes nothing.

    >>> resampled(lmopt.predict("q -> a").params, 2)["predict"].settings
    Record(rollout=2, temperature=1.0)
    """
    sample = {"rollout": rollout, "temperature": temperature}
    made = {path: evolve(one, settings=one.settings | sample) for path, one in params.items()}
    return Params(made) if rollout else params


def race(
    program: Program,
    dataset: Dataset,
    metric: Metric,
    *,
    lm: LM,
    beat: Evaluation | None = None,
    workers: int | None = None,
) -> Evaluation:
    """Evaluate a program, and stop as soon as it will hardly score more than another one did.

    It stops where even full marks on all rows that are left would not be enough, and where it is
    far behind, row by row: by two standard errors at first, by one at the end. It looks after 16
    rows, after twice as many, and so on, whatever the number of workers.

    Args:
        dataset: the rows, the same ones that `beat` was scored on.
        beat: the evaluation to be beaten; without it every row is evaluated.
    Returns:
        the evaluation of the rows that were run.
    Calls: `program.max_calls` at most for each row.

    >>> qa, rows = lmopt.predict("question -> answer"), [{"question": "?", "answer": "no"}] * 64
    >>> best = lmopt.evaluate(qa, rows, lambda row, made: 0.9, lm=lmopt.stub_lm())
    >>> len(race(qa, rows, lmopt.exact_match, lm=lmopt.stub_lm(), beat=best).rows)
    16
    """
    rows = lmopt.check_dataset(program, dataset)
    hunt = Hunt(program, (), rows, metric, lm)
    lmopt.drive(hunt._raced([program.params], beat), lm, workers=workers)
    return hunt._known("val", program.params, range(len(rows)))


def _told(value: Any) -> Any:
    """What a writer is told of some values: JSON data, in which media stay what they are."""
    return lmopt.jsonable(value, other=repr, media=lambda one: one)


def _pictured(value: Any) -> tuple[Any, list[lmopt.Image]]:
    """JSON data in which images are named, as [image 1], and the images in that order."""
    images: list[lmopt.Image] = []

    def named(one: Any) -> str:
        if not isinstance(one, lmopt.Image):
            return f"[{one.kind}]"
        images.append(one)
        return f"[image {len(images)}]"

    return lmopt.jsonable(value, other=repr, media=named), images


def cases(
    program: Program, path: str, rows: Iterable[Row], k: int | None = 8
) -> list[dict[str, Any]]:
    """Return what a step did in `k` evaluated rows, worst first: evidence for better instructions.

    Each has, as JSON data with media in it, the inputs and outputs of the step, what the example
    expects of it (or of the whole, where it says nothing of this step), and the feedback: that of
    the metric on this step, on the whole, or the error.

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
        told = {"score": row.score, **({"feedback": feedback} if feedback else {})}
        for event in row.prediction.trace:
            if event.kind == "step" and event.path == path:
                case = {"inputs": event.inputs, "outputs": event.outputs, "expected": expected}
                found.append(_told({**case, **told}))
    return found[:k]


def description(program: Program) -> str:
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
    "that the feedback and the expected values give. Keep what works, take over what the attempts "
    "know, and do not repeat one of them.",
)


_IMAGES = lmopt.Field("images", list[lmopt.Image], "of the cases")
_SEEING = lmopt.predict(_PROPOSE.append(_IMAGES, to="inputs"), name="propose", temperature=1.0)


def proposer(**options: Any) -> Program:
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
    plain, before = "" if text is None else str(text).strip(), ""
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
        gamma: share of the best, between 0 and 1.
        startup: tries that are plain random before that.
        samples: how many to choose from.
    Reference: Bergstra et al. 2011, NeurIPS 24. Independent dimensions, as there.

    >>> tried = [((0,), 0.0), ((1,), 1.0), ((2,), 0.0)] * 3
    >>> tpe(tried, [4], random.Random(0), startup=3)
    (3,)
    """

    def odds(tried: Sequence[tuple[Sequence[int], float]]) -> list[list[float]]:
        made = []
        for place, size in enumerate(sizes):
            counts = Counter(choice[place] for choice, _ in tried)
            made.append([(counts[option] + 1.0) / (len(tried) + size) for option in range(size)])
        return made

    def gain(choice: Sequence[int]) -> float:
        picked = zip(choice, good, bad, strict=True)
        return math.fsum(math.log(one[option] / two[option]) for option, one, two in picked)

    known = {tuple(choice) for choice, _ in history}
    drawn = [tuple(rng.randrange(size) for size in sizes) for _ in range(samples)]
    if len(history) >= startup:
        order = sorted(history, key=lambda one: -one[1])
        best = max(1, math.ceil(gamma * len(order)))
        good, bad = odds(order[:best]), odds(order[best:])
        drawn = [tuple(rng.choices(range(len(w)), w)[0] for w in good) for _ in range(samples)]
        drawn.sort(key=gain, reverse=True)
    return next((choice for choice in drawn if choice not in known), drawn[0])


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

    def search(hunt: Hunt) -> Flow:
        yield hunt.unscored(hunt.program.params, "start")
        params = labeled_demos(hunt.program, hunt.train, k, seed=seed)
        yield hunt.unscored(params, f"up to {k} labelled examples")

    return optimizer("labeled_few_shot", None, search, lambda size: Plan(), parts=False, seed=seed)


class Teaching(Options, total=False):
    """What optimizers that bootstrap take.

    Attributes:
        max_bootstrapped: how many runs of the teacher to take, 0 or more; labelled examples fill
            the demonstrations up, to `max_labeled` where there are fewer.
        rounds: how many times an example is tried, each time but the first with a new rollout at
            temperature 1; 1 or more.
        teacher: a program with the same steps, or other parameters; by default the program.
    """

    max_bootstrapped: int
    rounds: int
    threshold: float  # score from which a run is taken, 0 to 1; 0 is a threshold
    teacher: Program | Mapping[str, lmopt.Prompt] | None
    teacher_lm: LM | None  # runs the teacher


def fitting_count(program: Program, examples: Examples, tokens: int) -> int:
    """Return how many examples fit into the prompt of each step, as demonstrations of mean length.

    Args:
        tokens: of the prompt, of four characters each.

    >>> rows = tuple(lmopt.Record(q="a" * 100, a=str(n)) for n in range(100))
    >>> fitting_count(lmopt.predict("q -> a"), rows, 1000)
    24
    """
    return _Options(max_prompt_tokens=tokens).most(program, examples)


def _lengths(program: Program, examples: Examples) -> _Lengths:
    def size(leaf: Any, *demos: Record) -> int:
        prompt = evolve(leaf.prompt, demos=demos)
        return sum(len(one.text) for one in lmopt.chat.render(leaf.signature, prompt, {}))

    made = []
    for leaf in program.leaves.values():
        empty = size(leaf)
        sized = [size(leaf, demo) for demo in lmopt.fitting(leaf, examples[:100])]
        made.append((empty, statistics.fmean(sized) - empty if sized else 0.0))
    return made


def _rungs(most: int) -> list[int]:
    """How many demonstrations to try: as many as may be, and then fewer."""
    return [most, *reversed([4**n for n in range(1, 10) if 4**n <= most / 2])]


def bootstrap(
    teacher: Program,
    examples: Examples,
    *,
    wanted: int,
    threshold: float = 1.0,
    rounds: int = 1,
    max_labeled: int = 16,
    seed: int = 0,
) -> Flow:
    """Say on which examples to run a teacher until `wanted` runs reach the threshold.

    A flow that yields (parameters of the teacher, block of examples), and is sent the evaluation.
    A block is as large as the number of runs still wanted, so that none is wasted. No demonstration
    of the teacher has the inputs of an example of the block.

    >>> qa, rows = lmopt.predict("q -> a"), tuple(lmopt.Record(q=q, a="no") for q in "abcde")
    >>> params, block = next(bootstrap(qa, rows, wanted=3))
    >>> len(block), len(params["predict"].demos)
    (3, 2)
    """
    left, params = examples, teacher.params
    if not any(prompt.demos for prompt in params.values()):
        params = labeled_demos(teacher, examples, max_labeled, seed=seed)
    for number in range(rounds):
        failed: Examples = ()
        while left and wanted:
            block, left = left[:wanted], left[wanted:]
            result = yield resampled(unspoilt(teacher, params, block), number), block
            taken = passed(result, threshold)
            wanted -= len(taken)
            failed += tuple(row.example for row in result.rows if row not in taken)
        left = failed


def passed(evaluation: Evaluation, threshold: float) -> tuple[Row, ...]:
    """Return the rows that did not fail and reach a threshold, 0 included.

    >>> rows = (lmopt.Row(lmopt.Record(), lmopt.Prediction(), score) for score in (0.0, 1.0))
    >>> len(passed(lmopt.Evaluation(tuple(rows)), 0.0))
    2
    """
    return tuple(row for row in evaluation.rows if not row.error and row.score >= threshold)


@frozen(eq=False)
class _Lesson:
    """A set of demonstrations to make: of which examples, in an order, and how many of a kind."""

    hunt: Hunt
    examples: Examples
    wanted: int  # runs of the teacher
    labelled: int
    seed: int

    def learned(self, ran: Sequence[Row]) -> _Tried:
        """What runs of the teacher have shown, filled up with labelled examples."""
        program, seed = self.hunt.program, self.seed
        taken = passed(Evaluation(tuple(ran)), self.hunt.options.threshold)
        made = [step_demos(program, row, index=index, seed=seed) for index, row in enumerate(taken)]
        seen = {row.example for row in taken}
        others = [example for example in self.examples if example not in seen]

        def demos(path: str, leaf: Program) -> Sequence[Record] | None:
            shown = [demo[path] for demo in made if path in demo]
            more = labeled(leaf, others, max(self.labelled - len(shown), 0), seed=seed)
            return [*shown, *more] or None

        failed = _failures([row.error for row in ran if row.error])
        note = f"{len(taken)} of {len(ran)} runs reached the threshold{failed}"
        params = _redemoed(program, program.params, demos)
        return params, note if ran else f"up to {self.labelled} labelled examples"

    def taught(self, *own: Params, emit: bool = False) -> Flow:
        """Bootstrap; return the parameters and a note; if told so, emit a trial for each block."""
        hunt, given, ran = self.hunt, self.hunt.options, list[Row]()
        teacher = given.guide(hunt.program, *own)

        def teach(block: tuple[Params, Examples]) -> Flow:
            result = yield hunt.teach(teacher, block[1], block[0], given.teacher_lm)
            ran.extend(result.rows)
            if emit:
                yield hunt.unscored(*self.learned(ran))
            return result

        options: Any = {"threshold": given.threshold, "rounds": given.rounds, "seed": self.seed}
        options |= {"wanted": self.wanted, "max_labeled": self.labelled}
        yield from lmopt.through(bootstrap(teacher, self.examples, **options), teach)
        made = self.learned(ran)
        if emit and not ran:
            yield hunt.unscored(*made)
        return made


def bootstrap_few_shot(lm: LM, **options: Unpack[Teaching]) -> Optimizer:
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

    def search(hunt: Hunt) -> Flow:
        yield hunt.unscored(hunt.program.params, "start")
        rows, most = tuple(unique(hunt.train)), hunt.options.max_bootstrapped
        yield from _Lesson(hunt, rows, most, hunt.counts[0], hunt.seed).taught(emit=True)

    return optimizer("bootstrap_few_shot", lm, search, Size.lessons, parts=False, **options)


def random_search(
    lm: LM, *, candidates: int = 16, stop_at: float | None = None, **options: Unpack[Teaching]
) -> Optimizer:
    """Try random sets of demonstrations, and keep the one that scores best on held-out rows.

    Tried are, in this order: the start; labelled examples, as many as fit, and fewer (64, 16, 4);
    `bootstrap_few_shot` on the examples as they stand; and the same on `candidates` random orders,
    each with a random number of runs to take, and of labelled examples beside them. Four at a time
    race each other and the best so far (see `Hunt.contest`); equal ones are scored once.

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

    def search(hunt: Hunt) -> Flow:
        yield hunt.start(), hunt.demos()
        lessons = _draws(hunt, candidates)
        while stop_at is None or (hunt.top.score or 0.0) < stop_at:
            made = yield from _each(_Lesson.taught, take(4, lessons))
            if not made:
                return
            yield hunt.contest(hunt.new(made), 0)

    def bound(size: Size) -> Plan:
        runs = (candidates + 2 + size.rungs) * size.val
        return size.plan(runs) + size.lessons(candidates + 1)

    return optimizer("random_search", lm, search, bound, **options)


def _draws(hunt: Hunt, count: int) -> Iterator[_Lesson]:
    """Lessons: on the examples as they stand; then on random orders of them."""
    most, counts = hunt.options.max_bootstrapped, hunt.counts
    if most:
        yield _Lesson(hunt, hunt.train, most, counts[0], hunt.seed)
    for index in range(count):
        rng = lmopt.seeded(hunt.seed, "random_search", index)
        order = tuple(rng.sample(hunt.train, len(hunt.train)))
        size = rng.randint(1, most) if most else 0
        yield _Lesson(hunt, order, size, rng.choice(counts), rng.getrandbits(32))


_Choices = tuple[str, list[dict[str, Any]]]  # the path of a step, and changes to its prompt


def _changed(params: Params, space: Iterable[_Choices], choice: Iterable[int]) -> Params:
    for (path, changes), place in zip(space, choice, strict=True):
        params = params.replace(path, **changes[place])
    return params


def _sets(hunt: Hunt, count: int) -> Flow:
    """The demonstrations of each step to choose from: of all trials so far, and of lessons."""
    made = yield from _each(_Lesson.taught, take(count, _draws(hunt, count)))
    every = [one.params for one in hunt.trials] + [params for params, _ in made]
    sets = list(unique(every, key=lambda one: one.digest))
    return [(path, [{"demos": one[path].demos} for one in sets]) for path in hunt.paths]


def tpe_search(
    lm: LM, *, trials: int = 16, sets: int = 8, **options: Unpack[Teaching]
) -> Optimizer:
    """Choose a set of demonstrations for each step by itself, by a seeded TPE.

    Tried first are the start and labelled examples, in several numbers; then combinations of these
    and of bootstrapped sets, as those of `random_search`.

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

    def search(hunt: Hunt) -> Flow:
        yield hunt.start(), hunt.demos()
        space = yield from _sets(hunt, sets)
        sizes = [len(changes) for _, changes in space]
        history = [((n,) * len(space), one.score or 0.0) for n, one in enumerate(hunt.trials)]
        for number in range(trials):
            choice = tpe(history, sizes, lmopt.seeded(hunt.seed, "tpe", number))
            params = _changed(hunt.program.params, space, choice)
            trial = yield hunt.trial(params, f"sets {choice}", 0)
            history.append((choice, trial.score or 0.0))

    def bound(size: Size) -> Plan:
        runs = (trials + 1 + size.rungs) * size.val
        return size.plan(runs) + size.lessons(sets)

    return optimizer("tpe_search", lm, search, bound, **options)


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

    def search(hunt: Hunt) -> Flow:
        yield hunt.unscored(hunt.program.params, "start")
        rows = list(unique(hunt.train))
        given = [lmopt.select_inputs(hunt.program, row).values() for row in rows]
        texts = ["\n".join(map(lmopt.as_text, one)) for one in given]
        vectors = yield lmopt.invoke(embed, texts)
        chosen = _facilities([lmopt.unit(one) for one in vectors], k)
        taken = [rows[place] for place in chosen]
        choose = lambda _, leaf: lmopt.fitting(leaf, taken) or None  # noqa: E731
        params = _redemoed(hunt.program, hunt.program.params, choose)
        yield hunt.unscored(params, f"{len(taken)} examples that stand for all")

    return optimizer("knn_few_shot", None, search, lambda size: Plan(), parts=False)


def _facilities(vectors: Sequence[Sequence[float]], k: int) -> list[int]:
    """Take greedily what brings all vectors nearest to one that is taken."""
    alike = [[math.fsum(map(mul, a, b)) for b in vectors] for a in vectors]
    near, chosen = [-1.0] * len(vectors), list[int]()
    while len(chosen) < min(k, len(vectors)):
        left = [one for one in range(len(vectors)) if one not in chosen]
        chosen.append(max(left, key=lambda one: math.fsum(map(max, near, alike[one]))))
        near = list(map(max, near, alike[chosen[-1]]))
    return chosen


# == 4. Instructions ===============================================================================
# Each search takes a start, has texts proposed from what went wrong, and lets them race on held-out
# rows. The proposer is an ordinary program: see `proposer`.


def _reworded(hunt: Hunt, path: str, shown: int, count: int, note: str) -> Flow:
    """Race new instructions of a step of the best so far, each from other things it does wrong."""
    seen, base = (yield hunt.cases(path, shown, count=count)), hunt.top.params
    texts = yield hunt.propose(path, seen)
    yield hunt.contest((base.replace(path, instructions=text), note) for text in texts)


def copro(
    lm: LM, *, breadth: int = 10, depth: int = 3, shown: int = 16, **options: Unpack[Options]
) -> Optimizer:
    """Improve instructions step by step, by coordinate ascent over proposals.

    In each of `depth` rounds, for each step, `breadth` texts are proposed, each from what went
    wrong on `shown` rows of the training half, and from earlier proposals and scores; they race.

    Calls: for each round and step, runs on the rows shown, `breadth` proposals and their scoring.
    Reference: Opsahl-Ong et al. 2024, arXiv 2406.11695, and OPRO, Yang et al. 2023, arXiv
    2309.03409. Here proposals see failures, not only the instructions, and rows to score on are
    held out.

    >>> rows = [{"text": f"a {w} {n}", "kind": w} for n in range(6) for w in ("dog", "oak")]
    >>> task = lmopt.predict("text -> kind")
    >>> search = copro(lmopt.toy_lm(), breadth=1, depth=1, max_labeled=0)
    >>> [trial.score for trial in search.trials(task, rows, lmopt.exact_match)]
    [0.0, 1.0]
    """
    _check(1, breadth=breadth, depth=depth, shown=shown)

    def search(hunt: Hunt) -> Flow:
        yield hunt.start(), hunt.demos()
        for number, path in itertools.product(range(depth), hunt.paths):
            yield from _reworded(hunt, path, shown, breadth, f"round {number + 1}, {path}")

    def bound(size: Size) -> Plan:
        rounds = depth * size.steps
        runs = rounds * (breadth * size.val + min(shown * breadth, size.train))
        return size.plan((1 + size.rungs) * size.val + runs, rounds * breadth)

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


def _sizes(auto: str) -> tuple[int, int]:
    """How many candidates, and rows to score on."""
    known = {"light": (6, 100), "medium": (12, 300), "heavy": (18, 1000)}
    if auto not in known:
        raise lmopt.DataError("no size", auto, ", ".join(known), "correct auto")
    return known[auto]


def mipro(
    lm: LM,
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
    step. A pair is scored on `minibatch` rows; after every `full_every` pairs the one with the best
    mean is scored on all held-out rows, which alone decide. `max_labeled=0` with
    `max_bootstrapped=0` leaves demonstrations alone.

    Args:
        auto: 6, 12 or 18 candidates, and at most 100, 300 or 1,000 rows to score on.
        candidates: sets of demonstrations, and about half as many texts, 2 or more; beats `auto`.
        trials: pairs to try; by default as in the paper's code.
    Calls: bootstrapping, proposals, `minibatch` runs for each trial, and the full scores.
    Reference: Opsahl-Ong et al. 2024, arXiv 2406.11695. Here the best pair of the minibatches races
    the best so far, and no proposal is thrown away.

    >>> mipro(lmopt.toy_lm(), candidates=2, trials=3)
    Optimizer(name='mipro')
    """
    sized, most = (6, 1000) if auto is None else _sizes(auto)
    count = sized if candidates is None else candidates
    _check(2, candidates=count)
    _check(1, minibatch=minibatch, full_every=full_every)
    fixed = options.get("max_bootstrapped") == options.get("max_labeled") == 0
    texts = count if fixed else max(count // 2, 2)

    def tries(steps: int) -> int:
        choices = steps * (1 if fixed else 2)
        return trials or int(max(2 * choices * math.log2(count), 1.5 * count))

    def search(hunt: Hunt) -> Flow:
        hunt.fewer(most)
        yield hunt.start(), hunt.demos()
        demos = yield from _sets(hunt, 0 if fixed else max(count - len(hunt.trials), 1))
        space = yield from _wording(hunt, texts, demos)
        yield from _pairs(hunt, space, tries(len(hunt.paths)), minibatch, full_every)

    def bound(size: Size) -> Plan:
        size, many = evolve(size, val=min(size.val, most)), tries(size.steps)
        full = 1 + size.rungs - (-many // full_every)
        shown = min(16 * (texts - 1), size.train) * size.steps
        runs = many * min(minibatch, size.val) + full * size.val + shown
        plan = size.plan(runs, size.steps * (texts - 1)) + Plan(calls=3, usual=1)
        return plan + size.lessons(count - 1)

    return optimizer("mipro", lm, search, bound, **options)


def _wording(hunt: Hunt, count: int, demos: Iterable[_Choices]) -> Flow:
    """For each step what its instructions may be, with other tips proposed, and its examples."""
    examples, _ = _pictured(_fitting(_told(hunt.train[:20]), 16_000))
    made = yield hunt.ask(lmopt.predict(_SUMMARY, name="summary"), {"examples": examples})
    space: list[_Choices] = []
    for path, sets in demos:
        rng = lmopt.seeded(hunt.seed, "tips", path)
        tips = [rng.choice(TIPS) for _ in range(count - 1)]
        seen = yield hunt.cases(path, 16, count=count - 1)
        told = yield hunt.propose(path, seen, tips=tips, data=made.summary if made else "")
        texts = [hunt.program.params[path].instructions, *told]
        space += [(path, [{"instructions": one} for one in texts]), (path, sets)]
    return space


def _pairs(
    hunt: Hunt, space: Sequence[_Choices], tries: int, minibatch: int, full_every: int
) -> Flow:
    """Choose from a space, which has two choices for each step, by TPE over minibatches."""
    sizes, rows = [len(changes) for _, changes in space], range(len(hunt.val))
    history = [((0, n) * (len(space) // 2), one.score or 0.0) for n, one in enumerate(hunt.trials)]
    tried, scores = {choice for choice, _ in history}, dict[tuple[int, ...], list[float]]()
    for number in range(1, tries + 1):
        rng = lmopt.seeded(hunt.seed, "pairs", number - 1)
        choice = tpe(history, sizes, rng)
        places = sorted(rng.sample(rows, min(minibatch, len(rows))))
        result = yield hunt.held(_changed(hunt.program.params, space, choice), places)
        history.append((choice, result.score))
        scores.setdefault(choice, []).append(result.score)
        left = [one for one in scores if one not in tried]
        if left and (number % full_every == 0 or number == tries):
            best = max(left, key=lambda one: statistics.fmean(scores[one]))
            tried.add(best)
            params = _changed(hunt.program.params, space, best)
            trial = yield hunt.trial(params, f"pairs {best} after {number} minibatches", 0)
            history.append((best, trial.score or 0.0))


_SUMMARY = lmopt.Signature(
    (lmopt.Field("examples", list[Any], "some of the data"),),
    (lmopt.Field("summary", str, "two or three sentences"),),
    "Say what this data is like: its task, topics, form and values.",
)


def gepa(
    lm: LM,
    *,
    max_runs: int | None = None,
    auto: Literal["light", "medium", "heavy"] = "light",
    minibatch: int = 8,
    merge: bool = True,
    max_merges: int = 5,
    stop: Callable[[Trial], bool] | None = None,
    **options: Unpack[Options],
) -> Optimizer:
    """Evolve instructions by reflection on feedback, from a Pareto front of candidates.

    A candidate is drawn from those that are best on some held-out row, more often the more rows it
    leads. It runs on `minibatch` rows of the training half; one of its steps, in turn, gets new
    instructions from what it did there and the feedback on it. Where the child does better on the
    minibatch, it is scored on the held-out rows, and joins unless it is behind the best on the
    first of these. Two candidates of the front are merged: step by step where each has changed what
    the other has not, else by instructions that join those of both.

    Args:
        max_runs: program runs in all; the search ends before one more would be too many. It scores
            on a twelfth as many rows at most.
        auto: how many, by the number of steps and held-out rows, where that is not given.
        merge, max_merges: whether to merge, and how often at most.
        stop: called with each trial; True ends the search.
    Calls: those of `max_runs` runs, and at most one proposal for every two minibatches.
    Reference: Agrawal et al. 2025, arXiv 2507.19457. Here scores that are known are used again, the
    budget is never overshot, a minibatch has 8 rows, not 3, on which a win means little, and it
    begins with labelled demonstrations where these score better; `max_labeled=0` is the paper's.

    >>> gepa(lmopt.toy_lm(), max_runs=100)
    Optimizer(name='gepa')
    """
    _check(1, minibatch=minibatch)
    count, _ = _sizes(auto)

    def budget(steps: int, val: int, rungs: int) -> int:
        rounds = int(max(4 * steps * math.log2(count), 1.5 * count))
        usual = (4 * minibatch) * rounds + (rounds // 3 + 2 + rungs) * val
        return max_runs if max_runs is not None else usual

    def search(hunt: Hunt) -> Flow:
        rungs = len(hunt.counts)
        most = budget(len(hunt.paths), len(hunt.val), rungs)
        hunt.fewer(most // 12)
        if most < (size := len(hunt.val)):
            raise lmopt.DataError("too few runs", max_runs, f"{size} or more", "raise max_runs")
        trial = yield hunt.start()
        yield hunt.demos(min(rungs, max((most - size) // (2 * size), 0)))
        merges, idle, turns = max_merges if merge else 0, 0, Counter[int]()
        batch, stream = min(minibatch, len(hunt.train)), _shuffled(hunt)
        for number in itertools.count():
            full = hunt.runs + 2 * batch + size + 8 > most
            if full or idle > 50 or (trial and stop and stop(trial)):
                break
            rng, places = lmopt.seeded(hunt.seed, "gepa", number), list(take(batch, stream))
            merged = trial and merges and number and (yield from _merging(hunt, rng))
            merges -= bool(merged)
            trial = merged or (yield from _mutating(hunt, rng, places, turns))
            idle = 0 if trial else idle + 1
        if idle > 50 and (hunt.top.score or 0.0) < 1.0:
            what = "gepa ended: 50 minibatches in a row gave nothing new"
            warnings.warn(f"{what}, after {hunt.runs} of {most} runs", stacklevel=2)

    def bound(size: Size) -> Plan:
        runs = budget(size.steps, size.val, size.rungs)
        return size.plan(runs, max(runs - size.val, 0) // 2 + 1 + max_merges)

    return optimizer("gepa", lm, search, bound, **options)


def _front(hunt: Hunt) -> dict[int, int]:
    """On how many rows each trial of the Pareto front leads."""
    known = {n: one.evaluation for n, one in enumerate(hunt.trials) if not one.out}
    scores = [[row.score for row in one.rows] for one in known.values() if one]
    return {n: leads for n, leads in zip(known, pareto(scores), strict=True) if leads}


def _shuffled(hunt: Hunt) -> Iterator[int]:
    """Places of rows to learn from, without end, in another order in each pass."""
    for epoch in itertools.count():
        order = list(range(len(hunt.train)))
        lmopt.seeded(hunt.seed, "epoch", epoch).shuffle(order)
        yield from order


def _mutating(hunt: Hunt, rng: random.Random, places: Sequence[int], turns: Counter[int]) -> Flow:
    """Reflect on a step of one of the front; return its child's trial, None if it is no better."""
    front = _front(hunt)
    parent = rng.choices(list(front), list(front.values()))[0]
    params = hunt.trials[parent].params
    before = yield hunt.rows(params, places)
    path = hunt.paths[turns[parent] % len(hunt.paths)]
    turns[parent] += 1
    if all(row.score >= 1.0 for row in before.rows):
        return None
    seen = cases(hunt.program, path, before.rows, None)
    for text in (yield hunt.propose(path, [seen], params=params)):
        child = params.replace(path, instructions=text)
        if not hunt.knows(child) and (yield hunt.rows(child, places)).total > before.total:
            turns[len(hunt.trials)] = turns[parent]
            return (yield hunt.trial(child, f"new instructions of {path}", parent))
    return None


def _merging(hunt: Hunt, rng: random.Random) -> Flow:
    """Join what two of the front have found; return the child's trial, None if it is not new."""
    pairs = list(itertools.combinations(_front(hunt), 2))
    rng.shuffle(pairs)
    for pair in pairs:
        low, high = sorted(pair, key=lambda index: hunt.trials[index].score or 0.0)
        child = yield from _joined(hunt, hunt.trials[low].params, hunt.trials[high].params)
        if not hunt.knows(child):
            return (yield hunt.trial(child, f"merged from {pair[0]} and {pair[1]}", high))
    return None


def _joined(hunt: Hunt, low: Params, high: Params) -> Flow:
    """The second with the steps that only the first has changed, or with a text joined of both."""
    start = hunt.trials[0].params
    taken = {path: low[path] for path in start if low[path] != start[path] == high[path]}
    if taken and len(taken) < len(start):
        return Params({**high, **taken})
    differ = [path for path in hunt.paths if low[path].instructions != high[path].instructions]
    for path in differ[:1]:
        seen = yield hunt.cases(path, 8, params=high)
        join = "Join the instructions with these, so that what either knows is kept"
        tips = [f"{join}: {low[path].instructions}"]
        for text in (yield hunt.propose(path, seen, tips=tips, params=high)):
            return high.replace(path, instructions=text)
    return high


def simba(
    lm: LM,
    *,
    steps: int = 8,
    candidates: int = 6,
    minibatch: int = 32,
    max_demos: int = 4,
    temperature: float = 0.2,
    **options: Unpack[Options],
) -> Optimizer:
    """Learn from the rows on which runs differ most, by a demonstration or by new instructions.

    In each of so many steps, programs of the pool run `candidates` times on a minibatch of the
    training half, each with a rollout of its own, and as many are made. Where the best and the
    worst run of a row lie farthest apart, a program of the pool gets the best run as a
    demonstration, or instructions that contrast the two; where no run went better than another,
    instructions from what was expected. The best of these on the minibatch is scored on the
    held-out rows and joins the pool.

    Args:
        max_demos: demonstrations of a step, or as many as the program has; an old one makes room
            for a new one. With 0 only instructions are written.
        temperature: of the choice from the pool, more than 0.
    Calls: for each step 2 * `candidates` * `minibatch` runs, proposals, and a scoring.
    Reference: SIMBA of DSPy, https://dspy.ai. Here the start has its true score in the pool, as
    have labelled demonstrations, and a winner is scored at once.

    >>> simba(lmopt.toy_lm(), steps=1)
    Optimizer(name='simba')
    """
    _check(1, steps=steps, candidates=candidates, minibatch=minibatch)
    _check(max_demos=max_demos)

    def search(hunt: Hunt) -> Flow:
        yield hunt.start(), hunt.demos()
        for number in range(steps):
            rng = lmopt.seeded(hunt.seed, "simba", number)
            places = sorted(rng.sample(range(len(hunt.train)), min(minibatch, len(hunt.train))))
            pool = [hunt.trials[_chosen(hunt, temperature, rng)].params for _ in range(candidates)]
            asked = [resampled(p, number * candidates + place) for place, p in enumerate(pool)]
            runs = yield hunt.rows(asked, places)
            made: list[tuple[Params, str, int]] = []
            for bucket in _buckets(runs)[:candidates]:
                parent = _chosen(hunt, temperature, rng)
                made += yield from _learned(hunt, bucket, parent, max_demos, rng)
            if made:
                scores = yield hunt.rows([params for params, _, _ in made], places)
                best = max(range(len(made)), key=lambda place: scores[place].score)
                params, what, parent = made[best]
                yield hunt.trial(params, f"step {number + 1}, {what}", parent)

    def bound(size: Size) -> Plan:
        runs = 2 * candidates * min(minibatch, size.train) + size.val
        return size.plan((1 + size.rungs) * size.val + steps * runs, steps * candidates)

    return optimizer("simba", lm, search, bound, **options)


def _chosen(hunt: Hunt, temperature: float, rng: random.Random) -> int:
    """Draw a trial, better ones more often; none that is out."""
    scores = [-1.0 if one.out else one.score or 0.0 for one in hunt.trials]
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return rng.choices(range(len(scores)), weights)[0]


def _buckets(runs: Sequence[Evaluation]) -> list[list[Row]]:
    """The runs of each row, best first; rows whose runs differ most first."""
    rows = [
        sorted(same, key=lambda row: -row.score)
        for same in zip(*(one.rows for one in runs), strict=True)
    ]
    return sorted(rows, key=lambda same: (same[-1].score - same[0].score, -same[0].score))


def _learned(
    hunt: Hunt, runs: Sequence[Row], parent: int, max_demos: int, rng: random.Random
) -> Flow:
    """What a program of the pool learns from the runs of one row, the best of which comes first."""
    params, apart = hunt.trials[parent].params, runs[0].score > runs[-1].score
    if max_demos and rng.random() < 0.5 and (apart or runs[0].score >= 1.0):
        return [(_with_demo(hunt, params, runs[0], max_demos, rng), "a demonstration", parent)]
    path = rng.choice(hunt.paths)
    seen = cases(hunt.program, path, [runs[-1], runs[0]] if apart else runs[-1:])
    tips = ["The cases are a bad and a good run of one input." if apart else ""]
    texts = yield hunt.propose(path, [seen], tips=tips, params=params)
    return [(params.replace(path, instructions=text), "instructions", parent) for text in texts]


def _with_demo(hunt: Hunt, params: Params, row: Row, most: int, rng: random.Random) -> Params:
    """The parameters with a run as one more demonstration of each step; old ones make room."""
    for path, demo in step_demos(hunt.program, row).items():
        old = list(params[path].demos)
        if len(old) >= most:
            del old[rng.randrange(len(old))]
        params = params.replace(path, demos=(*old, demo))
    return params


def infer_rules(
    lm: LM,
    *,
    candidates: int = 10,
    rules: int = 10,
    shown: int = 40,
    **options: Unpack[Teaching],
) -> Optimizer:
    """Have rules inferred from labelled examples, and keep those that score best.

    Each of the candidates has so many rules, inferred from another draw of `shown` examples of the
    training half, once without demonstrations and once with the best: labelled ones, or those of
    `bootstrap_few_shot`.

    Calls: bootstrapping, a proposal for each candidate and step, and the scoring of both.
    Reference: InferRules of DSPy, https://dspy.ai. Here the candidate that scored best is returned.

    >>> infer_rules(lmopt.toy_lm(), candidates=2)
    Optimizer(name='infer_rules')
    """
    _check(1, candidates=candidates, shown=shown)
    tips = [f"Keep the instructions; add {rules} short rules that the cases show."]

    def search(hunt: Hunt) -> Flow:
        yield hunt.start(), hunt.demos()
        most = hunt.options.max_bootstrapped
        lesson = _Lesson(hunt, hunt.train, most, hunt.counts[0], hunt.seed)
        yield hunt.trial(*(yield from lesson.taught()), 0)
        start, demos, size = hunt.program.params, hunt.top.params, min(shown, len(hunt.train))
        told = [_labelled_case(hunt.program, row) for row in hunt.train]
        draws = (lmopt.seeded(hunt.seed, "rules", number) for number in range(candidates))
        seen, texts = [rng.sample(told, size) for rng in draws], {}
        for path in hunt.paths:
            texts[path] = yield hunt.propose(path, seen, tips=tips, params=start)
        yield hunt.contest(_ruled(start, texts, "rules"), 0)
        yield hunt.contest(_ruled(demos, texts, "rules with demonstrations"), 0)

    def bound(size: Size) -> Plan:
        runs = (2 * candidates + 2 + size.rungs) * size.val
        return size.plan(runs, candidates * size.steps) + size.lessons()

    return optimizer("infer_rules", lm, search, bound, **options)


def _ruled(base: Params, texts: Mapping[str, Sequence[str]], what: str) -> Iterator[_Tried]:
    """The parameters with the first text of each step, with the second, and so on."""
    known = {path: itertools.cycle(some) for path, some in texts.items() if some}
    for number in range(max(map(len, texts.values()))):
        for path, some in known.items():
            base = base.replace(path, instructions=next(some))
        yield base, f"{what} {number + 1}"


def _labelled_case(program: Program, row: Record) -> Any:
    """An example as a case: what goes in, and what is expected."""
    names = {one.name for one in program.inputs}
    given = keyfilter(names.__contains__, row)
    return _told({"inputs": given, "expected": {n: v for n, v in row.items() if n not in names}})


def avatar(
    lm: LM,
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
        rounds: how many; it ends before where no run goes badly.
        upper: score from which a run went well.
        lower: score up to which it went badly.
        shown: runs of either kind at most.
    Calls: for each round, runs on the training half, a proposal for each step, and a scoring.
    Reference: Wu et al. 2024, arXiv 2406.11200. Here new instructions are measured before they are
    kept.

    >>> avatar(lmopt.toy_lm(), rounds=1)
    Optimizer(name='avatar')
    """
    _check(1, rounds=rounds, shown=shown)

    def search(hunt: Hunt) -> Flow:
        yield hunt.start(), hunt.demos()
        for number in range(rounds):
            params, rng = hunt.top.params, lmopt.seeded(hunt.seed, "avatar", number)
            rows = list((yield hunt.rows(params)).rows)
            rng.shuffle(rows)
            bad = [row for row in rows if row.score <= lower][:shown]
            good = [row for row in rows if row.score >= upper][:shown]
            if not bad:
                return
            tips = [f"The first {len(bad)} cases went badly, the others well."]
            for path in hunt.paths:
                seen = cases(hunt.program, path, [*bad, *good], 2 * shown)
                for text in (yield hunt.propose(path, [seen], tips=tips)):
                    params = params.replace(path, instructions=text)
            yield hunt.trial(params, f"round {number + 1}")

    def bound(size: Size) -> Plan:
        runs = (1 + size.rungs) * size.val + rounds * (size.val + size.train)
        return size.plan(runs, rounds * size.steps)

    return optimizer("avatar", lm, search, bound, **options)


def auto(  # type: ignore[misc]
    lm: LM,
    *,
    calls: int = 1000,
    space: Mapping[str, Sequence[Any]] | None = None,
    refit: bool = True,
    level: float = 0.5,
    **options: Unpack[Teaching],
) -> Optimizer:
    """Spend one budget of LM calls on whatever still helps: the optimizer to begin with.

    First come labelled demonstrations, in as many numbers as the calls are enough to compare. Then,
    in turns, until the calls are used: instructions from what the best so far does wrong, with its
    demonstrations in place; other demonstrations, of rows that it gets wrong and of runs that went
    well; and settings. The last word is a paired test of the best against the start, on rows it was
    picked on and on a slice of others that is kept for that.

    Args:
        calls: in all; with few it compares less, and on fewer rows.
        space: settings to choose from, as in `tune`.
        refit: whether to draw the demonstrations at last from all rows, those to score on too, as
            many as were chosen, or all; the score is that of before. Without, of several that are
            as good the one that costs least a run is taken, see `best`.
        level: how probable the gain over the start may be by chance.
    Returns:
        an optimizer, whose last trial has the score on the rows that it was not picked on.
    Calls: `calls`.

    >>> rows = [{"text": f"a {w} {n}", "kind": w} for n in range(9) for w in ("dog", "oak", "tin")]
    >>> trials = list(auto(lmopt.toy_lm(), calls=100).trials(
    ...     lmopt.predict("text -> kind"), rows, lmopt.exact_match))
    >>> trials[0].score, trials[-1].score
    (0.0, 1.0)
    """
    choices = {} if space is None else _choices(space)

    def search(hunt: Hunt) -> Flow:
        each, most = max(_usual_calls(hunt.program), 1), hunt.most or 0
        runs = most // each
        hunt.val, kept = _slices(hunt.whole, runs)
        slack = 2 * hunt.program.max_calls + len(kept) * each // 2  # replies that cannot be read
        hunt.most = most - (2 * len(kept) * each + slack) * bool(kept)
        start, turn = (yield hunt.start()), 0
        with suppress(CallsSpent):
            yield hunt.demos(max(runs // (5 * len(hunt.val)), 1))
            while (hunt.top.score or 0.0) < 1.0 and hunt.left > len(hunt.val) * each:
                spent, path = hunt.calls, hunt.paths[turn % len(hunt.paths)]
                yield from _reworded(hunt, path, 16, 3, f"new instructions of {path}")
                yield from _redrawn(hunt, turn)
                if choices:
                    rng = lmopt.seeded(hunt.seed, "settings", turn)
                    chosen = [{n: rng.choice(c) for n, c in choices.items()} for _ in range(2)]
                    yield hunt.contest(hunt.new(_tuned(hunt, hunt.top.params, c) for c in chosen))
                turn += 1
                if hunt.calls == spent:
                    break
        hunt.most = most
        yield from _last_word(hunt, start, kept, level, hunt.whole if refit else ())

    def bound(size: Size) -> Plan:
        runs = calls if size.program.max_calls else calls * (size.val + size.train)
        return size.priced(Plan(runs, calls, runs, calls))

    return optimizer("auto", lm, search, bound, calls=calls, **options)


def _slices(val: Examples, runs: int) -> tuple[Examples, Examples]:
    """Rows to pick on, and where the runs are enough a quarter as many to test the best on."""
    size = min(max(runs // 10, min(24, runs // 3), 1), len(val))
    kept = size // 4 if runs >= 8 * size >= 160 else 0
    size = min(size, len(val) - kept)
    return val[:size], val[size:][:kept]


def _redrawn(hunt: Hunt, turn: int) -> Flow:
    """Race other demonstrations of the best: of rows it gets wrong, and of runs that go well."""
    made, rng = list[_Tried](), lmopt.seeded(hunt.seed, "redrawn", turn)
    base, order = hunt.top.params, tuple(rng.sample(hunt.train, len(hunt.train)))
    count = max(len(prompt.demos) for prompt in base.values())
    if 0 < count < len(order) and hunt.options.max_labeled != 0:
        seen = yield hunt.rows(base, rng.sample(range(len(order)), min(32, len(order))))
        wrong = [row.example for row in seen.rows if row.score < 1.0][: (count + 1) // 2]
        taken = list(unique([*wrong, *order]))[:count]
        shown = _redemoed(hunt.program, base, lambda _, leaf: lmopt.fitting(leaf, taken) or None)
        made.append((shown, "rows that went wrong shown"))
    tasks = [leaf.signature for leaf in hunt.program.leaves.values()]
    outputs = {one.name for task in tasks if task for one in task.outputs}
    wanted = hunt.options.max_bootstrapped
    if wanted and outputs - order[0].keys():  # runs show more than labels do
        lesson = _Lesson(hunt, order, wanted, count, rng.getrandbits(32))
        params, note = yield from lesson.taught(base)
        made.append((_redemoed(hunt.program, base, lambda path, _: params[path].demos), note))
    yield hunt.contest(made)


def _last_word(hunt: Hunt, start: Trial, kept: Examples, level: float, refit: Examples) -> Flow:
    """The best, if a paired test finds it better than the start, else the start."""
    top = best(hunt.trials, level=1.0 if refit else 0.7)  # what is refitted will cost more anyway
    tested = yield from _each(partial(_tested, hunt, kept), [start, top])
    count = min(map(len, tested))
    both = [one.evaluation.rows if one.evaluation else () for one in (start, top)]
    pair = [(*old, *new[:count]) for old, new in zip(both, tested, strict=True)]
    found = lmopt.compare(*map(Evaluation, pair)) if len(pair[0]) == len(pair[1]) else None
    sure = found is not None and found.difference > 0 and found.p_value < level
    winner = top if sure else start
    result = Evaluation(tested[sure][:count]) if count else winner.evaluation
    slice_ = f"; scored on {count} rows it was not picked on" if count else ""
    test = f"; {found.difference:+.3f} against the start, p = {found.p_value:.3g}" if found else ""
    params = _refitted(hunt, winner.params, refit) if sure and refit else winner.params
    filled = "; then demonstrations from all rows, not scored again" * (params != winner.params)
    note = f"{winner.note}{slice_}{test}{filled}"
    yield hunt.last(params, note, result, hunt.place(winner.params) or 0)


def _tested(hunt: Hunt, rows: Examples, trial: Trial) -> Flow:
    """Run a trial on other rows; return what the calls were enough for."""
    try:
        made = yield hunt.teach(hunt.program, rows, unspoilt(hunt.program, trial.params, rows))
    except CallsSpent as error:
        made = error
    return made.rows


def _refitted(hunt: Hunt, params: Params, rows: Examples) -> Params:
    """The parameters with their labelled demonstrations drawn from all rows."""
    every = hunt.train + rows
    most, all_ = (hunt.options.most(hunt.program, one) for one in (hunt.train, every))
    for path, leaf in hunt.program.leaves.items():
        demos, known = params[path].demos, set(lmopt.fitting(leaf, every))
        own = [demo for demo in demos if demo not in known]
        if len(own) < len(demos) and hunt.options.max_labeled != 0:
            full = len(demos) >= most and hunt.options.max_tokens_per_run is None
            size = max(all_, len(demos)) if full else len(demos)
            more = labeled(leaf, every, size - len(own), seed=hunt.seed)
            params = params.replace(path, demos=[*own, *more])
    return params


# == 5. Settings ===================================================================================


def tune(
    lm: LM,
    space: Mapping[str, Sequence[Any]],
    *,
    trials: int = 20,
    **options: Unpack[Options],
) -> Optimizer:
    """Choose settings by trying them: all combinations, or where these are more, `trials` by TPE.

    Every step gets the same. Without a `valset` it scores on all of the training set, for nothing
    is learned of it.

    Args:
        space: choices by name: a sampling setting, `adapter` (chat, json, xml or plain), `model`,
            or `demos`, the number of demonstrations, filled up with labelled examples.
    Raises:
        DataError: there is nothing to choose from.
        ParamsError: an unknown setting.
    Calls: those of scoring each combination.

    >>> optimize = tune(lmopt.toy_lm(), {"temperature": [0.0, 0.7], "adapter": ["chat"]})
    >>> optimize.plan(lmopt.predict("q -> a"), [{"q": "?"}] * 5).runs
    15
    """
    _check(1, trials=trials)
    choices = _choices(space)
    sizes = list(map(len, choices.values()))
    grid = math.prod(sizes)

    def search(hunt: Hunt) -> Flow:
        start = yield hunt.start()
        history: list[tuple[Sequence[int], float]] = []
        every = itertools.product(*map(range, sizes))
        for number in range(min(grid, trials)):
            rng = lmopt.seeded(hunt.seed, "tune", number)
            choice = next(every) if grid <= trials else tpe(history, sizes, rng)
            picked = zip(choices.items(), choice, strict=True)
            chosen = {name: known[place] for (name, known), place in picked}
            trial = yield hunt.trial(*_tuned(hunt, start.params, chosen), 0)
            history.append((choice, trial.score or 0.0))

    def bound(size: Size) -> Plan:
        return size.plan((1 + min(grid, trials)) * size.val)

    return optimizer("tune", lm, search, bound, parts=False, **options)


_NO_SETTINGS = ("model", "demos")  # what else there is to choose


def _choices(space: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    choices = {name: list(one) for name, one in space.items()}
    if not choices or not all(choices.values()):
        raise lmopt.DataError("nothing to choose from", choices, "name=[...]", "add choices")
    for name, (one, *_) in choices.items():
        if name not in _NO_SETTINGS:
            lmopt.Prompt(settings={name: one})  # complains now
    return choices


def _tuned(hunt: Hunt, params: Params, chosen: Fields) -> _Tried:
    """The parameters with settings, and with so many demonstrations, labelled ones after others."""
    changes = {"model": chosen["model"]} if "model" in chosen else {}
    settings = {name: value for name, value in chosen.items() if name not in _NO_SETTINGS}
    for path, prompt in params.items():
        params = params.replace(path, settings=prompt.settings | settings, **changes)

    def demos(path: str, leaf: Program) -> Sequence[Record]:
        known = params[path].demos
        more = labeled(leaf, hunt.train, len(known) + chosen["demos"], seed=hunt.seed)
        return [*known, *(one for one in more if one not in known)][: chosen["demos"]]

    if "demos" in chosen:
        params = _redemoed(hunt.program, params, demos)
    return params, ", ".join(f"{name}={value}" for name, value in chosen.items())


# == 6. Weights ====================================================================================
# A trainer is any function (examples, base model, **settings) -> name of the trained model; or has
# such a `flow`. An example is a conversation, {"messages": [{"role": ..., "content": ...}, ...]};
# for reinforcement also with the "advantage" of its last message, and the "logprobs" of that.

Trainer = Callable[..., str]


def chat_examples(
    program: Program, rows: Iterable[Row], *, keep_demos: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Return what each step should have been asked and should have replied in evaluated rows.

    Each run of a step is one conversation, rendered through the program's own adapter, whoever ran
    it. A step that asks no LM has none, nor has one that calls tools as its provider does.

    Args:
        keep_demos: leave the demonstrations in; else the weights shall know without.
    Returns:
        conversations by path, each `{"messages": [...]}`, as OpenAI and most others take them.

    >>> qa = lmopt.predict("q -> a")
    >>> rows = lmopt.evaluate(qa, [{"q": "?", "a": "text"}], lmopt.exact_match, lm=lmopt.stub_lm())
    >>> [one["role"] for one in chat_examples(qa, rows.rows)["predict"][0]["messages"]]
    ['system', 'user', 'assistant']
    """
    if not keep_demos:
        program = program.with_params(_redemoed(program, program.params, lambda *_: ()))
    leaves = {path: leaf for path, leaf in program.leaves.items() if leaf.max_calls}
    made: dict[str, list[dict[str, Any]]] = {path: [] for path in leaves}
    for event in itertools.chain.from_iterable(row.prediction.trace for row in rows):
        if event.kind == "step" and not event.error and event.path in leaves:
            asked: Any = next(leaves[event.path].flow(**event.inputs))
            if asked.adapter is not None:
                reply = lmopt.render_outputs(asked.adapter, asked.signature, event.outputs)
                made[event.path].append(_conversation(asked, reply))
    return made


def _conversation(request: lmopt.Request, reply: str) -> dict[str, Any]:
    turns = [*((one.role, one.text) for one in request.messages), ("assistant", reply)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def finetune(
    trainer: Any,
    *,
    lm: LM,
    teacher: Program | Mapping[str, lmopt.Prompt] | None = None,
    teacher_lm: LM | None = None,
    threshold: float = 1.0,
    keep_demos: bool = False,
    per_step: bool = False,
    settings: Mapping[str, Any] = Record(),
    **options: Unpack[Options],
) -> Optimizer:
    """Train weights on what a teacher did where it did well; keep them where they score better.

    The runs of the teacher on the training half that the metric accepts become conversations; the
    trained model is named by the prompts (`Prompt.model`), so that `lm` must serve it: see `route`.

    Args:
        trainer: (examples, base model, **settings) -> name of the trained model; such as
            `openai_trainer`, `jsonl_trainer` or any function. What it raises is raised.
        teacher, teacher_lm, threshold: as in `Teaching`.
        keep_demos: train with the demonstrations in the prompt, and leave them there.
        per_step: a model for each step; else one for all.
        settings: for the trainer.
    Calls: a run of the teacher for each row of the training half, and two scorings.
    Reference: BootstrapFinetune of DSPy; Soylu et al. 2024, arXiv 2407.10930.

    >>> taught = finetune(lambda examples, base: f"{base}-{len(examples)}", lm=lmopt.stub_lm())
    >>> rows = [{"q": str(n), "a": "text"} for n in range(6)]
    >>> [trial.note for trial in taught.trials(lmopt.predict("q -> a"), rows, lmopt.exact_match)]
    ['start', 'trained on 3 of 3 runs: -3']
    """
    changes = {} if keep_demos else {"demos": ()}

    def search(hunt: Hunt) -> Flow:
        yield hunt.start()
        guide, params = hunt.options.guide(hunt.program), hunt.program.params
        ran = yield hunt.teach(guide, hunt.train, guide.params, teacher_lm)
        taken = passed(ran, threshold)
        told = chat_examples(hunt.program, taken, keep_demos=keep_demos)
        known, names = [path for path in told if path in hunt.paths], list[str]()
        for paths in [[path] for path in known] if per_step else [known]:
            if examples := [one for path in paths for one in told[path]]:
                base = _base(hunt, params, paths)
                names.append((yield hunt.trained(trainer, examples, base, settings)))
                for path in paths:
                    params = params.replace(path, model=names[-1] or None, **changes)
        if not names:
            what = f"none of {len(ran.rows)} runs reached the threshold: nothing was trained"
            warnings.warn(what, stacklevel=2)
        note = f"trained on {len(taken)} of {len(ran.rows)} runs: {', '.join(names) or 'nothing'}"
        yield hunt.trial(params, note, 0)

    def bound(size: Size) -> Plan:
        jobs = Plan(trainings=size.steps if per_step else 1)
        return size.plan(2 * size.val) + size.lessons() + jobs

    teaching: Any = {"teacher": teacher, "teacher_lm": teacher_lm, "threshold": threshold}
    return optimizer("finetune", lm, search, bound, **teaching, **options)


def _base(hunt: Hunt, params: Params, paths: Iterable[str]) -> str:
    """The weights that some steps use now."""
    named = [params[path].model for path in paths]
    return next(filter(None, named), None) or str(getattr(hunt.lm, "model", ""))


def grpo(
    trainer: Any,
    *,
    lm: LM,
    group: int = 8,
    steps: int = 4,
    minibatch: int = 8,
    temperature: float = 1.0,
    settings: Mapping[str, Any] = Record(),
    **options: Unpack[Options],
) -> Optimizer:
    """Train weights by reinforcement: what scored better than its like becomes more probable.

    In each step, each row of a minibatch runs `group` times, 2 or more. The rewards are those of
    the metric; the advantage of a run is its reward, less the mean of its group, by the standard
    deviation of that; a group with equal rewards teaches nothing and is left out. The trainer gets
    the requests with the replies, their advantages and log-probabilities, and returns the next
    step's model.

    Args:
        trainer, settings: as in `finetune`.
        temperature: of the runs, more than 0.
    Calls: for each step `group` runs for each row of a minibatch, and a scoring.
    Reference: Shao et al. 2024, arXiv 2402.03300.

    >>> grpo(lambda examples, base: base, lm=lmopt.toy_lm(), steps=1)
    Optimizer(name='grpo')
    """
    _check(2, group=group)
    _check(1, steps=steps, minibatch=minibatch)

    def search(hunt: Hunt) -> Flow:
        params, stream = (yield hunt.start()).params, _shuffled(hunt)
        for number in range(steps):
            places = sorted(set(take(min(minibatch, len(hunt.train)), stream)))
            rollouts = [1 + number * group + place for place in range(group)]
            asked = [resampled(params, one, temperature=temperature) for one in rollouts]
            runs = yield hunt.rows(asked, places)
            told = rewarded(hunt.program, [one.rows for one in runs])
            reward = statistics.fmean(row.score for one in runs for row in one.rows)
            if told:
                base = _base(hunt, params, hunt.paths)
                model = yield hunt.trained(trainer, told, base, settings)
                for path in hunt.paths:
                    params = params.replace(path, model=model or None)
                yield hunt.trial(params, f"step {number + 1}: mean reward {reward:.3f}, {model}")

    def bound(size: Size) -> Plan:
        runs = steps * (group * min(minibatch, size.train) + size.val) + size.val
        return size.plan(runs) + Plan(trainings=steps)

    return optimizer("grpo", lm, search, bound, **options)


def rewarded(program: Program, runs: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Return the replies in several runs of the same rows, each with its advantage in its group.

    >>> qa = lmopt.predict("q -> a")
    >>> made = [qa(lmopt.scripted_lm([{"a": text}]), q="?") for text in ("x", "y")]
    >>> runs = [[lmopt.Row(lmopt.Record(), one, float(n))] for n, one in enumerate(made)]
    >>> [round(one["advantage"], 3) for one in rewarded(qa, runs)]
    [-1.0, 1.0]
    """
    told = []
    for same in zip(*runs, strict=True):
        scores = [row.score for row in same]
        spread_, mean = statistics.pstdev(scores), statistics.fmean(scores)
        for row in same if spread_ > 0 else ():
            for event in row.prediction.trace:
                if event.kind == "lm" and event.request is not None and event.response is not None:
                    made = {"path": event.path, "logprobs": event.response.logprobs}
                    said = _conversation(event.request, event.response.text)
                    told.append({**said, **made, "advantage": (row.score - mean) / spread_})
    return told


def write_examples(examples: Sequence[Fields], folder: lmopt.Path_) -> str:
    """Write examples as JSON Lines, whole or not at all; return the path.

    The file is named by the hash of its content, so that the same examples are the same file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_examples([{"messages": []}], folder)
    ...     path.endswith(".jsonl"), path == write_examples([{"messages": []}], folder)
    (True, True)
    """
    import hashlib

    text = "".join(f"{Record(one).to_json()}\n" for one in examples)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, f"train-{name}.jsonl")
    lmopt.write_whole(text, path)
    return str(path)


def jsonl_trainer(folder: lmopt.Path_) -> Trainer:
    """Make a trainer that writes the examples to a file and trains nothing: for other services.

    It returns the base model, so that nothing changes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jsonl_trainer(folder)([{"messages": []}], "base")
    'base'
    """

    def train(examples: Sequence[Fields], base_model: str, **settings: Any) -> str:
        write_examples(examples, folder)
        return base_model

    return train


@frozen(eq=False, repr=False)
class openai_trainer:
    """Make a trainer at OpenAI, or whatever else has its end points for files and jobs.

    It uploads the examples, begins a job and waits for it. Killed and started again, it goes on
    with the job of the same examples and base model, which `folder` remembers; Ctrl-C cancels it.

    Args:
        folder: for the files of examples, and what is known of jobs.
        api_key: by default the environment variable OPENAI_API_KEY.
        poll: seconds between questions how the job is.
        timeout: seconds for one request.
        attempts: how many times to try a request that finds no connection or a busy server.
    Raises:
        LMError: (when it trains) the job failed, or the server could not be asked.

    >>> openai_trainer("jobs", api_key="secret")
    <trainer at https://api.openai.com/v1>
    """

    folder: lmopt.Path_
    base_url: str = field(default="https://api.openai.com/v1", kw_only=True)
    api_key: str | Callable[[], str] | None = field(default=None, kw_only=True)
    poll: float = field(default=30.0, kw_only=True)
    timeout: float = field(default=60.0, kw_only=True)
    attempts: int = field(default=5, kw_only=True)

    def __repr__(self) -> str:
        return f"<trainer at {self.base_url}>"

    def __call__(self, examples: Sequence[Fields], base_model: str, **settings: Any) -> str:
        """Train in this thread."""
        return str(lmopt.drive(self.flow(examples, base_model, **settings), lmopt.stub_lm()))

    def flow(self, examples: Sequence[Fields], base_model: str, **settings: Any) -> Flow:
        """Return the flow of a training: its effects are requests over HTTP, and waiting."""
        path = Path(write_examples(examples, self.folder))
        asked = lmopt.canonical([base_model, settings, self.base_url])
        known = path.with_name(f"{path.stem}-{lmopt.seeded(0, asked).getrandbits(40):010x}.job")
        if not known.exists():
            files = {"file": (path.name, path.read_bytes()), "purpose": (None, "fine-tune")}
            sent = yield from self._ask("POST", "/files", files=files)
            told = {"model": base_model, "training_file": sent["id"], **settings}
            begun = yield from self._ask("POST", "/fine_tuning/jobs", json=told)
            lmopt.write_whole(begun["id"], known)
        job = known.read_text(encoding="utf-8")
        try:
            state = yield from self._ended(job)
        except GeneratorExit:  # Ctrl-C
            with suppress(Exception):
                self._send("POST", f"/fine_tuning/jobs/{job}/cancel", {})
            known.unlink(missing_ok=True)
            raise
        if state["status"] == "succeeded":
            return str(state["fine_tuned_model"])
        known.unlink(missing_ok=True)  # the next time begins a new one
        why = (state.get("error") or {}).get("message") or state["status"]
        raise lmopt.LMError("the training failed", why, "a trained model", f"see job {job}")

    def _ended(self, job: str) -> Flow:
        while True:
            state = yield from self._ask("GET", f"/fine_tuning/jobs/{job}")
            if state["status"] in ("succeeded", "failed", "cancelled"):
                return state
            yield lmopt.Sleep(self.poll)

    def _ask(self, method: str, path: str, **body: Any) -> Flow:
        """A request over HTTP; one that may pass is tried again."""
        for left in reversed(range(self.attempts)):
            try:
                return (yield lmopt.invoke(self._send, method, path, body))
            except lmopt.LMError as error:
                if not (error.retryable and left):
                    raise
            yield lmopt.Sleep(self.poll)

    def _send(self, method: str, path: str, body: Fields) -> Any:
        import httpx

        given = self.api_key() if callable(self.api_key) else self.api_key
        key = given or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url, status = self.base_url.rstrip("/") + path, 0
        try:
            sent = httpx.request(method, url, headers=headers, timeout=self.timeout, **body)
            if sent.is_success:
                return sent.json()
            status, said = sent.status_code, sent.text[:500]
        except (httpx.TransportError, ValueError) as error:
            said = lmopt.describe(error)
        passes = status in (0, 408, 409, 429) or status >= 500
        what, facts = f"{url} answered {status or 'nothing'}", {"status": status or None}
        raise lmopt.LMError(what, said, "200", "see the answer", **facts, retryable=passes)


# == 7. Combinators ================================================================================


_HANDED = ("propose", "prompt_lm", "seed", "max_labeled", "max_prompt_tokens", "max_tokens_per_run")


def _inside(outer: _Options, optimizer: Optimizer, *more: str) -> Optimizer:
    """An optimizer inside another one: it has its options where it has none of its own."""
    own, plain = optimizer.options, _Options()
    names = [one for one in (*_HANDED, *more) if getattr(own, one) == getattr(plain, one)]
    handed = {name: getattr(outer, name) for name in names}
    return evolve(optimizer, options=evolve(own, **handed, within=outer.within + own.within))


def _inner(
    hunt: Hunt,
    optimizer: Optimizer,
    params: Mapping[str, lmopt.Prompt],
    tell: Callable[[Trial], Trial | None],
    *more: str,
    share: int = 1,
    keep: int = 0,
) -> Flow:
    """Run an optimizer on its share of the calls that are left, but for those to keep, if any."""
    spent, part = hunt.calls, _inside(hunt.options, optimizer, *more)
    own, ours = part.options.calls, (hunt.left - keep) / share
    cut = ours < (math.inf if own is None else own)
    if cut:
        less = evolve(part.options, calls=max(int(ours), 0), sized=bool(keep))
        part = evolve(part, options=less)

    def counted(trial: Trial) -> Trial | None:
        hunt.calls = spent + trial.calls
        return tell(trial)

    flow = part.flow(hunt.program.with_params(params), hunt.train, hunt.metric)
    try:
        yield from relayed(flow, counted)
    except CallsSpent as error:
        hunt.calls = max(hunt.calls, spent + error.used)
        if cut and not keep:  # the other one has no more either
            raise


def _bounds(size: Size, optimizers: Iterable[Optimizer], *more: str) -> Plan:
    """What optimizers inside another one cost at most."""
    inner = [_inside(size.options, one, *more) for one in optimizers]
    plans = (one.bounded(size.program, size.train, size.lengths) for one in inner)
    return sum(plans, Plan())


def _checked(optimizer: Any) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        todo = "call its factory; make one of your own by optimizer(...)"
        raise TypeError(lmopt.explain("this is no Optimizer", optimizer, "an Optimizer", todo))
    return optimizer


def _shared(optimizers: Iterable[Optimizer], **options: Unpack[Options]) -> Options:
    """The options of a combinator: what runs rows for it is by default what does for its parts."""
    chosen = [_checked(one).options for one in optimizers]
    workers = max([one.workers for one in chosen if one.workers], default=None)
    executor = next((one.executor for one in chosen if one.executor), None)
    return {"workers": workers, "executor": executor, **options}


def _best(hunt: Hunt, optimizer: Optimizer, left: int = 1) -> Flow:
    """Run one of the `left` optimizers, with calls kept to score them; return its best trial."""
    made = [Trial(hunt.program.params)]
    keep = left * len(hunt.val) * hunt.program.max_calls
    yield from _inner(hunt, optimizer, {}, made.append, share=left, keep=keep)
    return best(made)


def chain(*optimizers: Optimizer, **options: Unpack[Options]) -> Optimizer:
    """Run optimizers one after the other, each on the best of the one before.

    Their scores should be on the same rows: give them one `valset`, or the same seed. What is not
    scored is, where it would take the place of what is.

    Args:
        *optimizers: none of them is the identity.
    Calls: those of all.
    Reference: Soylu et al. 2024, arXiv 2407.10930 (BetterTogether).

    >>> len(list(chain().trials(lmopt.predict("q -> a"), [{"q": "?"}], lmopt.exact_match)))
    1
    """

    def search(hunt: Hunt) -> Flow:
        if not optimizers:
            yield hunt.unscored(hunt.program.params, "start")
        before: Trial | None = None
        for one in optimizers:
            try:
                before = yield from _link(hunt, one, before)
            except lmopt.BudgetExceeded:
                if before and before.final:  # the last word of the part that came to its end
                    yield hunt.last(before.params, before.note, before.evaluation)
                raise
        if before and best(hunt.trials).params != before.params:  # the last word of a part
            yield hunt.last(before.params, before.note, before.evaluation)

    def bound(size: Size) -> Plan:
        again = max(len(optimizers) - 1, 0) * size.train
        return _bounds(size, optimizers, "valset") + size.plan(again)

    shared = _shared(optimizers, **options)
    lm = next((one.lm for one in optimizers if one.lm is not None), None)
    return optimizer("chain", lm, search, bound, parts=False, **shared)


def _link(hunt: Hunt, optimizer: Optimizer, before: Trial | None) -> Flow:
    """Run one optimizer from the best trial so far; return the best one after it."""
    if hunt.left < 1:
        raise hunt._spent()
    places, start = list[int](), before and evolve(before, final=False)
    # The score of a last word compares with no other.
    made = [start] if start and before and not before.final else []
    comparable = bool(made and made[0].score is not None)
    base = hunt.place(start.params) if start else None

    def tell(trial: Trial) -> Trial | None:
        if start and not places and (trial.score is None or comparable):
            places.append(base or 0)  # it starts with the best so far
            return None
        parent = base if trial.parent is None else places[trial.parent]
        made.append(evolve(trial, parent=parent, calls=hunt.calls))
        places.append(len(hunt.trials))
        hunt.trials.append(evolve(made[-1], final=False))
        return hunt.trials[-1]

    yield from _inner(hunt, optimizer, start.params if start else {}, tell, "valset")
    known = [one for one in (*made, start) if one and one.evaluation]
    if made and made[-1].score is None and known and hunt.lm is not None:
        made = [best(known), (yield from _settled(hunt, best(known), made[-1]))]
    return best(made) if made else before


def _settled(hunt: Hunt, after: Trial, new: Trial) -> Flow:
    """Score what has no score on the rows of what has one; return its trial."""
    rows = tuple(row.example for row in after.evaluation.rows) if after.evaluation else ()
    shown = yield hunt.teach(hunt.program, rows, unspoilt(hunt.program, new.params, rows))
    parent, note = hunt.place(new.params), f"{new.note}; scored"
    hunt.trials.append(Trial(new.params, shown.score, note, parent, hunt.calls, shown))
    yield hunt.trials[-1]
    return hunt.trials[-1]


def best_of(*optimizers: Optimizer, lm: LM, **options: Unpack[Options]) -> Optimizer:
    """Run several optimizers from the same start, and keep what scores best on held-out rows.

    Args:
        *optimizers: each gets the training half.
        lm: runs the program to score what they return.
    Calls: those of all, and a scoring for each.

    >>> both = best_of(labeled_few_shot(k=1), labeled_few_shot(k=4), lm=lmopt.toy_lm())
    >>> both.plan(lmopt.predict("q -> a"), [{"q": "?", "a": "!"}] * 8).runs
    12
    """

    def search(hunt: Hunt) -> Flow:
        yield hunt.start()
        for place, one in enumerate(optimizers):
            best = yield from _best(hunt, one, len(optimizers) - place)
            yield hunt.trial(best.params, one.name, 0)

    def bound(size: Size) -> Plan:
        return size.plan((1 + len(optimizers)) * size.val) + _bounds(size, optimizers)

    return optimizer("best_of", lm, search, bound, **_shared(optimizers, **options))


def only(path: str, optimizer: Optimizer) -> Optimizer:
    """Let an optimizer change one step, or all steps below a path; the others stay as they are.

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
        trials: after so many, the start included.
        calls: before it makes more LM calls than that.
    Calls: those of the optimizer at most.

    >>> short = limit(random_search(lmopt.toy_lm()), trials=2)
    >>> rows = [{"q": str(n), "a": "x"} for n in range(8)]
    >>> len(list(short.trials(lmopt.predict("q -> a"), rows, lmopt.exact_match)))
    2
    """
    if trials is None and calls is None:
        raise lmopt.DataError("no limit", None, "trials= or calls=", "pass one")
    _check(1, trials=1 if trials is None else trials)
    known = [one for one in (calls, optimizer.options.calls) if one is not None]
    options = evolve(optimizer.options, calls=min(known, default=None))
    if trials is None:
        return evolve(optimizer, options=options)

    def search(hunt: Hunt) -> Flow:
        count = itertools.count(1)

        def change(effect: Any) -> Flow:
            outcome = yield effect
            if isinstance(effect, Trial) and next(count) == trials:
                raise _Enough
            return outcome

        flow = lmopt.through(optimizer.search(hunt), hunt._satisfy)
        with suppress(_Enough):
            yield from lmopt.through(flow, change)

    return evolve(optimizer, name=f"limit({optimizer.name})", search=search, options=options)


def if_better(
    optimizer: Optimizer, *, lm: LM, level: float = 0.05, **options: Unpack[Options]
) -> Optimizer:
    """Keep the start unless a paired test on held-out rows says that the result is better.

    Args:
        optimizer: gets the training half.
        lm: runs both on the held-out rows.
        level: how probable a difference may be by chance.
    Calls: those of the optimizer, and two scorings.

    >>> rows = [{"animal": f"{a} {n}", "sound": a[:2]} for n in range(20) for a in ("dog", "cat")]
    >>> sure = if_better(labeled_few_shot(k=4), lm=lmopt.toy_lm())
    >>> [trial.note for trial in sure.trials(lmopt.predict("animal -> sound"), rows,
    ...     lmopt.exact_match)]
    ['start', 'labeled_few_shot is better: p = 1.91e-06']
    """

    def search(hunt: Hunt) -> Flow:
        before = yield hunt.start()
        best = yield from _best(hunt, optimizer)
        after = yield hunt.held(best.params)
        found = lmopt.compare(before.evaluation, after)
        sure = found.difference > 0 and found.p_value < level
        verdict = "is better" if sure else "is not surely better"
        note = f"{optimizer.name} {verdict}: p = {found.p_value:.3g}"
        kept, shown = (best.params, after) if sure else (before.params, before.evaluation)
        yield hunt.last(kept, note, shown)

    def bound(size: Size) -> Plan:
        return size.plan(2 * size.val) + _bounds(size, [optimizer])

    shared = _shared([optimizer], **options)
    return Optimizer("if_better", lm, search, bound, options=_options("if_better", **shared))


# == 8. Laws =======================================================================================


def check_optimizer(
    optimize: Optimizer,
    program: lmopt.Program,
    trainset: lmopt.Dataset,
    metric: lmopt.Metric,
    *,
    workers: Sequence[int] = (2, 8),
    kills: int = 3,
) -> None:
    """Raise unless an optimizer keeps the laws of all: a test of your own is a line.

    It changes nothing that it is given. It makes the same trials each time, for any number of
    workers; the first is the start. It stays within its plan. On the rows it scores on, it is never
    worse than its start. Killed and started again over the answers it had got, it pays for none of
    them twice, and ends in the same bytes.

    Args:
        optimize: with LMs that give equal requests equal answers, such as `toy_lm`.
        workers: numbers of them to try.
        kills: how many times to kill it.
    Raises:
        AssertionError: a law does not hold; says which, and what there was instead.
    Calls: those of some ten searches.

    >>> rows = [{"animal": f"{a} {n}", "sound": a[:2]} for n in range(4) for a in ("dog", "cat")]
    >>> search = copro(lmopt.toy_lm(), breadth=2, depth=1)
    >>> check_optimizer(search, lmopt.predict("animal -> sound"), rows, lmopt.exact_match)
    """
    optimize, rows, start = _checked(optimize), [dict(row) for row in trainset], program.params
    task, plan = (program, rows, metric), optimize.plan(program, rows)
    trials, calls, graded = _observed(optimize, task)
    _law("it changes its data", rows, [dict(row) for row in trainset])
    _law("it changes the program", program.params, start)
    _law("its first trial is not the start", trials and trials[0].params, start)
    made = best(trials).params
    _law("its result does not fit the program", program.with_params(made).params, made)
    spent = {"calls": max(trials[-1].calls, calls), "metric calls": graded}
    kept = spent["calls"] <= plan.calls and graded <= plan.metrics
    _law("it makes more calls than planned", kept or spent, True, plan)
    for count in (1, *workers):
        again = evolve(optimize, options=evolve(optimize.options, workers=count))
        how = f"with {count} workers" if count > 1 else "the second time"
        for place, pair in enumerate(itertools.zip_longest(again.trials(*task), trials)):
            _law(f"trial {place} is another one {how}", *pair)
    scored = trials[0].evaluation
    if scored is not None and not trials[0].out:
        shown = tuple(row.example for row in scored.rows)
        after = lmopt.evaluate(program, shown, metric, lm=optimize.lm, params=made).score
        _law("it is worse than its start", after >= scored.score or after, True, scored.score)
    for stop in range(1, graded + 1, max(graded // max(kills, 1), 1)):
        answers: dict[str, str] = {}
        _, paid, _ = _observed(optimize, task, lmopt.cache(answers), stop=stop)
        whole, more, _ = _observed(optimize, task, lmopt.cache(answers))
        _law(f"killed in run {stop}, it ends otherwise", best(whole).params, made)
        _law(f"killed in run {stop}, it pays for answers twice", paid + more, len(answers))


def _law(what: str, value: Any, expected: Any, shown: Any = None) -> None:
    if value != expected:
        todo = "correct the optimizer"
        raise AssertionError(lmopt.explain(what, value, str(shown or expected), todo))


def _observed(
    optimize: Optimizer, task: tuple[Any, ...], *layers: Any, stop: int = 0
) -> tuple[list[Trial], int, int]:
    """A search's trials, and how many replies and scores it got; killed at the `stop`-th score."""
    (program, rows, metric), asked, graded = task, list[Any](), list[Any]()

    def layered(lm: Any) -> Any:
        return lm and pipe(lm, lmopt.log(asked.append), *layers)

    def grade(example: Any, prediction: Any) -> Any:
        graded.append(example)
        if len(graded) == stop:
            raise _Enough
        return metric(example, prediction)

    options = evolve(optimize.options, prompt_lm=layered(optimize.options.prompt_lm))
    watched, trials = evolve(optimize, lm=layered(optimize.lm), options=options), list[Trial]()
    with suppress(_Enough):
        trials.extend(watched.trials(program, rows, grade))
    paid = [one for one in asked if "key" in one and not one.error]  # not tools, nor what failed
    return trials, len(paid), len(graded)


# == 9. Report =====================================================================================


def summary(trials: Iterable[Trial]) -> str:
    """Return a table of trials as text: score, its interval, calls, parent and note.

    >>> print(summary([Trial(lmopt.predict("q -> a").params, note="start")]))
       #  score  95 %           calls  from  note
       0      -  -                  0     -  start
    """
    row = "{:1}{:>3}  {:>5}  {:<14} {:>5}  {:>4}  {}".format
    shown, lines = list(trials), [row("", "#", "score", "95 %", "calls", "from", "note")]
    top = _place_of_best(shown)
    for place, one in enumerate(shown):
        star = "*" if place == top and one.score is not None else ""
        score = "-" if one.score is None else f"{one.score:.3f}"
        interval = "{:.3f} to {:.3f}".format(*one.evaluation.interval) if one.evaluation else "-"
        parent = "-" if one.parent is None else one.parent
        lines.append(row(star, place, score, interval, one.calls, parent, one.note))
    return "\n".join(lines)


def _place_of_best(trials: Sequence[Trial]) -> int:
    if not trials:
        return 0
    top = best(trials)  # its note may say more
    return [evolve(one, note=top.note) for one in trials].index(top)


def report(trials: Iterable[Trial], *, title: str = "Optimization") -> str:
    """Return trials as one HTML page that needs nothing else: no network, no script.

    It has the score against the calls, and against what a run costs; the prompt of the best; the
    candidates, each with what it changed of the one it was made from; and the rows of start and
    best side by side. No trials are a DataError.

    >>> page = report([Trial(lmopt.predict("q -> a").params, 0.5, "start")])
    >>> page.startswith("<!doctype html>"), "<svg" in page
    (True, True)
    """
    shown = list(trials)
    if not shown:
        raise lmopt.DataError("no trials to report", shown, "one or more", "run the search first")
    place = _place_of_best(shown)
    top = shown[place]
    said = top.evaluation and lmopt.transcript(top.evaluation.rows[0].prediction, every=True)
    items = "".join(_candidate(shown, number, place) for number in range(len(shown)))
    calls, tokens = [one.calls for one in shown], [one.tokens for one in shown]
    parts = {
        "Score against calls": _chart(shown, place, "calls", calls),
        "Score against the cost of a run": _chart(shown, place, "tokens a run", tokens) + _LEGEND,
        "The best prompt": f"<pre>{_escape(said or str(top.params))}</pre>",
        "Candidates": f'<ol start="0">{items}</ol>',
        "Start and best, row by row": _side_by_side(shown, top),
    }
    body = "\n".join(f"<h2>{head}</h2>\n{part}" for head, part in parts.items())
    title, about = _escape(title), _headline(shown, top)
    return _PAGE.format(title=title, style=_STYLE, body=f"<h1>{title}</h1>\n{about}\n{body}")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>{style}</style></head><body><div class="lmopt">
{body}
</div></body></html>
"""
_DOT, _BEST = "#38c", "#e52"  # these, and what one can see through, fit light and dark pages
_STYLE = """
.lmopt { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }
.lmopt svg { min-width: 32rem; font-size: 12px; text-anchor: middle; fill: currentColor }
.lmopt path { fill: none; stroke: #8886 } .lmopt .dot { stroke: #38c } .lmopt .bar { stroke: #38c8 }
.lmopt summary { cursor: pointer; overflow-wrap: anywhere }
.lmopt .best > summary { font-weight: bold } .lmopt .out > summary { opacity: .6 }
.lmopt pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; max-height: 40rem;
  background: #8882; padding: .5rem }
.lmopt ins, .lmopt .up { background: #0a03; text-decoration: none }
.lmopt del, .lmopt .down { background: #f003; text-decoration: none }
.lmopt .wide { overflow-x: auto } .lmopt table { border-collapse: collapse; width: 100% }
.lmopt tr { border-bottom: 1px solid #8886; text-align: left; vertical-align: top }
.lmopt td { padding: .25rem .5rem; white-space: pre-line }
"""


def _headline(trials: Sequence[Trial], top: Trial) -> str:
    start, end = trials[0].score, top.score
    tried = unique(trials, key=lambda one: one.params.digest)
    spent = sum((one.evaluation.usage for one in tried if one.evaluation), lmopt.Usage())
    gain = "" if start is None or end is None else f"from {start:.3f} to <b>{end:.3f}</b>, "
    cost = f", {evolve(spent, calls=0)} for scoring" if spent.calls else ""
    size = f"{len(trials)} trials, {max(one.calls for one in trials):,} calls"
    return f"<p>{gain}{size}{cost}.</p><p>Best: {_escape(top.note)}</p>"


_LEGEND = (
    f'<small><span style="color: {_BEST}">●</span> the best · <span style="color: {_DOT}">●</span>'
    " scored on all rows, with its 95 % interval · — the best so far · ○ out: it lost on the first"
    " rows, or costs too much; its score, of fewer rows, compares with no other</small>"
)


def _chart(trials: Sequence[Trial], best: int, unit: str, values: Sequence[float | None]) -> str:
    """Scores against something, with their intervals; those that are out in a band below."""
    points = sorted((x or 0.0, n) for n, x in enumerate(values) if trials[n].score is not None)
    step, count = _scale(max(points, default=(0.0, 0))[0])
    marks = [_label(30, 289, "out"), _label(750, 322, unit)]
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _height(level)
        marks += [f'<path d="M50 {y} H790"/>', _label(30, y + 4, f"{level:.2f}")]
    marks += [_label(60 + 720 * n / count, 308, f"{n * step:,.10g}") for n in range(count + 1)]
    dots, top, path = [], 0.0, "M60 260"
    for value, place in points:
        one, x = trials[place], round(60 + 720 * value / (step * count), 1)
        tip = f"{place}: {one.score:.3f}, {value:,.0f} {unit}, {one.note}"
        dots.append(_dot(one, x, _BEST if place == best else _DOT, tip))
        top = top if one.out else max(top, one.score or 0.0)
        path += f" H{x} V{_height(top)}"
    marks.append(f'<path class="dot" d="{path} H780"/>')
    look = f'viewBox="0 0 800 330" role="img" aria-label="score against {unit}"'
    return f'<div class="wide"><svg {look}>{"".join(marks + dots)}</svg></div>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}">{text}</text>'


def _scale(largest: float) -> tuple[float, int]:
    """The step of an axis, 1, 2 or 5 of a power of ten, and how many steps it has: about five."""
    power = 10.0 ** math.floor(math.log10((largest or 1) / 5))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * 5 >= (largest or 1))
    return step, math.ceil(largest / step + 0.2)


def _height(score: float) -> float:
    return round(260 - 240 * score, 1)


def _dot(one: Trial, x: float, color: str, tip: str) -> str:
    """A trial in a chart, with the interval of its score."""
    y, look, bar = _height(one.score or 0.0), f'fill="{color}"', ""
    if one.out:
        y, look = 285.0, f'fill="none" stroke="{color}"'
    elif one.evaluation is not None:
        low, high = map(_height, one.evaluation.interval)
        bar = f'<path class="bar" d="M{x} {low} V{high}"/>'
    return f'{bar}<circle cx="{x}" cy="{y}" r="4" {look}><title>{_escape(tip)}</title></circle>'


def _candidate(trials: Sequence[Trial], place: int, top: int) -> str:
    """A candidate, with what it changed of the one that it was made from."""
    one, made = trials[place], ""
    text = str(one.params)
    if one.parent is not None:
        made = f", from {one.parent}"
        text = lmopt.diff(trials[one.parent].params, one.params) or "nothing changed"
    body = _escape(text)
    for tag, line in {"ins": r"^\+(?!\+\+).*", "del": "^-(?!--).*"}.items():
        body = re.sub(line, rf"<{tag}>\g<0></{tag}>", body, flags=re.MULTILINE)
    kind = ' class="best" open' if place == top else ' class="out"' if one.out else ""
    score = "not scored" if one.score is None else f"{one.score:.3f}"
    head = f"<summary>{score}{made}: {_escape(one.note)}</summary>"
    return f"<li><details{kind}>{head}<pre>{body}</pre></details></li>"


def _side_by_side(trials: Sequence[Trial], top: Trial, most: int = 200) -> str:
    """The rows that the start was scored on, and the best, or what that was made from."""
    start, shown = trials[0].evaluation, trials[top.parent or 0] if top.final else top
    end = shown.evaluation
    if start is None or end is None:
        return "<p>The trials were not scored.</p>"
    after = {row.example: row for row in end.rows}
    pairs = [(row, after[row.example]) for row in start.rows if row.example in after]
    body = ["<tr><th>example</th><th>start</th><th>best</th></tr>"]
    for one, other in pairs[:most]:
        kind = "up" if other.score > one.score else "down" if other.score < one.score else ""
        made = [f"{row.score:g}\n{_fields(row.prediction) or row.error}" for row in (one, other)]
        cells = [f"<td>{_escape(text)}</td>" for text in (_fields(one.example), *made)]
        body.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    left = f"<p>and {len(pairs) - most} more rows</p>" if len(pairs) > most else ""
    return f'<div class="wide"><table>{"".join(body)}</table></div>{left}'


def _fields(fields: lmopt.Fields, most: int = 160) -> str:
    return "\n".join(f"{n}: {lmopt.cut(lmopt.as_text(v), most)}" for n, v in fields.items())


# == 10. Command line ==============================================================================
# Thin over the rest: each command is a function of what `argparse` has read, which does its work
# and returns what to print, as text and as data.


def lm_options(parser: Any, *, cassette: str | None = None) -> Any:
    """Give an `argparse` parser the options that name an LM, and return it; see `lm_of`.

    Args:
        parser: an `argparse.ArgumentParser`.
        cassette: where calls of a real LM are kept unless `--cassette` says otherwise.

    >>> import argparse
    >>> lm_options(argparse.ArgumentParser()).parse_args(["--lm", "ollama/llama3.2"]).lm
    'ollama/llama3.2'
    """
    add = parser.add_argument_group("language model").add_argument
    add("--lm", metavar="NAME", help="PROVIDER/MODEL, as openai/gpt-4o-mini or ollama/llama3.2")
    add("--base-url", metavar="URL", help="a server that speaks the format of OpenAI")
    add("--key-env", metavar="NAME", help="the environment variable with that server's key")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="to wait for an answer")
    add("--concurrency", type=int, default=16, metavar="N", help="calls at once")
    kept = f" (of a real LM, by default: {cassette})" if cassette else ""
    add("--cassette", metavar="FILE", help=f"keep calls here, and answer from it{kept}")
    parser.set_defaults(calls_kept=cassette)
    add("--budget", type=float, metavar="USD", help="US dollars at most; needs --price")
    add("--price", type=_price, metavar="IN,OUT", help="US dollars for a million tokens, each way")
    return parser


def _price(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def lm_of(given: Any, offline: lmopt.LM | None = None) -> lmopt.LM:
    """Make the LM that a command line names, with `retry()`, its budget and its cassette around it.

    Args:
        given: what a parser with `lm_options` has read.
        offline: the LM where none is named; by default `toy_lm()`.
    Raises:
        DataError: an unknown provider, no folder for the cassette, no key in the variable that is
            named, or a budget without a price.

    >>> import argparse
    >>> options = lm_options(argparse.ArgumentParser())
    >>> lm_of(options.parse_args(["--base-url", "http://localhost:8080/v1"])).url
    'http://localhost:8080/v1/chat/completions'
    """
    wired = given.base_url or given.lm not in (None, "toy")
    idle = lmopt.toy_lm() if offline is None or given.lm == "toy" else offline
    lm = _wired(given) if wired else idle
    if given.budget is not None:
        lm = lmopt.budget(usd=given.budget)(lm)
    tape = given.calls_kept if wired and given.cassette is None else given.cassette
    return lmopt.record(tape)(lm) if tape else lm


def _wired(given: Any) -> lmopt.LM:
    """The LM behind a URL that a command line names, asked again where that helps."""
    name = given.lm or "default"  # a local server serves one model, by any name
    options = {one: getattr(given, one) for one in ("timeout", "concurrency", "price")}
    if given.base_url:
        options["base_url"] = given.base_url
        if name.partition("/")[0] not in ("anthropic", "azure", *lmopt.PROVIDERS):
            name = f"openai/{name}"
    if given.key_env:
        if not os.getenv(given.key_env):
            raise lmopt.DataError("no key in the environment", given.key_env, "a key", "set it")
        options["api_key"] = partial(os.getenv, given.key_env, "")  # travels, unlike a key
    return lmopt.retry()(lmopt.connect(name, **options))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: `lmopt run | eval | optimize | show | diff | report | replay`.

    Returns:
        the exit code: 0; 1, the work failed; 2, wrong use; 130, interrupted.

    >>> main(["run", "question -> answer: int", "question=2+2?", "--json"])
    {"answer": 2}
    0
    """
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show must not end the work
        coding = {} if stream is None or stream.isatty() else {"encoding": "utf-8"}
        getattr(stream, "reconfigure", dict)(errors="backslashreplace", **coding)
    try:
        parser = _parser()
        given, more = parser.parse_known_args(argv)  # argparse takes no positionals after options
        if any(one.startswith("-") for one in more) or (more and given.work is not _run):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        given.inputs = [*given.inputs, *more]
        for path in filter(None, (given.out, given.report, given.trace)):
            _check_target(path)
        with warnings.catch_warnings(action="always"):
            warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
            text, data = given.work(given)
        print(lmopt.as_text(data) if given.json else text, flush=True)
    except BrokenPipeError:  # who reads has seen enough, as in `lmopt show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except (lmopt.LmoptError, OSError) as error:
        _tell(lmopt.describe(error))
        return 2 if isinstance(error, _WRONG) and not isinstance(error, lmopt.MetricError) else 1
    return 0


def _check_target(path: str) -> None:
    """See now, and not after the calls are paid for, that a file can be written."""
    if Path(path).is_dir() or not os.access(Path(path).resolve().parent, os.W_OK):
        raise lmopt.DataError("no file can be written there", path, "a file in a folder", "make it")


_WRONG = (lmopt.DataError, lmopt.SignatureError, lmopt.ParamsError, FileNotFoundError)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> Any:
    """A parser with a command for each of the functions below, which tell what they are for."""
    import argparse

    about = "Run, measure and optimize programs of language models."
    parser = argparse.ArgumentParser("lmopt", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=lmopt.__version__)
    parser.set_defaults(inputs=(), metric="", report=None, test="0", trace=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    task = "task --instructions --module --adapter --params"
    scored = f"{task} data --metric --rows --out"
    search = f"{scored} --optimizer --calls --option --seed --test"
    takes = {
        _run: f"{task} inputs --data --trace --watch",
        _eval: scored,
        _optimize: f"{search} --report",
        _show: "params task? --instructions --module --adapter",
        _diff: "params params2",
        _report: search,
        _replay: f"{task} events --upto",
    }
    results = {_optimize: "params.json", _report: "report.html"}
    for work, arguments in takes.items():
        name, about = work.__name__[1:], work.__doc__ or ""
        made = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        for one in f"{arguments} --json".split():
            made.add_argument(one.rstrip("?"), **_ARGUMENTS[one])
        made.set_defaults(work=work, out=results.get(work))
        if work not in (_show, _diff):
            lm_options(made)
    return parser


def _count(text: str) -> int:
    return range(sys.maxsize).index(int(text))  # a ValueError, which argparse says, below 0


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "task": {"help": "a signature, as \"text -> label: Literal['a', 'b']\", or FILE.py:NAME"},
    "task?": {"nargs": "?", "help": "as for run; then as the LM is sent them"},
    "inputs": {"nargs": "*", "metavar": "NAME=VALUE", "help": "inputs of one run"},
    "data": {"help": "examples: .csv, .json or .jsonl"},
    "params": {"help": "a file of parameters"},
    "params2": {"help": "another one"},
    "events": {"metavar": "trace", "help": "a file that `run --trace` wrote"},
    "--data": {"metavar": "FILE", "help": "run on each of these rows; .csv, .json or .jsonl"},
    "--instructions": {"metavar": "TEXT", "help": "what a signature does not say"},
    "--module": {"default": "predict", "choices": ["predict", "chain_of_thought"]},
    "--adapter": {"default": "chat", "choices": ["chat", "json", "xml", "plain"]},
    "--params": {"metavar": "FILE", "help": "parameters to use or to start from"},
    "--metric": {"default": "exact_match", "metavar": "NAME", "help": "of lmopt, or FILE.py:NAME"},
    "--rows": {"type": _count, "metavar": "N", "help": "rows at most, spread over the outputs"},
    "--optimizer": {"default": "auto", "metavar": "NAME", "help": "one of ours, or FILE.py:NAME"},
    "--calls": {"type": _count, "metavar": "N", "help": "LM calls that the search may make"},
    "--option": {"action": "append", "metavar": "NAME=VALUE", "help": "of the optimizer"},
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "of all random choices"},
    "--test": {
        "default": "0.25",
        "metavar": "FILE|SHARE",
        "help": "rows to test on, before and after: a file, or a share (by default 0.25; 0: none)",
    },
    "--out": {"metavar": "FILE", "help": "where the result goes; of optimize: params.json"},
    "--report": {"metavar": "FILE", "help": "write a page about the search here"},
    "--trace": {"metavar": "FILE", "help": "write the trace here, for replay"},
    "--watch": {"action": "store_true", "help": "tell of each step as it ends"},
    "--upto": {"type": _count, "metavar": "K", "help": "replay so many events, then go on live"},
    "--json": {"action": "store_true", "help": "print data, not text"},
}


def _named(name: str, *modules: Any) -> Any:
    """What a name of the command line means: FILE.py:NAME, or a name in one of our modules."""
    path, _, own = name.rpartition(":")
    known = [one for one in modules if name in one.__all__]
    if path.endswith(".py"):
        known = [_module(Path(path).resolve())]
    if not known or not hasattr(known[0], own):
        what = "no such name in the file" if path else "no such name"
        raise lmopt.DataError(what, name, "one of ours, or FILE.py:NAME", "correct it")
    return getattr(known[0], own)


def _module(file: Path) -> Any:
    """Import a file as if it were run."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() != file:  # built-in ones have none
        what = f"another module is called {file.stem!r}"
        raise lmopt.DataError(what, module, str(file), "rename the file")
    return module


def _program(given: Any) -> lmopt.Program:
    """The program that a command line names, with its parameters."""
    task = given.task
    if task.endswith(".py"):
        raise lmopt.DataError("no name in the file", task, "FILE.py:NAME", f"write {task}:NAME")
    if re.search(r"\.py:\w+$", task):
        task = _named(task)
    if not isinstance(task, lmopt.Program):
        options = {"instructions": given.instructions, "adapter": getattr(lmopt, given.adapter)}
        task = getattr(lmopt, given.module)(task, **options)
    made: lmopt.Program = task
    return made.with_params(lmopt.load(given.params)) if given.params else made


def _lm(given: Any) -> lmopt.LM:
    if not (given.lm or given.base_url):
        _tell("no --lm is named: the toy LM answers")
        if given.budget is not None:
            what, todo = "the toy LM costs nothing", "name an LM, or leave out --budget"
            raise lmopt.DataError(what, given.budget, "no budget", todo)
    return lm_of(given)


def _rows(given: Any, program: lmopt.Program, path: str) -> Examples:
    """The rows of a file; those that a metric of ours is to score have an output of the program."""
    rows = lmopt.check_dataset(program, lmopt.read_examples(path))
    ours = given.metric and ".py:" not in given.metric
    if ours and program.outputs and not {*program.outputs} & {*rows[0]}:
        what, expected = f"{path} has no column of an output", " or ".join(program.outputs)
        raise lmopt.DataError(what, list(rows[0]), expected, "name it in the task, or label it")
    return rows


def _task(given: Any) -> tuple[tuple[lmopt.Program, Examples, Any], Examples]:
    """A program, rows to learn from or to measure on, and a metric; and other rows to test on."""
    program, metric, test = _program(given), _named(given.metric, lmopt), Examples()
    rows = _rows(given, program, given.data)
    if given.rows is not None:
        rows = spread(rows, given.rows, by=program.outputs)
    if Path(given.test).is_file():
        return (program, rows, metric), _rows(given, program, given.test)
    try:
        share = float(given.test)
    except ValueError as error:
        what, todo = "no such rows to test on", "write --test test.csv, or --test 0.25"
        raise lmopt.DataError(what, given.test, "a file or a share", todo) from error
    if not 0 <= share < 1:
        raise lmopt.DataError("no share", share, "a number from 0 to 1", "write --test 0.25")
    if share:
        rows, test = split(rows, share=1 - share, seed=given.seed)
    return (program, rows, metric), test


def _pair(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark:
        raise lmopt.DataError("no value is given", text, "NAME=VALUE", "write one")
    return name, value


def _run(given: Any) -> tuple[str, Any]:
    """Run a program on inputs, or on each row of a file."""
    program, lm = _program(given), _lm(given)
    watch = (lambda event: _tell("  ".join((event.name, *event.told())))) if given.watch else None
    if given.data:
        if given.inputs or given.trace:
            todo = "leave out --data, or inputs and --trace"
            raise lmopt.DataError("--data takes rows only", given.data, "neither of these", todo)
        rows = [lmopt.select_inputs(program, row) for row in _rows(given, program, given.data)]
        try:
            made = lmopt.run_many(program, lm, rows, watch=watch)
        except Exception as error:
            print(*(one.to_json() for one in getattr(error, "results", ())), sep="\n", flush=True)
            raise
        return "\n".join(one.to_json() for one in made), made
    (inputs,) = lmopt.check_dataset(program, [dict(map(_pair, given.inputs))])
    ended: Any = None
    try:
        ended = lmopt.run(program, lm, inputs, watch=watch)
    except Exception as error:  # what a run did that failed is what one wants to see
        ended = error
        raise
    finally:
        if given.trace and isinstance(getattr(ended, "trace", None), lmopt.Trace):
            lmopt.write_whole(ended.trace.to_json(), given.trace)
    return _fields(ended, sys.maxsize), ended


def _eval(given: Any) -> tuple[str, Any]:
    """Measure a program on the rows of a file."""
    task, _ = _task(given)
    made = lmopt.evaluate(*task, lm=_lm(given))
    if given.out:
        as_csv = given.out.lower().endswith(".csv")
        lmopt.write_whole(made.to_csv() if as_csv else made.to_json(), given.out)
    return f"{made.table()}\n\n{made!r}\n{made.usage}", _facts(made)


def _facts(made: lmopt.Evaluation) -> dict[str, Any]:
    facts = {"score": made.score, "interval": made.interval, "rows": len(made.rows)}
    return {**facts, "errors": len(made.errors), "usage": lmopt.jsonable(made.usage)}


def _optimize(given: Any) -> tuple[str, Any]:
    """Find better parameters for a program, and measure what they gain on other rows."""
    if given.cassette is None and (given.lm or given.base_url):
        given.calls_kept = str(Path(given.out).with_suffix(".calls.jsonl"))
        _tell(f"calls are kept in {given.calls_kept}: the same command goes on from there")
    ((program, rows, metric), test), lm = _task(given), _lm(given)
    search, made, whole = _optimizer(given, lm), list[Trial](), False
    measure = partial(lmopt.evaluate, program, test, metric, lm=lm)
    before = measure() if test else None
    _tell(f"before: {before!r}" if test else "no rows to test on")
    try:
        _follow(made, search, program, rows, metric)
        whole = True
    finally:
        if made and (whole or best(made).params != program.params):  # an older file may be better
            lmopt.save(best(made).params, given.out)
            _tell(f"saved {given.out}" if whole else f"the best so far is in {given.out}")
        if made and given.report:
            lmopt.write_whole(report(made, title=given.task), given.report)
    found = best(made)
    facts = {"params": given.out, "calls": made[-1].calls, "score": found.score}
    text = lmopt.cut(lmopt.diff(program.params, found.params), 2000) or "nothing changed"
    if before is not None:
        after = measure(params=found.params)
        gain = lmopt.compare(before, after)
        facts |= {"before": _facts(before), "after": _facts(after), "gain": lmopt.jsonable(gain)}
        text += f"\n\nbefore: {before!r}\nafter:  {after!r}\n{gain}"
    return text, facts


def _optimizer(given: Any, lm: lmopt.LM) -> Optimizer:
    """The optimizer that a command line names."""
    make = _named(given.optimizer, sys.modules[__name__])
    options: dict[str, Any] = dict(map(_pair, given.option or ()))
    for name, text in options.items():
        with suppress(ValueError):  # what is no JSON is a text
            options[name] = json.loads(text)
    options |= {"seed": given.seed} | ({} if given.calls is None else {"calls": given.calls})
    try:
        takes_lm = first(inspect.signature(make).parameters) == "lm"
        return _checked(make(lm, **options) if takes_lm else make(**options))
    except TypeError as error:
        what, todo = "no such optimizer can be made", f"correct it, or an option ({error})"
        raise lmopt.DataError(what, given.optimizer, "one with these options", todo) from error


def _follow(made: list[Trial], search: Optimizer, *task: Any) -> None:
    """Run a search, tell of each trial, and add it to those made, however it ends."""
    _tell(f"{len(task[1])} rows to learn from; {search.plan(*task[:2])}")
    for trial in search.trials(*task):
        score = "  -  " if trial.score is None else f"{trial.score:.3f}"
        _tell(f"{score} {trial.calls:5} {trial.note}")
        made.append(trial)


def _report(given: Any) -> tuple[str, Any]:
    """Run a search again from its cassette, with the options it had, and write a page about it."""
    if not given.cassette and (given.lm or given.base_url):
        todo = "pass --cassette params.calls.jsonl, as `optimize` named it"
        raise lmopt.DataError("a report asks no LM", given.lm, "the cassette of the search", todo)
    lm = lmopt.replay_lm(given.cassette) if given.cassette else _lm(given)
    (task, _), made = _task(given), list[Trial]()
    try:
        _follow(made, _optimizer(given, lm), *task)
    except lmopt.ReplayMiss as error:
        if not made:
            raise
        _tell(f"the cassette ends here, as the search did: {lmopt.cut(str(error))}")
    lmopt.write_whole(report(made, title=given.task), given.out)
    return f"{summary(made)}\n\n{given.out}", {"report": given.out, "trials": len(made)}


def _show(given: Any) -> tuple[str, Any]:
    """Show parameters; with the task, each prompt exactly as an LM is sent it."""
    if not given.task:
        params = lmopt.load(given.params)
        return str(params), params
    sent = {}
    for path, leaf in _program(given).leaves.items():
        shown = {one.name: lmopt.sample(one.type) for one in leaf.inputs}
        shown |= {one.name: f"{{{one.name}}}" for one in leaf.inputs if one.type is str}
        sent[path] = lmopt.transcript(lmopt.preview(leaf, **shown))
    return "\n".join(f"===== {path} =====\n{text}" for path, text in sent.items()), sent


def _diff(given: Any) -> tuple[str, Any]:
    """Show what changed from one file of parameters to another."""
    changed = lmopt.diff(lmopt.load(given.params), lmopt.load(given.params2))
    return changed or "no difference", changed.splitlines()


def _replay(given: Any) -> tuple[str, Any]:
    """Run a program again from the trace of a run, without an LM; see what it did."""
    program = _program(given)
    trace = lmopt.Trace.from_json(Path(given.events).read_text(encoding="utf-8"))
    live = None if given.upto is None else _lm(given)
    made = lmopt.replay(program, trace, live, upto=given.upto)
    return f"{made.trace}\n\n{_fields(made, sys.maxsize)}", made


if __name__ == "__main__":  # as the module that others import, so that its classes are the same
    sys.exit(importlib.import_module(__spec__.name).main())
