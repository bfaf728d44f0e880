"""Entropy-coded scalar quantization against rate-distortion theory, and its range coder's bytes against entropy."""

import numpy as np
import pytest
import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import Ecsq
from fedlq_ray.quantization.coding.codes import Magnitudes, Model, fit

from .test_contract import rng, roundtrip

N = 100_000


def source(name):
    draws = np.random.default_rng(7)
    return torch.from_numpy({"gauss": draws.normal, "laplace": draws.laplace}[name](size=N).astype(np.float32))


def designed(step, x):
    return Ecsq(step).design(Magnitudes.of(x))


def codes_of(design, x):
    return np.searchsorted(design.edges, x.abs().numpy())


def at_rate(x, bits):
    """The quantizer whose body takes at most so many bits an element, found by halving; its body's rate and error."""
    low, high = 1e-3, 100.0
    for _ in range(25):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if 8 * designed(middle, x).num_bytes / N > bits else (low, middle)
    body = Ecsq(high).encode(x, rng())
    error = float((roundtrip(Ecsq(high), x) - x).square().sum() / x.square().sum())
    return 8 * len(body) / N, error


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_gaussian_costs_at_most_a_quarter_bit_more_than_the_rate_distortion_function(bits):
    rate, error = at_rate(source("gauss"), bits)
    assert bits * 0.98 < rate <= bits + 8 * 3 / N
    # 0.2546 bit (1.53 dB) is the loss of entropy-coded scalar quantization at high rate, and the most there is;
    # 0.01 bit for the model, the coder's words, and 10^5 draws.
    assert -0.5 * np.log2(error) > rate - 0.2546 - 0.01
    assert error > 2.0 ** (-2 * rate) * 0.97  # nothing beats R(D); 3 % for the draws' own spread


@pytest.mark.parametrize(("bits", "eden"), [(1, 0.364), (2, 0.118), (3, 0.0345), (4, 0.0094)])
def test_its_error_is_below_that_of_rotation_and_lloyd_max_at_the_same_bytes(bits, eden):
    for name in ("gauss", "laplace"):
        assert at_rate(source(name), bits)[1] < eden


@pytest.mark.parametrize("step", [0.05, 0.5, 1.0, 2.0, 4.0])
def test_bytes_are_within_a_hundredth_of_the_entropy_of_the_codes(step):
    for name in ("gauss", "laplace"):
        x = source(name)
        codes = codes_of(designed(step, x), x) * np.sign(x.numpy()).astype(np.int32)
        p = np.unique(codes, return_counts=True)[1] / N
        entropy = -(p * np.log2(p)).sum() * N / 8
        assert entropy * 0.999 - 4 <= len(Ecsq(step).encode(x, rng())) <= entropy * 1.01 + 24


def test_the_bytes_that_a_design_claims_are_never_short_and_hardly_long():
    draws = np.random.default_rng(1)
    for _ in range(1000):
        n = int(np.exp(draws.uniform(0, 9)))
        x = torch.from_numpy((draws.standard_t(2, size=n) * np.exp(draws.uniform(-5, 5))).astype(np.float32))
        step = float(x.abs().mean()) * np.exp(draws.uniform(-4, 4))
        claim = designed(step, x).num_bytes
        assert claim - 4 <= len(Ecsq(step).encode(x, rng())) <= claim
    x = torch.from_numpy(draws.laplace(size=3_000_000).astype(np.float32))
    for step in (0.5, 2.0, 5.0, 10.0):
        size, claim = len(Ecsq(step).encode(x, rng())), designed(step, x).num_bytes
        assert size <= claim <= size + 4 + 30e-6 * len(x)


def test_optimised_rounding_pays():
    """At the same bytes, the error is below that of plain rounding to the nearest multiple, entropy-coded."""
    x = source("laplace")
    rate, error = at_rate(x, 0.5)
    for step in np.linspace(2.0, 5.0, 60):
        codes = torch.round(x / step)
        p = np.unique(codes.numpy(), return_counts=True)[1] / N
        if -(p * np.log2(p)).sum() <= rate:
            assert error < float((codes * step - x).square().sum() / x.square().sum()) * 0.97
            return
    raise AssertionError("no step is coarse enough")


def test_a_code_stands_for_the_mean_of_what_it_codes():
    x = source("laplace")
    back, codes = roundtrip(Ecsq(1.5), x), torch.from_numpy(codes_of(designed(1.5, x), x))
    for code in (1, 2, 3):
        mean = float(x.abs()[codes == code].mean())
        value = float(back.abs()[codes == code][0])
        assert abs(mean - value) <= 1.5 / 512 + 1e-5  # shifts are rounded to 1/256 of a step
    lost = float((back - x).square().sum() / x.square().sum())
    assert lost < 1  # so that error feedback contracts


def test_the_model_describes_what_it_was_fitted_to():
    # Geometric: P(k) = (1 - r) r^k needs one hazard, 1 - r.
    counts = np.rint(1e6 * 0.2 * 0.8 ** np.arange(55)).astype(np.int64)
    model = fit(counts)
    p = model.probabilities()
    assert len(model.hazards) <= 4 and abs(p.sum() - 1) < 1e-12
    # A byte of a sixteenth of a logit: within 1/32 logit, so p within 1/32 x p (1 - p) = 0.5 %.
    assert abs(p[0] - 0.2) < 0.006 and abs(p[5] / p[4] - 0.8) < 0.006
    assert Model(3, bytes([128])).probabilities() == pytest.approx([0.5, 0.25, 0.125, 0.125])


def test_bytes_that_were_cut_or_lengthened_are_refused():
    x = source("gauss")[:1000]
    body = Ecsq(0.7).encode(x, rng())
    for wrong in (body[:-1], body[:-4], body + b"\0" * 8, body[:5]):
        with pytest.raises(PayloadError):
            Ecsq(1.0).decode(memoryview(wrong), 1000)
    with pytest.raises(ValueError, match="step must be above 0"):
        Ecsq(0.0)
