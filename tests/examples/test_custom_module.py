"""A module of one's own: stepped by hand, run in every way, sent elsewhere, optimized."""

import pickle
import subprocess
import sys

from conftest import ROOT, load_example

import lmopt

custom = load_example("custom_module")
INPUTS = {"complaint": "Late!", "order": 7}


def test_stepped_by_hand_it_corrects_once_and_only_where_a_check_says_no():
    flow = custom.replying.flow(**INPUTS)
    assert next(flow).name == "answer"
    checks = flow.send(lmopt.Prediction(reply="Sorry."))
    assert [one.inputs.criterion[:15] for one in checks] == ["Does it name th", "Does it say whe"]
    no = lmopt.Prediction(reason="no number", verdict="no")
    correct = flow.send((no, lmopt.Prediction(reason="", verdict="yes")))
    assert correct.name == "correct" and correct.inputs.objections == ["no number"]
    assert correct.inputs.draft == {"reply": "Sorry."}

    flow = custom.replying.flow(**INPUTS)
    next(flow)
    flow.send(lmopt.Prediction(reply="Sorry."))
    try:
        flow.send([lmopt.Prediction(reason="", verdict="yes")] * 2)
    except StopIteration as end:
        assert end.value == {"reply": "Sorry."}
    else:
        raise AssertionError("it goes on")


def test_it_makes_no_more_calls_than_it_says():
    program = custom.self_check("question -> answer", ["Is it odd?"])
    replies = [{"answer": "4"}, {"reason": "", "verdict": "no"}, {"answer": "5"}]
    lm = lmopt.scripted_lm([text for one in replies for text in ("?", "?", one)])
    made = program(lm, question="2+2?")
    assert made.answer == "5" and made.usage.calls == program.max_calls == 9


def test_it_runs_the_same_in_every_way_and_pickles_as_how_it_was_made(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")  # where other processes find it
    monkeypatch.setitem(sys.modules, "custom_module", custom)
    made = custom.run_everywhere(lmopt.mock_lm(custom.forgetful))
    assert {one.reply for one in made} == {made[0].reply} and "4711" in made[0].reply
    assert [one.trace for one in made] == [made[0].trace] * 4
    again = pickle.loads(pickle.dumps(custom.replying))
    assert again.params == custom.replying.params
    assert len(pickle.dumps(custom.replying)) < 2000


def test_its_steps_are_optimized_together(monkeypatch, capsys):
    monkeypatch.setattr(custom, "run_everywhere", lambda lm: None)
    gain = custom.main(lmopt.toy_lm())
    assert gain.interval[0] > 0
    shown = capsys.readouterr().out.splitlines()[:3]
    assert [line.split(":")[0] for line in shown] == ["answer", "check", "correct"]
    assert not any(": 0 " in line for line in shown)


def test_it_runs_as_a_script():
    script = [sys.executable, str(ROOT / "examples" / "custom_module.py"), "--rows", "48"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)
    assert "In pieces: answer, check, correct" in ran.stdout
    assert "The same in all four: True" in ran.stdout
