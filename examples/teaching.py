# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz"]
# ///
"""What an optimizer of prompts is, in 15 small steps from a string to GEPA: a lesson in cells.

Read it here, or open it as a notebook: VS Code, Spyder and jupytext know the mark `# %%`. What a
cell prints stands below it, after `# ->`. It takes a few seconds, no key and no network:

    python examples/teaching.py

With a language model the numbers are other ones. It takes about 1,700 calls (0.6 million tokens),
which are kept in teaching.calls.jsonl, so that running it again costs nothing:

    python examples/teaching.py --lm openai/gpt-4o-mini
    python examples/teaching.py --base-url http://localhost:8080/v1
"""

# %% [markdown]
# # What an optimizer of prompts is
#
# You know Python; nothing else is asked of you. Run the cells from top to bottom, and change what
# you like. Below a cell stands what it should print. The next two cells load the library and choose
# the language model: ours is a toy that runs anywhere. What such a model is comes in step 2.

# %%
import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(globals().get("__file__", "teaching.py")).resolve().parents[1]))

import lmopt
import lmopt_optimizers as opt
from lmopt import compare, evaluate, predict, preview, transcript

HERE = Path(globals().get("__file__", "teaching.py")).resolve().parent

# %%
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
arguments = [] if "ipykernel" in sys.modules else None  # a notebook: ["--lm", "openai/gpt-4o-mini"]
given = opt.lm_options(parser, cassette="teaching.calls.jsonl").parse_args(arguments)
lm = opt.lm_of(given, offline=lmopt.toy_lm())  # the one place where the model is chosen

# %% [markdown]
# ## 1. A prompt is a string
#
# A language model (LM) is sent a text, the *prompt*, and sends back a text, the *reply*. Here is a
# prompt for a help desk. Other words would get other replies, better ones or worse ones. Which
# words are good, and how can a program find them? That is all this lesson is about.

# %%
ticket = "Where is my parcel?"
prompt = f"Which team can help: billing, shipping or account?\n\nTicket: {ticket}\nTeam:"
print(prompt)
# -> Which team can help: billing, shipping or account?
# ->
# -> Ticket: Where is my parcel?
# -> Team:

# %% [markdown]
# ## 2. An LM is a function
#
# For lmopt an LM is any function that takes a `Request`, which holds messages, and returns a
# `Response`, which holds a text. This one is written by hand and knows two words. A real one knows
# far more, but from outside it is the same: text in, text out.


# %%
def clerk(request):
    """Answer by one word of the last message."""
    known = {"parcel": "shipping", "password": "account"}
    asked = request.messages[-1].text
    return lmopt.Response(next((known[word] for word in known if word in asked), "billing"))


request = lmopt.Request([lmopt.Message("user", prompt)])
print(clerk(request).text)
# -> shipping

# %% [markdown]
# The `lm` that we chose above is such a function too. The toy knows no English. It can only go by
# what its prompt shows; so whatever it learns below, it has learned from the prompt. This prompt
# shows it nothing yet, and it says back what it was told:

# %%
print(lm(request).text)
# -> Which team can help: billing, shipping or account?
# ->
# -> Ticket: Where is my parcel?
# -> Team:

# %% [markdown]
# ## 3. A signature instead of a string
#
# A program must find the answer in the reply. So we do not write the string ourselves: we say what
# goes in, what comes out (one of three words, `Literal`), and what to do. That is a *signature*;
# lmopt makes messages of it, with marks such as `[[ ## team ## ]]` that tell where a value begins.
# `preview` shows what will be sent; we cut its long last line.

# %%
route = predict(
    "ticket -> team: Literal['billing', 'shipping', 'account']",
    instructions="Route the ticket to the team that can help.",
)
for line in transcript(preview(route, ticket=ticket)).splitlines():
    print(lmopt.cut(line, 90))
# -> --- system ---
# -> Input fields:
# -> 1. `ticket` (str)
# -> Output fields:
# -> 1. `team` (one of "billing", "shipping", "account")
# ->
# -> The reply has each value below its header, in this structure:
# ->
# -> [[ ## team ## ]]
# -> one of the choices
# ->
# -> [[ ## completed ## ]]
# ->
# -> Instructions:
# -> Route the ticket to the team that can help.
# -> --- user ---
# -> [[ ## ticket ## ]]
# -> Where is my parcel?
# ->
# -> Reply with `team` in this structure, starting with [[ ## team ## ]] and ending with [[ ##…

