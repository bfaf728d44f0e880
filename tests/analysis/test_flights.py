"""Pictures of clients under way, and the metrics of waiting, staleness and waste."""

import csv
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlq_ray import simulate
from fedlq_ray.analysis import bound, compare, figures, flights, report, runs, tables
from fedlq_ray.analysis.flights import Flown, Pace
from fedlq_ray.config.load import load
from fedlq_ray.federation.metrics import lost_clients, of_rounds, staleness, waiting_s
from fedlq_ray.federation.record import Record

pytestmark = pytest.mark.usefixtures("own_folder")
QUICK = ["rounds=8", "clients.hosting=serial", "clients.count=12", "clients.cohort=6", "tracking.uri=null"]
MODES = {"sync": [], "buffer": ["server.buffer=3", "server.max_staleness=1"], "over": ["server.buffer=4"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("flights")
    for name, own in MODES.items():
        simulate(load(None, [*QUICK, *own, f"name={name}", f"out={made / name}"]))
    return made


def records(folder):
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [Record.from_json(json.loads(line)) for line in lines]


def summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_clients_wait_for_the_slowest_or_until_the_buffer_is_full(folder):
    for record in records(folder / "sync"):
        took = [sum(own) for own in zip(record.client_compute_s, record.client_upload_s, strict=True)]
        assert waiting_s([record]) == pytest.approx(max(took) - sum(took) / len(took))
        assert staleness([record]) is None and not {"wasted_mb", "lost_clients"} & of_rounds(record, {}).keys()
    for name in ("buffer", "over"):
        for record in records(folder / name):
            arrived = [one for one in flights.flown(record) if one.how == "arrived"]
            waited = [record.sim_time_s - one.end_s for one in arrived]
            assert waiting_s([record]) == pytest.approx(sum(waited) / len(waited)) and min(waited) >= -1e-12
            assert (
                lost_clients(record) == len(record.cohort) - len(record.answered) == len(record.cohort) - len(arrived)
            )
    assert staleness(records(folder / "buffer")) > 0 == staleness(records(folder / "over"))


def test_a_summary_has_what_was_wasted_and_who_was_still_under_way(folder):
    over, buffer = summary(folder / "over"), summary(folder / "buffer")
    assert over["wasted_bytes"] == sum(record.wasted_bytes for record in records(folder / "over")) > 0
    assert over["under_way"] == 0 < buffer["under_way"] <= 6
    assert not {"under_way", "wasted_bytes"} & summary(folder / "sync").keys()


def test_a_comparison_and_a_report_show_them(folder, tmp_path: Path):
    outcome = runs.find([str(folder)], None, tmp_path)
    table = compare.rows(outcome)
    found = {row["run"]: row for row in csv.DictReader(io.StringIO(tables.as_csv(table)))}
    assert float(found["sync"]["waiting_s"]) > 0 < float(found["over"]["wasted_mb"])
    columns = tables.columns(table, None)
    assert columns["waits, s"][columns["run"].index("sync")] == tables.figure(float(found["sync"]["waiting_s"]))
    assert columns["staleness"][columns["run"].index("sync")] == "–"
    alone = tables.columns([row for row in table if row.run == "sync"], None)
    assert "waits, s" in alone and not {"staleness", "wasted MB"} & alone.keys()
    assert found["sync"]["staleness"] == "" and float(found["buffer"]["staleness"]) > 0
    shown = flights.shown(outcome.runs)
    assert len(shown) == 5  # three pictures, and two where no update is stale
    ends = Counter(one.how for record in records(folder / "over") for one in flights.flown(record))
    over = shown[[one.title[:4] for one in shown].index("over")]
    assert over.title.startswith(f"over: {ends['arrived']} of {ends.total()} flights arrived, ")
    assert f"Over all steps: {ends['stopped']} stopped." in over.caption
    html = report.page(outcome, table, runs.unlike(outcome), "fedlq report")
    assert "<h2>Clients under way</h2>" in html and html.count("<h2>Clients that a round waited for") == 1
    assert "6 under way at a time, 8 steps of the server" in html and "time, traffic and steps" in html
    assert "#ffffff" not in html[html.index("<svg") : html.index("<h2>Settings")]  # it would be glaring on a dark page
    known = bound.shown(outcome.runs)
    assert known and "stale updates, clients that a step does not wait for" in known.caption


def test_a_client_is_as_slow_as_its_whole_flights():
    flights_of = [
        Flown(1, 0.0, 2.0, "arrived", 0),
        Flown(1, 2.0, 6.0, "arrived", 0),
        Flown(1, 6.0, 6.1, "stopped", 0),
        Flown(2, 0.0, 1.0, "dropped_out", 0),
        Flown(2, 0.0, 5.0, "stopped", 0),
        Flown(3, 0.0, 1.0, "arrived", 0),
    ]
    assert list(flights.paces(flights_of).items()) == [(3, Pace(1.0, 1)), (1, Pace(3.0, 2)), (2, Pace(5.0, 0))]


def test_what_stopped_clients_sent_is_no_payload(tmp_path):
    modes = {"sync": [], "over": ["server.buffer=4"]}
    for name, own in modes.items():
        simulate(load(None, [*QUICK, *own, "strategy.name=uniform", f"name={name}", f"out={tmp_path / name}"]))
    outcome = runs.find([str(tmp_path)], None, tmp_path)
    (over,) = outcome.runs["over"]
    ends = [how for record in over.records for how in record.client_end]
    sent = [up for record in over.records for up in record.client_uplink_bytes]
    assert any(up and how == "stopped" for up, how in zip(sent, ends, strict=True))
    bits = {row.run: row.bits_per_parameter for row in compare.rows(outcome)}
    assert bits["over"] == pytest.approx(bits["sync"])  # its payloads have one size
    shown, told = figures.bits(outcome.runs)
    assert not shown and len(told) == 2


def test_a_client_twice_in_a_step_has_the_mean_of_its_payloads(folder):
    run = runs.find([str(folder / "buffer")], None, folder).runs["buffer"][0]
    record = run.records[0]
    client, sent, how = [5, 5, 5, 7], [1000, 3000, 500, 900], ["arrived", "arrived", "stopped", "dropped_out"]
    twice = replace(record, cohort=client, client_uplink_bytes=sent, client_end=how)
    found = figures._client_bits(run._replace(records=[twice]))
    assert found[5, 0] == pytest.approx(8 * 2000 / runs.parameters([run])) and np.isnan(found[7, 0])
