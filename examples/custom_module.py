# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz"]
# ///
"""A module of one's own, written as those of the library are: a closure around `program`.

`self_check` answers, asks itself questions about the answer, and corrects it at most once. It runs
as any program does (in a thread, in an event loop, in pieces, in other processes), and its steps
can be optimized like all others. Offline, with a writer that forgets things, and a toy LM that
learns from demonstrations:

    python examples/custom_module.py

With a language model:

    python examples/custom_module.py --lm openai/gpt-4o-mini
    python examples/custom_module.py --base-url http://localhost:8080/v1
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import bootstrap_few_shot, lm_of, lm_options, split, spread

TICKETS = Path(__file__).with_name("tickets.jsonl")


@lmopt.factory
def self_check(
    task: lmopt.Task, questions: Sequence[str], *, name: str = "self_check", **options: Any
) -> lmopt.Program:
    """Make the program that answers, checks its answer, and corrects it at most once.

    Args:
        questions: asked about each answer, all at once; it stands if each is answered "yes".
        **options: what `predict` takes, for all three steps.
    Calls: those of `predict`, once for each question and twice more.
    Reference: Dhuliawala et al. 2023, arXiv 2309.11495 (chain of verification).
    """
    made = lmopt.signature(task)
    asked = lmopt.signature("criterion -> reason, verdict: Literal['yes', 'no']")
    told = lmopt.Field("draft", dict[str, Any]), lmopt.Field("objections", list[str])
    mend = f"{made.instructions}\n\nMend what the objections say, and leave the rest of the draft."
    tasks = {
        "answer": made,
        "check": lmopt.Signature(
            made.inputs + made.outputs + asked.inputs, asked.outputs, "Check the answer."
        ),
        "correct": lmopt.Signature(made.inputs + told, made.outputs, mend),
    }
    known = {step: lmopt.predict(one, name=step, **options) for step, one in tasks.items()}

    def body(steps: Any, /, **inputs: Any) -> lmopt.Flow:
        first = yield steps.answer(**inputs)
        checks = yield [steps.check(**inputs, **first, criterion=one) for one in questions]
        objections = [one.reason for one in checks if one.verdict == "no"]
        if not objections:
            return first
        return (yield steps.correct(**inputs, draft=first, objections=objections))

    facts = {"inputs": made.inputs, "outputs": [one.name for one in made.outputs], "name": name}
    most = (len(questions) + 2) * known["answer"].max_calls  # a plan of costs relies on it
    return lmopt.program(known, max_calls=most, **facts)(body)


def reply(complaint: str, order: int) -> str:
    """Write a reply to the customer, in two or three sentences."""


replying = self_check(
    reply, ["Does it name the number of the order?", "Does it say when we write again?"]
)
routing = self_check(
    """ticket -> team: Literal['account', 'billing', 'privacy', 'refunds', 'returns',
                               'sales', 'shipping', 'technical']""",
    ["Can this team do what the customer wants?"],
)


def forgetful(inputs: lmopt.Record) -> dict[str, Any]:
    """Write as one who forgets the number of the order, and sees it when asked."""
    if "criterion" in inputs:
        sought = str(inputs.order) if "number" in inputs.criterion else "Monday"
        reason, verdict = ("it is there", "yes") if sought in inputs.reply else ("missing", "no")
        return {"reason": f"{sought}: {reason}", "verdict": verdict}
    if "objections" in inputs:
        return {"reply": f"{inputs.draft['reply']} Your order has the number {inputs.order}."}
    return {"reply": "We are sorry to hear that. We write again on Monday."}


def offline(request: lmopt.Request) -> lmopt.Response:
    """Answer as a toy LM where it is about tickets, else as the forgetful writer."""
    lm = lmopt.toy_lm() if "ticket" in request.inputs else lmopt.mock_lm(forgetful)
    return lm(request)


def run_everywhere(lm: lmopt.LM) -> list[lmopt.Prediction]:
    """Run one program on one input in every way there is."""
    inputs = {"complaint": "My parcel is two weeks late!", "order": 4711}
    here = replying(lm, **inputs)
    steps = [event for event in here.trace if event.kind == "step" and event.path]
    print(*(f"{event.path}: {dict(event.outputs)}" for event in steps), sep="\n")
    loop = asyncio.run(lmopt.arun(replying, lm, inputs))
    *pieces, streamed = lmopt.stream(replying, lm, inputs)
    print(f"In pieces: {', '.join(dict.fromkeys(one.path for one in pieces))}")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        (there,) = lmopt.run_many(replying, lm, [inputs], executor=pool)
    print(f"The same in all four: {here == loop == streamed == there}\n")
    return [here, loop, streamed, there]


def main(lm: lmopt.LM, rows: int = 160) -> lmopt.Comparison:
    """Run the module, optimize all of its steps, and compare on held-out rows."""
    run_everywhere(lm)
    train, held_out = split(spread(lmopt.read_examples(TICKETS), rows, by=["team"]))
    found = bootstrap_few_shot(lm, max_labeled=40)(routing, train, lmopt.exact_match)
    for path, prompt in found.items():
        print(f"{path}: {len(prompt.demos)} demonstrations")
    before = lmopt.evaluate(routing, held_out, lmopt.exact_match, lm=lm)
    after = lmopt.evaluate(routing, held_out, lmopt.exact_match, lm=lm, params=found)
    print(f"Before: {before}\nAfter:  {after}")
    return lmopt.compare(before, after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=160, help="tickets to learn from and test on")
    given = lm_options(parser, cassette="custom_module.calls.jsonl").parse_args()
    main(lm_of(given, offline), given.rows)
