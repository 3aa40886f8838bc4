"""What `check_optimizer` lets pass, and what it finds."""

import itertools

import pytest

import lmopt_optimizers
from lmopt import LMError, Prompt, Response, exact_match, predict, toy_lm
from lmopt_optimizers import Plan, check_optimizer, optimizer

TASK = predict("animal -> sound")
ROWS = [
    {"animal": f"{a} {n}", "sound": s} for n in range(6) for a, s in (("dog", "w"), ("cat", "m"))
]


def made(search, bound=lambda size: size.plan(20 * size.val), **options):
    return optimizer("mine", toy_lm(), search, bound, **options)


def check(search, **options):
    check_optimizer(made(search, **options), TASK, ROWS, exact_match)


def test_a_lawful_one_passes():
    def search(hunt):
        yield hunt.start()
        for count in (2, 4):
            yield hunt.trial(hunt.labelled(count), f"{count} shown")

    check(search)


def test_one_that_changes_its_data_is_found():
    rows = [dict(row) for row in ROWS]

    def search(hunt):
        yield hunt.start()
        rows[0]["sound"] = "moo"

    with pytest.raises(AssertionError, match="it changes its data"):
        check_optimizer(made(search), TASK, rows, exact_match)


def test_one_that_does_not_begin_with_the_start_is_found():
    def search(hunt):
        yield hunt.trial(hunt.labelled(2), "shown")

    with pytest.raises(AssertionError, match="its first trial is not the start: .*; expected"):
        check(search)


def test_one_that_is_different_each_time_is_found():
    numbers = itertools.count()

    def search(hunt):
        yield hunt.start()
        text = f"Text {next(numbers)}."
        yield hunt.trial(hunt.top.params.replace("predict", instructions=text), "mine")

    with pytest.raises(AssertionError, match="trial 1 is another one the second time"):
        check(search)


def test_one_that_calls_more_than_it_planned_is_found():
    def search(hunt):
        yield hunt.start()

    with pytest.raises(AssertionError, match=r"it makes more calls than planned: {'calls': 6"):
        check(search, bound=lambda size: Plan(1, 1, 1))


def test_one_that_is_worse_than_its_start_is_found():
    good = TASK.with_params({"predict": Prompt("x", demos=ROWS)})

    def search(hunt):
        yield hunt.start()
        yield hunt.last(hunt.program.params.replace("predict", demos=()), "empty", None)

    with pytest.raises(AssertionError, match="it is worse than its start: 0.0; expected 1.0"):
        check_optimizer(made(search), good, ROWS, exact_match)


def test_one_that_goes_on_otherwise_when_it_was_killed_is_found():
    runs = itertools.count()

    def search(hunt):
        yield hunt.start()
        if next(runs) > 3:
            yield hunt.trial(hunt.labelled(2), "shown")

    with pytest.raises(AssertionError, match="killed in run 1, it ends otherwise"):
        check(search)


def unsteady(request):
    """A toy LM, one in six of whose replies cannot be read, and one in eight cannot come."""
    fate = int(request.key[:6], 16)
    if fate % 6 == 0:
        return Response("hm")
    if fate % 8 == 1:
        raise LMError("busy", retryable=True)
    return toy_lm()(request)


SEARCHES = (
    "auto",
    "random_search",
    "tpe_search",
    "copro",
    "mipro",
    "gepa",
    "simba",
    "infer_rules",
    "avatar",
    "bootstrap_few_shot",
)
unsteady.identity = "unsteady"
SAMPLING = TASK.with_params({"predict": Prompt("Say it.", settings={"temperature": 0.7})})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the search was ended", "ignore:gepa ended")
@pytest.mark.parametrize("name", SEARCHES)
def test_the_laws_hold_with_an_lm_that_samples_and_fails(name):
    few = {"max_runs": 40} if name == "gepa" else {"steps": 1} if name == "simba" else {}
    search = getattr(lmopt_optimizers, name)(unsteady, calls=90, **few)
    try:
        check_optimizer(search, SAMPLING, ROWS, exact_match, workers=(3,), kills=1)
    except LMError as error:  # three in a row: no accident
        assert "busy" in str(error)


def silent(hunt):
    yield from ()


def test_one_that_is_none_is_named():
    with pytest.raises(TypeError, match="this is no Optimizer"):
        check_optimizer(lambda *task: task[0].params, TASK, ROWS, exact_match)
    with pytest.raises(TypeError, match="this search is no flow"):
        check(lambda hunt: [])
    with pytest.raises(TypeError, match="this bound returned no plan: None"):
        check(silent, bound=lambda size: None)

    with pytest.raises(AssertionError, match="its first trial is not the start"):
        check(silent)
