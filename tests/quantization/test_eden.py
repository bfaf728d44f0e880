"""EDEN: the papers' figures, Gauss's integrals, no bias, and a decoder that trusts nothing."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import Quantizer
from fedlq_ray.quantization.eden import Eden, codebook

from .test_contract import rng, roundtrip

fuzz = settings(max_examples=300, deadline=None)
RATES = [1 / 64, 0.1, 0.5, 1, 1.5, 2, 2.25, 3, 4, 5, 6, 7, 7.9, 8]
# Lloyd-Max's distortion of N(0, 1) (Max, 1960, table I, to four digits; 0 bits send nothing).
DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
LARGE = 2**17


def normalised_error(quantizer, x, seed=0):
    return float((roundtrip(quantizer, x, seed) - x).double().square().sum() / x.double().square().sum())


@pytest.mark.parametrize(
    "level, half", [(1, [0.79788]), (2, [0.45278, 1.51042]), (3, [0.24509, 0.75601, 1.34391, 2.15195])]
)
def test_centroids_are_those_of_the_table(level, half):
    centroids, _ = codebook(level)
    np.testing.assert_allclose(centroids, [-c for c in half[::-1]] + half, atol=6e-6)  # the table's five digits


@pytest.mark.parametrize("level", range(1, 9))
def test_each_centroid_is_the_mean_between_its_boundaries(level):
    centroids, boundaries = codebook(level)
    assert len(centroids) == 2**level and (np.diff(centroids) > 0).all()
    np.testing.assert_allclose(boundaries, (centroids[1:] + centroids[:-1]) / 2, rtol=1e-6)
    edges = [-9.0, *boundaries, 9.0]
    for low, high, centroid in zip(edges, edges[1:], centroids, strict=False):
        t = np.linspace(low, high, 20001)  # the trapezium rule, instead of the closed form of the code
        weight = np.exp(-np.square(t) / 2)
        # Edges and centroids are float32, 3e-7 near 5; the rule's error in the widest cell is (high - low)^2/2e8.
        weight[[0, -1]] /= 2
        assert (t * weight).sum() / weight.sum() == pytest.approx(centroid, abs=1e-6)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_errors_are_lloyd_maxs_whatever_goes_in(level, kind):
    student = np.random.default_rng(3).standard_t(3, LARGE)
    x = torch.randn(LARGE, generator=rng(4)) if kind == "gaussian" else torch.from_numpy(student).float()
    least = DISTORTION[level]
    # The error is a mean over 2^17 coordinates, each with a standard deviation of about 1 to 3 times that mean:
    # 3/sqrt(2^17) = 0.8 % at worst, and three of them.
    assert normalised_error(Eden(level, unbiased=False), x) == pytest.approx(least, rel=0.025)
    # <c, z> = |c|^2 = 1 - D at the fixed point, so the unbiased scale gives |c|^2/<c, z>^2 - 1.
    assert normalised_error(Eden(level), x) == pytest.approx(1 / (1 - least) - 1, rel=0.025)


@pytest.mark.parametrize("bits", [0.1, 0.5, 1.5, 2.25, 3.9])
def test_fractions_of_a_bit_mix_the_two_levels_around(bits):
    x, below, share = torch.randn(LARGE, generator=rng(5)), math.floor(bits), bits - math.floor(bits)
    mixed = (1 - share) * DISTORTION[below] + share * DISTORTION[below + 1]
    assert normalised_error(Eden(bits, unbiased=False), x) == pytest.approx(mixed, rel=0.025)
    # Below one bit |x|^2 is taken from the share that is sent: 1/sqrt(share x 2^17) is 0.9 % at a tenth of a bit.
    assert normalised_error(Eden(bits), x) == pytest.approx(1 / (1 - mixed) - 1, rel=0.04)


@pytest.mark.parametrize("n", [16384, 16385, 30000])
def test_a_single_element_among_zeros_costs_no_more(n):
    x = torch.zeros(n)
    x[-1] = 5.0
    # 16384 coordinates, each with a standard deviation of 1.5 times the mean: 1.2 %, and four of them.
    assert normalised_error(Eden(2, unbiased=False), x) == pytest.approx(DISTORTION[2], rel=0.05)


@pytest.mark.parametrize("bits", [0.2, 1, 1.5, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 30, 65, 200])  # rotations: dense up to 64; then two windows of 64, two of 128
def test_the_mean_over_seeds_is_what_was_sent(bits, n):
    x, draws = torch.randn(n, generator=rng(n)), 450
    seen = torch.stack([roundtrip(Eden(bits), x, seed) for seed in range(draws)]).double()
    # Five standard errors, as the draws show them: beyond, 6e-7 an element. 1e-5 for what does not vary.
    error = seen.std(0) / draws**0.5
    assert ((seen.mean(0) - x).abs() <= 5 * error + 1e-5).all()
    if n < 30:
        return
    # Together: a sum of n squared deviations, each 1 in the mean, has a standard deviation of sqrt(2 n); five of them.
    assert ((seen.mean(0) - x) / error).square().sum() <= n + 5 * (2 * n) ** 0.5
    # The other scale shrinks, to |x|^2 (1 - D) along x: no constant factor hides in the test above. A draw's part along
    # x varies by 0.072 |x|^2 at most, so the mean of 60 is right to 1 %, and to 0.1 % at 3 bits.
    shrunk = torch.stack([roundtrip(Eden(bits, unbiased=False), x, seed) for seed in range(60)]).double()
    assert float(shrunk.mean(0) @ x.double()) < 0.99 * float(x.double().square().sum())


@pytest.mark.parametrize("bits", RATES)
def test_the_least_error_is_a_contraction(bits):
    for n in (1, 2, 5, 64, 65, 100):
        for seed in range(10):
            assert normalised_error(Eden(bits, unbiased=False), torch.randn(n, generator=rng(seed)), seed) < 1


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize("unbiased", [True, False])
def test_bytes_are_the_bits_and_a_header_of_nine(bits, unbiased):
    quantizer = Eden(bits, unbiased)
    assert isinstance(quantizer, Quantizer)
    for n in (1, 2, 7, 8, 64, 65, 1000, 1001):
        x = torch.randn(n, generator=rng(n))
        body = quantizer.encode(x, rng(1))
        assert len(body) == 9 + math.ceil(n * bits / 8) == quantizer.size(n)
        assert body == quantizer.encode(x, rng(1)) != quantizer.encode(x, rng(2))
        back = Eden().decode(memoryview(body), n)  # the body says all
        assert torch.equal(back, quantizer.decode(memoryview(body), n))
        assert back.dtype == torch.float32 and back.shape == (n,)


def test_the_body_by_hand():
    # One element of 2: rotated to +-1 in units of |x|, 2 bits: centroid 1.51042, scale 2/1.51042, code 11 or 00.
    first, _, scale, codes = struct.unpack("<BIfB", Eden(2).encode(torch.tensor([2.0]), rng()))
    assert first == 8 * 2 + 6 and scale == pytest.approx(2 / 1.51042, rel=1e-5) and codes in (0b11000000, 0)


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize("unbiased", [True, False])
def test_extremes_are_safe(bits, unbiased):
    quantizer = Eden(bits, unbiased)
    for n in (1, 2, 9, 65, 300):
        assert torch.equal(roundtrip(quantizer, torch.zeros(n)), torch.zeros(n))
        spike = torch.zeros(n)
        spike[0] = -3.4e38
        for x in (spike, torch.full((n,), 3.4e38), torch.full((n,), 1e-40), torch.full((n,), 1e-45)):
            assert torch.isfinite(roundtrip(quantizer, x)).all()
    tiny = roundtrip(Eden(8), torch.full((100,), 1e-40))
    np.testing.assert_allclose(tiny, 1e-40, rtol=0.1)  # the error at 8 bits is 0.6 %: no part of it went to zero


@pytest.mark.parametrize("bits", [0, -1, 0.01, 8.1, math.nan, math.inf])
def test_rates_that_cannot_be_are_refused(bits):
    with pytest.raises(ValueError, match="1/64 to 8"):
        Eden(bits)


@pytest.mark.parametrize(
    "body, why",
    [
        (Eden.HEADER.pack(8, 0, 1.0), "0 bits of codes"),
        (Eden.HEADER.pack(8, 0, 1.0) + b"\0\0", "16 bits of codes"),  # 2 bits, said to be a level of 1
        (Eden.HEADER.pack(72, 0, 1.0) + bytes(9), "72 bits of codes"),
        (Eden.HEADER.pack(9, 0, 1.0) + b"\1", "7 bits of codes"),
        (Eden.HEADER.pack(1, 0, 1.0) + b"\1", "padding"),
        (Eden.HEADER.pack(8, 0, -1.0) + b"\0", "negative"),
        (Eden.HEADER.pack(8, 0, math.inf) + b"\0", "infinity"),
        (Eden.HEADER.pack(8, 0, 1.0)[:-1], "8 bytes"),
    ],
)
def test_what_encode_cannot_have_made_is_refused(body, why):
    with pytest.raises(PayloadError, match=why):
        Eden().decode(memoryview(body), 8)


def test_a_byte_of_codes_stands_for_512_elements_at_most():
    body = memoryview(Eden.HEADER.pack(0, 0, 1.0) + b"\0")
    assert len(Eden().decode(body, 512)) == 512
    with pytest.raises(PayloadError, match="8 bits of codes"):
        Eden().decode(body, 513)


@fuzz
@given(st.binary(max_size=60), st.integers(1, 200))
def test_random_bytes_are_refused_or_sound(data, count):
    refused_or_sound(data, count)


@fuzz
@given(st.floats(1 / 64, 8), st.integers(1, 150), st.data())
def test_changed_bodies_are_refused_or_sound(bits, count, draw):
    body = bytearray(Eden(bits).encode(torch.randn(count, generator=rng()), rng()))
    assert len(body) == Eden(bits).size(count)
    for _ in range(draw.draw(st.integers(1, 3))):
        body[draw.draw(st.integers(0, len(body) - 1))] = draw.draw(st.integers(0, 255))
    refused_or_sound(bytes(body), count)
    refused_or_sound(bytes(body[: draw.draw(st.integers(0, len(body)))]), count)


def refused_or_sound(data, count):
    try:
        back = Eden().decode(memoryview(data), count)
    except PayloadError:
        return
    assert back.shape == (count,) and torch.isfinite(back).all()
