import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.data import PARTITIONS, hold_out, label_counts, partition
from fedlq_ray.errors import ConfigError

LABELS = np.arange(2000) % 10
SETTINGS = {"alpha": 0.3, "classes_per_client": 2, "min_samples": 1}


def split(how, labels=LABELS, clients=20, seed=0, **changes):
    return partition(labels, how=how, clients=clients, seed=seed, **{**SETTINGS, **changes})


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(PARTITIONS)), st.integers(1, 30), st.integers(0, 2**62), st.integers(1, 5))
def test_every_sample_goes_to_one_client_and_none_is_too_small(how, clients, seed, least):
    shards = split(how, LABELS[:300], clients, seed, min_samples=least)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(300))
    assert len(shards) == clients and min(map(len, shards)) >= least


@pytest.mark.parametrize("how", PARTITIONS)
def test_the_seed_decides(how):
    assert all(map(np.array_equal, split(how), split(how)))
    assert not all(map(np.array_equal, split(how), split(how, seed=1)))


def test_a_small_alpha_is_more_uneven_than_a_large_one():
    def spread(alpha):
        return label_counts(LABELS, split("dirichlet", alpha=alpha), 10).std()

    assert spread(0.1) > 1.5 * spread(1.0) > 2 * spread(1000.0)


def test_shards_bound_the_classes_of_a_client():
    # 40 pieces of 50 samples, 200 samples a class: no piece holds more than one class.
    assert ((label_counts(LABELS, split("shards"), 10) > 0).sum(axis=1) <= 2).all()


def test_too_many_clients_are_refused():
    with pytest.raises(ConfigError, match=r"data.min_samples.*clients.count.*2000"):
        split("iid", clients=300, min_samples=8)


def test_the_hold_out_is_disjoint_and_leaves_a_sample():
    shards = [np.arange(10), np.arange(10, 11), np.arange(11, 111)]
    kept, held = hold_out(shards, 0.25, seed=0)
    assert [len(h) for h in held] == [2, 0, 25]
    for shard, k, h in zip(shards, kept, held, strict=True):
        assert np.array_equal(np.sort(np.concatenate([k, h])), shard)
