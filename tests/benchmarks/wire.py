"""Requests a second through `openai_lm`, beside bare httpx making the same calls in the same run.

    python tests/benchmarks/wire.py [--quick]

The server runs in a process of its own, answers at once or after 50 ms, and does nothing but that.
For bare httpx several arrangements are tried, and the best one counts. Also printed: what a hit of
each cache costs beyond the call itself, and the memory that 100,000 recorded calls take.
"""

import asyncio
import contextlib
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx
from overhead import microseconds

import lmopt
from lmopt import Message, Request, Response, cache, openai_lm, record

ANSWER = (
    b'{"model":"m","choices":[{"message":{"role":"assistant","content":"[[ ## answer ## ]]\\nParis'
    b'\\n\\n[[ ## completed ## ]]"},"finish_reason":"stop"}],"usage":{"prompt_tokens":90,'
    b'"completion_tokens":12}}'
)
HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(ANSWER)}\r\n\r\n"
ASKED = Request(
    [
        Message("system", "Input fields:\n1. `question` (str)\nOutput fields:\n1. `answer` (str)"),
        Message("user", "[[ ## question ## ]]\nWhat is the capital of France?"),
    ]
)
IN_FLIGHT = (1, 16, 64)
WARM = 0.3  # seconds of calls that do not count


class Instant(asyncio.Protocol):
    """Answers each request that has arrived whole, after a delay."""

    delay = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, end, body = self.data.partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if end and len(body) >= size:
            self.data = b""
            if self.delay:
                asyncio.get_running_loop().call_later(self.delay, self.answer)
            else:
                self.answer()

    def answer(self) -> None:
        self.transport.write(HEAD.encode() + ANSWER)


def serve(listening: socket.socket, delay: float) -> None:
    """Answer until the process is ended."""

    async def forever() -> None:
        made = type("Delayed", (Instant,), {"delay": delay})
        server = await asyncio.get_running_loop().create_server(made, sock=listening)
        await server.serve_forever()

    asyncio.run(forever())


