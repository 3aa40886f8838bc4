"""Middleware: each a flow, tested by hand, in threads, loops and batches; caches and cassettes."""

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from toolz import pipe
from wire import completion, events, failure, served_by, server

import lmopt
from lmopt import (
    BudgetExceeded,
    DataError,
    LMError,
    LMTimeout,
    Message,
    RateLimited,
    ReplayMiss,
    Request,
    Response,
    Sleep,
    Usage,
    budget,
    cache,
    evaluate,
    exact_match,
    fallback,
    log,
    middleware,
    openai_lm,
    predict,
    record,
    replay_lm,
    retry,
    run_many,
    scripted_lm,
    stub_lm,
    throttle,
    timeout,
)

KEY = "sk-canary-4711"


def ask(text="Hi", **changes):
    return Request([Message("user", text)], **changes)


def echo(request):
    return Response(request.messages[-1].text.upper(), usage=Usage(1, 10, 5, cost=0.25))


def busy(*, after=None, kind=LMError, retryable=True):
    error = kind("busy")
    error.retryable, error.retry_after = retryable, after
    return error


def stepped(layer, request, *outcomes):
    """Step the flow of a layer by hand: the effects it yields, and what it returns or raises."""
    flow, effects = layer.flow(request), []
    left = [None, *outcomes]
    try:
        while True:
            outcome = left.pop(0)
            if isinstance(outcome, Exception):
                effects.append(flow.throw(outcome))
            else:
                effects.append(flow.send(outcome))
    except StopIteration as end:
        return effects, end.value


def in_a_loop(lm, requests):
    async def main():
        return await asyncio.gather(*map(lm.acall, requests), return_exceptions=True)

    return asyncio.run(main())


class Counting:
    """An LM that counts its calls, and waits in each for a gate."""

    concurrency, identity = 8, "counting"

    def __init__(self, gate=None):
        self.seen, self.gate, self.came = [], gate, threading.Semaphore(0)

    def __call__(self, request):
        self.seen.append(request.messages[-1].text)
        self.came.release()
        if self.gate is not None:
            assert self.gate.wait(10)
        return echo(request)


class Batched(Counting):
    def batch(self, requests):
        return [self(request) for request in requests]


# -- layers --


def test_a_layer_is_what_its_inner_lm_is_but_for_its_flow():
    lm = openai_lm("m", api_key=KEY, concurrency=7)
    layers = [
        retry(), throttle(per_minute=9), timeout(9), cache({}), budget(calls=9), log(),
        fallback(lm),
    ]  # fmt: skip
    for layer in layers:
        made = layer(lm)
        assert made.concurrency == 7 and made.model == "m" and not hasattr(made, "batch")
        assert hasattr(layer(Batched()), "batch")
    assert pipe(lm, *layers[:-1]).identity == lm.identity
    assert lmopt.identity(fallback(lm)(lm)) not in (lm.identity, "")
    with pytest.raises(AttributeError):
        _ = retry()(stub_lm()).nothing


def test_a_layer_of_your_own():
    @middleware
    def shout(request):
        response = yield evolve(request, temperature=1.0)
        return evolve(response, text=response.text + "!")

    assert shout(echo)(ask()).text == "HI!"
    assert in_a_loop(shout(echo), [ask()])[0].text == "HI!"
    assert shout(Batched()).batch([ask("a"), ask("b")])[1].text == "B!"


def test_layers_pickle_but_for_a_budget():
    lm = openai_lm("m", api_key=KEY)
    for layer in (retry(), throttle(per_minute=9), timeout(9), fallback(lm), log(print)):
        again = pickle.loads(pickle.dumps(layer(lm)))
        assert again.identity == layer(lm).identity and again.concurrency == 16
    with pytest.raises(DataError, match="a budget cannot be sent to another process"):
        pickle.dumps(budget(calls=1)(lm))


def down(request):
    raise busy()


@pytest.mark.parametrize("name", ["retry", "throttle", "timeout", "cache", "record", "fallback",
                                  "log"])  # fmt: skip
def test_a_layer_that_was_pickled_answers_the_same(name, tmp_path, capsys):
    make = {
        "retry": lambda: retry(attempts=2, base=0.0),
        "throttle": lambda: throttle(per_minute=100),
        "timeout": lambda: timeout(60),
        "cache": lambda: cache(tmp_path / "calls.sqlite"),
        "record": lambda: record(tmp_path / "calls.jsonl"),
        "fallback": lambda: fallback(echo),
        "log": lambda: log(print),
    }[name]
    layer = make()
    lm, failing = layer(echo), layer(down)
    assert lm(ask()).text == "HI"
    for again in (
        pickle.loads(pickle.dumps(lm)),
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(lm)))),
        pickle.loads(pickle.dumps(layer))(echo),
    ):
        made = again(ask())
        assert made == lm(ask()) and made.cached == (name in ("cache", "record"))
        assert again.identity == lm.identity and again.inner is echo
        assert in_a_loop(again, [ask("Ho")])[0].text == "HO"
    again = pickle.loads(pickle.dumps(failing))
    if name == "fallback":
        assert again(ask("Else")) == failing(ask("Else")) == echo(ask("Else"))
    else:
        for one in (again, failing):
            with pytest.raises(LMError, match="busy"):
                one(ask("Else"))
    written = capsys.readouterr().out.splitlines()
    assert len(written) == (12 if name == "log" else 0)


