"""Each metric against autograd's or a hand's own value of its formula, and what FedLQ makes of them."""

from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softmax

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.config.schemes import Probed, strategy_config
from fedlq_ray.models import FlatModel
from fedlq_ray.quantization import Float32, MinMax
from fedlq_ray.significance import METRICS, Drops, Measurement, gather, in_blocks, measure
from fedlq_ray.significance.metrics import (
    _differentiable,
    fisher,
    hawq,
    hessian_traces,
    loss,
    rise,
    size,
    squared_error,
    taylor,
)
from fedlq_ray.strategies import StrategyContext
from fedlq_ray.strategies.fedlq import FedLQ

QUANTIZERS = (MinMax(1), MinMax(3), Float32())
CLASSES = 3


class Deep(nn.Module):
    """A convolution, batch-norm and dropout: what lies in another order, has buffers, and is random in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))


def probed(payload="update", deep=False, samples=40, seed=3, round=7, whole=False):
    torch.manual_seed(0)
    module = Deep() if deep else nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model = FlatModel(module)
    weights = model.storage.clone()
    drawn = torch.Generator().manual_seed(round)
    x = torch.randn(samples, *((2, 4, 4) if deep else (5,)), generator=drawn)
    y = torch.randint(0, CLASSES, (samples,), generator=drawn)
    if deep:
        weights[model.num_parameters :] += torch.rand(8)  # means and variances that are not those of a new layer
    sent = weights if payload == "model" else 0.1 * torch.randn(len(weights))
    base = torch.zeros_like(weights) if payload == "model" else weights
    layers = [layer for layer in model.layers if not layer.buffer]
    take = partial(gather, model, base, sent, layers, QUANTIZERS, seed=seed, round=round)
    return take(x, y) if whole else in_blocks(take, x, y)


def evidence(*given, **named):
    return probed(*given, **named, whole=True)


def mlp_loss(w, x, y):
    """The loss of `evidence`'s shallow model, by hand: w (39,)."""
    hidden = torch.tanh(x @ w[:20].view(4, 5).T + w[20:24])
    return cross_entropy(hidden @ w[24:36].view(3, 4).T + w[36:39], y)


def errors(given):
    """By layer and level, (L, n) of vectors in double."""
    difference = (given.decoded - given.sent).double()
    return [[row[layer.start : layer.stop] for row in difference] for layer in given.layers]


def by_layer(given, function):
    """function(slice of the layer, its error): (L, n)."""
    pieces = [slice(layer.start, layer.stop) for layer in given.layers]
    return np.array([[float(function(p, e)) for e in row] for p, row in zip(pieces, errors(given), strict=True)])


@pytest.mark.parametrize("payload", ["update", "model"])
def test_fisher_and_taylor_are_those_of_autograd(payload):
    given = evidence(payload)
    w = given.weights.double()
    one = torch.func.grad(mlp_loss)
    gradients = torch.stack([one(w, x[None], y[None]) for x, y in zip(given.x.double(), given.y, strict=True)])
    diagonal = gradients.square().mean(0)
    assert np.allclose(fisher(given), by_layer(given, lambda p, e: 0.5 * diagonal[p] @ e**2), rtol=1e-4, atol=0)
    first = by_layer(given, lambda p, e: (gradients[:, p] @ e).mean().abs())
    assert np.allclose(taylor(given), first, rtol=1e-4, atol=1e-8)


def test_fisher_of_a_linear_softmax_by_its_formula():
    torch.manual_seed(1)
    model, x, y = FlatModel(nn.Linear(4, CLASSES)), torch.randn(30, 4), torch.randint(0, CLASSES, (30,))
    w = model.storage.clone()
    given = gather(model, torch.zeros(15), w, model.layers, QUANTIZERS, x, y, seed=0, round=0)
    # The gradient is (p - onehot) x' for the matrix, p - onehot for the bias.
    residual = softmax(x @ w[:12].view(3, 4).T + w[12:], 1) - torch.eye(3)[y]
    diagonal = torch.cat([(residual[:, :, None] * x[:, None]).square().mean(0).flatten(), residual.square().mean(0)])
    due = 0.5 * (diagonal.double() * (given.decoded - w).double() ** 2).sum(1)
    assert np.allclose(fisher(given)[0], due.numpy(), rtol=1e-4)


def test_hawq_is_the_trace_of_the_hessians_block():
    given = evidence("model")
    hessian = torch.func.hessian(mlp_loss)(given.weights.double(), given.x.double(), given.y)
    exact = np.array([hessian.diagonal()[layer.start : layer.stop].sum().item() for layer in given.layers])
    traces = hessian_traces(given, 1000)
    # Five standard errors; that blocks off the diagonal add no bias is part of this.
    assert (np.abs(traces.mean(0) - exact) < 5 * traces.std(0) / 1000**0.5).all()
    assert (traces.std(0) / 1000**0.5 < 0.05 * np.abs(exact)).all()
    due = by_layer(given, lambda p, e: hessian.diagonal()[p].mean() * (e @ e) / 2)
    assert np.allclose(hawq(given, 1000), due, rtol=5 * 0.05, atol=0)


