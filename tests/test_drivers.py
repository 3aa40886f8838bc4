"""Drivers: the same bodies, whatever performs the effects; order, traces and failures."""

import asyncio
import gc
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import programs
import pytest
import wire
from programs import PROGRAMS, Crowd, answer, together

import lmopt
from lmopt import (
    Chunk,
    DataError,
    Event,
    Message,
    Prediction,
    ReplayMiss,
    Request,
    Response,
    Sleep,
    adrive,
    aemit,
    arun,
    astream,
    drive,
    emit,
    gathered,
    invoke,
    mock_lm,
    predict,
    program,
    replay,
    run,
    run_many,
    stream,
    stub_lm,
    through,
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
    with pytest.raises(DataError, match="no workers: 0; expected a whole number, 1 or more; leave"):
        run_many(predict("a -> b"), lm, [{"a": 1}], workers=0)
    assert run_many(predict("a -> b"), lm, []) == []


class Batched:
    """An LM that answers in batches, and counts them."""

    def __init__(self, function):
        self.function, self.batches = function, []

    def batch(self, requests):
        self.batches.append(len(requests))
        return [attempt(self.function, request) for request in requests]


def attempt(function, request):
    try:
        return function(request)
    except Exception as error:
        return error


async def awaited(request):
    """An LM that is an `async def`."""
    await asyncio.sleep(0)
    return answer(request)


def by_hand(task, inputs):
    """Perform the effects of the flow of leaf effects with nothing of the drivers."""

    def finish(flow):
        outcome, error = None, None
        while True:
            try:
                effect = flow.send(outcome) if error is None else flow.throw(error)
            except StopIteration as end:
                return end.value
            outcome, error = None, None
            try:
                outcome = perform(effect)
            except Exception as failure:
                error = failure

    def perform(effect):
        if isinstance(effect, tuple):
            return tuple(finish(one) for one in effect)
        if isinstance(effect, Request):
            return answer(effect)
        if isinstance(effect, Sleep):
            return None
        return effect.function(*effect.args, **effect.kwargs)

    return finish(lmopt.running(task, lmopt.check_inputs(task, inputs)))


def from_json(trace):
    return lmopt.coerce(tuple[Event, ...], json.loads(lmopt.canonical(trace)))


def last_of(items):
    return list(items)[-1]


DRIVERS = {
    "by hand": by_hand,
    "threads": lambda task, inputs: run(task, answer, inputs, workers=4),
    "loop": lambda task, inputs: asyncio.run(arun(task, answer, inputs)),
    "loop, async LM": lambda task, inputs: asyncio.run(arun(task, awaited, inputs)),
    "stream": lambda task, inputs: last_of(stream(task, answer, inputs)),
    "replay": lambda task, inputs: replay(task, run(task, answer, inputs).trace),
    "replay from JSON": lambda task, inputs: replay(
        task, from_json(run(task, answer, inputs).trace)
    ),
    "many": lambda task, inputs: run_many(task, answer, [inputs] * 3, workers=2)[2],
    "lock-step": lambda task, inputs: run_many(task, Batched(answer), [inputs] * 3)[2],
    "layers": lambda task, inputs: task(lmopt.log(print)(lmopt.retry()(answer)), **inputs),
    "layers, lock-step": lambda task, inputs: run_many(
        task, lmopt.cache({})(lmopt.retry()(Batched(answer))), [inputs] * 3
    )[2],
    "layers, loop": lambda task, inputs: asyncio.run(
        arun(task, lmopt.cache({})(lmopt.retry()(awaited)), inputs)
    ),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_does_the_same_under_every_driver(name, driver):
    task, inputs = PROGRAMS[name]
    expected = run(task, answer, inputs)
    made = DRIVERS[driver](task, inputs)
    assert made == expected and type(made) is Prediction
    if driver == "replay from JSON":  # where what a call returned is plain data
        assert lmopt.canonical(made.trace) == lmopt.canonical(expected.trace)
    else:
        assert made.trace == expected.trace


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_replay_uses_no_tool(name, monkeypatch):
    task, inputs = PROGRAMS[name]
    expected = run(task, answer, inputs)

    def forbidden():
        raise AssertionError("a tool was used")

    monkeypatch.setattr(programs, "used", forbidden)
    assert replay(task, expected.trace).trace == expected.trace
    assert replay(task, from_json(expected.trace)) == expected


@pytest.mark.slow
def test_every_program_runs_in_other_processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for task, inputs in PROGRAMS.values():
            made = run_many(task, answer, [inputs] * 2, executor=pool)
            expected = run(task, answer, inputs)
            assert made == [expected] * 2 and made[1].trace == expected.trace


def counted(asked, request):
    asked.append(request)
    return answer(request)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_replay_goes_on_live_after_any_event(name):
    task, inputs = PROGRAMS[name]
    expected = run(task, answer, inputs)
    for k in range(len(expected.trace) + 1):
        asked = []
        live = partial(counted, asked)
        made = replay(task, expected.trace, live, upto=k)
        assert made == expected and made.trace == expected.trace
        left = [event for event in expected.trace[k:] if event.kind == "lm"]
        own = [event for event in left if not (event.request.inputs or {}).get("text")]
        assert len(asked) == len(own)  # the second call of two_step goes to another LM


def test_a_replay_calls_no_tool_and_waits_for_nothing():
    calls, naps = [], [0]

    @program(x=predict("a -> b"))
    def body(steps, a):
        yield Sleep(naps[0])
        calls.append((yield invoke(calls.append, a)))
        return (yield steps.x(a=a))

    trace = run(body, answer, {"a": "hi"}).trace
    before, naps[0] = len(calls), 3600
    assert replay(body, trace).b == "text"
    assert len(calls) == before + 1  # what the body itself does, not the tool


def test_a_replay_of_another_program_says_what_it_does_differently():
    task = predict("q -> a")
    trace = run(task, answer, {"q": "2+2?"}).trace
    other = predict("q -> a", instructions="Answer briefly.")
    with pytest.raises(ReplayMiss, match="something else than its trace: .*briefly.*; expected "):
        replay(other, trace)
    with pytest.raises(ReplayMiss, match="something else"):
        replay(program()(lambda steps, q: (yield invoke(len, q))), trace)
    shorter = program()(lambda steps, q: {"a": (yield ()) and ""})
    with pytest.raises(ReplayMiss, match="ended before its trace: 'lm at predict'"):
        replay(shorter, trace)
    with pytest.raises(ReplayMiss, match="pass the LM to go on with"):
        replay(task, trace, upto=0)
    with pytest.raises(DataError, match="no trace of a run: .*prediction.trace"):
        replay(task, trace[:1])


def test_a_replayed_error_is_of_its_class_and_says_the_same():
    class Strange(Exception):
        pass

    raised = [KeyError("x"), UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), Strange("s: t")]

    def tool(n):
        raise raised[n]

    @program()
    def body(steps, n):
        try:
            yield invoke(tool, n)
        except LookupError as error:
            return {"found": "lookup", "text": str(error)}
        except UnicodeError as error:
            return {"found": "unicode", "text": str(error)}
        except Exception as error:
            return {"found": type(error).__name__, "text": str(error)}

    for n, error in enumerate(raised):
        before = body(answer, n=n)
        assert replay(body, from_json(before.trace)) == before and before.text == str(error)


def test_an_event_loop_goes_on_while_a_plain_lm_thinks():
    thinking, moved = threading.Event(), threading.Event()

    def slow(request):
        thinking.set()
        assert moved.wait(10)
        return answer(request)

    async def main():
        task = asyncio.create_task(arun(predict("q -> a"), slow, {"q": "?"}))
        while not thinking.is_set():
            await asyncio.sleep(0)
        moved.set()
        return await task

    assert asyncio.run(main()).a == "text"


def test_in_a_loop_tools_may_be_asynchronous_and_requests_go_out_together_up_to_a_limit():
    async def tool(text):
        await asyncio.sleep(0)
        return text.upper()

    crowd = Crowd(answer, 3)

    @program(x=predict("a -> b"), max_calls=9)
    def body(steps, a):
        made = yield [steps.x(a=a) for _ in range(9)]
        return {"b": (yield invoke(tool, a)), "n": len(made)}

    assert asyncio.run(arun(body, crowd, {"a": "hi"})) == {"b": "HI", "n": 9}
    assert crowd.most == 3
    assert run(body, awaited, {"a": "hi"}) == {"b": "HI", "n": 9}

    async def wrong():
        with pytest.raises(DataError, match="asynchronous function in a synchronous run.*arun"):
            run(body, answer, {"a": "hi"})
        with pytest.raises(DataError, match="in an event loop: 'the LM'; expected a plain one"):
            run(predict("q -> a"), awaited, {"q": "?"})

    asyncio.run(wrong())


@program()
def bare(steps, a):
    yield Request([Message("user", a)])
    return {"b": a}


def held():
    """How many threads, open files and event loops there are now."""
    gc.collect()
    loops = [one for one in gc.get_objects() if issubclass(type(one), asyncio.AbstractEventLoop)]
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir())), len(loops)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing tells of open files here")
def test_ten_thousand_calls_of_an_async_lm_leak_nothing():
    asked = []

    async def counts(request):
        asked.append(len(asked))
        return Response("x")

    data, before = [{"a": "x", "b": "x"}] * 10_000, held()
    done = lmopt.evaluate(bare, data, lmopt.exact_match, lm=counts, workers=4)
    assert done.score == 1.0 and len(asked) == 10_000
    assert all(now <= then for now, then in zip(held(), before, strict=True))


