"""LoRA of peft on a tiny GPT-2, as in the tutorial: only its adapters are sent, and its base stays as it was."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from faults import cut, evidence
from ray import cloudpickle

from fedlq_ray import resume, simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.task import Job, Parts, Task, Worker, prepare
from fedlq_ray.quantization import Float32, Segment
from fedlq_ray.training.local import Plan

PAGE = Path(__file__).parents[2] / "docs/tutorial/adapters.md"
TEXT = (np.random.default_rng(0).integers(0, 16, (240, 1)) + np.arange(13)) % 16
DATA = (TEXT[:200, :-1], TEXT[:200, 1:], TEXT[200:, :-1], TEXT[200:, 1:])
SETTINGS = [
    "problem=tokens", "target=null", "data.partition=iid", "model.name=my_lora:tiny_gpt2", "model.args.rank=2",
    "clients.count=6", "clients.cohort=3", "train.optimizer=adam", "train.lr=0.01", "tracking.uri=null", "rounds=3",
]  # fmt: skip
ADAPTERS = [2 * 64, 192 * 2] * 2  # A and B of two blocks
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra adapters"),
    pytest.mark.ray,
    pytest.mark.usefixtures("my_lora"),
]


@pytest.fixture(scope="module")
def my_lora(ray_here):
    """The tutorial's file, in Ray's working directory."""
    body = PAGE.read_text("utf-8").split('```python title="my_lora.py"\n')[1].split("```")[0]
    Path("my_lora.py").write_text(body, encoding="utf-8")
    sys.path.insert(0, str(Path.cwd()))
    yield
    sys.path.remove(str(Path.cwd()))
    sys.modules.pop("my_lora", None)


def run(out, *settings):
    return simulate(load(None, [*SETTINGS, "clients.hosting=serial", *settings, f"out={out}"]), data=DATA)


@pytest.mark.parametrize(
    ("settings", "bodies"),
    [
        (["strategy.name=fedavg"], [4 * size for size in ADAPTERS]),
        (["strategy.name=uniform", "strategy.bits=3"], [9 + -(-3 * size // 8) for size in ADAPTERS]),
    ],
)
def test_uplink_bytes_are_the_adapters_and_their_headers(settings, bodies, tmp_path):
    result = run(tmp_path / "run", *settings)
    payload = 18 + sum(9 + body for body in bodies)
    assert result.history["client_uplink_bytes"].tolist() == [[payload] * 3] * 3
    assert result.history["client_downlink_bytes"].tolist() == [[18 + 4 * 9 + 4 * sum(ADAPTERS)] * 3] * 3
    assert len(result.weights) == sum(ADAPTERS)
    assert result.history["train_loss"].is_monotonic_decreasing
    assert result.history["metrics"].iloc[-1]["perplexity"] > 1


def digest(task):
    """The frozen parameters' digest, computed again after a client has trained."""
    size = sum(layer.size for layer in task.layers)
    worker, plan = Worker(task), Plan("update", (Segment(Float32(), 0, size),))
    samples = cohorts.base_work(task, len(task.shards[0]))
    reply, _ = worker.train(Job(0, 0, plan, samples), worker.initial_weights(), None)
    return Task.frozen_digest.func(dataclasses.replace(task, module=worker.model.module)), reply.moved


def test_the_base_is_the_same_bytes_in_every_process():
    task = prepare(load(None, SETTINGS), Parts(data=DATA))
    here = Task.frozen_digest.func(task)
    assert here is not None and digest(task) == (here, True)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    assert ray.get(ray.remote(digest).remote(task)) == (here, True)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert Task.frozen_digest.func(prepare(load(None, SETTINGS), Parts(data=DATA))) == here
    other = prepare(load(None, [*SETTINGS, "seed=1"]), Parts(data=DATA))
    assert Task.frozen_digest.func(other) != here


def test_hosting_and_resuming_change_no_byte(tmp_path):
    """Under FedLQ with error feedback, which measures the significance of adapters."""
    fedlq = ["rounds=4", "strategy.name=fedlq", "strategy.error_feedback=true", "strategy.probe_every=2"]
    run(tmp_path / "serial", *fedlq)
    run(tmp_path / "packed", *fedlq, "clients.hosting=packed", "clients.actors=1")
    assert evidence(tmp_path / "packed") == evidence(tmp_path / "serial")
    cut(tmp_path / "cut", *SETTINGS, "clients.hosting=serial", "train.max_samples=null", "train.local_epochs=2",
        "evaluate_every=1", *fedlq, data=DATA)  # fmt: skip
    resume(tmp_path / "cut", data=DATA)
    assert evidence(tmp_path / "cut") == evidence(tmp_path / "serial")
