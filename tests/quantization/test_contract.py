"""The contract that every quantizer keeps: one table, one row a quantizer and setting."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.errors import PayloadError
from fedlq_ray.models import FlatModel
from fedlq_ray.quantization import (
    Absent,
    Ecsq,
    Eden,
    FineGrained,
    Float16,
    Float32,
    MinMax,
    Qsgd,
    QsgdElias,
    Sign,
    Stc,
    TernGrad,
    TopK,
)
from fedlq_ray.quantization.clipped import Clipped
from fedlq_ray.quantization.registry import DECODERS
from fedlq_ray.quantization.stochastic import StochasticStep
from fedlq_ray.quantization.wire import Segment, decode
from fedlq_ray.training.local import Plan, client_round
from fedlq_ray.training.sgd import LocalSGD


class Row(NamedTuple):
    """A quantizer, and what its paper or its format promises.

    fixed_bytes, bits: bytes that do not depend on the elements, and bits a parameter; None where sizes vary.
    unbiased: the mean over draws is what was sent.
    """

    quantizer: object
    fixed_bytes: int | None = None
    bits: float | None = None
    unbiased: bool = False


TABLE = [
    Row(Float32(), 0, 32),
    Row(Float16(), 0, 16),
    Row(Absent(), 0, 0),
    *[Row(MinMax(b), 9, b, unbiased=True) for b in range(1, 9)],
    *[Row(Qsgd(b), 5, b, unbiased=True) for b in range(1, 9)],
    *[Row(QsgdElias(s, bucket, norm), unbiased=True) for s, bucket, norm in ((1, None, "l2"), (7, 4, "max"))],
    Row(TernGrad(None), 4, 1.6, unbiased=True),
    Row(TernGrad(2.5), 4, 1.6),
    Row(Sign(), 4, 1),
    Row(Sign(scaled=False), 4, 1),
    *[Row(TopK(p)) for p in (0.01, 0.1)],
    *[Row(Stc(p)) for p in (0.01, 0.1)],
    *[Row(Eden(b), Eden.HEADER.size, b, unbiased=True) for b in (0.25, 1, 1.5, 2, 4, 8)],
    *[Row(Eden(b, unbiased=False), Eden.HEADER.size, b) for b in (1, 2)],
    *[Row(Ecsq(step)) for step in (0.01, 0.5, 2.0, 100.0)],
    *[Row(StochasticStep(step), unbiased=True) for step in (0.01, 0.5, 2.0, 100.0)],
    Row(FineGrained(4.0)),
    *[Row(Clipped(b), 9, b) for b in (1, 2, 3, 8)],
]
known = {type(row.quantizer) for row in TABLE}
TABLE += [Row(one, unbiased=getattr(one, "unbiased", False)) for one in DECODERS.values() if type(one) not in known]
rows = pytest.mark.parametrize("row", TABLE, ids=[str(row.quantizer) for row in TABLE])
unbiased = [row for row in TABLE if row.unbiased]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def roundtrip(quantizer, x, seed=0):
    return quantizer.decode(memoryview(quantizer.encode(x, rng(seed))), len(x))


def test_the_wire_has_the_numbers_of_its_first_version():
    names = "Float32 Float16 MinMax Qsgd QsgdElias TernGrad Sign TopK Stc Eden Ecsq FineGrained Absent"
    names += " StochasticStep Clipped"
    assert [type(DECODERS[number]).__name__ for number in range(15)] == names.split()
    assert all(getattr(row.quantizer, "unbiased", False) == row.unbiased for row in TABLE)


@rows
@pytest.mark.parametrize("n", [1, 2, 7, 8, 1000, 1001])
def test_bytes_are_what_they_claim_and_the_shape_comes_back(row, n):
    x = torch.randn(n, generator=rng(n))
    before, quantizer = x.clone(), row.quantizer
    body = quantizer.encode(x, rng())
    assert torch.equal(x, before) and body == quantizer.encode(x, rng())
    assert quantizer.size(n) in (None, len(body))
    if row.bits is not None:
        assert len(body) == row.fixed_bytes + int(np.ceil(n * row.bits / 8)) == quantizer.size(n)
    back = roundtrip(quantizer, x)
    assert back.shape == x.shape and back.dtype == torch.float32 and torch.isfinite(back).all()


@rows
def test_zero_constant_and_extreme_layers_are_safe(row):
    zero = roundtrip(row.quantizer, torch.zeros(9))
    assert torch.equal(zero, torch.zeros(9))
    for x in (torch.full((9,), 3.0), torch.tensor([-3e38, 0.0, 3e38]), torch.full((5,), 1e-40)):
        assert torch.isfinite(roundtrip(row.quantizer, x)).all()


@pytest.mark.parametrize("row", unbiased, ids=[str(row.quantizer) for row in unbiased])
def test_rounding_has_no_bias(row):
    x, draws = torch.tensor([-1.0, -0.3, 0.0, 0.21, 0.8]), 750
    seen = torch.stack([roundtrip(row.quantizer, x, seed) for seed in range(draws)])
    # 4.3 standard errors, as the draws themselves show them: chance passes them once in 400 tables of 145 elements.
    # An element that never varies must be right.
    bound = 4.3 * seen.std(0) / draws**0.5 + 1e-5
    assert ((seen.mean(0) - x).abs() <= bound).all()


@rows
def test_nonsense_is_refused_or_sound(row):
    rubbish = np.random.default_rng(0)
    for length in [*range(30)] * 20:
        try:
            back = row.quantizer.decode(memoryview(rubbish.bytes(length)), 9)
        except PayloadError:
            continue
        assert back.shape == (9,) and torch.isfinite(back).all()
    nothing = b"" if row.quantizer != Absent() else b"x"
    with pytest.raises(PayloadError):
        row.quantizer.decode(memoryview(nothing), 9)


def rounds_of(quantizer, feedback, count=6):
    """Each round's update, what the server got of it, and what the client then remembers: (d,) each."""
    torch.manual_seed(0)
    flat = FlatModel(torch.nn.Linear(6, 4))
    x, y = torch.randn(40, 6, generator=rng()).numpy(), np.arange(40) % 4
    trainer, weights, memory = LocalSGD(flat, TrainConfig(batch_size=8)), flat.storage.clone(), None
    plan = Plan("update", (Segment(quantizer, 0, len(weights)),), feedback)
    for round in range(count):
        reply, memory = client_round(
            trainer, x, y, normalise=torch.from_numpy, weights=weights, memory=memory, plan=plan, samples=80, seed=0,
            round=round, client=0,
        )  # fmt: skip
        update = flat.storage - weights
        received = decode(reply.payload, len(weights), kind="update", round=round, client=0).vector
        yield update, received, memory.clone()