def test_layers_around_layers_pickle_as_one(tmp_path):
    layers = (
        retry(base=0.0), throttle(per_minute=100), timeout(60), cache(tmp_path / "calls.sqlite"),
        record(tmp_path / "calls.jsonl"), fallback(echo), log(print),
    )  # fmt: skip
    lm = pipe(down, *layers)
    again = pickle.loads(pickle.dumps(lm))
    assert again.identity == lm.identity
    assert again(ask()) == lm(ask()) == echo(ask())
    shared = pickle.loads(pickle.dumps(pipe(echo, *layers)))
    assert not shared(ask()).cached and pipe(echo, *layers)(ask()).cached


# -- retry --


def test_retry_waits_at_random_and_as_long_as_it_is_told():
    layer = retry(attempts=4, base=2.0)(echo)
    effects, answer = stepped(
        layer, ask(), busy(), None, busy(after=7.0), None, busy(), None, Response("ok")
    )
    assert answer.text == "ok"
    assert [type(one) for one in effects] == [Request, Sleep] * 3 + [Request]
    waits = [one.seconds for one in effects[1::2]]
    assert 0 <= waits[0] <= 2 and 7 <= waits[1] <= 11 and 0 <= waits[2] <= 8
    again, _ = stepped(layer, ask(), busy(), None, busy(after=7.0), None, busy(), None, echo(ask()))
    assert [one.seconds for one in again[1::2]] == waits
    other = stepped(retry(attempts=4, base=2.0, seed=1)(echo), ask(), busy(), None, echo(ask()))
    assert other[0][1].seconds != waits[0]


def test_retry_gives_up_after_its_attempts_or_at_once():
    lm = retry(attempts=3, base=0.0)(scripted_lm([busy(), busy(), busy(kind=RateLimited), "no"]))
    with pytest.raises(RateLimited):
        lm(ask())
    for error in (
        busy(retryable=False),
        busy(after=61.0),
        lmopt.ParseError("x"),
        BudgetExceeded("x"),
    ):
        with pytest.raises(type(error)):
            retry(base=0.0)(scripted_lm([error, "no"]))(ask())
    with pytest.raises(DataError, match="too few attempts: 0"):
        retry(attempts=0)


def test_retry_over_http_and_in_a_loop():
    answers = [failure(503), failure(429, Retry_After="0"), completion("Hi")] * 2
    with server(lambda payload: answers.pop(0)) as served:
        http = openai_lm("m", base_url=served.base_url)
        lm = retry(base=0.0)(http)
        assert lm(ask()).text == "Hi" and in_a_loop(lm, [ask()])[0].text == "Hi"
        assert len(served.seen) == 6
        http.close()


# -- throttle --


