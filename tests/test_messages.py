"""Requests and responses: what is part of the key, and what is not."""

import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import attrs
import pytest
from conftest import ROOT
from strategies import Person

import lmopt
from lmopt import (
    Audio,
    DataError,
    File,
    Image,
    Message,
    Prompt,
    Request,
    Response,
    SignatureError,
    Tool,
    ToolCall,
    chat,
    dumps,
    loads,
    predict,
    preview,
    signature,
    transcript,
)

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


# -- tools -----------------------------------------------------------------------------------------


def google(query: str, k: int = 3) -> list[str]:
    """Search the library.

    Only its titles.

    Args:
        query (str): what to look for,
            in a few words
        k: how many
            to return

    Returns:
        titles
    """
    return [query] * k


def numpy(query: str, k: int = 3) -> list[str]:
    """Search the library.

    Only its titles.

    Parameters
    ----------
    query : str
        what to look for,
        in a few words
    k : int, optional
        how many to return

    Returns
    -------
    list
    """
    return [query] * k


def rest(query: str, k: int = 3) -> list[str]:
    """Search the library.

    Only its titles.

    :param query: what to look for,
        in a few words
    :param int k: how many to return
    :returns: titles
    """
    return [query] * k


class Library:
    def find(self, query: str, k: int = 3) -> list[str]:
        return [query] * k

    find.__doc__ = google.__doc__


class Search:
    __doc__ = google.__doc__

    def __call__(self, query: str, k: int = 3) -> list[str]:
        return [query] * k


SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "description": "what to look for, in a few words"},
        "k": {"type": "integer", "description": "how many to return", "default": 3},
    },
    "required": ["query"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (google, "google"),
        (numpy, "numpy"),
        (rest, "rest"),
        (Library().find, "find"),
        (Search(), "Search"),
    ],
)
def test_a_tool_of_any_typed_function_in_any_style(function, name):
    tool = Tool.of(function)
    assert (tool.name, tool.desc) == (name, "Search the library.\n\nOnly its titles.")
    assert tool.schema == SCHEMA
    assert tool(query="x", k="2") == ["x", "x"] and tool(query="y") == ["y"] * 3
    assert Tool.of(tool) is tool and Tool.of(function, name="other", desc="d").name == "other"


def test_a_tool_of_a_partial_and_of_nothing_to_say():
    tool = Tool.of(functools.partial(google, "fixed"), desc="Search.")
    assert (tool.name == "google" and list(tool.schema["properties"]) == ["k"]) or tool.schema
    bare = Tool.of(lambda: 5, name="five")
    assert bare() == 5 and bare.desc == "" and bare.schema["properties"] == {}


def people(who: Person, tags: set[str] | None = None) -> str:
    """Greet."""
    return f"{who.name} {sorted(tags or ())}"


def test_arguments_become_values_of_the_parameters_types():
    tool = Tool.of(people)
    assert tool(who={"name": "Ann", "age": "7"}, tags=["b", "a"]) == "Ann ['a', 'b']"
    assert tool.schema["properties"]["who"] == {"$ref": "#/$defs/Person"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": "x"}, "google has no argument 'q': 'x'; expected query: str, k: int; drop it"),
        (
            {"k": 1},
            "google lacks the argument 'query': {'k': 1}; expected query: str, k: int; give it",
        ),
        (
            {"query": "x", "k": "many"},
            "google cannot take the argument 'k' .*: 'many'; expected int; correct",
        ),
    ],
)
def test_wrong_arguments_are_told_so_that_a_model_can_act_on_it(arguments, message):
    with pytest.raises(DataError, match=message):
        Tool.of(google)(**arguments)


def unknown(x: "Nothing") -> str:  # noqa: F821
    """Search."""


@pytest.mark.parametrize(
    ("function", "message"), [(5, "this is no tool: 5"), (unknown, "a wrong annotation")]
)
def test_a_function_that_cannot_be_a_tool(function, message):
    with pytest.raises(SignatureError, match=message):
        Tool.of(function)


def test_a_tool_of_an_mcp_description():
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "more": {"type": ["string", "null"]},
        },
        "required": ["city"],
    }
    described = {"name": "weather", "description": "Tell the weather.", "inputSchema": schema}
    for description in (described, SimpleNamespace(**described)):
        tool = Tool.from_mcp(description, lambda name, arguments: (name, arguments))
        assert (tool.name, tool.desc, tool.schema) == ("weather", "Tell the weather.", schema)
        assert tool(city="Bern", days="2", tags="a") == (
            "weather",
            {"city": "Bern", "days": 2, "tags": ["a"]},
        )
        with pytest.raises(DataError, match="weather lacks the argument 'city'"):
            tool(days=1)
        with pytest.raises(DataError, match="expected one of .C., .F."):
            tool(city="Bern", unit="K")
    assert Tool.from_mcp({"name": "now"}, lambda name, arguments: name)() == "now"


