"""Servers and clients that nobody here wrote: that they and the wire clients speak one format.

The server is npm's aimock in strict mode, which answers only what it has a fixture for; its command
`llmock` is found through LMOPT_AIMOCK. The clients are those of OpenAI and Anthropic themselves.
"""

import asyncio
import json
import os
import subprocess

import pytest
from attrs import evolve
from test_lms import ANTHROPIC_EVENTS
from wire import completion, deltas, events, server

import lmopt
from lmopt import LMError, Message, Request, Tool, Usage, anthropic_lm, openai_lm, predict

TEXT = "[[ ## answer ## ]]\nParis, Größe 😀\n\n[[ ## completed ## ]]"


# -- their server --


def fixture(match, **response):
    return {"match": {"userMessage": match}, "response": response}


FIXTURES = [
    {
        "match": {"inputText": "embed me"},
        "response": {"embedding": [0.25, -1.0, 3.0]},
    },
    fixture("use a tool", toolCalls=[{"name": "weather", "arguments": {"city": "Köln"}}]),
    fixture("think first", content="42", reasoning="six times seven"),
    fixture("too fast", error={"message": "slow down", "type": "rate_limit_error"}, status=429),
    fixture("capital", content=TEXT),
]


@pytest.fixture(scope="module")
def aimock(tmp_path_factory):
    """The base URL of aimock."""
    command = os.environ.get("LMOPT_AIMOCK")
    if not command:
        pytest.skip("LMOPT_AIMOCK names no llmock of npm's @copilotkit/aimock")
    folder = tmp_path_factory.mktemp("aimock")
    folder.joinpath("fixtures.json").write_text(json.dumps({"fixtures": FIXTURES}))
    options = ["--strict", "--port", "0", "--chunk-size", "3", "--fixtures", str(folder)]
    with subprocess.Popen([command, *options], stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "http://" in line)
        yield "http://" + line.partition("http://")[2].split()[0].rstrip("/") + "/v1"
        process.terminate()


def weather(city: str) -> str:
    """Tell the weather."""
    return city


def ask(text, **changes):
    return Request([Message("system", "Be brief."), Message("user", text)], **changes)


@pytest.fixture(params=["openai", "anthropic"])
def lm(request, aimock):
    made = {"openai": openai_lm, "anthropic": anthropic_lm}[request.param]
    made = made("test-model", base_url=aimock, api_key="secret-key", price=(1.0, 2.0))
    yield made
    made.close()


def answers(lm, request):
    """Of a call, one in a loop, and one in pieces, which are the text."""
    pieces = []
    streamed = lm(evolve(request, on_text=pieces.append))
    assert "".join(pieces) == streamed.text
    return [lm(request), asyncio.run(lm.acall(request)), streamed]


def test_aimock_answers_every_way_of_asking(lm):
    for answer in answers(lm, ask("What is the capital?", temperature=0.5, max_tokens=99)):
        assert answer.text == TEXT and answer.finish_reason == "stop"
        assert answer.usage.calls == 1 and answer.model
    made = list(lmopt.stream(predict("question -> answer"), lm, {"question": "capital?"}))
    assert "".join(one.text for one in made[:-1]) == made[-1].answer == "Paris, Größe 😀"
    assert len(made) > 3


def test_aimock_calls_tools(lm):
    asked = ask("use a tool", tools=[Tool.of(weather)])
    for answer in answers(lm, asked):
        (call,) = answer.tool_calls
        assert (call.name, call.arguments) == ("weather", {"city": "Köln"})
        assert call.id and answer.finish_reason == "tool_calls"
    turns = [
        Message("assistant", "", tool_calls=answer.tool_calls),
        Message("tool", "rain", tool_call_id=call.id),
        Message("user", "capital"),
    ]
    assert lm(evolve(asked, messages=[*asked.messages, *turns])).text == TEXT


def test_aimock_thinks(lm):
    for answer in answers(lm, ask("think first")):
        assert (answer.text, answer.reasoning) == ("42", "six times seven")


def test_aimock_refuses(lm):
    with pytest.raises(lmopt.RateLimited, match="slow down"):
        lm(ask("too fast"))
    with pytest.raises(LMError) as caught:
        lm(ask("nothing like this"))
    assert caught.value.status == 503