class Clock:
    """Virtual time, and flows that sleep in it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@given(
    gaps=st.lists(st.tuples(st.floats(0, 40), st.integers(0, 120)), min_size=1, max_size=25),
    calls=st.integers(1, 5),
    tokens=st.integers(50, 200),
    late=st.floats(0, 70),
)
def test_no_minute_has_more_than_it_may_however_late_who_waits_wakes_up(gaps, calls, tokens, late):
    clock, began, waiting = Clock(), [], []
    layer = throttle(per_minute=calls, tokens_per_minute=tokens, clock=clock)(echo)
    arrivals = itertools.accumulate(gap for gap, _ in gaps)
    for number, (when, (_, size)) in enumerate(zip(arrivals, gaps, strict=True)):
        waiting.append((when, number, size, layer.flow(ask("x" * 4 * size))))
    while waiting:
        waiting.sort(key=lambda one: one[:2])
        clock.now, number, size, flow = waiting.pop(0)
        effect = flow.send(None)
        if isinstance(effect, Sleep):
            assert 0 < effect.seconds <= 60
            waiting.append((clock.now + effect.seconds + late, number, size, flow))
            continue
        began.append((clock.now, size))
        with pytest.raises(StopIteration):
            flow.send(Response("x"))
    assert len(began) == len(gaps)
    for start, _ in began:
        minute = [(when, size) for when, size in began if start - 60 + 1e-6 < when <= start]
        assert len(minute) <= calls
        assert sum(size for _, size in minute) <= tokens or len(minute) == 1


def test_throttle_corrects_its_estimates():
    clock = Clock()
    layer = throttle(tokens_per_minute=100, clock=clock)(echo)
    assert stepped(layer, ask("x" * 40), Response("", usage=Usage(1, 80, 15)))[0] == [ask("x" * 40)]
    assert next(layer.flow(ask("x" * 40))) == Sleep(60.0)
    clock.now = 60.0
    large = ask("x" * 4000, max_tokens=5)
    assert stepped(layer, large, echo(ask()))[0] == [large]  # alone in its minute
    for wrong in ({}, {"per_minute": 0}):
        with pytest.raises(DataError, match="no limit to keep"):
            throttle(**wrong)


# -- timeout --


def test_a_call_that_takes_too_long_is_given_up():
    gate = threading.Event()
    lm = timeout(0.01)(Counting(gate))
    assert lm.concurrency == 8
    with pytest.raises(LMTimeout, match="did not answer in time: .*; expected an answer in 0.01 s"):
        lm(ask())
    (error,) = in_a_loop(lm, [ask()])
    assert type(error) is LMTimeout and error.retryable
    gate.set()
    assert timeout(10)(echo)(ask()).text == "HI" == in_a_loop(timeout(10)(echo), [ask()])[0].text
    with pytest.raises(LMError, match="busy"):
        timeout(10)(scripted_lm([busy()]))(ask())
    slow = scripted_lm([busy(kind=LMTimeout)])
    assert "busy" in str(in_a_loop(timeout(10)(slow), [ask()])[0])
    assert timeout(10)(Batched()).batch([ask()])[0].text == "HI"
    with pytest.raises(DataError, match="no time at all"):
        timeout(0)


# -- cache --


@pytest.mark.parametrize("kind", ["dict", "SQLite", "cassette"])
def test_a_request_is_asked_once_and_every_difference_counts(tmp_path, kind):
    store = {"dict": {}, "SQLite": tmp_path / "c.sqlite", "cassette": tmp_path / "c.jsonl"}[kind]
    layer = record(store) if kind == "cassette" else cache(store)
    rich = Response(
        "é\ud800", (lmopt.ToolCall("1", "f", {"a": [1]}),), Usage(1, 2, 3, 1, 0.5), "m", "length",
        "why", {"content": [{"logprob": -0.25}]},
    )  # fmt: skip
    inner = scripted_lm([rich, *"bcdef"])
    lm = layer(inner)
    first = lm(ask())
    again = lm(ask())
    assert first == again == rich and (first.cached, again.cached) == (False, True)
    assert again.usage == rich.usage
    different = [
        ask(temperature=0.0), ask(rollout=1), ask("Ho"), ask(extra={"n": 1}), ask(stop=["x"]),
    ]  # fmt: skip
    assert [lm(one).text for one in different] == list("bcdef")
    assert [lm(one).text for one in different] == list("bcdef")
    reopened = (record(store) if kind == "cassette" else cache(store))(inner)
    assert reopened(ask()) == rich


def test_two_lms_do_not_share_answers():
    store = {}
    one, other = (openai_lm("m", base_url="http://localhost:1/v1", temperature=t) for t in (0, 1))
    assert cache(store)(one).identity != cache(store)(other).identity
    cache(store)(lmopt.toy_lm(seed=1))(ask())
    assert len(store) == 1
    cache(store)(lmopt.toy_lm(seed=2))(ask())
    assert len(store) == 2


@pytest.mark.parametrize("kind", ["threads", "loop", "batch"])
@pytest.mark.parametrize("layer", ["cache", "record"])
def test_equal_requests_at_once_are_sent_once(tmp_path, kind, layer):
    made = cache({}) if layer == "cache" else record(tmp_path / "c.jsonl")
    gate = threading.Event()
    inner = Batched() if kind == "batch" else Counting(gate)
    lm = made(inner)
    if kind == "threads":
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(lm, ask()) for _ in range(8)]
            assert inner.came.acquire(timeout=10)
            gate.set()
            answers = [one.result() for one in futures]
    elif kind == "loop":
        gate.set()
        answers = in_a_loop(lm, [ask()] * 8)
    else:
        answers = lm.batch([ask()] * 8)
    assert inner.seen == ["Hi"] and {one.text for one in answers} == {"HI"}
    assert sum(one.cached for one in answers) == 7


def test_an_error_is_not_kept_and_the_others_try_themselves():
    lm = cache({})(scripted_lm([busy(), "ok"]))
    with pytest.raises(LMError):
        lm(ask())
    assert lm(ask()).text == "ok"
    errors = cache({})(Batched()).batch([])
    assert errors == []

    def picky(request):
        raise busy()

    assert [type(one) for one in in_a_loop(cache({})(picky), [ask()] * 3)] == [LMError] * 3


def test_what_is_no_cache_is_an_error_that_names_it(tmp_path):
    (tmp_path / "x.sqlite").write_text("this is no database, but a text of some length" * 9)
    with pytest.raises(DataError, match="this cache cannot be used: .*x.sqlite.*; expected SQLite"):
        cache(tmp_path / "x.sqlite")
    store = {}
    lm = cache(store)(echo)
    lm(ask())
    store[next(iter(store))] = "[]"
    with pytest.raises(DataError, match=r"what was kept is no response: '\[\]'"):
        lm(ask())


def test_the_sqlite_store_keeps_the_first_text_in_wal_mode(tmp_path):
    store = lmopt._Sqlite(str(tmp_path / "c.sqlite"))
    assert store.get("a") is None and store.setdefault("a", "1") == "1"
    assert store.setdefault("a", "9") == store.get("a") == "1"
    mode = sqlite3.connect(tmp_path / "c.sqlite")
    assert mode.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    mode.close()


# -- cassettes --


def test_a_cassette_is_one_line_a_call_and_replays_strictly(tmp_path):
    tape = tmp_path / "calls.jsonl"
    task = predict("q -> a")
    data = [{"q": str(n)} for n in range(3)]
    recorded = run_many(task, record(tape)(stub_lm()), data)
    lines = tape.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["step"] == "predict"
    assert list(json.loads(lines[0])) == ["key", "lm", "step", "request", "response"]
    with replay_lm(tape, strict=True) as lm:
        again = run_many(task, lm, data)
    assert again == recorded and [p.trace for p in again] == [p.trace for p in recorded]
    with (
        pytest.raises(ReplayMiss, match="1 of 3 recorded calls were not asked for; .*record again"),
        replay_lm(tape, strict=True) as lm,
    ):
        run_many(task, lm, data[:2])
    with replay_lm(tape) as lm:
        task(lm, q="1")
    assert record(tape)(replay_lm(tape)).identity == lmopt.identity(stub_lm())


def test_a_miss_shows_the_nearest_call_and_what_differs(tmp_path):
    tape = tmp_path / "calls.jsonl"
    task = predict("question -> answer", instructions="Answer the question.")
    lm = record(tape)(stub_lm())
    for text in ("What is the capital of France?", "How many legs has a spider?"):
        task(lm, question=text)
    with pytest.raises(ReplayMiss) as caught:
        task(replay_lm(tape), question="How many legs has a fly?")
    message = str(caught.value)
    assert "-How many legs has a spider?" in message and "+How many legs has a fly?" in message
    assert "France" not in message and "; expected a recorded one; record it" in message
    with pytest.raises(ReplayMiss, match="temperature"):
        predict("question -> answer", instructions="Answer the question.", temperature=0.5)(
            replay_lm(tape), question="How many legs has a spider?"
        )
    tape.write_text("")
    with pytest.raises(ReplayMiss, match="it is empty"):
        replay_lm(tape)(ask())
    with pytest.raises(FileNotFoundError):
        replay_lm(tmp_path / "none.jsonl")


def test_a_cassette_of_several_lms(tmp_path):
    tape = tmp_path / "calls.jsonl"
    student, teacher = lmopt.toy_lm(seed=1), lmopt.toy_lm(seed=2)
    record(tape)(student)(ask("one"))
    record(tape)(teacher)(ask("two"))
    assert [replay_lm(tape)(ask(text)).text for text in ("one", "two")] == ["one", "two"]
    record(tape)(teacher)(ask("one"))
    with pytest.raises(ReplayMiss, match="several LMs .*; say whose answer"):
        replay_lm(tape)(ask("one"))
    assert replay_lm(tape, lm=teacher)(ask("one")).text == "one"
    with pytest.raises(ReplayMiss, match="not on"):
        replay_lm(tape, lm=student)(ask("two"))


def test_a_folder_that_is_not_there_is_found_out_before_the_first_call(tmp_path):
    for make in (record, cache):
        with pytest.raises(DataError, match="none"):
            make(tmp_path / "none" / "calls")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
def test_a_full_disk_stops_an_evaluation_and_the_paid_answer_is_on_the_error(tmp_path, monkeypatch):
    tape = tmp_path / "calls.jsonl"
    lm = record(tape)(stub_lm())

    def full(file, line):
        with Path("/dev/full").open("wb", buffering=0) as disk:
            disk.write(line)

    monkeypatch.setattr(lmopt._Cassette, "_append", lambda self, file, line: full(file, line))
    with pytest.raises(DataError, match="an answer could not be kept: .*; see the disk") as caught:
        evaluate(predict("q -> a"), [{"q": "?", "a": "text"}], exact_match, lm=lm)
    assert caught.value.response.text.startswith("[[ ## a ## ]]")


def recorded_lines(tape, *texts):
    lm = record(tape)(Counting())
    for text in texts:
        lm(ask(text))
    return tape.read_bytes()


def test_a_torn_last_line_is_dropped_with_a_warning_at_any_byte(tmp_path):
    whole = recorded_lines(tmp_path / "whole.jsonl", "one", "two")
    start = whole.index(b"\n") + 1
    tape = tmp_path / "calls.jsonl"
    for end in range(start + 1, len(whole) - 1, 7):
        tape.write_bytes(whole[:end])
        inner = Counting()
        with pytest.warns(UserWarning, match="the last line was torn, and is dropped"):
            lm = record(tape)(inner)
        assert lm(ask("one")).text == "ONE" and inner.seen == []
        assert lm(ask("two")).text == "TWO"
        assert inner.seen == ["two"] and tape.read_bytes().count(b"\n") == 2
        with replay_lm(tape, strict=True) as again:
            assert again(ask("two")).text == "TWO" and again(ask("one")).text == "ONE"
    tape.write_bytes(whole[:-1])  # only the line break is missing
    record(tape)(echo)(ask("three"))
    assert tape.read_bytes().startswith(whole) and len(tape.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("line", [b'{"key": "x"', b"null", b'{"key": "x", "lm": "y"}', b"\xff"])
def test_a_torn_line_in_the_middle_is_an_error_that_names_it(tmp_path, line):
    tape = tmp_path / "calls.jsonl"
    whole = recorded_lines(tape, "one", "two")
    start = whole.index(b"\n") + 1
    tape.write_bytes(whole[:start] + line + b"\n" + whole[start:])
    for make in (record, replay_lm):
        with pytest.raises(
            DataError, match=r"calls.jsonl: line 2 is no recorded call: .*delete it"
        ):
            make(tape)


def test_the_first_answer_stands_for_all_processes(tmp_path):
    tape = tmp_path / "calls.jsonl"
    one, other = (record(tape)(Answering(n)) for n in (1, 2))  # both begin with no file
    assert [lm(ask()).text for lm in (one, other, one)] == ["1 says Hi"] * 3
    assert len(tape.read_bytes().splitlines()) == 1


# -- budget --


@pytest.mark.parametrize("kind", ["threads", "loop", "batch"])
def test_calls_never_overshoot(kind):
    inner = Batched() if kind == "batch" else Counting()
    lm = budget(calls=5)(inner)
    requests = [ask(str(n)) for n in range(20)]
    if kind == "threads":
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(lm, one) for one in requests]
            made = [one.exception() or one.result() for one in futures]
    else:
        made = in_a_loop(lm, requests) if kind == "loop" else lm.batch(requests)
    assert len(inner.seen) == 5 and sum(isinstance(one, Response) for one in made) == 5
    refused = [one for one in made if not isinstance(one, Response)]
    assert all(type(one) is BudgetExceeded for one in refused)
    assert "the budget is spent: {'calls': 5}; expected at most {'calls': 5}" in str(refused[0])


def test_tokens_and_dollars_are_reserved_as_the_dearest_call():
    for limits, calls in (({"tokens": 50}, 3), ({"usd": 0.6}, 2), ({"usd": 0.5, "calls": 9}, 2)):
        inner = Counting()
        lm = budget(**limits)(inner)
        with pytest.raises(BudgetExceeded):
            for n in range(20):
                lm(ask(str(n)))
        assert len(inner.seen) == calls
    for wrong in ({}, {"calls": -1}):
        with pytest.raises(DataError, match="no limit to keep"):
            budget(**wrong)


def test_what_a_cache_answers_is_free_and_what_fails_is_a_call():
    lm = budget(calls=2)(cache({})(scripted_lm(["a", busy(), "b"])))
    assert [lm(ask()).text for _ in range(9)] == ["a"] * 9
    with pytest.raises(LMError, match="busy"):
        lm(ask("other"))
    with pytest.raises(BudgetExceeded):
        lm(ask("other"))


def test_a_budget_ends_an_evaluation():
    data = [{"q": str(n), "a": "text"} for n in range(9)]
    with pytest.raises(BudgetExceeded):
        evaluate(predict("q -> a"), data, exact_match, lm=budget(calls=3)(stub_lm()))


# -- fallback and log --


def test_fallback_asks_the_next_after_what_may_pass():
    def down(request):
        raise busy()

    lm = fallback(scripted_lm([busy(), "b"]), scripted_lm(["c"]))(down)
    assert lm(ask()).text == "c" and lm(ask()).text == "b"
    assert in_a_loop(fallback(echo)(down), [ask()])[0].text == "HI"
    long = scripted_lm([lmopt.ContextWindowExceeded("too long")])
    assert fallback(echo)(long)(ask()).text == "HI"
    with pytest.raises(lmopt.Unauthorized):
        fallback(echo)(scripted_lm([lmopt.Unauthorized("no key")]))(ask())
    with pytest.raises(LMError, match="busy"):
        fallback()(down)(ask())
    with pytest.raises(LMError, match="busy"):
        fallback(down)(down)(ask())


def test_a_log_has_one_entry_a_call_and_no_texts(caplog):
    seen = []
    lm = log(seen.append)(scripted_lm([Response("secret reply", model="m"), busy()]))
    lm(ask("secret question", step="qa"))
    with pytest.raises(LMError):
        lm(ask("secret question", step="qa"))
    assert [one.error for one in seen] == ["", "LMError: busy"]
    assert seen[0].step == "qa" and seen[0].model == "m" and seen[0].finish_reason == "stop"
    assert "secret" not in repr(seen)
    with caplog.at_level(logging.INFO, "lmopt"):
        log()(echo)(ask())
    assert json.loads(caplog.messages[0])["usage"]["input_tokens"] == 10


# -- many processes, and processes that are killed --


def write_calls(path, process):
    """Write calls of its own and calls that all write, in threads, to a cache or a cassette."""
    layer = record(path) if path.endswith("jsonl") else cache(path)
    lm = layer(Answering(process))
    requests = [ask(f"{process}: {n} é" + "x" * 500) for n in range(15)]
    requests += [ask(f"all: {n}") for n in range(15)]
    with ThreadPoolExecutor(4) as pool:
        return [one.text for one in pool.map(lm, requests)][15:]


class Answering:
    """An LM that says which process it is in."""

    identity = "answering"

    def __init__(self, process):
        self.process = process

    def __call__(self, request):
        return Response(f"{self.process} says {request.messages[-1].text}")


def test_many_may_open_a_new_cache_at_the_same_moment(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for n in range(40):
            path, meet = str(tmp_path / f"{n}.sqlite"), threading.Barrier(8, timeout=10)
            opened = [pool.submit(lambda p, m: m.wait() >= 0 and lmopt._Sqlite(p), path, meet)
                      for _ in range(8)]  # fmt: skip
            assert all(one.result().get("x") is None for one in opened)


@pytest.mark.slow
def test_eight_processes_lose_and_tear_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(8, mp_context=context) as pool:
        for name in ("calls.jsonl", "calls.sqlite"):
            path = str(tmp_path / name)
            shared = list(pool.map(write_calls, [path] * 8, range(8)))
            assert all(one == shared[0] for one in shared)  # the first answer stands
            lm = (record if name == "calls.jsonl" else cache)(path)(Answering("none"))
            for process in range(8):
                for n in range(15):
                    text = lm(ask(f"{process}: {n} é" + "x" * 500)).text
                    assert text.startswith(f"{process} says")
    lines = (tmp_path / "calls.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 8 * 15 + 15


OPTIMIZE = """
import os, sys
sys.path[:0] = sys.path_to_lmopt
import httpx, lmopt, lmopt_optimizers
lmopt._once_made(httpx.create_ssl_context)

