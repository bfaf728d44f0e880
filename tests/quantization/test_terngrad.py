import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.terngrad import TernGrad

HEADER = TernGrad.HEADER


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def roundtrip(quantizer, x, seed=0):
    return TernGrad().decode(memoryview(quantizer.encode(x, rng(seed))), len(x))


def test_a_body_by_hand():
    # All at the greatest magnitude or zero: nothing is left to chance. Digits 1, 2, 0, 1, 1 | 2 are
    # 1 + 2*3 + 0*9 + 1*27 + 1*81 = 115, and 2.
    x = torch.tensor([2.0, -2.0, 0.0, 2.0, 2.0, -2.0])
    body = TernGrad(None).encode(x, rng())
    assert body == HEADER.pack(2.0) + bytes([115, 2]) and len(body) == TernGrad().size(6)
    assert torch.equal(TernGrad().decode(memoryview(body), 6), x)


def test_five_elements_take_a_byte():
    assert [TernGrad().size(n) - 4 for n in (1, 4, 5, 6, 10, 11, 1000)] == [1, 1, 1, 2, 2, 3, 200]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=40))
def test_ternary_vectors_come_back_exactly(values):
    x = torch.tensor(values)
    assert torch.equal(roundtrip(TernGrad(None), x), x)


def test_without_clipping_there_is_no_bias_and_the_variance_of_a_bernoulli():
    x, draws = torch.tensor([-1.0, -0.3, 0.0, 0.21, 0.8]), 4000
    seen = torch.stack([roundtrip(TernGrad(None), x, seed) for seed in range(draws)])
    # Var = |x| (1 - |x|) with m = 1, so a mean of 4000 is off by six of sqrt(Var / 4000) at most; a variance of such
    # draws has a relative deviation of at most |1 - 2p| / sqrt(p (1 - p) draws) = 2.3 %: six of them.
    variance = x.abs() * (1 - x.abs())
    assert ((seen.mean(0) - x).abs() <= 6 * (variance / draws).sqrt() + 1e-7).all()
    assert ((seen.var(0) - variance).abs() <= 0.14 * variance + 1e-7).all()


def test_clipping_is_at_so_many_deviations_from_zero():
    # 99 ones and a 10: deviation sqrt(1.99), 2.5 of it 3.527; the 10 always becomes that, a one with its probability.
    x = torch.ones(100)
    x[50] = 10
    seen = torch.stack([roundtrip(TernGrad(2.5), x, seed) for seed in range(200)])
    assert seen.max().item() == pytest.approx(2.5 * 1.99**0.5, rel=1e-6)
    assert (seen[:, 50] == seen.max()).all()
    # 19,800 draws of 3.527 with p = .2835: deviation 1.59, six of it / sqrt(19800) = .068.
    assert float(seen[:, :50].mean() + seen[:, 51:].mean()) / 2 == pytest.approx(1.0, abs=0.068)
    # A constant layer's deviation from zero is itself: not clipped, and exact. So is one element.
    for constant in (torch.full((9,), 3.0), torch.tensor([-0.7])):
        assert torch.equal(roundtrip(TernGrad(2.5), constant), constant)


def test_gaussian_error_is_what_integrals_say():
    x = torch.randn(100_000, generator=rng(2))
    # Clipped at c = 2.5: E|x'| c - E x'^2 + E(|x| - c)+^2, with E|x'| = .79788 - 2 * .0020 = .79388,
    # E x'^2 = .97743 and E(|x| - c)+^2 = .00206: 1.0095. Tail integrals phi(c) = .017528, 1 - Phi(c) = .0062097.
    clipped = roundtrip(TernGrad(2.5), x)
    assert float((clipped - x).square().sum() / x.square().sum()) == pytest.approx(1.0095, abs=0.02)
    # Without: m E|x| - E x^2, with m the greatest of these draws. Six standard errors of a mean of 10^5 are below 4 %.
    free, m = roundtrip(TernGrad(None), x), float(x.abs().max())
    assert float((free - x).square().mean()) == pytest.approx(m * 0.79788 - 1, rel=0.04)


@pytest.mark.parametrize("clip", [None, 2.5, 1e-9, 1e9])
def test_zeros_and_extremes_are_safe(clip):
    top = torch.finfo(torch.float32).max
    assert torch.equal(roundtrip(TernGrad(clip), torch.zeros(9)), torch.zeros(9))
    for x in ([-3e38, 0.0, 3e38], [1e-40] * 5, [-top], [top] * 7, [1e-45], [1e-45, -3e38], [-0.0]):
        for seed in range(10):
            back = roundtrip(TernGrad(clip), torch.tensor(x), seed)
            assert torch.isfinite(back).all() and (back * torch.tensor(x).sign() >= 0).all()
    # The least float32 there is, alone: its probability is 1, in a product that float32 would round.
    assert all(
        torch.equal(roundtrip(TernGrad(None), torch.tensor([1e-45]), s), torch.tensor([1e-45])) for s in range(9)
    )


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_settings_that_cannot_be_are_refused(clip):
    with pytest.raises(ValueError, match="clip must be"):
        TernGrad(clip)


@pytest.mark.parametrize(
    "body, why",
    [
        (HEADER.pack(1.0) + bytes([243, 0]), "243"),
        (HEADER.pack(1.0) + bytes([0, 3]), "padding"),  # the seventh of six
        (HEADER.pack(0.0) + bytes([1, 0]), "not zero, but the scale is"),
        (HEADER.pack(-1.0) + bytes([1, 0]), "negative"),
        (HEADER.pack(-0.0) + bytes(2), "negative"),
        (HEADER.pack(float("nan")) + bytes(2), "NaN"),
        (HEADER.pack(1.0) + bytes(1), "5 bytes, but 6 elements take 6"),
        (HEADER.pack(1.0) + bytes(3), "7 bytes, but 6 elements take 6"),
        (b"\0\0", "scalars"),
    ],
)
def test_what_encode_cannot_have_made_is_refused(body, why):
    with pytest.raises(PayloadError, match=why):
        TernGrad().decode(memoryview(body), 6)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=9), st.integers(1, 26))
def test_rubbish_is_refused_or_a_ternary_vector(body, n):
    try:
        back = TernGrad().decode(memoryview(body), n)
    except PayloadError:
        return
    assert back.shape == (n,) and back.dtype == torch.float32 and torch.isfinite(back).all()
    # Any such vector has all its magnitudes equal, so without clipping it encodes to the same bytes, if not all are 0.
    if back.any():
        assert TernGrad(None).encode(back, rng()) == body
    assert set(np.unique(np.sign(back.numpy()))) <= {-1.0, 0.0, 1.0}
