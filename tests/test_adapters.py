"""The laws of adapters, and the exact messages of `chat`."""

import datetime as dt
import itertools
import pickle
import time
from collections import Counter
from decimal import Decimal
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Person, same, tasks, texts

import lmopt
from lmopt import Field, ParseError, Prompt, Record, Response, Signature, chat, render_outputs
from lmopt import signature as sig

ADAPTERS = [lmopt.chat, lmopt.json, lmopt.xml, lmopt.plain]
adapters = pytest.mark.parametrize("adapter", ADAPTERS, ids=[one.name for one in ADAPTERS])


@attrs.frozen
class Item:
    name: str
    price: Decimal
    count: int = 1


@attrs.frozen
class Aspect:
    topic: str
    sentiment: Literal["good", "bad"]
    quote: str | None = None


@adapters
@given(drawn=tasks())
def test_what_is_rendered_is_read_back(adapter, drawn):
    task, _, outputs = drawn
    found = adapter.parse(task, Response(render_outputs(adapter, task, outputs)))
    for one in task.outputs:
        value, back = outputs[one.name], found[one.name]
        assert type(back) is type(value)
        assert back == value or (adapter is not lmopt.json and back == same(one.type, value))


@given(tasks())
def test_inputs_and_demos_do_not_leak_into_other_fields(drawn):
    task, inputs, outputs = drawn
    *_, question, answer, asked = chat.render(task, Prompt(demos=(inputs | outputs,)), inputs)
    assert set(lmopt.sections(question.content)) == set(inputs)
    assert set(lmopt.sections(answer.content)) == {*outputs, "completed"}
    assert set(lmopt.sections(asked.content)) == set(inputs)


@adapters
@given(drawn=tasks())
def test_rendering_is_stable_and_the_prefix_is_the_same_for_all_inputs(adapter, drawn):
    task, inputs, outputs = drawn
    prompt = Prompt(task.instructions, demos=(inputs | outputs, outputs))
    first = adapter.render(task, prompt, inputs)
    again = Prompt(task.instructions, prompt.demos)
    assert first == adapter.render(task, prompt, inputs) == adapter.render(task, again, inputs)
    changed = {name: value for name, value in inputs.items() if name == "x"}
    assert adapter.render(task, prompt, changed)[:-1] == first[:-1]
    assert [one.role for one in first[1:]] == ["user", "assistant"] * 2 + ["user"]


noise = (
    texts
    | st.text()
    | st.text("[#]\\ answer\n", max_size=200)
    | st.text("<>/&;answerx\"{}:,'", max_size=99)
)


reasons = st.sampled_from(["stop", "length"])


@adapters
@given(drawn=tasks(), text=noise, reason=reasons, cut=st.integers(0, 99))
def test_any_text_at_all_gives_fields_or_a_parse_error(adapter, drawn, text, reason, cut):
    task, _, outputs = drawn
    good = render_outputs(adapter, task, outputs)
    name = task.outputs[0].name
    for reply in (
        text,
        f"[[ ## {name} ## ]]\n{text}",
        f"<{name}>{text}</{name}>",
        f'{{"{name}": {text}}}',
        good[:cut],
        good[:cut] + text + good[cut:],
    ):
        response = Response(reply, finish_reason=reason)
        try:
            found = adapter.parse(task, response)
        except ParseError as error:
            assert error.response is response
        else:
            assert list(found) == [one.name for one in task.outputs]


@adapters
def test_an_adapter_pickles_and_a_program_runs_with_it(adapter):
    again = pickle.loads(pickle.dumps(adapter))
    task = lmopt.predict("text -> tags: list[str], n: int | None", adapter=again)
    lm = lmopt.mock_lm(lambda inputs: {"tags": [inputs.text], "n": None})
    assert task(lm, text="[[ ## n ## ]] & <n>") == {"tags": ["[[ ## n ## ]] & <n>"], "n": None}
    assert task(lmopt.stub_lm(), text="x") == {"tags": ["text"], "n": 1}


def test_json_puts_its_schema_into_the_request():
    task = lmopt.predict(
        "text -> people: list[Person], n: int", types={"Person": Person}, adapter=lmopt.json
    )
    schema = next(task.flow(text="x")).schema
    assert schema["required"] == ["people", "n"] and schema["additionalProperties"] is False
    assert schema["properties"]["people"]["items"] == {"$ref": "#/$defs/Person"}
    assert next(lmopt.predict("text -> n: int").flow(text="x")).schema is None


