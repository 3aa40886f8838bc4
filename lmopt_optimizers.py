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

Sections: 1 Contract · 2 Parts · 3 Few-shot
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from toolz import (  # type: ignore[import-untyped]
    concat,
    groupby,
    interleave,
    last,
    partition_all,
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
    "split", "spread", "labeled", "labeled_demos", "step_demos", "resampled", "race",
    # 3. Few-shot
    "labeled_few_shot", "bootstrap", "passed", "bootstrap_few_shot", "random_search",
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
    """

    params: lmopt.Params
    score: float | None = None
    note: str = ""
    parent: int | None = None
    calls: int = 0
    evaluation: lmopt.Evaluation | None = field(default=None, repr=False)


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

    It stops where even full marks on all rows that are left would not be enough, so that it never
    changes who wins. It looks after every eighth of the rows, never after less than 16, whatever
    the number of workers.

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
    examples = lmopt.check_dataset(program, dataset)
    size = len(examples) if beat is None else max(16, len(examples) // 8)
    rows: tuple[lmopt.Row, ...] = ()
    for block in partition_all(size, examples):
        rows += lmopt.evaluate(program, block, metric, lm=lm, workers=workers).rows
        left = len(examples) - len(rows)
        if beat is not None and lmopt.Evaluation(rows).total + left <= beat.total:
            break
    return lmopt.Evaluation(rows)


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
    given = None if valset is None else tuple(map(lmopt.Record, valset))

    def search(program: lmopt.Program, examples: Examples, metric: lmopt.Metric) -> Iterator[Trial]:
        train, val = split(examples, seed=seed) if given is None else _apart(examples, given)
        score = partial(race, dataset=val, metric=metric, lm=lm, workers=workers)
        simple = labeled_demos(program, train, max_labeled, seed=seed)
        first = [Trial(program.params, note="start"), Trial(simple, note="labelled")]
        sets = _demo_sets(program, train, metric, make, candidates, max_bootstrapped, seed)
        yield from _scored(program, concat([first, sets]), score, len(val), stop_at)

    def bound(program: lmopt.Program, size: int) -> Plan:
        train, val = (size, len(given)) if given is not None else ((size + 1) // 2,) * 2
        runs = (candidates + 3) * val
        teaching = make(max_bootstrapped=max_bootstrapped).bound(program, train)
        return sum([teaching] * (candidates + 1), Plan(runs, runs * program.max_calls, runs))

    return Optimizer("random_search", search, bound)


def _apart(examples: Examples, valset: Examples) -> tuple[Examples, Examples]:
    both = set(examples) & set(valset)
    if both or not valset:
        todo = "take them out of one, or leave valset out"
        what = f"{len(both)} rows are in both trainset and valset" if both else "an empty valset"
        raise lmopt.DataError(what, list(both)[:1], "rows of its own", todo)
    return examples, valset


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


def _scored(
    program: lmopt.Program,
    trials: Iterable[Trial],
    score: Callable[..., lmopt.Evaluation],
    size: int,
    stop_at: float | None,
) -> Iterator[Trial]:
    """Score each trial that is new against the best so far, on `size` rows."""
    best: lmopt.Evaluation | None = None
    spent, seen = 0, set()
    for trial in trials:
        spent += trial.calls
        if trial.params.digest in seen:
            continue
        seen.add(trial.params.digest)
        result = score(program.with_params(trial.params), beat=best)
        spent += result.usage.calls
        run, parent = len(result.rows), None if best is None else 0
        out = f"; out after {run} of {size} rows" if run < size else ""
        note = trial.note + out + _failures([row.error for row in result.errors])
        yield Trial(trial.params, result.score, note, parent, spent, result)
        best = result if best is None or result.score > best.score else best
        if stop_at is not None and best.score >= stop_at:
            return
