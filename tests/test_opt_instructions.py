"""Optimizers that write instructions, those of settings, combinators, and their parts."""

import itertools
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
from programs import WORDS, about

import lmopt
from lmopt import (
    DataError,
    ParamsError,
    Prompt,
    Record,
    exact_match,
    predict,
    program,
    seeded,
    toy_lm,
    transcript,
)
from lmopt_optimizers import (
    Hunt,
    Plan,
    Trial,
    _merging,
    _with_demo,
    avatar,
    best_of,
    bootstrap_few_shot,
    cases,
    chain,
    copro,
    description,
    gepa,
    if_better,
    infer_rules,
    knn_few_shot,
    labeled_few_shot,
    limit,
    mipro,
    only,
    optimizer,
    pareto,
    proposer,
    random_search,
    simba,
    tpe,
    tpe_search,
    tune,
)

ROWS = about(8)
TASK = predict("text -> kind", instructions="Say what it is about.")


# -- parts --


def best_found(choose, seed, sizes=(6,) * 5, tries=60):
    """The best of so many tries on a function whose optimum is known to be 1."""
    optimum = tuple(seeded(seed, "optimum").randrange(size) for size in sizes)
    history = []
    for number in range(tries):
        choice = choose(history, sizes, seeded(seed, "try", number))
        hits = sum(a == b for a, b in zip(choice, optimum, strict=True))
        history.append((choice, hits / len(sizes)))
    return max(score for _, score in history)


def at_random(history, sizes, rng):
    return tuple(rng.randrange(size) for size in sizes)


@pytest.mark.slow
def test_tpe_finds_more_than_random_search():
    ours = [best_found(tpe, seed) for seed in range(20)]
    random_ = [best_found(at_random, seed) for seed in range(20)]
    assert statistics.fmean(ours) > statistics.fmean(random_) + 0.2
    assert ours == [best_found(tpe, seed) for seed in range(20)]
    alone = [best_found(tpe, seed, sizes=(40,), tries=40) for seed in range(5)]
    assert alone == [1.0] * 5  # it tries nothing twice before all is tried


def test_tpe_copes_with_one_option_and_with_everything_tried():
    rng = seeded(0, "x")
    assert tpe([], [1, 1], rng) == (0, 0)
    assert tpe([((0,), 0.5)] * 9, [1], rng) == (0,)


def test_the_pareto_front_of_the_paper():
    assert pareto([[1.0]]) == [1]
    assert pareto([[0.5, 0.5], [1, 0], [0, 1]]) == [0, 1, 1]
    assert pareto([[1, 1], [1, 1]]) in ([2, 0], [0, 2])
    assert pareto([[0, 0, 0], [0, 0, 0], [0, 0, 1]]) == [0, 0, 3]


def test_cases_are_worst_first_with_the_feedback_of_the_step():
    def metric(example, prediction):
        return lmopt.Score(float(example["n"]) / 4, "general", {"b": f"of b {example['n']}"})

    @program(a=predict("n -> x"), b=predict("x -> y"))
    def two(steps, n):
        a = yield steps.a(n=n)
        return (yield steps.b(x=a.x))

    data = [{"n": n, "y": "gold"} for n in (3, 1, 2)]
    rows = lmopt.evaluate(two, data, metric, lm=lmopt.stub_lm()).rows
    assert [case["feedback"] for case in cases(two, "b", rows)] == ["of b 1", "of b 2", "of b 3"]
    assert [case["feedback"] for case in cases(two, "a", rows, 2)] == ["general"] * 2
    assert cases(two, "b", rows)[0]["expected"] == {"y": "gold"}
    failing = lmopt.evaluate(TASK, ROWS[:1], exact_match, lm=lambda r: lmopt.Response("")).rows
    assert cases(TASK, "predict", failing)[0]["feedback"].startswith("ParseError")


def hunt_of(rows, metric=exact_match, lm=None, task=TASK, **options):
    return Hunt(task, tuple(rows), tuple(rows), metric, lm or toy_lm(), **options)


