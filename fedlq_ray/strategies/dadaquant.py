"""DAdaQuant. Hoenig, Zhao, Mullins, "DAdaQuant: doubly-adaptive quantization for communication-efficient federated
learning", ICML 2022, arXiv:2111.00465, sections 3.3 to 3.6 and Theorem 1; checked against the paper's text.

Over time: with the running loss G_t = psi G_(t-1) + (1 - psi) loss_t, levels double when G_t >= G_(t+1-phi), then stay
for at least phi rounds. By client: q_i = max(1, round(sqrt(a/b) w_i^(2/3))), a = sum w_j^(2/3), b = sum w_j^2 / q^2,
which keeps the average's variance at that of q for all, with the smallest sum of levels.
Departs from it: losses are those that clients see while they train (the paper takes an extra pass over their data). G
starts at the first loss. phi is in rounds, where the paper uses a tenth of the run's. Each layer has its own norm,
unless `strategy.scope=model`. Runs of zeros are coded as in `QsgdElias`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlq_ray.quantization.qsgd_elias import QsgdElias
from fedlq_ray.strategies.adaquantfl import same_for_all
from fedlq_ray.strategies.base import Member, RoundResult, Strategy, StrategyContext, by_samples
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class Stall:
    """The levels, the running loss, and up to phi of its last values since the levels rose."""

    q: int
    running: float | None = None
    since: list[float] = field(default_factory=list)


class DAdaQuant(Strategy[Stall]):
    """Levels double when training stalls; clients with more weight get more levels.

    Args:
        q_min, q_max: initial and maximum levels; the paper's q_max is the best static level of each data set.
        psi: weight of the past in the running loss.
        phi: rounds over which the running loss is compared.
    """

    timeless = True

    def __init__(
        self, context: StrategyContext, q_min: int = 1, q_max: int = 16, psi: float = 0.9, phi: int = 10
    ) -> None:
        if not 1 <= q_min <= q_max:
            raise ValueError(f"q_min must be 1 to q_max ({q_max}), got {q_min}")
        if not 0 <= psi < 1 or phi < 2:
            raise ValueError(f"psi must be in [0, 1) and phi at least 2, got {psi} and {phi}")
        self.context, self.q_min, self.q_max, self.psi, self.phi = context, q_min, q_max, psi, phi

    def init(self) -> Stall:
        return Stall(self.q_min)

    def plan(self, state: Stall, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        levels = client_levels(state.q, by_samples(cohort))
        plans = {q: same_for_all(self.context, QsgdElias(levels=q, bucket=None, norm="l2")) for q in set(levels)}
        return {member.client: plans[q] for member, q in zip(cohort, levels, strict=True)}

    def learn(self, state: Stall, round: int, result: RoundResult) -> Stall:
        if result.train_loss is None:
            return state
        last = result.train_loss if state.running is None else state.running
        running = self.psi * last + (1 - self.psi) * result.train_loss
        since = [*state.since, running][-self.phi :]
        if len(since) == self.phi and since[-1] >= since[0]:
            return Stall(min(2 * state.q, self.q_max), running)
        return Stall(state.q, running, since)

    def report(self, state: Stall) -> dict[str, Any]:
        return {"quantization_levels": state.q}


def client_levels(q: int, weights: Sequence[float]) -> list[int]:
    """Theorem 1's q_i, rounded: each client's levels by its share of the average."""
    a = sum(w ** (2 / 3) for w in weights)
    b = sum(w**2 for w in weights) / q**2
    return [max(1, round(math.sqrt(a / b) * w ** (2 / 3))) for w in weights]
