"""Two levels in turn: one for even rounds, another for odd ones."""

from collections.abc import Mapping, Sequence

from fedlq_ray.strategies.base import Member, Setting, Strategy
from fedlq_ray.training.local import Plan


class Alternate(Strategy):
    """All layers of all clients at `even` bits in even rounds, and at `odd` bits in odd ones."""

    timeless = True

    def __init__(self, setting: Setting, even: int = 2, odd: int = 4) -> None:
        self.plans = [
            Plan(setting.config.payload, setting.one(setting.quantizer_at(bits)), setting.error_feedback)
            for bits in (even, odd)
        ]

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        return {member.client: self.plans[round % 2] for member in cohort}
