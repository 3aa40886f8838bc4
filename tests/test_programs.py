"""Programs: bodies stepped by hand, paths, parameters, previews."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
from attrs import evolve

import lmopt
from lmopt import (
    Call,
    DataError,
    ParamsError,
    Prediction,
    Prompt,
    Record,
    Request,
    Response,
    Run,
    chain_of_thought,
    invoke,
    predict,
    preview,
    program,
    scripted_lm,
    stub_lm,
)


def search(query):
    return [f"about {query}"]


@program(
    hop=predict("question, notes: list[str] -> query"),
    answer=predict("notes: list[str], question -> answer"),
)
def multihop(steps, question, hops: int = 2):
    notes = []
    for _ in range(hops):
        hop = yield steps.hop(question=question, notes=notes)
        notes = notes + (yield invoke(search, hop.query))
    return (yield steps.answer(notes=notes, question=question))


def test_a_body_is_stepped_by_hand_with_no_lm_at_all():
    flow = multihop.flow(question="How far?", hops=1)
    effect = next(flow)
    assert isinstance(effect, Run) and effect.name == "hop"
    assert effect.inputs == Record(question="How far?", notes=[])
    effect = flow.send(Prediction(query="distance"))
    assert effect == Call(search, ("distance",))
    effect = flow.send(["384,400 km"])
    assert effect.name == "answer" and effect.inputs.notes == ["384,400 km"]
    with pytest.raises(StopIteration) as end:
        flow.send(Prediction(answer="384,400 km"))
    assert end.value.value == {"answer": "384,400 km"}


def test_a_leaf_is_stepped_by_hand_too():
    flow = predict("question -> answer: int").flow(question="2+2?")
    request = next(flow)
    assert isinstance(request, Request) and request.step == "predict"
    again = flow.send(Response("four"))
    assert [one.role for one in again.messages] == ["system", "user"]
    assert "An earlier reply could not be used" in again.messages[-1].text
    with pytest.raises(StopIteration) as end:
        flow.send(Response("[[ ## answer ## ]]\n4"))
    assert end.value.value == {"answer": 4}


@program(rag=multihop, plain=multihop, judge=chain_of_thought("answer -> verdict"))
def outer(steps, question):
    a, b = yield steps.rag(question=question), steps.plain(question=question, hops=1)
    return (yield steps.judge(answer=a.answer + b.answer))


def test_paths_are_names_dotted():
    assert list(predict("q -> a").params) == ["predict"]
    assert list(predict("q -> a", name="qa").params) == ["qa"]
    assert list(chain_of_thought("q -> a").params) == ["chain_of_thought"]
    assert list(multihop.params) == ["hop", "answer"]
    assert list(outer.params) == ["rag.hop", "rag.answer", "plain.hop", "plain.answer", "judge"]
    assert outer.max_calls == 3 * 5 and multihop.max_calls == 6


def test_the_same_program_under_two_names_has_two_prompts():
    changed = outer.with_params({"rag.hop": Prompt("changed")})
    assert changed.params["rag.hop"].instructions == "changed"
    assert changed.params["plain.hop"] == outer.params["plain.hop"] == outer.params["rag.hop"]
    assert outer.with_params(outer.params).params == outer.params


def test_the_prompt_of_a_step_is_what_is_sent():
    asked = []

    def lm(request):
        asked.append(
            (
                request.step,
                "SECRET" in request.messages[0].content,
                request.temperature,
                request.model,
            )
        )
        return stub_lm()(request)

    prompt = Prompt("SECRET", settings={"temperature": 0.5}, model="big")
    outer.with_params({"plain.hop": prompt})(lm, question="?")
    assert ("plain.hop", True, 0.5, "big") in asked
    assert [one for one in asked if one[1]] == [("plain.hop", True, 0.5, "big")]


@pytest.mark.parametrize(
    ("action", "kind", "message"),
    [
        (
            lambda: outer.with_params({"rag.hpo": Prompt()}),
            ParamsError,
            "no such path: 'rag.hpo'; expected one of rag.hop, .*; correct",
        ),
        (
            lambda: predict("q -> a", temprature=1),
            ParamsError,
            "unknown setting: 'temprature'; expected one of temperature.*; put",
        ),
        (
            lambda: predict("q -> a", retries=-1),
            lmopt.SignatureError,
            "too few retries: -1; expected 0 or more",
        ),
        (
            lambda: predict("q -> a")(stub_lm(), qestion="?"),
            DataError,
            "unknown field: 'qestion'; expected the inputs q; correct",
        ),
        (
            lambda: predict("q, r -> a")(stub_lm(), q="?"),
            DataError,
            r"missing field 'r' in: \{'q': '\?'\}; expected the fields q, r; add",
        ),
        (
            lambda: multihop(stub_lm(), question="?", hop=1),
            DataError,
            "unknown field: 'hop'; expected the inputs question, hops",
        ),
        (lambda: multihop(stub_lm()), DataError, "missing field 'question'"),
        (
            lambda: program(a=search),
            lmopt.SignatureError,
            "the step 'a' is none: <function.*; expected a program; write a=predict",
        ),
        (
            lambda: program()(search),
            lmopt.SignatureError,
            "a body that never yields: 'search'; expected a generator; yield what",
        ),
    ],
)
def test_what_is_wrong_is_said(action, kind, message):
    with pytest.raises(kind, match=message):
        action()


def test_wrong_bodies():
    @program()
    def yields_nonsense(steps, q):
        yield 5

    @program()
    def returns_nothing(steps, q):
        yield invoke(len, q)

    @program(a=predict("q -> a"))
    def misnames(steps, q):
        yield steps.b(q=q)

    @program()
    def takes_anything(steps, q, one=1):
        yield invoke(len, q)
        return {"q": q, "one": one}

    with pytest.raises(
        lmopt.SignatureError, match="no effect was yielded: 5; expected an effect; yield"
    ):
        yields_nonsense(stub_lm(), q="?")
    with pytest.raises(
        lmopt.SignatureError, match="returned no fields: None; expected a mapping; return"
    ):
        returns_nothing(stub_lm(), q="?")
    with pytest.raises(
        AttributeError, match="no such step: 'b'; expected one of a; name it in program"
    ):
        misnames(stub_lm(), q="?")
    assert takes_anything(stub_lm(), q="?") == {"q": "?", "one": 1}


def test_an_example_cannot_slip_in_through_stars():
    with pytest.raises(lmopt.SignatureError, match="a parameter without a name"):

        @program()
        def body(steps, **inputs):
            yield invoke(len, "")


def test_preview_shows_the_exact_messages():
    qa = predict("question -> answer")
    sent = []
    qa(lambda request: sent.append(request) or stub_lm()(request), question="2+2?")
    assert preview(qa, question="2+2?") == sent[0].messages
    assert preview(outer, question="?") == preview(multihop.steps.hop, question="?", notes=[])


def test_preview_of_what_cannot_be_shown():
    @program(a=predict("q -> a"))
    def calls_first(steps, q):
        yield invoke(search, q)

    @program()
    def does_nothing(steps, q):
        return {"q": q}
        yield

    for one in (calls_first, does_nothing):
        with pytest.raises(
            DataError, match="no LM request to show: .*; expected a request first; preview"
        ):
            preview(one, q="?")


def test_repr_names_inputs_and_prompts():
    assert repr(multihop) == "<program multihop(question, hops) with prompts for hop, answer>"


def test_texts_replace_descriptions():
    qa = predict("question -> answer").with_params(
        {"predict": Prompt(texts={"answer": "one word"})}
    )
    assert "1. `answer` (str): one word" in preview(qa, question="?")[0].content


def test_a_step_can_be_caught_by_the_body():
    @program(a=predict("q -> n: int", retries=0), b=predict("q -> n: int"))
    def careful(steps, q):
        try:
            return (yield steps.a(q=q))
        except lmopt.ParseError as error:
            assert error.response.text == "no number"
            return (yield steps.b(q=q))

    prediction = careful(scripted_lm(["no number", {"n": 5}]), q="?")
    assert prediction.n == 5
    assert [(e.path, e.kind, bool(e.error)) for e in prediction.trace] == [
        ("a", "lm", False),
        ("a", "step", True),
        ("b", "lm", False),
        ("b", "step", False),
        ("", "step", False),
    ]


def test_a_program_of_a_module_pickles_by_its_name_with_its_parameters():
    changed = outer.with_params({"rag.hop": Prompt("changed", settings={"temperature": 0.5})})
    again = pickle.loads(pickle.dumps(changed))
    assert again.params == changed.params != outer.params
    assert again.body is outer.body and again.steps.rag.body is multihop.body
    assert again(stub_lm(), question="?").trace == changed(stub_lm(), question="?").trace
    assert pickle.loads(pickle.dumps(again)).params == changed.params


def test_a_program_inside_a_function_says_where_to_define_it():
    @program(a=predict("q -> a"))
    def inside(steps, q):
        return (yield steps.a(q=q))

    renamed = program(a=predict("q -> a"))(multihop.body)  # its name is that of another program
    for task in (inside, inside.with_params(inside.params), lmopt.parallel(x=inside)):
        with pytest.raises(
            DataError,
            match="this program cannot be sent elsewhere: .*inside'; expected a name of a module; "
            "define it at the top level of a module, or in a function decorated with @factory",
        ):
            pickle.loads(pickle.dumps(task))
    with pytest.raises(lmopt.LmoptError):
        pickle.loads(pickle.dumps(renamed))


def inside_a_function():
    @program(a=predict("q -> a"))
    def inside(steps, q):
        return (yield steps.a(q=q))

    return inside


def test_a_program_that_cannot_be_sent_says_so_before_it_is_sent():
    for task in (inside_a_function(), lmopt.parallel(x=inside_a_function())):
        with pytest.raises(DataError, match="define it at the top level of a module"):
            pickle.dumps(task)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(DataError, match="define it at the top level of a module"):
            lmopt.run_many(inside_a_function(), stub_lm(), [{"q": "?"}], executor=pool)
        made = lmopt.run_many(predict("q -> a"), stub_lm(), [{"q": "?"}], executor=pool)
        assert made[0].a == "text"


def half(inputs, made):
    return 0.5


@program(a=predict("q -> a"))
def rebound(steps, q):
    return (yield steps.a(q=q))


rebound = lmopt.best_of_n(rebound, 2, half)  # its name now stands for the outer program


def test_a_program_whose_name_stands_for_another_says_so_in_words():
    with pytest.raises(DataError, match="this program cannot be sent elsewhere: 'rebound'"):
        pickle.dumps(rebound)


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"max_calls": 9}, {"inputs": (lmopt.Field("a", int),)}]
)
def test_a_program_that_was_evolved_says_that_it_cannot_be_sent(changes):
    with pytest.raises(DataError, match="cannot be sent elsewhere: .*by with_params only"):
        pickle.dumps(evolve(predict("q -> a"), **changes))


def test_the_annotations_of_a_body_are_the_types_of_its_inputs():
    @program(outputs=["n"])
    def double(steps, count: int, note="") -> lmopt.Flow:
        yield lmopt.Sleep(0)
        return {"n": 2 * count}

    assert [(one.name, one.type) for one in double.inputs] == [("count", int), ("note", str)]
    rows = [{"count": "3", "n": 6}]
    assert lmopt.evaluate(double, rows, lmopt.exact_match, lm=lmopt.stub_lm()).score == 1.0

    @program()
    def of_a_checker(steps: "Nowhere", a: "Nowhere"):  # noqa: F821
        yield lmopt.Sleep(0)

    assert [one.type for one in of_a_checker.inputs] == [str]


@pytest.mark.parametrize(
    "make",
    [
        lambda one: lmopt.majority(one, 3),
        lambda one: lmopt.best_of_n(one, 2, lambda *_: 1),
        lambda one: lmopt.refine(one, 2, lambda *_: 1),
        lambda one: lmopt.each(one, "q"),
    ],
)
def test_a_module_around_a_program_refuses_what_is_none(make):
    with pytest.raises(
        lmopt.SignatureError, match="this is no program: 'q -> a'; .*; make one: predict"
    ):
        make("q -> a")