# %% [markdown]
# `route` is a program: call it with an LM and its inputs, and it returns its outputs. The clerk
# does not keep to the format, by the way; its reply is one bare word. That brings us to step 4.

# %%
print(route(clerk, ticket=ticket).team)
# -> shipping

# %% [markdown]
# ## 4. Reading a reply, and asking again
#
# LMs are free with formats. To see what is done about it we take an LM that gives these four
# replies, one after the other, and ask three times. The first two can be read. The third names no
# team, so the program asks again by itself: that takes a second call, and the fourth reply.

# %%
replies = ["**Team:** Shipping", '{"team": "shipping"}', "The parcel people.", "shipping"]
scripted = lmopt.scripted_lm(replies)
for _ in range(3):
    prediction = route(scripted, ticket=ticket)
    print(prediction.team, prediction.usage.calls)
# -> shipping 1
# -> shipping 1
# -> shipping 2

# %% [markdown]
# Nothing is hidden: the `trace` of a prediction lists all that happened (print it, to see it as a
# tree). Here is what the second request of the last run says about the reply before.

# %%
asked_again = prediction.trace[1].request.messages[-1].text
print(*asked_again.split("\n\n")[1].split("; "), sep="\n")
# -> An earlier reply could not be used: the field `team` is missing
# -> expected one of "billing", "shipping", "account".

# %% [markdown]
# ## 5. A metric, and a score with its interval
#
# To say "better" we need examples whose answers are known: 120 tickets, shuffled, the three teams
# in turn. We part them: from the first 30 we *learn*, on the next 30 we compare prompts and
# *choose*, and the other 60, the *test*, we leave alone until step 10 tells why.

# %%
tickets = lmopt.read_examples(HERE / "tickets.jsonl")
teams = ["billing", "shipping", "account"]
rows = opt.spread([row for row in tickets if row.team in teams], 120, by=["team"])
learn, choose, test = rows[:30], rows[30:60], rows[60:]
print(learn[0])
print(len(learn), len(choose), len(test))
# -> Record(ticket='The monthly bill is higher than the price we agreed on.', team='billing')
# -> 30 30 60

# %% [markdown]
# A *metric* says how good one answer is, from 0 to 1. `evaluate` runs the program on every row and
# takes the mean.


# %%
def right(example, prediction):
    """Return 1.0 for the right team, and 0.0 for a wrong one."""
    return float(prediction.team == example.team)


start = evaluate(route, choose, right, lm=lm)
print(start)
# -> <score 0.400, 95% 0.246 to 0.577, 30 rows, 0 errors>

# %% [markdown]
# 12 of 30 rows are right. Thirty other tickets would have given another score. The 95 % *interval*
# says how far off ours may be: the score on endlessly many tickets lies, very likely, between 0.25
# and 0.58. Pure guessing among three teams scores 0.33, which lies between them as well: so far we
# cannot even say that the toy does better than guessing.

# %% [markdown]
# ## 6. What can be learned is data
#
# What an optimizer may change of a program is one value, its `Params`. For each step (`route` has
# one, called "predict") it holds the instructions, and what step 7 adds. It cannot be changed in
# place: `replace` makes a new one, and `diff` shows what differs. Let us add a rule.

# %%
rule = 'If the text mentions "parcel" or "delivery", answer "shipping".'
old = route.params["predict"].instructions
ruled = route.params.replace("predict", instructions=f"{old}\n{rule}")
print(lmopt.diff(route.params, ruled))
# -> --- predict
# -> +++ predict
# -> +If the text mentions "parcel" or "delivery", answer "shipping".


# %%
def measure(params, part=choose):
    """Evaluate the route with other parameters."""
    return evaluate(route, part, right, lm=lm, params=params)


print(measure(ruled))
# -> <score 0.633, 95% 0.455 to 0.781, 30 rows, 0 errors>

# %% [markdown]
# 19 of 30. (The toy obeys rules that are written like this one, and no others; a real LM
# understands what you write.) Is it better, or was it lucky? See the end of step 7.

# %% [markdown]
# ## 7. Demonstrations, by hand
#
# Instead of telling an LM what to do we can show it. A *demonstration* is an example with its
# answer. It goes into the prompt as if it had been asked, and answered, before.