def wanted(lm, *wants):
    """What comes of what a search wants."""
    return [lmopt.drive(want.flow(), lm) for want in wants]


def test_what_the_proposer_is_told(golden):
    sent = []

    def lm(request):
        sent.extend([request] if request.step == "propose" else [])
        return toy_lm()(request)

    hunt = hunt_of(ROWS[:3], lm=lm)
    wanted(lm, hunt.start())
    tried = TASK.params.replace("predict", instructions="Be brief.")
    hunt.trials.append(Trial(tried, 0.25))
    (seen,) = wanted(lm, hunt.cases("predict", 3, params=TASK.params, count=2))
    told = {"tips": ["Be simple and clear."] * 2, "data": "Short sentences."}
    want = hunt.propose("predict", seen, params=TASK.params, **told)
    (texts,) = wanted(lm, want)
    assert [request.rollout for request in sent] == [0, 1] and hunt.calls == 8
    assert 'If the text mentions "horse' in texts[0]
    golden("proposer.txt", transcript(sent[0].messages) + "\n")


def test_what_mipro_asks_of_the_data(golden):
    sent = []
    lm = toy_lm()
    optimize = mipro(lambda r: sent.append(r) or lm(r), candidates=2, trials=1)
    list(optimize.trials(TASK, ROWS[:8], exact_match))
    golden(
        "summary.txt",
        transcript(next(r for r in sent if r.step == "summary").messages) + "\n",
    )


def test_a_description_names_steps_and_instructions():
    assert "Step predict takes text and makes kind" in description(TASK)
    assert "Say what it is about." in description(TASK)


def test_a_hunt_runs_nothing_twice_and_tries_nothing_twice():
    calls = []

    def lm(request):
        calls.append(1)
        return toy_lm()(request)

    hunt = hunt_of(ROWS[:9], lm=lm)
    wanted(lm, hunt.held(TASK.params, [0, 1]), hunt.held(TASK.params, [1, 2, 1]))
    assert len(calls) == hunt.calls == hunt.runs == 3
    wanted(lm, hunt.start())
    (again,) = wanted(lm, hunt.trial(TASK.params, "same", 0))
    assert len(calls) == 9 and again.note == "same; tried before" and hunt.trials[1] is again
    assert hunt.best == 0 and again.score == hunt.top.score
    wanted(lm, hunt.rows(TASK.params, [0]))
    assert len(calls) == 10  # a row to learn from is another row


def test_a_search_is_stepped_by_hand_with_no_lm():
    hunt = hunt_of(ROWS[:4])
    flow = copro(None, breadth=2, depth=1, shown=3).search(hunt)
    assert [(want.name, want.given) for want in next(flow)] == [("start", {}), ("demos", {})]
    hunt.trials.append(Trial(TASK.params, 0.5, "start"))
    want = flow.send((hunt.trials[0], ()))
    assert (want.name, want.given) == ("cases", {"path": "predict", "shown": 3, "count": 2})
    want = flow.send([[{"inputs": {}, "expected": {}}]] * 2)
    assert want.name == "propose" and len(want.given["seen"]) == 2
    want = flow.send(["One.", "Two."])
    made = list(want.given["made"])
    assert want.name == "contest" and [note for _, note in made] == ["round 1, predict"] * 2
    assert [params["predict"].instructions for params, _ in made] == ["One.", "Two."]
    with pytest.raises(StopIteration):
        flow.send([Trial(params, 0.25) for params, _ in made])


def test_several_things_may_be_wanted_at_once():
    def search(hunt):
        yield hunt.start()
        texts = [f"Text {n}." for n in range(3)]
        tried = [hunt.program.params.replace("predict", instructions=text) for text in texts]
        made = yield [hunt.trial(params, params["predict"].instructions) for params in tried]
        assert [one.note for one in made] == texts

    both = optimizer("both", toy_lm(), search, lambda size: size.plan(4 * size.val))
    trials = list(both.trials(TASK, ROWS, exact_match))
    assert [one.note for one in trials] == ["start", "Text 0.", "Text 1.", "Text 2."]