AS_MODELS_WRITE = [
    (lmopt.json, '```json\n{"n": 5, "t": "a"}\n```', (5, "a")),
    (lmopt.json, "Sure: {'n': '5', t: 'a',} Bye!", (5, "a")),
    (lmopt.json, '{"n": 5, "t": 7}', (5, "7")),
    (lmopt.json, '{"n": 5}', None),
    (lmopt.json, '{"n": 5, "t": "a', None),
    (lmopt.json, '{"n": "five", "t": "a"}', None),
    (lmopt.json, "[1]", None),
    (lmopt.json, r'{"n": 5, "t": "\q \u00e9\n\ud83d\ude00 \u00zz."}', (5, "\\q é\n😀 \\u00zz.")),
    (lmopt.json, '{"t": "a", "n": 1,234}', None),
    (lmopt.json, '{"n": 5, "t": "He said "a" to me"}', (5, 'He said "a" to me')),
    (lmopt.json, "{'n': 5, 't': 'It's me'}", (5, "It's me")),
    (lmopt.json, '{"n": 10 + 5, "t": "a"}', None),
    (lmopt.json, '{"n": 5, "t": "a" "b"}', None),
    (lmopt.json, '{"n": 5, "t": It is fine}', (5, "It is fine")),
    (lmopt.json, '{"n": 5, "t": "a"', None),
    (lmopt.json, '{"n": 5, "t": "```\n{x}```"}', (5, "```\n{x}```")),
    (lmopt.json, 'Of {x}:\n```json\n{"n": 5, "t": "a"}\n```', (5, "a")),
    (lmopt.xml, "<n>5</n><t>?a=1&copy=2&lt=3&copy;</t>", (5, "?a=1&copy=2&lt=3©")),
    (lmopt.xml, "<n>5</n><t>a &lt;b&gt; & c</t>", (5, "a <b> & c")),
    (
        lmopt.xml,
        "Sure!\n<n> 5 </n>\n<t>use <b>bold</b>\nand more</t>",
        (5, "use <b>bold</b>\nand more"),
    ),
    (lmopt.xml, "<t><t>a</t></t><n>5</n>", (5, "<t>a</t>")),
    (lmopt.xml, "<n>5</n><t>a", None),
    (lmopt.xml, "<t>I mean <n>6</n></t><n>5</n><n>7</n>", (5, "I mean <n>6</n>")),
    (lmopt.xml, "</t><n>5</n><t>a</t>", (5, "a")),
    (lmopt.xml, "<n>five</n><t>a</t>", None),
    (lmopt.plain, "N: 5\nT: a\nb", (5, "a\nb")),
    (lmopt.plain, "5\nT: a", (5, "a")),
    (lmopt.plain, "N: 5", None),
    (lmopt.plain, "five\nT: a", None),
]


@pytest.mark.parametrize(("adapter", "reply", "expected"), AS_MODELS_WRITE)
def test_replies_as_models_write_them_for_each_adapter(adapter, reply, expected):
    task = sig("-> n: int, t")
    if expected is None:
        with pytest.raises(ParseError):
            adapter.parse(task, Response(reply))
    else:
        assert tuple(adapter.parse(task, Response(reply)).values()) == expected


