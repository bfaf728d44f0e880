"""FedLUAR: scores and odds by hand, what is left out and applied again, and what is refused."""

from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.errors import ConfigError
from fedlq_ray.models import FlatModel
from fedlq_ray.models.flat import Layer
from fedlq_ray.strategies import Member, RoundResult, StrategyContext, make
from fedlq_ray.strategies.fedluar import Recycling

LAYERS = (
    Layer("a", 0, 4, matrix=True),
    Layer("norm", 4, 6),
    Layer("b", 6, 10, matrix=True),
    Layer("c", 10, 12, matrix=True),
)


def luar(**settings):
    return make(StrategyContext(tiny.config(strategy={"name": "fedluar", **settings}).strategy, LAYERS, seed=0))


def result(update, weights, loss=1.0):
    return RoundResult(None, update, weights, loss, 1.0)


def test_scores_are_relative_updates_and_those_of_layers_left_out_stay():
    strategy = luar(recycled=1)
    update, weights = torch.arange(12.0), torch.full((12,), 2.0)
    first = strategy.learn(strategy.init(), 0, result(update, weights))
    norms = [float(update[at.start : at.stop].norm() / weights[at.start : at.stop].norm()) for at in LAYERS]
    assert first.scores == pytest.approx([norms[0], 0.0, norms[2], norms[3]], rel=1e-5)
    state = Recycling([2], update, first.scores)
    later = strategy.learn(state, 1, result(2 * update, weights))
    assert later.scores == pytest.approx([2 * norms[0], 0.0, norms[2], 2 * norms[3]], rel=1e-5)
    assert strategy.learn(state, 1, result(update, weights, loss=None)) is state


def test_layers_are_drawn_by_the_inverse_of_their_scores():
    strategy = luar(recycled=1)
    drawn = Counter(strategy.drawn([1.0, 0.0, 2.0, 4.0], round)[0] for round in range(4000))
    assert set(drawn) == {0, 2, 3}  # never the normalisation
    share = np.array([drawn[at] for at in (0, 2, 3)]) / 4000
    assert share == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)  # four deviations
    assert all(len(set(luar(recycled=2).drawn([1.0, 0.0, 2.0, 4.0], round))) == 2 for round in range(50))


def test_what_is_left_out_is_not_sent_and_its_last_mean_update_is_applied_again():
    strategy, last = luar(recycled=2, bits=4), torch.arange(12.0)
    state = Recycling([0, 3], last, [1.0] * 4)
    (plan,) = strategy.plan(state, 1, [Member(0, 10, 1.0, 1e6)]).values()
    assert [segment.quantizer.size(segment.stop - segment.start) for segment in plan.segments][::3] == [0, 0]
    combined = strategy.combine(state, -torch.ones(12))
    assert combined.tolist() == [0.0, 1.0, 2.0, 3.0, *[-1.0] * 6, 10.0, 11.0]
    assert torch.equal(strategy.combine(strategy.init(), last), last)


def test_a_run_recycles_to_the_byte(tmp_path):
    """Each round's payload has the layers that are sent."""
    settings = ["strategy.name=fedluar", "rounds=6", "model.name=mlp", "model.args.hidden=[16,8,8]", "target=null"]
    settings += ["clients.count=6", "clients.cohort=3", "clients.hosting=serial", "tracking.uri=null"]
    result = simulate(load(None, [*settings, "train.max_samples=32", f"out={tmp_path / 'run'}"]))
    sizes = {"fc1": 65 * 16, "fc2": 17 * 8, "fc3": 9 * 8, "fc4": 9 * 10}
    left_out = [[], *result.history["recycled"]]
    assert all(len(names) == 2 for names in left_out[1:]) and len({tuple(names) for names in left_out}) > 2
    for names, sent in zip(left_out, result.history["client_uplink_bytes"], strict=False):
        assert set(sent) == {18 + sum(9 + 4 * size * (name not in names) for name, size in sizes.items())}


def test_layers_know_whether_they_have_a_matrix():
    model = FlatModel(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(2, 2)))
    assert [layer.matrix for layer in model.layers] == [True, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recycled": 3}, r"strategy\.recycled: 3 layers, but the model has 3 with a matrix.*; 0 to 2"),
        ({"payload": "model"}, r"strategy\.payload"),
        ({"error_feedback": True}, r"strategy\.error_feedback: fedluar"),
    ],
)
def test_what_it_cannot_do_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config = tiny.config(strategy={"name": "fedluar", **settings}).strategy
        make(StrategyContext(config, LAYERS, seed=0, error_feedback=bool(config.error_feedback)))
    with pytest.raises(ConfigError, match="leave the same layers out"):
        load(None, ["strategy.name=fedluar", "server.buffer=2", "server.max_staleness=null"])
