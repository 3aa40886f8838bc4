# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz"]
# ///
"""An optimizer of one's own in 25 lines: it drops the lines of a prompt that do not help.

Prompts grow: each complaint adds a line, and none is ever taken out. `prune` leaves out one after
the other, and puts back those without which the program is worse. It is put through the laws that
all optimizers keep, run on support tickets with a prompt that has grown for years, and compared
with its start on rows that it has not seen. Offline, with a toy LM that follows rules:

    python examples/custom_optimizer.py

With a language model, on fewer rows; what it costs at most is printed first:

    python examples/custom_optimizer.py --lm openai/gpt-4o-mini --rows 80
    python examples/custom_optimizer.py --base-url http://localhost:8080/v1 --rows 24
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Unpack

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

from toolz import partition_all

import lmopt
from lmopt_optimizers import (
    Hunt,
    Optimizer,
    Options,
    Plan,
    Size,
    best,
    check_optimizer,
    lm_of,
    lm_options,
    optimizer,
    split,
    spread,
    summary,
)

TICKETS = Path(__file__).with_name("tickets.jsonl")
GROWN = """\
Route the ticket to the team that can help.
Tickets come from the web form, by e-mail and by telephone.
A "refund" or "money" goes to "refunds".
An "invoice", a "payment" or a "subscription" goes to "billing".
Since the audit, whatever concerns an "order" goes to "billing" first.
A "parcel", a "package" or a "delivery" goes to "shipping".
A "return" or an "exchange" goes to "returns".
While the returns desk is on holiday, an "item" goes to "refunds".
A "password", an "email" or a "login" goes to "account".
Customers who come "back" after a year go to "account".
A "page" or an "update" goes to "technical".
A "plan" or a "quote" goes to "sales".
Since the fraud of last spring, a "card" or a "bank" goes to "account" first.
Questions about "personal" things or "data" go to "privacy".
Who says "please" is in a hurry and goes to "billing".
Always be polite, and never promise anything."""
route = lmopt.predict(
    """ticket -> team: Literal['account', 'billing', 'privacy', 'refunds', 'returns',
                               'sales', 'shipping', 'technical']""",
    instructions=GROWN,
)


def prune(
    lm: lmopt.LM, *, parts: int = 16, rounds: int = 2, **options: Unpack[Options]
) -> Optimizer:
    """Drop the lines of instructions without which the program is as good.

    Args:
        parts: into how many to cut the lines of a step, at most; so many are tried one by one.
        rounds: how often to go through them; what helps may change once others are gone.
    Calls: a run for each held-out row, part and round.
    """

    def search(hunt: Hunt) -> lmopt.Flow:
        kept = yield hunt.start()
        for path in hunt.paths * rounds:
            lines = kept.params[path].instructions.splitlines()
            for part in partition_all(math.ceil(len(lines) / parts) or 1, lines):
                rest = [line for line in lines if line not in part]
                shorter = kept.params.replace(path, instructions="\n".join(rest))
                note = f"{path} without: {lmopt.cut(part[0], 40)}"
                parent = hunt.trials.index(kept)
                # No race: that would end what is only as good, which is what we look for.
                tried = yield hunt.trial(shorter, note, parent, race=False)
                if tried.score >= kept.score:
                    kept, lines = tried, rest

    def bound(size: Size) -> Plan:
        return size.plan((1 + size.steps * parts * rounds) * size.val)

    options.setdefault("max_labeled", 0)  # it adds no demonstrations, so its plan counts none
    return optimizer("prune", lm, search, bound, **options)


def main(lm: lmopt.LM, rows: int = 320) -> lmopt.Comparison:
    """Check the optimizer, let it search, and return what it gains on held-out rows."""
    tickets = spread(lmopt.read_examples(TICKETS), rows, by=["team"])
    check_optimizer(prune(lmopt.toy_lm()), route, tickets[:16], lmopt.exact_match)
    print("prune keeps the laws of all optimizers.")

    learn, held_out = split(tickets, share=0.75)
    optimize = prune(lm)
    print(f"It costs {optimize.plan(route, learn)}.\n")
    trials = list(optimize.trials(route, learn, lmopt.exact_match))
    print(summary(trials), "\n")
    found = best(trials)
    print(f"What is left:\n{found.params['predict'].instructions}\n")
    print(f"Tokens a run: {trials[0].tokens:.0f} before, {found.tokens:.0f} after")

    before = lmopt.evaluate(route, held_out, lmopt.exact_match, lm=lm)
    after = lmopt.evaluate(route, held_out, lmopt.exact_match, lm=lm, params=found.params)
    print(f"Before, on held-out rows: {before}")
    print(f"After:                    {after}")
    gain = lmopt.compare(before, after)
    print(f"Gain, row by row:         {gain}")
    return gain


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=320, help="tickets to use at most")
    given = lm_options(parser, cassette="custom_optimizer.calls.jsonl").parse_args()
    main(lm_of(given, lmopt.toy_lm()), given.rows)
