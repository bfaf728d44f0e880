"""Simulated time: computed from counted FLOPs, measured bytes and a client's profile, never from a real clock."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedlq_ray.federation.profiles import Profile
from fedlq_ray.seeding import numpy_rng

__all__ = ["ClientTime", "client_time", "conditions", "round_time"]


@dataclass(frozen=True)
class ClientTime:
    """The duration of one client's round; its three steps run one after another."""

    download_s: float
    compute_s: float
    upload_s: float

    @property
    def total_s(self) -> float:
        return self.download_s + self.compute_s + self.upload_s


def conditions(profile: Profile, *, seed: int, round: int, client: int) -> Profile:
    """Returns a client's profile in one round: its means times log-normal factors of mean one.

    One factor scales both directions of the link, because a crowded cell slows both; another scales compute. Latency is
    constant.
    """
    sigma = profile.variation
    z_link, z_compute = numpy_rng(seed, "conditions", round, client).standard_normal(2).tolist()
    # Divide by E[exp(sigma z)] = exp(sigma^2 / 2), so that the profile is the mean over rounds.
    link, compute = math.exp(sigma * z_link - sigma**2 / 2), math.exp(sigma * z_compute - sigma**2 / 2)
    return replace(
        profile,
        uplink_mbps=profile.uplink_mbps * link,
        downlink_mbps=profile.downlink_mbps * link,
        compute_gflops=profile.compute_gflops * compute,
        variation=0.0,  # values within a round are constant
    )


def client_time(
    profile: Profile, *, flops: float, uplink_bytes: int, downlink_bytes: int, bill: str, uplink_free: bool
) -> ClientTime:
    """Returns the time of one client's round.

    Args:
        profile: a round's `conditions`, or the means for planning.
        flops: FLOPs of local training, forward and backward.
        bill: "both", or "upload" to exclude downloads from the clock.
        uplink_free: whether uploads take no time.
    Raises:
        ValueError: `bill` is neither.
    """
    if bill not in ("both", "upload"):
        raise ValueError(f"bill must be 'both' or 'upload', got {bill!r}")
    return ClientTime(
        download_s=_transfer_s(downlink_bytes, profile.downlink_mbps, profile.latency_ms) if bill == "both" else 0.0,
        compute_s=flops / (profile.compute_gflops * 1e9),
        upload_s=0.0 if uplink_free else _transfer_s(uplink_bytes, profile.uplink_mbps, profile.latency_ms),
    )


def _transfer_s(num_bytes: int, mbps: float, latency_ms: float) -> float:
    """Returns the seconds of a transfer; zero bytes take no time."""
    return latency_ms / 1e3 + 8 * num_bytes / (mbps * 1e6) if num_bytes else 0.0


def round_time(times: Iterable[ClientTime]) -> float:
    """Returns the seconds of a synchronous round, those of its slowest client; 0.0 without clients."""
    return max((time.total_s for time in times), default=0.0)
