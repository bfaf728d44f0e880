"""The Python interface: `simulate`, `resume`, `plan`, `sweep`, `compare`, and their results."""

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedlq_ray.config.load import Config
from fedlq_ray.data import GivenData
from fedlq_ray.errors import FedLQError
from fedlq_ray.federation.events import Event
from fedlq_ray.federation.task import Parts
from fedlq_ray.files import expand
from fedlq_ray.models import GivenModel
from fedlq_ray.problems import GivenProblem
from fedlq_ray.quantization import GivenQuantizer
from fedlq_ray.runs import simulation
from fedlq_ray.runs.forecast import Forecast, forecast
from fedlq_ray.strategies import GivenStrategy
from fedlq_ray.training.own import GivenLocal

if TYPE_CHECKING:
    from fedlq_ray.analysis.compare import Row
    from fedlq_ray.sweeps.sweep import Outcome

__all__ = ["Comparison", "Forecast", "Result", "compare", "plan", "resume", "simulate", "sweep"]


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
    model: GivenModel | None = None,
    data: GivenData | None = None,
    strategy: GivenStrategy | None = None,
    quantizer: GivenQuantizer | None = None,
    problem: GivenProblem | None = None,
    local: GivenLocal | None = None,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Result:
    """Runs one experiment.

    Args:
        config: the settings, or a dict of them; None for the defaults.
        model: a torch.nn.Module, which is copied with its weights, a factory of one, or a name; it replaces
            `model.name`.
        data: a Dataset, the four arrays (x_train, y_train, x_test, y_test), or a mapping of them.
        strategy: a Strategy, a factory that may take `context`, or a name.
        quantizer: an object with the methods of `Quantizer`, a factory that may take `bits`, or a name.
        problem: a Problem, its class, or a name; it replaces `problem`.
        local: a function (module, batches, context) that trains a client (fedlq_ray.training.own), an object that is
            called like it, its class, or a name; it replaces `train.local`.
        watch: called with each event (fedlq_ray.federation.events).
        parent: a comparison that this run belongs to, for MLflow: any text; the part after the last / is its name.
    Raises:
        ConfigError: the user's input is wrong; nothing was written.
        FedLQError: the run failed; the folder has the results so far.
    """
    parts = Parts(model, data, strategy, quantizer, problem, local)
    return Result.of(simulation.simulate(config, parts, watch=watch, parent=parent))


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: GivenModel | None = None,
    data: GivenData | None = None,
    strategy: GivenStrategy | None = None,
    quantizer: GivenQuantizer | None = None,
    problem: GivenProblem | None = None,
    local: GivenLocal | None = None,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Result:
    """Resumes a run that did not finish, from its last checkpoint. The result is that of an uninterrupted run.

    Args:
        folder: the run's folder.
        overrides: key=value settings: more `rounds`, or settings that cannot change a result, such as clients.hosting.
        model, data, strategy, quantizer, problem, local: as given to `simulate`.
        watch: as for `simulate`.
        parent: as given to `simulate`, for a run that was killed before it stored its parent.
    Raises:
        ConfigError: the run does not exist, is finished or running, or its identity changed (nothing was written).
        CheckpointError: there are checkpoints, but none can be used.
        FedLQError: the run failed again.
    """
    parts = Parts(model, data, strategy, quantizer, problem, local)
    return Result.of(simulation.resume(folder, overrides, parts, watch=watch, parent=parent))


def plan(
    config: Config | Mapping[str, Any] | None = None,
    *,
    model: GivenModel | None = None,
    data: GivenData | None = None,
    strategy: GivenStrategy | None = None,
    quantizer: GivenQuantizer | None = None,
    problem: GivenProblem | None = None,
    local: GivenLocal | None = None,
) -> Forecast:
    """Says what a run will take before it is trained, as `fedlq plan` does; nothing is written.

    Args:
        config: the settings, or a dict of them; None for the defaults.
        model, data, strategy, quantizer, problem, local: as for `simulate`.
    Raises:
        ConfigError: the user's input is wrong.
        FedLQError: the run would fail in its first steps.
    """
    return forecast(config, Parts(model, data, strategy, quantizer, problem, local))


@dataclass(frozen=True)
class Comparison:
    """Several runs, compared as `fedlq compare` does.

    Attributes:
        table: one row per run that differs in more than its seed: means over seeds, standard deviations (`_sd`), gains
            and speed-ups over the reference with the bounds of their intervals.
        runs: the folders of each row's runs, by its name, one per seed.
        path: the folder of the sweep, with table.json, accuracy.png and report.html; None for `compare`.
    """

    table: pd.DataFrame
    runs: dict[str, list[Path]]
    path: Path | None = None

    def _repr_html_(self) -> str:
        shown = self.table.dropna(axis="columns", how="all").drop(columns=["by_seed", "targets"], errors="ignore")
        return str(shown.to_html(index=False, float_format="%.4g"))


def sweep(
    runs: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    out: str | Path,
    only: Sequence[str] = (),
) -> Comparison:
    """Run several experiments and compare them, as `fedlq sweep` does.

    Args:
        runs: a sweep's file, or a dict with its keys: `runs` (a name and a list of key=value each), and optionally
            `base`, `seeds`, `tune`, `tuning`, `populations`, `targets`.
        overrides: key=value settings for all runs.
        out: the folder of the runs; finished runs in it are not repeated.
        only: the names of the runs to do now; none: all.
    Raises:
        ConfigError: the input is wrong; nothing was written.
        FedLQError: a run failed; the others are in `out`.
    """
    from fedlq_ray.analysis.conclude import conclude
    from fedlq_ray.runs.console import Console
    from fedlq_ray.sweeps import many
    from fedlq_ray.sweeps import sweep as sweeps

    out = Path(expand(str(out), "out"))
    if isinstance(runs, Mapping):
        comparison = sweeps.check(runs, re.sub(r"[^A-Za-z0-9._-]", "-", out.name), overrides, only)
        source = json.dumps(runs, indent=1, default=str)
    else:
        comparison, source = sweeps.load(runs, overrides, only), Path(runs).read_text(encoding="utf-8")
    outcome = sweeps.run(comparison, out, many.starter(Console(quiet=True)), warnings.warn)
    found = conclude(outcome, out, source, f"fedlq_ray.sweep({str(runs)!r}, out={str(out)!r})")
    if found.failure:
        warnings.warn(found.failure, stacklevel=2)
    if outcome.failed:
        raise FedLQError(f"{outcome.failed} runs of the sweep in {out} failed; call it again to retry them")
    return _compared(found.table, outcome, out)


def compare(*sources: str | Path, reference: str | None = None, tracking_uri: str | None = None) -> Comparison:
    """Compare runs, as `fedlq compare` does.

    Args:
        sources: folders of runs, or folders that contain runs; with `tracking_uri` also MLflow's run ids, or the name
            of an experiment.
        reference: the run to compare the others with; by default fedavg, or the first.
    Raises:
        ConfigError: a source holds no run, or there is no run called `reference`.
    """
    from fedlq_ray.analysis import compare as comparing
    from fedlq_ray.analysis import runs as finding

    with tempfile.TemporaryDirectory() as scratch:
        outcome = finding.find([str(source) for source in sources], tracking_uri, Path(scratch))
        return _compared(comparing.rows(outcome, reference), outcome)


def _compared(table: Sequence["Row"], outcome: "Outcome", out: Path | None = None) -> Comparison:
    folders = {label: [run.folder for run in runs] for label, runs in outcome.runs.items()}
    return Comparison(pd.DataFrame([row.to_json() for row in table]), folders, out)
