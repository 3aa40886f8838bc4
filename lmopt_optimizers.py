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
"""Optimizers of lmopt programs: values that map (program, trainset, metric) to better parameters.

>>> from lmopt import exact_match, predict, toy_lm
>>> qa = predict("animal -> sound")
>>> data = [{"animal": "dog", "sound": "woof"}, {"animal": "cat", "sound": "meow"}]
>>> params = labeled_few_shot(k=2)(qa, data, exact_match)
>>> qa.with_params(params)(toy_lm(), animal="my old cat").sound
'meow'

Sections: 1 Contract · 2 Parts · 3 Few-shot · 4 Instructions · 5 Settings · 6 Combinators · 7 Report
"""

from __future__ import annotations

import html
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, field, frozen
from toolz import (  # type: ignore[import-untyped]
    concat,
    groupby,
    interleave,
    last,
    take,
    unique,
)

if TYPE_CHECKING or not __package__:
    import lmopt
else:  # both modules were copied into a package
    from . import lmopt

__all__ = [
    # 1. Contract
    "Trial", "Plan", "Optimizer",
    # 2. Parts
    "split", "spread", "labeled", "labeled_demos", "step_demos", "resampled", "race", "cases",
    "description", "proposer", "Propose", "proposals", "tpe", "pareto", "Board", "Hunt",
    # 3. Few-shot
    "labeled_few_shot", "bootstrap", "passed", "bootstrap_few_shot", "random_search", "tpe_search",
    "knn_few_shot",
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
# An optimizer is a value with two functions: `search` yields trials lazily, the first of them the
# start; `bound` tells beforehand what that costs at most. Every random choice is drawn from
# `lmopt.seeded(seed, purpose, ...)`, so that the order in which threads finish cannot matter.


@frozen
class Trial:
    """One set of parameters that an optimizer tried.

    Attributes:
        params: the parameters.
        score: on the rows that the optimizer scores on, 0 to 1; None where it does not score.
        note: what they are, and what happened.
        parent: index of the trial they were made from, None for the start.
        calls: how many LM calls the optimizer had made by then.
        evaluation: where the score comes from; shorter than the data where the trial lost early.
        out: whether it lost early; its score, of fewer rows, then compares with no other.
    """

    params: lmopt.Params
    score: float | None = None
    note: str = ""
    parent: int | None = None
    calls: int = 0
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


Examples = tuple[lmopt.Record, ...]


@frozen
class Optimizer:
    """A function (program, trainset, metric) -> params, whose trials can be watched.

    Attributes:
        name: of its factory.
        search: (program, examples, metric) -> trials, the first of them the start.
        bound: (program, number of examples) -> plan.
    """

    name: str
    search: Callable[[lmopt.Program, Examples, lmopt.Metric], Iterator[Trial]] = field(repr=False)
    bound: Callable[[lmopt.Program, int], Plan] = field(repr=False)

    def __call__(
        self,
        program: lmopt.Program,
        trainset: Iterable[Mapping[str, Any]],
        metric: lmopt.Metric,
    ) -> lmopt.Params:
        """Return the parameters of the best trial; of equals, the earliest.

        A spent budget and Ctrl-C end the search with the best so far. Any other error of ours is
        raised, with the best so far as its attribute `best`.

        Raises:
            DataError: the training set is empty, or an example lacks an input.
            LMError: the LM could not be asked.
            MetricError: the metric raised, or returned no score.
        """
        best = Trial(program.params)
        try:
            for trial in self.trials(program, trainset, metric):
                best = _better(best, trial)
        except (lmopt.BudgetExceeded, KeyboardInterrupt):
            pass
        except lmopt.LmoptError as error:
            error.best = best.params
            raise
        return best.params

    def trials(
        self,
        program: lmopt.Program,
        trainset: Iterable[Mapping[str, Any]],
        metric: lmopt.Metric,
    ) -> Iterator[Trial]:
        """Return an iterator of trials, made as they are asked for; the first is the start."""
        return self.search(program, lmopt.check_dataset(program, trainset), metric)

    def plan(self, program: lmopt.Program, trainset: Iterable[Mapping[str, Any]]) -> Plan:
        """Return what a search costs at most; makes no LM call."""
        return self.bound(program, len(lmopt.check_dataset(program, trainset)))


def _better(best: Trial, trial: Trial) -> Trial:
    """Take the higher score; where there are no scores, each trial improves on the one before."""
    if trial.out:
        return best
    if best.score is None or trial.score is None or trial.score > best.score:
        return trial
    return best


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


def _values(row: Mapping[str, Any], names: Iterable[str]) -> str:
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
    dataset: Iterable[Mapping[str, Any]],
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
        program: the program.
        dataset: the rows, the same ones that `beat` was scored on.
        metric: (example, prediction) -> 0 to 1.
        lm: what answers the requests.
        beat: the evaluation to be beaten; without it every row is evaluated.
        workers: threads, as in `evaluate`.

    Returns:
        the evaluation of the rows that were run; its score is then at most that of `beat`.

    Calls: `program.max_calls` at most for each row.

    >>> qa, rows = lmopt.predict("question -> answer"), [{"question": "?", "answer": "no"}] * 64
    >>> best = lmopt.evaluate(qa, rows, lambda row, made: 0.9, lm=lmopt.stub_lm())
    >>> len(race(qa, rows, lmopt.exact_match, lm=lmopt.stub_lm(), beat=best).rows)
    16
    """
    rows = lmopt.check_dataset(program, dataset)
    return Board(program, rows, metric, lm=lm, workers=workers).race(program.params, beat)


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
        **options: what `predict` takes, such as an adapter or a temperature.

    Calls: those of `predict`.

    >>> [one.name for one in proposer().inputs]
    ['program', 'step', 'current', 'data', 'cases', 'attempts', 'tip']
    """
    return lmopt.predict(_PROPOSE, name="propose", **options)


Propose = lmopt.Program | Callable[[lmopt.Record], str]
"""Who writes instructions: a program with the inputs of `proposer()` and the output `instructions`,
or any function from a record of those inputs to a text, a person at a keyboard included."""


def proposals(
    propose: Propose,
    lm: lmopt.LM,
    program: lmopt.Program,
    given: Iterable[Mapping[str, Any]],
    *,
    workers: int | None = None,
) -> tuple[list[str], int]:
    """Have instructions proposed, one for each of what is given; equal requests are told apart.

    Args:
        propose: who writes them.
        lm: what answers where that is a program.
        program: whose step it is.
        given: for each text the step's path as `step`, `current` instructions, and what is known.
        workers: threads, as in `evaluate`.

    Returns:
        the texts, without white space around them, and how many LM calls they took.

    Calls: those of `propose` for each.

    >>> texts, calls = proposals(lambda given: "Be brief.", None, lmopt.predict("q -> a"), [{}])
    >>> texts, calls
    (['Be brief.'], 0)
    """
    about = {"program": description(program)}
    asked = [lmopt.Record({**about, **one}) for one in given]
    work = partial(_proposal, propose, lm)
    threads = lmopt.workers_for(lm, workers) if isinstance(propose, lmopt.Program) else 1
    made = list(lmopt.ordered_map(work, enumerate(asked), workers=threads))
    return [text.strip() for text, _ in made], sum(calls for _, calls in made)


def _proposal(propose: Propose, lm: lmopt.LM, asked: tuple[int, lmopt.Record]) -> tuple[str, int]:
    index, given = asked
    if not isinstance(propose, lmopt.Program):
        return str(propose(given)), 0
    program = lmopt.sampled(propose, index, 1 << 16)
    made = lmopt.run(program, lm, lmopt.select_inputs(program, given))
    return str(made["instructions"]), made.usage.calls


def _proposal_calls(propose: Propose) -> int:
    return propose.max_calls if isinstance(propose, lmopt.Program) else 0


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


class Board:
    """Scores of parameters on rows, for one search: nothing is run twice."""

    def __init__(
        self,
        program: lmopt.Program,
        rows: Examples,
        metric: lmopt.Metric,
        *,
        lm: lmopt.LM,
        workers: int | None = None,
    ) -> None:
        self.program, self.rows, self.calls, self.runs = program, rows, 0, 0
        self._evaluate = partial(lmopt.evaluate, metric=metric, lm=lm, workers=workers)
        self._done: dict[str, dict[int, lmopt.Row]] = {}

    def score(self, params: lmopt.Params, places: Iterable[int] | None = None) -> lmopt.Evaluation:
        """Return the evaluation of parameters on some rows, by default all; run what is missing."""
        wanted = list(range(len(self.rows)) if places is None else places)
        done = self._done.setdefault(params.digest, {})
        missing = list(unique(place for place in wanted if place not in done))
        if missing:
            rows = [self.rows[place] for place in missing]
            result = self._evaluate(self.program, rows, params=params)
            done.update(zip(missing, result.rows, strict=True))
            self.calls += result.usage.calls
            self.runs += len(missing)
        return lmopt.Evaluation(tuple(done[place] for place in wanted))

    def race(self, params: lmopt.Params, beat: lmopt.Evaluation | None) -> lmopt.Evaluation:
        """Score on all rows; stop where full marks on the rest would not beat another evaluation,
        or where it is clearly worse: 3 standard errors, row by row."""
        size = len(self.rows)
        step = max(16, -(-size // 8)) if beat is not None else size
        for end in range(step, size + step, step):
            result = self.score(params, range(min(end, size)))
            if beat is not None and _lost(result, beat, size):
                break
        return result


def _lost(result: lmopt.Evaluation, beat: lmopt.Evaluation, size: int) -> bool:
    if result.total + size - len(result.rows) <= beat.total:
        return True
    pairs = zip(result.rows, beat.rows, strict=False)
    gains = [row.score - other.score for row, other in pairs]
    return math.fsum(gains) < -3 * math.sqrt(math.fsum(gain * gain for gain in gains))


class Hunt:
    """The trials of one search: candidates race against the best so far, each only once."""

    def __init__(self, board: Board, *, learn: Board | None = None) -> None:
        self.board, self.learn = board, learn
        self.trials: list[Trial] = []
        self.asked, self.best = 0, 0
        self._seen: dict[str, int] = {}

    @property
    def calls(self) -> int:
        """LM calls so far: of both boards, and of proposals."""
        return self.board.calls + self.asked + (self.learn.calls if self.learn else 0)

    @property
    def top(self) -> Trial:
        """The best trial so far."""
        return self.trials[self.best]

    def start(self) -> Trial:
        """Score the program as it is."""
        return self.take(self.board.program.params, "start", None)

    def knows(self, params: lmopt.Params) -> bool:
        """Whether equal parameters were tried before."""
        return params.digest in self._seen

    def take(self, params: lmopt.Params, note: str, parent: int | None) -> Trial:
        """Score parameters against the best so far; equal ones get the score they have."""
        beat = self.top.evaluation if self.trials else None
        if self.knows(params):
            known = self.trials[self._seen[params.digest]]
            again = evolve(known, note=f"{note}; tried before", parent=parent, calls=self.calls)
            self.trials.append(again)  # so that places are those of what the search yields
            return again
        result = self.board.race(params, beat)
        return self.add(params, note, parent, result)

    def add(
        self, params: lmopt.Params, note: str, parent: int | None, result: lmopt.Evaluation
    ) -> Trial:
        """Book a trial."""
        run, size = len(result.rows), len(self.board.rows)
        out = f"; out after {run} of {size} rows" if run < size else ""
        note += out + _failures([row.error for row in result.errors])
        trial = Trial(params, result.score, note, parent, self.calls, result, run < size)
        self._seen.setdefault(params.digest, len(self.trials))
        self.trials.append(trial)
        whole = run == size and (not self.trials[:-1] or result.score > (self.top.score or 0.0))
        self.best = len(self.trials) - 1 if whole else self.best
        return trial


# == 3. Few-shot ===================================================================================


def labeled_few_shot(*, k: int = 16, seed: int = 0) -> Optimizer:
    """Use labelled examples as demonstrations.

    Each step gets up to `k` examples, in turns from those with different outputs.

    Args:
        k: how many, 0 or more.
        seed: of the choice.

    Calls: none.

    >>> qa = lmopt.predict("question -> answer")
    >>> rows = [{"question": "2+2?", "answer": "4"}]
    >>> labeled_few_shot(k=4)(qa, rows, lmopt.exact_match)["predict"].demos
    (Record(question='2+2?', answer='4'),)
    """
    _check_count("k", k)

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        yield Trial(program.params, note="start")
        params = labeled_demos(program, examples, k, seed=seed)
        yield Trial(params, note=f"up to {k} labelled examples", parent=0)

    return Optimizer("labeled_few_shot", search, lambda program, size: Plan())


def _check_count(name: str, value: int, least: int = 0) -> None:
    if value < least:
        raise lmopt.DataError(f"{name} is too small", value, f"{least} or more", f"raise {name}")


def bootstrap(
    teacher: lmopt.Program,
    examples: Examples,
    metric: lmopt.Metric,
    *,
    lm: lmopt.LM,
    wanted: int,
    threshold: float = 1.0,
    rounds: int = 1,
    max_labeled: int = 16,
    seed: int = 0,
    workers: int | None = None,
) -> Iterator[lmopt.Evaluation]:
    """Run a teacher on examples until `wanted` runs reach the threshold; yield block after block.

    A block is as large as the number of runs still wanted, so that none is wasted. No demonstration
    of the teacher has the inputs of an example of the block.

    Calls: `teacher.max_calls` at most for each example and round.

    >>> qa, rows = lmopt.predict("q -> a"), tuple(lmopt.Record(q=q, a="no") for q in "abcde")
    >>> blocks = bootstrap(qa, rows, lmopt.exact_match, lm=lmopt.stub_lm(), wanted=3)
    >>> [len(block.rows) for block in blocks]
    [3, 2]
    """
    left = examples
    for number in range(rounds):
        failed: Examples = ()
        while left and wanted:
            block, left = left[:wanted], left[wanted:]
            guide = resampled(_guide(teacher, examples, block, max_labeled, seed), number)
            result = lmopt.evaluate(teacher, block, metric, lm=lm, params=guide, workers=workers)
            wanted -= len(passed(result, threshold))
            failed += tuple(row.example for row in result.rows if not _passes(row, threshold))
            yield result
        left = failed


def _guide(
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
        given = [_values(row, names) for row in block]
        demos = [demo for demo in params[path].demos if _values(demo, names) not in given]
        params = params.replace(path, demos=demos)
    return params


def _passes(row: lmopt.Row, threshold: float) -> bool:
    return not row.error and row.score >= threshold


def passed(evaluation: lmopt.Evaluation, threshold: float) -> tuple[lmopt.Row, ...]:
    """Return the rows that did not fail and reach a threshold, 0 included.

    >>> rows = (lmopt.Row(lmopt.Record(), lmopt.Prediction(), score) for score in (0.0, 1.0))
    >>> len(passed(lmopt.Evaluation(tuple(rows)), 0.0))
    2
    """
    return tuple(row for row in evaluation.rows if _passes(row, threshold))


def bootstrap_few_shot(
    lm: lmopt.LM,
    *,
    max_bootstrapped: int = 4,
    max_labeled: int = 16,
    rounds: int = 1,
    threshold: float = 1.0,
    teacher: lmopt.Program | Mapping[str, lmopt.Prompt] | None = None,
    teacher_lm: lmopt.LM | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Run a teacher on the training set, and use what it did where it did well as demonstrations.

    The demonstrations of every step come from the traces of those runs; labelled examples fill them
    up. A teacher without demonstrations gets labelled ones, never of the examples it is run on.

    Args:
        lm: runs the teacher where there is no `teacher_lm`.
        max_bootstrapped: how many runs to take, 0 or more.
        max_labeled: how many demonstrations a step has at most, labelled ones included.
        rounds: how many times an example is tried, each time but the first with a new rollout at
            temperature 1; 1 or more.
        threshold: score from which a run is taken, 0 to 1; 0 is a threshold.
        teacher: a program with the same steps, or other parameters; by default the program.
        teacher_lm: runs the teacher.
        seed: of all choices.
        workers: threads, as in `evaluate`; they do not change the result.

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
    _check_count("max_bootstrapped", max_bootstrapped)
    _check_count("max_labeled", max_labeled)
    _check_count("rounds", rounds, 1)
    teach = partial(
        bootstrap,
        lm=teacher_lm or lm,
        wanted=max_bootstrapped,
        threshold=threshold,
        rounds=rounds,
        max_labeled=max_labeled,
        seed=seed,
        workers=workers,
    )

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        guide, rows = _teacher(program, teacher), tuple(unique(examples))
        assemble = partial(_few_shot, program, rows, max_labeled, seed)
        yield Trial(program.params, note="start")
        yield from _taught(teach(guide, rows, metric), threshold, assemble)

    def bound(program: lmopt.Program, size: int) -> Plan:
        runs = rounds * size if max_bootstrapped else 0
        return Plan(runs, runs * _teacher(program, teacher).max_calls, runs)

    return Optimizer("bootstrap_few_shot", search, bound)


def _taught(
    blocks: Iterator[lmopt.Evaluation],
    threshold: float,
    assemble: Callable[[tuple[lmopt.Row, ...]], lmopt.Params],
) -> Iterator[Trial]:
    """A trial after each block of the teacher's runs, with what passed by then."""
    taken: tuple[lmopt.Row, ...] = ()
    calls, tried, errors = 0, 0, []
    for index, result in enumerate(blocks):
        taken += passed(result, threshold)
        calls += result.usage.calls
        tried += len(result.rows)
        errors += [row.error for row in result.errors]
        note = f"{len(taken)} of {tried} runs reached the threshold{_failures(errors)}"
        yield Trial(assemble(taken), None, note, index, calls)
    if not tried:
        yield Trial(assemble(()), note="labelled examples only", parent=0)


def _failures(errors: list[str]) -> str:
    return f"; {len(errors)} failed (first: {lmopt.cut(errors[0], 80)})" if errors else ""


def _teacher(
    program: lmopt.Program, teacher: lmopt.Program | Mapping[str, lmopt.Prompt] | None
) -> lmopt.Program:
    """The program that shows how it is done; it must have the steps of the one that learns."""
    if not isinstance(teacher, lmopt.Program):
        return program.with_params(teacher or {})
    if list(teacher.params) != list(program.params):
        expected = f"the steps {', '.join(program.params)}"
        todo = "give the steps the same names"
        raise lmopt.ParamsError("a teacher with other steps", list(teacher.params), expected, todo)
    return teacher


def _few_shot(
    program: lmopt.Program,
    examples: Examples,
    max_labeled: int,
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
        more = labeled(leaf, others, max(max_labeled - len(demos), 0), seed=seed)
        params = params.replace(path, demos=demos + more)
    return params


def _given(valset: Iterable[Mapping[str, Any]] | None) -> Examples | None:
    return None if valset is None else tuple(map(lmopt.Record, valset))


def _halves(examples: Examples, valset: Examples | None, seed: int) -> tuple[Examples, Examples]:
    """Rows to learn from, and rows to score on; never the same."""
    return split(examples, seed=seed) if valset is None else _apart(examples, valset)


def _apart(examples: Examples, valset: Examples) -> tuple[Examples, Examples]:
    both = set(examples) & set(valset)
    if both or not valset:
        todo = "take them out of one, or leave valset out"
        what = f"{len(both)} rows are in both trainset and valset" if both else "an empty valset"
        raise lmopt.DataError(what, list(both)[:1], "rows of its own", todo)
    return examples, valset


def _half_sizes(size: int, valset: Examples | None) -> tuple[int, int]:
    """At most how many rows `_halves` gives on either side."""
    return ((size + 1) // 2,) * 2 if valset is None else (size, len(valset))


def random_search(
    lm: lmopt.LM,
    *,
    candidates: int = 16,
    valset: Iterable[Mapping[str, Any]] | None = None,
    stop_at: float | None = None,
    max_bootstrapped: int = 4,
    max_labeled: int = 16,
    seed: int = 0,
    workers: int | None = None,
    **options: Any,
) -> Optimizer:
    """Try random sets of demonstrations, and keep the one that scores best on held-out rows.

    Tried are, in this order: the start; labelled examples; `bootstrap_few_shot` on the examples as
    they stand; and the same on `candidates` random orders, each with a random number of runs to
    take. Equal parameters are scored once; one that cannot win any more stops early (see `race`).

    Args:
        lm: runs the program, and the teacher where there is no `teacher_lm`.
        candidates: how many random sets, 0 or more.
        valset: rows to score on, none of them in the training set; by default half of that.
        stop_at: score at which to stop, 0 to 1.
        max_bootstrapped: how many runs a set takes at most, 0 or more.
        max_labeled: how many demonstrations a step has at most, labelled ones included.
        seed: of all choices.
        workers: threads, as in `evaluate`; they do not change the result.
        **options: rounds, threshold, teacher and teacher_lm of `bootstrap_few_shot`.

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
    _check_count("candidates", candidates)
    make = partial(
        bootstrap_few_shot, lm, max_labeled=max_labeled, seed=seed, workers=workers, **options
    )
    make(max_bootstrapped=max_bootstrapped)  # complains of wrong options now
    given = _given(valset)

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = Hunt(Board(program, val, metric, lm=lm, workers=workers))
        simple = labeled_demos(program, train, max_labeled, seed=seed)
        sets = _demo_sets(program, train, metric, make, candidates, max_bootstrapped, seed)
        yield hunt.start()
        for trial in concat([[Trial(simple, note="labelled")], sets]):
            if stop_at is not None and (hunt.top.score or 0.0) >= stop_at:
                return
            hunt.asked += trial.calls
            if not hunt.knows(trial.params):
                yield hunt.take(trial.params, trial.note, hunt.best)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        runs = (candidates + 3) * val
        teaching = make(max_bootstrapped=max_bootstrapped).bound(program, train)
        return sum([teaching] * (candidates + 1), Plan(runs, runs * program.max_calls, runs))

    return Optimizer("random_search", search, bound)


def _demo_sets(
    program: lmopt.Program,
    train: Examples,
    metric: lmopt.Metric,
    make: Callable[..., Optimizer],
    candidates: int,
    most: int,
    seed: int,
) -> Iterator[Trial]:
    """Bootstrap on the examples as they stand, then on random orders; the last trial of each."""
    if most:
        yield last(make(max_bootstrapped=most).search(program, train, metric))
    for index in range(candidates):
        rng = lmopt.seeded(seed, "random_search", index)
        order = tuple(rng.sample(train, len(train)))
        size = rng.randint(1, most) if most else 0
        optimizer = make(max_bootstrapped=size, seed=rng.getrandbits(32))
        yield last(optimizer.search(program, order, metric))


def tpe_search(
    lm: lmopt.LM,
    *,
    trials: int = 16,
    sets: int = 8,
    max_bootstrapped: int = 4,
    max_labeled: int = 16,
    valset: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    workers: int | None = None,
    **options: Any,
) -> Optimizer:
    """Choose a set of demonstrations for each step by itself, by a seeded TPE.

    Tried first are the start and the labelled examples; then combinations of labelled sets and
    bootstrapped ones, as those of `random_search`.

    Args:
        lm: runs the program, and the teacher where there is no `teacher_lm`.
        trials: combinations to try, 1 or more.
        sets: bootstrapped sets to choose from, 1 or more.
        max_bootstrapped: how many runs a set takes at most, 0 or more.
        max_labeled: how many demonstrations a step has at most, labelled ones included.
        valset: rows to score on, none of them in the training set; by default half of that.
        seed: of all choices.
        workers: threads, as in `evaluate`; they do not change the result.
        **options: rounds, threshold, teacher and teacher_lm of `bootstrap_few_shot`.

    Calls: a run for each held-out row and combination, and those of bootstrapping.

    Reference: Bergstra et al. 2011; the search of DSPy with Optuna, arXiv 2310.03714. Here a set is
    chosen, not a single demonstration, and the sampler is ours: see `tpe`.

    >>> tpe_search(lmopt.toy_lm(), trials=2)
    Optimizer(name='tpe_search')
    """
    _check_count("trials", trials, 1)
    _check_count("sets", sets, 1)
    make = partial(
        bootstrap_few_shot, lm, max_labeled=max_labeled, seed=seed, workers=workers, **options
    )
    make(max_bootstrapped=max_bootstrapped)  # complains of wrong options now
    given = _given(valset)

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = Hunt(Board(program, val, metric, lm=lm, workers=workers))
        yield hunt.start()
        labels = labeled_demos(program, train, max_labeled, seed=seed)
        labelled = hunt.take(labels, "labelled", 0)
        yield labelled
        known = [program.params, labels]
        for trial in _demo_sets(program, train, metric, make, sets - 1, max_bootstrapped, seed):
            hunt.asked += trial.calls
            known.append(trial.params)
        paths = list(program.params)
        tried = enumerate((hunt.trials[0], labelled))
        history = [((n,) * len(paths), one.score or 0.0) for n, one in tried]
        for number in range(trials):
            rng = lmopt.seeded(seed, "tpe", number)
            choice = tpe(history, [len(known)] * len(paths), rng)
            params = program.params
            for path, index in zip(paths, choice, strict=True):
                params = params.replace(path, demos=known[index][path].demos)
            trial = hunt.take(params, f"sets {choice}", 0)
            history.append((choice, trial.score or 0.0))
            yield trial

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        runs = (trials + 2) * val
        teaching = make(max_bootstrapped=max_bootstrapped).bound(program, train)
        return sum([teaching] * sets, Plan(runs, runs * program.max_calls, runs))

    return Optimizer("tpe_search", search, bound)


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
    _check_count("k", k, 1)

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        yield Trial(program.params, note="start")
        rows = list(unique(examples))
        texts = [
            "\n".join(map(lmopt.as_text, lmopt.select_inputs(program, row).values()))
            for row in rows
        ]
        chosen = _facilities([lmopt.unit(one) for one in embed(texts)], k)
        params = program.params
        for path, leaf in program.leaves.items():
            demos = lmopt.fitting(leaf, [rows[place] for place in chosen])
            params = params.replace(path, demos=demos)
        yield Trial(params, note=f"{len(chosen)} examples that stand for all", parent=0)

    return Optimizer("knn_few_shot", search, lambda program, size: Plan())


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


def _hunt(
    program: lmopt.Program,
    train: Examples,
    val: Examples,
    metric: lmopt.Metric,
    lm: lmopt.LM,
    workers: int | None,
) -> Hunt:
    """A search that scores on one half, and looks for what goes wrong in the other."""
    make = partial(Board, program, metric=metric, lm=lm, workers=workers)
    return Hunt(make(val), learn=make(train))


def copro(
    lm: lmopt.LM,
    *,
    breadth: int = 10,
    depth: int = 3,
    shown: int = 16,
    valset: Iterable[Mapping[str, Any]] | None = None,
    propose: Propose | None = None,
    prompt_lm: lmopt.LM | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Improve instructions step by step, by coordinate ascent over proposals.

    In each round, for each step, `breadth` texts are proposed from what went wrong on `shown` rows
    of the training half, and from the earlier proposals with their scores, the failed ones too.

    Args:
        lm: runs the program.
        breadth: proposals in a round for each step, 1 or more.
        depth: rounds, 1 or more.
        shown: rows to look at for what goes wrong, 1 or more.
        valset: rows to score on, none of them in the training set; by default half of that.
        propose: who writes instructions; see `proposer`.
        prompt_lm: answers the proposer; by default `lm`.
        seed: of the split.
        workers: threads, as in `evaluate`; they do not change the result.

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
    for name, value in {"breadth": breadth, "depth": depth, "shown": shown}.items():
        _check_count(name, value, 1)
    given, writer = _given(valset), propose or proposer()

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = _hunt(program, train, val, metric, lm, workers)
        yield hunt.start()
        for number in range(depth):
            for path in program.params:
                asked = [_asked(hunt, path, shown, index=index) for index in range(breadth)]
                texts = _write(hunt, writer, prompt_lm or lm, asked, workers)
                base = hunt.best
                for text in texts:
                    params = hunt.trials[base].params.replace(path, instructions=text)
                    yield hunt.take(params, f"round {number + 1}, {path}", base)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        rounds = depth * len(program.params)
        runs = val * (1 + rounds * breadth) + rounds * min(shown, train)
        return _planned(program, runs, rounds * breadth, writer)

    return Optimizer("copro", search, bound)


def _planned(program: lmopt.Program, runs: int, texts: int, writer: Propose) -> Plan:
    return Plan(runs, runs * program.max_calls + texts * _proposal_calls(writer), runs)


def _asked(
    hunt: Hunt, path: str, shown: int, *, index: int = 0, tip: str = "", data: str = ""
) -> dict[str, Any]:
    """What a proposer is told of a step, by the best trial so far."""
    assert hunt.learn is not None
    params = hunt.top.params
    rows = hunt.learn.score(params, range(min(shown, len(hunt.learn.rows)))).rows
    return {
        "step": path,
        "current": params[path].instructions,
        "cases": cases(hunt.board.program, path, rows),
        "attempts": _attempts(hunt.trials, path),
        "tip": tip,
        "data": data,
    }


def _attempts(trials: Sequence[Trial], path: str, most: int = 10) -> list[dict[str, Any]]:
    """The last texts that were tried for a step, worst first, with their scores."""
    scores = {one.params[path].instructions: one.score for one in trials}
    last_ = list(scores.items())[-most:]
    ordered = sorted(last_, key=lambda one: one[1] or 0.0)
    return [{"instructions": text, "score": round(score or 0.0, 3)} for text, score in ordered]


def _write(
    hunt: Hunt,
    writer: Propose,
    lm: lmopt.LM,
    asked: Sequence[Mapping[str, Any]],
    workers: int | None,
) -> list[str]:
    """Have texts proposed, those that are empty left out."""
    program = hunt.board.program.with_params(hunt.top.params)
    texts, calls = proposals(writer, lm, program, asked, workers=workers)
    hunt.asked += calls
    return [text for text in unique(texts) if text]


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


def mipro(
    lm: lmopt.LM,
    *,
    auto: Literal["light", "medium", "heavy"] | None = "light",
    candidates: int | None = None,
    trials: int | None = None,
    max_bootstrapped: int = 4,
    max_labeled: int = 4,
    minibatch: int = 35,
    full_every: int = 5,
    valset: Iterable[Mapping[str, Any]] | None = None,
    propose: Propose | None = None,
    prompt_lm: lmopt.LM | None = None,
    seed: int = 0,
    workers: int | None = None,
    **options: Any,
) -> Optimizer:
    """Search instructions and demonstrations together.

    Sets of demonstrations are bootstrapped, instructions are proposed from a summary of the data,
    the program's description, its failures and tips; then a seeded TPE chooses a pair for each
    step. A pair is scored on a minibatch; after every `full_every` of them the one with the highest
    mean is scored on all held-out rows, which alone decide.

    Args:
        lm: runs the program, and the teacher where there is no `teacher_lm`.
        auto: 6, 12 or 18 candidates, and at most 100, 300 or 1,000 rows to score on.
        candidates: sets of demonstrations, and about half as many texts, 2 or more; beats `auto`.
        trials: pairs to try, 1 or more; by default as in the paper's code.
        max_bootstrapped: how many runs a set takes at most; 0 with `max_labeled=0` leaves
            demonstrations alone.
        max_labeled: how many demonstrations a step has at most.
        minibatch: rows for a first score, 1 or more.
        full_every: minibatches between full scores, 1 or more.
        valset: rows to score on, none of them in the training set; by default half of that.
        propose: who writes instructions; see `proposer`.
        prompt_lm: answers the proposer and writes the summary; by default `lm`.
        seed: of all choices.
        workers: threads, as in `evaluate`; they do not change the result.
        **options: rounds, threshold, teacher and teacher_lm of `bootstrap_few_shot`.

    Calls: bootstrapping, proposals, `minibatch` runs for each trial, and the full scores.

    Reference: Opsahl-Ong et al. 2024, arXiv 2406.11695. Here the best pair of the minibatches races
    the best so far, and no proposal is thrown away.

    >>> mipro(lmopt.toy_lm(), candidates=2, trials=3)
    Optimizer(name='mipro')
    """
    count, most = (candidates or 6, 1000) if auto is None else _SIZES[auto]
    count = candidates or count
    _check_count("candidates", count, 2)
    for name, value in {"minibatch": minibatch, "full_every": full_every}.items():
        _check_count(name, value, 1)
    given, writer, asking = _given(valset), propose or proposer(), prompt_lm or lm
    fixed = not max_bootstrapped and not max_labeled
    texts = count if fixed else max(count // 2, 2)
    make = partial(
        bootstrap_few_shot, lm, max_labeled=max_labeled, seed=seed, workers=workers, **options
    )
    make(max_bootstrapped=max_bootstrapped)  # complains of wrong options now

    def tries(program: lmopt.Program) -> int:
        choices = len(program.params) * (1 if fixed else 2)
        return trials or int(max(2 * choices * math.log2(count), 1.5 * count))

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = _hunt(program, train, val[:most], metric, lm, workers)
        yield hunt.start()
        sets = [program.params]
        if not fixed:
            sets.append(labeled_demos(program, train, max_labeled, seed=seed))
            made = _demo_sets(program, train, metric, make, count - 3, max_bootstrapped, seed)
            sets += [_booked(hunt, trial) for trial in made]
        wording = _wording(hunt, texts, writer, asking, seed, workers)
        yield from _pairs(
            hunt,
            sets,
            wording,
            tries(program),
            min(minibatch, len(hunt.board.rows)),
            full_every,
            seed,
        )

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        val, steps, many = min(val, most), len(program.params), tries(program)
        full = -(-many // full_every)
        runs = val + many * min(minibatch, val) + full * val + min(16, train)
        teaching = make(max_bootstrapped=max_bootstrapped).bound(program, train)
        sets = [] if fixed else [teaching] * (count - 2)
        writing = Plan(calls=3)
        return sum(sets, _planned(program, runs, steps * (texts - 1), writer)) + writing

    return Optimizer("mipro", search, bound)


def _booked(hunt: Hunt, trial: Trial) -> lmopt.Params:
    """The parameters of another search, whose calls are ours."""
    hunt.asked += trial.calls
    return trial.params


def _wording(
    hunt: Hunt, count: int, writer: Propose, lm: lmopt.LM, seed: int, workers: int | None
) -> dict[str, list[str]]:
    """For each step, its instructions and those that are proposed, each with another tip."""
    assert hunt.learn is not None
    summary, spent = _summary(lm, hunt.learn.rows)
    hunt.asked += spent
    wording = {}
    for path, prompt in hunt.top.params.items():
        rng = lmopt.seeded(seed, "tips", path)
        tips = [rng.choice(TIPS) for _ in range(count - 1)]
        told = [_asked(hunt, path, 16, tip=tip, data=summary) for tip in tips]
        wording[path] = [prompt.instructions, *_write(hunt, writer, lm, told, workers)]
    return wording


def _summary(lm: lmopt.LM, rows: Examples) -> tuple[str, int]:
    """What the data is like, in words, and how many calls that took."""
    program = lmopt.predict(_SUMMARY, name="summary")
    made = lmopt.run(program, lm, {"examples": lmopt.jsonable(rows[:20], other=repr)})
    return made["summary"], made.usage.calls


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
    seed: int,
) -> Iterator[Trial]:
    """Choose an instruction and a set of demonstrations for each step, by TPE over minibatches."""
    paths = list(wording)
    sizes = [size for path in paths for size in (len(wording[path]), len(sets))]
    history: list[tuple[tuple[int, ...], float]] = [((0,) * len(sizes), hunt.top.score or 0.0)]
    means: dict[tuple[int, ...], list[float]] = {}
    tried: set[tuple[int, ...]] = {(0,) * len(sizes)}
    for number in range(tries):
        rng = lmopt.seeded(seed, "pairs", number)
        choice = tpe(history, sizes, rng)
        places = sorted(rng.sample(range(len(hunt.board.rows)), minibatch))
        score = hunt.board.score(_paired(hunt, sets, wording, choice), places).score
        history.append((choice, score))
        means.setdefault(choice, []).append(score)
        left = [one for one in means if one not in tried]
        if left and (number % full_every == full_every - 1 or number == tries - 1):
            best = max(left, key=lambda one: statistics.fmean(means[one]))
            tried.add(best)
            params = _paired(hunt, sets, wording, best)
            note = f"pairs {best} after {number + 1} minibatches"
            trial = hunt.take(params, note, 0)
            history.append((best, trial.score or 0.0))
            yield trial


def _paired(
    hunt: Hunt,
    sets: Sequence[lmopt.Params],
    wording: Mapping[str, Sequence[str]],
    choice: Sequence[int],
) -> lmopt.Params:
    params = hunt.board.program.params
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
    valset: Iterable[Mapping[str, Any]] | None = None,
    propose: Propose | None = None,
    prompt_lm: lmopt.LM | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Evolve instructions by reflection on feedback, from a Pareto front of candidates.

    A candidate is drawn from those that are best on some held-out row, more often the more rows it
    leads. It runs on a minibatch of the training half; one of its steps, in turn, gets new
    instructions from what it did there and the feedback on it. Where the child does better on the
    minibatch, it is scored on all held-out rows and joins. Two candidates of the front are merged,
    step by step, where each has changed what the other has not.

    Args:
        lm: runs the program.
        max_runs: program runs in all; the search ends before one more would be too many.
        auto: how many, by the number of steps and held-out rows, where that is not given.
        minibatch: rows to reflect on, 1 or more.
        merge: whether to merge.
        max_merges: at most so often.
        stop: called with each trial; True ends the search.
        valset: rows to score on, none of them in the training set; by default half of that.
        propose: who writes instructions; see `proposer`.
        prompt_lm: answers the proposer; by default `lm`.
        seed: of all choices.
        workers: threads, as in `evaluate`; they do not change the result.

    Calls: those of `max_runs` runs, and at most one proposal for every two minibatches.

    Reference: Agrawal et al. 2025, arXiv 2507.19457. Here scores that are known are used again, and
    the budget is never overshot.

    >>> gepa(lmopt.toy_lm(), max_runs=100)
    Optimizer(name='gepa')
    """
    _check_count("minibatch", minibatch, 1)
    given, writer = _given(valset), propose or proposer()

    def budget(program: lmopt.Program, val: int) -> int:
        steps, many = len(program.params), _SIZES[auto][0]
        rounds = int(max(4 * steps * math.log2(many), 1.5 * many))
        return max_runs if max_runs is not None else 12 * rounds + (rounds // 3 + 2) * val

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = _hunt(program, train, val, metric, lm, workers)
        if budget(program, len(val)) < len(val):
            todo = "raise max_runs"
            raise lmopt.DataError("too few runs", max_runs, f"{len(val)} or more", todo)
        evolution = _Evolution(hunt, minibatch, budget(program, len(val)), seed)
        write = partial(_write, hunt, writer, prompt_lm or lm, workers=workers)
        for trial in evolution.trials(write, max_merges if merge else 0):
            yield trial
            if stop is not None and stop(trial):
                return

    def bound(program: lmopt.Program, size: int) -> Plan:
        _, val = _half_sizes(size, given)
        runs = budget(program, val)
        return _planned(program, runs, max(runs - val, 0) // 2 + 1, writer)

    return Optimizer("gepa", search, bound)


class _Evolution:
    """The state of `gepa`: candidates with full scores, and what they came from."""

    def __init__(self, hunt: Hunt, minibatch: int, budget: int, seed: int) -> None:
        assert hunt.learn is not None
        self.hunt, self.learn, self.budget, self.seed = hunt, hunt.learn, budget, seed
        self.minibatch = min(minibatch, len(self.learn.rows))
        self.turns: list[int] = []  # of each candidate, which step is next
        self.merged: set[str] = set()

    def fits(self, runs: int) -> bool:
        """Whether so many more runs are allowed."""
        return self.hunt.board.runs + self.learn.runs + runs <= self.budget

    def trials(self, write: Callable[..., list[str]], merges: int) -> Iterator[Trial]:
        size, fresh, idle = len(self.hunt.board.rows), False, 0
        yield self.join(self.hunt.board.program.params, "start", None, 0)
        for number in itertools.count():
            rng = lmopt.seeded(self.seed, "gepa", number)
            if not self.fits(2 * self.minibatch + size) or idle > 50:
                return
            merged = self.merge(rng) if fresh and merges else None
            merges -= merged is not None
            trial = merged or self.mutate(rng, number, write)
            fresh, idle = trial is not None, 0 if trial else idle + 1
            if trial is not None:
                yield trial

    def join(self, params: lmopt.Params, note: str, parent: int | None, turn: int) -> Trial:
        self.turns.append(turn)
        return self.hunt.add(params, note, parent, self.hunt.board.score(params))

    def front(self) -> list[int]:
        rows = [one.evaluation.rows for one in self.hunt.trials if one.evaluation]
        return pareto([[row.score for row in one] for one in rows])

    def mutate(
        self, rng: random.Random, number: int, write: Callable[..., list[str]]
    ) -> Trial | None:
        """Reflect on one step of a candidate; the child joins if it does better where it failed."""
        parent = rng.choices(range(len(self.hunt.trials)), self.front())[0]
        params = self.hunt.trials[parent].params
        places = self.batch(number)
        before = self.learn.score(params, places)
        paths = list(params)
        path, self.turns[parent] = paths[self.turns[parent] % len(paths)], self.turns[parent] + 1
        if all(row.score >= 1.0 for row in before.rows):
            return None
        told = {
            "step": path,
            "current": params[path].instructions,
            "cases": cases(self.hunt.board.program, path, before.rows),
            "attempts": _attempts(self.hunt.trials, path),
        }
        for text in write([told])[:1]:
            child = params.replace(path, instructions=text)
            if child.digest in {one.params.digest for one in self.hunt.trials}:
                return None
            if self.learn.score(child, places).total > before.total:
                return self.join(child, f"new instructions of {path}", parent, self.turns[parent])
        return None

    def batch(self, number: int) -> list[int]:
        """The next rows of a stream that is shuffled anew for each pass."""
        size = len(self.learn.rows)
        first_ = number * self.minibatch
        stream = range(first_, first_ + self.minibatch)
        return [self.shuffled(place // size)[place % size] for place in stream]

    def shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.learn.rows)))
        lmopt.seeded(self.seed, "epoch", epoch).shuffle(order)
        return order

    def merge(self, rng: random.Random) -> Trial | None:
        """Take from each of two candidates the steps that it alone has changed."""
        alive = [index for index, weight in enumerate(self.front()) if weight]
        pairs = list(itertools.combinations(alive, 2))
        rng.shuffle(pairs)
        for one, other in pairs:
            child = self.mixed(one, other)
            if child is not None and child.digest not in self.merged:
                self.merged.add(child.digest)
                better = max(one, other, key=lambda index: self.hunt.trials[index].score or 0.0)
                return self.join(child, f"merged from {one} and {other}", better, 0)
        return None

    def mixed(self, one: int, other: int) -> lmopt.Params | None:
        start = self.hunt.trials[0].params
        a, b = self.hunt.trials[one], self.hunt.trials[other]
        low, high = (a, b) if (a.score or 0.0) <= (b.score or 0.0) else (b, a)
        changed = {path: prompt for path, prompt in low.params.items() if prompt != start[path]}
        taken = {
            path: prompt for path, prompt in changed.items() if high.params[path] == start[path]
        }
        if not taken or len(taken) == len(start):
            return None
        child = lmopt.Params({**high.params, **taken})
        known = {trial.params.digest for trial in self.hunt.trials}
        return None if child.digest in known else child


def simba(
    lm: lmopt.LM,
    *,
    steps: int = 8,
    candidates: int = 6,
    minibatch: int = 32,
    max_demos: int = 4,
    temperature: float = 0.2,
    valset: Iterable[Mapping[str, Any]] | None = None,
    propose: Propose | None = None,
    prompt_lm: lmopt.LM | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Learn from the rows on which runs differ most, by a demonstration or by new instructions.

    In each step, programs of the pool run `candidates` times on a minibatch of the training half,
    each with a rollout of its own. Where the best and the worst run of a row lie farthest apart, a
    program of the pool gets the best run as a demonstration, or instructions that contrast the two.
    The best of these on the minibatch is scored on the held-out rows and joins the pool.

    Args:
        lm: runs the program.
        steps: how many, 1 or more.
        candidates: runs of a row, and programs made in a step, 1 or more.
        minibatch: rows of a step, 1 or more.
        max_demos: demonstrations of a step of the program; with 0 only instructions are written.
        temperature: of the choice from the pool, more than 0.
        valset: rows to score on, none of them in the training set; by default half of that.
        propose: who writes instructions; see `proposer`.
        prompt_lm: answers the proposer; by default `lm`.
        seed: of all choices.
        workers: threads, as in `evaluate`; they do not change the result.

    Calls: for each step 2 * `candidates` * `minibatch` runs, proposals, and a scoring.

    Reference: SIMBA of DSPy, https://dspy.ai. Here the start has its true score in the pool, and a
    winner is scored at once.

    >>> simba(lmopt.toy_lm(), steps=1)
    Optimizer(name='simba')
    """
    for name, value in {"steps": steps, "candidates": candidates, "minibatch": minibatch}.items():
        _check_count(name, value, 1)
    _check_count("max_demos", max_demos)
    given, writer = _given(valset), propose or proposer()

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = _hunt(program, train, val, metric, lm, workers)
        yield hunt.start()
        write = partial(_write, hunt, writer, prompt_lm or lm, workers=workers)
        for number in range(steps):
            rng = lmopt.seeded(seed, "simba", number)
            places = sorted(rng.sample(range(len(train)), min(minibatch, len(train))))
            pick = partial(_softmax, hunt, temperature, rng)
            buckets = _buckets(_sampled_runs(hunt, pick, places, candidates, number))
            teach = partial(_lessons, hunt, pick, max_demos, rng, write)
            made = list(concat(map(teach, buckets[:candidates])))
            if made:
                params, note, parent = max(made, key=partial(_score_of_lesson, hunt, places))
                yield hunt.take(params, f"step {number + 1}, {note}", parent)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        runs = val + steps * (2 * candidates * min(minibatch, train) + val)
        return _planned(program, runs, steps * candidates, writer)

    return Optimizer("simba", search, bound)


def _softmax(hunt: Hunt, temperature: float, rng: random.Random) -> int:
    """Draw a trial, better ones more often."""
    scores = [one.score or 0.0 for one in hunt.trials]
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return rng.choices(range(len(scores)), weights)[0]


def _sampled_runs(
    hunt: Hunt, pick: Callable[[], int], places: Sequence[int], count: int, number: int
) -> list[lmopt.Evaluation]:
    """Runs of programs of the pool on a minibatch, each with a rollout of its own."""
    assert hunt.learn is not None
    chosen = [hunt.trials[pick()].params for _ in range(count)]
    rollouts = [resampled(one, number * count + place) for place, one in enumerate(chosen)]
    return [hunt.learn.score(one, places) for one in rollouts]


_Lesson = tuple[lmopt.Params, str, int]  # parameters, what is new in them, the trial they are from


def _lessons(
    hunt: Hunt,
    pick: Callable[[], int],
    max_demos: int,
    rng: random.Random,
    write: Callable[..., list[str]],
    runs: Sequence[lmopt.Row],
) -> list[_Lesson]:
    """What a program of the pool learns from the runs of one row, the best of which comes first."""
    parent, program = pick(), hunt.board.program
    params = hunt.trials[parent].params
    if max_demos and rng.random() < 0.5:
        return [(_with_demo(program, params, runs[0], max_demos, rng), "a demonstration", parent)]
    path = rng.choice(list(params))
    told = {
        "step": path,
        "current": params[path].instructions,
        "cases": cases(program, path, [runs[-1], runs[0]]),
        "tip": "The cases are a bad and a good run of one input.",
    }
    return [
        (params.replace(path, instructions=text), "instructions", parent) for text in write([told])
    ]


def _score_of_lesson(hunt: Hunt, places: Sequence[int], lesson: _Lesson) -> float:
    assert hunt.learn is not None
    return hunt.learn.score(lesson[0], places).score


def _buckets(runs: Sequence[lmopt.Evaluation]) -> list[list[lmopt.Row]]:
    """The runs of each row, best first; rows whose runs differ most first."""
    rows = [
        sorted(same, key=lambda row: -row.score)
        for same in zip(*(one.rows for one in runs), strict=True)
    ]
    return sorted(rows, key=lambda same: (same[-1].score - same[0].score, -same[0].score))


def _with_demo(
    program: lmopt.Program, params: lmopt.Params, row: lmopt.Row, most: int, rng: random.Random
) -> lmopt.Params:
    """The parameters with a run as one more demonstration of each step; old ones make room."""
    for path, demo in step_demos(program, row).items():
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
    max_bootstrapped: int = 4,
    max_labeled: int = 16,
    valset: Iterable[Mapping[str, Any]] | None = None,
    propose: Propose | None = None,
    prompt_lm: lmopt.LM | None = None,
    seed: int = 0,
    workers: int | None = None,
    **options: Any,
) -> Optimizer:
    """Have rules inferred from labelled examples, and keep those that score best.

    The demonstrations are those of `bootstrap_few_shot`; each candidate has other rules, inferred
    from another draw of the training half.

    Args:
        lm: runs the program, and the teacher where there is no `teacher_lm`.
        candidates: how many sets of rules, 1 or more.
        rules: how many rules to ask for.
        shown: examples to infer them from, 1 or more.
        max_bootstrapped: how many runs to take as demonstrations at most.
        max_labeled: how many demonstrations a step has at most.
        valset: rows to score on, none of them in the training set; by default half of that.
        propose: who writes instructions; see `proposer`.
        prompt_lm: answers the proposer; by default `lm`.
        seed: of all choices.
        workers: threads, as in `evaluate`; they do not change the result.
        **options: rounds, threshold, teacher and teacher_lm of `bootstrap_few_shot`.

    Calls: bootstrapping, a proposal for each candidate and step, and the scoring.

    Reference: InferRules of DSPy, https://dspy.ai. Here the candidate that scored best is returned.

    >>> infer_rules(lmopt.toy_lm(), candidates=2)
    Optimizer(name='infer_rules')
    """
    for name, value in {"candidates": candidates, "shown": shown}.items():
        _check_count(name, value, 1)
    given, writer = _given(valset), propose or proposer()
    teach = bootstrap_few_shot(
        lm,
        max_bootstrapped=max_bootstrapped,
        max_labeled=max_labeled,
        seed=seed,
        workers=workers,
        **options,
    )

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = _hunt(program, train, val, metric, lm, workers)
        yield hunt.start()
        taught = last(teach.search(program, train, metric))
        hunt.asked += taught.calls
        yield hunt.take(taught.params, "demonstrations", 0)
        for number in range(candidates):
            rng = lmopt.seeded(seed, "rules", number)
            known = _labelled_cases(program, rng.sample(train, min(shown, len(train))))
            params = taught.params
            for path, prompt in params.items():
                told = {
                    "step": path,
                    "current": prompt.instructions,
                    "cases": known,
                    "tip": f"Keep the instructions; add {rules} short rules that the cases show.",
                }
                texts = _write(hunt, writer, prompt_lm or lm, [told], workers)
                params = params.replace(path, instructions=(texts or [prompt.instructions])[0])
            yield hunt.take(params, f"rules {number + 1}", 1)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        texts = candidates * len(program.params)
        return _planned(program, (candidates + 2) * val, texts, writer) + teach.bound(
            program, train
        )

    return Optimizer("infer_rules", search, bound)


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
    valset: Iterable[Mapping[str, Any]] | None = None,
    propose: Propose | None = None,
    prompt_lm: lmopt.LM | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Rewrite instructions from a contrast of runs that went well and runs that went badly.

    Made for agents, whose trajectories are among what is shown; good for any program.

    Args:
        lm: runs the program.
        rounds: how many, 1 or more; it ends before where no run goes badly.
        upper: score from which a run went well, 0 to 1.
        lower: score up to which it went badly, 0 to 1.
        shown: runs of either kind at most, 1 or more.
        valset: rows to score on, none of them in the training set; by default half of that.
        propose: who writes instructions; see `proposer`.
        prompt_lm: answers the proposer; by default `lm`.
        seed: of the split.
        workers: threads, as in `evaluate`; they do not change the result.

    Calls: for each round, runs on the training half, a proposal for each step, and a scoring.

    Reference: Wu et al. 2024, arXiv 2406.11200. Here new instructions are measured before they are
    kept.

    >>> avatar(lmopt.toy_lm(), rounds=1)
    Optimizer(name='avatar')
    """
    for name, value in {"rounds": rounds, "shown": shown}.items():
        _check_count(name, value, 1)
    given, writer = _given(valset), propose or proposer()

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = _hunt(program, train, val, metric, lm, workers)
        assert hunt.learn is not None
        yield hunt.start()
        for number in range(rounds):
            base, params = hunt.best, hunt.top.params
            rows = hunt.learn.score(params).rows
            bad = [row for row in rows if row.score <= lower][:shown]
            good = [row for row in rows if row.score >= upper][:shown]
            if not bad:
                return
            for path in params:
                told = {
                    "step": path,
                    "current": params[path].instructions,
                    "cases": cases(program, path, [*bad, *good], 2 * shown),
                    "attempts": _attempts(hunt.trials, path),
                    "tip": f"The first {len(bad)} cases went badly, the others well.",
                }
                texts = _write(hunt, writer, prompt_lm or lm, [told], workers)
                params = params.replace(
                    path, instructions=(texts or [params[path].instructions])[0]
                )
            yield hunt.take(params, f"round {number + 1}", base)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        runs = val + rounds * (val + train)
        return _planned(program, runs, rounds * len(program.params), writer)

    return Optimizer("avatar", search, bound)


# == 5. Settings ===================================================================================


def tune(
    lm: lmopt.LM,
    space: Mapping[str, Sequence[Any]],
    *,
    trials: int = 20,
    valset: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Choose settings by trying them: all combinations where they are few, else by TPE.

    Every step gets the same.

    Args:
        lm: runs the program.
        space: choices by name: a sampling setting, `adapter` (chat, json, xml or plain), `model`,
            or `demos`, the number of demonstrations to keep.
        trials: how many combinations to try at most, 1 or more.
        valset: rows to score on; by default all of the training set, for nothing is learned of it.
        seed: of the choices.
        workers: threads, as in `evaluate`; they do not change the result.

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
    _check_count("trials", trials, 1)
    for name in names:
        if name not in ("model", "demos"):
            lmopt.Prompt(settings={name: choices[names.index(name)][0]})  # complains now
    given, grid = _given(valset), math.prod(map(len, choices))

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        rows = examples if given is None else given
        hunt = Hunt(Board(program, rows, metric, lm=lm, workers=workers))
        yield hunt.start()
        sizes = [len(one) for one in choices]
        history: list[tuple[Sequence[int], float]] = []
        every = itertools.product(*map(range, sizes))
        for number in range(min(grid, trials)):
            rng = lmopt.seeded(seed, "tune", number)
            choice = next(every) if grid <= trials else tpe(history, sizes, rng)
            chosen = {n: c[i] for n, c, i in zip(names, choices, choice, strict=True)}
            params = _tuned(program.params, chosen)
            trial = hunt.take(params, ", ".join(f"{n}={v}" for n, v in chosen.items()), 0)
            history.append((choice, trial.score or 0.0))
            yield trial

    def bound(program: lmopt.Program, size: int) -> Plan:
        runs = (1 + min(grid, trials)) * (size if given is None else len(given))
        return Plan(runs, runs * program.max_calls, runs)

    return Optimizer("tune", search, bound)


def _tuned(params: lmopt.Params, chosen: Mapping[str, Any]) -> lmopt.Params:
    special = {name: value for name, value in chosen.items() if name in ("model", "demos")}
    settings = {name: value for name, value in chosen.items() if name not in special}
    for path, prompt in params.items():
        demos = prompt.demos[: special.get("demos", len(prompt.demos))]
        model = special.get("model", prompt.model)
        params = params.replace(path, demos=demos, model=model, settings=prompt.settings | settings)
    return params


# == 6. Combinators ================================================================================


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

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        done, best, spent = [Trial(program.params, note="start")], 0, 0
        if not optimizers:
            yield done[0]
        for number, optimizer in enumerate(optimizers):
            ready, places = program.with_params(done[best].params), [best]
            for index, trial in enumerate(optimizer.search(ready, examples, metric)):
                calls = spent + trial.calls
                if index == 0 and number and (trial.score is None or done[best].score is not None):
                    continue  # it starts with the best so far
                parent = best if number and index == 0 else trial.parent
                parent = None if parent is None else places[parent] if index else parent
                made = evolve(trial, parent=parent, calls=calls)
                if number == index == 0:
                    done = [made]
                else:
                    done.append(made)
                    places[index:] = [len(done) - 1]
                yield made
                best = len(done) - 1 if _better(done[best], made) is made else best
            spent = calls

    def bound(program: lmopt.Program, size: int) -> Plan:
        return sum((one.bound(program, size) for one in optimizers), Plan())

    return Optimizer("chain", search, bound)


def best_of(
    *optimizers: Optimizer,
    lm: lmopt.LM,
    valset: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Run several optimizers from the same start, and keep what scores best on held-out rows.

    Args:
        *optimizers: each gets the training half.
        lm: runs the program to score what they return.
        valset: rows to score on, none of them in the training set; by default half of that.
        seed: of the split.
        workers: threads, as in `evaluate`; they do not change the result.

    Calls: those of all, and a scoring for each.

    >>> both = best_of(labeled_few_shot(k=1), labeled_few_shot(k=4), lm=lmopt.toy_lm())
    >>> both.plan(lmopt.predict("q -> a"), [{"q": "?", "a": "!"}] * 8).runs
    12
    """
    given = _given(valset)

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        hunt = Hunt(Board(program, val, metric, lm=lm, workers=workers))
        yield hunt.start()
        for optimizer in optimizers:
            best = Trial(program.params)
            for trial in optimizer.search(program, train, metric):
                best, spent = _better(best, trial), trial.calls
            hunt.asked += spent
            yield hunt.take(best.params, optimizer.name, 0)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        runs = (1 + len(optimizers)) * val
        mine = Plan(runs, runs * program.max_calls, runs)
        return sum((one.bound(program, train) for one in optimizers), mine)

    return Optimizer("best_of", search, bound)


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

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        part = _frozen(program, path)
        for trial in optimizer.search(part, examples, metric):
            yield evolve(trial, params=lmopt.Params({**program.params, **trial.params}))

    def bound(program: lmopt.Program, size: int) -> Plan:
        return optimizer.bound(_frozen(program, path), size)

    return Optimizer("only", search, bound)


def _frozen(program: lmopt.Program, path: str) -> lmopt.Program:
    """The program with no prompts but those of a path or below it."""
    kept = {one for one in program.params if one == path or one.startswith(f"{path}.")}
    if not kept:
        known = f"one of {', '.join(program.params)}"
        raise lmopt.ParamsError("no such path", path, known, "correct the path")
    return _frozen_steps(program, program.root, kept)


def _frozen_steps(program: lmopt.Program, path: str, kept: set[str]) -> lmopt.Program:
    if program.prompt is not None:
        fixed = evolve(program, prompt=None, begin=partial(_begin_fixed, program))
        return program if path in kept else fixed
    steps = {
        name: _frozen_steps(step, f"{path}.{name}" if path else name, kept)
        for name, step in program.steps.items()
    }
    return evolve(program, steps=steps)


def _begin_fixed(
    fixed: lmopt.Program, program: lmopt.Program, path: str, inputs: lmopt.Record
) -> lmopt.Flow:
    return fixed.begin(fixed, path, inputs)


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
    _check_count("trials", 1 if trials is None else trials, 1)

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        found = optimizer.search(program, examples, metric)
        for trial in found if trials is None else take(trials, found):
            yield trial
            if calls is not None and trial.calls >= calls:
                return

    return Optimizer(f"limit({optimizer.name})", search, optimizer.bound)


def if_better(
    optimizer: Optimizer,
    *,
    lm: lmopt.LM,
    level: float = 0.05,
    valset: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Optimizer:
    """Keep the start unless a paired test on held-out rows says that the result is better.

    Args:
        optimizer: gets the training half.
        lm: runs both on the held-out rows.
        level: how probable a difference may be by chance, between 0 and 1.
        valset: rows to test on, none of them in the training set; by default half of that.
        seed: of the split.
        workers: threads, as in `evaluate`; they do not change the result.

    Calls: those of the optimizer, and two scorings.

    >>> rows = [{"animal": f"{a} {n}", "sound": a[:2]} for n in range(20) for a in ("dog", "cat")]
    >>> sure = if_better(labeled_few_shot(k=4), lm=lmopt.toy_lm())
    >>> [trial.note for trial in sure.trials(lmopt.predict("animal -> sound"), rows,
    ...     lmopt.exact_match)]
    ['start', 'labeled_few_shot is better: p = 7.74e-06']
    """
    given = _given(valset)

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = _halves(examples, given, seed)
        board = Board(program, val, metric, lm=lm, workers=workers)
        before = board.score(program.params)
        yield Trial(program.params, before.score, "start", None, board.calls, before)
        best, spent = Trial(program.params), 0
        for trial in optimizer.search(program, train, metric):
            best, spent = _better(best, trial), trial.calls
        after = board.score(best.params)
        found = lmopt.compare(before, after)
        sure = found.difference > 0 and found.p_value < level
        verdict = "is better" if sure else "is not surely better"
        note = f"{optimizer.name} {verdict}: p = {found.p_value:.3g}"
        kept, shown = (best.params, after) if sure else (program.params, before)
        yield Trial(kept, shown.score, note, 0, board.calls + spent, shown)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = _half_sizes(size, given)
        return Plan(2 * val, 2 * val * program.max_calls, 2 * val) + optimizer.bound(program, train)

    return Optimizer("if_better", search, bound)


# == 7. Report =====================================================================================


def summary(trials: Iterable[Trial]) -> str:
    """Return a table of trials as text: score, its interval, calls, parent and note.

    >>> print(summary([Trial(lmopt.predict("q -> a").params, note="start")]))
       #  score  95 %           calls  from  note
       0      -  -                  0     -  start
    """
    lines = ["   #  score  95 %           calls  from  note"]
    shown = list(trials)
    best = _place_of_best(shown)
    for place, one in enumerate(shown):
        score = "-" if one.score is None else f"{one.score:.3f}"
        spread_ = "-"
        if one.evaluation is not None:
            low, high = one.evaluation.interval
            spread_ = f"{low:.3f} to {high:.3f}"
        parent = "-" if one.parent is None else str(one.parent)
        star = "*" if place == best and one.score is not None else " "
        line = (
            f"{star}{place:>3}  {score:>5}  {spread_:<14} {one.calls:>5}  {parent:>4}  {one.note}"
        )
        lines.append(line)
    return "\n".join(lines)


def _place_of_best(trials: Sequence[Trial]) -> int:
    best = 0
    for place, one in enumerate(trials):
        if place and _better(trials[best], one) is one:
            best = place
    return best


def report(trials: Iterable[Trial], *, title: str = "Optimization") -> str:
    """Return trials as one HTML page that needs nothing else: no network, no script.

    It has the score against the calls with 95 % intervals, the tree of candidates, the difference
    of each prompt from its parent's, the rows of start and best side by side, and the cost.

    Args:
        trials: of one search, in their order.
        title: of the page.

    Raises:
        DataError: there are no trials.

    >>> page = report([Trial(lmopt.predict("q -> a").params, 0.5, "start")])
    >>> page.startswith("<!doctype html>"), "<svg" in page
    (True, True)
    """
    shown = list(trials)
    if not shown:
        raise lmopt.DataError("no trials to report", shown, "one or more", "run the search first")
    best = _place_of_best(shown)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _headline(shown, best),
        "<h2>Score against calls</h2>",
        f'<div class="wide">{_chart(shown, best)}</div>',
        "<h2>Candidates</h2>",
        _tree(shown, best),
        "<h2>Start and best, row by row</h2>",
        _side_by_side(shown[0], shown[best]),
    ]
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


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


def _headline(trials: Sequence[Trial], best: int) -> str:
    start, end = trials[0].score, trials[best].score
    scores = "" if start is None or end is None else f"from {start:.3f} to <b>{end:.3f}</b>, "
    scored = [one for one in unique(trials, key=lambda one: one.params.digest) if one.evaluation]
    spent = sum((one.evaluation.usage for one in scored), lmopt.Usage())
    tokens = f"{spent.input_tokens + spent.output_tokens:,} tokens for scoring"
    cost = f", {spent.cost:.4f} US dollars" if spent.cost else ""
    calls = max(one.calls for one in trials)
    return f"<p>{scores}{len(trials)} trials, {calls:,} calls, {tokens}{cost}.</p>"


def _chart(trials: Sequence[Trial], best: int) -> str:
    """Score against calls, each with its interval, and the best so far as a line."""
    most = max(1, *(one.calls for one in trials))
    scored = [(place, one) for place, one in enumerate(trials) if one.score is not None]

    def at(calls: float, score: float) -> tuple[float, float]:
        return round(50 + 730 * calls / most, 1), round(260 - 240 * score, 1)

    marks = []
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = at(0, level)
        marks.append(f'<line x1="50" x2="780" y1="{y}" y2="{y}" stroke="#ddd"/>')
        marks.append(f'<text x="44" y="{y + 4}" text-anchor="end">{level:.2f}</text>')
    marks.append(f'<text x="780" y="285" text-anchor="end">{most:,} calls</text>')
    steps: list[str] = []
    top = -1.0
    for place, one in scored:
        x, y = at(one.calls, one.score or 0.0)
        if one.evaluation is not None:
            (_, high), (_, low) = (at(0, value) for value in one.evaluation.interval)
            marks.append(f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}" stroke="#9bc"/>')
        if (one.score or 0.0) > top:
            steps += [f"{x},{at(0, max(top, 0))[1]}", f"{x},{y}"] if steps else [f"{x},{y}"]
            top = one.score or 0.0
        tip = html.escape(f"{place}: {one.score:.3f} after {one.calls} calls, {one.note}")
        fill = "#c40" if place == best else "#27a"
        marks.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}"><title>{tip}</title></circle>')
    if steps:
        end = f"780,{at(0, top)[1]}"
        line = f'<polyline points="{" ".join([*steps, end])}" fill="none" stroke="#27a"/>'
        marks.append(line)
    font = 'font-size="12" font-family="sans-serif"'
    label = 'role="img" aria-label="score against calls"'
    return f'<svg viewBox="0 0 800 295" {font} {label}>{"".join(marks)}</svg>'


def _tree(trials: Sequence[Trial], best: int) -> str:
    """Candidates below those they were made from, each with what it changed."""
    made: dict[int | None, list[int]] = {}
    for place, one in enumerate(trials):
        made.setdefault(one.parent, []).append(place)

    def branch(parent: int | None) -> str:
        places = made.get(parent, [])
        items = "".join(f"<li>{_leaf(trials, place, best)}{branch(place)}</li>" for place in places)
        return f"<ul>{items}</ul>" if places else ""

    return branch(None)


def _leaf(trials: Sequence[Trial], place: int, best: int) -> str:
    one = trials[place]
    score = "not scored" if one.score is None else f"{one.score:.3f}"
    head = f"{place}: {score}, {html.escape(one.note)}"
    if one.parent is None:
        changes = "\n".join(f"{path}: {prompt.instructions}" for path, prompt in one.params.items())
        body = html.escape(changes)
    else:
        lines = lmopt.diff(trials[one.parent].params, one.params).split("\n")
        body = "\n".join(map(_colored, lines)) or "nothing changed"
    kind = ' class="best" open' if place == best else ""
    return f"<details{kind}><summary>{head}</summary><pre>{body}</pre></details>"


def _colored(line: str) -> str:
    marked = not line.startswith(("+++", "---"))
    tag = {"+": "ins", "-": "del"}.get(line[:1], "") if marked else ""
    shown = html.escape(line)
    return f"<{tag}>{shown}</{tag}>" if tag else shown


def _side_by_side(start: Trial, best: Trial, most: int = 200) -> str:
    """The rows that both were scored on."""
    if start.evaluation is None or best.evaluation is None:
        return "<p>The trials were not scored.</p>"
    body = []
    pairs = list(zip(start.evaluation.rows, best.evaluation.rows, strict=False))
    for before, after in pairs[:most]:
        kind = {1: "up", -1: "down"}.get(
            (after.score > before.score) - (after.score < before.score), ""
        )
        cells = [
            _shown_record(before.example),
            _shown_record(before.prediction, before.error),
            f"{before.score:g}",
            _shown_record(after.prediction, after.error),
            f"{after.score:g}",
        ]
        body.append(f'<tr class="{kind}">{"".join(f"<td>{one}</td>" for one in cells)}</tr>')
    left = f"<p>and {len(pairs) - most} more rows</p>" if len(pairs) > most else ""
    head = "".join(f"<th>{one}</th>" for one in ("example", "start", "", "best", ""))
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>{left}'


def _shown_record(record: Mapping[str, Any], error: str = "") -> str:
    fields = [f"{name}: {lmopt.cut(lmopt.as_text(value), 160)}" for name, value in record.items()]
    return html.escape("\n".join(fields) or error).replace("\n", "<br>")
