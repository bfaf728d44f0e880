"""QSGD with Elias's codes: the paper's bounds on error and bits, entropy, and a decoder that trusts nothing."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.qsgd_elias import MOST, QsgdElias

from .test_contract import rng, roundtrip

fuzz = settings(max_examples=300, deadline=None)
HEADER = QsgdElias.HEADER


def gaussian(n, seed=2):
    return torch.randn(n, generator=rng(seed))


def body_of(way, levels, bucket, norms, bits):
    packed = np.packbits([int(bit) for bit in bits.replace(" ", "")]).tobytes()
    return memoryview(HEADER.pack(way, levels, bucket) + np.array(norms, "<f4").tobytes() + packed)


def test_bodies_by_hand():
    # Norm 5, s = 5: shares .6, 0, -.8 are levels 3, 0, -4 exactly, whatever the noise.
    x = torch.tensor([3.0, 0.0, -4.0])
    # Dense gamma: 4, 1, 5 take 5 + 1 + 5 bits; omega 6 + 1 + 6; sparse gamma: count + 1 = 3, distances 1 and 2, levels
    # 3 and 4 take 3 + 1 + 3 + 3 + 5. So dense gamma: unary 001 1 001, second bits 0 0, third 0 1, signs 0 1.
    body = QsgdElias(5, None).encode(x, rng())
    assert body == bytes(body_of(0, 5, 0, [5.0], "0011001 00 01 01"))
    assert torch.equal(QsgdElias().decode(memoryview(body), 3), x)
    # One of 99, the 43rd, s = 1: sparse omega, 2 is 100, the distance 43 is 10 101 101011 0, the level 0, a sign 1;
    # gamma has 11 bits for the distance, of omega's 12, and as many for the rest.
    one = torch.zeros(99)
    one[42] = -2.5
    body = QsgdElias(1, None).encode(one, rng())
    assert body == bytes(body_of(2, 1, 0, [2.5], "010 00000101011 1 1"))
    assert torch.equal(QsgdElias().decode(memoryview(body), 99), one)


@pytest.mark.parametrize(
    "way, s, bucket, norm", [(0, 16, 512, "max"), (1, 65536, 512, "max"), (2, 4, 512, "l2"), (3, 1, None, "l2")]
)
def test_each_way_is_taken_where_it_is_the_shortest_and_comes_back(way, s, bucket, norm):
    x = gaussian(100_000)  # for way 3 distances must exceed 128 mostly: one of sqrt(n) elements is not zero
    x[500:900] = 0
    body = QsgdElias(s, bucket, norm).encode(x, rng())
    assert body[0] == way
    back = QsgdElias().decode(memoryview(body), len(x))
    for piece, seen in zip(x.split(bucket or len(x)), back.split(bucket or len(x)), strict=True):
        size = float(piece.norm() if norm == "l2" else piece.abs().max())
        assert float((seen - piece).abs().max()) <= size / s * 1.01  # off by less than a step, and float32's rounding


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("s", [1, 2, 3, 7, 16, 100, 65536])
def test_rounding_has_no_bias_and_the_papers_variance(norm, s):
    d, buckets, draws = 64, 40, 50
    x = gaussian(d * buckets, 1) * torch.logspace(-3, 3, buckets).repeat_interleave(d)
    seen = torch.stack([roundtrip(QsgdElias(s, d, norm), x, seed) for seed in range(draws)]).double()
    rows = x.double().view(buckets, d)
    size = rows.norm(dim=1) if norm == "l2" else rows.abs().amax(1)
    noise = (seen - x).view(draws, buckets, d) / size[:, None]  # in units of the norm
    # An element's variance is p (1 - p) / s^2 <= 1 / (4 s^2). The mean over draws and a bucket: six deviations, and
    # 1e-7 for float32. Rounding to nearest would miss by about .3 at s = 1 and norm "max".
    assert float((noise * rows.sign()).mean((0, 2)).abs().max()) <= 6 / (2 * s) / (draws * d) ** 0.5 + 1e-7
    p = (rows.abs() / size[:, None] * s) % 1
    exact = (p * (1 - p)).sum(1) / s**2
    assert bool((exact <= (min(d / s**2, d**0.5 / s) if norm == "l2" else d / (4 * s**2))).all())
    # A bucket's squares are at most 1 / s^2 each, their sum's variance at most `exact` / s^2: six deviations of it, and
    # what float32 adds at many levels, (1e-7)^2 for each element.
    bound = 6 * (exact / s**2 / draws).sqrt() + 1e-7 * exact.sqrt()
    assert bool(((noise.square().sum(2).mean(0) - exact).abs() <= bound).all())


def expected_bits(x, norm, s):
    """E of dense gamma's bits, element by element: 2 floor(log2(level + 1)) + 1, and a sign where level > 0."""
    total = 0.0
    for share in (abs(v) / norm * s for v in x.tolist()):
        low = math.floor(share)
        for level, chance in ((low, low + 1 - share), (low + 1, share - low)):
            total += chance * (2 * (level + 1).bit_length() - 1 + (level > 0))
    return total


