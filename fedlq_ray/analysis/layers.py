"""The paper's motivating analysis: what each layer saves and costs at each level, on a partly trained model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.config.load import Config
from fedlq_ray.config.schemes import FedLQ, StrategyConfig
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Timed, Worker, prepare
from fedlq_ray.hosts.serial import Done, SerialHost
from fedlq_ray.quantization import family
from fedlq_ray.seeding import seeded
from fedlq_ray.significance import Measurement, gather, in_blocks, measure, memory_saving
from fedlq_ray.strategies import make
from fedlq_ray.training.device import reproducible
from fedlq_ray.training.local import Evaluation, evaluate
from fedlq_ray.training.payloads import PAYLOADS

__all__ = ["LayerAnalysis", "analyse", "analyses"]


@dataclass(frozen=True)
class LayerAnalysis:
    """Tables (layers, levels): memory saved, and the cost of quantizing that layer alone.

    Args:
        rounds: rounds of training before the measurement.
        samples: number of held-out samples used for all measurements.
        before: loss and metrics without quantization, on the same samples.
        loss, accuracy: measured, where accuracy stands for the main metric; the noise is the standard error over
            blocks, which covers samples and rounding.
        predicted: the requested metrics, by name.
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
        """Loss rise per memory saved; negative only because of noise, or if quantizing helps."""
        return self.loss.drop / self.saving

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Mask of the cells whose loss rise or fall exceeds twice its standard error."""
        return np.abs(self.loss.drop) > 2 * self.loss.noise


class _Unwatched(SerialHost):
    """Skips evaluation, because its result is not used here."""

    def evaluate(self, weights: Tensor) -> Done:
        return Done(Timed(Evaluation({}, 0.0), 0.0))


def _unheard(record: Record) -> None:
    pass


def analyse(config: Config, watch: Callable[[Record], None] = _unheard) -> LayerAnalysis:
    """Trains `rounds` rounds of FedAvg in this process, then measures every layer on held-out training samples.

    `watch` is called with the record of each round.
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
    """As `analyse`, at each of these rounds of one training, for each payload, and with additional metrics."""
    measured = config.strategy
    if not isinstance(measured, FedLQ):
        raise ConfigError(f"strategy.name: {measured.name} has no levels to measure; use fedlq")
    last = max(rounds)
    plain = config.model_copy(
        update={
            "strategy": StrategyConfig(name="fedavg"),
            "rounds": last,
            "evaluate_every": last,
            "target": None,
            "stop_at_target": False,
        }
    )
    task = prepare(plain)
    with reproducible(plain.train.device):
        host: Any = _Unwatched(task)
        strategy = make(host.worker.context)
        state = begin(task, strategy)
        for step in run(task, strategy, host, state, Timing()):
            watch(step.record)
            if step.state.round in rounds:
                for payload in payloads:
                    with seeded(task.config.seed, "measure", step.record.round):
                        found = _analysis(host.worker, measured, step.state, payload, metrics)
                    yield found


def _analysis(worker: Worker, config: FedLQ, state: ServerState, payload: str, metrics: Sequence[str]) -> LayerAnalysis:
    context = replace(worker.context, config=config, quantizer=family(config.quantizer))
    levels, layers = tuple(level for level in context.config.levels if level < 32), context.quantized
    sizes = tuple(layer.size for layer in layers)
    sent = PAYLOADS[payload].probed(state.weights, state.update)
    x, y = worker.probe_data(context.config.probe_samples)
    quantizers = [context.quantizer_at(level) for level in levels]

    what = (worker.model, state.weights - sent, sent, layers, quantizers)
    take = partial(gather, *what, seed=context.seed, round=state.round, problem=worker.task.problem)
    found = measure(in_blocks(take, x, y), "loss", "accuracy", *metrics)
    before = evaluate(worker.model, state.weights, x, y, worker.task.problem)
    saving = memory_saving(sizes, levels)
    names = tuple(layer.name for layer in layers)
    loss, accuracy, predicted = found["loss"], found["accuracy"], {name: found[name] for name in metrics}
    return LayerAnalysis(state.round, payload, names, sizes, levels, saving, len(y), before, loss, accuracy, predicted)
