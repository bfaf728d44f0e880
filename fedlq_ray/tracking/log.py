"""MLflow: a run's settings, metrics by round, and files; off the training path, and harmless when it fails.

A metric's timestamp is the run's start plus the simulated time: the UI's relative time is then the simulated clock,
and logging the same record again adds nothing. A run is found again by its tag `fedlq.run_key`.
"""

import csv
import hashlib
import json
import queue
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlq_ray.config.load import Config, digest, flat, to_yaml
from fedlq_ray.errors import ConfigError, first_line
from fedlq_ray.federation import metrics
from fedlq_ray.federation.record import Record
from fedlq_ray.problems import goal_of
from fedlq_ray.tracking import stores

FILES = (
    *("config.yaml", "clients.csv", "rounds.jsonl", "summary.json", "timing.json", "model.safetensors"),
    "test_clients.csv",
)
_WAIT_S = 30.0  # that the end of a run waits for MLflow, at most
_HURRY_S = 2.0  # the same after a second interrupt


@dataclass(frozen=True)
class Tracking:
    """Where a run is tracked, and as what: all that `fedlq sync` needs to continue.

    Attributes:
        uri: the store; a SQLite file by its absolute path, but by one that begins at the run's folder in tracking.json.
        parent: the comparison that the run belongs to: what identifies it, and after the last / its name.
        dataset: the fields of MLflow's dataset: name, digest, source_type, source, profile.
    """

    uri: str
    experiment: str
    run_key: str
    started_ms: int
    parent: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, str] = field(default_factory=dict)


def _plain(key: str) -> str:
    """A key as MLflow's filters take it without quoting: itself where it is short and plain, else a digest of it."""
    if re.fullmatch(r"[\w./ -]{1,250}", key):
        return key
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def find_or_create(
    client: Any, tracking: Tracking, key: str, name: str, tags: Mapping[str, str], started_ms: int
) -> str:
    """The id of the run with this key: made where there is none, so that logging twice makes one run.

    Raises:
        ConfigError: the experiment is deleted.
    """
    key = _plain(key)
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        file = stores.sqlite_file(tracking.uri)
        # Else MLflow would put artifacts under the working directory of whatever process makes the experiment.
        artifacts = file and (file.parent / "mlruns").as_uri()
        try:
            # The kind makes MLflow's UI open on runs and their charts, not on traces of language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            experiment_id = client.create_experiment(tracking.experiment, artifact_location=artifacts, tags=kind)
        except Exception:  # another run made it in the meantime, or the store is down: then the next line raises
            experiment_id = client.get_experiment_by_name(tracking.experiment).experiment_id
    elif experiment.lifecycle_stage == "deleted":
        raise ConfigError(stores.deleted_experiment(tracking.experiment, tracking.uri))
    else:
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], f"tags.`fedlq.run_key` = '{key}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = client.create_run(experiment_id, start_time=started_ms, run_name=name, tags={**tags, "fedlq.run_key": key})
    return str(run.info.run_id)


def _parent(client: Any, tracking: Tracking) -> str:
    """The id of the comparison that a run belongs to."""
    assert tracking.parent is not None
    shown = "".join(c if c.isprintable() else "?" for c in tracking.parent.rsplit("/", 1)[-1])
    name = shown[:250] or "comparison"
    kind = {"fedlq.kind": "comparison"}
    with stores.exclusive(tracking.uri):  # its runs may all start now, and one of them creates it
        run_id = find_or_create(client, tracking, tracking.parent, name, kind, tracking.started_ms)
    client.set_terminated(run_id)  # it only holds its children together
    return run_id


def conclude(tracking: Tracking, note: str, files: Sequence[Path]) -> None:
    """Give the comparison that a run belongs to its result: a note in markdown, and files as artifacts."""
    client = stores.connect(tracking.uri)
    run_id = _parent(client, tracking)
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_tag(run_id, "mlflow.note.content", note)  # last: MLflow refuses a very long one


def open_run(client: Any, tracking: Tracking, config: Config) -> str:
    """The run's id in MLflow, with its settings and its dataset logged."""
    trial = config.evaluate_on == "holdout"  # by which a sweep tunes
    tags = tracking.tags | {
        "fedlq.config_sha256": digest(config),
        "fedlq.strategy": config.strategy.name,
        "fedlq.data": config.data.name,
        "fedlq.profiles": config.clients.profiles,
        "fedlq.seed": str(config.seed),
        "fedlq.kind": "trial" if trial else "run",
    }
    if tracking.parent:
        tags["mlflow.parentRunId"] = _parent(client, tracking)
    name = f"{config.name}-{config.seed}" + (f" trial {Path(config.out or '').name}" if trial else "")
    run_id = find_or_create(client, tracking, tracking.run_key, name, tags, tracking.started_ms)
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    params = [Param(path, str(value)) for path, value in flat(config).items() if path not in ("out", "name")]
    logged = client.get_run(run_id).data.params
    client.log_batch(run_id, params=[param for param in params if param.key not in logged])
    for param in params:  # MLflow's parameters cannot change: what a resume changed is a tag
        if logged.get(param.key, param.value) != param.value:
            client.set_tag(run_id, f"fedlq.resumed.{param.key}", param.value)
    client.log_text(run_id, to_yaml(config), "config.yaml")
    if tracking.dataset:
        context = [InputTag("mlflow.data.context", "training")]
        with stores.exclusive(tracking.uri):  # MLflow fails where two runs add the same dataset at the same time
            client.log_inputs(run_id, datasets=[DatasetInput(Dataset(**tracking.dataset), context)])
    return run_id


