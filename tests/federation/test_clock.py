"""Simulated time: sums that a reader can redo, and variation that keeps the mean."""

from dataclasses import replace

import numpy as np
import pytest

from fedlq_ray.federation.clock import ClientTime, client_time, conditions, round_time
from fedlq_ray.federation.profiles import Profile

PROFILE = Profile(uplink_mbps=2.0, downlink_mbps=10.0, latency_ms=50.0, compute_gflops=4.0, variation=0.5, device="x")


def timed(
    flops: float = 8e9,
    uplink_bytes: int = 1_000_000,
    downlink_bytes: int = 5_000_000,
    bill: str = "both",
    uplink_free: bool = False,
) -> ClientTime:
    return client_time(
        PROFILE,
        flops=flops,
        uplink_bytes=uplink_bytes,
        downlink_bytes=downlink_bytes,
        bill=bill,
        uplink_free=uplink_free,
    )


def test_a_round_is_download_compute_and_upload() -> None:
    # 40 Mb at 10 Mb/s; 8 GFLOP at 4 GFLOP/s; 8 Mb at 2 Mb/s; 0.05 s of latency each way.
    assert timed() == ClientTime(download_s=4.05, compute_s=2.0, upload_s=4.05)
    assert timed().total_s == pytest.approx(10.1)


def test_upload_billing_leaves_the_download_out() -> None:
    assert timed(bill="upload") == ClientTime(0.0, 2.0, 4.05)


def test_a_free_uplink_and_an_empty_transfer_take_no_time() -> None:
    assert timed(uplink_free=True) == ClientTime(4.05, 2.0, 0.0)
    assert timed(uplink_bytes=0) == ClientTime(4.05, 2.0, 0.0)
    assert timed(downlink_bytes=0) == ClientTime(0.0, 2.0, 4.05)


def test_unknown_bill_is_refused() -> None:
    with pytest.raises(ValueError, match="bill must be 'both' or 'upload', got 'download'"):
        timed(bill="download")


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    assert round_time(iter([ClientTime(1, 1, 1), ClientTime(0, 4, 0), ClientTime(0, 0, 2)])) == 4
    assert round_time([]) == 0.0


def test_without_variation_a_round_has_exactly_the_means() -> None:
    steady = replace(PROFILE, variation=0.0)
    assert conditions(steady, seed=1, round=2, client=3) == steady


def test_variation_has_mean_one_and_the_asked_sigma() -> None:
    rounds = [conditions(PROFILE, seed=0, round=r, client=0) for r in range(4000)]
    link = np.array([c.uplink_mbps for c in rounds]) / 2
    compute = np.array([c.compute_gflops for c in rounds]) / 4
    # A log-normal of sigma 0.5 and mean 1 has deviation sqrt(e^0.25 - 1) = 0.533; 4 x 0.533 / sqrt(4000) = 0.034.
    # Without the correction the mean would be e^0.125 = 1.133.
    assert abs(link.mean() - 1) < 0.034
    assert abs(compute.mean() - 1) < 0.034
    assert abs(np.log(link).std() - 0.5) < 0.0224  # 4 x 0.5 / sqrt(2 x 4000)
    assert abs(np.corrcoef(np.log(link), np.log(compute))[0, 1]) < 0.064  # apart: 4 / sqrt(4000)


def test_up_and_down_vary_together_and_latency_stays() -> None:
    now = conditions(PROFILE, seed=0, round=0, client=0)
    assert now.uplink_mbps != 2.0
    assert now.downlink_mbps / now.uplink_mbps == pytest.approx(5)
    assert (now.latency_ms, now.device, now.variation) == (50.0, "x", 0.0)


def test_conditions_depend_on_seed_round_and_client_alone() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    drawn = [conditions(PROFILE, seed=s, round=r, client=c) for s, r, c in keys]
    assert drawn == [conditions(PROFILE, seed=s, round=r, client=c) for s, r, c in keys]
    assert len(set(drawn)) == len(keys)
