"""`auto`: one budget spent on whatever helps; and what it has in common with the other searches."""

import re
import warnings

import pytest
from programs import WORDS, about

import lmopt
from lmopt import (
    Record,
    chain_of_thought,
    evaluate,
    exact_match,
    mock_lm,
    predict,
    program,
    text,
    toy_lm,
)
from lmopt_optimizers import (
    Hunt,
    auto,
    best,
    best_of,
    bootstrap_few_shot,
    chain,
    copro,
    finetune,
    gepa,
    if_better,
    infer_rules,
    labeled_few_shot,
    limit,
    proposer,
    random_search,
    simba,
    tune,
)

ROWS = about(20)
TASK = predict("text -> kind", instructions="Say what it is about.")


@pytest.mark.parametrize("calls", [30, 50, 100, 300])
def test_it_is_not_below_labelled_examples_however_few_calls_it_has(calls):
    train, held = ROWS[:80], ROWS[80:]
    known = labeled_few_shot(k=80)(TASK, train, exact_match)
    found = auto(toy_lm(), calls=calls)(TASK, train, exact_match)
    ours, theirs = (
        evaluate(TASK, held, exact_match, lm=toy_lm(), params=one).score for one in (found, known)
    )
    assert ours >= theirs == 1.0


def test_the_last_word_is_scored_on_rows_that_it_was_not_picked_on():
    trials = list(auto(toy_lm(), calls=300).trials(TASK, ROWS, exact_match))
    picked = {row.example for one in trials[:-1] for row in one.evaluation.rows}
    last = trials[-1]
    assert last.final and best(trials) is last
    assert len(last.evaluation.rows) == 7 and not picked & {r.example for r in last.evaluation.rows}
    assert re.search(
        r"; scored on 7 rows it was not picked on; \+1.000 against the start, p = 1.46e-11",
        last.note,
    )
    assert [one.calls for one in trials] == sorted(one.calls for one in trials)
    assert last.calls <= 300


def test_at_last_the_demonstrations_come_from_all_rows():
    trials = list(auto(toy_lm(), calls=100).trials(TASK, ROWS, exact_match))
    val = {row.example for row in trials[0].evaluation.rows}
    assert not val & set(trials[1].params["predict"].demos)
    parent = trials[trials[-1].parent].params["predict"]
    made = trials[-1].params["predict"]
    assert val & set(made.demos) and made.instructions == parent.instructions
    assert len(made.demos) in (len(parent.demos), len(ROWS))
    assert trials[-1].note.endswith("; then demonstrations from all rows, not scored again")
    kept = auto(toy_lm(), calls=100, refit=False)(TASK, ROWS, exact_match)
    assert not val & set(kept["predict"].demos)


def test_the_start_is_kept_where_nothing_is_surely_better():
    trials = list(auto(toy_lm(), calls=200).trials(TASK, ROWS, lambda row, made: 0.5))
    assert trials[-1].params == TASK.params and trials[-1].score == 0.5
    assert "+0.000 against the start, p = 1" in trials[-1].note


def test_a_run_costs_no_more_than_is_allowed():
    free = list(auto(toy_lm(), calls=200).trials(TASK, ROWS, exact_match))
    assert free[1].tokens > 300
    search = auto(toy_lm(), calls=200, max_tokens_per_run=300, refit=False)
    trials = list(search.trials(TASK, ROWS, exact_match))
    dear = [one for one in trials if one.tokens > 300]
    assert all(one.out and "tokens a run" in one.note for one in dear)
    assert best(trials).tokens <= 300 and best(trials).score > 0.5
    wordy = copro(toy_lm(), breadth=1, depth=1, max_labeled=0, max_tokens_per_run=80)
    last = list(wordy.trials(TASK, ROWS, exact_match))[-1]
    assert last.out and re.search(r"out with \d+ tokens a run", last.note)


def test_settings_are_tried_where_there_is_something_to_choose():
    def lm(request):  # it knows nothing but when it is cold
        right = request.temperature == 0.1 and next(
            kind for kind, words in WORDS.items() if any(w in request.inputs.text for w in words)
        )
        return mock_lm(lambda inputs: {"kind": right or "?"})(request)

    space = {"temperature": [0.1, 0.9]}
    search = auto(lm, calls=300, space=space, propose=lambda given: "Guess.")
    made = search(TASK, ROWS, exact_match)["predict"]
    assert made.settings == {"temperature": 0.1}
    with pytest.raises(lmopt.DataError, match="nothing to choose from"):
        auto(lm, space={"temperature": []})


