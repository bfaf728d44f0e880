"""A run that ended anywhere goes on to the same bytes, or says why not."""

import dataclasses
import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from faults import KINDS, SMALL, cut, die, evidence, in_child, round_of, start

from fedlq_ray.cli.main import cli
from fedlq_ray.config import load as configuration
from fedlq_ray.errors import CheckpointError, ConfigError, FedLQError
from fedlq_ray.federation.events import Event, RoundDone
from fedlq_ray.federation.task import Parts
from fedlq_ray.files import locked
from fedlq_ray.runs import rundir
from fedlq_ray.runs.checkpoint import Snapshot, pack, unpack
from fedlq_ray.runs.simulation import resume, run_or_resume, simulate
from fedlq_ray.runs.storage import Folder, Saver
from fedlq_ray.strategies import STRATEGIES as BY_NAME
from fedlq_ray.strategies.state import plain, restored

STRATEGIES = ["adaquantfl", "dadaquant", "feddq", "adagq", "fedhq", "fedmpq", "lgreco", "kimad", "stc", "fedluar"]


def test_a_packed_snapshot_is_let_go_at_once():
    """Without waiting for the collector of cycles, which comes so rarely that the driver grew by 60 MB."""
    gc.disable()
    try:
        value = np.zeros(3)
        held = weakref.ref(value)
        unpack(pack({"memories": {1: value}, "strategy": plain([value])}))
        del value
        assert held() is None
    finally:
        gc.enable()


def test_all_is_on_the_disk_before_a_run_counts_as_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was synced, and the journal's length then; names of folders end in /."""
    synced, real = [], os.fsync

    def note(descriptor: int) -> None:
        real(descriptor)
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(f"{file.relative_to(tmp_path)}{'/' if file.is_dir() else ''}")
        if file.name == "rounds.jsonl":
            synced[-1] += f" {len(file.read_text().splitlines())}"

    monkeypatch.setattr(os, "fsync", note)
    start(tmp_path / "new" / "run", "checkpoint.every_rounds=null")
    began, ended = synced.index("new/run/.config.yaml.part"), synced.index("new/run/.summary.json.part")
    assert {"./", "new/"} <= set(synced[:began])
    assert {"new/run/.clients.csv.part", "new/run/rounds.jsonl 4"} <= set(synced[began:ended])


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_remembers(name: str, tmp_path: Path) -> None:
    """Cut short after each round in turn by what a signal does, then resumed."""
    settings = [f"strategy.name={name}", "rounds=4"]
    start(tmp_path / "whole", *settings)
    out = tmp_path / "cut"

    def go() -> None:
        seen = []

        def watch(event: Event) -> None:
            seen.extend(["record"] * isinstance(event, RoundDone))
            if isinstance(event, RoundDone) and len(seen) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        if out.exists():
            resume(out, watch=watch)
        else:
            own = [*SMALL, "checkpoint.every_rounds=null", *settings, f"out={out}"]
            simulate(configuration.load(None, own), watch=watch)

    for _ in range(8):
        if in_child(go) == 0:
            break
    assert evidence(out) == evidence(tmp_path / "whole")