@pytest.mark.filterwarnings("ignore:gepa ended")
@pytest.mark.parametrize("name", ["copro", "mipro", "gepa", "simba", "infer_rules", "avatar"])
def test_a_parent_is_what_a_trial_was_made_from(name):
    trials = list(WRITERS[name](toy_lm()).trials(TASK, ROWS, exact_match))
    for trial in trials[1:]:
        before = trials[trial.parent].params["predict"].instructions.split("\n")
        after = trial.params["predict"].instructions.split("\n")
        assert after[: len(before)] == before  # the toy keeps the rules that are there


def test_demonstrations_that_change_nothing_are_no_trouble():
    rows = [{"text": f"{n}", "other": "x"} for n in range(6)]
    for make in (tpe_search, infer_rules):
        trials = list(make(toy_lm()).trials(TASK, rows, lambda example, made: 0.5))
        assert "tried before" in trials[1].note


def test_a_race_ends_when_it_is_lost_or_clearly_lost():
    rows = tuple(Record(n=n, y="x") for n in range(160))
    task = predict("n -> y")

    def lm(request):
        good = "bad" not in request.messages[0].text and "worse" not in request.messages[0].text
        hit = good or ("worse" in request.messages[0].text and int(request.inputs.n) % 2)
        return lmopt.scripted_lm([{"y": "x" if hit else "y"}])(request)

    hunt = hunt_of(rows, lm=lm, task=task)
    assert wanted(lm, hunt.start())[0].score == 1.0
    for text in ("bad", "worse"):
        params = task.params.replace("predict", instructions=text)
        (trial,) = wanted(lm, hunt.trial(params, text, 0))
        assert len(trial.evaluation.rows) == 16 and "; out after 16 of 160 rows" in trial.note
        assert trial.out
    assert hunt.top.note == "start"


def test_one_that_is_out_never_wins_whatever_its_score_on_the_rows_it_ran():
    rows = tuple(Record(n=n, y="x") for n in range(160))
    task = predict("n -> y")

    def lm(request):  # the start is right on the first 40 rows, "worse" on half of these
        n, worse = int(request.inputs.n), "worse" in request.messages[0].text
        return lmopt.scripted_lm([{"y": "x" if n < 40 and not (worse and n % 2) else "y"}])(request)

    given = {"valset": rows, "breadth": 1, "depth": 1, "propose": lambda given: "worse"}
    given["max_labeled"] = 0
    optimize = copro(lm, **given)
    other = [{"n": -1, "y": "z"}]
    trials = list(optimize.trials(task, other, exact_match))
    assert trials[1].out and trials[1].score > trials[0].score
    assert optimize(task, other, exact_match) == task.params


# -- what each of them writes --

WRITERS = {
    "copro": lambda lm, **o: copro(lm, breadth=2, depth=2, max_labeled=0, **o),
    "mipro": lambda lm, **o: mipro(lm, candidates=4, trials=6, **o),
    "gepa": lambda lm, **o: gepa(lm, max_runs=300, minibatch=3, max_labeled=0, **o),
    "simba": lambda lm, **o: simba(lm, steps=3, candidates=3, minibatch=8, max_labeled=0, **o),
    "infer_rules": lambda lm, **o: infer_rules(lm, candidates=2, **o),
    "avatar": lambda lm, **o: avatar(lm, rounds=3, max_labeled=0, **o),
}
writers = pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)


@pytest.mark.filterwarnings("ignore:gepa ended")
@writers
def test_it_makes_the_program_better(make):
    start = lmopt.evaluate(TASK, ROWS, exact_match, lm=toy_lm()).score
    params = make(toy_lm())(TASK, ROWS, exact_match)
    assert start == 0.0
    assert lmopt.evaluate(TASK, ROWS, exact_match, lm=toy_lm(), params=params).score >= 0.3


