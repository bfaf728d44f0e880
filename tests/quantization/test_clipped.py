"""Min-max to nearest over a clipped range: its error against published and slow ones, and that it contracts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.quantization import MinMax
from fedlq_ray.quantization.clipped import Clipped

from .test_contract import rng, roundtrip
from .test_rate import ODD, update

# Max (1960), table II: the least distortion of N(0, 1) by 2, 4, 8 and 16 evenly spaced values.
MAX_1960 = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


def error(quantizer, x):
    return float((roundtrip(quantizer, x).double() - x.double()).square().sum() / x.double().square().sum())


@pytest.mark.parametrize("bits", MAX_1960)
def test_on_a_gaussian_it_is_the_best_uniform_quantizer(bits):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=2**17).astype(np.float32))
    assert error(Clipped(bits), x) == pytest.approx(MAX_1960[bits], rel=0.02)


@pytest.mark.parametrize("bits", range(1, 9))
def test_on_an_update_it_loses_far_less_than_the_full_range(bits):
    x = update()[3400:23_400]
    assert error(Clipped(bits), x) < error(MinMax(bits), x) / 1.9


@given(st.sampled_from(sorted(ODD)), st.integers(1, 2000), st.integers(1, 8), st.integers(0, 99), st.floats(-30, 30))
@settings(max_examples=200, deadline=None)
def test_what_is_lost_is_never_more_than_what_there_was(kind, count, bits, seed, exponent):
    x = torch.from_numpy((ODD[kind](np.random.default_rng(seed), count) * 10.0**exponent).astype(np.float32))
    back = roundtrip(Clipped(bits), x).double()
    assert (back - x.double()).norm() <= x.double().norm() * (1 + 1e-6)
    # The line of least squares through the codes: what is lost is orthogonal to what arrives.
    assert abs(float((x.double() - back) @ back)) <= 1e-5 * float(x.double().square().sum())


def test_no_wider_or_narrower_range_of_a_fine_grid_is_better():
    x = update()[3400:8400].double().numpy()
    for bits in (1, 2, 4):
        found = []
        for fraction in np.geomspace(0.01, 1, 150):
            low, step = (1 - fraction) * x.mean() + fraction * x.min(), fraction * (x.max() - x.min()) / (2**bits - 1)
            codes = np.rint((x - low) / step).clip(0, 2**bits - 1)
            line = np.polynomial.Polynomial.fit(codes, x, 1)
            found.append(np.square(line(codes) - x).sum() / np.square(x).sum())
        assert error(Clipped(bits), torch.from_numpy(x).float()) < 1.03 * min(found)


def test_its_bytes_are_those_of_minmax_and_no_rounding_is_random():
    x = update()[:1000]
    assert len(Clipped(3).encode(x, rng())) == len(MinMax(3).encode(x, rng()))
    assert Clipped(3).encode(x, rng(1)) == Clipped(3).encode(x, rng(2))
