"""The wire format: the payload that a client sends in a round, as bytes whose `len` is the traffic.

Version 1, little-endian. Header of 18 bytes: magic `FQ`, version (1 byte), kind (1 byte: 0 update, 1 model),
round and client (4 bytes each), number of segments (2 bytes), CRC-32 of all other bytes (4 bytes). Each segment has a
header of 9 bytes: the quantizer's number (1), elements (4), bytes of the body (4). The quantizer's body follows. The
caller passes the expected kind, round, client and total number of elements to the decoder, which allocates nothing
until the lengths agree with the number of bytes.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import Quantizer, RoundTrip, require_finite
from fedlq_ray.quantization.registry import DECODERS, NUMBERS

MAGIC, VERSION = b"FQ", 1
_HEADER = struct.Struct("<2sBBIIHI")
_SEGMENT = struct.Struct("<BII")
PAYLOAD_HEADER: int = _HEADER.size
"""Bytes of a payload's header."""
LAYER_HEADER: int = _SEGMENT.size
"""Bytes of a segment's header."""
KINDS = ("update", "model")
CUSTOM = 255  # a user's own quantizer, which both sides have


class Segment(NamedTuple):
    """A piece of the vector to send: its quantizer and its range of elements."""

    quantizer: Quantizer
    start: int
    stop: int


class Sent(NamedTuple):
    """A piece of a decoded payload: its range of elements, and its bytes, header included."""

    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True)
class Payload:
    """A decoded payload: the vector (d,) float32, and its pieces."""

    vector: Tensor
    segments: tuple[Sent, ...]


def encode(vector: Tensor, segments: Sequence[Segment], *, kind: str, round: int, client: int, rng: Generator) -> bytes:
    """Returns a client's payload.

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
    """Returns the encoded payload, and the vector (d,) that it decodes to.

    Raises:
        PayloadError: the segments do not cover the vector, or a user's quantizer fails to decode its own encoding.
    """
    ends = [0, *(stop for _, _, stop in segments)]
    if ends[:-1] != [start for _, start, _ in segments] or ends[-1] != len(vector):
        raise PayloadError(f"the segments do not cover the {len(vector)} elements in order")
    bodies, pieces = [], []
    for index, (quantizer, start, stop) in enumerate(segments):
        x, number = vector[start:stop], NUMBERS.get(type(quantizer), CUSTOM)
        if number != CUSTOM and isinstance(quantizer, RoundTrip):
            body, piece = quantizer.roundtrip(x, rng)
        else:
            body = quantizer.encode(x, rng)
            piece = _piece(index, number, memoryview(body), stop - start, custom)
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
    """Decodes a payload.

    Args:
        data: any bytes; nothing in them is trusted.
        count: number of elements of the vector.
        kind, round, client: the values that the header must have.
        custom: the user's quantizer by level, if there is one.
    Raises:
        PayloadError: the bytes are not such a payload.
    """
    view = memoryview(data)
    if len(view) < PAYLOAD_HEADER:
        raise PayloadError(f"{len(view)} bytes, but the header alone takes {PAYLOAD_HEADER}")
    magic, version, kind_number, its_round, its_client, pieces, checksum = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError("the bytes do not start as a payload does")
    if version != VERSION:
        raise PayloadError(f"unknown version {version}; the known version is {VERSION}")
    if zlib.crc32(view[PAYLOAD_HEADER:], zlib.crc32(view[: PAYLOAD_HEADER - 4])) != checksum:
        raise PayloadError("the checksum does not match the bytes")
    if (kind_number, its_round, its_client) != (KINDS.index(kind), round, client):
        raise PayloadError(
            f"kind {kind_number}, round {its_round}, client {its_client}, "
            f"expected kind {KINDS.index(kind)}, round {round}, client {client}"
        )
    found = _segments(view, pieces, count)
    vectors, sent, start = [], [], 0
    for index, (number, elements, body) in enumerate(found):
        vectors.append(_piece(index, number, body, elements, custom))
        sent.append(Sent(start, start + elements, LAYER_HEADER + len(body)))
        start += elements
    return Payload(torch.cat(vectors), tuple(sent))


def bodies(data: bytes) -> list[tuple[int, int, memoryview]]:
    """A payload's segments without decoding them: the quantizer's number, elements, and body.

    Raises:
        PayloadError: the bytes are not a payload.
    """
    view = memoryview(data)
    if len(view) < PAYLOAD_HEADER or _HEADER.unpack_from(view)[:2] != (MAGIC, VERSION):
        raise PayloadError(f"{len(view)} bytes that do not begin as a payload")
    return _segments(view, _HEADER.unpack_from(view)[5], None)


def _piece(
    index: int, number: int, body: memoryview, elements: int, custom: Callable[[int], Quantizer] | None
) -> Tensor:
    """Decodes a segment's elements."""
    quantizer = custom(1) if number == CUSTOM and custom else DECODERS.get(number)
    if quantizer is None or (number == CUSTOM and type(quantizer) in NUMBERS):
        own = "; set strategy.quantizer to your own quantizer" if number == CUSTOM else ""
        raise PayloadError(f"segment {index} names the unknown quantizer {number}{own}")
    try:
        piece = quantizer.decode(body, elements)
        if piece.shape != (elements,) or piece.dtype != torch.float32:
            raise PayloadError(f"decoded to {tuple(piece.shape)} {piece.dtype}, not ({elements},) float32")
        return require_finite(piece) if number == CUSTOM else piece  # this package's quantizers check their values
    except PayloadError as exc:
        raise PayloadError(f"segment {index}: {exc}") from exc


def _segments(view: memoryview, pieces: int, count: int | None) -> list[tuple[int, int, memoryview]]:
    """Returns each segment's (number, elements, body); checks all lengths and counts before any body is decoded."""
    found, at, seen = [], PAYLOAD_HEADER, 0
    for index in range(pieces):
        if len(view) - at < LAYER_HEADER:
            raise PayloadError(f"the payload ends within the header of segment {index}")
        number, elements, length = _SEGMENT.unpack_from(view, at)
        at += LAYER_HEADER
        if length > len(view) - at:
            raise PayloadError(f"segment {index} claims {length} bytes, but {len(view) - at} are left")
        if elements == 0:
            raise PayloadError(f"segment {index} has no elements")
        found.append((number, elements, view[at : at + length]))
        at += length
        seen += elements
    if at != len(view):
        raise PayloadError(f"{len(view) - at} bytes follow the last segment")
    if seen != (seen if count is None else count) or not found:
        raise PayloadError(f"{seen} elements, expected {count}")
    return found
