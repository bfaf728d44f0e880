"""TiFL's selection of clients, by tiers of similar speed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.durations import Durations, Sizes, sizes_of
from fedlq_ray.federation.flight import FlightEnd
from fedlq_ray.federation.selection import Asking, Selection
from fedlq_ray.federation.task import Task


@dataclass(frozen=True)
class Tiers:
    """What TiFL knows.

    Attributes:
        losses: by client, the mean training loss that it reported last.
        weights: of each tier in the draw, in proportion to its probability.
        before: each tier's mean loss at the last look, infinite where it was not known.
        spent: how often each tier was asked.
        sizes: of the first flights that arrived, by which the tiers are made; None before.
    """

    losses: Mapping[int, float]
    weights: tuple[float, ...]
    before: tuple[float, ...]
    spent: tuple[int, ...]
    sizes: Sizes | None


class TiFL(Selection[Tiers]):
    """TiFL: the clients of a step come from one tier of similar speed (Chai et al., HPDC 2020, Algorithm 2).

    All tiers are drawn alike at first. Every `interval` steps, if the last tier became no better since the last look,
    the tiers that have credits are ranked: the i-th worst of n is drawn with probability (n - i) / (n (n - 1) / 2). A
    tier that was asked `credits` times is not drawn again while another has some left.

    Departs from it: a tier is as good as the mean training loss that its clients reported last, in place of its
    accuracy on test data of its own; one that is not known yet ranks as the worst. Tiers are made from profiles and the
    bytes of the first payloads, without a phase of measuring, and have equally many clients. If a tier has too few idle
    clients, the nearest tiers fill up; if none that may be drawn has any, all that have are drawn alike. Credits are
    not derived from `rounds`, so that a run may be resumed with more. Not checked: the paper was not at hand, and
    public implementations differ in the ranks (FLGo draws the best tier too, with n (n + 1) / 2).

    Args:
        tiers: their number.
        interval: steps between looks.
        credits: how often a tier may be asked; null: without limit.
    """

    def __init__(self, task: Task, tiers: int = 5, interval: int = 10, credits: int | None = None) -> None:
        if not 1 <= tiers <= task.clients.count:
            raise ConfigError(f"clients.selection_args: tiers must be from 1 to the number of clients, got {tiers}")
        if interval < 1:
            raise ConfigError(f"clients.selection_args: interval must be at least 1, got {interval}")
        if credits is not None and (type(credits) is not int or credits < 1):
            raise ConfigError(
                f"clients.selection_args: credits must be a whole number of at least 1, or null, got {credits!r}"
            )
        self.durations, self.tiers, self.interval, self.credits = Durations(task), tiers, interval, credits

    def init(self) -> Tiers:
        return Tiers({}, (1.0,) * self.tiers, (math.inf,) * self.tiers, (0,) * self.tiers, None)

    def choose(self, state: Tiers, asking: Asking) -> Sequence[int]:
        tier = self.tier_of(state)
        there = np.unique(tier[asking.idle])
        rich = np.array([n for n in there if self._rich(state.spent[n])], np.int64)
        rich = rich if len(rich) else there
        weights = np.array(state.weights)[rich]
        weights = weights if weights.any() else np.ones(len(rich))
        drawn = int(asking.rng.choice(rich, p=weights / weights.sum()))
        mixed = asking.rng.permutation(asking.idle)
        found: list[int] = mixed[np.argsort(abs(tier[mixed] - drawn), kind="stable")][: asking.count].tolist()
        return found

    def tier_of(self, state: Tiers) -> NDArray[np.int64]:
        """Each client's tier, (clients,); 0 is the fastest."""
        order = np.argsort(self.durations(state.sizes or self.durations.initial), kind="stable")
        found = np.empty(len(order), np.int64)
        for number, members in enumerate(np.array_split(order, self.tiers)):
            found[members] = number
        return found

    def _rich(self, spent: int) -> bool:
        return self.credits is None or spent < self.credits

    def learn(self, state: Tiers, step: int, ended: Sequence[FlightEnd]) -> Tiers:
        if not ended:
            return state
        asked = [int(self.tier_of(state)[e.flight.client]) for e in ended]
        last = max(set(asked), key=lambda n: (asked.count(n), -n))
        spent = tuple(times + (n == last) for n, times in enumerate(state.spent))
        losses = {**state.losses, **{e.flight.client: e.reply.train_loss for e in ended if e.reply}}
        known = state.sizes is not None or any(e.how == "arrived" for e in ended)
        sizes = (state.sizes or sizes_of(ended, self.durations.initial)) if known else None
        state = replace(state, losses=losses, spent=spent, sizes=sizes)
        if (step + 1) % self.interval:
            return state
        now = self.losses_of(state)
        weights = self.ranked(now, spent) if now[last] >= state.before[last] else state.weights
        return replace(state, weights=weights, before=now)

    def losses_of(self, state: Tiers) -> tuple[float, ...]:
        """Each tier's mean loss; infinite if no client of it has reported one."""
        tier = self.tier_of(state)
        known: list[list[float]] = [[] for _ in range(self.tiers)]
        for client, loss in sorted(state.losses.items()):
            known[tier[client]].append(loss)
        return tuple(float(np.mean(losses)) if losses else math.inf for losses in known)

    def ranked(self, losses: Sequence[float], spent: Sequence[int]) -> tuple[float, ...]:
        """The tiers' weights: of n that have credits, n - 1 for the largest loss to 0 for the least."""
        rich = [n for n in range(self.tiers) if self._rich(spent[n])]
        order = sorted(rich, key=lambda n: (-losses[n], n))
        place = {n: float(len(rich) - 1 - i) for i, n in enumerate(order)}
        return tuple(place.get(n, 0.0) for n in range(self.tiers))
