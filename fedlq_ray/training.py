"""A client's round and the evaluation, as pure functions: no clock, no Ray, no state of their own."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlq_ray.config import TrainConfig
from fedlq_ray.errors import ClientError, DivergedError, PayloadError
from fedlq_ray.models import FlatModel, Layer
from fedlq_ray.quantization import Family, Segment, decode, encode
from fedlq_ray.seeding import numpy_rng, torch_rng, torch_seed

__all__ = ["Plan"]

EVALUATION_CHUNK = 500  # samples; fixed, so that sums are the same whoever evaluates


Feedback = bool | Literal["ef21"]


@dataclass(frozen=True)
class Plan:
    """What a client is to send in a round.

    Args:
        payload: "update" or "model".
        segments: the pieces that cover the flat vector in order, each with its quantizer; or, where the client chooses
            by what it has to send, a function from that vector (d,) to them, which pickles.
        error_feedback: add what was lost in earlier rounds, and keep what is lost in this one; "ef21": send the
            difference from what the server has of this client, and keep that.
    """

    payload: str
    segments: tuple[Segment, ...] | Callable[[Tensor], tuple[Segment, ...]]
    error_feedback: Feedback = False


@dataclass(frozen=True)
class Reply:
    """What came of a client's round: the payload's bytes, the mean training loss, samples processed, and the wall
    seconds of quantizing, which go to timing.json alone."""

    payload: bytes
    train_loss: float
    samples: int
    encode_s: float


def samples_of(shard: int, train: TrainConfig) -> int:
    """Samples that a client with a shard of this size uses in a pass."""
    return shard if train.max_samples is None else min(shard, train.max_samples)


def _batches(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """`order` in pieces of `size`; a last one of a single sample joins its neighbour (batch-norm needs two)."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def train_locally(
    model: FlatModel, x: Tensor, y: Tensor, train: TrainConfig, *, samples: int, rng: np.random.Generator
) -> float:
    """SGD on one shard, in place; gives the mean loss of all samples seen.

    Args:
        model: holds the global weights when it comes in, and the client's own when it goes out.
        x, y: normalised inputs (n, ...) float32, labels (n,) int64.
        samples: how many to go through, in as many passes as that takes.
        rng: source of the order of samples.
    """
    model.module.train()
    pieces = [(model.vector[start:stop], model.grad[start:stop]) for start, stop in model.trained]
    velocities: list[Tensor] = []
    anchor = model.vector[: model.num_parameters].clone() if train.prox_mu else None
    total, seen = torch.zeros((), dtype=torch.float64), 0
    while seen < samples:
        # Two samples at least, where there are two (batch-norm needs them), though one were left to go through.
        order = rng.permutation(len(y))[: min(samples_of(len(y), train), max(2, samples - seen))]
        for batch in _batches(order, train.batch_size):
            index = torch.from_numpy(batch)
            model.grad.zero_()
            loss = cross_entropy(model.module(x[index]), y[index])
            loss.backward()
            if anchor is not None:  # the gradient of mu / 2 |w - anchor|^2
                model.grad.add_(model.vector[: model.num_parameters] - anchor, alpha=train.prox_mu)
            if train.max_grad_norm is not None:
                model.grad.mul_(min(1.0, train.max_grad_norm / max(float(model.grad.norm()), 1e-30)))
            _step(pieces, velocities, train)
            total += loss.detach() * len(batch)
            seen += len(batch)
    return float(total) / seen


def _step(pieces: Sequence[tuple[Tensor, Tensor]], velocities: list[Tensor], train: TrainConfig) -> None:
    """SGD's step of weights along gradients, in place, as torch.optim.SGD takes it, bit for bit.

    That class imports PyTorch's compiler when it is first made, a second and 70 MB in each process that trains.
    """
    for index, (weights, gradient) in enumerate(pieces):
        if train.weight_decay:
            gradient = gradient.add(weights, alpha=train.weight_decay)
        if train.momentum:
            if len(velocities) == index:
                velocities.append(gradient.clone())
            else:
                velocities[index].mul_(train.momentum).add_(gradient)
            gradient = velocities[index]
        weights.add_(gradient, alpha=-train.lr)


