"""The report of an optimization: one page that needs nothing else, and a table of text."""

import re
from html.parser import HTMLParser

import pytest

import lmopt
from lmopt import exact_match, predict, toy_lm
from lmopt_optimizers import Trial, chain, copro, labeled_few_shot, report, summary

ROWS = [
    {"animal": f"{animal} <{n}> & co", "sound": sound}
    for n in range(8)
    for animal, sound in (("horse", "neigh"), ("sheep", "baa"))
]
TASK = predict("animal -> sound", instructions='Say "what" it <says>.')
TRIALS = list(copro(toy_lm(), breadth=2, depth=2).trials(TASK, ROWS, exact_match))


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
    assert checked.seen.count("svg") == 1 and checked.seen.count("circle") == len(TRIALS)
    assert checked.seen.count("details") == len(TRIALS)


def test_the_page_shows_scores_changes_rows_and_cost():
    page = report(TRIALS)
    best = max(trial.score for trial in TRIALS)
    assert f"from 0.000 to <b>{best:.3f}</b>, {len(TRIALS)} trials" in page
    assert "<ins>+If the text mentions &quot;" in page
    assert "animal: horse &lt;" in page and "&amp; co" in page
    assert page.count('<tr class="up">') == round(best * len(TRIALS[0].evaluation.rows))
    assert report(TRIALS) == page


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
