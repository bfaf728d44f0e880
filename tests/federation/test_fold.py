"""Rounds as a state machine: clients join, replies come in any order, twice, late or never; crashes, and restores."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedlq_ray.config.load import load
from fedlq_ray.errors import ClientError
from fedlq_ray.federation.fold import Fold
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.selection import draw
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Job, Worker, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.quantization import Float32, Segment, Sign, decode, encode
from fedlq_ray.runs.checkpoint import pack, unpack
from fedlq_ray.strategies import make
from fedlq_ray.training.local import Plan, Reply

ROUNDS = 5
SETTINGS = [
    "strategy.name=ecsq", "strategy.bits=1", "clients.count=8", "clients.cohort=4", "clients.hosting=serial",
    f"rounds={ROUNDS}", "clients.on_failure=skip_client", "train.max_samples=16", "train.local_epochs=1",
    "evaluate_every=4", "tracking.uri=null", "clients.dropout=0.2",
]  # fmt: skip
TASK = prepare(load(None, SETTINGS))
CLIENTS = st.integers(0, 7)


class Fated(SerialHost):
    """Of some jobs no reply comes; which, is the same whenever they are run."""

    def __init__(self, fates):
        super().__init__(TASK)
        self.fates = fates  # by round and client

    def result(self):
        job = self.waiting[0][0]
        if self.fates.get(job.key, True):
            return super().result()
        self.waiting.pop(0)
        return Answer(job, ClientError("it fails", round=job.round, client=job.client), None)


class Disorderly(Fated):
    """Trains in any order; what came comes again, in its round, in a later one, and after a crash."""

    def __init__(self, fates, replies):
        super().__init__(fates)
        self.replies = replies  # by round and client
        self.again = []  # of what came, what comes once more

    def result(self):
        due = {order[0].client for order in self.waiting}
        self.again = [key for key in self.again if key[1] not in due]
        if self.again:
            key = self.again.pop()
            return Answer(Job(*key, None, 0), self.replies[key], None)
        at = self.data.draw(st.integers(0, len(self.waiting) - 1), label="next")
        self.waiting.insert(0, self.waiting.pop(at))
        job = self.waiting[0][0]
        if job.key not in self.fates:
            self.fates[job.key] = self.data.draw(st.sampled_from([True] * 5 + [False]), label=f"{job.key} comes")
        answer = super().result()
        if self.fates[job.key]:
            self.replies[job.key] = answer.reply
        due = {order[0].client for order in self.waiting}
        if came := sorted(key for key in self.replies if key[0] <= job.round and key[1] not in due):
            self.again = self.data.draw(st.lists(st.sampled_from(came), max_size=2), label="again")
        return answer


class Federation(RuleBasedStateMachine):
    """The program: its journal and checkpoint outlive a crash, and so do clients and replies on their way.

    Each rule has a round in it, for of some rules hypothesis makes no use in a history.
    """

    @initialize(clients=st.sets(CLIENTS, min_size=3, max_size=6))
    def start(self, clients):
        self.joined = dict.fromkeys(clients, 0)  # from which round on a client takes part
        self.fates, self.replies, self.checkpoint, self.journal, self.fresh = {}, {}, None, [], 0
        self.begin()

    def begin(self):
        self.host, self.snapshot = Disorderly(self.fates, self.replies), None
        saved = unpack(self.checkpoint) if self.checkpoint else None
        self.journal = self.journal[: saved["round"] if saved else 0]
        self.rounds = self.run(self.host, saved)
        self.before = self.start.weights

    def run(self, host, saved=None):
        worker = Worker(TASK)
        strategy = make(worker.context)
        self.start = begin(TASK, strategy)
        if saved:
            self.start = ServerState.from_snapshot(saved, self.start, TASK)
        plan = strategy.plan

        def of_who_joined(state, round, *arguments):
            return {c: p for c, p in plan(state, round, *arguments).items() if self.joined.get(c, ROUNDS) <= round}

        vars(strategy)["plan"] = of_who_joined
        return run(TASK, strategy, host, self.start, Timing())

    @rule(data=st.data())
    def a_round(self, data):
        if len(self.journal) == ROUNDS:
            return
        self.host.data = data
        step = next(self.rounds)
        record, weights = step.record, step.state.weights
        if step.resumable:
            self.snapshot = step.state.snapshot() | {"memories": self.host.recall(step.state.memories)}
        self.journal.append(record)
        self.fresh = max(self.fresh, record.round + 2)  # the next one is under way
        jobs = {client: self.replies[record.round, client].payload for client in record.answered}
        assert record.uplink_bytes == sum(map(len, jobs.values()))
        sizes = dict(zip(record.cohort, record.client_uplink_bytes, strict=True))
        assert all(sizes[client] == len(payload) for client, payload in jobs.items())
        where = {"kind": "update", "round": record.round}
        samples = {client: min(16, len(TASK.shards[client])) for client in jobs}
        mean = torch.zeros(len(weights), dtype=torch.float64)
        for client, payload in jobs.items():
            value = decode(payload, len(mean), client=client, **where).vector.double()
            mean += samples[client] / sum(samples.values()) * value
        torch.testing.assert_close(weights - self.before, mean.float(), atol=1e-6, rtol=1e-5)
        self.before = weights

    @rule(client=CLIENTS, data=st.data())
    def join(self, client, data):
        self.joined.setdefault(client, self.fresh)
        self.a_round(data)

    @rule(data=st.data())
    def save(self, data):
        self.a_round(data)
        self.checkpoint = pack(self.snapshot) if self.snapshot else self.checkpoint

    @rule(data=st.data())
    def crash(self, data):
        self.a_round(data)
        self.rounds.close()
        self.begin()

    @invariant()
    def the_journal_is_sound(self):
        times = [record.sim_time_s for record in getattr(self, "journal", ())]
        assert times == sorted(times)
        for number, record in enumerate(getattr(self, "journal", ())):
            assert record.round == number
            counted = Counter(record.answered) + Counter(record.skipped)
            assert set(counted) <= set(record.cohort) and set(counted.values()) <= {1}
            assert all(self.joined[client] <= number for client in counted)
            assert not any(self.fates[number, client] for client in record.skipped)
            assert all(self.fates[number, client] for client in record.answered)

    def teardown(self):
        if getattr(self, "journal", None):
            again = islice(self.run(Fated(self.fates)), len(self.journal))
            assert self.journal == [step.record for step in again]  # in order, no crash


def four():
    """A fold of four clients, and what they send: the same."""
    update = torch.linspace(-1, 1, TASK.layers[-1].stop)
    jobs = [Job(0, client, Plan("update", (Segment(Float32(), 0, len(update)),)), 1) for client in range(4)]
    where = {"kind": "update", "round": 0, "rng": torch.Generator()}
    payloads = [encode(update, job.plan.segments, client=job.client, **where) for job in jobs]
    fold = Fold(TASK, jobs, [update] * 4, [0.1, 0.2, 0.3, 0.4], {}, 0 * update)
    return fold, [Reply(payload, 1.0, 1, 0.0, 0.0) for payload in payloads]


def test_what_comes_after_a_client_s_first_reply_does_not_count():
    fold, replies = four()
    late = Reply(b"of another round", 9.0, 1, 0.0, 0.0)
    for client, reply in ((3, replies[3]), (3, late), (7, late), *enumerate(replies[:3]), (0, late)):
        fold.take((0, client), reply)
    assert fold.replies == {(0, client): reply for client, reply in enumerate(replies)} and not fold.faults


class Damaging(SerialHost):
    """One client's payload arrives with another byte in it."""

    taken = 0

    def result(self):
        answer = super().result()
        self.taken += 1
        damaged = answer.reply.payload[:-1] + bytes([answer.reply.payload[-1] ^ 1])
        return answer._replace(reply=replace(answer.reply, payload=damaged)) if self.taken == 2 else answer


