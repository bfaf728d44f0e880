"""FedLQ-RD whose codes go in Elias's gamma or omega code in place of the range coder, and nothing else is changed.

From the project's folder: `strategy.name=experiments.ablation.coder:EliasRD` and
`strategy.quantizer=experiments.ablation.coder:Elias`.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER, Ecsq, Float32, Segment
from fedlq_ray.quantization.base import read_header
from fedlq_ray.quantization.coding.cells import count_below
from fedlq_ray.quantization.coding.codes import TOP, Magnitudes
from fedlq_ray.quantization.ecsq import Design, _decoded
from fedlq_ray.quantization.qsgd_elias import _Codes, _read, _write
from fedlq_ray.quantization.rate import OneStep
from fedlq_ray.strategies import Member
from fedlq_ray.strategies.fedlq_rd import FedLQRD, Seen
from fedlq_ray.training.local import Plan

NOTHING = Ecsq(1.0).design(Magnitudes.of(torch.zeros(1)))  # the server decodes without a design
PASSES = 16  # halvings of a factor of TOP between the largest and the smallest step: to a thousandth


@dataclass(frozen=True)
class Elias:
    """A layer with `Ecsq`'s codes, in the shortest of QSGD's four ways. Body: step, highest code, way, shifts, bits."""

    design: Design = NOTHING
    HEADER = struct.Struct("<fHB")

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values = x.numpy()
        codes = count_below(self.design.edges, np.abs(values)) if len(self.design.edges) else np.zeros(len(values), int)
        where = np.flatnonzero(codes)
        way, bits = _write(_Codes(where, codes[where].astype(np.int64), np.signbit(values[where])), len(values))
        header = self.HEADER.pack(self.design.step, self.design.model.top, way)
        return header + self.design.shifts.tobytes() + np.packbits(bits).tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        step, top, way = read_header(body, self.HEADER)
        start = self.HEADER.size + min(int(top), 4)
        shifts = np.frombuffer(body[self.HEADER.size : start], np.int8)
        read = _read(np.unpackbits(np.frombuffer(body[start:], np.uint8)), int(way), count, max(int(top), 1))
        codes = np.zeros(count, np.int32)
        codes[read.where] = read.levels
        return _decoded(codes, read.where, read.minus.astype(np.int32), step, int(top), shifts)

    def size(self, count: int) -> None:
        return None


@dataclass(frozen=True)
class EliasOneStep:
    """`OneStep` by plain halving, with the bytes that Elias's codes take."""

    of: OneStep

    def __call__(self, vector: Tensor) -> tuple[Segment, ...]:
        pieces = list(zip(self.of.pieces, self.of.weights, strict=True))
        layers = [Magnitudes.of(vector[start:stop]) if weight else None for (start, stop), weight in pieces]
        peak = max((layer.peak * w for layer, w in zip(layers, self.of.weights, strict=True) if layer), default=0.0)
        high = math.log(4 * peak or 1.0)
        low, best = high - math.log(4 * TOP), None
        for tried in range(PASSES):
            step = (low + high) / 2 if tried else high
            segments, size = self._segments(vector, layers, math.exp(step))
            if size <= self.of.budget or best is None:
                best, high = segments, step
            else:
                low = step
        return best or ()

    def _segments(
        self, vector: Tensor, layers: Sequence[Magnitudes | None], step: float
    ) -> tuple[tuple[Segment, ...], int]:
        segments, size = [], PAYLOAD_HEADER
        for layer, (start, stop), weight in zip(layers, self.of.pieces, self.of.weights, strict=True):
            quantizer = Elias(Ecsq(step / weight).design(layer)) if layer else Float32()
            segments.append(Segment(quantizer, start, stop))
            size += LAYER_HEADER + len(quantizer.encode(vector[start:stop], torch.Generator()))
        return tuple(segments), size


class EliasRD(FedLQRD):
    """FedLQ-RD with error feedback and these codes."""

    error_feedback = True

    def plan(self, seen: Seen, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        plans = super().plan(seen, round, cohort)
        return {client: replace(plan, segments=EliasOneStep(plan.segments)) for client, plan in plans.items()}
