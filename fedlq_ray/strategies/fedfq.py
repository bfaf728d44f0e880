"""FedFQ. Li, Xie, Ye, Ma, Ma, Li, "FedFQ: federated learning with fine-grained quantization", arXiv:2408.08977: 0, 2,
4 or 8 bits for each parameter, by its magnitude. `FineGrained` documents how they are found, sent and billed.

Departs from it: the paper's budgets of about one bit per parameter leave out the map of each parameter's bits, which
the server needs to decode. Here the budget includes it, so rates start at 3 bits. Each layer has a budget, as in the
authors' code.
"""

from collections.abc import Mapping, Sequence

from fedlq_ray.quantization.finegrained import FineGrained
from fedlq_ray.strategies.adaquantfl import same_for_all
from fedlq_ray.strategies.base import Member, Strategy, StrategyContext
from fedlq_ray.training.local import Plan


class FedFQ(Strategy):
    """Bits per parameter vary within a layer; all clients have the same rate.

    Args:
        bits: mean bits per parameter of a layer, 2 of them for the map.
    """

    timeless = True

    def __init__(self, context: StrategyContext, bits: float = 4.0) -> None:
        self._plan = same_for_all(context, FineGrained(bits))

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        return {member.client: self._plan for member in cohort}
