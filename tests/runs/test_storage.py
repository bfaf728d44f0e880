"""How often checkpoints are written, that rounds do not wait for them, and a file system that is full."""

import ctypes
import json
import shutil
import subprocess
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from faults import KINDS, SMALL, evidence, in_child, start

from fedlq_ray import resume, simulate
from fedlq_ray.config.load import load
from fedlq_ray.config.settings import CheckpointConfig
from fedlq_ray.federation.events import Warned
from fedlq_ray.runs import storage


class Disk(storage.Folder):
    """Remembers when what was written; `write` takes some seconds of a false clock, or waits to be let go."""

    def __init__(self, takes_s=0.0, go=None):
        super().__init__("nowhere")
        self.takes_s, self.go, self.now, self.written = takes_s, go, 0.0, []

    def names(self):
        return []

    def write(self, name, data):
        assert self.go is None or self.go.wait(20)
        self.written.append((int(name.split(".")[0]), self.now))
        self.now += self.takes_s


def snapshot(round):
    return {"round": round, "memories": {}, "memories_under_way": {}}


def saver(disk, monkeypatch, **settings):
    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=lambda: disk.now))
    return storage.Saver(disk, CheckpointConfig(**settings), dict, lambda: None)


@pytest.mark.parametrize(("takes_s", "apart_s"), [(0.25, 10.25), (1.0, 20.0), (4.0, 80.0)])
def test_by_default_checkpoints_take_a_twentieth_of_the_time(takes_s, apart_s, monkeypatch):
    disk = Disk(takes_s)
    ours = saver(disk, monkeypatch)
    for round in range(1, 4001):
        disk.now += 0.25
        ours.offer(round, partial(snapshot, round))
        ours.finish(completed=True)  # waits for what is being written
    at = [now for _, now in disk.written]
    assert at[0] == 10 and takes_s * (len(at) - 1) <= 0.05 * disk.now
    assert {after - before for before, after in zip(at, at[1:], strict=False)} == {apart_s}


def test_by_default_rounds_do_not_wait_for_a_slow_disk(monkeypatch):
    disk = Disk(go=threading.Event())
    ours = saver(disk, monkeypatch)
    for round in range(1, 10):
        disk.now += 1000
        ours.offer(round, partial(snapshot, round))
    assert not disk.written  # the first is still under way, and none was begun beside it
    disk.go.set()
    ours.finish(completed=False)
    assert [round for round, _ in disk.written] == [1, 9] and ours.failure is None


def test_every_rounds_is_kept_to_on_a_slow_disk(monkeypatch):
    """When a checkpoint is begun the one before it is whole: a kill at any time loses no more."""
    disk = Disk(go=SimpleNamespace(wait=lambda seconds: not time.sleep(0.02)))
    ours = saver(disk, monkeypatch, every_rounds=1)
    for round in range(1, 6):
        ours.offer(round, partial(snapshot, round))
        assert round == 1 or ours.saved >= round - 1
    ours.finish(completed=True)
    assert [round for round, _ in disk.written] == [1, 2, 3, 4, 5]


def mount(folder, size):
    """A small file system that this process alone sees."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        raise PermissionError("unshare")
    for options in (("--make-rprivate", "/"), ("-t", "tmpfs", "-o", f"size={size}", "none", str(folder))):
        subprocess.run(["mount", *options], check=True, stderr=subprocess.DEVNULL)


def test_a_tmpfs_fills_up(tmp_path):
    """Two checkpoints fit in it, and no third; nor does the model at the end."""
    small, told, settings = tmp_path / "small", tmp_path / "told", (*KINDS["rd"], "rounds=8")
    small.mkdir()
    if in_child(lambda: mount(small, "1m")):
        pytest.skip("mounting a tmpfs in a namespace of its own is not permitted here")
    start(tmp_path / "whole", *settings)

    def fill():
        def watch(event):
            if isinstance(event, Warned):
                with told.open("a") as file:
                    file.write(event.message + "\n")

        simulate(load(None, [*SMALL, *settings, f"out={small / 'run'}"]), watch=watch)

    def run():
        mount(small, "1000k")
        code = in_child(fill)
        kept = sorted(file.name for file in (small / "run" / "checkpoints").iterdir())
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        resume(small / "run")
        shutil.copytree(small / "run", tmp_path / "run")
        (tmp_path / "seen").write_text(json.dumps([code, kept]))

    assert in_child(run) == 0
    assert json.loads((tmp_path / "seen").read_text()) == [3, ["00000001.ckpt", "00000002.ckpt"]]
    missing = [line.partition(" in ")[0] for line in told.read_text().splitlines()]
    assert missing == [f"no checkpoint of round {number}" for number in range(3, 9)]
    assert evidence(tmp_path / "run") == evidence(tmp_path / "whole")
