import json
import subprocess
import sys

import pytest
from conftest import ROOT, load_example

import lmopt

for package in ("sqlalchemy", "alembic", "mlflow"):
    pytest.importorskip(package, reason=f"{package} is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One store, whose tables take seconds to make."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def example(folder):
    example = load_example("mlflow_tracing")
    example.open_store(folder)
    return example


def loaded(value):
    """The data of JSON, which MLflow reads where it is an object or a list."""
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value


def test_the_run_that_failed_is_found_and_its_tool_named(example):
    (trace,) = example.trace_agent(example.offline)
    failed = [span for span in trace.data.spans if span.status.status_code == "ERROR"]
    assert [span.attributes["gen_ai.tool.name"] for span in failed] == ["weight"]
    assert failed[0].status.description == "ValueError: could not convert string to float: '85 g'"
    assert failed[0].span_type == "TOOL" and "tea strainer" in str(failed[0].inputs)
    assert trace.data.spans[0].inputs == {"question": example.QUESTIONS[1]["question"]}
    assert trace.info.tags["score"] == "0.0"
    assert trace.info.status == "OK"  # the agent went on: only its spans tell


def test_nothing_is_found_once_the_tool_gets_what_it_can_read(example):
    example.WEIGHTS["tea strainer"] = "0.085 kg"
    assert example.trace_agent(example.offline) == []


def test_the_store_holds_the_tree_the_times_and_the_attributes_of_the_run(example):
    import mlflow

    made = example.agent(example.offline, question=example.QUESTIONS[0]["question"])
    example.write(made.trace, 1.0)
    (stored,) = mlflow.search_traces(max_results=1, return_type="list", flush=True)
    spans = sorted(lmopt.spans(made.trace), key=lambda span: span.span_id)
    found = stored.data.spans
    ids = dict(zip((one.span_id for one in spans), (one.span_id for one in found), strict=True))
    assert len({(one.start_time_ns, one.name) for one in found}) == len(spans) == 11
    for span, one in zip(spans, found, strict=True):
        assert (one.name, one.start_time_ns, one.end_time_ns) == (span.name, span.start, span.end)
        assert one.parent_id == (ids[span.parent_id] if span.parent_id else None)
        for name, value in span.attributes.items():
            assert loaded(one.attributes[name]) == loaded(value)


def test_trials_are_children_of_one_run_with_what_they_scored_and_say(example):
    trials, params = example.trace_search(example.offline, 80)
    scores = [one.data.metrics["score"] for one in trials]
    assert len({one.data.tags["mlflow.parentRunId"] for one in trials}) == 1 and len(trials) > 3
    assert scores[0] > 0.5 and trials[0].data.params["final"] == "True"
    (start,) = [one for one in trials if one.data.params["from"] == "None"]
    assert start.data.metrics["score"] == 0.0 and start.data.metrics["tokens"] > 0
    rows = lmopt.read_examples(example.TICKETS)[80:120]
    learned = lmopt.evaluate(
        example.route, rows, lmopt.exact_match, lm=example.offline, params=params
    )
    assert learned.score > 0.5  # of tickets that no trial saw


def test_it_runs_as_a_script(folder):
    script = [sys.executable, str(ROOT / "examples" / "mlflow_tracing.py"), "--folder", str(folder)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.count("\n  react: ") == 3  # a line for each event, as it ends
    found = "Something failed in 1 of 3 runs:\nWhat does it cost to send the tea strainer?"
    assert found in ran.stdout
    assert "execute_tool weight, given " in ran.stdout and "trial 0: 0.000 start" in ran.stdout