def test_runs_that_went_well_are_shown_where_they_show_more_than_labels_do():
    def lm(request):
        kind = next(
            kind for kind, words in WORDS.items() if any(w in request.inputs.text for w in words)
        )
        hint = any("step by step" in one.text for one in request.messages[1:-1])
        said = {"reasoning": "I think step by step.", "kind": kind if hint else "animal"}
        return mock_lm(lambda inputs: said)(request)

    task = chain_of_thought("text -> kind")
    search = auto(lm, calls=300, propose=lambda given: "Think.")
    made = search(task, ROWS, exact_match)
    (prompt,) = made.values()
    assert any("reasoning" in demo for demo in prompt.demos)
    assert evaluate(task, ROWS[:30], exact_match, lm=lm, params=made).score == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 10, 40])
@pytest.mark.parametrize("make", [auto, copro, gepa, random_search, infer_rules, simba])
def test_few_rows_are_enough(make, size):
    rows = ROWS[:size]
    if len({row.kind for row in rows}) < 1:
        return
    search = make(toy_lm(), calls=120)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trials = list(search.trials(TASK, rows, exact_match))
    found = best(trials)
    assert trials[0].note == "start" and found.score >= trials[0].score
    assert not any("labelled" in one.note and one.calls == 0 for one in trials)


# -- a text that asks no LM --


@program(pattern=text("[0-9]+"))
def find_date(steps, letter):
    pattern = yield steps.pattern()
    found = re.search(pattern.text, letter)
    return {"date": found[0] if found else ""}


LETTERS = [
    {
        "letter": f"No. {n}: we met on 20{n}-0{n % 9 + 1}-11 in town.",
        "date": f"20{n}-0{n % 9 + 1}-11",
    }
    for n in range(10, 34)
]


def told(example, made):
    right = example["date"] == made.date
    return lmopt.Score(float(right), "" if right else f"found {made.date!r}, not a whole date")


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: gepa(toy_lm(), max_runs=100, **o),
        lambda **o: copro(toy_lm(), breadth=1, depth=2, **o),
        lambda **o: auto(toy_lm(), calls=60, **o),
    ],
)
def test_any_text_of_a_program_is_improved_by_feedback(make):
    asked = []

    def writes(given):
        asked.append(given)
        return r"\d{4}-\d\d-\d\d" if "not a whole date" in str(given.cases) else "x"

    search = make(propose=writes)
    params = search(find_date, LETTERS, told)
    assert params["pattern"].instructions == r"\d{4}-\d\d-\d\d" and not params["pattern"].demos
    assert asked[0].current == "[0-9]+" and asked[0].step == "pattern"
    plan = search.plan(find_date, LETTERS)
    assert plan.runs > 0


def test_a_text_is_a_step_like_any_other():
    made = text("SELECT 1", name="query")
    assert made(None).text == "SELECT 1" and made.max_calls == 0 and list(made.params) == ["query"]
    changed = made.with_params(made.params.replace("query", instructions="SELECT 2"))
    ran = changed(toy_lm())
    assert ran.text == "SELECT 2" and [event.kind for event in ran.trace] == ["step"]
    assert lmopt.loads(lmopt.dumps(changed.params)) == changed.params
    rows = [{"text": "SELECT 3"}]
    assert not labeled_few_shot()(made, rows, exact_match)["query"].demos


# -- what all searches share --


def test_each_proposal_has_evidence_of_its_own():
    asked = []

    def writes(given):
        asked.append([case["inputs"]["text"] for case in given.cases])
        return f"Text {len(asked)}."

    list(
        copro(toy_lm(), breadth=3, depth=1, shown=6, propose=writes).trials(TASK, ROWS, exact_match)
    )
    assert [len(one) for one in asked] == [6, 6, 6] and len({frozenset(one) for one in asked}) == 3


