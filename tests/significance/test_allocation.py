import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.quantization import LAYER_HEADER, MinMax
from fedlq_ray.significance import best, bounded, exact, greedy, memory_saving

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
    least = min(
        drops[rows, list(c)].sum()
        for c in itertools.product(range(4), repeat=layers)
        if sizes[rows, list(c)].sum() <= budget
    )
    found, fast = exact(drops, sizes, budget), greedy(drops, sizes, budget)
    assert abs(found.drop - least) < 1e-12 and abs(best(drops, sizes, budget).drop - least) < 1e-12
    assert found.size <= budget and fast.size <= budget
    assert fast.drop >= least - 1e-12


def unequal(rng, layers):
    """Sizes of six levels of min-max, and drops that fall fourfold a bit; now and then one layer has nine tenths."""
    counts = rng.integers(10, 10_000, layers)
    if rng.random() < 0.3:
        counts[rng.integers(layers)] = 9 * counts.sum()
    bits = np.array([1, 2, 3, 4, 6, 8])
    sizes = np.array([[LAYER_HEADER + MinMax(int(b)).size(int(count)) for b in bits] for count in counts])
    return fourfold(rng, bits, layers), sizes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 5))
def test_the_best_is_never_worse_than_a_level_for_all_and_near_its_bound(seed, layers, level):
    """At exactly a level's bytes, which is what the slowest member of a cohort gets."""
    drops, sizes = unequal(np.random.default_rng(seed), layers)
    budget = sizes[:, level].sum()
    found, bound = bounded(drops, sizes, budget)
    assert found.size <= budget and found == best(drops, sizes, budget)
    assert found.drop <= drops[:, level].sum() * (1 + 1e-12)
    assert bound <= found.drop * (1 + 1e-9)
    if layers <= 5:
        assert found.drop <= bound * (1 + 1e-9)
    if layers <= 8:
        assert bound <= exact(drops, sizes, budget).drop * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 60), st.floats(0.01, 1))
def test_the_best_is_above_its_bound_by_less_than_a_step_of_a_small_layer(seed, layers, tightness):
    drops, sizes = unequal(np.random.default_rng(seed), layers)
    budget = sizes[:, 0].sum() + tightness * (sizes[:, -1] - sizes[:, 0]).sum()
    found, bound = bounded(drops, sizes, budget)
    small = np.argsort(-np.ptp(sizes, axis=1), kind="stable")[5:]
    assert bound * (1 - 1e-9) <= found.drop <= (bound + np.ptp(drops[small], axis=1).max()) * (1 + 1e-9)


def test_the_best_does_not_spend_where_nothing_is_lost():
    drops, sizes = np.array([[0.0, 0.0], [9.0, 1.0]]), np.array([[1, 2], [10, 100]])
    assert best(drops, sizes, 1000).choice == (0, 1)


def any_falling(rng, bits, layers):
    """Drops of no order but that they fall with the level."""
    return np.sort(rng.random((layers, len(bits))), axis=1)[:, ::-1]


def fourfold(rng, bits, layers):
    """Drops that fall fourfold a bit, layers of unequal weight, with noise: made to fall, as probes' are."""
    weight, noise = np.exp(2 * rng.normal(size=(layers, 1))), np.exp(0.3 * rng.normal(size=(layers, len(bits))))
    return np.maximum.accumulate((weight * noise * 4.0**-bits)[:, ::-1], axis=1)[:, ::-1]


# 300 tables of the CNN's layers, budgets between the cheapest and the dearest payload. `pytest -s -k distance` prints
# what docs/algorithms/fedlq.md tells.
@pytest.mark.parametrize(("tables", "ninetieth"), [(any_falling, 1.02), (fourfold, 1.12)])
def test_the_distance_of_greedy_from_exact(tables, ninetieth):
    rng, bits = np.random.default_rng(0), np.array([1, 2, 3, 4, 6, 8])
    sizes = np.array([[LAYER_HEADER + MinMax(int(b)).size(d) for b in bits] for d in (416, 12_832, 131_328, 2_570)])
    ratios = []
    for _ in range(300):
        drops = tables(rng, bits, len(sizes))
        budget = sizes[:, 0].sum() + rng.random() * (sizes[:, -1] - sizes[:, 0]).sum()
        ratios.append(greedy(drops, sizes, budget).drop / exact(drops, sizes, budget).drop)
    median, high = np.quantile(ratios, [0.5, 0.9])
    equal = np.mean(np.array(ratios) < 1 + 1e-9)
    print(f"\n{tables.__name__}: median {median:.3f}, p90 {high:.3f}, max {max(ratios):.2f}, exact in {equal:.0%}")
    assert min(ratios) >= 1 - 1e-9
    assert median <= 1 + 1e-9 and high <= ninetieth


def test_a_budget_below_the_cheapest_gives_the_cheapest():
    drops, sizes = problem(0, 3)
    assert exact(drops, sizes, 1).choice == greedy(drops, sizes, 1).choice == best(drops, sizes, 1).choice == (0, 0, 0)
    assert bounded(drops, sizes, 1)[1] == np.inf


def test_greedy_skips_a_layer_that_can_go_no_lower():
    # The first layer costs nothing to lower; two steps of it do not suffice, the second must follow.
    drops = np.array([[0.0, 0.0], [9.0, 0.0]])
    sizes = np.array([[1, 2], [10, 100]])
    assert greedy(drops, sizes, 20).choice == (1, 0) or greedy(drops, sizes, 20).choice == (0, 0)
    assert greedy(drops, sizes, 20).size <= 20


def test_memory_saving_is_the_share_of_the_models_bytes():
    assert np.allclose(memory_saving([300, 100], [8, 32]), [[0.75 * 24 / 32, 0], [0.25 * 24 / 32, 0]])
