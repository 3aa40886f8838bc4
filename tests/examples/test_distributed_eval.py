"""The example of a Dask cluster; its workers are processes of this machine."""

import json
import os
import subprocess
import sys

import attrs
import pytest
from conftest import ROOT, load_example

import lmopt

pytest.importorskip("distributed", reason="distributed is not installed")


def test_a_cluster_makes_the_same_bytes_and_shares_a_cassette(tmp_path):
    example = load_example("distributed_eval")
    toy, tape = lmopt.toy_lm(), tmp_path / "calls.jsonl"

    def located(request):
        return attrs.evolve(toy(request), model=str(os.getpid()))

    with example.connected() as client:
        here, there = example.main(toy, client, rows=40, calls=40)
        assert (here.params, here.rows) == (there.params, there.rows)

        executor, tickets = client.get_executor(pure=False), lmopt.read_examples(example.TICKETS)
        made = lmopt.run_many(
            example.route,
            located,
            [{"ticket": row.ticket} for row in tickets[:20]],
            executor=executor,
        )
        places = {event.response.model for one in made for event in one.trace if event.response}
        assert places and str(os.getpid()) not in places

        again = example.work(lmopt.record(tape)(toy), tickets[:40], 40, executor)
        assert (again.params, again.rows) == (here.params, here.rows)
    assert lmopt.loads(here.params)["predict"].demos
    keys = [json.loads(line)["key"] for line in tape.read_text(encoding="utf-8").splitlines()]
    assert len(keys) == len(set(keys)) > 20
    replayed = example.work(lmopt.replay_lm(tape), tickets[:40], 40, None)
    assert (replayed.params, replayed.rows) == (here.params, here.rows)


def test_it_runs_as_a_script_and_says_that_the_bytes_are_equal():
    script = ROOT / "examples" / "distributed_eval.py"
    command = [sys.executable, str(script), "--rows", "40", "--calls", "40"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "On the cluster, 8 at once in 2 processes:" in ran.stdout
    assert "The parameters are the same bytes: True" in ran.stdout
    assert "The rows are the same bytes: True" in ran.stdout