def test_evidence_is_mostly_failures_spread_over_what_was_expected():
    hunt = Hunt(TASK, tuple(ROWS), tuple(ROWS), exact_match, toy_lm())
    params = TASK.params.replace(
        "predict", instructions='If the text mentions "horse" or "tiger", answer "animal".'
    )
    lmopt.drive(hunt.start().flow(), toy_lm())
    flow = hunt.cases("predict", 12, params=params, count=4).flow()
    for drawn in lmopt.drive(flow, toy_lm()):
        scores = [case["score"] for case in drawn]
        kinds = [case["expected"]["kind"] for case in drawn]
        assert scores == [0.0] * 9 + [1.0] * 3
        assert {kinds.count("plant"), kinds.count("metal")} == {4, 5}


def test_cases_fill_their_share_of_the_prompt_and_no_more():
    asked = []

    def writes(given):
        asked.append(given.cases)
        return "x"

    rows = [Record(text=f"{n} " + "long " * 100, kind=str(n)) for n in range(40)]
    search = copro(toy_lm(), breadth=1, depth=1, shown=20, propose=writes, max_prompt_tokens=2000)
    list(search.trials(TASK, rows, exact_match))
    assert 1 < len(asked[0]) < 8 and len(lmopt.canonical(asked[0])) < 4200


def test_a_program_is_described_as_the_candidate_that_is_changed():
    asked = []

    def writes(given):
        asked.append(given)
        return f"Text {len(asked)}."

    list(gepa(toy_lm(), max_runs=400, minibatch=4, propose=writes).trials(TASK, ROWS, exact_match))
    list(simba(toy_lm(), steps=2, propose=writes).trials(TASK, ROWS, exact_match))
    assert asked and all(given.current in given.program for given in asked)


def test_what_others_have_found_is_offered():
    asked = []

    def writes(given):
        asked.append(given)
        return f"{given.current}\nFact {len(asked)}."

    list(copro(toy_lm(), breadth=2, depth=3, propose=writes).trials(TASK, ROWS, exact_match))
    shown = [one["instructions"] for one in asked[-1].attempts]
    assert any("Fact 1." in one for one in shown) and len(shown) <= 10


def test_two_that_have_changed_the_same_step_are_joined_by_the_writer():
    rows = [
        Record(text=f"{a} {n}", kind=k) for n in range(30) for a, k in (("ox", "o"), ("elm", "e"))
    ]
    rules = {
        "o": 'If the text mentions "ox", answer "o".',
        "e": 'If it mentions "elm", answer "e".',
    }
    asked = []

    def writes(given):
        asked.append(given)
        if given.tip.startswith("Join the instructions with these"):
            return f"{given.current}\n{given.tip.partition(': ')[2]}"
        return rules["oe"[len(asked) % 2]]

    search = gepa(toy_lm(), max_runs=900, minibatch=6, max_labeled=0, propose=writes)
    trials = list(search.trials(TASK, rows, exact_match))
    joined = [one for one in trials if one.note.startswith("merged from")]
    assert joined and joined[0].score == 1.0
    assert all(rule in joined[0].params["predict"].instructions for rule in rules.values())


def test_rules_are_tried_without_demonstrations_and_with():
    search = infer_rules(toy_lm(), candidates=1, propose=lambda given: "Rule 1.")
    trials = list(search.trials(TASK, ROWS, exact_match))
    ruled = {
        len(one.params["predict"].demos) > 0
        for one in trials
        if one.params["predict"].instructions == "Rule 1."
    }
    assert ruled == {True, False}


def test_in_a_chain_what_was_found_is_not_wiped():
    shown = labeled_few_shot(k=24)(TASK, ROWS, exact_match)
    task = TASK.with_params(shown)
    for make in (infer_rules, copro, simba, gepa, random_search):
        options = {"max_bootstrapped": 0} if make in (infer_rules, random_search) else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search = make(toy_lm(), max_labeled=0, calls=250, **options)
            trials = list(search.trials(task, ROWS, exact_match))
        kept = [len(one.params["predict"].demos) for one in trials]
        assert set(kept) <= {24, 0} and len(best(trials).params["predict"].demos) == 24


