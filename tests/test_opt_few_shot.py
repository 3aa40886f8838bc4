"""Few-shot optimizers: what they do, with the originals' defects as tests that ours lack them."""

import pytest

import lmopt
import lmopt_optimizers as opt
from lmopt import Prompt, Record, evaluate, exact_match, mock_lm, predict, program, stub_lm, toy_lm
from lmopt_optimizers import bootstrap, bootstrap_few_shot, labeled_few_shot, random_search, split

qa = predict("question -> answer")
ROWS = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(12)]


def adds(inputs):
    """Right for even numbers."""
    n = int(inputs.question.split()[0])
    return {"answer": str(n + 1 if n % 2 == 0 else 0)}


def test_labelled_examples_are_spread_over_their_labels():
    task = predict("text -> label")
    rows = [{"text": str(n), "label": "rare" if n == 7 else "common"} for n in range(50)]
    demos = labeled_few_shot(k=2)(task, rows, exact_match)["predict"].demos
    assert {demo.label for demo in demos} == {"rare", "common"}
    assert len(labeled_few_shot(k=99)(task, rows, exact_match)["predict"].demos) == 50
    assert labeled_few_shot(k=0)(task, rows, exact_match)["predict"].demos == ()
    assert labeled_few_shot(k=2, seed=1)(task, rows, exact_match) != labeled_few_shot(k=2)(
        task, rows, exact_match
    )


def test_bootstrapping_takes_runs_that_went_well_and_fills_up_with_labels():
    demos = bootstrap_few_shot(mock_lm(adds), max_bootstrapped=3, max_labeled=5)(
        qa, ROWS, exact_match
    )["predict"].demos
    assert [demo.answer for demo in demos[:3]] == ["1", "3", "5"]
    assert len(demos) == 5 and len({demo.question for demo in demos}) == 5
    assert all(int(demo.answer) == int(demo.question.split()[0]) + 1 for demo in demos)


def test_without_bootstrapping_it_labels_and_asks_nothing():
    search = bootstrap_few_shot(lambda request: pytest.fail("asked"), max_bootstrapped=0)
    trials = list(search.trials(qa, ROWS, exact_match))
    assert [(one.note, one.calls) for one in trials] == [
        ("start", 0),
        ("up to 12 labelled examples", 0),
    ]
    assert trials[1].params["predict"].demos


def test_it_stops_when_it_has_enough_and_wastes_no_run():
    asked = []

    def lm(request):
        asked.append(request.inputs.question)
        return mock_lm(adds)(request)

    trials = list(
        bootstrap_few_shot(lm, max_bootstrapped=2, max_labeled=0).trials(qa, ROWS, exact_match)
    )
    assert asked == ["0 + 1?", "1 + 1?", "2 + 1?"]
    assert [trial.note for trial in trials] == [
        "start",
        "1 of 2 runs reached the threshold",
        "2 of 3 runs reached the threshold",
    ]
    assert [trial.calls for trial in trials] == [0, 2, 3]
    assert [len(trial.params["predict"].demos) for trial in trials] == [0, 1, 2]


def test_errors_are_counted_and_shown():
    def look(question):
        if question.startswith("1 "):
            raise RuntimeError("tool broke")

    @program(ask=qa)
    def task(steps, question):
        yield lmopt.invoke(look, question)
        return (yield steps.ask(question=question))

    search = bootstrap_few_shot(mock_lm(adds), max_bootstrapped=2, max_labeled=0)
    trial = list(search.trials(task, ROWS, exact_match))[-1]
    assert (
        trial.note
        == "2 of 3 runs reached the threshold; 1 failed (first: RuntimeError: tool broke)"
    )


def test_the_teacher_never_sees_the_answer_it_is_asked_for():
    def lm(request):
        shown = "".join(one.content for one in request.messages[:-1])
        assert f"\n{request.inputs.question}" not in shown and shown.count("+ 1?") >= 5
        return mock_lm(adds)(request)

    twice = [*ROWS, *ROWS]
    bootstrap_few_shot(lm, max_bootstrapped=6)(qa, twice, exact_match)
    trained = qa.with_params(labeled_few_shot(k=12)(qa, ROWS, exact_match))
    bootstrap_few_shot(lm, max_bootstrapped=6)(trained, ROWS, exact_match)
    assert len(trained.params["predict"].demos) == 12  # nothing was taken from the program itself


def test_the_teacher_is_whole_again_after_an_error():
    """Appendix D, 7: a demonstration was taken from the teacher and never given back."""
    teacher = qa.with_params(labeled_few_shot(k=12)(qa, ROWS, exact_match))
    params = teacher.params
    with pytest.raises(lmopt.Unauthorized):
        bootstrap_few_shot(lmopt.scripted_lm([lmopt.Unauthorized("no")]), teacher=teacher)(
            qa, ROWS, exact_match
        )
    assert teacher.params == params


