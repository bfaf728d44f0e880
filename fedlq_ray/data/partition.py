"""Partitions of samples among clients: a plain dict of seeded partitioners, and the clients that the data names."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.config.settings import DataConfig
from fedlq_ray.errors import ConfigError
from fedlq_ray.seeding import numpy_rng

Indices = NDArray[np.int64]
Rng = np.random.Generator


def _iid(labels: Indices, clients: int, rng: Rng, data: DataConfig) -> list[Indices]:
    """Random samples in shards whose sizes differ by at most one."""
    return np.array_split(rng.permutation(len(labels)), clients)


def _dirichlet(labels: Indices, clients: int, rng: Rng, data: DataConfig) -> list[Indices]:
    """Splits each class in proportions drawn from Dirichlet(alpha). Hsu et al. 2019, as in NIID-Bench."""
    shards: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(clients, data.alpha)))[:-1] * len(samples)).astype(int)
        for shard, piece in zip(shards, np.split(samples, cuts), strict=True):
            shard.append(piece)
    return [np.concatenate(shard) for shard in shards]


def _shards(labels: Indices, clients: int, rng: Rng, data: DataConfig) -> list[Indices]:
    """Cuts label-sorted samples into clients x classes_per_client pieces; each client gets classes_per_client of them.

    McMahan et al. 2017.
    """
    each = data.classes_per_client
    if clients * each > len(labels):  # some pieces would be empty
        raise ConfigError(
            f"data.classes_per_client: {clients} clients (clients.count) with {each} shards each need "
            f"{clients * each} samples, but there are {len(labels)}"
        )
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, clients * each)
    deal = rng.permutation(len(pieces)).reshape(clients, each)
    return [np.concatenate([pieces[i] for i in row]) for row in deal]


def _quantity(labels: Indices, clients: int, rng: Rng, data: DataConfig) -> list[Indices]:
    """Sizes in proportions drawn from Dirichlet(alpha), with random labels."""
    cuts = (np.cumsum(rng.dirichlet(np.full(clients, data.alpha)))[:-1] * len(labels)).astype(int)
    return np.split(rng.permutation(len(labels)), cuts)


def _skew(labels: Indices, clients: int, rng: Rng, data: DataConfig) -> list[Indices]:
    """A share `level` of each class goes to one client, the rest evenly to the others.

    As in the published code of FedLQ's group (ymliao98/FedLamp), where there are as many clients as classes; with more
    classes, clients have several, and with more clients, some have none of their own.
    """
    order = rng.permutation(clients)
    shares = np.full((len(np.unique(labels)), clients), (1 - data.level) / max(clients - 1, 1))
    for row in range(len(shares)):
        shares[row, order[row % clients]] = data.level if clients > 1 else 1.0
    return _by_shares(labels, shares, rng)


def _missing(labels: Indices, clients: int, rng: Rng, data: DataConfig) -> list[Indices]:
    """Each client lacks `missing` classes; the samples of a class go evenly to the clients that have it.

    As in the published code of FedLQ's group (ymliao98/FedLamp).
    """
    classes = len(np.unique(labels))
    has = np.ones((classes, clients))
    start = rng.permutation(classes)
    for position, client in enumerate(rng.permutation(clients)):
        has[start[(position + np.arange(data.missing)) % classes], client] = 0
    without = np.flatnonzero(has.sum(1) == 0)
    if data.missing >= classes or len(without):
        raise ConfigError(
            f"data.missing: if each of {clients} clients (clients.count) lacks {data.missing} of {classes} classes, "
            "some class has no client; lower it, or raise clients.count"
        )
    return _by_shares(labels, has / has.sum(1, keepdims=True), rng)


def _by_shares(labels: Indices, shares: NDArray[np.float64], rng: Rng) -> list[Indices]:
    """Splits each class by its row of shares (classes, clients), each of which sums to 1."""
    shards: list[list[Indices]] = [[] for _ in range(shares.shape[1])]
    for label, row in zip(np.unique(labels), shares, strict=True):
        samples = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(row)[:-1] * len(samples)).astype(int)
        for shard, piece in zip(shards, np.split(samples, cuts), strict=True):
            shard.append(piece)
    return [np.concatenate(shard) for shard in shards]


PARTITIONS: dict[str, Callable[[Indices, int, Rng, DataConfig], list[Indices]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "quantity": _quantity,
    "skew": _skew,
    "missing": _missing,
}
_OF_LABELS = ("dirichlet", "shards", "skew", "missing")


class Split(NamedTuple):
    """The samples of each client.

    Attributes:
        shards: sorted, disjoint indices, by client.
        names: the clients' ids, if the data has them.
        note: a sentence about clients that were left out.
    """

    shards: list[Indices]
    names: list[str] | None = None
    note: str | None = None


def partition(
    samples: int, strata: Indices | None, ids: NDArray[np.str_] | None, data: DataConfig, *, clients: int, seed: int
) -> Split:
    """Returns each client's samples, as `data.partition` says.

    Args:
        strata: each sample's label (n,); None if samples have none.
        ids: whose sample each is (n,); None if they belong to nobody.
        clients: their number; for `natural`, the largest number.
    Raises:
        ConfigError: there are too few samples for the number of clients or shards, or the data lacks labels or ids.
    """
    if data.partition == "natural":
        return _natural(ids, data, clients, seed)
    how = data.partition
    if how in _OF_LABELS and strata is None:
        raise ConfigError(f"data.partition: {how} splits by label, but these samples have none; use iid or quantity")
    labels = np.zeros(samples, np.int64) if strata is None else strata
    return Split(_drawn(labels, how, data, clients, seed))


def _drawn(labels: Indices, how: str, data: DataConfig, clients: int, seed: int) -> list[Indices]:
    """Splits all samples; clients with fewer than `min_samples` get samples from the largest shards."""
    least = data.min_samples
    if clients * least > len(labels):
        raise ConfigError(
            f"data.min_samples: {clients} clients (clients.count) with at least {least} samples each need "
            f"{clients * least}, but there are {len(labels)}"
        )
    rng = numpy_rng(seed, "partition")
    shards = PARTITIONS[how](labels, clients, rng, data)
    sizes = np.array([len(s) for s in shards])
    for client in np.flatnonzero(sizes < least):
        while len(shards[client]) < least:
            donor = int(sizes.argmax())
            spare = max(1, (len(shards[donor]) - least) // 2)
            give = rng.permutation(len(shards[donor]))[: min(spare, least - len(shards[client]))]
            shards[client] = np.concatenate([shards[client], shards[donor][give]])
            shards[donor] = np.delete(shards[donor], give)
            sizes[donor], sizes[client] = len(shards[donor]), len(shards[client])
    return [np.sort(shard).astype(np.int64) for shard in shards]


def _natural(ids: NDArray[np.str_] | None, data: DataConfig, clients: int, seed: int) -> Split:
    """Each id of the data is a client; of those with `min_samples` or more, at most `clients` are drawn."""
    if ids is None:
        raise ConfigError(
            f"data.partition: natural needs data with clients, but {data.name} has none (clients_train); use another"
        )
    names, place, counts = np.unique(ids, return_inverse=True, return_counts=True)
    large = np.flatnonzero(counts >= data.min_samples)
    if len(large) < 2:
        raise ConfigError(
            f"data.min_samples: of {len(names)} clients of the data, {len(large)} with {data.min_samples} samples or "
            "more; two are needed"
        )
    chosen = np.sort(numpy_rng(seed, "clients").permutation(large)[:clients])
    order = np.argsort(place, kind="stable")
    shards = np.split(order, np.cumsum(counts)[:-1])
    note = f"{len(chosen)} of {len(names)} clients of the data take part"
    if small := len(names) - len(large):
        note += f"; {small} have fewer than {data.min_samples} samples (data.min_samples)"
    return Split([shards[c].astype(np.int64) for c in chosen], names[chosen].tolist(), note)


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
