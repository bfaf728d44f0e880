"""Places actors on the nodes of a cluster."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlq_ray.config.settings import ClientsConfig
from fedlq_ray.errors import FedLQError
from fedlq_ray.hosts.ray import stub


class Node(NamedTuple):
    """A node of the cluster that is alive.

    Attributes:
        fork: the command with which Ray starts actors from the node's fork server; None: as ordinary processes.
    """

    id: str
    cores: float
    fork: str | None


def deal(count: int, nodes: Iterable[Node], taken: Mapping[str, int]) -> list[str]:
    """Returns nodes for `count` actors: each goes to the node with the most cores per actor; `taken` counts others."""
    cores = {node.id: node.cores for node in nodes}
    if not any(cores.values()):
        cores = dict.fromkeys(cores, 1.0)
    has = Counter(taken)
    dealt = []
    for _ in range(count):
        node = max(cores, key=lambda name: cores[name] / (has[name] + 1))
        has[node] += 1
        dealt.append(node)
    return dealt


def asks(clients: ClientsConfig) -> dict[str, Any]:
    """Returns the resources that an actor requests from Ray, if the settings have any; Ray then chooses its node."""
    wanted: dict[str, Any] = {
        "num_cpus": clients.num_cpus,
        "num_gpus": clients.num_gpus,
        "resources": clients.resources,
        "label_selector": clients.labels,
    }
    wanted = {name: value for name, value in wanted.items() if value}
    return wanted | {"scheduling_strategy": "SPREAD"} if wanted else {}


def fitting(asks: Mapping[str, Any]) -> int:
    """Returns the number of actors with these requests that the cluster has room for.

    Raises:
        FedLQError: there is no room for a single actor.
    """
    has = ray.cluster_resources()
    amounts = {"CPU": asks.get("num_cpus"), "GPU": asks.get("num_gpus"), **asks.get("resources", {})}
    room = {name: int(has.get(name, 0.0) / amount) for name, amount in amounts.items() if amount}
    lacking = [name for name, actors in room.items() if not actors]
    if lacking:
        name = lacking[0]
        raise FedLQError(
            f"an actor requests {amounts[name]:g} {name}, but the cluster has {has.get(name, 0.0):g}; request less, or "
            "set clients.actors to wait for nodes that join"
        )
    return min(room.values(), default=max(1, int(has.get("CPU", 1))))


class Nodes:
    """The nodes that were alive at the last query."""

    def __init__(self) -> None:
        self.known: dict[str, Node] = {}
        self.look()

    def look(self) -> dict[str, Node]:
        """Queries the nodes again."""
        alive = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
        if alive.keys() != self.known.keys():
            forks = {name: node.fork for name, node in self.known.items()}
            new = alive.keys() - forks.keys()
            forks |= dict.fromkeys(new, stub.command()) if len(alive) == 1 else _commands(new)
            self.known = {name: Node(name, cores, forks[name]) for name, cores in sorted(alive.items())}
        return self.known

    @property
    def cores(self) -> int:
        return max(1, int(sum(node.cores for node in self.known.values())))

    def options(self, at: str | None) -> dict[str, Any]:
        """Returns Ray's options for an actor on this node; None: Ray chooses the node."""
        forks = {node.fork for node in self.known.values()}
        fork = self.known[at].fork if at else forks.pop() if len(forks) == 1 else None
        return options(at, fork)


def options(at: str | None, fork: str | None) -> dict[str, Any]:
    """Returns Ray's options for an actor on node `at` (None: Ray chooses), forked by `fork` (None: not forked)."""
    made: dict[str, Any] = {"runtime_env": {"py_executable": fork}} if fork else {}
    return made | ({"scheduling_strategy": on(at)} if at else {})


def on(node: str) -> Any:
    """Returns Ray's scheduling strategy for this node only."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _commands(nodes: Iterable[str]) -> dict[str, str | None]:
    """Returns each node's own fork-server command, because its paths may differ from this node's."""
    ask: Any = ray.remote(num_cpus=0)(stub.command)
    asked = {node: ask.options(scheduling_strategy=on(node)).remote() for node in nodes}
    found: dict[str, str | None] = {}
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer, timeout=120)
        except RayError:  # the node has left, or is too slow
            found[node] = None
    return found
