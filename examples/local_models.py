# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz"]
# ///
"""One program on a model of your own machine: Ollama, vLLM or llama.cpp, measured.

It sorts a dozen support tickets, as many at once as the server has slots, and says how long a row
takes and how good the answers are. Calls are kept in a cassette: the second half of the run goes
on from it, and so does a second start. Offline, with a toy LM:

    python examples/local_models.py

With a server (without one, it says how to start it):

    python examples/local_models.py --lm ollama/llama3.2
    python examples/local_models.py --lm vllm/Qwen/Qwen2.5-0.5B-Instruct --concurrency 16
    python examples/local_models.py --lm llamacpp/any --timeout 300
    python examples/local_models.py --base-url http://192.168.1.20:8080/v1
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import labeled_few_shot, lm_of, lm_options, split, spread

TICKETS = Path(__file__).with_name("tickets.jsonl")
SERVERS = """\
These commands start one, each with four slots:
  ollama     OLLAMA_NUM_PARALLEL=4 OLLAMA_CONTEXT_LENGTH=4096 ollama serve
             ollama pull llama3.2      (in another terminal, once)
             --lm ollama/llama3.2
  vLLM       vllm serve Qwen/Qwen2.5-0.5B-Instruct --port 8000 --max-num-seqs 4
             --lm vllm/Qwen/Qwen2.5-0.5B-Instruct
  llama.cpp  llama-server -hf Qwen/Qwen2.5-0.5B-Instruct-GGUF --port 8080 -np 4 -c 16384
             --lm llamacpp/any
Another host or port: --base-url. One that answers slowly: --timeout, or a lower --concurrency."""

route = lmopt.predict(
    """ticket -> team: Literal['account', 'billing', 'privacy', 'refunds', 'returns',
                               'sales', 'shipping', 'technical']""",
    instructions="Route the ticket to the team that can help.",
    temperature=0,
    max_tokens=100,  # a small model that rambles on holds a slot
)


def warm_up(program: lmopt.Program, lm: lmopt.LM, ticket: str) -> None:
    """Ask once, so that the model is loaded; where nobody answers, say how to start a server."""
    try:
        program(lm, ticket=ticket)
    except lmopt.LMError as error:
        if error.status is None:  # no answer at all, not even a refusal
            error.add_note(SERVERS)
        raise


def measure(program: lmopt.Program, lm: lmopt.LM, rows: lmopt.Dataset) -> lmopt.Evaluation:
    """Evaluate a program, and print how good it is, and how fast."""
    began = time.perf_counter()
    made = lmopt.evaluate(program, rows, lmopt.exact_match, lm=lm)
    seconds = time.perf_counter() - began
    replies = [event.response for row in made.rows for event in row.prediction.trace]
    new = sum((one.usage for one in replies if one and not one.cached), lmopt.Usage())
    print(f"{made}; {new.calls} calls made, {made.usage.calls - new.calls} from the cassette")
    if new.calls:
        known = new.cached_tokens / (new.input_tokens or 1)  # equal beginnings are read once
        print(
            f"  {seconds / new.calls:.3f} seconds a call, {new.output_tokens / seconds:.0f} tokens "
            f"written a second; {known:.0%} of the prompts were known to the server"
        )
    return made


def main(lm: lmopt.LM, rows: int = 12) -> tuple[lmopt.Evaluation, lmopt.Evaluation]:
    """Measure half of the rows, and then all of them, over the same cassette."""
    learn, held_out = split(lmopt.read_examples(TICKETS))
    shown = labeled_few_shot(k=8)(route, learn, lmopt.exact_match)  # one for each team
    program = route.with_params(shown)
    tickets = spread(held_out, rows, by=["team"])
    warm_up(program, lm, learn[0].ticket)
    return measure(program, lm, tickets[: rows // 2]), measure(program, lm, tickets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=12, help="tickets to sort")
    options = lm_options(parser, cassette="local_models.calls.jsonl")
    options.set_defaults(concurrency=4)  # as many as the server has slots
    given = options.parse_args()
    if not given.lm and not given.base_url:
        print(f"No server is named, so a toy LM answers. {SERVERS}\n")
    with TemporaryDirectory() as folder:
        offline = lmopt.record(Path(folder) / "calls.jsonl")(lmopt.toy_lm())
        main(lm_of(given, offline), given.rows)
