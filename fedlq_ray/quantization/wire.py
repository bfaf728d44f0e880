"""The wire format: what a client sends in a round, as bytes whose `len` is the traffic.

Version 1, little-endian. Header of 18 bytes: magic `FQ`, version (1 byte), kind (1 byte: 0 update, 1 model),
round and client (4 bytes each), number of segments (2 bytes), CRC-32 of all other bytes (4 bytes). Then for each
segment 9 bytes, quantizer's number (1), elements (4), bytes of the body (4), followed by the body that the quantizer
made. The decoder is told what it must find (kind, round, client, elements in all), and allocates nothing before the
lengths agree with the bytes that are there.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import Quantizer, require_finite
from fedlq_ray.quantization.ecsq import Ecsq
from fedlq_ray.quantization.eden import Eden
from fedlq_ray.quantization.finegrained import FineGrained
from fedlq_ray.quantization.qsgd import Qsgd
from fedlq_ray.quantization.qsgd_elias import QsgdElias
from fedlq_ray.quantization.scalar import Absent, Float16, Float32, MinMax
from fedlq_ray.quantization.sign import Sign
from fedlq_ray.quantization.sparse import Stc, TopK
from fedlq_ray.quantization.terngrad import TernGrad

MAGIC, VERSION = b"FQ", 1
_HEADER = struct.Struct("<2sBBIIHI")
_SEGMENT = struct.Struct("<BII")
PAYLOAD_HEADER: int = _HEADER.size
"""Bytes of a payload's header."""
LAYER_HEADER: int = _SEGMENT.size
"""Bytes of a segment's header."""
KINDS = ("update", "model")
# Numbers on the wire: never changed, only added to.
# What decodes each number: a body says all that is needed, so the settings here do not matter.
DECODERS: dict[int, Quantizer] = {
    0: Float32(),
    1: Float16(),
    2: MinMax(8),
    3: Qsgd(8),
    4: QsgdElias(),
    5: TernGrad(),
    6: Sign(),
    7: TopK(1.0),
    8: Stc(1.0),
    9: Eden(),
    10: Ecsq(1.0),
    11: FineGrained(),
    12: Absent(),
}
NUMBERS: dict[type, int] = {type(quantizer): number for number, quantizer in DECODERS.items()}
CUSTOM = 255  # a user's own quantizer, which both sides hold


class Segment(NamedTuple):
    """How a piece of the vector is sent: by which quantizer, and which elements."""

    quantizer: Quantizer
    start: int
    stop: int


class Sent(NamedTuple):
    """A piece of a decoded payload: its elements, and the bytes that it took, header included."""

    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True)
class Payload:
    """A decoded payload: the vector (d,) float32, and the pieces that it came in."""

    vector: Tensor
    segments: tuple[Sent, ...]


def encode(vector: Tensor, segments: Sequence[Segment], *, kind: str, round: int, client: int, rng: Generator) -> bytes:
    """A client's payload.

    Args:
        vector: finite float32 (d,), which the segments cover in order.
        kind: "update" or "model".
        rng: source of the rounding noise.
    """
    bodies = [quantizer.encode(vector[start:stop], rng) for quantizer, start, stop in segments]
    return _framed(segments, bodies, kind, round, client)


def send(
    vector: Tensor,
    segments: Sequence[Segment],
    *,
    kind: str,
    round: int,
    client: int,
    rng: Generator,
    custom: Callable[[int], Quantizer] | None = None,
) -> tuple[bytes, Tensor]:
    """What `encode` makes, and the vector (d,) that `decode` makes of it.

    Raises:
        PayloadError: the segments leave something out, or a user's quantizer does not decode what it encoded.
    """
    ends = [0, *(stop for _, _, stop in segments)]
    if ends[:-1] != [start for _, start, _ in segments] or ends[-1] != len(vector):
        raise PayloadError(f"its segments do not cover the {len(vector)} elements one after another")
    bodies, pieces = [], []
    for index, (quantizer, start, stop) in enumerate(segments):
        x = vector[start:stop]
        if isinstance(quantizer, Ecsq):
            body, piece = quantizer.send(x)
        else:
            body = quantizer.encode(x, rng)
            piece = _piece(index, NUMBERS.get(type(quantizer), CUSTOM), memoryview(body), stop - start, custom)
        bodies.append(body)
        pieces.append(piece)
    return _framed(segments, bodies, kind, round, client), torch.cat(pieces)


