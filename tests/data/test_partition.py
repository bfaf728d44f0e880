import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.config.settings import DataConfig
from fedlq_ray.data import PARTITIONS, hold_out, label_counts, partition
from fedlq_ray.errors import ConfigError

LABELS = np.arange(2000) % 10


def whole(how, labels=LABELS, clients=20, seed=0, ids=None, samples=None, **changes):
    data = DataConfig(partition=how, **{"min_samples": 1, **changes})
    return partition(samples or len(labels), labels, ids, data, clients=clients, seed=seed)


def split(how, *arguments, **options):
    return whole(how, *arguments, **options).shards


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(set(PARTITIONS) - {"missing"})), st.integers(1, 30), st.integers(0, 2**62), st.integers(1, 5)
)
def test_every_sample_goes_to_one_client_and_none_is_too_small(how, clients, seed, least):
    shards = split(how, LABELS[:300], clients, seed, min_samples=least)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(300))
    assert len(shards) == clients and min(map(len, shards)) >= least
    assert all(s.dtype == np.int64 and (np.diff(s) > 0).all() for s in shards)  # sorted, none twice


@pytest.mark.parametrize("how", PARTITIONS)
def test_the_seed_decides(how):
    assert all(map(np.array_equal, split(how), split(how)))
    assert not all(map(np.array_equal, split(how), split(how, seed=1)))


def test_iid_sizes_differ_by_one_at_most():
    assert sorted({len(s) for s in split("iid", clients=30)}) == [66, 67]


def test_a_small_alpha_is_more_uneven_than_a_large_one():
    def spread(alpha):
        return label_counts(LABELS, split("dirichlet", alpha=alpha), 10).std()

    assert spread(0.1) > 1.5 * spread(1.0) > 2 * spread(1000.0)


def test_quantity_skews_sizes_and_keeps_labels_alike():
    sizes = {alpha: [len(s) for s in split("quantity", alpha=alpha)] for alpha in (0.3, 1000.0)}
    assert np.std(sizes[0.3]) > 5 * np.std(sizes[1000.0])

    def skew(how):  # of the largest client's labels, whose share would be 0.1 each
        counts = label_counts(LABELS, split(how), 10)
        largest = counts[counts.sum(axis=1).argmax()]
        return (largest / largest.sum()).max()

    assert skew("quantity") < 0.2 < skew("dirichlet")


def test_ten_thousand_clients_take_seconds():
    labels = np.arange(60_000) % 10
    start = time.process_time()
    for how in PARTITIONS:
        assert min(map(len, split(how, labels, 10_000, alpha=0.01, min_samples=5))) >= 5
    assert time.process_time() - start < 10  # all four take about 1 s


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_skew_gives_a_share_of_each_class_to_one_client_and_the_rest_evenly(clients, level, seed):
    labels = np.arange(20_000) % 10
    counts = label_counts(labels, split("skew", labels, clients, seed, level=level), 10)
    own = np.sort(counts, axis=0)  # by class: the others' samples, then the owner's, if its share is the largest
    if level > 1.5 / clients:
        assert (abs(own[-1] - 2000 * level) <= 1).all() and (own[-2] - own[0] <= 1).all()
        assert sorted(np.bincount(counts.argmax(0), minlength=clients))[0] >= 10 // clients


@settings(max_examples=30, deadline=None)
@given(st.integers(11, 30), st.integers(1, 5), st.integers(0, 2**32))
def test_missing_takes_whole_classes_and_shares_the_others_evenly(clients, missing, seed):
    shards = split("missing", clients=clients, missing=missing, seed=seed)
    counts = label_counts(LABELS, shards, 10)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(2000))
    assert ((counts == 0).sum(1) == missing).all()
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1


def test_missing_more_than_there_are_clients_for_is_refused():
    with pytest.raises(ConfigError, match=r"data.missing: if each of 2 clients .* lacks 9 of 10 classes"):
        split("missing", clients=2, missing=9)
    with pytest.raises(ConfigError, match="data.missing"):
        split("missing", missing=10)


def test_natural_clients_are_those_of_the_data():
    ids = np.array([f"c{i % 7}" for i in range(100)] + ["small"] * 3)
    found = whole("natural", np.zeros(103, int), 50, ids=ids, min_samples=10)
    assert found.names == [f"c{i}" for i in range(7)]
    assert all(set(ids[shard]) == {name} for name, shard in zip(found.names, found.shards, strict=True))
    assert found.note == "7 of 8 clients of the data take part; 1 have fewer than 10 samples (data.min_samples)"
    drawn = [whole("natural", np.zeros(103, int), 3, seed, ids=ids, min_samples=10).names for seed in range(5)]
    assert all(len(names) == 3 for names in drawn) and len(set(map(tuple, drawn))) > 1
    assert whole("natural", np.zeros(103, int), 3, 4, ids=ids, min_samples=10).names == drawn[4]
    with pytest.raises(ConfigError, match="of 8 clients of the data, 0 with 99 samples or more; two are needed"):
        whole("natural", np.zeros(103, int), ids=ids, min_samples=99)
    with pytest.raises(ConfigError, match="natural needs data with clients, but digits has none"):
        whole("natural")


def test_samples_without_labels_are_not_split_by_label():
    with pytest.raises(ConfigError, match="skew splits by label, but these samples have none; use iid or quantity"):
        whole("skew", None, samples=100)
    assert len(split("iid", None, samples=100)) == 20


def test_shards_bound_the_classes_of_a_client():
    # 40 pieces of 50 samples, 200 samples a class: no piece holds more than one class.
    assert ((label_counts(LABELS, split("shards"), 10) > 0).sum(axis=1) <= 2).all()


def test_too_many_clients_are_refused():
    with pytest.raises(ConfigError, match=r"data.min_samples.*clients.count.*2000"):
        split("iid", clients=300, min_samples=8)
    with pytest.raises(ConfigError, match=r"data.classes_per_client.*clients.count.*2000"):
        split("shards", clients=300, classes_per_client=7)


def test_the_hold_out_is_disjoint_and_leaves_a_sample():
    shards = [np.arange(10), np.arange(10, 11), np.arange(11, 111)]
    kept, held = hold_out(shards, 0.25, seed=0)
    assert [len(h) for h in held] == [2, 0, 25]
    for shard, k, h in zip(shards, kept, held, strict=True):
        assert np.array_equal(np.sort(np.concatenate([k, h])), shard)
        assert (np.diff(k) > 0).all() and (np.diff(h) > 0).all()
    assert [len(k) for k in hold_out(shards, 1.0, seed=0)[0]] == [1, 1, 1]
    alike = hold_out([np.arange(100)] * 2, 0.25, seed=0)[1]
    assert not np.array_equal(*alike)  # each client draws its own
    assert np.array_equal(held[2], hold_out(shards, 0.25, seed=0)[1][2])
    assert not np.array_equal(held[2], hold_out(shards, 0.25, seed=1)[1][2])


def test_label_counts_by_hand():
    counts = label_counts(np.array([0, 2, 2, 0, 1]), [np.array([0, 1, 2]), np.array([3, 4])], 4)
    assert counts.tolist() == [[1, 0, 2, 0], [1, 1, 0, 0]] and counts.dtype == np.int64
