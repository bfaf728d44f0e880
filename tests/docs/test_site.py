"""The documentation site: built without a warning, and complete."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fedlq_ray.cli.main import cli
from fedlq_ray.config.sections import keys
from fedlq_ray.config.settings import Config
from fedlq_ray.federation.metrics import METRICS
from fedlq_ray.strategies import STRATEGIES

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("latex2mathml", reason="needs the extra docs")
pytest.importorskip("nbformat", reason="needs the extra docs")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out / "site"


def test_every_public_name_has_a_place(site):
    modules = build.packages()
    assert "fedlq_ray" in modules and "fedlq_ray.strategies" in modules
    for module in modules:
        page = (site / "api" / f"{module}.html").read_text()
        for name in importlib.import_module(module).__all__:
            assert f'id="{module}.{name}"' in page, f"{module}.{name}"


def test_every_setting_and_command_is_there(site):
    settings, commands = (site / "reference" / f"{page}.html" for page in ("settings", "cli"))
    for path, _, _ in keys(Config):
        assert f'id="{path}"' in settings.read_text()
    for name, command in cli.commands.items():
        assert isinstance(command, click.Command) and f"fedlq {name}" in commands.read_text()


def test_every_metric_is_there(site):
    page = (site / "metrics.html").read_text()
    for metric in METRICS:
        assert f"<code>{metric.shown}</code>" in page, metric.name


def test_every_strategy_is_told(site):
    page = (site / "algorithms" / "index.html").read_text()
    for name in STRATEGIES:
        assert f"<code>{name}</code>" in page, name


def test_formulas_are_mathml(site):
    theory = (site / "theory.html").read_text()
    assert theory.count("<math") > 200 and "```math" not in theory and "\\lVert" not in theory
    for page in site.rglob("*.html"):
        assert "&lt;math" not in page.read_text(), page


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for tag in ('<script src="http', '<link rel="stylesheet" href="http', "fonts.googleapis"):
            assert tag not in text, f"{page}: {tag}"


def test_a_link_in_the_repository_becomes_one_between_pages():
    page, source = Path("/site/theory.md"), ROOT / "docs" / "theory.md"
    pages = {ROOT / "experiments" / "theory" / "README.md": Path("/site/experiments/theory/README.md")}
    assert build.relink("[a](../experiments/theory/)", page, source, pages) == "[a](experiments/theory/README.md)"
    assert build.relink("[a](../pyproject.toml)", page, source, pages) == "a"
    assert build.relink("[a](../nowhere.md)", page, source, pages) == "[a](../nowhere.md)"
    assert build.relink("[a](https://x.org/y)", page, source, pages) == "[a](https://x.org/y)"


def test_formulas_in_code_stay_as_they_are():
    assert build.formulas("`$x$` and\n```text\n$y$\n```\n") == "`$x$` and\n```text\n$y$\n```\n"
    assert "<mi>x</mi>" in build.formulas("so $x$ is")
    assert build.formulas("it costs $5 and $6") == "it costs $5 and $6"


def test_docstrings_are_plain_text():
    text = build.as_markdown("Levels 2**b of <c, z>, `a**b`:\n- one\n- two\nBody: bytes.")
    assert text == "Levels 2\\*\\*b of &lt;c, z>, `a**b`:\n\n- one\n- two\n\nBody: bytes."
