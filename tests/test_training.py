"""A client's round: what training moves, what it leaves alone, and what its reply is a function of."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fedlq_ray.config import TrainConfig
from fedlq_ray.models import FlatModel
from fedlq_ray.quantization import Float32, MinMax, Segment, decode
from fedlq_ray.training import Plan, client_round, evaluate, train_locally

X = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def trained(model, **settings):
    flat = FlatModel(model)
    train = TrainConfig(batch_size=8, local_epochs=2, **settings)
    train_locally(flat, torch.from_numpy(X), torch.from_numpy(Y), train, samples=80, rng=np.random.default_rng(1))
    return flat


def trained_by_pytorch(max_grad_norm=float("inf"), **settings):
    plain, rng = module(), np.random.default_rng(1)
    optimizer = torch.optim.SGD(plain.parameters(), **settings)
    for _ in range(2):
        order = rng.permutation(40)
        for start in range(0, 40, 8):
            batch = order[start : start + 8]
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(torch.from_numpy(X[batch])), torch.from_numpy(Y[batch])).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
            optimizer.step()
    return FlatModel(plain).vector


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_training_is_pytorchs_own_sgd_bit_for_bit(momentum, weight_decay):
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    assert torch.equal(trained(module(), **settings).vector, trained_by_pytorch(foreach=False, **settings))


def test_training_does_not_import_pytorchs_compiler():
    code = """
import sys, numpy, torch
from fedlq_ray.config import TrainConfig
from fedlq_ray.models import FlatModel
from fedlq_ray.training import train_locally
x, y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
train_locally(FlatModel(torch.nn.Linear(6, 2)), x, y, TrainConfig(), samples=4, rng=numpy.random.default_rng(0))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_gradients_are_clipped_as_pytorch_does():
    flat = trained(module(), lr=0.5, max_grad_norm=0.1)
    torch.testing.assert_close(flat.vector, trained_by_pytorch(0.1, lr=0.5), rtol=1e-4, atol=1e-6)
    assert not torch.equal(flat.vector, trained(module(), lr=0.5).vector)


def test_frozen_parameters_stay_where_they_are_whatever_the_weight_decay():
    model = module()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    flat = trained(model, lr=0.1, momentum=0.9, weight_decay=0.5)
    assert flat.trained == ((0, 48), (56, 74))
    assert torch.equal(model[0].bias, before[0].bias)
    assert not torch.equal(model[0].weight, before[0].weight) and not torch.equal(model[2].bias, before[2].bias)


def round_of(flat, weights, memory=None, *, payload="update", feedback=False, client=3, samples=80, plan=None):
    plan = plan or Plan(payload, (Segment(MinMax(2), 0, len(weights)),), feedback)
    return client_round(
        flat,
        X,
        Y,
        normalise=torch.from_numpy,
        weights=weights,
        memory=memory,
        plan=plan,
        train=TrainConfig(batch_size=8),
        samples=samples,
        seed=0,
        round=5,
        client=client,
    )


def received(reply, weights, kind="update"):
    return decode(reply.payload, len(weights), kind=kind, round=5, client=3).vector


def test_a_round_is_a_function_of_its_arguments():
    flat = FlatModel(module())
    weights = flat.vector.clone()
    first, _ = round_of(flat, weights)
    flat.vector.normal_()  # scratch space: what it holds does not matter
    again, _ = round_of(flat, weights)
    assert first.payload == again.payload and torch.equal(weights, FlatModel(module()).vector)
    assert round_of(flat, weights, client=4)[0].payload != first.payload


def test_error_feedback_keeps_exactly_what_was_lost():
    flat = FlatModel(module())
    weights, memory = flat.vector.clone(), torch.full_like(flat.vector, 0.25)
    reply, kept = round_of(flat, weights, memory, feedback=True)
    update = flat.vector - weights
    torch.testing.assert_close(received(reply, weights) + kept, update + memory)
    assert round_of(flat, weights)[1] is None


def test_ef21_sends_the_difference_and_keeps_what_the_server_then_has():
    flat = FlatModel(module())
    weights, memory = flat.vector.clone(), torch.full_like(flat.vector, 0.25)
    reply, kept = round_of(flat, weights, memory, feedback="ef21")
    torch.testing.assert_close(kept, memory + received(reply, weights))
    sent = flat.vector - weights - memory
    assert (received(reply, weights) - sent).abs().max() <= 1.001 * (sent.max() - sent.min()) / 3
    first, kept = round_of(flat, weights, feedback="ef21")
    assert torch.equal(kept, received(first, weights))


def test_an_update_is_normalised_by_the_work_that_made_it():
    flat, plain = FlatModel(module()), FlatModel(module())
    weights = flat.vector.clone()
    memory = torch.zeros_like(weights)
    reply, kept = round_of(flat, weights, memory, feedback=True, samples=160)
    assert reply.samples == 160
    torch.testing.assert_close(received(reply, weights) + kept, (flat.vector - weights) / 2)
    round_of(plain, weights)
    assert not torch.equal(plain.vector, flat.vector)


def test_payload_model_sends_the_model():
    flat = FlatModel(module())
    weights = flat.vector.clone()
    reply, _ = round_of(flat, weights, payload="model")
    step = (flat.vector.max() - flat.vector.min()) / 3
    assert (received(reply, weights, "model") - flat.vector).abs().max() <= 1.001 * step


def test_evaluation_counts_what_is_right():
    flat = FlatModel(nn.Sequential(nn.Linear(1, 2)))
    # Logits (x, -x): class 0 where x > 0.
    weights = torch.tensor([1.0, -1.0, 0.0, 0.0])
    found = evaluate(flat, weights, torch.tensor([[2.0], [1.0], [-1.0], [-3.0]]), torch.tensor([0, 1, 1, 1]))
    assert found.accuracy == 0.75
    expected = np.mean([np.log1p(np.exp(-2 * m)) for m in (2, -1, 1, 3)])
    assert abs(found.loss - expected) < 1e-6


def test_a_last_sample_alone_is_joined_by_another_for_batch_norm():
    flat = FlatModel(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)))
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    train_locally(flat, x, y, TrainConfig(batch_size=8), samples=41, rng=np.random.default_rng(1))


def test_buffers_are_not_normalised_by_work():
    flat = FlatModel(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)))
    weights = flat.vector.clone()
    plan = Plan("update", (Segment(Float32(), 0, len(weights)),))
    reply, _ = round_of(flat, weights, plan=plan, samples=160)
    buffers = flat.num_parameters
    torch.testing.assert_close(received(reply, weights)[:buffers], (flat.vector - weights)[:buffers] / 2)
    torch.testing.assert_close(received(reply, weights)[buffers:], (flat.vector - weights)[buffers:])