def log_record(client: Any, run_id: str, tracking: Tracking, record: Record, totals: dict[str, float]) -> None:
    """Log one round's metrics; `totals` has the sums over the rounds so far."""
    _log_metrics(client, run_id, tracking, metrics.of_rounds(record, totals), record.sim_time_s, record.round)


def _log_metrics(
    client: Any, run_id: str, tracking: Tracking, values: Mapping[str, float], sim_time_s: float, step: int
) -> None:
    from mlflow.entities import Metric

    at = tracking.started_ms + round(sim_time_s * 1e3)
    client.log_batch(run_id, metrics=[Metric(named(key), float(value), at, step) for key, value in values.items()])


def named(metric: str) -> str:
    """A metric's name in characters that MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_. :/-]", "_", metric)


class Tracker:
    """Logs in a thread of its own. The first failure ends it: the records are kept, and `fedlq sync` logs them."""

    def __init__(self, tracking: Tracking, config: Config, records: Sequence[Record] = ()) -> None:
        """`records` are those of a run that resumes: what MLflow already has of them is not logged twice."""
        self.failure: str | None = None
        self._tracking, self._config = tracking, config
        self._queue: queue.Queue[Any] = queue.Queue()
        for record in records:
            self.log(record)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Takes no time."""
        self._queue.put(record)

    def finish(self, status: str, wait: bool = True) -> str | None:
        """Wait, a bounded time, until all is logged. What went wrong, or None."""
        self._queue.put(status)
        self._thread.join(_WAIT_S if wait else 0)
        if self._thread.is_alive():
            return f"did not answer for {_WAIT_S:.0f} s"
        return self.failure

    def _work(self) -> None:
        try:
            client = stores.connect(self._tracking.uri)
            run_id = open_run(client, self._tracking, self._config)
            client.update_run(run_id, status="RUNNING")  # a resumed run was KILLED or FAILED
            totals: dict[str, float] = {}
            while not isinstance(item := self._queue.get(), str):
                log_record(client, run_id, self._tracking, item, totals)
            client.set_terminated(run_id, item)
        except Exception as exc:  # telemetry must never end a training run
            self.failure = f"{type(exc).__name__}: {first_line(exc)}"[:300]


def sync(
    tracking: Tracking,
    config: Config,
    records: Sequence[Record],
    status: str,
    folder: Path | None,
    module: Any = None,
) -> str:
    """Log a whole run, and its folder's files; what is there already is not logged twice. Gives the run's id.

    Args:
        module: the model that model.safetensors belongs to; without it MLflow gets that file, and no model of its own.
    """
    client = stores.connect(tracking.uri)
    run_id = open_run(client, tracking, config)
    totals: dict[str, float] = {}
    for record in records:
        log_record(client, run_id, tracking, record, totals)
    if folder is not None:
        _log_files(client, run_id, tracking, config, records, folder, module)
    client.set_terminated(run_id, status)
    return run_id


def mark(tracking: Tracking, config: Config, records: Sequence[Record], status: str, hurry: bool) -> str:
    """`sync` without files, in a bounded time. What went wrong, or nothing."""
    wait_s = _HURRY_S if hurry else _WAIT_S
    outcome = [f"did not answer for {wait_s:.0f} s"]

    def work() -> None:
        try:
            sync(tracking, config, records, status, None)
            outcome[0] = ""
        except Exception as exc:  # telemetry: the run's own error is what the user must see
            outcome[0] = f"{type(exc).__name__}: {first_line(exc)}"[:300]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(wait_s)
    return outcome[0]


def attach(tracking: Tracking, config: Config, records: Sequence[Record], folder: Path, module: Any = None) -> None:
    """Add a finished run's files, pictures and model to what its driver has logged."""
    client = stores.connect(tracking.uri)
    run_id = open_run(client, tracking, config)
    _log_files(client, run_id, tracking, config, records, folder, module)
    client.set_terminated(run_id, "FINISHED")


def lacking(folder: Path, why: Exception) -> str:
    """The warning if `attach` fails: the run itself is finished and stored."""
    return f"MLflow lacks this run's files ({first_line(why)}); fedlq sync {folder} adds them"


