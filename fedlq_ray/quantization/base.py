"""The `Quantizer` protocol, and the checks that all decoders share."""

import struct
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError

HIGHEST = float(np.finfo(np.float32).max)


@runtime_checkable
class Quantizer(Protocol):
    """Converts one layer to bytes and back; it has frozen settings and no state. Custom quantizers need no base class.

    The encoded bytes hold everything that `decode` needs: any quantizer of the same class decodes them, whatever its
    settings. A quantizer whose expected error over the rounding is zero may set `unbiased = True`, which makes probes
    less noisy.

    A quantizer of this package declares `number`, its number on the wire: 1 byte, never changed, never used again. Its
    fields have defaults, because a decoder is made without arguments. One that takes a level of 1 to 8 bits declares
    `family`, its name as `strategy.quantizer`.
    """

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        """Quantize one layer.

        Args:
            x: finite float32 (n,), n >= 1.
            rng: source of the rounding noise.
        """

    def decode(self, body: memoryview, count: int) -> Tensor:
        """Decode to finite float32 (count,). Raises PayloadError on bytes that `encode` cannot produce."""

    def size(self, count: int) -> int | None:
        """Number of bytes that `encode` returns for `count` elements; None if it depends on their values."""


@runtime_checkable
class RoundTrip(Protocol):
    """A quantizer that knows what its bytes decode to without decoding them."""

    def roundtrip(self, x: Tensor, rng: Generator) -> tuple[bytes, Tensor]:
        """Returns what `encode` returns, and the values (n,) that `decode` returns for it."""


def require_bits(bits: int) -> None:
    """Raises ValueError unless `bits` is 1 to 8, so that a code fits in a byte."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits!r}")


def require_finite(values: Tensor) -> Tensor:
    """Returns the values. Raises PayloadError if one is a NaN or an infinity."""
    if not np.isfinite(values.numpy()).all():  # many times faster than torch.isfinite
        raise PayloadError("holds a NaN or an infinity")
    return values


def read_header(body: memoryview, header: struct.Struct) -> tuple[int | float, ...]:
    """Returns the scalars at the start of a body. Raises PayloadError if they are truncated or not finite."""
    if len(body) < header.size:
        raise PayloadError(f"{len(body)} bytes, but the scalars alone take {header.size}")
    scalars = header.unpack_from(body)
    if not np.isfinite(scalars).all():
        raise PayloadError("holds a NaN or an infinity")
    return scalars


def read_bits(bits: int | float) -> int:
    """Checks and returns a level from a body's header."""
    if not 1 <= bits <= 8:
        raise PayloadError(f"a level of {bits} bits; levels are 1 to 8 bits")
    return int(bits)


def as_float32(value: float) -> float:
    """Rounds to the nearest float32, the type on the wire; values beyond its range are clipped to it."""
    return float(np.float32(min(max(value, -HIGHEST), HIGHEST)))
