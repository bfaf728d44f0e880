"""Memory that runs out on a node of Ray's: object stores that are full, and actors that are killed for it."""

import json
import os
import sys
import time

import numpy as np
import pytest

import fedlq_ray
from fedlq_ray.config.load import load
from fedlq_ray.strategies import Strategy
from fedlq_ray.training.local import Plan

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.ray,
    pytest.mark.skipif("FEDLQ_CLUSTER" not in os.environ, reason="takes minutes; FEDLQ_CLUSTER=1 runs it"),
]
QUICK = [
    "rounds=6", "clients.count=8", "clients.cohort=4", "strategy.probe_every=2", "model.name=mlp",
    "model.args.hidden=[670]", "train.local_epochs=1", "evaluate_every=3", "tracking.uri=null",
]  # fmt: skip


def run(folder, *overrides, **given):
    result = fedlq_ray.simulate(load(None, [*QUICK, f"out={folder}", *overrides]), **given)
    return [(result.path / name).read_bytes() for name in ("rounds.jsonl", "summary.json")]


def test_memories_that_fill_the_object_store_go_to_disk(tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    large = [
        "strategy.error_feedback=true",
        "clients.count=30",
        "clients.cohort=15",
        "model.args.hidden=[13000]",
        "train.max_samples=32",
        "rounds=4",
    ]
    alone = run(tmp_path / "serial", *large, "clients.hosting=serial")
    node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 79_000_000}  # the least that Ray takes
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        assert 30 * json.loads(alone[0].splitlines()[0])["downlink_bytes"] / 15 > 100_000_000  # of memories
        assert run(tmp_path / "packed", *large, "clients.hosting=packed") == alone
    finally:
        ray.shutdown()
        cluster.shutdown()


class Hungry:
    """Takes 5 GB for a minute, where nobody has done so in this folder before."""

    def __init__(self, segments, folder):
        self.segments, self.folder = segments, folder

    def __call__(self, vector):
        before = list(self.folder.iterdir())
        (self.folder / str(os.getpid())).touch()
        if not before:
            held = np.ones(625_000_000)
            time.sleep(60)
            del held
        return self.segments


class Hungers(Strategy):
    """Client 3 does."""

    def __init__(self, context, folder):
        self.context, self.folder = context, folder

    def plan(self, state, round, cohort):
        segments = self.context.segments([self.context.quantizer_at(4)] * len(self.context.quantized))
        hungry = Hungry(segments, self.folder)
        return {c.client: Plan("update", hungry if c.client == 3 else segments) for c in cohort}


def test_rays_memory_monitor_ends_a_client_that_is_run_again(tmp_path, monkeypatch):
    """Its threshold is 2 GB above what is in use."""
    import psutil
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    memory = psutil.virtual_memory()
    threshold = {"memory_usage_threshold": (memory.total - memory.available + 2e9) / memory.total}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _system_config=threshold | {"memory_monitor_refresh_ms": 100},
    )  # fmt: skip
    found = {}
    try:
        for hosting in ("packed", "serial"):  # the second finds that somebody has
            (tmp_path / "ate").mkdir(exist_ok=True)
            own = {"strategy": lambda context: Hungers(context, tmp_path / "ate")}
            found[hosting] = run(tmp_path / hosting, f"clients.hosting={hosting}", **own)
            if hosting == "packed":
                assert len(list((tmp_path / "ate").iterdir())) > 1  # the actor was killed, another took over
    finally:
        ray.shutdown()
    assert found["packed"] == found["serial"]
