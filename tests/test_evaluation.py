"""Evaluation: scores and intervals, what is a wrong answer and what is not, metrics."""

import asyncio
import csv
import io
import json
import math
import pickle
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from programs import Crowd

import lmopt
from lmopt import (
    DataError,
    Evaluation,
    MetricError,
    Prediction,
    Record,
    Row,
    Score,
    aevaluate,
    compare,
    evaluate,
    exact_match,
    f1,
    mock_lm,
    normalize,
    predict,
    stub_lm,
)

qa = predict("question -> answer")
DATA = [{"question": f"{n}?", "answer": str(n)} for n in range(20)]
knows_half = mock_lm(
    lambda inputs: {"answer": inputs.question[:-1] if int(inputs.question[:-1]) % 2 else "?"}
)


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_a_score_with_its_rows(workers):
    result = evaluate(qa, DATA, exact_match, lm=knows_half, workers=workers)
    assert result.score == 0.5 and len(result.rows) == 20 and result.errors == ()
    assert [row.example for row in result.rows] == DATA
    assert [row.score for row in result.rows] == [0.0, 1.0] * 10
    assert result.usage.calls == 20
    assert result == evaluate(qa, DATA, exact_match, lm=knows_half)


def test_the_interval_is_wilsons():
    """Worked example: 81 of 263 (Newcombe 1998, table I)."""
    rows = tuple(Row(Record(n=n), Prediction(), float(n < 81)) for n in range(263))
    low, high = Evaluation(rows).interval
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_the_interval_holds_the_score_and_stays_within_0_and_1(scores):
    result = Evaluation(tuple(Row(Record(), Prediction(), score) for score in scores))
    low, high = result.interval
    assert 0 <= low <= result.score + 1e-12 and result.score - 1e-12 <= high <= 1 and low < high


def test_a_metric_may_return_a_bool_a_number_or_a_score_with_feedback():
    for made, value in ((True, 1.0), (False, 0.0), (1, 1.0), (0.25, 0.25), (Score(True), 1.0)):
        row = evaluate(qa, DATA[:1], lambda e, p, made=made: made, lm=stub_lm()).rows[0]
        assert row.score == value and type(row.score) is float
    row = evaluate(
        qa, DATA[:1], lambda e, p: Score(0.5, "be brief", {"predict": "no"}), lm=stub_lm()
    ).rows[0]
    assert (row.feedback, row.steps.predict) == ("be brief", "no")


def test_a_metric_sees_the_trace():
    seen = []
    evaluate(qa, DATA[:1], lambda e, p: seen.append([x.kind for x in p.trace]) or 1, lm=stub_lm())
    assert seen == [["lm", "step"]]


@pytest.mark.parametrize(
    ("made", "part"),
    [
        (float("nan"), "the metric returned nan for"),
        (float("inf"), "returned inf"),
        (2, "returned 2"),
        (-0.1, "returned -0.1"),
        (None, "returned None"),
        ("good", "returned 'good'"),
        (Score(None), "returned Score"),
    ],
)
@pytest.mark.parametrize("workers", [1, 4])
def test_a_metric_that_returns_no_score_is_your_error_and_finished_rows_are_kept(
    made, part, workers
):
    def metric(example, prediction):
        return made if example.question == "7?" else 1.0

    with pytest.raises(
        MetricError, match="7?.*; expected a number from 0 to 1; correct or"
    ) as caught:
        evaluate(qa, DATA, metric, lm=stub_lm(), workers=workers)
    assert part in str(caught.value) and "'question': '7?'" in str(caught.value)
    assert [row.example for row in caught.value.rows] == DATA[:7]


def test_a_metric_that_raises_is_your_error():
    with pytest.raises(
        MetricError,
        match=r"raised ZeroDivisionError \(division by zero\) for: .*'0\?'.*; correct the metric",
    ) as caught:
        evaluate(qa, DATA, lambda e, p: 1 / 0, lm=stub_lm())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def broken_for(*questions):
    """A program that calls a tool first, which breaks for some questions, or for all."""

    def look(question):
        if question in questions or not questions:
            raise RuntimeError("broken")

    @lmopt.program(ask=qa)
    def body(steps, question):
        yield lmopt.invoke(look, question)
        return (yield steps.ask(question=question))

    return body


def test_what_the_program_gets_wrong_is_a_scored_row():
    def lm(request):
        if request.inputs.question == "3?":
            return lmopt.Response("no fields")
        if request.inputs.question == "4?":
            raise lmopt.ContextWindowExceeded("too long")
        return knows_half(request)

    task = broken_for("5?")
    result = evaluate(task, DATA, exact_match, lm=lm, failure_score=0.25, workers=4)
    assert [row.error.split(":")[0] for row in result.errors] == [
        "ParseError",
        "ContextWindowExceeded",
        "RuntimeError",
    ]
    assert [row.score for row in result.rows[3:6]] == [0.25] * 3
    assert result.usage.calls == 19 + 2  # the unreadable reply was asked again twice
    failed = result.rows[3].prediction
    assert failed == {} and failed.trace[-1].inputs == {"question": "3?"} and failed.trace[-1].error
    assert "20 rows, 3 errors; first: ParseError: " in repr(result)


