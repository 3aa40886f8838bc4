import subprocess
import sys
from itertools import pairwise

import pytest
from conftest import ROOT, load_example

import lmopt
from lmopt_optimizers import gepa

pytest.importorskip("bm25s", reason="bm25s is not installed")


def test_both_optimizers_find_more_titles_of_claims_that_they_never_saw():
    multihop = load_example("multihop")
    start, *learned = multihop.main(multihop.offline)
    for after in learned:
        gain = lmopt.compare(start, after)
        assert gain.difference > 0.3 and gain.p_value < 0.001 and gain.worse == 0


def test_it_is_the_feedback_that_they_learn_from():
    multihop = load_example("multihop")
    optimize = gepa(multihop.offline, max_runs=75, valset=multihop.DATA["val"])

    def silent(row, made):
        return multihop.recall(row, made).value

    start, train = multihop.verify.params, multihop.DATA["train"]
    assert optimize(multihop.verify, train, silent) == start
    assert optimize(multihop.verify, train, multihop.recall) != start


def test_each_step_has_something_to_learn_of_its_own():
    multihop = load_example("multihop")

    def recall_with(*paths):
        params = multihop.verify.params
        for path in paths:
            params = params.replace(path, instructions=multihop.ADVICE[path])
        program, rows = multihop.verify.with_params(params), multihop.DATA["held_out"]
        return lmopt.evaluate(program, rows, multihop.recall, lm=multihop.offline).score

    assert recall_with() == recall_with("note")  # good notes are no help where no query uses them
    assert recall_with("note") < recall_with("query") < recall_with("query", "note")


def test_each_passage_leads_to_the_next_and_no_chain_is_in_two_parts():
    multihop = load_example("multihop")
    parts = [multihop.DATA[name] for name in ("train", "val", "held_out")]
    for row in [row for part in parts for row in part]:
        first, *later = row["titles"]
        assert first in row["claim"] and not any(title in row["claim"] for title in later)
        assert all(there in multihop.PASSAGES[here] for here, there in pairwise(row["titles"]))
    firsts = [{row["titles"][0] for row in part} for part in parts]
    assert sum(map(len, firsts)) == len(set().union(*firsts)) == 40


def test_it_runs_as_a_script():
    script = [sys.executable, str(ROOT / "examples" / "multihop.py")]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["optimizer", "auto", "gepa"]
    assert "+instructions: Write a search query. Search for the names in the notes" in ran.stdout
