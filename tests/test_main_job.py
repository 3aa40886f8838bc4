"""The main job of a newcomer: the quick start on its own data, on real data, and on bad input."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, load_example

import lmopt
from lmopt import evaluate, exact_match, predict, read_examples, toy_lm
from lmopt_optimizers import labeled_few_shot, random_search, split

SCRIPT = ROOT / "examples" / "quickstart.py"


def run_script(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )


def test_the_tickets_are_many_and_even():
    rows = read_examples(ROOT / "examples" / "tickets.jsonl")
    teams = Counter(row.team for row in rows)
    assert len({row.ticket for row in rows}) == len(rows) >= 180
    assert len(teams) == 8 and max(teams.values()) - min(teams.values()) <= 1


def test_the_quick_start_does_its_job(tmp_path):
    done = run_script(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "--- system ---",
        "Before: ",
        "random_search: ",
        "p = ",
        "+demo: ",
        "-> {'team': ",
    ):
        assert part in done.stdout
    params = lmopt.load(tmp_path / "params.json")
    assert 0 < len(params["predict"].demos) <= 48


@pytest.mark.slow
def test_the_gain_on_the_tickets_is_significant(tmp_path, capsys):
    quickstart = load_example("quickstart")
    given = ["--out", str(tmp_path / "p.json"), "--candidates", "1"]
    gain = quickstart.main(quickstart.options(given), toy_lm())
    assert gain.difference > 0.2 and gain.p_value < 0.001 and gain.interval[0] > 0


def test_a_failing_lm_loses_nothing_that_was_paid_for(tmp_path):
    quickstart = load_example("quickstart")
    given, asked = quickstart.options(["--out", str(tmp_path / "p.json"), "--rows", "80"]), []

    def lm(request):
        asked.append(request)
        if len(asked) > 150:
            raise lmopt.Unauthorized("the key was revoked")
        return toy_lm()(request)

    with pytest.raises(lmopt.Unauthorized):
        quickstart.main(given, lm)
    kept = lmopt.load(tmp_path / "p.json")
    assert len(kept["predict"].demos) > 0


def test_the_users_own_job_on_real_data(real_data, tmp_path):
    data = str(real_data / "banking20.jsonl")
    job = ("--data", data, "--signature", "text -> intent", "--demos", "64", "--candidates", "2")
    done = run_script(*job, "--out", "mine.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(lmopt.load(tmp_path / "mine.json")["predict"].demos) <= 64


@pytest.mark.parametrize(
    "make",
    [
        lambda lm: labeled_few_shot(k=64),
        lambda lm: random_search(lm, candidates=2, max_labeled=64),
    ],
)
def test_on_real_questions_the_score_rises_from_nothing_to_half(real_data, make):
    learn, held_out = split(read_examples(real_data / "banking20.jsonl"), share=0.75)
    task, lm = predict("text -> intent"), toy_lm()
    assert len(held_out) == 200 and len({row.intent for row in held_out}) == 20
    before = evaluate(task, held_out, exact_match, lm=lm)
    params = make(lm)(task, learn, exact_match)
    after = evaluate(task, held_out, exact_match, lm=lm, params=params)
    assert before.score < 0.05 and after.score >= 0.5
    assert len(params["predict"].demos) <= 64
    assert lmopt.compare(before, after).p_value < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.csv"), "FileNotFoundError: .*none.csv"),
        (("--data", "bad.jsonl"), "DataError: bad.jsonl: line 2: this is no JSON"),
        (("--data", "empty.jsonl"), "DataError: an empty data set"),
        (("--signature", "ticket -> tema"), "DataError: no such field in the data: 'tema'"),
        (("--signature", "ticket"), "SignatureError: not one arrow: 'ticket'"),
        (("--signature", "tickt -> team"), "DataError: example 0: missing field 'tickt'"),
        (("--lm", "acme/x"), "DataError: unknown LM: 'acme/x'"),
        (("--lm", "openai/gpt-4o-mini"), "Unauthorized: no API key: 'OPENAI_API_KEY'"),
        (("--demos", "-1"), "DataError: max_labeled is too small: -1"),
        (("--out", "nowhere/params.json"), "FileNotFoundError: .*nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "bad.jsonl").write_text(
        '{"ticket": "a", "team": "b"}\n{"ticket": \n', encoding="utf-8"
    )
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert len(ended.value.code.splitlines()) == 1 and re.search(message, ended.value.code)


def test_the_data_of_a_user_may_be_csv(tmp_path):
    rows = [f"{color} thing {n},{color}" for n in range(10) for color in ("red", "blue", "größe")]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    done = run_script(
        "--data", "data.csv", "--signature", "text -> label", "--candidates", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    demos = json.loads((tmp_path / "params.json").read_text("utf-8"))["params"]["predict"]["demos"]
    assert {demo["label"] for demo in demos} == {"red", "blue", "größe"}
