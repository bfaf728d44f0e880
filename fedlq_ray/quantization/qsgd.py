"""QSGD: a norm, and each element's share of it, rounded at random."""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_bits, read_header, require_bits
from fedlq_ray.quantization.packing import pack, packed_size, unpack


@dataclass(frozen=True)
class Qsgd:
    """Round each |x| / norm, at random and without bias, onto s + 1 values from 0 to 1; send sign and value.

    Source: Alistarh et al., NeurIPS 2017, arXiv:1610.02132, section 3.1: E|Q(x) - x|^2 <= min(n/s^2, sqrt(n)/s) |x|^2,
    with the layer's Euclidean norm.
    Departs from it: codes of fixed length instead of Elias's; s = 2**(bits - 1) - 1, and at 1 bit, where no zero is
    possible, the two values -norm and norm, unbiased with E|Q(x) - x|^2 = (n - 1) |x|^2.
    Body: bits (1 byte), norm (float32), codes of `bits` bits.
    """

    bits: int
    HEADER = struct.Struct("<Bf")

    def __post_init__(self) -> None:
        require_bits(self.bits)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        norm = as_float32(float(x.double().norm()))
        unit = x / norm if norm > 0 else torch.zeros_like(x)
        noise = torch.rand(x.shape, generator=rng)
        if self.bits == 1:
            codes = ((unit + 1) / 2 + noise).floor().clamp_(0, 1)
        else:
            s = 2 ** (self.bits - 1) - 1
            codes = torch.sign(x) * (unit.abs() * s + noise).floor().clamp_(0, s) + s
        return self.HEADER.pack(self.bits, norm) + pack(codes.to(torch.uint8).numpy(), self.bits)

    def decode(self, body: memoryview, count: int) -> Tensor:
        bits, norm = read_header(body, self.HEADER)
        if norm < 0:
            raise PayloadError(f"a norm of {norm:g}, which is negative")
        codes = torch.from_numpy(unpack(body[self.HEADER.size :], count, read_bits(bits)).astype(np.float32))
        if bits == 1:
            return (codes * 2 - 1) * norm
        s = 2 ** (int(bits) - 1) - 1
        if bool((codes > 2 * s).any()):
            raise PayloadError(f"a code above {2 * s}")
        return (codes - s) * (norm / s)

    def size(self, count: int) -> int:
        return self.HEADER.size + packed_size(count, self.bits)
