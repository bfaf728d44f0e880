"""Plans a round: which clients take part, what each may fetch, and what each will send."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedlq_ray.federation import cohorts
from fedlq_ray.federation.downlink import Downlink, Offer
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Job, Task, Workplace
from fedlq_ray.strategies import Member, Probe, Strategy
from fedlq_ray.strategies.asking import asked
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class Planned:
    """The plan of a round, made before it trains.

    Attributes:
        members: the cohort, in order.
        offers: the model that each member may fetch.
        plans: what each member sends; clients without a plan skip the round and do not delay it.
        jobs: one for each member that has a plan and does not drop out, in order.
        shares: each job's share of the sum.
        probe: the measurement that the strategy requests while the round trains.
    """

    round: int
    members: Sequence[Member]
    offers: Mapping[int, Offer]
    plans: Mapping[int, Plan]
    jobs: Sequence[Job]
    shares: Sequence[float]
    probe: Probe | None


@dataclass(frozen=True)
class Rules:
    """What is constant over rounds: the task, the strategy and the downlink."""

    task: Task
    strategy: Strategy
    downlink: Downlink

    @staticmethod
    def of(task: Task, strategy: Strategy) -> "Rules":
        place, network = Workplace(task), task.config.network
        initial = place.initial_weights() if network.downlink_bits is not None else torch.empty(0)
        down = Downlink(
            place.setting, network.downlink_bits, network.downlink_cap_bits, initial, place.broadcast_size()
        )
        return Rules(task, strategy, down)

    def ask(self, method: str, round: int, *arguments: Any) -> Any:
        """The checked result of a strategy's method."""
        return asked(self.strategy, self.task.config.seed, method, round, *arguments)


def plan(rules: Rules, state: ServerState) -> Planned:
    """Draws a cohort and asks the strategy for each member's plan."""
    task, round = rules.task, state.round
    drawn = cohorts.draw(task, round)
    rates = {client: cohorts.downlink(task, client) for client in drawn}
    offers = rules.downlink.offer(state.held, state.weights, rates, round)
    members = [cohorts.member(task, client, offers[client].num_bytes) for client in drawn]
    if task.config.train.adaptive_work > 1:
        known = state.payload_bytes and [state.payload_bytes] * len(members)
        expected = rules.ask("expected_bytes", round, state.strategy, round, members) or known
        members = cohorts.with_own_work(task, members, expected) if expected else members
    plans = rules.ask("plan", round, copy.deepcopy(state.strategy), round, members)
    answering = [m for m in members if m.client in plans and not cohorts.drops_out(task, round, m.client)]
    jobs = [Job(round, m.client, plans[m.client], samples_of_member(task, m)) for m in answering]
    probe = rules.ask("probe", round, state.strategy, round)
    if probe and getattr(task.config.strategy, "probe_on", "proxy") == "clients":
        probe = replace(probe, clients=tuple(drawn))
    return Planned(round, members, offers, plans, jobs, shares_of(answering, plans), probe)


def shares_of(members: Sequence[Member], plans: Mapping[int, Plan]) -> list[float]:
    """Each member's share of the sum: its weight over the sum of weights."""
    weights = [m.samples if (own := plans[m.client].weight) is None else own for m in members]
    total = sum(weights)
    return [weight / total for weight in weights]


def samples_of_member(task: Task, member: Member) -> int:
    """Samples that a member trains on in a round, over all passes."""
    return int(0.5 + member.work * cohorts.base_work(task, member.samples))
