"""The parts of optimizers: splitting, spreading, demonstrations, racing."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmopt
from lmopt import Prompt, Record, evaluate, exact_match, mock_lm, predict, program, stub_lm
from lmopt_optimizers import labeled, labeled_demos, race, resampled, split, spread, step_demos

rows_ = st.lists(st.integers(0, 30), min_size=2, max_size=40).map(
    lambda ns: [Record(n=n, label=n % 3) for n in ns]
)
qa = predict("question -> answer")


@given(rows_, st.integers(0, 3), st.floats(0, 1))
def test_a_split_parts_what_differs(rows, seed, share):
    if len(set(rows)) < 2:
        with pytest.raises(
            lmopt.DataError, match="too few examples to split: .*; expected two that differ; add"
        ):
            split(rows)
        return
    train, val = split(rows, seed=seed, share=share)
    assert train and val and not set(train) & set(val)
    assert Counter(train + val) == Counter(set(rows))
    assert split(rows, seed=seed, share=share) == (train, val)


def test_another_seed_is_another_split_and_zero_is_a_seed():
    rows = [Record(n=n) for n in range(20)]
    assert len({split(rows, seed=seed) for seed in range(5)}) == 5


@given(rows_, st.integers(0, 12), st.integers(0, 3))
def test_spreading_takes_turns_between_labels(rows, k, seed):
    taken = spread(rows, k, by=["label"], seed=seed)
    assert len(taken) == min(k, len(rows)) and not Counter(taken) - Counter(rows)
    counts = Counter(row.label for row in taken)
    have = Counter(row.label for row in rows)
    for label in have:  # nobody gets two more than another who has some left
        assert all(
            counts[label] >= counts[other] - 1 or counts[label] == have[label] for other in have
        )


@program(think=predict("question -> thought"), answer=predict("question, thought -> answer"))
def two(steps, question):
    first = yield steps.think(question=question)
    second = yield steps.think(question=question + "?")
    return (yield steps.answer(question=question, thought=first.thought + second.thought))


def test_labelled_demos_go_to_the_steps_that_have_their_fields():
    rows = [Record(question="a", answer="b", source="x"), Record(question="c"), Record(answer="d")]
    params = labeled_demos(two, rows, 5)
    assert params["think"].demos == ()
    assert params["answer"].demos == (Record(question="a", answer="b"),)
    assert labeled(predict("-> joke"), [Record(joke="ha")], 5) == (Record(joke="ha"),)
    assert labeled(two, rows, 5) == ()


def test_each_step_may_get_as_many_as_there_are():
    """DSPy drew the demonstrations of a later step from those of the one before (5.2)."""
    rows = [Record(question=f"q{n}", thought=f"t{n}", answer=f"a{n}") for n in range(10)]
    params = labeled_demos(two, rows, 8)
    assert [len(prompt.demos) for prompt in params.values()] == [8, 8]


def test_step_demos_are_what_each_step_did():
    lm = mock_lm(
        lambda i: {"answer": i.thought} if "thought" in i else {"thought": i.question.upper()}
    )
    rows = [lmopt.Row(Record(n=n), two(lm, question="q"), 1.0) for n in range(20)]
    made = [step_demos(two, row, index=index) for index, row in enumerate(rows)]
    assert all(demo["answer"] == Record(question="q", thought="QQ?", answer="QQ?") for demo in made)
    assert {demo["think"].thought for demo in made} == {"Q", "Q?"}
    assert made[0] == step_demos(two, rows[0])


def test_step_demos_leave_out_steps_that_failed():
    lm = lmopt.scripted_lm(["nothing"] * 3)
    row = evaluate(qa, [{"question": "?"}], exact_match, lm=lm).rows[0]
    assert step_demos(qa, row) == {}


def test_resampling_asks_for_another_answer():
    params = qa.with_params({"predict": Prompt(settings={"max_tokens": 5})}).params
    assert resampled(params, 0) == params
    assert resampled(params, 2)["predict"].settings == {
        "max_tokens": 5,
        "rollout": 2,
        "temperature": 1.0,
    }
    requests = {next(qa.with_params(resampled(params, n)).flow(question="?")).key for n in range(3)}
    assert len(requests) == 3


marks = st.lists(st.integers(0, 4), min_size=1, max_size=120)


@given(marks, marks, st.sampled_from([1, 5]))
def test_a_race_is_the_beginning_of_an_evaluation_and_ends_where_it_is_hardly_won(a, b, workers):
    size = min(len(a), len(b))
    rows = [{"question": f"{n}", "answer": ""} for n in range(size)]

    def graded(scores):
        return lambda example, prediction: scores[int(example.question)] / 4

    best = evaluate(qa, rows, graded(a), lm=stub_lm())
    whole = evaluate(qa, rows, graded(b), lm=stub_lm())
    raced = race(qa, rows, graded(b), lm=stub_lm(), beat=best, workers=workers)
    run = len(raced.rows)
    assert raced.rows == whole.rows[:run] and (run == size or run in (16, 32, 64))
    if run < size:
        gains = [
            after.score - before.score for after, before in zip(raced.rows, best.rows, strict=False)
        ]
        room = sum(1 - row.score for row in best.rows[run:])
        far = sum(gains) < -math.sqrt(sum(gain * gain for gain in gains))
        assert far or sum(gains) + room <= 1e-9
    assert race(qa, rows, graded(b), lm=stub_lm()).rows == whole.rows


def test_a_race_stops_as_soon_as_it_is_lost():
    rows = [{"question": f"{n}", "answer": ""} for n in range(800)]
    best = evaluate(qa, rows, lambda e, p: 0.95, lm=stub_lm())
    lost = race(qa, rows, lambda e, p: 0.0, lm=stub_lm(), beat=best)
    assert len(lost.rows) == 16 and lost.score <= best.score
