"""The paper's motivating analysis: what each layer saves and costs at each level, on a model trained a while."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlq_ray.config import Config
from fedlq_ray.device import reproducible
from fedlq_ray.quantization import MinMax, Qsgd
from fedlq_ray.rounds import Outcome, Record, run
from fedlq_ray.serial import Done, SerialHost
from fedlq_ray.significance import Evidence, Measurement, gather, measure, memory_saving
from fedlq_ray.strategies import make
from fedlq_ray.task import Timed, Workplace, prepare
from fedlq_ray.training import Evaluation, sample_losses

__all__ = ["LayerAnalysis", "analyse", "analyses"]

BLOCKS = 16  # of the held-out samples, each with rounding noise of its own
UNBIASED = (MinMax, Qsgd)


@dataclass(frozen=True)
class LayerAnalysis:
    """Tables (layers, levels): memory saved, and what quantizing that layer alone costs.

    Args:
        rounds: of training before it.
        samples: held-out ones that all is measured on.
        before: loss and accuracy without quantization, on the same samples.
        loss, accuracy: measured; the noise is the standard error over blocks, of samples and of rounding.
        predicted: what metrics that were asked for say, by name.
    """

    rounds: int
    payload: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    levels: tuple[int, ...]
    saving: NDArray[np.float64]
    samples: int
    before: Evaluation
    loss: Measurement
    accuracy: Measurement
    predicted: Mapping[str, Measurement]

    @property
    def significance(self) -> NDArray[np.float64]:
        """Loss rise per memory saved; below zero only by noise, or where quantizing helps."""
        return self.loss.drop / self.saving

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Where the loss rise is beyond twice its standard error, either way."""
        return np.abs(self.loss.drop) > 2 * self.loss.noise


class _Unwatched(SerialHost):
    """Evaluates nothing, as nobody reads it here."""

    def evaluate(self, weights: Tensor) -> Done:
        return Done(Timed(Evaluation(0.0, 0.0), 0.0))


def _unheard(record: Record) -> None:
    pass


def analyse(config: Config, watch: Callable[[Record], None] = _unheard) -> LayerAnalysis:
    """Train `rounds` rounds of FedAvg in this process, then measure every layer on held-out training samples.

    `watch` hears of each round.
    """
    (found,) = analyses(config, (config.rounds,), (config.strategy.payload,), watch=watch)
    return found


def analyses(
    config: Config,
    rounds: Sequence[int],
    payloads: Sequence[str],
    metrics: Sequence[str] = (),
    watch: Callable[[Record], None] = _unheard,
) -> Iterator[LayerAnalysis]:
    """The same after each of these numbers of rounds of one training, for each payload, and in further metrics."""
    settings = {"name": "fedavg", "payload": "update", "error_feedback": None}
    last = max(rounds)
    plain = config.model_copy(
        update={
            "strategy": config.strategy.model_copy(update=settings),
            "rounds": last,
            "evaluate_every": last,
            "target_accuracy": None,
            "stop_at_target": False,
        }
    )
    task = prepare(plain)
    with reproducible(plain.train.device):
        host: Any = _Unwatched(task)
        outcome = Outcome(host.place.initial_weights())
        for record in run(task, make(host.place.setting), host, outcome):
            watch(record)
            if record["round"] + 1 in rounds:
                for payload in payloads:
                    yield _analysis(host.place, outcome, record["round"] + 1, payload, metrics)


def _analysis(place: Workplace, outcome: Outcome, rounds: int, payload: str, metrics: Sequence[str]) -> LayerAnalysis:
    setting = place.setting
    levels, layers = tuple(level for level in setting.config.levels if level < 32), setting.quantized
    sizes = tuple(layer.size for layer in layers)
    sent = outcome.weights if payload == "model" else outcome.update
    x, y = place.probe_data(setting.config.probe_samples)
    quantizers = [setting.quantizer_at(level) for level in levels]

    def evidence(x: Tensor, y: Tensor, noise: int) -> Evidence:
        what = (place.model, outcome.weights - sent, sent, layers, quantizers, x, y)
        return gather(*what, seed=setting.seed, round=noise)

    count = min(BLOCKS, len(y))
    blocks = zip(x.tensor_split(count), y.tensor_split(count), strict=True)
    before, loss, accuracy = _measured(
        (evidence(*block, rounds * BLOCKS + i) for i, block in enumerate(blocks)), place.task.quantizer in UNBIASED
    )
    predicted = {name: measure(evidence(x, y, rounds * BLOCKS), name) for name in metrics}
    saving = memory_saving(sizes, levels)
    names = tuple(layer.name for layer in layers)
    return LayerAnalysis(rounds, payload, names, sizes, levels, saving, len(y), before, loss, accuracy, predicted)


def _measured(blocks: Iterator[Evidence], unbiased: bool) -> tuple[Evaluation, Measurement, Measurement]:
    """Loss and accuracy before, and what quantizing each layer takes from them.

    Of the loss the first-order term g'e is taken off where the quantizer is unbiased: its expectation is then zero, and
    the rest would drown in it.
    """
    before, drops, distortion, weights = [], [], [], []
    for given in blocks:
        losses, right = sample_losses(given.model, given.weights, given.x, given.y)
        errors, drop = (given.decoded - given.sent).double(), np.zeros((2, *given.shape))
        gradient = _gradient(given) if unbiased else torch.zeros(errors.shape[1], dtype=torch.float64)
        square = np.zeros(given.shape)
        for row, layer in enumerate(given.layers):
            piece = slice(layer.start, layer.stop)
            for column in range(given.shape[1]):
                error = errors[column, piece]
                after, still = sample_losses(given.model, given.with_layer(layer, column), given.x, given.y)
                drop[0, row, column] = float((after - losses).mean() - error @ gradient[piece])
                drop[1, row, column] = float(right.double().mean() - still.double().mean())
                square[row, column] = float(error @ error)
        before.append((float(right.double().mean()), float(losses.mean())))
        drops.append(drop)
        distortion.append(square)
        weights.append(len(given.y))
    by = np.array(weights) / sum(weights)  # blocks differ by a sample at most
    found = np.nan_to_num(np.array(drops), nan=1e30, posinf=1e30, neginf=-1e30)
    mean = np.tensordot(by, found, 1)
    noise = found.std(0, ddof=1) / len(by) ** 0.5 if len(by) > 1 else np.zeros_like(mean)
    squares = np.tensordot(by, np.array(distortion), 1)
    accuracy, loss = by @ np.array(before)
    measured = [Measurement(mean[i], noise[i], squares) for i in range(2)]
    return Evaluation(float(accuracy), float(loss)), measured[0], measured[1]


def _gradient(given: Evidence) -> Tensor:
    """Of the block's mean loss at the weights without quantization: (d,) float64, zero for buffers."""
    model = given.model
    model.load(given.weights)
    model.module.eval()
    model.grad.zero_()
    cross_entropy(model.module(given.x).float(), given.y).backward()
    gradient = torch.zeros(len(given.sent), dtype=torch.float64)
    gradient[: model.num_parameters] = model.flat(model.grad)
    return gradient
