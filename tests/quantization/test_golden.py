"""Bodies of version 1 of the wire format, as hashes that were kept when its encoders were first written.

Those of Ecsq and StochasticStep are left out: their model's probabilities are float64 logarithms, whose last bit may
depend on the processor.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlq_ray.quantization import Ecsq
from fedlq_ray.quantization.stochastic import StochasticStep

from .test_contract import TABLE

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
quantizers = [row.quantizer for row in TABLE if not isinstance(row.quantizer, Ecsq | StochasticStep)]


def body_hash(quantizer: object) -> str:
    whole = hashlib.sha256()
    for count in (1, 13, 64, 1001, 70_000):
        x = torch.from_numpy(np.random.default_rng(count).standard_normal(count).astype(np.float32))
        whole.update(quantizer.encode(x, torch.Generator().manual_seed(count)))
    return whole.hexdigest()[:16]


@pytest.mark.parametrize("quantizer", quantizers, ids=str)
def test_bodies_are_those_of_the_first_version(quantizer):
    assert body_hash(quantizer) == GOLDEN[str(quantizer)]
