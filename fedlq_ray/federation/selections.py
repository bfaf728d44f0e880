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
from fedlq_ray.federation.flight import Ended
from fedlq_ray.federation.selection import Asking, Selection, Uniformly
from fedlq_ray.federation.task import Task

Floats = NDArray[np.float64]


def expected_s(task: Task) -> Floats:
    """Each client's mean seconds of training, and of latency, without the bytes of a payload, (clients,)."""
    return np.array([cohorts.member(task, client, 0).fixed_s for client in range(task.clients.count)])


def samples(task: Task) -> Floats:
    """Each client's samples per pass, (clients,)."""
    return np.array([cohorts.member(task, client, 0).samples for client in range(task.clients.count)], float)


class Fastest(Selection[None]):
    """The clients that train in the least time, by the means of their profiles. A bound on speed, not a fair scheme."""

    def __init__(self, task: Task) -> None:
        self.expected_s = expected_s(task)

    def choose(self, state: None, asking: Asking) -> Sequence[int]:
        found: list[int] = asking.idle[np.argsort(self.expected_s[asking.idle], kind="stable")][: asking.count].tolist()
        return found


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

    def learn(self, state: dict[int, float], step: int, ended: Sequence[Ended]) -> dict[int, float]:
        return state | {e.flight.client: e.reply.train_loss for e in ended if e.reply}


@dataclass(frozen=True)
class Explored:
    """What Oort knows.

    Attributes:
        utility, seconds, last: by client, its statistical utility, how long its last flight took, and its step.
        percentile: of the preferred duration T.
        gained: sums of utility of this window of steps, and of the one before.
    """

    utility: Mapping[int, float]
    seconds: Mapping[int, float]
    last: Mapping[int, int]
    percentile: float
    gained: tuple[float, float]


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
        self.expected_s, self.samples = expected_s(task), samples(task)

    def init(self) -> Explored:
        return Explored({}, {}, {}, self.percentile, (0.0, 0.0))

    def choose(self, state: Explored, asking: Asking) -> Sequence[int]:
        known = np.array([client for client in asking.idle.tolist() if client in state.utility], np.int64)
        fresh = np.setdiff1d(asking.idle, known)
        explore = max(0.2, 0.9 * 0.98**asking.step) * asking.count
        new = min(len(fresh), max(math.floor(explore + asking.rng.random()), asking.count - len(known)))
        found: list[int] = []
        if new:
            speed = 1 / self.expected_s[fresh]
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

    def learn(self, state: Explored, step: int, ended: Sequence[Ended]) -> Explored:
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
        )
        if (step + 1) % self.window:
            return state
        now, before = state.gained
        raised = min(100.0, state.percentile + 5) if now < before else state.percentile
        return replace(state, percentile=raised, gained=(0.0, now))


@dataclass(frozen=True)
class Credits:
    """What TiFL knows: the credits of each tier, and each client's last loss."""

    credits: tuple[int, ...]
    losses: Mapping[int, float]


class TiFL(Selection[Credits]):
    """TiFL: the clients of a step come from one tier of similar speed (Chai et al., HPDC 2020, Algorithm 2).

    A tier is drawn among those with credits, in proportion to its mean loss, and pays one. At the beginning each has
    twice its share of the steps.

    Departs from it: the paper draws tiers by their accuracy on test data of their own, every few rounds; this is the
    mean training loss that their clients reported last. If a tier has too few idle clients, neighbouring tiers fill up.

    Args:
        tiers: their number, of equally many clients.
    """

    def __init__(self, task: Task, tiers: int = 5) -> None:
        if not 1 <= tiers <= task.clients.count:
            raise ConfigError(f"clients.selection_args: tiers must be from 1 to the number of clients, got {tiers}")
        order = np.argsort(expected_s(task), kind="stable")
        self.tier = np.empty(len(order), np.int64)
        for number, members in enumerate(np.array_split(order, tiers)):
            self.tier[members] = number
        self.tiers, self.steps = tiers, task.config.rounds

    def init(self) -> Credits:
        return Credits((math.ceil(2 * self.steps / self.tiers),) * self.tiers, {})

    def choose(self, state: Credits, asking: Asking) -> Sequence[int]:
        there = np.unique(self.tier[asking.idle])
        rich = [tier for tier in there.tolist() if state.credits[tier] > 0] or there.tolist()
        weights = np.array([self._loss(state, tier) for tier in rich])
        tier = int(asking.rng.choice(rich, p=weights / weights.sum()))
        mixed = asking.rng.permutation(asking.idle)
        found: list[int] = mixed[np.argsort(abs(self.tier[mixed] - tier), kind="stable")][: asking.count].tolist()
        return found

    def _loss(self, state: Credits, tier: int) -> float:
        """A tier's mean loss; of one that is not known yet, the largest that is known."""
        known = [loss for client, loss in state.losses.items() if self.tier[client] == tier]
        return max(1e-9, float(np.mean(known)) if known else max(state.losses.values(), default=1.0))

    def learn(self, state: Credits, step: int, ended: Sequence[Ended]) -> Credits:
        losses = {**state.losses, **{e.flight.client: e.reply.train_loss for e in ended if e.reply}}
        if not ended:
            return state
        tiers = [int(self.tier[e.flight.client]) for e in ended]
        paid = max(set(tiers), key=lambda tier: (tiers.count(tier), -tier))
        credits = tuple(own - (tier == paid) for tier, own in enumerate(state.credits))
        return Credits(credits, losses)


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
    return found