# %%
by_hand = [
    {"ticket": "I was charged twice", "team": "billing"},
    {"ticket": "My parcel is late", "team": "shipping"},
    {"ticket": "I forgot my password", "team": "account"},
]
shown = route.params.replace("predict", demos=by_hand)
print(transcript(preview(route.with_params(shown), ticket=ticket)[1:3]))
# -> --- user ---
# -> [[ ## ticket ## ]]
# -> I was charged twice
# -> --- assistant ---
# -> [[ ## team ## ]]
# -> billing
# ->
# -> [[ ## completed ## ]]

# %%
print(measure(shown))
for params in (ruled, shown):
    gain = compare(start, measure(params))
    print(f"{gain.better} rows better, {gain.worse} worse, p = {gain.p_value:.3f}")
# -> <score 0.733, 95% 0.556 to 0.858, 30 rows, 0 errors>
# -> 7 rows better, 0 worse, p = 0.016
# -> 11 rows better, 1 worse, p = 0.006

# %% [markdown]
# All three saw the same rows, so we count: on how many is the new program right and the start
# wrong, and on how many is it the other way round? If the change did nothing, a coin might as well
# have decided each of these rows. How often do 12 coins fall as unevenly as 11 to 1, either way?

# %%
coins = random.Random(0)  # with a seed, so that you get the same numbers
heads = [sum(coins.random() < 0.5 for _ in range(12)) for _ in range(10_000)]
print(sum(count <= 1 or count >= 11 for count in heads) / 10_000)
# -> 0.0067

# %% [markdown]
# That is what `p` is, worked out without coins. Where it is below 0.05, people believe that the
# change did something; above that we say *noise*. So the rule and the demonstrations have helped.

# %% [markdown]
# ## 8. The simplest optimizer
#
# An optimizer is a function: from a program, examples and a metric to `Params`. Here is one in
# three lines, which shows the first six examples, and then lmopt's, which draws them from all,
# as many of each team. Neither asks the LM anything.


# %%
def first_six(program, trainset, metric):
    """Show the first six examples."""
    return program.params.replace("predict", demos=trainset[:6])


for optimize in (first_six, opt.labeled_few_shot(k=6)):
    result = measure(optimize(route, learn, right))
    print(result, f"p = {compare(measure(shown), result).p_value:.2f}")
# -> <score 0.700, 95% 0.521 to 0.833, 30 rows, 0 errors> p = 1.00
# -> <score 0.667, 95% 0.488 to 0.808, 30 rows, 0 errors> p = 0.75

# %% [markdown]
# `p` is against the three demonstrations by hand, which had 0.73. One or two rows of 30 are noise:
# from these numbers nobody can tell which of the three sets is the best.

# %% [markdown]
# ## 9. Random search
#
# Which six examples are best to show? Nobody knows. So draw a dozen sets at random, score each, and
# keep the best: four lines, and a real optimizer.

# %%
rng = random.Random(0)
draws = [route.params.replace("predict", demos=rng.sample(learn, 6)) for _ in range(12)]
scores = [measure(params).score for params in draws]
winner = draws[scores.index(max(scores))]
print(*(f"{score:.2f}" for score in sorted(scores)))
print(f"mean {mean(scores):.2f}, best {max(scores):.2f}")
# -> 0.47 0.53 0.53 0.57 0.60 0.63 0.67 0.70 0.70 0.73 0.80 0.80
# -> mean 0.64, best 0.80

# %% [markdown]
# From 0.47 to 0.80, only by which examples are shown! But how much of that is the set, and how much
# is luck? The best of twelve is best for both reasons.

# %% [markdown]
# ## 10. Why some rows are kept out of sight
#
# Now we open the test rows, which took part in nothing so far, and measure four programs on each
# part of our tickets: the start, the three demonstrations by hand, the winner, and one that shows
# all 30 examples of the part we learn from.

# %%
all_shown = route.params.replace("predict", demos=learn)
tried = {"start": route.params, "by hand": shown, "winner": winner, "all 30": all_shown}
print("         learn choose   test")
for name, params in tried.items():
    found = [measure(params, part).score for part in (learn, choose, test)]
    print(f"{name:7}", *(f"{score:6.2f}" for score in found))
# ->          learn choose   test
# -> start     0.50   0.40   0.48
# -> by hand   0.73   0.73   0.70
# -> winner    0.87   0.80   0.70
# -> all 30    1.00   0.83   0.85

# %% [markdown]
# "start" knows none of the parts, and yet scores from 0.40 to 0.50: so much is noise. "all 30" has
# 1.00 on the rows to learn from, because the answer to each stands in its prompt. That is memory,
# and tells nothing of tickets to come; 0.83 and 0.85 do. To be far better on the rows that one has
# learned from than on others is called *overfitting*.

