"""Plans flights: what each client that is asked may fetch, and what it will send."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.errors import FedLQError
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.downlink import Downlink, Shared
from fedlq_ray.federation.flight import Flight, FlightEnd, depart
from fedlq_ray.federation.selection import Asking, Selection, called, chosen
from fedlq_ray.federation.selections import selection_of
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Task, Worker
from fedlq_ray.seeding import numpy_rng, seeded
from fedlq_ray.strategies import Member, Probe, Strategy
from fedlq_ray.strategies.asking import asked
from fedlq_ray.training.local import Plan
from fedlq_ray.training.payloads import MEMORIES


@dataclass(frozen=True)
class Rules:
    """What is constant over steps: the task, the strategy and the downlink."""

    task: Task
    strategy: Strategy
    downlink: Downlink
    selection: Selection

    @staticmethod
    def of(task: Task, strategy: Strategy) -> "Rules":
        worker, network = Worker(task), task.config.network
        initial = worker.initial_weights() if network.downlink_bits is not None else torch.empty(0)
        down = Downlink(
            worker.context, network.downlink_bits, network.downlink_cap_bits, initial, worker.broadcast_size()
        )
        return Rules(task, strategy, down, selection_of(task))

    def ask(self, method: str, round: int, *arguments: Any, keys: tuple[int, ...] = ()) -> Any:
        """The checked result of a strategy's method. `keys`: more keys of its random draws than the round."""
        return asked(self.strategy, self.task.config.seed, method, round, *arguments, keys=keys)

    def choose(self, state: ServerState, idle: NDArray[np.int64], count: int, dispatch: int, at_s: float) -> list[int]:
        """The clients that a dispatch asks, ascending."""
        seed = self.task.config.seed
        asking = Asking(idle, count, state.round, at_s, numpy_rng(seed, "cohort", dispatch))
        with seeded(seed, "selection.choose", dispatch):  # a user's selection may draw from global generators
            return chosen(self.selection, copy.deepcopy(state.selection), asking)  # and change its state in place

    def learned(self, state: ServerState, ended: Sequence[FlightEnd]) -> Any:
        """The selection's state after a step, which took these flights."""
        step, known = state.round, copy.deepcopy(state.selection)
        return called(self.selection, self.task.config.seed, "learn", step, known, step, ended)


@dataclass(frozen=True)
class Dispatch:
    """A moment at which clients are asked.

    Attributes:
        number: counted from 0; with the client, the key of all randomness.
        at_s: the simulated time.
        held: by client, the model that it holds, if the downlink is coded.
        shared: the model that all hold, if they hold the same.
    """

    number: int
    at_s: float
    held: Mapping[int, Tensor]
    shared: Shared | None


def plan(rules: Rules, state: ServerState, dispatch: Dispatch, clients: Sequence[int]) -> list[Flight]:
    """Asks the strategy for the plans of clients that are asked at the same moment; their flights, in order.

    Where a step waits for all of them, they are planned together. Otherwise each is planned alone, because nobody
    waits for it: it is the slowest of a cohort of one, and `Member.updates` says how many make up a step.

    Raises:
        FedLQError: a client that is planned alone has no plan.
    """
    if not rules.task.config.continuous:
        return _planned(rules, state, dispatch, clients)
    flights = []
    for client in clients:
        (flight,) = _planned(rules, state, dispatch, [client], keys=(dispatch.number, client))
        if not flight.sends:
            raise FedLQError(
                f"step {state.round}: {type(rules.strategy).__name__} has no plan for client {client}; where the "
                "server does not wait for all (server.buffer, server.deadline_s), each client that is asked needs one"
            )
        flights.append(flight)
    return flights


def _planned(
    rules: Rules, state: ServerState, dispatch: Dispatch, clients: Sequence[int], keys: tuple[int, ...] = ()
) -> list[Flight]:
    """The flights of clients that are planned together. `keys`: more keys of the strategy's random draws."""
    task, step = rules.task, state.round
    rates = {client: cohorts.downlink(task, client) for client in clients}
    downloads = rules.downlink.download(dispatch.held, state.weights, rates, dispatch.number, dispatch.shared)
    members = [cohorts.member(task, client, downloads[client].num_bytes) for client in clients]
    if task.config.train.adaptive_work > 1:
        known = state.payload_bytes and [state.payload_bytes] * len(members)
        expected = rules.ask("expected_bytes", step, state.strategy, step, members) or known
        members = cohorts.with_own_work(task, members, expected) if expected else members
    plans: Mapping[int, Plan] = rules.ask("plan", step, copy.deepcopy(state.strategy), step, members, keys=keys)
    if task.config.strategy.error_feedback != "cafe" and any(MEMORIES[p.error_feedback].common for p in plans.values()):
        raise FedLQError(
            f"step {step}: {type(rules.strategy).__name__} has plans with error_feedback='cafe'; set "
            "strategy.error_feedback=cafe too, which checks that all clients have the last mean update"
        )
    return [
        depart(task, m, dispatch.number, step, dispatch.at_s, downloads[m.client], plans.get(m.client)) for m in members
    ]


def probe(rules: Rules, state: ServerState, clients: Sequence[int]) -> Probe | None:
    """What the strategy measures in a step. `clients`: those under way, whose samples it may use."""
    found: Probe | None = rules.ask("probe", state.round, state.strategy, state.round)
    if found and getattr(rules.task.config.strategy, "probe_on", "proxy") == "clients":
        found = replace(found, clients=tuple(clients))
    return found


def shares_of(members: Sequence[Member], weights: Sequence[float | None]) -> list[float]:
    """Each member's share of the sum: its weight over the sum of weights; None: its samples."""
    own = [m.samples if weight is None else weight for m, weight in zip(members, weights, strict=True)]
    total = sum(own)
    return [weight / total for weight in own]
