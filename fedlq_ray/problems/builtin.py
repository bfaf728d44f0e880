"""The built-in problems: classification, tokens, regression and multilabel."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fedlq_ray.errors import ConfigError
from fedlq_ray.problems.base import Array, Goal, Problem, numbers, whole_numbers

PADDING = -1  # a target that is not scored


class Classification(Problem):
    """One label per sample, cross-entropy in nats. Targets (n,) int64 from 0; outputs (n, classes)."""

    def targets(self, where: str, y: Array) -> NDArray[np.int64]:
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        found = whole_numbers(y) if y.ndim == 1 else None
        if found is None:
            raise ConfigError(f"{where} must be one whole number per sample, got {y.dtype} of shape {y.shape}")
        wrong = np.flatnonzero((found < 0) | (found >= 100_000))
        if len(wrong):
            raise ConfigError(f"{where}[{wrong[0]}] is {y[wrong[0]]}, out of range; labels are 0 to 99999")
        return found

    def outputs(self, y: Array) -> int:
        return int(y.max()) + 1

    def strata(self, y: Array) -> NDArray[np.int64]:
        return y

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs.float(), y)

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = outputs.float()
        return {"loss": cross_entropy(logits, y, reduction="none"), "main": logits.argmax(1) == y}


class Tokens(Problem):
    """The next token at every position of a text. Targets (n, length) int64, -1 where padded; outputs (n, length,
    vocabulary). With targets (n,), only the token after the text is predicted; outputs are (n, vocabulary)."""

    def targets(self, where: str, y: Array) -> NDArray[np.int64]:
        found = whole_numbers(y)
        if found is None or found.ndim not in (1, 2) or 0 in found.shape:
            raise ConfigError(
                f"{where} must be whole numbers of shape (n,) or (n, length), got {y.dtype} of shape {y.shape}"
            )
        wrong = np.argwhere((found < PADDING) | (found >= 1_000_000))
        if len(wrong):
            place = tuple(wrong[0].tolist())
            raise ConfigError(f"{where}{list(place)} is {found[place]}; tokens are 0 to 999999, and -1 is padding")
        empty = np.flatnonzero((found.reshape(len(found), -1) == PADDING).all(1))
        if len(empty):
            raise ConfigError(f"{where}[{empty[0]}] is nothing but padding (-1); drop such samples")
        return found

    def outputs(self, y: Array) -> int:
        return int(y.max()) + 1

    def output_shape(self, y: Array, outputs: int) -> tuple[int, ...]:
        return (*y.shape, outputs)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs.float().flatten(0, -2), y.flatten(), ignore_index=PADDING)

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits, y = outputs.float(), y.reshape(len(y), -1)
        scored = y != PADDING
        losses = cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=PADDING, reduction="none")
        right = (logits.argmax(-1).reshape(y.shape) == y) & scored
        return {"loss": losses.view(y.shape).double().sum(1), "main": right.sum(1), "parts": scored.sum(1)}

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        return {**super().metrics(means), "perplexity": math.exp(min(means["loss"], 700.0))}


class Regression(Problem):
    """One or more numbers per sample, mean squared error. Targets and outputs are (n, targets)."""

    goal = Goal("absolute_error", higher_is_better=False, percent=False)

    def targets(self, where: str, y: Array) -> NDArray[np.float32]:
        return numbers(where, y)

    def outputs(self, y: Array) -> int:
        return int(y.shape[1])

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.float() - y).square().mean()

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        error = (outputs.float() - y).double()
        return {"loss": error.square().mean(1), "main": error.abs().mean(1)}

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        return {**super().metrics(means), "root_mean_square_error": math.sqrt(means["loss"])}


class MultiLabel(Problem):
    """Any number of labels per sample, binary cross-entropy in nats. Targets are (n, labels), 0 or 1; outputs likewise,
    and a label is predicted if its output is above 0. The main metric is the F1 score over all labels and samples."""

    goal = Goal("micro_f1")

    def targets(self, where: str, y: Array) -> NDArray[np.float32]:
        found = numbers(where, y)
        wrong = np.argwhere((found != 0) & (found != 1))
        if len(wrong):
            place = tuple(wrong[0].tolist())
            raise ConfigError(f"{where}{list(place)} is {found[place]:g}; a label is 1 if the sample has it, else 0")
        return found

    def outputs(self, y: Array) -> int:
        return int(y.shape[1])

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(outputs.float(), y)

    def scores(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = outputs.float()
        predicted = (logits > 0).double()
        return {
            "loss": binary_cross_entropy_with_logits(logits, y, reduction="none").double().mean(1),
            "main": (predicted == y).double().mean(1),  # of one sample, where F1 is not a mean
            "hits": (predicted * y).sum(1),
            "claims": (predicted + y).sum(1),
        }

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        f1 = 2 * means["hits"] / means["claims"] if means["claims"] else 1.0
        return {self.goal.metric: f1, "label_accuracy": means["main"]}


PROBLEMS: dict[str, type[Problem]] = {
    "classification": Classification,
    "tokens": Tokens,
    "regression": Regression,
    "multilabel": MultiLabel,
}
