"""Pictures of clients under way, and the metrics of waiting, staleness and waste."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from fedlq_ray import simulate
from fedlq_ray.analysis import compare, flights, report, runs, tables
from fedlq_ray.config.load import load
from fedlq_ray.federation.metrics import of_rounds, staleness, waiting_s
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
        assert waiting_s(record) == pytest.approx(max(took) - sum(took) / len(took))
        assert staleness(record) is None and "wasted_mb" not in of_rounds(record, {})
    for name in ("buffer", "over"):
        for record in records(folder / name):
            arrived = [one for one in flights.flown(record) if one.how == "arrived"]
            waited = [record.sim_time_s - one.end_s for one in arrived]
            assert waiting_s(record) == pytest.approx(sum(waited) / len(waited)) and min(waited) >= -1e-12
    assert max(map(staleness, records(folder / "buffer"))) > 0 == max(map(staleness, records(folder / "over")))


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
    assert found["sync"]["staleness"] == "" and float(found["buffer"]["staleness"]) > 0
    shown = flights.shown(outcome.runs)
    assert len(shown) == 5  # three pictures, and two where no update is stale
    ends = Counter(one.how for record in records(folder / "over") for one in flights.flown(record))
    assert shown[[one.title[:4] for one in shown].index("over")].title == (
        f"over: {ends['arrived']} arrived, {ends['stopped']} stopped"
    )
    html = report.page(outcome, table, runs.unlike(outcome), "fedlq report")
    assert "<h2>Clients under way</h2>" in html and html.count("<h2>Clients that a round waited for") == 1
