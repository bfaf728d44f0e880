"""The one step that fits a budget."""

import numpy as np
import pytest
import torch

from fedlq_ray.quantization import Ecsq, Float32, decode, encode
from fedlq_ray.quantization.rate import OneStep

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
        assert 0.95 * budget - 12 < size <= budget


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
