"""What a quantizer is, and the checks that every decoder shares."""

import struct
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError


@runtime_checkable
class Quantizer(Protocol):
    """One layer to bytes, and back: frozen settings, no state. A user's own needs no base class.

    What `encode` makes says all that `decode` needs: a quantizer of the same class decodes it, whatever its settings.
    One whose error is zero in expectation over the rounding may say so, `unbiased = True`: probes are then less noisy.
    """

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        """Quantize one layer.

        Args:
            x: finite float32 (n,), n >= 1.
            rng: source of the rounding noise.
        """

    def decode(self, body: memoryview, count: int) -> Tensor:
        """What `encode` stands for: finite float32 (count,). Raises PayloadError on what `encode` cannot have made."""

    def size(self, count: int) -> int | None:
        """Bytes that `encode` makes of `count` elements; None where that depends on the elements."""


def require_bits(bits: int) -> None:
    """Raises ValueError unless a code of so many bits fits a byte."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits!r}")


def require_finite(values: Tensor) -> Tensor:
    """The values, or PayloadError where one is a NaN or an infinity."""
    if not np.isfinite(values.numpy()).all():  # many times as fast as torch.isfinite
        raise PayloadError("holds a NaN or an infinity")
    return values


def read_header(body: memoryview, header: struct.Struct) -> tuple[int | float, ...]:
    """The scalars at the start of a body. Raises PayloadError where they are cut or not finite."""
    if len(body) < header.size:
        raise PayloadError(f"{len(body)} bytes where the scalars alone take {header.size}")
    scalars = header.unpack_from(body)
    if not np.isfinite(scalars).all():
        raise PayloadError("holds a NaN or an infinity")
    return scalars


def read_bits(bits: int | float) -> int:
    """A level from a body's header, checked."""
    if not 1 <= bits <= 8:
        raise PayloadError(f"a level of {bits} bits, where 1 to 8 are possible")
    return int(bits)


def as_float32(value: float) -> float:
    """The nearest float32, which the wire carries; what is beyond its range becomes its largest."""
    top = float(np.finfo(np.float32).max)
    return float(np.float32(min(max(value, -top), top)))
