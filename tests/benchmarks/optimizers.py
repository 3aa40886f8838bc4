"""Held-out score and LM calls of every optimizer on real questions, with the toy LM.

    LMOPT_DATA=FOLDER python tests/benchmarks/optimizers.py [SEEDS]

Each row is the mean over seeds: which rows are trained on, which are held out, and all choices of
the optimizer follow the seed. "better" counts the seeds in which it beats the program as it is.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lmopt
import lmopt_optimizers as opt
from lmopt import evaluate, exact_match, predict, read_examples, toy_lm

TRAIN, HELD_OUT = 200, 200


def letters(texts: Any) -> list[list[float]]:
    """Embed texts by pairs of letters."""
    pairs = [a + b for a in "acdeilmnoprstu" for b in "aeiorst"]
    return [[float(text.lower().count(pair)) for pair in pairs] for text in texts]


OPTIMIZERS: dict[str, Callable[..., opt.Optimizer]] = {
    "labeled_few_shot": lambda lm, seed: opt.labeled_few_shot(k=TRAIN, seed=seed),
    "knn_few_shot": lambda lm, seed: opt.knn_few_shot(letters, k=32),
    "bootstrap_few_shot": lambda lm, seed: opt.bootstrap_few_shot(lm, seed=seed),
    "random_search": lambda lm, seed: opt.random_search(lm, candidates=8, seed=seed),
    "tpe_search": lambda lm, seed: opt.tpe_search(lm, trials=8, sets=4, seed=seed),
    "copro": lambda lm, seed: opt.copro(lm, breadth=4, depth=3, shown=60, seed=seed),
    "mipro": lambda lm, seed: opt.mipro(lm, seed=seed),
    "gepa": lambda lm, seed: opt.gepa(lm, minibatch=6, seed=seed),
    "simba": lambda lm, seed: opt.simba(lm, steps=4, candidates=4, seed=seed),
    "infer_rules": lambda lm, seed: opt.infer_rules(lm, candidates=4, shown=80, seed=seed),
    "avatar": lambda lm, seed: opt.avatar(lm, rounds=4, shown=40, seed=seed),
    "tune after labels": lambda lm, seed: opt.chain(
        opt.labeled_few_shot(k=32, seed=seed), opt.tune(lm, {"demos": [8, 16, 32]}, seed=seed)
    ),
    "chain": lambda lm, seed: opt.chain(
        opt.labeled_few_shot(k=16, seed=seed), opt.avatar(lm, rounds=2, shown=40, seed=seed)
    ),
}


def measure(make: Callable[..., opt.Optimizer], rows: Any, seed: int) -> tuple[float, float, int]:
    """The held-out score before and after, and how many LM calls were made."""
    task = predict("text -> intent", instructions="Name the intent of the message.")
    drawn = lmopt.seeded(seed, "rows").sample(rows, TRAIN + HELD_OUT)
    train, held = drawn[:TRAIN], drawn[TRAIN:]
    calls = 0

    def lm(request: lmopt.Request) -> lmopt.Response:
        nonlocal calls
        calls += 1
        return toy(request)

    toy = toy_lm()
    params = make(lm, seed)(task, train, exact_match)
    score = partial(evaluate, task, held, exact_match, lm=toy)
    return score().score, score(params=params).score, calls


def main(seeds: int) -> None:
    """Print the table."""
    folder = os.environ.get("LMOPT_DATA")
    if not folder:
        raise SystemExit("set LMOPT_DATA to the folder with banking20.jsonl")
    rows = read_examples(Path(folder, "banking20.jsonl"))
    print(f"{'optimizer':<20} {'before':>6} {'after':>6} {'better':>6} {'calls':>7} {'seconds':>7}")
    for name, make in OPTIMIZERS.items():
        began = time.perf_counter()
        made = [measure(make, rows, seed) for seed in range(seeds)]
        before, after = (statistics.fmean(one[place] for one in made) for place in (0, 1))
        better = sum(one[1] > one[0] for one in made)
        calls = statistics.fmean(one[2] for one in made)
        took = (time.perf_counter() - began) / seeds
        wins = f"{better}/{seeds}"
        print(
            f"{name:<20} {before:6.3f} {after:6.3f} {wins:>6} {calls:7.0f} {took:7.1f}", flush=True
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