# Of each: the format asked for, the outputs, the reply, and what is read; None where it is refused.
THINKING = '<think>Perhaps {"answer": "draft"}?</think>'
READ = [
    # the commonest of all: JSON with exactly the fields, whatever was asked for
    ("chat xml plain", "name, age: int", '```json\n{"name": "Ann", "age": 7}\n```', ("Ann", 7)),
    ("chat json xml", "name, age: int", '{"Name": "Ann", "AGE": "7", "completed": 1}', ("Ann", 7)),
    ("chat json", "answer", '[{"answer": "4"}]', ("4",)),
    ("json", "answer", '"{\\"answer\\": \\"4\\"}"', ("4",)),
    ("chat", "name, age: int", 'I like {player}. {"name": "Ann", "age": 7}', ("Ann", 7)),
    ("chat", "name, age: int", '{"name": "Ann"}', None),
    # other headers
    ("chat xml json", "name, age: int", "[name] Ann\n[age] 7\n[[ ## completed ## ]]", ("Ann", 7)),
    ("chat json", "answer", "[answer] Rome[/answer]", ("Rome",)),
    ("chat", "intent", "[[ intent ]]\npay\n\n[[ completed ]]", ("pay",)),
    ("chat", "intent", "[[ # intent # ]]\npay", ("pay",)),
    ("chat", "intent: Literal['pay', 'ask']", "[[ intent ## pay ]]\n[[ completed ]]", ("pay",)),
    ("chat", "intent: Literal['pay', 'ask']", "[[ intent = pay ]]\n[[ completed = 1 ]]", ("pay",)),
    ("chat", "intent: Literal['pay', 'ask']", "[[ pay ]]\n{intent}", ("pay",)),
    ("chat xml json", "name, age: int", "**Name**: Ann\n**age:** 7", ("Ann", 7)),
    ("chat xml json", "name, age: int", "### name\nAnn\n\n### Age\n7", ("Ann", 7)),
    ("chat json", "answer", "Answer\nRome", ("Rome",)),
    ("json xml plain", "name, age: int", "[[ ## name ## ]]\nAnn\n[[ ## age ## ]]\n7", ("Ann", 7)),
    ("chat json plain", "name, age: int", "<name>Ann</name><age>7</age>", ("Ann", 7)),
    ("xml", "answer", '<Answer kind="x">Rome</ANSWER>', ("Rome",)),
    ("xml", "tags: list[str], n: int", "<tags>- a\n- b</tags><n>1</n>", (["a", "b"], 1)),
    ("xml", "tags: list[str]", "<tags><tag>a</tag><tag>b</tag></tags>", (["a", "b"],)),
    ("xml", "tags: list[str]", '<tags><item id="1">a</item></tags>', (["a"],)),
    ("xml", "who: dict[str, int]", '<who><entry key="a">1</entry><entry key="b">2</entry></who>',
     ({"a": 1, "b": 2},)),
    ("xml", "answer", "<text>\nanswer: Rome\n</text>", ("Rome",)),
    # values that run into a marker, or copy a template
    ("chat", "answer", "[[ ## answer ## ]]\nOslo [[ ## completed ## ]]", ("Oslo",)),
    ("chat", "answer", "[[ ## answer ## ]]:\nOslo", ("Oslo",)),
    ("chat plain", "answer", "[[ ## answer ## ]]\nOslo</s>", ("Oslo",)),
    ("chat", "answer", "[[ ## text ## ]] A\n[[ ## answer ## ]] B\n[[ ## text ## ]] C", ("B",)),
    ("chat", "answer", "[[ ## text ## ]]\nIs it Oslo?", None),
    ("chat", "n: int", "[[ ## text ## ]]\nIs it 5?", None),
    ("chat", "answer", "[[ ## answer ## ]]\nUse this:\n[[ ## note ## ]]\nmore",
     ("Use this:\n[[ ## note ## ]]\nmore",)),
    ("plain", "answer", "**Answer:** Oslo", ("Oslo",)),
    ("plain", "answer", "answer: Oslo\nText: And Rome?\nAnswer: Italy", ("Oslo",)),
    ("plain", "answer", "Oslo<|im_end|>", ("Oslo",)),
    ("chat plain", "due: date, n: int", "[[ ## due ## ]]\n{2026-07-05}\n\n[[ ## n ## ]]\n{n: 3}",
     (dt.date(2026, 7, 5), 3)),
    ("plain", "goods: list[int]", 'Goods: {"goods": [1, 2]}', ([1, 2],)),
    # thoughts come first; what is cut off is never completed
    ("chat json plain", "answer", THINKING + '\n{"answer": "final"}', ("final",)),
    ("chat", "answer", "Is it {\"answer\": \"a\"}?</think>\n[[ ## answer ## ]]\nfinal", ("final",)),
    ("xml", "think, answer", "<think>a</think><answer>b</answer>", ("a", "b")),
    ("json", "answer", '{"answer": "a </think> b"}', ("a </think> b",)),
    ("chat json plain xml", "answer", "<think>Perhaps Rome, but", None),
    ("cut json chat", "answer", '<think>Maybe {"answer": "draft"} but let me', None),
    ("cut json chat", "answer", 'Draft {"answer": "a"} and final {"answer": "b', None),
    ("cut chat", "n: int", "5", None),
    ("cut json chat", "answer", '{"answer": "Os', None),
    # one value and nothing else, where it is no free text
    ("chat json xml", "n: int", "5", (5,)),
    ("chat json xml", "intent: Literal['pay', 'ask']", "**Pay**", ("pay",)),
    ("chat json xml", "answer", "Rome", None),
    ("chat", "a: int, b: int", "5", None),
    # slips in JSON
    ("json", "a: dict[str, Any]", '{"a": {x: 1, // one\n y: .5, /* two */ z: Anna Rossi}}',
     ({"x": 1, "y": 0.5, "z": "Anna Rossi"},)),
    ("json", "t", '{"t": """He said "no"."""}', ('He said "no".',)),
    ("json", "t, n: int", '{“t”: “a”, "n": 1}', ("a", 1)),
    ("json", "t, n: int", '{"t": "a" "n": 1}', ("a", 1)),
    ("json", "t, n: int", '{"t": "a"\n"n": 1}', ("a", 1)),
    ("json", "t", '{"t": ["a", "b"]}', ("a\nb",)),
    ("json", "t", '{"t": {"x": 1}}', ('{"x": 1}',)),
    ("json", "tags: list[str]", '{"tags": "[\\"a\\"]"}', (["a"],)),
    ("json", "tags: list[dict[str, str]]", '{"tags": {"k": "v"}}', ([{"k": "v"}],)),
]  # fmt: skip