@pytest.mark.parametrize(("threshold", "taken"), [(0, 4), (0.5, 2), (1.0, 0)])
def test_a_threshold_of_zero_is_a_threshold(threshold, taken):
    """Appendix D, 7: metric_threshold=0 was ignored."""
    rows, lm = ROWS[:4], stub_lm()
    grades = iter([0.0, 0.5, 0.7, 0.0])
    made = bootstrap_few_shot(lm, max_labeled=0, threshold=threshold)(
        qa, rows, lambda e, p: next(grades)
    )
    assert len(made["predict"].demos) == taken


def test_the_settings_of_the_program_stay():
    """Appendix D, 7: the LM was dropped by the reset."""
    task = qa.with_params({"predict": Prompt("Add.", model="mine", settings={"temperature": 0.1})})
    for optimizer in (
        labeled_few_shot(),
        bootstrap_few_shot(mock_lm(adds)),
        random_search(mock_lm(adds), candidates=1),
    ):
        made = optimizer(task, ROWS, exact_match)["predict"]
        assert (made.model, made.settings, made.instructions) == (
            "mine",
            {"temperature": 0.1},
            "Add.",
        )


def test_further_rounds_try_failed_examples_again_with_another_rollout():
    asked = []

    def lm(request):
        asked.append((request.inputs.question, request.rollout, request.temperature))
        return mock_lm(lambda inputs: {"answer": "1"} if request.rollout == 2 else {"answer": "?"})(
            request
        )

    made = bootstrap_few_shot(lm, rounds=3, max_bootstrapped=1, max_labeled=0)(
        qa, ROWS[:2], exact_match
    )
    first, second = ROWS[0]["question"], ROWS[1]["question"]
    assert asked == [
        (first, 0, None),
        (second, 0, None),
        (first, 1, 1.0),
        (second, 1, 1.0),
        (first, 2, 1.0),
    ]
    assert made["predict"].demos == (Record(question=first, answer="1"),)
    assert made["predict"].settings == {}


def test_a_teacher_may_be_another_program_or_other_parameters_with_its_own_lm():
    weak, strong = mock_lm(lambda i: {"answer": "?"}), mock_lm(adds)
    for teacher in (qa, qa.params, predict("question -> reasoning, answer")):
        made = bootstrap_few_shot(weak, teacher=teacher, teacher_lm=strong, max_labeled=0)
        if isinstance(teacher, lmopt.Program) and teacher is not qa:
            continue
        assert len(made(qa, ROWS, exact_match)["predict"].demos) == 4
    with pytest.raises(
        lmopt.ParamsError,
        match=r"a teacher with other steps: \['t'\]; expected the steps predict; give",
    ):
        bootstrap_few_shot(weak, teacher=predict("question -> answer", name="t"))(
            qa, ROWS, exact_match
        )
    with pytest.raises(lmopt.ParamsError, match="no such path: 't'"):
        bootstrap_few_shot(weak, teacher={"t": Prompt()})(qa, ROWS, exact_match)


def test_every_step_of_a_program_gets_demonstrations_of_its_own():
    @program(think=predict("question -> number"), add=predict("number -> answer"))
    def steps_(steps, question):
        thought = yield steps.think(question=question)
        return (yield steps.add(number=thought.number))

    def fields(inputs):
        return (
            {"answer": str(int(inputs.number) + 1)}
            if "number" in inputs
            else {"number": inputs.question.split()[0]}
        )

    made = bootstrap_few_shot(mock_lm(fields), max_bootstrapped=2, max_labeled=0)(
        steps_, ROWS, exact_match
    )
    assert made["think"].demos == (
        {"question": "0 + 1?", "number": "0"},
        {"question": "1 + 1?", "number": "1"},
    )
    assert made["add"].demos == ({"number": "0", "answer": "1"}, {"number": "1", "answer": "2"})


def test_blocks_are_public():
    rows, blocks = tuple(map(Record, ROWS)), []
    flow = bootstrap(qa, rows, wanted=6, max_labeled=0)
    block = next(flow)
    with pytest.raises(StopIteration):
        while True:
            blocks.append(evaluate(qa, block[1], exact_match, lm=mock_lm(adds), params=block[0]))
            block = flow.send(blocks[-1])
    assert [len(block.rows) for block in blocks] == [6, 3, 1, 1]
    assert sum(row.score for block in blocks for row in block.rows) == 6


animals = predict("animal -> sound")
ZOO = [
    {"animal": f"{a} {n}", "sound": s}
    for n in range(20)
    for a, s in (("dog", "woof"), ("cat", "meow"))
]


def test_random_search_never_mixes_rows_that_teach_with_rows_that_score():
    trials = list(random_search(toy_lm(), candidates=3).trials(animals, ZOO, exact_match))
    val = {row.example for row in trials[0].evaluation.rows}
    assert len(val) == 20
    assert not {demo for trial in trials for demo in trial.params["predict"].demos} & val


