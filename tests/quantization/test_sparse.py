"""Top-k and sparse ternary compression: hand arithmetic, slow loops, and decoders that trust nothing."""

import math
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.coding import golomb
from fedlq_ray.quantization.coding.golomb import rice_bits
from fedlq_ray.quantization.sparse import BITMAP, GOLOMB, Stc, TopK

BOTH = [TopK, Stc]
HAND = torch.tensor([3.0, -1, 4, -1, 5, -9, 2, 6])
fuzz = settings(max_examples=300, deadline=None)
floats = st.floats(-(2.0**127), 2.0**127, width=32)
# Few values, so that ties and zeros are common, or any.
vectors = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3e38]) | floats, min_size=1, max_size=60).map(
    torch.tensor
)
fractions = st.floats(0.001, 1)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def encode(quantizer, x):
    return quantizer.encode(x, rng())


def roundtrip(quantizer, x):
    # A decoder of other settings: the body says all.
    return type(quantizer)(0.5).decode(memoryview(encode(quantizer, x)), len(x))


def slow_largest(x, fraction):
    """Positions by sorting: greatest magnitude first, of equals the lower, zeros left out."""
    k = max(1, round(fraction * len(x)))
    order = sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))
    return [i for i in order[:k] if x[i] != 0]


@given(vectors, fractions)
@fuzz
def test_topk_against_a_slow_loop(x, fraction):
    expected = torch.zeros(len(x))
    for i in slow_largest(x.tolist(), fraction):
        expected[i] = x[i]
    assert torch.equal(roundtrip(TopK(fraction), x), expected)


@given(vectors, fractions)
@fuzz
def test_stc_against_a_slow_loop(x, fraction):
    values, expected = x.tolist(), torch.zeros(len(x))
    chosen = slow_largest(values, fraction)
    for i in chosen:
        mu = math.fsum(abs(values[j]) for j in chosen) / len(chosen)
        expected[i] = math.copysign(mu, values[i])
    # One rounding to float32 may differ, where sums in another order straddle its midpoint.
    assert_close(roundtrip(Stc(fraction), x), expected, rtol=2**-23, atol=2**-149)


def test_errors_by_hand():
    # Half of 8: -9, 6, 5 and 4 go, and 3, -1, -1, 2 are left out: 9 + 1 + 1 + 4 = 15.
    assert (roundtrip(TopK(0.5), HAND) - HAND).square().sum() == 15
    # mu = (9 + 6 + 5 + 4) / 4 = 6: what is sent errs by 4 + 1 + 9 + 0 more.
    assert roundtrip(Stc(0.5), HAND).tolist() == [0, 0, 6, 0, 6, -6, 0, 6]
    assert (roundtrip(Stc(0.5), HAND) - HAND).square().sum() == 29


def test_bytes_by_hand():
    # Positions 2, 4, 5, 7 of 8: p = .5, no remainders, gaps 2, 1, 0, 1 as 001 01 1 01. Signs + + - +.
    where = bytes([0b00101101])
    assert encode(TopK(0.5), HAND) == struct.pack("<BI4f", GOLOMB, 4, 4, 5, -9, 6) + where
    assert encode(Stc(0.5), HAND) == struct.pack("<BIf", GOLOMB, 4, 6) + bytes([0b00100000]) + where


@pytest.mark.parametrize("quantizer", BOTH)
def test_ties_send_exactly_k_and_the_lower_first(quantizer):
    x = torch.tensor([1.0, -2, 1, 1, -1, 2, -1, 1, 1, 1])
    assert roundtrip(quantizer(0.5), x).nonzero().ravel().tolist() == [0, 1, 2, 3, 5]
    equal = torch.full((1000,), -0.5)
    assert roundtrip(quantizer(0.1), equal).nonzero().ravel().tolist() == [*range(100)]
    assert torch.equal(roundtrip(quantizer(1.0), equal), equal)


