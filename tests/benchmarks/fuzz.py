"""Feed mutated replies to every adapter and count what comes of them: fields, or `ParseError`.

    python tests/benchmarks/fuzz.py [REPLIES]

Anything else that is raised, or a reply that takes longer than 50 ms, ends it with status 1.
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import lmopt
from lmopt import ParseError, Response, render_outputs, seeded, signature

TASKS = [
    ("-> answer", {"answer": "Paris, [the] <capital>\nof 'France'"}),
    ("-> n: int, ok: bool", {"n": 1234, "ok": True}),
    ("-> tags: list[str], team: Literal['a', 'b c']", {"tags": ["x", "y z"], "team": "b c"}),
    ("-> d: dict[str, list[int]], x: float | None", {"d": {"k": [1, 2]}, "x": None}),
    ("-> pair: tuple[int, str], any: Any", {"pair": (1, "a"), "any": [1, {"b": None}]}),
]
PIECES = [
    "[[ ## ",
    " ## ]]",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "\\",
    "\n",
    "<",
    ">",
    "</item>",
    "<item>",
]
PIECES += [
    "&amp;",
    "&#",
    "```",
    "```json\n",
    ",",
    ":",
    "null",
    "None",
    "9" * 50,
    "\ud800",
    "\x00",
    "é",
    "🙂",
]


def mutate(text: str, rng: random.Random) -> str:
    """Change a text in one to six places."""
    for _ in range(rng.randint(1, 6)):
        at, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        piece = rng.choice(PIECES) * rng.choice((1, 1, 1, 50))
        text = rng.choice(
            (
                text[:at] + piece + text[at:],
                text[:at] + text[end:],
                text[:at] + text[at:end] * 2 + text[end:],
                text[:end],
            )
        )
    return text[:20_000]


def main(replies: int) -> int:
    """Run, print the counts, return the exit status."""
    rng, counts, slowest = seeded(0, "fuzz"), Counter[str](), (0.0, "")
    cases = [
        (adapter, task, render_outputs(adapter, task, values))
        for adapter in (lmopt.chat, lmopt.json, lmopt.xml, lmopt.plain)
        for text, values in TASKS
        for task in [signature(text)]
    ]
    for number in range(replies):
        adapter, task, good = cases[number % len(cases)]
        reply = mutate(good, rng)
        began = time.perf_counter()
        try:
            adapter.parse(task, Response(reply, finish_reason=rng.choice(("stop", "length"))))
            counts[f"{adapter.name}: fields"] += 1
        except ParseError:
            counts[f"{adapter.name}: ParseError"] += 1
        except Exception as error:
            print(f"{adapter.name} raised {error!r} for {reply!r}")
            return 1
        slowest = max(slowest, (time.perf_counter() - began, f"{adapter.name}: {reply[:200]!r}"))
    for name, count in sorted(counts.items()):
        print(f"{count:8,} {name}")
    print(f"slowest: {slowest[0] * 1000:.1f} ms for {slowest[1]}")
    return int(slowest[0] > 0.05)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000))
