"""Every metric of a run, in one table: MLflow's names, docs/metrics.md and the columns of comparisons come from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlq_ray.federation.record import Record

Summary = Mapping[str, Any]  # what summary.json holds


@dataclass(frozen=True)
class Metric:
    """A number that a round or a run has.

    Attributes:
        unit, meaning: for people; Markdown.
        of_round: the value of one round; None for a metric of the whole run.
        of_layers: the same for a metric of each layer, by layer's name.
        of_names: several metrics with names of their own.
        of_run: the value of a finished run.
        of_records: the value of a finished run, in `unit`, where its summary does not have it.
        sums: the value of a round is added to those of the rounds before.
        per: the divisor that turns a value into `unit`.
        of_all: a comparison has it only where every seed finished.
        column: the heading of its column in comparisons, which show the mean over seeds; None: no column of its own. A
            metric `of_records` has it only where a run has a value.
    """

    name: str
    unit: str
    meaning: str
    of_round: Callable[[Record], float | None] | None = None
    of_layers: Callable[[Record], Mapping[str, float]] | None = None
    of_names: Callable[[Record], Mapping[str, float]] | None = None
    of_run: Callable[[Summary], float | None] | None = None
    of_records: Callable[[Sequence[Record]], float | None] | None = None
    sums: bool = False
    per: float = 1
    of_all: bool = False
    column: str | None = None

    @property
    def shown(self) -> str:
        """The name in documents."""
        return f"{self.name}/LAYER" if self.of_layers else self.name


def waiting_s(records: Sequence[Record]) -> float | None:
    """Seconds from an update's arrival to the step that takes it, mean over updates; None if none arrived, or it is not
    known."""
    return mean(seconds for record in records for seconds in _waits_s(record))


def _waits_s(record: Record) -> list[float]:
    times = zip(record.client_download_s, record.client_compute_s, record.client_upload_s, strict=True)
    took = [sum(own) for own in times]
    if record.client_end:
        ends = zip(record.client_start_s, took, record.client_end, strict=True)
        return [max(0.0, record.sim_time_s - (start + own)) for start, own, how in ends if how == "arrived"]
    return [max(took) - own for client, own in zip(record.cohort, took, strict=False) if client in record.answered]


def staleness(records: Sequence[Record]) -> float | None:
    """Mean staleness of the updates that arrived; None if none did, or the run is synchronous."""
    flights = (zip(record.client_staleness, record.client_end, strict=True) for record in records)
    return mean(old for each in flights for old, how in each if how == "arrived")


def lost_clients(record: Record) -> int | None:
    """How many flights ended without an update, of those that had a plan; None if the run is synchronous."""
    return None if record.wasted_bytes is None else sum(how not in ("arrived", "idle") for how in record.client_end)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


METRICS = (
    Metric(
        "accuracy",
        "fraction",
        "accuracy on the test set (or, with `evaluate_on=holdout`, on held-out training samples) after the round; only "
        "in rounds that are evaluated",
        of_round=lambda r: r.accuracy,
    ),
    Metric(
        "test_loss",
        "nats",
        "mean cross-entropy on the same samples; absent where it is not finite",
        of_round=lambda r: r.test_loss,
    ),
    Metric(
        "METRIC",
        "as the problem says",
        "the problem's other metrics under their own names, such as `perplexity` (tokens), `absolute_error` and "
        "`root_mean_square_error` (regression), `micro_f1` and `label_accuracy` (multilabel); where test samples have "
        "clients, the main one's mean over clients, `METRIC_of_clients`, and over the worst tenth of them, "
        "`METRIC_of_worst_clients`",
        of_names=lambda r: r.metrics,
    ),
    Metric(
        "train_loss",
        "nats",
        "mean over the cohort's local training, with the weights of the average",
        of_round=lambda r: r.train_loss,
    ),
    Metric(
        "update_norm",
        "of the weights",
        "length of the cohort's mean update, before the server's own step",
        of_round=lambda r: r.update_norm,
    ),
    Metric(
        "quantization_error",
        "of the weights",
        "the error that quantization adds to the mean update, root mean square over its noise: "
        "sqrt(sum p_n^2 \\|Q(x_n) - x_n\\|^2), as clients measure it. With error feedback, x_n includes the client's "
        "memory. Its share of `update_norm` shows how coarse a plan is; its square is the term of the "
        "[convergence bound](theory.md). Absent for `signsgd`, whose votes are not updates",
        of_round=lambda r: r.quantization_error,
    ),
    Metric("sim_time_s", "s", "simulated clock at the end of the round", of_round=lambda r: r.sim_time_s),
    Metric(
        "uplink_mb",
        "MB (10^6 bytes)",
        "all payloads that clients have sent so far, headers included",
        of_round=lambda r: r.uplink_bytes,
        of_run=lambda s: s["uplink_bytes"],
        sums=True,
        per=1e6,
        column="MB in all",
    ),
    Metric(
        "downlink_mb",
        "MB",
        "all bytes that clients have fetched so far, whether the clock bills them or not",
        of_round=lambda r: r.downlink_bytes,
        sums=True,
        per=1e6,
    ),
    Metric("round_uplink_mb", "MB", "payloads of this round", of_round=lambda r: r.uplink_bytes, per=1e6),
    Metric(
        "waiting_s",
        "s",
        "how long a client whose update arrived waited for the server's step, mean over the clients of the step. In a "
        "synchronous run, that is for the slowest; it shows what stragglers cost",
        of_round=lambda r: waiting_s([r]),
        of_records=waiting_s,
        column="waits, s",
    ),
    Metric(
        "staleness",
        "steps",
        "steps that the server took while the clients of this step's updates were under way, mean; only where a step "
        "does not wait for all",
        of_round=lambda r: staleness([r]),
        of_records=staleness,
        column="staleness",
    ),
    Metric(
        "lost_clients",
        "clients",
        "clients whose flight ended in this step without an update: they dropped out, failed, left or were stopped; "
        "only where a step does not wait for all",
        of_round=lost_clients,
    ),
    Metric(
        "wasted_mb",
        "MB",
        "bytes so far, in both directions, of clients that were under way and whose update did not arrive; only where "
        "a step does not wait for all. `uplink_mb` and `downlink_mb` include them",
        of_round=lambda r: r.wasted_bytes,
        of_records=lambda rs: None if rs[-1].wasted_bytes is None else sum(r.wasted_bytes or 0 for r in rs) / 1e6,
        sums=True,
        per=1e6,
        column="wasted MB",
    ),
    Metric(
        "bits_per_parameter",
        "bits",
        "bits that the cohort's payloads spend on a layer, divided by its parameters and the number of payloads; "
        "headers included",
        of_layers=lambda r: r.bits_per_parameter,
    ),
    Metric(
        "significance",
        "loss (or accuracy) per share of memory saved; `fedlq_rd`: per unit of squared error",
        "running average of probes, at the lowest level; only for strategies that measure it",
        of_layers=lambda r: r.report.get("significance", {}),
    ),
    Metric(
        "final_accuracy",
        "fraction",
        "accuracy of the last evaluation; logged once, at the last round. Where the main metric is another, "
        "`final_METRIC`",
        of_run=lambda s: s.get("final_accuracy"),
    ),
    Metric(
        "best_accuracy",
        "fraction",
        "highest accuracy of all evaluations; logged once. Where the main metric is another, `best_METRIC`",
        of_run=lambda s: s.get("best_accuracy"),
    ),
    Metric(
        "time_to_target_s",
        "s",
        "simulated clock when the run first reached `target`; absent if it did not",
        of_run=lambda s: s["time_to_target_s"],
        of_all=True,
    ),
    Metric(
        "uplink_mb_to_target",
        "MB",
        "bytes that clients have sent by then; absent if the run did not reach the target",
        of_run=lambda s: s["uplink_bytes_to_target"],
        per=1e6,
        of_all=True,
    ),
)


def of_rounds(record: Record, totals: dict[str, float]) -> dict[str, float]:
    """A round's values by name, those of layers as NAME/LAYER; without those that the round does not have.

    Args:
        totals: the sums over the rounds so far, by name; this round is added.
    """
    found: dict[str, float] = {}
    for metric in METRICS:
        if metric.of_layers:
            found |= {f"{metric.name}/{layer}": value for layer, value in metric.of_layers(record).items()}
        elif metric.of_names:
            found |= metric.of_names(record)
        elif metric.of_round and (value := metric.of_round(record)) is not None:
            if metric.sums:
                value = totals[metric.name] = totals.get(metric.name, 0.0) + value
            found[metric.name] = value / metric.per
    return found


def of_run(summary: Summary) -> dict[str, float]:
    """A finished run's values by name, of the metrics that only a whole run has."""
    values = [(m, m.of_run(summary)) for m in METRICS if m.of_run and not m.of_round]
    found = {metric.name: value / metric.per for metric, value in values if value is not None}
    own = [name for name in summary if name.startswith(("final_", "best_")) and summary[name] is not None]
    return found | {name: summary[name] for name in own}


def table() -> str:
    """The metrics as a Markdown table."""
    rows = [f"| `{metric.shown}` | {metric.unit} | {metric.meaning} |" for metric in METRICS]
    return "\n".join(["| metric | unit | what it is |", "| --- | --- | --- |", *rows])
