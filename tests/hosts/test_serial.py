"""The host without Ray: answers in the order of submission, and jobs that are taken back."""

import pytest

from fedlq_ray.config.load import load
from fedlq_ray.errors import ClientError
from fedlq_ray.federation.task import Job, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.quantization import Float32, Segment
from fedlq_ray.training.local import Plan

SETTINGS = ["clients.count=4", "clients.cohort=4", "train.max_samples=16", "train.local_epochs=1"]


def host_and_jobs(*overrides):
    task = prepare(load(None, [*SETTINGS, *overrides]))
    host = SerialHost(task)
    weights = host.worker.initial_weights()
    plan = Plan("update", (Segment(Float32(), 0, len(weights)),))
    return host, weights, [Job(0, client, plan, 16) for client in range(4)]


def test_answers_come_in_order_and_never_of_a_withdrawn_job():
    host, weights, jobs = host_and_jobs()
    for job in jobs:
        host.submit(job, weights, None)
    assert host.result().job == jobs[0]
    host.withdraw([jobs[0], jobs[2]])  # one has its answer, one waits
    answers = [host.result(), host.result()]
    assert [answer.job for answer in answers] == [jobs[1], jobs[3]] and not host.waiting
    assert all(answer.memory is None and answer.reply.payload for answer in answers)


@pytest.mark.parametrize("policy", ["fail", "skip_client"])
def test_a_client_that_fails_is_tried_again_and_then_skipped_or_the_end(policy, monkeypatch):
    host, weights, jobs = host_and_jobs(f"clients.on_failure={policy}", "clients.retries=2")
    tried = []

    def fails(job, weights, memory):
        tried.append(job.client)
        raise ClientError("it fails", round=job.round, client=job.client)

    monkeypatch.setattr(host.worker, "train", fails)
    host.submit(jobs[3], weights, None)
    if policy == "fail":
        with pytest.raises(ClientError, match="^round 0, client 3: it fails"):
            host.result()
    else:
        job, reply, memory = host.result()
        assert job == jobs[3] and isinstance(reply, ClientError) and memory is None
    assert tried == [3, 3, 3]
