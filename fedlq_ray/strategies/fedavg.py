"""FedAvg. McMahan et al., AISTATS 2017, arXiv:1602.05629, Algorithm 1.

Departs from it: a client sends its update (or its model, `strategy.payload`) in the wire format, as float32. Its weight
is its samples per pass, min(shard, `train.max_samples`), where the paper uses the whole shard.
"""

from collections.abc import Mapping, Sequence

from fedlq_ray.strategies.base import Member, Strategy, StrategyContext
from fedlq_ray.training.local import Plan


class FedAvg(Strategy):
    """Sends everything at full precision."""

    timeless = True

    def __init__(self, context: StrategyContext) -> None:
        self._plan = context.at_levels([32] * len(context.quantized))

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        return {member.client: self._plan for member in cohort}
