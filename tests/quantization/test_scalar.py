import pytest
import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import MinMax

from .test_contract import rng, roundtrip


def test_a_constant_layer_comes_back_exactly():
    for bits in range(1, 9):
        assert torch.equal(roundtrip(MinMax(bits), torch.full((9,), 0.7)), torch.full((9,), 0.7))


def test_minmax_on_a_gaussian_has_the_published_error():
    x = torch.randn(100_000, generator=rng(2))
    errors = [float((roundtrip(MinMax(b), x) - x).square().sum() / x.square().sum()) for b in (1, 2, 3, 4)]
    # The range of 10^5 draws is about 8.7: errors of about R^2/4 - 1, then R^2 / (6 (2^b - 1)^2).
    assert 14 < errors[0] < 26
    for bits, error in zip((2, 3, 4), errors[1:], strict=True):
        assert error == pytest.approx(8.7**2 / (6 * (2**bits - 1) ** 2), rel=0.35)


def test_settings_and_scalars_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        MinMax(9)
    nan = MinMax.HEADER.pack(8, float("nan"), 1.0) + b"\0" * 4
    with pytest.raises(PayloadError, match="NaN"):
        MinMax(8).decode(memoryview(nan), 4)
    with pytest.raises(PayloadError, match="a level of 9 bits"):
        MinMax(8).decode(memoryview(MinMax.HEADER.pack(9, 0.0, 1.0) + b"\0" * 4), 4)


def test_a_level_beyond_float32_is_refused_only_where_a_code_stands_for_it():
    header = MinMax.HEADER.pack(2, 3e38, 3e38)
    assert torch.equal(MinMax(2).decode(memoryview(header + b"\x00"), 4), torch.full((4,), 3e38))
    with pytest.raises(PayloadError, match="infinity"):
        MinMax(2).decode(memoryview(header + b"\x03"), 4)