def test_what_is_not_scored_never_takes_the_place_of_what_is():
    teacher = mock_lm(lambda inputs: {"kind": "animal"})
    wrong = bootstrap_few_shot(toy_lm(), teacher_lm=teacher, threshold=0, max_bootstrapped=8,
                               max_labeled=8)  # fmt: skip
    found = random_search(toy_lm(), candidates=0)
    trials = list(chain(found, wrong).trials(TASK, ROWS, exact_match))
    assert trials[-1].note.endswith("; scored") and trials[-1].score < 1.0
    assert best(trials).score == 1.0
    assert chain(found, wrong)(TASK, ROWS, exact_match) == found(TASK, ROWS, exact_match)


def test_a_chain_ends_with_its_calls():
    both = chain(random_search(toy_lm()), copro(toy_lm()), calls=300)
    with pytest.warns(UserWarning, match="used its calls"):
        trials = list(both.trials(TASK, ROWS, exact_match))
    assert 290 < trials[-1].calls <= 300 and both.plan(TASK, ROWS).calls == 300


# -- what a reviewer found --


def test_after_a_last_word_a_later_part_of_a_chain_can_win():
    first = auto(toy_lm(), calls=60, max_labeled=0, max_bootstrapped=0, propose=lambda given: "hm")
    both = chain(first, random_search(toy_lm(), candidates=1))
    trials = list(both.trials(TASK, ROWS, exact_match))
    assert best(trials).score == 1.0 and both(TASK, ROWS, exact_match)["predict"].demos


@pytest.mark.filterwarnings("ignore:the search was ended")
def test_the_verdict_of_a_part_stands_where_the_next_one_has_too_few_calls():
    first = auto(toy_lm(), calls=200, refit=False)
    for calls in (205, 215):
        trials = list(chain(first, copro(toy_lm()), calls=calls).trials(TASK, ROWS, exact_match))
        assert trials[-1].final and trials[-1].params == first(TASK, ROWS, exact_match)


PIPE = lmopt.pipeline(x=predict("q -> t"), y=predict("t -> a"))
SECRETS = [Record(q=c, t=c.upper(), a=f"secret {n}") for n, c in enumerate("abcdefghijkl")]


def copies(request):
    """An LM that copies the demonstration with its input, and knows nothing else."""
    turns = request.messages
    for given, made in zip(turns[1:-1:2], turns[2:-1:2], strict=False):
        if "t" in request.inputs and lmopt.sections(given.text).get("t") == request.inputs["t"]:
            return lmopt.Response(made.text)
    return mock_lm(lambda i: {"t": i.q.upper()} if "q" in i else {"a": "?"})(request)


def test_a_later_step_is_not_shown_the_answer_of_its_row_either():
    shown = PIPE.with_params(labeled_few_shot(k=12)(PIPE, SECRETS, exact_match))
    search = tune(copies, {"demos": [0, 12]})
    assert {one.score for one in search.trials(PIPE, SECRETS, exact_match)} == {0.0}
    assert next(iter(search.trials(shown, SECRETS, exact_match))).score == 0.0


def test_demonstrations_of_ones_own_stay_where_they_are_to_be_left_alone():
    def obeys(request):
        kinds = {word: kind for kind, words in WORDS.items() for word in words}
        word = request.inputs["text"].split()[3] if "text" in request.inputs else ""
        good = "GOOD" in request.messages[0].text
        return mock_lm(lambda inputs: {"kind": kinds.get(word, "?") if good else "?"})(request)

    own = [Record(text=f"the ox {n}", kind="ox") for n in range(5)]
    for demos in (ROWS[:3], [*own, *ROWS[:1]]):
        task = TASK.with_params({"predict": lmopt.Prompt("Classify.", demos=demos)})
        for options in ({"max_labeled": 0, "max_bootstrapped": 0}, {"max_labeled": 2}):
            search = auto(obeys, calls=300, propose=lambda given: "GOOD", **options)
            made = search(task, ROWS, exact_match)["predict"]
            assert made.instructions == "GOOD"
            assert len(made.demos) == len(demos) or options["max_labeled"]


@pytest.mark.filterwarnings("ignore:the search was ended")
@pytest.mark.parametrize(
    "make",
    [
        lambda: if_better(auto(toy_lm()), lm=toy_lm(), calls=400),
        lambda: best_of(auto(toy_lm()), copro(toy_lm()), lm=toy_lm(), calls=600),
        lambda: limit(best_of(auto(toy_lm()), lm=toy_lm()), calls=400),
    ],
)
def test_what_is_inside_leaves_the_calls_to_score_it(make):
    search = make()
    trials = list(search.trials(TASK, ROWS, exact_match))
    assert best(trials).score == 1.0 and trials[-1].calls <= search.options.calls


