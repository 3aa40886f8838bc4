# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "mcp>=2", "toolz"]
# ///
"""An agent uses the tools of an MCP server, which it starts and talks to over stdin and stdout.

Offline, the LM's answers come from the cassette beside this file, and were written by hand; the
tools are really called, in a small server that this file starts as a process (`--serve`):

    python examples/mcp_tools.py

With a language model, on a question of your own; with tools of another server, whose command line
comes last:

    python examples/mcp_tools.py --lm openai/gpt-4o-mini "Is there more honey or more vinegar?"
    python examples/mcp_tools.py --base-url http://localhost:8080/v1
    python examples/mcp_tools.py --lm openai/gpt-4o-mini "What time is it in Oslo?" \\
        --command uvx mcp-server-time

A server tells the name, the description and the JSON schema of each tool, and `Tool.from_mcp` makes
of that what `react` takes. The agent runs in the event loop of the session, by `arun`. What the
server reports as an error is what the agent observes, and it can do better in its next step. What
ends the run, such as an LM that cannot be asked, leaves the session inside an ExceptionGroup.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import lm_of, lm_options

OWN_SERVER = [sys.executable, str(Path(__file__).resolve()), "--serve"]
TAPE = Path(__file__).with_name("mcp_tools.jsonl")
QUESTION = "How many US gallons of olive oil are in the shop?"
BOTTLES = {"olive oil": (12, 0.75), "lamp oil": (5, 1.0), "vinegar": (30, 0.5), "honey": (8, 0.4)}
LITRES = {"litre": 1.0, "millilitre": 0.001, "us gallon": 3.785411784, "us pint": 0.473176473}


# -- the server --


def goods(word: str) -> str:
    """List the goods whose names contain a word; all of them for an empty one."""
    return ", ".join(name for name in BOTTLES if word.lower() in name)


def stock(name: str) -> str:
    """Tell how many bottles there are of one of the goods, and how much is in each."""
    from mcp.server.mcpserver.exceptions import ToolError

    if name not in BOTTLES:
        raise ToolError(f"there is no {name!r}; ask for the goods first")
    count, litres = BOTTLES[name]
    return f"{count} bottles of {litres} litres"


def convert(amount: float, unit: str, to: str) -> float:
    """Convert a volume; units are litre, millilitre, US gallon and US pint."""
    return round(amount * LITRES[unit.lower()] / LITRES[to.lower()], 3)


def serve() -> None:
    """Offer the tools over stdin and stdout, until stdin is closed."""
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("shop")
    for function in (goods, stock, convert):
        server.tool()(function)
    server.run()


# -- the agent --


async def answer(lm: lmopt.LM, question: str, command: Sequence[str]) -> lmopt.Prediction:
    """Start a server, and answer a question with its tools."""
    from mcp import Client, StdioServerParameters

    async with Client(StdioServerParameters(command=command[0], args=command[1:])) as client:
        listed = await client.list_tools()
        tools = [lmopt.Tool.from_mcp(one, client.call_tool) for one in listed.tools]
        print(f"Tools: {', '.join(one.name for one in tools)}\n")
        agent = lmopt.react("question -> answer", tools, max_steps=8)
        return await lmopt.arun(agent, lm, {"question": question})


def main(
    lm: lmopt.LM, question: str = QUESTION, command: Sequence[str] = OWN_SERVER
) -> lmopt.Prediction:
    """Answer a question, and show each step on the way."""
    prediction = asyncio.run(answer(lm, question, command))
    for number, turn in enumerate(prediction.trajectory, start=1):
        given = ", ".join(f"{name}={value!r}" for name, value in turn.arguments.items())
        print(f"{number}. {turn.thought}\n   {turn.tool}({given}) -> {turn.observation}")
    print(f"\n{question}\n{prediction.answer}")
    return prediction


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--serve", action="store_true", help="be the server")
    parser.add_argument(
        "--command", nargs=argparse.REMAINDER, default=OWN_SERVER, help="comes last"
    )
    given = lm_options(parser, cassette="mcp_tools.calls.jsonl").parse_args()
    if given.serve:
        serve()
    else:
        main(lm_of(given, lmopt.replay_lm(TAPE)), given.question, given.command)