def test_tools_are_part_of_the_key_and_old_keys_stay():
    assert ASKED.key.startswith("ebd51c78")
    with_tools = attrs.evolve(ASKED, tools=[Tool.of(google)])
    assert with_tools.key == attrs.evolve(ASKED, tools=[Tool.of(google)]).key != ASKED.key
    called = Message("assistant", "", (ToolCall("1", "google", {"query": "x"}),))
    answered = Message("tool", "y", tool_call_id="1")
    assert attrs.evolve(ASKED, messages=[*ASKED.messages, called, answered]).key != ASKED.key


# -- media -----------------------------------------------------------------------------------------

CAT = Image("https://example.org/cat.png")


@attrs.frozen
class Page:
    title: str
    picture: Image


def test_media_from_bytes_path_url_and_data_uri(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"\x89PNG")
    (tmp_path / "odd.xyzzy").write_bytes(b"?")
    image = Image.from_path(tmp_path / "cat.png")
    assert image == Image("data:image/png;base64,iVBORw==", "cat.png")
    assert image == Image.from_bytes(b"\x89PNG", "image/png", name="cat.png")
    assert (
        Audio.from_path(tmp_path / "odd.xyzzy", media_type="audio/wav").url
        == "data:audio/wav;base64,Pw=="
    )
    with pytest.raises(
        DataError, match="unknown media type: 'odd.xyzzy'; expected a known ending; pass"
    ):
        File.from_path(tmp_path / "odd.xyzzy")
    with pytest.raises(FileNotFoundError):
        File.from_path(tmp_path / "none.pdf")
    for wrong in ("cat.png", "/etc/passwd", "file:///etc/passwd", "", 5):
        with pytest.raises(
            DataError, match="neither a URL nor a data URI: .*; expected .*; read a file with"
        ):
            Image(wrong)


def test_what_is_no_medium_is_refused_when_it_is_read():
    assert lmopt.coerce(Image, CAT.url) == lmopt.coerce(Image, {"url": CAT.url}) == CAT
    for wrong in (5, {}, {"file": CAT.url}):
        with pytest.raises(ValueError, match="is not the URL or data URI of image"):
            lmopt.coerce(Image, wrong)


def test_media_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(lmopt, "MEDIA_LIMIT", 10)
    (tmp_path / "cat.png").write_bytes(b"x" * 11)
    with pytest.raises(DataError, match="too large: .*; expected at most 10 bytes; make it"):
        Image.from_path(tmp_path / "cat.png")
    with pytest.raises(DataError, match="too large"):
        Image.from_bytes(b"x" * 200, "image/png")
    assert Image.from_bytes(b"x" * 10, "image/png").url


def test_a_repr_of_media_is_short():
    assert len(repr(Image.from_bytes(b"x" * 10_000, "image/png"))) < 100


@pytest.mark.parametrize("adapter", [lmopt.chat, lmopt.json, lmopt.xml, lmopt.plain])
def test_media_stand_where_they_are_named_in_inputs_lists_records_and_demos(adapter, golden):
    task = predict(
        "photo: Image, pages: list[Page], note: File | None -> answer",
        types={"Page": Page},
        adapter=adapter,
    )
    dog, doc = Image("https://example.org/dog.png"), File.from_bytes(b"%PDF", "application/pdf")
    demo = {"photo": dog, "pages": [], "note": None, "answer": "A dog."}
    task = task.with_params({"predict": Prompt("Say what you see.", demos=[demo])})
    messages = preview(task, photo=CAT, pages=[Page("One", dog), Page("Two", CAT)], note=doc)
    assert messages[1].content[1:] == (dog,)
    assert messages[-1].content[1:] == (CAT, dog, CAT, doc)
    text = messages[-1].text
    places = [text.index(one) for one in ("[image 1]", "[image 2]", "[image 3]", "[file 4]")]
    assert places == sorted(places) and "example.org" not in transcript(messages)
    golden(f"media_{adapter.name}.txt", transcript(messages[-1:]) + "\n")
    again = task.with_params(loads(dumps(task.params)))
    assert preview(again, photo=CAT, pages=[], note=None)[:2] == messages[:2]
    assert type(again.params["predict"].demos[0]["photo"]) is Image


