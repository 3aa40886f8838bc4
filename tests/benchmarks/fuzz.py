"""Feed mutated replies to every adapter and count what comes of them: fields, or `ParseError`.

    python tests/benchmarks/fuzz.py [REPLIES]

Anything else that is raised, a reply that takes longer than 50 ms, or a megabyte that takes more
than three times as long as half of one (were a pattern quadratic) ends it with status 1.
"""

import contextlib
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import lmopt
from lmopt import (
    Adapter,
    ParseError,
    Request,
    Response,
    predict,
    render_outputs,
    seeded,
    signature,
    stream,
)

ADAPTERS = (lmopt.chat, lmopt.json, lmopt.xml, lmopt.plain)
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


def seconds(adapter: lmopt.Adapter, text: str) -> float:
    """How long it takes to read a text, the best of three."""
    task, found = signature("-> answer, tags: list[str], n: int"), []
    for _ in range(3):
        began = time.perf_counter()
        with contextlib.suppress(ParseError):
            adapter.parse(task, Response(text))
        found.append(time.perf_counter() - began)
    return min(found)


def ratio(adapter: lmopt.Adapter, piece: str) -> float:
    """How much longer a megabyte of a piece takes than half of one; 0 where both are instant."""
    half, whole = (seconds(adapter, piece * (size // len(piece))) for size in (2**19, 2**20))
    return whole / half if whole > 0.01 else 0.0


def growth() -> float:
    """The worst ratio; one over 3 is measured again, since a busy machine is not a slow pattern."""
    pieces = [*PIECES, "[[ ## answer ## ]]\n", "<answer>", "<tags><item>", "Answer: x\n", '{"a": ']
    found = [(ratio(adapter, piece), adapter, piece) for adapter in ADAPTERS for piece in pieces]
    return max(
        once if once <= 3 else min(ratio(adapter, piece) for _ in range(4))
        for once, adapter, piece in found
    )


def streamed(adapter: Adapter, task: str, value: object) -> float:
    """Seconds to stream a megabyte that arrives in single characters."""
    wanted = signature(task)
    reply = render_outputs(adapter, wanted, {"answer": value})
    heard = predict(wanted, adapter=adapter)

    def drips(request: Request) -> Response:
        for character in reply:
            request.on_text(character)
        return Response(reply)

    began = time.perf_counter()
    for _ in stream(heard, drips, {}):
        pass
    return time.perf_counter() - began


def main(replies: int) -> int:
    """Run, print the counts, return the exit status."""
    rng, counts, slowest = seeded(0, "fuzz"), Counter[str](), (0.0, "")
    cases = [
        (adapter, task, render_outputs(adapter, task, values))
        for adapter in ADAPTERS
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
    worst = growth()
    print(f"a megabyte takes at most {worst:.1f} times as long as half of one")
    values = {"-> answer": "line after line\n" * 62_500, "-> answer: list[int]": [*range(140_000)]}
    longest = max(streamed(one, *pair) for one in ADAPTERS for pair in values.items())
    print(f"a megabyte in single characters streams in {longest:.1f} s at most")
    return int(slowest[0] > 0.05 or worst > 3 or longest > 10)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000))
