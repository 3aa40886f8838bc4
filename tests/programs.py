"""One program of every kind, with inputs; they run on `answer`, by whatever driver."""

import asyncio
from typing import Any

import lmopt
from lmopt import (
    Message,
    Program,
    Request,
    Response,
    Result,
    Score,
    Sleep,
    ToolCall,
    best_of_n,
    chain_of_thought,
    code_act,
    each,
    ensemble,
    invoke,
    knn_demos,
    majority,
    multi_chain_comparison,
    parallel,
    pipeline,
    predict,
    program,
    program_of_thought,
    react,
    recursive,
    refine,
    retrieve,
    scripted_lm,
    stub_lm,
    two_step,
)

stub = stub_lm()


class Crowd:
    """An LM of a loop that counts how many calls it gets at once at most."""

    identity = "crowd"

    def __init__(self, ask, concurrency):
        self.ask, self.concurrency, self.now, self.most = ask, concurrency, 0, 0

    async def acall(self, request):
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(5):
            await asyncio.sleep(0)
        self.now -= 1
        return self.ask(request)


def answer(request: Request) -> Response:
    """Sample values of the types asked for; some replies cannot be read, and one call fails."""
    text = request.messages[-1].text
    if "stumble" in text and request.adapter is not lmopt.json:
        return Response("What?")
    if "break" in text:
        raise lmopt.ContextWindowExceeded("too long")
    if request.tools:
        return acts_natively(request)
    fields = acts(request) if request.inputs is not None else None
    return scripted_lm([fields])(request) if fields else stub(request)


TURNS = (
    {"thought": "a", "tool": "lookup", "arguments": {"word": "tea"}},
    {"thought": "b", "tool": "lookup", "arguments": {"wrong": 1}},
    {"thought": "c", "tool": "fails", "arguments": {"text": "x"}},
    {"thought": "d", "tool": "nothing", "arguments": {}},
    {"thought": "e", "tool": "finish", "arguments": {}},
)
CODE = (
    {"thought": "a", "code": "print(lookup('tea'))", "finished": False},
    {"thought": "b", "code": "submit(a='4')", "finished": True},
)


def acts(request: Request) -> dict[str, Any] | None:
    """What an agent does, by how much it has done."""
    names = [one.name for one in request.signature.outputs]
    if names == ["thought", "tool", "arguments"]:
        return TURNS[len(request.inputs["trajectory"])]
    if names[-1] in ("code", "finished"):
        done = len(request.inputs.get("history", request.inputs.get("attempts", ())))
        return {name: value for name, value in CODE[done].items() if name in names}
    if names == ["advice"]:
        return {"advice": {"predict": "Think."}}
    return None


def acts_natively(request: Request) -> Response:
    """The same in tool calls: two at once, then a last word."""
    if request.messages[-1].role == "tool":
        return Response("All is known.")
    calls = [ToolCall(str(n), one["tool"], one["arguments"]) for n, one in enumerate(TURNS[:4])]
    return Response("Look.", tool_calls=calls)


def lookup(word: str) -> str:
    """Look a word up.

    Args:
        word: in the dictionary.
    """
    used()
    return f"{word} is a drink"


def interpreter(code: str, state: Any) -> Result:
    """Knows a few lines of code."""
    used()
    done = {**state, "cells": [*state["cells"], code]}
    if "submit" in code:
        return Result(state=done, answer={"a": "4"})
    if "lookup" in code and "lookup" in state["functions"]:
        if not state["answers"]:
            return Result(calls=(("lookup", ["tea"], {}),))
        return Result(output=str(state["answers"]), state=done)
    return Result(error="NameError: lookup")


def reward(inputs: Any, made: Any) -> Score:
    """Not good enough."""
    return Score(0.5, "too short")


def embed(texts: list[str]) -> list[list[float]]:
    """Count letters."""
    used()
    return [[text.count(one) for one in "aeiou"] for text in texts]


def used() -> None:
    """Called by each tool; a test replaces it to forbid their use."""


def fails(text: str) -> str:
    """A tool that does not work."""
    used()
    raise KeyError(text)


