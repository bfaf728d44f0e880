"""Clients' rounds a second on a GPU and on CPU cores, by how many processes train at the same time.

    python experiments/benchmarks/device.py --out experiments/benchmarks/device.json

Each process trains one client after another: 300 images of 32x32x3, batch 32, one epoch, 4 bits, as a packed actor
does. The images are random: speed is the same. `steps` tells how the GPU's steps are launched: recorded (as built-in
models are) or one by one (as a user's own model is).
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import harness
import numpy as np

from fedlq_ray.config.load import load
from fedlq_ray.federation.task import Job, Worker, prepare
from fedlq_ray.runs import provenance
from fedlq_ray.training.device import reproducible

SECONDS = 5.0
SETTINGS = (
    "clients.hosting=serial", "clients.count=2", "clients.cohort=1", "data.holdout=0", "train.batch_size=32",
    "train.local_epochs=1", "train.max_samples=300", "train.lr=0.01",
)  # fmt: skip


def work(model: str, device: str, steps: str) -> None:
    """One process: it says when it is ready, and then its rate, from when all are."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8), np.arange(2000) % 10
    with reproducible(device):
        task = prepare(
            load(None, [*SETTINGS, f"model.name={model}", f"train.device={device}"]), data=(x, y, x[:9], y[:9])
        )
        worker = Worker(dataclasses.replace(task, builtin=steps == "recorded"))
        weights, plan = worker.initial_weights(), worker.context.at_levels([4] * len(worker.context.quantized))
        for _ in range(2):
            worker.train(Job(0, 0, plan, 300), weights, None)
        print("ready", flush=True)
        sys.stdin.readline()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            worker.train(Job(0, 0, plan, 300), weights, None)
            done += 1
        print(done / (time.perf_counter() - started))


def rate(model: str, device: str, steps: str, processes: int) -> float:
    """Clients a second of so many processes together."""
    command = [sys.executable, __file__, "--work", model, device, steps]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    started = [subprocess.Popen(command, **pipe) for _ in range(processes)]
    for one in started:
        if one.stdout.readline() != "ready\n":
            raise SystemExit(f"{model} on {device}: a process failed")
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    return sum(float(one.communicate()[0]) for one in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cnn", "resnet8_gn"])
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(*given.work)
        return
    found = []
    for model in given.models:
        for device in given.devices:
            for steps in ["recorded", "one by one"] if device == "cuda" else ["one by one"]:
                for processes in given.processes:
                    speed = rate(model, device, steps, processes)
                    found.append(
                        {
                            "model": model,
                            "device": device,
                            "steps": steps,
                            "processes": processes,
                            "clients_per_s": speed,
                        }
                    )
    heads = ["model", "device", "steps", "processes", "clients a second"]
    print(harness.table(heads, [[*map(str, list(row.values())[:-1]), f"{row['clients_per_s']:.1f}"] for row in found]))
    print(provenance.machine())
    harness.keep(given.out, {"rows": found})


if __name__ == "__main__":
    main()