@contextlib.contextmanager
def server(delay: float) -> Iterator[str]:
    """Serve in a process of its own; give the base URL."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    process = multiprocessing.get_context("fork").Process(
        target=serve, args=(listening, delay), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        process.terminate()
        process.join()
        listening.close()


def threads_rate(calls: list[Callable[[], Any]], seconds: float) -> float:
    """Calls a second, each callable on a thread of its own, after some that open connections."""
    start = time.perf_counter() + WARM

    def work(call: Callable[[], Any]) -> int:
        count = 0
        while (now := time.perf_counter()) < start + seconds:
            call()
            count += now >= start
        return count

    with ThreadPoolExecutor(len(calls)) as pool:
        return sum(pool.map(work, calls)) / seconds


def tasks_rate(
    start: Callable[[], Awaitable[list[Callable[[], Awaitable[Any]]]]], seconds: float
) -> float:
    """Calls a second, each callable in a task of its own, after some that open connections."""

    async def main() -> float:
        calls = await start()
        began = time.perf_counter() + WARM

        async def work(call: Callable[[], Awaitable[Any]]) -> int:
            count = 0
            while (now := time.perf_counter()) < began + seconds:
                await call()
                count += now >= began
            return count

        return sum(await asyncio.gather(*map(work, calls))) / seconds

    return asyncio.run(main())


def bare(base_url: str, client: Any) -> Callable[[], Any]:
    """A call with nothing but httpx, which reads the answer as JSON."""
    url = f"{base_url}/chat/completions"
    payload = {"model": "m", "messages": [lmopt.jsonable(one) for one in ASKED.messages]}
    headers = {"Authorization": "Bearer secret-secret"}
    if isinstance(client, httpx.AsyncClient):

        async def acall() -> Any:
            return (await client.post(url, json=payload, headers=headers)).json()

        return acall
    return lambda: client.post(url, json=payload, headers=headers).json()


def limits() -> httpx.Limits:
    """Connections enough for all."""
    return httpx.Limits(max_connections=256, max_keepalive_connections=256)


def sync_rates(base_url: str, n: int, seconds: float) -> dict[str, float]:
    """One client for each thread, one for all, and ours."""
    own = [httpx.Client(limits=limits()) for _ in range(n)]
    shared = httpx.Client(limits=limits())
    lm = openai_lm("m", base_url=base_url, api_key="secret-secret", concurrency=n)
    return {
        "own": threads_rate([bare(base_url, client) for client in own], seconds),
        "shared": threads_rate([bare(base_url, shared)] * n, seconds),
        "lmopt": threads_rate([lambda: lm(ASKED)] * n, seconds),
    }


def async_rates(base_url: str, n: int, seconds: float) -> dict[str, float]:
    """One client for each task, one for all, and ours."""
    lm: Any = openai_lm("m", base_url=base_url, api_key="secret-secret", concurrency=n)

    async def own() -> Any:
        return [bare(base_url, httpx.AsyncClient(limits=limits())) for _ in range(n)]

    async def shared() -> Any:
        return [bare(base_url, httpx.AsyncClient(limits=limits()))] * n

    async def ours() -> Any:
        return [lambda: lm.acall(ASKED)] * n

    return {
        "own": tasks_rate(own, seconds),
        "shared": tasks_rate(shared, seconds),
        "lmopt": tasks_rate(ours, seconds),
    }


def wire(seconds: float, rounds: int) -> None:
    """Print median rates, and the median ratio to the bare arrangement that is best."""
    print("  server   kind at once    own shared  lmopt ratio")
    for delay in (0.0, 0.05):
        with server(delay) as base_url:
            for kind, measure in (("sync", sync_rates), ("async", async_rates)):
                for n in IN_FLIGHT:
                    made = [measure(base_url, n, seconds) for _ in range(rounds)]
                    middle = {k: statistics.median(one[k] for one in made) for k in made[0]}
                    best = max(("own", "shared"), key=lambda k: middle[k])
                    ratio = statistics.median(one["lmopt"] / one[best] for one in made)
                    rates = " ".join(f"{rate:6.0f}" for rate in middle.values())
                    line = f"{delay * 1000:5.0f} ms {kind:>6} {n:7d} {rates} {ratio:5.2f}"
                    print(line, flush=True)


def hits(folder: Path) -> None:
    """Print what a hit costs beyond the call of an LM that answers at once."""
    answer = Response("[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]", model="m")

    def instant(request: Request) -> Response:
        return answer

    alone = microseconds(lambda: instant(ASKED), 2000)
    stores = {"SQLite": str(folder / "calls.sqlite"), "dict": {}}
    for name, store in stores.items():
        lm = cache(store)(instant)
        lm(ASKED)
        print(f"a hit of {name}: {microseconds(lambda lm=lm: lm(ASKED), 2000) - alone:.1f} us")
    lm = record(folder / "calls.jsonl")(instant)
    lm(ASKED)
    print(f"a hit of a cassette: {microseconds(lambda: lm(ASKED), 2000) - alone:.1f} us")


def memory(folder: Path, calls: int) -> None:
    """Print the memory that the record of many calls takes, of a cassette and of a trace."""
    answer = Response("[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]", model="m")
    path = folder / "many.jsonl"
    qa = lmopt.predict("question -> answer")

    def instant(request: Request) -> Response:
        return answer

    write = cache({})(instant)
    tracemalloc.start()
    for n in range(calls):
        qa(write, question=f"What is number {n}?")
    print(f"{calls} calls in a dict: {tracemalloc.get_traced_memory()[0] / 1e6:.0f} MB")
    tracemalloc.stop()
    lm = record(path)(instant)
    for n in range(calls):
        qa(lm, question=f"What is number {n}?")
    tracemalloc.start()
    began = time.perf_counter()
    again = record(path)(instant)
    qa(again, question="What is number 0?")
    used, took = tracemalloc.get_traced_memory()[0] / 1e6, time.perf_counter() - began
    tracemalloc.stop()
    size = path.stat().st_size / 1e6
    print(f"{calls} calls in a cassette of {size:.0f} MB: {used:.0f} MB, read in {took:.1f} s")


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    with tempfile.TemporaryDirectory() as made:
        hits(Path(made))
        memory(Path(made), 2_000 if quick else 100_000)
    wire(0.3 if quick else 0.6, 1 if quick else 9)