@pytest.mark.parametrize("workers", [1, 4])
def test_an_async_lm_and_async_tools_are_awaited_on_every_worker(workers):
    async def length(text):
        await asyncio.sleep(0)
        return len(text)

    @program(x=predict("a -> b"))
    def body(steps, a):
        x, n = yield steps.x(a=a), invoke(length, a)
        return {"b": x.b, "n": n}

    async def shouts(request):
        await asyncio.sleep(0)
        return upper(request)

    inputs = [{"a": "x" * n} for n in range(1, 20)]
    made = run_many(body, shouts, inputs, workers=workers)
    assert made == [{"b": "X" * n, "n": n} for n in range(1, 20)]
    assert run(body, shouts, inputs[0], workers=workers) == made[0]
    layered = lmopt.log(len)(lmopt.timeout(60)(lmopt.cache({})(shouts)))
    assert run_many(body, layered, inputs, workers=workers) == made
    with ThreadPoolExecutor(workers) as pool:
        assert run_many(body, shouts, inputs, executor=pool) == made


def test_a_tool_of_an_mcp_session_is_awaited_in_its_loop():
    async def call(name, arguments):
        await asyncio.sleep(0)
        return f"{name} {arguments['word']}"

    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    tool = lmopt.Tool.from_mcp({"name": "look", "inputSchema": schema}, call)
    acts = [
        {"thought": "", "tool": "look", "arguments": {"word": "tea"}},
        {"thought": "", "tool": "finish", "arguments": {}},
        {"reasoning": "", "a": "x"},
    ]
    agent = lmopt.react("q -> a", [tool])
    made = asyncio.run(arun(agent, lmopt.scripted_lm(acts), {"q": "?"}))
    assert made.trajectory[0].observation == "look tea"
    assert run(agent, lmopt.scripted_lm(acts), {"q": "?"}) == made


