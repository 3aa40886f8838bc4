"""Resumes are read into classes, and wrong dates are asked for again."""

import subprocess
import sys
from datetime import date

import pytest
from conftest import ROOT, load_example

import lmopt

TOM = {"name": "Tom Okafor", "skills": ["triage"], "links": []}


def held(start, end):
    """A reply whose one job was held between two dates."""
    job = {"title": "Nurse", "employer": "St Brendan's", "start": start, "end": end}
    return {**TOM, "jobs": [job]}


def test_two_wrong_dates_are_asked_for_again_and_all_of_the_cassette_is_used(capsys):
    example = load_example("resume_extraction")
    with lmopt.replay_lm(example.TAPE, strict=True) as lm:
        marta, tom, lena, jun = found = example.main(lm)
    assert [one.usage.calls for one in found] == [1, 2, 2, 1]
    assert (tom.jobs[1].start, tom.jobs[1].end) == (date(2013, 2, 1), date(2018, 8, 31))
    assert lena.jobs[1].end == date(2020, 6, 30) and not lena.links
    assert jun.links[1] == example.Link("code", "https://code.example/jtanaka")
    assert isinstance(marta.jobs[0], example.Job) and marta.jobs[0].end is None
    assert "the end 2013-02-01 is before the start 2018-08-31" in example.refusals(tom)[0]
    assert "'2020-06-31' is not date YYYY-MM-DD or null" in example.refusals(lena)[0]
    assert "2013-02  2018-08  Staff Nurse, St Brendan's Hospital" in capsys.readouterr().out


def test_the_same_is_found_in_any_number_of_threads():
    example = load_example("resume_extraction")
    lm, texts = lmopt.replay_lm(example.TAPE), [{"text": text} for text in example.RESUMES]
    one, four = (lmopt.run_many(example.extract, lm, texts, workers=n) for n in (1, 4))
    assert one == four and [made.trace for made in one] == [made.trace for made in four]


def test_a_reply_may_be_wrong_twice_and_wrong_dates_never_come_through():
    example = load_example("resume_extraction")
    wrong, right = held("2018-08-31", "2013-02-01"), held("2013-02-01", "2018-08-31")
    made = example.extract(lmopt.scripted_lm([wrong, wrong, right]), text="Tom Okafor")
    assert made.jobs[0].end == date(2018, 8, 31)
    assert "the end 2013-02-01 is before the start" in example.refusals(made)[0]
    with pytest.raises(lmopt.ParseError, match="the end 2013-02-01 is before the start"):
        example.extract(lmopt.scripted_lm([wrong] * 3), text="Tom Okafor")


def test_it_runs_as_a_script_also_on_a_file_of_ones_own(tmp_path):
    script = [sys.executable, "-X", "utf8", str(ROOT / "examples" / "resume_extraction.py")]
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 60, "cwd": tmp_path}
    ran = subprocess.run(script, check=True, **options)
    assert ran.stdout.count("Asked again about") == 2 and not list(tmp_path.iterdir())
    example = load_example("resume_extraction")
    mine = tmp_path / "mine.txt"
    mine.write_text(example.RESUMES[0], encoding="utf-8")
    ran = subprocess.run([*script, str(mine)], check=True, **options)
    assert "Marta Kowalska" in ran.stdout and "Tom" not in ran.stdout
