"""Local models: over a real socket, with nobody there, and with real weights."""

import os
import socket
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, load_example
from toolz import pipe
from wire import failure, served_by, server

import lmopt

local = load_example("local_models")


def test_a_server_is_asked_four_at_a_time_and_a_second_start_asks_nothing(tmp_path, capsys):
    answer, lock, at_once = served_by(lmopt.toy_lm()), threading.Lock(), [0, 0]

    def counted(payload):
        with lock:
            at_once[0] += 1
            at_once[1] = max(at_once)
        made = answer(payload)
        with lock:
            at_once[0] -= 1
        return made

    with server(counted) as there:
        wire = lmopt.connect("llamacpp/any", base_url=there.base_url, concurrency=4)
        lm = pipe(wire, lmopt.record(tmp_path / "calls.jsonl"))
        half, whole = local.main(lm)
        assert len(there.seen) == 1 + 12  # the one to warm up, and each row once
        assert at_once[1] <= 4
        assert local.main(lm) == (half, whole) == local.main(lmopt.toy_lm())
        assert len(there.seen) == 13
    assert whole.rows[:6] == half.rows and len(whole.rows) == 12
    lines = capsys.readouterr().out.splitlines()
    assert "6 calls made, 0 from the cassette" in lines[0]
    assert "6 calls made, 6 from the cassette" in lines[2]
    assert "0 calls made, 12 from the cassette" in lines[5]


def test_where_nobody_answers_the_error_says_how_to_start_a_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(lmopt.LMError, match="cannot be reached") as caught:
        local.main(lmopt.connect("llamacpp/any", base_url=closed))
    assert closed in str(caught.value)
    for command in ("ollama serve", "vllm serve", "llama-server"):
        assert command in caught.value.__notes__[0]


def test_a_server_that_refuses_needs_no_other_start():
    with server(lambda payload: failure(404, "model 'any' not found")) as there:
        lm = lmopt.connect("ollama/any", base_url=there.base_url)
        with pytest.raises(lmopt.LMError, match="not found") as caught:
            local.main(lm)
    assert not hasattr(caught.value, "__notes__")


def test_real_weights_keep_the_format(tmp_path):
    url = os.environ.get("LMOPT_LLAMA")
    if not url:
        pytest.skip("LMOPT_LLAMA names no server such as http://127.0.0.1:8080/v1")
    wire = lmopt.connect("llamacpp/any", base_url=url, timeout=300, concurrency=4)
    half, whole = local.main(pipe(wire, lmopt.record(tmp_path / "calls.jsonl")), rows=4)
    assert whole.rows[:2] == half.rows and not whole.errors
    assert whole.usage.calls == 4 and whole.usage.output_tokens > 4


def test_it_runs_as_a_script_without_a_server():
    script = [sys.executable, str(ROOT / "examples" / "local_models.py")]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.startswith("No server is named, so a toy LM answers.")
    assert "6 calls made, 6 from the cassette" in ran.stdout
