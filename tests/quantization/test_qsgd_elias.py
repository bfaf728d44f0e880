import numpy as np
import pytest
import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import QsgdElias

from .test_contract import rng, roundtrip


@pytest.mark.parametrize("levels", [1, 4, 16, 1000])
@pytest.mark.parametrize("bucket", [None, 128])
def test_the_variance_stays_below_the_papers(levels, bucket):
    x, quantizer = torch.randn(512, generator=rng(1)), QsgdElias(levels, bucket, "l2")
    error = sum(float((roundtrip(quantizer, x, i) - x).square().sum()) for i in range(60)) / 60
    d = bucket or 512
    # Lemma 3.1, in each bucket; 5 % for the mean of 60 draws of 512 errors.
    assert error <= 1.05 * min(d / levels**2, d**0.5 / levels) * float(x.square().sum())


def test_levels_are_multiples_of_a_norms_share():
    x = torch.tensor([3.0, -4.0, 0.0, 0.1])
    back = roundtrip(QsgdElias(2, 2, "l2"), x) / torch.tensor([2.5, 2.5, 0.05, 0.05])
    assert torch.allclose(back, back.round(), atol=1e-5) and back[2] == 0  # norms 5 and 0.1, halved
    top = roundtrip(QsgdElias(1, None, "max"), torch.tensor([2.0, -2.0, 2.0]))
    assert top.tolist() == [2.0, -2.0, 2.0]


def test_bytes_are_those_of_eliass_code():
    x = torch.randn(20_000, generator=rng(3))
    for levels in (4, 64):
        quantizer = QsgdElias(levels, None, "l2")
        body = quantizer.encode(x, rng())
        codes = (roundtrip(quantizer, x) / x.double().norm() * levels).abs().round().numpy().astype(int)
        bits = (2 * np.floor(np.log2(codes + 1)) + 1).sum() + (codes > 0).sum()
        assert bits / 8 + 12 <= len(body) <= bits / 8 + 14  # header, one norm, two fillings


def test_more_levels_than_a_byte_holds():
    x = torch.randn(300, generator=rng(4))
    assert float((roundtrip(QsgdElias(2**16, 100, "max"), x) - x).abs().max()) < 4 / 2**16


def test_what_cannot_be_is_refused():
    body = bytearray(QsgdElias(2, None).encode(torch.ones(8), rng()))
    for at, value in ((0, 0), (4, 0), (4, 200), (11, 0x7F), (11, 0xBF)):
        wrong = bytearray(body)
        wrong[at] = value
        if at == 11:
            wrong[10] = 0x80
        with pytest.raises(PayloadError):
            QsgdElias().decode(memoryview(bytes(wrong)), 8)
    with pytest.raises(PayloadError, match="take a bit each"):
        QsgdElias().decode(memoryview(QsgdElias.HEADER.pack(4, 2**31) + b"\0" * 8), 2**31)
    with pytest.raises(ValueError, match="levels must be 1"):
        QsgdElias(0)
