import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.significance import exact, greedy, memory_saving

LEVELS = np.array([1, 2, 4, 8])


def problem(seed, layers):
    rng = np.random.default_rng(seed)
    sizes = 18 + np.ceil(rng.integers(1, 500, layers)[:, None] * LEVELS / 8).astype(np.int64)
    drops = np.sort(rng.random((layers, 4)), axis=1)[:, ::-1]
    return drops, sizes


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 1.1))
def test_exact_is_what_trying_all_gives_and_greedy_never_beats_it(seed, layers, tightness):
    drops, sizes = problem(seed, layers)
    budget = sizes[:, 0].sum() + tightness * (sizes[:, -1].sum() - sizes[:, 0].sum())
    rows = np.arange(layers)
    best = min(
        drops[rows, list(c)].sum()
        for c in itertools.product(range(4), repeat=layers)
        if sizes[rows, list(c)].sum() <= budget
    )
    found, fast = exact(drops, sizes, budget), greedy(drops, sizes, budget)
    assert abs(found.drop - best) < 1e-12
    assert found.size <= budget and fast.size <= budget
    assert fast.drop >= best - 1e-12


def test_a_budget_below_the_cheapest_gives_the_cheapest():
    drops, sizes = problem(0, 3)
    assert exact(drops, sizes, 1).choice == greedy(drops, sizes, 1).choice == (0, 0, 0)


def test_greedy_skips_a_layer_that_can_go_no_lower():
    # The first layer costs nothing to lower; two steps of it do not suffice, the second must follow.
    drops = np.array([[0.0, 0.0], [9.0, 0.0]])
    sizes = np.array([[1, 2], [10, 100]])
    assert greedy(drops, sizes, 20).choice == (1, 0) or greedy(drops, sizes, 20).choice == (0, 0)
    assert greedy(drops, sizes, 20).size <= 20


def test_memory_saving_is_the_share_of_the_models_bytes():
    assert np.allclose(memory_saving([300, 100], [8, 32]), [[0.75 * 24 / 32, 0], [0.25 * 24 / 32, 0]])
