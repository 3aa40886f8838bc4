"""The laws of optimizers: every optimizer is a row of one table that is put through all of them."""

import asyncio
import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
from conftest import ROOT

import lmopt
import lmopt_optimizers as opt
from lmopt import chain_of_thought, evaluate, exact_match, predict, program, toy_lm
from lmopt_optimizers import (
    Optimizer,
    Plan,
    avatar,
    best_of,
    bootstrap_few_shot,
    chain,
    copro,
    gepa,
    if_better,
    infer_rules,
    knn_few_shot,
    labeled_few_shot,
    limit,
    mipro,
    random_search,
    simba,
    tpe_search,
    tune,
)

ANIMALS = {"dog": "woof", "cat": "meow", "cow": "moo"}
ROWS = [
    {"animal": f"{animal} {n}", "sound": sound}
    for n, (animal, sound) in enumerate(list(ANIMALS.items()) * 4)
]


@program(think=chain_of_thought("animal -> kind"), tell=predict("animal, kind -> sound"))
def two_steps(steps, animal):
    thought = yield steps.think(animal=animal)
    return (yield steps.tell(animal=animal, kind=thought.kind))


def letters(texts):
    """Embed texts by their letters."""
    return [[text.count(one) for one in "acdgotw"] for text in texts]


PROGRAMS = {"one step": predict("animal -> sound"), "two steps": two_steps}

OPTIMIZERS = {
    "labeled_few_shot": lambda lm, **o: labeled_few_shot(k=5),
    "bootstrap_few_shot": lambda lm, **o: bootstrap_few_shot(lm, max_labeled=6, rounds=2, **o),
    "bootstrap only": lambda lm, **o: bootstrap_few_shot(
        lm, max_bootstrapped=2, max_labeled=0, threshold=0, **o
    ),
    "random_search": lambda lm, **o: random_search(lm, candidates=3, max_labeled=4, **o),
    "tpe_search": lambda lm, **o: tpe_search(lm, trials=4, sets=2, max_labeled=4, **o),
    "knn_few_shot": lambda lm, **o: knn_few_shot(letters, k=3),
    "copro": lambda lm, **o: copro(lm, breadth=2, depth=2, shown=5, **o),
    "mipro": lambda lm, **o: mipro(lm, candidates=4, trials=4, minibatch=4, full_every=2, **o),
    "mipro of texts": lambda lm, **o: mipro(
        lm, candidates=3, trials=3, max_bootstrapped=0, max_labeled=0, **o
    ),
    "gepa": lambda lm, **o: gepa(lm, max_runs=60, **o),
    "simba": lambda lm, **o: simba(lm, steps=2, candidates=2, minibatch=4, **o),
    "infer_rules": lambda lm, **o: infer_rules(lm, candidates=2, shown=6, max_labeled=2, **o),
    "avatar": lambda lm, **o: avatar(lm, rounds=2, **o),
    "tune": lambda lm, **o: tune(lm, {"temperature": [0.0, 1.0], "adapter": ["chat"]}, **o),
    "chain": lambda lm, **o: chain(labeled_few_shot(k=3), copro(lm, breadth=1, depth=1, **o)),
    "best_of": lambda lm, **o: best_of(
        labeled_few_shot(k=2), copro(lm, breadth=1, depth=1, **o), lm=lm, **o
    ),
    "limit": lambda lm, **o: limit(random_search(lm, candidates=3, **o), trials=2),
    "if_better": lambda lm, **o: if_better(labeled_few_shot(k=6), lm=lm, **o),
    "random_search of labels": lambda lm, **o: random_search(
        lm, candidates=2, max_bootstrapped=0, max_labeled=3, stop_at=0.9, **o
    ),
}
WRITERS = ("copro", "mipro", "gepa", "simba", "infer_rules", "avatar", "chain", "best_of")
table = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
programs = pytest.mark.parametrize("task", PROGRAMS.values(), ids=PROGRAMS)


def counted(lm, stop=None, error=None):
    """An LM that counts its calls, and raises an error instead of call number `stop`."""
    numbers, lock = itertools.count(), threading.Lock()

    def ask(request):
        with lock:
            ask.calls = next(numbers) + 1
        if ask.calls == stop:
            raise error
        return lm(request)

    ask.calls = 0
    return ask


def uneven(request, rng=random.Random(0)):  # noqa: B008
    """A toy LM that takes now less, now more time."""
    threading.Event().wait(rng.random() / 5000)
    return toy_lm()(request)


