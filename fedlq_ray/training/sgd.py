"""The clients' SGD: passes over a shard that update a flat model in place."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.models import FlatModel
from fedlq_ray.problems import Classification, Problem
from fedlq_ray.training.augment import augmented

_WARM_UP = 3  # steps before recording, in which libraries choose their kernels and allocate their memory


def samples_of(shard: int, settings: TrainConfig) -> int:
    """Number of samples that a client with a shard of this size uses in one pass."""
    return shard if settings.max_samples is None else min(shard, settings.max_samples)


def _batches(samples: int, size: int) -> list[slice]:
    """Splits a pass into batches of `size`; a last batch of one sample joins the one before (batch-norm needs two)."""
    batches = [slice(start, min(start + size, samples)) for start in range(0, samples, size)]
    if len(batches) > 1 and samples % size == 1:
        batches[-2:] = [slice(batches[-2].start, samples)]
    return batches


def batch_sizes(samples: int, size: int) -> list[int]:
    """Number of samples in each step of a pass over `samples`, in batches of `size`."""
    return [batch.stop - batch.start for batch in _batches(samples, size)]


def _passes(shard: int, samples: int, settings: TrainConfig) -> Iterator[int]:
    """Yields the number of samples of each pass until `samples` are processed."""
    seen = 0
    while seen < samples:
        # At least two samples if the shard has two (batch-norm needs them), even if only one is left to process.
        size = min(samples_of(shard, settings), max(2, samples - seen))
        yield size
        seen += size


def steps_of(shard: int, samples: int, settings: TrainConfig) -> int:
    """Number of steps in which a client with a shard of this size processes `samples`."""
    return sum(len(batch_sizes(size, settings.batch_size)) for size in _passes(shard, samples, settings))


class Batches:
    """A client's batches in a round, as (inputs, targets) on the model's device; the same ones each time.

    Args:
        x, y: inputs (n, ...) and targets (n, ...) as stored.
        normalise: converts stored inputs to the model's inputs, float32 or int64, on the model's device.
        samples: number of samples to process, in as many passes as needed.
        rng: source of the order of samples.
    Attributes:
        seen: number of samples in all batches.
    """

    def __init__(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        normalise: Callable[[NDArray[Any]], Tensor],
        samples: int,
        rng: np.random.Generator,
        settings: TrainConfig,
    ) -> None:
        self._x, self._y, self._normalise, self._size = x, y, normalise, settings.batch_size
        self._orders = [rng.permutation(len(y))[:size] for size in _passes(len(y), samples, settings)]
        self._how = settings.augment
        self._seed = 0 if self._how == "none" else int(rng.integers(2**63))
        self.seen = sum(map(len, self._orders))

    def __len__(self) -> int:
        return sum(len(batch_sizes(len(order), self._size)) for order in self._orders)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, order in enumerate(self._orders):
            inputs = self._normalise(self._x[order])
            if self._how != "none":
                inputs = augmented(inputs, self._how, np.random.default_rng([self._seed, number]))
            targets = torch.from_numpy(self._y[order]).to(inputs.device)
            for batch in _batches(len(order), self._size):
                yield inputs[batch], targets[batch]


def lr_at(settings: TrainConfig, step: int) -> float:
    """The clients' learning rate in a step of the server; in a synchronous run, a round."""
    match settings.lr_schedule:
        case "exponential":
            lr = settings.lr * settings.lr_decay**step
        case "steps":
            lr = settings.lr * settings.lr_decay ** (step // settings.lr_rounds)
        case "cosine":
            way = min(step / settings.lr_rounds, 1.0)
            lr = settings.lr_min + (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * way)) / 2
        case _:
            lr = settings.lr
    return max(lr, settings.lr_min)


