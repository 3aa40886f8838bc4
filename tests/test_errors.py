"""The error tree: whose fault it is, what the message says, and that errors travel."""

import asyncio
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import lmopt
import lmopt_optimizers as opt
from lmopt import LmoptError, explain

ROOT = Path(__file__).parents[1]

CLASSES = [
    one for one in vars(lmopt).values() if isinstance(one, type) and issubclass(one, LmoptError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_ours_fits_a_built_in_and_pickles_with_its_facts(kind):
    error = kind("what", "value", "this", "do that", status=401, extra_fact=[1])
    assert str(error) == "what: 'value'; expected this; do that"
    assert kind is LmoptError or len(kind.__mro__) > len(LmoptError.__mro__)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.status, again.extra_fact) == (str(error), 401, [1])


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (lmopt.SignatureError, ValueError),
        (lmopt.ParamsError, ValueError),
        (lmopt.DataError, ValueError),
        (lmopt.ParseError, ValueError),
        (lmopt.LMError, RuntimeError),
        (lmopt.Unauthorized, PermissionError),
        (lmopt.LMTimeout, TimeoutError),
        (lmopt.BudgetExceeded, RuntimeError),
        (lmopt.ReplayMiss, LookupError),
    ],
)
def test_each_class_is_also_the_built_in_that_fits(kind, fits):
    assert issubclass(kind, fits)


def test_a_long_value_is_cut():
    assert len(explain("what", "x" * 10_000, "this", "that")) < 250


qa = lmopt.predict("question -> answer: Literal['yes', 'no']")
stub = lmopt.stub_lm()
ROWS = [{"question": "2+2?", "answer": "yes"}, {"question": "2+3?", "answer": "no"}]


def greet(name: str) -> str:
    """Greet."""
    return f"Hello {name}"


@lmopt.program(route=lmopt.predict("ticket -> team"))
def forgetful(steps, ticket):
    yield lmopt.Sleep(0)
    return {"team": steps.route(ticket=ticket).team}


@lmopt.program(route=lmopt.predict("ticket -> team"))
def broken(steps, ticket):
    made = yield steps.route(ticket=ticket)
    return {"team": made["taem"]}


def scored(dataset=ROWS, **options):
    return lmopt.evaluate(qa, dataset, lmopt.exact_match, **{"lm": stub, **options})