def test_a_cancelled_run_leaves_no_task_behind():
    ended = []

    class Waiting:
        concurrency = 9

        async def acall(self, request):
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(request)

    @program(x=predict("a -> b"), max_calls=3)
    def body(steps, a):
        try:
            yield [steps.x(a=a) for _ in range(3)]
        finally:
            ended.append("body")

    async def main():
        task = asyncio.create_task(arun(body, lmopt.cache({})(Waiting()), {"a": "hi"}))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()
    assert len(ended) == 2 and ended[-1] == "body"  # equal requests at once were one


def test_in_lock_step_requests_go_out_in_batches():
    lm = Batched(answer)
    run_many(together, lm, [{"a": "hi"}] * 5)
    assert lm.batches == [10, 5, 5, 5]
    done = lmopt.evaluate(predict("q -> a"), [{"q": str(n), "a": "text"} for n in range(7)],
                          lmopt.exact_match, lm=lm)  # fmt: skip
    assert lm.batches[4:] == [7] and done.score == 1.0


def test_in_lock_step_effects_together_and_flows_that_are_gathered_are_one_batch():
    lm = Batched(loud)

    @program(max_calls=9)
    def body(steps, a):
        one, two = yield Request([Message("user", "one")]), Request([Message("user", "two")])
        many = yield [asked(text) for text in a]
        last = yield [Request([Message("user", text)]) for text in many]
        return {"one": one.text, "two": two.text, "last": "".join(one.text for one in last)}

    made = run(body, lm, {"a": "abc"})
    assert made == {"one": "ONE", "two": "TWO", "last": "ABC"} and lm.batches == [2, 3, 3]
    lm.batches.clear()
    assert run_many(body, lm, [{"a": "abc"}, {"a": ""}, {"a": "abc"}]) == [
        made, {**made, "last": ""}, made
    ]  # fmt: skip
    assert lm.batches == [6, 6, 6]

    def both():
        return (yield gathered(asked, "abc", lm), gathered(asked, "de", lm), asked("f"))

    lm.batches.clear()
    assert drive(both(), lm) == (["A", "B", "C"], ["D", "E"], "F") and lm.batches == [6]
    lm.batches.clear()
    layered = lmopt.cache({})(lm)
    assert drive(gathered(asked, "aab", layered), None) == ["A", "A", "B"] and lm.batches == [2]


def test_in_lock_step_an_error_is_that_of_its_own_run():
    def picky(request):
        if request.inputs.q == "3":
            raise lmopt.LMError("no")
        return answer(request)

    with pytest.raises(lmopt.LMError, match="no"):
        run_many(predict("q -> a"), Batched(picky), [{"q": str(n)} for n in range(5)])
    lm = lmopt.fallback(stub_lm(), when=lambda error: True)(Batched(picky))
    assert len(run_many(predict("q -> a"), lm, [{"q": str(n)} for n in range(5)])) == 5

    class Short(Batched):
        def batch(self, requests):
            return super().batch(requests)[1:]

    with pytest.raises(DataError, match="a batch of another size: 1; expected 2 answers"):
        run_many(predict("q -> a"), Short(answer), [{"q": "1"}, {"q": "2"}])


