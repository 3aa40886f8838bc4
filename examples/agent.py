# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz"]
# ///
"""An agent with three tools answers a question that takes several steps.

Offline, from the cassette beside this file, whose replies were written by hand:

    python examples/agent.py

With a language model, on any question about the rivers below:

    python examples/agent.py --lm openai/gpt-4o-mini "How far is it to walk along the Rhine?"
"""

import argparse
import ast
import operator
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import lm_of, lm_options

QUESTION = "Which river is longer, the Danube or the Rhine, and by how many percent?"
TAPE = Path(__file__).parent / "agent.jsonl"
LENGTHS = {"danube": 2850, "rhine": 1233, "elbe": 1094, "loire": 1006}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def find_rivers(word: str) -> list[str]:
    """List the known rivers whose names contain a word; all of them for an empty one."""
    return [name for name in LENGTHS if word.lower() in name]


def river_length(name: str) -> int:
    """Return the length of a river in kilometres.

    Args:
        name: of the river, as find_rivers gives it.
    """
    return LENGTHS[name.lower()]


def calculate(expression: str) -> float:
    """Work out an arithmetic expression with numbers, brackets and + - * /."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return float(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        raise ValueError(f"only numbers and + - * /, not {ast.unparse(node)!r}")

    return round(value(ast.parse(expression, mode="eval").body), 3)


agent = lmopt.react(
    "question -> river: str, percent: int",
    [find_rivers, river_length, calculate],
    instructions="Answer the question about rivers; percent is how much longer the river is.",
    max_steps=8,
)


def main(lm: lmopt.LM, question: str) -> lmopt.Prediction:
    """Answer a question, and show each step on the way."""
    prediction = agent(lm, question=question)
    for number, turn in enumerate(prediction.trajectory, start=1):
        given = ", ".join(f"{name}={value!r}" for name, value in turn.arguments.items())
        print(f"{number}. {turn.thought}\n   {turn.tool}({given}) -> {turn.observation}")
    print(f"\n{prediction.river}, by {prediction.percent} %")
    print(f"{prediction.usage.calls} calls of the language model")
    return prediction


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    given = lm_options(parser, cassette="agent.calls.jsonl").parse_args()
    main(lm_of(given, lmopt.replay_lm(TAPE)), given.question)
