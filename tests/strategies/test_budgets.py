"""What a member may send, where rounds are longer than the base; the rest is in test_baselines.py."""

import numpy as np
import pytest

from fedlq_ray.config.schemes import strategy_config
from fedlq_ray.strategies import Member
from fedlq_ray.strategies.budgets import thrifty


@pytest.mark.parametrize("work", [1.0, 4.0])
def test_noise_costs_in_proportion_to_the_work_of_a_round(work):
    def chosen(cost, work):
        config = strategy_config(name="own:any", cap_bits=8.0, noise_cost=cost, thrift=0.0)
        cohort = [Member(i, 10, 1.0, rate, work) for i, rate in enumerate((500.0, 5000.0, 5000.0))]
        return thrifty(config, cohort, 0, lambda bits: 50 + 160 * bits, lambda bits: 4.0 ** -np.asarray(bits), 0.0)

    assert chosen(100.0 / work, work) == chosen(100.0, 1.0) != chosen(1.0, 1.0)