words = (("a dog", "animal"), ("an oak", "plant"), ("a stone", "thing"))
rows = [lmopt.Record(text=f"{w} number {n}", label=l) for n in range(8) for w, l in words]
task = lmopt.predict("text -> label")

def optimize(base_url, tape):
    lm = lmopt.openai_lm("toy", base_url=base_url, api_key="sk-canary-4711", concurrency=4)
    search = lmopt_optimizers.random_search(lmopt.record(tape)(lm), candidates=9, seed=1)
    return lmopt.dumps(search(task, rows, lmopt.exact_match))

# One process for each line "base_url tape out"; this one only forks them, so that all start fast.
for line in sys.stdin:
    base_url, tape, out = line.split()
    child = os.fork()
    if not child:
        text = optimize(base_url, tape)
        open(out, "w").write(text)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no SIGKILL and no fork here")
def test_killed_at_random_and_started_again_it_pays_nothing_twice(tmp_path):
    kill_after = None
    arrived = 0

    def answer(payload):
        nonlocal arrived
        arrived += 1
        if arrived == kill_after:
            threading.Timer(rng.uniform(0, 0.02), os.kill, (child, signal.SIGKILL)).start()
        return toy(payload)

    rng, toy = lmopt.seeded(4, "kill"), served_by(lmopt.toy_lm())
    code = OPTIMIZE.replace("sys.path_to_lmopt", repr([str(Path(lmopt.__file__).parent)]))
    with (
        server(answer) as served,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as forks,
    ):  # fmt: skip
        tape = tmp_path / "calls.jsonl"
        kills = 0
        while not (tmp_path / "out").exists():
            kill_after, arrived = (rng.randint(1, 9) if kills < 20 else None), 0
            before, known = len(served.seen), recorded_messages(tape)
            forks.stdin.write(f"{served.base_url} {tape} {tmp_path / 'out'}\n")
            forks.stdin.flush()
            child = int(forks.stdout.readline())
            assert forks.stdout.readline() == "ended\n"
            kills += not (tmp_path / "out").exists()
            sent = [json.dumps(payload["messages"]) for _, _, payload in served.seen[before:]]
            assert not known & set(sent)  # nothing recorded is paid for again
            lost = len(sent) - len(recorded_messages(tape) - known)
            assert lost <= 4  # at most the calls in flight
        kill_after = None
        forks.stdin.write(f"{served.base_url} {tmp_path / 'whole.jsonl'} {tmp_path / 'whole'}\n")
        forks.stdin.close()
        assert forks.stdout.read().endswith("ended\n")
    assert kills == 20
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert recorded_messages(tape) == recorded_messages(tmp_path / "whole.jsonl")
    assert b"canary" not in tape.read_bytes()


