"""Rounds as a state machine: replies in any order, twice, or never, a crash at any time, and a restore."""

import hashlib
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedlq_ray.checkpoint import pack, unpack
from fedlq_ray.config import load
from fedlq_ray.downlink import Offer
from fedlq_ray.errors import ClientError
from fedlq_ray.fold import Fold
from fedlq_ray.quantization import Float32, Segment, Sign, decode, encode
from fedlq_ray.rounds import Outcome, run
from fedlq_ray.serial import SerialHost
from fedlq_ray.strategies import make
from fedlq_ray.task import Job, Workplace, prepare
from fedlq_ray.training import Plan, Reply

ROUNDS = 5
SETTINGS = [
    "strategy.name=ecsq", "strategy.bits=1", "clients.count=8", "clients.cohort=4", "clients.hosting=serial",
    f"rounds={ROUNDS}", "clients.on_failure=skip_client", "train.max_samples=16", "train.local_epochs=1",
    "evaluate_every=4", "tracking.uri=null", "clients.dropout=0.2",
]  # fmt: skip
TASK = prepare(load(None, SETTINGS))


def fails(round, client):
    """One client in six fails for good, the same whenever it is asked."""
    return hashlib.sha256(bytes([round, client])).digest()[0] % 6 == 0


class Disorderly(SerialHost):
    """Trains in any order; replies come twice, also late; some never come."""

    def __init__(self, draw):
        super().__init__(TASK)
        self.draw, self.payloads = draw, {}

    def train(self, jobs, weights):
        before = []
        for job in sorted(jobs, key=lambda job: self.draw()):
            if fails(job.round, job.client):
                yield job.client, ClientError("it fails", round=job.round, client=job.client)
                continue
            ((client, reply),) = super().train([job], weights)
            self.payloads[job.round, client] = reply.payload
            yield client, reply
            before.append((client, reply))
            if self.draw() < 0.3:
                yield before[int(self.draw() * len(before))]  # once more


class Federation(RuleBasedStateMachine):
    """The program: its journal and checkpoint outlive a crash, nothing else does."""

    def begin(self):
        self.host, self.snapshot, place = Disorderly(self.draw), None, Workplace(TASK)
        self.outcome = Outcome(place.model.storage.clone())
        saved = unpack(self.checkpoint) if self.checkpoint else None
        self.journal = self.journal[: saved["round"] if saved else 0]
        self.before = saved["weights"] if saved else place.model.storage.clone()
        self.rounds = run(TASK, make(place.setting), self.host, self.outcome, saved=saved, keep=self.keep)

    def keep(self, snapshot):
        self.snapshot = snapshot | {"memories": self.host.recall(snapshot["memories"])}

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed):
        self.draw, self.checkpoint, self.journal = random.Random(seed).random, None, []
        self.begin()

    @precondition(lambda self: len(self.journal) < ROUNDS)
    @rule()
    def a_round(self):
        record = next(self.rounds)
        self.journal.append(record)
        jobs = {client: self.host.payloads[record["round"], client] for client in record["answered"]}
        assert record["uplink_bytes"] == sum(map(len, jobs.values()))
        sizes = dict(zip(record["cohort"], record["client_uplink_bytes"], strict=True))
        assert all(sizes[client] == len(payload) for client, payload in jobs.items())
        where = {"kind": "update", "round": record["round"]}
        samples = {client: min(16, len(TASK.shards[client])) for client in jobs}
        mean = torch.zeros(len(self.outcome.weights), dtype=torch.float64)
        for client, payload in jobs.items():
            value = decode(payload, len(mean), client=client, **where).vector.double()
            mean += samples[client] / sum(samples.values()) * value
        torch.testing.assert_close(self.outcome.weights - self.before, mean.float(), atol=1e-6, rtol=1e-5)
        self.before = self.outcome.weights

    @precondition(lambda self: self.snapshot)
    @rule()
    def save(self):
        self.checkpoint = pack(self.snapshot)

    @rule()
    def crash(self):
        self.rounds.close()
        self.begin()

    @invariant()
    def the_journal_is_sound(self):
        times = [record["sim_time_s"] for record in getattr(self, "journal", ())]
        assert times == sorted(times)
        for number, record in enumerate(getattr(self, "journal", ())):
            assert record["round"] == number
            counted = Counter(record["answered"]) + Counter(record["skipped"])
            assert set(counted) <= set(record["cohort"]) and set(counted.values()) <= {1}
            assert all(fails(number, client) for client in record["skipped"])
            assert not any(fails(number, client) for client in record["answered"])

    def teardown(self):
        if getattr(self, "journal", None):
            assert self.journal == whole()[: len(self.journal)]


_WHOLE = []


def whole():
    """The journal without a crash, in order."""
    if not _WHOLE:
        place = Workplace(TASK)
        host = Disorderly(lambda: 0.5)
        _WHOLE.extend(run(TASK, make(place.setting), host, Outcome(place.model.storage.clone())))
    return _WHOLE


def test_spread_is_of_who_came():
    layers = TASK.layers
    update = torch.linspace(-1, 1, layers[-1].stop)
    jobs = [Job(0, client, Plan("update", (Segment(Float32(), 0, len(update)),)), 1) for client in range(4)]
    fold = Fold(TASK, {0: Offer(update, 0)}, jobs, [0.1, 0.2, 0.3, 0.4], {})
    for job in jobs:
        payload = encode(update, job.plan.segments, kind="update", round=0, client=job.client, rng=torch.Generator())
        reply = Reply(payload, 1.0, 1, 0.0, 0.0)
        fold.take(job.client, ClientError("it fails", round=0, client=job.client) if job.client in (1, 2) else reply)
    assert fold.lost == [1, 2] and abs(fold.spread - 1) < 1e-6  # they are all the same


class Damaging(SerialHost):
    """One client's payload arrives with another byte in it."""

    def train(self, jobs, weights):
        for index, (client, reply) in enumerate(super().train(jobs, weights)):
            damaged = reply.payload[:-1] + bytes([reply.payload[-1] ^ 1])
            yield client, replace(reply, payload=damaged) if index == 1 else reply


@pytest.mark.parametrize("policy", ["fail", "skip_client"])
def test_a_refused_payload_is_named_or_its_client_is_skipped(policy):
    task = prepare(load(None, [*SETTINGS, f"clients.on_failure={policy}", "rounds=1", "clients.dropout=0"]))
    place = Workplace(task)
    rounds = run(task, make(place.setting), Damaging(task), Outcome(place.model.storage.clone()))
    cohort = whole()[0]["cohort"]
    if policy == "fail":
        with pytest.raises(ClientError, match=rf"^round 0, client {cohort[1]}: its payload is refused: the checksum"):
            next(rounds)
    else:
        record = next(rounds)
        assert record["skipped"] == [cohort[1]] and record["answered"] == [cohort[0], *cohort[2:]]


def test_a_round_without_error_feedback_leaves_memories_alone():
    host = SerialHost(TASK)
    weights = host.place.initial_weights()
    plan = Plan("update", (Segment(Sign(), 0, len(weights)),), True)
    for feedback in (True, False):
        list(host.train([Job(0, 0, replace(plan, error_feedback=feedback), 16)], {0: weights}))
        assert host.memories[0].norm() > 0


TestFederation = Federation.TestCase
TestFederation.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
