"""The start page's picture, docs/round.png: one round of the same clients, at 4 bits for all and by FedLQ.

`python docs/round.py` makes it anew, from runs on Fashion-MNIST.
"""

import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from fedlq_ray import simulate
from fedlq_ray.config.load import load

SETTINGS = (
    "data.name=fashion-mnist", "data.partition=iid", "clients.count=8", "clients.cohort=8", "clients.hosting=serial",
    "clients.profiles=thin", "train.max_samples=300", "rounds=30", "evaluate_every=30", "target=null",
    "tracking.uri=null", "seed=7",
)  # fmt: skip
SCHEMES = {"4 bits for all": ("strategy.name=uniform", "strategy.bits=4"), "FedLQ": ("strategy.name=fedlq",)}
COMPUTE, UPLOAD = "#8fb8de", "#00796b"


def last_round(*settings: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return simulate(load(None, [*SETTINGS, *settings, f"out={folder}/run"])).history.iloc[-1]


def main() -> None:
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    rounds = {name: last_round(*settings) for name, settings in SCHEMES.items()}
    order = sorted(range(8), key=lambda i: rounds["FedLQ"].client_upload_s[i] / rounds["FedLQ"].client_uplink_bytes[i])
    figure, axes = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    for axis, (name, record) in zip(axes, rounds.items(), strict=True):
        compute, upload = ([record[f"client_{part}_s"][i] for i in order] for part in ("compute", "upload"))
        sent = [record.client_uplink_bytes[i] for i in order]
        axis.barh(range(8), compute, color=COMPUTE, label="computes")
        axis.barh(range(8), upload, left=compute, color=UPLOAD, label="uploads")
        ends = [c + u for c, u in zip(compute, upload, strict=True)]
        for row, (end, size) in enumerate(zip(ends, sent, strict=True)):
            axis.text(end, row, f" {size / 1e3:.0f} kB", va="center", backgroundcolor="white")
        axis.axvline(max(ends), color="0.4", linestyle="--", linewidth=1)
        axis.set_title(f"{name}: {sum(sent) / 1e6:.2f} MB in {max(ends):.2f} s", loc="left", fontweight="bold")
        axis.set_yticks(range(8), ["fastest link", *[""] * 6, "slowest link"])
        axis.invert_yaxis()
    axes[0].set_xlim(0, 1.12 * axes[0].get_xlim()[1])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    axes[1].set_xlabel("simulated seconds since the round began (dashed: the round is over)")
    plt.savefig(Path(__file__).with_name("round.png"), dpi=110)


if __name__ == "__main__":
    main()
