"""Records: immutable mappings with attributes, equal by what they would be written as."""

import copy
import enum
import json
import pickle

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmopt
from lmopt import DataError, Event, Params, Prediction, Prompt, Record, Response, Trace, Usage

json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text(), json_data, max_size=5)


@given(mappings, mappings)
def test_a_record_is_a_mapping_that_never_changes(a, b):
    record = Record(a)
    assert dict(record) == a == record
    assert dict(record | b) == {**a, **b}
    assert dict(record) == a
    assert len(record) == len(a) and list(record) == list(a)


@given(mappings)
def test_json_pickle_and_copy_give_it_back(a):
    record = Record(a)
    for again in (
        Record.from_json(record.to_json()),
        pickle.loads(pickle.dumps(record)),
        copy.deepcopy(record),
        copy.copy(record),
    ):
        assert again == record and hash(again) == hash(record) and type(again) is Record


@given(mappings, mappings)
def test_equal_records_have_equal_hashes_whatever_they_hold(a, b):
    assert (Record(a) == Record(b)) == (lmopt.canonical(a) == lmopt.canonical(b))
    if Record(a) == Record(b):
        assert hash(Record(a)) == hash(Record(b))


def test_order_of_fields_does_not_matter_and_kinds_of_numbers_do():
    assert Record(a=1, b=2) == Record(b=2, a=1)
    assert Record(a=1) != Record(a=True) != Record(a=1.0)
    assert Record(a=1) != 1
    assert {Record(a=[1]): "found"}[Record(a=[1])] == "found"
    assert Record(f=print) == Record(f=print) != Record(f=len)


def test_fields_are_attributes_unless_the_class_says_otherwise():
    record = Record({"items": 1, "answer": 2, "_hidden": 3})
    assert record["items"] == 1 and callable(record.items)
    assert record.answer == 2 and record._hidden == 3
    assert "answer" in dir(record)


def test_what_is_wrong_is_said():
    record = Record(answer=1)
    with pytest.raises(AttributeError, match="no such field: 'anser'; expected one of: answer; "):
        record.anser  # noqa: B018
    with pytest.raises(AttributeError, match="never changes: 'answer'; expected no .*make a new"):
        record.answer = 2
    with pytest.raises(AttributeError, match="never changes"):
        del record.answer
    with pytest.raises(DataError, match="a Record needs names: 5; expected a mapping; pass a dict"):
        Record(5)
    with pytest.raises(DataError, match="a name is no text: 1; expected a str; rename"):
        Record({1: 2})
    with pytest.raises(DataError, match=r"no JSON: '\{'; expected one JSON object; correct it"):
        Record.from_json("{")
    with pytest.raises(DataError, match=r"no JSON object: '\[1\]'; expected .*; wrap"):
        Record.from_json("[1]")
    assert not hasattr(record, "__wrapped__")


def test_the_given_mapping_is_copied():
    given_ = {"a": 1}
    record = Record(given_)
    given_["a"] = 2
    assert record.a == 1


class Kind(str, enum.Enum):
    A = "a"


@attrs.frozen
class Box:
    content: object
    secret: str = attrs.field(default="x", eq=False)


def test_json_of_each_kind_of_value():
    value = {"e": Kind.A, "s": {2, 1}, "t": (1,), "b": Box(Kind.A), "n": float("nan"), 1: None}
    text = lmopt.canonical(value)
    assert text == '{"1":null,"b":{"content":"a"},"e":"a","n":NaN,"s":[1,2],"t":[1]}'
    with pytest.raises(DataError, match="a object has no JSON form: .*; expected plain data; conv"):
        lmopt.canonical(object())


def test_a_lone_surrogate_is_escaped_so_that_it_can_be_encoded():
    text = Record(a="\ud800ü").to_json()
    assert text == '{"a": "\\ud800ü"}'
    assert Record.from_json(text).a == "\ud800ü"


def test_a_prediction_adds_the_trace_and_its_cost():
    asked = Event("a", "lm", response=Response("x", usage=Usage(calls=1, input_tokens=3, cost=0.5)))
    failed = Event("a", "lm", error="LMError: no")
    prediction = Prediction({"trace": 1, "answer": 2}, trace=[asked, failed, Event("a", "step")])
    assert prediction["trace"] == 1 and prediction.trace[0] is asked
    assert prediction.usage == Usage(calls=2, input_tokens=3, cost=0.5)
    again = pickle.loads(pickle.dumps(prediction))
    assert again == prediction == Record(trace=1, answer=2) and again.trace == prediction.trace
    assert type(prediction | {"answer": 3}) is Record


def test_a_trace_goes_to_json_and_back():
    lm = lmopt.scripted_lm(["no", {"n": 2}, lmopt.Unauthorized("dead")])
    task = lmopt.predict("text -> n: int", temperature=0.5, extra={"a": [1]})
    failed = Event("x", "call", Record(args=(1,)), [2], error="E: no")
    trace = (*task(lm, text="é").trace, failed)
    again = lmopt.coerce(tuple[Event, ...], json.loads(lmopt.canonical(trace)))
    assert again == trace and again[0].request.key == trace[0].request.key


