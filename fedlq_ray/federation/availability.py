"""When clients are available: always, in a daily pattern, or as a user's file says.

Each answer is a function of client and time alone, however often it is asked.
"""

import difflib
import functools
import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fedlq_ray.config.settings import Config, DailyConfig
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation import rows
from fedlq_ray.files import expand
from fedlq_ray.seeding import numpy_rng

_KEY = "clients.availability"


class Availability(Protocol):
    """Each client's times, in simulated seconds."""

    def leaves_s(self, client: int, at_s: float) -> float:
        """When a client that is available at `at_s` stops being so; `at_s` or less if it is not available."""
        ...

    def returns_s(self, client: int, at_s: float) -> float:
        """The first time from `at_s` on at which a client is available; inf if there is none."""
        ...


class Always:
    """All clients are available at any time."""

    def leaves_s(self, client: int, at_s: float) -> float:
        return math.inf

    def returns_s(self, client: int, at_s: float) -> float:
        return at_s


class Spans(NamedTuple):
    """Intervals in seconds, ascending, that neither overlap nor touch. Each has its start, and not its stop."""

    starts: tuple[float, ...]
    stops: tuple[float, ...]

    def leaves_s(self, at_s: float) -> float:
        before = bisect_right(self.starts, at_s)
        return max(at_s, self.stops[before - 1]) if before else at_s

    def next_s(self, at_s: float) -> float:
        """The first start after `at_s`; inf if there is none."""
        after = bisect_right(self.starts, at_s)
        return self.starts[after] if after < len(self.starts) else math.inf


def merged(intervals: Sequence[tuple[float, float]]) -> Spans:
    """The union of intervals (start, stop)."""
    union: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(stop, union[-1][1])
        elif stop > start:
            union.append((start, stop))
    return Spans(tuple(start for start, _ in union), tuple(stop for _, stop in union))


@dataclass(frozen=True)
class Intervals:
    """Each client is available in its own intervals."""

    of_clients: tuple[Spans, ...]

    def leaves_s(self, client: int, at_s: float) -> float:
        return self.of_clients[client].leaves_s(at_s)

    def returns_s(self, client: int, at_s: float) -> float:
        spans = self.of_clients[client]
        return at_s if spans.leaves_s(at_s) > at_s else spans.next_s(at_s)

    @property
    def digest(self) -> str:
        """8 hex digits that change with any interval."""
        return hashlib.sha256(repr(self.of_clients).encode()).hexdigest()[:8]


@dataclass(frozen=True, eq=False)
class Daily:
    """Sessions that begin at random, more often at some hours than at others.

    They begin at the rate sessions per day times 1 + a cos(2 pi (hour - peak_hour) / 24), a = (swing - 1) /
    (swing + 1), and last log-normally long, at most a day. A client is available while any of its sessions lasts, so
    that without a swing its share of the time is 1 - exp(-sessions x mean length / day): an M/G/inf queue. All clients
    have the same pattern and time zone.

    Sources: Bonawitz et al. (MLSys 2019) report four times as many devices by night as by day, which is the default
    swing. Of the slots in the trace of 136 thousand phones by Yang et al. (WWW 2021), half last at most 5 minutes and
    70 % at most 10, as Abdelmoniem et al. (EuroSys 2023) describe it; a log-normal length with these quantiles has
    sigma = ln(2) / 0.524. We could not check these figures against the papers' texts or the trace. How many sessions a
    day has, and which hour is the busiest, are assumptions.
    """

    pattern: DailyConfig
    seed: int

    def leaves_s(self, client: int, at_s: float) -> float:
        while (until := _around(self, client, self._day(at_s)).leaves_s(at_s)) > at_s:
            at_s = until  # sessions that begin later may last longer
        return at_s

    def returns_s(self, client: int, at_s: float) -> float:
        day = self._day(at_s)
        if _around(self, client, day).leaves_s(at_s) > at_s:
            return at_s
        while math.isinf(found := _around(self, client, day).next_s(at_s)):
            day += 1
        return found

    @property
    def share(self) -> float:
        """The share of the time for which a client is available, without a swing."""
        how, day = self.pattern, 1440.0
        if how.sigma == 0:
            mean = min(how.minutes, day)
        else:  # of min(length, day)
            z = math.log(day / how.minutes) / how.sigma
            mean = how.minutes * math.exp(how.sigma**2 / 2) * _normal(z - how.sigma) + day * _normal(-z)
        return 1 - math.exp(-how.sessions * mean / day)

    def _day(self, at_s: float) -> int:
        return math.floor(at_s / self.pattern.day_s + self.pattern.start_hour / 24)

    def _sessions(self, client: int, day: int) -> list[tuple[float, float]]:
        """The sessions that begin on a day, in simulated seconds."""
        how = self.pattern
        rng = numpy_rng(self.seed, "availability", client, day + 2)
        swing = (how.swing - 1) / (how.swing + 1)
        drawn = int(rng.poisson(how.sessions * (1 + swing)))
        begins, kept, lengths = rng.random(drawn), rng.random(drawn), rng.standard_normal(drawn)
        found = []
        for begin, keep, z in zip(begins.tolist(), kept.tolist(), lengths.tolist(), strict=True):
            height = 1 + swing * math.cos(2 * math.pi * (begin - how.peak_hour / 24))
            if keep * (1 + swing) < height:  # thinning
                start_s = (day + begin - how.start_hour / 24) * how.day_s
                length = min(1.0, math.exp(math.log(how.minutes / 1440) + how.sigma * z))  # in days
                found.append((start_s, start_s + length * how.day_s))
        return found


