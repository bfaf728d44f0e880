"""A client's round: what training moves, what it leaves alone, and what its reply is a function of."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.errors import ClientError
from fedlq_ray.models import FlatModel
from fedlq_ray.quantization import Float32, MinMax, Segment, decode
from fedlq_ray.training.local import Plan, client_round, evaluate
from fedlq_ray.training.sgd import LocalSGD

X = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def round_of(flat, weights, memory=None, *, payload="update", feedback=False, client=3, samples=80, plan=None):
    plan = plan or Plan(payload, (Segment(MinMax(2), 0, len(weights)),), feedback)
    return client_round(
        LocalSGD(flat, TrainConfig(batch_size=8)),
        X,
        Y,
        normalise=torch.from_numpy,
        weights=weights,
        memory=memory,
        plan=plan,
        samples=samples,
        seed=0,
        round=5,
        client=client,
    )


def received(reply, weights, kind="update"):
    return decode(reply.payload, len(weights), kind=kind, round=5, client=3).vector


def test_a_round_is_a_function_of_its_arguments():
    flat = FlatModel(module())
    weights = flat.storage.clone()
    first, _ = round_of(flat, weights)
    flat.storage.normal_()  # scratch space: what it holds does not matter
    again, _ = round_of(flat, weights)
    assert first.payload == again.payload and torch.equal(weights, FlatModel(module()).storage)
    assert round_of(flat, weights, client=4)[0].payload != first.payload


def test_error_feedback_keeps_exactly_what_was_lost():
    flat = FlatModel(module())
    weights, memory = flat.storage.clone(), torch.full_like(flat.storage, 0.25)
    reply, kept = round_of(flat, weights, memory, feedback=True)
    update = flat.storage - weights
    torch.testing.assert_close(received(reply, weights) + kept, update + memory)
    assert reply.square_error == float(kept.double().square().sum()) > 0
    assert round_of(flat, weights)[1] is None


def test_ef21_sends_the_difference_and_keeps_what_the_server_then_has():
    flat = FlatModel(module())
    weights, memory = flat.storage.clone(), torch.full_like(flat.storage, 0.25)
    reply, kept = round_of(flat, weights, memory, feedback="ef21")
    torch.testing.assert_close(kept, memory + received(reply, weights))
    sent = flat.storage - weights - memory
    assert (received(reply, weights) - sent).abs().max() <= 1.001 * (sent.max() - sent.min()) / 3
    first, kept = round_of(flat, weights, feedback="ef21")
    assert torch.equal(kept, received(first, weights))


def test_the_error_that_a_client_reports_is_that_of_its_payload():
    flat = FlatModel(module())
    weights = flat.storage.clone()
    exact = Plan("update", (Segment(Float32(), 0, len(weights)),))
    assert round_of(flat, weights, plan=exact)[0].square_error == 0
    for payload, base in (("update", 0), ("model", weights)):
        reply, _ = round_of(flat, weights, payload=payload)
        sent = flat.storage - weights + base
        lost = (received(reply, weights, payload) - sent).double().square().sum()
        assert reply.square_error == pytest.approx(float(lost), rel=1e-6)


def test_a_quantizer_that_the_server_does_not_know_is_refused():
    class Own(MinMax):
        pass

    flat = FlatModel(module())
    weights = flat.storage.clone()
    with pytest.raises(ClientError, match="uses Own, .* name it as strategy.quantizer"):
        round_of(flat, weights, plan=Plan("update", (Segment(Own(8), 0, len(weights)),)))


def test_an_update_is_normalised_by_the_work_that_made_it():
    flat, plain = FlatModel(module()), FlatModel(module())
    weights = flat.storage.clone()
    memory = torch.zeros_like(weights)
    reply, kept = round_of(flat, weights, memory, feedback=True, samples=160)
    assert reply.samples == 160
    torch.testing.assert_close(received(reply, weights) + kept, (flat.storage - weights) / 2)
    round_of(plain, weights)
    assert not torch.equal(plain.storage, flat.storage)


def test_payload_model_sends_the_model():
    flat = FlatModel(module())
    weights = flat.storage.clone()
    reply, _ = round_of(flat, weights, payload="model")
    step = (flat.storage.max() - flat.storage.min()) / 3
    assert (received(reply, weights, "model") - flat.storage).abs().max() <= 1.001 * step


def test_evaluation_counts_what_is_right():
    flat = FlatModel(nn.Sequential(nn.Linear(1, 2)))
    # Logits (x, -x): class 0 where x > 0.
    weights = torch.tensor([1.0, -1.0, 0.0, 0.0])
    found = evaluate(flat, weights, torch.tensor([[2.0], [1.0], [-1.0], [-3.0]]), torch.tensor([0, 1, 1, 1]))
    assert found.metrics == {"accuracy": 0.75}
    expected = np.mean([np.log1p(np.exp(-2 * m)) for m in (2, -1, 1, 3)])
    assert abs(found.loss - expected) < 1e-6


def test_buffers_are_not_normalised_by_work():
    flat = FlatModel(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)))
    weights = flat.storage.clone()
    plan = Plan("update", (Segment(Float32(), 0, len(weights)),))
    reply, _ = round_of(flat, weights, plan=plan, samples=160)
    buffers = flat.num_parameters
    torch.testing.assert_close(received(reply, weights)[:buffers], (flat.storage - weights)[:buffers] / 2)
    torch.testing.assert_close(received(reply, weights)[buffers:], (flat.storage - weights)[buffers:])
