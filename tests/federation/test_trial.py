"""What a step before the run finds; each case is refused, or works, before anything is written."""

import random
import sys
import threading
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import config, layers
from torch import nn

from fedlq_ray import ConfigError, simulate
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.errors import FedLQError
from fedlq_ray.federation.task import Parts, prepare
from fedlq_ray.federation.trial import Smallest, smallest_batch
from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER
from fedlq_ray.strategies import Strategy


class Wrapped(nn.Module):
    """A model whose forward pass does something of its own."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.body = layers(nn.ReLU(), width=16)
        self.out = forward

    def forward(self, x):
        return self.out(self, self.body(x))


class Hidden(nn.Module):
    """Its first layer is in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [nn.Linear(64, 16)]
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.relu(self.parts[0](x.flatten(1))))


class ZeroGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = layers(width=16)

    def forward(self, x):
        self.zero_grad()
        return self.body(x)


class Teacher(nn.Module):
    """A frozen copy that follows the student."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = layers(width=8), layers(width=8).requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    slow.mul_(0.9).add_(fast, alpha=0.1)
        return self.student(x) + self.teacher(x).detach()


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = layers(width=8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, torch.ones(1)])
        return self.body(x)


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = layers(width=8)

    def get_extra_state(self):
        return {"note": "text"}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return self.body(x)


def locked() -> nn.Module:
    module = layers(width=8)
    module.lock = threading.Lock()
    return module


REFUSED = {
    "no parameter trains": (lambda: layers(width=8).requires_grad_(False), "nothing to train: all 4 parameters are"),
    "detached": (lambda: Wrapped(lambda m, x: x.detach()), "no gradient reaches the model's parameters"),
    "without gradients": (lambda: Wrapped(lambda m, x: x * 0), "all gradients are zero"),
    "in a list": (Hidden, r"parameter of shape \(16, 64\) that it does not own.*nn\.ModuleList"),
    "zero_grad": (ZeroGrad, r"replaces the values or the gradient of parameter body\.1\.weight"),
    "frozen that moves": (Teacher, r"parameter teacher\.1\.weight is frozen .* but a training step changes it"),
    "a buffer that grows": (Growing, r"changes the shape of buffer seen; .*persistent=False"),
    "a lock": (locked, r"cannot be copied, .*TypeError: cannot pickle '_thread\.lock' object"),
    "a dict": (lambda: Wrapped(lambda m, x: {"logits": x}), r"forward pass returns a dict; it must return one float"),
    "a tuple": (lambda: Wrapped(lambda m, x: (x, x)), "forward pass returns a tuple"),
    "a tuple in training": (lambda: Wrapped(lambda m, x: (x, x) if m.training else x), "forward pass returns a tuple"),
    "whole numbers": (lambda: Wrapped(lambda m, x: x.argmax(1)), r"returns a tensor of torch\.int64"),
    "too few outputs": (lambda: Wrapped(lambda m, x: x[:, :3]), r"returns \(2, 3\) for 2 samples"),
    "a generator without a seed": (
        lambda: Wrapped(lambda m, x: x + np.random.default_rng().integers(1 << 30)),
        "returns other outputs when it is repeated",
    ),
    "a state that is no tensor": (lambda: Extra(), r"state_dict cannot be saved in model\.safetensors"),
    "two steps fail": (
        lambda: Wrapped(lambda m, x: x if not m.training else 1 / 0),
        "a training step fails: ZeroDivision",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_would_train_in_vain_or_fail_is_refused_in_a_sentence(kind, tmp_path):
    make, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=rf"^model\.name: .*{message}") as caught:
        simulate(config(tmp_path / "r"), model=make)
    assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()


def test_a_step_below_the_resolution_of_float32_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^train\.lr: a step at 1e-30 changes no weight"):
        simulate(config(tmp_path / "r", train={"lr": 1e-30}))
    assert not (tmp_path / "r").exists()


class Tires(nn.Module):
    """It learns for so many forward passes in training, all clients together."""

    left = 20

    def __init__(self) -> None:
        super().__init__()
        self.body = layers(width=8)

    def forward(self, x):
        type(self).left -= self.training
        return self.body(x) if type(self).left > 0 or not self.training else self.body(x) * 0


def test_a_round_in_which_no_client_learns_ends_the_run(tmp_path):
    with pytest.raises(FedLQError, match=r"^round \d: training changed no weight of any of the 4 clients"):
        simulate(config(tmp_path / "r", rounds=9), model=Tires)


class Zeros:
    """Sends nothing but zeros."""

    def encode(self, x, rng):
        return b""

    def decode(self, body, count):
        return torch.zeros(count)

    def size(self, count):
        return 0


def test_payloads_that_are_all_zero_end_the_run_but_not_where_they_are_owed(tmp_path):
    settings = {"name": "uniform", "bits": 4}
    with pytest.raises(FedLQError, match=r"^round 0: all 4 payloads decode to no change"):
        simulate(config(tmp_path / "r", strategy=settings), quantizer=Zeros())
    owed = config(tmp_path / "s", rounds=1, strategy=settings | {"error_feedback": True})
    assert simulate(owed, quantizer=Zeros()).summary["rounds"] == 1


class Table(nn.Module):
    """A constant table, as a transformer has for positions."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.body = layers(nn.ReLU(), width=8)
        self.register_buffer("pe", torch.zeros(2000, 16), persistent=persistent)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf), persistent=persistent)

    def forward(self, x):
        return self.body(x) + self.pe[0, :10]