def test_times_take_no_part_in_equality():
    assert Event("a", "step", seconds=1.0) == Event("a", "step", seconds=2.0)


def test_params_are_a_mapping_of_prompts():
    params = Params({"a": Prompt("x"), "b": Prompt("y")})
    changed = params.replace("a", instructions="z", demos=[{"q": 1}])
    assert (params["a"].instructions, changed["a"].instructions) == ("x", "z")
    assert changed["a"].demos == (Record(q=1),)
    assert Params.from_json(changed.to_json()) == changed != params
    assert pickle.loads(pickle.dumps(changed)).digest == changed.digest != params.digest
    with pytest.raises(lmopt.ParamsError, match="no such path: 'c'; expected one of a, b; correct"):
        params.replace("c", instructions="z")


def test_seeded_generators_depend_on_seed_and_purpose_only():
    draw = lmopt.seeded(0, "a", 1).random()
    assert draw == lmopt.seeded(0, "a", 1).random()
    assert len({draw, lmopt.seeded(1, "a", 1).random(), lmopt.seeded(0, "a", 2).random()}) == 3


def search(query):
    return [f"about {query}"]


@lmopt.program(hop=lmopt.predict("question -> query"), answer=lmopt.predict("notes -> answer"))
def research(steps, question):
    hops = yield (steps.hop(question=question), steps.hop(question=question + "!"))
    notes = yield lmopt.invoke(search, hops[0].query)
    return (yield steps.answer(notes=str(notes)))


REPLIES = [{"query": "x"}, {"query": "y"}, "no", {"answer": "long " * 40}]


def test_a_trace_prints_as_the_tree_of_its_steps(golden):
    made = research(lmopt.scripted_lm(REPLIES), question="Why?")
    stable = Trace.from_json(made.trace.to_json())  # without times
    golden("trace.txt", f"{stable}\n")
    assert stable == made.trace and "0.0" in str(made.trace) and " s " in str(made.trace)
    assert [depth for depth, _, _ in made.trace.tree()] == [0, 1, 2, 1, 2, 1, 1, 2, 2]


def test_a_failed_run_prints_what_failed_where():
    with pytest.raises(lmopt.ParseError) as failed:
        lmopt.predict("q -> n: int", retries=0)(lmopt.scripted_lm(["a"]), q="?")
    assert isinstance(failed.value.trace, Trace)
    assert "predict" in str(failed.value.trace) and "failed: ParseError: " in str(
        failed.value.trace
    )
    assert str(Trace([])) == "" and str(Trace([Event("a.b", "call")])) == "b()  null"


def test_a_trace_pickles_and_is_a_tuple():
    trace = research(lmopt.scripted_lm(REPLIES), question="Why?").trace
    again = pickle.loads(pickle.dumps(trace))
    assert type(again) is Trace and again == trace == tuple(trace)
    for text in ("{", "{}", "[1]"):
        with pytest.raises(lmopt.DataError, match="this is no trace.*save one with to_json"):
            Trace.from_json(text)


def test_parameters_print_readably(golden):
    demos = [{"ticket": "x" * 99, "team": f"t{n}"} for n in range(7)]
    made = Prompt("Sort\nit.", demos=demos, settings={"temperature": 0.1}, model="small")
    golden("params.txt", f"{Params({'sort': made, 'rag.hop': Prompt('Ask.')})}\n")


def test_notebooks_show_predictions_parameters_and_traces_with_full_texts_on_a_click():
    made = research(lmopt.scripted_lm(REPLIES), question="<b>Why?")
    page = made._repr_html_()
    assert "&lt;b&gt;Why?" in page and "<b>" not in page
    assert "long " * 40 in page and page.count("<details>") == 1 + len(made.trace)
    shown = Params({"sort": Prompt("<i>", demos=[{"t": "long " * 40}])})._repr_html_()
    assert "&lt;i&gt;" in shown and "long " * 40 in shown and "<i>" not in shown


def test_usage_prints_what_there_is():
    assert str(Usage()) == "" and str(Usage(calls=1, cost=0.12345)) == "1 call, $0.1235"
    assert str(Usage(2, 10, 5)) == "2 calls, 10+5 tokens"


def test_a_slice_of_a_trace_is_one_and_what_a_terminal_would_obey_is_not_printed():
    trace = research(lmopt.scripted_lm(REPLIES), question="Why?").trace
    assert type(trace[1:3]) is Trace and trace[1:3] == trace[1:3] and trace[0].kind == "lm"
    assert lmopt.transcript(trace[:1]).startswith("--- system ---")
    shown = str(Trace([Event("x", "step", outputs=Record(a="red \x1b[31m\x07 \n text"))]))
    assert shown == "x  a: red [31m text"
    with pytest.raises(lmopt.DataError, match="this is no trace"):
        Trace.from_json("[" * 100_000)