@rows
@pytest.mark.parametrize("feedback", [True, "ef21"])
def test_with_error_feedback_or_ef21_what_is_remembered_is_what_the_server_lacks_or_has(row, feedback):
    updates, received, memories = (torch.stack(each) for each in zip(*rounds_of(row.quantizer, feedback), strict=True))
    has = received.double().cumsum(0)
    due = updates.double().cumsum(0) - has if feedback is True else has
    scale = float(due.abs().max()) + float(updates.abs().max())
    assert torch.allclose(memories.double(), due, rtol=0, atol=1e-5 * scale)


contracting = [
    Float16(), MinMax(4), Qsgd(8), Sign(), TopK(0.1), Stc(0.1), Eden(1, unbiased=False), Ecsq(0.5), FineGrained(4.0),
    *(Clipped(b) for b in (1, 2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("quantizer", contracting, ids=str)
def test_what_error_feedback_remembers_of_a_contraction_stays_bounded(quantizer):
    updates, _, memories = (torch.stack(each) for each in zip(*rounds_of(quantizer, True, 60), strict=True))
    sizes = memories.norm(dim=1)
    assert sizes[30:].max() <= 1.5 * sizes[:30].max() + 1e-6
    assert sizes.max() < 15 * updates.norm(dim=1).max()  # of 60: the rest has arrived
