"""LMs: those that need no network, then the wire over real sockets, with failures and secrets."""

import asyncio
import copy
import email.utils
import gc
import json
import pickle
import threading
import time
import traceback

import httpx
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from wire import completion, deltas, events, failure, served_by, server

import lmopt
from lmopt import (
    DataError,
    LMError,
    Message,
    Prompt,
    RateLimited,
    Request,
    Response,
    ToolCall,
    Usage,
    chain_of_thought,
    connect,
    evaluate,
    exact_match,
    mock_lm,
    openai_lm,
    predict,
    scripted_lm,
    stub_lm,
    toy_lm,
)
from lmopt_optimizers import random_search

ASKED = Request([Message("user", "Hello")])
KEY = "sk-canary-4711"


def test_scripted_lm_gives_its_replies_in_order_and_no_more():
    lm = scripted_lm(["a", Response("b"), {"answer": "c"}, LMError("down")])
    assert lm(ASKED).text == "a" and lm(ASKED).text == "b"
    assert predict("q -> answer")(lm, q="?").answer == "c"
    with pytest.raises(LMError, match="down"):
        lm(ASKED)
    with pytest.raises(
        lmopt.ReplayMiss, match="all of its 4 replies.*'Hello'; expected no.*; script one"
    ):
        lm(ASKED)


def test_fields_need_a_step_that_asks_for_them():
    with pytest.raises(
        lmopt.DataError, match="fields for a request without a step: .*; answer with"
    ):
        scripted_lm([{"answer": "x"}])(ASKED)
    with pytest.raises(lmopt.DataError, match="a request without inputs: .*; use scripted_lm"):
        mock_lm(lambda inputs: {})(ASKED)


def test_mock_lm_answers_by_a_function_of_the_inputs():
    lm = mock_lm(lambda inputs: {"n": len(inputs.text)} if inputs.text else LMError("empty"))
    count = predict("text -> n: int")
    assert count(lm, text="abc").n == 3
    with pytest.raises(LMError, match="empty"):
        count(lm, text="")


def test_stub_lm_fits_any_signature_and_pickles():
    made = predict("a -> s, n: int, l: list[bool], c: Literal['x', 'y'], d: dict[str, float]")
    lm = pickle.loads(pickle.dumps(stub_lm()))
    assert made(lm, a=1) == {"s": "text", "n": 1, "l": [True], "c": "x", "d": {"text": 1.0}}
    assert lm(ASKED).text == "text"


# -- toy_lm ----------------------------------------------------------------------------------------

animals = predict("animal -> sound").with_params(
    {
        "predict": Prompt(
            "Tell its sound.",
            demos=[{"animal": "dog", "sound": "woof"}, {"animal": "cat", "sound": "meow"}],
        )
    }
)


def test_toy_lm_answers_by_the_nearest_demonstration():
    assert [animals(toy_lm(), animal=a).sound for a in ("two dogs", "my Cat!")] == ["woof", "meow"]


def test_toy_lm_follows_rules_in_the_instructions():
    rules = 'If the animal is a "cow" or an "ox", answer "moo".\nOtherwise think.'
    told = animals.with_params({"predict": Prompt(rules, animals.params["predict"].demos)})
    assert [told(toy_lm(), animal=a).sound for a in ("brown cow", "ox", "dog")] == [
        "moo",
        "moo",
        "woof",
    ]


def test_toy_lm_keeps_to_the_allowed_values():
    task = predict("text -> label: Literal['apple pie', 'car', 7]")
    assert task(toy_lm(), text="a red car").label == "car"
    assert task(toy_lm(), text="I love pies, apple ones").label == "apple pie"
    led = task.with_params({"predict": Prompt(demos=[{"text": "a red car", "label": "boat"}])})
    assert led(toy_lm(), text="a red car").label == "car"


def test_toy_lm_answers_every_simple_type_with_nothing_to_go_by():
    task = predict("text -> a, b: int, c: float, d: bool, e: list[int], f: dict[str, int], g: None")
    made = task(toy_lm(), text="We had 12 eggs")
    assert dict(made) == {
        "a": "We had 12 eggs",
        "b": 12,
        "c": 12.0,
        "d": False,
        "e": [],
        "f": {},
    } | {"g": None}
    assert predict("-> joke")(toy_lm()).joke == ""
    assert toy_lm()(Request([])).text == "" and toy_lm()(ASKED).text == "Hello"


def test_toy_lm_never_takes_an_unknown_field_for_an_answer():
    task = chain_of_thought("animal -> sound").with_params(
        {"chain_of_thought": Prompt(demos=[{"animal": "dog", "sound": "woof"}])}
    )
    made = task(toy_lm(), animal="dog")
    assert made.sound == "woof" and made.reasoning == "dog"


def test_toy_lm_is_deterministic_and_sampling_varies():
    many = [{"animal": "it", "sound": sound} for sound in ("woof", "meow", "moo", "baa")]
    task = animals.with_params({"predict": Prompt(demos=many)})

    def sounds(seed, **settings):
        made = [
            task.with_params({"predict": Prompt(demos=many, settings=settings | {"rollout": n})})
            for n in range(20)
        ]
        return [one(toy_lm(seed=seed), animal="it").sound for one in made]

    assert set(sounds(0, temperature=0.0)) == {sounds(0)[0]}
    assert sounds(0, temperature=1.0) == sounds(0, temperature=1.0) != sounds(1, temperature=1.0)
    assert len(set(sounds(0, temperature=1.0))) == 4
    assert len(set(sounds(0))) == 4


def test_samples_of_one_prompt_are_told_apart_on_the_wire():
    with server(lambda payload: completion(f"sample {payload.get('seed')}")) as served:
        lm = openai_lm("m", base_url=served.base_url, temperature=0.7)
        texts = [lm(Request([Message("user", "?")], rollout=n)).text for n in range(3)]
        own = lm(Request([Message("user", "?")], rollout=2, extra={"seed": 9})).text
        lm.close()
    assert texts == ["sample None", "sample 1", "sample 2"] and own == "sample 9"


@pytest.mark.parametrize(
    ("reason", "known"),
    [("MAX_TOKENS", "length"), ("end_turn", "stop"), ("SAFETY", "refusal"), (None, "stop"),
     ("content_filter", "refusal"), ("tool_use", "tool_calls"), ("odd", "odd")],
)  # fmt: skip
def test_why_a_reply_ended_has_one_spelling_for_all_providers(reason, known):
    assert Response("x", finish_reason=reason).finish_reason == known


def test_a_thought_before_the_answer_is_reasoning():
    text = "<think>Is it 5?</think>\n[[ ## n ## ]]\n4\n\n[[ ## completed ## ]]"
    task = predict("q -> n: int")
    with server(lambda payload: events(*deltas(text)) if payload.get("stream") else
                completion(text)) as served:  # fmt: skip
        lm = openai_lm("m", base_url=served.base_url)
        made = task(lm, q="?")
        chunks = list(lmopt.stream(task, lm, {"q": "?"}))
        lm.close()
    response = made.trace[0].response
    assert made.n == 4 and response.reasoning == "Is it 5?" and "think" not in response.text
    assert [(one.field, one.text, one.call) for one in chunks[:-1]] == [("n", "4", 0)]


def test_a_refusal_of_the_provider_is_no_answer():
    message = {"role": "assistant", "content": None, "refusal": "I cannot."}
    with server(lambda payload: completion("", choices=[{"message": message}])) as served:
        lm = openai_lm("m", base_url=served.base_url)
        with pytest.raises(lmopt.Refused, match="refuses to answer: 'I cannot.'"):
            predict("q -> a")(lm, q="?")
        lm.close()


# -- the wire --------------------------------------------------------------------------------------


def test_a_request_and_its_answer_in_the_openai_format():
    asked = Request(
        [Message("system", "Be brief."), Message("user", "Hëllo")],
        temperature=0.0,
        max_tokens=5,
        top_p=0.5,
        stop=["x"],
        schema={"type": "object"},
        tools=[{"type": "function"}],
        tool_choice="auto",
        rollout=3,
        extra={"seed": 1, "nested": {"a": (1,)}},
    )
    alike = pytest.warns(UserWarning, match="samples of one prompt are asked for at temperature 0")
    with server(lambda payload: completion("Hi")) as served, alike:
        lm = openai_lm(
            "m",
            base_url=served.base_url + "/",
            api_key=KEY,
            headers={"X-Team": "a"},
            price=(1, 10),
            user="me",
        )
        answer = lm(asked)
        (path, headers, payload) = served.seen[0]
        lm.close()
    assert answer == Response(
        "Hi",
        usage=Usage(calls=1, input_tokens=7, output_tokens=3, cached_tokens=2, cost=37e-6),
        model="served",
    )
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["X-Team"] == "a"
    assert payload == {
        "model": "m",
        "user": "me",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hëllo"},
        ],
        "temperature": 0.0,
        "max_tokens": 5,
        "top_p": 0.5,
        "stop": ["x"],
        "tools": [{"type": "function"}],
        "tool_choice": "auto",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": {"type": "object"}},
        },
        "seed": 1,
        "nested": {"a": [1]},
    }