@pytest.mark.parametrize("persistent", [False, True])
def test_constant_buffers_are_not_sent_billed_or_judged(persistent, tmp_path):
    plain = simulate(config(tmp_path / "a"), model=lambda: layers(nn.ReLU(), width=8))
    table = simulate(config(tmp_path / "b"), model=lambda: Table(persistent))
    for name in ("uplink_bytes", "downlink_bytes", "client_upload_s"):
        assert table.history[name].tolist() == plain.history[name].tolist()
    assert table.summary["weights_sha256"] == plain.summary["weights_sha256"]


def test_statistics_are_what_training_changes():
    def module():
        part = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
        part.register_buffer("scale", torch.ones(3))
        return part

    task = prepare(config(), Parts(model=module))
    assert task.statistics == {"2.running_mean", "2.running_var"}
    assert [(layer.name, layer.size) for layer in task.layers if layer.buffer] == [("2.buffers", 16)]

    class Eval(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    fixed = prepare(
        config(), Parts(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Eval(8), nn.Linear(8, 10)))
    )
    assert not fixed.statistics and not any(layer.buffer for layer in fixed.layers)


class Later(nn.Module):
    """A buffer that changes only after some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers(width=8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.steps += 1
            if self.steps > 3:
                self.mean += 1
        return self.body(x)


def test_a_buffer_that_changes_only_later_is_an_error_and_no_silent_loss(tmp_path):
    with pytest.raises(FedLQError, match=r"^round 0, client \d: training changed buffer mean, which the trial step"):
        simulate(config(tmp_path / "r", clients={"retries": 0}), model=Later)


def frozen_body() -> nn.Module:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 68), nn.ReLU(), nn.Linear(68, 20), nn.ReLU(),
        nn.Linear(20, 10),
    )  # fmt: skip
    module[1].requires_grad_(False)
    module[3].requires_grad_(False)
    return module


@pytest.mark.parametrize("payload", ["update", "model"])
@pytest.mark.parametrize("strategy", ["fedlq", "uniform", "fedavg", "fedlq_rd", "ef_signsgd"])
def test_frozen_parameters_are_not_sent_planned_or_moved(strategy, payload, tmp_path):
    feedback = None if payload == "update" else False
    chosen = {"name": strategy, "payload": payload, "error_feedback": feedback}
    settings = config(tmp_path / "r", strategy=chosen)
    task = prepare(settings, Parts(model=frozen_body))
    result = simulate(settings, model=frozen_body)
    trained = 68 * 20 + 20 + 20 * 10 + 10
    assert len(result.weights) == trained == sum(layer.size for layer in task.layers)
    assert set(result.history["bits_per_parameter"].iloc[-1]) == {"5", "7"}
    broadcast = PAYLOAD_HEADER + 2 * LAYER_HEADER + 4 * trained
    assert result.history["client_downlink_bytes"].iloc[0] == [broadcast] * 4
    if strategy == "fedavg":
        assert result.history["client_uplink_bytes"].iloc[0] == [broadcast] * 4
    assert result.history["uplink_bytes"].max() <= 4 * broadcast
    state, before = load_file(tmp_path / "r" / "model.safetensors"), task.module.state_dict()
    assert state.keys() == before.keys()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    assert moved == {"5.weight", "5.bias", "7.weight", "7.bias"}


def drawing(input_shape, num_classes):
    """Draws its weights from NumPy and Python, and noise in every forward pass from all three generators."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, num_classes)
            with torch.no_grad():
                self.fc.weight.copy_(torch.from_numpy(np.random.normal(size=(num_classes, 64))) * 0.1)
                self.fc.bias.fill_(random.random())

        def forward(self, x):
            noise = random.random() + np.random.random() + torch.rand(()).item()
            return self.fc(x.flatten(1)) + 0.1 * noise * torch.arange(num_classes)

    return Noisy()


