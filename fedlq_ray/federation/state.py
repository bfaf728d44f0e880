"""Everything that a round needs from earlier rounds, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fedlq_ray.federation.downlink import Shared
from fedlq_ray.federation.flight import Flight, packed, unpacked
from fedlq_ray.federation.server import Moments
from fedlq_ray.federation.task import Task
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
        memories: by client, its memory (`training/own.py`), in the host's form.
        dispatches: how often clients were asked.
        flights: the clients under way, if a step does not wait for all.
        selection: the state of the selection of clients.
        shared: the model that all clients share (`network.downlink=shared`).
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
    dispatches: int
    flights: tuple[Flight, ...] = ()
    selection: Any = None
    shared: Shared | None = None

    def snapshot(self) -> dict[str, Any]:
        """The fields by name, as stored in checkpoints. The flights have landed."""
        kept = {f.client: f.landing.answer.memory for f in self.flights if f.landing.answer}
        return vars(self) | {
            "strategy": plain(self.strategy),
            "selection": plain(self.selection),
            "shared": None if self.shared is None else vars(self.shared),
            "flights": [packed(flight) for flight in self.flights],
            "memories_under_way": {client: memory for client, memory in kept.items() if memory is not None},
        }

    @staticmethod
    def from_snapshot(saved: Mapping[str, Any], initial: "ServerState", task: Task) -> "ServerState":
        """A state from a checkpoint, which may have more fields.

        Args:
            initial: the state before the first round; it gives types, and what a checkpoint of before lacks.
        """
        own: dict[str, Any] = {name: saved[name] for name in FIELDS}
        own["server"], own["strategy"] = Moments(*saved["server"]), restored(initial.strategy, saved["strategy"])
        under_way = saved.get("memories_under_way", {})
        flights = [unpacked(task, one, under_way.get(one["member"]["client"])) for one in saved.get("flights", ())]
        selection = restored(initial.selection, saved["selection"]) if "selection" in saved else initial.selection
        dispatches = saved.get("dispatches", saved["round"])  # checkpoints of before are synchronous
        shared = Shared(**saved["shared"]) if saved.get("shared") else None
        return ServerState(**own, dispatches=dispatches, flights=tuple(flights), selection=selection, shared=shared)


_LATER = ("dispatches", "flights", "selection", "shared")  # fields that checkpoints of before lack
FIELDS = tuple(field.name for field in fields(ServerState) if field.name not in _LATER)
