"""The Python interface: `simulate` and `resume`, and their result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedlq_ray.config.load import Config
from fedlq_ray.federation.events import Event
from fedlq_ray.runs import simulation

__all__ = ["Result", "resume", "simulate"]


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        history: one row per round, with the keys of rounds.jsonl.
        summary: the contents of summary.json.
        weights: the final flat vector (d,) float32; model.safetensors has it as a state_dict.
        path: the run's folder.
    """

    history: pd.DataFrame
    summary: dict[str, Any]
    weights: NDArray[np.float32]
    path: Path

    def plot(self) -> Any:
        """Accuracy against simulated time and traffic: a matplotlib figure."""
        from fedlq_ray.analysis import notebook

        return notebook.plot(self.path)

    def _repr_html_(self) -> str:
        from fedlq_ray.analysis import notebook

        return notebook.html(self.path)

    @staticmethod
    def of(outcome: simulation.Outcome) -> "Result":
        """A Result with the records as a table."""
        history = pd.DataFrame([record.to_json() for record in outcome.records])
        return Result(history, outcome.summary, outcome.weights, outcome.path)


def simulate(
    config: Config | Mapping[str, Any] | None = None,
    *,
    model: Any = None,
    data: Any = None,
    strategy: Any = None,
    quantizer: Any = None,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Result:
    """Runs one experiment.

    Args:
        config: the settings, or a dict of them; None for the defaults.
        model: a torch.nn.Module, which is copied with its weights, or a factory of one; it replaces `model.name`.
        data: a Dataset, the four arrays (x_train, y_train, x_test, y_test), or a mapping of them.
        strategy: a Strategy, a factory that may take `setting`, or a name.
        quantizer: an object with the methods of `Quantizer`, a factory that may take `bits`, or a name.
        watch: called with each event (fedlq_ray.federation.events).
        parent: a comparison that this run belongs to, for MLflow: any text; the part after the last / is its name.
    Raises:
        ConfigError: the user's input is wrong; nothing was written.
        FedLQError: the run failed; the folder has the results so far.
    """
    given = {"model": model, "data": data, "strategy": strategy, "quantizer": quantizer}
    return Result.of(simulation.simulate(config, **given, watch=watch, parent=parent))


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: Any = None,
    data: Any = None,
    strategy: Any = None,
    quantizer: Any = None,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Result:
    """Resumes a run that did not finish, from its last checkpoint. The result is that of an uninterrupted run.

    Args:
        folder: the run's folder.
        overrides: key=value settings: more `rounds`, or settings that cannot change a result, such as clients.hosting.
        model, data, strategy, quantizer: as given to `simulate`.
        watch: as for `simulate`.
        parent: as given to `simulate`, for a run that was killed before it stored its parent.
    Raises:
        ConfigError: the run does not exist, is finished or running, or its identity changed (nothing was written).
        CheckpointError: there are checkpoints, but none can be used.
        FedLQError: the run failed again.
    """
    given = {"model": model, "data": data, "strategy": strategy, "quantizer": quantizer}
    return Result.of(simulation.resume(folder, overrides, **given, watch=watch, parent=parent))
