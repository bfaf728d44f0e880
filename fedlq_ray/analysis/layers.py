"""The paper's motivating analysis: what each layer saves and costs at each level, on a model trained a while."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlq_ray.config import Config
from fedlq_ray.rounds import Outcome, run
from fedlq_ray.serial import SerialHost
from fedlq_ray.significance import Measurement, memory_saving
from fedlq_ray.strategies import Probe, make
from fedlq_ray.task import Workplace, prepare


@dataclass(frozen=True)
class LayerAnalysis:
    """Tables (layers, levels): memory saved, and what quantizing that layer alone costs."""

    names: tuple[str, ...]
    levels: tuple[int, ...]
    saving: NDArray[np.float64]
    loss: Measurement
    accuracy: Measurement

    @property
    def significance(self) -> NDArray[np.float64]:
        """Loss rise per memory saved; below zero only by noise."""
        return self.loss.drop / self.saving


def analyse(config: Config) -> LayerAnalysis:
    """Train `rounds` rounds of FedAvg in this process, then measure every layer on held-out training samples."""
    plain = config.model_copy(
        update={"strategy": config.strategy.model_copy(update={"name": "fedavg"}), "evaluate_every": config.rounds}
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = prepare(plain)
        host: Any = SerialHost(task)
        place: Workplace = host.place
        outcome = Outcome(place.model.vector.clone())
        for _ in run(task, make(place.setting), host, outcome):
            pass
        levels = tuple(level for level in config.strategy.levels if level < 32)
        sent = outcome.weights if config.strategy.payload == "model" else outcome.update
        base = outcome.weights - sent
        quantizers = tuple(place.setting.quantizer_at(level) for level in levels)
        loss, accuracy = (
            place.probe(Probe(quantizers, config.strategy.probe_samples, metric), base, sent, config.rounds)
            for metric in ("loss", "accuracy")
        )
    finally:
        torch.set_num_threads(threads)
    quantized = place.setting.quantized
    saving = memory_saving([layer.size for layer in quantized], levels)
    return LayerAnalysis(tuple(layer.name for layer in quantized), levels, saving, loss, accuracy)
