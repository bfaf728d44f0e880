"""The rotation: Sylvester's matrix by its definition, and what a random rotation must do to any vector."""

import numpy as np
import pytest

from fedlq_ray.quantization.coding.hadamard import DENSE, hadamard, rotate, unrotate

LENGTHS = [1, 2, 3, 5, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 16385]


def vector(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def awkward(n):
    """Vectors that one pass of signs and Hadamard, or blocks of it, would not spread."""
    first, last, two, tail = np.zeros((4, n), np.float32)
    first[0], last[-1], two[:2], tail[-(n // 50) :] = 1, 1, (1, 0.6), 1
    heavy = np.random.default_rng(1).standard_t(3, n).astype(np.float32)
    return {"first": first, "last": last, "two": two, "tail": tail, "ones": np.ones(n, np.float32), "t3": heavy}


@pytest.mark.parametrize("power", range(9))
def test_hadamard_is_sylvesters_matrix(power):
    matrix = np.ones((1, 1))
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = vector(2**power)
    # float32 sums of 256 terms near 1: 256 x 6e-8 at worst.
    np.testing.assert_allclose(hadamard(x), matrix @ x / 2 ** (power / 2), atol=2e-5)


@pytest.mark.parametrize("n", LENGTHS)
def test_a_rotation_keeps_length_and_angles_and_is_undone(n):
    x, y = vector(n, 1), vector(n, 2)
    before = x.copy()
    a, b = rotate(x, 7), rotate(y, 7)
    back = unrotate(a, 7)
    assert np.array_equal(x, before) and a.dtype == back.dtype == np.float32 and a.shape == (n,)
    # float32: some 60 butterflies, each with a relative error of 6e-8.
    np.testing.assert_allclose(back, x, atol=5e-6)
    assert np.dot(a, a) == pytest.approx(np.dot(x, x), rel=1e-5)
    assert np.dot(a, b) == pytest.approx(np.dot(x, y), abs=1e-5 * n)


@pytest.mark.parametrize("n", [5, 64, 1000, 1024])
def test_the_seed_and_nothing_else_makes_the_rotation(n):
    x = vector(n)
    assert np.array_equal(rotate(x, 3), rotate(x, 3))
    assert not np.allclose(rotate(x, 3), rotate(x, 4))
    rotate(x, 2**32 - 1)  # the greatest seed that four bytes hold


@pytest.mark.parametrize("n", [16384, 16385, 24000, 32767])
@pytest.mark.parametrize("kind", ["first", "last", "two", "tail", "ones", "t3"])
def test_whatever_goes_in_looks_gaussian_in_every_part(n, kind):
    x = awkward(n)[kind]
    z = rotate(x, 11) * np.sqrt(n) / np.linalg.norm(x)
    for part in (z[:1000], z[n // 2 : n // 2 + 1000], z[-1000:]):
        # Six standard errors of 1000 draws of N(0, 1): mean 1, variance sqrt 2, fourth power sqrt 96, over sqrt 1000.
        assert abs(part.mean()) < 6 * 0.0316 and abs(np.square(part).mean() - 1) < 6 * 0.0447
        assert abs((part**4).mean() - 3) < 6 * 0.31
    assert np.abs(z).max() < 6.5  # 32767 draws of N(0, 1) beyond: 3e-6


@pytest.mark.parametrize("n", [2, 3, 8])
def test_small_rotations_are_uniform(n):
    seeds = range(4000)
    first = np.array([rotate(np.eye(n, dtype=np.float32)[0], seed) for seed in seeds])
    # A coordinate of a uniform direction has mean 0, variance 1/n and fourth moment 3/(n(n + 2)); each power of it is
    # at most 1, so that its standard error over 4000 draws is at most 1/sqrt(4000): six of them are 0.095.
    for power, expected in ((1, 0.0), (2, 1 / n), (3, 0.0), (4, 3 / (n * (n + 2)))):
        np.testing.assert_allclose((first**power).mean(0), expected, atol=0.095 * (1 if power < 2 else n**-0.5))
    # Two orthogonal vectors at once: for a uniform rotation E[(R11 R22)^2] = (n + 1)/((n - 1) n (n + 2)).
    second = np.array([rotate(np.eye(n, dtype=np.float32)[1], seed) for seed in seeds])
    joint = np.square(first[:, 0] * second[:, 1])
    expected = (n + 1) / ((n - 1) * n * (n + 2))
    assert abs(joint.mean() - expected) < 6 * joint.std() / 4000**0.5


def test_no_length_costs_more_codes_than_it_has_elements():
    assert len(rotate(vector(16385), 0)) == 16385 and DENSE < 16385