def test_the_parts_of_a_chain_have_its_options():
    val = [Record(text=f"this is about gold number {n}", kind="metal") for n in range(5)]
    asked = []

    def writes(given):
        asked.append(given)
        return "x"

    part = copro(toy_lm(), breadth=1, depth=1)
    search = chain(part, valset=val, propose=writes, max_labeled=0, max_tokens_per_run=1)
    with pytest.warns(UserWarning, match="a run of the start takes .* tokens, more than 1, which"):
        trials = list(search.trials(TASK, ROWS, exact_match))
    assert {row.example for row in trials[0].evaluation.rows} == set(val)
    assert asked and all(one.out for one in trials[1:])


def fails_once(which):
    left = [1]

    def lm(request):
        if left[0] and which(request):
            left[0] = 0
            raise lmopt.LMError("busy", retryable=True)
        return toy_lm()(request)

    return lm


@pytest.mark.filterwarnings("ignore:gepa ended")
@pytest.mark.parametrize("make", [gepa, simba, copro])
def test_one_request_that_is_not_answered_ends_no_search(make):
    few = {"max_runs": 300} if make is gepa else {"steps": 1} if make is simba else {"depth": 1}
    search = make(fails_once(lambda one: one.step == "propose"), max_labeled=0, **few)
    trials = list(search.trials(TASK, ROWS, exact_match))
    assert trials and trials[0].score is not None


def test_one_row_that_is_not_answered_ends_no_bootstrapping():
    search = bootstrap_few_shot(
        fails_once(lambda one: "number 0" in one.inputs["text"]), max_bootstrapped=1, threshold=0
    )
    assert search(TASK, ROWS, exact_match)["predict"].demos

    def down(request):
        raise lmopt.LMError("down", retryable=True)

    with pytest.raises(lmopt.LMError, match="down"):
        bootstrap_few_shot(down, max_bootstrapped=1, threshold=0)(TASK, ROWS, exact_match)


def test_the_test_on_other_rows_is_made_although_replies_cannot_be_read():
    def unreadable(request):
        hidden = lmopt.seeded(0, request.key).random() < 0.15
        return lmopt.Response("") if hidden else toy_lm()(request)

    trials = list(auto(unreadable, calls=400).trials(TASK, ROWS, exact_match))
    assert "rows it was not picked on" in trials[-1].note and trials[-1].calls <= 400


def test_a_data_frame_may_be_what_is_scored_on():
    class Frame:
        columns = ("text", "kind")

        def to_dict(self, kind):
            assert kind == "records"
            return [{"text": "this is about gold", "kind": "metal"}]

    search = copro(toy_lm(), breadth=1, depth=1, valset=Frame())
    assert len(next(iter(search.trials(TASK, ROWS, exact_match))).evaluation.rows) == 1


def test_a_writer_that_writes_nothing_is_not_taken_at_its_word():
    for nothing in (None, "", "```\n```"):
        search = copro(
            toy_lm(), breadth=1, depth=1, max_labeled=0, propose=lambda given, it=nothing: it
        )
        with pytest.warns(UserWarning, match=r"1 proposed texts could not be used .*an empty text"):
            assert len(list(search.trials(TASK, ROWS, exact_match))) == 1
    for wrong in (5, ["a"]):
        search = copro(toy_lm(), propose=lambda given, it=wrong: it)
        with pytest.raises(lmopt.DataError, match="propose wrote no text"):
            search(TASK, ROWS, exact_match)
    with pytest.raises(lmopt.DataError, match="this writes nothing: 'hello'"):
        copro(toy_lm(), propose="hello")


def test_a_text_step_has_no_demonstrations():
    @program(policy=text("be brief"), tell=predict("text, policy -> kind"))
    def task(steps, text):
        policy = yield steps.policy()
        return (yield steps.tell(text=text, policy=policy.text))

    for search in (bootstrap_few_shot(toy_lm(), threshold=0), auto(toy_lm(), calls=150)):
        assert not search(task, ROWS, exact_match)["policy"].demos


