"""With Ray: the same bytes by every hosting, failures told, MLflow filled."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedlq_ray
from fedlq_ray.config import load

pytestmark = pytest.mark.ray
QUICK = ["rounds=3", "clients.count=5", "clients.cohort=3", "strategy.error_feedback=true"]
FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]


@pytest.fixture(scope="module", autouse=True)
def ray_here(tmp_path_factory):
    import ray

    where = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("runs"))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.chdir(where)


def run(*overrides):
    return fedlq_ray.simulate(load(None, [*QUICK, *overrides]))


def contents(result):
    return [(result.path / name).read_bytes() for name in ("rounds.jsonl", "summary.json")]


def test_hosting_changes_no_byte():
    expected = contents(run("clients.hosting=serial", "tracking.uri=null"))
    for hosting in (["packed", 1], ["packed", 2], ["packed", 5], ["dedicated", "null"]):
        overrides = [f"clients.hosting={hosting[0]}", f"clients.actors={hosting[1]}", "tracking.uri=null"]
        assert contents(run(*overrides)) == expected, hosting


def test_mlflow_has_the_run_and_syncing_twice_adds_nothing():
    from mlflow import MlflowClient

    result = run("clients.hosting=packed", "clients.actors=1", "tracking.experiment=seen")
    client = MlflowClient("sqlite:///mlflow.db")
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


def test_an_interrupt_keeps_what_was_done():
    environment = {**os.environ, "RAY_ADDRESS": ""}
    command = [*FEDLQ, "run", "rounds=5000", "out=cut", "clients.hosting=packed", "clients.actors=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    journal = Path("cut/rounds.jsonl")
    end = time.monotonic() + 90
    while time.monotonic() < end and (not journal.exists() or journal.stat().st_size == 0):
        time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-600:]
    assert "Traceback" not in errors and "interrupted" in errors
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert Path("cut/model.safetensors").exists() and not Path("cut/summary.json").exists()
