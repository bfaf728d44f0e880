"""TernGrad: a sign or zero per element, and one scale."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header

_PER_BYTE = 5  # 3**5 = 243 of a byte's 256 values: 1.6 bits per ternary digit; log2(3) = 1.585
_POWERS = (3 ** np.arange(_PER_BYTE)).astype(np.uint8)
# The elements of each byte (243, 5): digits 0, 1, 2, least significant first, represent 0, 1, -1.
_DIGITS = np.array([0, 1, -1], np.float32)[np.arange(243)[:, None] // _POWERS % 3]


@dataclass(frozen=True)
class TernGrad:
    """Clip, then send each x as m sgn(x) with probability |x| / m and else as 0; m is the largest clipped magnitude.

    Source: Wen et al., NeurIPS 2017, arXiv:1705.07878: ternarizing, layer-wise scales, clipping at 2.5 standard
    deviations. Without clipping it is unbiased, with E|Q(x) - x|^2 = sum |x| (m - |x|); with clipping, the mean is the
    clipped x.
    Departs from it: the deviation is measured from zero, not from the layer's mean. Otherwise a layer of one element,
    or of nearly equal elements, would be clipped to nearly nothing (the authors' code exempts small layers). Five
    elements share a byte, 1.6 bits each; the paper counts 2 bits or log2(3).
    Body: m (float32), five elements per byte.

    Args:
        clip: threshold in deviations; None for no clipping.
    """

    number: ClassVar[int] = 5

    clip: float | None = 2.5
    HEADER = struct.Struct("<f")

    def __post_init__(self) -> None:
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(f"clip must be above 0 and finite, or None, got {self.clip!r}")

    @property
    def unbiased(self) -> bool:
        return self.clip is None

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values, magnitudes = x.numpy(), x.abs().numpy()
        top = float(magnitudes.max())
        if self.clip is not None:
            # In float64, in which the square of a float32 cannot overflow or underflow.
            top = min(top, self.clip * float(np.sqrt(np.square(values, dtype=np.float64).mean())))
        m = as_float32(top)
        noise = torch.rand(x.shape, generator=rng, dtype=torch.float64).numpy()
        # Elements with |x| >= m, such as clipped ones, are always sent, because the noise is below 1.
        sent = noise * m < magnitudes if m > 0 else np.zeros(len(values), bool)
        digits = np.zeros(-(-len(values) // _PER_BYTE) * _PER_BYTE, np.uint8)
        digits[: len(values)] = sent.view(np.uint8) + (sent & (values < 0))
        fives = np.zeros(len(digits) // _PER_BYTE, np.uint8)
        for place, power in enumerate(_POWERS):
            fives += digits[place::_PER_BYTE] * power
        return self.HEADER.pack(m) + fives.tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        (m,) = read_header(body, self.HEADER)
        if len(body) != self.size(count):
            raise PayloadError(f"{len(body)} bytes, but {count} elements take {self.size(count)}")
        if np.signbit(m):
            raise PayloadError(f"the scale {m:g} is negative")
        raw = np.frombuffer(body[self.HEADER.size :], np.uint8)
        if raw.max() >= len(_DIGITS):
            raise PayloadError(f"a byte of {raw.max()}; five ternary digits give at most 242")
        if _DIGITS[raw[-1], _PER_BYTE + count - _PER_BYTE * len(raw) :].any():
            raise PayloadError("the padding after the last element is not zero")
        if m == 0 and raw.any():
            raise PayloadError("an element is not zero, but the scale is")
        return torch.from_numpy(np.take(_DIGITS * np.float32(m), raw, axis=0).reshape(-1)[:count])

    def size(self, count: int) -> int:
        return self.HEADER.size + -(-count // _PER_BYTE)
