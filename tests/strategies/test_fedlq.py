"""FedLQ's plans at the edges: few levels, low caps, late clients, models for payloads; FedLQ-RD's baseline."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from kept import Kept

from fedlq_ray.config.schemes import SCHEMES, strategy_config
from fedlq_ray.errors import ConfigError
from fedlq_ray.models import Layer
from fedlq_ray.quantization import Absent, decode, encode
from fedlq_ray.significance import Measurement
from fedlq_ray.strategies import Member, RoundResult, StrategyContext, make
from fedlq_ray.strategies.budgets import bytes_at_levels

LAYERS = (Layer("a", 0, 1000), Layer("b", 1000, 1300), Layer("c", 1300, 1310, buffer=True))
COHORT = [Member(0, 10, 1.0, 500.0), Member(1, 10, 1.0, 4000.0)]


def settings(name, config):
    """Those that the strategy reads."""
    return {key: value for key, value in config.items() if key in SCHEMES[name].model_fields}


def strategy(name="fedlq", **config):
    return Kept(make(StrategyContext(strategy_config(name=name, **settings(name, config)), LAYERS, seed=0)))


def result(levels, error=1.0):
    table = np.ones((2, levels)) / 2 ** np.arange(levels)
    return RoundResult(
        Measurement(table, 0 * table, error * table), torch.full((1310,), 0.1), torch.ones(1310), 1.0, 1.0
    )


@pytest.mark.parametrize("name", ["fedlq", "fedlq_rd", "fedhq", "fedmpq", "kimad"])
@pytest.mark.parametrize(
    "config",
    [
        {"levels": (3, 8)},
        {"levels": (16, 32)},
        {"levels": (6, 8), "cap_bits": 4.0},
        {"cap_bits": 0.5},
        {"cap_bits": 0.01},
    ],
)
def test_a_floor_by_the_bound_whatever_levels_and_cap(name, config):
    if name == "fedlq_rd" and config.get("cap_bits", 8) < 0.1:
        with pytest.raises(ConfigError, match=r"strategy.cap_bits: 0.01 bits .* headers alone"):
            strategy(name, floor_bits=None, **config)
        return
    made = strategy(name, floor_bits=None, **config)
    for round in range(3):
        assert set(made.plan(round, COHORT)) == {0, 1}
        made.learn(round, result(len(config.get("levels", (1, 2, 3, 4, 6, 8)))))


@pytest.mark.parametrize(
    ("name", "config", "bits"),
    [
        *((name, {"levels": (4, 6, 8), "floor_bits": 2}, [4, 8, 8]) for name in ("fedlq", "fedhq", "kimad")),
        *((name, {"floor_bits": 0.5}, [1, 2, 3]) for name in ("fedlq", "fedhq", "kimad", "fedmpq")),
        ("fedlq", {"levels": (2, 4, 6, 8), "floor_bits": 2}, [2, 4, 6]),  # the floor's 2 bits are the lowest level
    ],
)
def test_a_round_takes_what_the_slowest_needs_for_the_cheapest_payload(name, config, bits):
    """100,000 parameters at 4 bits take 10 kB/s to 1 + 5 s, by when 20 kB/s and more have sent 8 bits."""
    config = strategy_config(name=name, cap_bits=8, **config)
    made = Kept(make(StrategyContext(config, (Layer("a", 0, 100_000),), seed=0)))
    plans = made.plan(0, [Member(i, 10, 1.0, 1e4 * (i + 1)) for i in range(3)])
    vector = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    pieces = [p.segments(vector) if callable(p.segments) else p.segments for p in plans.values()]
    assert [segment.quantizer.bits for (segment,) in pieces] == bits


def test_no_rate_below_the_lowest_level_before_any_probe_either():
    made = strategy(levels=(4, 8))
    for _ in range(2):
        below, above = made.noise(np.array([3.0, 4.0]))
        assert below == math.inf and above < math.inf
        made.learn(0, result(2))


def test_what_can_send_nothing_or_choose_nothing_is_refused():
    for config in ({"levels": (32,)}, {"levels": (8,), "significance": "sum"}):
        with pytest.raises(ConfigError, match="needs at least two"):
            strategy(**config)
    with pytest.raises(ConfigError, match=r"strategy.floor_bits: 0.02 bits .* headers alone"):
        strategy("fedlq_rd", floor_bits=0.02)
    made = strategy("fedlq_rd", budget="deadline", deadline_s=1e-3, late="partial")
    (plan,) = made.plan(0, COHORT).values()
    vector = torch.from_numpy(np.random.default_rng(0).standard_normal(1310)).float()
    payload = encode(vector, plan.segments(vector), kind="update", round=0, client=1, rng=torch.Generator())
    received = decode(payload, 1310, kind="update", round=0, client=1).vector
    assert received[:1300].norm() > 0  # more than headers


def test_noise_is_that_of_a_gaussian_times_what_clients_reported():
    made = strategy(levels=(1, 2, 8))
    bits = np.array([0.5, 1.0, 2.0])
    assert made.noise(bits) == pytest.approx([math.inf, 20, 20 / 9])
    sent = bytes_at_levels(made.context, 2)
    for noise, bytes_sent, ratio in ((9.0, sent, 9 * 9 / 20), (None, None, 9 * 9 / 20), (0.0, sent, 9 * 9 / 20)):
        made.learn(0, replace(result(3), noise=noise, payload_bytes=bytes_sent))
        assert made.noise(bits) == pytest.approx([math.inf, 20 * ratio, 20 / 9 * ratio], rel=0.02)  # headers


def test_significance_as_a_weighted_sum_by_hand():
    drops = np.array([[0.9, 0.5, 0.1], [0.3, 0.1, 0.0]])
    # Steps down, 4 -> 2 and 8 -> 4 bits, add .4 and .4, .2 and .1 to A: of .4 at most. To M = d (32 - b) / (32 x 1300)
    # they add as 2000 and 4000, 600 and 1200: of 4000 at most.
    lost, saved = np.array([[1, 1], [0.5, 0.25]]), np.array([[0.5, 1], [0.15, 0.3]])
    summed = {"allocation": "greedy", "significance": "sum"}
    made = strategy(levels=(2, 4, 8), significance_alpha=0.25, **summed)
    assert made._margins(drops) == pytest.approx(0.25 * lost - 0.75 * saved)
    # A byte too few for 8 bits everywhere: by the sum a is lowered, -.5 against -.1625; by the ratio b, .1 for 150
    # bytes against .4 for 500; the exact plan costs least, .1 and not .4.
    budget = made.context.fixed_size + int(made.sizes[:, -1].sum()) - 1
    by_ratio = [{"allocation": name} for name in ("best", "greedy", "exact")]
    for config, choice in [(summed, (1, 2)), *((config, (2, 1)) for config in by_ratio)]:
        made = strategy(levels=(2, 4, 8), significance_alpha=0.25, **config)
        made.learn(0, RoundResult(Measurement(drops, 0 * drops, drops), torch.ones(1310), torch.ones(1310), 1.0, 1.0))
        assert made.allocate(budget).choice == choice


@pytest.mark.parametrize("allocation", ["best", "exact"])
def test_an_allocation_without_steps_refuses_the_weighted_sum(allocation):
    with pytest.raises(ConfigError, match=r"strategy.significance: sum .*use ratio, or allocation=greedy"):
        strategy(allocation=allocation, significance="sum")


def test_the_late_send_layers_in_part_but_never_nothing():
    made = strategy(budget="deadline", deadline_s=0.5, late="partial", levels=(1, 8))
    (plan,) = made.plan(0, COHORT).values()  # too late both: the faster sends the smaller layer
    assert [isinstance(s.quantizer, Absent) for s in plan.segments] == [True, False, False]
    first = int(made.sizes[0, 0])
    assert made.levels(made.context.fixed_size + 9 + first) == [1, 0]
    # Of equal drops the smaller layer is of more significance for its bytes, but where both fit both go.
    assert made.levels(made.context.fixed_size + int(made.sizes[:, 0].sum())) == [1, 1]


def test_ecsq_has_no_significance_whatever_the_metric():
    for name, probes in (("ecsq", False), ("fedlq_rd", True)):
        made = strategy(name, metric="fisher")
        made.learn(0, RoundResult(None, torch.ones(1310), torch.ones(1310), 1.0, 1.0))
        assert (made.probe(1) is not None) == probes
