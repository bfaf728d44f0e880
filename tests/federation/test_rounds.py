"""Whole runs without Ray: what a record holds, what seeds decide, and that bytes and clock are right."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from faults import round_of
from safetensors.torch import load_file
from torch import nn

from fedlq_ray import ClientError, ConfigError, FedLQError, simulate
from fedlq_ray.config.load import load, merge
from fedlq_ray.federation import rounds, server
from fedlq_ray.federation.server import Moments
from fedlq_ray.federation.task import Worker, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.runs import simulation
from fedlq_ray.strategies import STRATEGIES, Strategy, make

pytestmark = pytest.mark.usefixtures("own_folder")

QUICK = ["rounds=3", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "tracking.uri=null"]


def run(*overrides, **parts):
    return simulate(load(None, [*QUICK, *overrides]), **parts)


UPDATES_ONLY = ("signsgd", "fedhq", "fedmpq", "lgreco", "fedluar")  # what they learn or vote on is an update


@pytest.mark.parametrize("name", UPDATES_ONLY)
def test_strategies_that_need_updates_refuse_models(name):
    with pytest.raises(ConfigError, match=r"strategy.payload: .*update"):
        run(f"strategy.name={name}", "strategy.payload=model")


class Weighing(SerialHost):
    """Notes the length of every payload, by round and client."""

    def __init__(self, task):
        super().__init__(task)
        self.lengths = {}

    def result(self):
        answer = super().result()
        self.lengths[answer.job.key] = len(answer.reply.payload)
        return answer


@pytest.mark.parametrize("payload", ["update", "model"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_and_its_bytes_are_those_of_the_payloads(name, payload):
    if payload == "model" and name in UPDATES_ONLY:
        return
    bits = ["strategy.bits=2.5"] if name in ("uniform", "eden", "ecsq") else []
    own = [f"strategy.name={name}", f"strategy.payload={payload}", "train.local_epochs=1", *bits]
    task = prepare(merge({"strategy": {"name": "fedlq", "probe_samples": 32}}, [*QUICK, *own]))
    host, strategy = Weighing(task), make(Worker(task).context)
    before = 0.0
    for step in rounds.run(task, strategy, host, rounds.begin(task, strategy), rounds.Timing()):
        record = step.record
        lengths = [host.lengths[record.round, client] for client in record.cohort]
        assert record.client_uplink_bytes == lengths and record.uplink_bytes == sum(lengths) > 0
        slowest = max(c + u for c, u in zip(record.client_compute_s, record.client_upload_s, strict=True))
        assert record.sim_time_s - before == pytest.approx(slowest)
        before = record.sim_time_s
    assert record.round == 2


def test_a_run_leaves_its_files():
    result = run()
    files = {file.name for file in result.path.iterdir()}
    assert {"config.yaml", "rounds.jsonl", "summary.json", "timing.json", "model.safetensors"} <= files
    lines = (result.path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2] and len(result.history) == 3
    assert result.summary["uplink_bytes"] == sum(json.loads(line)["uplink_bytes"] for line in lines)


def test_the_seed_decides_and_nothing_else_does():
    first, again, other = run(), run("name=x", "out=elsewhere"), run("seed=1")
    for file in ("rounds.jsonl", "summary.json"):
        assert (first.path / file).read_bytes() == (again.path / file).read_bytes()
    assert first.summary["weights_sha256"] != other.summary["weights_sha256"]
    repeated = simulate(load(first.path / "config.yaml"))
    assert repeated.summary == first.summary and repeated.path != first.path


def test_the_recorded_error_is_that_of_the_mean_update():
    """What quantization did to the weights of one round, squared, is on average what clients reported."""
    predicted, found = [], []
    for seed in range(12):
        one = (f"seed={seed}", "rounds=1", "train.local_epochs=1")
        exact, coarse = run("strategy.name=fedavg", *one), run("strategy.name=uniform", "strategy.bits=2", *one)
        assert exact.history["quantization_error"].item() == 0
        predicted.append(coarse.history["quantization_error"].item() ** 2)
        found.append(float(((coarse.weights - exact.weights).astype(float) ** 2).sum()))
    assert sum(found) == pytest.approx(sum(predicted), rel=0.1)


def test_fractional_bits_hold_on_average():
    result = run("strategy.name=uniform", "strategy.bits=1.25", "rounds=8")
    floor, ceiling = run("strategy.name=uniform", "strategy.bits=1"), run("strategy.name=uniform", "strategy.bits=2")
    one, two = (r.history["uplink_bytes"].mean() for r in (floor, ceiling))
    assert result.history["uplink_bytes"].mean() == pytest.approx(0.75 * one + 0.25 * two)


def test_fedlq_keeps_its_budgets_and_gives_layers_different_levels():
    # At 1.5 bits the large layer can have 1 bit at most, which leaves the small one up to 4.
    result = run("strategy.budget=bits", "strategy.bits=1.5", "strategy.payload=model", "rounds=4")
    bits = result.history["bits_per_parameter"].iloc[-1]
    uniform = run("strategy.name=uniform", "strategy.bits=1.5", "rounds=4")
    assert result.summary["uplink_bytes"] <= uniform.summary["uplink_bytes"]
    assert bits["fc2"] > 1.5 * bits["fc1"]


def test_stopping_at_the_target_discards_what_began_beyond_it():
    whole = run("rounds=12", "target=0.5")
    stopped = run("rounds=12", "target=0.5", "stop_at_target=true")
    n = stopped.summary["rounds"]
    assert 0 < n < 12 and stopped.summary["final_accuracy"] >= 0.5
    assert (whole.path / "rounds.jsonl").read_text().splitlines()[:n] == (
        stopped.path / "rounds.jsonl"
    ).read_text().splitlines()
    assert stopped.summary["time_to_target_s"] == whole.summary["time_to_target_s"]
    shorter = run(f"rounds={n}", "target=0.5")
    assert shorter.summary["weights_sha256"] == stopped.summary["weights_sha256"]


def test_dropped_clients_send_nothing_and_the_run_goes_on():
    result = run("clients.dropout=0.5", "rounds=6")
    missing = sum(len(c) - len(a) for c, a in zip(result.history["cohort"], result.history["answered"], strict=True))
    assert 0 < missing < 24
    assert run("clients.dropout=1.0").summary["uplink_bytes"] == 0


def test_the_clock_bills_downloads_only_when_told_and_uploads_unless_free():
    upload, both, free = run(), run("network.bill=both"), run("network.uplink_free=true", "strategy.name=fedavg")
    assert sum(upload.history["client_download_s"].sum()) == 0 < sum(both.history["client_download_s"].sum())
    assert sum(free.history["client_upload_s"].sum()) == 0 < free.summary["sim_time_s"]


def test_divergence_names_round_client_and_layer_and_keeps_what_was_done():
    with pytest.raises(ClientError, match=r"round \d+, client \d+: training diverged: layer \w+"):
        run("train.lr=1000", "rounds=20", "out=here")
    from pathlib import Path

    assert not Path("here/summary.json").exists() and Path("here/config.yaml").exists()


class EightBits(Strategy):
    def __init__(self, context):
        self.context = context

    def plan(self, state, round, cohort):
        return {m.client: self.context.at_levels([8] * len(self.context.quantized)) for m in cohort}


class Weighted(EightBits):
    """The same weights as by default, in another unit."""

    def plan(self, state, round, cohort):
        plans = super().plan(state, round, cohort)
        return {m.client: replace(plans[m.client], weight=m.samples / 2) for m in cohort}


class OneVoteEach(EightBits):
    def plan(self, state, round, cohort):
        return {client: replace(plan, weight=3.0) for client, plan in super().plan(state, round, cohort).items()}


def test_weights_of_plans_are_relative():
    default, same, other = run(strategy=EightBits), run(strategy=Weighted), run(strategy=OneVoteEach)
    assert same.summary["weights_sha256"] == default.summary["weights_sha256"] != other.summary["weights_sha256"]


class Signs:
    """One bit an element, and a scale: a user's quantizer, with no base class."""

    def encode(self, x, rng):
        return x.abs().mean().numpy().tobytes() + (x > 0).numpy().tobytes()

    def decode(self, body, count):
        signs = torch.frombuffer(bytearray(body[4:]), dtype=torch.uint8).float() * 2 - 1
        return signs * torch.frombuffer(bytearray(body[:4]), dtype=torch.float32)

    def size(self, count):
        return 4 + count


