"""The example of an agent with the tools of an MCP server, over stdio."""

import asyncio
import subprocess
import sys

import pytest
from conftest import ROOT, load_example

import lmopt

pytest.importorskip("mcp.server.mcpserver", reason="mcp 2 is not installed")


def acts(*calls):
    """An LM that makes these tool calls, and is done."""
    made = [{"thought": "", "tool": name, "arguments": given} for name, given in calls]
    end = [{"thought": "", "tool": "finish"}, {"reasoning": "", "answer": "None."}]
    return lmopt.scripted_lm([*made, *end])


def test_the_agent_answers_from_its_cassette_with_what_the_server_says():
    example = load_example("mcp_tools")
    with lmopt.replay_lm(example.TAPE, strict=True) as lm:
        made = example.main(lm)
    seen = [(turn.tool, turn.observation) for turn in made.trajectory]
    assert seen == [
        ("goods", "olive oil, lamp oil"),
        ("stock", "12 bottles of 0.75 litres"),
        ("convert", "2.378"),
        ("finish", ""),
    ]
    assert made.answer == "2.378 US gallons"


def test_the_agent_observes_what_the_server_refuses_and_what_does_not_fit():
    example = load_example("mcp_tools")
    lm = acts(("stock", {"name": "tea"}), ("stock", {}), ("convert", {"amount": "much"}))
    made = asyncio.run(example.answer(lm, "How much tea is there?", example.OWN_SERVER))
    refused, lacking, wrong, _ = (turn.observation for turn in made.trajectory)
    assert refused.startswith("The tool failed: ") and "there is no 'tea'" in refused
    assert lacking.startswith("Wrong arguments: stock lacks the argument 'name'")
    assert wrong.startswith("Wrong arguments: convert lacks the argument 'unit'")


def test_it_runs_as_a_script_with_the_server_that_a_command_starts():
    script = str(ROOT / "examples" / "mcp_tools.py")
    command = [sys.executable, script, "--command", sys.executable, script, "--serve"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.startswith("Tools: goods, stock, convert\n")
    assert "   convert(amount=9, unit='litre', to='US gallon') -> 2.378\n" in ran.stdout
    assert ran.stdout.endswith("2.378 US gallons\n")