def test_tool_calls_reasoning_and_missing_usage_are_read():
    call = {"id": "c1", "function": {"name": "search", "arguments": '{"q": "x"}'}}
    message = {"content": None, "tool_calls": [call], "reasoning_content": "hm"}
    data = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    with server(lambda payload: (200, {}, json.dumps(data).encode())) as served:
        lm = openai_lm("m", base_url=served.base_url)
        answer = lm(ASKED)
        assert "Authorization" not in served.seen[0][1]
        lm.close()
    assert answer == Response(
        "",
        tool_calls=(lmopt.ToolCall("c1", "search", {"q": "x"}),),
        usage=Usage(calls=1),
        finish_reason="tool_calls",
        reasoning="hm",
    )


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


def test_native_tool_calls_go_out_and_come_back_several_at_once():
    calls = [
        {"id": "c1", "function": {"name": "add", "arguments": '{"a": "1"}'}},
        {"id": "c2", "function": {"name": "add", "arguments": "{a: 2, 'b': 3}"}},
        {"id": "c3", "function": {"name": "add", "arguments": "one and two"}},
        {"id": "c4", "function": {"name": "add", "arguments": ""}},
    ]
    message = {"content": None, "tool_calls": calls}
    data = json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    tool = lmopt.Tool.of(add)
    with server(lambda payload: (200, {}, data.encode())) as served:
        lm = openai_lm("m", base_url=served.base_url)
        first = lm(Request(ASKED.messages, tools=[tool]))
        said = Message("assistant", first.text, first.tool_calls[:1])
        result = Message("tool", str(tool(**first.tool_calls[0].arguments)), tool_call_id="c1")
        lm(Request([*ASKED.messages, said, result], tools=[tool]))
        lm.close()
    assert [dict(call.arguments) for call in first.tool_calls] == [
        {"a": "1"},
        {"a": 2, "b": 3},
        {"arguments": "one and two"},
        {},
    ]
    with pytest.raises(lmopt.DataError, match="add has no argument 'arguments': 'one and two'"):
        tool(**first.tool_calls[2].arguments)
    sent = served.seen[0][2]["tools"][0]
    assert sent["type"] == "function" and sent["function"]["parameters"]["required"] == ["a"]
    assert served.seen[1][2]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": "1"}'},
                }
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


def test_media_in_the_openai_format():
    wav = lmopt.Audio.from_bytes(b"RIFF", "audio/x-wav")
    text = lmopt.File.from_bytes(b"%", "text/x", name="a.x")
    image = lmopt.Image("https://example.org/cat.png")
    with server(lambda payload: completion("Hi")) as served:
        lm = openai_lm("m", base_url=served.base_url)
        lm(Request([Message("user", ("see [image 1]", image, wav, text))]))
        with pytest.raises(lmopt.DataError, match="audio by URL cannot be sent: .*; use Audio"):
            lm(Request([Message("user", ("hear", lmopt.Audio("https://example.org/a.wav")))]))
        lm.close()
    assert served.seen[0][2]["messages"][0]["content"] == [
        {"type": "text", "text": "see [image 1]"},
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "file", "file": {"filename": "a.x", "file_data": "data:text/x;base64,JQ=="}},
    ]


def test_the_anthropic_format(monkeypatch):
    tool = lmopt.Tool.of(add)
    calls = (lmopt.ToolCall("c1", "add", {"a": 1}), lmopt.ToolCall("c2", "add", {"a": 2}))
    image = lmopt.Image.from_bytes(b"x", "image/png")
    pdf = lmopt.File("https://example.org/a.pdf", "a.pdf")
    asked = Request(
        [
            Message("system", "Be brief."),
            Message("user", ("see [image 1] [file 2]", image, pdf)),
            Message("assistant", "", calls),
            Message("tool", "2", tool_call_id="c1"),
            Message("tool", "3", tool_call_id="c2"),
            Message("user", "And now?"),
        ],
        temperature=0.5,
        stop=["x"],
        tools=[tool],
        schema={"type": "object"},
        extra={"metadata": {"user_id": "u"}},
    )
    data = {
        "model": "served",
        "content": [
            {"type": "thinking", "thinking": "hm"},
            {"type": "text", "text": "Hi"},
            {"type": "tool_use", "id": "c3", "name": "add", "input": {"a": 5}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 3},
    }
    with server(lambda payload: (200, {}, json.dumps(data).encode())) as served:
        lm = lmopt.anthropic_lm("m", base_url=served.base_url, api_key=KEY, price=(1, 10))
        answer = lm(asked)
        with pytest.raises(lmopt.DataError, match="audio cannot be sent"):
            lm(Request([Message("user", ("hear", lmopt.Audio.from_bytes(b"x", "audio/wav")))]))
        lm(Request(ASKED.messages, tools=[{"type": "bash", "name": "bash"}]))
        lm.close()
    assert served.seen[1][2]["tools"] == [{"type": "bash", "name": "bash"}]
    (path, headers, payload) = served.seen[0]
    assert path == "/v1/messages" and headers["x-api-key"] == KEY and "Authorization" not in headers
    assert headers["anthropic-version"] == "2023-06-01" and KEY not in repr(lm)
    assert payload == {
        "model": "m",
        "max_tokens": 4096,
        "system": "Be brief.",
        "temperature": 0.5,
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        "stop_sequences": ["x"],
        "tools": [{"name": "add", "description": "Add two numbers.", "input_schema": tool.schema}],
        "metadata": {"user_id": "u"},
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see [image 1] [file 2]"},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": "eA=="},
                    },
                    {
                        "type": "document",
                        "source": {"type": "url", "url": "https://example.org/a.pdf"},
                        "title": "a.pdf",
                    },
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                    {"type": "tool_use", "id": "c2", "name": "add", "input": {"a": 2}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "2"},
                    {"type": "tool_result", "tool_use_id": "c2", "content": "3"},
                ],
            },
            {"role": "user", "content": "And now?"},
        ],
    }
    assert answer == Response(
        "Hi",
        tool_calls=(lmopt.ToolCall("c3", "add", {"a": 5}),),
        usage=Usage(calls=1, input_tokens=8, output_tokens=2, cached_tokens=3, cost=28e-6),
        model="served",
        finish_reason="tool_calls",
        reasoning="hm",
    )


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (failure(400, "prompt is too long: 9 tokens > 8 maximum"), lmopt.ContextWindowExceeded),
        (failure(401, KEY), lmopt.Unauthorized),
        (failure(529, "overloaded"), LMError),
        ((200, {}, b'{"type": "error"}'), LMError),
        ((200, {}, b'{"content": [5]}'), LMError),
    ],
)
def test_failures_in_the_anthropic_format(answer, kind):
    with server(lambda payload: answer) as served:
        lm = lmopt.anthropic_lm("m", base_url=served.base_url, api_key=KEY)
        with pytest.raises(LMError) as caught:
            lm(ASKED)
        lm.close()
    assert type(caught.value) is kind and not holds_key(caught.value)


