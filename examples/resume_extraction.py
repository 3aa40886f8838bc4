# /// script
# requires-python = ">=3.11"
# dependencies = ["attrs", "httpx", "toolz"]
# ///
"""Read resumes into classes that check themselves; what they refuse is asked for again.

Offline, from the cassette beside this file, whose replies were written by hand. In two of them a
date is wrong, as an LM might have it:

    python examples/resume_extraction.py

With a language model, on the same resumes or on text files of your own:

    python examples/resume_extraction.py --lm openai/gpt-4o-mini
    python examples/resume_extraction.py --base-url http://localhost:8080/v1 mine.txt yours.txt
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Literal

import attrs

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, without installing

import lmopt
from lmopt_optimizers import lm_of, lm_options

TAPE = Path(__file__).with_name("resume_extraction.jsonl")
RESUMES = [
    """MARTA KOWALSKA
marta@kowalska.example | https://kowalska.example

EXPERIENCE
03/2021 - present   Lead Data Engineer, Nordlicht Wind
01/2017 - 02/2021   Data Analyst, Baltic Freight

SKILLS: Python, SQL, dbt""",
    """Tom Okafor, nurse. In August 2018 I left St Brendan's Hospital, where I had been a staff
nurse since February 2013. Since September 2018 I have been a ward manager at Lakeside Clinic. I am
trained in triage and wound care. Write to tom.okafor@mail.example.""",
    """| Name     | Lena Brandt                                           |
| Now      | Toolmaker at Feinwerk, since 1 July 2020              |
| Before   | Apprentice at Hammer & Sohn, from 1 September 2017 until the end of June 2020 |
| Can do   | CNC milling, CAD                                      |""",
    """jun@tanaka.example -- https://code.example/jtanaka
Jun Tanaka: Rust, C, embedded Linux
* Firmware developer @ Orbital Pumps (Apr 2022-)
* Intern @ Orbital Pumps (Oct 2021-Mar 2022)""",
]


@attrs.frozen
class Job:
    """One job; its dates are in order."""

    title: str
    employer: str
    start: date = attrs.field(metadata={"desc": "the first of the month where no day is given"})
    end: date | None = attrs.field(metadata={"desc": "null where it is the job of today"})

    def __attrs_post_init__(self) -> None:
        """Refuse an end before the start."""
        if self.end is not None and self.end < self.start:
            raise ValueError(f"the end {self.end} is before the start {self.start}")


@attrs.frozen
class Link:
    """Where a person can be found."""

    kind: Literal["email", "website", "code"]
    address: str


@attrs.frozen
class Resume:
    """What a resume says."""

    name: str
    jobs: list[Job]
    skills: list[str]
    links: list[Link]


def resume(text: str) -> Resume:
    """Extract what a resume says, the latest job first."""


extract = lmopt.predict(resume, retries=2)


def refusals(made: lmopt.Prediction) -> list[str]:
    """List what the LM was told when it was asked again: a paragraph of the later requests."""
    asked = [event.request.messages[-1].text for event in made.trace if event.request]
    parts = [part for text in asked for part in text.split("\n\n")]
    return [part for part in parts if part.startswith("An earlier reply could not be used")]


def table(found: Sequence[lmopt.Prediction]) -> str:
    """Lay out each resume as a line about the person and a line for each job."""
    rows = [("name", "from", "to", "skills and links, and the jobs")]
    for one in found:
        known = [*one.skills, *(f"{link.kind} {link.address}" for link in one.links)]
        rows.append((one.name, "", "", ", ".join(known)))
        for job in one.jobs:
            end = f"{job.end:%Y-%m}" if job.end else "today"
            rows.append(("", f"{job.start:%Y-%m}", end, f"{job.title}, {job.employer}"))
    cells = [[textwrap.shorten(cell, 88, placeholder="...") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def main(lm: lmopt.LM, texts: Sequence[str] = RESUMES) -> list[lmopt.Prediction]:
    """Read several resumes at once, and show what was found and what was asked again."""
    found = lmopt.run_many(extract, lm, [{"text": text} for text in texts])
    print(table(found))
    for one in found:
        for told in refusals(one):
            print(f"\nAsked again about {one.name}:")
            print(textwrap.fill(told, 96, initial_indent="  ", subsequent_indent="  "))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="resumes as text; by default four")
    given = lm_options(parser, cassette="resume_extraction.calls.jsonl").parse_args()
    texts = [file.read_text(encoding="utf-8") for file in given.files]
    main(lm_of(given, lmopt.replay_lm(TAPE)), texts or RESUMES)
