"""FedProx and the server's momentum or Adam are choices of their own: they combine with any strategy."""

import pytest

from fedlq_ray import simulate
from fedlq_ray.config.load import merge
from fedlq_ray.strategies import STRATEGIES

QUICK = [
    "rounds=3", "evaluate_every=3", "clients.hosting=serial", "clients.count=4", "clients.cohort=2",
    "tracking.uri=null", "train.local_epochs=1", "train.max_samples=32", "model.name=mlp", "model.args.hidden=[8]",
]  # fmt: skip
OPTIMIZERS = {
    "none": [],
    "momentum": ["server.optimizer=momentum", "server.lr=0.5"],
    "adam": ["server.optimizer=adam", "server.lr=0.03"],
}


PROBES = {"strategy": {"name": "fedlq", "probe_every": 1, "probe_samples": 16}}  # of those that probe


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_strategy_takes_any_server_optimizer_and_fedprox(name, tmp_path):
    seen = {}
    for optimizer, server in OPTIMIZERS.items():
        for mu in (0, 1):
            own = [f"strategy.name={name}", f"train.prox_mu={mu}", f"out={tmp_path}/{optimizer}-{mu}", *server]
            result = simulate(merge(PROBES, [*QUICK, *own]))
            assert len(result.history) == 3 and 0 < result.history["test_loss"].iloc[-1] < 10, (optimizer, mu)
            seen[result.summary["weights_sha256"]] = optimizer, mu
    assert len(seen) == 6  # none of the choices is passed over
