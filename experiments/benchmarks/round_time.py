"""What the framework costs: wall time of a round, against the bare training loop on the same cores.

Fashion-MNIST, 100 IID clients of 600 images, cohort 20, one epoch, batch 32, the small CNN, no quantization unless
`--strategy` names another; evaluation apart. Repetitions alternate, so that what else the machine does meets all
alike. The bare loop is PyTorch's own: a process a core, each training half of the cohort one client after another,
channels_last, `torch.optim.SGD`, data in memory, nothing around it.

    python experiments/benchmarks/round_time.py --repetitions 3 --out experiments/benchmarks/round_time.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fedlq_ray import cohorts, provenance, simulate
from fedlq_ray.config import load
from fedlq_ray.data import inputs
from fedlq_ray.models import build
from fedlq_ray.task import prepare

BASE = ["data.name=fashion-mnist", "data.partition=iid", "data.holdout=0", "clients.count=100", "clients.cohort=20"]
TRAIN = ["train.lr=0.05", "train.batch_size=32", "train.local_epochs=1", "tracking.uri=null", "target_accuracy=null"]


def settings(rounds: int, *more: str) -> list[str]:
    return [*BASE, *TRAIN, f"rounds={rounds}", f"evaluate_every={rounds}", *more]


def bare(task, pipe) -> None:
    """One process of the bare loop: told which clients to train, it answers when it has."""
    torch.set_num_threads(1)
    data, train = task.data, task.config.train
    model = build("cnn", data.input_shape, data.num_classes, {}).to(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    shards = {
        client: (inputs(data.x_train[shard], data.mean, data.std), torch.from_numpy(data.y_train[shard]))
        for client, shard in enumerate(task.shards)
    }
    pipe.send("ready")
    while (clients := pipe.recv()) is not None:
        for client in clients:
            x, y = shards[client]
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=train.lr)
            for batch in torch.randperm(len(y)).split(train.batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        pipe.send("done")


def bare_rounds(rounds: int, cores: int) -> list[float]:
    """Seconds of each round: from the first order to the last answer."""
    task = prepare(load(None, settings(rounds)))
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(cores):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=bare, args=(task, theirs)))
        processes[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    seconds = []
    for round in range(rounds):
        members = cohorts.draw(task, round)
        started = time.perf_counter()
        for index, pipe in enumerate(pipes):
            pipe.send(members[index::cores])
        for pipe in pipes:
            pipe.recv()
        seconds.append(time.perf_counter() - started)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return seconds


def measure(hosting: str, strategy: str, rounds: int) -> dict:
    """Wall seconds of a run's rounds, and what its timing.json says besides."""
    import ray

    more = [f"clients.hosting={hosting}", f"strategy.name={strategy}", "evaluate_on=test"]
    result = simulate(load(None, settings(rounds, *more)))
    ray.shutdown()  # each repetition starts afresh, as a user's run does
    timing = json.loads((result.path / "timing.json").read_text())
    return {key: timing[key] for key in ("round_s", "startup_s", "encode_s", "decode_s")} | {
        "final_accuracy": result.summary["final_accuracy"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--hosting", nargs="+", default=["packed", "dedicated"])
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    here = Path.cwd()
    medians: dict[str, list[float]] = {name: [] for name in ["bare", *options.hosting]}
    startups: dict[str, list[float]] = {name: [] for name in options.hosting}
    accuracy: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for repetition in range(options.repetitions):
            seconds = bare_rounds(options.rounds, cores)
            medians["bare"].append(statistics.median(seconds[1:]))
            for hosting in options.hosting:
                timing = measure(hosting, options.strategy, options.rounds)
                medians[hosting].append(statistics.median(timing["round_s"][1:]))
                startups[hosting].append(timing["startup_s"])
                accuracy[hosting] = timing["final_accuracy"]
            told = "  ".join(f"{name} {values[-1]:.3f} s" for name, values in medians.items())
            print(f"repetition {repetition + 1}: median round: {told}", flush=True)
        os.chdir(here)
    ratios = {
        name: [own / base for own, base in zip(values, medians["bare"], strict=True)]
        for name, values in medians.items()
        if name != "bare"
    }
    for name, values in ratios.items():
        print(
            f"{name}: {statistics.median(values):.3f} times the bare loop (from {min(values):.3f} to "
            f"{max(values):.3f}); start-up {statistics.median(startups[name]):.1f} s; "
            f"test accuracy after {options.rounds} rounds {accuracy[name]:.4f}"
        )
    if options.out:
        result = {
            "command": "python experiments/benchmarks/round_time.py "
            f"--strategy {options.strategy} --rounds {options.rounds} --repetitions {options.repetitions}",
            "commit": provenance.commit(),
            "machine": provenance.machine(),
            "versions": provenance.versions(),
            "median_round_s": medians,
            "ratio_to_bare": ratios,
            "startup_s": startups,
            "final_accuracy": accuracy,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
