"""Codes' models and sums."""

import itertools

import constriction
import numpy as np
import pytest
import torch

from fedlq_ray.quantization.coding.codes import Magnitudes, Model, categorical, fit


def test_prefix_sums_are_added_one_by_one():
    x = torch.randn(10_007, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(10_007).remainder(30)
    layer = Magnitudes.of(x)
    expected = [0.0, *itertools.accumulate(np.sort(x.abs().numpy()).astype(np.float64).tolist())]
    assert layer.sums.tolist() == expected


@pytest.mark.parametrize("counts", [[9, 1], [1, 9], [0.01, 1e6], [131_000, 300]])
def test_a_model_of_two_codes_has_the_best_of_all_hazards(counts):
    found = fit(np.array(counts, np.float64))
    costs = [float(np.array(counts) @ Model(1, bytes([hazard])).bits()) for hazard in range(256)]
    assert found.top == 1 and len(found.hazards) == 1
    assert costs[found.hazards[0]] <= min(costs) * 1.0005  # the best logit is rounded to 1/16


def test_bits_are_those_of_the_coders_probabilities_and_nobody_can_change_them():
    model = fit(np.array([900, 80, 15, 5]))
    assert model.bits() == pytest.approx(-np.log2(model.coded())) and model.coded().sum() == pytest.approx(1)
    for array in (model.probabilities(), model.coded(), model.bits()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.5


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("top", [1, 5, 200])
def test_both_kinds_of_decoder_read_the_same_words(p, top):
    codes = np.minimum(np.random.default_rng(top).geometric(1 - p, 3000) - 1, top).astype(np.int32)
    model = fit(np.bincount(codes, minlength=top + 1))
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(codes, categorical(model))
    words = coder.get_compressed()
    for decode in (False, True):
        found = constriction.stream.queue.RangeDecoder(words).decode(categorical(model, decode=decode), len(codes))
        assert found.tolist() == codes.tolist()
