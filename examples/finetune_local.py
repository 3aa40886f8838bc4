# /// script
# requires-python = ">=3.11"
# dependencies = ["torch", "transformers", "tokenizers", "httpx", "attrs", "toolz"]
# ///
"""Train the weights of a small local model from a program's own good runs, on this machine.

    python examples/finetune_local.py                 # an encoder-decoder (T5), a decoder (Llama)
    python examples/finetune_local.py --kind llama --reinforce
    python examples/finetune_local.py --kind t5 --model google-t5/t5-base

The models are small ones with random weights, and a tokenizer made on the spot, since nothing can
be downloaded everywhere; `--model` takes real weights. A trained model is an LM with `.batch`, so
that `evaluate` runs all rows in lock-step.
"""

import argparse
import copy
import hashlib
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

import lmopt
from lmopt import Request, Response, Usage, evaluate, exact_match, mock_lm, plain, predict
from lmopt_optimizers import finetune, grpo

WORDS = {
    "billing": ["invoice", "refund", "charge", "payment"],
    "shipping": ["parcel", "courier", "delivery", "address"],
    "account": ["password", "login", "email", "profile"],
    "product": ["broken", "manual", "colour", "battery"],
}
TEAMS = {word: team for team, words in WORDS.items() for word in words}
FILLERS = ["please", "my", "the", "is", "about", "help", "with", "again", "today", "now"]
TASK = predict("ticket -> team", instructions="Name the team.", adapter=plain, retries=0)