# %% [markdown]
# "winner" falls too, from 0.80 on the rows to choose from to 0.70 on the test, and its prompt has
# none of either. On so few rows that may be noise. But we chose it *because* it did well on the
# former, and such a score is too high on average. By how much? Here are twelve who guess among
# three teams, and the score of the luckiest (the mean of 500 such games).


# %%
def luckiest():
    """Return the score, on 30 rows, of the best of twelve who guess."""
    return max(sum(rng.random() < 1 / 3 for _ in range(30)) for _ in range(12)) / 30


print(f"{mean(luckiest() for _ in range(500)):.2f}")
# -> 0.48

# %% [markdown]
# 0.48, where each of them is worth 0.33: that is what choosing alone makes of nothing. Hence three
# parts: rows to learn from, rows to choose by, and a test that takes part in no choice. By the test
# our search is no better than three lines by hand, and to show all 30 is better than its winner:

# %%
gain = compare(measure(winner, test), measure(all_shown, test))
print(f"{gain.better} rows better, {gain.worse} worse, p = {gain.p_value:.3f}")
# -> 9 rows better, 0 worse, p = 0.004

# %% [markdown]
# ## 11. Calls cost money
#
# Each row that is scored is a call, and calls are paid for, by the token: a word or a part of one.
# So ask before you spend. `plan` tells what a search takes at most, were each reply to be asked for
# three times (step 4), and what it usually takes, if none is. With `calls=100` it never makes more,
# and ends with the best it has by then.

# %%
options = {"candidates": 2, "valset": choose, "max_bootstrapped": 0}  # step 13 tells what that is
print(opt.random_search(lm, **options).plan(route, learn))
print(opt.random_search(lm, **options, calls=100).plan(route, learn))
# -> at most 180 runs and 540 LM calls, usually 180, about 200,000 tokens
# -> at most 100 runs and 100 LM calls, usually 100, about 110,000 tokens

# %% [markdown]
# And never pay twice. `record` makes of an LM one that writes all calls on a tape, a file, and
# answers from it what it has. Below, the power fails after two trials. We start again: the calls
# that were paid for come from the tape, and only new ones are made. A candidate that is clearly
# behind after some rows is `out`, which saves the calls on the rest.

# %%
with tempfile.TemporaryDirectory() as folder:
    tape = Path(folder) / "calls.jsonl"
    search = opt.random_search(lmopt.record(tape)(lm), **options)
    trials = search.trials(route, learn, right)  # made one by one, as they are asked for
    print(next(trials).note, "and", next(trials).note)
    print(tape.read_text(encoding="utf-8").count("\n"), "calls on the tape; start again:")
    for trial in search.trials(route, learn, right):
        print(f"{trial.score:.2f} {trial.note}")
    print(tape.read_text(encoding="utf-8").count("\n"), "calls on the tape")
# -> start and 30 labelled examples
# -> 90 calls on the tape; start again:
# -> 0.40 start
# -> 0.83 30 labelled examples
# -> 0.60 4 labelled examples
# -> 0.50 up to 4 labelled examples; out after 16 of 30 rows
# -> 0.83 up to 30 labelled examples
# -> 136 calls on the tape

# %% [markdown]
# ## 12. Instructions from failures
#
# Demonstrations can be drawn; instructions must be written. By whom? By an LM, which is shown what
# went wrong. One step of the optimizer `copro`, by hand: first, the cases that failed among the
# rows to learn from.

# %%
seen = measure(route.params, learn)
failures = [case for case in opt.cases(route, "predict", seen.rows, None) if case["score"] < 1]
print(len(failures), "of", len(learn))
for name, value in [pair for case in failures[:1] for pair in case.items()]:
    print(f"{name}: {value}")
# -> 15 of 30
# -> inputs: {'ticket': 'Can my wife and I share one login for orders?'}
# -> outputs: {'team': 'billing'}
# -> expected: {'team': 'account'}
# -> score: 0.0

# %% [markdown]
# Second, `proposer()`, a program as `route` is one: it takes a description of the program, the
# instructions now, and cases; it returns new instructions. Three times, with other cases each. The
# toy as a writer just counts words, so that "and" becomes a sign of "account".

# %%
about = {"program": opt.description(route), "step": "predict", "current": old}
texts = [opt.proposer()(lm, cases=failures[n::3], **about).instructions for n in range(3)]
print(texts[0])
# -> Route the ticket to the team that can help.
# -> If the text mentions "and" or "password" or "surname", answer "account".
# -> If the text mentions "carrier" or "package" or "tracking", answer "shipping".

