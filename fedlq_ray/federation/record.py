"""The record of a round: one line of rounds.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Record:
    """One round. Lists by client follow the order of `cohort`, dicts are by layer; bytes and seconds are this round's.

    Attributes:
        cohort: the clients that were drawn.
        answered: clients whose payload arrived, in the order of summation.
        skipped: clients that failed, if `clients.on_failure` lets the round continue without them.
        train_loss: the mean of the clients' training losses; None if none answered.
        bits_per_parameter: mean over the clients that answered, headers included.
        client_samples: samples that each client trained on, over all passes.
        client_bits_per_parameter: by layer, then by client; None for a client that sent nothing.
        update_norm: Euclidean norm of the mean update's parameters.
        quantization_error: root mean square of the error that quantization adds to the mean update; None if unknown.
        sim_time_s: simulated seconds since the start of the run.
        report: what the strategy reports, by name.
        accuracy, test_loss: of the model after the round; None if it was not evaluated, or the problem has no accuracy.
        metrics: the problem's other metrics by name; if it has no accuracy, the first is its main metric.
        client_start_s, client_staleness, client_end, wasted_bytes: only where a step does not wait for all clients,
            `cohort` then has the flights that ended since the last step: when each began, how many steps ago, how it
            ended (`flight.End`), and the bytes of those that did not arrive, which are in the sums too.
    """

    round: int
    cohort: list[int]
    answered: list[int]
    skipped: list[int]
    uplink_bytes: int
    downlink_bytes: int
    train_loss: float | None
    bits_per_parameter: dict[str, float]
    client_samples: list[int]
    client_uplink_bytes: list[int]
    client_downlink_bytes: list[int]
    client_bits_per_parameter: dict[str, list[float | None]]
    client_download_s: list[float]
    client_compute_s: list[float]
    client_upload_s: list[float]
    update_norm: float | None
    quantization_error: float | None
    sim_time_s: float
    report: dict[str, Any]
    accuracy: float | None
    test_loss: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    client_start_s: list[float] = field(default_factory=list)
    client_staleness: list[int] = field(default_factory=list)
    client_end: list[str] = field(default_factory=list)
    wasted_bytes: int | None = None

    @property
    def main(self) -> float | None:
        """The value of the problem's main metric; None if the round was not evaluated."""
        return self.accuracy if self.accuracy is not None else next(iter(self.metrics.values()), None)

    def evaluated(self, metrics: Mapping[str, float], test_loss: float | None) -> "Record":
        """The record with its evaluation added."""
        others = {name: value for name, value in metrics.items() if name != "accuracy"}
        return replace(self, accuracy=metrics.get("accuracy"), test_loss=test_loss, metrics=others)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object, with the strategy's report merged into it, and optional fields if it has any."""
        made: dict[str, Any] = {}
        for name in NAMES:
            made |= self.report if name == "report" else {name: getattr(self, name)}
        return {name: value for name, value in made.items() if name not in _OPTIONAL or value not in ({}, [], None)}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "Record":
        """A record from JSON, including journals of earlier versions, which lack some fields."""
        report = {name: value for name, value in found.items() if name not in NAMES}
        return Record(**{**_ABSENT, **{name: found[name] for name in NAMES if name in found}, "report": report})


_OPTIONAL = ("metrics", "client_start_s", "client_staleness", "client_end", "wasted_bytes")
NAMES = tuple(field.name for field in fields(Record))
_ABSENT: dict[str, Any] = {
    **dict.fromkeys(("train_loss", "update_norm", "quantization_error", "accuracy", "test_loss")),
    **dict.fromkeys(("cohort", "answered", "skipped"), []),
    **dict.fromkeys((name for name in NAMES if name.startswith("client_")), []),
    **dict.fromkeys(("uplink_bytes", "downlink_bytes", "sim_time_s"), 0),
    "bits_per_parameter": {},
    "client_bits_per_parameter": {},
    "metrics": {},
    "wasted_bytes": None,
}
