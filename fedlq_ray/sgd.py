"""The clients' SGD: passes over a shard, a step at a time, in place on a flat model."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlq_ray.config import TrainConfig
from fedlq_ray.models import FlatModel

_WARM_UP = 3  # steps before one is recorded, in which libraries choose their kernels and take their memory


def samples_of(shard: int, settings: TrainConfig) -> int:
    """Samples that a client with a shard of this size uses in a pass."""
    return shard if settings.max_samples is None else min(shard, settings.max_samples)


def _batches(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """`order` in pieces of `size`; a last one of a single sample joins its neighbour (batch-norm needs two)."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


class LocalSGD:
    """Trains one model for client after client; nothing but the model's weights goes from one to the next.

    The step is that of torch.optim.SGD, bit for bit. That class imports PyTorch's compiler when it is first made, a
    second and 70 MB in each process that trains.

    Args:
        model: holds the global weights when `train` begins, and the client's own when it ends.
        record: on a GPU, record the step once and replay it: one launch in place of a hundred. For models that do the
            same operations at every step, on whatever input.
    """

    def __init__(self, model: FlatModel, settings: TrainConfig, *, record: bool = False) -> None:
        self.model, self.settings = model, settings
        self.velocity = torch.zeros_like(model.grad) if settings.momentum else None
        self.anchor = torch.zeros_like(model.grad) if settings.prox_mu else None
        self.loss = torch.zeros((), dtype=torch.float64, device=model.device)  # sum over the samples seen
        self.record = record and model.device.type == "cuda"
        self.recorded: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None

    def train(self, x: Tensor, y: Tensor, *, samples: int, rng: np.random.Generator) -> float:
        """Train on one shard; gives the mean loss of all samples seen.

        Args:
            x, y: normalised inputs (n, ...) float32, labels (n,) int64.
            samples: how many to go through, in as many passes as that takes.
            rng: source of the order of samples.
        """
        self.model.module.train()
        self.loss.zero_()
        if self.velocity is not None:
            self.velocity.zero_()
        if self.anchor is not None:
            self.anchor.copy_(self.model.vector[: self.model.num_parameters])
        x, y = x.to(self.model.device), y.to(self.model.device)
        seen = 0
        for batch in self._order(len(y), samples, rng):
            index = torch.from_numpy(batch).to(self.model.device)
            if self.record and len(batch) == self.settings.batch_size:
                self._replay(x[index], y[index])
            else:
                self._step(x[index], y[index])
            seen += len(batch)
        return float(self.loss) / seen

    def _order(self, shard: int, samples: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        seen = 0
        while seen < samples:
            # Two samples at least, where there are two (batch-norm needs them), though one were left to go through.
            order = rng.permutation(shard)[: min(samples_of(shard, self.settings), max(2, samples - seen))]
            yield from _batches(order, self.settings.batch_size)
            seen += len(order)

    def _step(self, x: Tensor, y: Tensor) -> None:
        model, settings = self.model, self.settings
        model.grad.zero_()
        loss = cross_entropy(model.module(x), y)
        loss.backward()
        if self.anchor is not None:  # the gradient of mu / 2 |w - anchor|^2
            model.grad.add_(model.vector[: model.num_parameters] - self.anchor, alpha=settings.prox_mu)
        if settings.max_grad_norm is not None:
            norm = model.grad.norm().double().clamp_min(1e-30)
            model.grad.mul_((settings.max_grad_norm / norm).clamp_max(1.0).float())
        for start, stop in model.trained:
            weights, gradient = model.vector[start:stop], model.grad[start:stop]
            if settings.weight_decay:
                gradient = gradient.add(weights, alpha=settings.weight_decay)
            if self.velocity is not None:
                gradient = self.velocity[start:stop].mul_(settings.momentum).add_(gradient)
            weights.add_(gradient, alpha=-settings.lr)
        self.loss += loss.detach() * len(y)

    def _replay(self, x: Tensor, y: Tensor) -> None:
        if self.recorded is None:
            self.recorded = self._record(x, y)
        graph, its_x, its_y = self.recorded
        its_x.copy_(x)
        its_y.copy_(y)
        graph.replay()

    def _record(self, x: Tensor, y: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """The step as a graph, and the tensors it reads its batch from; everything else is as it was."""
        kept = [self.model.vector, self.loss, *([] if self.velocity is None else [self.velocity])]
        kept += [buffer for buffer in self.model.module.buffers() if not buffer.is_floating_point()]
        before = [tensor.clone() for tensor in kept]
        x, y = x.clone(), y.clone()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step(x, y)
        with torch.cuda.graph(graph, stream=stream):
            self._step(x, y)
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        return graph, x, y
