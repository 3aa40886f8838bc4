# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "distributed", "httpx", "toolz"]
# ///
"""Optimize and evaluate on a Dask cluster, and get the same bytes as in one process.

Offline, on two worker processes of this machine; with a language model; on a cluster that is up
already, made by `dask scheduler` and `dask worker tcp://HOST:8786` where lmopt is installed:

    python examples/distributed_eval.py
    python examples/distributed_eval.py --lm openai/gpt-4o-mini
    python examples/distributed_eval.py --base-url http://localhost:8080/v1
    python examples/distributed_eval.py --address tcp://HOST:8786

lmopt runs rows on any `concurrent.futures.Executor`, and `client.get_executor()` is one. What goes
to the workers must pickle: program, LM, metric and rows. Modules such as `predict` do, and so do
toy_lm(), the LMs of `connect` (a worker reads the API key from its own environment), retry() and
record(); a budget does not, since it holds in one process. Functions and `@program`s of your own do
where they stand at the top level of a module that the workers can import.

A cassette is shared: each worker appends to the one file and answers from it, and the first answer
to a request stands. With --lm there is one by default. So the cluster repeats what this process was
answered, to the byte, and takes only the time to read it. Workers on other machines need the file
under the same path: give --cassette an absolute one that all of them see.

Processes pay where an LM, a program or a metric computes. For an LM that is only waited for, as
here and behind any network, threads of one process (`workers=`) do as well and cost less.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import auto, lm_of, lm_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from dask.distributed import Client

TICKETS = Path(__file__).with_name("tickets.jsonl")
toy = lmopt.toy_lm()
route = lmopt.predict("ticket -> team", instructions="Route the ticket.")


def slow_toy(request: lmopt.Request) -> lmopt.Response:
    """Answer as toy_lm() does, after a pause in place of the time that a real LM takes."""
    time.sleep(0.1)
    return toy(request)


class Outcome(NamedTuple):
    """What came of the work in one place."""

    params: str  # JSON
    rows: str  # JSON
    seconds: float


def work(
    lm: lmopt.LM, rows: Sequence[lmopt.Record], calls: int, executor: Executor | None
) -> Outcome:
    """Optimize on one half of the rows, and evaluate on the other."""
    began, half = time.perf_counter(), len(rows) // 2
    optimize = auto(lm, calls=calls, executor=executor)
    params = optimize(route, rows[:half], lmopt.exact_match)
    found = lmopt.evaluate(
        route, rows[half:], lmopt.exact_match, lm=lm, params=params, executor=executor
    )
    seconds = time.perf_counter() - began
    print(f"  {found}\n  {seconds:.1f} s")
    return Outcome(lmopt.dumps(params), found.to_json(), seconds)


def main(lm: lmopt.LM, client: Client, rows: int = 60, calls: int = 40) -> tuple[Outcome, Outcome]:
    """Do the same work in this process and on a cluster, and compare the bytes."""
    tickets = lmopt.read_examples(TICKETS)[:rows]
    print(f"In this process, {getattr(lm, 'concurrency', 1)} at once:")
    here = work(lm, tickets, calls, None)
    threads = client.nthreads().values()
    print(f"On the cluster, {sum(threads)} at once in {len(threads)} processes:")
    # pure=False, for Dask would else run what looks equal once; an LM is to be asked each time.
    there = work(lm, tickets, calls, client.get_executor(pure=False))
    print("The parameters are the same bytes:", here.params == there.params)
    print("The rows are the same bytes:", here.rows == there.rows)
    return here, there


def connected(address: str | None = None) -> Client:
    """Connect to a cluster, or start a small one that ends with the client."""
    from dask.distributed import Client

    if address:
        return Client(address)
    return Client(n_workers=2, threads_per_worker=4, dashboard_address=None)


# Worker processes import this file too; without the next line, each would start workers again.
if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="of a Dask scheduler; by default two processes here")
    parser.add_argument("--rows", type=int, default=60, help="half to learn from, half to test on")
    parser.add_argument("--calls", type=int, default=40, help="of the LM, for auto at most")
    given = lm_options(parser, cassette="distributed_eval.calls.jsonl").parse_args()
    with connected(given.address) as client:
        main(lm_of(given, slow_toy), client, given.rows, given.calls)