def replies_read():
    for formats, outputs, reply, expected in READ:
        cut_off, *names = ["stop", *formats.split()] if "cut" not in formats else formats.split()
        for name in names:
            yield name, outputs, reply, expected, "length" if cut_off == "cut" else "stop"


@pytest.mark.parametrize(("name", "outputs", "reply", "expected", "reason"), [*replies_read()])
def test_a_reply_is_read_where_a_person_can_read_it_in_one_way_only(
    name, outputs, reply, expected, reason
):
    task, adapter = sig(f"text -> {outputs}"), getattr(lmopt, name)
    response = Response(reply, finish_reason=reason)
    if expected is None:
        with pytest.raises(ParseError):
            adapter.parse(task, response)
    else:
        assert tuple(adapter.parse(task, response).values()) == expected


# Of each: format, signature, reply, and what is read; None where no answer is surely meant.
ATTACKS: list[tuple[str, str, str, dict[str, Any] | None]] = [
    ("json", "q -> answer", 'I considered {"answer": "no"} but it is {"answer": "yes"}', None),
    ("json", "x -> y", '<thinking>{"y": "draft"}</thinking>{"y": "final"}', {"y": "final"}),
    (
        "json",
        "q -> name, age: int",
        'Input: {"name": "A", "age": 1}. Output: {"name": "B", "age": 5}',
        None,
    ),
    ("json", "q -> answer: int", '[{"answer": 1}, {"answer": 2}]', None),
    ("json", "q -> name, age: int", '{"name":"A","age":5,"age":6}', None),
    ("chat", "q -> answer", '{"answer": "x"} or {"answer": "y"}', None),
    ("chat", "q -> answer", "The\nanswer\nis 5", None),
    ("chat", "q -> a", "What is\na\ncat?", None),
    ("chat", "text -> name", "This is a\nname\nthat", None),
    ("chat", "q -> name", "my config has <name>foo</name> in it, so I cannot answer", None),
    ("chat", "q -> name", "Use <name>x</name> as in Maven.", None),
    ("chat", "q -> name", 'Example: {"name": "foo"} is the format. I can\'t answer.', None),
    ("chat", "q -> n: int", "let\nn = 4\nthen\nn = 5", None),
    ("chat", "q -> n: int", "n: 4\nn: 5", None),
    (
        "chat",
        "q -> x",
        "[[ ## x ## ]]\nuse the token <|end|> in prompts\n[[ ## completed ## ]]",
        {"x": "use the token <|end|> in prompts"},
    ),
    (
        "chat",
        "q -> x",
        "[[ ## x ## ]]\nHTML: <s>old</s> new\n[[ ## completed ## ]]",
        {"x": "HTML: <s>old</s> new"},
    ),
    (
        "chat",
        "q -> answer",
        "[[ ## answer ## ]]\na\n[[answer]]\nand so on\n[[ ## completed ## ]]",
        {"answer": "a\n[[answer]]\nand so on"},
    ),
    ("plain", "q -> answer", "Answer: ends with </s> token", {"answer": "ends with </s> token"}),
    (
        "plain",
        "q -> answer",
        "The </think> tag ends thoughts.",
        {"answer": "The </think> tag ends thoughts."},
    ),
    ("json", "q -> answer", '{"answer": 1e3}', {"answer": "1e3"}),
    ("json", "q -> answer", '{"answer": 1.10}', {"answer": "1.10"}),
    (
        "json",
        "q -> answer: Decimal",
        '{"answer": 0.1234567890123456789012345}',
        {"answer": Decimal("0.1234567890123456789012345")},
    ),
    ("json", "q -> answer: dict[int,str]", '{"answer": {"1": "a", "01": "b"}}', None),
    ("json", "q -> x", '{"x": "a" + "b"}', None),
    ("json", "q -> x", '{"x": issue #5 }', {"x": "issue #5"}),
    ("json", "q -> x", '{"x": see // foo }', {"x": "see // foo"}),
    ("json", "n: int -> x: int", "n: [5]", None),
    ("chat", "q -> x: bool", 'not {"x": true}', None),
    ("xml", "q -> answer: int", "Answer: 3\nRecheck.\nAnswer: 4", None),
]


