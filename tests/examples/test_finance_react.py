"""The analyst keeps to its limits, and what it found is not lost when they end it."""

import subprocess
import sys

from conftest import ROOT, load_example

import lmopt


def test_both_questions_are_answered_where_the_budget_allows_it(capsys):
    example = load_example("finance_react")
    with lmopt.replay_lm(example.TAPE, strict=True) as lm:
        first, second = example.main(lm, calls=20)
    assert "NORD costs 34.0 times its earnings" in first.answer
    assert {turn.tool for turn in first.trajectory} == {"ratios", "news", "prices", "finish"}
    assert second.trajectory[0].observation == "The tool failed: KeyError: 'LUMA OPTICS'"
    assert '"change_in_percent": -33.8' in second.trajectory[1].observation
    cost = first.usage.cost + second.usage.cost
    assert f"{cost:.4f} US dollars" in capsys.readouterr().out and cost > 0


def test_a_spent_budget_of_calls_or_of_dollars_leaves_what_was_found():
    example = load_example("finance_react")
    tape = lmopt.replay_lm(example.TAPE)
    whole = example.main(tape, calls=20)
    for limits, found in (({"calls": 9}, [5, 3]), ({"calls": 5}, [5, 0]), ({"usd": 3e-4}, [3, 0])):
        first, second = example.main(example.paid(tape), **limits)
        assert [len(first.trajectory), len(second.trajectory)] == found
        assert "the budget is spent" in second.answer and next(iter(limits)) in second.answer
        assert second.trajectory == whole[1].trajectory[: found[1]]
        assert second.trace[-1].error.startswith("BudgetExceeded")
        assert first.usage.cost + second.usage.cost <= limits.get("usd", 1)


def test_an_analyst_that_never_finishes_answers_after_six_steps():
    example = load_example("finance_react")
    look = {"thought": "Once more.", "tool": "news", "arguments": {"ticker": "HARB"}}
    lm = lmopt.scripted_lm([look] * 6 + [{"reasoning": "", "answer": "It is quiet."}])
    (made,) = example.main(lm, ["What is new at HARB?"])
    assert len(made.trajectory) == 6 and made.answer == "It is quiet."


def test_it_runs_as_a_script_within_the_limit_it_is_given():
    script = [sys.executable, "-X", "utf8", str(ROOT / "examples" / "finance_react.py")]
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 60, "check": True}
    ran = subprocess.run(script, **options)
    assert "=> no answer: the budget is spent: {'calls': 9" in ran.stdout
    ran = subprocess.run([*script, "--calls", "20"], **options)
    assert "=> LUMA fell by 33.8 %" in ran.stdout and "budget" not in ran.stdout
    ran = subprocess.run([*script, "--budget", "0.0003"], **options)
    assert "at most {'calls': 9, 'usd': 0.0003}" in ran.stdout