@pytest.mark.parametrize(
    "error",
    [
        lmopt.Unauthorized,
        lmopt.RateLimited,
        lmopt.LMTimeout,
        lmopt.LMError,
        lmopt.BudgetExceeded,
        lmopt.ReplayMiss,
        lmopt.ParamsError,
    ],
)
@pytest.mark.parametrize("workers", [1, 4])
def test_what_would_fail_on_every_row_is_no_wrong_answer(error, workers):
    def lm(request):
        if request.inputs.question == "3?":
            raise error("no")
        return stub_lm()(request)

    with pytest.raises(error):
        evaluate(qa, DATA, exact_match, lm=lm, workers=workers)


@pytest.mark.parametrize("error", [lmopt.RateLimited, lmopt.BudgetExceeded, lmopt.ReplayMiss])
def test_a_judge_whose_lm_fails_is_no_wrong_metric(error):
    def judge(example, prediction):
        raise error("no")

    with pytest.raises(error):
        evaluate(qa, DATA, judge, lm=stub_lm())


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("error", [ConnectionError("gone"), ImportError("x"), TypeError("y")])
def test_an_error_of_an_lms_own_code_is_no_wrong_answer(error, workers):
    def lm(request):
        if request.inputs.question == "3?":
            raise error
        return knows_half(request)

    for asked in (lm, lmopt.cache({})(lm), lmopt.retry()(lm)):
        with pytest.raises(type(error)):
            evaluate(qa, DATA, exact_match, lm=asked, workers=workers)


def busy(*questions):
    """An LM that cannot answer some questions just then."""

    def lm(request):
        if request.inputs.question in questions:
            raise lmopt.RateLimited("busy", retryable=True)
        return knows_half(request)

    return lm


@pytest.mark.parametrize("workers", [1, 4])
def test_what_an_lm_cannot_answer_just_then_is_a_failed_row(workers):
    lm = busy("3?", "4?", "9?", "19?")
    result = evaluate(qa, DATA, exact_match, lm=lm, workers=workers)
    assert [row.example.question for row in result.errors] == ["3?", "4?", "9?", "19?"]
    assert result.errors[0].error == "RateLimited: busy"
    with pytest.raises(DataError, match="3 of 10 rows failed; the last: 'RateLimited: busy'"):
        evaluate(qa, DATA, exact_match, lm=lm, workers=workers, max_errors=2)


@pytest.mark.parametrize("workers", [1, 4])
def test_three_in_a_row_that_it_cannot_answer_end_it_and_keep_the_rows(workers):
    with pytest.raises(lmopt.RateLimited) as caught:
        evaluate(qa, DATA, exact_match, lm=busy("5?", "7?", "8?", "9?"), workers=workers)
    assert [row.example for row in caught.value.rows] == DATA[:9]
    with pytest.raises(lmopt.RateLimited):
        evaluate(qa, DATA[:2], exact_match, lm=busy("0?", "1?"))


def test_too_many_errors_stop():
    with pytest.raises(
        DataError,
        match="3 of 3 rows failed; the last: 'RuntimeError: broken'; expected at most 2; correct",
    ) as caught:
        evaluate(broken_for(), DATA, exact_match, lm=stub_lm(), max_errors=2)
    assert len(caught.value.rows) == 3
    task = broken_for()
    assert len(evaluate(task, DATA[:2], exact_match, lm=stub_lm(), max_errors=2).errors) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"an empty data set: \[\]; expected at least one example; add"),
        (
            [{"question": "a", "answer": "b"}, {"answer": "c"}],
            "example 1: missing field 'question' in: .*; add",
        ),
        ([5], "a Record needs names: 5"),
    ],
)
def test_data_is_checked_before_the_first_call(data, message):
    with pytest.raises(DataError, match=message):
        evaluate(qa, data, exact_match, lm=lambda request: pytest.fail("asked"))


def test_progress_is_called_as_tqdm_is():
    called = []

    def progress(items, total, desc):
        called.append((total, desc))
        for item in items:
            called.append(item.score)
            yield item

    evaluate(qa, DATA[:2], exact_match, lm=knows_half, progress=progress)
    assert called == [(2, "evaluate"), 0.0, 1.0]


def test_rows_are_evaluated_as_they_are_asked_for_not_all_at_once():
    active, peak, lock = 0, 0, threading.Lock()

    def lm(request):
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
        made = stub_lm()(request)
        with lock:
            active -= 1
        return made

    evaluate(qa, DATA * 5, exact_match, lm=lm, workers=3)
    assert peak <= 3


# -- in an event loop, and with what must be awaited --


def some_wrong(request):
    """An LM that knows half, fails on one row and writes nonsense on another."""
    if request.inputs.question == "4?":
        raise lmopt.ContextWindowExceeded("too long")
    return lmopt.Response("?") if request.inputs.question == "5?" else knows_half(request)


async def awaited(request):
    await asyncio.sleep(0)
    return some_wrong(request)


