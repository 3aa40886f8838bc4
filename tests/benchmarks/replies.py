"""How many replies are read: recorded ones, and those of a running model; DSPy beside it.

    LMOPT_DATA=FOLDER python tests/benchmarks/replies.py [--base-url URL --model NAME] [--dspy]

"first" counts the rows that the first reply answers, "read" those that any reply does: lmopt asks
up to three times, DSPy's ChatAdapter twice, its JSONAdapter once. The score is the share of fields
that are right, the characters are those of the first prompt. lmopt's json sends its schema, which
some servers enforce; DSPy sends one only to models that it knows. Small models tell the formats
apart best; for a slow one take fewer `--rows`.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

import attrs

import lmopt


@attrs.frozen
class Item:
    name: str
    price: Decimal
    count: int = 1


@attrs.frozen
class Aspect:
    topic: str
    sentiment: Literal["good", "bad"]
    quote: str | None = None


TYPES: dict[str, Any] = {"Item": Item, "Aspect": Aspect, "date": date}
ADAPTERS = {one.name: one for one in (lmopt.chat, lmopt.json, lmopt.plain, lmopt.xml)}
Found = tuple[bool, bool, float, int]  # read at first, read at all, score, characters asked
SETTINGS: dict[str, Any] = {"temperature": 0, "max_tokens": 250}
INTENTS = ["declined_cash_withdrawal", "passcode_forgotten", "exchange_rate"]
INTENTS += ["get_physical_card", "automatic_top_up"]
# The text, and the outputs in order, as `said` writes them; a summary has no score.
TASKS: dict[str, list[tuple[Any, ...]]] = {
    "text -> name: str, age: int, cities: list[str], member: bool": [
        ("Mona Reyes, 41, left Porto for Rome; a member.", "Mona Reyes", 41, "Porto Rome", True),
        ("Tim is 17 and not a member. He lives in Oslo.", "Tim", 17, "Oslo", False),
        ("Member profile: Nils Berg, 24 years old, no cities given.", "Nils Berg", 24, "", True),
        ("Ruth Okafor turned 70 in Lagos. She is no member.", "Ruth Okafor", 70, "Lagos", False),
        ("Ines Vidal (33) is a member from Valencia.", "Ines Vidal", 33, "Valencia", True),
        ("Jack, 45, lives in Leeds and York but never joined.", "Jack", 45, "Leeds York", False),
    ],
    "text -> due: date, urgent: bool, amount: float | None": [
        ("Pay the 480.50 euros by 2025-04-30. No hurry.", date(2025, 4, 30), False, 480.5),
        ("URGENT: the report must be in by 2024-12-01!", date(2024, 12, 1), True, None),
        ("The rent of 900 is due on 1 June 2025, as usual.", date(2025, 6, 1), False, 900),
        ("Transfer $1,250 at once; the deadline is 2025-02-14.", date(2025, 2, 14), True, 1250),
        ("Take your time: we need it by 10 October 2025.", date(2025, 10, 10), False, None),
        ("Urgent! Send the slides by 3 March 2025.", date(2025, 3, 3), True, None),
    ],
    "text -> goods: list[Item]": [
        ("Two chairs at 39.90 each and one table for 120.", "2 chair 39.9, 1 table 120"),
        ("I bought 3 apples for $0.50 each.", "3 apple 0.5"),
        ("5 notebooks (2.99 each), 10 pens (0.80 each)", "5 notebook 2.99, 10 pen 0.8"),
        ("Just one umbrella at 18 euros, please.", "1 umbrella 18"),
        ("Three shirts, $15 each; two belts, $12.50 each.", "3 shirt 15, 2 belt 12.5"),
        ("One kettle, 25 dollars. Four mugs, $6.25 apiece.", "1 kettle 25, 4 mug 6.25"),
    ],
    "text -> aspects: list[Aspect], stars: int, summary": [
        ("The pasta was excellent but the waiter was rude. Three stars.", "bad good", 3),
        ("Awful hotel: dirty room, noisy street. One star from me.", "bad", 1),
        ("I love this lamp, the light is warm and it looks great. 5 stars!", "good", 5),
        ("Fast delivery, but the box was damaged. 2 out of 5 stars.", "bad good", 2),
        ("Friendly staff and a lovely view. Five stars.", "good", 5),
        ("Great screen, but the battery dies fast. 3 stars.", "bad good", 3),
    ],
}


def said(value: Any) -> Any:
    """A value as the table of tasks has it."""
    if not isinstance(value, list):
        return value
    if value and hasattr(value[0], "price"):
        names = [one.name.lower().removeprefix("the ").rstrip("s") for one in value]
        rows = zip(value, names, strict=True)
        return ", ".join(f"{one.count} {name} {one.price.normalize():f}" for one, name in rows)
    if value and hasattr(value[0], "sentiment"):
        return " ".join(sorted({one.sentiment for one in value}))
    return " ".join(map(str, value))


def share(example: Any, prediction: Any) -> float:
    """How many of the fields are right, as a share."""
    right = [said(getattr(prediction, name)) == value for name, value in example.right.items()]
    return float(sum(right) / len(right))


def tasks(folder: str, count: int) -> Iterator[tuple[str, list[Any]]]:
    """Signatures, with some rows each."""
    known = lmopt.read_examples(Path(folder, "banking20.jsonl"))
    each = [[(row.text, one) for row in known if row.intent == one][3:] for one in INTENTS]
    banking = [row for turn in zip(*each, strict=False) for row in turn]
    for task, rows in {f"text -> intent: Literal{INTENTS}": banking, **TASKS}.items():
        names = [one.name for one in lmopt.signature(task, types=TYPES).outputs]
        pairs = [(text, dict(zip(names, values, strict=False))) for text, *values in rows[:count]]
        yield task, [lmopt.Record(text=text, right=right) for text, right in pairs]


def recorded(folder: str) -> None:
    """Print how many of the recorded replies are read, and were read when they were recorded."""
    rows, now, then = Counter[str](), Counter[str](), Counter[str]()
    for row in lmopt.read_examples(Path(folder, "replies.jsonl")):
        rows[row.adapter] += 1
        then[row.adapter] += row.read
        with contextlib.suppress(lmopt.ParseError):
            reply = lmopt.Response(row.reply, finish_reason=row.finish_reason)
            ADAPTERS[row.adapter].parse(lmopt.signature(row.signature, types=TYPES), reply)
            now[row.adapter] += 1
    print(f"{'recorded replies':<18} {'rows':>5} {'read':>5} {'then':>5}")
    for name in ADAPTERS:
        print(f"{name:<18} {rows[name]:5} {now[name]:5} {then[name]:5}")
    print(f"{'all':<18} {rows.total():5} {now.total():5} {then.total():5}")


def ours(adapter: lmopt.Adapter, given: Any, task: str, rows: list[Any]) -> list[Found]:
    """What comes of some rows with one of our formats."""
    lm = lmopt.openai_lm(given.model, base_url=given.base_url, timeout=300, concurrency=4)
    once, often = (
        lmopt.predict(task, types=TYPES, adapter=adapter, retries=retries, **SETTINGS)
        for retries in (0, 2)
    )
    kept = lmopt.cache({})(lm)  # first replies are not paid twice
    first, read = (lmopt.evaluate(one, rows, share, lm=kept).rows for one in (once, often))
    sizes = [sum(len(m.text) for m in lmopt.preview(once, text=row.text)) for row in rows]
    found = zip(first, read, sizes, strict=True)
    return [(not one.error, not two.error, two.score, size) for one, two, size in found]


def theirs(name: str, given: Any, task: str, rows: list[Any]) -> list[Found]:
    """The same with an adapter of DSPy; its classes are pydantic models."""
    import dspy
    import pydantic

    def model(cls: type) -> Any:
        made: dict[str, Any] = {one.name: (one.type, one.default) for one in attrs.fields(cls)}
        made |= {n: (tp, ...) for n, (tp, kept) in made.items() if kept is attrs.NOTHING}
        return pydantic.create_model(cls.__name__, **made)

    types = {**TYPES, "Item": model(Item), "Aspect": model(Aspect)}
    program = dspy.Predict(dspy.Signature(task, custom_types=types))
    where = {"api_base": given.base_url, "api_key": "none", "timeout": 300, "cache": False}

    def one(row: Any) -> Found:
        lm, score = dspy.LM(f"openai/{given.model}", **where, **SETTINGS), None
        with (
            dspy.context(lm=lm, adapter=getattr(dspy, name)()),
            contextlib.suppress(dspy.utils.exceptions.AdapterParseError),
        ):
            score = share(row, program(text=row.text))
        size = sum(len(message["content"]) for message in lm.history[0]["messages"])
        return len(lm.history) == 1 and score is not None, score is not None, score or 0.0, size

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, rows))


def asked(given: Any, folder: str) -> None:
    """Print what a running model makes of the rows in each format."""
    formats = {name: partial(ours, adapter, given) for name, adapter in ADAPTERS.items()}
    if given.dspy and importlib.util.find_spec("dspy") is None:
        print("(DSPy is not installed)")
    elif given.dspy:
        known = ("ChatAdapter", "JSONAdapter")
        formats |= {f"DSPy {name}": partial(theirs, name, given) for name in known}
    print(f"\n{given.model:<18} {'rows':>5} {'first':>5} {'read':>5} score seconds characters")
    for name, measure in formats.items():
        began = time.perf_counter()
        made = [one for task, rows in tasks(folder, given.rows) for one in measure(task, rows)]
        took = time.perf_counter() - began
        first, read, score, size = map(sum, zip(*made, strict=True))
        mean = f"{score / len(made):5.2f} {took:7.0f} {size / len(made):10.0f}"
        print(f"{name:<18} {len(made):5} {first:5} {read:5} {mean}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-url", help="of a running model, such as http://localhost:8080/v1")
    parser.add_argument("--model", default="default", help="its name there")
    parser.add_argument("--rows", type=int, default=6, help="of each task")
    parser.add_argument("--dspy", action="store_true", help="DSPy beside it, if it is installed")
    given, folder = parser.parse_args(), os.environ.get("LMOPT_DATA")
    if not folder:
        raise SystemExit("set LMOPT_DATA to the folder with replies.jsonl and banking20.jsonl")
    recorded(folder)
    if given.base_url:
        asked(given, folder)


if __name__ == "__main__":
    main()