def _log_files(
    client: Any,
    run_id: str,
    tracking: Tracking,
    config: Config,
    records: Sequence[Record],
    folder: Path,
    module: Any,
) -> None:
    """A run's files as artifacts, its summary as metrics and a note, its pictures, and the model."""
    from fedlq_ray import plots

    for name in FILES:
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))
    summary = None
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        _log_summary(client, run_id, tracking, config, summary)
    with tempfile.TemporaryDirectory() as made, (folder / "clients.csv").open(newline="", encoding="utf-8") as table:
        counts = [[int(v) for k, v in row.items() if k.startswith("label_")] for row in csv.DictReader(table)]
        if counts and counts[0]:
            plots.labels(counts, Path(made) / "labels.png")
        goal = goal_of(config.problem, summary)
        curves = plots.accuracy({config.strategy.name: [records]}, config.target, config.network.bill, goal=goal)
        plots.save(curves, Path(made) / "accuracy.png")
        if by_client := plots.test_clients(folder, goal):
            plots.save(plots.by_client(by_client, goal), Path(made) / "test_clients.png")
        for picture in sorted(Path(made).iterdir()):
            client.log_artifact(run_id, str(picture))
    if module is not None and (folder / "model.safetensors").exists() and tracking.dataset:
        shape = json.loads(tracking.dataset["profile"])["input_shape"]
        _log_model(client, run_id, module, folder / "model.safetensors", shape)


def _log_summary(client: Any, run_id: str, tracking: Tracking, config: Config, summary: Mapping[str, Any]) -> None:
    """What a run came to, at its last round: metrics to sort a list of runs by, and a note to read."""
    values = metrics.of_run(summary)
    _log_metrics(client, run_id, tracking, values, summary["sim_time_s"], summary["rounds"] - 1)
    goal = goal_of(config.problem, summary)
    final = goal.shown(summary[f"final_{goal.metric}"])
    note = (
        f"**{config.strategy.name}** on {config.data.name}: {goal.metric} {final} after "
        f"{summary['rounds']} rounds, {summary['sim_time_s']:.1f} simulated s, {summary['uplink_bytes'] / 1e6:.2f} MB "
        "sent by clients."
    )
    if config.target is not None:
        reached = summary["time_to_target_s"]
        when = "not reached" if reached is None else f"after {reached:.1f} s and {values['uplink_mb_to_target']:.2f} MB"
        note += f" Target {goal.shown(config.target)}: {when}."
    client.set_tag(run_id, "mlflow.note.content", note)


def _log_model(client: Any, run_id: str, module: Any, weights: Path, input_shape: Sequence[int]) -> None:
    """As an MLflow model, `mlflow.pytorch.load_model("runs:/RUN_ID/model")`: an exported graph, no pickle."""
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, about its own type hints
        import mlflow.pytorch

        try:
            module.load_state_dict(load_file(weights))
            mlflow.pytorch.save_model(
                module.eval(),
                f"{made}/model",
                input_example=np.zeros((2, *input_shape), np.float32),
                serialization_format="pt2",
                pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
            )
        except Exception as exc:  # not every module can be exported, or is the one that these weights are of
            client.set_tag(run_id, "fedlq.model_not_exported", f"{type(exc).__name__}: {exc}"[:200])
            return
        client.log_artifacts(run_id, f"{made}/model", "model")


def fetch(uri: str, source: str, to: Path) -> list[Path]:
    """The folders, under `to`, of a run, of a comparison's runs, or of an experiment's, as MLflow keeps them.

    Trials by which a sweep tuned are left out.

    Args:
        source: a run's id, or an experiment's name.
    Raises:
        ConfigError: there is none, it holds no finished run, or MLflow does not answer.
    """
    stores.require_readable(uri, "--tracking-uri")
    try:
        client = stores.connect(uri)
        experiment = client.get_experiment_by_name(source)
        if experiment:
            runs = client.search_runs([experiment.experiment_id], "params.evaluate_on = 'test'", max_results=5000)
        else:
            run = client.get_run(source)
            children = f"tags.`mlflow.parentRunId` = '{source}' and params.evaluate_on = 'test'"
            runs = client.search_runs([run.info.experiment_id], children, max_results=5000) or [run]
        return [folder for run in runs if (folder := _files(client, run, to))]
    except Exception as exc:  # MLflow raises many kinds
        raise ConfigError(f"{source}: no such run or experiment in {uri}: {first_line(exc)}") from exc


def _files(client: Any, run: Any, to: Path) -> Path | None:
    """A finished run's folder, rebuilt from its artifacts; None where it has none."""
    there = {file.path for file in client.list_artifacts(run.info.run_id)}
    if "rounds.jsonl" not in there:
        return None
    folder = Path(to, run.info.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if name in there:
            client.download_artifacts(run.info.run_id, name, str(folder))
    return folder


def now_ms() -> int:
    """The wall clock: it dates a run in MLflow, and enters no result."""
    return int(time.time() * 1e3)
