import numpy as np
import pytest

from fedlq_ray.quantization.coding.cells import count_below

DRAWN = np.random.default_rng(0)
EDGES = {
    "even": np.arange(10.0),
    "one": np.array([0.5]),
    "none": np.zeros(0),
    "equal": np.array([1.0, 1.0, 1.0, 2.0]),
    "all equal": np.full(3, 2.0),
    "crowded": np.sort(DRAWN.lognormal(0, 3, 40)),
    "tiny": np.arange(1.0, 9.0) * 1e-44,
    "near": 1 + np.arange(9.0) * 2.0**-23,
}


@pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES)
def test_it_counts_as_a_search_does(edges):
    edges = edges.astype(np.float32)
    beside = [np.nextafter(edges, np.float32(sign * np.inf)) for sign in (-1, 1)]
    values = np.concatenate([edges, *beside, DRAWN.normal(0, 5, 1000).astype(np.float32), np.float32([-3e38, 0, 3e38])])
    assert np.array_equal(count_below(edges, values), np.searchsorted(edges, values))
