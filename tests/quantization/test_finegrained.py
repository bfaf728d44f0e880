import itertools

import numpy as np
import pytest
import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.coding.packing import packed_size
from fedlq_ray.quantization.finegrained import CHOICES, FineGrained, assign


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def roundtrip(quantizer, x, seed=0):
    return quantizer.decode(memoryview(quantizer.encode(x, rng(seed))), len(x))


def objective(sizes, bits):
    return float((sizes**2 / 4.0 ** np.array(bits)).sum())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [2, 6, 10, 17, 40])
def test_bits_are_as_good_as_the_best_that_trying_all_finds(seed, budget):
    sizes = np.abs(np.random.default_rng(seed).normal(size=5))
    found = [CHOICES[g] for g in assign(sizes, budget)]
    assert sum(found) <= budget
    # Greedy steps are optimal for the bits that they spend: nothing that spends no more is better.
    rivals = [c for c in itertools.product(CHOICES, repeat=5) if sum(c) <= sum(found)]
    assert objective(sizes, found) <= min(objective(sizes, c) for c in rivals) + 1e-12


def test_steps_are_judged_by_gain_a_bit():
    # After 1 has 4 bits: its step to 8 gains .0039 for 4 bits, the first step of .054 gains .0027 for 2.
    assert [CHOICES[g] for g in assign(np.array([1.0, 0.054]), 6)] == [4, 2]


def test_larger_elements_never_have_fewer_bits():
    sizes = np.sort(np.abs(np.random.default_rng(0).normal(size=1000)))
    assert (np.diff(assign(sizes, 2500).astype(int)) >= 0).all()


def test_a_payload_by_hand():
    # Budget (4 - 2) x 4 = 8 bits. Gains a bit, with x^2 = 64, 4, 1, 0 (over 64): of 0 -> 2: 30, 1.875, .46875; of
    # 2 -> 4: 1.875 (8 is first), .117, ...; of 4 -> 8: .0623, ... So 8 gets 2, then 4 bits; 2 gets 2, and 1 gets 2.
    x = torch.tensor([8.0, -2.0, 1.0, 0.0])
    assert [CHOICES[g] for g in assign(np.abs(x.numpy().astype(float)), 8)] == [4, 2, 2, 0]
    body = FineGrained(4.0).encode(x, rng())
    # Three maxima, the map in 4 x 2 bits, 2 codes of 2 bits and 1 of 4 bits in a byte each.
    assert len(body) == 12 + 1 + 1 + 1
    assert body[:12] == np.array([2.0, 8.0, 0.0], "<f4").tobytes()
    assert body[12] == 0b10_01_01_00  # groups 2, 1, 1, 0
    back = FineGrained(4.0).decode(memoryview(body), 4)
    assert back[[0, 1, 3]].tolist() == [8.0, -2.0, 0.0] and back[2] in (0.0, 2.0)


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0, 6.5, 10.0])
def test_the_map_is_billed_and_the_budget_kept(bits):
    x = torch.randn(4001, generator=rng(1))
    size = len(FineGrained(bits).encode(x, rng()))
    # Header of 12 bytes; the map and three groups are each filled up to a byte.
    assert packed_size(4001, 2) <= size <= 12 + 4 + 4001 * bits / 8
    # No more than a step of 4 bits is left over, and nothing else: dense values use the whole budget.
    assert size >= 12 + (4001 * bits - 5) / 8


def test_elements_with_bits_have_no_bias():
    x, draws = torch.tensor([1.0, -0.7, 0.55, 0.4]), 4000
    quantizer = FineGrained(4.0)  # 8 bits for four of like size: 2 each
    assert assign(x.abs().double().numpy(), 8).tolist() == [1, 1, 1, 1]
    seen = torch.stack([roundtrip(quantizer, x, seed) for seed in range(draws)])
    bound = 6 * seen.std(0) / draws**0.5 + 1e-6  # six standard errors, as the draws show them
    assert ((seen.mean(0) - x).abs() <= bound).all()


def test_full_bits_are_within_a_step():
    x = torch.randn(500, generator=rng(2))
    step = float(x.abs().max()) / 127  # 8 bits: 127 steps to the maximum of all; a rounding moves by one at most
    assert float((roundtrip(FineGrained(10.0), x) - x).abs().max()) <= step * (1 + 1e-5)


def test_wrong_bodies_are_refused():
    quantizer, x = FineGrained(4.0), torch.randn(40, generator=rng(3))
    body = quantizer.encode(x, rng())
    negative = np.array([-1.0], "<f4").tobytes() + body[4:]
    for wrong in (body[:-1], body + b"\0", b"", negative, body[:12] + b"\xff" * (len(body) - 12)):
        with pytest.raises(PayloadError):
            quantizer.decode(memoryview(wrong), 40)
    with pytest.raises(ValueError, match="map"):
        FineGrained(2.0)
