"""TernGrad: -m, 0 or m."""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import read_header

_POWERS = np.array([81, 27, 9, 3, 1], np.uint8)  # five codes of three values fit a byte: 243 of 256


@dataclass(frozen=True)
class TernGrad:
    """m sgn(x) with probability |x| / m, else 0; m the greatest magnitude after clipping. Unbiased without clipping.

    Source: Wen et al., NeurIPS 2017, arXiv:1705.07878, equations 1 and 7.
    Departs from it: five codes share a byte (1.6 bits each), where the paper counts 2 bits.
    Body: m (float32), codes.

    Args:
        clip: standard deviations beyond which values are cut; None for no clipping.
    """

    clip: float | None = 2.5
    HEADER = struct.Struct("<f")

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0 or None, got {self.clip!r}")

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values = x.double()
        limit = self.clip * float(values.std(correction=0)) if self.clip is not None else 0.0
        if limit > 0:  # a constant layer has no deviation to cut by
            values = values.clamp(-limit, limit)
        top = float(np.float32(min(float(values.abs().max()), float(np.finfo(np.float32).max))))
        share = values.abs() / top if top > 0 else torch.zeros_like(values)
        kept = torch.rand(x.shape, generator=rng, dtype=torch.float64) < share
        codes = torch.where(kept, torch.sign(values), 0).to(torch.int8).numpy() + 1
        filled = np.ones(5 * self._bytes(len(codes)), np.uint8)
        filled[: len(codes)] = codes
        return self.HEADER.pack(top) + (filled.reshape(-1, 5) * _POWERS).sum(axis=1, dtype=np.uint8).tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        (top,) = read_header(body, self.HEADER)
        raw = np.frombuffer(body[self.HEADER.size :], np.uint8)
        if top < 0 or len(raw) != self._bytes(count) or (raw >= 243).any():
            raise PayloadError(f"scale {top:g} and {len(raw)} bytes where {count} codes take {self._bytes(count)}")
        codes = (raw[:, None] // _POWERS % 3).reshape(-1)
        if (codes[count:] != 1).any():
            raise PayloadError("the filling after the last code is not zero")
        return torch.from_numpy((codes[:count].astype(np.float32) - 1) * np.float32(top))

    def size(self, count: int) -> int:
        return self.HEADER.size + self._bytes(count)

    @staticmethod
    def _bytes(count: int) -> int:
        return -(-count // 5)
