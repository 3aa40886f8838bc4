# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "fastapi>=0.135", "httpx", "toolz", "uvicorn"]
# ///
"""A web service answers with an optimized program, and shows the answer while it is written.

Offline, with an LM that answers from the demonstrations it is shown; then open the page it names:

    python examples/service.py --port 8000

With a language model, and parameters of your own, such as those that an optimizer found overnight:

    python examples/service.py --lm openai/gpt-4o-mini --params params.json

`POST /answer` takes {"question": ...}; `GET /stream?question=...` sends the pieces of the answer as
server-sent events, and the whole of it at the end. Who goes away stops the run. When the file of
the parameters changes, the next request uses the new ones: no restart. A broken file changes
nothing, and each answer says so.
"""

import argparse
import asyncio
import logging
import re
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import labeled_few_shot, lm_of, lm_options

EXAMPLES = [
    {
        "question": "How do I fix a flat tyre?",
        "summary": "Find the hole in the tube, patch it, and take out what made it.",
        "tools": ["two tyre levers", "a patch kit", "a pump"],
        "steps": [
            "Take the wheel out and lever one side of the tyre off the rim.",
            "Pump up the tube, and find the hole by ear or under water.",
            "Roughen the place, spread the glue, wait until it is dull, press the patch on.",
            "Feel along the inside of the tyre for glass or thorns, and take them out.",
            "Put tube, tyre and wheel back, and pump it up.",
        ],
        "minutes": 30,
    },
    {
        "question": "My brakes squeak when I slow down. What helps?",
        "summary": "Clean the rims, and turn the pads so that their front edge touches first.",
        "tools": ["a clean rag", "alcohol", "a 5 mm hex key"],
        "steps": [
            "Wipe both sides of the rims with alcohol.",
            "Rub the shine off the pads with sandpaper.",
            "Turn each pad so that its front edge touches a millimetre before the rest.",
        ],
        "minutes": 20,
    },
    {
        "question": "The chain falls off when I change gear.",
        "summary": "Set the limit screws of the derailleur, which let the chain go too far.",
        "tools": ["a screwdriver"],
        "steps": [
            "Shift to the smallest ring and the largest sprocket.",
            "Turn the screw marked L until the cage is a millimetre from the chain.",
            "Do the same with H, on the largest ring and the smallest sprocket.",
        ],
        "minutes": 15,
    },
]
MESSAGES = {
    lmopt.RateLimited: "The language model is busy. Please try again in a minute.",
    lmopt.LMTimeout: "The language model took too long. Please try again.",
    lmopt.Refused: "The language model does not answer this.",
    lmopt.ParseError: "The answer could not be read. Please try again.",
    Exception: "No answer can be given at the moment.",
}
log = logging.getLogger("service")

helper = lmopt.predict(
    "question -> summary, tools: list[str], steps: list[str], minutes: int",
    instructions="Tell how to mend a bicycle, in short steps that a beginner can follow.",
    max_tokens=500,
)


class Current:
    """A program with the parameters of a file, as the file is now."""

    def __init__(self, program: lmopt.Program, path: Path) -> None:
        self.start, self.path, self.seen = program, path, None
        self.read()

    def read(self) -> None:
        """Read the file if it is not as it was when it was last read."""
        now = self.path.stat()  # before it is read: a change from now on is seen next time
        if (now.st_mtime_ns, now.st_size) != self.seen:
            self.program, self.notice = self.start.with_params(lmopt.load(self.path)), ""
            self.seen = now.st_mtime_ns, now.st_size

    def refresh(self) -> tuple[lmopt.Program, dict[str, str]]:
        """Return the program, and what to say of its parameters; a broken file changes nothing."""
        try:
            self.read()
        except (OSError, lmopt.ParamsError) as error:
            self.seen, self.notice = None, f"{self.path.name} is broken: the old parameters stay."
            log.warning("The old parameters stay: %s", error)
        return self.program, {"params": self.program.params.digest[:8], "notice": self.notice}


def plain(error: Exception) -> dict[str, str]:
    """Log an error, and return what a visitor may know of it."""
    log.error("A run failed.", exc_info=error)
    return {"error": next(text for kind, text in MESSAGES.items() if isinstance(error, kind))}


def make_app(lm: Any, params_path: Path) -> Any:
    """Make the service: the page, answers, and streams of answers."""
    from fastapi import Body, FastAPI, Query
    from fastapi.responses import FileResponse, JSONResponse
    from fastapi.sse import EventSourceResponse, ServerSentEvent

    app, current = FastAPI(title="Bicycle help"), Current(helper, params_path)
    app.add_exception_handler(lmopt.LmoptError, lambda _, e: JSONResponse(plain(e), 502))
    app.get("/", response_class=FileResponse)(lambda: Path(__file__).with_suffix(".html"))

    @app.post("/answer")
    async def answer(question: Annotated[str, Body(embed=True, max_length=500)]) -> dict[str, Any]:
        program, known = current.refresh()
        made = await lmopt.arun(program, lm, {"question": question})
        return {"fields": lmopt.jsonable(made), **known}

    @app.get("/stream", response_class=EventSourceResponse)
    async def stream(question: Annotated[str, Query(max_length=500)]) -> AsyncIterator[Any]:
        program, known = current.refresh()
        try:
            async with aclosing(lmopt.astream(program, lm, {"question": question})) as items:
                async for item in items:  # the last one is the prediction
                    data = lmopt.jsonable(item)
                    if isinstance(item, lmopt.Chunk):
                        yield ServerSentEvent(event="chunk", data=data)
                yield ServerSentEvent(event="prediction", data={"fields": data, **known})
        except Exception as error:
            yield ServerSentEvent(event="failure", data=plain(error))

    return app


async def offline(request: lmopt.Request, *, seconds: float = 0.04) -> lmopt.Response:
    """Answer from the demonstrations in the prompt, and tell the answer word by word."""
    response = lmopt.toy_lm()(request)
    for piece in re.findall(r"\s*\S+", response.text) if request.on_text else []:
        request.on_text(piece)
        await asyncio.sleep(seconds)
    return response


def main(lm: Any, params_path: Path, port: int) -> None:
    """Serve until Ctrl-C; where there are no parameters yet, learn some from the examples."""
    import uvicorn

    if not params_path.exists():
        lmopt.save(labeled_few_shot(k=3)(helper, EXAMPLES, lmopt.exact_match), params_path)
    uvicorn.run(make_app(lm, params_path), port=port, timeout_graceful_shutdown=3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="of this machine; 0 for any")
    parser.add_argument("--params", type=Path, default="service.params.json", help="a file")
    given = lm_options(parser, cassette="service.calls.jsonl").parse_args()
    main(lm_of(given, offline), given.params, given.port)
