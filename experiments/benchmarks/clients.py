"""W2: memory and round time as the number of clients grows, at equal cohort and equal work of each of its members.

    python experiments/benchmarks/clients.py --repetitions 3 --out experiments/benchmarks/w2.json

Fashion-MNIST's 60,000 images go to 100, 1,000 or 10,000 clients; whoever trains goes 20 times through 6 of its own,
which is what each of 10,000 has. Beside the JSON lies a picture of the same name.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import matplotlib
import workloads

matplotlib.use("agg")
from matplotlib import pyplot


def picture(runs: dict[str, dict[int, list[dict[str, Any]]]], file: Path) -> None:
    """Round time and memory against the number of clients."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3))
    titles = ("seconds a round", "peak memory, GB (PSS)")
    for axis, title, of in zip(axes, titles, (_round_s, lambda run: run["peak_mb"] / 1024), strict=True):
        for strategy, by_count in runs.items():
            middles = [statistics.median(map(of, by_count[count])) for count in by_count]
            axis.plot(list(by_count), middles, marker="o", label=strategy)
        axis.set(xscale="log", xlabel="clients", title=title, ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _round_s(run: dict[str, Any]) -> float:
    return harness.middle(run["round_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "fedlq", "ef_signsgd"])
    parser.add_argument("--hosting", default="packed")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--data", nargs="+", default=[], metavar="KEY=VALUE", help="where the data is: data.path=...")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {
        strategy: {count: [] for count in options.counts} for strategy in options.strategies
    }
    for repetition in range(options.repetitions):
        order = [(strategy, count) for strategy in options.strategies for count in options.counts]
        for strategy, count in order if repetition % 2 == 0 else reversed(order):
            chosen = workloads.settings("w2", options.rounds, *options.data, f"clients.count={count}")
            chosen += [f"strategy.name={strategy}", f"clients.hosting={options.hosting}", "data.min_samples=1"]
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, Path(__file__).parent / "ours.py", *chosen]
                run = harness.measure(command, Path(folder))
            runs[strategy][count].append(run)
            told = f"{_round_s(run):.3f} s a round, {run['peak_mb']:.0f} MB"
            print(f"repetition {repetition + 1}, {strategy}, {count} clients: {told}", file=sys.stderr, flush=True)
    rows = [
        [
            strategy,
            f"{count:,}",
            harness.spread([_round_s(run) for run in found], 3),
            harness.spread([run["startup_s"] for run in found], 1),
            harness.spread([run["peak_mb"] for run in found], 0),
        ]
        for strategy, by_count in runs.items()
        for count, found in by_count.items()
    ]
    print(harness.table(["strategy", "clients", "s a round", "start-up, s", "peak, MB"], rows))
    harness.keep(options.out, {"hosting": options.hosting, "runs": runs})
    if options.out:
        picture(runs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
