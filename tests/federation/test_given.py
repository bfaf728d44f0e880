"""Parts that are given as objects, by name, or as what cannot travel; settings as a dict."""

import threading

import pytest
import torch
from tiny import config, layers
from torch import nn

from fedlq_ray import ConfigError, simulate
from fedlq_ray.federation.task import Parts, prepare


def test_a_module_may_be_given_in_place_of_a_factory(tmp_path):
    torch.manual_seed(3)
    module = layers(nn.ReLU(), width=8)
    kept = [p.detach().clone() for p in module.parameters()]
    task = prepare(config(), Parts(model=module))
    assert all(torch.equal(p, q) for p, q in zip(task.module.parameters(), kept, strict=True))
    result = simulate(config(tmp_path / "r"), model=module)
    assert result.summary["rounds"] == 3
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), kept, strict=True))  # it is left as it was
    with pytest.raises(ConfigError, match=r"^model\.args: a module takes none"):
        prepare(config(model={"args": {"hidden": 3}}), Parts(model=module))


def test_lazy_and_tied_models_train(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)
            self.down.weight = nn.Parameter(self.up.weight.T.contiguous())
            self.again, self.head = nn.Linear(64, 8, bias=False), nn.Linear(8, 10)
            self.again.weight = self.up.weight

        def forward(self, x):
            return self.head(self.again(self.down(self.up(x.flatten(1)))))

    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(10))
    for name, model in (("tied", Tied), ("lazy", lambda: lazy)):
        assert simulate(config(tmp_path / name, rounds=1), model=model).summary["rounds"] == 1


def test_parts_may_be_given_by_name(tmp_path):
    by_name = simulate(config(tmp_path / "a", rounds=1), strategy="uniform", quantizer="qsgd", model="mlp")
    settings = {"name": "uniform", "quantizer": "qsgd"}
    assert (
        by_name.summary["weights_sha256"]
        == (
            simulate(config(tmp_path / "b", rounds=1, strategy=settings, model={"name": "mlp"})).summary[
                "weights_sha256"
            ]
        )
    )


class Held:
    """A quantizer, and a strategy, that no other process can have."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def encode(self, x, rng):
        return x.numpy().tobytes()

    def decode(self, body, count):
        return torch.frombuffer(bytearray(body), dtype=torch.float32)

    def size(self, count):
        return 4 * count

    def plan(self, state, round, cohort, evaluation=None):
        return {}


@pytest.mark.parametrize("part", ["quantizer", "strategy"])
def test_parts_that_cannot_travel_are_refused_before_ray_gets_them(part, tmp_path):
    settings = config(tmp_path / "r", clients={"hosting": "packed"})
    with pytest.raises(ConfigError, match=r"^strategy\.\w+: cannot be sent to Ray's actors \(TypeError: cannot pickle"):
        simulate(settings, **{part: Held()})
    assert not (tmp_path / "r").exists()


def test_settings_may_be_a_dict(tmp_path):
    settings = config(tmp_path / "r", rounds=1)
    assert simulate(settings.model_dump()).summary["rounds"] == 1
    with pytest.raises(ConfigError, match=r"^roundz: unknown key; did you mean rounds"):
        simulate({"roundz": 1})
    with pytest.raises(
        ConfigError, match=r"^settings: input should be a valid dictionary or instance of Config \(given: 'c\.yaml'\)"
    ):
        simulate("c.yaml")