def test_what_is_no_optimizer_is_named():
    def plain(program, trainset, metric):
        return program.params

    for make in (
        chain,
        lambda one: best_of(one, lm=toy_lm()),
        lambda one: if_better(one, lm=toy_lm()),
    ):
        with pytest.raises(
            TypeError, match="this is no Optimizer: .*; expected an Optimizer; call"
        ):
            make(plain)
    with pytest.raises(lmopt.DataError, match="no trials"):
        best([])
    with pytest.raises(lmopt.DataError, match=r"calls is no whole number: 2.5"):
        copro(toy_lm(), calls=2.5)
    with pytest.raises(TypeError, match="gepa has no option of this name: 'teacher'") as caught:
        gepa(toy_lm(), teacher=3)
    assert "threshold" not in str(caught.value)
    with pytest.raises(TypeError, match="if_better has no option .*: 'levl'; .*did you mean level"):
        if_better(labeled_few_shot(), lm=toy_lm(), levl=0.1, sed=3)
    with pytest.raises(TypeError, match="finetune has no option of this name: 'rounds'"):
        finetune(None, lm=toy_lm(), rounds=2)
    with pytest.raises(lmopt.ParamsError, match="unknown setting: 'b'"):
        tune(toy_lm(), {"b": [1], "a": [2], "demos": [3]})


def test_images_reach_the_proposer_as_images_or_where_it_takes_none_by_name():
    rows = [
        Record(picture=lmopt.Image(f"data:image/png;base64,{'A' * 4000}{n}"), kind=str(n))
        for n in range(8)
    ]
    sent = []
    task = predict(lmopt.signature("picture: Image -> kind", types={"Image": lmopt.Image}))

    def lm(request, blind=False):
        if request.step == "propose":
            sent.append(request)
            media = [one for one in request.messages if not isinstance(one.content, str)]
            if media and blind:
                raise lmopt.LMError("no images", status=400)
            return lmopt.scripted_lm([{"instructions": "Look."}])(request)
        return mock_lm(lambda inputs: {"kind": "?"})(request)

    for asked in (lm, lambda request: lm(request, blind=True)):
        sent.clear()
        search = copro(asked, breadth=1, depth=1, shown=3, max_labeled=0)
        trials = list(search.trials(task, rows, exact_match))
        assert trials[1].params["predict"].instructions == "Look."
        assert "[image 1]" in sent[-1].messages[-1].text
        assert all("AAAA" not in one.text for request in sent for one in request.messages)
        seen = sent[-1].messages[-1].content[1:] if asked is lm else ()
        assert len(seen) == (3 if asked is lm else 0)


@program(think=predict("q -> thought"), say=predict("thought -> a"))
def two_hops(steps, q):
    made = yield steps.think(q=q)
    return (yield steps.say(thought=made.thought))


def test_lessons_are_those_of_the_best_so_far():
    def lm(request):  # right only where the prompt says "aloud"
        name, given = request.signature.outputs[0].name, request.inputs
        if request.step == "propose":
            text = "Think aloud." if given.step == "think" else "Say."
        else:
            aloud = "aloud" in request.messages[0].text
            text = given.thought if name == "a" else given.q if aloud else "?"
        return lmopt.mock_lm(lambda _: {name: text})(request)

    rows = [{"q": str(n), "a": str(n) if n % 5 else "never"} for n in range(40)]
    trials = list(auto(lm, calls=300).trials(two_hops, rows, exact_match))
    notes = [trial.note for trial in trials]
    assert any(note.startswith("4 of ") for note in notes)
    assert not any(note.startswith("0 of ") for note in notes)


def test_what_the_writer_was_told_is_no_proposal():
    told = proposer().params["propose"].instructions
    lm = mock_lm(lambda given: {"instructions": told} if "cases" in given else {"kind": "?"})
    rows = [{"text": f"{n}", "kind": "a"} for n in range(12)]
    task = predict("text -> kind")
    with pytest.warns(UserWarning, match="what the writer itself was told"):
        made = list(copro(lm, breadth=2, depth=1).trials(task, rows, exact_match))
    assert {trial.params["predict"].instructions for trial in made} == {task.prompt.instructions}