MISTAKES = [
    (lambda: scored(lm="openai/gpt-4o"), "this is no LM: 'openai/gpt-4o'; .*connect\\("),
    (lambda: qa("What?"), "this is no LM: 'What\\?'; .*; .*qa\\(lm, question=q\\)"),
    (
        lambda: scored(lm=lmopt.stub_lm),
        "this makes an LM, and is none: 'stub_lm'; .*stub_lm\\(...\\)",
    ),
    (
        lambda: qa(lmopt.retry(), question="?"),
        "this goes around an LM: .*; expected an LM; apply it",
    ),
    (
        lambda: lmopt.predict("q -> a", adapter="json"),
        "this is no adapter: 'json'; expected .*; write adapter=lmopt.json",
    ),
    (
        lambda: lmopt.evaluate(ROWS, qa, lmopt.exact_match, lm=stub),
        "this is no program: .*; .*evaluate",
    ),
    (
        lambda: lmopt.evaluate(qa, lmopt.exact_match, ROWS, lm=stub),
        "this is no metric: .*; .*; write",
    ),
    (
        lambda: lmopt.save("a.json", qa.params),
        "these are no parameters: 'a.json'; .*; write save\\(",
    ),
    (lambda: scored("rows.csv"), "this is no data set: 'rows.csv'; .*read_examples"),
    (lambda: scored(ROWS[0]), "this is no data set: .*; .*put a single example into a list"),
    (
        lambda: lmopt.react("q -> a", greet),
        "tools are no list: .*; expected a list.*; write \\[tool",
    ),
    (lambda: lmopt.react("q -> a", [5]), "this is no tool: 5; expected a function; pass"),
    (lambda: scored(workers="8"), "no workers: '8'; expected a whole number, 1 or more; leave"),
    (lambda: scored(progress=True), "this shows no progress: True; expected a function; pass tqdm"),
    (
        lambda: opt.split(ROWS, share=80),
        "no share: 80; expected a number from 0 to 1; write share=0.8",
    ),
    (
        lambda: opt.gepa(stub, auto="lite"),
        "no size: 'lite'; expected light, medium, heavy; correct auto",
    ),
    (
        lambda: opt.random_search(stub, candidate=3),
        "random_search has no option .*: 'candidate'; expected .*; did you mean candidates\\?",
    ),
    (
        lambda: lmopt.predict("q -> a", temperature="hot"),
        "a wrong temperature: 'hot'; expected a number, 0 or more; correct the setting",
    ),
    (
        lambda: lmopt.predict("q -> a", max_tokens=0),
        "a wrong max_tokens: 0; expected a whole number",
    ),
    (
        lambda: forgetful(stub, ticket="x"),
        "a step that has not run: 'team'; .*; yield it first: made = ",
    ),
    (
        lambda: lmopt.replay_lm("none.jsonl"),
        "no such cassette; record it first: 'none.jsonl'; .*record",
    ),
    (
        lambda: scored([ROWS[0], {"question": "?", "answer": "maybe"}]),
        "example 1: the field 'answer' cannot be read .*: 'maybe'; .*; correct the data",
    ),
    (
        lambda: scored([{"question": "?", "anser": "yes"}]),
        "no field to compare.*; correct the data",
    ),
    (
        lambda: lmopt.evaluate(
            broken, [{"ticket": "a"}, {"ticket": "b"}], lmopt.exact_match, lm=stub
        ),
        "all 2 rows failed alike: \"KeyError: 'taem'\"; expected a program.*; correct",
    ),
    (
        lambda: lmopt.predict(type("S", (), {"__annotations__": {"a": str}})),
        "a class is no task: 'S'; expected a text or a function; write a function that returns it",
    ),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_is_named_with_what_to_do_before_it_costs_anything(number):
    make, message = MISTAKES[number]
    with pytest.raises((LmoptError, TypeError, AttributeError, OSError), match=message):
        make()


def test_a_body_that_fails_is_scored_where_errors_are_allowed_for():
    data = [{"ticket": "a"}, {"ticket": "b"}]
    made = lmopt.evaluate(broken, data, lmopt.exact_match, lm=stub, max_errors=2)
    assert (made.score, len(made.errors)) == (0.0, 2)


def places(error):
    frames = traceback.extract_tb(error.__traceback__)
    return [Path(one.filename).name for one in frames]


@lmopt.program(a=lmopt.predict("q -> a"))
def rescuing(steps, q):
    made = yield steps.a(q=q)
    try:
        return {"a": made["b"]}
    except KeyError:
        raise ZeroDivisionError  # noqa: B904


def test_a_traceback_shows_the_users_lines_and_none_of_ours():
    mine = Path(__file__).name
    with pytest.raises(ZeroDivisionError) as caught:
        rescuing(stub, q="x")
    assert places(caught.value) == [mine, mine]
    assert isinstance(caught.value.__context__, KeyError) and not caught.value.__suppress_context__
    assert places(caught.value.__context__) == [mine]


def test_in_development_mode_the_traceback_is_whole():
    code = "import lmopt; lmopt.predict('q -> a')(lmopt.scripted_lm([]), q='?')"
    sizes = []
    for options in ([], ["-X", "dev"]):
        made = subprocess.run(
            [sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        sizes.append(made.stderr.count('lmopt.py"'))
    assert sizes[0] == 0 and sizes[1] > 5


def test_a_traceback_is_as_short_from_a_stream_and_from_a_search():
    def broken_lm(request):
        raise lmopt.RateLimited("too many")

    async def later():
        return [one async for one in lmopt.astream(rescuing, broken_lm, {"q": "x"})]

    search = opt.copro(broken_lm).trials(rescuing, [{"q": n, "b": n} for n in "ab"], lambda *_: 1)
    for run in (
        lambda: list(lmopt.stream(rescuing, broken_lm, {"q": "x"})),
        lambda: asyncio.run(later()),
        lambda: list(search),
    ):
        with pytest.raises(lmopt.RateLimited) as caught:
            run()
        found = places(caught.value)
        assert found[-1] == Path(__file__).name
        assert sum(name.startswith("lmopt") for name in found) <= 3