def test_bits_are_those_that_probabilities_say_and_never_more():
    x = gaussian(2000)
    for norm, s in (("l2", 4), ("l2", 45), ("max", 4), ("max", 16)):
        size = float(x.norm() if norm == "l2" else x.abs().max())
        bodies = [QsgdElias(s, None, norm).encode(x, rng(i)) for i in range(30)]
        bits, due = np.mean([8 * (len(body) - HEADER.size - 4) for body in bodies]), expected_bits(x, size, s)
        # An element's length varies by 2 at most, as its level does by one (by 3 at 0): deviation 1.5 at most, six of
        # it over sqrt(30 * 2000), and up to 7 bits of filling.
        slack = 6 * 1.5 * (2000 / 30) ** 0.5
        assert bits <= due + slack + 7
        if (norm, s) == ("max", 16):
            assert {body[0] for body in bodies} == {0} and bits >= due - slack


def test_no_more_are_sent_than_the_paper_has_it():
    # Lemma 3.1: at most s (s + sqrt(n)) levels are not zero, on average. n = 10^4, s = 1: 101, of one vector 79.8 in
    # truth, sqrt(2 / pi) sqrt(n); six standard errors of 50 draws are 7.6.
    x = gaussian(10_000)
    sent = np.mean([int(roundtrip(QsgdElias(1, None), x, i).count_nonzero()) for i in range(50)])
    assert sent <= 101 and abs(sent - 79.8) <= 7.6


@pytest.mark.parametrize("s", [1, 4, 16])
def test_bits_are_near_the_entropy_of_the_codes(s):
    x = gaussian(100_000)
    body = QsgdElias(s).encode(x, rng())
    norms = torch.stack([piece.norm() for piece in x.split(512)]).repeat_interleave(512)[: len(x)]
    levels = (QsgdElias().decode(memoryview(body), len(x)) / norms * s).round()
    shares = levels.unique(return_counts=True)[1] / len(x)
    entropy = -float((shares * shares.log2()).sum())
    coded = 8 * (len(body) - HEADER.size - 4 * 196) / len(x)
    # No code of independent elements is below; a universal code pays a factor, of 1.29 to 1.43 here. Level + 1 for
    # every element alone would take 4.4 times the entropy at s = 1.
    assert entropy < coded < 1.5 * entropy


def test_zeros_are_cheap():
    # Sparse: the code of 0 + 1 alone, a bit, and a norm a bucket.
    assert len(QsgdElias(4).encode(torch.zeros(100_000), rng())) == HEADER.size + 4 * 196 + 1
    assert len(QsgdElias(4, None).encode(torch.zeros(100_000), rng())) == HEADER.size + 4 + 1


