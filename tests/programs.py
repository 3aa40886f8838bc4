"""One program of every kind, with inputs; they run on `answer`, by whatever driver."""

from typing import Any

import lmopt
from lmopt import (
    Message,
    Program,
    Request,
    Response,
    Sleep,
    chain_of_thought,
    invoke,
    pipeline,
    predict,
    program,
    stub_lm,
    two_step,
)

stub = stub_lm()


def answer(request: Request) -> Response:
    """Sample values of the types asked for; some replies cannot be read, and one call fails."""
    text = request.messages[-1].text
    if "stumble" in text and len(request.messages) < 4:
        return Response("What?")
    if "break" in text:
        raise lmopt.ContextWindowExceeded("too long")
    return stub(request)


def fails(text: str) -> str:
    """A tool that does not work."""
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


PROGRAMS: dict[str, tuple[Program, dict[str, Any]]] = {
    "predict": (predict("q -> a"), {"q": "2+2?"}),
    "asks again": (predict("q -> a: int"), {"q": "stumble"}),
    "chain_of_thought": (chain_of_thought("q -> a: float"), {"q": "2+2?"}),
    "two_step": (predict("q -> a", adapter=two_step(stub)), {"q": "2+2?"}),
    "json": (predict("q -> a: list[int], b", adapter=lmopt.json), {"q": "2+2?"}),
    "xml": (predict("q -> a: list[int], b", adapter=lmopt.xml), {"q": "2+2?"}),
    "plain": (predict("q -> a: int, b", adapter=lmopt.plain), {"q": "2+2?"}),
    "pipeline": (pipeline(a=predict("q -> a"), b=predict("a, q -> b: int")), {"q": "2+2?"}),
    "together": (together, {"a": "hi"}),
    "nested": (nested, {"a": "hi"}),
}