FAILURES = [
    (
        failure(401, f"Incorrect API key provided: {KEY}"),
        lmopt.Unauthorized,
        False,
        "check the API key",
    ),
    (failure(403), lmopt.Unauthorized, False, "check what the API key may do"),
    (failure(429, Retry_After="7"), lmopt.RateLimited, True, "wait"),
    (failure(429, "insufficient_quota"), lmopt.RateLimited, False, "raise the quota"),
    (
        failure(400, "maximum context length is 4096 tokens"),
        lmopt.ContextWindowExceeded,
        False,
        "shorten",
    ),
    (failure(400, "bad request"), LMError, False, "see the answer"),
    (failure(404), LMError, False, "answered 404"),
    (failure(408), lmopt.LMTimeout, True, "ask again"),
    (failure(500), LMError, True, "ask again"),
    (failure(503, "x" * 10_000), LMError, True, "answered 503"),
    ((302, {"Location": "/elsewhere"}, b""), LMError, False, "answered 302"),
    ((500, {}, b"\xff\xfe\xff"), LMError, True, "answered 500"),
    ((200, {}, b'{"choices": [{"mess'), LMError, True, "cannot be read (JSONDecodeError)"),
    ((200, {}, b"<html>\xe9</html>"), LMError, True, "cannot be read"),
    (
        (200, {}, '{"choices": [{"message": {"content": "é"}}]}'.encode("latin-1")),
        LMError,
        True,
        "cannot be read (UnicodeDecodeError)",
    ),
    ((200, {}, b'{"error": "overloaded"}'), LMError, True, "answered 500"),
    ((200, {}, b'{"choices": []}'), LMError, True, "cannot be read (IndexError)"),
    ((200, {}, b"[1]"), LMError, True, "cannot be read (TypeError)"),
    (
        (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
        LMError,
        True,
        "cannot be read (TypeError)",
    ),
    (None, LMError, True, "cannot be reached (RemoteProtocolError)"),
]


def holds_key(error: BaseException) -> bool:
    """Whether the key is on an error: in its texts, attributes, causes or pickle."""
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    shown = [text for one in chain for text in (str(one), repr(one), repr(vars(one)))]
    shown += traceback.format_exception(error)
    headers = [
        repr(dict(one.request.headers)) for one in chain if isinstance(one, httpx.RequestError)
    ]
    # What tools that report errors send: the local names of our frames.
    for one in chain:
        for frame, _ in traceback.walk_tb(one.__traceback__):
            ours = frame.f_code.co_filename == lmopt.__file__
            shown += map(repr, frame.f_locals.values()) if ours else ()
    return KEY in "".join(shown + headers) or KEY.encode() in pickle.dumps(error)


@pytest.mark.parametrize(("answer", "kind", "retryable", "part"), FAILURES)
def test_every_failure_is_the_right_error_and_holds_no_key(answer, kind, retryable, part):
    with server(lambda payload: answer) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY)
        with pytest.raises(LMError) as caught:
            lm(ASKED)
        assert len(served.seen) == 1  # it never asks again by itself
        lm.close()
    error = caught.value
    assert type(error) is kind and error.retryable is retryable
    assert part in str(error) and "; expected " in str(error) and len(str(error)) < 500
    assert error.status == (500 if part == "answered 500" else answer[0] if answer else None)
    assert not holds_key(error)


def test_a_key_read_from_a_file_with_its_newline_works_and_does_not_leak():
    for key, works in ((f"{KEY}\n", True), (f"{KEY}\n{KEY}", False)):
        with server(lambda payload: completion("Hi")) as served:
            lm = openai_lm("m", base_url=served.base_url, api_key=key)
            if works:
                assert lm(ASKED).text == "Hi"
            else:
                with pytest.raises(
                    LMError, match="cannot be sent .*; correct the key or"
                ) as caught:
                    lm(ASKED)
                assert not holds_key(caught.value) and not caught.value.retryable
            lm.close()


def test_retry_after_is_seconds_or_a_date():
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    for header, low, high in (
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        (date, 3500, 3601),
        ("soon", None, None),
        ("-1", 0, 0),
    ):
        with server(lambda payload, header=header: failure(429, Retry_After=header)) as served:
            lm = openai_lm("m", base_url=served.base_url)
            with pytest.raises(lmopt.RateLimited) as caught:
                lm(ASKED)
            lm.close()
        after = caught.value.retry_after
        assert after is None if low is None else low <= after <= high


def test_a_server_that_does_not_answer_or_is_not_there():
    slow = httpx.MockTransport(
        lambda request: (_ for _ in ()).throw(httpx.ReadTimeout("slow", request=request))
    )
    with (
        httpx.Client(transport=slow) as client,
        pytest.raises(
            lmopt.LMTimeout,
            match="did not answer in time: 'ReadTimeout'; expected .* in 60.0 s; ask again, with",
        ) as caught,
    ):
        openai_lm("m", api_key=KEY, client=client)(ASKED)
    assert caught.value.retryable and not holds_key(caught.value)
    with server(lambda payload: None) as served:
        gone = served.base_url
    for url, retryable in (
        (gone, True),
        ("ftp://x", False),
        ("no url", False),
        ("http://[::1", False),
    ):
        lm = openai_lm("m", base_url=url, api_key=KEY)
        with pytest.raises(
            LMError, match="cannot be reached .*; expected an HTTP answer; see that it runs"
        ) as caught:
            lm(ASKED)
        assert caught.value.retryable is retryable and not holds_key(caught.value)
        lm.close()


def test_openai_needs_a_key_and_others_never_get_it(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(
        lmopt.Unauthorized, match="no API key: 'OPENAI_API_KEY'; expected .*; set it, or"
    ):
        openai_lm("m")(ASKED)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with server(lambda payload: completion("Hi")) as served:
        lm = openai_lm("m", base_url=served.base_url)
        lm(ASKED)
        lm.close()
        assert KEY not in repr(served.seen)
    seen = []
    echo = httpx.MockTransport(
        lambda request: seen.append(request) or httpx.Response(200, content=completion("Hi")[2])
    )
    with httpx.Client(transport=echo) as client:
        assert openai_lm("m", client=client)(ASKED).text == "Hi"
    assert seen[0].headers["authorization"] == f"Bearer {KEY}"


def a_key() -> str:
    return KEY


def test_an_lm_shows_no_key_pickles_and_keeps_its_connection():
    with server(lambda payload: completion("Hi")) as served:
        lm = openai_lm(
            "m", base_url=served.base_url, api_key=KEY, headers={"X-Key": KEY}, temperature=1
        )
        assert KEY not in repr(lm) and KEY not in lm.identity
        lm(ASKED)
        lm(ASKED)
        assert served.connections == 1
        pickled = pickle.dumps(lm)
        assert KEY.encode() not in pickled
        again = pickle.loads(pickled)
        assert again.identity == lm.identity
        with pytest.raises(lmopt.Unauthorized, match="does not travel .* pass api_key=FUNCTION"):
            again(ASKED)
        there = pickle.loads(pickle.dumps(openai_lm("m", base_url=served.base_url, api_key=a_key)))
        assert there(ASKED).text == "Hi"
        assert served.seen[-1][1]["Authorization"] == f"Bearer {KEY}"
        there.close()
        del lm
        gc.collect()  # an unclosed socket would be a warning, hence an error


def test_what_cannot_be_sent_is_an_error_of_yours():
    with pytest.raises(lmopt.DataError, match="no JSON form"):
        openai_lm("m", api_key=KEY)(Request(ASKED.messages, extra={"x": object()}))
    with pytest.raises(lmopt.DataError, match="no JSON form"):
        openai_lm("m", api_key=KEY, x=object())


def test_a_lone_surrogate_can_be_sent():
    with server(lambda payload: completion("Hi")) as served:
        lm = openai_lm("m", base_url=served.base_url)
        assert lm(Request([Message("user", "\ud800")])).text == "Hi"
        lm.close()


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("openai/gpt-4o-mini", "https://api.openai.com/v1/chat/completions"),
        ("openai/ft:gpt:a/b", "https://api.openai.com/v1/chat/completions"),
        ("ollama/llama3.2", "http://localhost:11434/v1/chat/completions"),
        ("anthropic/claude-sonnet-4-5", "https://api.anthropic.com/v1/messages"),
    ],
)
def test_connect_picks_by_prefix(name, url):
    lm = connect(name, temperature=0)
    assert lm.url == url and f"openai/{lm.model}" in (name, f"openai/{name.partition('/')[2]}")


def test_each_provider_gets_its_own_key_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(lmopt.Unauthorized, match="no API key: 'ANTHROPIC_API_KEY'"):
        connect("anthropic/claude-sonnet-4-5")(ASKED)
    seen = []
    reply = {"content": [{"type": "text", "text": "Hi"}]}
    echo = httpx.MockTransport(lambda r: seen.append(r) or httpx.Response(200, json=reply))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-other-0815")
    with httpx.Client(transport=echo) as client:
        lm = connect("anthropic/claude-sonnet-4-5", client=client, max_tokens=9)
        assert lm(ASKED).text == "Hi"
    assert seen[0].headers["x-api-key"] == "sk-other-0815" and KEY not in repr(seen[0].headers)
    assert json.loads(seen[0].content)["max_tokens"] == 9


def test_connect_to_the_toy():
    assert animals(connect("toy", seed=1), animal="dog").sound == "woof"


@pytest.mark.parametrize("name", ["", "gpt-4o", "openai/", "acme/x", "toy/x"])
def test_connect_says_what_it_knows(name):
    with pytest.raises(
        lmopt.DataError, match="unknown LM: .*; expected PROVIDER/MODEL, of .*; or make it"
    ):
        connect(name)