def recorded_messages(tape):
    """The messages of the calls on a cassette, but for a last line that was torn."""
    lines = tape.read_text().split("\n")[:-1] if tape.exists() else []
    return {json.dumps(json.loads(line)["request"]["messages"]) for line in lines}


# -- secrets --


def shown(error):
    """All that is to be seen of an error: texts, attributes, causes, pickle, traceback."""
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    texts = [text for one in chain for text in (str(one), repr(one), repr(vars(one)))]
    return "".join([*texts, *traceback.format_exception(error), repr(pickle.dumps(error))])


@pytest.mark.slow
def test_a_key_is_nowhere_to_be_found(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    echoed = json.dumps({"error": {"message": f"wrong key {KEY} and {KEY}-header"}}).encode()
    answers = [
        (401, {}, echoed), (500, {}, echoed), (200, {}, echoed), None, (200, {}, b"?"),
        events({"error": {"message": KEY}}), events("?" + KEY),
        (302, {"Location": "/"}, KEY.encode()),
        (400, {}, b"context length exceeded " + KEY.encode()),
    ]  # fmt: skip
    data = [{"q": str(n), "a": "x"} for n in range(3)]
    task, answer = predict("q -> a"), None

    def calls(lm, found):
        """Everything that can be done with an LM."""
        yield lambda: lm(ask())
        yield lambda: lm(ask(on_text=found.append))
        yield lambda: asyncio.run(lm.acall(ask()))
        yield lambda: run_many(task, lm, data)
        yield lambda: evaluate(task, data, exact_match, lm=lm)
        yield lambda: list(lmopt.stream(task, lm, {"q": "?"}))

    def everything_shown(lm):
        found = [repr(lm), lm.identity]
        for call in calls(lm, found):
            try:
                made = call()
                found += [repr(made), repr(pickle.dumps(made))]
                if isinstance(made, lmopt.Evaluation):
                    found += [made.to_json(), made.to_csv()]
                    found += [lmopt.canonical(row.prediction.trace) for row in made.rows]
            except lmopt.LmoptError as error:
                found.append(shown(error))
        return found

    found = []
    with server(lambda payload: answer) as served:
        headers = {"X-Api-Key": f"{KEY}-header"}
        options = {"base_url": served.base_url, "api_key": KEY, "headers": headers}
        for make in (openai_lm, lmopt.anthropic_lm):
            http = make("m", concurrency=2, **options)
            layers = (
                retry(attempts=2, base=0.0), throttle(per_minute=10**6), timeout(60),
                cache(tmp_path / "c.sqlite"), record(tmp_path / "c.jsonl"),
                budget(calls=10**6), fallback(http), log(),
            )  # fmt: skip
            for answer in [*answers, completion("[[ ## a ## ]]\nx")]:  # noqa: B007
                found += everything_shown(pipe(http, *layers))
            found += [repr(http), repr(pickle.dumps(http))]
            http.close()
        embed = lmopt.embedder("m", **options)
        found += [repr(embed), repr(pickle.dumps(embed))]
    lmopt.save(task.params, tmp_path / "params.json")
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(found) > 100 and len(files) >= 3
    assert KEY not in "".join([*map(str, found), *caplog.messages])
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


# -- what goes wrong in the hands of others --


def test_a_budget_lets_pass_what_a_cache_below_holds(tmp_path):
    for made in (cache({}), cache(tmp_path / "c.sqlite"), record(tmp_path / "c.jsonl")):
        inner = Counting()
        lm = budget(calls=1)(retry()(made(inner)))
        assert [lm(ask("one")).cached for _ in range(3)] == [False, True, True]
        with pytest.raises(lmopt.BudgetExceeded):
            lm(ask("two"))
        assert len(inner.seen) == 1
        assert in_a_loop(lm, [ask("one")])[0].cached


@pytest.mark.parametrize("harm", ["deleted", "emptied", "replaced", "shortened"])
def test_a_cassette_that_is_changed_under_a_live_lm_gives_no_wrong_answer(tmp_path, harm):
    tape = tmp_path / "calls.jsonl"
    other = tmp_path / "other.jsonl"
    for text in ("xxx", "yyy", "zzz"):
        record(other)(echo)(ask(text))
    lm = record(tape)(echo)
    assert [lm(ask(text)).text for text in ("one", "two", "six")] == ["ONE", "TWO", "SIX"]
    if harm == "deleted":
        tape.unlink()
    elif harm == "emptied":
        tape.write_bytes(b"")
    elif harm == "replaced":
        other.replace(tape)
    else:
        tape.write_bytes(tape.read_bytes().splitlines(keepends=True)[1])
    assert [lm(ask(text)).text for text in ("two", "one", "six")] == ["TWO", "ONE", "SIX"]
    again = replay_lm(tape)
    assert [again(ask(text)).text for text in ("one", "two", "six")] == ["ONE", "TWO", "SIX"]


@pytest.mark.parametrize(
    "line",
    [
        b"notes of mine, without a newline",
        b'{"name": "a file of another program"}',
        b'{"name": "a file of another program"}\n',
        b"[" * 100_000,
        b'{"key": "k", "lm": "l", "request": {"messages": []}, "response": {"text": 5}}\n',
        b'{"key": "k", "lm": 5, "request": {"messages": []}, "response": {"text": ""}}\n',
        b'{"key": "k", "lm": "l", "response": {"text": "x"}}\n',
        b"\xff\xfe\x00",
    ],
)
def test_a_file_that_is_no_cassette_is_an_error_and_stays_as_it_is(tmp_path, line):
    tape = tmp_path / "notes.txt"
    tape.write_bytes(line)
    for make in (lambda: record(tape)(echo)(ask()), lambda: replay_lm(tape)):
        with pytest.raises(DataError, match="line 1 is no recorded call"):
            make()
        assert tape.read_bytes() == line


def test_a_line_that_was_torn_anywhere_is_dropped_with_a_warning(tmp_path):
    tape = tmp_path / "calls.jsonl"
    record(tape)(echo)(ask("one"))
    whole = tape.read_bytes()
    for size in (1, 5, 9, 30, len(whole) - 2):
        tape.write_bytes(whole + whole[:size])
        with pytest.warns(UserWarning, match="the last line was torn"):
            assert record(tape)(echo)(ask("one")).cached


def test_what_others_have_recorded_since_is_not_asked_again(tmp_path):
    tape, inner = tmp_path / "calls.jsonl", Counting()
    one, other = record(tape)(inner), record(tape)(inner)
    for n in range(5):
        one(ask(str(n)))
        assert other(ask(str(n))).cached
    assert len(inner.seen) == 5


def test_after_an_answer_could_not_be_kept_nothing_more_is_paid_for(tmp_path):
    class Full(dict):
        def setdefault(self, key, value):
            raise OSError(28, "No space left on device")

    inner = Counting()
    lm = cache(Full())(inner)
    for text in ("one", "two", "three"):
        with pytest.raises(DataError, match="answer could not be kept"):
            lm(ask(text))
    assert len(inner.seen) == 1


def test_what_a_cache_holds_can_be_read_where_it_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "c.sqlite"
    cache(path)(echo)(ask("one"))
    made = sqlite3.connect(path)
    made.execute("PRAGMA journal_mode = DELETE")
    made.close()

    class Refusing(sqlite3.Connection):  # as a file or folder without the right to write does
        def execute(self, *_):
            raise sqlite3.OperationalError("attempt to write a readonly database")

    writing = functools.partial(sqlite3.connect, factory=Refusing)
    reading = sqlite3.connect
    connect = lambda path, **how: (reading if "uri" in how else writing)(path, **how)  # noqa: E731
    monkeypatch.setattr(sqlite3, "connect", connect)
    inner = Counting()
    inner.identity = lmopt.identity(echo)
    lm = cache(path)(inner)
    assert lm(ask("one")).cached and lm(ask("one")).text == "ONE"
    for text in ("two", "three"):
        with pytest.raises(DataError, match="could not be kept: .*readonly"):
            lm(ask(text))
    assert inner.seen == ["two"]


def test_a_hit_waits_for_nobody_who_writes(tmp_path):
    path = tmp_path / "c.sqlite"
    lm = cache(path)(echo)
    lm(ask("one"))
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    waiting = threading.Thread(target=lm, args=(ask("two"),))
    waiting.start()
    began = time.monotonic()
    assert lm(ask("one")).cached and time.monotonic() - began < 1
    blocker.execute("COMMIT")
    blocker.close()
    waiting.join()
    assert lm(ask("two")).cached


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_does_not_wait_for_its_parents_calls():
    gate = threading.Event()
    inner = Counting(gate)
    lm = cache({})(inner)
    thread = threading.Thread(target=lm, args=(ask("one"),))
    thread.start()
    inner.came.acquire()
    child = os.fork()
    if not child:
        inner.gate = None
        os._exit(0 if lm(ask("one")).text == "ONE" else 1)
    deadline = time.monotonic() + 10
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    gate.set()
    thread.join()
    assert done == (child, 0)


def factory_of_lms(text):
    return lambda request: Response(text)


class Local:
    """A model of one's own."""

    def __init__(self, name):
        self.name, self._asked = name, 0

    def __call__(self, request):
        self._asked += 1
        return Response(self.name)


@pytest.mark.parametrize(
    "make",
    [
        factory_of_lms,
        Local,
        lambda text: lmopt.mock_lm(lambda inputs: {"a": text}),
        lambda text: functools.partial(lambda request, text: Response(text), text=text),
        lambda text: eval(f"lambda request: lmopt.Response({text!r})", {"lmopt": lmopt}),
    ],
)
def test_two_lms_of_one_make_share_no_answer(make):
    store, task = {}, predict("q -> a")
    one, other = make("one"), make("two")
    assert lmopt.identity(one) != lmopt.identity(other)
    assert lmopt.identity(one) == lmopt.identity(make("one"))
    with contextlib.suppress(lmopt.ParseError):
        task(cache(store)(one), q="?")
    before = lmopt.identity(one)
    asked = cache(store)(other)
    with contextlib.suppress(lmopt.ParseError):
        assert task(asked, q="?").a == "two"
    assert lmopt.identity(one) == before  # what it has done is not who it is


def test_a_refusal_after_a_failed_keep_holds_nobody_elses_answer():
    class Full(dict):
        def setdefault(self, key, value):
            raise OSError("disk full")

    lm = cache(Full())(echo)
    with pytest.raises(DataError) as first:
        lm(ask("one"))
    with pytest.raises(DataError, match="not asked, since an earlier answer could not") as second:
        lm(ask("two"))
    assert first.value.response.text == "ONE" and not hasattr(second.value, "response")


def test_a_cassette_that_was_replaced_by_a_longer_one_is_read_anew(tmp_path):
    tape, other = tmp_path / "r.jsonl", tmp_path / "s.jsonl"
    lm = record(tape)(echo)
    lm(ask("one"))
    for text in ("something longer than that " * 9, "wanted"):
        record(other)(echo)(ask(text))
    other.replace(tape)
    assert lm(ask("wanted")).cached and not lm(ask("one")).cached
    assert len(tape.read_bytes().splitlines()) == 3


def test_a_cache_in_memory():
    lm = cache(":memory:")(echo)
    assert [lm(ask("one")).cached for _ in range(2)] == [False, True]


class Slotted:
    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __call__(self, request):
        return Response(self.name)

    def answer(self, request):
        return Response(self.name)


def test_more_lms_are_told_apart():
    assert lmopt.identity(Slotted("a")) != lmopt.identity(Slotted("b"))
    assert lmopt.identity(Slotted("a").answer) != lmopt.identity(Slotted("b").answer)

    def polite(inner):
        return lambda request: inner(request)

    one, other = (polite(openai_lm(name, base_url="http://h/v1")) for name in "ab")
    assert lmopt.identity(one) != lmopt.identity(other)


def test_a_budget_looks_through_no_layer_that_asks_something_else():
    @middleware
    def polite(request):
        return (yield evolve(request, messages=(*request.messages, Message("user", "Please."))))

    store = {}
    cache(store)(echo)(ask("one"))
    with pytest.raises(BudgetExceeded):
        budget(calls=0)(polite(cache(store)(echo)))(ask("one"))
    assert budget(calls=0)(retry()(cache(store)(echo)))(ask("one")).cached


def test_the_log_tells_of_tools_and_of_what_was_cancelled_but_not_of_our_own_calls():
    seen = []
    lm = cache({})(log(seen.append)(stub_lm()))

    @lmopt.program(ask=predict("q -> a"))
    def task(steps, q):
        yield lmopt.invoke(str.upper, q)
        return (yield steps.ask(q=q))

    task(lm, q="x")
    assert [one.get("call") for one in seen] == ["upper", None]

    async def slow(request):
        await asyncio.sleep(60)

    with pytest.raises(LMTimeout):
        asyncio.run(timeout(0.01)(log(seen.append)(slow)).acall(ask()))
    assert seen[-1].error


def test_a_budget_in_dollars_needs_a_price():
    with pytest.raises(DataError, match=r"without a price: .*<LM m at .*say what a million tokens"):
        budget(usd=1)(retry()(openai_lm("m", base_url="http://localhost:1/v1")))
    free = openai_lm("m", base_url="http://localhost:1/v1", price=(0, 0))
    assert lmopt.budget_left(budget(usd=1, calls=5)(free)) == {"calls": 5, "usd": 1}
    asked = []

    def silent(request):
        asked.append(request)
        return Response("a", usage=Usage(1, 3, 2))

    lm = budget(usd=1)(silent)
    with pytest.raises(DataError, match="a budget in dollars for an LM without a price"):
        lm(ask())
    assert len(asked) == 1
    paid = budget(usd=1)(lambda request: Response("a", usage=Usage(1, 3, 2, 0, 0.25)))
    paid(ask())
    assert lmopt.budget_left(retry()(paid)) == {"usd": 0.75}


def test_a_budget_in_dollars_is_shared_by_what_is_free_and_what_is_paid():
    def priced(price):
        lm = lambda request: Response("a", usage=Usage(1, 3, 2))  # noqa: E731
        lm.price = price
        return lm

    both = budget(usd=1)
    free, paid = both(priced((0, 0))), both(priced((1, 2)))
    assert free(ask()).text == "a"
    with pytest.raises(DataError, match="a budget in dollars for an LM without a price"):
        paid(ask())  # it has a price, and did not say what it took
    assert free(ask()).text == "a" and lmopt.budget_left(free) == {"usd": 1}


def test_of_several_budgets_the_least_is_left():
    lm = budget(calls=2)(retry()(budget(calls=9, tokens=50)(stub_lm())))
    assert lmopt.budget_left(lm) == {"calls": 2, "tokens": 50} and lmopt.budget_left(echo) == {}
    lm(ask())
    assert lmopt.budget_left(lm)["calls"] == 1


def test_a_budget_in_dollars_counts_every_answer_or_says_that_it_cannot():
    priced = openai_lm("m", base_url="http://localhost:1/v1", price=(1, 2))
    silent = lambda request: Response("a", usage=Usage(1, 3, 2))  # noqa: E731
    down = LMError("down", retryable=True)
    for lm in (
        budget(usd=1)(lambda request: Response("a")),
        budget(usd=1)(fallback(silent)(scripted_lm([down]))),
        budget(usd=1)(stub_lm()),
    ):
        with pytest.raises(DataError, match="a budget in dollars for an LM without a price"):
            lm(ask())
    both = budget(usd=1)
    assert both(priced).price == (1, 2)
    with pytest.raises(DataError, match="without a price"):
        both(silent)(ask())
    with pytest.raises(DataError, match="no limit to keep"):
        budget(usd=float("nan"))
