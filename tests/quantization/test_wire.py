"""The wire format: round trips, and a decoder that trusts nothing. FEDLQ_FUZZ=100000 runs the long fuzz."""

import os
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import (
    LAYER_HEADER,
    PAYLOAD_HEADER,
    Absent,
    Ecsq,
    Eden,
    FineGrained,
    Float16,
    Float32,
    MinMax,
    Qsgd,
    QsgdElias,
    Segment,
    Sign,
    Stc,
    TernGrad,
    TopK,
    decode,
    encode,
    send,
)
from fedlq_ray.quantization.stochastic import StochasticStep

CASES = int(os.environ.get("FEDLQ_FUZZ", "300"))
fuzz = settings(max_examples=CASES, deadline=None)
WHERE = {"kind": "update", "round": 3, "client": 9}


def vector(plan, seed=0):
    """Values for some pieces, (quantizer, elements) each, and their segments."""
    sizes = [size for _, size in plan]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    segments = [Segment(q, s, s + size) for (q, size), s in zip(plan, starts, strict=True)]
    x = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
    return x, segments


def payload(plan, seed=0):
    """The bytes of some pieces; how many elements they have; what they stand for."""
    x, segments = vector(plan, seed)
    return encode(x, segments, rng=torch.Generator().manual_seed(seed), **WHERE), len(x), x


QUANTIZERS = st.one_of(
    st.sampled_from([Float32(), Float16()]),
    st.builds(MinMax, st.integers(1, 8)),
    st.builds(Qsgd, st.integers(1, 8)),
    st.builds(Ecsq, st.floats(0.01, 3)),
    st.builds(StochasticStep, st.floats(0.01, 30)),
    st.builds(QsgdElias, st.integers(1, 8)),
    st.builds(Sign, st.booleans()),
    st.builds(TopK, st.floats(0.01, 1)),
    st.builds(Stc, st.floats(0.01, 1)),
    st.builds(Eden, st.floats(0.1, 8)),
    st.builds(FineGrained, st.floats(2.5, 10)),
    st.sampled_from([TernGrad(), Absent()]),
)
plans = st.lists(st.tuples(QUANTIZERS, st.integers(1, 40)), min_size=1, max_size=4)


def repaired(data):
    """The same with a checksum that fits: what lies behind the checksum must hold on its own."""
    body = data[: PAYLOAD_HEADER - 4], data[PAYLOAD_HEADER:]
    return body[0] + struct.pack("<I", zlib.crc32(body[1], zlib.crc32(body[0]))) + body[1]


def refused_or_sound(data, count):
    try:
        result = decode(data, count, **WHERE)
    except PayloadError:
        return
    assert result.vector.shape == (count,) and torch.isfinite(result.vector).all()


@fuzz
@given(plans, st.integers(0, 1000))
def test_round_trips_cover_every_byte(plan, seed):
    data, count, x = payload(plan, seed)
    back = decode(data, count, **WHERE)
    assert len(data) == PAYLOAD_HEADER + sum(sent.num_bytes for sent in back.segments)
    for (quantizer, size), (start, stop, length) in zip(plan, back.segments, strict=True):
        assert length >= LAYER_HEADER and stop - start == size
        if quantizer == Float32():
            assert torch.equal(back.vector[start:stop], x[start:stop])


@fuzz
@given(plans, st.integers(0, 1000), st.integers(-40, 38))
def test_a_sender_knows_what_arrives(plan, seed, exponent):
    x, segments = vector(plan, seed)
    x = (x.double() * 10.0**exponent).clamp(-3e38, 3e38).float()
    data, received = send(x, segments, rng=torch.Generator().manual_seed(seed), **WHERE)
    assert data == encode(x, segments, rng=torch.Generator().manual_seed(seed), **WHERE)
    back = decode(data, len(x), **WHERE).vector
    assert back.numpy().tobytes() == received.numpy().tobytes()


def test_segments_that_leave_something_out_are_refused():
    x = torch.ones(5)
    for bounds in ([(0, 4)], [(1, 5)], [(0, 2), (3, 5)], [(0, 3), (2, 5)], []):
        segments = [Segment(Float32(), start, stop) for start, stop in bounds]
        with pytest.raises(PayloadError, match="do not cover the 5 elements"):
            send(x, segments, rng=torch.Generator(), **WHERE)


@fuzz
@given(plans, st.data())
def test_cut_or_flipped_bytes_are_refused(plan, draw):
    data, count, _ = payload(plan)
    cut = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(PayloadError):
        decode(data[:cut], count, **WHERE)
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PayloadError):
        decode(bytes(flipped), count, **WHERE)
    refused_or_sound(repaired(bytes(flipped)), count)


@fuzz
@given(st.binary(max_size=200), st.integers(1, 2**31), st.integers(0, 3))
def test_random_bytes_are_refused_whatever_they_claim(data, count, pieces):
    header = struct.pack("<2sBBIIHI", b"FQ", 1, 0, 3, 9, pieces, 0)
    for attempt in (data, repaired(header + data)):
        with pytest.raises(PayloadError):
            decode(attempt, count, **WHERE)


@pytest.mark.parametrize("wrong", [{"kind": "model"}, {"round": 4}, {"client": 8}])
def test_another_kind_round_or_client_is_refused(wrong):
    data, count, _ = payload([(MinMax(4), 10)])
    with pytest.raises(PayloadError, match="expected kind"):
        decode(data, count, **{**WHERE, **wrong})
    with pytest.raises(PayloadError, match="10 elements, expected 11"):
        decode(data, 11, **WHERE)
