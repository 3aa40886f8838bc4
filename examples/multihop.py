# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz", "bm25s"]
# ///
"""Find the passages that a claim rests on, hop by hop, and learn from feedback how to do it.

In the manner of HoVer (Jiang et al. 2020, arXiv 2011.03088): a claim names only the first link of a
chain, so each query needs a name from what the last one found. All that the feedback says is which
titles are missing. Two optimizers learn from claims about some companies, people and towns, score
on others, and are measured on others again. The world is invented, so no LM knows it by heart.

Offline, with an LM that is weak but does what it is told:

    python examples/multihop.py

With a language model; each optimizer may make --calls of it, and a run of the program makes 5:

    python examples/multihop.py --lm openai/gpt-4o-mini
    python examples/multihop.py --base-url http://localhost:8080/v1 --calls 200 --rows 6
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import auto, best, gepa, lm_of, lm_options

DATA = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
PASSAGES: dict[str, str] = DATA["passages"]  # texts by title
ADVICE = {  # of the offline LM, for each step
    "query": "Search for the names in the notes that the claim does not have.",
    "note": "Repeat every name that the passages mention.",
}


@functools.cache
def index() -> Any:
    """Index the passages and their titles for BM25, once."""
    import bm25s

    texts = [f"{title}: {text}" for title, text in PASSAGES.items()]
    made = bm25s.BM25(corpus=list(PASSAGES))
    made.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    return made


def search(query: str, k: int = 2) -> list[str]:
    """Return the titles of the passages that fit a query best, the best first."""
    import bm25s

    words = bm25s.tokenize(query, show_progress=False)
    titles, scores = index().retrieve(words, k=k, show_progress=False)
    return [str(title) for title, score in zip(titles[0], scores[0], strict=True) if score > 0]


@lmopt.program(
    query=lmopt.predict("claim, notes: list[str] -> query", instructions="Write a search query."),
    note=lmopt.predict("claim, passages: list[str] -> note", instructions="Sum up the passages."),
    max_calls=15,  # 3 queries and 2 notes, each asked for up to 3 times until it can be read
)
def verify(steps: lmopt.Steps, claim: str) -> lmopt.Flow:
    """Search, note what was found, search for what is missing; return all titles found."""
    notes, titles, found = [], [], []
    for _ in range(3):
        if found:
            noted = yield steps.note(claim=claim, passages=[PASSAGES[one] for one in found])
            notes.append(noted.note)
        asked = yield steps.query(claim=claim, notes=notes)
        found = yield lmopt.invoke(search, asked.query)
        titles += [title for title in found if title not in titles]
    return {"titles": titles}


def recall(example: lmopt.Record, made: lmopt.Prediction) -> lmopt.Score:
    """Score the share of the titles that was found, and name the rest."""
    missing = [title for title in example.titles if title not in made.titles]
    return lmopt.Score(1 - len(missing) / len(example.titles), f"Missing: {missing}")


def offline(request: lmopt.Request) -> lmopt.Response:
    """Answer as an LM that is content with little, unless its prompt asks for more."""
    told, given = request.messages[0].text, request.inputs
    if request.step == "query":
        names = re.findall(r"(?<!\. )\b[A-Z]\w+", " ".join(given.notes[-1:]))
        new = [name for name in names if name not in given.claim and "names in the notes" in told]
        text = " ".join(new) or given.claim
    elif request.step == "note":
        text = given.passages[0] if "every name" in told else given.passages[0].split(".")[0]
    else:  # an optimizer asks for new instructions
        text = f"{given.current} {advice(given)}"
    text = " ".join(text.split()[:3]) if "Be brief" in told else text
    return lmopt.mock_lm(lambda _: {request.signature.outputs[0].name: text})(request)


def advice(given: lmopt.Record) -> str:
    """Advise a step from its cases: did it pass on a missing title that it was given?"""
    for case in given.cases:
        for title in re.findall(r"'(.+?)'", case.get("feedback", "")):
            if title in str(case["inputs"]) and title not in str(case["outputs"]):
                return ADVICE[given.step]
    return "Be brief."


def main(lm: lmopt.LM, calls: int = 600, rows: int = 30) -> list[lmopt.Evaluation]:
    """Print the recall on held-out claims; return how the start did there, and each optimizer."""
    index()  # so that a missing package is found before any call
    train, val, held_out = (DATA[part][:rows] for part in ("train", "val", "held_out"))
    both = {"calls": calls, "valset": val}  # of other chains: names known by heart win nothing
    made = [lmopt.evaluate(verify, held_out, recall, lm=lm)]
    print("optimizer  recall before  after  calls")
    for optimize in (auto(lm, **both), gepa(lm, **both, max_runs=calls // 6)):
        trials = list(optimize.trials(verify, train, recall))
        learned = verify.with_params(best(trials).params)
        made.append(lmopt.evaluate(learned, held_out, recall, lm=lm))
        print(f"{optimize.name:9} {made[0].score:14.3f} {made[-1].score:6.3f} {trials[-1].calls:6}")
    print(f"\nWhat {optimize.name} learned:\n{lmopt.diff(verify.params, learned.params)}")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=600, help="of the LM, for each optimizer")
    parser.add_argument("--rows", type=int, default=30, help="claims to use of each half")
    given = lm_options(parser, cassette="multihop.calls.jsonl").parse_args()
    main(lm_of(given, offline), given.calls, given.rows)