class ForAll(EightBits):
    def plan(self, state, round, cohort):
        (plan,) = set(super().plan(state, round, cohort[:1]).values())
        return dict.fromkeys(range(8), plan)


@pytest.mark.parametrize("settings", [[], ["network.downlink_bits=2", "network.bill=both"]])
def test_plans_of_who_is_not_in_the_cohort_change_nothing(settings):
    assert run(*settings, strategy=ForAll).summary == run(*settings, strategy=EightBits).summary


def test_own_parts_go_in_as_objects():
    x, y = torch.randn(200, 6).numpy(), (torch.arange(200) % 3).numpy()
    result = run(
        "data.min_samples=2",
        model=lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        data=(x, y, x, y),
        strategy=EightBits,
        quantizer=Signs(),
    )
    assert result.summary["uplink_bytes"] == 3 * 4 * (18 + 2 * 9 + 2 * 4 + 35 + 18)


class Holes(Signs):
    def decode(self, body, count):
        return super().decode(body, count).log()


def test_a_quantizer_that_decodes_to_nan_is_refused_with_the_client():
    with pytest.raises(ClientError, match=r"round 0, client \d: .*segment 0: holds a NaN"):
        run(strategy=EightBits, quantizer=Holes())


def test_error_feedback_sends_later_what_was_lost():
    plain = run("strategy.name=uniform", "strategy.bits=4", "rounds=20")
    fed = run("strategy.name=uniform", "strategy.bits=4", "rounds=20", "strategy.error_feedback=true")
    assert fed.summary["weights_sha256"] != plain.summary["weights_sha256"]
    assert fed.summary["uplink_bytes"] == plain.summary["uplink_bytes"]
    assert fed.summary["final_accuracy"] > 0.7


