"""What experiments/ holds still fits the package: scripts are imported, sweeps are read."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from fedlq_ray.sweeps.sweep import load

FOLDER = Path(__file__).parents[1] / "experiments"
OTHERS = {"flower_app.py", "pfl_app.py"}  # run in environments of their own
SCRIPTS = sorted(str(f.relative_to(FOLDER)) for f in FOLDER.rglob("*.py") if f.name not in OTHERS)
SWEEPS = sorted(str(f.relative_to(FOLDER)) for f in FOLDER.rglob("*.yaml") if "runs" in yaml.safe_load(f.read_text()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_imported(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str((FOLDER / script).parent))
    monkeypatch.setattr(sys, "argv", [script])
    spec = importlib.util.spec_from_file_location(f"experiment_{Path(script).stem}", FOLDER / script)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_are_read(sweep: str) -> None:
    assert load(FOLDER / sweep).runs


@pytest.mark.parametrize("results", sorted(str(f.relative_to(FOLDER)) for f in FOLDER.rglob("*.json")))
def test_results_say_what_made_them(results: str) -> None:
    text = (FOLDER / results).read_text()
    assert json.loads(text) and '"command"' in text and '"commit"' in text
