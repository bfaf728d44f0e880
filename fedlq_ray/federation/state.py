"""Everything that a round needs from earlier rounds, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fedlq_ray.federation.server import Moments
from fedlq_ray.strategies.state import plain, restored


@dataclass(frozen=True)
class ServerState:
    """The server's state before a round. Each round returns a new one; a checkpoint is a packed state.

    Attributes:
        round: the next round, from 0.
        weights: the global flat vector (d,) float32.
        update: the last mean update (d,) float32, as the strategy combines it; the server may take another step.
        sim_time_s: simulated seconds so far.
        payload_bytes: mean payload size of the last round; None before the first.
        server: the server optimizer's moments.
        held: by client, the model (d,) that it holds, if the downlink is coded.
        tracked: by client, the server's EF21 vector (d,).
        strategy: the strategy's own state.
        memories: by client, its error-feedback memory, in the host's form.
    """

    round: int
    weights: Tensor
    update: Tensor
    sim_time_s: float
    payload_bytes: float | None
    server: Moments
    held: Mapping[int, Tensor]
    tracked: Mapping[int, Tensor]
    strategy: Any
    memories: Mapping[int, Any]

    def snapshot(self) -> dict[str, Any]:
        """The fields by name, as stored in checkpoints."""
        return vars(self) | {"strategy": plain(self.strategy)}

    @staticmethod
    def from_snapshot(saved: Mapping[str, Any], initial: Any) -> "ServerState":
        """A state from a checkpoint, which may have more fields. `initial`: the strategy's state before round 0."""
        strategy = restored(initial, saved["strategy"])
        own = {"server": Moments(*saved["server"]), "strategy": strategy}
        return ServerState(**{name: saved[name] for name in FIELDS} | own)


FIELDS = tuple(field.name for field in fields(ServerState))