@writers
def test_a_person_may_write_and_sees_what_went_wrong(make):
    asked = []

    def person(given):
        asked.append(given)
        return f"  {prompt('kind')}\n# {len(asked)}  "

    def fails(request):
        raise AssertionError("the prompt LM was asked")

    optimize = make(
        toy_lm(), propose=person, prompt_lm=fails if make is not WRITERS["mipro"] else None
    )
    params = optimize(TASK, ROWS, exact_match)
    assert asked[0].step == "predict" and asked[0].current == TASK.params["predict"].instructions
    assert asked[0].program.startswith("predict takes text: str.") and asked[0].cases
    assert {"inputs", "expected"} <= set(asked[0].cases[0])
    assert lmopt.evaluate(TASK, ROWS, exact_match, lm=toy_lm(), params=params).score == 1.0


@pytest.mark.filterwarnings("ignore:gepa ended")
@writers
def test_earlier_proposals_are_shown_with_their_scores_failed_ones_too(make):
    asked, counter = [], itertools.count()

    def useless(given):
        asked.append(given)
        return f"Useless text {next(counter)}."

    list(make(toy_lm(), propose=useless).trials(TASK, ROWS, exact_match))
    shown = [one["instructions"] for given in asked for one in given.get("attempts", ())]
    if make in (WRITERS["copro"], WRITERS["avatar"]):
        assert "Useless text 0." in shown


@pytest.mark.filterwarnings("ignore:gepa ended")
@writers
def test_rows_to_score_on_are_never_shown_to_the_proposer(make):
    asked = []

    def writes(given):
        asked.append(given)
        return "x"

    optimize = make(toy_lm(), propose=writes, seed=3)
    trials = list(optimize.trials(TASK, ROWS, exact_match))
    val = {row.example.text for row in trials[0].evaluation.rows}
    told = [str(case) for given in asked for case in given.get("cases", ())]
    assert told and not [text for text in told for held in val if f"{held}'" in text]
    with pytest.raises(DataError, match="rows are in both trainset and valset"):
        make(toy_lm(), valset=ROWS[:2])(TASK, ROWS, exact_match)


@writers
def test_the_proposer_fails_like_any_lm(make):
    def dead(request):
        raise lmopt.Unauthorized("no key")

    with pytest.raises(lmopt.Unauthorized) as caught:
        make(toy_lm(), prompt_lm=dead)(TASK, ROWS, exact_match)
    labels_first = (WRITERS["infer_rules"], WRITERS["mipro"])
    assert (caught.value.best == TASK.params) is (make not in labels_first)


def test_gepa_draws_from_the_front_merges_and_stops_when_told():
    @program(a=predict("text -> kind"), b=predict("text -> size"))
    def two(steps, text):
        a, b = yield steps.a(text=text), steps.b(text=text)
        return {"kind": a.kind, "size": b.size}

    rows = [evolve_row(row, n) for n, row in enumerate(ROWS)]

    def metric(example, prediction):
        hits = [example[name] == prediction[name] for name in ("kind", "size")]
        told = {"a": f"kind {hits[0]}", "b": f"size {hits[1]}"}
        return lmopt.Score(statistics.fmean(hits), "", told)

    trials = list(gepa(toy_lm(), max_runs=900, seed=1).trials(two, rows, metric))
    assert trials[0].score < max(trial.score for trial in trials)
    stopped = gepa(
        toy_lm(), max_runs=900, max_labeled=0, minibatch=3, stop=lambda trial: trial.score > 0.1
    )
    assert len(list(stopped.trials(two, rows, metric))) == 2
    with pytest.raises(DataError, match="too few runs: 5; expected 24 or more"):
        gepa(toy_lm(), max_runs=5)(TASK, ROWS, exact_match)


