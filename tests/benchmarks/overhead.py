"""What lmopt itself costs, over an LM that answers at once; DSPy beside it where it is installed.

    python tests/benchmarks/overhead.py

Absolute times depend on the machine; the ratios, taken side by side in one run, hardly do.
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from lmopt import Prompt, Record, Response, evaluate, exact_match, predict, toy_lm

REPLY = "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
QUESTION = "What is the capital of France?"
DEMOS = [{"question": f"What is number {n}?", "answer": f"number {n}"} for n in range(16)]
ANSWER = Response(REPLY)


def instant(request: Any) -> Response:
    """An LM that costs nothing."""
    return ANSWER


def microseconds(call: Callable[[], Any], times: int, rounds: int = 15) -> float:
    """The best of several rounds: what it costs while nothing else disturbs the machine."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(times):
            call()
        found.append((time.perf_counter() - began) / times * 1e6)
    return min(found)


def with_demos(count: int) -> Any:
    """A program with some demonstrations."""
    prompt = Prompt("Answer the question.", demos=DEMOS[:count])
    return predict("question -> answer").with_params({"predict": prompt})


def lmopt_predict(count: int) -> float:
    """One call of `predict`."""
    program = with_demos(count)
    return microseconds(lambda: program(instant, question=QUESTION), 1000)


def dspy_predict(count: int) -> float:
    """One call of `dspy.Predict`."""
    import dspy

    class Instant(dspy.BaseLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(model="instant")
            self.kwargs = {}

        def forward(self, **kwargs: Any) -> Any:
            message = SimpleNamespace(content=REPLY, tool_calls=None)
            choice = SimpleNamespace(message=message, finish_reason="stop")
            return SimpleNamespace(choices=[choice], usage={}, model="instant")

    dspy.configure(lm=Instant(), disable_history=True)
    program = dspy.Predict("question -> answer")
    program.demos = [dspy.Example(**demo) for demo in DEMOS[:count]]
    return microseconds(lambda: program(question=QUESTION), 100)


def per_example(size: int, workers: int) -> float:
    """`evaluate`, per example."""
    rows = [Record(question=f"{n}?", answer="Paris") for n in range(size)]
    began = time.perf_counter()
    evaluate(with_demos(0), rows, exact_match, lm=instant, workers=workers)
    return (time.perf_counter() - began) / size * 1e6


def main() -> None:
    """Print the table."""
    installed = importlib.util.find_spec("dspy") is not None
    print("predict over an instant LM, microseconds a call (best of 15 rounds)")
    for count in (0, 8):
        ours = lmopt_predict(count)
        theirs = dspy_predict(count) if installed else None
        beside = f"   DSPy {theirs:6.1f}   ratio {theirs / ours:5.1f}" if theirs else ""
        print(f"  {count} demonstrations: lmopt {ours:6.1f}{beside}")
    if not installed:
        print("  (DSPy is not installed)")

    print("evaluate over an instant LM, microseconds an example")
    for workers in (1, 2):
        small = statistics.median(per_example(2_000, workers) for _ in range(5))
        large = per_example(200_000, workers)
        print(
            f"  {workers} workers: {small:6.1f} with 2,000 examples, "
            f"{large:6.1f} with 200,000; ratio {large / small:.2f}"
        )

    program = with_demos(16)
    rate = 1e6 / microseconds(lambda: program(toy_lm(), question=QUESTION), 50)
    print(f"toy_lm with 16 demonstrations: {rate:,.0f} requests a second")


if __name__ == "__main__":
    main()