def client_round(
    model: FlatModel,
    x: NDArray[Any],
    y: NDArray[np.int64],
    *,
    normalise: Callable[[NDArray[Any]], Tensor],
    weights: Tensor,
    memory: Tensor | None,
    plan: Plan,
    train: TrainConfig,
    samples: int,
    seed: int,
    round: int,
    client: int,
    custom: Family | None = None,
) -> tuple[Reply, Tensor | None]:
    """One client's round: (weights, memory, plan, seed) to (payload, memory).

    Args:
        model: scratch space of the right shape; what it holds does not matter.
        x, y: the client's training shard, as stored.
        weights: the global flat vector (d,) float32; not changed.
        memory: error feedback's (d,) float32, or None for none yet.
        samples: to go through; the update of all but buffers is scaled to what the base work comes to (FedNova).
        custom: the user's quantizer by level, where there is one.
    Returns:
        The reply, and the new memory (None without error feedback).
    Raises:
        ClientError: training or a user's part failed, or training diverged; names the layer.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # a model's dropout draws from the global generator
            torch.manual_seed(torch_seed(seed, "model", round, client))
            model.load(weights)
            rng = numpy_rng(seed, "batches", round, client)
            loss = train_locally(model, normalise(x), torch.from_numpy(y.copy()), train, samples=samples, rng=rng)
        _require_finite(model.vector, model.layers, round, client)
        started = time.perf_counter()
        update = model.vector - weights
        update[: model.num_parameters] *= train.local_epochs * samples_of(len(y), train) / samples
        sent = update if plan.payload == "update" else weights + update
        if plan.error_feedback and memory is not None:
            sent = sent - memory if plan.error_feedback == "ef21" else sent + memory
        segments = plan.segments(sent) if callable(plan.segments) else plan.segments
        noise = torch_rng(seed, "quantize", round, client)
        payload = encode(sent, segments, kind=plan.payload, round=round, client=client, rng=noise)
        if plan.error_feedback:
            received = decode(payload, len(sent), kind=plan.payload, round=round, client=client, custom=custom)
            if plan.error_feedback == "ef21":
                memory = received.vector if memory is None else memory + received.vector
            else:
                memory = sent - received.vector
        encode_s = time.perf_counter() - started
    except ClientError:
        raise
    except PayloadError as exc:
        raise ClientError(f"its quantized payload cannot be read back: {exc}", round=round, client=client) from exc
    except Exception as exc:  # a user's model or quantizer may raise anything
        raise ClientError(f"{type(exc).__name__}: {exc}", round=round, client=client) from exc
    reply = Reply(payload, loss, samples, encode_s)
    return reply, memory if plan.error_feedback else None


def _require_finite(vector: Tensor, layers: tuple[Layer, ...], round: int, client: int) -> None:
    if bool(torch.isfinite(vector).all()):
        return
    for layer in layers:
        piece = vector[layer.start : layer.stop]
        bad = int((~torch.isfinite(piece)).sum())
        if bad:
            raise DivergedError(
                f"training diverged: layer {layer.name} has {bad} of {layer.size} values that are NaN or infinite; "
                "lower train.lr",
                round=round,
                client=client,
            )


@dataclass(frozen=True)
class Evaluation:
    """Fraction of samples that are classified rightly, and the mean cross-entropy."""

    accuracy: float
    loss: float


@torch.no_grad()
def sample_losses(model: FlatModel, weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's loss (n,) and whether it is classified rightly (n,) bool, in evaluation mode."""
    model.load(weights)
    model.module.eval()
    outputs = [
        model.module(x[start : start + EVALUATION_CHUNK]).float() for start in range(0, len(y), EVALUATION_CHUNK)
    ]
    logits = torch.cat(outputs)
    return cross_entropy(logits, y, reduction="none").double(), logits.argmax(1) == y


def evaluate(model: FlatModel, weights: Tensor, x: Tensor, y: Tensor) -> Evaluation:
    """Accuracy and loss of a flat vector on normalised inputs (n, ...) and labels (n,)."""
    losses, right = sample_losses(model, weights, x, y)
    return Evaluation(int(right.sum()) / len(y), float(losses.mean()))