def test_gepa_merges_what_two_candidates_have_changed_each():
    task = lmopt.parallel(a=predict("text -> kind"), b=predict("text -> size"))
    rows = tuple(evolve_row(row, n) for n, row in enumerate(ROWS[:12]))
    right = [prompt("kind"), prompt("size")]

    def half(example, prediction):  # of some rows the one counts, of the others the other
        name = "kind" if example["size"] == "small" else "size"
        return example[name] == prediction[name]

    hunt = hunt_of(rows, half, task=task)
    (start,) = wanted(hunt.lm, hunt.start())
    for path, text in zip("ab", right, strict=True):
        changed = start.params.replace(path, instructions=text)
        wanted(hunt.lm, hunt.trial(changed, path, 0, race=False))
    want = next(_merging(hunt, seeded(0, "x")))
    (child,) = wanted(hunt.lm, want)
    assert child.note == "merged from 1 and 2" and child.score == 1.0
    assert [one.instructions for one in child.params.values()] == right
    with pytest.raises(StopIteration) as ended:  # there is nothing new to merge
        next(_merging(hunt, seeded(0, "x")))
    assert ended.value.value is None


def prompt(name):
    if name == "size":
        signs = {"tiny": "small", "huge": "large"}
        return "\n".join(f'If the text mentions "{a}", answer "{b}".' for a, b in signs.items())
    return "\n".join(
        f'If the text mentions "{word}", answer "{kind}".'
        for kind, words in WORDS.items()
        for word in words
    )


def evolve_row(row, n):
    return row | {
        "size": "small" if n % 2 else "large",
        "text": f"{row.text} {'tiny' if n % 2 else 'huge'}",
    }


def test_wrong_numbers_are_refused_at_once():
    for make in (
        lambda: copro(toy_lm(), breadth=0),
        lambda: mipro(toy_lm(), candidates=1),
        lambda: mipro(toy_lm(), minibatch=0),
        lambda: gepa(toy_lm(), minibatch=0),
        lambda: simba(toy_lm(), steps=0),
        lambda: infer_rules(toy_lm(), candidates=0),
        lambda: avatar(toy_lm(), rounds=0),
        lambda: tpe_search(toy_lm(), trials=0),
        lambda: knn_few_shot(lambda texts: [], k=0),
        lambda: limit(copro(toy_lm()), trials=0),
        lambda: tune(toy_lm(), {"temperature": [0]}, trials=0),
    ):
        with pytest.raises(DataError, match=r"is too small: [01]; expected [12] or more"):
            make()


# -- settings --


def test_tune_tries_every_combination_or_searches():
    task = TASK.with_params({"predict": Prompt("Say.", demos=ROWS[:12])})
    space = {"demos": [0, 6, 12], "adapter": ["chat"], "model": [None, "big"]}
    trials = list(tune(toy_lm(), space).trials(task, ROWS, exact_match))
    assert len(trials) == 7 and trials[0].note == "start"
    assert {len(trial.params["predict"].demos) for trial in trials} == {0, 6, 12}
    assert {trial.params["predict"].model for trial in trials} == {None, "big"}
    best = tune(toy_lm(), space)(task, ROWS, exact_match)
    assert len(best["predict"].demos) == 12
    many = {"temperature": [n / 10 for n in range(10)], "demos": list(range(10))}
    assert len(list(tune(toy_lm(), many, trials=5).trials(task, ROWS[:4], exact_match))) == 6


def test_an_adapter_is_a_setting_of_a_prompt():
    sent = []
    lm = lmopt.stub_lm()
    for name in ("chat", "json", "xml", "plain"):
        task = predict("q -> a: list[int]")
        chosen = task.with_params({"predict": Prompt("x", settings={"adapter": name})})
        assert chosen(lambda r: sent.append(r) or lm(r), q="?").a == [1]
        assert sent[-1].adapter.name == name
        assert lmopt.loads(lmopt.dumps(chosen.params)) == chosen.params
    with pytest.raises(ParamsError, match="unknown adapter: 'yaml'; expected one of chat, json"):
        Prompt(settings={"adapter": "yaml"})
    with pytest.raises(DataError, match="nothing to choose from"):
        tune(toy_lm(), {"temperature": []})
    with pytest.raises(ParamsError, match="unknown setting: 'heat'"):
        tune(toy_lm(), {"heat": [1]})


# -- combinators --


def noted(optimizer):
    return [(t.score, t.note, t.parent, t.calls) for t in optimizer.trials(TASK, ROWS, exact_match)]