def test_second_order_metrics_foretell_small_losses_together_with_the_first():
    given = evidence("model")
    w, x, y = given.weights.double(), given.x.double(), given.y
    small = replace(given, decoded=given.sent + 1e-2 * (given.decoded - given.sent))
    gradient, hessian = torch.func.grad(mlp_loss)(w, x, y), torch.func.hessian(mlp_loss)(w, x, y)
    due = by_layer(small, lambda p, e: gradient[p] @ e + e @ hessian[p, p] @ e / 2)
    assert np.allclose(rise(small), due, atol=2e-7)
    second = by_layer(small, lambda p, e: e @ hessian[p, p] @ e / 2)
    assert given.unbiased.tolist() == [True, True, False] and np.allclose(loss(small), second, atol=2e-7)


def test_the_noise_that_is_told_is_what_other_samples_and_other_rounding_change_and_the_drop_has_no_bias():
    count = 200
    found = [measure(probed("model", round=round), "loss")["loss"] for round in range(count)]
    drops, told = np.array([one.drop for one in found])[:, :, :2], np.array([one.noise for one in found])[:, :, :2]
    plain = np.array([rise(probed("model", round=round, whole=True)) for round in range(count)])[:, :, :2]
    spread = drops.std(0, ddof=1)
    ratio = spread / np.sqrt((told**2).mean(0))  # 1, to the 5 % of 200 draws and what heavy tails add
    assert (ratio > 0.8).all() and (ratio < 1.2).all()
    gap = np.hypot(spread, plain.std(0, ddof=1)) / count**0.5
    assert (np.abs(drops.mean(0) - plain.mean(0)) < 3 * gap).all()
    assert (spread < plain.std(0, ddof=1) / 2).all()  # what blocks and the control variate are for


def test_blocks_have_all_samples_once_and_rounding_of_their_own():
    whole, blocks = evidence(samples=43), list(probed(samples=43))
    assert torch.equal(torch.cat([b.x for b in blocks]), whole.x) and {len(b.y) for b in blocks} == {5, 6}
    assert not torch.equal(blocks[0].decoded, blocks[1].decoded) and torch.equal(blocks[0].decoded, whole.decoded)
    (one,) = measure([whole], "accuracy").values()
    assert (one.noise == 1e30).all()  # unknown


def test_a_convolution_in_evaluation_mode_has_the_gradient_of_ordinary_backward():
    given = evidence(deep=True)
    given.model.load(given.weights)
    given.model.module.eval()
    given.model.grad.zero_()
    cross_entropy(given.model.module(given.x), given.y).backward()
    gradient, statistics = given.model.grad.double(), given.model.storage[given.model.num_parameters :].clone()
    due = by_layer(given, lambda p, e: (gradient[p] @ e).abs())
    assert np.allclose(taylor(given), due, rtol=1e-3, atol=1e-7)
    assert torch.equal(given.model.storage[given.model.num_parameters :], statistics)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_finite_repeatable_and_nothing_where_nothing_is_lost(metric, deep):
    given = evidence(deep=deep)
    found, again = METRICS[metric](given), METRICS[metric](given)
    assert found.shape == given.shape and found.dtype == np.float64
    assert np.isfinite(found).all() and (found == again).all()
    if metric not in ("size", "random"):
        assert (found[:, 2] == 0).all() and found[:, 0].any()
    (told,) = measure(probed(deep=deep), metric).values()
    assert told.drop.shape == told.noise.shape == given.shape
    assert np.isfinite(told.noise).all() and (told.noise >= 0).all()


def test_random_is_seeded_and_size_follows_bytes():
    one, other = METRICS["random"](evidence()), METRICS["random"](evidence(seed=4))
    assert (one != other).all()
    given = evidence()
    assert (given.sizes == [[9 + 3, 9 + 9, 4 * 24], [9 + 2, 9 + 6, 4 * 15]]).all()
    assert size(given)[0, 1] == pytest.approx(24 * 4 ** -(8 * 18 / 24))


def test_what_is_not_finite_counts_as_the_worst():
    given = evidence()
    broken = replace(given, decoded=torch.full_like(given.decoded, float("nan")))
    for blocks in ([broken, broken], [given, given, broken]):
        found = measure(blocks, "loss")["loss"]
        assert (found.drop == 1e30).all() and (found.noise == 0).all()  # the worst, and sure of it
    part = given.decoded.clone()
    part[0] = float("nan")
    one = measure([given, replace(given, decoded=part)], "loss")["loss"]
    assert (one.drop[:, 0] == 1e30).all() and (one.drop[:, 1:] < 1).all()