@pytest.mark.parametrize("name", OPTIMIZERS)
@programs
def test_nothing_is_changed_and_the_result_fits_the_program(name, task):
    rows, params = [dict(row) for row in ROWS], task.params
    made = OPTIMIZERS[name](toy_lm())(task, rows, exact_match)
    assert rows == ROWS and task.params == params
    assert task.with_params(made).params == made and list(made) == list(params)
    if not name.startswith(WRITERS):
        assert [one.instructions for one in made.values()] == [
            one.instructions for one in params.values()
        ]


@table
@programs
def test_the_same_bytes_for_any_number_of_workers_and_any_delays(make, task):
    one_after_the_other = lmopt.dumps(make(toy_lm())(task, ROWS, exact_match))
    for workers in (2, 16):
        made = lmopt.dumps(make(uneven, workers=workers)(task, ROWS, exact_match))
        assert made == one_after_the_other


toy = toy_lm()


async def awaited(request):
    """A toy LM that is an `async def`."""
    await asyncio.sleep(0)
    return toy(request)


class Batched:
    """A toy LM that answers batches, and nothing else."""

    def batch(self, requests):
        return [toy(request) for request in requests]


async def listed(items):
    return [one async for one in items]


@functools.cache
def in_one_thread(make):
    """The bytes an optimizer ends in for the program of one step, and its trials."""
    given = PROGRAMS["one step"], ROWS, exact_match
    return lmopt.dumps(make(toy)(*given)), list(make(toy).trials(*given))


WAYS = {
    "loop": lambda make, *given: asyncio.run(make(toy).arun(*given)),
    "loop, async LM": lambda make, *given: asyncio.run(make(awaited).arun(*given)),
    "lock-step": lambda make, *given: make(Batched())(*given),
    "lock-step, layers": lambda make, *given: make(lmopt.cache({})(lmopt.retry()(Batched())))(
        *given
    ),
}


@pytest.mark.parametrize("way", WAYS)
@table
def test_the_same_bytes_whoever_performs_the_effects(make, way):
    given = PROGRAMS["one step"], ROWS, exact_match
    assert lmopt.dumps(WAYS[way](make, *given)) == in_one_thread(make)[0]


def test_the_same_bytes_on_an_executor_of_other_processes():
    given = PROGRAMS["one step"], ROWS, exact_match
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, make in OPTIMIZERS.items():
            expected, _ = in_one_thread(make)
            assert lmopt.dumps(make(toy, executor=pool)(*given)) == expected, name
            if name in ("copro", "simba", "random_search"):
                made = asyncio.run(make(toy, executor=pool).arun(*given))
                assert lmopt.dumps(made) == expected


@table
def test_trials_in_a_loop_are_those_outside(make):
    given = PROGRAMS["one step"], ROWS, exact_match
    _, trials = in_one_thread(make)
    assert asyncio.run(listed(make(awaited).atrials(*given))) == trials
    assert list(make(Batched()).trials(*given)) == trials

    async def first_only():
        trials = make(awaited).atrials(*given)
        made = await anext(trials)
        await trials.aclose()
        return made, asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(first_only()) == (trials[0], set())


@pytest.mark.filterwarnings("ignore:the search was ended")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("error", [lmopt.BudgetExceeded("spent"), lmopt.Unauthorized("no")])
def test_in_a_loop_a_spent_budget_gives_the_best_so_far_and_so_does_an_error(name, error):
    make, task = OPTIMIZERS[name], PROGRAMS["one step"]
    _, trials = in_one_thread(make)
    for stop in range(3, trials[-1].calls + 1, 29):
        lm = counted(toy, stop, error)

        async def stopped(request, lm=lm):
            await asyncio.sleep(0)
            return lm(request)

        try:
            made = asyncio.run(make(stopped).arun(task, ROWS, exact_match))
            assert type(error) is lmopt.BudgetExceeded
        except lmopt.Unauthorized as caught:
            assert caught is error
            made = caught.best
        done = [trial for trial in trials if trial.calls < stop]
        assert made in [trial.params for trial in done] or made == task.params
        scores = [trial.score for trial in done if trial.score is not None]
        assert not scores or made == next(t.params for t in done if t.score == max(scores))


