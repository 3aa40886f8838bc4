"""The command line: from data to a saved, measured, reported result; and its words for mistakes."""

import csv
import json
import pickle
import re
import subprocess
import sys
import tomllib

import pytest
import wire
from conftest import ROOT

import lmopt
import lmopt_optimizers
from lmopt import Prompt, toy_lm
from lmopt_optimizers import lm_of, lm_options, main

TASK = "ticket -> team"
WORDS = {"billing": "invoice", "shipping": "parcel", "account": "password"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with data, and a file of Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    rows = [(f"my {word} number {n}", team) for n in range(12) for team, word in WORDS.items()]
    with (tmp_path / "tickets.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("ticket", "team"), *rows])
    (tmp_path / "mine.py").write_text(
        """
import lmopt
from lmopt_optimizers import copro, optimizer

triage = lmopt.chain_of_thought("ticket -> team", instructions="Sort it.")

def team(ticket: str) -> str:
    "Name the team."

def strict(example, made):
    return example.team == made.team

def small(lm, *, breadth=2, **options):
    return copro(lm, breadth=breadth, depth=1, **options)
""",
        encoding="utf-8",
    )
    (tmp_path / "json.py").touch()
    (tmp_path / "time.py").touch()
    return tmp_path


def run(capsys, *arguments):
    """The exit code, and what was printed on either side."""
    code = main(list(arguments))
    out, told = capsys.readouterr()
    return code, out, told


def test_a_session_from_data_to_a_reported_result(folder, capsys):
    code, out, _ = run(capsys, "eval", TASK, "tickets.csv")
    assert code == 0 and "<score 0.000" in out and "predicted team" in out
    search = ("optimize", TASK, "tickets.csv", "--calls", "60", "--report", "report.html")
    code, out, told = run(capsys, *search)
    assert code == 0 and "+demo: " in out and "after:  <score 1.000" in out and "p = 0.0039" in out
    assert "27 rows to learn from; at most 60 runs and 60 LM calls" in told
    assert " start\n" in told and "the toy LM answers" in told
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")
    again = (TASK, "--params", "params.json")
    assert run(capsys, "run", *again, "ticket=the invoice is wrong")[1] == "team: billing\n"
    code, out, _ = run(capsys, "eval", *again[:1], "tickets.csv", *again[1:], "--json")
    assert json.loads(out)["score"] > 0.9 and json.loads(out)["rows"] == 36
    assert run(capsys, *search)[1] == run(capsys, *search)[1]


def test_results_as_data_and_as_files(folder, capsys):
    code, out, _ = run(capsys, "optimize", TASK, "tickets.csv", "--calls", "60", "--json")
    made = json.loads(out)
    assert code == 0 and made["after"]["score"] == 1.0 and made["gain"]["difference"] == 1.0
    assert made["params"] == "params.json" and made["calls"] <= 60
    run(capsys, "eval", TASK, "tickets.csv", "--out", "rows.csv", "--rows", "6")
    run(capsys, "eval", TASK, "tickets.csv", "--out", "rows.json", "--rows", "6")
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["team"] for row in rows] == [
        row["team"] for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    ]
    assert len(rows) == 6 and len({row["team"] for row in rows}) == 3
    code, out, _ = run(capsys, "run", TASK, "--data", "tickets.csv", "--params", "params.json")
    assert [json.loads(line)["team"] for line in out.splitlines()][:3] == list(WORDS)


def test_programs_metrics_and_optimizers_of_a_file(folder, capsys):
    task = ("mine.py:triage", "tickets.csv", "--metric", "mine.py:strict", "--test", "0")
    code, out, told = run(capsys, "optimize", *task, "--optimizer", "mine.py:small")
    assert code == 0 and "no rows to test on" in told and "before: " not in out
    given = ("--optimizer", "copro", "--option", "depth=1", "--option", "max_labeled=0")
    code, _, told = run(capsys, "optimize", *task, *given, "--calls", "40", "--seed", "3")
    assert code == 0 and "warning: the search was ended by CallsSpent" in told
    few = ("--optimizer", "labeled_few_shot", "--option", "k=2")  # it takes no LM
    code, out, _ = run(capsys, "optimize", "mine.py:team", "tickets.csv", *few)
    assert code == 0 and out.count("+demo: ") == 2 and "before: <score 0.000" in out
    assert run(capsys, "show", "params.json")[1].startswith(
        "predict\n  instructions: Name the team."
    )


def test_show_prints_the_exact_prompts(folder, capsys):
    prompt = Prompt("Sort it.", demos=[{"ticket": "a", "reasoning": "b", "team": "c"}])
    lmopt.save({"predict": prompt}, "p.json")
    task = lmopt.chain_of_thought(TASK)
    lmopt.save(task.with_params(dict.fromkeys(task.params, prompt)).params, "q.json")
    code, out, _ = run(capsys, "show", "q.json", TASK, "--module", "chain_of_thought")
    ready = task.with_params(lmopt.load("q.json"))
    (path,) = ready.params
    sent = lmopt.transcript(lmopt.preview(ready, ticket="{ticket}"))
    assert (code, out) == (0, f"===== {path} =====\n{sent}\n")
    code, out, _ = run(capsys, "show", "p.json", "n: int, tags: list[str] -> team", "--json")
    assert code == 0 and "tags" in json.loads(out)["predict"]


def test_diff_of_two_files(folder, capsys):
    lmopt.save({"predict": Prompt("Old.")}, "a.json")
    lmopt.save({"predict": Prompt("New.")}, "b.json")
    assert run(capsys, "diff", "a.json", "b.json")[1].splitlines()[2:] == [
        "-instructions: Old.",
        "+instructions: New.",
    ]
    assert run(capsys, "diff", "a.json", "a.json")[1] == "no difference\n"


def test_a_run_is_watched_and_replayed(folder, capsys):
    code, out, told = run(
        capsys, "run", "mine.py:triage", "--trace", "t.json", "--watch", "ticket=a = b"
    )
    assert code == 0 and "reasoning: " in out and "lm toy" in told
    code, again, told = run(capsys, "replay", "mine.py:triage", "t.json")
    assert (code, told) == (0, "") and again.endswith(f"\n\n{out}") and "lm toy" in again
    code, _, told = run(capsys, "replay", "triage -> x", "t.json")
    assert code == 2 and "DataError" in told
    code, again, _ = run(capsys, "replay", "mine.py:triage", "t.json", "--upto", "0", "--json")
    assert code == 0 and json.loads(again).keys() == {"reasoning", "team"}


def test_a_search_over_http_goes_on_from_its_cassette_and_is_reported_from_it(folder, capsys):
    asked = []

    def answer(payload):
        asked.append(payload)
        return wire.failure(401) if len(asked) == 40 else wire.served_by(toy_lm())(payload)

    with wire.server(answer) as served:
        search = ("optimize", TASK, "tickets.csv", "--calls", "60", "--base-url", served.base_url)
        code, _, told = run(capsys, *search, "--concurrency", "1")
        assert code == 1 and "Unauthorized" in told
        first = len(asked)
        code, out, _ = run(capsys, *search, "--concurrency", "1")
        assert code == 0 and "after:  <score 1.000" in out
        assert len({json.dumps(one["messages"]) for one in asked}) == len(asked) - 1 > first
        paid = len(asked)
        again = ("report", TASK, "tickets.csv", "--calls", "60")
        code, out, _ = run(capsys, *again, "--cassette", "params.calls.jsonl", "--out", "r.html")
    assert code == 0 and "labelled examples" in out and len(asked) == paid
    assert "<svg" in (folder / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("eval", "ticket", "tickets.csv"), 2, "SignatureError: not one arrow"),
        (("eval", TASK, "none.csv"), 2, "FileNotFoundError: .*none.csv"),
        (("eval", "a -> b", "tickets.csv"), 2, "DataError: example 0: missing field 'a'"),
        (("eval", TASK, "tickets.csv", "--metric", "exat"), 2, "no such name: 'exat'"),
        (("eval", "mine.py:nobody", "tickets.csv"), 2, "no such name in the file"),
        (("eval", "other.py:team", "tickets.csv"), 2, "no such file: .*other.py"),
        (("eval", "json.py:team", "tickets.csv"), 2, "another module is called 'json'"),
        (("eval", "time.py:team", "tickets.csv"), 2, "another module is called 'time'"),
        (("run", TASK, "a=1", "--data", "tickets.csv"), 2, "--data takes rows only"),
        (("run", TASK, "--data", "tickets.csv", "--trace", "t.json"), 2, "--data takes rows only"),
        (("report", TASK, "tickets.csv", "--lm", "vllm/x"), 2, "a report asks no LM: .*--cassette"),
        (("run", TASK, "ticket"), 2, "no value is given: 'ticket'"),
        (("run", TASK, "ticket=a", "--lm", "acme/x"), 2, "unknown LM"),
        (("run", TASK, "ticket=a", "--lm", "vllm/x", "--price", "1"), 2, "no price: .*0.15, 0.60"),
        (("run", TASK, "ticket=a", "--lm", "openai/x"), 1, "Unauthorized: no API key"),
        (("run", TASK, "ticket=a", "--lm", "vllm/x", "--budget", "5"), 2, "without a price"),
        (("run", TASK, "ticket=a", "--base-url", "http://x", "--key-env", "NO_SUCH"), 2, "no key"),
        (("optimize", TASK, "tickets.csv", "--optimizer", "Trial"), 2, "no such optimizer"),
        (("optimize", TASK, "tickets.csv", "--option", "refti=1"), 2, "did you mean refit"),
        (("optimize", TASK, "tickets.csv", "--test", "none.csv"), 2, "no such rows to test on"),
        (("replay", TASK, "tickets.csv"), 2, "this is no trace"),
        (("eval", TASK, "tickets.csv", "--budget", "1"), 2, "the toy LM costs nothing"),
        (("eval", "ticket -> dept", "tickets.csv"), 2, "no column of an output: .*name it in the"),
        (("eval", TASK, "tickets.csv", "--out", "no/rows.csv"), 2, "no file can be written there"),
        (("optimize", TASK, "tickets.csv", "--test", "1"), 2, "no share: 1.0"),
        (("run", "mine.py", "ticket=a"), 2, "no name in the file: 'mine.py'.*write mine.py:NAME"),
        (("show", "tickets.csv"), 2, "these are no parameters"),
    ],
)
def test_mistakes_are_one_clear_line(folder, capsys, monkeypatch, arguments, code, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made, out, told = run(capsys, *arguments)
    assert (made, out) == (code, "")
    assert re.search(message, told) and "Traceback" not in told


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("dance",),
        ("run",),
        ("run", TASK, "--foo"),
        ("run", TASK, "--param", "p.json"),
        ("run", TASK, "--price", "dear"),
        ("eval", TASK, "tickets.csv", "--rows", "-3"),
        ("eval", TASK, "a", "b=c"),
    ],
)
def test_wrong_use_shows_what_is_right(folder, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2 and "usage: lmopt" in capsys.readouterr().err


def test_ctrl_c_leaves_an_older_trace_as_it_was(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (folder / "t.json").write_text("older", encoding="utf-8")
    monkeypatch.setattr(lmopt, "run", interrupted)
    assert run(capsys, "run", TASK, "ticket=a", "--trace", "t.json")[0] == 130
    assert (folder / "t.json").read_text(encoding="utf-8") == "older"


def test_ctrl_c_ends_it_with_the_best_so_far(folder, capsys, monkeypatch):
    def trials(self, *task):
        yield lmopt_optimizers.Trial(task[0].params.replace("predict", instructions="Kept."), 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(lmopt_optimizers.Optimizer, "trials", trials)
    code, _, told = run(capsys, "optimize", TASK, "tickets.csv")
    assert code == 130 and told.endswith("the best so far is in params.json\ninterrupted\n")
    assert lmopt.load("params.json")["predict"].instructions == "Kept."


def test_it_is_a_script_and_a_module():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert scripts["scripts"] == {"lmopt": "lmopt_optimizers:main"}
    command = [sys.executable, "-m", "lmopt_optimizers", "run", "q -> a", "q=ä"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "a: ä\n")


ASKED = lmopt.Request([lmopt.Message("user", "?")])


def given(*arguments):
    import argparse

    return lm_options(argparse.ArgumentParser(), cassette="calls.jsonl").parse_args(arguments)


def test_the_lm_of_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    offline = lmopt.scripted_lm(["!"])
    assert (
        lm_of(given(), offline) is offline and lm_of(given("--lm", "toy"), offline) is not offline
    )
    assert lm_of(given())(ASKED).model == "toy"
    lm = lm_of(given("--lm", "ollama/x", "--concurrency", "3", "--timeout", "7"))
    assert (lm.concurrency, lm.end.timeout, lm.model) == (3, 7.0, "x")
    served = lm_of(given("--lm", "Qwen/Qwen3-8B", "--base-url", "http://localhost:1/v1"))
    assert (served.model, served.url) == (
        "Qwen/Qwen3-8B",
        "http://localhost:1/v1/chat/completions",
    )
    assert lm_of(given("--base-url", "http://localhost:1/v1")).model == "default"
    priced = lm_of(given("--lm", "vllm/x", "--price", "0.15,0.6", "--budget", "2"))
    assert priced.price == (0.15, 0.6) and lmopt.budget_left(priced) == {"usd": 2.0}
    monkeypatch.setenv("MINE", "secret")
    keyed = lm_of(given("--lm", "vllm/x", "--key-env", "MINE"))
    assert keyed.end.key() == "secret"
    assert b"secret" not in pickle.dumps(keyed) and pickle.loads(pickle.dumps(keyed)).end.key
    assert (tmp_path / "calls.jsonl").exists() is False
    lm_of(given("--cassette", "mine.jsonl"), offline)(ASKED)
    lm_of(given("--cassette", "", "--lm", "ollama/x"))
    assert (tmp_path / "mine.jsonl").exists() and not (tmp_path / "calls.jsonl").exists()
    with pytest.raises(lmopt.DataError, match="without a price"):
        lm_of(given("--budget", "1"), lmopt.toy_lm())(ASKED)


def test_a_failed_search_does_not_take_the_place_of_an_older_file(folder, capsys):
    lmopt.save({"predict": Prompt("Good.")}, "params.json")
    asked = []

    def answer(payload):
        asked.append(payload)
        return wire.failure(401) if len(asked) > 20 else wire.served_by(toy_lm())(payload)

    with wire.server(answer) as served:
        search = ("optimize", TASK, "tickets.csv", "--test", "0", "--base-url", served.base_url)
        code, _, told = run(capsys, *search, "--concurrency", "1", "--cassette", "")
    assert code == 1 and "Unauthorized" in told and "params.json" not in told.split("kept in")[0]
    assert lmopt.load("params.json")["predict"].instructions == "Good."


def test_a_cut_off_search_is_reported_as_far_as_it_came(folder, capsys):
    asked = []

    def answer(payload):
        asked.append(payload)
        return wire.failure(401) if len(asked) > 25 else wire.served_by(toy_lm())(payload)

    task = (TASK, "tickets.csv", "--calls", "60", "--test", "0")
    with wire.server(answer) as served:
        run(capsys, "optimize", *task, "--base-url", served.base_url, "--concurrency", "1")
    code, out, told = run(capsys, "report", *task, "--cassette", "params.calls.jsonl")
    assert code == 0 and "the cassette ends here" in told and " start" in out


def test_what_was_done_before_a_row_failed_is_printed(folder, capsys):
    (folder / "rows.csv").write_text("ticket\na\nb\n", encoding="utf-8")
    replies = iter(["[[ ## team ## ]]\nx\n\n[[ ## completed ## ]]"])
    with wire.server(lambda payload: wire.completion(next(replies, "?"))) as served:
        lm = ("--base-url", served.base_url, "--concurrency", "1")
        code, out, told = run(
            capsys, "run", "ticket -> team: Literal['x']", "--data", "rows.csv", *lm
        )
    assert code == 1 and out == '{"team": "x"}\n' and "ParseError" in told
    with wire.server(lambda payload: wire.completion("?")) as served:
        lm = ("--base-url", served.base_url, "--trace", "t.json")
        code, _, told = run(capsys, "run", "ticket -> team: Literal['x']", "ticket=a", *lm)
    assert code == 1 and len(lmopt.Trace.from_json((folder / "t.json").read_text("utf-8"))) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="there is no head here")
def test_who_reads_may_stop_reading(folder):
    lmopt.save({"predict": Prompt("Go.\n" * 100_000)}, folder / "p.json")
    command = f"{sys.executable} -m lmopt_optimizers show {folder / 'p.json'}"
    ran = subprocess.run(
        f"{command} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (ran.stdout, ran.stderr) == ("predict\n", "")
