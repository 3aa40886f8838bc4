# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz", "yfinance"]
# ///
"""An analyst looks up prices, news and ratios, within a limit of steps and of cost.

Offline, about three companies that do not exist, from the cassette beside this file, whose replies
were written by hand and whose tokens were estimated. The second question is one too many:

    python examples/finance_react.py

With a language model; `--budget` limits the dollars too, where `--price` tells what a million
tokens cost that are read, and that are written. With `--live`, on what Yahoo Finance says of real
companies, by way of yfinance:

    python examples/finance_react.py --base-url http://localhost:8080/v1 --calls 30
    python examples/finance_react.py --lm openai/gpt-4o-mini --price 0.15,0.60 --budget 0.05
    python examples/finance_react.py --lm openai/gpt-4o-mini --live "Why did AAPL fall or rise?"

Nothing here is advice.
"""

import argparse
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import attrs

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import lm_of, lm_options

Look = Callable[[str, str], Any]  # (ticker, "prices" or "news" or "ratios") -> what is known
TAPE = Path(__file__).with_name("finance_react.jsonl")
QUESTIONS = [
    "Which share costs more for what the company earns, NORD or HARB, and what may explain it?",
    "Why did LUMA fall?",
]
SAMPLE = {
    "NORD": {
        "prices": [41.2, 43.9, 47.5, 52.3],
        "news": ["Nordlicht Wind wins two offshore sites", "Nordlicht Wind doubles its orders"],
        "ratios": {"price_to_earnings": 34.0, "price_to_book": 4.1, "profit_margin": 0.08},
    },
    "HARB": {
        "prices": [18.0, 17.6, 17.9, 18.1],
        "news": ["Harbour Tools keeps its dividend"],
        "ratios": {"price_to_earnings": 12.5, "price_to_book": 1.3, "profit_margin": 0.11},
    },
    "LUMA": {
        "prices": [88.0, 86.5, 61.0, 58.3],
        "news": ["Luma Optics loses its largest customer", "Luma Optics cuts its forecast"],
        "ratios": {"price_to_earnings": 15.2, "price_to_book": 2.0, "profit_margin": 0.05},
    },
}
RATIOS = {
    "price_to_earnings": "trailingPE",
    "price_to_book": "priceToBook",
    "profit_margin": "profitMargins",
}


def sample(ticker: str, what: str) -> Any:
    """Look into the sample."""
    return SAMPLE[ticker.upper()][what]


def yahoo() -> Look:
    """Make what asks Yahoo Finance."""
    import yfinance

    def look(ticker: str, what: str) -> Any:
        found = yfinance.Ticker(ticker)
        if what == "prices":
            return found.history(period="3mo", interval="1mo")["Close"].round(2).tolist()
        if what == "news":
            return [item["content"]["title"] for item in found.news[:5]]
        return {name: found.info.get(theirs) for name, theirs in RATIOS.items()}

    return look


def analyst(look: Look) -> lmopt.Program:
    """Make the agent, whose tools look things up here or there."""

    def prices(ticker: str) -> dict[str, Any]:
        """Return the closing prices of the last months, the oldest first, and their change."""
        closes = look(ticker, "prices")
        return {"closes": closes, "change_in_percent": round(100 * (closes[-1] / closes[0] - 1), 1)}

    def news(ticker: str) -> list[str]:
        """List the latest headlines about a company."""
        return look(ticker, "news")

    def ratios(ticker: str) -> dict[str, float]:
        """Return what a share costs for what the company earns and owns, and its margin."""
        return look(ticker, "ratios")

    return lmopt.react(
        "question -> answer",
        [prices, news, ratios],
        instructions="Answer the question about shares in two sentences, with figures.",
        max_steps=6,
    )


@lmopt.middleware
def paid(request: lmopt.Request) -> Generator[lmopt.Request, lmopt.Response, lmopt.Response]:
    """Count what a cassette answers as paid for, which is free to a budget otherwise."""
    response = yield request
    return attrs.evolve(response, cached=False)


def ask(agent: lmopt.Program, lm: lmopt.LM, question: str) -> lmopt.Prediction:
    """Answer a question; where the budget ends that, return what was found until then."""
    try:
        return agent(lm, question=question)
    except lmopt.BudgetExceeded as error:
        found = error.trace[-2].inputs["trajectory"]  # given to the step that was refused its call
        return lmopt.Prediction(answer=f"no answer: {error}", trajectory=found, trace=error.trace)


def main(
    lm: lmopt.LM,
    questions: Sequence[str] = QUESTIONS,
    look: Look = sample,
    *,
    calls: int = 9,
    usd: float | None = None,
) -> list[lmopt.Prediction]:
    """Answer questions with one budget for all of them, and show each step and the cost."""
    agent, purse = analyst(look), lmopt.budget(calls=calls, usd=usd)(lm)
    answers = []
    for question in questions:
        print(question)
        answers.append(ask(agent, purse, question))
        for number, turn in enumerate(answers[-1].trajectory, start=1):
            given = ", ".join(f"{name}={value!r}" for name, value in turn.arguments.items())
            print(f"{number}. {turn.thought}\n   {turn.tool}({given}) -> {turn.observation}")
        print(f"=> {answers[-1].answer}\n")
    spent = sum((one.usage for one in answers), lmopt.Usage())
    print(f"Cost: {spent.input_tokens + spent.output_tokens} tokens, {spent.cost:.4f} US dollars")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="by default two")
    parser.add_argument("--live", action="store_true", help="look things up with yfinance")
    parser.add_argument("--calls", type=int, default=9, help="of the LM, for all questions")
    given = lm_options(parser, cassette="finance_react.calls.jsonl").parse_args()
    chosen, look = lm_of(given, paid(lmopt.replay_lm(TAPE))), yahoo() if given.live else sample
    main(chosen, given.questions, look, calls=given.calls, usd=given.budget)
