"""The server's optimizers against hand arithmetic, and FedProx against PyTorch's gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlq_ray.config.settings import ServerConfig, TrainConfig
from fedlq_ray.federation.server import Moments, step
from fedlq_ray.models import FlatModel
from fedlq_ray.training.sgd import LocalSGD

U = torch.tensor([1.0, -2.0])


def test_none_adds_the_mean_update_times_lr():
    assert torch.equal(step(ServerConfig(), Moments(), U)[0], U)
    assert torch.equal(step(ServerConfig(lr=0.5), Moments(), U)[0], U / 2)


def test_momentum_sums_what_came_before():
    config, moments, found = ServerConfig(optimizer="momentum", momentum=0.5, lr=2.0), Moments(), []
    for _ in range(3):
        change, moments = step(config, moments, U)
        found.append(change[0].item())
    assert found == [2.0, 3.0, 3.5]


def test_adam_is_the_papers():
    config = ServerConfig(optimizer="adam", momentum=0.5, beta2=0.75, tau=0.5, lr=1.0)
    # m = u / 2, v = u^2 / 4: u / 2 / (|u| / 2 + 0.5); then m = 3/4 u, v = 7/16 u^2.
    first, moments = step(config, Moments(), U)
    assert first.tolist() == pytest.approx([0.5 / 1.0, -1.0 / 1.5])
    second, _ = step(config, moments, U)
    assert second.tolist() == pytest.approx([0.75 / (7**0.5 / 4 + 0.5), -1.5 / (2 * 7**0.5 / 4 + 0.5)])


def test_fedprox_pulls_to_the_global_weights_as_its_penalty_says():
    def module():
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    flat = FlatModel(module())
    train = TrainConfig(lr=0.5, batch_size=6, local_epochs=4, prox_mu=0.7)
    LocalSGD(flat, train).train(
        x.numpy(), y.numpy(), normalise=torch.from_numpy, samples=24, rng=np.random.default_rng(0)
    )
    plain = module()
    start = [p.detach().clone() for p in plain.parameters()]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        pull = sum((p - s).square().sum() for p, s in zip(plain.parameters(), start, strict=True))
        (nn.functional.cross_entropy(plain(x), y) + 0.35 * pull).backward()
        optimizer.step()
    torch.testing.assert_close(flat.storage, FlatModel(plain).storage)
