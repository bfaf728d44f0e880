"""A user's own local training (`train.local`): a function of the module, the client's batches and a context.

The function trains the module in place. It returns the mean loss, or the mean loss and the client's state: tensors by
name that the client finds in `Context.state` in the next round in which it takes part. States travel with the client's
memory and are never sent to the server. What the server should average belongs in a float buffer of the module.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn

from fedlq_ray.config import parts
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.errors import ConfigError
from fedlq_ray.models import FlatModel
from fedlq_ray.problems import Problem
from fedlq_ray.seeding import numpy_rng
from fedlq_ray.training.payloads import Feedback
from fedlq_ray.training.sgd import Batches, lr_at

State = Mapping[str, Tensor]
Local = Callable[[nn.Module, Batches, "Context"], Any]
GivenLocal = Local | type | str
_ERROR, _STATE = "error", "state."  # names in a packed memory


@dataclass(frozen=True)
class Context:
    """What a user's local training may know.

    Attributes:
        settings: the section `train`.
        lr: the learning rate of this round.
        loss: the problem's mean loss of a batch, a function of outputs and targets.
        start: the trainable parameters by name, as the server sent them; copies.
        state: the tensors that this client's training returned last; empty at first.
        rng: a generator of this round and client. PyTorch's, NumPy's and Python's own are seeded too.
        round, client: their numbers, from 0; where the server does not wait for all, the number of the dispatch.
        clients, cohort: how many clients there are, and how many take part in a round.
    """

    settings: TrainConfig
    lr: float
    loss: Callable[[Tensor, Tensor], Tensor]
    start: Mapping[str, Tensor]
    state: State
    rng: np.random.Generator
    round: int
    client: int
    clients: int
    cohort: int


def find(given: GivenLocal | None) -> Local | None:
    """A local training by import path, or the given one; None: the package's own.

    Raises:
        ConfigError: it does not exist, or does not take (module, batches, context).
    """
    if given is None:
        return None
    if isinstance(given, str) and ":" not in given:
        raise ConfigError(f"train.local: {given!r} is not the name of a function of yours, as module:function")
    found: Any = parts.find("train.local", given, {}) if isinstance(given, str) else given
    found = parts.call("train.local", found, {}, {}) if isinstance(found, type) else found
    if not callable(found):
        raise ConfigError(f"train.local: {found!r} is not a function of (module, batches, context)")
    try:
        inspect.signature(found).bind(0, 0, 0)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"train.local: {name(found)} must take (module, batches, context): {exc}") from exc
    return cast(Local, found)


def require_fits(local: Local | None, settings: TrainConfig, feedback: Feedback | None) -> None:
    """Raises ConfigError if a user's own training cannot run with these settings.

    It alone could train in another precision. Its state takes the place in which clients get the last mean update.
    """
    if local is None:
        return
    if feedback == "cafe":
        raise ConfigError("strategy.error_feedback: cafe leaves no room for a local training of your own; use true")
    if settings.precision != "float32":
        raise ConfigError(
            f"train.precision: {settings.precision} does not reach a local training of your own; use float32, and "
            "torch.autocast in the function"
        )


def name(local: Local) -> str:
    return str(getattr(local, "__name__", type(local).__name__))


def set_up(local: Local, module: nn.Module) -> None:
    """Calls the training's own `setup(module)`, if it has one, once before a run. It may register buffers."""
    setup = getattr(local, "setup", None)
    if setup is None:
        return
    try:
        setup(module)
    except Exception as exc:  # a user's function may raise anything
        raise ConfigError(f"train.local: {name(local)}.setup fails: {type(exc).__name__}: {exc}") from exc


def unpacked(memory: Tensor | None) -> tuple[Tensor | None, State | None]:
    """A client's memory as the vector of error feedback (d,) float32 and the state of its own training; None: none."""
    if memory is None or memory.dtype != torch.uint8:
        return memory, None
    found = load(memory.numpy().tobytes())
    return found.get(_ERROR), {key.removeprefix(_STATE): value for key, value in found.items() if key != _ERROR}


