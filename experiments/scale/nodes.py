"""Weak scaling: seconds a round on 1, 2 and 4 nodes of a core each, with a cohort that grows as they do.

All nodes are on this machine, so no more than its cores can train at once; what a node more costs, that shows.

    python experiments/scale/nodes.py --out experiments/scale/nodes.json
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
from ray.cluster_utils import Cluster

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.runs import provenance

COHORT = 8  # a node
SETTINGS = ["tracking.uri=null", "checkpoint.keep=0", "clients.hosting=packed", "strategy.name=fedavg"]


def measure(nodes: int, rounds: int) -> dict[str, float]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cohort = [f"clients.count={COHORT * nodes}", f"clients.cohort={COHORT * nodes}", "train.local_epochs=5"]
        with tempfile.TemporaryDirectory() as folder:
            out = [f"out={folder}/run", f"rounds={rounds + 1}", f"evaluate_every={rounds + 1}"]
            result = simulate(load(None, [*SETTINGS, *cohort, *out, "data.partition=iid"]))
            timing = json.loads((result.path / "timing.json").read_text(encoding="utf-8"))
        return {"nodes": nodes, "cohort": COHORT * nodes, "round_s": statistics.median(timing["round_s"][1:])}
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    rows = []
    for nodes in given.nodes:
        rows.append(measure(nodes, given.rounds))
        print(f"{nodes} nodes  cohort {rows[-1]['cohort']}  {rows[-1]['round_s']:.3f} s a round", flush=True)
    if given.out:
        about = {"command": f"python {' '.join(sys.argv)}", "date": time.strftime("%Y-%m-%d"), **provenance.made_by()}
        given.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