@pytest.mark.slow
def test_an_optimization_over_http():
    """The main job on real sockets, eight calls at once: the same result as offline."""
    task = predict("animal -> sound")
    rows = [
        {"animal": f"{a} {n}", "sound": s}
        for n in range(8)
        for a, s in (("dog", "woof"), ("cat", "meow"))
    ]
    search = {"candidates": 3, "max_labeled": 4}
    offline = random_search(toy_lm(), **search)(task, rows, exact_match)
    with server(served_by(toy_lm())) as served:
        lm = openai_lm("toy", base_url=served.base_url, concurrency=8)
        online = random_search(lm, **search)(task, rows, exact_match)
        result = evaluate(task, rows, exact_match, lm=lm, params=online)
        lm.close()
    assert online == offline
    assert result.score > 0.9 and result.usage.input_tokens == 7 * 16


def test_a_failing_server_stops_an_optimization_and_keeps_the_best_so_far():
    task = predict("animal -> sound")
    rows = [
        {"animal": f"{a} {n}", "sound": s}
        for n in range(8)
        for a, s in (("dog", "woof"), ("cat", "meow"))
    ]
    answers = served_by(toy_lm())
    count = iter(range(10_000))
    with server(lambda payload: answers(payload) if next(count) < 20 else failure(401)) as served:
        lm = openai_lm("toy", base_url=served.base_url, api_key=KEY, concurrency=1)
        with pytest.raises(lmopt.Unauthorized) as caught:
            random_search(lm, candidates=3, max_labeled=4)(task, rows, exact_match)
        lm.close()
    assert len(served.seen) == 21
    assert len(caught.value.best["predict"].demos) == 4


# -- streaming --


def collected(lm, request=None, **changes):
    """The answer to a request, and the pieces of text on the way."""
    pieces = []
    asked = evolve(request or ASKED, on_text=pieces.append, **changes)
    return lm(asked), pieces


CALLED = [
    {
        "choices": [
            {
                "delta": {
                    "reasoning_content": "hm ",
                    "tool_calls": [{"index": 0, "id": "c1", "function": {"name": "add"}}],
                }
            }
        ]
    },
    {
        "choices": [
            {
                "delta": {
                    "reasoning_content": "yes",
                    "tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}],
                },
                "logprobs": {"content": [{"token": "x", "logprob": -0.5}]},
            }
        ]
    },
    {
        "choices": [
            {
                "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
                "logprobs": {"content": [{"token": "y", "logprob": -1.5}], "refusal": None},
                "finish_reason": "tool_calls",
            }
        ]
    },
]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_an_answer_in_pieces_is_the_whole_answer(size):
    text = "Grüße 😀\nund mehr"
    made = {"stream": events(*deltas(text), size=size), "whole": completion(text)}
    with server(lambda payload: made["stream" if payload.get("stream") else "whole"]) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY, price=(1, 2))
        answer, pieces = collected(lm)
        assert pieces[0] == "" and "".join(pieces) == text and len(pieces) > 3
        assert evolve(answer, usage=Usage()) == evolve(lm(ASKED), usage=Usage())
        assert answer.usage == Usage(1, 7, 3, 0, 13e-6)
        payload = served.seen[0][2]
        assert payload["stream"] is True and payload["stream_options"] == {"include_usage": True}
        lm.close()


def test_tool_calls_reasoning_and_log_probs_come_in_pieces_too():
    with server(lambda payload: events(*CALLED)) as served:
        lm = openai_lm("m", base_url=served.base_url)
        answer, pieces = collected(lm)
        lm.close()
    assert pieces == [""] and answer.text == "" and answer.reasoning == "hm yes"
    assert answer.tool_calls == (ToolCall("c1", "add", {"a": 1}),)
    assert [one["logprob"] for one in answer.logprobs["content"]] == [-0.5, -1.5]
    assert answer.finish_reason == "tool_calls"


BROKEN = [
    (events({"error": {"message": "busy", "code": 503}}), LMError, "answered 503"),
    (events({"error": {"message": "slow", "type": "rate_limit_error"}}), lmopt.RateLimited, "429"),
    (events('{"choices": [{'), LMError, "answered 500"),
    (events({"choices": [5]}), LMError, "answered 500"),
    (events(*deltas("Hello")[:1], done=False), LMError, "cannot be read (ValueError)"),
    (events({"error": f"wrong key {KEY}"}), LMError, "wrong key ***"),
    (failure(429), lmopt.RateLimited, "answered 429"),
    ((200, {"Content-Type": "text/event-stream"}, b""), LMError, "cannot be read"),
]


@pytest.mark.parametrize(("answer", "kind", "part"), BROKEN)
def test_a_stream_that_breaks_is_an_error_that_may_pass(answer, kind, part):
    with server(lambda payload: answer) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY)
        with pytest.raises(kind) as caught:
            collected(lm)
        lm.close()
    assert part in str(caught.value) and caught.value.retryable and not holds_key(caught.value)


def test_who_is_asked_for_a_stream_may_answer_without():
    with server(lambda payload: completion("Hi")) as served:
        lm = openai_lm("m", base_url=served.base_url)
        assert collected(lm)[0].text == "Hi"
        lm.close()


def part(index, **block):
    """What begins a part of an Anthropic message."""
    return {"type": "content_block_start", "index": index, "content_block": block}


def more(index, **delta):
    """What is added to a part."""
    return {"type": "content_block_delta", "index": index, "delta": delta}


ANTHROPIC_EVENTS = [
    {
        "type": "message_start",
        "message": {
            "model": "c",
            "content": [],
            "usage": {"input_tokens": 5, "cache_read_input_tokens": 3, "output_tokens": 1},
        },
    },
    part(0, type="thinking", thinking=""),
    more(0, type="thinking_delta", thinking="hm"),
    more(0, type="signature_delta", signature="s"),
    part(1, type="text", text=""),
    {"type": "ping"},
    more(1, type="text_delta", text="He"),
    more(1, type="text_delta", text="llo"),
    part(2, type="tool_use", id="c1", name="add", input={}),
    more(2, type="input_json_delta", partial_json='{"a"'),
    more(2, type="input_json_delta", partial_json=": 1}"),
    part(3, type="tool_use", id="c2", name="now", input={}),
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
    {"type": "message_stop"},
]


def test_an_anthropic_answer_in_pieces():
    with server(lambda payload: events(*ANTHROPIC_EVENTS, done=False, size=11)) as served:
        lm = lmopt.anthropic_lm("m", base_url=served.base_url, api_key=KEY)
        answer, pieces = collected(lm)
        lm.close()
    assert pieces == ["", "He", "llo"] and answer.text == "Hello" and answer.reasoning == "hm"
    assert answer.tool_calls == (ToolCall("c1", "add", {"a": 1}), ToolCall("c2", "now", {}))
    assert answer.usage == Usage(1, 8, 9, 3) and answer.finish_reason == "tool_calls"
    assert answer.model == "c" and served.seen[0][2]["stream"] is True
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    with server(lambda payload: events(ANTHROPIC_EVENTS[0], overloaded, done=False)) as served:
        lm = lmopt.anthropic_lm("m", base_url=served.base_url, api_key=KEY)
        with pytest.raises(LMError, match="answered 529") as caught:
            collected(lm)
        assert caught.value.retryable
        lm.close()


def test_a_program_streams_over_http():
    text = "[[ ## answer ## ]]\nParis\nof course\n\n[[ ## completed ## ]]"
    with server(lambda payload: events(*deltas(text, size=3))) as served:
        lm = openai_lm("m", base_url=served.base_url)
        items = list(lmopt.stream(predict("question -> answer"), lm, {"question": "?"}))
        lm.close()
    assert "".join(one.text for one in items[:-1]) == items[-1].answer == "Paris\nof course"
    assert len(items) > 4 and {one.field for one in items[:-1]} == {"answer"}


def test_who_leaves_a_stream_closes_its_connection():
    with server(lambda payload: events(*deltas("[[ ## answer ## ]]\n" + "x" * 10**5))) as served:
        lm = openai_lm("m", base_url=served.base_url)
        items = lmopt.stream(predict("question -> answer"), lm, {"question": "?"})
        next(items)
        items.close()
        assert served.has(0)
        lm.close()


# -- in an event loop --


