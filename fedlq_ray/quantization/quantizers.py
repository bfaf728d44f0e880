"""Quantizers: one layer to bytes at a level, and back.

Every bit that the server needs is in the bytes. A quantizer has no state: noise comes in by `rng`.
"""

import struct
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray import parts
from fedlq_ray.errors import ConfigError, PayloadError
from fedlq_ray.quantization.packing import pack, packed_size, unpack


@runtime_checkable
class Quantizer(Protocol):
    """What a quantizer is; a user's own needs these three methods and no base class."""

    def encode(self, x: Tensor, bits: int, rng: Generator) -> bytes:
        """Quantize one layer.

        Args:
            x: finite float32 (n,), n >= 1.
            bits: the level, bits a parameter.
            rng: source of the rounding noise.
        """

    def decode(self, body: memoryview, count: int) -> Tensor:
        """What `encode` stands for: float32 (count,). Raises PayloadError on bytes that `encode` cannot have made."""

    def size(self, count: int, bits: int) -> int:
        """Bytes that `encode` makes of `count` elements at `bits`."""


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise PayloadError("holds a NaN or an infinity")
    return values


def _scalars(body: memoryview, header: struct.Struct) -> tuple[int, list[float]]:
    """The level and the float32 scalars at the start of a body, checked."""
    if len(body) < header.size:
        raise PayloadError(f"{len(body)} bytes where the scalars alone take {header.size}")
    bits, *scalars = header.unpack_from(body)
    if not 1 <= bits <= 8:
        raise PayloadError(f"a level of {bits} bits, where 1 to 8 are possible")
    if not np.isfinite(scalars).all():
        raise PayloadError("holds a NaN or an infinity")
    return bits, scalars


@dataclass(frozen=True)
class Float32:
    """No quantization: little-endian float32."""

    def encode(self, x: Tensor, bits: int, rng: Generator) -> bytes:
        return x.numpy().astype("<f4").tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        if len(body) != 4 * count:
            raise PayloadError(f"{len(body)} bytes where {count} float32 take {4 * count}")
        return _finite(torch.from_numpy(np.frombuffer(body, "<f4").astype(np.float32)))

    def size(self, count: int, bits: int) -> int:
        return 4 * count


@dataclass(frozen=True)
class Float16:
    """Half precision, rounded to nearest; values beyond its range become its largest."""

    def encode(self, x: Tensor, bits: int, rng: Generator) -> bytes:
        return x.clamp(-65504.0, 65504.0).numpy().astype("<f2").tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        if len(body) != 2 * count:
            raise PayloadError(f"{len(body)} bytes where {count} float16 take {2 * count}")
        return _finite(torch.from_numpy(np.frombuffer(body, "<f2").astype(np.float32)))

    def size(self, count: int, bits: int) -> int:
        return 2 * count


@dataclass(frozen=True)
class MinMax:
    """Round, at random and without bias, onto 2**bits values evenly spaced from a layer's least to its greatest.

    Source: Suresh et al., ICML 2017, arXiv:1611.00429, stochastic k-level quantization.
    Departs from it: the range is a layer's (or, with `strategy.scope=model`, the whole vector's), without rotation.
    Body: bits (1 byte), low and step (float32 each), codes of `bits` bits.
    """

    HEADER = struct.Struct("<Bff")

    def encode(self, x: Tensor, bits: int, rng: Generator) -> bytes:
        top = 2**bits - 1
        low, high = (float(v) for v in x.double().aminmax())
        step = np.float32(min((high - low) / top, float(np.finfo(np.float32).max)))
        if step == 0:  # a constant layer decodes exactly, whatever its codes
            codes = torch.zeros_like(x)
        else:
            noise = torch.rand(x.shape, generator=rng)
            # A float32 step may be short of the range by a rounding: 256 would wrap to 0 in uint8.
            codes = ((x.double() - low) / float(step) + noise).floor().clamp_(0, top)
        return self.HEADER.pack(bits, low, step) + pack(codes.to(torch.uint8).numpy(), bits)

    def decode(self, body: memoryview, count: int) -> Tensor:
        bits, (low, step) = _scalars(body, self.HEADER)
        codes = torch.from_numpy(unpack(body[self.HEADER.size :], count, bits).astype(np.float64))
        return _finite((codes * step + low).float())  # in float64, where no product overflows

    def size(self, count: int, bits: int) -> int:
        return self.HEADER.size + packed_size(count, bits)


@dataclass(frozen=True)
class Qsgd:
    """Round each |x| / norm, at random and without bias, onto s + 1 values from 0 to 1; send sign and value.

    Source: Alistarh et al., NeurIPS 2017, arXiv:1610.02132, section 3.1: E|Q(x) - x|^2 <= min(n/s^2, sqrt(n)/s) |x|^2,
    with the layer's Euclidean norm.
    Departs from it: codes of fixed length instead of Elias's; s = 2**(bits - 1) - 1, and at 1 bit, where no zero is
    possible, the two values -norm and norm, unbiased with E|Q(x) - x|^2 = (n - 1) |x|^2.
    Body: bits (1 byte), norm (float32), codes of `bits` bits.
    """

    HEADER = struct.Struct("<Bf")

    def encode(self, x: Tensor, bits: int, rng: Generator) -> bytes:
        norm = np.float32(min(float(x.double().norm()), float(np.finfo(np.float32).max)))
        unit = x / float(norm) if norm > 0 else torch.zeros_like(x)
        noise = torch.rand(x.shape, generator=rng)
        if bits == 1:
            codes = ((unit + 1) / 2 + noise).floor().clamp_(0, 1)
        else:
            s = 2 ** (bits - 1) - 1
            codes = torch.sign(x) * (unit.abs() * s + noise).floor().clamp_(0, s) + s
        return self.HEADER.pack(bits, norm) + pack(codes.to(torch.uint8).numpy(), bits)

    def decode(self, body: memoryview, count: int) -> Tensor:
        bits, (norm,) = _scalars(body, self.HEADER)
        if norm < 0:
            raise PayloadError(f"a norm of {norm:g}, which is negative")
        codes = torch.from_numpy(unpack(body[self.HEADER.size :], count, bits).astype(np.float32))
        if bits == 1:
            return (codes * 2 - 1) * norm
        s = 2 ** (bits - 1) - 1
        if bool((codes > 2 * s).any()):
            raise PayloadError(f"a code above {2 * s}")
        return (codes - s) * (norm / s)

    def size(self, count: int, bits: int) -> int:
        return self.HEADER.size + packed_size(count, bits)


QUANTIZERS: dict[str, Any] = {"float32": Float32(), "float16": Float16(), "minmax": MinMax(), "qsgd": Qsgd()}


def resolve(name: str) -> Quantizer:
    """The quantizer of a name, or a user's own by import path (an object, or a class or function without arguments).

    Raises:
        ConfigError: no such quantizer, or it lacks a method of `Quantizer`.
    """
    return checked(parts.find("strategy.quantizer", name, QUANTIZERS))


def checked(part: Any) -> Quantizer:
    """A user's quantizer, made where it is a class or function, and found to have the three methods."""
    if isinstance(part, type) or (callable(part) and not isinstance(part, Quantizer)):
        part = parts.call("strategy.quantizer", part, {}, {})
    missing = [name for name in ("encode", "decode", "size") if not callable(getattr(part, name, None))]
    if missing:
        raise ConfigError(f"strategy.quantizer: {type(part).__name__} has no method {', '.join(missing)}")
    return part  # type: ignore[no-any-return]
