"""What is shipped: two modules and nothing else, which also work inside another package."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from types import FunctionType

import pytest
from conftest import ROOT

import lmopt
import lmopt_optimizers

MODULES = ("lmopt.py", "lmopt_optimizers.py")


def test_the_wheel_holds_the_two_modules_and_nothing_else(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"lmopt-{lmopt.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == list(MODULES)


def test_copied_into_a_package_both_modules_work_without_an_edit(tmp_path):
    package = tmp_path / "other" / "vendored"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in MODULES:
        (package / name).write_bytes((ROOT / name).read_bytes())
    code = """
import sys
from other.vendored import lmopt
from other.vendored.lmopt_optimizers import random_search
task = lmopt.predict("animal -> sound")
zoo = (("dog", "woof"), ("cat", "meow"))
rows = [{"animal": f"{a} {n}", "sound": s} for n in range(4) for a, s in zoo]
params = random_search(lmopt.toy_lm(), candidates=1)(task, rows, lmopt.exact_match)
print(len(params["predict"].demos), "lmopt" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("4 False\n", "")


def test_importing_is_cheap_and_has_no_effects(tmp_path):
    code = """
import sys, threading
import lmopt, lmopt_optimizers
print("httpx" in sys.modules, threading.active_count())
"""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "False 1\n" and list(tmp_path.iterdir()) == []


def test_dependencies_are_the_three_and_the_version_is_read_from_the_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    names = [re.match(r"\w+", one)[0] for one in project["project"]["dependencies"]]
    assert sorted(names) == ["attrs", "httpx", "toolz"]
    assert project["tool"]["hatch"]["version"]["path"] == "lmopt.py"
    assert sorted(
        re.match(r"\w+", one)[0] for one in project["project"]["optional-dependencies"]["test"]
    ) == ["hypothesis", "pytest"]


@pytest.mark.parametrize("name", MODULES)
def test_each_module_carries_the_licence_and_imports_only_what_it_may(name):
    source = (ROOT / name).read_text("utf-8")
    assert source.startswith("# MIT License\n") and "WITHOUT WARRANTY OF ANY KIND" in source[:1200]
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.partition(".")[0])
    known = {*sys.stdlib_module_names, "attrs", "toolz", "httpx"}
    assert imported - known == ({"lmopt"} if name == "lmopt_optimizers.py" else set())
    assert not imported & {"pickle", "dspy", "litellm"}


@pytest.mark.parametrize("module", [lmopt, lmopt_optimizers])
def test_all_that_is_public_is_described(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__doc__ or not isinstance(value, (type, FunctionType)), name


def test_the_top_level_is_as_it_was_fixed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    names = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == {
        "pyproject.toml", "README.md", "lmopt.py", "lmopt_optimizers.py", "tests", "examples",
    }  # fmt: skip
