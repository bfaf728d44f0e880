"""The clients' SGD: PyTorch's own, bit for bit, and what it leaves alone."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fedlq_ray import ConfigError, simulate
from fedlq_ray.config.load import load
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.models import FlatModel
from fedlq_ray.training.sgd import LocalSGD, lr_at

X = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def trained(model, **settings):
    flat = FlatModel(model)
    start = flat.read()
    train = TrainConfig(batch_size=8, local_epochs=2, **settings)
    sgd = LocalSGD(flat, train)
    sgd.train(X[:16], Y[:16], normalise=torch.from_numpy, samples=32, rng=np.random.default_rng(5))
    flat.load(start)  # a client before leaves nothing behind
    sgd.train(X, Y, normalise=torch.from_numpy, samples=80, rng=np.random.default_rng(1))
    return flat


def trained_by_pytorch(max_grad_norm=float("inf"), kind=torch.optim.SGD, **settings):
    plain, rng = module(), np.random.default_rng(1)
    optimizer = kind(plain.parameters(), **settings)
    for _ in range(2):
        order = rng.permutation(40)
        for start in range(0, 40, 8):
            batch = order[start : start + 8]
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(torch.from_numpy(X[batch])), torch.from_numpy(Y[batch])).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
            optimizer.step()
    return FlatModel(plain).storage


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_training_is_pytorchs_own_sgd_bit_for_bit(momentum, weight_decay):
    settings = {"lr": 0.1, "weight_decay": weight_decay, **momentum}
    assert torch.equal(trained(module(), **settings).storage, trained_by_pytorch(foreach=False, **settings))


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_pytorchs_with_a_fresh_state_for_each_client(name, kind):
    settings = {"lr": 0.01, "weight_decay": 0.1}
    found = trained(module(), optimizer=name, **settings).storage
    assert torch.equal(found, trained_by_pytorch(kind=kind, foreach=False, **settings))


def test_schedules_by_hand():
    def at(rounds, **settings):
        return [lr_at(TrainConfig(lr=0.1, **settings), round) for round in rounds]

    assert at([0, 500]) == [0.1, 0.1]
    assert at([0, 2, 900], lr_schedule="exponential", lr_min=0.005) == pytest.approx([0.1, 0.1 * 0.993**2, 0.005])
    assert at([9, 10, 25], lr_schedule="steps", lr_decay=0.5, lr_rounds=10) == pytest.approx([0.1, 0.05, 0.025])
    assert at([0, 5, 10, 99], lr_schedule="cosine", lr_rounds=10, lr_min=0.02) == pytest.approx([0.1, 0.06, 0.02, 0.02])


def test_a_round_trains_at_its_learning_rate(tmp_path):
    def norms(**train):
        settings = {"rounds": 2, "strategy": {"name": "fedavg"}, "tracking": {"uri": None}, "train": train}
        settings |= {"clients": {"count": 4, "cohort": 4, "hosting": "serial"}, "out": str(tmp_path / str(len(train)))}
        return simulate(settings).history["update_norm"]

    plain, fallen = norms(), norms(lr_schedule="steps", lr_decay=1e-3, lr_rounds=1)
    assert fallen[0] == plain[0] and fallen[1] < 0.01 * plain[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.optimizer=adam", "train.momentum=0.9"], "train.momentum: adam has none"),
        (["train.nesterov=true"], "train.nesterov needs a train.momentum"),
        (["train.lr_min=0.5"], r"train.lr_min \(0.5\) must not be above train.lr \(0.1\)"),
    ],
)
def test_settings_that_an_optimizer_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(None, settings)


def test_training_does_not_import_pytorchs_compiler():
    code = """
import sys, numpy, torch
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.models import FlatModel
from fedlq_ray.training.sgd import LocalSGD, lr_at
x, y = numpy.zeros((4, 6), numpy.float32), numpy.zeros(4, numpy.int64)
sgd = LocalSGD(FlatModel(torch.nn.Linear(6, 2)), TrainConfig())
sgd.train(x, y, normalise=torch.from_numpy, samples=4, rng=numpy.random.default_rng(0))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_gradients_are_clipped_as_pytorch_does():
    flat = trained(module(), lr=0.5, max_grad_norm=0.1)
    torch.testing.assert_close(flat.storage, trained_by_pytorch(0.1, lr=0.5), rtol=1e-4, atol=1e-6)
    assert not torch.equal(flat.storage, trained(module(), lr=0.5).storage)


def test_frozen_parameters_stay_where_they_are_whatever_the_weight_decay():
    model = module()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    flat = trained(model, lr=0.1, momentum=0.9, weight_decay=0.5)
    assert flat.num_parameters == 48 + 18
    assert torch.equal(model[0].bias, before[0].bias)
    assert not torch.equal(model[0].weight, before[0].weight) and not torch.equal(model[2].bias, before[2].bias)


def test_a_last_sample_alone_is_joined_by_another_for_batch_norm():
    flat = FlatModel(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)))
    sgd = LocalSGD(flat, TrainConfig(batch_size=8))
    sgd.train(X, Y, normalise=torch.from_numpy, samples=41, rng=np.random.default_rng(1))


def test_bfloat16_rounds_the_step_and_keeps_the_weights_float32():
    plain, rough = (trained(module(), lr=0.1, precision=kind).storage for kind in ("float32", "bfloat16"))
    start = FlatModel(module()).storage
    assert rough.dtype == torch.float32 and not torch.equal(plain, rough)
    # Eight bits of mantissa: the way that the weights went is the same to a few per cent.
    assert float((plain - rough).norm() / (plain - start).norm()) < 0.05
    assert torch.equal(rough, trained(module(), lr=0.1, precision="bfloat16").storage)
