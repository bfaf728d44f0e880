"""With Ray: the same bytes by every hosting, failures told, MLflow filled."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import MARK, left

import fedlq_ray
from fedlq_ray.config.load import load
from fedlq_ray.tracking import stores

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
QUICK = ["rounds=3", "clients.count=5", "clients.cohort=3", "strategy.error_feedback=true"]
FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]


def run(*overrides):
    return fedlq_ray.simulate(load(None, [*QUICK, *overrides]))


def contents(result):
    return [(result.path / name).read_bytes() for name in ("rounds.jsonl", "summary.json")]


def test_hosting_changes_no_byte():
    expected = contents(run("clients.hosting=serial", "tracking.uri=null"))
    for hosting in (["packed", 1], ["packed", 2], ["packed", 5], ["dedicated", "null"]):
        overrides = [f"clients.hosting={hosting[0]}", f"clients.actors={hosting[1]}", "tracking.uri=null"]
        assert contents(run(*overrides)) == expected, hosting


@pytest.mark.filterwarnings("ignore:train.precision")
def test_hosting_changes_no_byte_in_bfloat16():
    serial, packed, plain = (
        contents(run(f"clients.hosting={hosting}", f"train.precision={precision}", "tracking.uri=null"))
        for hosting, precision in (("serial", "bfloat16"), ("packed", "bfloat16"), ("serial", "float32"))
    )
    assert serial == packed != plain


def test_hosting_changes_no_byte_of_an_asynchronous_run():
    """Clients are under way over steps, in any number of actors, and replies come in any order."""
    more = ["server.buffer=2", "server.max_staleness=2", "clients.dropout=0.2", "clients.cohort=4", "rounds=8"]
    more += [
        "network.downlink_bits=1",
        "network.downlink=shared",
        "network.bill=both",
        "tracking.uri=null",
        "clients.variation=0.5",
        "clients.selection=oort",
    ]
    expected = contents(run(*more, "clients.hosting=serial"))
    for hosting, actors in (("packed", 1), ("packed", 2), ("packed", 5), ("dedicated", "null")):
        assert contents(run(*more, f"clients.hosting={hosting}", f"clients.actors={actors}")) == expected, hosting


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy.error_feedback=ef21", "strategy.floor_bits=null", "strategy.probe_on=clients"],
        ["strategy.name=fedlq_rd", "strategy.metric=fisher", "strategy.late=drop", "strategy.budget=deadline"],
    ],
)
def test_hosting_changes_no_byte_of_adaptive_work_coded_downlinks_ef21_or_probes(settings):
    both = ["train.adaptive_work=2", "network.downlink_bits=1", "network.bill=both", "clients.dropout=0.3"]
    more = ["strategy.probe_every=1", "strategy.deadline_s=0.15", "clients.profiles=thin", "tracking.uri=null"]
    serial, packed = (
        contents(run(*settings, *both, *more, f"clients.hosting={hosting}", "clients.actors=2"))
        for hosting in ("serial", "packed")
    )
    assert serial == packed


def test_mlflow_has_the_run_and_syncing_twice_adds_nothing():
    result = run("clients.hosting=packed", "clients.actors=1", "tracking.experiment=seen")
    client = stores.connect("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("seen").experiment_id

    def history():
        (found,) = client.search_runs([experiment])
        return found, [
            (m.value, m.step, m.timestamp - found.info.start_time)
            for m in client.get_metric_history(found.info.run_id, "accuracy")
        ]

    found, before = history()
    assert found.info.status == "FINISHED" and found.data.params["train.lr"] == "0.1"
    assert [v for v, _, _ in before] == list(result.history["accuracy"])
    assert [t for _, _, t in before] == [round(1e3 * s) for s in result.history["sim_time_s"]]
    for _ in range(2):
        subprocess.run([*FEDLQ, "sync", str(result.path)], check=True, capture_output=True)
    assert history()[1] == before


def test_divergence_is_told_without_a_traceback():
    with pytest.raises(fedlq_ray.ClientError, match=r"round \d+, client \d+: training diverged: layer"):
        run("clients.hosting=packed", "train.lr=1000", "rounds=20", "tracking.uri=null")


def start(out, *overrides):
    """A long run in a process and a Ray of its own, as soon as its first round is done."""
    environment = {**os.environ, "RAY_ADDRESS": "", MARK: out}
    command = [*FEDLQ, "run", "rounds=5000", f"out={out}", "clients.hosting=packed", "clients.actors=1", *overrides]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    journal, end = Path(out) / "rounds.jsonl", time.monotonic() + 90
    while time.monotonic() < end and (not journal.exists() or journal.stat().st_size == 0):
        time.sleep(0.3)
    return process


def ended(process):
    """Its exit code and what it said, once it has ended by itself."""
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors[-2000:]
    return process.returncode, errors


def records(out):
    return [json.loads(line) for line in (Path(out) / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_was_done(number, code):
    from safetensors.torch import load_file

    out = f"cut-{code}"
    process = start(out, f"tracking.experiment={out}")
    assert any("forkserver" in line for line in left(out, 0.0)) == (sys.platform == "linux")
    process.send_signal(number)
    returned, errors = ended(process)
    assert not left(out)  # Ray's processes, actors and the fork server
    assert returned == code and "interrupted" in errors
    assert [r["round"] for r in records(out)] == list(range(len(records(out))))
    assert len(load_file(f"{out}/model.safetensors")) == 4 and not Path(out, "summary.json").exists()
    assert status_in_mlflow(out) == "KILLED"


def status_in_mlflow(experiment):
    client = stores.connect("sqlite:///mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return found.info.status


OWN = """
import numpy as np
import torch
from torch import nn
from fedlq_ray import Config, simulate
from fedlq_ray.quantization import MinMax
from fedlq_ray.strategies import Strategy

