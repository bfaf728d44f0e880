"""q of each unbiased quantizer against measured errors, and against vectors that reach it."""

import numpy as np
import pytest
import torch

from fedlq_ray.quantization import (
    Ecsq,
    Eden,
    Float32,
    MinMax,
    Qsgd,
    QsgdElias,
    Segment,
    Sign,
    TernGrad,
    TopK,
)
from fedlq_ray.significance.error_factors import (
    lloyd_max_q,
    minmax_error,
    minmax_q,
    plan_q,
    quantizer_q,
    terngrad_q,
)
from fedlq_ray.training.local import Plan


def vectors():
    rng = np.random.default_rng(3)
    spike = np.zeros(50)
    spike[7] = 1.0
    return {
        "gaussian": rng.normal(size=40),
        "heavy": rng.standard_t(2, size=200),
        "flat": np.full(17, -0.3) + 1e-3 * rng.normal(size=17),
        "spike": spike,
        "worst for min-max": np.array([-1.0, 1.0, *([0.0] * 30)]),
        "one": np.array([0.7]),
    }


QUANTIZERS = [
    Float32(), *[kind(bits) for kind in (MinMax, Qsgd) for bits in range(1, 9)], TernGrad(None),
    *[QsgdElias(s, bucket, norm) for s in (1, 4, 30) for bucket in (None, 8) for norm in ("l2", "max")],
]  # fmt: skip


def error(quantizer, x, draws=300):
    """E|Q(x) - x|^2, and what it may be off by: six standard errors, and float32's rounding, squared and with room."""
    rng = torch.Generator().manual_seed(0)
    errors = torch.stack(
        [
            (quantizer.decode(memoryview(quantizer.encode(x, rng)), len(x)) - x).double().square().sum()
            for _ in range(draws)
        ]
    )
    return float(errors.mean()), 6 * float(errors.std()) / draws**0.5 + 1e-12 * float(x.double().square().sum())


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("name", vectors())
def test_q_bounds_the_error_that_is_measured(quantizer, name):
    x = torch.from_numpy(vectors()[name]).float()
    mean, slack = error(quantizer, x)
    assert mean <= quantizer_q(quantizer, len(x)) * float(x.double().square().sum()) + slack
    if isinstance(quantizer, MinMax):
        assert mean <= float(minmax_error(quantizer.bits, len(x), float(x.max() - x.min()))) + slack


def test_terngrad_reaches_its_q():
    assert quantizer_q(QsgdElias(1, None, "max"), 50) == quantizer_q(TernGrad(None), 50) == terngrad_q(50)
    x = torch.full((50,), 1 / (1 + 50**0.5))
    x[3] = 1
    mean, slack = error(TernGrad(None), x, 2000)
    assert mean == pytest.approx(terngrad_q(50) * float(x.double().square().sum()), abs=slack)


def test_the_q_of_a_plan_is_that_of_its_segments():
    pieces = (Segment(MinMax(2), 0, 30), Segment(QsgdElias(4, 10, "max"), 30, 70), Segment(Float32(), 70, 75))
    found = plan_q([Plan("update", pieces), Plan("update", (*pieces[:2], Segment(Qsgd(3), 70, 75)))])
    # 30/(2 3^2); buckets of 10, so 10/(4 4^2), below (1 + sqrt(10))/8; 0. Then s = 3: min(5/36, sqrt(5)/3).
    assert found == pytest.approx(np.array([[30 / 18, 10 / 64, 0], [30 / 18, 10 / 64, 5 / 36]]))


def test_what_the_bound_does_not_speak_of_is_refused():
    for quantizer in (TernGrad(2.5), TopK(0.1), Sign(), Eden(2, unbiased=False), Eden(2), Ecsq(0.1)):
        with pytest.raises(ValueError, match="the bound does not cover it"):
            quantizer_q(quantizer, 10)
    for plan in (Plan("update", lambda x: ()), Plan("update", (Segment(MinMax(2), 0, 9),), True)):
        with pytest.raises(ValueError, match="without error feedback"):
            plan_q([plan])
    for bits in (0, 9, 16):
        with pytest.raises(ValueError, match="bits"):
            minmax_q(bits, 10)


def test_min_max_reaches_its_q_to_the_elements_that_hold_the_range():
    # 1 bit, range [-1, 1], the rest at its middle: each of these errs by exactly 1. |x|^2 = 2, so q >= 30/2, of 32/2.
    x = torch.from_numpy(vectors()["worst for min-max"]).float()
    back = MinMax(1).decode(memoryview(MinMax(1).encode(x, torch.Generator().manual_seed(0))), 32)
    assert float((back - x).square().sum()) == pytest.approx(30, abs=1e-5)
    assert float(minmax_q(1, 32)) * 2 == pytest.approx(32)


def test_lloyd_max_q_is_the_error_of_rotated_gaussians_with_the_unbiased_scale():
    # A uniformly random rotation makes of x a Gaussian vector scaled to |x|; centroids by Lloyd's own iteration.
    rng = np.random.default_rng(4)
    grid = np.linspace(-7, 7, 28001)
    weight = np.exp(-(grid**2) / 2)
    for bits in (1, 2, 3, 4):
        centroids = np.linspace(-2, 2, 2**bits)
        for _ in range(400):
            cell = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, grid)
            centroids = np.bincount(cell, weight * grid) / np.bincount(cell, weight)
        z = rng.normal(size=(400, 2000))
        z *= np.sqrt(2000) / np.linalg.norm(z, axis=1, keepdims=True)
        c = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, z)]
        scale = 2000 / (c * z).sum(1, keepdims=True)
        error = ((scale * c - z) ** 2).sum(1) / 2000
        # The mean of 400 draws has a standard error below 0.1 %, and 2000 elements are within 0.5 % of the limit.
        assert error.mean() == pytest.approx(lloyd_max_q(bits), rel=0.01)
