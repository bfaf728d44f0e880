"""The one step that fits a budget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.quantization import Ecsq, Float32, decode, encode
from fedlq_ray.quantization.rate import OneStep
from fedlq_ray.quantization.wire import LAYER_HEADER, PAYLOAD_HEADER

from .test_contract import rng

SIZES, SCALES = (400, 3000, 20000, 1000), (0.02, 0.01, 0.002, 0.02)
STARTS = np.cumsum([0, *SIZES]).tolist()
PIECES = tuple(zip(STARTS[:-1], STARTS[1:], strict=True))
WHERE = {"kind": "update", "round": 0, "client": 0}


def update(seed=0):
    draws = np.random.default_rng(seed)
    parts = [draws.standard_t(4, size=n) * s for n, s in zip(SIZES, SCALES, strict=True)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


@pytest.mark.parametrize("bits", [0.05, 0.1, 0.3, 1, 2, 4, 8])
def test_the_payload_fits_and_leaves_little(bits):
    for seed in range(3):
        x, budget = update(seed), bits * STARTS[-1] / 8
        size = len(encode(x, OneStep(PIECES, (1.0,) * 4, budget)(x), rng=rng(), **WHERE))
        assert 0.98 * budget - 12 < size <= budget


ODD = {
    "zeros": lambda draws, n: np.zeros(n),
    "constant": lambda draws, n: np.ones(n),
    "spike": lambda draws, n: np.eye(1, n, n // 2)[0],
    "spike on noise": lambda draws, n: draws.normal(size=n) * 1e-5 + np.eye(1, n, n // 2)[0],
    "two levels": lambda draws, n: draws.choice([-1.0, 1.0], n),
    "mostly zero": lambda draws, n: draws.normal(size=n) * (draws.random(n) < 0.02),
    "uniform": lambda draws, n: draws.uniform(-1, 1, n),
    "laplace": lambda draws, n: draws.laplace(size=n),
    "heavy": lambda draws, n: draws.standard_cauchy(n),
}
layer = st.tuples(
    st.sampled_from(sorted(ODD)),
    st.sampled_from([1, 2, 7, 100, 3000]),
    st.one_of(st.just(0.0), st.floats(-44, 38)),  # from subnormals to the highest float32
    st.sampled_from([1.0, 1.0, 1.0, 0.0, 0.03, 50.0]),
)


@given(st.lists(layer, min_size=1, max_size=5), st.floats(-3, 5), st.integers(0, 99))
@settings(max_examples=400, deadline=None)
def test_no_update_however_odd_takes_more_than_its_budget_or_comes_back_worse_than_zeros(layers, log2_bits, seed):
    draws = np.random.default_rng(seed)
    top = float(np.finfo(np.float32).max)
    parts = [np.clip(ODD[kind](draws, n) * 10.0**exponent, -top, top) for kind, n, exponent, _ in layers]
    x = torch.from_numpy(np.concatenate(parts).astype(np.float32))
    starts = np.cumsum([0, *(n for _, n, _, _ in layers)]).tolist()
    pieces, weights = tuple(zip(starts[:-1], starts[1:], strict=True)), tuple(weight for *_, weight in layers)
    least = PAYLOAD_HEADER + sum(LAYER_HEADER + (Ecsq.HEADER.size if w else 4 * n) for _, n, _, w in layers)
    budget = 2**log2_bits * len(x) / 8
    payload = encode(x, OneStep(pieces, weights, budget)(x), rng=rng(), **WHERE)
    assert len(payload) <= max(budget, least)
    assert payload == encode(x, OneStep(pieces, weights, budget)(x), rng=rng(), **WHERE)
    back = decode(payload, len(x), **WHERE).vector
    for (start, stop), weight in zip(pieces, weights, strict=True):
        sent, came = x[start:stop].double(), back[start:stop].double()
        assert (came - sent).norm() <= sent.norm() * (1 + 1e-6) and (weight or torch.equal(came, sent))


@pytest.mark.parametrize("bits", [0.1, 1, 4])
def test_a_choice_is_encoded_as_a_quantizer_of_the_same_step_would_do_it_alone(bits):
    x = update()
    for quantizer, start, stop in OneStep(PIECES, (1.0, 2.0, 1.0, 1.0), bits * STARTS[-1] / 8)(x):
        assert quantizer.encode(x[start:stop], rng()) == Ecsq(quantizer.step).encode(x[start:stop], rng())


def test_a_budget_that_nothing_fits_gives_zeros_and_one_beyond_all_needs_is_not_used_up():
    x = update()
    least = encode(x, OneStep(PIECES, (1.0,) * 4, 10)(x), rng=rng(), **WHERE)
    assert not decode(least, len(x), **WHERE).vector.any()
    most = encode(x, OneStep(PIECES, (1.0,) * 4, 1e9)(x), rng=rng(), **WHERE)
    back = decode(most, len(x), **WHERE).vector
    assert len(most) < 4 * len(x) and float((back - x).norm() / x.norm()) < 1e-3
    assert OneStep(PIECES, (1.0,) * 4, 1e4)(torch.zeros(STARTS[-1]))[0].quantizer == Ecsq(1.0)


def test_weights_divide_the_step_and_a_buffer_goes_as_float32():
    segments = OneStep(PIECES, (2.0, 1.0, 4.0, 0.0), 8000)(update())
    steps = [s.quantizer.step for s in segments[:3]]
    assert steps[0] == pytest.approx(steps[1] / 2) and steps[2] == pytest.approx(steps[1] / 4)
    assert segments[3].quantizer == Float32()


def test_one_step_is_the_best_split_of_bytes_between_layers():
    """Reverse water-filling: shifting the step between layers, at the same bytes, gains next to nothing."""
    x = update()

    def error(weights):
        payload = encode(x, OneStep(PIECES, weights, 1500)(x), rng=rng(), **WHERE)
        return float((decode(payload, len(x), **WHERE).vector - x).square().sum())

    even = error((1.0,) * 4)
    for other in ((1.5, 1, 1, 1), (1, 1.5, 1, 1), (1, 1, 1.5, 1), (1, 1, 1, 1.5), (0.6, 1, 1, 1), (1, 1, 0.6, 1)):
        assert even < 1.01 * error(other)


@pytest.mark.parametrize("bits", [0.1, 0.25, 0.5, 1.0])
def test_what_is_left_of_an_update_fills_its_budget_again_and_again(bits):
    # All that a dead zone leaves lies right below its edge: bytes then rise steeply with the step.
    noise = torch.Generator().manual_seed(0)
    left = torch.cat([torch.randn(n, generator=noise) * scale for n, scale in ((416, 0.3), (12832, 0.1), (1280, 0.05))])
    pieces, budget = ((0, 416), (416, 13248), (13248, 14528)), bits * 14528 / 8
    norms = [float(left.norm())]
    for _ in range(12):
        segments = OneStep(pieces, (1.0, 1.0, 1.0), budget)(left)
        payload = encode(left, segments, kind="update", round=0, client=0, rng=noise)
        assert 0.9 * budget < len(payload) <= budget
        left = left - decode(payload, len(left), kind="update", round=0, client=0).vector
        norms.append(float(left.norm()))
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.75 * norms[0]
