"""The contract that every quantizer keeps, and what each paper promises of its own."""

import pytest
import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import QUANTIZERS, MinMax, Qsgd

LEVELS = [(name, bits) for name in ("minmax", "qsgd") for bits in range(1, 9)] + [("float16", 16), ("float32", 32)]
FIXED = {"minmax": 9, "qsgd": 5, "float16": 0, "float32": 0}  # bits in a byte, and the float32 scalars


def test_the_table_has_every_quantizer():
    assert {name for name, _ in LEVELS} == set(QUANTIZERS) == set(FIXED)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def roundtrip(name, x, bits, seed=0):
    quantizer = QUANTIZERS[name]
    return quantizer.decode(memoryview(quantizer.encode(x, bits, rng(seed))), len(x))


@pytest.mark.parametrize(("name", "bits"), LEVELS)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 1000, 1001])
def test_bytes_are_the_packed_size_and_the_shape_comes_back(name, bits, n):
    x = torch.randn(n, generator=rng(n))
    body = QUANTIZERS[name].encode(x, bits, rng())
    assert len(body) == FIXED[name] + -(-n * bits // 8) == QUANTIZERS[name].size(n, bits)
    assert body == QUANTIZERS[name].encode(x, bits, rng())
    back = roundtrip(name, x, bits)
    assert back.shape == x.shape and back.dtype == torch.float32 and torch.isfinite(back).all()


@pytest.mark.parametrize(("name", "bits"), LEVELS)
def test_zero_and_constant_layers_are_safe(name, bits):
    assert torch.equal(roundtrip(name, torch.zeros(9), bits), torch.zeros(9)) or (name, bits) == ("qsgd", 1)
    assert torch.isfinite(roundtrip(name, torch.full((9,), 3.0), bits)).all()
    assert torch.isfinite(roundtrip(name, torch.tensor([-3e38, 0.0, 3e38]), bits)).all()
    if name == "minmax":
        assert torch.equal(roundtrip(name, torch.full((9,), 0.7), bits), torch.full((9,), 0.7))


@pytest.mark.parametrize(("name", "bits"), [level for level in LEVELS if level[1] <= 8])
def test_rounding_has_no_bias(name, bits):
    x, draws = torch.tensor([-1.0, -0.3, 0.0, 0.21, 0.8]), 4000
    mean = sum(roundtrip(name, x, bits, seed) for seed in range(draws)) / draws
    top = 2**bits - 1
    step = 1.8 / top if name == "minmax" else float(x.norm()) * (2 if bits == 1 else 1 / (2 ** (bits - 1) - 1))
    # One draw's standard deviation is at most half a step: this is six standard errors.
    assert (mean - x).abs().max() < 6 * step / 2 / draws**0.5


@pytest.mark.parametrize("bits", range(2, 9))
def test_qsgd_stays_below_its_papers_variance(bits):
    x = torch.randn(500, generator=rng(1))
    s = 2 ** (bits - 1) - 1
    error = sum(float((roundtrip("qsgd", x, bits, i) - x).square().sum()) for i in range(50)) / 50
    assert error <= 1.05 * min(500 / s**2, 500**0.5 / s) * float(x.square().sum())


def test_minmax_on_a_gaussian_has_the_published_error():
    x = torch.randn(100_000, generator=rng(2))
    errors = [float((roundtrip("minmax", x, b) - x).square().sum() / x.square().sum()) for b in (1, 2, 3, 4)]
    # The range of 10^5 draws is about 8.7: errors of about R^2/4 - 1, then R^2 / (6 (2^b - 1)^2).
    assert 14 < errors[0] < 26
    for bits, error in zip((2, 3, 4), errors[1:], strict=True):
        assert error == pytest.approx(8.7**2 / (6 * (2**bits - 1) ** 2), rel=0.35)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("body", [b"", b"\x03", b"\x00" * 20, b"\xff" * 40, b"\x09" + b"\x00" * 30])
def test_nonsense_is_refused(name, body):
    with pytest.raises(PayloadError):
        QUANTIZERS[name].decode(memoryview(body), 9)


def test_codes_and_scalars_that_cannot_be_are_refused():
    nan = MinMax().HEADER.pack(8, float("nan"), 1.0) + b"\0" * 4
    with pytest.raises(PayloadError, match="NaN"):
        MinMax().decode(memoryview(nan), 4)
    with pytest.raises(PayloadError, match="code above 2"):
        Qsgd().decode(memoryview(Qsgd().HEADER.pack(2, 1.0) + b"\xff"), 4)