@pytest.mark.parametrize("name", ["fedlq", "fedlq_rd"])
def test_probes_on_clients_samples_and_by_metric_weigh_layers(name):
    settings = [
        f"strategy.name={name}",
        "strategy.probe_every=2",
        "strategy.metric=fisher",
        "strategy.probe_samples=64",
    ]
    settings = [*settings, "train.local_epochs=1"]
    proxy, clients = run(*settings), run(*settings, "strategy.probe_on=clients")
    first, second = (r.history["significance"].iloc[-1] for r in (proxy, clients))
    assert set(first) == {"fc1", "fc2"} and all(value > 0 for value in first.values()) and first != second
    if name == "fedlq_rd":
        plain = run("strategy.name=fedlq_rd", "train.local_epochs=1")
        assert "significance" not in plain.history
        assert plain.summary["weights_sha256"] != proxy.summary["weights_sha256"]


@pytest.mark.parametrize(
    "settings",
    [
        ["train.adaptive_work=10", "rounds=2"],  # the first round has the same work for all
        ["train.adaptive_work=10", "rounds=2", "network.downlink_bits=20", "strategy.error_feedback=ef21"],
        ["server.lr=3.0", "rounds=1"],
        ["server.optimizer=adam", "rounds=1"],
    ],
)
def test_running_statistics_are_the_mean_of_the_clients_whatever_the_work_and_the_server(settings):
    x, y = torch.randn(240, 6, generator=torch.Generator().manual_seed(0)).numpy(), torch.arange(240).numpy() % 2

    def model():  # all inputs of batch-norm are small: its variances fall from 1 towards 0
        return nn.Sequential(nn.Hardtanh(-0.01, 0.01), nn.BatchNorm1d(6), nn.Linear(6, 2))

    settings = [*settings, "strategy.name=fedavg", "data.partition=iid", "clients.profiles=thin", "train.batch_size=4"]
    result = run(*settings, model=model, data=(x, y, x, y))
    variance = load_file(result.path / "model.safetensors")["1.running_var"]
    assert bool((variance >= 0).all()) and bool((variance < 1).all())


def test_signsgd_steps_as_far_however_much_work_there_is():
    far = ["strategy.name=signsgd", "strategy.step=0.01", "train.adaptive_work=4", "rounds=2"]
    one, two = (run(*far, f"rounds={n}").path / "model.safetensors" for n in (1, 2))
    moved = (load_file(two)["fc1.weight"] - load_file(one)["fc1.weight"]).abs()
    assert float(moved.max()) == pytest.approx(0.01, abs=1e-6)