# %% [markdown]
# Third, score the three on the rows to choose from, against the start.

# %%
proposed = [route.params.replace("predict", instructions=text) for text in texts]
results = [measure(params) for params in proposed]
for result in results:
    print(result, f"p = {compare(start, result).p_value:.2f}")
# -> <score 0.467, 95% 0.302 to 0.639, 30 rows, 0 errors> p = 0.69
# -> <score 0.400, 95% 0.246 to 0.577, 30 rows, 0 errors> p = 1.00
# -> <score 0.400, 95% 0.246 to 0.577, 30 rows, 0 errors> p = 1.00

# %% [markdown]
# The best is two rows better than the start: noise. One step seldom does it. `copro` takes several,
# with ten texts in each, and shows the writer the earlier texts with their scores.

# %% [markdown]
# ## 13. Programs of several steps, and whom to blame
#
# A program may ask more than once. Its body is a generator: it yields the step that it wants, and
# gets what came of it. This one makes a summary, and then sorts the summary instead of the ticket.

# %%
shorten = predict("ticket -> summary", instructions="Say in a few words what the ticket is about.")
sort = predict("summary -> team: Literal['billing', 'shipping', 'account']")


@lmopt.program(shorten=shorten, sort=sort)
def desk(steps, ticket):
    """Shorten the ticket, then sort what is left of it."""
    short = yield steps.shorten(ticket=ticket)
    return (yield steps.sort(summary=short.summary))


for event in desk(lm, ticket=learn[0].ticket).trace:
    if event.kind == "step":
        print(f"{event.path or 'desk'}: {dict(event.outputs)}")
# -> shorten: {'summary': 'The monthly bill is higher than the price'}
# -> sort: {'team': 'billing'}
# -> desk: {'team': 'billing'}

# %% [markdown]
# When the team is wrong, which step is to blame? Hand the second one the whole ticket. If it is
# right then, the summary has lost what matters; if not, sorting is the weak step. Here it is.

# %%
seen = evaluate(desk, learn, right, lm=lm)
whole = evaluate(sort, [row | {"summary": row.ticket} for row in learn], right, lm=lm)
print(f"{seen.score:.2f} by summary, {whole.score:.2f} by the whole ticket")
pairs = zip(seen.rows, whole.rows, strict=True)
print(Counter("shorten" if after.score else "sort" for before, after in pairs if not before.score))
# -> 0.50 by summary, 0.50 by the whole ticket
# -> Counter({'sort': 14, 'shorten': 1})

# %% [markdown]
# The trace helps in another way: where a run went well, what each step did is a demonstration of
# that step. So we get demonstrations of summaries, though no one ever wrote one. This is called
# *bootstrapping*; `bootstrap_few_shot` does it.

# %%
good = [opt.step_demos(desk, row) for row in seen.rows if row.score == 1]
taught = desk.params
for path in taught:
    taught = taught.replace(path, demos=[demos[path] for demos in good])
before, after = (evaluate(desk, choose, right, lm=lm, params=one) for one in (desk.params, taught))
gain = compare(before, after)
print(f"{before.score:.2f} to {after.score:.2f}: {gain.better} rows better, {gain.worse} worse")
# -> 0.33 to 0.50: 5 rows better, 0 worse

# %% [markdown]
# Five coins fall alike in 1 of 16 tries: promising, and not yet sure. More rows would tell.

# %% [markdown]
# ## 14. Keep who is best at something
#
# Below, four candidates on five rows. By the mean we would keep A alone, and forget that C does
# just what A cannot. The *Pareto front* keeps everyone whom some row needs: B leads only where A
# does, and D only where A or C do, so both go. `pareto` counts on how many rows the others lead.

# %%
matrix = {"A": [1, 1, 1, 0, 0], "B": [1, 1, 0, 0, 0], "C": [0, 0, 0, 1, 1], "D": [1, 0, 0, 0, 1]}
best = [max(column) for column in zip(*matrix.values(), strict=True)]
for name, row in matrix.items():
    leads = [place for place in range(5) if row[place] == best[place]]
    print(f"{name}: mean {mean(row):.1f}, leads on rows {leads}")
print(opt.pareto(list(matrix.values())))
# -> A: mean 0.6, leads on rows [0, 1, 2]
# -> B: mean 0.4, leads on rows [0, 1]
# -> C: mean 0.4, leads on rows [3, 4]
# -> D: mean 0.4, leads on rows [0, 4]
# -> [3, 0, 2, 0]