def tickets(count: int, seed: int) -> list[dict[str, str]]:
    """Make tickets: some words of no meaning, and one that tells the team."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        word = rng.choice(list(TEAMS))
        said = [*rng.sample(FILLERS, 4), word]
        rng.shuffle(said)
        rows.append({"ticket": " ".join(said), "team": TEAMS[word]})
    return rows


def tokenizer_of(texts: list[str]) -> Any:
    """Make a tokenizer of the words of some texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|:"), "isolated")
    made.decoder = decoders.Fuse()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def small(kind: str, tokenizer: Any) -> Any:
    """Make a small model with random weights."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": len(tokenizer)}
    if kind == "t5":
        config = transformers.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, **ids,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, **ids,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Local:
    """Models on this machine, by name: each answers single requests and batches."""

    identity = "local"

    def __init__(self, model: Any, tokenizer: Any, device: str, folder: str = "") -> None:
        self.models, self.tokenizer, self.device = {"base": model.to(device)}, tokenizer, device
        self.folder = folder
        self.encodes = model.config.is_encoder_decoder

    def __call__(self, request: Request) -> Response:
        """Answer one request."""
        return self.batch([request])[0]

    @torch.no_grad()
    def batch(self, requests: list[Request]) -> list[Response]:
        """Answer requests together, those of one model and temperature at once."""
        answers: dict[int, Response] = {}
        groups: dict[Any, list[int]] = {}
        for place, one in enumerate(requests):
            groups.setdefault((one.model or "base", one.temperature or 0.0), []).append(place)
        for (name, heat), places in groups.items():
            prompts = [text_of(requests[place].messages) for place in places]
            torch.manual_seed(sum(requests[place].rollout for place in places))
            for place, text in zip(places, self.generate(name, prompts, heat), strict=True):
                answers[place] = Response(text, usage=Usage(calls=1), model=name)
        return [answers[place] for place in range(len(requests))]

    def generate(self, name: str, prompts: list[str], heat: float) -> list[str]:
        """Write on from prompts; without heat always the most probable words."""
        model = self.models[name].eval()
        self.tokenizer.padding_side = "left"
        given = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        given.pop("token_type_ids", None)
        heat_ = (
            {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {"do_sample": False}
        )
        made = model.generate(**given, max_new_tokens=8, **heat_)
        new = made if self.encodes else made[:, given["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def loss(self, model: Any, examples: list[dict[str, Any]]) -> torch.Tensor:
        """The mean loss of each example's reply, weighed by its advantage where it has one."""
        prompts = [text_of(one["messages"][:-1]) for one in examples]
        replies = [one["messages"][-1]["content"] for one in examples]
        weights = torch.tensor([one.get("advantage", 1.0) for one in examples], device=self.device)
        end = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        if self.encodes:
            given = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
            labels = self.tokenizer(
                [f"{one}{end}" for one in replies], return_tensors="pt", padding=True
            )
            labels = labels["input_ids"].to(self.device)
            logits = model(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"],
                labels=labels.masked_fill(labels == 0, -100),
            ).logits  # fmt: skip
        else:
            both = [f"{p}{r}{end}" for p, r in zip(prompts, replies, strict=True)]
            given = self.tokenizer(both, return_tensors="pt", padding=True).to(self.device)
            sizes = [len(ids) for ids in self.tokenizer(prompts)["input_ids"]]
            labels = given["input_ids"].clone()
            for row, size in enumerate(sizes):
                labels[row, :size] = 0
            mask = given["attention_mask"]
            logits = model(input_ids=given["input_ids"], attention_mask=mask).logits[:, :-1]
            labels = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels.masked_fill(labels == 0, -100), reduction="none",
            ignore_index=-100,
        )  # fmt: skip
        return (losses.sum(1) * weights).mean()

    def train(
        self, examples: list[dict[str, Any]], base_model: str, *, epochs: int = 30,
        rate: float = 3e-3, size: int = 32,
    ) -> str:  # fmt: skip
        """Train a copy of a model; return its name, by which it is found again the next time."""
        told = lmopt.canonical([examples, base_model, epochs, rate, size, str(self.models["base"])])
        name = f"trained-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        model = copy.deepcopy(self.models[base_model or "base"]).train()
        kept = self.folder and Path(self.folder, f"{name}.pt")
        if kept and kept.exists():
            model.load_state_dict(torch.load(kept, weights_only=True))
            self.models[name] = model
            return name
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        rng, order = random.Random(0), list(examples)
        for _ in range(epochs):
            rng.shuffle(order)
            for start in range(0, len(order), size):
                optimizer.zero_grad()
                self.loss(model, order[start : start + size]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        if kept:
            torch.save(model.state_dict(), kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)  # whole or not at all
        self.models[name] = model
        return name

    def begin(self, examples: list[dict[str, Any]], base_model: str) -> str:
        """Train a little only, so that there is something to reinforce."""
        return self.train(examples[:150], base_model, epochs=8)

    def reinforce(self, examples: list[dict[str, Any]], base_model: str) -> str:
        """One step of policy gradient on replies with advantages."""
        return self.train(examples, base_model, epochs=1, rate=1e-3, size=len(examples))


def text_of(messages: Any) -> str:
    """Write messages as one text, as a base model reads it."""
    texts = [one["content"] if isinstance(one, dict) else one.text for one in messages]
    return "\n".join(texts) + "\n"


def teacher(inputs: lmopt.Record) -> dict[str, str]:
    """Answer right: what a large model would do."""
    return {"team": next(TEAMS[word] for word in inputs.ticket.split() if word in TEAMS)}


def local(kind: str, name: str, rows: list[dict[str, str]], folder: str) -> Local:
    """The model to train, real or small."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name:
        load = (
            transformers.AutoModelForSeq2SeqLM
            if kind == "t5"
            else transformers.AutoModelForCausalLM
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return Local(load.from_pretrained(name), tokenizer, device, folder)
    texts = [text_of(lmopt.preview(TASK, ticket=row["ticket"])) for row in rows]
    tokenizer = tokenizer_of([*texts, *(f"Team: {team}" for team in WORDS)])
    return Local(small(kind, tokenizer), tokenizer, device, folder)


def reinforced(lm: Local, params: lmopt.Params, train: Any, held: Any, steps: int) -> None:
    """Go on by policy gradient from what was learned so far, and show the reward of each step."""
    search = grpo(lm.reinforce, lm=lm, group=8, steps=steps, minibatch=16, max_labeled=0)
    trials = list(search.trials(TASK.with_params(params), train, exact_match))
    for trial in trials[1:]:
        print(f"  {trial.note}; held-out half {trial.score:.3f}")
    best = max(trials, key=lambda one: one.score or 0.0)
    print(f"  after {steps} steps: {evaluate(TASK, held, exact_match, lm=lm, params=best.params)}")


def main(given: argparse.Namespace) -> list[float]:
    """Train each kind of model, and print what it scores before and after; return the latter."""
    scores = []
    train, held = tickets(given.rows, 1), tickets(200, 2)
    for kind in [given.kind] if given.kind else ["t5", "llama"]:
        lm, began = local(kind, given.model, train + held, given.folder), time.perf_counter()
        before = evaluate(TASK, held, exact_match, lm=lm)
        trainer = lm.train if not given.reinforce else lm.begin
        search = finetune(trainer, lm=lm, teacher_lm=mock_lm(teacher))
        params = search(TASK, train, exact_match)
        after = evaluate(TASK, held, exact_match, lm=lm, params=params)
        print(f"{kind}: before {before}\n{kind}: after  {after}")
        print(f"  {time.perf_counter() - began:.0f} s on {lm.device}")
        if given.reinforce:
            reinforced(lm, params, train, held, given.reinforce)
        times = []
        for one in (lm, lm.__call__):  # which has no `batch`
            began = time.perf_counter()
            evaluate(TASK, held[:60], exact_match, lm=one, params=params)
            times.append(time.perf_counter() - began)
        print(f"  in one batch {times[1] / times[0]:.1f} times as fast as one by one")
        scores.append(after.score)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=["t5", "llama"])
    parser.add_argument("--model", default="", help="real weights, such as google-t5/t5-base")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--folder", default="", help="keep trained weights here, and use them")
    parser.add_argument("--reinforce", type=int, default=0, metavar="STEPS")
    main(parser.parse_args())
