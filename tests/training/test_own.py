"""A user's own local training: the tutorial's functions, SCAFFOLD and its algorithm, states, and what is refused."""

import copy
import functools
import re
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from faults import SMALL, cut, evidence
from ray import cloudpickle
from torch import nn

from fedlq_ray import ClientError, ConfigError, resume, simulate
from fedlq_ray.config.load import load
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.federation import rounds
from fedlq_ray.federation.task import Parts, Worker, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.models import FlatModel
from fedlq_ray.problems import Classification
from fedlq_ray.quantization import MinMax, Segment
from fedlq_ray.seeding import numpy_rng
from fedlq_ray.strategies import make
from fedlq_ray.training.local import Plan, client_round
from fedlq_ray.training.own import OwnTraining, packed, unpacked
from fedlq_ray.training.sgd import Batches, LocalSGD

PAGE = Path(__file__).parents[2] / "docs/tutorial/local_training.md"
X = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


@pytest.fixture(scope="module")
def page():
    """The module of a file that the tutorial shows; other processes get its contents by value."""
    made = {}

    def module(title):
        if title in made:
            return made[title]
        body = re.search(rf'^```python title="{title}.py"\n(.*?)^```$', PAGE.read_text("utf-8"), re.S | re.M)[1]
        found = sys.modules[title] = ModuleType(title)
        exec(compile(body, title, "exec"), found.__dict__)
        cloudpickle.register_pickle_by_value(found)
        made[title] = found
        return found

    yield module
    for found in made.values():
        cloudpickle.unregister_pickle_by_value(found)
        sys.modules.pop(found.__name__, None)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def sgd(module, batches, context):
    optimizer, total = torch.optim.SGD(module.parameters(), context.lr, foreach=False), 0.0
    for x, y in batches:
        loss = context.loss(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
    return total / batches.seen


def counting(module, batches, context):
    """Trains, and counts the client's rounds in tensors of several types."""
    state = context.state or {"rounds": torch.tensor(0), "half": torch.zeros(2, 3, dtype=torch.bfloat16)}
    assert int(state["rounds"]) == float(state["half"].sum()) / 6
    return sgd(module, batches, context), {key: value + 1 for key, value in state.items()}


def trained(local, memory=None, *, feedback=False, **settings):
    """A client's reply, memory and weights, of the package's training if `local` is None."""
    flat, settings = FlatModel(model()), TrainConfig(batch_size=8, **settings)
    numbers = {"clients": 4, "cohort": 2, "seed": 0}
    own = local and OwnTraining(local, flat, settings, Classification(), **numbers)
    weights = flat.read()
    reply, memory = client_round(
        own or LocalSGD(flat, settings), X[:41], Y[:41], normalise=torch.from_numpy, weights=weights, memory=memory,
        plan=Plan("update", (Segment(MinMax(2), 0, len(weights)),), feedback), samples=82, seed=0, round=5, client=3,
    )  # fmt: skip
    return reply, memory, flat.read()


def test_the_same_steps_give_the_same_bytes_as_the_packages_training():
    own, builtin = trained(sgd), trained(None)
    assert own[0].payload == builtin[0].payload and own[1] is None and not own[0].keeps
    assert own[0].train_loss == pytest.approx(builtin[0].train_loss, rel=1e-6)


def test_the_tutorials_functions_are_the_packages_settings(page):
    tutorial = page("my_training")
    clipped = functools.partial(tutorial.clipped, norm=0.1)
    for local, settings in ((tutorial.fedprox, {"prox_mu": 0.1}), (clipped, {"max_grad_norm": 0.1})):
        plain, own, builtin = trained(None), trained(local), trained(None, **settings)
        torch.testing.assert_close(own[2], builtin[2], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(own[2], plain[2], rtol=1e-3, atol=1e-4)


def test_batches_repeat_and_know_their_number():
    batches = Batches(X[:41], Y[:41], torch.from_numpy, 82, np.random.default_rng(0), TrainConfig(batch_size=8))
    first, again = list(batches), list(batches)
    assert len(first) == len(batches) == 10 and batches.seen == sum(len(y) for _, y in first) == 82
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(first, again, strict=True))


def test_a_memory_holds_the_error_and_the_state():
    assert packed(None, None) is None and unpacked(None) == (None, None)
    error, state = torch.randn(5), {"a": torch.arange(6).view(2, 3), "b": torch.tensor(True), "c": torch.empty(0)}
    assert packed(error, None) is error and unpacked(error) == (error, None)
    for kept in (None, error):
        found, tensors = unpacked(packed(kept, state))
        assert (found is None) if kept is None else torch.equal(found, error)
        assert all(torch.equal(tensors[name], value) for name, value in state.items()) and len(tensors) == 3
    assert torch.equal(unpacked(packed(None, state, error))[0], error)


@pytest.mark.parametrize("feedback", [False, True, "ef21"])
def test_error_memory_is_the_same_with_a_state(feedback):
    plain = with_state = (None, None, None)
    for count in (1, 2, 3):
        plain, with_state = (
            trained(sgd, plain[1], feedback=feedback),
            trained(counting, with_state[1], feedback=feedback),
        )
        assert plain[0].payload == with_state[0].payload and with_state[0].keeps
        error, state = unpacked(with_state[1])
        assert state["rounds"] == count and (error is None or torch.equal(error, plain[1]))
        assert (error is not None) == bool(feedback)


def test_a_state_stays_if_training_returns_none():
    _, memory, _ = trained(counting)
    assert torch.equal(trained(sgd, memory)[1], memory)


def test_what_a_function_replaces_is_taken_over_and_reaches_no_other_client():
    def careless(module, batches, context):
        loss = sgd(module, batches, context)
        module.requires_grad_(False)
        module.eval()
        for parameter in module.parameters():
            parameter.data = parameter.data.mT.contiguous().mT if parameter.ndim == 2 else parameter.data.clone()
        return loss

    assert trained(careless)[0].payload == trained(sgd)[0].payload
    flat = FlatModel(model())
    own = OwnTraining(careless, flat, TrainConfig(), Classification(), clients=1, cohort=1, seed=0)
    start = flat.read()
    ends = []
    for _ in range(2):
        flat.load(start)
        own.train(
            X, Y, normalise=torch.from_numpy, samples=200, rng=np.random.default_rng(0), round=0, client=0, state=None
        )
        ends.append(flat.read())
    assert torch.equal(*ends) and not torch.equal(ends[0], start)


ARRAYS = (X[:160], Y[:160], X[160:], Y[160:])
EVEN = [
    "rounds=4", "clients.count=4", "clients.cohort=2", "clients.hosting=serial", "tracking.uri=null", "target=null",
    "data.partition=iid", "data.holdout=0", "strategy.name=fedavg", "train.local_epochs=3",
]  # fmt: skip


def test_scaffold_is_the_papers_algorithm(page):
    """Against option II of Karimireddy et al., ICML 2020, written down here from their Algorithm 1."""
    task = prepare(load(None, EVEN), Parts(model=model(), data=ARRAYS, local=page("scaffold").Scaffold))
    strategy, worker, settings = make(Worker(task).context), Worker(task), task.config.train
    state, size = rounds.begin(task, strategy), sum(p.numel() for p in model().parameters())
    x, c, own = state.weights[:size].double(), torch.zeros(size).double(), torch.zeros(4, size).double()
    net = model()
    for step in rounds.run(task, strategy, SerialHost(task), state, rounds.Timing()):
        ends, changes = [], []
        for client in step.record.cohort:
            y, shard = x.clone(), task.shards[client]
            rng = numpy_rng(0, "batches", step.record.round, client)
            batches = list(Batches(ARRAYS[0][shard], ARRAYS[1][shard], worker.normalise, 120, rng, settings))
            for inputs, targets in batches:
                nn.utils.vector_to_parameters(y.float(), net.parameters())
                gradient = torch.autograd.grad(nn.functional.cross_entropy(net(inputs), targets), [*net.parameters()])
                y -= settings.lr * (nn.utils.parameters_to_vector(gradient).double() - own[client] + c)
            new = own[client] - c + (x - y) / (len(batches) * settings.lr)
            ends.append(y - x)
            changes.append(new - own[client])
            own[client] = new
        x, c = x + sum(ends) / 2, c + sum(changes) / 4
        close = {"rtol": 1e-3, "atol": 2e-5}
        torch.testing.assert_close(step.state.weights[:size].double(), x, **close)
        torch.testing.assert_close(step.state.weights[size:].double(), c, **close)
        for client, memory in step.state.memories.items():
            kept = torch.cat([value.flatten() for value in _ordered(unpacked(memory)[1])])
            torch.testing.assert_close(kept.double(), own[client], **close)
        assert step.record.client_uplink_bytes == [18 + 3 * 9 + 2 * 4 * size] * 2
        assert step.record.client_downlink_bytes == step.record.client_uplink_bytes
    assert float(c.norm()) > 0.1


def _ordered(state):
    return [state[name] for name, _ in model().named_parameters()]


def scaffold_run(page, out, *settings, **given):
    local = given.pop("local", page("scaffold").Scaffold)
    more = ["strategy.error_feedback=true", "strategy.name=uniform", f"out={out}", *settings]
    return simulate(load(None, [*SMALL, *more]), local=local, **given)


@pytest.mark.parametrize("server", [[], ["server.buffer=2", "server.max_staleness=null"]])
def test_states_resume_to_the_same_bytes(server, page, tmp_path):
    local = page("scaffold").Scaffold
    scaffold_run(page, tmp_path / "whole", *server)
    cut(tmp_path / "cut", "strategy.name=uniform", "strategy.error_feedback=true", *server, local=local)
    with pytest.raises(ConfigError, match=r'local was "Scaffold" and is null; give the local .*resume\(\.\.\., local='):
        resume(tmp_path / "cut")
    resume(tmp_path / "cut", local=local)
    assert evidence(tmp_path / "cut") == evidence(tmp_path / "whole")


@pytest.mark.ray
def test_states_give_the_same_bytes_by_every_hosting_and_resume_in_another(page, tmp_path, ray_here):
    for hosting in ("serial", "packed", "dedicated"):
        scaffold_run(page, tmp_path / hosting, f"clients.hosting={hosting}")
        assert evidence(tmp_path / hosting) == evidence(tmp_path / "serial"), hosting

    def stop(event):
        if getattr(getattr(event, "record", None), "round", 0) == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        scaffold_run(page, tmp_path / "cut", "clients.hosting=packed", watch=stop)
    resume(tmp_path / "cut", ["clients.hosting=serial"], local=page("scaffold").Scaffold)
    assert evidence(tmp_path / "cut") == evidence(tmp_path / "serial")


def test_own_training_by_name_and_with_other_settings(page, tmp_path):
    page("my_training")
    named = simulate(load(None, [*SMALL, "train.local=my_training:fedprox", f"out={tmp_path / 'a'}"]))
    given = simulate(load(None, [*SMALL, f"out={tmp_path / 'b'}"]), local="my_training:fedprox")
    plain = simulate(load(None, [*SMALL, f"out={tmp_path / 'c'}"]))
    hashes = [result.summary["weights_sha256"] for result in (named, given, plain)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert "local: my_training:fedprox" in (tmp_path / "a/config.yaml").read_text()


def test_a_round_can_fail_and_says_which_client_and_why(page, tmp_path):
    def late(module, batches, context):
        return (sgd(module, batches, context), {"a": 1}) if context.round == 2 else sgd(module, batches, context)

    with pytest.raises(ClientError, match=r"round 2, client \d: train.local: late returned a state whose 'a' is of"):
        scaffold_run(page, tmp_path / "run", local=late)


def returns(value):
    def local(module, batches, context):
        sgd(module, batches, context)
        return value

    return local


def idle(module, batches, context):
    return 1.0


def fails(module, batches, context):
    raise ValueError("no luck")


def unseeded(module, batches, context):
    with torch.no_grad():
        module[1].weight += torch.from_numpy(np.random.default_rng().random(module[1].weight.shape)).float()
    return 1.0


def frozen(module, batches, context):
    with torch.no_grad():
        module[3].bias += 1
    return sgd(module, batches, context)


def replaces(module, batches, context):
    module[1].weight = nn.Parameter(module[1].weight + 1)
    return 1.0


def reshapes(module, batches, context):
    module[1].weight.data = torch.zeros(3)
    return 1.0


class Setup:
    def setup(self, module):
        raise KeyError("who")

    def __call__(self, module, batches, context):
        return sgd(module, batches, context)


WRONG = {
    "nothing": (returns(None), "returned a NoneType; it must return the mean loss, a number, or"),
    "three": (returns((1.0, {}, 2)), "returned a tuple; it must return the mean loss"),
    "nan": (returns(float("nan")), "returned a mean loss of nan, although all weights are finite"),
    "list": (returns((1.0, [1])), "returned a list as state; a state is a dict of tensors by name"),
    "array": (returns((1.0, {"c": np.zeros(3)})), "returned a state whose 'c' is of type ndarray, not a tensor"),
    "number": (returns((1.0, {3: torch.zeros(3)})), "returned a state with the name 3; names are text"),
    "sparse": (returns((1.0, {"c": torch.zeros(3).to_sparse()})), "returned a state whose 'c' is not a dense tensor"),
    "idle": (idle, "idle changes no parameter of the module; it must train the module in place"),
    "fails": (fails, "fails fails: ValueError: no luck"),
    "unseeded": (unseeded, "unseeded trains otherwise when it is repeated"),
    "frozen": (frozen, "frozen changes parameter 3.bias, which is frozen"),
    "replaces": (replaces, "replaces replaces parameter 1.weight; it must change the values of the one that is there"),
    "reshapes": (reshapes, "reshapes changes the shape or type of a parameter"),
    "setup": (Setup, "Setup.setup fails: KeyError: 'who'"),
    "arguments": (lambda module: 1.0, r"<lambda> must take \(module, batches, context\): too many positional"),
    "object": (3, r"3 is not a function of \(module, batches, context\)"),
    "name": ("fedprox", "'fedprox' is not the name of a function of yours, as module:function"),
    "missing": ("json:fedprox", "module 'json' has no 'fedprox'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(case, tmp_path):
    local, message = WRONG[case]
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    module[3].bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=rf"^train\.local: (local )?{message}") as told:
        simulate(load(None, [*SMALL, f"out={tmp_path / 'run'}"]), local=local, model=module)
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def test_other_precisions_and_what_cannot_travel_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^train\.precision: bfloat16 does not reach a local training of your own"):
        prepare(load(None, [*SMALL, "train.precision=bfloat16"]), Parts(local=sgd))
    lock = threading.Lock()

    def held(module, batches, context):
        with lock:
            return sgd(module, batches, context)

    settings = [*SMALL, "clients.hosting=packed", f"out={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"^train\.local: cannot be sent to Ray's actors \(TypeError: cannot pickle"):
        simulate(load(None, settings), local=held)
    assert not (tmp_path / "run").exists()


def test_a_copy_of_the_model_is_left_as_it_was(page):
    module = model()
    before = copy.deepcopy(module)
    prepare(load(None, EVEN), Parts(model=module, data=ARRAYS, local=page("scaffold").Scaffold))
    assert [*module.state_dict()] == [*before.state_dict()]