@pytest.mark.parametrize("feedback", ["true", "ef21"])
def test_signsgd_refuses_error_feedback(feedback):
    with pytest.raises(ConfigError, match=r"strategy.error_feedback: signsgd .*use false, or strategy.name=ef_signsgd"):
        run("strategy.name=signsgd", f"strategy.error_feedback={feedback}")


@pytest.mark.parametrize("optimizer", ["lr=3.0", "optimizer=momentum", "optimizer=adam"])
def test_strategies_and_probes_have_the_mean_update_and_not_the_servers_step(optimizer):
    heard, probed = [], []

    class Hears(STRATEGIES["fedlq"]):
        def learn(self, seen, round, result):
            heard.append(result.update)
            return super().learn(seen, round, result)

    class Probes(SerialHost):
        def probe(self, probe, base, sent, round):
            probed.append(sent)
            return super().probe(probe, base, sent, round)

    quick = ["train.local_epochs=1", "strategy.probe_every=1", "strategy.probe_samples=32"]
    task = prepare(load(None, [*QUICK, *quick, "rounds=4", f"server.{optimizer}"]))
    worker = Worker(task)

    def steps(state=None):
        strategy = make(worker.context, Hears)
        state = state or rounds.begin(task, strategy)
        return list(rounds.run(task, strategy, Probes(task), state, rounds.Timing()))

    weights, moments = worker.model.storage.clone(), Moments()
    whole = steps()
    for update in heard:
        step, moments = server.step(task.config.server, moments, update)
        weights = weights + step
    assert torch.equal(weights, whole[-1].state.weights)
    assert len(probed) == 3 and all(torch.equal(*pair) for pair in zip(probed, heard[:-1], strict=True))
    assert all(torch.equal(step.state.update, update) for step, update in zip(whole, heard, strict=True))
    rest = steps(whole[1].state)
    assert [step.record for step in rest] == [step.record for step in whole[2:]]
    assert torch.equal(rest[-1].state.weights, weights)


def test_a_finished_folder_is_not_written_over():
    run("out=here")
    with pytest.raises(ConfigError, match="finished run"):
        run("out=here")


@pytest.mark.parametrize("late", ["wait", "drop", "partial"])
def test_ef21_clients_and_server_hold_the_same_whoever_drops_out_or_is_late(late):
    settings = ["strategy.error_feedback=ef21", "clients.dropout=0.4", "clients.profiles=thin", "train.adaptive_work=2"]
    deadline = ["strategy.budget=deadline", "strategy.deadline_s=0.15", f"strategy.late={late}", "rounds=6"]
    task = prepare(load(None, [*QUICK, *settings, *deadline]))
    worker = Worker(task)
    host, strategy = SerialHost(task), make(worker.context)
    state = rounds.begin(task, strategy)
    steps = list(rounds.run(task, strategy, host, state, rounds.Timing()))
    answered = {client for step in steps for client in step.record.answered}
    tracked = steps[-1].state.tracked
    assert answered == set(steps[-1].state.memories) == set(tracked) and len(answered) < 24
    assert all(torch.equal(steps[-1].state.memories[client], tracked[client]) for client in answered)


def test_a_model_that_raises_is_tried_again_and_in_evaluation_told():
    moods = []

    class Moody(nn.Linear):
        def forward(self, x):
            if moods and moods[0] == self.training:
                moods.pop(0)
                raise RuntimeError("not today")
            return super().forward(x.flatten(1))

    def moody(*raises):
        moods.clear()
        start = {0: raises}  # once there is a record
        return run(
            model=lambda input_shape, num_classes: Moody(64, num_classes),
            watch=lambda event: moods.extend(start.pop(round_of(event), ())),
        )

    assert moody(True, True).summary == moody().summary and not moods
    with pytest.raises(ClientError, match="round 1, client .: RuntimeError: not today"):
        moody(True, True, True)
    with pytest.raises(FedLQError, match=r"^evaluate failed: RuntimeError: not today$"):
        moody(False)


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_warns_where_the_processor_has_no_instructions_for_it(emulated, monkeypatch):
    monkeypatch.setattr(simulation, "emulates_bfloat16", lambda: emulated)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        result = run("train.precision=bfloat16", "rounds=2")
    assert any("no instructions for it" in str(warning.message) for warning in told) == emulated
    assert result.summary["weights_sha256"] != run("rounds=2").summary["weights_sha256"]
