"""A client's round and the evaluation, as pure functions: no clock, no Ray, no state of their own."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.errors import ClientError, ConfigError, DivergedError, PayloadError
from fedlq_ray.models import FlatModel, Layer
from fedlq_ray.problems import Classification, Problem, score
from fedlq_ray.quantization import Family, Segment, send
from fedlq_ray.quantization.registry import NUMBERS
from fedlq_ray.seeding import numpy_rng, seeded, torch_rng
from fedlq_ray.training.own import OwnTraining, State, packed, unpacked
from fedlq_ray.training.payloads import MEMORIES, PAYLOADS, Feedback
from fedlq_ray.training.sgd import LocalSGD, samples_of

__all__ = ["Plan"]

EVALUATION_CHUNK = 500  # samples; fixed, so that sums are the same in every process


@dataclass(frozen=True)
class Plan:
    """What a client sends in a round.

    Args:
        payload: "update" or "model".
        segments: the pieces that cover the flat vector in order, each with its quantizer. If the client chooses by the
            vector (d,) that it will send: a function from that vector to the pieces, which can be pickled.
        error_feedback: True adds what was lost in earlier rounds and keeps what this round loses; "ef21" sends the
            difference from the server's vector of this client, and keeps that vector; "cafe" sends the difference from
            the last mean update.
        weight: the weight in the average, relative to the sum over clients that answer; None: its samples per pass.
    """

    payload: str
    segments: tuple[Segment, ...] | Callable[[Tensor], tuple[Segment, ...]]
    error_feedback: Feedback = False
    weight: float | None = None


@dataclass(frozen=True)
class Reply:
    """The result of a client's round.

    Attributes:
        train_loss: mean over the samples that it trained on.
        square_error: |Q(x) - x|^2 of the vector x that the payload encodes.
        encode_s: wall seconds of quantizing, which are written only to timing.json.
        moved: whether training changed a parameter.
        square: |update|^2.
        keeps: whether the client has a new memory.
    """

    payload: bytes
    train_loss: float
    samples: int
    square_error: float
    encode_s: float
    moved: bool = True
    square: float = 0.0
    keeps: bool = False


Trainer = LocalSGD | OwnTraining


def client_round(
    trainer: Trainer,
    x: NDArray[Any],
    y: NDArray[Any],
    *,
    normalise: Callable[[NDArray[Any]], Tensor],
    weights: Tensor,
    memory: Tensor | None,
    plan: Plan,
    samples: int,
    seed: int,
    round: int,
    client: int,
    custom: Family | None = None,
    step: int = 0,
) -> tuple[Reply, Tensor | None]:
    """Runs one client's round: (weights, memory, plan, seed) to (payload, memory).

    Args:
        trainer: with a model of the right shape; its weights do not matter.
        x, y: the client's training shard, as stored.
        weights: the global flat vector (d,) float32; it is not changed.
        memory: as `own.packed` returns it: of error feedback, (d,) float32, or with a state; None before the first.
        samples: to train on; the update, except buffers, is scaled to the base work (FedNova).
        custom: the user's quantizer by level, if any.
        step: of the server; it decides the learning rate.
    Returns:
        The reply, and the new memory (None without error feedback and state).
    Raises:
        ClientError: training or a user's part failed, or training diverged; the message names the layer.
    """
    model, kept = trainer.model, MEMORIES[plan.error_feedback]
    before, state = unpacked(memory)
    where = {"round": round, "client": client}
    try:
        gpus = [] if model.device.type == "cpu" else [model.device]
        # Dropout, users' models and users' quantizers draw from the global generators.
        with seeded(seed, "model", round, client, gpus=gpus):
            model.load(weights)
            rng = numpy_rng(seed, "batches", round, client)
            work = {"normalise": normalise, "samples": samples, "rng": rng, "step": step}
            loss, state = _train(trainer, x, y, work, state, round, client)
            trained = _trained(model, round, client)  # the rest is the same for every training device
            started = time.perf_counter()
            update, moved = _update(trainer, trained - weights, len(y), samples)
            sent = kept.before(PAYLOADS[plan.payload].of(weights, update), before)
            segments = _known_segments(plan, sent, custom, round, client)
            noise = torch_rng(seed, "quantize", round, client)
            payload, received = send(sent, segments, kind=plan.payload, rng=noise, custom=custom, **where)
        memory = packed(kept.after(sent, received, before), state, before)
        encode_s = time.perf_counter() - started
    except ClientError:
        raise
    except PayloadError as exc:
        raise ClientError(f"its quantized payload cannot be read back: {exc}", **where) from exc
    except Exception as exc:  # a user's model or quantizer may raise anything
        raise ClientError(f"{type(exc).__name__}: {exc}", **where) from exc
    lost = _square(sent - received)
    reply = Reply(payload, loss, samples, lost, encode_s, moved, _square(update), memory is not None)
    return reply, memory


def _train(
    trainer: Trainer,
    x: NDArray[Any],
    y: NDArray[Any],
    work: Mapping[str, Any],
    state: State | None,
    round: int,
    client: int,
) -> tuple[float, State | None]:
    """The mean loss, and the client's next state."""
    if isinstance(trainer, LocalSGD):
        return trainer.train(x, y, **work), state
    try:
        return trainer.train(x, y, **work, round=round, client=client, state=state)
    except ConfigError as exc:
        raise ClientError(str(exc), round=round, client=client) from exc


