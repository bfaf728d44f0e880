"""What happens in a run, one small class each; `simulate(watch=...)` and `fedlq watch` hear of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.federation.record import Record


@dataclass(frozen=True)
class Prepared:
    """All is checked; `notes` are sentences on how data and settings were read."""

    notes: list[str]


@dataclass(frozen=True)
class Hosting:
    """Where clients live, and why; `actors` is 0 without Ray, `startup_s` wall seconds."""

    kind: str
    why: str
    actors: int
    startup_s: float


@dataclass(frozen=True)
class Resumed:
    """A run continues after these records, from a checkpoint; `faults` says what was wrong with newer ones."""

    records: list[Record]
    faults: list[str]


@dataclass(frozen=True)
class RoundDone:
    """A round is over, and evaluated where that was due."""

    record: Record


@dataclass(frozen=True)
class Warned:
    """Something that does not end the run."""

    message: str


@dataclass(frozen=True)
class Restarted:
    """The driver failed, and starts again from its checkpoint; or a run that is watched went back to a checkpoint."""

    fault: str


@dataclass(frozen=True)
class Stopping:
    """An interrupt was heard: the run ends at the next payload."""


@dataclass(frozen=True)
class Ended:
    """The rounds are over.

    Attributes:
        weights: (d,) float32, after the last record's round.
        completed: all that was asked for was done.
        timing: wall seconds by name.
        tracked: what went wrong with MLflow, or None.
    """

    weights: NDArray[np.float32]
    completed: bool
    timing: dict[str, list[float]]
    tracked: str | None


@dataclass(frozen=True)
class Closed:
    """A run that was watched has ended; `status` is MLflow's word for how."""

    status: str


Event = Prepared | Hosting | Resumed | RoundDone | Warned | Restarted | Stopping | Ended | Closed
