"""W1, W2 and W3 as settings, and what the other contenders need of them as files."""

import json
from pathlib import Path

import numpy as np

from fedlq_ray.config.load import load
from fedlq_ray.federation.selection import draw
from fedlq_ray.federation.task import prepare

_FEDERATION = ["clients.count=100", "clients.cohort=20", "data.partition=iid", "data.holdout=0"]
_TRAINING = ["train.lr=0.05", "train.batch_size=32", "train.local_epochs=1"]
_QUIET = ["tracking.uri=null", "target=null", "checkpoint.keep=0"]
_COMMON = [*_FEDERATION, *_TRAINING, *_QUIET]
WORKLOADS = {
    "w1": [*_COMMON, "data.name=fashion-mnist", "model.name=cnn"],
    "w3": [*_COMMON, "data.name=cifar10", "model.name=resnet8_gn"],
}
# W2: a client that trains does as much whatever their number: 20 passes over 6 samples, as many as each of 10,000 has.
WORKLOADS["w2"] = [*WORKLOADS["w1"], "train.max_samples=6", "train.local_epochs=20"]


def settings(workload: str, rounds: int, *more: str) -> list[str]:
    """A configuration as key=value, evaluated at its end alone."""
    return [*WORKLOADS[workload], f"rounds={rounds}", f"evaluate_every={rounds}", *more]


def export(chosen: list[str], cores: int, folder: Path) -> None:
    """What `net.Work` reads."""
    task = prepare(load(None, chosen))
    config, data = task.config, task.data
    np.save(folder / "x.npy", data.x_train)
    np.savez(
        folder / "rest.npz",
        y=data.y_train,
        mean=data.mean,
        std=data.std,
        order=np.concatenate(task.shards),
        ends=np.cumsum([len(shard) for shard in task.shards]),
        cohorts=[draw(task, round) for round in range(config.rounds)],
    )
    told = {"model": config.model.name, "lr": config.train.lr, "batch_size": config.train.batch_size}
    told |= {"rounds": config.rounds, "cores": cores, "cohort": config.clients.cohort}
    (folder / "settings.json").write_text(json.dumps(told), encoding="utf-8")
