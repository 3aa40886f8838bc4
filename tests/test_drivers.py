"""Drivers: the same bodies, whatever performs the effects; order, traces and failures."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import lmopt
from lmopt import (
    DataError,
    Message,
    Request,
    Response,
    Sleep,
    invoke,
    mock_lm,
    predict,
    program,
    run,
    run_many,
    stub_lm,
)

upper = mock_lm(lambda inputs: {"b": inputs.a.upper()})


@program(x=predict("a -> b"), y=predict("a -> b"))
def both(steps, a):
    x, y, n = yield steps.x(a=a), steps.y(a=a * 2), invoke(len, a)
    (z,) = yield [steps.x(a=y.b.lower())]
    yield ()
    yield Sleep(0)
    raw = yield Request([Message("user", "bare")])
    return {"x": x.b, "y": y.b, "n": n, "z": z.b, "raw": raw.text}


def lm(request):
    return upper(request) if request.inputs else Response("bare")


def test_effects_yielded_together_come_back_in_order_for_any_number_of_workers():
    results = [run(both, lm, {"a": "hi"}, workers=workers) for workers in (1, 2, 16)]
    for result in results:
        assert result == {"x": "HI", "y": "HIHI", "n": 2, "z": "HIHI", "raw": "bare"}
        assert result.trace == results[0].trace
        assert [(e.path, e.kind, e.parent) for e in result.trace] == [
            ("x", "lm", "x"),
            ("x", "step", ""),
            ("y", "lm", "y"),
            ("y", "step", ""),
            ("len", "call", ""),
            ("x", "lm", "x"),
            ("x", "step", ""),
            ("", "lm", ""),
            ("", "step", ""),
        ]


def test_effects_yielded_together_are_performed_together():
    meet = threading.Barrier(2, timeout=10)

    def waits(request):
        meet.wait()
        return upper(request)

    @program(x=predict("a -> b"), y=predict("a -> b"))
    def pair(steps, a):
        x, y = yield steps.x(a=a), steps.y(a=a)
        return {"b": x.b + y.b}

    assert run(pair, waits, {"a": "a"}, workers=2).b == "AA"


def test_of_effects_yielded_together_the_first_error_in_order_is_raised_after_all_are_done():
    done = []

    def fails(n):
        done.append(n)
        raise ValueError(n)

    @program()
    def body(steps, a):
        try:
            yield invoke(fails, 1), invoke(done.append, 2), invoke(fails, 3)
        except ValueError as error:
            return {"error": error.args[0]}

    prediction = body(stub_lm(), a=1)
    assert prediction.error == 1 and sorted(done) == [1, 2, 3]
    assert [event.error for event in prediction.trace] == ["ValueError: 1", "", "ValueError: 3", ""]


def test_a_trace_holds_what_went_in_and_came_out():
    trace = both(lm, a="hi").trace
    assert trace[0].request.step == "x" and trace[0].response.text.startswith("[[ ## b ## ]]\nHI")
    assert trace[1].inputs == {"a": "hi"} and trace[1].outputs == {"b": "HI"}
    assert trace[4].inputs == {"args": ("hi",), "kwargs": {}} and trace[4].outputs == 2
    assert all(event.seconds >= 0 for event in trace)


def test_a_prediction_of_a_step_has_the_trace_of_that_step():
    seen = []

    @program(x=predict("a -> b"))
    def body(steps, a):
        yield invoke(len, a)
        x = yield steps.x(a=a)
        seen.append(x.trace)
        return x

    assert [event.kind for event in body(lm, a="hi").trace] == ["call", "lm", "step", "step"]
    assert [event.kind for event in seen[0]] == ["lm", "step"]


def test_an_lm_that_returns_a_text_is_told_what_to_return():
    with pytest.raises(
        DataError, match=r"returned no response: 'Paris'; expected .*; return Response\('Paris'\)"
    ):
        predict("q -> a")(lambda request: "Paris", q="?")


def test_params_instead_of_its_own():
    sent = []
    run(
        predict("a -> b"),
        lambda r: sent.append(r) or lm(r),
        {"a": "x"},
        params={"predict": lmopt.Prompt("NEW")},
    )
    assert "NEW" in sent[0].messages[0].content


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_many_runs_come_back_in_order(workers):
    gate = threading.Event()

    def uneven(request):  # the first run ends last, wherever there is a second thread
        if request.inputs.a == "0" and workers > 1:
            assert gate.wait(10)
        gate.set()
        return upper(request)

    inputs = [{"a": str(n)} for n in range(200)]
    assert [p.b for p in run_many(predict("a -> b"), uneven, inputs, workers=workers)] == [
        str(n) for n in range(200)
    ]


def test_an_lm_may_declare_how_many_calls_it_likes_at_once():
    class Parallel:
        concurrency = 3
        meet = threading.Barrier(3, timeout=10)

        def __call__(self, request):
            self.meet.wait()
            return upper(request)

    assert len(run_many(predict("a -> b"), Parallel(), [{"a": "x"}] * 9)) == 9


def test_any_executor_will_do():
    with ThreadPoolExecutor(2) as pool:
        made = run_many(predict("a -> b"), lm, [{"a": "x"}, {"a": "y"}], executor=pool)
        assert [one.b for one in made] == ["X", "Y"]
        assert pool.submit(len, "ab").result() == 2  # it is still open


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_error_stops_what_has_not_begun(workers):
    asked = []

    def breaks(request):
        asked.append(request.inputs.a)
        if request.inputs.a == "3":
            raise lmopt.Unauthorized("no", status=401)
        return upper(request)

    with pytest.raises(lmopt.Unauthorized):
        run_many(predict("a -> b"), breaks, [{"a": str(n)} for n in range(1000)], workers=workers)
    assert len(asked) < 900


def test_ctrl_c_is_not_swallowed_and_does_not_wait():
    hold = threading.Event()

    def interrupted(request):
        if request.inputs.a == "0":
            raise KeyboardInterrupt
        hold.wait(10)
        return upper(request)

    with pytest.raises(KeyboardInterrupt):
        run_many(predict("a -> b"), interrupted, [{"a": str(n)} for n in range(4)], workers=4)
    hold.set()


def test_inputs_are_checked_before_the_first_call():
    with pytest.raises(DataError, match="missing field 'a'"):
        run_many(predict("a -> b"), lambda request: pytest.fail("asked"), [{"a": 1}, {}])
    with pytest.raises(DataError, match="no workers: 0; expected 1 or more; leave"):
        run_many(predict("a -> b"), lm, [{"a": 1}], workers=0)
    assert run_many(predict("a -> b"), lm, []) == []
