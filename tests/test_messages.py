"""Requests and responses: what is part of the key, and what is not."""

import subprocess
import sys

import attrs
import pytest
from conftest import ROOT

from lmopt import Message, Request, Response, ToolCall, chat, signature, transcript

ASKED = Request([Message("user", "Hello")])
CHANGES = [
    {"messages": [Message("user", "Hi")]},
    {"model": "m"},
    {"temperature": 0.0},
    {"max_tokens": 5},
    {"top_p": 0.5},
    {"stop": ["x"]},
    {"schema": {"type": "object"}},
    {"tools": [{"name": "t"}]},
    {"tool_choice": "auto"},
    {"rollout": 1},
    {"extra": {"seed": 1}},
]


def test_whatever_can_change_the_answer_changes_the_key():
    keys = {attrs.evolve(ASKED, **change).key for change in CHANGES}
    assert len(keys | {ASKED.key}) == len(CHANGES) + 1
    known = {name for change in CHANGES for name in change}
    assert known == {one.name for one in attrs.fields(Request) if one.eq}


def test_where_a_request_comes_from_is_no_part_of_it():
    marked = attrs.evolve(
        ASKED,
        step="a.b",
        signature=signature("q -> a"),
        inputs={"q": 1},
        adapter=chat,
        on_text=print,
    )
    assert marked == ASKED and marked.key == ASKED.key and hash(marked) == hash(ASKED)
    assert "on_text" not in repr(marked)


def test_the_key_is_the_same_in_every_process():
    code = "from lmopt import *\nprint(Request([Message('user', 'Hello')], extra={'b': 1}).key)"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert keys == {attrs.evolve(ASKED, extra={"b": 1}).key + "\n"}


def test_a_response_needs_only_its_text():
    answer = Response("hi", tool_calls=(ToolCall("1", "search", {"q": "x"}),))
    assert (answer.finish_reason, answer.usage.calls, answer.cached) == ("stop", 0, False)
    assert answer.tool_calls[0].arguments.q == "x"


@pytest.mark.parametrize("content", ["", "two\nlines"])
def test_a_transcript_shows_role_and_text(content):
    assert transcript([Message("user", content)]) == f"--- user ---\n{content}"