def test_names_in_the_configuration_are_the_metrics():
    names, _ = get_args(Probed.model_fields["metric"].annotation)  # or None
    assert get_args(names) == tuple(METRICS)


def test_curvature_by_hand():
    drops, sizes = Drops(0.5), [10, 30, 60]
    assert (drops.curvature(sizes) == 1).all()  # nothing is known
    error = np.array([[4.0, 1.0], [2.0, 0.0], [8.0, 2.0]])
    drops = drops.add(Measurement(np.array([[8.0, 2.0], [0.5, 0.5], [-1.0, 0.0]]), np.zeros((3, 2)), error))
    # 10/5, 1/2 and noise: the mean is (10 x 2 + 30 x .5) / 100 = .35, of which the third has a thousandth.
    assert drops.curvature(sizes) == pytest.approx([2, 0.5, 0.35e-3])
    drops = drops.add(Measurement(np.array([[0.0, 0.0], [1.5, 1.5], [4.0, 2.0]]), np.zeros((3, 2)), error))
    # Averages of the sums: 5/5, 2/2, 2.5/10.
    assert drops.curvature(sizes) == pytest.approx([1, 1, 0.25])
    drops = Drops(0.5)
    drops = drops.add(Measurement(-error, np.zeros((3, 2)), error))
    assert (drops.curvature(sizes) == 1).all()  # nothing stands out
    drops = Drops(0.5)
    drops = drops.add(Measurement(np.array([[6.0], [0.0]]), np.zeros((2, 1)), np.array([[2.0], [0.0]])))
    assert (drops.curvature([1, 9]) == 3).all()  # a layer without error has the mean of the others


def test_what_is_not_above_its_noise_is_the_scaled_distortion_by_hand():
    sizes, levels = [10, 30], [1, 2, 4]
    drops = Drops(0.5)
    first = drops.estimate(sizes, levels)  # nothing is known: d / (6 (2^b - 1)^2)
    assert first == pytest.approx(np.array([[10, 10 / 9, 10 / 225], [30, 30 / 9, 30 / 225]]) / 6)
    error = np.array([[4.0, 1.0, 0.1], [8.0, 2.0, 0.2]])
    drops = drops.add(Measurement(np.array([[8.0, 4.0, -0.3], [1.0, -1.0, 0.1]]), np.full((2, 3), 1.0), error))
    # The first layer's ratios are 2 and 4, so 3 for its third level; the second has none, so 3 too, at most 2 noises.
    assert drops.estimate(sizes, levels) == pytest.approx(np.array([[8, 4, 0.3], [2, 2, 0.6]]))
    drops = Drops(0.5)
    drops = drops.add(Measurement(np.array([[8.0, 4.0, -0.3], [40.0, -1.0, 0.1]]), np.full((2, 3), 1.0), error))
    # The second layer's ratio is 5, of its first level: its own, not the median of all, 4.
    assert drops.estimate(sizes, levels) == pytest.approx(np.array([[8, 4, 0.3], [40, 2, 1]]))
    drops = Drops(0.5)
    drops = drops.add(Measurement(np.ones((2, 3)), np.full((2, 3), 1.0), error))
    assert (drops.estimate(sizes, levels) == error).all()  # none stands out


def test_curvature_of_squared_error_is_one():
    drops = Drops(0.3)
    for seed in range(4):
        given = evidence(seed=seed)
        (found,) = measure([given], "squared_error").values()
        drops = drops.add(found)
        assert (found.drop == found.distortion).all() and np.allclose(found.drop, squared_error(given), rtol=1e-12)
        assert (drops.curvature([layer.size for layer in given.layers]) == 1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_fedlq_runs_with_it(metric, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["rounds=2", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "tracking.uri=null"]
    probing = ["strategy.probe_every=1", "strategy.probe_samples=32", f"strategy.metric={metric}"]
    result = simulate(load(None, [*quick, *probing, "train.local_epochs=1"]))
    assert len(result.history) == 2 and all(s >= 0 for s in result.history["significance"].iloc[-1].values())


def test_fedlq_probes_with_the_quantizers_of_its_levels():
    layers = evidence().model.layers
    strategy = FedLQ(StrategyContext(strategy_config(levels=(2, 32), metric="fisher"), layers, seed=0))
    probe = strategy.probe(strategy.init(), 1)
    assert probe.quantizers == (MinMax(2), Float32()) and probe.metric == "fisher"


def test_recurrent_layers_have_their_gradients_without_cudnn():
    before = torch.backends.cudnn.enabled
    for module, there in ((nn.Sequential(nn.LSTM(2, 2)), False), (nn.Linear(2, 2), before)):
        with _differentiable(module):
            assert torch.backends.cudnn.enabled is there
        assert torch.backends.cudnn.enabled is before
