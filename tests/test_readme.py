"""Every Python block of the README runs, in one session, and prints what stands below it."""

import contextlib
import io
import re
import shutil

from conftest import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)


def test_each_block_prints_what_stands_below_it(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python") > 5
    for code, expected in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "README.md", "exec"), names)
        assert out.getvalue() == expected


def test_the_first_screen_has_an_example_and_the_two_commands():
    screen = (ROOT / "README.md").read_text(encoding="utf-8").split("## How it works")[0]
    assert screen.count("python3 -m venv .venv && .venv/bin/pip install") == 2
    assert screen.index("```python") < 300