@program(x=predict("a -> b"), y=predict("a -> b: int"))
def together(steps, a):
    """Effects at once, tools that fail, waits, bare requests."""
    x, y, n = yield steps.x(a=a), steps.y(a=a * 2), invoke(len, a)
    (z,) = yield [steps.x(a=x.b)]
    yield ()
    yield Sleep(0)
    raw = yield Request([Message("user", "bare")])
    try:
        yield invoke(fails, a)
    except KeyError as error:
        failure = lmopt.describe(error)
    try:
        yield steps.x(a="break")
    except lmopt.ContextWindowExceeded:
        return {"x": x.b, "y": y.b, "n": n, "z": z.b, "raw": raw.text, "failure": failure}


@program(inner=together, last=predict("x -> y: list[int]"), max_calls=30)
def nested(steps, a):
    """Programs in programs, at once."""
    one, two = yield steps.inner(a=a), steps.inner(a=a + "!")
    return (yield steps.last(x=one.x + two.x))


@lmopt.factory
def asking_often(task: Program, times: int) -> Program:
    """A program of a factory of one's own, whose body is a closure."""

    @program(step=task, max_calls=task.max_calls * times)
    def often(steps, q):
        made = yield [steps.step(q=q + "?" * n) for n in range(times)]
        return {"a": [one.a for one in made]}

    return often


def search(query: str, k: int) -> list[str]:
    """Find something."""
    used()
    return [f"{query} {n}" for n in range(k + 1)]


DATA = [{"q": "eat", "a": "1"}, {"q": "out", "a": "2"}]

PROGRAMS: dict[str, tuple[Program, dict[str, Any]]] = {
    "predict": (predict("q -> a"), {"q": "2+2?"}),
    "asks again": (predict("q -> a: int"), {"q": "stumble"}),
    "chain_of_thought": (chain_of_thought("q -> a: float"), {"q": "2+2?"}),
    "two_step": (predict("q -> a", adapter=two_step(stub)), {"q": "2+2?"}),
    "json": (predict("q -> a: list[int], b", adapter=lmopt.json), {"q": "2+2?"}),
    "xml": (predict("q -> a: list[int], b", adapter=lmopt.xml), {"q": "2+2?"}),
    "plain": (predict("q -> a: int, b", adapter=lmopt.plain), {"q": "2+2?"}),
    "react": (react("q -> a", [lookup, fails]), {"q": "2+2?"}),
    "react, native": (react("q -> a", [lookup, fails], native=True), {"q": "2+2?"}),
    "program_of_thought": (
        program_of_thought("q -> a", interpreter, max_tries=2),
        {"q": "2+2?"},
    ),
    "code_act": (code_act("q -> a", [lookup], interpreter), {"q": "2+2?"}),
    "recursive": (recursive("q -> a", interpreter, tools=[lookup]), {"q": "2+2?"}),
    "best_of_n": (best_of_n(predict("q -> a"), 3, reward), {"q": "2+2?"}),
    "refine": (refine(predict("q -> a"), 3, reward), {"q": "2+2?"}),
    "majority": (majority(predict("q -> a"), 3), {"q": "2+2?"}),
    "multi_chain_comparison": (multi_chain_comparison("q -> a"), {"q": "2+2?"}),
    "ensemble": (ensemble([predict("q -> a")] * 3, size=2), {"q": "2+2?"}),
    "parallel": (parallel(x=predict("q -> a"), y=predict("q -> b: int")), {"q": "2+2?"}),
    "each": (each(predict("q -> a"), "q"), {"q": ["1", "2"]}),
    "retrieve": (retrieve(search), {"query": "tea"}),
    "knn_demos": (knn_demos(predict("q -> a"), DATA, 1, embed), {"q": "2+2?"}),
    "pipeline": (pipeline(a=predict("q -> a"), b=predict("a, q -> b: int")), {"q": "2+2?"}),
    "together": (together, {"a": "hi"}),
    "nested": (nested, {"a": "hi"}),
    "own factory": (asking_often(predict("q -> a"), times=2), {"q": "2+2?"}),
}


WORDS = {"animal": ("horse", "tiger"), "plant": ("tulip", "clover"), "metal": ("copper", "silver")}


def about(count):
    """So many rows about each of these words, by kind."""
    return [
        lmopt.Record(text=f"this is about {word} number {n}", kind=kind)
        for n in range(count)
        for kind, words in WORDS.items()
        for word in words
    ]
