"""The report of an optimization: one page that needs nothing else, and a table of text."""

import html
import re
from html.parser import HTMLParser

import pytest

import lmopt
from lmopt import exact_match, predict, toy_lm
from lmopt_optimizers import Trial, auto, best, chain, copro, labeled_few_shot, report, summary

ROWS = [
    {"animal": f"{animal} <{n}> & co", "sound": sound}
    for n in range(8)
    for animal, sound in (("horse", "neigh"), ("sheep", "baa"))
]
TASK = predict("animal -> sound", instructions='Say "what" it <says>.')
TRIALS = list(copro(toy_lm(), breadth=2, depth=2, max_labeled=0).trials(TASK, ROWS, exact_match))


class Checked(HTMLParser):
    """Reads a page, and sees that every element is closed in its place."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else():
    page = report(TRIALS, title="Sounds & <more>")
    checked = Checked()
    checked.feed(page)
    assert checked.open == [] and not checked.links and "script" not in checked.seen
    assert "http" not in page and "<title>Sounds &amp; &lt;more&gt;</title>" in page
    assert checked.seen.count("svg") == 2 and checked.seen.count("circle") == 2 * len(TRIALS)
    assert checked.seen.count("details") == len(TRIALS)


def test_the_page_shows_scores_changes_rows_and_cost():
    page = report(TRIALS)
    best = max(trial.score for trial in TRIALS)
    assert f"from 0.000 to <b>{best:.3f}</b>, {len(TRIALS)} trials" in page
    assert "<ins>+If the text mentions &quot;" in page
    assert "animal: horse &lt;" in page and "&amp; co" in page
    assert page.count('<tr class="up">') == round(best * len(TRIALS[0].evaluation.rows))
    assert report(TRIALS) == page


def test_the_page_shows_the_prompt_that_was_sent_and_where_the_best_came_from():
    page = report(TRIALS)
    top = best(TRIALS)
    sent = next(event.request for event in top.evaluation.rows[0].prediction.trace if event.request)
    assert html.escape(lmopt.transcript(sent.messages)) in page
    assert f"<p>Best: {html.escape(top.note)}</p>" in page


def test_what_is_out_is_drawn_apart_and_no_point_lies_on_the_edge():
    one = TRIALS[0]
    rows = lmopt.Evaluation(one.evaluation.rows[:3])
    lost = Trial(one.params, 1.0, "lost", 0, 30, rows, out=True)
    page = report([one, lost])
    first, second = re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)" r="4" (\w+)="(\w*)', page)[
        :2
    ]
    assert second[1] == "285.0" and second[3] == "none" and float(first[1]) == 260.0
    assert 60 < float(first[0]) < float(second[0]) < 780
    assert all(label in page for label in (">0<", ">10<", ">20<", ">30<", ">calls<", ">out<"))


def test_forty_improvements_stand_in_one_list():
    params, made = TASK.params, []
    for n in range(40):
        params = params.replace("predict", instructions=f"Text {n}.")
        made.append(Trial(params, n / 40, f"step {n}", n - 1 if n else None, n))
    page = report(made)
    assert page.count("<ol") == 1 and "<ul" not in page and "0.975, from 38: step 39" in page


def test_the_styles_reach_nothing_else_on_a_page():
    style = re.search("<style>(.*)</style>", report(TRIALS), re.DOTALL)[1]
    rules = [one.strip() for one in re.findall(r"([^{}]+)\{", style)]
    assert rules and all(part.strip().startswith((".lmopt", "@media"))
                         for one in rules for part in one.split(","))  # fmt: skip


def test_a_last_word_is_shown_with_the_rows_of_what_it_was_made_from():
    rows = [{"animal": f"{a} {n}", "sound": a[:2]} for n in range(40) for a in ("dog", "cat")]
    trials = list(auto(toy_lm(), calls=300).trials(predict("animal -> sound"), rows, exact_match))
    assert trials[-1].final and "labelled examples; scored on 7" in trials[-1].note
    page = report(trials)
    assert page.count('<tr class="up">') == len(trials[0].evaluation.rows)


def test_the_page_of_trials_without_scores_and_of_none():
    trials = list(labeled_few_shot(k=2).trials(TASK, ROWS, exact_match))
    page = report(trials)
    assert "not scored" in page and "The trials were not scored." in page
    with pytest.raises(lmopt.DataError, match="no trials to report"):
        report([])
    mixed = list(chain(labeled_few_shot(k=2), copro(toy_lm(), breadth=1, depth=1)).trials(
        TASK, ROWS, exact_match))  # fmt: skip
    assert "<svg" in report(mixed)


def test_the_summary_is_a_table_that_marks_the_best(golden):
    golden("trials.txt", summary(TRIALS) + "\n")
    lines = summary(TRIALS).split("\n")
    assert len(lines) == len(TRIALS) + 1 and sum(line.startswith("*") for line in lines) == 1
    assert re.match(r"^\*? +\d+ +-  -", summary([Trial(TASK.params, note="start")]).split("\n")[1])
