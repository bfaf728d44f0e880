"""Stochastic rounding to one step: its error against the formula, its bytes against their prediction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import QsgdElias, decode, encode
from fedlq_ray.quantization.coding.codes import TOP, Magnitudes
from fedlq_ray.quantization.rate import OneStep
from fedlq_ray.quantization.stochastic import StochasticStep
from fedlq_ray.quantization.wire import Segment

from .test_contract import rng, roundtrip
from .test_rate import ODD, PIECES, STARTS, WHERE, update


def error(x, back):
    return float((back - x).double().square().sum() / x.double().square().sum())


@pytest.mark.parametrize("step", [0.01, 0.5, 3.0, 40.0])
def test_the_error_is_that_of_the_formula(step):
    x = torch.from_numpy(np.random.default_rng(1).laplace(size=20_000).astype(np.float32))
    up = np.modf(np.abs(x.numpy().astype(np.float64)) / step)[0]
    expected = step**2 * float((up * (1 - up)).sum()) / float(x.double().square().sum())
    seen = np.mean([error(x, roundtrip(StochasticStep(step), x, seed)) for seed in range(8)])
    assert seen == pytest.approx(expected, rel=0.05)
    fine, coarse = step**2 * len(x) / 6, step * float(x.abs().sum())
    if step == 0.01:
        assert expected == pytest.approx(fine / float(x.double().square().sum()), rel=0.01)
    if step == 40.0:
        assert expected == pytest.approx(coarse / float(x.double().square().sum()) - 1, rel=0.01)


@pytest.mark.parametrize("roots", [0.1, 1.0, 2.0, 8.0, 100.0])
def test_the_bound_of_the_theory_holds_and_is_reached(roots):
    """q = min(r^2 / 4, r), with a step of r root mean squares of the vector."""
    bound = min(roots**2 / 4, roots)
    for kind in ("laplace", "heavy", "spike", "uniform"):
        x = torch.from_numpy(ODD[kind](np.random.default_rng(3), 2000).astype(np.float32))
        step = roots * float(x.square().mean().sqrt())
        seen = np.mean([error(x, roundtrip(StochasticStep(step), x, seed)) for seed in range(10)])
        assert seen < bound * 1.15 + 0.01
    halves = torch.full((20_000,), 3.0)  # a step of two root mean squares
    assert error(halves, roundtrip(StochasticStep(6.0), halves)) == pytest.approx(1.0)


@pytest.mark.parametrize("step", [0.02, 0.3, 2.0, 10.0, 60.0, 1e3])
@pytest.mark.parametrize("kind", sorted(ODD))
def test_bytes_are_those_predicted_less_a_margin_for_chance(kind, step):
    x = torch.from_numpy(ODD[kind](np.random.default_rng(0), 3000).astype(np.float32))
    quantizer, taken = StochasticStep(step).fitted(Magnitudes.of(x))
    assert quantizer == StochasticStep(step)
    sizes = np.array([len(quantizer.encode(x, rng(seed))) for seed in range(40)])
    assert (sizes > taken).mean() <= 0.15 and sizes.mean() > 0.9 * taken - 30


@given(st.integers(0, 10**6), st.floats(-3, 4), st.sampled_from(sorted(ODD)), st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_each_value_is_one_of_the_two_nearest_multiples(seed, exponent, kind, count):
    x = torch.from_numpy(ODD[kind](np.random.default_rng(seed), count).astype(np.float32))
    step = 10.0**exponent
    back = roundtrip(StochasticStep(step), x, seed).double().numpy()
    step = max(np.float32(step), float(x.abs().max()) / TOP)
    assert (np.abs(back - x.double().numpy()) < step * (1 + 1e-6) + 1e-6 * np.abs(back)).all()
    assert ((back == 0) | (np.sign(back) == np.sign(x.numpy()))).all()


@pytest.mark.parametrize("bits", [0.05, 0.1, 0.3, 1, 2, 4, 8])
def test_one_step_for_all_layers_fills_a_budget_and_seldom_exceeds_it(bits):
    budget, sizes = bits * STARTS[-1] / 8, []
    for seed in range(12):
        x = update(seed)
        chosen = OneStep(PIECES, (1.0,) * 4, budget, StochasticStep)(x)
        sizes.append(len(encode(x, chosen, rng=rng(seed), **WHERE)))
    assert np.mean(sizes) > 0.85 * budget - 12
    assert max(sizes) < 1.05 * budget and sum(size > budget for size in sizes) <= 2


def test_a_budget_below_the_headers_gives_zeros():
    x = update()
    assert not decode(encode(x, OneStep(PIECES, (1.0,) * 4, 10, StochasticStep)(x), rng=rng(), **WHERE), len(x), **WHERE
                      ).vector.any()  # fmt: skip


@pytest.mark.parametrize("levels", [2, 8, 32])
def test_at_the_bytes_of_qsgd_the_error_is_a_third_smaller(levels):
    x = update()
    theirs = [Segment(QsgdElias(levels, None, "l2"), start, stop) for start, stop in PIECES]
    size, error_theirs, error_ours = 0.0, 0.0, 0.0
    for seed in range(5):
        payload = encode(x, theirs, rng=rng(seed), **WHERE)
        size += len(payload) / 5
        error_theirs += error(x, decode(payload, len(x), **WHERE).vector)
    for seed in range(5):
        payload = encode(x, OneStep(PIECES, (1.0,) * 4, size, StochasticStep)(x), rng=rng(seed), **WHERE)
        error_ours += error(x, decode(payload, len(x), **WHERE).vector)
    assert error_ours < error_theirs / 1.5


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda body: body[:5], "scalars"),
        (lambda body: np.float32(-1).tobytes() + body[4:], "a step of"),
        (lambda body: body[:4] + b"\0\0" + body[6:], "follow a layer of zeros"),
        (lambda body: body[:4] + b"\xff\xff" + body[6:], "a model of"),
        (lambda body: body + b"\0", "4-byte words"),
        (lambda body: body + b"\0\0\0\1", "differ"),
    ],
)
def test_damaged_bodies_are_refused(spoil, says):
    body = StochasticStep(0.5).encode(update()[:100] * 100, rng())
    with pytest.raises(PayloadError, match=says):
        StochasticStep().decode(memoryview(spoil(body)), 100)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_a_step_that_is_not_above_zero_is_refused(step):
    with pytest.raises(ValueError, match="step must be above 0"):
        StochasticStep(step)