@functools.lru_cache(maxsize=100_000)
def _around(daily: Daily, client: int, day: int) -> Spans:
    """The sessions that may last at some time of a day, and those that begin by the end of the next.

    A session that lasts began at most a day ago. One more day on both sides makes up for rounding at midnight.
    """
    return merged([session for near in range(day - 2, day + 2) for session in daily._sessions(client, near)])


def _normal(z: float) -> float:
    """The standard normal distribution function."""
    return (1 + math.erf(z / math.sqrt(2))) / 2


def availability(config: Config, count: int, names: Sequence[str] | None) -> tuple[Availability, list[str]]:
    """When clients 0 to `count` - 1 are available, and sentences about it.

    Args:
        names: the clients' ids, if the data has them.
    Raises:
        ConfigError: the pattern does not exist, the file is not valid, or nobody is ever available.
    """
    spec = config.clients.availability
    if spec == "always":
        return Always(), []
    if spec == "daily":
        daily = Daily(config.daily, config.seed)
        if daily.share > 0.99:
            raise ConfigError(
                f"daily: with daily.sessions={config.daily.sessions:g} and daily.minutes={config.daily.minutes:g}, "
                f"clients are available {daily.share:.2%} of the time; more than 99 % is clients.availability=always"
            )
        return daily, [f"clients.availability=daily: each client is available about {daily.share:.1%} of the time"]
    path = expand(spec, _KEY)
    if not (spec.endswith(".csv") or "/" in spec or os.path.isfile(path)):
        near = difflib.get_close_matches(spec, ["always", "daily"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{_KEY}: no pattern {spec!r}; known: always, daily, or a path of your own .csv{hint}")
    found = _read(path, count, names)
    absent = sum(not spans.starts for spans in found.of_clients)
    if absent == count:
        raise ConfigError(f"{_KEY}: {path} has no interval of any client, so nobody would ever be available")
    return found, [f"{_KEY}: {absent} of {count} clients have no interval in {path}, and are never available"] * (
        absent > 0
    )


def _read(path: str, count: int, names: Sequence[str] | None) -> Intervals:
    """Reads a user's file: `client` (number, or id if the data has ids), `from_s` and `to_s`, rows in any order."""
    known = rows.Clients(count, names)
    of_clients: list[list[tuple[float, float, str]]] = [[] for _ in range(count)]
    columns = ("client", "from_s", "to_s")
    for where, row in rows.read(path, _KEY, required=columns, instead="always, daily or a CSV file"):
        client, start = known.number(where, row), rows.amount(where, row, "from_s", "seconds, 0 or more")
        stop = rows.amount(where, row, "to_s", "seconds, 0 or more, or inf", endless=True)
        if stop <= start:
            raise ConfigError(f"{where}: to_s must be after from_s, got from_s={start:g}, to_s={stop:g}")
        of_clients[client].append((start, stop, where))
    for intervals in of_clients:
        intervals.sort()
        for (start, stop, _), (other, _, where) in zip(intervals, intervals[1:], strict=False):
            if other < stop:
                raise ConfigError(f"{where}: overlaps the client's interval from {start:g} to {stop:g} s")
    return Intervals(tuple(merged([(start, stop) for start, stop, _ in intervals]) for intervals in of_clients))
