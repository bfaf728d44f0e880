"""A run is killed, or its disk fails, at one point after another; resumed, it gives the same bytes.

All kinds of run pass the same points, and differ in the state that they hold. By default one kind is stopped at every
third point, the others at every seventh; with FEDLQ_POINTS=1 all of them at each.
"""

import errno
import functools
import itertools
import os
import resource
import signal
from pathlib import Path

import pytest
from faults import KINDS, at_point, die, evidence, go_on, in_child, start

from fedlq_ray.runs import provenance

ALL = bool(os.environ.get("FEDLQ_POINTS"))
ONE, OTHERS = (1, 1) if ALL else (3, 7)
pytestmark = pytest.mark.timeout(1800 if ALL else 300)


@pytest.fixture(autouse=True)
def git_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a thousand times."""
    monkeypatch.setattr(provenance, "commit", functools.cache(provenance.commit))
    provenance.commit()


@pytest.mark.parametrize(("kind", "stride"), [("fedlq", ONE), ("rd", OTHERS), ("ef21", OTHERS), ("flights", OTHERS)])
def test_killed_at_every_point(kind: str, stride: int, whole: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    for number in itertools.count(1, stride):
        out = tmp_path / str(number)

        def run(out: Path = out, number: int = number) -> None:
            with at_point(number, die):
                start(out, *KINDS[kind])

        code = in_child(run)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        go_on(out, *KINDS[kind])
        assert evidence(out) == whole[kind], f"killed at point {number}"
    assert number > 50  # the points were passed


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("fedlq", errno.ENOSPC), ("fedlq", errno.EIO), ("rd", errno.ENOSPC), ("ef21", errno.EIO)],
)
def test_disk_fails_at_every_point(kind: str, fault: int, whole: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    stride = ONE if (kind, fault) == ("fedlq", errno.ENOSPC) else OTHERS
    hit = tmp_path / "hit"

    def fail() -> None:
        hit.touch()
        raise OSError(fault, os.strerror(fault))

    failed = 0
    for number in itertools.count(1, stride):
        out = tmp_path / str(number)

        def run(out: Path = out, number: int = number) -> None:
            with at_point(number, fail):
                start(out, *KINDS[kind])

        code = in_child(run)
        if not hit.exists():
            break
        hit.unlink()
        assert code in (0, 3), f"point {number}"  # done all the same, or one message
        if code:
            failed += 1
            go_on(out, *KINDS[kind])
        assert evidence(out) == whole[kind], f"failed at point {number}"
    assert number > 80 and failed > 10 / stride  # the points were passed


@pytest.mark.parametrize("limit", [0, 700, 3_000, 60_000, 200_000])
def test_files_cannot_grow(limit: int, whole: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    """A real limit of the system: no file may be larger than so many bytes."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        start(tmp_path / "run", *KINDS["rd"])

    assert in_child(run) in (0, 3)
    go_on(tmp_path / "run", *KINDS["rd"])
    assert evidence(tmp_path / "run") == whole["rd"]
