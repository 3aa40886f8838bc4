"""Write a program, measure it, optimize it, keep it.

Without arguments it routes support tickets with a toy LM: no key, no network. With your own data
and LM it does your own job:

    python examples/quickstart.py --data questions.jsonl --signature "text -> intent" \
        --lm openai/gpt-4o-mini --out params.json

The calls of a real LM are kept in quickstart.calls.jsonl: after a failure, the same command goes on
from there.
"""

import argparse
import sys
from pathlib import Path

import lmopt
from lmopt import evaluate, exact_match
from lmopt_optimizers import (
    Trial,
    best,
    bootstrap_few_shot,
    lm_of,
    lm_options,
    random_search,
    split,
    spread,
)

TICKETS = Path(__file__).with_name("tickets.jsonl")
TASK = """ticket -> team: Literal['billing', 'refunds', 'shipping', 'returns', 'account',
                                  'technical', 'sales', 'privacy']"""


def options(args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=TICKETS, help="examples: .csv, .json or .jsonl")
    parser.add_argument("--signature", default=TASK, help="what goes in -> what comes out")
    parser.add_argument("--instructions", help="what the program is to do, in a sentence or two")
    parser.add_argument("--demos", type=int, default=48, help="demonstrations at most")
    parser.add_argument("--rows", type=int, default=800, help="examples to use at most")
    parser.add_argument("--candidates", type=int, default=8, help="sets of them to try")
    parser.add_argument("--out", default="params.json", help="where the parameters go")
    return lm_options(parser, cassette="quickstart.calls.jsonl").parse_args(args)


def main(given: argparse.Namespace, lm: lmopt.LM) -> lmopt.Comparison:
    """Do the job, and return how much better the program got."""
    folder = Path(given.out).resolve().parent
    if not folder.is_dir():  # found out now, not after the calls are paid for
        raise FileNotFoundError(f"no such folder for --out: {folder}")
    program = lmopt.predict(given.signature, instructions=given.instructions)
    rows = lmopt.check_dataset(program, lmopt.read_examples(given.data))
    for name in program.outputs:
        if not any(name in row for row in rows):
            raise lmopt.DataError("no such field in the data", name, list(rows[:1]), "label it")
    learn, held_out = split(spread(rows, given.rows, by=program.outputs), share=0.75)
    print(f"{len(rows)} examples: {len(learn)} to learn from, {len(held_out)} held out\n")

    print("The first prompt:\n")
    inputs = lmopt.select_inputs(program, held_out[0])
    print(lmopt.transcript(lmopt.preview(program, **inputs)), "\n")

    before = evaluate(program, held_out, exact_match, lm=lm)
    print(f"Before:             {before}")

    few = bootstrap_few_shot(lm, max_labeled=min(16, given.demos))
    after = evaluate(program, held_out, exact_match, lm=lm, params=few(program, learn, exact_match))
    print(f"bootstrap_few_shot: {after}")

    search = random_search(lm, candidates=given.candidates, max_labeled=given.demos)
    print(f"random_search, with at most {search.plan(program, learn).calls} LM calls:")
    trials = [Trial(program.params)]
    try:
        for trial in search.trials(program, learn, exact_match):
            print(f"  {trial.score:.3f} after {trial.calls} calls: {trial.note}", flush=True)
            trials.append(trial)
    finally:  # whatever happens, what is paid for is kept
        lmopt.save(best(trials).params, given.out)
    found = best(trials).params
    after = evaluate(program, held_out, exact_match, lm=lm, params=found)
    print(f"random_search:      {after}")
    gain = lmopt.compare(before, after)
    print(f"Gain, row by row:   {gain}\n")

    print("What changed:\n")
    changes = lmopt.diff(program.params, found).splitlines()
    print(*(lmopt.cut(line, 100) for line in changes[:8]), sep="\n")
    print(f"... and {len(changes) - 8} more lines\n" if len(changes) > 8 else "")

    loaded = program.with_params(lmopt.load(given.out))
    print(f"Saved to {given.out}, loaded again, and asked:\n")
    right = {name: held_out[0][name] for name in program.outputs if name in held_out[0]}
    print(f"  {dict(inputs)}\n  -> {dict(loaded(lm, **inputs))}, labelled {right}")
    return gain


if __name__ == "__main__":
    arguments = options()
    try:
        main(arguments, lm_of(arguments))
    except (lmopt.LmoptError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
