"""What a member may send, where rounds are longer than the base; the rest is in test_baselines.py."""

import numpy as np
import pytest

from fedlq_ray.config.schemes import strategy_config
from fedlq_ray.strategies import Member
from fedlq_ray.strategies.budgets import thrifty


@pytest.mark.parametrize(("work", "rate"), [(1.0, 1.0), (4.0, 1.0), (1.0, 0.5), (2.0, 0.25)])
def test_noise_costs_by_the_square_of_how_far_a_round_goes(work, rate):
    def chosen(cost, work, server_lr):
        config = strategy_config(name="own:any", cap_bits=8.0, noise_cost=cost, thrift=0.0)
        cohort = [Member(i, 10, 1.0, link, work, server_lr=server_lr) for i, link in enumerate((500.0, 5000.0, 5000.0))]
        return thrifty(config, cohort, 0, lambda bits: 50 + 160 * bits, lambda bits: 4.0 ** -np.asarray(bits), 0.0)

    far = (work * rate) ** 2
    assert chosen(100.0 / far, work, rate) == chosen(100.0, 1.0, 1.0) != chosen(1.0, 1.0, 1.0)