class Calling:
    """An LM that answers in a thread, and in a loop by its `acall`."""

    concurrency, identity = 4, "calling"

    def __call__(self, request):
        return some_wrong(request)

    async def acall(self, request):
        return await awaited(request)


class Plain:
    """An LM that is an object with an asynchronous `__call__`."""

    async def __call__(self, request):
        return await awaited(request)


LMS = {
    "plain": some_wrong, "async": awaited, "acall": Calling(), "async object": Plain(),
    "layers": lmopt.retry(base=0.0)(awaited),
}  # fmt: skip


async def exact_match_awaited(example, prediction):
    await asyncio.sleep(0)
    return exact_match(example, prediction)


def everything_of(result):
    """The rows with their traces, and all that is made of them."""
    traces = [row.prediction.trace for row in result.rows]
    return result, traces, result.score, result.usage, result.to_json()


@pytest.mark.parametrize("metric", [exact_match, exact_match_awaited])
@pytest.mark.parametrize("name", LMS)
def test_an_evaluation_in_a_loop_is_that_outside(name, metric):
    expected = everything_of(evaluate(qa, DATA, exact_match, lm=some_wrong, failure_score=0.25))
    assert expected[2] == (10 - 1 + 2 * 0.25) / 20  # of rows 4 and 5, the second is odd
    for workers in (None, 1, 4):
        options = {"lm": LMS[name], "workers": workers, "failure_score": 0.25}
        inside = asyncio.run(aevaluate(qa, DATA, metric, **options))
        assert everything_of(inside) == expected
        assert everything_of(evaluate(qa, DATA, metric, **options)) == expected


@pytest.mark.parametrize("lm", [some_wrong, awaited])
def test_an_evaluation_in_a_loop_runs_on_an_executor(lm):
    expected = everything_of(evaluate(qa, DATA, exact_match, lm=some_wrong))
    with ThreadPoolExecutor(3) as pool:
        for metric in (exact_match, exact_match_awaited):
            inside = asyncio.run(aevaluate(qa, DATA, metric, lm=lm, executor=pool))
            outside = evaluate(qa, DATA, metric, lm=lm, executor=pool)
            assert everything_of(inside) == everything_of(outside) == expected
        assert pool.submit(len, "ab").result() == 2  # it is still open


def test_progress_in_a_loop_is_called_as_tqdm_is():
    called = []

    def bar(items, total, desc):
        called.append((total, desc))
        for item in items:
            called.append(item.score)
            yield item
        called.append("end")

    class Bar:
        """As tqdm's: an object with an iterator, that closes at the end."""

        def __init__(self, items, **options):
            self.items = items
            called.append(tuple(options.values()))

        def __iter__(self):
            try:
                for item in self.items:
                    called.append(item.score)
                    yield item
            finally:
                called.append("end")

    for progress in (bar, Bar):
        for lm in (knows_half, awaited):
            asyncio.run(aevaluate(qa, DATA[:3], exact_match, lm=lm, progress=progress))
            assert called == [(3, "evaluate"), 0.0, 1.0, 0.0, "end"]
            called.clear()
        evaluate(qa, DATA[:3], exact_match, lm=knows_half, progress=progress)
        assert called == [(3, "evaluate"), 0.0, 1.0, 0.0, "end"]
        called.clear()


@pytest.mark.parametrize("lm", [some_wrong, awaited])
def test_too_many_errors_stop_an_evaluation_in_a_loop_too(lm):
    data = [*DATA[:7], *DATA[4:6]]
    with pytest.raises(
        DataError, match="3 of 8 rows failed; the last: .*expected at most 2"
    ) as seen:
        asyncio.run(aevaluate(qa, data, exact_match, lm=lm, max_errors=2))
    assert seen.value.rows == evaluate(qa, data[:8], exact_match, lm=some_wrong).rows
    made = asyncio.run(aevaluate(qa, data[:7], exact_match, lm=lm, max_errors=2))
    assert len(made.errors) == 2


@pytest.mark.parametrize("lm", [some_wrong, awaited])
def test_a_metric_that_is_wrong_in_a_loop_keeps_the_rows_before_it(lm):
    def raises(example, prediction):
        return 1 / 0 if example.question == "7?" else 1.0

    async def raises_later(example, prediction):
        await asyncio.sleep(0)
        return raises(example, prediction)

    async def returns_nothing(example, prediction):
        return None if example.question == "7?" else 1.0

    for metric, message in (
        (raises, "the metric raised ZeroDivisionError"),
        (raises_later, "the metric raised ZeroDivisionError"),
        (returns_nothing, "the metric returned None"),
    ):
        for act in (
            lambda metric: asyncio.run(aevaluate(qa, DATA, metric, lm=lm)),
            lambda metric: evaluate(qa, DATA, metric, lm=lm, workers=4),
        ):
            with pytest.raises(MetricError, match=f"{message}.*'7?'") as caught:
                act(metric)
            assert [row.example for row in caught.value.rows] == DATA[:7]


