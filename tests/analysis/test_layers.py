"""The layer analysis: one training for several rounds, noise that holds, and what is taken off."""

import numpy as np
import pytest

from fedlq_ray import plots
from fedlq_ray.analysis.layers import analyse, analyses
from fedlq_ray.config.load import load

SETTINGS = ["clients.hosting=serial", "tracking.uri=null", "strategy.levels=[1,2,4]", "strategy.probe_samples=256"]


def tables(found):
    return [found.loss.drop, found.loss.noise, found.accuracy.drop]


def test_one_training_measures_at_several_rounds_what_each_of_its_own_does():
    heard = []
    watch = lambda record: heard.append(record.round)  # noqa: E731
    found = list(analyses(load(None, SETTINGS), (1, 3), ("update", "model"), ("fisher",), watch))
    assert [(one.rounds, one.payload) for one in found] == [(1, "update"), (1, "model"), (3, "update"), (3, "model")]
    assert heard == [0, 1, 2]
    for rounds, payload, one in ((1, "update", found[0]), (3, "model", found[3])):
        alone = analyse(load(None, [*SETTINGS, f"rounds={rounds}", f"strategy.payload={payload}"]))
        assert alone.before == one.before
        for a, b in zip(tables(alone), tables(one), strict=True):
            np.testing.assert_array_equal(a, b)
    assert found[0].predicted["fisher"].drop.shape == found[0].saving.shape == (len(found[0].names), 3)
    assert found[0].samples == 124 and sum(found[0].sizes) > 1000


def test_zeroing_a_layers_update_costs_what_its_absence_does(tmp_path, monkeypatch):
    """A biased quantizer keeps its first order."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rough_part.py").write_text(
        "import torch\nclass Rough:\n"
        "    def encode(self, x, rng): return b''\n"
        "    def decode(self, body, count): return torch.zeros(count)\n"
        "    def size(self, count): return 0\n"
    )
    found = analyse(load(None, [*SETTINGS, "rounds=1", "strategy.quantizer=rough_part:Rough"]))
    last = found.loss.drop[-1]  # without the update, which lowered the loss to first order
    assert (last > 0).all() and np.ptp(last) == 0


def test_a_coarse_level_stands_out_of_the_noise():
    """At one bit every layer of the model costs beyond its noise, and more than at four."""
    config = load(None, [*SETTINGS, "rounds=2", "strategy.payload=model"])
    found = analyse(config)
    assert (found.loss.noise > 0).all() and found.seen[:, 0].all()
    assert (found.loss.drop[:, 0] > 0).all() and (found.significance[:, 0] > found.significance[:, -1]).all()


@pytest.mark.parametrize("seen", [None, np.array([[True, False], [False, False]])])
def test_heat_maps_in_rows_with_noise_and_all_kinds_of_figures(tmp_path, seen):
    values = np.array([[1e30, -2.5e-7], [0.0, 0.25]])
    rows = [[plots.Panel(f"{i} {j}", values, seen) for j in range(2)] for i in range(2)]
    plots.layers(rows, ["a", "block3.shortcut"], [1, 2], "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert [plots.short(v) for v in (0.0, 0.25, 1e30, -2.5e-7, 123.0)] == ["0", "0.25", "1e30", "-2.5e-7", "1.2e2"]
