"""Held-out score and LM calls of every optimizer on real questions, with the toy LM.

    LMOPT_DATA=FOLDER python tests/benchmarks/optimizers.py [SEEDS] [SVG]

Every search is at its defaults. It learns from 100 rows and scores on 100 others, that `auto`
parts itself; all choices follow the seed. "labels" are labelled examples, as many as fit, from the
same 100 rows, or for `auto`, which draws from all rows in the end, from all 200. "better" counts
the seeds in which it beats the program as it is. With a name ending in .svg it also draws score
against calls, for each optimizer with several budgets of calls.
"""

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lmopt
import lmopt_optimizers as opt
from lmopt import evaluate, exact_match, predict, read_examples, toy_lm

TRAIN, HELD_OUT = 200, 200
BUDGETS = (50, 200, 500, 1500)
TASK = predict("text -> intent", instructions="Name the intent of the message.")


def letters(texts: Any) -> list[list[float]]:
    """Embed texts by pairs of letters."""
    pairs = [a + b for a in "acdeilmnoprstu" for b in "aeiorst"]
    return [[float(text.lower().count(pair)) for pair in pairs] for text in texts]


Make = Callable[..., opt.Optimizer]
SEARCHES: dict[str, Make] = {
    name: getattr(opt, name)
    for name in ("random_search", "tpe_search", "copro", "mipro", "gepa", "simba", "infer_rules",
                 "avatar")
}  # fmt: skip
LABELS: dict[str, Make] = {
    "labels of 100": lambda lm, seed, **_: opt.labeled_few_shot(k=TRAIN, seed=seed),
    "knn_few_shot": lambda lm, seed, **_: opt.knn_few_shot(letters, k=32),
    "bootstrap_few_shot": lambda lm, seed, **_: opt.bootstrap_few_shot(lm, seed=seed),
    "tune": lambda lm, seed, **_: opt.tune(lm, {"demos": [0, 4, 16, 64, 100]}, seed=seed),
}


def measure(make: Make, rows: Any, seed: int, whole: bool, **options: Any) -> tuple[float, ...]:
    """The held-out score before and after, how many LM calls were made, and tokens of a run."""
    drawn = lmopt.seeded(seed, "rows").sample(rows, TRAIN + HELD_OUT)
    train, held, calls = drawn[:TRAIN], drawn[TRAIN:], 0
    if not whole:
        train, options["valset"] = opt.split(train, seed=seed)

    def lm(request: lmopt.Request) -> lmopt.Response:
        nonlocal calls
        calls += 1
        return toy(request)

    toy = toy_lm()
    params = make(lm, seed=seed, **options)(TASK, train, exact_match)
    score = partial(evaluate, TASK, held, exact_match, lm=toy)
    after = score(params=params)
    return score().score, after.score, calls, after.usage.input_tokens / len(held)


def line(name: str, make: Make, rows: Any, seeds: int, whole: bool, **options: Any) -> Any:
    """Measure for all seeds, and print the means."""
    began = time.perf_counter()
    made = [measure(make, rows, seed, whole, **options) for seed in range(seeds)]
    before, after, calls, tokens = (statistics.fmean(column) for column in zip(*made, strict=True))
    spread = statistics.stdev([one[1] for one in made]) / seeds**0.5 if seeds > 1 else 0.0
    wins = f"{sum(one[1] > one[0] for one in made)}/{seeds}"
    took = (time.perf_counter() - began) / seeds
    print(f"{name:<22} {before:6.3f} {after:6.3f} {spread:6.3f} {wins:>6} {calls:7.0f}"
          f" {tokens:7.0f} {took:7.1f}", flush=True)  # fmt: skip
    return calls, after


def main(seeds: int, svg: str = "") -> None:
    """Print the table, and draw what it says."""
    folder = os.environ.get("LMOPT_DATA")
    if not folder:
        raise SystemExit("set LMOPT_DATA to the folder with banking20.jsonl")
    warnings.simplefilter("ignore")  # spent budgets are the point
    rows = read_examples(Path(folder, "banking20.jsonl"))
    heads = ("before", "after", "+-", "better", "calls", "tokens", "seconds")
    print(f"{'optimizer':<22} {heads[0]:>6} {heads[1]:>6} {heads[2]:>6} {heads[3]:>6} {heads[4]:>7}"
          f" {heads[5]:>7} {heads[6]:>7}")  # fmt: skip
    for name, make in {**LABELS, **SEARCHES}.items():
        line(name, make, rows, seeds, whole=name == "tune")
    line("labels of 200", LABELS["labels of 100"], rows, seeds, whole=True)
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, make in {"auto": opt.auto, **(SEARCHES if svg else {})}.items():
        for calls in BUDGETS:
            made = line(f"{name} {calls}", make, rows, seeds, name == "auto", calls=calls)
            curves.setdefault(name, []).append(made)
    if svg:
        Path(svg).write_text(drawing(curves), encoding="utf-8")


def drawing(curves: dict[str, list[tuple[float, float]]]) -> str:
    """Score against calls, a line for each optimizer."""
    colors = ["#c40", "#27a", "#2a7", "#a2a", "#970", "#555", "#09c", "#c59", "#690"]
    shapes, most = [], max(calls for points in curves.values() for calls, _ in points)
    for place, level in enumerate((0.0, 0.2, 0.4, 0.6, 0.8)):
        y = 340 - 400 * level
        shapes += [f'<line x1="50" x2="600" y1="{y}" y2="{y}" stroke="#ddd"/>',
                   f'<text x="44" y="{y + 4}" text-anchor="end">{level}</text>',
                   f'<text x="{50 + 550 * place / 4}" y="360" text-anchor="middle">'
                   f"{most * place / 4:.0f}</text>"]  # fmt: skip
    for place, (name, points) in enumerate(curves.items()):
        color, y = colors[place % len(colors)], 40 + 20 * place
        path = " ".join(f"{50 + 550 * calls / most:.0f},{340 - 400 * score:.0f}"
                        for calls, score in points)  # fmt: skip
        shapes += [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>',
                   f'<text x="615" y="{y}" fill="{color}">{name}</text>']  # fmt: skip
    texts = '<text x="600" y="376" text-anchor="end">calls</text>'
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 380" font-size="12"'
    return f'{head} font-family="sans-serif">{"".join(shapes)}{texts}</svg>'


if __name__ == "__main__":
    given = sys.argv[1:]
    drawn = [one for one in given if one.endswith(".svg")]
    numbers = [int(one) for one in given if one not in drawn]
    main(*numbers[:1] or [5], *drawn)