@pytest.mark.slow
def test_chain_is_associative_and_has_an_identity():
    a, b, c = (
        labeled_few_shot(k=3),
        copro(toy_lm(), breadth=1, depth=1),
        random_search(toy_lm(), candidates=1),
    )
    for one, other in (
        (chain(a, chain(b, c)), chain(chain(a, b), c)),
        (chain(b, c, a), chain(chain(b, c), a)),
    ):
        assert noted(one) == noted(other)
        assert one(TASK, ROWS, exact_match) == other(TASK, ROWS, exact_match)
        assert one.plan(TASK, ROWS) == other.plan(TASK, ROWS)
    for one in (chain(chain(), b), chain(b, chain()), chain(b)):
        assert one(TASK, ROWS, exact_match) == b(TASK, ROWS, exact_match)
    assert chain()(TASK, ROWS, exact_match) == TASK.params and chain().plan(TASK, ROWS) == Plan()
    trials = list(chain(b, c).trials(TASK, ROWS, exact_match))
    assert trials[1].score == 1.0 and {trial.parent for trial in trials[4:]} == {1}
    assert [t.calls for t in trials] == sorted(t.calls for t in trials)


def test_best_of_runs_each_from_the_start():
    one = best_of(labeled_few_shot(k=1), labeled_few_shot(k=24), lm=toy_lm())
    trials = list(one.trials(TASK, ROWS, exact_match))
    assert [trial.note for trial in trials] == ["start", "labeled_few_shot", "labeled_few_shot"]
    assert one(TASK, ROWS, exact_match) == trials[2].params


def test_only_changes_one_step():
    task = lmopt.pipeline(x=predict("text -> kind"), y=predict("kind -> size"))
    rows = [evolve_row(row, n) for n, row in enumerate(ROWS)]
    for path in ("x", "y"):
        made = only(path, copro(toy_lm(), breadth=1, depth=1))(task, rows, exact_match)
        changed = [one for one in made if made[one] != task.params[one]]
        assert changed in ([path], []) and list(made) == ["x", "y"]
    with pytest.raises(ParamsError, match="no such path: 'z'; expected one of x, y"):
        only("z", labeled_few_shot())(task, rows, exact_match)


def test_a_demonstration_more_takes_the_place_of_an_old_one():
    task, rows = predict("text -> label"), [{"text": str(n), "label": "x"} for n in range(3)]
    params = task.params.replace("predict", demos=rows[:2])
    (row,) = lmopt.evaluate(task, rows[2:], exact_match, lm=toy_lm()).rows
    hunt = Hunt(task, tuple(rows), tuple(rows), exact_match, toy_lm())
    demos = _with_demo(hunt, params, row, 2, seeded(0, "demos"))["predict"].demos
    assert [one.text for one in demos] in (["0", "2"], ["1", "2"])


NESTED = lmopt.pipeline(
    x=lmopt.pipeline(u=predict("text -> kind"), v=predict("kind -> size")), y=predict("size -> b")
)


@pytest.mark.parametrize(
    ("nest", "steps"),
    [
        (lambda one: only("x", only("x.v", one)), ["x.v"]),
        (lambda one: only("x.v", chain(only("x", one))), ["x.v"]),
        (lambda one: only("x.v", limit(only("x", one), trials=9)), ["x.v"]),
        (lambda one: chain(only("y", one), only("x.u", one)), ["x.u", "y"]),
        (lambda one: only("x", only("y", one)), None),
        (lambda one: only("x", chain(only("y", one))), None),
    ],
)
def test_what_is_inside_may_change_no_more_than_what_is_outside(nest, steps):
    rows = [{"text": str(n), "kind": "k", "size": "s", "b": "b"} for n in range(4)]
    made = nest(tune(toy_lm(), {"temperature": [0.5]}))
    if steps is None:
        with pytest.raises(ParamsError, match="no such path: 'y'; expected one of x.u, x.v"):
            list(made.trials(NESTED, rows, exact_match))
        return
    trials = list(made.trials(NESTED, rows, exact_match))
    old = NESTED.params
    assert steps == [one for one in old if any(t.params[one] != old[one] for t in trials)]


