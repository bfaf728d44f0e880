"""FedFQ. Li, Xie, Ye, Ma, Ma, Li, "FedFQ: federated learning with fine-grained quantization", arXiv:2408.08977: bits of
0, 2, 4 or 8 for each parameter, by its size; see `FineGrained` for how they are found, sent and billed.

Departs from it: the paper's budgets of about a bit a parameter do not bill the map of who has how many, without which
nobody can decode; here it is in the budget, so that rates start at 3 bits. A budget for each layer, as in the authors'
code.
"""

from collections.abc import Mapping, Sequence

from fedlq_ray.quantization.finegrained import FineGrained
from fedlq_ray.strategies.adaquantfl import same_for_all
from fedlq_ray.strategies.base import Member, Setting, Strategy
from fedlq_ray.training.local import Plan


class FedFQ(Strategy):
    """Bits by parameter, the same rate for all clients.

    Args:
        bits: a parameter's share of a layer's bytes, 2 of them for the map.
    """

    timeless = True

    def __init__(self, setting: Setting, bits: float = 4.0) -> None:
        self._plan = same_for_all(setting, FineGrained(bits))

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        return {member.client: self._plan for member in cohort}
