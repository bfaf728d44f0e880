"""FedLQ's two measurements of a layer: the memory that quantizing it saves, and the accuracy that it costs.

Source: Xu et al., Computer Networks 264, 2025, 111223. We could read only the abstract, so the formulas are our
interpretation. Significance is the accuracy drop per memory saved.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedlq_ray.models import FlatModel, Layer
from fedlq_ray.problems import Classification, Problem
from fedlq_ray.quantization import Quantizer
from fedlq_ray.seeding import torch_rng
from fedlq_ray.significance.metrics import METRICS, Evidence, Table

BLOCKS = 8  # blocks of held-out samples, each with its own rounding


def memory_saving(sizes: Sequence[int], levels: Sequence[int]) -> Table:
    """M_l(b) = d_l (32 - b) / (32 d): the share of the model's bytes that layer l at level b saves; (L, levels)."""
    share = np.array(sizes, float) / sum(sizes)
    saving: Table = share[:, None] * (32 - np.array(levels, float)) / 32
    return saving


@dataclass(frozen=True)
class Measurement:
    """The cost of quantizing one layer alone, in one metric: tables (L, levels).

    drop: the metric.
    noise: the standard error of the drop over blocks, which covers samples and rounding.
    distortion: squared error of the layer.
    """

    drop: Table
    noise: Table
    distortion: Table


def gather(
    model: FlatModel,
    base: Tensor,
    sent: Tensor,
    layers: Sequence[Layer],
    quantizers: Sequence[Quantizer],
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    round: int,
    block: int = 0,
    problem: Problem = Classification(),
) -> Evidence:
    """Quantizes every layer with every quantizer; arguments are as in `Evidence`, with x and y held out of training."""
    decoded = sent.repeat(len(quantizers), 1)
    sizes = np.zeros((len(layers), len(quantizers)), np.int64)
    for row, layer in enumerate(layers):
        piece = slice(layer.start, layer.stop)
        for column, quantizer in enumerate(quantizers):
            body = quantizer.encode(sent[piece], torch_rng(seed, "probe", round, block, row, column))
            decoded[column, piece] = quantizer.decode(memoryview(body), layer.size)
            sizes[row, column] = len(body)
    unbiased = np.array([getattr(quantizer, "unbiased", False) for quantizer in quantizers], bool)
    return Evidence(model, base, sent, layers, decoded, sizes, unbiased, x, y, seed, round, block, problem)


def in_blocks(take: Callable[..., Evidence], x: Tensor, y: Tensor) -> Iterator[Evidence]:
    """Splits the samples into `BLOCKS` parts, each with its own rounding; this takes no more passes than one part.

    `take` is `gather` with all arguments bound except x, y and block.
    """
    count = min(BLOCKS, len(y))
    for block, part in enumerate(zip(x.tensor_split(count), y.tensor_split(count), strict=True)):
        yield take(*part, block=block)


def measure(blocks: Iterable[Evidence], *metrics: str) -> dict[str, Measurement]:
    """Computes the named metrics.

    If a block's value is not finite, for example because a coarse level breaks the weights, the drop is +-1e30 with
    zero noise. With a single block, the noise is unknown and set to 1e30, so that no drop is significant.
    """
    found, sizes = [], []
    for evidence in blocks:
        found.append(_tables(evidence, metrics))
        sizes.append(len(evidence.y))
        del evidence  # free its tables before the next block allocates its own
    tables = np.array(found)
    broken = ~np.isfinite(tables).all(0)
    tables[:, broken] = np.where(np.isneginf(tables[:, broken]).any(0), -1e30, 1e30)
    means = np.average(tables, 0, sizes)  # the sizes of blocks differ by at most one sample
    noises = tables.std(0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.full_like(means, 1e30)
    noises[broken] = 0
    return {name: Measurement(means[i], noises[i], means[-1]) for i, name in enumerate(metrics)}


def _tables(evidence: Evidence, metrics: Sequence[str]) -> list[Table]:
    return [METRICS[name](evidence) for name in (*metrics, "squared_error")]


@dataclass(frozen=True)
class Drops:
    """The running estimate of A_l(b) over rounds: an exponential average that falls in b.

    The order of measurements below twice their standard error would be chance. For these, the estimate is the
    distortion, scaled to the significant drops (A ~ k D for small errors), those of the same layer if it has any, and
    capped by the noise.
    """

    decay: float
    measured: Table | None = None
    variance: Table | None = None
    distortion: Table | None = None

    def add(self, measurement: Measurement) -> "Drops":
        """The averages with one more measurement."""
        drop, variance, distortion = measurement.drop, measurement.noise**2, measurement.distortion
        if self.measured is None or self.variance is None or self.distortion is None:
            return Drops(self.decay, drop, variance, distortion)
        keep, new = self.decay, 1 - self.decay
        return Drops(
            self.decay,
            keep * self.measured + new * drop,
            keep**2 * self.variance + new**2 * variance,
            keep * self.distortion + new * distortion,
        )

    def curvature(self, sizes: Sequence[int], floor: float = 1e-3) -> Table:
        """s_l = sum_b A_l(b) / sum_b D_l(b), each layer's drop per unit of squared error: (L,), above zero.

        Values are at least `floor` times the mean over parameters, so that noise makes no layer worthless; layers
        without any error get the mean. All are 1 before any measurement, if no drop is positive, and for the metric
        `squared_error`.
        """
        if self.measured is None or self.distortion is None:
            return np.ones(len(sizes))
        drop, error = self.measured.sum(1), self.distortion.sum(1)
        seen = error > 0
        slope = np.maximum(drop, 0) / np.where(seen, error, 1)
        if not (slope[seen] > 0).any():
            return np.ones(len(sizes))
        mean = float(np.average(slope[seen], weights=np.array(sizes, float)[seen]))
        return np.maximum(np.where(seen, slope, mean), floor * mean)

    def estimate(self, sizes: Sequence[int], levels: Sequence[int]) -> Table:
        """A_l(b), (L, levels): never negative, never rising with b.

        Before any measurement, it is the error of the min-max quantizer for layers of equal range,
        d_l / (6 (2^b - 1)^2).
        """
        if self.measured is None or self.variance is None or self.distortion is None:
            top = 2.0 ** np.minimum(np.array(levels, float), 32) - 1
            expected: Table = np.array(sizes, float)[:, None] / (6 * top[None, :] ** 2)
            return expected
        noise = np.sqrt(self.variance)
        seen = self.measured > 2 * noise
        if seen.any():
            ratios = np.ma.masked_array(self.measured / np.maximum(self.distortion, 1e-30), ~seen)
            slope = np.ma.median(ratios, axis=1).filled(np.ma.median(ratios))
            estimate = np.where(seen, self.measured, np.minimum(slope[:, None] * self.distortion, 2 * noise))
        else:
            estimate = self.distortion
        return np.maximum.accumulate(np.maximum(estimate, 0)[:, ::-1], axis=1)[:, ::-1]
