import pytest
import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import Qsgd

from .test_contract import rng, roundtrip


@pytest.mark.parametrize("bits", range(2, 9))
def test_qsgd_stays_below_its_papers_variance(bits):
    x = torch.randn(500, generator=rng(1))
    s = 2 ** (bits - 1) - 1
    error = sum(float((roundtrip(Qsgd(bits), x, i) - x).square().sum()) for i in range(50)) / 50
    assert error <= 1.05 * min(500 / s**2, 500**0.5 / s) * float(x.square().sum())


def test_codes_that_cannot_be_are_refused():
    with pytest.raises(PayloadError, match="code above 2"):
        Qsgd(2).decode(memoryview(Qsgd.HEADER.pack(2, 1.0) + b"\xff"), 4)