def test_in_lock_step_sleepers_wait_together():
    slept = []

    @program(x=predict("a -> b"))
    def body(steps, a):
        yield Sleep(0.01)
        slept.append(a)
        return (yield steps.x(a=a))

    lm = Batched(answer)
    run_many(body, lm, [{"a": str(n)} for n in range(20)])
    assert lm.batches == [20] and slept == [str(n) for n in range(20)]


def talkative(sent, ended, request):
    """Stream a million pieces; tell what was sent, and that it has ended."""
    try:
        for n in range(10**6):
            request.on_text(f"{n}\n" if n else "[[ ## a ## ]]\n0\n")
            sent.append(n)
    finally:
        ended.set()


def test_who_stops_a_stream_early_stops_the_run():
    sent, ended = [], threading.Event()
    chunks = stream(predict("q -> a"), partial(talkative, sent, ended), {"q": "?"})
    assert next(chunks).field == "a"
    chunks.close()
    assert ended.wait(10) and len(sent) < 10**6


def test_a_stream_raises_what_the_run_raises_and_checks_inputs_at_once():
    with pytest.raises(DataError, match="unknown field"):
        stream(predict("q -> a"), answer, {"wrong": "?"})
    with pytest.raises(lmopt.ContextWindowExceeded):
        list(stream(predict("q -> a"), answer, {"q": "break"}))


def spelled(request):
    """The answer of `answer`, one character after the other."""
    response = answer(request)
    for character in response.text if request.on_text else "":
        request.on_text(character)
    return response


async def spelled_awaited(request):
    await asyncio.sleep(0)
    return spelled(request)


def joined(chunks):
    """The texts of the chunks of a stream, and what came at its end.

    Of runs at once, whose answers are counted as they begin, it matters not which was first.
    """
    *pieces, end = chunks
    texts = {}
    for one in pieces:
        place = (one.path, one.field, one.call)
        texts[place] = texts.get(place, "") + one.text
    return sorted((path, field, text) for (path, field, _), text in texts.items()), end, end.trace


@pytest.mark.parametrize("lm", [answer, spelled, spelled_awaited])
def test_a_stream_in_a_loop_gives_what_a_stream_gives(lm):
    async def main():
        for task, inputs in PROGRAMS.values():
            made = joined([one async for one in astream(task, lm, inputs)])
            assert made == joined(list(stream(task, answer, inputs)))

    asyncio.run(main())


TAGS = [[], [""], ["a"], ["a"], ["a"], ["a", ""], ["a", "é"], ["a", "é"], ["a", "é\n"],
        ["a", "é\n"], ["a", "é\n"]]  # fmt: skip