def test_no_media_no_parts():
    task = predict("photo: Image | None -> answer: Literal['image', 'file']")
    assert isinstance(preview(task, photo=None)[-1].content, str)
    assert task(lmopt.toy_lm(), photo=CAT).answer == "image"


def test_which_picture_it_is_is_part_of_the_key():
    keys = {
        Request([Message("user", ("see [image 1]", one))]).key
        for one in (CAT, Image("https://example.org/dog.png"), File(CAT.url), "cat")
    }
    assert len(keys) == 4


def counted(n: int, /, *rest: int, step: int = 1, **more: int) -> str:
    """Count."""
    return f"{n} {rest} {step} {more}"


def test_a_tool_of_any_kind_of_parameters():
    tool = Tool.of(counted)
    assert tool.schema["required"] == ["n"] and tool.schema["additionalProperties"] is True
    assert tool(n="1", step=None, other=5) == "1 () 1 {'other': 5}"
    assert Tool.of("a-b".split)(sep="-", maxsplit=1) == ["a", "b"]
    listed = Tool.of(people)
    assert listed(who='{"name": "Ann"}', tags='["b", "a"]') == "Ann ['a', 'b']"
    assert listed(who={"name": "Ann"}, tags=None) == "Ann []"


@pytest.mark.parametrize(
    ("name", "fit"),
    [("a.b c", "a_b_c"), ("<lambda>", "lambda"), ("é" * 3, "tool"), ("x" * 99, "x" * 64)],
)
def test_a_name_that_providers_refuse_is_made_fit(name, fit):
    assert Tool.of(google, name=name).name == fit


class Chain:
    """As a tool of LangChain looks."""

    name, description = "look.up", "Look\n    it up."
    args_schema = {  # noqa: RUF012
        "type": "object",
        "properties": {
            "max-results": {"type": "integer", "description": "how many", "default": 2},
            "place": {"$ref": "#/$defs/Place"},
            "kind": {"anyOf": [{"const": "a"}, {"type": "null"}]},
        },
        "required": ["place"],
        "$defs": {
            "Place": {
                "title": "Place",
                "type": "object",
                "properties": {"name": {"type": "string"}, "inside": {"$ref": "#/$defs/Place"}},
                "required": ["name"],
            }
        },
    }

    def invoke(self, arguments):
        return arguments


def test_an_object_with_a_schema_and_invoke_is_a_tool():
    tool = Tool.of(Chain())
    assert (tool.name, tool.desc) == ("look_up", "Look\nit up.")
    assert [(one.name, one.words) for one in tool.fields] == [
        ("max_results", "int"),
        ("place", "{name: str, inside: any}"),
        ("kind", 'one of "a" or null'),
    ]
    given = {"max_results": "3", "place": '{"name": "Rome"}'}
    assert tool(**given) == {"max-results": 3, "place": {"name": "Rome"}}
    with pytest.raises(DataError, match="look_up cannot take the argument 'place' .*has no 'name'"):
        tool(place={})


def test_an_image_may_be_given_as_its_url_or_as_its_json():
    task = lmopt.predict("picture: Image | None, question -> answer")
    image = Image("https://e.org/a.png", "a")
    for given in (image, "https://e.org/a.png", lmopt.jsonable(image)):
        *_, asked = lmopt.preview(task, picture=given, question="?")
        assert asked.content[1].url == image.url and "[image 1]" in asked.text
    assert isinstance(lmopt.preview(task, picture=None, question="?")[-1].content, str)
    with pytest.raises(
        DataError, match="the input 'picture' cannot be read .*: 'cat'; .*; pass Image"
    ):
        lmopt.preview(task, picture="cat", question="?")


def test_a_history_may_be_none_or_messages_or_a_list():
    task = lmopt.predict("question, past: History | None -> answer")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    _, first, second, asked = lmopt.preview(task, question="?", past=said)
    assert (first, second) == (Message("user", "Hi"), Message("assistant", "Hello"))
    assert "Hi" not in asked.text and "past" not in asked.text
    assert len(lmopt.preview(task, question="?", past=None)) == 2
    assert len(lmopt.preview(task, question="?", past=lmopt.History(said))) == 4
    with pytest.raises(DataError, match="a turn of the history has no known field: .*text='Hi'"):
        lmopt.preview(task, question="?", past=[{"text": "Hi"}])


