"""The ceiling: ratios and gains by hand, and no nonsense where steps do not wait, links change, or clients drop out."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from fedlq_ray import simulate
from fedlq_ray.federation.events import Prepared
from fedlq_ray.federation.task import Parts, Worker, prepare
from fedlq_ray.runs.ceiling import Quantiles, ceiling

HEADER = "uplink_mbps,downlink_mbps,latency_ms,compute_gflops\n"


def two(tmp_path, *rows, **sections):
    """The task of two clients with these profiles, both in every cohort."""
    (tmp_path / "two.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))
    clients = {"count": 2, "cohort": 2, "profiles": str(tmp_path / "two.csv")}
    return prepare(tiny.config(clients=clients, **sections))


def test_ratios_and_the_gain_by_hand(tmp_path):
    task = two(tmp_path, "1,9,50,0.001", "0.5,9,0,0.004")
    size = Worker(task).broadcast_size()
    samples = [len(shard) * task.config.train.local_epochs for shard in task.shards]
    computes = [task.flops * samples[0] / 1e6, task.flops * samples[1] / 4e6]
    uploads = [0.05 + 8 * size / 1e6, 8 * size / 0.5e6]
    ratios = [upload / compute for upload, compute in zip(uploads, computes, strict=True)]
    found = ceiling(task)
    assert found.ratios.least == pytest.approx(min(ratios)) and found.ratios.most == pytest.approx(max(ratios))
    assert found.ratios.median == pytest.approx(sum(ratios) / 2)
    assert found.float32_s == pytest.approx(max(c + u for c, u in zip(computes, uploads, strict=True)))
    assert found.free_s == pytest.approx(max(computes))
    # One client computes for longest, and the other sends for longest: 1 + ratio at the slowest would promise more.
    assert ratios[1] > ratios[0] and computes[0] > computes[1]
    assert 1 < found.gain < 1 + max(ratios)


def test_equal_clients_gain_one_plus_their_ratio(tmp_path):
    task = prepare(tiny.config(clients={"count": 2, "cohort": 1, "profiles": "equal"}, train={"max_samples": 32}))
    found = ceiling(task)
    assert found.ratios.least == pytest.approx(found.ratios.most)
    assert found.gain == pytest.approx(1 + found.ratios.most)


def test_quantiles_lie_between_two_values():
    assert Quantiles.of([float(value) for value in range(11)]) == (0.0, 1.0, 5.0, 9.0, 10.0)
    assert Quantiles.of([1.0, 2.0]) == pytest.approx((1.0, 1.1, 1.5, 1.9, 2.0))


@pytest.mark.parametrize(
    "sections",
    [
        {"clients": {"dropout": 0.3, "variation": 0.5}},
        {"server": {"buffer": 2, "max_staleness": None}},
        {"server": {"deadline_s": 0.2}},
        {"clients": {"availability": "daily"}},
        {"network": {"downlink_bits": 1.0, "bill": "both"}},
        {"network": {"downlink_bits": 1.0, "downlink": "shared", "bill": "both"}},
        {"train": {"adaptive_work": 4.0}},
    ],
    ids=["dropout", "buffer", "deadline", "daily", "coded", "shared", "adaptive"],
)
def test_every_kind_of_run_has_a_finite_ceiling(sections):
    found = ceiling(prepare(tiny.config(rounds=6, **sections)))
    assert 1 <= found.gain < np.inf and found.ratios.least > 0


def test_the_ceiling_is_the_time_of_fedavg_over_that_of_the_limit(tmp_path):
    same = {"rounds": 5, "clients": {"dropout": 0.2, "variation": 0.5}, "strategy": {"name": "fedavg"}}
    slow, fast = (
        simulate(tiny.config(tmp_path / name, network={"uplink_free": name == "limit"}, **same)).summary["sim_time_s"]
        for name in ("fedavg", "limit")
    )
    assert ceiling(prepare(tiny.config(**same | {"strategy": {"name": "uniform"}}))).gain == pytest.approx(slow / fast)


def test_free_uploads_leave_nothing_to_gain():
    found = ceiling(prepare(tiny.config(network={"uplink_free": True})))
    assert found.gain == 1 and found.ratios.most == 0


class Free(nn.Module):
    """A model without any FLOPs that are counted."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.ones(10))

    def forward(self, x):
        return x.flatten(1)[:, :10] * self.weight


def test_a_run_whose_computing_takes_no_time_has_no_ceiling_and_runs(tmp_path):
    seen = []
    assert not prepare(tiny.config(), Parts(model=Free())).flops
    simulate(tiny.config(tmp_path / "r", rounds=1), model=Free(), watch=seen.append)
    assert isinstance(seen[0], Prepared) and seen[0].ceiling is None
