"""The selections of clients that have a name: `clients.selection`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.config import parts
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.durations import Durations, Floats, Sizes, sizes_of
from fedlq_ray.federation.flight import FlightEnd
from fedlq_ray.federation.selection import Asking, Selection, Uniformly
from fedlq_ray.federation.task import Task
from fedlq_ray.federation.tifl import TiFL


def samples(task: Task) -> Floats:
    """Each client's samples per pass, (clients,)."""
    return np.array([cohorts.member(task, client, 0).samples for client in range(task.clients.count)], float)


class Fastest(Selection[Sizes]):
    """The clients of the least expected duration (`Durations`). A bound on speed, not a fair scheme."""

    def __init__(self, task: Task) -> None:
        self.durations = Durations(task)

    def init(self) -> Sizes:
        return self.durations.initial

    def choose(self, state: Sizes, asking: Asking) -> Sequence[int]:
        order = np.argsort(self.durations(state)[asking.idle], kind="stable")
        found: list[int] = asking.idle[order][: asking.count].tolist()
        return found

    def learn(self, state: Sizes, step: int, ended: Sequence[FlightEnd]) -> Sizes:
        return sizes_of(ended, state)


class PowerOfChoice(Selection[dict[int, float]]):
    """Power-of-choice: of some candidates, those with the largest loss (Cho, Wang and Joshi, AISTATS 2022).

    This is the paper's rpow-d: the loss of a client is the mean training loss that it reported last, infinite before.
    No candidate evaluates the current model, so that nothing is sent for it.

    Args:
        candidates: d, drawn by their share of the data, without replacement; at least as many as are asked.
    """

    timeless = True

    def __init__(self, task: Task, candidates: int = 20) -> None:
        if candidates < 1:
            raise ConfigError(f"clients.selection_args: candidates must be at least 1, got {candidates}")
        self.samples, self.candidates = samples(task), candidates

    def init(self) -> dict[int, float]:
        return {}

    def choose(self, state: dict[int, float], asking: Asking) -> Sequence[int]:
        shares = self.samples[asking.idle] / self.samples[asking.idle].sum()
        count = min(len(asking.idle), max(self.candidates, asking.count))
        drawn = asking.rng.choice(asking.idle, count, replace=False, p=shares)
        losses = np.array([state.get(int(client), math.inf) for client in drawn])
        found: list[int] = drawn[np.argsort(-losses, kind="stable")][: asking.count].tolist()
        return found

    def learn(self, state: dict[int, float], step: int, ended: Sequence[FlightEnd]) -> dict[int, float]:
        return state | {e.flight.client: e.reply.train_loss for e in ended if e.reply}


@dataclass(frozen=True)
class Explored:
    """What Oort knows.

    Attributes:
        utility, seconds, last: by client, its statistical utility, how long its last flight took, and its step.
        percentile: of the preferred duration T.
        gained: sums of utility of this window of steps, and of the one before.
        sizes: of the last flights that arrived.
    """

    utility: Mapping[int, float]
    seconds: Mapping[int, float]
    last: Mapping[int, int]
    percentile: float
    gained: tuple[float, float]
    sizes: Sizes = (0.0, 0.0)


