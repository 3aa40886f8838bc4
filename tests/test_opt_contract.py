"""The laws of optimizers: every optimizer is a row of one table that is put through all of them."""

import asyncio
import functools
import itertools
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
from attrs import evolve
from conftest import ROOT

import lmopt
import lmopt_optimizers as opt
from lmopt import chain_of_thought, evaluate, exact_match, predict, program, toy_lm
from lmopt_optimizers import (
    Optimizer,
    auto,
    avatar,
    best_of,
    bootstrap_few_shot,
    chain,
    check_optimizer,
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
    "auto": lambda lm, **o: auto(lm, **{"calls": 150, **o}),
    "auto with settings": lambda lm, **o: auto(
        lm, **{"calls": 100, "space": {"temperature": [0.0, 0.5]}, "refit": False, **o}
    ),
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
    "gepa": lambda lm, **o: gepa(lm, max_runs=60, minibatch=3, **o),
    "gepa of texts": lambda lm, **o: gepa(lm, max_runs=40, minibatch=3, max_labeled=0, **o),
    "simba": lambda lm, **o: simba(lm, steps=2, candidates=2, minibatch=4, **o),
    "infer_rules": lambda lm, **o: infer_rules(lm, candidates=2, shown=6, max_labeled=2, **o),
    "avatar": lambda lm, **o: avatar(lm, rounds=2, **o),
    "copro of few calls": lambda lm, **o: copro(lm, breadth=2, depth=2, **{"calls": 50, **o}),
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
WRITERS = ("auto", "copro", "mipro", "gepa", "simba", "infer_rules", "avatar", "chain", "best_of")
WITH_CALLS = ("auto", "auto with settings", "copro of few calls")
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
    threading.Event().wait(rng.random() / 20000)
    return toy_lm()(request)


spent = pytest.mark.filterwarnings("ignore:the search was ended")


@spent
@table
def test_the_laws(make):
    check_optimizer(make(toy_lm()), two_steps, ROWS, exact_match, workers=(3,), kills=2)


@pytest.mark.parametrize("name", [one for one in OPTIMIZERS if not one.startswith(WRITERS)])
@programs
def test_who_writes_no_instructions_changes_none(name, task):
    made = OPTIMIZERS[name](toy_lm())(task, ROWS, exact_match)
    assert [one.instructions for one in made.values()] == [
        one.instructions for one in task.params.values()
    ]


@pytest.mark.slow
@spent
@table
def test_the_same_bytes_whatever_the_delays(make):
    expected, _ = in_one_thread(make)
    made = make(uneven, workers=16)(PROGRAMS["one step"], ROWS, exact_match)
    assert lmopt.dumps(made) == expected


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


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@table
def test_the_same_bytes_whoever_performs_the_effects(make, way):
    given = PROGRAMS["one step"], ROWS, exact_match
    assert lmopt.dumps(WAYS[way](make, *given)) == in_one_thread(make)[0]


@pytest.mark.slow
def test_the_same_bytes_on_an_executor_of_other_processes():
    given = PROGRAMS["one step"], ROWS, exact_match
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, make in OPTIMIZERS.items():
            expected, _ = in_one_thread(make)
            assert lmopt.dumps(make(toy, executor=pool)(*given)) == expected, name
            if name in ("copro", "simba", "random_search"):
                made = asyncio.run(make(toy, executor=pool).arun(*given))
                assert lmopt.dumps(made) == expected


@pytest.mark.slow
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
        assert made in [trial.params for trial in trials] or made == task.params


@spent
@table
def test_trials_are_in_order(make):
    _, trials = in_one_thread(make)
    assert trials[0].parent is None and len(trials) > 1
    assert all(trial.parent < index for index, trial in enumerate(trials) if index)
    assert [trial.calls for trial in trials] == sorted(trial.calls for trial in trials)
    scored = [trial for trial in trials if trial.score is not None]
    assert all(trial.evaluation.score == trial.score for trial in scored)


@pytest.mark.slow
@spent
def test_the_same_bytes_in_every_process():
    code = """
        import sys
        sys.path[:0] = ["tests", "."]
        from test_opt_contract import *
        for make in OPTIMIZERS.values():
            for task in list(PROGRAMS.values())[1:]:
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
        for task in list(PROGRAMS.values())[1:]
    ]
    assert {text.strip() for text in seen} == {"\n".join(here)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [one for one in OPTIMIZERS if one not in (*WITH_CALLS, "limit", "bootstrap only")]
)
@programs
def test_a_full_run_uses_at_least_half_of_its_plan(name, task):
    counter, runs = itertools.count(), []

    def never(example, prediction):  # what never scores never stops early
        runs.append(1)
        return 0.0

    writes = name.startswith(WRITERS[1:7])
    options = {"propose": lambda given: f"Text {next(counter)}."} if writes else {}
    optimizer = OPTIMIZERS[name](toy_lm(), **options)
    list(optimizer.trials(task, ROWS, never))
    assert optimizer.plan(task, ROWS).runs <= 2 * len(runs)


@pytest.mark.filterwarnings("ignore:the search was ended")
@table
@pytest.mark.parametrize("error", [lmopt.BudgetExceeded("spent"), KeyboardInterrupt()])
def test_a_spent_budget_or_ctrl_c_at_any_call_gives_the_best_so_far(make, error):
    task, whole = PROGRAMS["one step"], counted(toy_lm())
    trials = list(make(whole).trials(task, ROWS, exact_match))
    for stop in range(1, whole.calls + 1, 31):
        made = make(counted(toy_lm(), stop, error))(task, ROWS, exact_match)
        assert made in [trial.params for trial in trials] or made == task.params
        done = [trial for trial in trials if trial.calls < stop and not trial.out]
        if done and done[0].score is not None and not done[-1].final:
            val = [row.example for row in done[0].evaluation.rows]
            score = evaluate(task, val, exact_match, lm=toy_lm(), params=made).score
            assert score >= max(trial.score for trial in done)


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
    assert len(caught.value.best["predict"].demos) == 6


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


def clumsy(request):
    """A toy LM, one in three of whose replies cannot be read."""
    return lmopt.Response("hm") if int(request.key[:4], 16) % 3 == 0 else toy(request)


@spent
@pytest.mark.parametrize("calls", [1, 47])
@table
def test_calls_are_never_exceeded_retries_and_proposals_included(make, calls):
    task, made = PROGRAMS["one step"], []
    if make in (OPTIMIZERS["labeled_few_shot"], OPTIMIZERS["knn_few_shot"]):
        return  # they take no calls
    for workers in (1, 8):
        lm = counted(clumsy)
        search = opt.limit(make(lm, workers=workers), calls=calls)
        trials = list(search.trials(task, ROWS, exact_match))
        assert lm.calls <= calls and search.plan(task, ROWS).calls <= calls
        made.append((trials, lm.calls))
    assert made[0] == made[1]


def test_spent_calls_end_with_the_trial_under_way_and_a_warning():
    task, words = PROGRAMS["one step"], "ended by CallsSpent: the search has used its calls: .*"
    search = opt.copro(toy_lm(), calls=12, valset=ROWS[6:])
    with pytest.warns(UserWarning, match=words + "its trials so far are all") as told:
        trials = list(search.trials(task, ROWS[:6], exact_match))
    assert [one.note for one in trials] == [
        "start, scored on 4 of 6 rows",
        "6 labelled examples",
        "round 1, predict; ended with the budget after 1 of 4 rows",
    ] or trials[-1].note.startswith("6 labelled examples")
    assert told[0].filename == __file__ and trials[-1].calls <= 12
    with pytest.warns(UserWarning, match=words + "its best so far is returned: 6 labelled"):
        assert len(search(task, ROWS[:6], exact_match)["predict"].demos) == 6


@pytest.mark.filterwarnings("ignore:the search was ended")
@pytest.mark.parametrize("calls", [30, 60])
@pytest.mark.parametrize("make", [copro, gepa, random_search, mipro, infer_rules, simba])
def test_with_few_calls_a_search_still_finds_that_labels_help(make, calls):
    rows = [{"animal": f"{animal} {n}", "sound": sound} for n in range(70)
            for animal, sound in ANIMALS.items()]  # fmt: skip
    params = make(toy_lm(), calls=calls)(PROGRAMS["one step"], rows, exact_match)
    assert params["predict"].demos


def test_an_lms_own_budget_ends_the_trials_in_the_same_way():
    lm = lmopt.budget(calls=9)(toy_lm())
    with pytest.warns(UserWarning, match="ended by BudgetExceeded: the budget is spent"):
        trials = list(opt.copro(lm).trials(PROGRAMS["one step"], ROWS, exact_match))
    assert [len(one.evaluation.rows) for one in trials] == [6, 3] and trials[1].out


def evaluated(scores, tokens):
    """An evaluation with such scores, each run of which took so many tokens."""
    spent = lmopt.Response("x", usage=lmopt.Usage(input_tokens=tokens))
    event = lmopt.Event("predict", "lm", response=spent)
    made = lmopt.Prediction(trace=[event])
    rows = [lmopt.Row(lmopt.Record(n=n), made, float(one)) for n, one in enumerate(scores)]
    return lmopt.Evaluation(tuple(rows))


def trial(scores, tokens, note, **changes):
    params = lmopt.Params({"predict": lmopt.Prompt(note)})
    result = evaluated(scores, tokens)
    return opt.Trial(params, result.score, note, evaluation=result, **changes)


def test_of_trials_that_no_test_tells_apart_the_cheapest_is_best():
    start = trial([0] * 100, 10, "start")
    dear, cheap = (
        trial([1] * 60 + [0] * 40, 500, "dear"),
        trial([1] * 59 + [0, 1] * 20 + [0], 50, "cheap"),
    )
    worse = trial([1] * 40 + [0] * 60, 20, "worse")
    assert dear.tokens == 500.0 and start.usd == 0.0
    found = opt.best([start, cheap, worse])
    assert found is cheap
    like = trial([1] * 59 + [0] * 41, 50, "like")
    less = trial([1] * 57 + [0] * 43, 50, "less")
    found = opt.best([start, dear, less, worse])
    assert found.params == dear.params  # three rows apart, with nothing against it: p = 0.25
    assert opt.best([start, dear, like], level=0.05).note == (
        "like; no test tells it from the best (dear: 0.600), which costs 500 tokens a run, not 50"
    )
    mixed = trial([1] * 58 + [0, 0] + [1] + [0] * 39, 50, "mixed")
    assert opt.best([start, dear, mixed]).params == mixed.params  # 2 rows against 1
    few = [trial([1, 1, 0], 500, "few"), trial([1, 0, 1], 50, "as few")]
    assert opt.best(few).note == "as few" and opt.best([few[0], trial([0, 0, 1], 5, "x")]) is few[0]


def test_a_final_trial_is_the_best_and_one_that_is_out_never_is():
    high, low = trial([1, 1], 5, "high"), trial([1, 0], 5, "low", final=True)
    assert opt.best([high, low]) is low and opt.best([low, high]) is low
    assert opt.best([trial([1, 0], 5, "x"), trial([1, 1], 5, "y", out=True)]).note == "x"


def test_no_row_is_answered_with_itself_among_the_demonstrations():
    task, seen = PROGRAMS["one step"], []

    def lm(request):
        *shown, asked = [one.text for one in request.messages if one.role == "user"]
        question = asked.split("\n")[1]
        seen.append((question, len(shown)))
        assert not any(question in one.split("\n") for one in shown)
        return toy(request)

    params = labeled_few_shot(k=12)(task, ROWS, exact_match)  # all rows are demonstrations
    shown = task.with_params(params)
    trials = list(opt.copro(lm, breadth=1, depth=1, prompt_lm=toy).trials(shown, ROWS, exact_match))
    assert trials[0].score == 1.0 and {count for _, count in seen} <= {3, 4, 5, 6, 10, 11}
    assert task.with_params(params).params == params


def test_a_plan_tells_tokens_and_dollars_where_the_lm_has_a_price():
    task, rows = predict("text -> label"), [{"text": "x" * 400, "label": str(n)} for n in range(40)]
    free = random_search(lmopt.toy_lm(), calls=100).plan(task, rows)
    assert free.usd is None and 100 * 20 * 100 < free.tokens < 100 * 21 * 150
    lm = lmopt.openai_lm("m", base_url="http://localhost:1/v1", price=(1.0, 2.0))
    priced = random_search(lmopt.retry()(lm), calls=100).plan(task, rows)
    assert priced.tokens == free.tokens and free.tokens < priced.usd * 1e6 < 2 * free.tokens
    few = random_search(lm, calls=100, max_labeled=0).plan(task, rows)
    assert few.usd < priced.usd / 5 and (few + priced).usd == few.usd + priced.usd
    assert str(priced) == (
        f"at most 100 runs and 100 LM calls, usually 100, about {round(priced.tokens, -4):,} "
        f"tokens, about ${priced.usd:.2f}"
    )


def test_progress_tells_what_is_done_the_best_score_and_what_is_spent_and_left():
    told = []

    def progress(items, total, desc):
        told.append(desc)
        return items

    def lm(request):
        made = lmopt.toy_lm()(request)
        return evolve(made, usage=evolve(made.usage, cost=0.01))

    rows = [{"text": f"a {w} {n}", "kind": w} for n in range(9) for w in ("dog", "oak")]
    around = lmopt.budget(usd=5)(lm)
    copro(around, breadth=1, depth=1, calls=60, progress=progress)(
        predict("text -> kind"), rows, exact_match
    )
    assert told[0] == "copro: scoring, 0 of 60 calls, $5.00 left"
    found = r"rows to learn from, best 1\.000, \d+ of 60 calls, \$0"
    assert any(re.search(found, one) for one in told)


def test_a_plan_has_the_price_of_who_answers():
    def lm(*price):
        return lmopt.openai_lm("m", base_url="http://localhost:1/v1", price=price or None)

    task, rows = predict("text -> label"), [{"text": "x" * 40, "label": str(n)} for n in range(40)]
    cheap, dear = lm(0.1, 0.4), lm(10, 40)
    taught = bootstrap_few_shot(cheap, teacher_lm=dear).plan(task, rows).usd
    assert taught == pytest.approx(100 * bootstrap_few_shot(cheap).plan(task, rows).usd)
    written = copro(cheap, prompt_lm=dear).plan(task, rows).usd
    assert written > copro(cheap).plan(task, rows).usd > 0
    assert copro(lm(), prompt_lm=dear).plan(task, rows).usd is None  # a part of it is not known
    assert copro(cheap, prompt_lm=lm()).plan(task, rows).usd is None
    assert labeled_few_shot().plan(task, rows).usd is None
    parts = [copro(cheap), copro(cheap)]
    assert chain(*parts).plan(task, rows).usd > 2 * parts[0].plan(task, rows).usd