class Five(Strategy):
    def __init__(self, context):
        self.context = context
    def plan(self, state, round, cohort):
        return {m.client: self.context.at_levels([5] * len(self.context.quantized)) for m in cohort}

def data():
    x = np.random.default_rng(0).standard_normal((300, 6))
    return x, np.arange(300) % 3, x, np.arange(300) % 3

def model(input_shape, num_classes):
    return nn.Sequential(nn.Linear(input_shape[0], 5), nn.ReLU(), nn.Linear(5, num_classes))
"""
SCRIPT = """
clients = {"count": 5, "cohort": 3, "hosting": "packed", "actors": 1}
config = Config.model_validate({"rounds": 2, "clients": clients, "tracking": {"uri": None}})
result = simulate(config, model=model, data=data(), strategy=Five, quantizer=MinMax)
print(result.summary["weights_sha256"])
"""


def test_own_parts_reach_the_actors_by_import_path_and_as_objects_of_a_script():
    Path("own_parts.py").write_text(OWN)
    Path("script.py").write_text(OWN + SCRIPT)
    environment = {**os.environ, "RAY_ADDRESS": ""}

    def output(*command):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    parts = ("data.name=own_parts:data", "model.name=own_parts:model", "strategy.name=own_parts:Five")
    hosting = ("clients.hosting=packed", "clients.actors=1", "clients.count=5", "clients.cohort=3")
    run = ("rounds=2", "tracking.uri=null", "strategy.quantizer=fedlq_ray.quantization:MinMax")
    by_path = output("-m", "fedlq_ray.cli", "run", "--json", *parts, *hosting, *run)
    summary = json.loads(by_path.splitlines()[-1])["summary"]
    assert output("script.py").strip() == summary["weights_sha256"]


def test_ray_address_is_joined_and_its_ray_goes_on_afterwards():
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [*FEDLQ, "run", "rounds=2", "out=joined", "clients.hosting=packed", "tracking.uri=null"]
    before = len([n for n in ray.nodes() if n["Alive"]])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 actors" in done.stderr, done.stderr[-2000:]
    assert len([n for n in ray.nodes() if n["Alive"]]) == before == 1