@pytest.mark.parametrize("error", [lmopt.Unauthorized, lmopt.BudgetExceeded, lmopt.ReplayMiss])
def test_what_would_fail_on_every_row_ends_an_evaluation_in_a_loop(error):
    begun = []

    async def dead(request):
        begun.append(request)
        await asyncio.sleep(0)
        raise error("no")

    async def main():
        with pytest.raises(error):
            await aevaluate(qa, DATA * 50, exact_match, lm=dead)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set() and len(begun) < 500


def test_a_judge_is_a_metric_inside_and_outside_of_a_loop():
    def grade(inputs):
        good = inputs.prediction["answer"] == inputs.example["answer"]
        return {"feedback": "good" if good else "bad", "grade": 5 if good else 2}

    plain = mock_lm(grade)

    async def grades(request):
        await asyncio.sleep(0)
        return plain(request)

    data = DATA[:4]
    for lm in (plain, grades, lmopt.cache({})(grades)):
        metric = lmopt.judge(lm, "It is right.")
        for task_lm in (knows_half, awaited):
            inside = asyncio.run(aevaluate(qa, data, metric, lm=task_lm))
            assert [row.score for row in inside.rows] == [0.25, 1.0] * 2
            assert [row.feedback for row in inside.rows] == ["bad", "good"] * 2
            for workers in (1, 4):
                assert evaluate(qa, data, metric, lm=task_lm, workers=workers) == inside
    assert lmopt.judge(grades, "It is right.")(DATA[1], {"answer": "1"}).value == 1.0


@pytest.mark.parametrize("workers", [1, 4])
def test_all_that_can_be_asynchronous_is_awaited_in_an_evaluation(workers):
    async def find(query, k):
        await asyncio.sleep(0)
        return [f"{query} {n}" for n in range(k)]

    async def shout(text):
        await asyncio.sleep(0)
        return text.upper()

    @lmopt.program(find=lmopt.retrieve(find, 2), qa=qa)
    def body(steps, question):
        found, loud = yield steps.find(query=question), lmopt.invoke(shout, "a")
        made = yield steps.qa(question=question)
        return {"answer": made.answer, "found": found.passages, "loud": loud}

    data = DATA[6:10]
    inside = asyncio.run(aevaluate(body, data, exact_match_awaited, lm=awaited))
    made = evaluate(body, data, exact_match_awaited, lm=awaited, workers=workers)
    assert made == inside and [row.error for row in made.rows] == [""] * 4
    assert made.rows[1].prediction == {"answer": "7", "found": ("7? 0", "7? 1"), "loud": "A"}
    inputs = [{"question": row["question"]} for row in data]
    many = lmopt.run_many(body, awaited, inputs, workers=workers)
    assert many == [row.prediction for row in made.rows]
    assert lmopt.run(body, awaited, inputs[1], workers=workers) == many[1]
    assert [one.trace for one in many] == [row.prediction.trace for row in made.rows]


def test_a_cancelled_evaluation_leaves_no_task_behind():
    begun, ended = [], []

    async def waits(request):
        begun.append(request)
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(request)

    async def judges(example, prediction):
        return await waits(example)

    async def main(lm, metric):
        task = asyncio.create_task(aevaluate(qa, DATA, metric, lm=lm, workers=5))
        while not begun:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.all_tasks() - {asyncio.current_task()}

    for lm, metric in ((waits, exact_match), (awaited, judges), (lmopt.cache({})(waits), f1)):
        assert asyncio.run(main(lm, metric)) == set()
        assert len(ended) == len(begun) > 0
        begun.clear()
        ended.clear()


def odd_rows():
    rows = [*DATA[:3], {"question": "3?", "answer": "3", "tags": ["ä", "b,c"]}]
    task, lm = broken_for("0?"), knows_half
    return evaluate(task, rows, lambda e, p: Score(exact_match(e, p), "<b>"), lm=lm)


def test_rows_as_csv_json_table_and_html(golden):
    result = odd_rows()
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert (
        len(rows) == 4
        and rows[0]["error"] == "RuntimeError: broken"
        and rows[1]["predicted answer"] == "1"
    )
    assert json.loads(rows[3]["tags"]) == ["ä", "b,c"]
    data = json.loads(result.to_json())
    assert [set(row) for row in data] == [set(data[0])] * 4
    page = result._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and page.count("<tr") == 5
    golden("table.txt", f"{result.table()}\n\n{result.table(limit=1)}\n")


# -- compare ---------------------------------------------------------------------------------------


def graded(scores):
    return Evaluation(
        tuple(Row(Record(n=n), Prediction(), score) for n, score in enumerate(scores))
    )


marks = st.integers(0, 20).map(lambda n: n / 20)


def test_compare_is_mcnemars_test_for_right_and_wrong():
    """10 rows got better and 2 worse: p = 2 * (C(12, 0) + C(12, 1) + C(12, 2)) / 2**12."""
    before, after = graded([0] * 10 + [1] * 2 + [1] * 8), graded([1] * 10 + [0] * 2 + [1] * 8)
    made = compare(before, after)
    assert (made.difference, made.better, made.worse, made.rows) == (0.4, 10, 2, 20)
    assert made.p_value == 2 * (1 + 12 + 66) / 2**12


