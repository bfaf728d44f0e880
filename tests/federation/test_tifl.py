"""TiFL: tiers by duration, drawn by rank of their loss, with credits; by hand."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from untrained import arrived, timed_task

from fedlq_ray.federation.selection import Asking, chosen
from fedlq_ray.federation.tifl import TiFL

TASK = timed_task([float(second) for second in range(1, 11)])


def asking(idle=range(10), count=2, seed=0):
    return Asking(np.array(list(idle)), count, 0, 0.0, np.random.default_rng(seed))


def drawn(tifl, state, draws=40):
    return Counter(tuple(chosen(tifl, state, asking(seed=seed))) for seed in range(draws))


def test_the_clients_of_a_step_are_of_one_tier():
    tifl = TiFL(TASK, tiers=5)
    assert tifl.tier_of(tifl.init()).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert set(drawn(tifl, tifl.init())) == {(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)}


def test_a_tier_without_credits_is_not_drawn_while_another_has_some():
    tifl = TiFL(TASK, tiers=5, credits=3)
    poor = replace(tifl.init(), spent=(3, 3, 2, 3, 3))
    assert set(drawn(tifl, poor, 10)) == {(4, 5)}
    assert len(drawn(tifl, replace(poor, spent=(3,) * 5))) == 5  # none has any: all alike


def test_the_nearest_tiers_fill_up():
    tifl = TiFL(TASK, tiers=5, credits=3)
    poor = replace(tifl.init(), spent=(3, 3, 2, 3, 3))
    found = {tuple(chosen(tifl, poor, asking(idle=[0, 5, 6, 9], seed=seed))) for seed in range(20)}
    assert found == {(5, 6)}


def test_tiers_are_drawn_by_rank():
    tifl = TiFL(TASK, tiers=3)
    state = tifl.init()
    assert tifl.ranked((1.0, 3.0, 2.0), (0, 0, 0)) == (0, 2, 1)  # over 3 x 2 / 2
    assert tifl.ranked((1.0, math.inf, 2.0), (0, 0, 0)) == (0, 2, 1)  # not known: as the worst
    assert TiFL(TASK, tiers=3, credits=1).ranked((1.0, 3.0, 2.0), (0, 1, 0)) == (0, 0, 1)
    found = Counter(
        tifl.tier_of(state)[client]
        for seed in range(3000)
        for client in chosen(tifl, replace(state, weights=(0.0, 2.0, 1.0)), asking(count=1, seed=seed))
    )
    assert found[0] == 0 and found[1] == pytest.approx(2000, abs=104)  # four standard deviations


def test_a_tier_of_weight_0_is_asked_if_nobody_else_is_idle():
    tifl = TiFL(TASK, tiers=5)
    state = replace(tifl.init(), weights=(0.0, 1.0, 2.0, 3.0, 4.0))
    assert chosen(tifl, state, asking(idle=[0, 1])) == [0, 1]


def test_tiers_are_ranked_when_the_last_one_became_no_better():
    tifl = TiFL(TASK, tiers=5, interval=2)

    def steps(state, first, *losses_by_clients):
        for step, losses in enumerate(losses_by_clients, start=first):
            state = tifl.learn(state, step, [arrived(TASK, client, loss) for client, loss in losses.items()])
        return state

    first = steps(tifl.init(), 0, {0: 1.0, 1: 3.0}, {2: 5.0, 3: 5.0})
    assert first.spent == (1, 1, 0, 0, 0) and first.weights == (1.0,) * 5
    assert first.before == (2.0, 5.0, math.inf, math.inf, math.inf)
    better = steps(first, 2, {8: 4.0}, {2: 4.0, 3: 5.0})
    assert better.before == (2.0, 4.5, math.inf, math.inf, 4.0) and better.weights == (1.0,) * 5
    same = steps(first, 2, {8: 4.0}, {2: 5.0, 3: 5.0})
    assert same.weights == (0, 2, 4, 3, 1)  # losses 2, 5, unknown, unknown, 4


def test_tiers_are_made_from_the_first_payloads():
    task = timed_task([1.0, 2.0, 3.0, 4.0], "network.uplink_free=false")
    slow = [replace(profile, uplink_mbps=8e-4 if n < 2 else 8.0) for n, profile in enumerate(task.profiles)]
    task = replace(task, profiles=slow)
    tifl = TiFL(task, tiers=2)
    assert tifl.tier_of(tifl.init()).tolist() == [1, 1, 0, 0]  # the whole model, at 100 bytes per second
    small = tifl.learn(tifl.init(), 0, [arrived(task, 0, 1.0, b"x" * 10)])
    assert tifl.tier_of(small).tolist() == [0, 0, 1, 1]
    assert tifl.learn(small, 1, [arrived(task, 2, 1.0, b"x" * 9999)]).sizes == small.sizes
