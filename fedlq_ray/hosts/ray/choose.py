"""Whether each client gets an actor of its own, from the memory and the cores that Ray has."""

import ray

from fedlq_ray.config.settings import ClientsConfig
from fedlq_ray.errors import FedLQError
from fedlq_ray.federation.task import Task
from fedlq_ray.hosts.ray import stub
from fedlq_ray.hosts.ray.placement import asks, fitting
from fedlq_ray.models import saved_bytes

# Memory of an actor without its model (experiments/benchmarks/README.md; ARCHITECTURE.md).
FORKED_BYTES, ORDINARY_BYTES = 42e6, 212e6
VECTORS = 8  # vectors of the model's length that training and quantizing hold at once
ACTORS_A_CORE = 8  # an actor takes about a second of a core to start


def actor_bytes(task: Task) -> float:
    """Approximate private memory of an actor after training."""
    vectors = VECTORS * 4 * sum(layer.size for layer in task.layers)
    frozen = 2 * sum(p.nbytes for p in task.module.parameters() if not p.requires_grad)  # in the task and in the model
    kept = task.config.train.batch_size * saved_bytes(task.module, task.data.input_shape, task.data.vocabulary)
    return (FORKED_BYTES if stub.command() else ORDINARY_BYTES) + vectors + frozen + kept


def choose(clients: ClientsConfig, each_bytes: float) -> tuple[str, str]:
    """`dedicated` or `packed`, and the reason, from Ray's free memory and its cores.

    Args:
        each_bytes: memory of an actor (`actor_bytes`).
    Raises:
        FedLQError: `dedicated` is configured, but the actors would not fit into memory.
    """
    free = ray.available_resources().get("memory", 0.0)
    cores = int(ray.cluster_resources().get("CPU", 1))
    need = clients.count * each_bytes
    figures = f"{clients.count} actors need about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free, on {cores} cores"
    if clients.hosting == "dedicated" and need > free:
        raise FedLQError(f"clients.hosting=dedicated: {figures}; use packed, which hosts many clients in an actor")
    if clients.hosting != "auto":
        return clients.hosting, "as configured"
    wanted = asks(clients)
    if wanted and not clients.actors and clients.count >= (room := fitting(wanted)):
        return "packed", f"the cluster has room for {room} actors that ask for so much"
    if need > free / 2:
        return "packed", figures
    if clients.count > ACTORS_A_CORE * cores:
        return "packed", f"{figures}: starting them would take long"
    return "dedicated", figures
