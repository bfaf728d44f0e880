"""The code of the documentation runs: each page in an empty folder, from its top to its end."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fedlq_ray.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["index.md", "faq.md", "clock_and_bytes.md", *sorted(f"tutorial/{f.name}" for f in DOCS.glob("tutorial/*.md"))]
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.S | re.M)
NEEDS = {"tutorial/adapters.md": "peft"}
RUNS_ON_RAY = {"index.md", "tutorial/first_run.md", "tutorial/profiles.md"}  # they share one that runs already


@pytest.fixture
def workplace(tmp_path, monkeypatch, new_store):
    """A folder with an empty store in which modules are found, and forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(new_store, tmp_path / "mlflow.db")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def command(line, monkeypatch, capfd):
    """What a line prints, and its exit code; `fedlq` runs in this process, which has imported it already."""
    if not line.startswith("fedlq "):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr, done.returncode
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        main()
    told = capfd.readouterr()
    return told.out + told.err, ended.value.code


def without_figures(line):
    """Figures differ from one type of processor to another."""
    return re.sub(r"\d+(\.\d+)?", "#", " ".join(line.split()))


def console(block, monkeypatch, capfd):
    """Run the lines that start with $; each of the others must be printed. Errors are shown with their message."""
    for part in block.split("$ ")[1:]:
        line, *expected = part.rstrip().split("\n")
        printed, code = command(line, monkeypatch, capfd)
        fails = any(told.startswith(("error:", "failed:")) for told in expected)
        assert bool(code) == fails, f"{line}: exit code {code}\n{printed[-2000:]}"
        lines = [without_figures(told) for told in printed.splitlines()]
        for told in expected:
            assert without_figures(told) in lines, f"{line}: did not print\n{told}\nbut\n{printed[-2000:]}"


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.ray] * (p in RUNS_ON_RAY)) for p in PAGES])
def test_the_code_of_a_page_runs(page, workplace, monkeypatch, capfd, request):
    if page in NEEDS and importlib.util.find_spec(NEEDS[page]) is None:
        pytest.skip(f"needs {NEEDS[page]}")
    if page in RUNS_ON_RAY:
        request.getfixturevalue("ray_here")
        monkeypatch.chdir(workplace)
    space = {"__name__": "docs"}
    for language, title, body in FENCE.findall((DOCS / page).read_text()):
        if title:
            (workplace / title).write_text(body)
        elif language == "python":
            exec(compile(body, page, "exec"), space)
        elif language == "console":
            console(body, monkeypatch, capfd)


def test_pages_have_code_to_run():
    found = [FENCE.findall((DOCS / page).read_text()) for page in PAGES]
    assert sum(language in ("python", "console") for page in found for language, _, _ in page) > 40
