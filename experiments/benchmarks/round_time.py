"""What the framework costs: wall time and memory of a round, beside the bare training loop and other simulators.

W1: Fashion-MNIST, CNN of 147,146 parameters; W3: CIFAR-10, ResNet-8 with GroupNorm. 100 IID clients, cohort 20, one
epoch, batch 32, SGD at 0.05; our run is evaluated once, after its last round.

    python experiments/benchmarks/round_time.py --repetitions 5 --out experiments/benchmarks/w1.json

Contenders: bare (a process a core, nothing around PyTorch's loop), HOSTING:STRATEGY (ours), flower (its simulation,
Ray backend), pfl (pfl-research). The last two live in environments of their own, made at the first run in --envs.
Repetitions alternate, and go backwards every other time, so that what else the machine does meets all alike. A round
is all that its user waits for: ours from record to record, with planning and the server's step.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import workloads

HERE = Path(__file__).parent
OURS = [f"{hosting}:{strategy}" for hosting in ("packed", "dedicated") for strategy in ("fedavg", "fedlq", "fedlq_rd")]
OTHERS = ["flower", "pfl"]
Command = Sequence[str | Path]


def other(name: str, envs: Path, cores: int, work: Path) -> tuple[Command, dict[str, str]]:
    """Another simulator's command and its versions, in an environment that has our version of PyTorch."""
    torch = "torch==" + version("torch").partition("+")[0]
    if name == "flower":
        python = harness.environment(envs, "flower", "flwr[simulation]", torch)
        return [python, HERE / "flower_app.py", work], harness.installed(python, "flwr", "ray", "torch")
    python = harness.environment(envs, "pfl", "pfl[pytorch]", torch)
    launch: Command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cores}"]
    return [*launch, HERE / "pfl_app.py", work], harness.installed(python, "pfl", "torch")


def commands(
    names: Sequence[str], chosen: list[str], envs: Path, cores: int, work: Path
) -> tuple[dict[str, Command], dict[str, dict[str, str]]]:
    """Each contender's command, and the versions of those that live in other environments."""
    found: dict[str, Command] = {}
    versions = {}
    for name in names:
        if name in OTHERS:
            found[name], versions[name] = other(name, envs, cores, work)
        elif name == "bare":
            found[name] = [sys.executable, HERE / "bare.py", work]
        else:
            hosting, strategy = name.split(":")
            hosted = [f"clients.hosting={hosting}", f"strategy.name={strategy}"]
            found[name] = [sys.executable, HERE / "ours.py", *chosen, *hosted]
    return found, versions


def row(name: str, runs: list[dict[str, Any]], bare: list[dict[str, Any]] | None) -> list[str]:
    """A contender's line of the table."""
    medians = [harness.middle(run["round_s"]) for run in runs]
    ratios = [own / harness.middle(base["round_s"]) for own, base in zip(medians, bare, strict=True)] if bare else []
    clients = [run["timing"] for run in runs if "timing" in run]
    codec = [sum(map(harness.middle, (part["encode_s"], part["decode_s"]))) for part in clients]
    probes = [sum(part["probe_s"]) for part in clients]
    return [
        name,
        harness.spread(medians, 3),
        harness.spread(ratios) if ratios else "",
        harness.spread([run["round_s"][0] for run in runs]),
        harness.spread([run["startup_s"] for run in runs], 1),
        harness.spread([run["peak_mb"] for run in runs], 0),
        f"{statistics.median(codec):.3f}" if codec else "",
        f"{statistics.median(probes):.2f}" if probes else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["w1", "w3"], default="w1")
    parser.add_argument("--contenders", nargs="+", default=["bare", *OURS, *OTHERS], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="of bare, flower and pfl")
    parser.add_argument("--data", nargs="+", default=[], metavar="KEY=VALUE", help="where the data is: data.path=...")
    parser.add_argument("--envs", type=Path, default=harness.ENVS, help="where the others' environments are made")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    unknown = [name for name in options.contenders if name not in ("bare", *OURS, *OTHERS)]
    if unknown:
        parser.error(f"--contenders: {', '.join(unknown)}; there are bare, {', '.join(OURS + OTHERS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chosen = workloads.settings(options.workload, options.rounds, *options.data)
        workloads.export(chosen, options.cores, work)
        each, versions = commands(options.contenders, chosen, options.envs, options.cores, work)
        failed: list[str] = []  # who failed once is left out
        for repetition in range(options.repetitions):
            order = list(each.items())
            for name, command in order if repetition % 2 == 0 else reversed(order):
                if name in failed:
                    continue
                try:
                    runs[name].append(harness.measure(command, work))
                except harness.Failed as exc:  # the others' results are kept
                    print(f"repetition {repetition + 1}, {name}: {exc}", file=sys.stderr, flush=True)
                    failed.append(name)
                    continue
                middle = harness.middle(runs[name][-1]["round_s"])
                print(f"repetition {repetition + 1}, {name}: {middle:.3f} s a round", file=sys.stderr, flush=True)
    heads = ["", "s a round", "times bare", "first, s", "start-up, s", "peak, MB", "codec, s a round", "probes, s"]
    whole = {name: found for name, found in runs.items() if name not in failed}
    print(harness.table(heads, [row(name, found, whole.get("bare")) for name, found in whole.items()]))
    harness.keep(options.out, {"workload": options.workload, "contenders": versions, "failed": failed, "runs": whole})


if __name__ == "__main__":
    main()