@pytest.mark.parametrize("quantizer", BOTH)
def test_chosen_zeros_are_not_sent(quantizer):
    x = torch.zeros(1000)
    x[[17, 500]] = torch.tensor([-2.0, 2.0])
    # 100 are chosen and 2 sent, a zero never as plus or minus mu: in the paper sign(0) is 0.
    assert torch.equal(roundtrip(quantizer(0.1), x), x)
    assert encode(quantizer(0.1), torch.zeros(1000)) == bytes(quantizer.HEADER.size)
    assert torch.equal(roundtrip(quantizer(0.1), torch.zeros(1000)), torch.zeros(1000))


@pytest.mark.parametrize("quantizer", BOTH)
def test_extreme_layers_are_safe(quantizer):
    for values in ([3e38] * 9, [-3e38, 0, 3e38], [1e-40] * 5, [-1e-45], [7.5], [-0.0]):
        x = torch.tensor(values)
        assert_close(roundtrip(quantizer(1.0), x), x, rtol=0, atol=0)  # one magnitude each, so mu is it
    mixed = roundtrip(quantizer(0.5), torch.tensor([3e38, -3e38, 1e-40, 1e-45]))
    assert mixed.tolist() == torch.tensor([3e38, -3e38, 0, 0]).tolist()


@pytest.mark.parametrize("quantizer", BOTH)
def test_a_bitmap_goes_where_it_is_shorter(quantizer):
    # p = .36, 1 bit of remainder. Positions 0 to 358 and 999: 360 * 2 + 640 / 2 = 1040 bits, where a bitmap has 1000.
    x = torch.zeros(1000)
    x[:359] = 1
    x[999] = -1
    body = encode(quantizer(0.36), x)
    values = {TopK: 4 * 360, Stc: 45}[quantizer]
    assert body[0] == BITMAP and len(body) == quantizer.HEADER.size + values + 125
    assert torch.equal(roundtrip(quantizer(0.36), x), x)
    with pytest.raises(PayloadError, match="359 positions, expected 360"):
        quantizer(0.36).decode(memoryview(body[:-1] + b"\0"), 1000)
    longer = golomb.encode(x.nonzero().ravel().numpy(), 1000)
    with pytest.raises(PayloadError, match="130 bytes of positions, but a bitmap takes 125"):
        quantizer(0.36).decode(memoryview(bytes([GOLOMB]) + body[1:-125] + longer), 1000)
    assert encode(quantizer(0.36), torch.randn(1000, generator=rng()))[0] == GOLOMB


@pytest.mark.parametrize("fraction", [0.01, 0.1])
@pytest.mark.parametrize("quantizer, bits, header", [(TopK, 32, 5), (Stc, 1, 9)])
def test_bits_an_element_sent_are_the_papers(fraction, quantizer, bits, header):
    n = 147_000
    k, b = round(fraction * n), rice_bits(round(fraction * n), n)
    r = (1 - fraction) ** 2**b
    body = encode(quantizer(fraction), torch.randn(n, generator=rng(3)))
    # 1 or 32 bits, the position, and the header with STC's 32-bit mu; the quotient's standard deviation is
    # sqrt(r) / (1 - r): six standard errors; fillings of signs and positions, 14 bits at most.
    allowed = 6 * k**0.5 * r**0.5 / (1 - r) + 14
    assert abs(8 * len(body) - (8 * header + k * (bits + b + 1 / (1 - r)))) <= allowed


@pytest.mark.parametrize("quantizer", BOTH)
def test_size_is_not_known_and_k_is_one_at_least(quantizer):
    assert [quantizer(0.1).size(n) for n in (1, 1000)] == [None, None]
    assert roundtrip(quantizer(0.001), HAND).tolist() == [0, 0, 0, 0, 0, -9, 0, 0]
    for fraction in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="fraction must be"):
            quantizer(fraction)


def hostile(quantizer):
    good = encode(quantizer(0.5), HAND)
    head, rest = quantizer.HEADER, good[quantizer.HEADER.size :]
    mu = (6.0,) if quantizer is Stc else ()
    return {
        "short header": good[: head.size - 1],
        "no positions": good[:-1],
        "a byte more": good + b"\0",
        "unknown way": b"\2" + good[1:],
        "bitmap though no shorter": head.pack(BITMAP, 4, *mu) + rest,
        "more than there are": head.pack(GOLOMB, 9, *mu) + rest + b"\xff" * 40,
        "fewer than the positions": head.pack(GOLOMB, 2, *mu) + rest,
        "vast claim": head.pack(GOLOMB, 2**32 - 1, *mu) + rest,
        "vast claim of a bitmap": head.pack(BITMAP, 2**32 - 1, *mu) + rest,
        "none, and bytes": head.pack(GOLOMB, 0, *mu) + b"\0",
    }