class LocalSGD:
    """Trains one model for one client after another; they share nothing but the model's weights.

    Adam and AdamW are PyTorch's. A step of SGD equals that of torch.optim.SGD bit for bit; that class imports PyTorch's
    compiler on first use, which takes a second and 70 MB in each process that trains.

    Args:
        model: holds the global weights when `train` begins, and the client's own when it ends.
        problem: has the loss.
        record: on a GPU, record a step for each batch size that recurs, and replay it: one launch instead of a hundred.
            Only for models that run the same operations at every step, whatever the input.
    """

    def __init__(
        self, model: FlatModel, settings: TrainConfig, problem: Problem = Classification(), *, record: bool = False
    ) -> None:
        self.model, self.settings, self.problem = model, settings, problem
        self.velocity = torch.zeros_like(model.grad) if settings.momentum else None
        self.anchor = torch.zeros_like(model.grad) if settings.prox_mu else None  # the weights that FedProx pulls to
        self.loss = torch.zeros((), dtype=torch.float64, device=model.device)  # sum over the samples seen
        self.arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext
        if settings.precision == "bfloat16":  # without a cache, which a recorded step must not use
            self.arithmetic = partial(torch.autocast, model.device.type, torch.bfloat16, cache_enabled=False)
        plain = settings.optimizer == "sgd" and settings.lr_schedule == "constant"
        self.record = record and plain and model.device.type == "cuda"  # a record has its learning rate in it
        self.lr = settings.lr
        self.adam: torch.optim.Optimizer | None = None
        self.recorded: dict[int, _Recorded | None] = {}  # by batch size; None: seen once

    def train(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        *,
        normalise: Callable[[NDArray[Any]], Tensor],
        samples: int,
        rng: np.random.Generator,
        step: int = 0,
    ) -> float:
        """Train on one shard; returns the mean loss over all samples seen.

        Args:
            x, y, normalise, samples, rng: as for `Batches`.
            step: of the server; it decides the learning rate.
        """
        self.lr = lr_at(self.settings, step)
        if self.settings.optimizer != "sgd":
            self.adam = _adam(self.model, self.settings, self.lr)
        self.model.module.train()
        self.loss.zero_()
        if self.velocity is not None:
            self.velocity.zero_()
        if self.anchor is not None:
            self.anchor.copy_(self.model.storage[: len(self.anchor)])
        take = self._replay if self.record else self._step
        batches = Batches(x, y, normalise, samples, rng, self.settings)
        for inputs, targets in batches:
            take(inputs, targets)
        return float(self.loss) / batches.seen

    def _step(self, x: Tensor, y: Tensor) -> None:
        model, settings = self.model, self.settings
        model.grad.zero_()
        with self.arithmetic():
            outputs = model.module(x)
        loss = self.problem.loss(outputs, y)
        loss.backward()
        if self.anchor is not None:  # the gradient of mu / 2 |w - anchor|^2
            model.grad.add_(model.storage[: len(self.anchor)] - self.anchor, alpha=settings.prox_mu)
        if settings.max_grad_norm is not None:
            norm = model.grad.norm().double().clamp_min(1e-30)
            model.grad.mul_((settings.max_grad_norm / norm).clamp_max(1.0).float())
        if self.adam is not None:
            self.adam.step()
            self.loss += loss.detach() * len(y)
            return
        weights, gradient = model.storage[: len(model.grad)], model.grad
        if settings.weight_decay:
            gradient = gradient.add(weights, alpha=settings.weight_decay)
        if self.velocity is not None:
            velocity = self.velocity.mul_(settings.momentum).add_(gradient)
            gradient = gradient.add(velocity, alpha=settings.momentum) if settings.nesterov else velocity
        weights.add_(gradient, alpha=-self.lr)
        self.loss += loss.detach() * len(y)

    def _replay(self, x: Tensor, y: Tensor) -> None:
        """Take a step, replaying its record if there is one."""
        size = len(y)
        if size not in self.recorded and size != self.settings.batch_size:
            self.recorded[size] = None
            return self._step(x, y)
        recorded = self.recorded.get(size) or self._record(x, y)
        self.recorded[size] = recorded
        recorded.x.copy_(x)
        recorded.y.copy_(y)
        recorded.graph.replay()

    def _record(self, x: Tensor, y: Tensor) -> "_Recorded":
        """Record the step as a graph; the model and all other state is restored."""
        kept = [self.model.storage, self.loss, *([] if self.velocity is None else [self.velocity])]
        kept += [buffer for buffer in self.model.module.buffers() if not buffer.is_floating_point()]
        before = [tensor.clone() for tensor in kept]
        recorded = _Recorded(torch.cuda.CUDAGraph(), x.clone(), y.clone())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step(recorded.x, recorded.y)
        # Records share their memory, because nothing in it is needed after a replay.
        shared = next((known.graph.pool() for known in self.recorded.values() if known), None)
        with torch.cuda.graph(recorded.graph, stream=stream, pool=shared):
            self._step(recorded.x, recorded.y)
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        return recorded


def _adam(model: FlatModel, settings: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """PyTorch's optimizer of the flat parameters, with a fresh state."""
    flat = torch.nn.Parameter(model.storage[: len(model.grad)])
    flat.grad = model.grad
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind([flat], lr, weight_decay=settings.weight_decay, foreach=False)


class _Recorded(NamedTuple):
    """A recorded step, and the batch that it reads."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