# %% [markdown]
# Now the start and the three texts of step 12.

# %%
ours = [[row.score for row in result.rows] for result in (start, *results)]
print(opt.pareto(ours))
print(f"{mean(max(column) for column in zip(*ours, strict=True)):.2f}")
# -> [0, 24, 22, 0]
# -> 0.67

# %% [markdown]
# Two texts stay. The second has the mean of the start, and yet it knows what the first does not.
# Could we always take the right one of the four, we would score 0.67, where the best of them alone
# scores 0.47. To write one text that knows what both know is worth a try.

# %% [markdown]
# ## 15. GEPA
#
# `gepa` is all of this together. It draws a candidate from the Pareto front, runs it on eight rows
# to learn from, and has new instructions written from what went wrong there. Are they better on the
# eight, they are scored on the rows to choose from. At times it joins two candidates of the front.
# The writer learns more from a metric that says what would have been right: its *feedback*.


# %%
def explained(example, prediction):
    """Score as before, and say what would have been right."""
    good = prediction.team == example.team
    return lmopt.Score(float(good), "" if good else f"This is for {example.team}.")


optimize = opt.gepa(lm, max_runs=400, max_labeled=0, valset=choose)  # instructions only
trials = list(optimize.trials(route, learn, explained))
print(opt.summary(trials))
# ->    #  score  95 %           calls  from  note
# ->    0  0.400  0.246 to 0.577    30     -  start
# ->    1  0.400  0.246 to 0.577    77     0  new instructions of predict
# ->    2  0.500  0.332 to 0.668   116     1  merged from 0 and 1
# ->    3  0.500  0.332 to 0.668   155     2  merged from 0 and 2
# ->    4  0.500  0.332 to 0.668   194     2  merged from 0 and 2
# ->    5  0.533  0.361 to 0.698   233     4  merged from 2 and 4
# ->    6  0.533  0.361 to 0.698   272     5  merged from 2 and 5
# ->    7  0.533  0.361 to 0.698   330     2  new instructions of predict
# -> *  8  0.600  0.423 to 0.754   373     5  new instructions of predict

# %% [markdown]
# Each line is a *trial*: its score, the calls so far, and from which trial it was made; a star is
# beside the best. Trial 1 is no better than the start by its mean, but the front has kept it, and
# trial 2 is made of both. Look at the intervals: each step is within noise, and only all together
# may amount to something. Here is how the best instructions begin, and then the test.

# %%
evolved = opt.best(trials).params
print(*evolved["predict"].instructions.splitlines()[:4], sep="\n")
# -> Route the ticket to the team that can help.
# -> If the text mentions "orders" or "password" or "somebody", answer "account".
# -> If the text mentions "order" or "second" or "today", answer "shipping".
# -> If the text mentions "checkout" or "invoice" or "you", answer "billing".

# %%
for before, after in ((route.params, evolved), (evolved, all_shown)):
    was, now = measure(before, test), measure(after, test)
    print(f"from {was.score:.2f} to {now.score:.2f}, p = {compare(was, now).p_value:.3f}")
# -> from 0.48 to 0.63, p = 0.049
# -> from 0.63 to 0.85, p = 0.001

# %% [markdown]
# GEPA has improved the start, also on rows that it never saw (0.049: to be believed, but barely).
# But to show all 30 examples, which takes no search, is better still. That is our toy: it goes by
# examples well, and what it writes is superstition about words. A real LM writes sentences, and
# understands them; there it may be the other way round. So measure: with your LM, on your rows.

# %% [markdown]
# Last, all trials as one page: which candidate came from which, and what changed in its text.

# %%
page = opt.report(trials, title="GEPA on 30 tickets")
Path("report.html").write_text(page, encoding="utf-8")
print("Open report.html in a browser.")
# -> Open report.html in a browser.

# %% [markdown]
# ## What to read next
#
# - `README.md`: all of lmopt on some pages; `auto` is the optimizer to begin with in earnest.
# - `examples/quickstart.py`: these steps as a program, for your own data and LM; or without a line
#   of Python, `lmopt --help`.
# - `help(opt.gepa)`, `help(opt.copro)`: each optimizer names its paper, and how it differs.
# - The papers: arXiv 2310.03714 (demonstrations), 2406.11695 (instructions), 2507.19457 (GEPA).
# - To write an optimizer of your own: `shortest` in the README, and `check_optimizer` to test it.
