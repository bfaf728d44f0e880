"""How often checkpoints are written, and that rounds do not wait for them."""

import threading
import time
from types import SimpleNamespace

import pytest

from fedlq_ray import storage
from fedlq_ray.config import CheckpointConfig


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


def saver(disk, monkeypatch, **settings):
    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=lambda: disk.now))
    return storage.Saver(disk, CheckpointConfig(**settings), dict, lambda: None)


@pytest.mark.parametrize(("takes_s", "apart_s"), [(0.25, 10.25), (1.0, 20.0), (4.0, 80.0)])
def test_by_default_checkpoints_take_a_twentieth_of_the_time(takes_s, apart_s, monkeypatch):
    disk = Disk(takes_s)
    ours = saver(disk, monkeypatch)
    for round in range(1, 4001):
        disk.now += 0.25
        ours.offer({"round": round, "memories": {}})
        ours.finish(completed=True)  # waits for what is being written
    at = [now for _, now in disk.written]
    assert at[0] == 10 and takes_s * (len(at) - 1) <= 0.05 * disk.now
    assert {after - before for before, after in zip(at, at[1:], strict=False)} == {apart_s}


def test_by_default_rounds_do_not_wait_for_a_slow_disk(monkeypatch):
    disk = Disk(go=threading.Event())
    ours = saver(disk, monkeypatch)
    for round in range(1, 10):
        disk.now += 1000
        ours.offer({"round": round, "memories": {}})
    assert not disk.written  # the first is still under way, and none was begun beside it
    disk.go.set()
    ours.finish(completed=False)
    assert [round for round, _ in disk.written] == [1, 9] and ours.failure is None


def test_every_rounds_is_kept_to_on_a_slow_disk(monkeypatch):
    """When a checkpoint is begun the one before it is whole: a kill at any time loses no more."""
    disk = Disk(go=SimpleNamespace(wait=lambda seconds: not time.sleep(0.02)))
    ours = saver(disk, monkeypatch, every_rounds=1)
    for round in range(1, 6):
        ours.offer({"round": round, "memories": {}})
        assert round == 1 or ours.saved >= round - 1
    ours.finish(completed=True)
    assert [round for round, _ in disk.written] == [1, 2, 3, 4, 5]
