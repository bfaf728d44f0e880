"""The table of metrics: sums, units, names by layer, and what a round or a run does not have."""

from dataclasses import replace

import pytest

from fedlq_ray.federation.metrics import METRICS, lost_clients, of_rounds, of_run, staleness, table, waiting_s
from fedlq_ray.federation.record import Record

BARE = Record.from_json({"round": 0, "uplink_bytes": 3_000_000, "downlink_bytes": 500_000, "sim_time_s": 2.5})


def test_a_round_has_its_sums_its_layers_and_nothing_that_it_lacks():
    totals: dict[str, float] = {}
    first = of_rounds(BARE, totals)
    assert first == {"sim_time_s": 2.5, "uplink_mb": 3, "downlink_mb": 0.5, "round_uplink_mb": 3}
    record = replace(
        BARE, accuracy=0.5, bits_per_parameter={"fc1": 4.0, "fc 2": 2.0}, report={"significance": {"fc1": 0.1}}
    )
    second = of_rounds(record, totals)
    assert second["uplink_mb"] == 6 and second["downlink_mb"] == 1 and second["round_uplink_mb"] == 3
    assert second["accuracy"] == 0.5 and "test_loss" not in second
    assert second["bits_per_parameter/fc 2"] == 2 and second["significance/fc1"] == 0.1


def test_waiting_and_staleness_are_means_over_updates():
    """Waiting: a synchronous round lasts as long as its slowest client; another step comes when it comes."""
    times = {"client_download_s": [1, 0], "client_compute_s": [2, 1], "client_upload_s": [1, 1]}
    sync = replace(BARE, cohort=[3, 4], answered=[3, 4], **times)
    assert waiting_s([sync]) == 1 and staleness([sync]) is None  # 0 s and 2 s
    assert waiting_s([replace(sync, answered=[4])]) == 2 and waiting_s([replace(sync, answered=[])]) is None
    flown = replace(
        sync, sim_time_s=10, client_start_s=[5, 6], client_staleness=[3, 1], client_end=["arrived"] * 2, wasted_bytes=0
    )
    assert waiting_s([flown]) == 1.5 and staleness([flown]) == 2 and lost_clients(flown) == 0  # 1 s and 2 s
    cut = replace(flown, client_end=["stopped", "arrived"], answered=[4], wasted_bytes=3_000_000)
    assert waiting_s([cut]) == 2 and staleness([cut]) == 1 and lost_clients(cut) == 1
    assert waiting_s([flown, cut]) == pytest.approx(5 / 3) and staleness([flown, cut]) == pytest.approx(5 / 3)
    none = replace(flown, client_end=["idle", "dropped_out"], answered=[])
    assert waiting_s([none]) is None and staleness([none]) is None and lost_clients(none) == 1
    totals: dict[str, float] = {}
    assert [of_rounds(r, totals)["wasted_mb"] for r in (cut, flown, cut)] == [3, 3, 6]


def test_a_run_has_what_a_list_of_runs_is_sorted_by():
    summary = {"final_accuracy": 0.9, "best_accuracy": 0.95, "time_to_target_s": None, "uplink_bytes_to_target": 2e6}
    summary |= {"uplink_bytes": 5_000_000}
    found = of_run(summary)
    assert found == {"final_accuracy": 0.9, "best_accuracy": 0.95, "uplink_mb_to_target": pytest.approx(2)}


def test_names_are_distinct_and_each_row_is_documented():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.unit and metric.meaning and f"| `{metric.shown}` | {metric.unit} |" in table()
        assert metric.of_round or metric.of_layers or metric.of_names or metric.of_run
