"""Kills a run at random moments, goes on, and compares bytes: `python tests/chaos.py TARGET --moments 50`.

TARGET is what SIGKILL hits: `serial`, the whole program without Ray; `program`, the whole program with Ray under it;
`driver`, `client` (one client actor), `clients` (all of them) or `node` (the second of two nodes with all that runs
there; a new one joins for the next moment). A line a moment is appended to --out.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import evidence, workers

RUN = (
    "rounds=40", "clients.count=12", "clients.cohort=6", "clients.actors=2", "strategy.name=fedlq_rd",
    "strategy.error_feedback=true",
    "strategy.metric=fisher", "strategy.probe_every=2", "network.downlink_bits=1", "evaluate_every=3",
    "tracking.uri=null", "checkpoint.every_rounds=3", "clients.timeout_s=60",
)  # fmt: skip

ASYNCHRONOUS = (*RUN, "server.buffer=3", "server.max_staleness=3", "train.adaptive_work=1")


class Nodes:
    """Two nodes, of which the second can be killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.second: object = None

    def whole(self) -> str:
        """The cluster's address, when it has both."""
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, wait=True)
        return str(self.cluster.address)

    def kill(self) -> int:
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None
        return 1


def fedlq(*arguments: str, address: str = "local") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedlq_ray.cli", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, **quiet)  # type: ignore[call-overload, no-any-return]


def lines(out: Path) -> int:
    file = out / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def strike(
    settings: tuple[str, ...], target: str, moment: float, folder: Path, nodes: Nodes | None
) -> dict[str, object]:
    """A run that is hit when this share of its rounds is done, and what came of it."""
    out, rounds = folder / f"run-{moment:.6f}", int(RUN[0].partition("=")[2])
    hosting = "serial" if target == "serial" else "packed"
    address = nodes.whole() if nodes else "local"
    process = fedlq("run", *settings, f"clients.hosting={hosting}", f"out={out}", address=address)
    while process.poll() is None and lines(out) < int(moment * rounds):
        time.sleep(0.01)
    time.sleep(moment * rounds % 1 * 0.2)  # somewhere in a round, too
    done, hit = lines(out), 0
    if target in ("serial", "program"):
        process.kill()
        hit = 1
    elif nodes:
        hit = nodes.kill() if process.poll() is None else 0
    else:
        kind = "Driver" if target == "driver" else "ClientActor"
        for pid in workers(kind, process.pid)[: 1 if target == "client" else None]:
            os.kill(pid, signal.SIGKILL)
            hit += 1
    code = process.wait()
    resumed = 0
    if (out / "summary.json").exists():
        code = max(code, 0)  # a program that was killed when its result was there
    else:
        resumed = 1
        again = ("resume", str(out)) if (out / "config.yaml").exists() else ("run", *settings, f"out={out}")
        code = fedlq(*again).wait()
    same = code == 0 and evidence(out) == evidence(folder / "whole")
    shutil.rmtree(out)
    return {"target": target, "round": done, "hit": hit, "resumed": resumed, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["serial", "program", "driver", "client", "clients", "node"])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--asynchronous", action="store_true", help="clients are under way over steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("chaos.jsonl"))
    given = parser.parse_args()
    draw, settings = random.Random(given.seed), ASYNCHRONOUS if given.asynchronous else RUN
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if fedlq("run", *settings, "clients.hosting=serial", f"out={folder / 'whole'}").wait():
            sys.exit("the run without a fault failed")
        nodes = Nodes() if given.target == "node" else None
        results = []
        for _ in range(given.moments):
            results.append(strike(settings, given.target, draw.random(), folder, nodes))
            with given.out.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
        if nodes:
            nodes.cluster.shutdown()
    lost = [result for result in results if not result["same"]]
    hits = sum(result["hit"] != 0 for result in results)
    print(f"{given.target}: {len(results)} moments, {hits} hit, {len(lost)} differ")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
