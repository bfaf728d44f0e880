"""The wire format: what a client sends in a round, as bytes whose `len` is the traffic.

Version 1, little-endian. Header of 18 bytes: magic `FQ`, version (1 byte), kind (1 byte: 0 update, 1 model),
round and client (4 bytes each), number of segments (2 bytes), CRC-32 of all other bytes (4 bytes). Then for each
segment 9 bytes, quantizer's number (1), elements (4), bytes of the body (4), followed by the body that the quantizer
made. The decoder is told what it must find (round, client, elements of each segment), and allocates nothing before the
lengths agree with the bytes that are there.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.quantizers import QUANTIZERS, Quantizer

MAGIC, VERSION = b"FQ", 1
_HEADER = struct.Struct("<2sBBIIHI")
_SEGMENT = struct.Struct("<BII")
PAYLOAD_HEADER, LAYER_HEADER = _HEADER.size, _SEGMENT.size
KINDS = ("update", "model")
# Numbers on the wire: never changed, only added to. 255 is a user's own quantizer, which both sides hold.
NUMBERS = {"float32": 0, "float16": 1, "minmax": 2, "qsgd": 3}
CUSTOM = 255
_NAMES = {number: name for name, number in NUMBERS.items()}


class Segment(NamedTuple):
    """How a piece of the vector is sent: a quantizer by name (or "custom"), its level, and which elements."""

    quantizer: str
    bits: int
    start: int
    stop: int


@dataclass(frozen=True)
class Payload:
    """A decoded payload: the vector (d,) float32, and the bytes that each segment took, header included."""

    vector: Tensor
    segment_bytes: tuple[int, ...]


def encode(
    vector: Tensor,
    segments: Sequence[Segment],
    *,
    kind: str,
    round: int,
    client: int,
    rng: Generator,
    custom: Quantizer | None = None,
) -> bytes:
    """A client's payload.

    Args:
        vector: finite float32 (d,), which the segments cover in order.
        kind: "update" or "model".
        rng: source of the rounding noise.
        custom: the user's quantizer, for segments called "custom".
    """
    bodies = []
    for name, bits, start, stop in segments:
        quantizer = custom if name == "custom" else QUANTIZERS[name]
        body = quantizer.encode(vector[start:stop], bits, rng)  # type: ignore[union-attr]
        bodies.append(_SEGMENT.pack(NUMBERS.get(name, CUSTOM), stop - start, len(body)) + body)
    rest = b"".join(bodies)
    header = _HEADER.pack(MAGIC, VERSION, KINDS.index(kind), round, client, len(segments), 0)
    return header[:-4] + struct.pack("<I", zlib.crc32(rest, zlib.crc32(header[:-4]))) + rest


def decode(
    data: bytes,
    sizes: Sequence[int],
    *,
    kind: str,
    round: int,
    client: int,
    custom: Quantizer | None = None,
) -> Payload:
    """The vector of a payload.

    Args:
        data: anything; nothing in it is trusted.
        sizes: the elements of each segment, as the plan had them.
        kind, round, client: what the payload must say.
        custom: the user's quantizer, where the plan has one.
    Raises:
        PayloadError: the bytes are not such a payload.
    """
    view = memoryview(data)
    if len(view) < PAYLOAD_HEADER:
        raise PayloadError(f"{len(view)} bytes where the header alone takes {PAYLOAD_HEADER}")
    magic, version, kind_number, its_round, its_client, count, checksum = _HEADER.unpack_from(view)
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
    if count != len(sizes):
        raise PayloadError(f"{count} segments where {len(sizes)} were due")
    pieces, lengths, at = [], [], PAYLOAD_HEADER
    for index, size in enumerate(sizes):
        if len(view) - at < LAYER_HEADER:
            raise PayloadError(f"ends in the header of segment {index}")
        number, elements, length = _SEGMENT.unpack_from(view, at)
        at += LAYER_HEADER
        if elements != size:
            raise PayloadError(f"segment {index} has {elements} elements where {size} were due")
        if length > len(view) - at:
            raise PayloadError(f"segment {index} claims {length} bytes where {len(view) - at} are left")
        quantizer = custom if number == CUSTOM else QUANTIZERS.get(_NAMES.get(number, ""))
        if quantizer is None:
            raise PayloadError(f"segment {index} names quantizer {number}, which is not known")
        try:
            piece = quantizer.decode(view[at : at + length], size)
        except PayloadError as exc:
            raise PayloadError(f"segment {index}: {exc}") from exc
        if piece.shape != (size,) or piece.dtype != torch.float32:
            raise PayloadError(f"segment {index}: decoded to {tuple(piece.shape)} {piece.dtype}, not ({size},) float32")
        pieces.append(piece)
        lengths.append(LAYER_HEADER + length)
        at += length
    if at != len(view):
        raise PayloadError(f"{len(view) - at} bytes follow the last segment")
    return Payload(torch.cat(pieces), tuple(lengths))
