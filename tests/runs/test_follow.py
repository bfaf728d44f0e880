"""Watching a run that goes on elsewhere: every record once, and how it ended."""

import io
import subprocess
import sys
import threading
import time

import pytest
from faults import round_of
from rich.console import Console

from fedlq_ray import ClientError, ConfigError, simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation.events import Closed, Restarted, RoundDone
from fedlq_ray.federation.record import Record
from fedlq_ray.runs import follow, progress, rundir

pytestmark = pytest.mark.usefixtures("own_folder")

QUICK = ["rounds=4", "clients.hosting=serial", "clients.count=8", "clients.cohort=4"]


def test_a_run_is_followed_from_its_folder_while_it_goes_on(tmp_path):
    started, go_on, seen = threading.Event(), threading.Event(), []

    def wait(event):
        if round_of(event) == 1:
            started.set()
            go_on.wait(60)

    run = threading.Thread(
        target=simulate, args=(load(None, [*QUICK, "out=here", "tracking.uri=null"]),), kwargs={"watch": wait}
    )
    run.start()
    assert started.wait(120)
    config, events = follow.folder(tmp_path / "here", every_s=0.02)
    for event in events:
        seen.append(event)
        if round_of(event) == 1:  # not the last, and it waits
            assert not (tmp_path / "here/summary.json").exists()
            go_on.set()
    run.join()
    assert config.rounds == 4 and seen[-1] == Closed("FINISHED")
    assert [event.record for event in seen[:-1]] == rundir.journal(tmp_path / "here")


def test_a_run_that_goes_back_is_told_and_followed_anew(tmp_path):
    result = simulate(load(None, [*QUICK, "tracking.uri=null"]))
    lines = (result.path / "rounds.jsonl").read_text().splitlines(keepends=True)
    _, events = follow.folder(result.path, every_s=0.01)
    (result.path / "summary.json").unlink()
    held = threading.Event()

    def hold():
        from fedlq_ray.files import locked

        with locked(result.path):
            held.set()
            time.sleep(0.5)
            (result.path / "rounds.jsonl").write_text(lines[0])
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    told = [type(event) for event in events]
    other.join()
    assert told == [RoundDone] * 4 + [Restarted, RoundDone, Closed]


def test_a_failed_run_is_told_as_such(tmp_path):
    with pytest.raises(ClientError):
        simulate(load(None, [*QUICK, "train.lr=1000", "rounds=20", "out=bad", "tracking.uri=null"]))
    assert list(follow.folder(tmp_path / "bad")[1])[-1] == Closed("FAILED")
    with pytest.raises(ConfigError, match="holds no run"):
        follow.folder(tmp_path)


def test_mlflow_tells_the_same_as_the_folder(tmp_path):
    from fedlq_ray.tracking import stores

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    result = simulate(load(None, [*QUICK, "evaluate_every=2", "server.buffer=3"]))
    client = stores.connect(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fedlq").experiment_id])
    config, events = follow.mlflow(uri, run.info.run_id)
    *records, last = list(events)
    assert last == Closed("FINISHED") and config.evaluate_every == 2
    for event, record in zip(records, rundir.journal(result.path), strict=True):
        for name in ("round", "sim_time_s", "uplink_bytes", "wasted_bytes", "accuracy"):
            assert getattr(event.record, name) == getattr(record, name)
    with pytest.raises(ConfigError, match="no run of fedlq"):
        follow.mlflow(uri, "0" * 32)


def test_the_progress_fits_in_80_columns(tmp_path):
    console = Console(width=80, force_terminal=True, record=True, file=io.StringIO())
    config = load(None, ["name=a-name-that-is-longer-than-any-terminal", "rounds=1000"])
    with progress.watch(config, console) as show:
        for round in range(999):
            record = {"round": round, "accuracy": 0.98765, "sim_time_s": 54321.5, "uplink_bytes": 9_876_543_210}
            show(RoundDone(Record.from_json(record)))
    last = console.export_text().strip().splitlines()
    assert (
        len(last) == 1
        and "999/1000" in last[0]
        and "acc. 0.9877" in last[0]
        and "MB" in last[0]
        and "a-name-that" in last[0]
    )


@pytest.mark.parametrize("columns", [80, 112])
def test_a_wide_terminal_also_shows_staleness_and_waste(columns):
    console = Console(width=columns, force_terminal=True, record=True, file=io.StringIO())
    settings = ["rounds=1000", "name=a-name-that-is-long", "server.buffer=3", "server.max_staleness=null"]
    flights = {"client_staleness": [1, 2], "client_end": ["arrived", "arrived"], "client_start_s": [0, 0]}
    times = {f"client_{step}_s": [1, 1] for step in ("download", "compute", "upload")}
    record = {"round": 998, "accuracy": 0.98765, "sim_time_s": 54321.5, "uplink_bytes": 9_876_543_210}
    record |= {"wasted_bytes": 9_000_000_000, **flights, **times}
    with progress.watch(load(None, settings), console) as show:
        show(RoundDone(Record.from_json(record)))
    (last,) = console.export_text().strip().splitlines()
    assert "999/1000" in last and "9877 MB" in last
    assert ("staleness 1.5  9000 MB wasted" in last) == (columns == 112)


def test_a_plain_line_names_steps(capsys):
    config = load(None, ["rounds=2", "server.buffer=3", "name=a-name-that-is-longer-than-most"])
    record = {"round": 0, "accuracy": 0.5, "sim_time_s": 2.0, "uplink_bytes": 1_000_000, "wasted_bytes": 250_000}
    with progress.watch(config, Console(width=80)) as show:
        show(RoundDone(Record.from_json(record)))
        show(RoundDone(Record.from_json(record | {"round": 1})))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("step 1/2  accuracy 0.5000  2.0 simulated s  1.00 MB  0.25 MB wasted")
    assert second.endswith("2.00 MB  0.5 MB wasted")


def test_the_command_says_how_it_ended(tmp_path):
    simulate(load(None, [*QUICK, "out=here", "tracking.uri=null"]))
    command = [sys.executable, "-m", "fedlq_ray.cli", "watch"]
    done = subprocess.run([*command, "here"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("round ") == 4 and "here: finished" in done.stdout
    wrong = subprocess.run([*command, "nowhere"], capture_output=True, text=True, timeout=240)
    assert wrong.returncode == 2 and "holds no run" in wrong.stderr


def test_a_result_shows_itself(tmp_path):
    result = simulate(load(None, [*QUICK, "target=0.99", "tracking.uri=null"]))
    shown = result._repr_html_()
    assert f"{result.summary['final_accuracy']:.2%}" in shown and "not reached" in shown and "<svg" in shown
    assert "var(--" not in shown  # a notebook has none of the report's colours
    axes = result.plot().axes
    assert [axis.get_xlabel()[:9] for axis in axes] == ["simulated", "uplink tr"]
    assert list(axes[0].lines[0].get_ydata()) == pytest.approx(list(100 * result.history.accuracy))
