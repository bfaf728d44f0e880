"""FedProx and the server's momentum or Adam are choices of their own: they combine with any strategy."""

import pytest

from fedlq_ray import simulate
from fedlq_ray.config.load import merge
from fedlq_ray.strategies import STRATEGIES

QUICK = [
    "rounds=2", "evaluate_every=2", "clients.hosting=serial", "clients.count=4", "clients.cohort=2",
    "tracking.uri=null", "train.local_epochs=1", "train.max_samples=32", "model.name=mlp", "model.args.hidden=[8]",
]  # fmt: skip
OPTIMIZERS = {
    "none": [],
    "momentum": ["server.optimizer=momentum", "server.lr=0.5"],
    "adam": ["server.optimizer=adam", "server.lr=0.03"],
}
# Each optimizer with and without FedProx over two strategies; each strategy with FedProx, and with each optimizer.
CHOICES = [("none", 0), ("none", 1)], [("momentum", 0), ("adam", 1)], [("momentum", 1), ("adam", 0)]
PROBES = {"strategy": {"name": "fedlq", "probe_every": 1, "probe_samples": 16}}  # of those that probe


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_strategy_takes_any_server_optimizer_and_fedprox(name, tmp_path):
    seen = {}
    for optimizer, mu in CHOICES[0] + CHOICES[1 + list(STRATEGIES).index(name) % 2]:
        own = [
            f"strategy.name={name}",
            f"train.prox_mu={mu}",
            f"out={tmp_path}/{optimizer}-{mu}",
            *OPTIMIZERS[optimizer],
        ]
        result = simulate(merge(PROBES, [*QUICK, *own]))
        assert len(result.history) == 2 and 0 < result.history["test_loss"].iloc[-1] < 10, (optimizer, mu)
        seen[result.summary["weights_sha256"]] = optimizer, mu
    assert len(seen) == 4  # none of the choices is passed over
