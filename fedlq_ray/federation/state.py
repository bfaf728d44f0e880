"""All that a round takes from the rounds before it, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fedlq_ray.federation.server import Moments
from fedlq_ray.strategies.state import plain, restored


@dataclass(frozen=True)
class ServerState:
    """What the server has before a round. A round makes a new one; a checkpoint is this, packed.

    Attributes:
        round: the next, from 0.
        weights: the global flat vector (d,) float32.
        update: the last round's mean update (d,) float32, as the strategy combines it; the server may step otherwise.
        sim_time_s: simulated seconds so far.
        payload_bytes: of the last round's mean payload; None before any.
        server: the server optimizer's moments.
        held: by client, what it holds of the model (d,), where the downlink is coded.
        tracked: by client, what the server has of it (d,), by EF21.
        strategy: the strategy's own state.
        memories: by client, what it keeps for error feedback, in the host's form.
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
        """The fields by name, as checkpoints hold them."""
        return vars(self) | {"strategy": plain(self.strategy)}

    @staticmethod
    def from_snapshot(saved: Mapping[str, Any], initial: Any) -> "ServerState":
        """A state from a checkpoint, which may hold more; `initial`: the strategy's state before the first round."""
        strategy = restored(initial, saved["strategy"])
        own = {"server": Moments(*saved["server"]), "strategy": strategy}
        return ServerState(**{name: saved[name] for name in FIELDS} | own)


FIELDS = tuple(field.name for field in fields(ServerState))