def test_a_plan_is_that_of_the_steps_that_may_change():
    rows = [{"text": str(n), "kind": "k", "size": "s", "b": "b"} for n in range(8)]
    search = copro(toy_lm(), breadth=2, depth=1)
    plan = only("x.v", search).plan(NESTED, rows)
    assert plan.calls < search.plan(NESTED, rows).calls
    assert only("x.v", chain(search)).plan(NESTED, rows) == plan
    assert only("x.v", limit(search, trials=3)).plan(NESTED, rows) == plan


def test_a_limit_holds_whatever_is_inside():
    def inner():
        return limit(random_search(toy_lm(), candidates=2), trials=3)

    made = limit(chain(inner(), inner()), trials=2)
    assert len(list(made.trials(TASK, ROWS, exact_match))) == 2


@pytest.mark.parametrize(
    "nest",
    [
        chain,
        lambda one: chain(labeled_few_shot(), one),
        lambda one: limit(one, trials=2),
        lambda one: best_of(one, lm=toy_lm()),
        lambda one: if_better(one, lm=toy_lm()),
    ],
)
def test_a_combinator_has_the_workers_and_the_executor_of_what_is_inside(nest):
    with ThreadPoolExecutor(3) as pool:
        chosen = nest(random_search(toy_lm(), workers=8, executor=pool)).options
        assert (chosen.workers, chosen.executor) == (8, pool)
    assert best_of(random_search(toy_lm(), workers=8), lm=toy_lm(), workers=2).options.workers == 2


def test_limit_stops_after_trials_or_calls():
    search = random_search(toy_lm(), candidates=5)
    assert len(list(limit(search, trials=3).trials(TASK, ROWS, exact_match))) == 3
    with pytest.warns(UserWarning, match="used its calls: .*; expected at most 60; raise calls"):
        trials = list(limit(search, calls=60).trials(TASK, ROWS, exact_match))
    assert 57 < trials[-1].calls <= 60 and limit(search, calls=60).plan(TASK, ROWS).calls == 60
    assert trials[0].note == "start, scored on 20 of 24 rows"
    assert trials[1].note == "24 labelled examples" and "ended with the budget" in trials[-1].note
    with pytest.raises(DataError, match="no limit"):
        limit(search)


def test_if_better_keeps_the_start_where_the_gain_may_be_chance():
    good = if_better(labeled_few_shot(k=12), lm=toy_lm())
    assert good(TASK, ROWS, exact_match) != TASK.params

    def search(hunt):
        yield hunt.unscored(hunt.program.params, "start")
        yield hunt.unscored(hunt.program.params.replace("predict", instructions="x"), "other")

    nothing = optimizer("nothing", toy_lm(), search, lambda size: Plan(), parts=False)
    assert if_better(nothing, lm=toy_lm())(TASK, ROWS, exact_match) == TASK.params


# -- what went wrong in others: the table of defects in DSPy's optimizers --


def test_defect_1_infer_rules_returns_the_best_rules_and_changes_nothing_else():
    good = 'If the text mentions "horse" or "tiger", answer "animal".'
    texts = iter([good, "Nothing useful.", "Nothing either."])
    optimize = infer_rules(
        toy_lm(), candidates=3, max_bootstrapped=0, max_labeled=0, propose=lambda given: next(texts)
    )
    made = optimize(TASK, ROWS, exact_match)
    assert made["predict"].instructions == good
    assert TASK.params["predict"].instructions == "Say what it is about."


def test_defect_4_avatar_runs_on_an_agent():
    def look(word: str) -> str:
        """Look."""
        return word

    agent = lmopt.react("text -> kind", [look], max_steps=1)
    trials = list(
        avatar(lmopt.stub_lm(), rounds=1, max_labeled=0, propose=lambda g: "x").trials(
            agent, ROWS, exact_match
        )
    )
    assert len(trials) == 2 and trials[1].params["act"].instructions == "x"


