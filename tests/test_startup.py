"""A file of the user's in the working directory hides no library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlq_ray import shadows

pytestmark = pytest.mark.usefixtures("cold")
FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]
SCRIPT = [str(Path(sys.executable).with_name("fedlq"))]
SMALL = ["rounds=1", "clients.count=4", "clients.cohort=2", "tracking.uri=null"]
HIDING = ("ray", "torch", "queue", "random", "numpy", "pandas", "json")


def called(command, cwd, **environment):
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120, env=os.environ | environment
    )


def hide(folder):
    for name in HIDING:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('this {name} is not Python\\'s')\n")


@pytest.mark.parametrize("command", [FEDLQ, SCRIPT], ids=["-m", "script"])
def test_files_with_the_names_of_libraries_hide_none(command, tmp_path):
    hide(tmp_path)
    done = called([*command, "run", *SMALL, "clients.hosting=serial"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
@pytest.mark.parametrize("hosting", ["packed", "dedicated"])
def test_files_with_the_names_of_libraries_hide_none_from_actors(hosting, tmp_path):
    hide(tmp_path)
    done = called([*FEDLQ, "run", *SMALL, f"clients.hosting={hosting}"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
def test_files_with_the_names_of_libraries_hide_none_from_a_sweeps_tasks(tmp_path):
    hide(tmp_path)
    runs = "base: {rounds: 1, clients: {count: 4, cohort: 2}, tracking: {uri: null}}\nruns: {a: [], b: []}\n"
    (tmp_path / "s.yaml").write_text(runs)
    done = called([*FEDLQ, "sweep", "s.yaml"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["from fedlq_ray import simulate", "from fedlq_ray import Config"])
def test_a_program_beside_such_a_file_is_told_its_name(program, tmp_path):
    (tmp_path / "queue.py").write_text("mine = 1\n")
    (tmp_path / "random.py").write_text("mine = 1\n")
    (tmp_path / "program.py").write_text(program)
    done = called([sys.executable, "program.py"], tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fedlq_ray cannot be imported: ") and last.endswith("rename it"), done.stderr
    assert f"{tmp_path}/queue.py, {tmp_path}/random.py hide" in last


def test_an_error_without_such_a_file_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert shadows.explain() is None
    (tmp_path / "torch.py").touch()
    assert (
        shadows.explain()
        == f"fedlq_ray cannot be imported: {tmp_path}/torch.py hides the module of the same name; rename it"
    )
    monkeypatch.setattr(sys, "path", [])
    shadows.explain()


def test_a_home_that_nobody_knows_is_no_reason_to_fail(tmp_path):
    code = "import os, pwd\npwd.getpwuid = lambda _: {}[0]\nimport fedlq_ray\nprint(os.path.expanduser('~'))"
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout == "/nonexistent\n", done.stderr


LOADED = """
import sys
from fedlq_ray.cli.main import cli
from fedlq_ray.errors import ConfigError
try:
    cli.main(sys.argv[2:], standalone_mode=False)
except ConfigError as exc:
    print(exc, file=sys.stderr)
print(sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
"""
LIBRARIES = "torch,torchvision,ray,mlflow,numpy,scipy,pandas,matplotlib,rich,asyncio"


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--help"], f"{LIBRARIES},pydantic,omegaconf,yaml"),
        (["config"], LIBRARIES),
        (["run", "roundz=1"], LIBRARIES),
        (["run", "train.lr=-1"], LIBRARIES),
        (["run", *SMALL, "clients.hosting=serial"], "ray,mlflow,sklearn,scipy.stats,pandas,torch._dynamo"),
    ],
)
def test_what_a_command_does_not_use_is_not_imported(arguments, unused, tmp_path):
    done = called([sys.executable, "-c", LOADED, unused, *arguments], tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout[-500:] + done.stderr[-500:]


def test_a_wrong_setting_is_told_before_libraries_are_loaded(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('loaded')")
    done = called([sys.executable, "-c", LOADED, "", "run", "roundz=1"], tmp_path)  # -c finds it first
    assert "roundz" in done.stderr and "loaded" not in done.stderr, done.stderr[-500:]
