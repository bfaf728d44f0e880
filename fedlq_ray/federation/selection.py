"""Which of the idle, available clients are asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypeVar

from fedlq_ray.errors import FedLQError
from fedlq_ray.federation.flight import FlightEnd
from fedlq_ray.federation.task import Task
from fedlq_ray.seeding import numpy_rng, seeded

State = TypeVar("State", default=Any)


@dataclass(frozen=True)
class Asking:
    """A moment at which clients are asked.

    Attributes:
        idle: clients that are available and not under way, ascending, (n,) int64.
        count: how many to choose, at most n.
        step: of the server, from 0.
        at_s: the simulated time.
        rng: for all random draws.
    """

    idle: NDArray[np.int64]
    count: int
    step: int
    at_s: float
    rng: np.random.Generator


class Selection(Generic[State]):
    """A way to choose clients. Your own needs `choose`.

    The state is a plain value, as that of a strategy: `init` makes it, and `learn` returns the next one.
    """

    timeless = False  # does not depend on any time; your own class must declare it

    def init(self) -> State:
        """The state before the first step."""
        return None  # type: ignore[return-value]  # a selection without state is a Selection[None]

    def choose(self, state: State, asking: Asking) -> Sequence[int]:
        """The clients to ask: `asking.count` different ones of `asking.idle`."""
        raise TypeError(f"{type(self).__name__} has no choose")

    def learn(self, state: State, step: int, ended: Sequence[FlightEnd]) -> State:
        """The state after a step, which took these flights."""
        return state


class Uniformly(Selection[None]):
    """Draws clients uniformly, without replacement."""

    timeless = True

    def choose(self, state: None, asking: Asking) -> Sequence[int]:
        drawn: list[int] = asking.rng.choice(asking.idle, asking.count, replace=False).tolist()
        return drawn


def draw(task: Task, dispatch: int) -> list[int]:
    """The clients of a dispatch, ascending, where all are idle and available, and the selection is random."""
    idle, rng = np.arange(task.clients.count), numpy_rng(task.config.seed, "cohort", dispatch)
    return chosen(Uniformly(), None, Asking(idle, task.clients.cohort, dispatch, 0.0, rng))


def called(selection: Selection, seed: int, method: str, step: int, *arguments: Any) -> Any:
    """The result of a selection's `init` or `learn`. Global generators are seeded by method and step.

    Raises:
        FedLQError: the method raised; the message names step, class and method.
    """
    try:
        with seeded(seed, f"selection.{method}", step):
            return getattr(selection, method)(*arguments)
    except FedLQError:
        raise
    except Exception as exc:  # a user's selection may raise anything
        where = f"step {step}: {type(selection).__name__}.{method}"
        raise FedLQError(f"{where} failed: {type(exc).__name__}: {exc}") from exc


def chosen(selection: Selection, state: Any, asking: Asking) -> list[int]:
    """The clients that a selection asks, ascending.

    Raises:
        FedLQError: it failed, or chose clients that are not idle, one twice, or another number of them.
    """
    where = f"step {asking.step}: {type(selection).__name__}.choose"
    try:
        found = sorted(int(client) for client in selection.choose(state, asking))
    except Exception as exc:  # a user's selection may raise anything
        raise FedLQError(f"{where} failed: {type(exc).__name__}: {exc}") from exc
    if len(set(found)) != asking.count or not np.isin(found, asking.idle).all():
        raise FedLQError(
            f"{where} returned {found}; it must return {asking.count} different clients of the {len(asking.idle)} that "
            "are idle and available"
        )
    return found