@pytest.mark.parametrize("policy", ["fail", "skip_client"])
def test_a_refused_payload_is_named_or_its_client_is_skipped(policy):
    task = prepare(load(None, [*SETTINGS, f"clients.on_failure={policy}", "rounds=1", "clients.dropout=0"]))
    worker = Worker(task)
    strategy = make(worker.context)
    rounds = run(task, strategy, Damaging(task), begin(task, strategy), Timing())
    cohort = draw(task, 0)
    if policy == "fail":
        with pytest.raises(ClientError, match=rf"^round 0, client {cohort[1]}: its payload is refused: the checksum"):
            next(rounds)
    else:
        record = next(rounds).record
        assert record.skipped == [cohort[1]] and record.answered == [cohort[0], *cohort[2:]]


def test_a_round_without_error_feedback_leaves_memories_alone():
    host = SerialHost(TASK)
    weights = host.worker.initial_weights()
    plan = Plan("update", (Segment(Sign(), 0, len(weights)),), True)
    for feedback in (True, False):
        job = Job(0, 0, replace(plan, error_feedback=feedback), 16)
        host.submit(job, weights, torch.ones(len(weights)))
        memory = host.result().memory
        assert memory.norm() > 0 if feedback else memory is None


TestFederation = pytest.mark.timeout(600)(Federation.TestCase)  # a failure is made small for 5 minutes at most
TestFederation.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
