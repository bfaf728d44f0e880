"""What the server does with a cohort's mean update: add it, or step along it with momentum or Adam.

Reddi et al., "Adaptive federated optimization", ICLR 2021, arXiv:2003.00295, Algorithm 2 (FedAvgM, FedAdam): the mean
update takes the place of a negative gradient. Departs from it: Adam's moments are not bias-corrected there nor here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlq_ray.settings import ServerConfig


@dataclass
class ServerOptimizer:
    """Holds the moments, (d,) float32 each, from round to round."""

    config: ServerConfig
    momentum: Tensor | None = None
    square: Tensor | None = None

    def step(self, update: Tensor) -> Tensor:
        """What to add to the weights, (d,) float32, for this mean update."""
        config = self.config
        if config.optimizer == "none":
            return update if config.lr == 1 else config.lr * update
        before = torch.zeros_like(update) if self.momentum is None else self.momentum
        if config.optimizer == "momentum":
            self.momentum = config.momentum * before + update
            return config.lr * self.momentum
        self.momentum = config.momentum * before + (1 - config.momentum) * update
        square = torch.zeros_like(update) if self.square is None else self.square
        self.square = config.beta2 * square + (1 - config.beta2) * update.square()
        return config.lr * self.momentum / (self.square.sqrt() + config.tau)
