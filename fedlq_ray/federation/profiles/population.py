"""Profiles of clients: drawn from a shipped population of devices, or read from a user's CSV file.

Each device has a single compute value. Measured boards differ by a factor of 20 to 30 between network architectures at
the same FLOP count, so a value is the order of magnitude for common convolutional networks, not a benchmark.
"""

import csv
import difflib
import math
import os
from bisect import bisect_right
from dataclasses import dataclass, fields
from importlib import resources
from itertools import accumulate, islice

from fedlq_ray.errors import ConfigError
from fedlq_ray.federation import rows
from fedlq_ray.files import expand
from fedlq_ray.seeding import numpy_rng

_KEY = "clients.profiles"
_REQUIRED = ("uplink_mbps", "downlink_mbps", "latency_ms", "compute_gflops")
_MAX_VARIATION = 3.0  # a larger sigma is probably a percentage: at 3, half of the rounds are below 1/90 of the mean


@dataclass(frozen=True)
class Profile:
    """One client's means over rounds; Mb means 10^6 bits."""

    uplink_mbps: float
    downlink_mbps: float
    latency_ms: float  # added once to each transfer
    compute_gflops: float  # effective training throughput, 10^9 FLOP/s
    variation: float = 0.0  # sigma of the log-normal variation of bandwidth and compute from round to round
    device: str = ""


_OPTIONAL = tuple(field.name for field in fields(Profile) if field.name not in _REQUIRED)


@dataclass(frozen=True)
class DeviceClass:
    """One row of populations.csv: a share of a population's clients, and the ranges (low, high) of their values."""

    device: str
    share: float
    uplink_mbps: tuple[float, float]
    downlink_mbps: tuple[float, float] | None  # None: the uplink times downlink_per_uplink
    downlink_per_uplink: float
    latency_ms: float
    compute_gflops: tuple[float, float]
    source: str
    year: int
    licence: str


def load_profiles(spec: str, *, count: int, seed: int, variation: float) -> list[Profile]:
    """Returns the profiles of clients 0 to `count` - 1.

    Args:
        spec: the name of a population, which takes precedence, or the path of a CSV file with one row per client.
        count: number of clients.
        seed: the configuration's seed; with the client's number it determines the client's draw, whatever `count` is.
        variation: the variation of every client, unless a file has a column of that name.
    Raises:
        ConfigError: the population does not exist, or the file is not valid.
    """
    known = populations()
    if spec in known:
        return [_draw(known[spec], seed=seed, client=client, variation=variation) for client in range(count)]
    path = expand(spec, _KEY)
    if spec.endswith(".csv") or "/" in spec or os.path.isfile(path):
        return _read(path, count=count, variation=variation)
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{_KEY}: no population {spec!r}; known: {', '.join(known)}, or a path of your own .csv{hint}")


def populations() -> dict[str, tuple[DeviceClass, ...]]:
    """Returns the device classes of each shipped population, by name, in the file's order."""
    found: dict[str, tuple[DeviceClass, ...]] = {}
    text = (resources.files("fedlq_ray.federation.profiles") / "populations.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines(), strict=True):
        found[row["population"]] = (*found.get(row["population"], ()), _device_class(row))
    return found


def _device_class(row: dict[str, str]) -> DeviceClass:
    def span(name: str) -> tuple[float, float]:
        return float(row[f"{name}_low"]), float(row[f"{name}_high"])

    factor = float(row["downlink_per_uplink"] or 0)
    return DeviceClass(
        device=row["device"],
        share=float(row["share"]),
        uplink_mbps=span("uplink_mbps"),
        downlink_mbps=None if factor else span("downlink_mbps"),
        downlink_per_uplink=factor,
        latency_ms=float(row["latency_ms"]),
        compute_gflops=span("compute_gflops"),
        source=row["source"],
        year=int(row["year"]),
        licence=row["licence"],
    )


def _draw(classes: tuple[DeviceClass, ...], *, seed: int, client: int, variation: float) -> Profile:
    """Draws a class by its share, then each value log-uniformly in its range, independently."""
    # Always four draws, so that none of them shifts when a class's ranges change.
    pick, up, down, compute = numpy_rng(seed, "profile", client).random(4).tolist()
    shares = list(accumulate(c.share for c in classes))
    chosen = classes[bisect_right(shares, pick * shares[-1])]  # pick < 1
    uplink_mbps = _log_uniform(chosen.uplink_mbps, up)
    span = chosen.downlink_mbps
    return Profile(
        uplink_mbps=uplink_mbps,
        downlink_mbps=_log_uniform(span, down) if span else uplink_mbps * chosen.downlink_per_uplink,
        latency_ms=chosen.latency_ms,
        compute_gflops=_log_uniform(chosen.compute_gflops, compute),
        variation=variation,
        device=chosen.device,
    )


def _log_uniform(span: tuple[float, float], uniform: float) -> float:
    low, high = span
    return low * math.exp(uniform * math.log(high / low))


def _read(path: str, *, count: int, variation: float) -> list[Profile]:
    """Reads the first `count` rows of a user's file."""
    found = rows.read(path, _KEY, required=_REQUIRED, optional=_OPTIONAL, instead="a population or a CSV file")
    profiles = [_profile(where, row, variation) for where, row in islice(found, count)]
    if len(profiles) < count:
        raise ConfigError(f"{_KEY}: {path} has {len(profiles)} rows for {count} clients; it needs one row per client")
    return profiles


def _profile(where: str, row: dict[str, str], variation: float) -> Profile:
    def number(column: str) -> float:
        try:
            value = float(row[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            rule = "a finite number"
        elif column == "latency_ms":
            rule = "" if value >= 0 else "0 or more"
        elif column == "variation":
            in_bounds = 0 <= value <= _MAX_VARIATION
            rule = "" if in_bounds else f"0 to {_MAX_VARIATION:g} (a sigma, 0.3 for about 30 %)"
        else:
            rule = "" if value > 0 else "more than 0"
        if rule:
            raise ConfigError(f"{where}, column {column}: must be {rule}, got {row[column]!r}")
        return value

    return Profile(
        uplink_mbps=number("uplink_mbps"),
        downlink_mbps=number("downlink_mbps"),
        latency_ms=number("latency_ms"),
        compute_gflops=number("compute_gflops"),
        variation=number("variation") if "variation" in row else variation,
        device=row.get("device", "").strip(),
    )
