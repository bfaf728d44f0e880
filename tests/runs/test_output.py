"""Output that nobody reads any more ends a run as an interrupt does; what is printed survives any encoding."""

import json
import os
import subprocess
import sys

import pytest

from fedlq_ray import resume, simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation.events import RoundDone
from fedlq_ray.runs.output import OutputClosed

FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]
SERIAL = ["clients.hosting=serial", "tracking.uri=null", "clients.count=8", "clients.cohort=4"]
PACKED = ["clients.hosting=packed", *SERIAL[1:]]


def unread(*arguments, cwd, both=False):
    """The command, its output, or both its streams, to a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": write, "stderr": write if both else subprocess.PIPE}
    try:
        return subprocess.run([*FEDLQ, *arguments], cwd=cwd, encoding="utf-8", timeout=200, check=False, **streams)
    finally:
        os.close(write)


def status(folder):
    return json.loads((folder / "timing.json").read_text())["status"]


def kept(folder):
    """Whether a run was interrupted, and can be resumed."""
    return status(folder) == "KILLED" and len(list(folder.glob("checkpoints/*"))) > 0


@pytest.mark.parametrize("settings", [SERIAL, pytest.param(PACKED, marks=pytest.mark.ray)], ids=["serial", "packed"])
def test_a_run_whose_output_is_closed_ends_as_by_an_interrupt(settings, tmp_path):
    done = unread("run", *settings, "rounds=20", "--json", cwd=tmp_path)
    assert done.returncode == 141
    (line,) = done.stderr.splitlines()
    assert line.startswith("the output was closed") and "fedlq resume RUN_DIR" in line
    assert kept(tmp_path / "runs/demo-0")


def test_a_run_of_which_nobody_reads_anything_ends_as_by_an_interrupt(tmp_path):
    assert unread("run", *SERIAL, "rounds=20", cwd=tmp_path, both=True).returncode == 141
    assert status(tmp_path / "runs/demo-0") == "KILLED"  # before its first round, for it said something before that
    resumed = subprocess.run([*FEDLQ, "resume", "runs/demo-0"], cwd=tmp_path, capture_output=True, timeout=100)
    assert resumed.returncode == 0 and (tmp_path / "runs/demo-0/summary.json").exists()


@pytest.mark.ray
def test_a_sweep_of_which_nobody_reads_anything_ends_as_by_an_interrupt(tmp_path):
    sweep = {"base": {"rounds": 300, "tracking": {"uri": None}}, "runs": {"a": [], "b": []}}
    (tmp_path / "s.yaml").write_text(json.dumps(sweep))
    assert unread("sweep", "s.yaml", *SERIAL, cwd=tmp_path, both=True).returncode == 141
    assert any(kept(folder) for folder in (tmp_path / "runs/s").iterdir())


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "both"])
@pytest.mark.parametrize(
    "arguments",
    [["config"], ["config", "--schema"], ["--help"], ["run", "--help"], ["layers", *SERIAL, "rounds=1"]],
    ids=" ".join,
)
def test_other_commands_end_quietly(arguments, both, tmp_path):
    done = unread(*arguments, cwd=tmp_path, both=both)
    assert done.returncode == 141
    assert both or all(line.startswith(("round ", "quantizing ")) for line in done.stderr.splitlines()), done.stderr


def test_an_error_that_nobody_reads_has_its_code(tmp_path):
    assert [unread(*a, cwd=tmp_path, both=True).returncode for a in (["none"], ["run", "rounds=x"])] == [2, 2]


def test_a_finished_run_and_its_comparison(tmp_path):
    assert unread("run", *SERIAL, "rounds=1", "out=one", cwd=tmp_path).returncode == 141
    assert (tmp_path / "one/summary.json").exists()
    done = unread("compare", "one", cwd=tmp_path)
    assert done.returncode == 141 and not done.stderr


def test_a_program_whose_watch_has_no_reader(own_folder):
    def watch(event):
        if isinstance(event, RoundDone):
            raise BrokenPipeError

    config = load(None, [*SERIAL, "rounds=3", "out=here"])
    with pytest.raises(OutputClosed):
        simulate(config, watch=watch)
    assert resume("here").summary["rounds"] == 3


@pytest.mark.parametrize("arguments", [["layers", "--out", "läufe.png"], ["run", "out=läufe"]], ids=["layers", "run"])
def test_output_survives_an_encoding_without_its_characters(arguments, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*FEDLQ, *arguments, *SERIAL, "rounds=1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_names_of_files_need_no_locale(tmp_path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "timeout": 100}
    done = subprocess.run([*FEDLQ, "run", *SERIAL, "rounds=1", "out=läufe"], **options)
    assert done.returncode == 0 and "läufe" in done.stdout.decode(), done.stderr
    done = subprocess.run([*FEDLQ, "report", "läufe", "--out", "größe.html"], **options)
    assert done.returncode == 0 and "läufe" in (tmp_path / "größe.html").read_text(encoding="utf-8"), done.stderr


def test_an_argument_that_is_no_text_is_one_message(tmp_path):
    done = subprocess.run([*FEDLQ, "run", *SERIAL, b"out=l\xe4ufe"], cwd=tmp_path, capture_output=True, timeout=100)
    assert done.returncode == 2 and done.stderr == b"error: b'out=l\\xe4ufe': is not text in utf-8\n"
    assert not list(tmp_path.iterdir())


def test_a_working_directory_that_was_removed_is_one_message(tmp_path):
    program = f"cd {tmp_path}; mkdir gone; cd gone; rmdir ../gone; {' '.join(FEDLQ)} run {' '.join(SERIAL)}"
    done = subprocess.run(["sh", "-c", program], capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: the working directory was removed")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_may_be_closed_from_the_start(stream, tmp_path):
    number = {"stdout": 1, "stderr": 2}[stream]
    program = f"{' '.join(FEDLQ)} run {' '.join(SERIAL)} rounds=1 {number}>&-"
    done = subprocess.run(["sh", "-c", program], cwd=tmp_path, capture_output=True, timeout=100)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
