"""What clients hold of the model, and what bringing them up to date takes."""

import json

import pytest
import torch
from torch import nn

from fedlq_ray import ConfigError, simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation.downlink import Downlink
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.task import Worker, prepare

pytestmark = pytest.mark.usefixtures("own_folder")

QUICK = ["rounds=6", "clients.hosting=serial", "clients.count=8", "clients.cohort=3", "tracking.uri=null"]
LINKS = {0: 1000.0, 1: 2000.0, 2: 100_000.0}


def downlink(bits, cap_bits=4.0):
    worker = Worker(prepare(load(None, QUICK)))
    weights = worker.model.storage.clone()
    return Downlink(worker.context, bits, cap_bits, weights, worker.broadcast_size()), weights, worker.broadcast_size()


def moved(weights, seed=0, by=0.1):
    return weights + by * torch.randn(len(weights), generator=torch.Generator().manual_seed(seed))


def test_whole_models_are_exact_and_always_cost_the_same():
    sent, weights, whole = downlink(None)
    for download in sent.download({}, weights, LINKS, 0).values():
        assert download.model is weights and download.num_bytes == whole


def test_every_link_is_busy_for_as_long_as_the_slowest():
    sent, weights, _ = downlink(0.5)
    # The initial weights come from the seed.
    assert all(
        download.num_bytes == 0 and download.model is weights
        for download in sent.download({}, weights, LINKS, 0).values()
    )
    offers, d = sent.download({}, moved(weights), LINKS, 1), len(weights)
    for client, bits in ((0, 0.5), (1, 1.0), (2, 4.0)):
        assert 0.9 * bits * d / 8 < offers[client].num_bytes <= bits * d / 8
    losses = [float((offers[c].model - moved(weights)).norm()) for c in LINKS]
    assert losses[0] > losses[1] > losses[2] > 0


def test_only_what_is_fetched_is_held_and_what_coding_loses_is_sent_later():
    sent, weights, _ = downlink(0.5)
    goal, gaps, held = moved(weights), [], {}
    for round in range(1, 30):
        offers = sent.download(held, goal, LINKS, round)
        held = {0: offers[0].model}
        gaps.append(float((goal - offers[0].model).norm()))
    assert gaps[:8] == sorted(gaps[:8], reverse=True) and gaps[-1] < 0.01 * gaps[0]
    again = sent.download(held, goal, LINKS, 1)[1]  # never fetched
    assert torch.equal(again.model, downlink(0.5)[0].download({}, goal, LINKS, 1)[1].model)
    assert sent.download(held, offers[0].model, {0: 1.0}, 30)[0].num_bytes == 0  # it has just that


def test_the_whole_model_is_sent_where_that_is_less():
    sent, weights, whole = downlink(32.0, 32.0)
    offers = sent.download({}, moved(weights), LINKS, 1)
    assert all(download.num_bytes <= whole for download in offers.values())


@pytest.mark.parametrize("payload", ["update", "model"])
def test_a_run_with_coded_downlinks_bills_their_bytes(payload):
    both = ["network.bill=both", "strategy.name=fedlq_rd", f"strategy.payload={payload}"]
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


def test_all_clients_share_one_model_and_fetch_what_they_missed():
    """QAFeL's downlink: a client fetches every step's change since it was asked last."""
    settings = [*QUICK, "rounds=8", "clients.cohort=4"]
    more = ["network.downlink_bits=1", "network.downlink=shared", "strategy.name=qsgd"]
    result = simulate(load(None, [*settings, *more]))
    lines = (result.path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    records = [Record.from_json(json.loads(line)) for line in lines]
    assert records[0].downlink_bytes == 0  # the initial weights come from the seed
    sent, has = [0], dict.fromkeys(range(8), 0)  # bytes of all changes by step, and of those that each client has
    for record in records:
        totals = {
            has[client] + fetched for client, fetched in zip(record.cohort, record.client_downlink_bytes, strict=True)
        }
        assert len(totals) == 1  # whatever they missed, they hold the same now
        sent += totals
        has.update(dict.fromkeys(record.cohort, sent[-1]))
    whole = downlink(1)[2]
    assert all(0 < after - before < whole / 8 for before, after in zip(sent[1:], sent[2:], strict=False))
    assert records[-1].accuracy > records[0].accuracy
    with pytest.raises(ConfigError, match=r"network\.downlink=shared needs network\.downlink_bits"):
        load(None, [*settings, "network.downlink=shared"])
