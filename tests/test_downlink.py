"""What clients hold of the model, and what bringing them up to date takes."""

import json

import pytest
import torch
from torch import nn

from fedlq_ray import ConfigError, simulate
from fedlq_ray.config import load
from fedlq_ray.downlink import Downlink
from fedlq_ray.task import Workplace, prepare

QUICK = ["rounds=6", "clients.hosting=serial", "clients.count=8", "clients.cohort=3", "tracking.uri=null"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def downlink(bits, clients=3):
    place = Workplace(prepare(load(None, QUICK)))
    weights = place.model.vector.clone()
    return Downlink(place.setting, bits, weights, place.broadcast_size(), clients), weights, place.broadcast_size()


def test_whole_models_are_exact_and_always_cost_the_same():
    sent, weights, whole = downlink(None)
    assert sent.bytes_for(0) == whole
    sent.broadcast(weights + 1, 1)
    assert torch.equal(sent.model, weights + 1) and sent.bytes_for(0) == whole


def test_a_client_fetches_what_it_missed_or_the_whole_where_that_is_less():
    sent, weights, whole = downlink(1.0)
    assert sent.bytes_for(0) == 0  # the initial weights come from the seed
    noise = torch.Generator().manual_seed(0)
    for round in range(1, 40):
        sent.broadcast(weights + 0.1 * torch.randn(len(weights), generator=noise), round)
        sent.fetched(1)
        assert sent.bytes_for(1) == 0
        assert sent.bytes_for(0) == min(whole, sum(sent.sizes))
        assert sent.sizes[-1] <= len(weights) / 8
    assert sum(sent.sizes) > whole == sent.bytes_for(0)


def test_what_coding_loses_is_sent_later():
    sent, weights, _ = downlink(0.5)
    goal = weights + 0.1 * torch.randn(len(weights), generator=torch.Generator().manual_seed(0))
    gaps = []
    for round in range(1, 30):
        sent.broadcast(goal, round)
        gaps.append(float((goal - sent.model).norm()))
    assert all(after < before for before, after in zip(gaps, gaps[1:], strict=False)) and gaps[-1] < 0.01 * gaps[0]


def test_a_run_with_coded_downlinks_bills_their_bytes():
    both = ["network.bill=both", "strategy.name=fedlq_rd"]
    coded = simulate(load(None, [*QUICK, *both, "network.downlink_bits=1", "name=coded"]))
    whole = simulate(load(None, [*QUICK, *both, "name=whole"]))
    lines = [json.loads(line) for line in (coded.path / "rounds.jsonl").read_text().splitlines()]
    assert lines[0]["downlink_bytes"] == 0 < lines[1]["downlink_bytes"]
    assert all(sum(r["client_downlink_bytes"]) == r["downlink_bytes"] for r in lines)
    assert coded.summary["downlink_bytes"] < 0.2 * whole.summary["downlink_bytes"]
    assert coded.summary["sim_time_s"] < whole.summary["sim_time_s"]
    again = simulate(load(None, [*QUICK, *both, "network.downlink_bits=1", "name=again"]))
    assert again.summary["weights_sha256"] == coded.summary["weights_sha256"]


@pytest.mark.parametrize(("name", "setting"), [("fedavg", "network.downlink_bits=1.5"), ("ecsq", "strategy.bits=1.5")])
def test_a_rate_that_headers_alone_take_is_refused(name, setting):
    x, y = torch.randn(200, 6).numpy(), (torch.arange(200) % 3).numpy()
    config = load(None, [*QUICK, setting, f"strategy.name={name}", "data.min_samples=2"])
    with pytest.raises(ConfigError, match=rf"{setting.partition('=')[0]}: 1.5 bits .* headers alone take \d"):
        simulate(config, model=lambda: nn.Linear(6, 3), data=(x, y, x, y))
