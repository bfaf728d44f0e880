"""How many cores an asynchronous run keeps busy: `python experiments/scale/asynchronous.py`.

The package's own loop runs, with jobs that take a second of a simulated processor each, on C simulated cores, and no
training. Clients have the population's links and speeds. The loop may dispatch what the clock allows, so this is what
real hosting can reach at most, where a job takes equally long on all cores. The results are in asynchronous.json.
"""

import heapq
import json
import sys
from collections import deque
from pathlib import Path

import torch

from fedlq_ray.config.load import load
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.task import Worker, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.quantization import encode
from fedlq_ray.runs import provenance
from fedlq_ray.strategies import make
from fedlq_ray.training.local import Reply

OUT = Path(__file__).with_suffix(".json")
SETTINGS = [
    "clients.hosting=serial", "tracking.uri=null", "target=null", "evaluate_every=1000", "model.name=mlp",
    "model.args.hidden=[8]", "train.max_samples=16", "clients.count=150",
]  # fmt: skip


class Cores(SerialHost):
    """Jobs take one second each on so many cores; answers come in the order of their ends."""

    def __init__(self, task, cores: int) -> None:
        super().__init__(task)
        self.now, self.jobs, self.free = 0.0, 0, [0.0] * cores
        self.queue: deque = deque()  # (end, job, length of the flat vector)

    def submit(self, job, weights, memory) -> None:
        start = max(self.now, heapq.heappop(self.free))
        heapq.heappush(self.free, start + 1)
        self.queue.append((start + 1, job, len(weights)))

    def result(self) -> Answer:
        at = min(range(len(self.queue)), key=lambda i: self.queue[i][0])
        end, job, size = self.queue[at]
        del self.queue[at]
        self.now, self.jobs = max(self.now, end), self.jobs + 1
        where = {"kind": "update", "round": job.round, "client": job.client, "rng": torch.Generator()}
        return Answer(job, Reply(encode(torch.full((size,), 1e-4), _segments(job, size), **where), 1, 1, 0, 0), None)

    def withdraw(self, jobs) -> None:
        keys = {job.key for job in jobs}
        self.queue = deque(order for order in self.queue if order[1].key not in keys)


def _segments(job, size: int):
    found = job.plan.segments
    return found(torch.full((size,), 1e-4)) if callable(found) else found


def busy(cores: int, *settings: str) -> float:
    """The share of the cores' time that jobs take."""
    task = prepare(load(None, [*SETTINGS, *settings]))
    host, strategy = Cores(task, cores), make(Worker(task).context)
    for _ in run(task, strategy, host, begin(task, strategy), Timing()):
        pass
    return host.jobs / (host.now * cores)


def main() -> None:
    rows = []
    for under_way in (10, 20, 50):
        rounds = 600 // under_way
        modes = {
            "synchronous": [f"rounds={rounds}"],
            "buffer of half": [f"rounds={2 * rounds}", f"server.buffer={under_way // 2}", "server.max_staleness=null"],
            "buffer of 1": ["rounds=600", "server.buffer=1", "server.max_staleness=null"],
        }
        for mode, own in modes.items():
            for scheme in ("fedpaq", "fedlq_rd"):  # payloads of a fixed size, and entropy-coded ones
                settings = [f"clients.cohort={under_way}", f"strategy.name={scheme}", *own]
                shares = {cores: round(busy(cores, *settings), 2) for cores in (2, 8, 16)}
                rows.append({"under_way": under_way, "mode": mode, "scheme": scheme, "busy": shares})
                print(json.dumps(rows[-1]), flush=True)
    about = {"command": f"python {' '.join(sys.argv)}", **provenance.made_by()}
    OUT.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