def test_a_few_rows_are_no_proof_and_many_have_the_normal_approximation():
    def p_of(*gains):
        return compare(graded([0.5] * len(gains)), graded([0.5 + one for one in gains])).p_value

    assert (p_of(0.5), p_of(0.5, 0.5, 0, 0), p_of(*[0.5] * 4)) == (1.0, 0.5, 0.125)
    assert p_of(0.0) == 1.0
    assert p_of(0.1, 0.2, 0.4) == 0.25 and p_of(0.4, -0.1, 0.2) == 0.5
    assert p_of(*[0.5] * 300) < 1e-60 and p_of(*[0.1, 0.2] * 10) == pytest.approx(2e-5, rel=0.5)


@given(st.lists(st.tuples(marks, marks), min_size=1, max_size=40))
def test_the_interval_excludes_no_difference_exactly_where_p_is_below_5_percent(pairs):
    made = compare(graded([a for a, _ in pairs]), graded([b for _, b in pairs]))
    back = compare(graded([b for _, b in pairs]), graded([a for a, _ in pairs]))
    low, high = made.interval
    assert back.difference == -made.difference and back.p_value == made.p_value
    assert low <= made.difference <= high and 0 <= made.p_value <= 1
    if not math.isclose(made.p_value, 0.05, rel_tol=1e-6):
        assert (low > 0 or high < 0) == (made.p_value < 0.05)


def test_compare_needs_the_same_examples():
    with pytest.raises(
        DataError, match=r"different examples: \(2, 3\); expected the same.*; evaluate both"
    ):
        compare(graded([0, 1]), graded([0, 1, 1]))
    assert compare(graded([0, 1]), graded([0, 1])).p_value == 1.0


@pytest.mark.slow
def test_about_5_percent_of_null_comparisons_are_significant():
    rng = lmopt.seeded(0, "null")
    found = [
        compare(
            graded([rng.random() < 0.5 for _ in range(40)]),
            graded([rng.random() < 0.5 for _ in range(40)]),
        ).p_value
        < 0.05
        for _ in range(400)
    ]
    assert 0.025 < statistics.fmean(found) < 0.07


# -- metrics ---------------------------------------------------------------------------------------

NORMAL = [
    ("The  Eiffel-Tower!", "eiffel tower"),
    ("it's", "its"),
    ("A", "a"),
    ("a the", "a the"),
    ("3.5", "3.5"),
    ("$1,234.50", "1234.50"),
    ("-5", "-5"),
    ("5-6", "5 6"),
    ("ＦＵＬＬ", "full"),
    ("Straße", "strasse"),
    ("naïve café", "naïve café"),
    ("你好。", "你好 。"),
    ("C++", "c"),
    (5, "5"),
    (True, "true"),
    (None, "null"),
    (["b", "a"], "b"),
]


@pytest.mark.parametrize(("value", "expected"), NORMAL)
def test_normalize(value, expected):
    assert (
        normalize(value).startswith(expected)
        if value == ["b", "a"]
        else normalize(value) == expected
    )


@given(st.text())
def test_normalize_is_idempotent_and_forgives_case_of_ascii(text):
    once = normalize(text)
    assert normalize(once) == once or any(ord(c) > 127 for c in text)


MATCHES = [
    ({"a": "Paris"}, {"a": "paris."}, 1.0),
    ({"a": "Paris"}, {"a": "London"}, 0.0),
    ({"a": 4}, {"a": "4"}, 1.0),
    ({"a": "5"}, {"a": "-5"}, 0.0),
    ({"a": "3.5"}, {"a": "35"}, 0.0),
    ({"a": "A"}, {"a": "the"}, 0.0),
    ({"a": 1, "b": 2, "q": "?"}, {"a": 1, "b": 2, "reasoning": "r"}, 1.0),
    ({"a": 1, "b": 2}, {"a": 1, "b": 3}, 0.0),
    ({"a": ["x", "y"]}, {"a": ["x", "y"]}, 1.0),
]


@pytest.mark.parametrize(("example", "prediction", "expected"), MATCHES)
def test_exact_match(example, prediction, expected):
    assert exact_match(example, prediction) == expected


def test_f1():
    assert f1({"a": "Paris"}, {"a": "Eiffel Tower is in Paris"}) == pytest.approx(2 * 0.2 / 1.2)
    assert f1({"a": "x x y"}, {"a": "x y y"}) == pytest.approx(2 / 3)
    assert f1({"a": ""}, {"a": ""}) == 1.0 and f1({"a": "x"}, {"a": ""}) == 0.0
    assert f1({"a": "x", "b": "y"}, {"a": "x", "b": "z"}) == 0.5


@pytest.mark.parametrize("metric", [exact_match, f1])
def test_a_field_can_be_named_and_must_be_there(metric):
    example, made = {"reasoning": "x", "answer": "4"}, {"reasoning": "y", "answer": "4"}
    assert metric(example, made, field="answer") == 1.0 and metric(example, made) < 1
    for field in ("anwser", "reasoning"):
        with pytest.raises(
            DataError, match="no field to compare: .*; expected a field of .*; name it"
        ):
            metric({"answer": "4"}, made, field=field)
    with pytest.raises(DataError, match="no field to compare"):
        metric({"answer": "4"}, {"text": "4"})


