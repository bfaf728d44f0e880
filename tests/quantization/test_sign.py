import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.sign import Sign

HEADER = Sign.HEADER


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def roundtrip(quantizer, x):
    return Sign().decode(memoryview(quantizer.encode(x, rng())), len(x))


def test_a_body_by_hand():
    # Mean magnitude (4 + 1 + 0 + 3) / 4 = 2; plus, minus, plus (of zero), minus are 1010 and four zeros.
    x = torch.tensor([4.0, -1.0, 0.0, -3.0])
    assert Sign().encode(x, rng()) == HEADER.pack(2.0) + bytes([0b10100000])
    assert roundtrip(Sign(), x).tolist() == [2.0, -2.0, 2.0, -2.0]
    assert Sign(scaled=False).encode(x, rng()) == HEADER.pack(1.0) + bytes([0b10100000])
    assert roundtrip(Sign(scaled=False), x).tolist() == [1.0, -1.0, 1.0, -1.0]


def test_a_zero_is_plus_whatever_its_sign_and_all_zeros_are_zeros():
    assert roundtrip(Sign(), torch.tensor([0.0, -0.0, -6.0])).tolist() == [2.0, 2.0, -2.0]
    for quantizer in (Sign(), Sign(scaled=False)):
        assert torch.equal(roundtrip(quantizer, torch.tensor([0.0, -0.0] * 5)), torch.zeros(10))


def test_size_is_a_bit_an_element_and_the_scale():
    for n in (1, 7, 8, 9, 1000):
        assert len(Sign().encode(torch.randn(n, generator=rng(n)), rng())) == Sign().size(n) == 4 + -(-n // 8)


def test_the_error_is_that_of_the_paper():
    for x in (torch.randn(1000, generator=rng(1)), torch.tensor([5.0, 0.0, 0.0, -1.0]), torch.tensor([-0.3])):
        wide = x.double()
        density = float(wide.abs().sum() ** 2 / (len(x) * wide.square().sum()))
        error = float((roundtrip(Sign(), x) - wide).square().sum() / wide.square().sum())
        assert error == pytest.approx(1 - density, abs=1e-6)  # the scale is rounded to float32, 6e-8
    # N(0, 1): 1 - 2/pi = .3634; six standard errors of 10^5 draws are below .01.
    x = torch.randn(100_000, generator=rng(2))
    assert float((roundtrip(Sign(), x) - x).square().mean()) == pytest.approx(0.3634, abs=0.01)


def test_extremes_are_safe():
    top = torch.finfo(torch.float32).max
    for x in ([-3e38, 0.0, 3e38], [1e-40] * 5, [-top] * 99, [1e-45], [-1e-45, 0.0, 0.0, 0.0]):
        for quantizer in (Sign(), Sign(scaled=False)):
            assert torch.isfinite(roundtrip(quantizer, torch.tensor(x))).all()
    assert torch.equal(roundtrip(Sign(), torch.full((99,), -top)), torch.full((99,), -top))


@pytest.mark.parametrize(
    "body, why",
    [
        (HEADER.pack(1.0) + bytes([0b00010000]), "padding"),
        (HEADER.pack(-1.0) + bytes(1), "negative"),
        (HEADER.pack(-0.0) + bytes(1), "negative"),
        (HEADER.pack(float("inf")) + bytes(1), "infinity"),
        (HEADER.pack(1.0), "0 bytes of codes"),
        (HEADER.pack(1.0) + bytes(2), "2 bytes of codes"),
        (b"\0\0\0", "scalars"),
    ],
)
def test_what_encode_cannot_have_made_is_refused(body, why):
    with pytest.raises(PayloadError, match=why):
        Sign().decode(memoryview(body), 3)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=9), st.integers(1, 40))
def test_rubbish_is_refused_or_comes_back_as_it_was(body, n):
    try:
        back = Sign().decode(memoryview(body), n)
    except PayloadError:
        return
    assert back.shape == (n,) and back.dtype == torch.float32 and torch.isfinite(back).all()
    if back.any():
        # All magnitudes are equal, hence so is their mean, up to the rounding of a sum in float64.
        assert Sign().encode(back, rng())[4:] == body[4:]