def test_an_lm_answers_in_an_event_loop_keeps_its_connections_and_closes_them_at_the_end():
    with server(lambda payload: completion("Hi")) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY)

        async def main():
            first_ = await asyncio.gather(*(lm.acall(ASKED) for _ in range(5)))
            assert served.has(5)
            await asyncio.gather(*(lm.acall(ASKED) for _ in range(5)))
            assert served.has(5)
            return first_

        assert [one.text for one in asyncio.run(main())] == ["Hi"] * 5
        assert served.has(0)
        assert asyncio.run(lm.acall(ASKED)) == lm(ASKED)
        assert not [key for key in lm.end._idle if not isinstance(key, int)]  # no loop is kept
        lm.close()


def test_streaming_in_an_event_loop():
    with server(lambda payload: events(*deltas("Hello there"), size=5)) as served:
        lm, pieces = openai_lm("m", base_url=served.base_url), []
        answer = asyncio.run(lm.acall(evolve(ASKED, on_text=pieces.append)))
        assert answer.text == "".join(pieces) == "Hello there"
    with server(lambda payload: failure(500)) as served:
        lm = openai_lm("m", base_url=served.base_url)
        with pytest.raises(LMError, match="answered 500"):
            asyncio.run(lm.acall(evolve(ASKED, on_text=pieces.append)))


@pytest.mark.parametrize("answer", [None, failure(401), (200, {}, b"?")])
def test_failures_in_an_event_loop_are_the_same_errors(answer):
    with server(lambda payload: answer) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY)
        with pytest.raises(LMError) as here:
            lm(ASKED)
        with pytest.raises(type(here.value)) as there:
            asyncio.run(lm.acall(ASKED))
        lm.close()
    assert str(there.value) == str(here.value) and not holds_key(there.value)


def test_a_cancelled_call_leaves_no_connection_behind():
    came, release = threading.Event(), threading.Event()

    def answer(payload):
        came.set()
        release.wait(10)
        return completion("late")

    with server(answer) as served:
        lm = openai_lm("m", base_url=served.base_url)

        async def main():
            inputs = {"question": "?"}
            task = asyncio.create_task(lmopt.arun(predict("question -> answer"), lm, inputs))
            await asyncio.to_thread(came.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert not any(clients for clients, _ in lm.end._idle.values())

        asyncio.run(main())
        release.set()
        assert served.has(0)


# -- embeddings --


def embedded(payload):
    data = [{"index": n, "embedding": [len(one), 0.5]} for n, one in enumerate(payload["input"])]
    return 200, {}, json.dumps({"data": data[::-1]}).encode()


def test_an_embedder_asks_in_batches_and_keeps_the_order():
    with server(embedded) as served:
        embed = lmopt.embedder(
            "m", base_url=served.base_url, api_key=KEY, batch_size=3, dimensions=2
        )
        texts = ["x" * n for n in range(8)]
        expected = [(float(n), 0.5) for n in range(8)]
        assert embed(texts) == expected and embed("ab") == (2.0, 0.5) and embed([]) == []
        sizes = sorted(len(payload["input"]) for _, _, payload in served.seen)
        assert sizes == [1, 2, 3, 3] and served.seen[0][2]["dimensions"] == 2
        assert served.seen[0][0] == "/v1/embeddings" and KEY not in repr(embed)
        assert asyncio.run(embed.acall(texts)) == expected
        assert asyncio.run(embed.acall("ab")) == (2.0, 0.5)
        with pytest.raises(lmopt.DataError, match="only texts have vectors: 5"):
            embed([5])
        embed.end.close()
    with pytest.raises(lmopt.DataError, match="too small a batch: 0"):
        lmopt.embedder("m", batch_size=0)


def test_an_embedder_that_misses_a_vector_is_an_error():
    with server(lambda payload: (200, {}, b'{"data": []}')) as served:
        embed = lmopt.embedder("m", base_url=served.base_url)
        with pytest.raises(LMError, match="cannot be read"):
            embed(["a"])
        embed.end.close()


# -- details --


def test_max_tokens_has_the_name_that_the_provider_knows():
    asked = Request(ASKED.messages, max_tokens=5)
    assert openai_lm("m", base_url="http://x/v1").dialect.encode(asked)["max_tokens"] == 5
    assert openai_lm("m").dialect.encode(asked)["max_completion_tokens"] == 5


def test_what_is_cached_has_its_own_price():
    spent = Usage(1, 1_000_000, 1_000_000, 400_000)
    assert lmopt._priced(spent, (1.0, 4.0)).cost == pytest.approx(5.0)
    assert lmopt._priced(spent, (1.0, 4.0, 0.5)).cost == pytest.approx(0.6 + 0.2 + 4.0)


def test_a_url_shows_no_secret():
    lm = openai_lm("m", base_url=f"http://user:{KEY}@127.0.0.1:1/v1?key={KEY}")
    assert KEY not in repr(lm) + lm.identity + lm.url
    with pytest.raises(LMError) as caught:
        lm(ASKED)
    assert KEY not in str(caught.value)


# -- the habits of providers, each over a real socket --


def chat(*parts, **end):
    """A stream of chunks of one choice: deltas, and how it ends."""
    chunks = [{"choices": [{"index": 0, "delta": one}]} for one in parts]
    return [*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **end}]}]


def call(index, name, given, ident="", **more):
    made = {"function": {"name": name, "arguments": given}, **({"id": ident} if ident else {})}
    return {**({} if index == "none" else {"index": index}), **made, **more}


TWO = [("look", {"city": "Paris"}), ("drop", {"city": "Lyon"})]
STREAMED_CALLS = {
    "one index for both": [
        call(0, "look", '{"city": "Paris"}', "a"),
        call(0, "drop", '{"city": "Lyon"}', "b"),
    ],
    "a null index": [
        call(None, "look", '{"city": "Paris"}', "a"),
        call(None, "drop", '{"city": "Lyon"}', "b"),
    ],
    "no index and no id": [
        call("none", "look", '{"city": "Paris"}'),
        call("none", "drop", '{"city": "Lyon"}'),
    ],
    "in pieces": [
        call(0, "look", "", "a"),
        call(0, None, '{"city": '),
        call(0, None, '"Paris"}'),
        call(1, "drop", '{"city"', "b"),
        call(1, None, ': "Lyon"}'),
    ],
    "the id in each piece": [
        call(0, "look", '{"city": ', "a"),
        call(0, None, '"Paris"}', "a"),
        call(1, "drop", '{"city": "Lyon"}', "b"),
    ],
    "arguments as objects": [
        call(0, "look", {"city": "Paris"}, "a"),
        call(1, "drop", {"city": "Lyon"}, "b"),
    ],
}


@pytest.mark.parametrize("parts", STREAMED_CALLS.values(), ids=STREAMED_CALLS)
def test_streamed_tool_calls_are_told_apart(parts):
    sent = events(*chat(*({"tool_calls": [one]} for one in parts), finish_reason="tool_calls"))
    with server(lambda payload: sent) as served:
        lm = openai_lm("m", base_url=served.base_url)
        made = lm(evolve(ASKED, on_text=lambda text: None))
        lm.close()
    assert [(one.name, dict(one.arguments)) for one in made.tool_calls] == TWO


def told(message, **more):
    return 200, {}, json.dumps({"choices": [{"message": message, **more}]}).encode()