@pytest.mark.parametrize("quantizer", [QsgdElias(s, b, n) for s in (1, MOST) for b in (2, None) for n in ("l2", "max")])
def test_extremes_are_safe(quantizer):
    top = torch.finfo(torch.float32).max
    for values in ([0.0], [-0.0], [1e-45], [-top], [top] * 5, [-3e38, 0.0, 3e38], [1e-40] * 5, [1e-40, 3e38, -1e-45]):
        x = torch.tensor(values)
        seen = torch.stack([roundtrip(quantizer, x, seed) for seed in range(30)])
        assert torch.isfinite(seen).all() and (seen * x.sign() >= 0).all()
    # An element alone is its own norm, exactly.
    for alone in (-top, 1e-45, 0.1, 0.0):
        assert torch.equal(roundtrip(quantizer, torch.tensor([alone])), torch.tensor([alone]))


@pytest.mark.parametrize(
    "wrong", [{"levels": 0}, {"levels": MOST + 1}, {"bucket": 0}, {"bucket": 2**32}, {"norm": "l1"}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QsgdElias(**wrong)


SOUND = "0011001 00 01 01"


@pytest.mark.parametrize(
    "body, why",
    [
        (body_of(4, 5, 0, [5.0], SOUND), "way 4"),
        (body_of(0, 0, 0, [5.0], SOUND), "0 levels"),
        (body_of(0, MOST + 1, 0, [5.0], SOUND), r"levels; 1 to \d+ are"),
        (body_of(0, 5, 0, [-5.0], SOUND), "negative"),
        (body_of(0, 5, 0, [-0.0], SOUND), "negative"),
        (body_of(0, 5, 0, [float("inf")], SOUND), "infinity"),
        (body_of(0, 5, 0, [0.0], SOUND), "not zero, but its norm is"),
        (body_of(0, 5, 1, [5.0], SOUND), "norms alone take 21"),
        (body_of(0, 3, 0, [5.0], SOUND), "integer above 4"),
        (body_of(0, 5, 0, [5.0], "0011001 0"), "ends within an integer|signs"),
        (body_of(0, 5, 0, [5.0], "00010001000 1"), "integer|3 integers"),
        (body_of(0, 5, 0, [5.0], SOUND + "1"), "not padding"),
        (body_of(0, 5, 0, [5.0], SOUND + "000 00000000"), "not padding"),
        (body_of(3, 5, 0, [5.0], "0"), "way 3, which is not the shortest"),
        (body_of(2, 5, 0, [5.0], "010 001 00 1 0"), "integer"),  # the fourth of three
        (body_of(2, 5, 0, [5.0], "011 0101 11 11 00"), "beyond the last"),  # distances 3 and 3
        (body_of(2, 5, 0, [5.0], "00100 01"), "integer|ends"),
    ],
)
def test_what_encode_cannot_have_made_is_refused(body, why):
    with pytest.raises(PayloadError, match=why):
        QsgdElias().decode(body, 3)


@fuzz
@given(
    header=st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 12)),
    rest=st.binary(max_size=40),
    n=st.integers(1, 12),
)
def test_rubbish_is_refused_or_sound(header, rest, n):
    try:
        back = QsgdElias().decode(memoryview(HEADER.pack(*header) + rest), n)
    except PayloadError:
        return
    assert back.shape == (n,) and back.dtype == torch.float32 and torch.isfinite(back).all()


@fuzz
@given(data=st.data())
def test_a_changed_bit_is_refused_or_sound(data):
    s, bucket = data.draw(st.sampled_from([1, 4, 300])), data.draw(st.sampled_from([8, None]))
    body = bytearray(QsgdElias(s, bucket).encode(gaussian(40, data.draw(st.integers(0, 9))), rng()))
    at = data.draw(st.integers(0, 8 * len(body) - 1))
    body[at // 8] ^= 1 << at % 8
    try:
        back = QsgdElias().decode(memoryview(bytes(body)), 40)
    except PayloadError:
        return
    assert back.shape == (40,) and torch.isfinite(back).all()


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("bucket", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("bits", ["00000000" * 8, "11111111" * 8, "0" * 21 + "1" + "0" * 42])
def test_claims_allocate_nothing(way, bucket, bits):
    body = body_of(way, MOST, bucket, [1.0], bits)
    tracemalloc.start()
    with pytest.raises(PayloadError):
        QsgdElias().decode(body, 10_000_000)
    with pytest.raises(PayloadError):
        QsgdElias().decode(body, 9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes; a byte for each element would take ten million