def test_aimock_takes_a_schema_and_embeds(lm, aimock):
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    assert lm(ask("capital", schema=schema)).text == TEXT
    embed = lmopt.embedder("test-embedding", base_url=aimock, api_key="secret-key")
    assert embed("embed me") == (0.25, -1.0, 3.0)
    embed.end.close()


# -- their clients --


def test_the_client_of_openai_reads_what_our_server_writes():
    openai = pytest.importorskip("openai")
    made = {True: events(*deltas(TEXT)), False: completion(TEXT)}
    with server(lambda payload: made[bool(payload.get("stream"))]) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key="secret-key")
        ours, pieces = lm(ask("?")), []
        lm(ask("?", on_text=pieces.append))
        with openai.OpenAI(base_url=served.base_url, api_key="secret-key") as client:
            asked = {"model": "m", "messages": served.seen[0][2]["messages"]}
            theirs = client.chat.completions.create(**asked)
            stream = client.chat.completions.create(**asked, stream=True)
            texts = [one.choices[0].delta.content for one in stream if one.choices]
        lm.close()
    assert theirs.choices[0].message.content == ours.text == TEXT
    assert theirs.usage.prompt_tokens == ours.usage.input_tokens == 7
    assert theirs.usage.prompt_tokens_details.cached_tokens == ours.usage.cached_tokens == 2
    assert [one for one in texts if one] == pieces[1:]
    ours_sent, theirs_sent = served.seen[0][2], served.seen[2][2]
    assert ours_sent == theirs_sent
    assert served.seen[1][2].keys() - served.seen[3][2].keys() == {"stream_options"}
    assert [path for path, _, _ in served.seen] == ["/v1/chat/completions"] * 4
    assert {lowered(headers)["authorization"] for _, headers, _ in served.seen} == {
        "Bearer secret-key"
    }


def test_the_client_of_anthropic_reads_what_our_server_writes():
    anthropic = pytest.importorskip("anthropic")
    start = ANTHROPIC_EVENTS[0]
    whole = {"id": "1", "type": "message", "role": "assistant", "stop_sequence": None}
    told = [evolve_event(one, whole) if one is start else one for one in ANTHROPIC_EVENTS]
    parts = "".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in told)
    answer = (200, {"Content-Type": "text/event-stream"}, [parts.encode()])
    with server(lambda payload: answer) as served:
        lm = anthropic_lm("m", base_url=served.base_url, api_key="secret-key", max_tokens=50)
        pieces = []
        ours = lm(ask("?", on_text=pieces.append))
        lm.close()
        url = served.base_url.removesuffix("/v1")
        with (
            anthropic.Anthropic(base_url=url, api_key="secret-key") as client,
            client.messages.stream(
                model="m",
                max_tokens=50,
                system="Be brief.",
                messages=[{"role": "user", "content": "?"}],
            ) as stream,
        ):
            theirs = stream.get_final_message()
    by_kind = {one.type: one for one in theirs.content}
    assert by_kind["text"].text == ours.text == "".join(pieces)
    assert by_kind["thinking"].thinking == ours.reasoning
    used = [one for one in theirs.content if one.type == "tool_use"]
    assert [(one.id, one.name, one.input) for one in used] == [
        (one.id, one.name, dict(one.arguments)) for one in ours.tool_calls
    ]
    assert ours.usage == Usage(1, theirs.usage.input_tokens + 3, theirs.usage.output_tokens, 3)
    (path, headers, sent), (their_path, their_headers, their_sent) = served.seen
    assert path == their_path == "/v1/messages" and sent == their_sent
    assert headers["x-api-key"] in str(their_headers)


def lowered(headers):
    return {name.lower(): value for name, value in headers.items()}


def evolve_event(event, whole):
    return event | {"message": event["message"] | whole}


def test_the_vectors_that_the_client_of_openai_reads_are_ours():
    openai = pytest.importorskip("openai")
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
    body = json.dumps({"object": "list", "data": data, "model": "m", "usage": {}}).encode()
    with server(lambda payload: (200, {}, body)) as served:
        embed = lmopt.embedder("m", base_url=served.base_url, api_key="secret-key")
        with openai.OpenAI(base_url=served.base_url, api_key="secret-key") as client:
            made = client.embeddings.create(model="m", input=["x"], encoding_format="float")
        assert tuple(made.data[0].embedding) == embed("x")
        embed.end.close()
