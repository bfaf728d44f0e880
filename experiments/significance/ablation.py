"""Which significance metric foretells the loss that quantizing a layer costs: rank correlations, and wall times.

FedAvg on Fashion-MNIST in this process; at some rounds each metric's table (layers, levels) on samples held out of
training, as a probe of FedLQ has it, against the truth: the rise of the test loss that is to be expected, over rounding
noise that is another in every tenth of the test set. The first-order term, whose expectation is zero, is taken off: it
is most of what a single draw shows, and would drown the rest. The test set serves as the truth alone; nothing is
chosen on it.

    python experiments/significance/ablation.py
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ConstantInputWarning, spearmanr

from fedlq_ray.config.load import Config, load, to_yaml
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.task import prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.quantization import MinMax
from fedlq_ray.runs import provenance
from fedlq_ray.significance import METRICS, Drops, Measurement, gather, in_blocks, measure
from fedlq_ray.significance.metrics import first_order, rise
from fedlq_ray.strategies import make

HERE = Path(__file__).parent
SETTINGS = [
    "data.name=fashion-mnist", "model.name=cnn", "clients.hosting=serial", "clients.count=50", "clients.cohort=10",
    "data.partition=dirichlet", "data.alpha=0.3", "train.lr=0.2", "train.batch_size=32", "train.local_epochs=1",
    "train.max_samples=300", "strategy.name=fedavg", "tracking.uri=null", "target=null",
]  # fmt: skip
LEVELS = (1, 2, 3, 4, 6, 8)
SAMPLES = 512
BLOCKS = 10  # of the test set, each with its own rounding noise
SMOOTHED = "loss, as FedLQ takes it"
PLAIN = "rise of the loss, one draw"
PAYLOADS = ("update", "model")


def states(host: SerialHost, config: Config, rounds: list[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """After so many rounds of training: the weights (d,), and the last cohort's mean update (d,)."""
    strategy = make(host.worker.context)
    for step in run(host.worker.task, strategy, host, begin(host.worker.task, strategy), Timing()):
        if step.state.round in rounds:
            yield step.state.round, step.state.weights.clone(), step.state.update.clone()


def tables(host: SerialHost, config: Config, rounds: list[int]) -> Iterator[dict]:
    """Of each round and payload: the rise by block, as it is (`plain`) and less its first order (`truth`), both
    (BLOCKS, L, n), and each metric's table (L, n) and seconds."""
    worker, quantizers = host.worker, [MinMax(bits) for bits in LEVELS]
    x, y = worker.probe_data(SAMPLES)
    x_test, y_test = worker.normalise(worker.task.data.x_test), torch.from_numpy(worker.task.data.y_test.copy())
    blocks = [*zip(x_test.chunk(BLOCKS), y_test.chunk(BLOCKS), strict=True)]
    for round, weights, update in states(host, config, rounds):
        for payload in PAYLOADS:
            sent = weights if payload == "model" else update
            what = (worker.model, weights - sent, sent, worker.context.quantized, quantizers)
            given = list(in_blocks(partial(gather, *what, seed=config.seed, round=round), x, y))
            found, seconds = {}, {}
            for name in METRICS:
                started = time.perf_counter()
                measured = measure(given, name)[name]
                seconds[name] = time.perf_counter() - started
                found[name] = measured.drop
                if name == "loss":
                    found[SMOOTHED] = smoothed(measured, [layer.size for layer in worker.context.quantized])
            found[PLAIN] = rise(gather(*what, x, y, seed=config.seed, round=round))
            other = 1000 * (config.seed + 1)  # seeds of rounding noise that no probe has
            tests = [gather(*what, *block, seed=other + i, round=round) for i, block in enumerate(blocks)]
            plain, first = (np.array([take(test) for test in tests]) for take in (rise, first_order))
            yield {
                "round": round,
                "payload": payload,
                "plain": plain,
                "truth": plain - first,
                "metrics": found,
                "seconds": seconds,
            }