# -- metrics on words and judges --


@pytest.mark.parametrize(
    ("expected", "made", "score"),
    [
        ("Paris", "It is paris!", 1.0),
        ("aris", "Paris", 0.0),
        ("new york", "New, York", 1.0),
        (4, "There are 4.", 1.0),
        (4, "There are 44.", 0.0),
        ("the end", "End", 1.0),
    ],
)
def test_contains(expected, made, score):
    assert lmopt.contains({"a": expected}, {"a": made}) == score
    with pytest.raises(DataError, match="no field to compare"):
        lmopt.contains({"a": "x"}, {"b": "x"})


def test_passage_match():
    passages = ["Rome is old.", "The capital is New York!"]
    for wanted, score in (("new york", 1.0), (["Paris", "rome"], 1.0), ("York is", 0.0), ([], 0.0)):
        assert lmopt.passage_match({"answer": wanted}, {"context": passages}) == score
    assert lmopt.passage_match({"x": "old"}, {"y": passages}, field="x", context="y") == 1.0
    with pytest.raises(DataError, match="no field to compare: 'context'; expected one of answer"):
        lmopt.passage_match({"answer": "x"}, {"answer": "x"})


EXAMPLE = {"question": "Where?", "answer": "In Paris.", "context": ["Paris is in France."]}


def judges(lm):
    return {
        "judge": lmopt.judge(lm, "The answer is polite."),
        "semantic_f1": lmopt.semantic_f1(lm),
        "complete_and_grounded": lmopt.complete_and_grounded(lm),
    }


@pytest.mark.parametrize("name", ["judge", "semantic_f1", "complete_and_grounded"])
def test_a_judge_is_a_program_that_is_a_metric(name, golden):
    sent = []
    metric = judges(lambda request: sent.append(request) or lmopt.stub_lm()(request))[name]
    score = metric(EXAMPLE, Prediction(answer="Paris"))
    assert isinstance(score, Score) and score.value == (0.0 if name == "judge" else 1.0)
    texts = [f"{lmopt.transcript(one.messages)}\n" for one in sent]
    golden(f"metric_{name}.txt", "\n".join(texts))
    qa = lmopt.predict("question -> answer")
    result = evaluate(qa, [EXAMPLE] * 3, metric, lm=lmopt.stub_lm())
    assert result.score == score.value and result.rows[0].feedback == score.feedback
    changed = {path: evolve(one, instructions="NEW") for path, one in metric.params.items()}
    sent.clear()
    metric.with_params(changed)(EXAMPLE, Prediction(answer="Paris"))
    assert all("NEW" in request.messages[0].text for request in sent)


@pytest.mark.parametrize("name", ["judge", "semantic_f1", "complete_and_grounded"])
def test_a_judge_pickles_with_its_prompts_and_grades_the_same(name):
    metric = judges(stub_lm())[name]
    changed = {path: evolve(one, instructions="NEW") for path, one in metric.params.items()}
    metric = metric.with_params(changed)
    again = pickle.loads(pickle.dumps(metric))
    assert again.params == metric.params and again.program.max_calls == metric.program.max_calls
    made = Prediction(answer="Paris")
    assert again(EXAMPLE, made) == metric(EXAMPLE, made)
    assert asyncio.run(again.acall(EXAMPLE, made)) == metric(EXAMPLE, made)
    with pytest.raises(DataError, match=f"the argument 'lm' of {name} cannot be sent elsewhere"):
        pickle.dumps(judges(lambda request: lmopt.Response("5"))[name])


def test_a_judge_grades_from_one_to_five_and_says_why():
    lm = lmopt.scripted_lm([{"feedback": f"{n}", "grade": n} for n in range(1, 6)])
    polite = lmopt.judge(lm, "The answer is polite.")
    scores = [polite(EXAMPLE, {"answer": "x"}) for _ in range(5)]
    assert [one.value for one in scores] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert scores[2].feedback == "3"


@pytest.mark.parametrize(
    ("recall", "precision", "threshold", "score"),
    [(1, 0.5, None, 2 / 3), (0, 0, None, 0.0), (7, -1, None, 0.0), (2, 1, None, 1.0),
     (1, 0.5, 0.6, 1.0), (1, 0.5, 0.7, 0.0)],
)  # fmt: skip
def test_semantic_f1_is_the_harmonic_mean_of_shares(recall, precision, threshold, score):
    lm = lmopt.scripted_lm([{"reasoning": "", "recall": recall, "precision": precision}])
    metric = lmopt.semantic_f1(lm, threshold=threshold)
    assert metric(EXAMPLE, {"answer": "x"}).value == pytest.approx(score)


