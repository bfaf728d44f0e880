"""Which hosting is chosen, what is refused, and in which order packed actors get jobs."""

import pytest
import ray
import torch
from torch import nn

from fedlq_ray.config.load import load
from fedlq_ray.errors import FedLQError
from fedlq_ray.federation.task import Parts, prepare
from fedlq_ray.hosts.ray import stub
from fedlq_ray.hosts.ray.choose import FORKED_BYTES, ORDINARY_BYTES, actor_bytes, choose
from fedlq_ray.models import saved_bytes


@pytest.fixture
def laptop(monkeypatch):
    """2 cores, 16 GB free, and forking."""
    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 16e9})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(stub, "command", lambda: "fork")


def clients(count, *settings):
    return load(None, [f"clients.count={count}", "clients.cohort=1", *settings]).clients


@pytest.mark.parametrize(("count", "chosen"), [(10, "dedicated"), (200, "packed"), (5000, "packed")])
def test_auto_takes_actors_of_their_own_where_they_start_soon(laptop, count, chosen):
    kind, why = choose(clients(count), 50e6)
    assert kind == chosen
    assert f"{count} actors need about {count * 0.05:.1f} GB of 16.0 GB free, on 2 cores" in why


def test_what_the_memory_cannot_bear_is_refused_with_the_figure_and_the_alternative(laptop):
    settings = clients(300, "clients.hosting=dedicated")
    assert choose(settings, 50e6) == ("dedicated", "as configured")
    with pytest.raises(FedLQError, match=r"dedicated: 300 actors need about 16\.5 GB of 16\.0 GB free.*; use packed"):
        choose(settings, 55e6)
    assert choose(clients(300, "clients.hosting=packed"), 1e12)[0] == "packed"


def test_auto_is_packed_where_memory_is_short(laptop):
    assert choose(clients(10), 0.79e9)[0] == "dedicated"
    kind, why = choose(clients(10), 0.81e9)
    assert kind == "packed" and "10 actors need about 8.1 GB of 16.0 GB free" in why


def test_auto_is_packed_where_actors_ask_for_more_than_there_is(laptop):
    assert choose(clients(10, "clients.num_cpus=0.5"), 50e6) == (
        "packed",
        "the cluster has room for 4 actors that ask for so much",
    )


def test_an_actor_takes_what_its_model_does(laptop, monkeypatch):
    def taken(name):
        shape = (32, 32, 3)
        data = [torch.randint(256, (20, *shape), dtype=torch.uint8).numpy(), torch.arange(20).numpy() % 2] * 2
        settings = [f"model.name={name}", "train.batch_size=32", "clients.count=2", "clients.cohort=1"]
        return actor_bytes(prepare(load(None, settings), Parts(data=data)))

    # As measured in forked processes: private memory after a client's round, of batches of 32 (docs/hosting.md).
    for name, measured in (("resnet8_gn", 43e6), ("vgg9", 187e6)):
        assert taken(name) - FORKED_BYTES + 12e6 == pytest.approx(measured, rel=0.15)
    forked = taken("cnn")
    monkeypatch.setattr(stub, "command", lambda: None)
    assert taken("cnn") - forked == ORDINARY_BYTES - FORKED_BYTES


def test_saved_bytes_are_those_of_what_backward_needs():
    """A linear layer keeps its input, tanh its output."""
    assert saved_bytes(nn.Sequential(nn.Linear(5, 7), nn.Tanh()), (5,)) == 4 * (5 + 7)
