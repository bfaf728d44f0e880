"""Client profiles: what a population draws, and each way in which a user's file can be wrong."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.profiles import Profile, load_profiles, populations

HEADER = "uplink_mbps,downlink_mbps,latency_ms,compute_gflops"


def draw(spec: str, count: int, seed: int = 0) -> list[Profile]:
    return load_profiles(spec, count=count, seed=seed, variation=0.0)


def read(folder: Path, text: str, count: int = 1) -> list[Profile]:
    file = folder / "clients.csv"
    file.write_bytes(text.encode())
    return load_profiles(str(file), count=count, seed=0, variation=0.25)


def test_populations_are_the_six_documented_ones() -> None:
    assert set(populations()) == {"mixed", "thin", "equal", "mobile", "broadband", "lpwan"}


@pytest.mark.parametrize("name", populations())
def test_every_population_draws_positive_figures_within_its_class(name: str) -> None:
    classes = {c.device: c for c in populations()[name]}
    for profile in draw(name, 100):
        chosen = classes[profile.device]
        low, high = chosen.downlink_mbps or [chosen.downlink_per_uplink * end for end in chosen.uplink_mbps]
        assert 0 < chosen.uplink_mbps[0] <= profile.uplink_mbps <= chosen.uplink_mbps[1]
        assert 0 < low <= profile.downlink_mbps <= high
        assert 0 < chosen.compute_gflops[0] <= profile.compute_gflops <= chosen.compute_gflops[1]
        assert profile.latency_ms == chosen.latency_ms > 0


@pytest.mark.parametrize("name", populations())
def test_every_class_has_a_source_and_shares_sum_to_one(name: str) -> None:
    classes = populations()[name]
    assert all(c.source and c.licence and 2010 < c.year < 2030 for c in classes)
    assert len({c.device for c in classes}) == len(classes)
    assert sum(c.share for c in classes) == pytest.approx(1)


def test_mixed_uplink_is_log_uniform_from_200_kbps_to_10_mbps() -> None:
    uplinks = np.array([p.uplink_mbps for p in draw("mixed", 2000)])
    # A quantile q of 2000 uniform draws has standard deviation sqrt(q (1 - q) / 2000) <= 0.0112; 0.045 is 4 sigma.
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        expected = 0.2 * 50**q  # the median is sqrt(0.2 x 10) = 1.41 Mb/s
        assert abs(np.mean(uplinks <= expected) - q) < 0.045


def test_mixed_draws_compute_apart_from_uplink_and_five_times_the_uplink_down() -> None:
    drawn = draw("mixed", 2000)
    logs = np.log([(p.uplink_mbps, p.compute_gflops) for p in drawn])
    assert abs(np.corrcoef(logs.T)[0, 1]) < 0.09  # independent: 4 sigma, with sigma = 1 / sqrt(2000) = 0.022
    assert abs(np.mean(logs[:, 1]) - np.log(40) / 2) < 0.06  # log-uniform on 2 to 20: 4 x ln 10 / sqrt(12 x 2000)
    assert all(p.downlink_mbps == 5 * p.uplink_mbps and p.latency_ms == 50 for p in drawn)


def test_classes_come_in_their_shares_and_each_fills_its_range() -> None:
    drawn = draw("mobile", 2000)
    shares = Counter(p.device for p in drawn)
    for device, share in {"phone on 5G": 0.3, "phone on LTE": 0.5, "phone on weak LTE": 0.2}.items():
        assert abs(shares[device] / 2000 - share) < 0.045  # 4 sigma: 4 x sqrt(0.25 / 2000)
    lte = [p.uplink_mbps for p in drawn if p.device == "phone on LTE"]
    assert min(lte) < 5.6 * 4**0.05  # of about 1000 draws 50 lie in each outer twentieth
    assert max(lte) > 5.6 * 4**0.95


def test_equal_clients_are_equal() -> None:
    assert set(draw("equal", 10)) == {Profile(1.0, 5.0, 50.0, 10.0, 0.0, "synthetic device")}


def test_a_client_keeps_its_profile_when_clients_are_added_and_changes_it_with_the_seed() -> None:
    assert draw("mobile", 50)[:20] == draw("mobile", 20)
    assert not set(draw("mobile", 20)) & set(draw("mobile", 20, seed=1))


def test_variation_is_given_to_every_client_of_a_population() -> None:
    assert {p.variation for p in load_profiles("thin", count=3, seed=0, variation=0.4)} == {0.4}


def test_file_gives_a_client_a_row_in_order_and_rows_too_many_are_left(tmp_path: Path) -> None:
    rows = f"{HEADER}\n1,2,0,4\n\n5,6,7,8\n9,9,9,9\n"  # an empty line is no row
    assert read(tmp_path, rows, count=2) == [Profile(1, 2, 0, 4, 0.25), Profile(5, 6, 7, 8, 0.25)]


def test_file_from_a_spreadsheet_with_all_columns_in_another_order(tmp_path: Path) -> None:
    text = '\ufeffdevice,variation,compute_gflops, latency_ms,downlink_mbps,uplink_mbps\r\n"Pi 4, old",0,4,3,2,1\r\n'
    assert read(tmp_path, text) == [Profile(1, 2, 3, 4, 0.0, "Pi 4, old")]


def test_file_is_found_without_the_ending_and_a_population_goes_before_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clients", "equal"):
        Path(name).write_text(f"{HEADER}\n7,7,7,7\n")
    assert draw("clients", 1)[0].uplink_mbps == 7
    assert draw("equal", 1)[0].uplink_mbps == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("fast,2,3,4", "line 3, column uplink_mbps: must be a finite number, got 'fast'"),
        ("1,,3,4", "line 3, column downlink_mbps: must be a finite number, got ''"),
        ("1,2,nan,4", "line 3, column latency_ms: must be a finite number, got 'nan'"),
        ("1,2,3,inf", "line 3, column compute_gflops: must be a finite number, got 'inf'"),
        ("0,2,3,4", "line 3, column uplink_mbps: must be more than 0, got '0'"),
        ("1,-2,3,4", "line 3, column downlink_mbps: must be more than 0, got '-2'"),
        ("1,2,3,0.0", "line 3, column compute_gflops: must be more than 0, got '0.0'"),
        ("1,2,-1,4", "line 3, column latency_ms: must be 0 or more, got '-1'"),
        ("1,2,3", "line 3: 3 values for 4 columns"),
        ("0,5,2,3,4", "line 3: 5 values for 4 columns"),  # a decimal comma
        ('"1,2,3,4', "line 3: not well-formed CSV"),
    ],
)
def test_wrong_row_is_named_with_its_line_and_column(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"{HEADER}\n1,2,3,4\n{row}", count=2)
    assert f"clients.profiles: {tmp_path}/clients.csv, {message}" in str(caught.value)


@pytest.mark.parametrize("sigma", ["-0.1", "30"])  # 30: per cent
def test_variation_out_of_bounds_is_refused(tmp_path: Path, sigma: str) -> None:
    with pytest.raises(ConfigError, match=rf"line 2, column variation: must be 0 to 3 .*, got '{sigma}'"):
        read(tmp_path, f"{HEADER},variation\n1,2,3,4,{sigma}\n")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "line 1: no header row; required: uplink_mbps, downlink_mbps, latency_ms, compute_gflops"),
        ("uplink_mbps,latency_ms", "line 1: no column downlink_mbps, compute_gflops; required: uplink_mbps, "),
        (HEADER.replace("latency_ms", "latency_s"), "no column latency_ms; required: .*; is 'latency_s' meant as"),
        (HEADER.replace(",", ";"), "line 1: separate the columns with commas, got 'uplink_mbps;"),
        (HEADER.replace(",", "\t"), "line 1: separate the columns with commas"),
        (f"{HEADER},region", "line 1: unknown column 'region'; known: .*, variation, device"),
        (f"{HEADER},latency_ms", "line 1: a column occurs twice"),
    ],
)
def test_wrong_header_is_refused(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, f"{header}\n1,2,3,4\n")


def test_too_few_rows_are_refused_with_both_counts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clients\.csv has 1 rows for 3 clients"):
        read(tmp_path, f"{HEADER}\n1,2,3,4\n", count=3)


@pytest.mark.parametrize("spec", ["nowhere.csv", "no/where", "/"])
def test_unreadable_file_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=f"clients.profiles: cannot read {spec}: "):
        draw(spec, 1)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clients.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        draw(f"{tmp_path}/clients.csv", 1)


def test_unknown_population_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no population 'mobil'; known: mixed, .*did you mean 'mobile'\?"):
        draw("mobil", 1)