def test_what_the_caller_has_set_holds_in_every_thread():
    import contextvars

    span = contextvars.ContextVar("span", default="none")
    span.set("outer")
    seen = []

    def lm(request):
        seen.append(span.get())
        return knows_half(request)

    evaluate(qa, DATA, exact_match, lm=lm, workers=4)
    qa(lmopt.timeout(5)(lm), question="1?")
    list(lmopt.stream(qa, lm, {"question": "1?"}))
    assert set(seen) == {"outer"} and len(seen) == len(DATA) + 2


def test_a_judge_that_cannot_be_read_or_asked_is_an_error():
    with pytest.raises(lmopt.ParseError):
        lmopt.judge(lmopt.scripted_lm(["?"] * 3), "Polite.")(EXAMPLE, {"answer": "x"})
    with pytest.raises(DataError, match="no passages: 'context'"):
        lmopt.complete_and_grounded(lmopt.stub_lm())({"answer": "x"}, {"answer": "x"})
    down = lmopt.judge(lmopt.scripted_lm([lmopt.Unauthorized("no key")]), "Polite.")
    with pytest.raises(lmopt.Unauthorized):
        evaluate(lmopt.predict("question -> answer"), [EXAMPLE], down, lm=lmopt.stub_lm())


@pytest.mark.parametrize("what", ["lm", "tool", "metric"])
def test_a_function_that_stops_an_iteration_is_an_error_and_no_endless_wait(what):
    def stops(*args):
        return next(iter(()))

    @lmopt.program()
    def body(steps, a):
        yield lmopt.invoke(stops, a)
        return {"b": a}

    task = body if what == "tool" else predict("a -> b")
    lm, metric = (
        (stops if what == "lm" else stub_lm()),
        (stops if what == "metric" else exact_match),
    )

    async def main():
        evaluation = lmopt.aevaluate(task, [{"a": "x", "b": "X"}], metric, lm=lm)
        return await asyncio.wait_for(evaluation, 5)

    if what == "metric":
        with pytest.raises(lmopt.MetricError, match="StopIteration"):
            asyncio.run(main())
    elif what == "lm":
        with pytest.raises(RuntimeError, match="StopIteration"):
            asyncio.run(main())
    else:
        assert "StopIteration" in asyncio.run(main()).rows[0].error


@pytest.mark.parametrize("what", ["judge", "fallback", "two_step"])
def test_in_a_loop_every_lm_is_asked_as_often_at_once_as_it_likes(what):
    async def fast(request):
        return stub_lm()(request)

    async def down(request):
        raise lmopt.ContextWindowExceeded("too long")

    single, metric, lm, task = Crowd(stub_lm(), 1), exact_match, fast, predict("a -> b")
    if what == "judge":
        metric = lmopt.judge(single, "Right.")
    elif what == "fallback":
        lm = lmopt.fallback(single)(down)
    else:
        task = predict("a -> b", adapter=lmopt.two_step(single))
    data = [{"a": str(n), "b": "text"} for n in range(40)]
    asyncio.run(lmopt.aevaluate(task, data, metric, lm=lm))
    assert single.most == 1


def test_an_lm_that_is_no_function_is_asked_in_its_way_and_no_lm_is_an_error():
    class Awaited:
        async def acall(self, request):
            return stub_lm()(request)

    class InBatches:
        def batch(self, requests):
            return [stub_lm()(one) for one in requests]

    task, data = predict("a -> b"), [{"a": "x", "b": "text"}]
    for lm in (Awaited(), InBatches()):
        assert evaluate(task, data, exact_match, lm=lm).score == 1.0
        assert asyncio.run(lmopt.aevaluate(task, data, exact_match, lm=lm)).score == 1.0
        assert task(lm, a="x").b == "text"
    with pytest.raises(
        DataError, match="this is no LM: 'openai/gpt-4o'; expected a function.*; .*connect"
    ):
        evaluate(task, data, exact_match, lm="openai/gpt-4o")


def fails_at(letter, status):
    """An LM that cannot be asked about one text."""

    def lm(request):
        if letter in request.inputs.text:
            raise lmopt.LMError("no", status=status)
        return lmopt.stub_lm()(request)

    return lm


COUNTED = [{"text": text, "n": 1} for text in "abcd"]


def test_a_request_that_the_provider_refuses_costs_its_row_and_no_more():
    made = evaluate(predict("text -> n: int"), COUNTED, exact_match, lm=fails_at("b", 400))
    assert [row.score for row in made.rows] == [1, 0, 1, 1]
    assert made.rows[1].error == "LMError: no"


def test_an_error_that_ends_an_evaluation_carries_its_rows():
    with pytest.raises(lmopt.LMError) as caught:
        evaluate(predict("text -> n: int"), COUNTED, exact_match, lm=fails_at("c", 500))
    assert [row.score for row in caught.value.rows] == [1, 1]


def test_an_error_that_ends_a_run_carries_its_trace():
    with pytest.raises(lmopt.LMError) as caught:
        predict("text -> n: int")(fails_at("a", 500), text="a")
    assert [(event.kind, event.error) for event in caught.value.trace] == [
        ("lm", "LMError: no"),
        ("step", "LMError: no"),
    ]