def test_the_transcript_of_a_run_is_its_last_call_or_all_with_the_replies():
    task, lm = predict("q -> n: int"), lmopt.scripted_lm(["no", {"n": 2}])
    made = task(lm, q="?")
    first, last = made.trace[0].request, made.trace[1].request
    end = "--- assistant ---\n[[ ## n ## ]]\n2\n\n[[ ## completed ## ]]"
    assert transcript(made) == transcript(made.trace) == f"{transcript(last.messages)}\n{end}"
    both = transcript(made, every=True)
    assert both.startswith(f"===== 1. predict =====\n{transcript(first.messages)}\n--- assistant")
    assert "--- assistant ---\nno\n===== 2. predict =====\n" in both and both.endswith(end)
    with pytest.raises(lmopt.Unauthorized) as failed:
        task(lmopt.scripted_lm([lmopt.Unauthorized("dead key")]), q="?")
    assert transcript(failed.value.trace).endswith("--- failed ---\nUnauthorized: dead key")
    assert transcript(lmopt.Trace([])) == transcript(lmopt.Trace([]), every=True) == ""
    call = Message("assistant", "", [ToolCall("1", "add", {"a": 1})])
    assert transcript([call]) == '--- assistant ---\nadd({"a": 1})'


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_spans_are_those_of_opentelemetry():
    act = {"thought": "add", "tool": "add", "arguments": {"a": 1, "b": 2}}
    agent = lmopt.react("q -> n: int", [add], max_steps=1, temperature=0.5)
    lm = lmopt.scripted_lm([act, {"reasoning": "so", "n": 3}])
    trace = agent(lm, q="1 + 2?").trace
    made = lmopt.spans(trace)
    assert [one.name for one in made] == [
        "chat",
        "invoke_agent act",
        "execute_tool add",
        "chat",
        "invoke_agent answer",
        "invoke_agent react",
    ]
    root, known = made[-1], {one.span_id: one for one in made}
    assert root.parent_id == "" and len({one.trace_id for one in made}) == 1
    assert all(len(one.trace_id) == 32 and len(one.span_id) == 16 for one in made)
    for one in made[:-1]:
        above = known[one.parent_id]
        assert above.start <= one.start <= one.end <= above.end + 1_000_000  # clocks are coarse
    chat_, tool = made[0].attributes, made[2].attributes
    assert chat_["gen_ai.operation.name"] == "chat" and made[0].kind == "CLIENT"
    assert chat_["gen_ai.request.temperature"] == 0.5
    assert chat_["gen_ai.response.finish_reasons"] == ["stop"]
    said = json.loads(chat_["gen_ai.input.messages"])
    assert [one["role"] for one in said] == ["system", "user"]
    assert said[0]["parts"][0]["type"] == "text"
    assert json.loads(tool["gen_ai.tool.call.result"]) == 3 and made[2].kind == "INTERNAL"
    assert json.loads(tool["gen_ai.tool.call.arguments"]) == {"a": 1, "b": 2}
    (said,) = json.loads(root.attributes["gen_ai.output.messages"])
    assert json.loads(said["parts"][0]["content"])["n"] == 3 and said["finish_reason"] == "stop"
    assert lmopt.spans(trace) == made


def test_spans_of_a_failure_say_so_and_a_trace_without_times_has_none():
    with pytest.raises(lmopt.Unauthorized) as failed:
        predict("q -> a")(lmopt.scripted_lm([lmopt.Unauthorized("dead key")]), q="?")
    asked, step = lmopt.spans(failed.value.trace)
    assert asked.error == step.error == "Unauthorized: dead key"
    assert asked.attributes["error.type"] == "Unauthorized"
    assert "gen_ai.output.messages" not in {**asked.attributes, **step.attributes}
    with pytest.raises(DataError, match="events of several runs"):
        lmopt.spans([*failed.value.trace, *failed.value.trace])
    again = lmopt.Trace.from_json(failed.value.trace.to_json())
    with pytest.raises(DataError, match="a trace without times.*prediction.trace"):
        lmopt.spans(again)


def test_spans_tell_of_tool_calls_and_their_results():
    asked = Request(
        [
            Message("user", "?"),
            Message("assistant", "", [ToolCall("1", "add", {"a": 1, "b": 2})]),
            Message("tool", "3", tool_call_id="1"),
        ]
    )
    (made,) = lmopt.spans([lmopt.Event("x", "lm", request=asked, response=Response("3"), id=1)])
    parts = [one["parts"] for one in json.loads(made.attributes["gen_ai.input.messages"])]
    assert parts[1][1] == {
        "type": "tool_call",
        "id": "1",
        "name": "add",
        "arguments": {"a": 1, "b": 2},
    }
    assert parts[2] == [{"type": "tool_call_response", "id": "1", "response": "3"}]