@pytest.mark.parametrize("quantizer", BOTH)
@pytest.mark.parametrize("fault", hostile(TopK))
def test_what_encode_cannot_have_made_is_refused(quantizer, fault):
    with pytest.raises(PayloadError):
        quantizer(0.5).decode(memoryview(hostile(quantizer)[fault]), 8)


@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, math.inf])
def test_values_that_cannot_be_are_refused(value):
    with pytest.raises(PayloadError):
        TopK(0.5).decode(memoryview(struct.pack("<BI4f", GOLOMB, 4, 4, 5, value, 6) + b"\x2d"), 8)
    with pytest.raises(PayloadError):
        Stc(0.5).decode(memoryview(struct.pack("<BIf", GOLOMB, 4, value) + b"\x20\x2d"), 8)


def test_means_and_signs_that_cannot_be_are_refused():
    for mu in (-6.0, -0.0, 6.0):  # of none
        with pytest.raises(PayloadError, match="mean magnitude"):
            Stc(0.5).decode(memoryview(struct.pack("<BIf", GOLOMB, 0, mu)), 8)
    with pytest.raises(PayloadError, match="mean magnitude"):
        Stc(0.5).decode(memoryview(struct.pack("<BIf", GOLOMB, 4, -6.0) + b"\x20\x2d"), 8)
    with pytest.raises(PayloadError, match="padding"):
        Stc(0.5).decode(memoryview(struct.pack("<BIf", GOLOMB, 4, 6.0) + b"\x21\x2d"), 8)


def refused_or_the_only_reading(quantizer, body, count):
    """At fraction 1 all that is not zero goes, so what was read must encode to the same bytes."""
    try:
        back = quantizer(0.5).decode(memoryview(body), count)
    except PayloadError:
        return
    assert back.shape == (count,) and back.dtype == torch.float32 and torch.isfinite(back).all()
    assert encode(quantizer(1.0), back) == body


@pytest.mark.parametrize("quantizer", BOTH)
@given(body=st.binary(max_size=80), count=st.integers(1, 60))
@fuzz
def test_rubbish_is_refused_or_sound(quantizer, body, count):
    refused_or_the_only_reading(quantizer, body, count)


@pytest.mark.parametrize("quantizer", BOTH)
@given(x=vectors, fraction=fractions, data=st.data())
@fuzz
def test_a_changed_body_is_refused_or_sound(quantizer, x, fraction, data):
    body = bytearray(encode(quantizer(fraction), x))
    refused_or_the_only_reading(quantizer, bytes(body), len(x))
    for at in data.draw(st.lists(st.integers(0, 8 * len(body) - 1), max_size=3)):
        body[at // 8] ^= 1 << at % 8
    cut = data.draw(st.integers(0, len(body)))
    refused_or_the_only_reading(quantizer, bytes(body), len(x))
    refused_or_the_only_reading(quantizer, bytes(body[:cut]), len(x))


@pytest.mark.parametrize("quantizer", BOTH)
def test_claims_alone_allocate_nothing(quantizer):
    mu = (6.0,) if quantizer is Stc else ()
    bodies = [quantizer.HEADER.pack(way, k, *mu) + bytes(30) for way in (GOLOMB, BITMAP) for k in (1, 2**31)]
    tracemalloc.start()
    for body in bodies:
        with pytest.raises(PayloadError):
            quantizer(0.5).decode(memoryview(body), 2**32 - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes


@pytest.mark.parametrize("quantizer", BOTH)
def test_bytes_do_not_depend_on_noise_and_the_input_stays(quantizer):
    x = torch.randn(300, generator=rng(1))
    before, piece = x.clone(), torch.cat([x, x])[300:]
    assert quantizer(0.1).encode(x, rng(1)) == quantizer(0.1).encode(piece, rng(2))
    assert torch.equal(x, before)
