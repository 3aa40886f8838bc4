"""Weights as parameters: trainers, what they are given, and prompts and weights together."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from attrs import evolve

import lmopt
from lmopt import (
    LMError,
    Message,
    chain_of_thought,
    evaluate,
    exact_match,
    mock_lm,
    predict,
    program,
    route,
    toy_lm,
)
from lmopt_optimizers import (
    Plan,
    best,
    chain,
    chat_examples,
    check_optimizer,
    copro,
    finetune,
    grpo,
    jsonl_trainer,
    labeled_few_shot,
    mipro,
    openai_trainer,
    passed,
    rewarded,
    write_examples,
)

ANIMALS = {"dog": "woof", "cat": "meow", "cow": "moo"}
ROWS = [
    {"animal": f"{animal} {n}", "sound": sound}
    for n in range(8)
    for animal, sound in ANIMALS.items()
]
TASK = predict("animal -> sound", instructions="Say its sound.")
knows = mock_lm(lambda inputs: {"sound": ANIMALS[inputs.animal.split()[0]]})


def train(examples, base, **settings):
    """A trainer whose models are their names: what they were trained on, as JSON."""
    known = json.loads(base) if base.startswith("[") else []
    pairs = [[turn["content"] for turn in one["messages"][-2:]] for one in examples]
    good = [pair for one, pair in zip(examples, pairs, strict=True) if one.get("advantage", 1) > 0]
    return json.dumps([*known, *good])


def trained(request):
    """A toy LM that answers by what its weights were trained on, as if by demonstrations."""
    if not (request.model or "").startswith("["):
        return toy_lm()(request)
    system, *turns = request.messages
    taught = [Message(role, text) for pair in json.loads(request.model)
              for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    return toy_lm()(evolve(request, messages=(system, *taught, *turns), model=None))


trained.identity = "trained"


# -- what a trainer is given --


def test_conversations_are_what_the_program_would_send_and_should_get():
    shown = TASK.with_params(labeled_few_shot(k=2)(TASK, ROWS, exact_match))
    rows = evaluate(shown, ROWS[:2], exact_match, lm=knows).rows
    (one, _), (other, _) = (
        chat_examples(shown, rows, keep_demos=keep)["predict"] for keep in (False, True)
    )
    asked = lmopt.preview(TASK, animal=ROWS[0]["animal"])
    assert one["messages"][:-1] == [{"role": m.role, "content": m.text} for m in asked]
    reply = one["messages"][-1]["content"]
    assert (
        TASK.signature and lmopt.chat.parse(TASK.signature, lmopt.Response(reply)).sound == "woof"
    )
    assert len(other["messages"]) == len(one["messages"]) + 4
    assert json.loads(json.dumps(one)) == one


@program(think=chain_of_thought("animal -> kind"), tell=predict("animal, kind -> sound"))
def two_steps(steps, animal):
    thought = yield steps.think(animal=animal)
    return (yield steps.tell(animal=animal, kind=thought.kind))


def fields(inputs):
    kind = inputs.animal.split()[0]
    return {"sound": ANIMALS[kind]} if "kind" in inputs else {"reasoning": "Hm.", "kind": kind}


def test_every_step_has_conversations_of_its_own_and_a_model_for_all_or_each():
    rows = evaluate(two_steps, ROWS[:3], exact_match, lm=mock_lm(fields)).rows
    assert {path: len(one) for path, one in chat_examples(two_steps, rows).items()} == {
        "think": 3, "tell": 3}  # fmt: skip
    for per_step, sizes in ((False, [24]), (True, [12, 12])):
        seen = []

        def counts(examples, base, seen=seen, **settings):
            seen.append(len(examples))
            return f"model-{len(seen)}"

        search = finetune(counts, lm=mock_lm(fields), per_step=per_step)
        params = list(search.trials(two_steps, ROWS, exact_match))[-1].params
        assert seen == sizes and search.plan(two_steps, ROWS).trainings == len(sizes)
        assert [one.model for one in params.values()] == [f"model-{n}" for n in (1, len(sizes))]


def test_only_runs_that_reach_the_threshold_are_learned_and_a_failed_row_costs_itself():
    def lm(request):
        if request.inputs.animal.startswith("dog"):
            return lmopt.Response("hm")
        return mock_lm(lambda i: {"sound": "meow"})(request)

    seen = []
    search = finetune(
        lambda examples, base: seen.extend(examples) or "m", lm=toy_lm(), teacher_lm=lm
    )
    trials = list(search.trials(TASK, ROWS, exact_match))
    assert seen and all("cat" in one["messages"][-2]["content"] for one in seen)
    assert trials[1].note == f"trained on {len(seen)} of 12 runs: m"


def test_a_step_that_may_not_change_is_not_trained():
    search = finetune(lambda examples, base: "m", lm=mock_lm(fields), within="tell")
    params = list(search.trials(two_steps, ROWS, exact_match))[-1].params
    assert [one.model for one in params.values()] == [None, "m"]


def test_advantages_are_normalised_within_a_group_and_equal_rewards_teach_nothing():
    def scored(*texts):
        made = [TASK(lmopt.scripted_lm([{"sound": text}]), animal="dog") for text in texts]
        return [lmopt.Row(lmopt.Record(), one, exact_match({"sound": "woof"}, one)) for one in made]

    runs = [
        scored("woof", "moo"),
        scored("meow", "moo"),
        scored("meow", "moo"),
        scored("woof", "x"),
    ]
    told = rewarded(TASK, runs)
    assert [one["advantage"] for one in told] == [1.0, -1.0, -1.0, 1.0]  # the second row is equal
    assert {one["path"] for one in told} == {"predict"} and "logprobs" in told[0]
    assert told[0]["messages"][-1]["role"] == "assistant"


# -- what comes of it --


def test_weights_that_were_taught_by_a_large_model_are_kept_where_they_score_better():
    search = finetune(train, lm=trained, teacher_lm=knows)
    trials = list(search.trials(TASK, ROWS, exact_match))
    assert [one.score for one in trials] == [0.0, 1.0] and not trials[1].params["predict"].demos
    params = search(TASK, ROWS, exact_match)
    assert evaluate(TASK, ROWS, exact_match, lm=trained, params=params).score == 1.0
    useless = finetune(lambda examples, base: "other", lm=trained, teacher_lm=knows)
    assert useless(TASK, ROWS, exact_match) == TASK.params


def test_rewards_teach_what_scored_better_than_its_like():
    shown = TASK.with_params(labeled_few_shot(k=24)(TASK, ROWS, exact_match))
    search = grpo(train, lm=trained, group=4, steps=3, minibatch=6)
    trials = list(search.trials(shown, ROWS, exact_match))
    assert trials[0].score <= best(trials).score
    seen = []
    even = grpo(lambda examples, base: seen.append(1) or "m", lm=knows, group=2, steps=2)
    assert len(list(even.trials(TASK, ROWS, exact_match))) == 1 and not seen


@pytest.mark.parametrize(
    "make",
    [
        lambda lm: finetune(train, lm=lm, teacher_lm=knows),
        lambda lm: finetune(train, lm=lm, teacher_lm=knows, keep_demos=True, per_step=True),
        lambda lm: grpo(train, lm=lm, group=3, steps=2, minibatch=4),
        lambda lm: chain(
            copro(lm, breadth=1, depth=1), finetune(train, lm=lm, teacher_lm=knows),
            copro(lm, breadth=1, depth=1),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("task", [TASK, predict("animal -> sound", temperature=0.8)])
def test_the_laws(make, task):
    check_optimizer(make(trained), task, ROWS[:12], exact_match, kills=2)


def test_prompts_and_weights_together_win_on_rows_that_were_held_out():
    both = chain(
        mipro(trained, candidates=2, trials=2),
        finetune(train, lm=trained, teacher_lm=knows),
        mipro(trained, candidates=2, trials=2),
    )
    trials = list(both.trials(TASK, ROWS, exact_match))
    params = both(TASK, ROWS, exact_match)
    assert best(trials).score == 1.0 and evaluate(TASK, ROWS, exact_match, lm=trained,
                                                  params=params).score == 1.0  # fmt: skip
    assert both.plan(TASK, ROWS).trainings == 1


def test_a_trainer_that_fails_leaves_the_parameters_and_its_data(tmp_path):
    class Broken(RuntimeError):
        pass

    def fails(examples, base):
        write_examples(examples, tmp_path)
        raise Broken("out of memory")

    with pytest.raises(Broken) as caught:
        finetune(fails, lm=trained, teacher_lm=knows)(TASK, ROWS, exact_match)
    assert caught.value.best == TASK.params and len(list(tmp_path.iterdir())) == 1


def test_killed_while_it_trains_it_goes_on_over_its_answers(tmp_path):
    paid, died = [], []

    def lm(request):
        paid.append(request.key)
        return trained(request)

    def dies_once(examples, base):
        write_examples(examples, tmp_path / "data")
        if not died:
            died.append(1)
            raise SystemExit
        return train(examples, base)

    def search():
        return finetune(dies_once, lm=lmopt.record(tmp_path / "calls.jsonl")(lm), teacher_lm=knows)(
            TASK, ROWS, exact_match
        )

    with pytest.raises(SystemExit):
        search()
    before = len(paid)
    assert search() == finetune(train, lm=trained, teacher_lm=knows)(TASK, ROWS, exact_match)
    assert len(set(paid)) == len(paid) > before
    assert len(list((tmp_path / "data").iterdir())) == 1  # the same examples are the same file


def test_a_file_only(tmp_path):
    search = finetune(jsonl_trainer(tmp_path), lm=trained, teacher_lm=knows)
    assert search(TASK, ROWS, exact_match) == TASK.params
    (path,) = tmp_path.iterdir()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12 and all(set(json.loads(line)) == {"messages"} for line in lines)


# -- several models behind one name --


def test_the_steps_of_a_program_can_use_different_models():
    asked = []

    def named(name):
        def lm(request):
            asked.append((name, request.step))
            return mock_lm(fields)(request)

        return lm

    lm = route({"small": named("small")}, named("large"))
    params = two_steps.params.replace("think", model="small")
    two_steps.with_params(params)(lm, animal="dog 1")
    assert asked == [("small", "think"), ("large", "tell")]
    saved = lmopt.loads(lmopt.dumps(params))
    assert saved == params and "+model" in lmopt.diff(two_steps.params, saved)


def test_a_model_that_nobody_serves_is_a_clear_error_at_the_first_call():
    params = TASK.params.replace("predict", model="gone")
    with pytest.raises(
        LMError, match=r"nothing serves this model: 'gone'; expected one of \['a'\]"
    ):
        evaluate(TASK, ROWS, exact_match, lm=route({"a": knows}), params=params)


def test_a_route_is_who_its_lms_are():
    one, other = route({"a": toy_lm()}, knows), route({"a": toy_lm(seed=1)}, knows)
    assert lmopt.identity(one) != lmopt.identity(other)
    assert lmopt.identity(one) == lmopt.identity(route({"a": toy_lm()}, knows))


# -- training at OpenAI --


class Jobs:
    """A server with the end points of files and fine-tuning jobs."""

    def __init__(self, *states):
        self.states, self.asked, self.down = list(states), [], 0
        jobs = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                jobs.asked.append((self.command, self.path, dict(self.headers), body))
                if jobs.down:
                    jobs.down -= 1
                    self.close_connection = True
                    return
                made = {"id": "file-1"} if self.path == "/v1/files" else {"id": "job-1"}
                if self.command == "GET":
                    state = jobs.states.pop(0) if len(jobs.states) > 1 else jobs.states[0]
                    made = {"status": state, "fine_tuned_model": "ft:mine",
                            "error": {"message": "bad data"}}  # fmt: skip
                text = json.dumps(made).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def paths(self):
        return [f"{method} {path.removeprefix('/v1')}" for method, path, _, _ in self.asked]


def search_with(jobs, folder, **options):
    trainer = openai_trainer(folder, base_url=jobs.url, api_key="sk-secret", poll=0.0, **options)
    served = route({"ft:mine": knows}, trained)
    return finetune(trainer, lm=served, teacher_lm=knows, settings={"suffix": "x"})


def test_a_training_at_openai(tmp_path):
    with Jobs("queued", "running", "succeeded") as jobs:
        search = search_with(jobs, tmp_path)
        assert search(TASK, ROWS, exact_match)["predict"].model == "ft:mine"
        wait = "GET /fine_tuning/jobs/job-1"
        assert jobs.paths() == ["POST /files", "POST /fine_tuning/jobs", wait, wait, wait]
        upload, begin = jobs.asked[0], jobs.asked[1]
        assert b'name="purpose"' in upload[3] and b'{"messages":' in upload[3].replace(b"\n", b"")
        assert upload[2]["Authorization"] == "Bearer sk-secret"
        told = json.loads(begin[3])
        assert told["training_file"] == "file-1" and told["suffix"] == "x" and "model" in told
        search(TASK, ROWS, exact_match)  # the same examples: the same job, which has ended
        assert jobs.paths()[5:] == [wait]
    assert "sk-secret" not in repr(openai_trainer(tmp_path, api_key="sk-secret"))


def test_a_training_that_fails_says_why_and_begins_anew_the_next_time(tmp_path):
    with Jobs("failed") as jobs:
        for _ in range(2):
            with pytest.raises(
                LMError, match="the training failed: 'bad data'.*see job job-1"
            ) as e:
                search_with(jobs, tmp_path)(TASK, ROWS, exact_match)
            assert e.value.best == TASK.params
        assert jobs.paths().count("POST /fine_tuning/jobs") == 2


def test_a_connection_that_is_lost_is_tried_again(tmp_path):
    with Jobs("running", "succeeded") as jobs:
        jobs.down = 3
        assert search_with(jobs, tmp_path)(TASK, ROWS, exact_match)["predict"].model == "ft:mine"
        jobs.down = 9
        with pytest.raises(LMError, match="answered nothing"):
            search_with(jobs, tmp_path / "other", attempts=2)(TASK, ROWS, exact_match)


def test_ctrl_c_cancels_the_job_and_a_kill_goes_on_with_it(tmp_path):
    examples = [{"messages": [{"role": "user", "content": "x"}]}]

    def begun(jobs):
        trainer = openai_trainer(tmp_path, base_url=jobs.url, poll=0.0)
        flow = trainer.flow(examples, "base")
        effect = next(flow)
        while not isinstance(effect, lmopt.Sleep):
            effect = flow.send(effect.function(*effect.args))
        return flow

    with Jobs("running") as jobs:
        begun(jobs).close()  # as Ctrl-C does
        assert jobs.paths()[-1] == "POST /fine_tuning/jobs/job-1/cancel"
    with Jobs("running") as jobs:
        flow = begun(jobs)  # and this one is killed: nothing is closed
        jobs.states[:] = ["succeeded"]
        trainer = openai_trainer(tmp_path, base_url=jobs.url, poll=0.0)
        assert trainer(examples, "base") == "ft:mine"
        assert jobs.paths().count("POST /fine_tuning/jobs") == 1
        flow.close()


def test_what_a_plan_says_of_trainings():
    assert Plan(trainings=1) + Plan(trainings=2) == Plan(trainings=3)
    assert grpo(train, lm=trained, steps=5).plan(TASK, ROWS).trainings == 5
    assert passed(evaluate(TASK, ROWS[:1], exact_match, lm=knows), 1.0)


def test_a_trainer_that_names_nothing_and_a_teacher_that_knows_nothing():
    with pytest.raises(lmopt.DataError, match="this trainer returned no name: None"):
        finetune(lambda examples, base: None, lm=trained, teacher_lm=knows)(TASK, ROWS, exact_match)
    search = finetune(train, lm=trained)
    with pytest.warns(UserWarning, match="none of 12 runs reached the threshold: nothing was tr"):
        assert search(TASK, ROWS, exact_match) == TASK.params


def test_a_step_that_calls_tools_as_its_provider_does_has_no_conversation():
    def look(city: str) -> str:
        """Look a city up."""
        return "big"

    agent = lmopt.react("q -> a", [look], native=True)
    call = lmopt.Response("", tool_calls=[lmopt.ToolCall("1", "look", {"city": "Rome"})])
    replies = [call, lmopt.Response("done"), {"reasoning": "", "a": "big"}]
    row = lmopt.Row(lmopt.Record(), agent(lmopt.scripted_lm(replies), q="?"), 1.0)
    made = chat_examples(agent, [row])
    assert {path: len(found) for path, found in made.items()} == {"act": 0, "answer": 1}