def test_only_the_inputs_and_outputs_of_a_program_are_read_as_its_types():
    two = lmopt.pipeline(first=predict("text -> n: int"), second=predict("n: int -> ok: bool"))
    inner = lmopt.program({"two": two}, inputs=two.inputs, outputs=["ok"])(_through)
    (row,) = lmopt.check_dataset(inner, [{"text": "a", "n": "many", "ok": "yes"}])
    assert row == {"text": "a", "n": "many", "ok": True}
    with pytest.raises(lmopt.DataError, match="example 0: the field 'n' cannot be read"):
        lmopt.check_dataset(two, [{"text": "a", "n": "many", "ok": "yes"}])


def _through(steps, text):
    return (yield steps.two(text=text))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_shows_how_far_how_fast_and_how_good(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(lmopt.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    made = evaluate(qa, DATA, exact_match, lm=knows_half)
    drawn = lmopt.sys.stderr.getvalue().split("\r\x1b[K")
    assert drawn[1].startswith("evaluate: 1 of 20, ") and drawn[-1] == ""  # it is wiped out
    low, high = made.interval
    assert drawn[-2].endswith(f", score 0.500 ({low:.3f} to {high:.3f})")
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    assert evaluate(qa, DATA, exact_match, lm=knows_half) == made
    assert max(map(len, lmopt.sys.stderr.getvalue().split("\r\x1b[K"))) == 19
    monkeypatch.setattr("sys.stderr", Terminal())
    assert evaluate(qa, DATA, exact_match, lm=knows_half, progress=False) == made
    assert lmopt.sys.stderr.getvalue() == ""


def test_progress_is_silent_elsewhere_and_wiped_out_when_it_ends_early(monkeypatch, capsys):
    evaluate(qa, DATA, exact_match, lm=knows_half)
    assert capsys.readouterr() == ("", "")
    clock = iter(range(1000))
    monkeypatch.setattr(lmopt.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr", Terminal())
    bar = lmopt.meter(iter("abc"), total=3, desc="x")
    assert [next(bar), next(bar)] == ["a", "b"]
    bar.close()
    assert lmopt.sys.stderr.getvalue().endswith("\r\x1b[K")
    monkeypatch.setattr("sys.stderr", None)  # as under pythonw
    assert evaluate(qa, DATA, exact_match, lm=knows_half).score == 0.5


def test_in_a_notebook_failed_rows_are_marked_and_long_texts_open_on_a_click():
    lm = mock_lm(lambda inputs: "1" in inputs.question and {"answer": "x" * 300})
    page = evaluate(qa, DATA[:2], exact_match, lm=lm)._repr_html_()
    assert (
        page.count('<tr style="background') == 1 and "ParseError" in page
    ) or "DataError" in page
    assert "<details>" in page and "x" * 300 in page
    many = Evaluation(tuple(Row(Record(n=n), Prediction(), 1.0) for n in range(103)))
    assert "and 3 more rows" in many._repr_html_()


def test_an_empty_cell_stays_empty_and_is_no_value_of_another_type():
    task = predict("text, size: int | None -> when: date, n: int", types={"date": lmopt.date})
    row = {"text": "", "size": "", "when": "", "n": ""}
    assert lmopt.check_dataset(task, [row]) == (Record(row),)


def test_a_history_in_a_row_is_one_wherever_it_is_seen():
    seen = []
    task = predict("message, history: History -> answer")
    lm = mock_lm(lambda inputs: seen.append(inputs.history) or {"answer": "x"})
    turns = [{"message": "a", "answer": "b"}]
    evaluate(task, [{"message": "c", "history": turns, "answer": "x"}], exact_match, lm=lm)
    assert seen == [lmopt.History(turns)] and seen[0].turns[0].answer == "b"


def test_scores_that_differ_by_rounding_only_are_equal():
    thirds = [0.1, 0.2, 0.3]
    pair = graded([sum(thirds) / 3] * 20), graded([sum(reversed(thirds)) / 3] * 20)
    made = compare(*pair)
    assert (made.p_value, made.better, made.worse, made.difference) == (1.0, 0, 0, 0.0)
    with pytest.raises(DataError, match="no rows to compare"):
        compare(Evaluation(()), Evaluation(()))


@pytest.mark.parametrize("stream", [object(), None])
def test_progress_needs_no_more_of_standard_error_than_there_is(monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream)
    assert evaluate(qa, DATA[:4], exact_match, lm=knows_half).score == 0.5
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    assert evaluate(qa, DATA[:4], exact_match, lm=knows_half).score == 0.5


def test_watch_is_called_in_this_process_only_and_is_a_function():
    with ThreadPoolExecutor(1) as pool:
        for run in (
            lambda **o: evaluate(qa, DATA[:2], exact_match, lm=knows_half, **o),
            lambda **o: lmopt.run_many(qa, knows_half, [{"question": "1?"}], **o),
            lambda **o: asyncio.run(aevaluate(qa, DATA[:2], exact_match, lm=knows_half, **o)),
        ):
            with pytest.raises(DataError, match="other processes cannot call this"):
                run(executor=pool, watch=print)
            with pytest.raises(DataError, match="this watches nothing: 5"):
                run(watch=5)
