"""Events of a run, one small class each; `simulate(watch=...)` and `fedlq watch` receive them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.federation.record import Record


@dataclass(frozen=True)
class Prepared:
    """Everything is checked; `notes` are sentences on how data and settings were read, and `ceiling` on what
    compression can gain, if that is known."""

    notes: list[str]
    ceiling: str | None = None


@dataclass(frozen=True)
class Hosting:
    """How clients are hosted, and why; `actors` is 0 without Ray, `startup_s` is in wall seconds."""

    kind: str
    why: str
    actors: int
    startup_s: float


@dataclass(frozen=True)
class Resumed:
    """A run resumes after these records, from a checkpoint; `faults` says why newer checkpoints were not used."""

    records: list[Record]
    faults: list[str]


@dataclass(frozen=True)
class RoundDone:
    """A round is over, and evaluated if the settings require it."""

    record: Record


@dataclass(frozen=True)
class Warned:
    """A problem that does not end the run."""

    message: str


@dataclass(frozen=True)
class Restarted:
    """The driver failed and restarts from its checkpoint, or a watched run returned to a checkpoint."""

    fault: str


@dataclass(frozen=True)
class Stopping:
    """An interrupt was received: the run ends at the next payload."""


@dataclass(frozen=True)
class Ended:
    """The rounds are over.

    Attributes:
        weights: (d,) float32, after the last record's round.
        completed: all configured rounds are done, or the target is reached.
        timing: wall seconds by name.
        tracked: MLflow's error, or None.
        under_way: clients whose flights had not ended.
        of_clients: the main metric by the test samples' client, of a completed run's weights; empty if they have none.
    """

    weights: NDArray[np.float32]
    completed: bool
    timing: dict[str, list[float]]
    tracked: str | None
    under_way: int = 0
    of_clients: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Closed:
    """A watched run has ended; `status` is MLflow's status."""

    status: str


Event = Prepared | Hosting | Resumed | RoundDone | Warned | Restarted | Stopping | Ended | Closed