def test_damaged_checkpoints(tmp_path: Path, whole: dict[str, tuple[bytes, str]]) -> None:
    cut(tmp_path / "run", *KINDS["fedlq"])
    newest, older = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        resume(tmp_path / "run")
    assert evidence(tmp_path / "run") == whole["fedlq"]

    cut(tmp_path / "all", *KINDS["fedlq"])
    for file in (tmp_path / "all" / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        resume(tmp_path / "all")


def test_journal_that_lost_its_end(tmp_path: Path, whole: dict[str, tuple[bytes, str]]) -> None:
    """A checkpoint of more rounds than the journal has is passed over."""
    cut(tmp_path / "run", *KINDS["fedlq"])
    journal = tmp_path / "run" / "rounds.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    rounds = [int(f.stem) for f in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    journal.write_bytes(b"".join(lines[: rounds[-1] - 1]) + lines[rounds[-1] - 1][:20])
    with pytest.warns(UserWarning, match="whole rounds"):
        resume(tmp_path / "run")
    assert evidence(tmp_path / "run") == whole["fedlq"]


def _change(out: Path, number: int) -> None:
    """One digit of one line of the journal."""
    lines = (out / "rounds.jsonl").read_text().splitlines(keepends=True)
    record = json.loads(lines[number])
    lines[number] = json.dumps(record | {"train_loss": record["train_loss"] + 1}) + "\n"
    (out / "rounds.jsonl").write_text("".join(lines))


def test_journal_that_was_changed(tmp_path: Path, whole: dict[str, tuple[bytes, str]]) -> None:
    cut(tmp_path / "last", *KINDS["fedlq"])
    newest, older = sorted((tmp_path / "last" / "checkpoints").iterdir(), reverse=True)
    _change(tmp_path / "last", int(newest.stem) - 1)
    with pytest.warns(UserWarning, match=f"{newest.name} is of other rounds"):
        resume(tmp_path / "last")
    assert evidence(tmp_path / "last") == whole["fedlq"]

    cut(tmp_path / "first", *KINDS["fedlq"])
    _change(tmp_path / "first", 0)
    before = (tmp_path / "first" / "rounds.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used: .*rounds.jsonl changed in its first"):
        resume(tmp_path / "first")
    assert (tmp_path / "first" / "rounds.jsonl").read_bytes() == before


def test_more_rounds(tmp_path: Path) -> None:
    start(tmp_path / "long", *KINDS["rd"], "rounds=6")
    cut(tmp_path / "run", *KINDS["rd"], after=2)
    result = resume(tmp_path / "run", ["rounds=6", "clients.hosting=serial"])
    assert evidence(tmp_path / "run") == evidence(tmp_path / "long")
    assert result.summary["rounds"] == 6
    assert result.summary["config_sha256"] == rundir.read(tmp_path / "long").summary["config_sha256"]  # type: ignore[index]


def test_more_rounds_after_the_last(tmp_path: Path) -> None:
    """Killed when only summary.json was missing. The last round was evaluated; of more rounds it is not."""
    settings = ("strategy.name=adaquantfl", "evaluate_every=3")
    start(tmp_path / "long", *settings, "rounds=6")

    def run() -> None:
        with mock.patch.object(rundir, "summarise", lambda *arguments: die()):
            start(tmp_path / "run", *settings)

    assert in_child(run) == -signal.SIGKILL
    assert len(rundir.journal(tmp_path / "run")) == 4
    resume(tmp_path / "run", ["rounds=6"])
    assert evidence(tmp_path / "run") == evidence(tmp_path / "long")


def test_what_may_not_be(tmp_path: Path) -> None:
    out = tmp_path / "run"
    cut(out, after=2)
    with pytest.raises(ConfigError, match="may only have more rounds"):
        resume(out, ["train.lr=0.5"])
    with pytest.raises(ConfigError, match="not fewer"):
        resume(out, ["rounds=1"])
    with pytest.raises(ConfigError, match=f"fedlq resume {out}"):
        start(out)
    with locked(out), pytest.raises(ConfigError, match="another process is running it"):
        resume(out)
    resume(out)
    with pytest.raises(ConfigError, match="is finished"):
        resume(out)
    with pytest.raises(ConfigError, match="holds no run"):
        resume(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".mine").touch()
    with pytest.raises(ConfigError, match="is there already"):
        start(tmp_path / "full")


def test_killed_before_there_was_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def early() -> None:
        with mock.patch.object(Path, "replace", lambda *files: die()):
            start(out)

    assert in_child(early) == -signal.SIGKILL and sorted(f.name for f in out.iterdir()) == [
        ".config.yaml.part",
        ".lock",
    ]
    told = CliRunner().invoke(cli, ["resume", str(out)]).exception
    assert f"holds no run (no config.yaml); fedlq run ... out={out} begins one" in str(told)
    with locked(out), pytest.raises(ConfigError, match="another process is running it"):
        start(out)
    start(out)
    evidence(out)


def test_two_begin_in_one_folder(tmp_path: Path) -> None:
    """At the same time: one of them has it, and its settings are those that stay."""
    out = tmp_path / "run"
    real = rundir.make_folder

    def other_first(folder: Path, exist_ok: bool = False) -> None:
        with mock.patch.object(rundir, "make_folder", real):
            start(out)
        real(folder, exist_ok)

    with mock.patch.object(rundir, "make_folder", other_first), pytest.raises(ConfigError, match="holds a"):
        start(out, "train.lr=0.5")
    assert rundir.read(out).config.train.lr == 0.1
    evidence(out)


def test_killed_before_its_clients_were_written(tmp_path: Path) -> None:
    """A sweep's run has its place in MLflow all the same."""
    out = tmp_path / "run"
    config = configuration.load(None, [*SMALL, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"out={out}"])

    def early() -> None:
        with mock.patch.object(rundir, "describe_clients", lambda *arguments: die()):
            simulate(config, parent="of/all")

    assert in_child(early) == -signal.SIGKILL
    run_or_resume(config, parent="of/all")
    evidence(out)
    found = rundir.read(out).tracking
    assert found is not None and found.parent == "of/all"


@pytest.mark.parametrize("where", ["", "store", "file://store"])
def test_killed_before_its_checkpoints_were_cleared(where: str, tmp_path: Path) -> None:
    out, store = tmp_path / "run", tmp_path / "store" if where else tmp_path / "run" / "checkpoints"
    place = [f"checkpoint.path={where.replace('store', str(store))}"] if where else []
    cut(out, *place)
    newest = max(file for file in store.iterdir() if file.suffix == ".ckpt")  # one may be half written
    hidden = "" if where.startswith("file:") else "."  # as either writes it
    newest.with_name(f"{hidden}{newest.name.replace('0000000', '0000009')}.part").touch()

    def late() -> None:
        with mock.patch.object(Folder, "clear", lambda folder: die()):
            resume(out)

    assert in_child(late) == -signal.SIGKILL and len(list(store.iterdir())) == 3
    for _ in range(2):  # the second finds nothing to do
        with pytest.raises(ConfigError, match="is finished"):
            resume(out)
    evidence(out)
    assert not store.exists() or not any(store.iterdir())


def test_remote_filesystem(tmp_path: Path, whole: dict[str, tuple[bytes, str]]) -> None:
    """By pyarrow, as s3:// would be."""
    (tmp_path / "store").mkdir()
    for store in ("store", "new/one"):
        out = tmp_path / f"run-{store[:3]}"
        cut(out, *KINDS["rd"], f"checkpoint.path=file://{tmp_path}/{store}")
        assert os.listdir(tmp_path / store)
        resume(out)
        assert evidence(out) == whole["rd"]
        assert not os.listdir(tmp_path / store)


def test_runs_may_have_their_checkpoints_in_one_place(tmp_path: Path, whole: dict[str, tuple[bytes, str]]) -> None:
    place = f"checkpoint.path={tmp_path}/store"
    for kind, after in (("rd", 3), ("fedlq", 2)):
        cut(tmp_path / kind, *KINDS[kind], place, after=after)
    start(tmp_path / "ef21", *KINDS["ef21"], place)  # starts, and clears, beside them
    cut(tmp_path / "twin", *KINDS["rd"], place, after=2)  # of the same settings
    for folder in ("fedlq", "rd", "twin"):
        resume(tmp_path / folder)
    for folder in ("fedlq", "rd", "ef21", "twin"):
        assert evidence(tmp_path / folder) == whole[folder.replace("twin", "rd")]
        assert not (tmp_path / folder / "checkpoints.id").exists()
    assert not (tmp_path / "store").exists()


def test_a_resume_does_not_train_past_the_target(tmp_path: Path) -> None:
    settings = (
        "stop_at_target=true",
        "target=0.2",
        "rounds=6",
        "evaluate_every=2",
        "checkpoint.every_rounds=1",
    )
    kept: list[int] = []
    offer = Saver.offer

    def note(self: Saver, round: int, snapshot: Callable[[], Snapshot]) -> None:
        kept.append(round)
        offer(self, round, snapshot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "offer", note)
        start(tmp_path / "run", *settings)
    done = len(evidence(tmp_path / "run")[0].splitlines())
    assert 1 < done < 6 and kept == list(range(1, done))  # none from which a round would follow the last


@dataclasses.dataclass(frozen=True)
class Table:
    rates: list[float]
    of: dict[str, tuple[list[float]]]
    counts: Any
    again: list[Any]
    norm: torch.Tensor
    inner: Any = None


def test_a_plain_state_is_a_copy_that_gives_the_state_back() -> None:
    counts = np.zeros(1)
    state = Table([1.0], {"a": ([2.0],)}, counts, [counts], torch.zeros(1), Table([0.5], {}, 1, [], torch.ones(1)))
    before = plain(state)
    state.rates.append(3.0)
    state.of["a"][0].append(4.0)
    state.counts[0] += 1
    state.norm[0] += 1
    assert (before["rates"], before["of"], before["counts"][0], float(before["norm"])) == ([1.0], {"a": ([2.0],)}, 0, 0)
    assert before["again"][0] is before["counts"]  # changed in one place, changed in the other
    unpacked = unpack(pack(before))
    unpacked["counts"] += 1  # and a resumed strategy may change it too
    back = restored(dataclasses.replace(state, rates=[], inner=Table([], {}, 0, [], torch.zeros(1))), before)
    assert isinstance(back, Table) and back.rates == [1.0] and back.inner.rates == [0.5]
    assert restored(state, {"rates": [9.0]}).of is state.of  # what a checkpoint lacks stays as init makes it
    assert restored(None, {}) is None


def test_an_array_changed_in_place(tmp_path: Path) -> None:
    """By `plan`, of a round that a signal then cuts short: that round is not counted, nor what it changed."""

    class Counts(BY_NAME["uniform"]):  # type: ignore[valid-type,misc]
        def init(self) -> Any:
            return np.zeros(1, int)

        def plan(self, counts: Any, round: int, cohort: Any) -> Any:
            counts[0] += 1
            return {m.client: self.context.at_levels([int(counts[0])] * len(self.context.quantized)) for m in cohort}

    def settings(name: str) -> configuration.Config:
        return configuration.load(None, [*SMALL, "checkpoint.every_rounds=null", f"out={tmp_path / name}"])

    def stop(event: Event) -> None:
        if round_of(event) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    simulate(settings("whole"), Parts(strategy=Counts))
    assert in_child(lambda: simulate(settings("cut"), Parts(strategy=Counts), watch=stop)) == 4
    resume(tmp_path / "cut", parts=Parts(strategy=Counts))
    assert evidence(tmp_path / "cut") == evidence(tmp_path / "whole")


def test_strategy_that_forgets(tmp_path: Path) -> None:
    class Forgetful(BY_NAME["uniform"]):  # type: ignore[valid-type,misc]
        def learn(self, state: None, round: int, result: object) -> None:
            self.seen = round

    with pytest.raises(FedLQError, match=r"Forgetful changes its attribute seen during a run"):
        simulate(configuration.load(None, [*SMALL, f"out={tmp_path / 'run'}"]), Parts(strategy=Forgetful))