def test_rows_of_its_own_may_be_given():
    train, val = split(map(Record, ZOO), share=0.7)
    trials = list(
        random_search(toy_lm(), candidates=1, valset=val).trials(animals, train, exact_match)
    )
    assert tuple(row.example for row in trials[0].evaluation.rows) == val
    with pytest.raises(
        lmopt.DataError, match="1 rows are in both trainset and valset: .*; take them"
    ):
        random_search(toy_lm(), valset=[*val, train[0]])(animals, train, exact_match)
    with pytest.raises(
        lmopt.DataError, match=r"an empty valset: \[\]; expected rows of its own; .*leave"
    ):
        random_search(toy_lm(), valset=[])(animals, train, exact_match)


def test_equal_candidates_are_scored_once_and_losers_stop_early():
    rows = [
        {"animal": f"{a} {n}", "sound": s}
        for n in range(64)
        for a, s in (("dog", "woof"), ("cat", "meow"))
    ]
    search = random_search(toy_lm(), candidates=12, max_bootstrapped=0, max_labeled=1)
    trials = list(search.trials(animals, rows, lambda e, p: e.sound == p.sound == "woof"))
    digests = [trial.params.digest for trial in trials]
    assert len(set(digests)) == len(digests)
    short = [trial for trial in trials if len(trial.evaluation.rows) < 64]
    assert short and all("; out after" in trial.note for trial in short)


def test_it_stops_at_the_score_that_is_asked_for():
    trials = list(random_search(toy_lm(), stop_at=0.9).trials(animals, ZOO, exact_match))
    assert [trial.score for trial in trials] == [0.0, 1.0, 1.0]


def test_trials_are_lazy():
    asked = []
    trials = random_search(lambda r: asked.append(r) or toy_lm()(r), candidates=3).trials(
        animals, ZOO, exact_match
    )
    assert asked == []
    next(trials)
    assert len(asked) == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: labeled_few_shot(k=-1), "k is too small: -1; expected 0 or more; raise k"),
        (
            lambda: bootstrap_few_shot(toy_lm(), max_bootstrapped=-1),
            "max_bootstrapped is too small",
        ),
        (lambda: bootstrap_few_shot(toy_lm(), max_labeled=-1), "max_labeled is too small"),
        (
            lambda: bootstrap_few_shot(toy_lm(), rounds=0),
            "rounds is too small: 0; expected 1 or more",
        ),
        (lambda: random_search(toy_lm(), candidates=-1), "candidates is too small"),
        (lambda: random_search(toy_lm(), rounds=0), "rounds is too small"),
    ],
)
def test_wrong_options_are_found_when_the_optimizer_is_made(make, message):
    with pytest.raises(lmopt.DataError, match=message):
        make()


def test_an_unknown_option_is_a_type_error_at_once():
    with pytest.raises(TypeError, match="round"):
        random_search(toy_lm(), round=1)


def test_searches_try_as_many_labelled_examples_as_fit_and_fewer():
    rows = [{"q": f"dog {n}", "a": "woof"} for n in range(100)]
    rows += [{"q": f"cat {n}", "a": "meow"} for n in range(100)]
    task = predict("q -> a")

    def counts(**options):
        search = random_search(toy_lm(), candidates=0, max_bootstrapped=0, **options)
        trials = search.trials(task, rows, exact_match)
        return [len(trial.params["predict"].demos) for trial in trials]

    assert counts() == [0, 100, 16, 4]
    assert counts(max_labeled=16) == [0, 16, 4]
    assert counts(max_labeled=0) == [0]
    few = counts(max_prompt_tokens=500)
    assert 8 < few[1] < 32 and few[2:] == [4]
    assert len(bootstrap_few_shot(toy_lm())(task, rows, exact_match)["predict"].demos) == 200


def test_a_prompt_without_room_has_no_demonstrations():
    rows = tuple(lmopt.Record(q="a" * 1000, a="b") for _ in range(5))
    assert opt.fitting_count(predict("q -> a"), rows, 10) == 0
    assert opt.fitting_count(predict("q -> a"), (), 10) == 0
    assert opt.fitting_count(predict("q -> a"), rows, 10_000) == 5


def test_a_label_that_is_missing_makes_no_demonstration():
    rows = [{"q": "a", "n": None}, {"q": "b", "n": ""}, {"q": "c", "n": "3"}, {"q": "d"}]
    demos = labeled_few_shot()(predict("q -> n: int"), rows, exact_match)["predict"].demos
    assert demos == ({"q": "c", "n": 3},)
    task = predict("q -> n: int | None")
    assert len(labeled_few_shot()(task, rows, exact_match)["predict"].demos) == 2