ANSWERS = {
    "a list of parts": (
        told({"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}),
        {"text": "Hello"},
    ),
    "thoughts among the parts": (
        told({"content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
            {"type": "text", "text": "Hello"},
        ]}),
        {"text": "Hello", "reasoning": "Hm."},
    ),
    "counts as text": (
        (200, {}, json.dumps({
            "choices": [{"message": {"content": "x"}}],
            "usage": {"prompt_tokens": "7", "completion_tokens": "3", "cost": "0.5"},
        }).encode()),
        {"usage": Usage(1, 7, 3, 0, 0.5)},
    ),
    "arguments as an object": (
        told({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}),
        {"tool_calls": (ToolCall("", "f", {"a": 1}),)},
    ),
    "no arguments": (
        told({"content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}),
        {"tool_calls": (ToolCall("1", "f", {}),)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_in_a_providers_own_form_is_read(answer, expected):
    with server(lambda payload: answer) as served:
        lm = openai_lm("m", base_url=served.base_url)
        made = lm(ASKED)
        lm.close()
    assert {name: getattr(made, name) for name in expected} == expected


WRONG = {
    "an error with status 200": (
        (200, {}, b'{"error": {"message": "busy", "code": 429}}'), RateLimited, True),
    "a code that is text": (
        (200, {}, b'{"error": {"message": "busy", "code": "429"}}'), RateLimited, True),
    "a choice that is an error": (
        (200, {}, b'{"choices": [{"error": {"code": 502, "message": "upstream"}}]}'),
        LMError, True),
    "a key that is wrong, with status 200": (
        (200, {}, b'{"error": {"type": "authentication_error", "message": "no"}}'),
        lmopt.Unauthorized, False),
    "vLLM: too long": (
        failure(400, "This model's maximum context length is 4096 tokens."),
        lmopt.ContextWindowExceeded, False),
    "llama.cpp: too long": (
        failure(400, "the request exceeds the available context size; exceed_context_size_error"),
        lmopt.ContextWindowExceeded, False),
    "llama.cpp of old: too long": (
        failure(500, "the request exceeds the available context size. try increasing it"),
        lmopt.ContextWindowExceeded, False),
    "Gemini: too long": (
        failure(400, "The input token count (40000) exceeds the maximum number of tokens allowed"),
        lmopt.ContextWindowExceeded, False),
    "Groq: too long": (
        failure(413, "Please reduce the length of the messages or completion."),
        lmopt.ContextWindowExceeded, False),
    "Anthropic: too long": (
        failure(400, "prompt is too long: 210000 tokens > 200000 maximum"),
        lmopt.ContextWindowExceeded, False),
    "a tool's name too long is no prompt too long": (
        failure(400, "Invalid 'tools[0].function.name': string too long."), LMError, False),
    "broken gzip": ((200, {"Content-Encoding": "gzip"}, b"no gzip"), LMError, False),
    "moved to another host": (
        (307, {"Location": "http://elsewhere.invalid/v1"}, b"{}"), LMError, False),
    "moved in a circle": ((308, {"Location": "/v1/chat/completions"}, b"{}"), LMError, False),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "kind", "retryable"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_is_known_by_what_it_says(answer, kind, retryable, streamed):
    asked = evolve(ASKED, on_text=lambda text: None) if streamed else ASKED
    with server(lambda payload: answer) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY)
        with pytest.raises(LMError) as caught:
            lm(asked)
        assert 1 <= len(served.seen) <= 4
        lm.close()
    assert type(caught.value) is kind and caught.value.retryable is retryable
    assert not holds_key(caught.value)


@pytest.mark.parametrize("answers", [
    [{"error": {"message": "busy", "type": "overloaded_error"}}],
    [{"choices": [{"delta": {"content": "x"}}]}, {"error": {"code": "503", "message": "down"}}],
    [{"choices": [{"delta": {}, "error": {"code": 502, "message": "x"}}]}],
])  # fmt: skip
def test_an_error_in_a_stream_is_an_error(answers):
    with server(lambda payload: events(*answers)) as served:
        lm = openai_lm("m", base_url=served.base_url)
        with pytest.raises(LMError) as caught:
            lm(evolve(ASKED, on_text=lambda text: None))
        lm.close()
    assert caught.value.retryable and caught.value.status >= 500


def test_a_wait_may_be_given_in_milliseconds():
    headers = {"retry-after-ms": "250", "retry-after": "9"}
    with server(lambda payload: failure(429, "busy", **headers)) as served:
        lm = openai_lm("m", base_url=served.base_url)
        with pytest.raises(RateLimited) as caught:
            lm(ASKED)
        lm.close()
    assert caught.value.retry_after == 0.25


def test_a_request_follows_to_another_path_of_the_same_host():
    def answer(payload):
        if len(served.seen) == 1:
            return 307, {"Location": "/v2/chat"}, b""
        return completion("Hi")

    with server(answer) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY)
        assert lm(ASKED).text == "Hi" == asyncio.run(lm.acall(ASKED)).text
        assert [path for path, _, _ in served.seen][1] == "/v2/chat"
        assert served.seen[0][2] == served.seen[1][2] and KEY in str(served.seen[1][1])
        lm.close()


def test_a_connection_that_was_closed_since_is_no_failure():
    silent = []

    def answer(payload):
        if len(served.seen) in silent:
            return None
        return completion("Hi")

    with server(answer) as served:
        lm = openai_lm("m", base_url=served.base_url)
        assert lm(ASKED).text == "Hi"
        silent[:] = [2]  # the second request finds the connection closed
        assert lm(ASKED).text == "Hi" and len(served.seen) == 3
        silent[:] = [4, 5]  # and then a fresh one too: that is a failure
        with pytest.raises(LMError, match="cannot be reached"):
            lm(ASKED)
        assert len(served.seen) == 5

        async def twice():
            silent[:] = [7]
            return [(await lm.acall(ASKED)).text for _ in range(2)]

        assert asyncio.run(twice()) == ["Hi", "Hi"] and len(served.seen) == 8
        lm.close()


def test_nothing_is_waited_for_after_the_end_of_a_stream():
    gate = threading.Event()

    def pieces():
        yield events(*chat({"content": "Hi"}), done=False)[2][0]
        yield b"data: [DONE] \n\n"
        gate.wait(20)
        yield b"data: late\n\n"

    class Lazily(list):
        def __iter__(self):
            return pieces()

    with server(lambda payload: (200, {"Content-Type": "text/event-stream"}, Lazily())) as served:
        lm = openai_lm("m", base_url=served.base_url, timeout=15)
        began = time.monotonic()
        assert lm(evolve(ASKED, on_text=lambda text: None)).text == "Hi"
        assert time.monotonic() - began < 10
        gate.set()
        lm.close()


def test_one_large_event_is_read_in_linear_time():
    def seconds(size):
        taken = []
        feed = lmopt._events(taken.append)
        whole = b"data: " + b"x" * size + b"\n\n"
        began = time.perf_counter()
        for n in range(0, len(whole), 4096):
            feed(whole[n : n + 4096])
        assert [len(one) for one in taken] == [size]
        return time.perf_counter() - began

    assert min(seconds(8_000_000) for _ in range(3)) < 1.0


@given(st.lists(st.sampled_from(["a", "data: x", "data:y", ": c", "", "event: z"])),
       st.sampled_from(["\n", "\r\n", "\r"]), st.integers(1, 7))  # fmt: skip
def test_events_are_the_same_however_they_are_cut(lines, end, size):
    whole = (end.join(lines) + end * 2).encode()

    def read(pieces):
        taken = []
        feed = lmopt._events(taken.append)
        for piece in pieces:
            feed(piece)
        feed(b"\n")
        return taken

    assert read([whole[n : n + size] for n in range(0, len(whole), size)]) == read([whole])


def test_a_tool_call_of_anthropic_that_was_cut_off_is_length():
    sent = [
        {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 5}}},
        {"type": "content_block_start", "index": 0,
         "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}}},
        {"type": "content_block_delta", "index": 0,
         "delta": {"type": "input_json_delta", "partial_json": '{"city": "Par'}},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"},
         "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]  # fmt: skip
    with server(lambda payload: events(*sent, done=False)) as served:
        lm = lmopt.anthropic_lm("m", base_url=served.base_url, api_key="k")
        made = lm(evolve(ASKED, on_text=lambda text: None))
        lm.close()
    assert made.finish_reason == "length" and made.tool_calls[0].arguments == {}


BASES = {
    "https://x.example/v1": "https://x.example/v1/chat/completions",
    " https://x.example/v1/ ": "https://x.example/v1/chat/completions",
    "https://x.example/v1/chat/completions": "https://x.example/v1/chat/completions",
    "https://x.example/d/gpt?api-version=2024-10-21":
        "https://x.example/d/gpt/chat/completions?api-version=2024-10-21",
    "https://x.example/d/gpt/chat/completions?api-version=1":
        "https://x.example/d/gpt/chat/completions?api-version=1",
}  # fmt: skip


@pytest.mark.parametrize(("base", "url"), BASES.items())
def test_a_base_url_is_taken_as_people_write_it(base, url):
    assert openai_lm("m", base_url=base).end.url == url


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/ "])
def test_the_base_url_of_anthropics_own_clients_works(end, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    lm = lmopt.anthropic_lm("m", base_url=f"https://api.anthropic.com{end}")
    assert lm.end.url == "https://api.anthropic.com/v1/messages" and lm.end._key() == KEY
    assert lmopt.anthropic_lm("m", base_url="http://localhost:9").end.url.endswith("9/v1/messages")


def test_openai_is_known_however_its_url_is_written(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for base in ("https://api.openai.com/v1/", " https://api.openai.com/v1"):
        lm = openai_lm("m", base_url=base)
        assert lm.end._key() == KEY
        assert "max_completion_tokens" in lm.dialect.encode(evolve(ASKED, max_tokens=5))


@pytest.mark.parametrize("provider", [*lmopt.PROVIDERS])
def test_connect_knows_the_names_people_use(provider, monkeypatch):
    base, name = lmopt.PROVIDERS[provider]
    if name:
        monkeypatch.setenv(name, KEY)
    lm = lmopt.connect(f"{provider}/some/model")
    assert lm.model == "some/model" and lm.end.url == f"{base}/chat/completions"
    assert lm.end._key() == (KEY if name else "")
    other = lmopt.connect(f"{provider}/m", base_url="http://localhost:1/v1")
    assert other.end._key() == "" and KEY not in pickle.dumps(lm).decode("latin-1")


def test_connect_reaches_azure(monkeypatch):
    with server(lambda payload: completion("Hi")) as served:
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
        root = served.base_url.removesuffix("/v1")
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", root)
        old = f"{root}/openai/deployments/d?api-version=2024-10-21"
        for lm in (lmopt.connect("azure/d"), lmopt.connect("azure/d", base_url=old)):
            assert lm(ASKED).text == "Hi"
            lm.close()
        paths = [path for path, _, _ in served.seen]
        assert paths == [
            "/openai/v1/chat/completions",
            "/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ]
        assert all(headers["api-key"] == KEY for _, headers, _ in served.seen)
    monkeypatch.delenv("AZURE_OPENAI_ENDPOINT")
    with pytest.raises(DataError, match="no resource at Azure"):
        lmopt.connect("azure/d")


def test_of_two_names_of_the_token_limit_one_is_sent():
    def answer(payload):
        if "max_tokens" in payload and payload["model"] == "new":
            return failure(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
        return completion("Hi")

    with server(answer) as served:
        lm = openai_lm("new", base_url=served.base_url, max_tokens=50)
        assert lm(ASKED).text == "Hi"
        assert [payload.get("max_tokens") for _, _, payload in served.seen] == [50, None]
        assert served.seen[1][2]["max_completion_tokens"] == 50
        both = openai_lm("old", base_url=served.base_url, max_completion_tokens=50)
        both(evolve(ASKED, max_tokens=7))
        assert served.seen[2][2]["max_tokens"] == 7
        assert "max_completion_tokens" not in served.seen[2][2]
        lm.close()
        both.close()


def test_a_header_that_is_given_replaces_ours(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with server(lambda payload: completion("Hi")) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key=KEY,
                       headers={"authorization": "Basic 1234"})  # fmt: skip
        assert lm(ASKED).text == "Hi"
        assert [v for n, v in served.seen[0][1].items() if n.lower() == "authorization"] == [
            "Basic 1234"
        ]
        lm.close()
    assert openai_lm("m", headers={"Authorization": "x"}).end._headers()[0]["Authorization"] == "x"


# -- what a provider attaches to calls, and wants back --


def look(city: str) -> str:
    """Look a city up."""
    return f"{city}: 2 million"


CALL = {"id": "c1", "type": "function",
        "function": {"name": "look", "arguments": '{"city": "Paris"}'},
        "extra_content": {"google": {"thought_signature": "sig"}}}  # fmt: skip
WITH_CALL = {"content": "", "tool_calls": [CALL], "reasoning_content": "Let me look."}


@pytest.mark.parametrize("streamed", [False, True])
def test_what_came_with_a_call_goes_back_with_it(streamed):
    def answer(payload):
        if len(served.seen) == 1 and streamed:
            parts = ({"reasoning_content": "Let me "}, {"reasoning_content": "look."},
                     {"tool_calls": [{**CALL, "index": 0}]})  # fmt: skip
            return events(*chat(*parts, finish_reason="tool_calls"))
        if len(served.seen) == 1:
            return told(WITH_CALL, finish_reason="tool_calls")
        return completion("[[ ## reasoning ## ]]\nx\n[[ ## answer ## ]]\n2 million")

    with server(answer) as served:
        lm = openai_lm("m", base_url=served.base_url)
        agent = lmopt.react("question -> answer", [look], native=True)
        if streamed:
            *_, made = lmopt.stream(agent, lm, {"question": "How many?"})
        else:
            made = agent(lm, question="How many?")
        lm.close()
    assert made.answer == "2 million"
    (back,) = [one for one in served.seen[1][2]["messages"] if one["role"] == "assistant"]
    assert back["reasoning_content"] == "Let me look."
    assert back["tool_calls"][0]["extra_content"] == CALL["extra_content"]


def test_signed_thoughts_of_anthropic_go_back():
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "sig"}
    calls = {"type": "tool_use", "id": "t", "name": "look", "input": {"city": "Paris"}}

    def answer(payload):
        said = {"type": "text", "text": "[[ ## reasoning ## ]]\nx\n[[ ## answer ## ]]\n2 million"}
        content = [thought, calls] if len(served.seen) == 1 else [said]
        return 200, {}, json.dumps({"content": content, "stop_reason": "end_turn"}).encode()

    with server(answer) as served:
        lm = lmopt.anthropic_lm("m", base_url=served.base_url, api_key="k")
        lmopt.react("question -> answer", [look], native=True)(lm, question="How many?")
        lm.close()
    (back,) = [one for one in served.seen[1][2]["messages"] if one["role"] == "assistant"]
    assert back["content"][0] == thought and back["content"][-1]["type"] == "tool_use"


# -- OpenAI's Responses --


def responded(*output, **more):
    usage = {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 2}}
    made = {"output": list(output), "usage": usage, "model": "new", "status": "completed"}
    return {**made, "error": None, "incomplete_details": None, **more}


def said(text):
    return {"type": "message", "content": [{"type": "output_text", "text": text}]}


THOUGHT = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm."}]}


@pytest.mark.parametrize("streamed", [False, True])
def test_the_responses_format_end_to_end(streamed):
    def answer(payload):
        first = (THOUGHT, {"type": "function_call", "call_id": "c1", "name": "look",
                           "arguments": '{"city": "Paris"}'})  # fmt: skip
        last = (said("[[ ## reasoning ## ]]\nx\n[[ ## answer ## ]]\n2 million"),)
        whole = responded(*(first if len(served.seen) == 1 else last))
        if not payload.get("stream"):
            return 200, {}, json.dumps(whole).encode()
        text = "".join(p["text"] for o in whole["output"] for p in o.get("content", ()))
        deltas = [{"type": "response.output_text.delta", "delta": one} for one in text]
        end = {"type": "response.completed", "response": whole}
        return events({"type": "response.created", "response": {**whole, "output": []}}, *deltas,
                      end, done=False)  # fmt: skip

    with server(answer) as served:
        lm = openai_lm("new", base_url=served.base_url, api="responses", max_tokens=99)
        agent = lmopt.react("question -> answer", [look], native=True)
        if streamed:
            *chunks, made = lmopt.stream(agent, lm, {"question": "How many?"})
            assert "".join(one.text for one in chunks if one.field == "answer") == "2 million"
        else:
            made = agent(lm, question="How many?")
        lm.close()
    assert made.answer == "2 million" and made.usage == Usage(3, 27, 12, 6)
    path, _, payload = served.seen[0]
    assert path == "/v1/responses" and payload["max_output_tokens"] == 99
    assert payload["tools"][0]["name"] == "look" and payload["instructions"]
    items = [one.get("type", one.get("role")) for one in served.seen[1][2]["input"]]
    assert items == ["user", "assistant", "reasoning", "function_call", "function_call_output"]
    assert served.seen[1][2]["input"][2] == THOUGHT


def test_a_request_in_the_responses_format():
    call = ToolCall("c1", "look", {"city": "Paris"}, {"responses": [THOUGHT]})
    asked = Request(
        [
            Message("system", "Be brief."),
            Message("user", ("[image 1]", lmopt.Image("https://x.example/a.png"))),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", "2 million", tool_call_id="c1"),
        ],
        temperature=0.5, max_tokens=7, schema={"type": "object"},
    )  # fmt: skip
    made = lmopt._RESPONSES.encode(asked)
    assert made["instructions"] == "Be brief." and made["text"]["format"]["name"] == "reply"
    assert [one.get("type", one.get("role")) for one in made["input"]] == [
        "user", "reasoning", "function_call", "function_call_output"]  # fmt: skip
    assert made["input"][0]["content"][1]["type"] == "input_image"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (responded(said("Hi")), ("Hi", "stop")),
        (responded(said("Hi"), incomplete_details={"reason": "max_output_tokens"}),
         ("Hi", "length")),
        (responded(said(""), incomplete_details={"reason": "content_filter"}), ("", "refusal")),
        (responded({"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}),
         ("No.", "refusal")),
    ],
)  # fmt: skip
def test_an_answer_in_the_responses_format(data, expected):
    made = lmopt._RESPONSES.decode(data)
    assert (made.text, made.finish_reason) == expected and made.usage.cached_tokens == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_in_the_responses_format(streamed):
    error = {"code": "rate_limit_exceeded", "message": "slow down"}
    whole = responded(error=error, status="failed")
    sent = (200, {}, json.dumps(whole).encode())
    if streamed:
        sent = events({"type": "response.failed", "response": whole}, done=False)
    with server(lambda payload: sent) as served:
        lm = openai_lm("m", base_url=served.base_url, api="responses")
        with pytest.raises(RateLimited):
            lm(evolve(ASKED, on_text=(lambda text: None) if streamed else None))
        lm.close()
    with pytest.raises(DataError, match="unknown api"):
        openai_lm("m", api="newest")


def test_a_password_in_a_url_goes_into_a_header_and_nowhere_else(caplog):
    caplog.set_level("DEBUG")
    with server(lambda payload: completion("Hi")) as served:
        url = served.base_url.replace("http://", f"http://me:{KEY}@")
        lm = openai_lm("m", base_url=url)
        assert lm(ASKED).text == "Hi" and KEY not in repr(lm) + lm.end.url + caplog.text
        assert served.seen[0][1]["Authorization"].startswith("Basic ")
        assert KEY.encode() not in pickle.dumps(lm)
        lm.close()


# -- what a reviewer found: each was a wrong answer without a word, or a lost one --


def test_an_answer_is_left_as_it_is_whatever_the_headers_say():
    said = "It was released on 2023-06-01 by the Translation assistant"
    made = {"content": [{"type": "text", "text": said}], "stop_reason": "end_turn"}
    with server(lambda payload: (200, {}, json.dumps(made).encode())) as served:
        lm = lmopt.anthropic_lm("m", base_url=served.base_url, api_key="k" * 20)
        assert lm(ASKED).text == said
        lm.close()
    with server(lambda payload: completion(said)) as served:
        lm = openai_lm("m", base_url=served.base_url, api_key="assistant",
                       headers={"X-Title": "Translation assistant"})  # fmt: skip
        assert lm(ASKED).text == said
        lm.close()


MORE_CALLS = {
    "one index, empty ids": [
        call(0, "look", '{"city": "Paris"}'), call(0, "drop", '{"city": "Lyon"}')],
    "ids that take turns": [
        call(0, "look", '{"city": ', "a"), call(0, "drop", '{"city": ', "b"),
        call(0, None, '"Paris"}', "a"), call(0, None, '"Lyon"}', "b"),
    ],
    "an id and a name that are repeated": [
        call("none", "look", "", "a"), call("none", "look", '{"city": "Paris"}', "a"),
        call("none", "drop", '{"city": "Lyon"}', "b"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("parts", MORE_CALLS.values(), ids=MORE_CALLS)
def test_more_streamed_tool_calls_are_told_apart(parts):
    test_streamed_tool_calls_are_told_apart(parts)


def test_of_several_streamed_choices_the_first_is_read():
    sent = [{"choices": [{"index": n, "delta": {"content": text}}]}
            for n, text in ((0, "yes "), (1, "no "), (0, "sir"), (1, "way"))]  # fmt: skip
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    with server(lambda payload: events(*sent, end)) as served:
        lm = openai_lm("m", base_url=served.base_url)
        assert lm(evolve(ASKED, on_text=lambda text: None)).text == "yes sir"
        lm.close()


def test_a_key_follows_no_redirect_to_another_port():
    with server(lambda payload: completion("evil")) as other:
        moved = {"Location": f"http://127.0.0.1:{other.server_port}/x"}
        with server(lambda payload: (307, moved, b"")) as served:
            lm = openai_lm("m", base_url=served.base_url, api_key=KEY)
            with pytest.raises(LMError, match="answered 307"):
                lm(ASKED)
            lm.close()
        assert not other.seen


STREAMS = {
    "a byte order mark": ("\ufeff" + 'data: {"choices": [{"delta": {"content": "The "}}]}\n\n'
                          'data: {"choices": [{"delta": {"content": "answer"}, '
                          '"finish_reason": "stop"}]}\n\ndata: [DONE]\n\n', "The answer"),
    "an event that is an error": ('data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
                                  'event: error\ndata: {"message": "overloaded"}\n\n'
                                  "data: [DONE]\n\n", LMError),
    "nested too deep": ("data: " + "[" * 100_000 + "\n\ndata: [DONE]\n\n", LMError),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), STREAMS.values(), ids=STREAMS)
def test_what_streams_may_be_like(body, expected):
    sent = 200, {"Content-Type": "text/event-stream"}, [body.encode()]
    with server(lambda payload: sent) as served:
        lm = openai_lm("m", base_url=served.base_url)
        asked = evolve(ASKED, on_text=lambda text: None)
        if isinstance(expected, str):
            assert lm(asked).text == expected
        else:
            with pytest.raises(expected):
                lm(asked)
        lm.close()


def test_a_listener_that_raises_is_no_fault_of_the_request():
    def listen(text):
        if text:
            raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range")

    with server(lambda payload: events(*chat({"content": "é"}))) as served:
        lm = openai_lm("m", base_url=served.base_url)
        with pytest.raises(UnicodeEncodeError):
            lm(evolve(ASKED, on_text=listen))
        lm.close()


@pytest.mark.parametrize("status", ["in_progress", "cancelled", "failed"])
def test_a_response_that_is_not_whole_is_no_answer(status):
    with pytest.raises(ValueError, match="its status is"):
        lmopt._RESPONSES.decode(responded(said("half"), status=status))
    assert (
        lmopt._RESPONSES.decode(responded(said("h"), status="incomplete")).finish_reason == "length"
    )


def test_wiring(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    whole = openai_lm("m", base_url="https://api.openai.com/v1/chat/completions")
    assert whole.end._key() == KEY and "max_completion_tokens" in whole.dialect.encode(
        evolve(ASKED, max_tokens=5))  # fmt: skip
    other = lmopt.anthropic_lm("m", base_url="https://api.anthropic.com/v1/messages")
    assert other.end._key() == KEY and other.end.url.endswith("/v1/messages")
    azure = lmopt.connect("azure/d", base_url="https://n.openai.azure.com", api="responses")
    assert azure.end.url.endswith("/responses") and "input" in azure.dialect.encode(ASKED)
    assert copy.deepcopy(openai_lm("m", api_key=KEY)).end._key() == KEY
    for url in ("HTTP://me:pass@h/v1", "http://me:p@ss@h/v1"):
        assert "@" not in openai_lm("m", base_url=url).end.url
    a, b = (openai_lm("m", base_url=f"http://h/v1?route={one}") for one in "ab")
    assert lmopt.identity(a) != lmopt.identity(b)


def test_a_client_of_the_wrong_kind_is_refused_before_anything_is_sent():
    with server(lambda payload: completion("Hi")) as served:
        with httpx.Client() as client:
            lm = openai_lm("m", base_url=served.base_url, client=client)
            with pytest.raises(DataError, match="this client blocks an event loop"):
                asyncio.run(lm.acall(ASKED))
        lm = openai_lm("m", base_url=served.base_url, client=httpx.AsyncClient())
        with pytest.raises(DataError, match="this client needs an event loop"):
            lm(ASKED)
        asyncio.run(lm.end.client.aclose())
        assert not served.seen


def test_a_script_does_not_go_to_other_processes():
    with pytest.raises(DataError, match="replies in their order cannot go to several processes"):
        pickle.dumps(scripted_lm(["a"]))


def test_an_error_that_is_null_is_none():
    whole = responded(said("run it in lm-studio"), error=None)
    with server(lambda payload: (200, {}, json.dumps(whole).encode())) as served:
        lm = openai_lm("m", base_url=served.base_url, api="responses", api_key="lm-studio")
        assert lm(ASKED).text == "run it in lm-studio"
        lm.close()


@pytest.mark.parametrize("name", ["content", "reasoning_content"])
def test_halves_of_a_character_that_are_sent_apart_are_one(name):
    sent = ["Gr\u00f6\u00dfe ", "\ud83d", "\ude00!"]
    told = [{"choices": [{"delta": {"content": "", name: one}}]} for one in sent]
    told.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    lines = [*map(json.dumps, told), "[DONE]"]

    def answer(request):
        body = "".join(f"data: {one}\n\n" for one in lines)
        return httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        lm, pieces = lmopt.openai_lm("m", base_url="http://a/v1", client=client), []
        made = lm(Request([Message("user", "?")], on_text=pieces.append))
    assert {"content": made.text, "reasoning_content": made.reasoning}[name] == "Größe 😀!"
    assert "".join(pieces) == made.text
