"""A small HTTP server that speaks the OpenAI chat-completions format, for tests on real sockets."""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lmopt import LM, Message, Request

Answer = tuple[int, dict[str, str], bytes | list[bytes]]


def completion(text: str, **changes: Any) -> Answer:
    """A good answer with this text."""
    data = {
        "model": "served",
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    } | changes
    return 200, {}, json.dumps(data).encode()


def events(*data: Any, size: int = 0, done: bool = True) -> Answer:
    """A stream of events; the last one is [DONE]. It comes in pieces of `size` bytes."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in data]
    body = "".join(f"data: {one}\n\n" for one in [*texts, *(["[DONE]"] if done else [])]).encode()
    pieces = [body[n : n + size] for n in range(0, len(body), size)] if size else [body]
    return 200, {"Content-Type": "text/event-stream"}, pieces


def deltas(text: str, *, size: int = 4) -> list[Any]:
    """The events of a chat completion with this text, in pieces of so many characters."""
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    made = [{"choices": [{"delta": {"content": one}, "index": 0}]} for one in pieces]
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    end = {"choices": [{"delta": {}, "index": 0, "finish_reason": "stop"}], "model": "served"}
    return [*made, end, {"choices": [], "usage": usage}]


def failure(status: int, message: str = "no", **headers: str) -> Answer:
    """A refusal, as providers word it."""
    return status, headers, json.dumps({"error": {"message": message}}).encode()


def served_by(lm: LM) -> Callable[[dict[str, Any]], Answer]:
    """Answer requests with an LM."""

    def answer(payload: dict[str, Any]) -> Answer:
        messages = [Message(one["role"], one["content"]) for one in payload["messages"]]
        asked = Request(messages, temperature=payload.get("temperature"))
        return completion(lm(asked).text)

    return answer


@contextlib.contextmanager
def server(answer: Callable[[dict[str, Any]], Answer | None]) -> Iterator[Any]:
    """Serve on a free port; `answer` returning None drops the connection. Yields the server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            self.server.count(1)  # type: ignore[attr-defined]

        def finish(self) -> None:
            super().finish()
            self.server.count(-1)  # type: ignore[attr-defined]

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append((self.path, dict(self.headers), payload))  # type: ignore[attr-defined]
            made = answer(payload)
            if made is None:
                self.close_connection = True
                return
            status, headers, body = made
            self.send_response(status)
            streamed = isinstance(body, list)
            size = {} if streamed else {"Content-Length": str(len(body))}
            chunked = {"Transfer-Encoding": "chunked"} if streamed else {}
            for name, value in {**size, **chunked, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            for piece in itertools.chain(body, [b""]) if streamed else [body]:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if streamed else piece)
                self.wfile.flush()

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        seen: list[Any]
        connections = 0
        changed = threading.Condition()

        def count(self, change: int) -> None:
            with self.changed:
                self.connections += change
                self.changed.notify_all()

        def has(self, connections: int) -> bool:
            """Wait until there are so many."""
            with self.changed:
                return self.changed.wait_for(lambda: self.connections == connections, 10)

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that went away

    served = Server(("127.0.0.1", 0), Handler)
    served.seen = []
    served.base_url = f"http://127.0.0.1:{served.server_port}/v1"  # type: ignore[attr-defined]
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        served.shutdown()
        served.server_close()
        thread.join()
