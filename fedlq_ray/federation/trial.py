"""A trial training step before a run: it finds what training changes, and whether a run could learn anything.

The step is the smallest that the settings allow, on samples of a client that would take it. A model that cannot take
this step, or that would not learn, is rejected here, before anything is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.data import Dataset, inputs
from fedlq_ray.errors import ConfigError
from fedlq_ray.models import FlatModel, copied, float_buffers, require_logits, require_trainable
from fedlq_ray.problems import Problem
from fedlq_ray.seeding import numpy_rng, seeded
from fedlq_ray.training import own
from fedlq_ray.training.own import Local, OwnTraining
from fedlq_ray.training.sgd import LocalSGD, batch_sizes, samples_of


@dataclass(frozen=True)
class Smallest:
    """The smallest batch that a client may train on.

    Args:
        client: the client that trains on it.
        shard: number of samples that this client trains on.
        samples: number of samples in the batch.
    """

    client: int
    shard: int
    samples: int

    def why(self, settings: TrainConfig) -> str:
        """States which setting makes the batch this small, and the remedy."""
        if self.samples == settings.batch_size:
            return f"train.batch_size={settings.batch_size} allows such a step; raise it"
        if self.samples == settings.max_samples:
            return f"train.max_samples={settings.max_samples} allows such a step; raise it"
        return (
            f"client {self.client} trains on {self.shard} sample{'s' * (self.shard > 1)}, in batches of "
            f"{settings.batch_size} (train.batch_size): raise data.min_samples, or change train.batch_size"
        )


def smallest_batch(shards: Sequence[NDArray[np.int64]], settings: TrainConfig) -> Smallest:
    """Returns the smallest batch of any client; ties go to the first client."""
    least: dict[int, int] = {}
    for size in {len(shard) for shard in shards}:
        used = samples_of(size, settings)
        least[size] = min(batch_sizes(used, settings.batch_size))
        if settings.adaptive_work > 1:  # a pass may end early, after at least two samples if there are two
            least[size] = min(least[size], 2, used)
    client = min(range(len(shards)), key=lambda c: least[len(shards[c])])
    return Smallest(client, len(shards[client]), least[len(shards[client])])


def try_step(
    module: nn.Module,
    data: Dataset,
    shards: Sequence[NDArray[np.int64]],
    config: Any,
    problem: Problem,
    local: Local | None = None,
) -> frozenset[str]:
    """Trains a copy of the model for the smallest step that the settings allow.

    The caller seeds the global generators.

    Args:
        module: the model with its initial weights; it is not changed.
        shards: each client's indices into the training data.
        config: the run's settings.
        local: the user's own local training, if any, which then takes the step.
    Returns:
        Names of the model's statistics: the float buffers of its state_dict that the step changed.
    Raises:
        ConfigError: the step fails, does not return a single tensor of logits, changes no weight, changes a frozen one,
            or uses parameters that the module does not own.
    """
    require_trainable(module)
    settings: TrainConfig = config.train
    smallest = smallest_batch(shards, settings)
    chosen = shards[smallest.client][: smallest.samples]
    x, y = _samples(data, chosen)
    try:
        statistics = _statistics(module, x, y, problem)
    except ConfigError:
        raise
    except Exception as exc:  # a user's model may raise anything
        told = f"{type(exc).__name__}: {exc}"
        if _fails(module, *_samples(data, np.arange(min(len(data.y_train), 8))), problem):
            raise ConfigError(f"model.name: a training step fails: {told}") from exc
        count = f"{smallest.samples} sample{'s' * (smallest.samples > 1)}"
        raise ConfigError(f"model.name: a training step on {count} fails ({told}); {smallest.why(settings)}") from exc
    if local is not None:
        flat = FlatModel(copied(module), statistics=statistics)
        numbers = {"clients": len(shards), "cohort": config.clients.cohort, "seed": config.seed}
        training = OwnTraining(local, flat, settings, problem, **numbers)
        return statistics | _changed_by(training, data, chosen, smallest.client)
    _require_movement(module, data, chosen, settings, statistics, config.seed, problem)
    return statistics


def _samples(data: Dataset, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    return inputs(data.x_train[chosen], data.mean, data.std), torch.from_numpy(data.y_train[chosen])


def _fails(module: nn.Module, x: Tensor, y: Tensor, problem: Problem) -> bool:
    try:
        _statistics(module, x, y, problem)
    except Exception:  # a user's model may raise anything
        return True
    return False


def _statistics(module: nn.Module, x: Tensor, y: Tensor, problem: Problem) -> frozenset[str]:
    """Returns the float buffers of the state_dict that one forward and backward pass changes, and checks the pass.

    A batch-norm's mean and variance count together, because the mean may stay exactly zero in one step.
    """
    twin = copied(module).train()
    before = {name: buffer.clone() for name, buffer in float_buffers(twin).items()}
    if not _same_twice(module, x):
        raise ConfigError(
            "model.name: a forward pass returns other outputs when it is repeated, although PyTorch's, NumPy's and "
            "Python's generators are seeded, so no run could be repeated; does it use np.random.default_rng() without "
            "a seed, the time, or state that is not a buffer?"
        )
    frozen = {name: p.detach().clone() for name, p in twin.named_parameters() if not p.requires_grad}
    output: Any = twin(x)
    require_logits(output)
    loss: Any = problem.loss(output, y)
    if not isinstance(loss, Tensor) or loss.shape != ():
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"problem: its loss is {what}; it must be a scalar, the mean over the batch")
    _require_owned(twin, loss)
    loss.backward()
    for name, value in frozen.items():
        if not torch.equal(twin.get_parameter(name), value):
            raise ConfigError(
                f"model.name: parameter {name} is frozen (requires_grad=False), but a training step changes it, and "
                "frozen parameters are not sent; make it a buffer (register_buffer), which is sent if it changes"
            )
    changed = set()
    for name, buffer in float_buffers(twin).items():
        if name in before and buffer.shape != before[name].shape:
            raise ConfigError(
                f"model.name: a training step changes the shape of buffer {name}; a cache belongs in "
                "register_buffer(..., persistent=False)"
            )
        if name in before and not torch.allclose(buffer, before[name], 0, 0, equal_nan=True):
            changed.add(name)
    for path, part in twin.named_modules():
        own = {f"{path}.{name}" if path else name for name in ("running_mean", "running_var")}
        if isinstance(part, nn.modules.batchnorm._NormBase) and own & changed:
            changed |= own
    return frozenset(changed)


@torch.no_grad()
def _same_twice(module: nn.Module, x: Tensor) -> bool:
    """Whether two copies of a model agree in training mode, up to kernels that differ in the last bits."""
    outputs: list[Tensor] = []
    for _ in range(2):
        twin = copied(module).train()
        with seeded(0, "twice"):
            outputs.append(twin(x))
    require_logits(outputs[0])
    first, again = outputs
    return torch.allclose(first, again, rtol=1e-3, atol=1e-4, equal_nan=True)


def _require_owned(module: nn.Module, loss: Tensor) -> None:
    """Raises ConfigError if the loss depends on parameters that `module.parameters()` does not list."""
    if loss.grad_fn is None:
        raise ConfigError(
            "model.name: no gradient reaches the model's parameters: its forward pass detaches them, or runs under "
            "torch.no_grad()"
        )
    owned = {id(p) for p in module.parameters()}
    kept = {id(v) for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor)}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in owned and (isinstance(leaf, nn.Parameter) or id(leaf) in kept):
            raise ConfigError(
                f"model.name: the model uses a parameter of shape {tuple(leaf.shape)} that it does not own, so it is "
                "never trained; keep modules in nn.ModuleList and parameters in nn.ParameterList, not in Python lists"
            )


def _require_movement(
    module: nn.Module,
    data: Dataset,
    chosen: NDArray[np.int64],
    settings: TrainConfig,
    statistics: frozenset[str],
    seed: int,
    problem: Problem,
) -> None:
    """Raises ConfigError unless a client's step changes the flat vector's parameters, and the model can be saved."""
    model = FlatModel(copied(module), statistics=statistics)
    _require_saved(model)
    before = model.read()[: model.num_parameters]
    x, y = data.x_train[chosen], data.y_train[chosen]
    LocalSGD(model, settings, problem).train(
        x, y, normalise=lambda x: inputs(x, data.mean, data.std), samples=len(y), rng=numpy_rng(seed, "trial")
    )
    if detached := model.detached():
        raise ConfigError(
            f"model.name: a training step replaces the values or the gradient of parameter {detached[0]}; a forward "
            "pass must leave both in place (no zero_grad, no new Parameter)"
        )
    if not bool(model.grad.any()):
        raise ConfigError("model.name: after a training step all gradients are zero, so nothing can be trained")
    if torch.equal(model.read()[: model.num_parameters], before):
        raise ConfigError(
            f"train.lr: a step at {settings.lr:g} changes no weight: it is below the resolution of float32"
        )


def _require_saved(model: FlatModel) -> None:
    try:
        save(model.state_dict())
    except Exception as exc:  # an extra state that is not a tensor, or a type that the format lacks
        raise ConfigError(f"model.name: its state_dict cannot be saved in model.safetensors: {exc}") from exc


def _changed_by(training: OwnTraining, data: Dataset, chosen: NDArray[np.int64], client: int) -> frozenset[str]:
    """Names of the further float buffers that a user's own local training changes, in two rounds of a client.

    Raises:
        ConfigError: it fails, returns something else, changes no parameter, or differs when it is repeated.
    """
    model, name = training.model, own.name(training.local)
    _require_saved(model)
    frozen = {key: p.detach().clone() for key, p in model.module.named_parameters() if not p.requires_grad}
    start, changed = model.read(), set[str]()
    memory: Tensor | None = None
    for round in (0, 1):  # the second with the state that the first left
        ends = []
        for _ in range(2):
            model.load(start)
            with seeded(training.seed, "trial", round):
                _, state = training.train(
                    data.x_train[chosen], data.y_train[chosen], normalise=lambda x: inputs(x, data.mean, data.std),
                    samples=len(chosen), rng=numpy_rng(training.seed, "trial"), round=round, client=client,
                    state=own.unpacked(memory)[1],
                )  # fmt: skip
            changed |= set(model.changed_constants())
            ends.append(model.read() - start)
        first, again = ends
        if bool((again - first).norm() > 1e-3 * first.norm()):
            raise ConfigError(
                f"train.local: {name} trains otherwise when it is repeated with the same batches and context; draw "
                "numbers from context.rng, and keep what a client needs later in its state"
            )
        try:
            memory = own.packed(None, state)
        except Exception as exc:  # a type that the format lacks
            raise ConfigError(f"train.local: the state that {name} returns cannot be kept: {exc}") from exc
    if not bool(first[: model.num_parameters].any()):
        raise ConfigError(
            f"train.local: {name} changes no parameter of the module; it must train the module in place, and train.lr "
            "must not be below the resolution of float32"
        )
    for key, value in frozen.items():
        if not torch.equal(model.module.get_parameter(key), value):
            raise ConfigError(f"train.local: {name} changes parameter {key}, which is frozen, and not sent")
    return frozenset(changed)
