"""What the server does with a cohort's mean update: add it, or step along it with momentum or Adam.

Reddi et al., "Adaptive federated optimization", ICLR 2021, arXiv:2003.00295, Algorithm 2 (FedAvgM, FedAdam): the mean
update takes the place of a negative gradient. As there, Adam's moments are not bias-corrected.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedlq_ray.config.settings import ServerConfig


class Moments(NamedTuple):
    """The optimizer's state, (d,) float32 each; None before the first step, and where the optimizer has none."""

    momentum: Tensor | None = None
    square: Tensor | None = None


def step(config: ServerConfig, moments: Moments, update: Tensor) -> tuple[Tensor, Moments]:
    """What to add to the weights, (d,) float32, for this mean update; and the new moments."""
    if config.optimizer == "none":
        return (update if config.lr == 1 else config.lr * update), moments
    before = torch.zeros_like(update) if moments.momentum is None else moments.momentum
    if config.optimizer == "momentum":
        momentum = config.momentum * before + update
        return config.lr * momentum, Moments(momentum, moments.square)
    momentum = config.momentum * before + (1 - config.momentum) * update
    square = torch.zeros_like(update) if moments.square is None else moments.square
    square = config.beta2 * square + (1 - config.beta2) * update.square()
    return config.lr * momentum / (square.sqrt() + config.tau), Moments(momentum, square)
