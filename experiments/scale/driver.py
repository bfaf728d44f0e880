"""What one driver takes: payloads and bytes a second, of clients that answer at once.

`fold`: the driver's own work in a round, in this process: check, decode, and add each payload in client order. `host`:
the same with Ray's dispatch: jobs go to actors, which answer with a payload made beforehand (`dispatch`: without
the fold). Payloads are real ones, of a fully connected model on digits. Rates are wall time, and so want a quiet
machine; milliseconds are the driver process's processor time a payload, which other work disturbs less.

    python experiments/scale/driver.py --out experiments/scale/driver.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
import torch

from fedlq_ray.config.load import load
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.fold import Fold
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.planning import shares_of
from fedlq_ray.federation.selection import draw
from fedlq_ray.federation.task import Job, Worker, prepare
from fedlq_ray.hosts.ray.hosting import RayHost
from fedlq_ray.hosts.ray.pool import Pool
from fedlq_ray.hosts.ray.session import start_ray
from fedlq_ray.runs import provenance
from fedlq_ray.strategies import make

SCHEMES = {
    "fedavg": ["strategy.name=fedavg"],
    "uniform, 4 bits": ["strategy.name=uniform", "strategy.bits=4"],
    "eden, 1 bit": ["strategy.name=eden", "strategy.bits=1"],
    "ecsq, 1 bit": ["strategy.name=ecsq", "strategy.bits=1"],
}
COHORT = 20


class Case:
    """A cohort, its jobs, and what it sends."""

    def __init__(self, hidden: int, scheme: str) -> None:
        clients = [f"clients.count={COHORT}", f"clients.cohort={COHORT}", "train.max_samples=16", "tracking.uri=null"]
        model = ["model.name=mlp", f"model.args.hidden=[{hidden}]", "strategy.error_feedback=false"]
        self.task = prepare(load(None, [*clients, *model, *SCHEMES[scheme]]))
        worker = Worker(self.task)
        weights = worker.initial_weights()
        members = [cohorts.member(self.task, client, worker.broadcast_size()) for client in draw(self.task, 0)]
        strategy = make(worker.context, None)
        plans = strategy.plan(strategy.init(), 0, members)
        self.jobs = [Job(0, m.client, plans[m.client], 16) for m in members]
        self.shares = shares_of(members, [plans[m.client].weight for m in members])
        self.replies = {job.key: worker.train(job, weights, None)[0] for job in self.jobs}
        self.parameters, self.weights = len(weights), weights
        self.bytes = sum(len(reply.payload) for reply in self.replies.values()) / COHORT

    def fold(self) -> Fold:
        return Fold(self.task, self.jobs, [self.weights] * COHORT, self.shares, {})


@ray.remote(num_cpus=0)
class Echo:
    """Stands where a client's actor does, and answers with what was made beforehand."""

    def __init__(self, replies: dict) -> None:
        self.replies = replies

    def alive(self) -> bool:
        return True

    def train(self, job: Job, weights: object, memory: object) -> tuple:
        return self.replies[job.key], None


class EchoPool(Pool):
    """Actors that answer at once."""

    def __init__(self, case: Case) -> None:
        self.replies = ray.put(case.replies)
        super().__init__(case.task, "packed")

    def create(self, options: dict) -> object:
        return Echo.remote(self.replies)


def cost(rounds: int, one: Callable[[], None]) -> dict[str, float]:
    """Of a payload: its rate in the median round, and this process's processor time; a first round is left out."""
    wall, busy = [], []
    for _ in range(rounds + 1):
        started, used = time.perf_counter(), time.process_time()
        one()
        wall.append(time.perf_counter() - started)
        busy.append(time.process_time() - used)
    return {
        "per_s": COHORT / statistics.median(wall[1:]),
        "cpu_ms": 1e3 * statistics.median(busy[1:]) / COHORT,
    }


def measure(case: Case, rounds: int) -> dict:
    def folded() -> None:
        fold = case.fold()
        for job in case.jobs:
            fold.take(job.key, case.replies[job.key])

    host = RayHost(EchoPool(case))
    published = host.publish(case.weights)

    def answers() -> Iterator[Answer]:
        for job in case.jobs:
            host.submit(job, published, None)
        for _ in case.jobs:
            yield host.result()

    def hosted() -> None:
        fold = case.fold()
        for job, reply, _ in answers():
            fold.take(job.key, reply)

    def dispatched() -> None:
        for _ in answers():
            pass

    return {
        "parameters": case.parameters,
        "payload_bytes": case.bytes,
        "fold": cost(rounds, folded),
        "dispatch": cost(rounds, dispatched),
        "host": cost(rounds, hosted),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--hidden", type=int, nargs="+", default=[1960, 13500], help="147 thousand, a million")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)  # as the driver has
    start_ray()
    rows = []
    for hidden in given.hidden:
        for scheme in SCHEMES:
            rows.append({"scheme": scheme, **measure(Case(hidden, scheme), given.rounds)})
            row = rows[-1]
            parts = ("fold", "dispatch", "host")
            told = "  ".join(f"{name} {row[name]['per_s']:.0f}/s {row[name]['cpu_ms']:.2f} ms" for name in parts)
            mb = row["payload_bytes"] * row["host"]["per_s"] / 1e6
            print(
                f"{scheme:16} {row['parameters']:>9,} {row['payload_bytes']:>10,.0f} B  {told}  {mb:.1f} MB/s",
                flush=True,
            )
    if given.out:
        about = {"command": f"python {' '.join(sys.argv)}", "date": time.strftime("%Y-%m-%d"), **provenance.made_by()}
        given.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