def test_defect_5_a_partly_read_reply_is_a_failed_row_that_is_shown():
    def half(request):
        if request.step == "propose":
            return lmopt.scripted_lm([{"instructions": "Better."}])(request)
        return lmopt.Response("[[ ## kind ## ]]\nanimal")

    task = predict("text -> kind, size", retries=0)
    asked = []
    optimize = copro(half, breadth=1, depth=1, propose=lambda given: asked.append(given) or "x")
    list(optimize.trials(task, ROWS, exact_match))
    assert hasattr(asked[0], "cases")


def test_defect_7_bootstrapping_keeps_the_teacher_and_takes_a_threshold_of_0():
    teacher = TASK.with_params({"predict": Prompt("Teach.", demos=ROWS[:6])})
    before = teacher.params
    with pytest.raises(lmopt.Unauthorized):
        bootstrap_few_shot(lmopt.scripted_lm([lmopt.Unauthorized("no")]), teacher=teacher)(
            TASK, ROWS, exact_match
        )
    assert teacher.params == before
    made = bootstrap_few_shot(lmopt.stub_lm(), threshold=0, max_bootstrapped=3, max_labeled=0)
    assert len(made(TASK, ROWS, exact_match)["predict"].demos) == 3


def test_defect_12_every_prompt_of_an_optimized_part_is_saved(tmp_path):
    inner = lmopt.pipeline(x=predict("text -> kind"))
    tuned = inner.with_params(labeled_few_shot(k=2)(inner, ROWS, exact_match))
    whole = lmopt.pipeline(inner=tuned, y=predict("kind -> size"))
    lmopt.save(whole.params, tmp_path / "p.json")
    loaded = lmopt.load(tmp_path / "p.json")
    assert list(loaded) == ["inner.x", "y"] and len(loaded["inner.x"].demos) == 2


def test_defect_13_every_candidate_of_copro_changes_the_prompt():
    trials = list(
        copro(toy_lm(), breadth=3, depth=1, max_labeled=0).trials(TASK, ROWS, exact_match)
    )
    shown = {
        lmopt.preview(TASK.with_params(trial.params), text="x")[0].text
        for trial in trials
        if "tried before" not in trial.note
    }
    assert len(shown) == len([t for t in trials if "tried before" not in t.note]) > 1


def test_defect_14_seed_0_is_a_seed_and_no_proposal_of_mipro_is_thrown_away():
    def texts(seed):
        made, counter = [], itertools.count()

        def propose(given):
            made.append(given.tip)
            return f"Text {next(counter)}."

        optimize = mipro(toy_lm(), candidates=4, trials=12, seed=seed, propose=propose,
                         max_bootstrapped=0, max_labeled=0)  # fmt: skip
        trials = list(optimize.trials(TASK, ROWS, exact_match))
        return made, trials

    (tips0, trials0), (tips9, trials9) = texts(0), texts(9)
    assert [t.evaluation.rows[0].example for t in trials0[:1]] != [
        t.evaluation.rows[0].example for t in trials9[:1]
    ] or tips0 != tips9
    assert len(tips0) == 3


def test_the_toy_writes_rules_from_the_cases_it_is_shown():
    text = proposer()(
        toy_lm(),
        program="p",
        step="s",
        current="Old line.",
        cases=[
            {"inputs": {"text": "a nice horse"}, "expected": {"kind": "animal"}},
            {"inputs": {"text": "a nice tulip"}, "expected": {"kind": "plant"}},
        ],
    ).instructions
    assert text.split("\n") == [
        "Old line.",
        'If the text mentions "horse", answer "animal".',
        'If the text mentions "tulip", answer "plant".',
    ]


def test_gepa_says_so_where_it_finds_nothing_more():
    with pytest.warns(UserWarning, match=r"gepa ended: 50 minibatches .*, after \d+ of 3000 runs"):
        gepa(toy_lm(), max_runs=3000, propose=lambda given: "No use.")(TASK, ROWS[:12], never)


def never(example, prediction):
    return 0.0
