"""FedHQ. Chen, Shen, Zhang, Tang, "Dynamic aggregation for heterogeneous quantization in federated learning", IEEE
Transactions on Wireless Communications 20(10), 2021: weights in the average that minimise the bound on convergence
when clients quantize differently: p_n / (1 + q_n). Errors q_n |x_n|^2 are independent; the 1 is the signal's own share.

We could check only the abstract: weights come from the clients' own errors, which clients send. The form
p_n / (1 + q_n) is the project's derivation.
Departs from it: the paper takes levels as given. Here a client gets the highest of `strategy.levels` whose payload fits
its budget (`strategy.budget`: its link and its computing). Clients do not send q_n: the server measures it for each
level, on the last mean update with the clients' quantizer. Before the first update, weights are FedAvg's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from fedlq_ray.config import schemes
from fedlq_ray.strategies.base import Member, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.budgets import budgets, bytes_at_levels
from fedlq_ray.strategies.costs import layer_sizes, require_update, squared_errors
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class Errors:
    """q by level, measured on the last mean update."""

    errors: dict[int, float] = field(default_factory=dict)


class FedHQ(Strategy[Errors]):
    """One level per client, by its budget; clients with more error get less weight."""

    def __init__(self, context: StrategyContext[schemes.FedHQ]) -> None:
        require_update(context)
        self.context = context
        self.sizes = context.fixed_size + layer_sizes(context, context.config.levels).sum(axis=0)

    def init(self) -> Errors:
        return Errors()

    def plan(self, state: Errors, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        config = self.context.config
        levels: tuple[int, ...] = config.levels
        limits = budgets(config, cohort, round, partial(bytes_at_levels, self.context), cheapest=float(self.sizes[0]))
        fitting = [np.flatnonzero(self.sizes <= limit) for limit in limits]
        chosen = [levels[int(fits[-1]) if len(fits) else 0] for fits in fitting]
        plans = {bits: self.context.at_levels([bits] * len(self.context.quantized)) for bits in set(chosen)}
        return {
            m.client: replace(plans[bits], weight=m.samples / (1 + state.errors.get(bits, 0.0)))
            for m, bits in zip(cohort, chosen, strict=True)
        }

    def learn(self, state: Errors, round: int, result: RoundResult) -> Errors:
        levels, layers = self.context.config.levels, self.context.quantized
        energy = sum(float(result.update[layer.start : layer.stop].double().square().sum()) for layer in layers)
        if not energy > 0:  # no client replied: keep the errors of the previous round
            return state
        errors = squared_errors(self.context, result.update, levels).sum(axis=0) / energy
        return Errors(dict(zip(levels, errors.tolist(), strict=True)))