class Oort(Selection[Explored]):
    """Oort: clients whose updates promise most, and that are not slow (Lai et al., OSDI 2021, Algorithm 1).

    The utility of client n is |B_n| sqrt(mean loss^2), clipped at the 0.9 quantile, plus sqrt(0.1 ln(step) / last),
    times (T / t_n)^alpha if it is slower than T. T is a percentile of the known durations; the pacer raises it by 5
    when a window of steps gained less than the one before. A share of those asked, 0.9 x 0.98^step but at least 0.2,
    are clients that have sent nothing yet, the fast ones more often. The others are drawn in proportion to utility,
    from those with at least 95 % of the utility of the last one that would be needed.

    Departs from it: a client reports its mean loss, which stands for the root mean square over samples, and counts as
    0 if it is negative; no client is left out because it was asked often. A share that is no whole number of clients is
    rounded up or down at random, so that it holds on average where clients are asked one at a time.

    Args:
        alpha: exponent of the penalty of slow clients.
        window: steps between looks of the pacer.
        percentile: of durations, at the beginning.
    """

    def __init__(self, task: Task, alpha: float = 2.0, window: int = 20, percentile: float = 30.0) -> None:
        numbers = all(isinstance(value, int | float) for value in (alpha, percentile))
        if not (numbers and 0 <= alpha < math.inf and window >= 1 and 0 < percentile <= 100):
            raise ConfigError(
                "clients.selection_args: oort needs alpha of at least 0, window of at least 1 and a percentile above 0 "
                f"and at most 100, got {alpha!r}, {window} and {percentile!r}"
            )
        self.alpha, self.window, self.percentile = alpha, window, percentile
        self.durations, self.samples = Durations(task), samples(task)

    def init(self) -> Explored:
        return Explored({}, {}, {}, self.percentile, (0.0, 0.0), self.durations.initial)

    def choose(self, state: Explored, asking: Asking) -> Sequence[int]:
        known = np.array([client for client in asking.idle.tolist() if client in state.utility], np.int64)
        fresh = np.setdiff1d(asking.idle, known)
        explore = max(0.2, 0.9 * 0.98**asking.step) * asking.count
        new = min(len(fresh), max(math.floor(explore + asking.rng.random()), asking.count - len(known)))
        found: list[int] = []
        if new:
            speed = 1 / self.durations(state.sizes)[fresh]
            found += asking.rng.choice(fresh, new, replace=False, p=speed / speed.sum()).tolist()
        if rest := asking.count - new:
            utility = self.utilities(state, known, asking.step)
            bar = 0.95 * np.sort(utility)[-rest]
            good = np.flatnonzero(utility >= bar)
            weights = np.maximum(utility[good], 1e-30)
            found += asking.rng.choice(known[good], rest, replace=False, p=weights / weights.sum()).tolist()
        return found

    def utilities(self, state: Explored, clients: NDArray[np.int64], step: int) -> Floats:
        """The utility of clients that have been asked, (n,)."""
        statistical = np.array([state.utility[client] for client in clients.tolist()])
        statistical = np.minimum(statistical, np.quantile(list(state.utility.values()), 0.9))
        last = np.array([state.last[client] + 1 for client in clients.tolist()])
        seconds = np.array([state.seconds[client] for client in clients.tolist()])
        preferred = np.percentile(list(state.seconds.values()), state.percentile)
        slow = np.where(seconds > preferred, (preferred / np.maximum(seconds, 1e-30)) ** self.alpha, 1.0)
        found: Floats = (statistical + np.sqrt(0.1 * np.log(step + 1) / last)) * slow
        return found

    def learn(self, state: Explored, step: int, ended: Sequence[FlightEnd]) -> Explored:
        came = [e for e in ended if e.reply]
        loss = {e.flight.client: max(0.0, e.reply.train_loss) for e in came if e.reply}
        utility = {client: self.samples[client].item() * own for client, own in loss.items()}
        seconds = {e.flight.client: e.times.total_s for e in came}
        last = {e.flight.client: step for e in came}
        now, before = state.gained
        state = replace(
            state,
            utility={**state.utility, **utility},
            seconds={**state.seconds, **seconds},
            last={**state.last, **last},
            gained=(now + sum(utility.values()), before),
            sizes=sizes_of(ended, state.sizes),
        )
        if (step + 1) % self.window:
            return state
        now, before = state.gained
        raised = min(100.0, state.percentile + 5) if now < before else state.percentile
        return replace(state, percentile=raised, gained=(0.0, now))


SELECTIONS: dict[str, Any] = {
    "random": Uniformly,
    "oort": Oort,
    "tifl": TiFL,
    "power_of_choice": PowerOfChoice,
    "fastest": Fastest,
}


def selection_of(task: Task) -> Selection:
    """The selection that the settings name.

    Raises:
        ConfigError: it is unknown, or does not take its arguments.
    """
    settings = task.config.clients
    factory = parts.find("clients.selection", settings.selection, SELECTIONS)
    if "task" in settings.selection_args:
        raise ConfigError("clients.selection_args: 'task' is given by the run; leave it out")
    found = parts.call("clients.selection", factory, {"task": task}, settings.selection_args)
    if not isinstance(found, Selection):
        raise ConfigError(
            f"clients.selection: {settings.selection} made a {type(found).__name__}; it must be a subclass of "
            "fedlq_ray.federation.selection.Selection"
        )
    if type(found).choose is Selection.choose:
        raise ConfigError(f"clients.selection: {settings.selection} has no choose, which returns the clients to ask")
    return found
