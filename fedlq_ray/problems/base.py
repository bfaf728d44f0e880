"""The interface of a learning problem: what a model returns, how it is scored, and what samples are split by."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.errors import ConfigError

Array = NDArray[Any]


@dataclass(frozen=True)
class Goal:
    """The main metric of a problem.

    Attributes:
        metric: its name.
        higher_is_better: whether a larger value is better.
        percent: whether it is a fraction, which people read in percent.
    """

    metric: str = "accuracy"
    higher_is_better: bool = True
    percent: bool = True

    def reaches(self, value: float | None, target: float | None) -> bool:
        """Whether a value is at the target, or better."""
        return value is not None and target is not None and self.merit(value) >= self.merit(target)

    def merit(self, value: float) -> float:
        """The value, or its negative if lower is better."""
        return value if self.higher_is_better else -value

    def best(self, values: Iterable[float]) -> float | None:
        return max(values, key=self.merit, default=None)

    def worst(self, values: Iterable[float]) -> list[float]:
        """The tenth of the values that is worst, at least one; the worst first."""
        ordered = sorted(values, key=self.merit)
        return ordered[: max(1, len(ordered) // 10)]

    def shown(self, value: float) -> str:
        """The value as text, such as 87.12 % or 41.3."""
        return f"{value:.2%}" if self.percent else f"{value:.4g}"

    def named(self, target: float) -> str:
        """A target as text, such as 86 % accuracy or 41 absolute_error."""
        return f"{100 * target:g} % {self.metric}" if self.percent else f"{target:g} {self.metric}"

    @property
    def label(self) -> str:
        """The heading of a column or an axis."""
        return f"{self.metric.replace('_', ' ')}{', %' if self.percent else ''}"

    @property
    def scale(self) -> float:
        """The factor of values under `label`."""
        return 100 if self.percent else 1


class Problem:
    """What clients train for. A problem of your own derives from this class, or from one of the built-in problems.

    A sample may have several parts, such as the positions of a text; losses and metrics are means over parts. Problems
    hold no state: the same object serves all clients, and Ray pickles it.

    Attributes:
        goal: the main metric, which `target` and the comparison of runs refer to.
    """

    goal: Goal = Goal()

    def targets(self, where: str, y: Array) -> Array:
        """Checks and converts stored targets (n, ...).

        Args:
            where: the array's name, for messages.
        Raises:
            ConfigError: a target is wrong.
        """
        raise NotImplementedError

    def outputs(self, y: Array) -> int:
        """The size of a model's last dimension, from the training targets."""
        raise NotImplementedError

    def output_shape(self, y: Array, outputs: int) -> tuple[int, ...]:
        """The shape of a model's outputs for the samples of these targets."""
        return (len(y), outputs)

    def strata(self, y: Array) -> NDArray[np.int64] | None:
        """The label (n,) by which partitions split samples; None if samples have none."""
        return None

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch, over parts: a float32 scalar with a gradient."""
        raise NotImplementedError

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Sums over each sample's parts, (n,) each: `loss`, `main` (the main metric), and what `metrics` needs besides.

        `parts` has the number of each sample's parts; without it, a sample is one part.
        """
        raise NotImplementedError

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics by name, the main one first, from the means of `scores` over all parts."""
        return {self.goal.metric: means["main"]}


def whole_numbers(y: Array) -> NDArray[np.int64] | None:
    """Converts whole numbers of any type to int64; None if one is not whole."""
    whole = y.dtype.kind == "f" and bool((y == np.floor(y)).all()) and bool((abs(y) < 2**53).all())
    return y.astype(np.int64) if whole or y.dtype.kind in "uib" else None


def numbers(where: str, y: Array) -> NDArray[np.float32]:
    """Converts targets (n,) or (n, k) to float32 (n, k).

    Raises:
        ConfigError: one is not a finite number, or the shape is another.
    """
    if y.dtype.kind not in "uifb" or y.ndim not in (1, 2) or 0 in y.shape:
        raise ConfigError(f"{where} must be numbers of shape (n,) or (n, targets), got {y.dtype} of shape {y.shape}")
    found = np.ascontiguousarray(y.reshape(len(y), -1), dtype=np.float32)
    if not np.isfinite(found).all():
        row = np.argwhere(~np.isfinite(found))[0][0]
        raise ConfigError(f"{where}[{row}] is a NaN, an infinity or beyond float32's range")
    return found


def score(problem: Problem, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A problem's scores, float64 on the CPU, with `parts`."""
    found = {name: value.detach().double().cpu() for name, value in problem.scores(outputs, y).items()}
    return {"parts": torch.ones(len(y), dtype=torch.float64), **found}