def _framed(segments: Sequence[Segment], bodies: Sequence[bytes], kind: str, round: int, client: int) -> bytes:
    headed = [
        _SEGMENT.pack(NUMBERS.get(type(quantizer), CUSTOM), stop - start, len(body)) + body
        for (quantizer, start, stop), body in zip(segments, bodies, strict=True)
    ]
    rest = b"".join(headed)
    header = _HEADER.pack(MAGIC, VERSION, KINDS.index(kind), round, client, len(segments), 0)
    return header[:-4] + struct.pack("<I", zlib.crc32(rest, zlib.crc32(header[:-4]))) + rest


def decode(
    data: bytes,
    count: int,
    *,
    kind: str,
    round: int,
    client: int,
    custom: Callable[[int], Quantizer] | None = None,
) -> Payload:
    """The vector of a payload.

    Args:
        data: anything; nothing in it is trusted.
        count: the elements of the vector.
        kind, round, client: what the payload must say.
        custom: the user's quantizer by level, where there is one.
    Raises:
        PayloadError: the bytes are not such a payload.
    """
    view = memoryview(data)
    if len(view) < PAYLOAD_HEADER:
        raise PayloadError(f"{len(view)} bytes where the header alone takes {PAYLOAD_HEADER}")
    magic, version, kind_number, its_round, its_client, pieces, checksum = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError("does not start as a payload does")
    if version != VERSION:
        raise PayloadError(f"version {version}, where {VERSION} is known")
    if zlib.crc32(view[PAYLOAD_HEADER:], zlib.crc32(view[: PAYLOAD_HEADER - 4])) != checksum:
        raise PayloadError("the checksum does not agree with the bytes")
    if (kind_number, its_round, its_client) != (KINDS.index(kind), round, client):
        raise PayloadError(
            f"kind {kind_number}, round {its_round}, client {its_client}, "
            f"where kind {KINDS.index(kind)}, round {round}, client {client} was due"
        )
    found = _segments(view, pieces, count)
    vectors, sent, start = [], [], 0
    for index, (number, elements, body) in enumerate(found):
        vectors.append(_piece(index, number, body, elements, custom))
        sent.append(Sent(start, start + elements, LAYER_HEADER + len(body)))
        start += elements
    return Payload(torch.cat(vectors), tuple(sent))


def _piece(
    index: int, number: int, body: memoryview, elements: int, custom: Callable[[int], Quantizer] | None
) -> Tensor:
    """A segment's elements."""
    quantizer = custom(1) if number == CUSTOM and custom else DECODERS.get(number)
    if quantizer is None or (number == CUSTOM and type(quantizer) in NUMBERS):
        own = "; a quantizer of your own is named by strategy.quantizer" if number == CUSTOM else ""
        raise PayloadError(f"segment {index} names quantizer {number}, which is not known{own}")
    try:
        piece = quantizer.decode(body, elements)
        if piece.shape != (elements,) or piece.dtype != torch.float32:
            raise PayloadError(f"decoded to {tuple(piece.shape)} {piece.dtype}, not ({elements},) float32")
        return require_finite(piece) if number == CUSTOM else piece  # those of this package check theirs
    except PayloadError as exc:
        raise PayloadError(f"segment {index}: {exc}") from exc


def _segments(view: memoryview, pieces: int, count: int) -> list[tuple[int, int, memoryview]]:
    """The (number, elements, body) of each segment; lengths and counts are found to agree before any is decoded."""
    found, at, seen = [], PAYLOAD_HEADER, 0
    for index in range(pieces):
        if len(view) - at < LAYER_HEADER:
            raise PayloadError(f"ends in the header of segment {index}")
        number, elements, length = _SEGMENT.unpack_from(view, at)
        at += LAYER_HEADER
        if length > len(view) - at:
            raise PayloadError(f"segment {index} claims {length} bytes where {len(view) - at} are left")
        if elements == 0:
            raise PayloadError(f"segment {index} has no elements")
        found.append((number, elements, view[at : at + length]))
        at += length
        seen += elements
    if at != len(view):
        raise PayloadError(f"{len(view) - at} bytes follow the last segment")
    if seen != count or not found:
        raise PayloadError(f"{seen} elements where {count} were due")
    return found