def _trained(model: FlatModel, round: int, client: int) -> Tensor:
    """The trained flat vector, checked."""
    trained = model.read()
    _require_finite(trained, model.layers, round, client)
    _require_constants(model, round, client)
    return trained


def _square(vector: Tensor) -> float:
    return float(vector.double().square().sum())


def _update(trainer: Trainer, update: Tensor, shard: int, samples: int) -> tuple[Tensor, bool]:
    """The update scaled to the base work, except buffers (FedNova), and whether training changed a parameter."""
    parameters = update[: trainer.model.num_parameters]
    moved = bool(parameters.any())
    settings = trainer.settings
    parameters *= settings.local_epochs * samples_of(shard, settings) / samples
    return update, moved


def _known_segments(plan: Plan, sent: Tensor, custom: Family | None, round: int, client: int) -> tuple[Segment, ...]:
    """The plan's segments, whose quantizers the server decodes: this package's, and `strategy.quantizer`."""
    segments = plan.segments(sent) if callable(plan.segments) else plan.segments
    for kind in {type(segment.quantizer) for segment in segments}.difference(NUMBERS):
        if custom is None or type(custom(1)) is not kind:
            raise ClientError(
                f"its plan uses {kind.__name__}, which the server does not know; name it as strategy.quantizer",
                round=round,
                client=client,
            )
    return segments


def _require_constants(model: FlatModel, round: int, client: int) -> None:
    """Requires that training changes no buffer that the trial step left unchanged: such buffers are not sent."""
    if changed := model.changed_constants():
        raise ClientError(
            f"training changed buffer {changed[0]}, which the trial step before the run did not change, so it is not "
            "sent; let every training step change it, or register it with persistent=False",
            round=round,
            client=client,
        )


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
    """The problem's metrics by name, the main one first, and the mean loss; and the main metric by client, if samples
    have clients."""

    metrics: Mapping[str, float]
    loss: float
    of_clients: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def sample_scores(
    model: FlatModel, weights: Tensor, x: Tensor, y: Tensor, problem: Problem = Classification()
) -> dict[str, Tensor]:
    """Each sample's scores (n,) as in `Problem.scores`, float64, on the CPU, in evaluation mode."""
    model.load(weights)
    model.module.eval()
    x, y = x.to(model.device), y.to(model.device)
    found = [
        score(problem, model.module(piece), targets)
        for piece, targets in zip(x.split(EVALUATION_CHUNK), y.split(EVALUATION_CHUNK), strict=True)
    ]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def evaluate(
    model: FlatModel,
    weights: Tensor,
    x: Tensor,
    y: Tensor,
    problem: Problem = Classification(),
    clients: NDArray[np.str_] | None = None,
) -> Evaluation:
    """Metrics and loss of a flat vector on a model's inputs (n, ...) and targets (n, ...).

    Args:
        clients: whose sample each is, (n,); with them, the metrics have the main one's mean over clients, and its mean
            over the tenth of the clients that is worst.
    """
    scores = sample_scores(model, weights, x, y, problem)
    found = summarise(problem, scores)
    if clients is None:
        return found
    of_clients, metric = _of_clients(problem, scores, clients), problem.goal.metric
    means = {
        f"{metric}_of_clients": fmean(of_clients.values()),
        f"{metric}_of_worst_clients": fmean(problem.goal.worst(of_clients.values())),
    }
    return Evaluation({**found.metrics, **means}, found.loss, of_clients)


def _of_clients(problem: Problem, scores: Mapping[str, Tensor], clients: NDArray[np.str_]) -> dict[str, float]:
    """The main metric by client, in the order of their ids."""
    found = {}
    for name in np.unique(clients):
        own = torch.from_numpy(np.flatnonzero(clients == name))
        scored = summarise(problem, {key: value[own] for key, value in scores.items()})
        found[str(name)] = scored.metrics[problem.goal.metric]
    return found


def summarise(problem: Problem, scores: Mapping[str, Tensor]) -> Evaluation:
    """The evaluation that samples' scores add up to."""
    parts = float(scores["parts"].sum())
    means = {name: float(value.sum()) / parts for name, value in scores.items()}
    return Evaluation(problem.metrics(means), means["loss"])
