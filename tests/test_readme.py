"""Every block of the README runs, in one session, and prints what stands below it."""

import contextlib
import io
import os
import re
import shlex
import shutil

import pytest
from conftest import ROOT

import lmopt_optimizers

README = ROOT / "README.md"
BLOCK = re.compile(
    r"^```(python|sh)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL
)


def run_python(code, names):
    """What a block prints; the tests that it defines are called."""
    known, out = set(names), io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), names)
        for name in [one for one in names if one.startswith("test_") and one not in known]:
            names[name]()
    return out.getvalue()


def run_commands(code):
    """What the last command of a block prints; those that are not ours run elsewhere."""
    out = io.StringIO()
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        if program == "lmopt" and "--lm" not in arguments:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert lmopt_optimizers.main(arguments) == 0
    return out.getvalue()


def test_each_block_prints_what_stands_below_it(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") + text.count("```sh") > 20
    for block in reversed(blocks) if os.environ.get("GOLDEN") == "update" else blocks:
        language, code, expected = block.groups()
        made = run_python(code, names) if language == "python" else run_commands(code)
        assert expected is None or made == expected, code
        assert language == "sh" or made == (expected or "")


def test_the_first_screen_has_an_example_the_two_commands_and_a_session():
    screen = README.read_text(encoding="utf-8").split("## How it works")[0]
    assert screen.count("python3 -m venv .venv && .venv/bin/pip install") == 2
    assert screen.index("```python") < 300 and screen.index("lmopt optimize") < 2500


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_each_example_is_told_of(name):
    assert f"`{name}`" in README.read_text(encoding="utf-8")
