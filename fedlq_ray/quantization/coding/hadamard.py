"""A random rotation from a seed: orthonormal, of any length, in O(n log n), and identical on every machine.

Purpose: the coordinates of a rotated vector resemble draws from N(0, |x|^2/n), whatever x is.
Source: the randomised Hadamard transform H D of DRIVE (Vargaftik et al., NeurIPS 2021, arXiv:2105.08339)
and EDEN (ICML 2022, arXiv:2108.08842): random signs D, then a Walsh-Hadamard matrix H over sqrt(n).
Departs from it:
- Any length, without padding, so that n elements cost n codes: H D acts on the first p elements, then on the last p,
  where p is the largest power of two that is at most n. If n is a power of two, H D is applied once.
- Two passes, with the elements shuffled in between. One pass of H D maps a vector with few large elements to few
  distinct values (two elements a, b: to a + b and a - b up to sign), and two windows leave unequal energy in the parts
  that they do not share. The second pass corrects both.
- Up to 64 elements, the rotation is uniform over all rotations (Haar), as the papers' theorems assume. So few random
  signs are far from Haar, and estimators that are unbiased under Haar would be visibly biased. Above 64 elements, we
  saw bias only for vectors with two nonzero elements: 1.5 % of the norm at 128 to 256 elements and less at 512.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
DENSE = 64  # elements; up to this size, n^2/2 operations are cheap
BLOCK = 2**17  # elements that are processed at a time


def rotate(x: Floats, seed: int) -> Floats:
    """Rotates x (n,), n >= 1, by the rotation that the seed determines."""
    if len(x) <= DENSE:
        return _haar(x, seed, inverse=False)
    first, order, second = _draws(len(x), seed)
    return _forth(_forth(x.copy(), first)[order], second)


def unrotate(z: Floats, seed: int) -> Floats:
    """Inverts `rotate` on z (n,), up to rounding."""
    if len(z) <= DENSE:
        return _haar(z, seed, inverse=True)
    first, order, second = _draws(len(z), seed)
    y = np.empty_like(z)
    y[order] = _back(z.copy(), second)
    return _back(y, first)


def hadamard(x: Floats) -> Floats:
    """H x / sqrt(n) for x (n,), n a power of two, and H Sylvester's matrix; it is its own inverse.

    H with a x b rows is the Kronecker product of those with a and b rows. So x, as an a x b matrix, is transformed by
    butterflies along its columns and, transposed, along its rows. Every operation then has a long contiguous axis, and
    processes as many columns at a time as a processor's cache holds.
    """
    power = len(x).bit_length() - 1
    y = torch.from_numpy(x).view(2 ** (power // 2), -1)
    for _ in range(2):
        rows, width = y.shape
        z, columns = torch.empty(width, rows), max(1, BLOCK // rows)
        for start in range(0, width, columns):
            block = y[:, start : start + columns].clone(memory_format=torch.contiguous_format)
            z[start : start + columns] = _butterflied(block).T
        y = z
    return y.mul_(2 ** (-power / 2)).view(-1).numpy()


def _butterflied(y: Tensor) -> Tensor:
    """Applies H along the columns of y (rows, width); overwrites y. PyTorch does this faster than NumPy."""
    rows, width = y.shape
    other, half = torch.empty_like(y), 1
    while half < rows:
        old, new = y.view(-1, 2, half * width), other.view(-1, 2, half * width)
        torch.add(old[:, 0], old[:, 1], out=new[:, 0])
        torch.sub(old[:, 0], old[:, 1], out=new[:, 1])
        y, other, half = other, y, 2 * half
    return y


def _forth(x: Floats, signs: list[Floats]) -> Floats:
    """One pass over x, in place: signs and H on the first elements, then signs and H on the last ones."""
    p = len(signs[0])
    for start, flips in zip(_starts(len(x), p), signs, strict=True):
        x[start : start + p] = hadamard(x[start : start + p] * flips)
    return x


def _back(x: Floats, signs: list[Floats]) -> Floats:
    """Inverts `_forth`, in place."""
    p = len(signs[0])
    for start, flips in reversed(list(zip(_starts(len(x), p), signs, strict=True))):
        x[start : start + p] = hadamard(x[start : start + p]) * flips
    return x


def _starts(n: int, p: int) -> list[int]:
    """Returns the start of each window of p elements."""
    return [0] if p == n else [0, n - p]


def _draws(n: int, seed: int) -> tuple[list[Floats], NDArray[np.int64], list[Floats]]:
    """Draws signs for each window of the first pass, the order in between, and signs for the second pass."""
    rng, p = _generator(seed), 2 ** (n.bit_length() - 1)
    # Each window needs new signs: H of a single element is constant, and H of a constant is a single element again.
    first, second = ([_signs(p, rng) for _ in _starts(n, p)] for _ in range(2))
    return first, rng.permutation(n), second


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def _signs(n: int, rng: np.random.Generator) -> Floats:
    bits = np.unpackbits(np.frombuffer(rng.bytes((n + 7) // 8), np.uint8), count=n)
    return np.float32(1) - np.float32(2) * bits


def _haar(x: Floats, seed: int, *, inverse: bool) -> Floats:
    """Applies a uniform rotation: random signs, then reflections of the last 2, 3, ... n elements.

    Source: Stewart, SIAM J. Numer. Anal. 17, 1980: the k-th reflection maps the first of its axes to a uniform
    direction up to a sign, which the random signs randomise. It uses no matrix product, whose result may depend on the
    number of threads.
    """
    n, rng = len(x), _generator(seed)
    signs = _signs(n, rng)
    normals = []
    for k in range(2, n + 1):
        normal = rng.standard_normal(k)
        normal[0] += np.copysign(np.sqrt(np.square(normal).sum()), normal[0])
        normals.append(normal)
    y = x.astype(np.float64) if inverse else x.astype(np.float64) * signs
    for normal in reversed(normals) if inverse else normals:
        part = y[n - len(normal) :]
        part -= 2 * (normal * part).sum() / np.square(normal).sum() * normal
    return (y * signs if inverse else y).astype(np.float32)