def packed(error: Tensor | None, state: State | None, before: Tensor | None = None) -> Tensor | None:
    """A client's memory: the error vector alone, or bytes (n,) uint8 that hold it and the state.

    Args:
        before: the error vector of before, which stays if there is no new one.
    """
    if state is None:
        return error
    error = before if error is None else error
    named = {_STATE + key: value for key, value in state.items()} | ({} if error is None else {_ERROR: error})
    return torch.frombuffer(bytearray(save(named)), dtype=torch.uint8)


class OwnTraining:
    """Trains one model for one client after another with a user's function.

    Args:
        model: holds the global weights when `train` begins, and the client's own when it ends.
        clients, cohort: as in `Context`.
        seed: of the run.
    """

    def __init__(
        self,
        local: Local,
        model: FlatModel,
        settings: TrainConfig,
        problem: Problem,
        *,
        clients: int,
        cohort: int,
        seed: int,
    ) -> None:
        self.local, self.model, self.settings, self.problem = local, model, settings, problem
        self.clients, self.cohort, self.seed = clients, cohort, seed

    def train(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        *,
        normalise: Callable[[NDArray[Any]], Tensor],
        samples: int,
        rng: np.random.Generator,
        round: int,
        client: int,
        state: State | None,
        step: int = 0,
    ) -> tuple[float, State | None]:
        """Trains on one shard: the mean loss, and the client's next state on the CPU.

        Args:
            x, y, normalise, samples, rng: as for `Batches`.
            state: the client's last state, or None before the first.
            step: of the server; it decides the learning rate.
        Raises:
            ConfigError: the function fails, returns something else, or changes what it must leave alone.
        """
        model, module = self.model, self.model.module
        module.train()
        trained = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
        frozen = [(key, p, p._version) for key, p in module.named_parameters() if not p.requires_grad]
        context = Context(
            self.settings,
            lr_at(self.settings, step),
            self.problem.loss,
            {key: p.detach().clone() for key, p in trained},
            {key: value.to(model.device) for key, value in (state or {}).items()},
            numpy_rng(self.seed, "local", round, client),
            round,
            client,
            self.clients,
            self.cohort,
        )
        try:
            found = self.local(module, Batches(x, y, normalise, samples, rng, self.settings), context)
        except Exception as exc:  # a user's function may raise anything
            raise self._wrong(f"fails: {type(exc).__name__}: {exc}") from exc
        for key, parameter, version in frozen:
            if parameter.requires_grad or parameter._version != version:
                raise self._wrong(f"changes parameter {key}, which is frozen, and frozen parameters are not sent")
        self._attach()
        loss, state = found if isinstance(found, tuple) and len(found) == 2 else (found, state)
        return self._loss(loss), self._state(state)

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"train.local: {name(self.local)} {what}")

    def _attach(self) -> None:
        """Takes the parameters' values; optimizers and users may have replaced gradients and data by other tensors."""
        try:
            self.model.attach()
        except RuntimeError as exc:
            raise self._wrong(f"changes the shape or type of a parameter: {exc}") from exc
        if detached := self.model.detached():
            raise self._wrong(f"replaces parameter {detached[0]}; it must change the values of the one that is there")

    def _loss(self, loss: Any) -> float:
        number = isinstance(loss, int | float | np.number) and not isinstance(loss, bool)
        if not number and not (isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()):
            raise self._wrong(
                f"returned a {type(loss).__name__}; it must return the mean loss, a number, or (mean loss, state)"
            )
        if not math.isfinite(loss) and bool(torch.isfinite(self.model.storage).all()):
            raise self._wrong(f"returned a mean loss of {float(loss)}, although all weights are finite")
        return float(loss)

    def _state(self, state: Any) -> State | None:
        if state is None:
            return None
        if not isinstance(state, Mapping):
            raise self._wrong(f"returned a {type(state).__name__} as state; a state is a dict of tensors by name")
        for key, value in state.items():
            if not isinstance(key, str):
                raise self._wrong(f"returned a state with the name {key!r}; names are text")
            if not isinstance(value, Tensor):
                raise self._wrong(f"returned a state whose {key!r} is of type {type(value).__name__}, not a tensor")
            if value.layout != torch.strided or value.is_quantized:
                raise self._wrong(f"returned a state whose {key!r} is not a dense tensor")
        return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