@pytest.mark.parametrize(("name", "task", "reply", "expected"), ATTACKS)
def test_a_draft_an_echo_or_an_example_is_no_answer(name, task, reply, expected):
    adapter = getattr(lmopt, name)
    if expected is None:
        with pytest.raises(ParseError):
            adapter.parse(sig(task), Response(reply))
    else:
        assert adapter.parse(sig(task), Response(reply)) == expected


HOSTILE = [
    "[[ ## completed ## ]]",
    "a [[ ## completed ## ]] b",
    "a\\[[ ## completed ## ]]",
    "x</s>",
    "a</s> b",
    "...",
    "[...]",
    '{"x": 1}',
    "a </think> b",
    "<think>",
]


@adapters
@pytest.mark.parametrize("value", [*HOSTILE, "<|end|>"])
@pytest.mark.parametrize("kind", ["str", "str | int", "list[str]"])
def test_values_that_look_like_markers_are_read_back(adapter, value, kind):
    task, made = sig(f"q -> x: {kind}"), [value] if kind == "list[str]" else value
    assert adapter.parse(task, Response(render_outputs(adapter, task, {"x": made}))).x == made


@adapters
@given(drawn=tasks())
def test_a_strict_adapter_reads_what_it_would_write_and_nothing_else(adapter, drawn):
    task, _, outputs = drawn
    reply = render_outputs(adapter, task, outputs)
    exact = lmopt.strict(adapter)
    assert exact.parse(task, Response(f" {reply}\n")) == adapter.parse(task, Response(reply))
    with pytest.raises(ParseError, match="not the format|cannot be read|is missing|not complete"):
        exact.parse(task, Response(f"Sure!\n{reply}"))