def smoothed(measured: Measurement, sizes: list[int]) -> np.ndarray:
    """What FedLQ makes of this one probe: scaled distortion where it is not above its noise."""
    drops = Drops(0.0).add(measured)
    return drops.estimate(sizes, LEVELS)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; zero where one side is constant and so tells no order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(np.nan_to_num(spearmanr(a.ravel(), b.ravel()).statistic))


def correlations(one: dict) -> dict[str, dict]:
    """Of each metric with the truth, over all pairs and over layers at each level; and of what tells how well the truth
    is known: the same without the control variate, and one half of its blocks with the other."""
    truth = one["truth"]
    pairs = {name: (table, truth.mean(0)) for name, table in one["metrics"].items()}
    pairs["plain rise of the truth"] = (one["plain"].mean(0), truth.mean(0))
    pairs["half of the truth"] = (truth[::2].mean(0), truth[1::2].mean(0))
    return {
        name: {"all": correlation(a, b), "level": [correlation(a[:, i], b[:, i]) for i in range(len(LEVELS))]}
        for name, (a, b) in pairs.items()
    }


def summary(results: list[dict], kind: str, payload: str, name: str) -> list[float]:
    """Mean and sample standard deviation over seeds of the mean over rounds (and levels)."""
    by_seed: dict[int, list[float]] = {}
    for one in results:
        if one["payload"] == payload:
            by_seed.setdefault(one["seed"], []).append(float(np.mean(one["correlations"][name][kind])))
    means = [float(np.mean(values)) for values in by_seed.values()]
    return [round(float(np.mean(means)), 4), round(float(np.std(means, ddof=1)) if len(means) > 1 else 0.0, 4)]


def rounded(value):
    """Four significant digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, nargs="+", default=[5, 15, 30])
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit, started = provenance.commit(), time.perf_counter()
    last, results = max(options.rounds), []
    for seed in range(options.seeds):
        config = load(None, [*SETTINGS, f"seed={seed}", f"rounds={last}", f"evaluate_every={last}"])
        host = SerialHost(prepare(config))
        for one in tables(host, config, options.rounds):
            results.append({"seed": seed, **one, "correlations": correlations(one)})
            print(
                f"seed {seed}, round {one['round']}, {one['payload']}: {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    names = [*METRICS, SMOOTHED, PLAIN, "plain rise of the truth", "half of the truth"]
    columns = [(payload, kind) for payload in PAYLOADS for kind in ("all", "level")]
    rows = {
        name: {f"{payload}, {kind}": summary(results, kind, payload, name) for payload, kind in columns}
        | {"seconds": float(np.mean([one["seconds"].get(name, 0.0) for one in results]))}
        for name in names
    }
    for one in results:
        truth = one["truth"]
        one["plain"] = one["plain"].mean(0)
        one["truth"], one["truth_noise"] = truth.mean(0), truth.std(0, ddof=1) / BLOCKS**0.5
    given = {
        "command": f"python experiments/significance/ablation.py --seeds {options.seeds} "
        f"--rounds {' '.join(map(str, options.rounds))}",
        "commit": commit,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "wall_s": time.perf_counter() - started,
        "config": to_yaml(config),
        "levels": list(LEVELS),
        "layers": [layer.name for layer in host.worker.context.quantized],
        "samples": SAMPLES,
        "spearman": rows,
        "tables": results,
    }
    options.out.write_text(json.dumps(rounded(given)) + "\n", encoding="utf-8")
    print("| metric | update: all pairs | update: by level | model: all pairs | model: by level | ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        cells = [f"{value[0]:.2f} ± {value[1]:.2f}" for key, value in row.items() if key != "seconds"]
        print(f"| {name} | {' | '.join(cells)} | {1e3 * row['seconds']:.1f} |")


if __name__ == "__main__":
    main()
