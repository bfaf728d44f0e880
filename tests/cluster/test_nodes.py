"""Several nodes on one machine: the same bytes on any number of them, and while they come and go."""

import os
import sys
import time

import pytest
from faults import round_of

import fedlq_ray
from fedlq_ray.config.load import load
from fedlq_ray.strategies.fixed import Fixed

pytestmark = [pytest.mark.cluster, pytest.mark.ray]
# The memories of error feedback are 200 kB each: they lie in the object store of the node where a client was trained.
QUICK = [
    "rounds=6", "clients.count=8", "clients.cohort=4", "strategy.error_feedback=true", "strategy.probe_every=2",
    "model.name=mlp", "model.args.hidden=[670]", "train.local_epochs=1", "evaluate_every=3", "tracking.uri=null",
]  # fmt: skip
FULL = pytest.mark.skipif("FEDLQ_CLUSTER" not in os.environ, reason="takes minutes; FEDLQ_CLUSTER=1 runs it")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return run(tmp_path_factory.mktemp("serial"), "clients.hosting=serial")


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one node with one core, which all tests share: starting one takes ten seconds."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def nodes(cluster):
    """Of that cluster the first node alone; those that a test adds are removed after it."""
    import ray

    yield cluster
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    end = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < end:
        time.sleep(0.1)


def run(folder, *overrides, **given):
    result = fedlq_ray.simulate(load(None, [*QUICK, f"out={folder}/run", *overrides]), **given)
    return [(result.path / name).read_bytes() for name in ("rounds.jsonl", "summary.json")]


def homes():
    """How many client actors live on each node."""
    import ray
    from ray._private.state import actors  # the public way needs a dashboard

    found = [
        a["Address"]["NodeID"] for a in actors().values() if a["State"] == "ALIVE" and "Client" in a["ActorClassName"]
    ]
    return sorted(found.count(node["NodeID"]) for node in ray.nodes() if node["Alive"])


def after(round, what):
    """Do something after that round, once: a round may come again."""
    left = [what]

    def watch(event):
        if round_of(event) == round and left:
            left.pop()()

    return watch


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=FULL)])
def test_any_number_of_nodes_gives_the_same_bytes(count, nodes, expected, tmp_path):
    for _ in range(count - 1):
        nodes.add_node(num_cpus=1)
    seen = []
    found = run(tmp_path, "clients.hosting=packed", watch=after(1, lambda: seen.append(homes())))
    assert found == expected
    # An actor a core, and the one that evaluates.
    assert seen == [[1] * (count - 1) + [2]]


@pytest.mark.parametrize("hosting", ["packed", pytest.param("dedicated", marks=FULL)])
def test_a_node_that_dies_loses_nothing(hosting, nodes, expected, tmp_path):
    node = nodes.add_node(num_cpus=1)
    leave = after(2, lambda: nodes.remove_node(node, allow_graceful=False))
    assert run(tmp_path, f"clients.hosting={hosting}", "checkpoint.every_rounds=2", watch=leave) == expected


class Waits(Fixed):
    """Before rounds 3 and 5, until the test has done its part after rounds 1 and 3."""

    def __init__(self, context, folder):
        super().__init__(context, context.quantizer_at(4))
        self.folder = folder

    def plan(self, state, round, cohort):
        while round in (3, 5) and not (self.folder / str(round)).exists():
            time.sleep(0.05)
        return super().plan(state, round, cohort)


@pytest.mark.parametrize("hosting", ["packed", pytest.param("dedicated", marks=FULL)])
def test_a_node_that_joins_is_used(hosting, nodes, tmp_path):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    seen = []

    def look(event):
        round = round_of(event)
        if round in (1, 3) and not (tmp_path / str(round + 2)).exists():  # a round may come again
            seen.append(homes())
            if round == 1:
                nodes.add_node(num_cpus=1)
            (tmp_path / str(round + 2)).touch()

    own = {"strategy": lambda context: Waits(context, tmp_path)}
    found = run(tmp_path, f"clients.hosting={hosting}", watch=look, **own)
    assert len(seen) == 2 and len(seen[0]) == 1 and seen[1] == ([1, 2] if hosting == "packed" else [4, 5])
    assert found == run(tmp_path / "serial", "clients.hosting=serial", **own)


@FULL
def test_actors_go_where_their_resources_are(nodes, expected, tmp_path, monkeypatch):
    import ray

    from fedlq_ray.federation.task import prepare
    from fedlq_ray.hosts.ray import pool

    nodes.add_node(num_cpus=2, resources={"big": 2}, labels={"place": "shed"})
    seen = []
    asked = ["clients.num_cpus=0.5", "clients.resources.big=0.5", "clients.labels.place=shed"]
    look = after(1, lambda: seen.append((homes(), ray.available_resources().get("big", 0))))
    assert run(tmp_path, "clients.hosting=packed", *asked, watch=look) == expected
    assert seen == [([0, 5], 0)] or seen == [([1, 4], 0)]  # four that train, and the one that evaluates, anywhere
    with pytest.raises(fedlq_ray.FedLQError, match="an actor requests 9 huge, but the cluster has 0"):
        run(tmp_path / "none", "clients.hosting=packed", "clients.resources.huge=9")
    monkeypatch.setattr(pool, "_START_S", 3.0)
    waits = load(None, [*QUICK, "clients.resources.huge=9", "clients.actors=1", "clients.timeout_s=3"])
    with pytest.raises(fedlq_ray.FedLQError, match="did not start in 3 s with resources=.*huge"):
        pool.Pool(prepare(waits), "packed")


def test_actors_are_dealt_by_cores():
    from fedlq_ray.hosts.ray.placement import Node, deal

    nodes = [Node("a", 1, None), Node("b", 3, None), Node("head", 0, None)]
    assert sorted(deal(8, nodes, {})) == ["a"] * 2 + ["b"] * 6
    assert deal(2, nodes, {"b": 6}) == ["a", "a"]
    assert sorted(deal(2, [Node("a", 0, None), Node("b", 0, None)], {})) == ["a", "b"]  # no cores at all: one each