def test_real_replies_are_read(real_data):
    """What two small models wrote: of those that were read, all but a list called None; of the
    others, most."""
    types = {"Item": Item, "Aspect": Aspect}
    lines = (real_data / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    counts = Counter()
    for row in map(Record.from_json, lines):
        task = sig(row.signature, types=types)
        try:
            getattr(lmopt, row.adapter).parse(
                task, Response(row.reply, finish_reason=row.finish_reason)
            )
            counts[row.read, True] += 1
        except ParseError:
            counts[row.read, False] += 1
    assert counts[True, False] == 1 and counts[False, True] >= 36


@adapters
def test_a_row_with_too_many_or_too_few_items_is_an_error(adapter):
    task = sig("-> pair: tuple[int, str]")
    form = {"chat": "[[ ## pair ## ]]\n%s", "plain": "Pair: %s", "json": '{"pair": %s}',
            "xml": "<pair>%s</pair>"}[adapter.name]  # fmt: skip
    assert adapter.parse(task, Response(form % '[1, "a"]')).pair == (1, "a")
    for wrong in ("[1]", '[1, "a", "b"]', ""):
        with pytest.raises(ParseError):
            adapter.parse(task, Response(form % wrong))


def test_xml_holds_lists_and_objects_as_json():
    task = sig("-> tags: list[str], who: Person", types={"Person": Person})
    reply = '<tags>["a &lt; b", "b"]</tags><who>{"name": "Ann"}</who>'
    assert lmopt.xml.parse(task, Response(reply)) == {"tags": ["a < b", "b"], "who": Person("Ann")}


def test_equal_types_that_read_differently_are_never_mixed_up():
    ab, ba = Literal["a", "b"], Literal["b", "a"]
    assert ab == ba
    for tp in (ab, ba, ab):
        task = Signature((), (Field("x", tp),))
        first, second = tp.__args__
        assert f'one of "{first}", "{second}"' in chat.render(task, Prompt(), {})[0].content


def test_a_demo_of_one_is_not_taken_for_a_demo_of_true():
    task = sig("x: Any -> y: Any")
    for value, text in ((1, "1"), (True, "true"), (1.0, "1.0")):
        messages = chat.render(task, Prompt(demos=[{"x": value, "y": value}]), {"x": 0})
        assert lmopt.sections(messages[1].content)["x"] == text


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[[ ## n ## ]]\n5\n[[ ## completed ## ]]", 5),
        ("Sure!\n\n  [[ ## n ## ]]  5", 5),
        ("[[##n##]]\n5", 5),
        ("[[ ## n ## ]]\n5\n[[ ## n ## ]]\n6", 5),
        ("[[ ## other ## ]]\n4\n[[ ## n ## ]]\n```json\n5\n```", 5),
    ],
)
def test_replies_as_models_write_them(reply, expected):
    assert chat.parse(sig("-> n: int"), Response(reply)).n == expected


@pytest.mark.parametrize(
    ("reply", "reason", "parts"),
    [
        ("five", "stop", ("`n` is missing", "'five'", "expected int", "write it")),
        (
            "[[ ## n ## ]]\nfive",
            "stop",
            ("`n` cannot be read", "'five'", "expected int", "correct"),
        ),
        (
            "[[ ## n ## ]]\n5",
            "length",
            ("cut off", "[[ ## n ## ]]", "expected a complete reply", "max_tokens"),
        ),
        ("", "stop", ("`n` is missing", "''", "expected int", "write it")),
    ],
)
def test_a_reply_that_cannot_be_read_says_which_field_and_why(reply, reason, parts):
    with pytest.raises(ParseError) as caught:
        chat.parse(sig("-> n: int"), Response(reply, finish_reason=reason))
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.response.text == reply


def test_a_text_is_no_list_in_json():
    for kind in ("list[str]", "dict[str, int]", "tuple[int, int]"):
        with pytest.raises(ParseError, match="'Rome, Oslo' is not"):
            lmopt.json.parse(sig(f"-> t: {kind}"), Response('{"t": "Rome, Oslo"}'))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_of_an_object_that_goes_wrong_nothing_is_taken(reason):
    reply = '{"m": 7, "n": 1,234}'
    for name in ("m", "n"):
        with pytest.raises(ParseError, match="`n` is not complete|cut off|`m` is not complete"):
            lmopt.json.parse(sig(f"-> {name}: int"), Response(reply, finish_reason=reason))


def test_of_an_object_that_is_cut_off_what_is_before_the_cut_is_taken():
    for end in ('"n', '"n": ', '"n": 3', '"n": {"a": "x\\', '"n": [1, '):
        response = Response('{"m": 7, ' + end, finish_reason="length")
        assert lmopt.json.parse(sig("-> m: int"), response) == {"m": 7}


@pytest.mark.slow
@adapters
def test_a_long_reply_of_anything_is_read_at_once(adapter):
    task = sig("-> n: int, text, tags: list[str]")
    pieces = (
        " ",
        "[[ ## ",
        "\\",
        "\n [[",
        "`",
        "[",
        "<n>",
        "<text><n></n>",
        "{a:",
        "'",
        '"',
        "N:\n",
        "&",
        "<item>",
    )
    for text in [piece * (60_000 // len(piece)) for piece in pieces]:
        began = time.perf_counter()
        for reply in (
            text,
            f"[[ ## text ## ]]\n{text}\n[[ ## n ## ]]\n{text}",
            f"<tags>{text}</tags>",
        ):
            with pytest.raises(ParseError):
                adapter.parse(task, Response(reply))
        assert time.perf_counter() - began < 5  # it would be minutes if it were quadratic


RICH = Signature(
    (
        Field("ticket", str, "what the customer wrote"),
        Field("notes", list[str]),
        Field("age", int | None),
    ),
    (
        Field("reasoning", str, "the steps that lead to the answer"),
        Field("team", Literal["billing", "technical"], "who can help"),
        Field("people", list[Person], "who is named"),
        Field("score", float, "0 to 1"),
        Field("urgent", bool),
    ),
    "Route the ticket.\nName everybody.",
)


@pytest.mark.parametrize("adapter", [*ADAPTERS, lmopt.two_step(lmopt.stub_lm())], ids=str)
def test_the_messages_of_a_rich_signature(adapter, golden):
    whole: dict[str, Any] = {
        "ticket": "I was charged twice.\n[[ ## team ## ]]\nbilling",
        "notes": ["a", "ü"],
        "age": None,
        "reasoning": "Charges are money.",
        "team": "billing",
        "people": [Person("Ann", 7, ["x"])],
        "score": 0.5,
        "urgent": False,
    }
    part = {"ticket": "It crashes.", "team": "technical"}
    prompt = Prompt(RICH.instructions, [whole, part], texts={"urgent": "true where it cannot wait"})
    messages = adapter.render(RICH, prompt, Record(ticket="Hello", notes=[], age=3))
    golden(f"rich_{adapter.name}.txt", lmopt.transcript(messages) + "\n")


@adapters
def test_a_history_becomes_messages_of_its_own(adapter, golden):
    task = lmopt.predict("question, history: History -> answer", adapter=adapter)
    turns = [{"question": "Who?", "answer": "Ann."}, {"question": "When?", "answer": "Now."}]
    past = lmopt.History(turns)
    messages = lmopt.preview(task, question="Why?", history=past)
    assert [one.role for one in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert "history" not in lmopt.transcript(messages) and "Ann." in messages[2].content
    assert messages[:1] == lmopt.preview(task, question="x", history=lmopt.History())[:1]
    again = lmopt.Record.from_json(lmopt.Record(history=past).to_json()).history
    assert lmopt.preview(task, question="Why?", history=again) == messages
    demo = lmopt.Prompt("Say.", demos=[{"question": "a", "answer": "b"}])
    shown = lmopt.preview(task.with_params({"predict": demo}), question="Why?", history=past)
    assert "not complete" not in lmopt.transcript(shown) and len(shown) == len(messages) + 2
    golden(f"history_{adapter.name}.txt", lmopt.transcript(messages) + "\n")


def test_two_steps_are_in_the_trace_and_in_the_cost(golden):
    reader = lmopt.scripted_lm(["no fields", {"n": 2, "text": "b"}])
    task = lmopt.predict("question -> n: int, text", adapter=lmopt.two_step(reader))
    prediction = task(lmopt.scripted_lm(["I say two.", "Two, and b."]), question="How many?")
    assert prediction == {"n": 2, "text": "b"} and task.max_calls == 6
    kinds = [event.kind for event in prediction.trace]
    assert kinds == ["lm", "lm", "lm", "lm", "step"] and prediction.usage.calls == 4
    request = prediction.trace[1].request
    shown = [lmopt.transcript(one.messages) for one in (prediction.trace[0].request, request)]
    golden("two_step.txt", "\n\n".join(shown) + "\n")


@given(drawn=tasks())
def test_two_steps_give_back_what_the_second_lm_reads(drawn):
    task, _, outputs = drawn
    answer = Response(render_outputs(lmopt.two_step(lmopt.stub_lm()), task, outputs))
    adapter = lmopt.two_step(
        lambda request: Response(render_outputs(chat, request.signature, outputs))
    )
    flow = adapter.parse(task, answer)
    effect = next(flow)
    assert effect.args[0].inputs
    with pytest.raises(StopIteration) as end:
        flow.send(effect.function(*effect.args))
    for one in task.outputs:
        assert end.value.value[one.name] == same(one.type, outputs[one.name])


def test_a_wrong_history_is_an_error_of_yours():
    task = lmopt.predict("question, history: History -> answer")
    with pytest.raises(
        lmopt.DataError, match="this is no history: 'text'; expected earlier turns; pass"
    ):
        lmopt.preview(task, question="Why?", history="text")


def streamed(adapter, task, pieces):
    """The joined text of each field, of a reply that arrives in pieces."""
    chunks, found, partials = [], {}, {}
    request = lmopt.Request((), signature=task, adapter=adapter)
    reader = lmopt._Reader(request, chunks.append, Counter())
    for piece in pieces:
        reader(piece)
    reader.end(Response("".join(pieces)))
    for chunk in chunks:
        assert chunk.text
        found[chunk.field] = found.get(chunk.field, "") + chunk.text
        partials.setdefault(chunk.field, []).append(chunk.value)
    return found, partials


def pieces_of(text, cuts):
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


cuttings = st.lists(st.integers(0, 10_000), max_size=30)


@adapters
@given(drawn=tasks(), cuts=cuttings)
def test_a_streamed_reply_has_the_text_of_its_fields_however_it_is_cut(adapter, drawn, cuts):
    task, _, outputs = drawn
    reply = render_outputs(adapter, task, outputs)
    found = adapter.parse(task, Response(reply))
    whole, _ = streamed(adapter, task, [reply])
    each, values = streamed(adapter, task, list(reply))
    assert each == whole and streamed(adapter, task, pieces_of(reply, cuts))[0] == whole
    assert list(whole) == [one.name for one in task.outputs if one.name in whole]
    for one in task.outputs:
        text = whole.get(one.name, "")
        if one.type is str:
            assert text == found[one.name].strip()
        elif one.type in (int, float, bool):
            assert lmopt.read(one.type, text) == found[one.name]
        if values.get(one.name, [None])[-1] is not None:
            final = lmopt.jsonable(outputs[one.name])
            assert values[one.name][-1] == final
            assert all(begins(value, final) for value in values[one.name])


def begins(part, whole):
    """Whether JSON data is the beginning of other data, as far as one can have come in reading."""
    if isinstance(whole, str):
        return isinstance(part, str) and whole.startswith(part)
    if isinstance(part, dict) and isinstance(whole, dict):
        part, whole = list(part.items()), list(whole.items())
        names = [name for name, _ in part] == [name for name, _ in whole][: len(part)]
        return names and begins([value for _, value in part], [value for _, value in whole])
    if isinstance(part, list) and isinstance(whole, list):
        *done, last = part or [None]
        return part == [] or (done == whole[: len(done)] and begins(last, whole[len(done)]))
    return part == whole


@adapters
@given(drawn=tasks(), text=noise, cut=st.integers(0, 99), cuts=cuttings)
def test_any_text_streams_the_same_however_it_is_cut(adapter, drawn, text, cut, cuts):
    task, _, outputs = drawn
    good = render_outputs(adapter, task, outputs)
    name = task.outputs[0].name
    for reply in (
        text,
        f"[[ ## {name} ## ]]\n{text}",
        f"<{name}>{text}</{name}>",
        f'{{"{name}": {text}}}',
        f'{{"{name}": "{text}"}}',
        good[:cut] + text + good[cut:],
    ):
        whole, _ = streamed(adapter, task, [reply])
        assert streamed(adapter, task, list(reply))[0] == whole
        assert streamed(adapter, task, pieces_of(reply, cuts))[0] == whole


STREAMED = [
    (
        chat,
        "[[ ## a ## ]]\nx [[ ## b ## ]]\n[1] \n\n[[ ## completed ## ]] bye",
        {"a": "x [[ ## b ## ]]\n[1]"},
    ),
    (
        chat,
        "Sure!\n [[##a##]] x\n\\[[ ## b ## ]]\n[[ ## b ## ]] 2",
        {"a": "x\n[[ ## b ## ]]", "b": "2"},
    ),
    (
        chat,
        "[[ ## a ## ]]\nx\n[[ ## other ## ]]\ny\n[[ ## a ## ]]\nz",
        {"a": "x\n[[ ## other ## ]]\ny"},
    ),  # no field of this signature
    (
        lmopt.json,
        '```json\n{"a": "x\\n\\ud83d\\ude00\\"", "b": [1, "]", {"c": 2}], "d": 3}\n```',
        {"a": 'x\n😀"', "b": '[1, "]", {"c": 2}]'},
    ),
    (lmopt.json, '{"a" : "", "b":12 }', {"b": "12"}),
    (
        lmopt.xml,
        "Well <b> &lt;1 </b><a>x < y &amp;\n<a>z</a></a> <b>2</b>",
        {"b": "<1", "a": "x < y &\n<a>z</a>"},
    ),
    (lmopt.plain, "B: 2\n  A : x\n\\B: no\nmore", {"b": "2", "a": "x\nB: no\nmore"}),
    (lmopt.plain, "just text\n", {"a": "just text"}),
]


@pytest.mark.parametrize(("adapter", "reply", "fields"), STREAMED)
def test_what_is_streamed(adapter, reply, fields):
    for pieces in ([reply], list(reply), [reply[:9], reply[9:]]):
        assert streamed(adapter, sig("q -> a, b"), pieces)[0] == fields


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [lmopt.chat, lmopt.json, lmopt.xml, lmopt.plain])
@pytest.mark.parametrize("depth", [500, 100_000])
def test_what_is_nested_too_deep_to_be_used_is_not_read(adapter, depth):
    deep = "[" * depth + "]" * depth
    task = lmopt.predict("q -> a: list[Any]", adapter=adapter, retries=0)
    for text in (f"[[ ## a ## ]]\n{deep}\n\n[[ ## completed ## ]]", f'{{"a": {deep}}}',
                 f"<a>{deep}</a>", f"A: {deep}", deep):  # fmt: skip
        with pytest.raises(lmopt.ParseError):
            task(lmopt.scripted_lm([text]), q="?")
