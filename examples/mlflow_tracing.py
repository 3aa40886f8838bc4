# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz", "mlflow-skinny>=3.5", "sqlalchemy", "alembic"]
# ///
"""An agent fails, and its trace in MLflow tells which tool did; trials are kept there as runs.

The agent's events are told as they end, and written as spans into a local store, where the failed
one is found again. Then an optimizer's trials become runs, and the best is read back.

Offline, with a stand-in that does as a language model would:

    python examples/mlflow_tracing.py

With a language model; `--folder` keeps the store, for `mlflow ui` (of the package mlflow) to show:

    python examples/mlflow_tracing.py --lm openai/gpt-4o-mini --folder store
    python examples/mlflow_tracing.py --base-url http://localhost:8080/v1
    mlflow ui --backend-store-uri sqlite:///store/mlflow.db
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import auto, lm_of, lm_options

TICKETS = Path(__file__).with_name("tickets.jsonl")
WEIGHTS = {"teapot": "1.2 kg", "tea strainer": "85 g", "cast-iron kettle": "3.4 kg"}
QUESTIONS = [
    {"question": "What does it cost to send the teapot?", "euros": 4.99},
    {"question": "What does it cost to send the tea strainer?", "euros": 4.99},
    {"question": "What does it cost to send the cast-iron kettle?", "euros": 7.49},
]


def weight(item: str) -> float:
    """Return what an item weighs, in kilograms."""
    return float(WEIGHTS[item].removesuffix(" kg"))


def postage(kilograms: float) -> float:
    """Return what it costs to send a parcel of this weight, in euros."""
    return 4.99 if kilograms <= 2 else 7.49


agent = lmopt.react(
    "question -> euros: float | None",
    [weight, postage],
    instructions="Tell what the postage is, or null if that cannot be found out.",
    max_steps=5,
)
route = lmopt.predict("ticket -> team", instructions="Route the ticket.")


def open_store(folder: Path) -> None:
    """Have MLflow keep everything in a folder."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it reports its use
    import mlflow

    folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder.resolve().as_posix()}/mlflow.db")
    if not mlflow.get_experiment_by_name("lmopt"):
        mlflow.create_experiment("lmopt", artifact_location=(folder / "files").resolve().as_uri())
    mlflow.set_experiment("lmopt")


def tell(event: lmopt.Event) -> None:
    """Print a line for an event, as it ends."""
    print(f"  {event.name}: {lmopt.cut(event.told()[-1], 90)}")


def write(trace: lmopt.Trace, score: float) -> None:
    """Write what a run did as a trace of MLflow, which knows the names of the attributes."""
    import mlflow
    from mlflow.entities import SpanStatus, SpanStatusCode

    made: dict[str, Any] = {}
    spans = lmopt.spans(trace)
    for span in sorted(spans, key=lambda span: span.span_id):  # a step before what it did
        made[span.span_id] = mlflow.start_span_no_context(
            span.name,
            parent_span=made.get(span.parent_id),
            inputs=None if span.parent_id else dict(trace[-1].inputs),  # shown in lists of traces
            attributes=span.attributes,
            tags={"score": str(score)},
            start_time_ns=span.start,
        )
    for span in spans:  # a step after what it did; the last is the run, which ends the trace
        code = SpanStatusCode.ERROR if span.error else SpanStatusCode.OK
        made[span.span_id].end(status=SpanStatus(code, span.error), end_time_ns=span.end)


def trace_agent(lm: lmopt.LM) -> list[Any]:
    """Measure the agent, write its runs, and find in the store those in which something failed.

    The agent observes that a tool failed and goes on, so the status of the whole run is OK.
    """
    import mlflow

    with mlflow.start_run(run_name="agent") as run:
        made = lmopt.evaluate(
            agent, QUESTIONS, lmopt.exact_match, lm=lm, workers=1, progress=False, watch=tell
        )  # one worker, so that the lines of a run stand together
        for row in made.rows:
            write(row.prediction.trace, row.score)
    failed = "span.status = 'ERROR'"
    found: list[Any] = mlflow.search_traces(
        run_id=run.info.run_id, filter_string=failed, return_type="list", flush=True
    )
    print(f"{made}\nSomething failed in {len(found)} of {len(made.rows)} runs:")
    for trace in found:
        print(f"{trace.data.spans[0].inputs['question']} (score {trace.info.tags['score']})")
        for span in trace.data.spans:
            if span.status.status_code == "ERROR":
                print(f"  {span.name}, given {span.inputs}: {span.status.description}")
    return found


def trace_search(lm: lmopt.LM, size: int) -> tuple[list[Any], lmopt.Params]:
    """Optimize, each trial a child of one run; return from the store the children and the best."""
    import mlflow

    tickets, search = lmopt.read_examples(TICKETS)[:size], auto(lm, calls=2 * size)
    with mlflow.start_run(run_name=search.name) as parent:
        for number, trial in enumerate(search.trials(route, tickets, lmopt.exact_match)):
            with mlflow.start_run(run_name=f"trial {number}", nested=True, description=trial.note):
                numbers = {"score": trial.score, "calls": trial.calls, "tokens": trial.tokens}
                mlflow.log_metrics({name: one for name, one in numbers.items() if one is not None})
                mlflow.log_params({"out": trial.out, "final": trial.final, "from": trial.parent})
                mlflow.log_text(lmopt.dumps(trial.params), "params.json")
    children = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    order = ["params.final DESC", "params.out", "metrics.score DESC"]
    trials = mlflow.search_runs(filter_string=children, order_by=order, output_format="list")
    for one in trials:
        score, note = one.data.metrics["score"], one.data.tags["mlflow.note.content"]
        print(f"{one.info.run_name}: {score:.3f} {note}")
    stored = mlflow.artifacts.load_text(f"{trials[0].info.artifact_uri}/params.json")
    return trials, lmopt.loads(stored)


def clerk(inputs: lmopt.Record) -> dict[str, Any]:
    """Do as a language model would in the agent."""
    item = inputs.question.rpartition(" the ")[2].rstrip("?")
    seen = [turn.observation for turn in inputs.trajectory]
    if not seen:
        return {"thought": "First the weight.", "tool": "weight", "arguments": {"item": item}}
    if not seen[-1]:  # it has finished
        return {"reasoning": "That is what the tools say.", "euros": seen[1] or None}
    if len(seen) == 1 and "failed" not in seen[0]:
        given = {"kilograms": float(seen[0])}
        return {"thought": "Now the postage.", "tool": "postage", "arguments": given}
    return {"thought": "There is no more to find out.", "tool": "finish"}


def offline(request: lmopt.Request) -> lmopt.Response:
    """Answer as a clerk in the agent, and elsewhere as a toy that learns from demonstrations."""
    in_agent = "trajectory" in (request.inputs or {})
    return (lmopt.mock_lm(clerk) if in_agent else lmopt.toy_lm())(request)


def main(lm: lmopt.LM, folder: Path, size: int = 80) -> None:
    """Do both, in one store."""
    open_store(folder)
    trace_agent(lm)
    _, params = trace_search(lm, size)
    print(f"The best has {len(params['predict'].demos)} demonstrations and these instructions:")
    print(params["predict"].instructions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the store here; by default nowhere")
    parser.add_argument("--tickets", type=int, default=80, help="to learn from, two calls for each")
    given = lm_options(parser, cassette="mlflow_tracing.calls.jsonl").parse_args()
    with TemporaryDirectory(ignore_cleanup_errors=True) as passing:
        main(lm_of(given, offline), given.folder or Path(passing), given.tickets)
