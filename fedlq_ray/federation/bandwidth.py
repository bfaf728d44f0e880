"""Bandwidth over time: each client's rates, constant between the times of a user's file."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedlq_ray.errors import ConfigError
from fedlq_ray.federation import rows
from fedlq_ray.federation.profiles import Profile
from fedlq_ray.files import expand

_KEY = "network.bandwidth"


class Course(NamedTuple):
    """A rate that is constant from each time until the next.

    Attributes:
        from_s: ascending, the first is 0.
        mbps: Mb/s, above 0.
    """

    from_s: tuple[float, ...]
    mbps: tuple[float, ...]

    def seconds(self, megabits: float, at_s: float) -> float:
        """How long a transfer takes that begins at a time."""
        piece, now_s = bisect_right(self.from_s, at_s) - 1, at_s
        while piece + 1 < len(self.from_s) and (room := (self.from_s[piece + 1] - now_s) * self.mbps[piece]) < megabits:
            piece, megabits = piece + 1, megabits - room
            now_s = self.from_s[piece]
        return (now_s - at_s) + megabits / self.mbps[piece]

    def megabits(self, at_s: float, until_s: float) -> float:
        """What is transferred between two times; 0.0 if the second is before the first."""
        piece, now_s, total = bisect_right(self.from_s, at_s) - 1, at_s, 0.0
        while piece + 1 < len(self.from_s) and self.from_s[piece + 1] < until_s:
            total += (self.from_s[piece + 1] - now_s) * self.mbps[piece]
            piece += 1
            now_s = self.from_s[piece]
        return total + max(0.0, until_s - now_s) * self.mbps[piece]


class Rates(NamedTuple):
    """A client's rates over time."""

    uplink: Course
    downlink: Course


@dataclass(frozen=True)
class Bandwidth:
    """The rates of the clients that a file names, by client. The others keep those of their profiles."""

    of_clients: Mapping[int, Rates] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """8 hex digits that change with any rate."""
        return hashlib.sha256(repr(sorted(self.of_clients.items())).encode()).hexdigest()[:8]


def bandwidth(spec: str | None, profiles: Sequence[Profile], names: Sequence[str] | None) -> Bandwidth:
    """Reads `network.bandwidth`: rates from `t_s` on, rows in any order. Before its first row, a client has the
    rates of its profile.

    Args:
        names: the clients' ids, if the data has them.
    Raises:
        ConfigError: the file is not valid.
    """
    if spec is None:
        return Bandwidth()
    known = rows.Clients(len(profiles), names)
    found: dict[int, dict[float, tuple[float, float]]] = {}
    required = ("client", "t_s", "uplink_mbps", "downlink_mbps")
    for where, row in rows.read(expand(spec, _KEY), _KEY, required=required, instead="null or a CSV file"):
        client, t_s = known.number(where, row), rows.amount(where, row, "t_s", "seconds, 0 or more")
        up, down = (rows.amount(where, row, column, "more than 0", above=True) for column in required[2:])
        if t_s in (own := found.setdefault(client, {})):
            raise ConfigError(f"{where}: the client's rates at {t_s:g} s are given twice")
        own[t_s] = up, down
    made = {}
    for client, own in sorted(found.items()):
        profile = profiles[client]
        times = {0.0: (profile.uplink_mbps, profile.downlink_mbps)} | own
        from_s = tuple(sorted(times))
        made[client] = Rates(*(Course(from_s, tuple(times[t][way] for t in from_s)) for way in (0, 1)))
    return Bandwidth(made)
