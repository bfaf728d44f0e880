"""The wire format: round trips, and a decoder that trusts nothing. FEDLQ_FUZZ=100000 runs the long fuzz."""

import os
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER, decode, encode
from fedlq_ray.quantization.wire import NUMBERS, Segment

CASES = int(os.environ.get("FEDLQ_FUZZ", "300"))
fuzz = settings(max_examples=CASES, deadline=None)
WHERE = {"kind": "update", "round": 3, "client": 9}


def payload(plan, seed=0):
    sizes = [size for _, _, size in plan]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    segments = [Segment(n, b, s, s + size) for (n, b, size), s in zip(plan, starts, strict=True)]
    x = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
    return encode(x, segments, rng=torch.Generator().manual_seed(seed), **WHERE), sizes, x


plans = st.lists(
    st.tuples(st.sampled_from(sorted(NUMBERS)), st.integers(1, 8), st.integers(1, 40)), min_size=1, max_size=4
)


def repaired(data):
    """The same with a checksum that fits: what lies behind the checksum must hold on its own."""
    body = data[: PAYLOAD_HEADER - 4], data[PAYLOAD_HEADER:]
    return body[0] + struct.pack("<I", zlib.crc32(body[1], zlib.crc32(body[0]))) + body[1]


def refused_or_sound(data, sizes):
    try:
        result = decode(data, sizes, **WHERE)
    except PayloadError:
        return
    assert result.vector.shape == (sum(sizes),) and torch.isfinite(result.vector).all()


@fuzz
@given(plans, st.integers(0, 1000))
def test_round_trips_cover_every_byte(plan, seed):
    data, sizes, x = payload(plan, seed)
    back = decode(data, sizes, **WHERE)
    assert len(data) == PAYLOAD_HEADER + sum(back.segment_bytes)
    at = 0
    for (name, _, size), length in zip(plan, back.segment_bytes, strict=True):
        assert length > LAYER_HEADER
        if name == "float32":
            assert torch.equal(back.vector[at : at + size], x[at : at + size])
        at += size


@fuzz
@given(plans, st.data())
def test_cut_or_flipped_bytes_are_refused(plan, draw):
    data, sizes, _ = payload(plan)
    cut = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(PayloadError):
        decode(data[:cut], sizes, **WHERE)
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PayloadError):
        decode(bytes(flipped), sizes, **WHERE)
    refused_or_sound(repaired(bytes(flipped)), sizes)


@fuzz
@given(st.binary(max_size=200), st.lists(st.integers(1, 2**31), min_size=1, max_size=3))
def test_random_bytes_are_refused_whatever_they_claim(data, sizes):
    header = struct.pack("<2sBBIIHI", b"FQ", 1, 0, 3, 9, len(sizes), 0)
    for attempt in (data, repaired(header + data)):
        with pytest.raises(PayloadError):
            decode(attempt, sizes, **WHERE)


@pytest.mark.parametrize("wrong", [{"kind": "model"}, {"round": 4}, {"client": 8}])
def test_another_kind_round_or_client_is_refused(wrong):
    data, sizes, _ = payload([("minmax", 4, 10)])
    with pytest.raises(PayloadError, match="was due"):
        decode(data, sizes, **{**WHERE, **wrong})
    with pytest.raises(PayloadError, match="10 elements where 11"):
        decode(data, [11], **WHERE)
