"""CAFe: clients send the difference from the last mean update, and the server adds it to what arrives."""

import pytest
import tiny
import torch
from faults import SMALL, cut, evidence

from fedlq_ray import ConfigError, FedLQError, resume, simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation import rounds
from fedlq_ray.federation.task import Worker, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.quantization import decode
from fedlq_ray.runs.ceiling import ceiling
from fedlq_ray.strategies import Strategy, make

CAFE = ["strategy.name=uniform", "strategy.bits=4", "strategy.error_feedback=cafe"]


def run(out, *settings, **given):
    return simulate(load(None, [*SMALL, f"out={out}", *settings]), **given)


def test_with_exact_payloads_it_is_the_same_average(tmp_path):
    """Float32 differences, added again: equal up to rounding."""
    plain, cafe = (
        run(tmp_path / str(feedback), "strategy.name=fedavg", f"strategy.error_feedback={feedback}")
        for feedback in ("false", "cafe")
    )
    torch.testing.assert_close(torch.tensor(cafe.weights), torch.tensor(plain.weights), rtol=1e-5, atol=1e-6)


def test_the_mean_update_is_the_last_one_and_the_mean_of_what_arrived():
    task = prepare(load(None, [*SMALL, *CAFE]))
    strategy, seen = make(Worker(task).context), {}

    class Keeps(SerialHost):
        def result(self):
            answer = super().result()
            seen.setdefault(answer.job.round, []).append((answer.job, answer.reply.payload))
            assert answer.memory is None
            return answer

    state = rounds.begin(task, strategy)
    for step in rounds.run(task, strategy, Keeps(task), state, rounds.Timing()):
        came = [
            decode(data, len(state.weights), kind="update", round=job.round, client=job.client).vector.double()
            for job, data in seen[step.record.round]
        ]
        samples = [min(32, len(task.shards[job.client])) for job, _ in seen[step.record.round]]
        shares = torch.tensor(samples, dtype=torch.float64)
        mean = (torch.stack(came) * (shares / shares.sum())[:, None]).sum(0)
        torch.testing.assert_close(step.state.update.double(), state.update.double() + mean, rtol=1e-5, atol=1e-7)
        assert not step.state.memories and not step.state.tracked
        state = step.state
    assert state.round == 4


def test_clients_fetch_the_mean_update_with_the_model(tmp_path):
    plain, cafe = run(tmp_path / "a", *CAFE[:2]), run(tmp_path / "b", *CAFE)
    assert (cafe.history["downlink_bytes"] == 2 * plain.history["downlink_bytes"]).all()
    assert (cafe.history["uplink_bytes"] == plain.history["uplink_bytes"]).all()


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    run(tmp_path / "whole", *CAFE)
    cut(tmp_path / "cut", *CAFE)
    resume(tmp_path / "cut")
    assert evidence(tmp_path / "cut") == evidence(tmp_path / "whole")


@pytest.mark.ray
def test_hosting_changes_no_byte(tmp_path, ray_here):
    for hosting in ("serial", "packed"):
        run(tmp_path / hosting, *CAFE, f"clients.hosting={hosting}", "clients.actors=1")
    assert evidence(tmp_path / "packed") == evidence(tmp_path / "serial")


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy.payload=model"],
        ["server.buffer=2", "server.max_staleness=null"],
        ["train.adaptive_work=2"],
        ["network.downlink_bits=1"],
        ["strategy.name=signsgd"],
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"strategy\.error_feedback"):
        run(tmp_path / "run", CAFE[2], *settings)
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_plans_it_alone_is_refused(tmp_path):
    class Own(Strategy):
        error_feedback = "cafe"

        def __init__(self, context):
            self.context = context

        def plan(self, state, round, cohort):
            return {m.client: self.context.at_levels([4] * len(self.context.quantized)) for m in cohort}

    with pytest.raises(FedLQError, match=r"step 0: Own has plans with error_feedback='cafe'; set strategy\.error_feed"):
        run(tmp_path / "own", strategy=Own)


def test_ceilings_count_the_uploads_of_a_model(tmp_path):
    plain, cafe = (ceiling(prepare(load(None, [*SMALL, f"strategy.error_feedback={f}"]))) for f in ("false", "cafe"))
    assert plain.ratios == cafe.ratios and plain.float32_s == cafe.float32_s


def test_a_local_training_of_ones_own_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cafe leaves no room"):
        simulate(tiny.config(tmp_path / "run", strategy={"error_feedback": "cafe"}), local=lambda *a: 0.0)
