"""Partitions of samples among clients: a plain dict of seeded partitioners, and a minimum number per client."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import ConfigError
from fedlq_ray.seeding import numpy_rng

Indices = NDArray[np.int64]
Rng = np.random.Generator


def _iid(labels: Indices, clients: int, rng: Rng, *, alpha: float, classes_per_client: int) -> list[Indices]:
    """Random samples in shards whose sizes differ by at most one."""
    return np.array_split(rng.permutation(len(labels)), clients)


def _dirichlet(labels: Indices, clients: int, rng: Rng, *, alpha: float, classes_per_client: int) -> list[Indices]:
    """Splits each class in proportions drawn from Dirichlet(alpha). Hsu et al. 2019, as in NIID-Bench."""
    shards: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(samples)).astype(int)
        for shard, piece in zip(shards, np.split(samples, cuts), strict=True):
            shard.append(piece)
    return [np.concatenate(shard) for shard in shards]


def _shards(labels: Indices, clients: int, rng: Rng, *, alpha: float, classes_per_client: int) -> list[Indices]:
    """Cuts label-sorted samples into clients x classes_per_client pieces; each client gets classes_per_client of them.

    McMahan et al. 2017.
    """
    if clients * classes_per_client > len(labels):  # some pieces would be empty
        raise ConfigError(
            f"data.classes_per_client: {clients} clients (clients.count) with {classes_per_client} shards each need "
            f"{clients * classes_per_client} samples, but there are {len(labels)}"
        )
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, clients * classes_per_client)
    deal = rng.permutation(len(pieces)).reshape(clients, classes_per_client)
    return [np.concatenate([pieces[i] for i in row]) for row in deal]


def _quantity(labels: Indices, clients: int, rng: Rng, *, alpha: float, classes_per_client: int) -> list[Indices]:
    """Sizes in proportions drawn from Dirichlet(alpha), with random labels."""
    cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(labels)).astype(int)
    return np.split(rng.permutation(len(labels)), cuts)


PARTITIONS: dict[str, Callable[..., list[Indices]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "quantity": _quantity,
}


def partition(
    labels: Indices, *, how: str, clients: int, seed: int, alpha: float, classes_per_client: int, min_samples: int
) -> list[Indices]:
    """Returns each client's samples: sorted, disjoint indices that cover all of `labels` (n,).

    Clients with fewer than `min_samples` get samples from the largest shards.
    Raises:
        ConfigError: there are too few samples for the number of clients or shards.
    """
    if clients * min_samples > len(labels):
        raise ConfigError(
            f"data.min_samples: {clients} clients (clients.count) with at least {min_samples} samples each need "
            f"{clients * min_samples}, but there are {len(labels)}"
        )
    rng = numpy_rng(seed, "partition")
    shards = PARTITIONS[how](labels, clients, rng, alpha=alpha, classes_per_client=classes_per_client)
    sizes = np.array([len(s) for s in shards])
    for client in np.flatnonzero(sizes < min_samples):
        while len(shards[client]) < min_samples:
            donor = int(sizes.argmax())
            spare = max(1, (len(shards[donor]) - min_samples) // 2)
            give = rng.permutation(len(shards[donor]))[: min(spare, min_samples - len(shards[client]))]
            shards[client] = np.concatenate([shards[client], shards[donor][give]])
            shards[donor] = np.delete(shards[donor], give)
            sizes[donor], sizes[client] = len(shards[donor]), len(shards[client])
    return [np.sort(shard).astype(np.int64) for shard in shards]


def hold_out(shards: Sequence[Indices], fraction: float, seed: int) -> tuple[list[Indices], list[Indices]]:
    """Splits each shard into training and held-out samples; floor(fraction x size) are held out, never all."""
    kept, held = [], []
    for client, shard in enumerate(shards):
        order = numpy_rng(seed, "holdout", client).permutation(len(shard))
        count = min(int(fraction * len(shard)), len(shard) - 1)
        held.append(np.sort(shard[order[:count]]))
        kept.append(np.sort(shard[order[count:]]))
    return kept, held


def label_counts(labels: Indices, shards: Sequence[Indices], num_classes: int) -> Indices:
    """Counts the samples of each class on each client: (clients, classes)."""
    return np.stack([np.bincount(labels[shard], minlength=num_classes) for shard in shards])
