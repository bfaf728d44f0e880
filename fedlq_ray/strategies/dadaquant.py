"""DAdaQuant. Hoenig, Zhao, Mullins, "DAdaQuant: doubly-adaptive quantization for communication-efficient federated
learning", ICML 2022, arXiv:2111.00465, sections 3.3 to 3.6 and Theorem 1; checked against the paper's text.

In time: with the running loss G_t = psi G_(t-1) + (1 - psi) loss_t, levels double when G_t >= G_(t+1-phi), then stay
for phi rounds at least. By client: q_i = max(1, round(sqrt(a/b) w_i^(2/3))), a = sum w_j^(2/3), b = sum w_j^2 / q^2,
which keeps the variance of the average at that of q for all, with the fewest levels in sum.
Departs from it: the losses are those that clients see while they train (the paper takes an extra pass over their data);
G starts at the first loss; phi is in rounds, where the paper has a tenth of the run's; a norm for each layer, unless
`strategy.scope=model`; runs of zeros are coded as `QsgdElias` codes them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlq_ray.quantization.qsgd_elias import QsgdElias
from fedlq_ray.strategies.adaquantfl import same_for_all
from fedlq_ray.strategies.base import Member, News, Setting, Strategy
from fedlq_ray.training.local import Plan


class DAdaQuant(Strategy):
    """Levels that double when training stalls, more of them for clients of more weight.

    Args:
        q_min, q_max: levels at first and at most; the paper's q_max is the best static level of each data set.
        psi: weight of the past in the running loss.
        phi: rounds across which it is compared.
    """

    remembers = ("q", "running", "since")
    timeless = True

    def __init__(self, setting: Setting, q_min: int = 1, q_max: int = 16, psi: float = 0.9, phi: int = 10) -> None:
        if not 1 <= q_min <= q_max:
            raise ValueError(f"q_min must be 1 to q_max ({q_max}), got {q_min}")
        if not 0 <= psi < 1 or phi < 2:
            raise ValueError(f"psi must be in [0, 1) and phi at least 2, got {psi} and {phi}")
        self.setting, self.q, self.q_max, self.psi, self.phi = setting, q_min, q_max, psi, phi
        self.running: float | None = None
        self.since: list[float] = []  # the running loss after each round since q was raised, the last phi of them

    def plan(self, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        levels = client_levels(self.q, self.weights(cohort))
        plans = {q: same_for_all(self.setting, QsgdElias(levels=q, bucket=None, norm="l2")) for q in set(levels)}
        return {member.client: plans[q] for member, q in zip(cohort, levels, strict=True)}

    def learn(self, round: int, news: News) -> None:
        if news.train_loss is None:
            return
        last = news.train_loss if self.running is None else self.running
        self.running = self.psi * last + (1 - self.psi) * news.train_loss
        self.since = [*self.since, self.running][-self.phi :]
        if len(self.since) == self.phi and self.since[-1] >= self.since[0]:
            self.q, self.since = min(2 * self.q, self.q_max), []

    def report(self) -> dict[str, Any]:
        return {"quantization_levels": self.q}


def client_levels(q: int, weights: Sequence[float]) -> list[int]:
    """Theorem 1's q_i, rounded: levels of each client, by its share of the average."""
    a = sum(w ** (2 / 3) for w in weights)
    b = sum(w**2 for w in weights) / q**2
    return [max(1, round(math.sqrt(a / b) * w ** (2 / 3))) for w in weights]