BOX = [{}, {}, {}, {}, {}, {}, {}, {"x": 12}]
VALUES = {
    # At a bracket or a backslash, a marker may begin.
    "chat": (lmopt.chat, [*TAGS[1:7], *TAGS[8:]], BOX),
    "json": (lmopt.json, [*TAGS[:7], *TAGS[8:]], BOX),  # a whole token at once
    "xml": (lmopt.xml, TAGS, BOX),
    "plain": (lmopt.plain, [*TAGS[1:7], *TAGS[8:]], BOX),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_chunk_of_a_list_or_an_object_has_what_there_is_of_it_so_far(name):
    adapter, tags, box = VALUES[name]
    task = predict("q -> tags: list[str], box: dict[str, int], last", adapter=adapter)
    outputs = {"tags": ["a", "é\n"], "box": {"x": 12}, "last": "<b>"}
    reply = lmopt.render_outputs(adapter, task.signature, outputs)

    def spells(request):
        for character in reply:
            request.on_text(character)
        return Response(reply)

    *chunks, end = stream(task, spells, {"q": "?"})
    assert end == outputs and {one.call for one in chunks} == {0}
    assert [one.value for one in chunks if one.field == "tags"] == tags
    assert [one.value for one in chunks if one.field == "box"] == box
    assert {one.value for one in chunks if one.field == "last"} == {None}
    texts = {n: "".join(one.text for one in chunks if one.field == n) for n in outputs}
    assert texts == {"tags": '["a", "é\\n"]', "box": '{"x": 12}', "last": "<b>"}
    whole = list(stream(task, lambda request: Response(reply), {"q": "?"}))
    assert [one.value for one in whole[:-1]] == [["a", "é\n"], {"x": 12}, None]


@pytest.mark.parametrize(
    ("streamed", "reply"),
    [
        ('Like {"a": "x"}:\n```json\n{"a": "y"}\n```',) * 2,
        ('{"a": "x', '{"a": "y"}'),
    ],
)
def test_what_was_told_and_turns_out_to_be_none_starts_over(streamed, reply):
    def spells(request):
        for character in streamed:
            request.on_text(character)
        return Response(reply)

    *chunks, end = stream(predict("q -> a", adapter=lmopt.json), spells, {"q": "?"})
    assert [(one.text, one.call) for one in chunks] == [("x", 0), ("y", 1)] and end.a == "y"


def test_who_stops_a_stream_in_a_loop_early_stops_the_run():
    sent, cancelled, ended = [], [], threading.Event()

    async def patient(request):
        try:
            request.on_text("[[ ## a ## ]]\n0\n")
            await asyncio.sleep(3600)
        finally:
            cancelled.append(request)

    async def main():
        for lm in (partial(talkative, sent, ended), patient):
            chunks = astream(predict("q -> a"), lm, {"q": "?"})
            assert (await anext(chunks)).field == "a"
            await chunks.aclose()

    asyncio.run(main())
    assert ended.wait(10) and len(sent) < 10**6 and len(cancelled) == 1


def test_a_stream_in_a_loop_raises_what_the_run_raises():
    async def pieces(inputs):
        return [one async for one in astream(predict("q -> a"), spelled, inputs)]

    with pytest.raises(DataError, match="unknown field"):
        asyncio.run(pieces({"wrong": "?"}))
    with pytest.raises(lmopt.ContextWindowExceeded):
        asyncio.run(pieces({"q": "break"}))


# -- flows of one's own --


def loud(request):
    if request.messages[-1].text == "break":
        raise lmopt.ContextWindowExceeded("too long")
    return Response(request.messages[-1].text.upper())


async def loud_awaited(request):
    await asyncio.sleep(0)
    return loud(request)


def asked(text):
    """A flow of one request."""
    return (yield Request([Message("user", text)])).text


class Loud(Batched):
    def __call__(self, request):
        return self.function(request)


WAYS = [
    lambda flow: drive(flow, loud),
    lambda flow: drive(flow, loud, workers=4),
    lambda flow: drive(flow, Loud(loud)),
    lambda flow: drive(flow, lmopt.retry()(loud)),
    lambda flow: drive(flow, loud_awaited),
    lambda flow: drive(flow, loud_awaited, workers=4),
    lambda flow: asyncio.run(adrive(flow, loud)),
    lambda flow: asyncio.run(adrive(flow, loud_awaited)),
]


def test_any_flow_of_effects_can_be_driven():
    def flow():
        one = yield Request([Message("user", "one")])
        two, three = yield asked("two"), asked("three")
        count = yield invoke(len, one.text)
        yield Sleep(0.0)
        nothing = yield ()
        many = yield from gathered(asked, ["four", "five"], loud)
        return one.text, two, three, count, nothing, many

    expected = ("ONE", "TWO", "THREE", 3, (), ["FOUR", "FIVE"])
    assert [act(flow()) for act in WAYS] == [expected] * len(WAYS)


def test_what_an_effect_raises_can_be_caught_where_it_is_yielded():
    def flow():
        caught = []
        try:
            yield Request([Message("user", "break")])
        except lmopt.ContextWindowExceeded as error:
            caught.append(str(error))
        try:
            yield invoke(int, "x")
        except ValueError:
            caught.append("no number")
        try:
            yield from gathered(asked, ["a", "break"], loud)
        except lmopt.ContextWindowExceeded as error:
            caught.append(str(error))
        return caught

    assert [act(flow()) for act in WAYS] == [["too long", "no number", "too long"]] * len(WAYS)


def test_a_flow_that_fails_is_closed_and_so_is_what_it_waits_for():
    closed = []

    def flow(text):
        try:
            return (yield from asked(text))
        finally:
            closed.append(text)

    for act in (
        lambda: drive(flow("break"), loud),
        lambda: asyncio.run(adrive(flow("break"), loud)),
        lambda: list(emit(flow("break"), Sleep, loud)),
        lambda: drive(gathered(flow, ["break"], loud), None),
        lambda: drive(gathered(flow, ["break"], Batched(loud)), None),
        lambda: asyncio.run(adrive(gathered(flow, ["break"], loud), None)),
    ):
        with pytest.raises(lmopt.ContextWindowExceeded, match="too long"):
            act()
        assert closed == ["break"]
        closed.clear()


def noting(asked):
    """A flow of notes, which are told while it goes on."""
    for n, text in enumerate(("one", "two", "break")):
        asked.append(text)
        made = yield Request([Message("user", text)])
        same = yield Sleep(n)
        assert same == Sleep(n)
        asked.append(made.text)


def test_emit_tells_of_the_effects_of_a_class_as_they_come_and_lets_what_is_wrong_through():
    def here(flow, lm, kind):
        yield from emit(flow, kind, lm)

    def there(flow, lm, kind):
        async def all_of(notes):
            async for one in aemit(flow, kind, lm):
                notes.append(one)

        notes = []
        try:
            asyncio.run(all_of(notes))
        finally:
            yield from notes

    for tell in (here, there):
        begun, seen = [], []
        notes = tell(noting(begun), loud, Sleep)
        assert begun == []
        with pytest.raises(lmopt.ContextWindowExceeded):
            seen.extend(notes)
        assert seen == [Sleep(0), Sleep(1)]
        assert begun == ["one", "ONE", "two", "TWO", "break"]


def test_who_stops_an_emit_early_closes_the_flow():
    ended = []

    def flow():
        try:
            yield from noting([])
        finally:
            ended.append(True)

    notes = emit(flow(), Sleep, loud)
    assert next(notes) == Sleep(0)
    notes.close()
    assert ended == [True]

    async def main():
        notes = aemit(flow(), Sleep, loud_awaited)
        assert await anext(notes) == Sleep(0)
        await notes.aclose()
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set() and ended == [True, True]


def test_an_emit_is_lazy():
    asked = []
    notes = emit(noting(asked), Sleep, loud)
    assert asked == []
    next(notes)
    assert asked == ["one"]
    next(notes)
    assert asked == ["one", "ONE", "two"]
    notes.close()


def test_through_has_each_effect_performed_by_another_flow():
    closed = []

    def twice(text):
        if text == "skip":
            return "skipped"
        try:
            return (yield text) + (yield text)
        finally:
            closed.append(text)

    def texts():
        try:
            one = yield "a"
            two = yield "skip"
            try:
                three = yield "b"
            except ValueError as error:
                three = str(error)
            return [one, two, three]
        finally:
            closed.append("flow")

    flow = through(texts(), twice)
    assert (next(flow), flow.send("1")) == ("a", "a")
    assert flow.send("2") == "b" and closed == ["a"]  # and "skip" yielded nothing
    with pytest.raises(StopIteration) as end:
        flow.throw(ValueError("none"))
    assert end.value.value == ["12", "skipped", "none"] and closed == ["a", "b", "flow"]
    flow = through(texts(), twice)
    next(flow)
    flow.close()
    assert closed[3:] == ["a", "flow"]
    with pytest.raises(ValueError, match="wrong"):
        flow = through(texts(), twice)
        next(flow)
        flow.throw(ValueError("wrong"))
    assert list(through(iter_of("ab"), iter_of)) == ["a", "b"]


def iter_of(texts):
    """A flow of each of these texts, that returns the last outcome."""
    outcome = None
    for text in texts:
        outcome = yield text
    return outcome


def test_gathered_flows_are_driven_lazily_and_their_first_error_in_order_is_raised():
    begun = []

    def picky(text):
        begun.append(text)
        yield from asked("break" if text in "37" else text)
        return text

    items = [str(n) for n in range(1000)]
    for act in (
        lambda: drive(gathered(picky, items, loud), None),
        lambda: drive(gathered(picky, items, loud), None, workers=4),
        lambda: asyncio.run(adrive(gathered(picky, items, loud), None)),
    ):
        with pytest.raises(lmopt.ContextWindowExceeded):
            act()
        assert begun[:4] == items[:4] and len(begun) < 500
        begun.clear()
    assert drive(gathered(picky, [], loud), None) == []
    assert asyncio.run(adrive(gathered(picky, [], loud), None)) == []


def test_a_stream_says_when_an_answer_starts_over():
    replies = iter(["[[ ## a ## ]]\nmaybe 4", "[[ ## a ## ]]\n4"])
    chunks = list(stream(predict("q -> a: int"), lambda r: Response(next(replies)), {"q": "?"}))
    assert chunks[:-1] == [Chunk("predict", "a", "maybe 4", 0), Chunk("predict", "a", "4", 1)]

    def broken(request):
        for piece in ("", "[[ ## a ## ]]\n1", "", "[[ ## a ## ]]\n2", "3"):
            request.on_text(piece)
        return Response("[[ ## a ## ]]\n234")

    chunks = list(stream(predict("q -> a: int"), broken, {"q": "?"}))
    assert [(c.text, c.call) for c in chunks[:-1]] == [("1", 0), ("2", 1), ("3", 1), ("4", 1)]


CTRL_C = """
import os, signal, sys, threading, time
import lmopt
done = threading.Event()
def lm(request):
    if request.inputs.q == "0":
        return lmopt.Response("[[ ## a ## ]]\\nfast")
    done.wait()  # never
task = lmopt.predict("q -> a")
kept = lmopt.record(sys.argv[1])(lm)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    lmopt.run_many(task, kept, [{"q": str(n)} for n in range(8)], workers=4)
except KeyboardInterrupt:
    print("stopped", len(open(sys.argv[1]).readlines()), flush=True)
    os.write(2, str(time.time()).encode())
"""


def test_ctrl_c_gives_back_control_at_once_and_keeps_what_is_done(tmp_path):
    code = [sys.executable, "-c", CTRL_C, str(tmp_path / "calls.jsonl")]
    ran = subprocess.run(code, capture_output=True, text=True, timeout=30, check=False)
    ended = time.time()
    assert ran.stdout == "stopped 1\n"  # and the process ends, with calls under way
    assert ended - float(ran.stderr) < 5


def test_ctrl_c_between_rows_does_not_wait_either():
    begun, never = threading.Event(), threading.Event()

    def lm(request):
        if request.inputs.q == "0":
            return answer(request)
        begun.set()
        never.wait()

    def progress(items, **_):
        yield next(iter(items))
        assert begun.wait(10)
        raise KeyboardInterrupt

    data = [{"q": str(n), "a": "text"} for n in range(9)]
    with pytest.raises(KeyboardInterrupt):
        lmopt.evaluate(
            predict("q -> a"), data, lmopt.exact_match, lm=lm, workers=2, progress=progress
        )
    never.set()


# -- what went wrong once --


@pytest.mark.parametrize("way", ["timeout", "effects together"])
def test_a_run_has_no_more_event_loops_at_once_than_threads(way):
    loops, most = set(), 0

    async def counts(request):
        nonlocal most
        loops.add(asyncio.get_running_loop())
        most = max(most, sum(not one.is_closed() for one in loops))
        return upper(request)

    @program(x=predict("a -> b"), max_calls=99)
    def often(steps, a):
        for _ in range(20):
            yield steps.x(a=a), steps.x(a=a)
        return {"b": a}

    if way == "timeout":
        run_many(predict("a -> b"), lmopt.timeout(60)(counts), [{"a": "x"}] * 50, workers=2)
    else:
        run(often, counts, {"a": "x"}, workers=2)
    assert most <= 4


def test_a_synchronous_run_in_a_loop_says_so_or_leaks_no_loop():
    async def main():
        with suppress(DataError):
            run_many(predict("a -> b"), loud_awaited_fields, [{"a": "x"}] * 8, workers=4)

    asyncio.run(main())
    gc.collect()  # a loop that was not closed is a warning, and a warning an error


async def loud_awaited_fields(request):
    await asyncio.sleep(0)
    return upper(request)


def test_in_lock_step_what_is_left_of_flows_that_failed_is_forgotten():
    def late(text):
        if text == "late":
            yield Sleep(0.01)
        return (yield from asked(text))

    def slow(text):
        made = yield from asked(text)
        yield Sleep(0.05)
        return made

    def flow(lm):
        with suppress(lmopt.ContextWindowExceeded):
            yield from gathered(late, ["break", "late"], lm)
        return (yield from gathered(slow, ["one", "two"], lm))

    def top(lm):
        return (yield flow(lm), asked("x"))

    assert drive(top(loud), loud) == (["ONE", "TWO"], "X")
    lm = Batched(loud)
    assert drive(top(lm), lm) == (["ONE", "TWO"], "X")


def test_of_flows_at_once_the_first_error_is_raised_as_itself():
    def flow():
        return (yield asked("a"), asked("break"), asked("break"))

    for act in (
        lambda: drive(flow(), loud),
        lambda: drive(flow(), loud, workers=4),
        lambda: drive(flow(), Batched(loud)),
        lambda: asyncio.run(adrive(flow(), loud)),
        lambda: asyncio.run(adrive(flow(), loud_awaited)),
    ):
        with pytest.raises(lmopt.ContextWindowExceeded, match="too long"):
            act()


def test_gathered_flows_may_return_nothing():
    def nothing(text):
        yield from asked(text)

    assert drive(gathered(nothing, "ab", loud), None) == [None, None]
    assert asyncio.run(adrive(gathered(nothing, "ab", loud), None)) == [None, None]


def test_a_layer_over_a_batch_and_lock_step_close_their_loops():
    lm = lmopt.fallback(loud_awaited, when=lambda error: True)(Batched(broken))
    assert lm.batch([lmopt.Request([lmopt.Message("user", "x")])])[0].text == "X"

    def both():
        return (yield gathered(asked, "ab", loud_awaited), asked("c"))

    assert drive(both(), Batched(loud)) == (["A", "B"], "C")
    gc.collect()  # a loop that was not closed is a warning, and a warning an error


def broken(request):
    raise lmopt.LMError("broken")


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_who_stops_a_stream_in_a_loop_leaves_no_task_behind(kind):
    never = threading.Event()

    async def patient(request):
        request.on_text("[[ ## b ## ]]\n0\n1\n")
        await asyncio.sleep(3600)

    def waits(request):
        request.on_text("[[ ## b ## ]]\n0\n1\n")
        assert never.wait(10)
        return answer(request)

    async def main():
        chunks = astream(predict("a -> b"), patient if kind == "async" else waits, {"a": "?"})
        assert (await anext(chunks)).field == "b"
        await chunks.aclose()
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()
    never.set()


def test_a_stream_in_a_loop_checks_inputs_at_once():
    async def main():
        with pytest.raises(DataError, match="unknown field"):
            astream(predict("a -> b"), answer, {"wrong": "?"})

    asyncio.run(main())


def test_what_is_no_leaf_effect_is_named_by_who_drives():
    @program(x=predict("a -> b"))
    def body(steps, a):
        return (yield steps.x(a=a))

    for act in (
        lambda: drive(body.flow(a="x"), upper),
        lambda: drive(body.flow(a="x"), Batched(upper)),
        lambda: asyncio.run(adrive(body.flow(a="x"), upper)),
    ):
        with pytest.raises(lmopt.SignatureError, match="no leaf effect: Run.*; expected a Request"):
            act()

    @program()
    def hidden(steps, a):
        return {"b": (yield from gathered(asked, a, loud))}

    with pytest.raises(lmopt.SignatureError, match="no effect was yielded"):  # it left no trace
        run(hidden, loud, {"a": "ab"})


def test_each_event_is_told_of_as_it_ends():
    def seen_by(drive_):
        seen = []
        made = drive_(seen.append)
        ids = {event.id: event for event in seen}
        assert sorted(ids) == sorted(event.id for event in made.trace) and len(ids) == len(seen)
        assert all(ids[one.id] == one for one in made.trace)
        assert seen[-1] == made.trace[-1]
        return seen

    given = (both, lm, {"a": "hi"})
    in_turn = seen_by(lambda watch: run(*given, watch=watch))
    assert in_turn == list(run(*given).trace)
    seen_by(lambda watch: run(*given, watch=watch, workers=4))
    seen_by(lambda watch: asyncio.run(arun(*given, watch=watch)))
    seen_by(lambda watch: list(stream(*given, watch=watch))[-1])
    seen_by(lambda watch: run_many(both, lm, [{"a": "hi"}], watch=watch)[0])

    async def streamed(watch):
        return [one async for one in astream(*given, watch=watch)][-1]

    seen_by(lambda watch: asyncio.run(streamed(watch)))
    rows = []
    lmopt.evaluate(both, [{"a": "hi", "n": 2}] * 3, lmopt.exact_match, lm=lm, watch=rows.append)
    assert len(rows) == 3 * len(in_turn)


def test_failed_events_are_told_of_and_those_that_were_left_are_not():
    seen = []
    with pytest.raises(lmopt.ParseError):
        run(
            predict("a -> n: int", retries=0),
            lambda _: Response("x"),
            {"a": "?"},
            watch=seen.append,
        )
    assert [(one.kind, bool(one.error)) for one in seen] == [("lm", False), ("step", True)]
    seen.clear()
    flow = lmopt.running(both, lmopt.Record(a="hi"), seen.append)
    next(flow)
    flow.close()
    assert seen == []


def test_who_watches_and_fails_ends_the_run():
    def watch(event):
        if event.kind == "call":
            raise ZeroDivisionError

    def look(a: int) -> int:
        """Look."""
        return a

    act = {"thought": "x", "tool": "look", "arguments": {"a": 1}}
    agent, given = lmopt.react("q -> a", [look]), {"q": "?"}
    lm = lmopt.scripted_lm([act] * 9)
    for drive_ in (
        lambda: run(agent, lm, given, watch=watch),
        lambda: asyncio.run(arun(agent, lm, given, watch=watch)),
        lambda: list(stream(agent, lm, given, watch=watch)),
        lambda: run_many(agent, lm, [given] * 2, watch=watch, workers=2),
        lambda: lmopt.evaluate(agent, [given], lmopt.exact_match, lm=lm, watch=watch),
    ):
        with pytest.raises(ZeroDivisionError):  # it is no failure of the tool
            drive_()


def test_an_error_of_a_programs_own_code_has_the_trace_too():
    @program(x=predict("a -> b"))
    def wrong(steps, a):
        made = yield steps.x(a=a)
        return {"b": made["c"]}

    with pytest.raises(KeyError) as failed:
        wrong(stub_lm(), a="?")
    assert [one.path for one in failed.value.trace] == ["x", "x", ""]
    assert failed.value.trace[-1].name == "wrong"


def test_another_process_keeps_the_first_copy_of_an_lm_for_all_that_one_driver_does():
    import pickle

    asked = lmopt.throttle(per_minute=60)(lmopt.stub_lm())
    driver, other = lmopt._Here(asked), lmopt._Here(asked)
    texts = [pickle.dumps(lmopt._sent(one, asked)) for one in (driver, driver, other)]
    first, again, elsewhere = [lmopt._first_copy(pickle.loads(text)).lm for text in texts]
    assert first is again and first is not elsewhere and first is not asked


@pytest.mark.slow
def test_a_limit_and_a_connection_hold_for_all_rows_of_a_process():
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with wire.server(wire.served_by(lmopt.toy_lm())) as served, pool:
        lm = lmopt.openai_lm("m", base_url=served.base_url)
        run_many(predict("a -> b"), lm, [{"a": str(n)} for n in range(9)], executor=pool)
        assert served.has(1) and len(served.seen) == 9


def test_an_lm_of_the_main_script_has_one_identity_in_all_processes():
    def ask(request):
        return Response("")

    ask.__module__, here = "__main__", lmopt.identity
    name = here(ask)
    ask.__module__ = "__mp_main__"
    assert here(ask) == name
