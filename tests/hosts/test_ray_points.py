"""The driver, a client's actor and a node are killed at the N-th point of a small run: the same bytes.

CI tries a few N. All of them take some 20 min, each with its number:
FEDLQ_POINTS=1 pytest -rP tests/hosts/test_ray_points.py
"""

import itertools
import os
import sys
from pathlib import Path

import faults
import pytest
import ray
from faults import at_point, die, evidence
from ray import cloudpickle
from ray.cluster_utils import Cluster
from torch import nn

import fedlq_ray
from fedlq_ray.config.load import load
from fedlq_ray.strategies.fedlq_rd import FedLQRD

pytestmark = [pytest.mark.ray, pytest.mark.timeout(7200)]
for module in (faults, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)  # no other process can import a test
ALL = bool(os.environ.get("FEDLQ_POINTS"))
SETTINGS = (
    "rounds=3", "clients.count=6", "clients.cohort=3", "clients.actors=2", "clients.hosting=packed",
    "train.local_epochs=1", "train.max_samples=32", "evaluate_every=2", "tracking.uri=null", "strategy.name=fedlq_rd",
    "checkpoint.every_rounds=1", "network.downlink_bits=1", "strategy.floor_bits=null",
)  # fmt: skip


class Once:
    """Does something at the N-th point that a process of one kind comes to; no process does so again."""

    def __init__(self, number, kind, marker, what):
        self.number, self.kind, self.marker, self.what, self.count = number, kind, marker, what, 0

    def here(self):
        return Path("/proc/self/cmdline").read_text().startswith(f"ray::{self.kind}") and not self.marker.exists()

    def point(self):
        if self.here():
            self.count += 1
            if self.count == self.number:
                self.happen()

    def happen(self):
        self.marker.touch()
        self.what()


def armed(once):
    """A strategy that has a driver's writes, syncs and renames count, from the first to the last."""

    def factory(context):
        if once.here():
            once.armed = at_point(once.number, once.happen)
            once.armed.__enter__()
        return FedLQRD(context)

    return factory


class Counted(nn.Module):
    """Its forward and backward passes are points."""

    def __init__(self, once):
        super().__init__()
        self.once, self.fc = once, nn.Linear(64, 10)

    def forward(self, x):
        self.once.point()
        x = self.fc(x.flatten(1))
        if x.requires_grad:
            x.register_hook(lambda gradient: self.once.point())
        return x


def counted(once):
    return lambda: Counted(once)


def simulated(out, once, **given):
    given = given or {"model": counted(once)}
    fedlq_ray.simulate(load(None, [*SETTINGS, f"out={out}"]), **given)
    return evidence(out)


def numbers(few):
    return itertools.count(1) if ALL else few


def tried(tmp_path, few, attempt):
    """Try numbers until one is beyond the last point; how many were not."""
    hit = 0
    for number in numbers(few):
        marker = tmp_path / f"hit-{number}"
        attempt(number, tmp_path / str(number), marker)
        if not marker.exists():
            break
        hit += 1
    print(f"{hit} points")
    return hit


@pytest.mark.usefixtures("ray_here")
def test_the_driver_at_every_write(tmp_path):
    plain = Once(0, "Driver", tmp_path / "never", die)
    expected = simulated(tmp_path / "whole", plain, strategy=armed(plain))

    def attempt(number, out, marker):
        once = Once(number, "Driver", marker, die)
        assert simulated(out, once, strategy=armed(once)) == expected, f"point {number}"

    assert tried(tmp_path, [4, 20], attempt) >= (30 if ALL else 2)


@pytest.mark.usefixtures("ray_here")
def test_a_clients_actor_at_every_pass(tmp_path):
    expected = simulated(tmp_path / "whole", Once(0, "ClientActor", tmp_path / "never", die))

    def attempt(number, out, marker):
        once = Once(number, "ClientActor", marker, die)
        assert simulated(out, once) == expected, f"point {number}"

    assert tried(tmp_path, [3, 6], attempt) >= (10 if ALL else 2)


@pytest.mark.skipif(not ALL, reason="half a minute for each point; FEDLQ_POINTS=1")
def test_a_node_at_every_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ray.shutdown()  # that of the tests above
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", str(cluster.address))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    here = ray.get_runtime_context().get_node_id()

    def end_node():
        os.kill(int(os.environ["RAY_RAYLET_PID"]), 9)

    class Elsewhere(Once):
        def here(self):
            return super().here() and ray.get_runtime_context().get_node_id() != here

    try:
        expected = simulated(tmp_path / "whole", Once(0, "ClientActor", tmp_path / "never", die))

        def attempt(number, out, marker):
            second = cluster.add_node(num_cpus=1, wait=True)
            once = Elsewhere(number, "ClientActor", marker, end_node)
            assert simulated(out, once) == expected, f"point {number}"
            cluster.remove_node(second, allow_graceful=False)

        assert tried(tmp_path, [], attempt) >= 5
    finally:
        ray.shutdown()
        cluster.shutdown()
