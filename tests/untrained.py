"""Runs whose clients take exact times and are not trained, for tests of the clock and of who is asked."""

from collections import Counter
from dataclasses import replace

import torch

from fedlq_ray.config.load import load
from fedlq_ray.errors import ClientError
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.downlink import Download
from fedlq_ray.federation.flight import depart, end
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.task import Worker, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.quantization import encode
from fedlq_ray.strategies import make
from fedlq_ray.training.local import Plan, Reply

SMALL = [
    "clients.hosting=serial", "tracking.uri=null", "target=null", "evaluate_every=1000", "network.uplink_free=true",
    "strategy.name=fedavg", "model.name=mlp", "model.args.hidden=[2]", "train.max_samples=16",
]  # fmt: skip


class Untrained(SerialHost):
    """Answers with a payload of the client's number, untrained, and the next job by `pick`."""

    def __init__(self, task, pick=lambda n: 0):
        super().__init__(task)
        self.pick, self.trained, self.failing = pick, Counter(), set()

    def result(self):
        job, weights, _ = self.waiting.pop(self.pick(len(self.waiting)))
        self.trained[job.key] += 1
        if job.key in self.failing:
            return Answer(job, ClientError("it fails", round=job.round, client=job.client), None)
        sent = torch.full((len(weights),), 1e-3 * (1 + job.client))
        where = {"kind": "update", "round": job.round, "client": job.client, "rng": torch.Generator()}
        return Answer(job, Reply(encode(sent, job.plan.segments, **where), 1.0, job.samples, 0.0, 0.0), None)


def timed_task(seconds, *overrides):
    """A task whose clients take so many seconds each, and nothing else takes time."""
    count = len(seconds)
    made = prepare(load(None, [*SMALL, f"clients.count={count}", f"clients.cohort={count}", *overrides]))
    made = replace(made, flops=1e9)  # so that quotients are exact
    samples = [cohorts.samples_of_member(made, cohorts.member(made, client, 0)) for client in range(count)]
    profiles = [
        replace(profile, compute_gflops=own / wanted)
        for profile, own, wanted in zip(made.profiles, samples, seconds, strict=True)
    ]
    return replace(made, profiles=profiles)


def steps_of(task, host=None, state=None):
    strategy = make(Worker(task).context)
    return list(run(task, strategy, host or Untrained(task), state or begin(task, strategy), Timing()))


def records_of(task, host=None, state=None):
    return [step.record for step in steps_of(task, host, state)]


def arrived(task, client, loss, payload=b""):
    """A flight that arrived with this training loss and payload."""
    download, plan = Download(torch.empty(0), 0, False), Plan("update", (), False)
    flight = depart(task, cohorts.member(task, client, 0), 0, 0, 0.0, download, plan)
    flight.landing.answer = Answer(flight.job, Reply(payload, loss, flight.job.samples, 0.0, 0.0), None)
    return end(task, flight)
