"""Runs at a time: the results of runs in turn, failures told, and an interrupt that leaves all of them to go on."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fedlq_ray.config.load import load
from fedlq_ray.errors import ConfigError
from fedlq_ray.runs.rundir import journal
from fedlq_ray.runs.simulation import run_or_resume
from fedlq_ray.sweeps import many

pytestmark = pytest.mark.usefixtures("own_folder")

SWEEP = {
    "base": {
        "name": "m",
        "rounds": 40,
        "clients": {"count": 8, "cohort": 4},
        "tracking": {"uri": None},
        "checkpoint": {"every_rounds": 1},
    },
    "runs": {
        "fedavg": ["strategy.name=fedavg"],
        "fedlq": ["strategy.name=fedlq"],
        "bad": ["train.lr=1000"],
        "eden": ["strategy.name=eden"],
    },
}
FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]


def summaries(folder):
    return {file.parent.name: json.loads(file.read_text()) for file in Path(folder).rglob("summary.json")}


def test_an_interrupt_leaves_all_to_go_on_and_the_end_is_as_in_turn():
    Path("s.yaml").write_text(yaml.safe_dump(SWEEP))
    command = [*FEDLQ, "sweep", "s.yaml", "--out", "out"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(list(Path("out").rglob("rounds.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    errors = first.communicate(timeout=200)[1]
    assert first.returncode == 130 and "interrupted" in errors, errors
    cut = {file.parent.name for file in Path("out").rglob("rounds.jsonl")} - set(summaries("out"))
    assert cut, "both were finished before the interrupt"
    again = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert again.returncode == 1 and "1 of the sweep's runs" in again.stderr, again.stderr
    assert "training diverged" in again.stderr and "Traceback" not in again.stderr
    found = summaries("out")
    assert set(found) == {"fedavg-0", "fedlq-0", "eden-0"}
    for name in ("fedavg", "fedlq", "eden"):
        settings = [f"strategy.name={name}", f"out=alone/{name}", "clients.hosting=serial"]
        base = [f"{key}={value}" for key, value in (("rounds", 40), ("clients.count", 8), ("clients.cohort", 4))]
        run_or_resume(load(None, [*base, *settings, "name=m", "tracking.uri=null"]))
        assert found[f"{name}-0"]["weights_sha256"] == summaries("alone")[name]["weights_sha256"]
        assert journal(Path("out") / f"{name}-0") == journal(Path("alone") / name)


def configs(*changes):
    common = ["rounds=2", "tracking.uri=null", "clients.count=4", "clients.cohort=2"]
    return [load(None, [*common, f"out=r{i}", *own]) for i, own in enumerate(changes)]


def test_those_that_leave_hosting_open_run_at_a_time_where_there_are_cores(ray_here):
    serial, auto, packed = configs(
        ["clients.hosting=serial"], ["clients.hosting=auto"], ["clients.hosting=packed", "clients.actors=1"]
    )
    assert many.abreast([serial, packed]) == []
    together = many.abreast([serial, auto, packed])
    if len(os.sched_getaffinity(0)) < 2:
        assert together == []
    else:
        assert [(config.out, config.clients.hosting) for config in together] == [("r0", "serial"), ("r1", "serial")]


def test_a_users_mistake_is_that_of_the_run_and_a_failure_goes_on(ray_here):
    console = Console(file=io.StringIO())
    good, bad = configs([], ["rounds=20", "train.lr=1000"])
    ended = {config.out: failure for config, failure in many.run([bad, good], "p", console)}
    assert ended["r0"] is None and "training diverged" in str(ended["r1"])
    (wrong,) = configs(["data.name=npz", "data.path=nowhere.npz", "out=wrong"])
    with pytest.raises(ConfigError, match=r"nowhere\.npz"):
        list(many.run([wrong], "p", console))