@table
@programs
def test_trials_are_the_same_each_time_and_start_with_the_start(make, task):
    trials = list(make(toy_lm()).trials(task, ROWS, exact_match))
    assert trials == list(make(toy_lm(), workers=4).trials(task, ROWS, exact_match))
    assert trials[0].params == task.params and trials[0].parent is None and len(trials) > 1
    assert all(trial.parent < index for index, trial in enumerate(trials) if index)
    assert [trial.calls for trial in trials] == sorted(trial.calls for trial in trials)
    scored = [trial for trial in trials if trial.score is not None]
    assert all(trial.evaluation.score == trial.score for trial in scored)


def test_the_same_bytes_in_every_process():
    code = """
        import sys
        sys.path[:0] = ["tests", "."]
        from test_opt_contract import *
        for make in OPTIMIZERS.values():
            for task in PROGRAMS.values():
                print(make(uneven, workers=16)(task, ROWS, exact_match).digest)
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "random")
    ]
    seen = {process.communicate()[0] for process in started}
    here = [
        make(toy_lm())(task, ROWS, exact_match).digest
        for make in OPTIMIZERS.values()
        for task in PROGRAMS.values()
    ]
    assert {text.strip() for text in seen} == {"\n".join(here)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@programs
def test_it_stays_within_its_plan(name, task):
    lm, metrics = counted(toy_lm()), []

    def metric(example, prediction):
        metrics.append(1)
        return exact_match(example, prediction)

    optimizer = OPTIMIZERS[name](lm)
    plan = optimizer.plan(task, ROWS)
    assert lm.calls == 0
    trials = list(optimizer.trials(task, ROWS, metric))
    assert trials[-1].calls <= lm.calls <= plan.calls
    if name not in ("gepa", "avatar"):  # which may look for more after their last trial
        assert lm.calls == trials[-1].calls
    assert len(metrics) <= plan.metrics and len(metrics) <= plan.runs
    assert isinstance(plan, Plan) and plan.calls >= plan.runs * task.max_calls


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name not in ("limit", "bootstrap only")]
)
@programs
def test_a_full_run_uses_at_least_half_of_its_plan(name, task):
    counter, runs = itertools.count(), []

    def never(example, prediction):  # what never scores never stops early
        runs.append(1)
        return 0.0

    writes = name.startswith(WRITERS[:6])
    options = {"propose": lambda given: f"Text {next(counter)}."} if writes else {}
    optimizer = OPTIMIZERS[name](toy_lm(), **options)
    list(optimizer.trials(task, ROWS, never))
    assert optimizer.plan(task, ROWS).runs <= 2 * len(runs)


@table
@programs
def test_it_is_never_worse_than_its_start_on_the_rows_it_scores_on(make, task):
    trials = list(make(toy_lm()).trials(task, ROWS, exact_match))
    best = make(toy_lm())(task, ROWS, exact_match)
    scored = [trial for trial in trials if trial.score is not None and not trial.out]
    scores = [trial.score for trial in scored]
    if scores:
        val = [row.example for row in scored[0].evaluation.rows]
        result = evaluate(task, val, exact_match, lm=toy_lm(), params=best)
        assert result.score == max(scores) >= scores[0]
        assert best == next(trial.params for trial in scored if trial.score == max(scores))
    else:
        assert best == trials[-1].params


@pytest.mark.filterwarnings("ignore:the search was ended")
@table
@pytest.mark.parametrize("error", [lmopt.BudgetExceeded("spent"), KeyboardInterrupt()])
def test_a_spent_budget_or_ctrl_c_at_any_call_gives_the_best_so_far(make, error):
    task, whole = PROGRAMS["one step"], counted(toy_lm())
    trials = list(make(whole).trials(task, ROWS, exact_match))
    for stop in range(1, whole.calls + 1, 7):
        made = make(counted(toy_lm(), stop, error))(task, ROWS, exact_match)
        done = [trial for trial in trials if trial.calls < stop]
        assert made in [trial.params for trial in done] or made == task.params
        scores = [trial.score for trial in done if trial.score is not None]
        assert not scores or made == next(t.params for t in done if t.score == max(scores))


@table
@pytest.mark.parametrize("workers", [1, 4])
def test_killed_at_any_call_and_started_again_over_its_answers_it_ends_in_the_same_bytes(
    make, workers
):
    task, whole = PROGRAMS["one step"], counted(toy_lm())
    expected = lmopt.dumps(make(whole)(task, ROWS, exact_match))
    for stop in range(1, whole.calls + 1, 19):
        answers, paid = {}, Counter()

        def remembered(request, lm, answers=answers, paid=paid):
            if request.key not in answers:
                answers[request.key] = lm(request)
                paid[request.key] += 1
            return answers[request.key]

        killed = counted(toy_lm(), stop, SystemExit())
        with contextlib.suppress(SystemExit):
            make(lambda r, lm=killed: remembered(r, lm), workers=workers)(task, ROWS, exact_match)
        made = make(lambda r: remembered(r, toy_lm()))(task, ROWS, exact_match)
        assert lmopt.dumps(made) == expected
        assert workers > 1 or set(paid.values()) <= {1}


@table
def test_a_failing_lm_stops_it_with_the_error_and_the_best_so_far(make):
    task, whole = PROGRAMS["one step"], counted(toy_lm())
    make(whole)(task, ROWS, exact_match)
    for stop in range(1, whole.calls + 1, 11):
        with pytest.raises(lmopt.Unauthorized) as caught:
            make(counted(toy_lm(), stop, lmopt.Unauthorized("no")))(task, ROWS, exact_match)
        assert task.with_params(caught.value.best).params == caught.value.best


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if not name.startswith(("labeled", "knn"))]
)
def test_a_metric_that_raises_stops_it_and_says_for_which_row(name):
    make = OPTIMIZERS[name]
    with pytest.raises(lmopt.MetricError, match="the metric raised ZeroDivisionError .*'animal': "):
        make(toy_lm())(PROGRAMS["one step"], ROWS, lambda example, prediction: 1 / 0)


@table
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"an empty data set: \[\]; expected at least one example; add"),
        ([*ROWS, {"sound": "?"}], "example 12: missing field 'animal' in: .*; add the input"),
    ],
)
def test_wrong_data_is_found_before_the_first_call(make, rows, message):
    optimizer = make(lambda request: pytest.fail("asked"))
    for act in (optimizer, optimizer.trials, optimizer.plan):
        arguments = (rows, exact_match) if act != optimizer.plan else (rows,)
        with pytest.raises(lmopt.DataError, match=message):
            act(PROGRAMS["one step"], *arguments)


def test_a_repr_is_short_and_shows_no_lm():
    assert repr(random_search(toy_lm())) == "Optimizer(name='random_search')"
    assert isinstance(random_search(toy_lm()), Optimizer)


def test_a_search_that_is_ended_says_so_and_what_it_returns():
    task, lm = PROGRAMS["one step"], counted(toy_lm(), 3, lmopt.BudgetExceeded("spent"))
    words = "the search was ended by BudgetExceeded: spent; its best so far is returned: the start"
    with pytest.warns(UserWarning, match=words) as told:
        assert opt.copro(lm)(task, ROWS, exact_match) == task.params
    assert told[0].filename == __file__


def test_a_text_that_cannot_be_used_is_skipped_and_noted():
    task, asked = PROGRAMS["one step"], []

    def writes(request):
        asked.append(request)
        return lmopt.Response("no idea") if len(asked) < 4 else toy_lm()(request)

    search = opt.copro(toy_lm(), breadth=3, depth=2, prompt_lm=writes)
    notes = [trial.note for trial in search.trials(task, ROWS, exact_match)]
    assert any(
        "; 1 texts could not be used (the field `instructions` is missing" in n for n in notes
    )
    assert notes[0] == "start" and len(notes) > 2
    assert asked[0].temperature == 1.0


def test_an_error_of_a_writer_of_ones_own_leaves_the_best_so_far():
    def writes(told):
        raise ZeroDivisionError

    task = PROGRAMS["one step"]
    with pytest.raises(ZeroDivisionError) as caught:
        opt.copro(toy_lm(), propose=writes)(task, ROWS, exact_match)
    assert caught.value.best == task.params


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Answer briefly.", "Answer briefly."),
        ("```text\nAnswer\nbriefly.\n```", "Answer\nbriefly."),
        ('"Answer briefly."', "Answer briefly."),
        ('**New instructions:** "Answer briefly."', "Answer briefly."),
        ("# Improved Instructions:\nAnswer briefly.", "Answer briefly."),
        ("[[ ## instructions ## ]]\nAnswer briefly.\n\n[[ ## completed ## ]]", "Answer briefly."),
        ('Say "yes" or "no"', 'Say "yes" or "no"'),
        ('"yes" or "no"', '"yes" or "no"'),
        ("Write code in ```python\nx\n```", "Write code in ```python\nx\n```"),
        ("``````", "``````"),
        ("", ""),
    ],
)
def test_proposed_text_is_cleaned_of_what_stands_around_it(text, plain):
    assert opt.cleaned(text) == plain
