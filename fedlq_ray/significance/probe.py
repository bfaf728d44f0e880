"""FedLQ's two measurements of a layer: the memory that quantizing it saves, and the accuracy that it costs.

Source: Xu et al., Computer Networks 264, 2025, 111223. Only the abstract is public to us: the formulas are our
reading of it. Significance is the accuracy drop per memory saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.models import FlatModel, Layer
from fedlq_ray.quantization import Quantizer
from fedlq_ray.seeding import torch_rng
from fedlq_ray.training import sample_losses

Table = NDArray[np.float64]


def memory_saving(sizes: Sequence[int], levels: Sequence[int]) -> Table:
    """M_l(b) = d_l (32 - b) / (32 d): the share of the model's bytes that layer l at level b saves; (L, levels)."""
    share = np.array(sizes, float) / sum(sizes)
    return share[:, None] * (32 - np.array(levels, float)) / 32


@dataclass(frozen=True)
class Measurement:
    """What quantizing one layer alone costs: tables (L, levels).

    loss, accuracy: the drops (loss after minus before, accuracy before minus after) on the probe's samples.
    loss_noise, accuracy_noise: their standard errors over samples.
    distortion: squared error of the layer.
    """

    loss: Table
    loss_noise: Table
    accuracy: Table
    accuracy_noise: Table
    distortion: Table


def measure(
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
) -> Measurement:
    """Measure each layer at each level on samples held out from training.

    Args:
        base: flat vector (d,) that `sent` is added to: zeros for payload `model`, the old weights for `update`.
        sent: flat vector (d,): the weights, or the last cohort's mean update.
        quantizers: that of each level.
        x, y: normalised inputs and labels; the more, the less noise.
    """
    reference = base + sent
    losses, right = sample_losses(model, reference, x, y)
    shape = (len(layers), len(quantizers))
    tables = [np.zeros(shape) for _ in range(5)]
    for row, layer in enumerate(layers):
        for column, quantizer in enumerate(quantizers):
            piece = sent[layer.start : layer.stop]
            body = quantizer.encode(piece, torch_rng(seed, "probe", round, row, column))
            quantized = quantizer.decode(memoryview(body), layer.size)
            changed = reference.clone()
            changed[layer.start : layer.stop] = base[layer.start : layer.stop] + quantized
            its_losses, its_right = sample_losses(model, changed, x, y)
            drops = (its_losses - losses, right.double() - its_right.double())
            for table, drop in zip((0, 2), drops, strict=True):
                tables[table][row, column] = float(drop.mean())
                tables[table + 1][row, column] = float(drop.std()) / len(y) ** 0.5
            tables[4][row, column] = float((quantized - piece).double().square().sum())
    return Measurement(*[np.nan_to_num(t, nan=1e30, posinf=1e30, neginf=-1e30) for t in tables])


@dataclass
class Drops:
    """The running estimate of A_l(b), kept over rounds: an exponential average, above its noise, falling in b.

    Where a measurement is not above twice its standard error its order would be chance: there the estimate is the
    distortion, scaled to the measured drops where some stand out (A ~ k D for small errors), capped by the noise.
    """

    decay: float
    metric: str
    measured: Table | None = None
    variance: Table | None = None
    distortion: Table | None = field(default=None)

    def add(self, measurement: Measurement) -> None:
        """Fold one measurement in."""
        drop: Table = getattr(measurement, self.metric)
        noise: Table = getattr(measurement, f"{self.metric}_noise")
        if self.measured is None or self.variance is None or self.distortion is None:
            self.measured, self.variance, self.distortion = drop, noise**2, measurement.distortion
            return
        keep, new = self.decay, 1 - self.decay
        self.measured = keep * self.measured + new * drop
        self.variance = keep**2 * self.variance + new**2 * noise**2
        self.distortion = keep * self.distortion + new * measurement.distortion

    def estimate(self, sizes: Sequence[int], levels: Sequence[int]) -> Table:
        """A_l(b), (L, levels): never negative, never rising with b.

        Before any measurement: the error of the min-max quantizer for layers of one range, d_l / (6 (2^b - 1)^2).
        """
        if self.measured is None or self.variance is None or self.distortion is None:
            top = 2.0 ** np.minimum(np.array(levels, float), 32) - 1
            return np.array(sizes, float)[:, None] / (6 * top[None, :] ** 2)
        noise = np.sqrt(self.variance)
        seen = self.measured > 2 * noise
        if seen.any():
            ratios = self.measured[seen] / np.maximum(self.distortion[seen], 1e-30)
            estimate = np.where(seen, self.measured, np.minimum(np.median(ratios) * self.distortion, 2 * noise))
        else:
            estimate = self.distortion
        return np.maximum.accumulate(np.maximum(estimate, 0)[:, ::-1], axis=1)[:, ::-1]
