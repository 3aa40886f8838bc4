"""Examples run offline; that of the main job has a file of its own."""

import argparse
import subprocess
import sys

import pytest
from conftest import ROOT, load_example

import lmopt


def test_the_agent_answers_from_its_cassette_and_uses_all_of_it(capsys):
    agent = load_example("agent")
    with lmopt.replay_lm(agent.TAPE, strict=True) as lm:
        made = agent.main(lm, agent.QUESTION)
    assert (made.river, made.percent) == ("Danube", 131)
    assert {turn.tool for turn in made.trajectory} >= {"find_rivers", "river_length", "calculate"}
    assert "Danube, by 131 %" in capsys.readouterr().out
    assert lmopt.replay(agent.agent, made.trace).trace == made.trace


def test_the_agent_runs_as_a_script_and_says_what_is_not_recorded():
    script = [sys.executable, str(ROOT / "examples" / "agent.py")]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.endswith("7 calls of the language model\n")
    other = [*script, "How long is the Elbe?"]
    ran = subprocess.run(other, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1 and "ReplayMiss: a request that is not on" in ran.stderr


def test_the_calculator_takes_arithmetic_only():
    agent = load_example("agent")
    made = lmopt.react("q -> a", [agent.calculate], max_steps=2)
    acts = [
        {"thought": "", "tool": "calculate", "arguments": {"expression": text}}
        for text in ("2 * (3 + 4)", "__import__('os')")
    ]
    lm = lmopt.scripted_lm([*acts, {"reasoning": "", "a": "x"}])
    seen = [turn.observation for turn in made(lm, q="?").trajectory]
    assert seen[0] == "14.0" and seen[1].startswith("The tool failed: ValueError: only numbers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "least"), [("t5", 0.9), ("llama", 0.9)])
def test_small_models_of_this_machine_learn_what_a_teacher_shows(kind, least):
    pytest.importorskip("torch", reason="torch and transformers are not installed")
    pytest.importorskip("transformers", reason="torch and transformers are not installed")
    local = load_example("finetune_local")
    given = argparse.Namespace(kind=kind, model="", rows=400, folder="", reinforce=0)
    assert local.main(given)[0] >= least
