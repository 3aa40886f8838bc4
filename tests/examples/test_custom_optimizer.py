"""An optimizer of one's own: what it drops, how it decides, and that it helps on unseen rows."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, load_example

import lmopt
from lmopt_optimizers import Hunt, Trial, check_optimizer, only

custom = load_example("custom_optimizer")
RULES = [
    'A "dog" says "woof".',
    'Since the flood, a "cat" says "blub".',
    "Be polite.",
    'A "cat" says "meow".',
]
ANIMALS = [
    {"animal": f"{name} {number}", "sound": sound}
    for number in range(8)
    for name, sound in (("dog", "woof"), ("cat", "meow"))
]


def test_it_keeps_the_lines_that_help_and_drops_those_that_harm_or_do_nothing():
    program = lmopt.predict("animal -> sound", instructions="\n".join(RULES))
    found = custom.prune(lmopt.toy_lm())(program, ANIMALS, lmopt.exact_match)
    assert found["predict"].instructions == f"{RULES[0]}\n{RULES[3]}"


def test_it_keeps_the_laws_with_several_steps_and_within_one_of_them():
    step = lmopt.predict("animal -> sound", instructions="\n".join(RULES))
    named = lmopt.predict("animal -> name", instructions="\n".join(RULES[2:]))
    both = lmopt.parallel(sound=step, name=named)
    for optimize in (custom.prune(lmopt.toy_lm()), only("sound", custom.prune(lmopt.toy_lm()))):
        check_optimizer(optimize, both, ANIMALS, lmopt.exact_match, workers=(2,), kills=2)


def test_stepped_by_hand_it_goes_on_from_what_is_as_good_and_back_from_what_is_worse():
    program = lmopt.predict("animal -> sound", instructions="one\ntwo\nthree")
    hunt = Hunt(program, (), (), lmopt.exact_match, None)
    search = custom.prune(None, rounds=1).search(hunt)
    assert next(search).name == "start"
    tried, params = [], program.params
    for score in (0.5, 0.5, 0.4):
        hunt.trials.append(Trial(params, score))
        params = search.send(hunt.trials[-1]).given["params"]
        tried.append(params["predict"].instructions)
    assert tried == ["two\nthree", "three", "two"]


@pytest.mark.slow
def test_a_grown_prompt_gets_shorter_and_better_on_rows_it_was_not_pruned_on(capsys):
    gain = custom.main(lmopt.toy_lm())
    assert gain.rows == 80 and gain.better > gain.worse == 0
    out = capsys.readouterr().out
    left = out.partition("What is left:\n")[2].partition("\n\n")[0].splitlines()
    assert len(left) == 7 and {*left} < {*custom.GROWN.splitlines()}
    assert not [line for line in left if re.match("Since|While|Who |Customers|Always", line)]
    before, after = map(int, re.search(r"Tokens a run: (\d+) before, (\d+) after", out).groups())
    assert after < 0.7 * before


@pytest.mark.slow
def test_it_runs_as_a_script_on_fewer_rows():
    script = [sys.executable, str(ROOT / "examples" / "custom_optimizer.py"), "--rows", "32"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.startswith("prune keeps the laws of all optimizers.")
    assert "Gain, row by row: " in ran.stdout
