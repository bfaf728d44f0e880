import numpy as np
import pytest
import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import Sign, TernGrad

from .test_contract import rng, roundtrip


def test_terngrad_sends_the_greatest_always_and_others_by_their_share():
    x, draws = torch.tensor([2.0, -1.0, 0.0]), 4000
    seen = torch.stack([roundtrip(TernGrad(None), x, i) for i in range(draws)])
    assert (seen[:, 0] == 2).all() and (seen[:, 2] == 0).all() and set(seen[:, 1].tolist()) == {-2.0, 0.0}
    share = float((seen[:, 1] == -2).double().mean())
    assert abs(share - 0.5) < 4 * 0.5 / draws**0.5


def test_terngrad_clips_at_its_deviations():
    x = torch.randn(10_000, generator=rng(1))
    scale = float(roundtrip(TernGrad(2.5), x).abs().max())
    assert scale == pytest.approx(2.5 * float(x.double().std(correction=0)), rel=1e-6)


def test_five_codes_of_three_values_share_a_byte():
    body = TernGrad(None).encode(torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, -1.0]), rng())
    # Codes 2 0 1 1 2 and 0 filled up with 1s: 2*81 + 0 + 9 + 3 + 2, and 0 + 27 + 9 + 3 + 1.
    assert body[4:] == bytes([176, 40])
    for wrong in (body[:4] + bytes([243, 40]), body[:4] + bytes([176, 39]), body[:-1]):
        with pytest.raises(PayloadError):
            TernGrad().decode(memoryview(wrong), 6)


def test_the_scaled_sign_is_the_papers_contraction():
    x = torch.randn(1000, generator=rng(2)) * torch.linspace(0.1, 3, 1000)
    back = roundtrip(Sign(), x)
    assert torch.equal(torch.sign(back), torch.sign(x))
    # Karimireddy et al., lemma 8: |C(x) - x|^2 = (1 - |x|_1^2 / (d |x|_2^2)) |x|^2.
    phi = float(x.abs().sum()) ** 2 / (1000 * float(x.square().sum()))
    assert float((back - x).square().sum()) == pytest.approx((1 - phi) * float(x.square().sum()), rel=1e-4)


def test_plain_signs_are_one_and_zero_counts_as_positive():
    assert roundtrip(Sign(scaled=False), torch.tensor([-3.0, 0.0, 0.5])).tolist() == [-1.0, 1.0, 1.0]
    assert roundtrip(Sign(), torch.tensor([-0.0, 4.0])).tolist() == [2.0, 2.0]
    with pytest.raises(PayloadError, match="negative"):
        Sign().decode(memoryview(Sign.HEADER.pack(-1.0) + b"\0"), 3)


def test_fillings_are_checked():
    body = Sign().encode(torch.ones(3), rng())
    with pytest.raises(PayloadError, match="filling"):
        Sign().decode(memoryview(body[:-1] + bytes([np.uint8(1)])), 3)
