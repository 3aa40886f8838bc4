"""The lesson is a notebook in percent format, and each of its cells prints what stands below it."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LESSON = ROOT / "examples" / "teaching.py"
MARK = re.compile(r"^# %%(.*)\n", re.MULTILINE)
SHOWN = re.compile(r"^# ->(?: (.*))?\n", re.MULTILINE)  # a line of the output of a cell


def notebook(text):
    """Make of a file in percent format what Jupyter has in an .ipynb file."""
    first, *rest = MARK.split(text)
    cells = []
    for mark, body in [("", first), *zip(rest[::2], rest[1::2], strict=True)]:
        kind = {"": "code", " [markdown]": "markdown"}[mark]
        lines = body.rstrip("\n").split("\n")
        if kind == "markdown":
            assert all(line == "#" or line.startswith("# ") for line in lines), body
            lines = [line[2:] for line in lines]
        cells.append({"cell_type": kind, "metadata": {}, "source": "\n".join(lines)})
    return {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": cells}


def filled(text):
    """Run the cells in one namespace, and put below each what it has printed."""
    names = {"__name__": "teaching", "__file__": str(LESSON)}
    first, *rest = MARK.split(text)
    made = [ran(first, names)]
    for mark, body in zip(rest[::2], rest[1::2], strict=True):
        made += [f"# %%{mark}\n", body if mark else ran(body, names)]
    return "".join(made)


def ran(body, names):
    code = SHOWN.sub("", body).rstrip("\n")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "teaching.py", "exec"), names)
    *lines, last = out.getvalue().split("\n")
    assert last == "", "what a cell prints ends with a line break"
    shown = [f"# -> {line}" if line else "# ->" for line in lines]
    blank = body[len(body.rstrip("\n")) :]
    return "\n".join([code, *shown]) + blank


def test_each_cell_prints_what_stands_below_it_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["teaching.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    text = LESSON.read_text(encoding="utf-8")
    wrong = text.replace("# -> shipping\n", "# -> billing\n", 1)
    right = filled(wrong)
    if os.environ.get("GOLDEN") == "update":
        LESSON.write_text(right, encoding="utf-8", newline="\n")
    assert right == text  # byte for byte
    assert right != wrong  # so one wrong word would be found
    assert "GEPA on 30 tickets" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_is_a_notebook_of_fifteen_steps_in_small_cells():
    cells = notebook(LESSON.read_text(encoding="utf-8"))["cells"]
    steps = [found for cell in cells for found in re.findall(r"^## (\d+)\. ", cell["source"])]
    assert steps == [str(number) for number in range(1, 16)]
    assert cells[0]["source"].startswith("# /// script\n")
    for cell in cells[1:]:
        lines = [line for line in cell["source"].split("\n") if line and line[:4] != "# ->"]
        assert len(lines) <= (12 if cell["cell_type"] == "code" else 7), cell["source"]


@pytest.mark.slow
def test_the_script_prints_the_same(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(LESSON)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
        timeout=120,
        check=True,
        cwd=tmp_path,
    )
    shown = SHOWN.findall(LESSON.read_text(encoding="utf-8"))
    assert ran.stdout.split("\n") == [*shown, ""]
    assert ran.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