def drawn_data():
    x, y = np.random.normal(size=(300, 64)).astype(np.float32), np.arange(300) % 10
    return x[:200], y[:200], x[200:], y[200:]


class Drawing(Strategy):
    """Draws each round's level from the global generators."""

    def __init__(self, context) -> None:
        self.context = context

    def plan(self, state, round, cohort):
        level = random.choice([2, 4, 8]) if np.random.random() < 0.5 else 3
        return {m.client: self.context.at_levels([level] * len(self.context.quantized)) for m in cohort}


def test_global_generators_of_numpy_and_python_give_the_same_run_and_are_left_alone(tmp_path):
    found = []
    for attempt in range(2):
        np.random.seed(attempt)
        random.seed(attempt)
        torch.manual_seed(attempt)
        before = np.random.get_state()[1].tolist(), random.getstate(), torch.random.get_rng_state().tolist()
        out = tmp_path / str(attempt)
        simulate(config(out), model=drawing, strategy=Drawing)
        assert before == (np.random.get_state()[1].tolist(), random.getstate(), torch.random.get_rng_state().tolist())
        found.append((out / "rounds.jsonl").read_bytes() + (out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_data_function_that_draws_gives_the_same_arrays(monkeypatch):
    module = types.ModuleType("drawn")
    module.make = drawn_data
    monkeypatch.setitem(sys.modules, "drawn", module)
    first, again = (prepare(config(data={"name": "drawn:make"})).data.digest() for _ in range(2))
    assert first == again != prepare(config(data={"name": "drawn:make"}, seed=1)).data.digest()


def normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch_size": 1}}, r"train\.batch_size=1 allows such a step; raise it$"),
        ({"train": {"max_samples": 1}}, r"train\.max_samples=1 allows such a step; raise it$"),
        (
            {"data": {"min_samples": 1, "alpha": 0.01, "holdout": 0}, "clients": {"count": 60}},
            r"client \d+ trains on 1 sample, in batches of 16 \(train\.batch_size\): raise data\.min_samples",
        ),
    ],
)
def test_a_batch_norm_that_may_get_one_sample_is_refused_by_the_setting(sections, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"^model\.name: a training step on 1 sample fails .*; {message}"):
        simulate(config(tmp_path / "r", **sections), model=normed)
    assert not (tmp_path / "r").exists()
    assert simulate(config(tmp_path / "s", rounds=1), model=normed).summary["rounds"] == 1


def test_the_smallest_batch_is_the_smallest_that_any_client_trains_on():
    shards = [np.arange(n) for n in (40, 33, 35, 7)]

    def least(**settings):
        return smallest_batch(shards, TrainConfig(**settings))

    assert least(batch_size=16) == Smallest(2, 35, 3)  # 33 = 16 + 17, for a last sample joins its neighbour
    assert least(batch_size=8) == Smallest(2, 35, 3)
    assert least(batch_size=5).samples == 2
    assert least(batch_size=1).samples == least(batch_size=4, max_samples=1).samples == 1
    assert least(batch_size=40) == Smallest(3, 7, 7)
    assert least(batch_size=40, adaptive_work=4).samples == 2
