"""A run is killed, or its disk fails, at one point after another; resumed, it gives the same bytes.

All kinds of run pass the same points, and differ in the state that they hold. By default each kind is stopped at every
twelfth point, and the kinds between them at every third; with FEDLQ_POINTS=1 each kind is stopped at each point.
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
STRIDE = 1 if ALL else 12
pytestmark = pytest.mark.timeout(1800 if ALL else 300)


@pytest.fixture(autouse=True)
def git_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a thousand times."""
    monkeypatch.setattr(provenance, "commit", functools.cache(provenance.commit))
    provenance.commit()


@pytest.mark.parametrize(("kind", "first"), [("fedlq", 1), ("rd", 4), ("ef21", 7), ("flights", 10)])
def test_killed_at_every_point(kind: str, first: int, whole: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    for number in itertools.count(1 if ALL else first, STRIDE):
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
    ("kind", "fault", "first"),
    [("fedlq", errno.ENOSPC, 2), ("fedlq", errno.EIO, 5), ("rd", errno.ENOSPC, 8), ("ef21", errno.EIO, 11)],
)
def test_disk_fails_at_every_point(
    kind: str, fault: int, first: int, whole: dict[str, tuple[bytes, str]], tmp_path: Path
) -> None:
    hit = tmp_path / "hit"

    def fail() -> None:
        hit.touch()
        raise OSError(fault, os.strerror(fault))

    failed = 0
    for number in itertools.count(1 if ALL else first, STRIDE):
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
    assert number > 80 and failed > 10 / STRIDE  # the points were passed


@pytest.mark.parametrize("limit", [0, 700, 3_000, 60_000, 200_000])
def test_files_cannot_grow(limit: int, whole: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    """A real limit of the system: no file may be larger than so many bytes."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        start(tmp_path / "run", *KINDS["rd"])

    assert in_child(run) in (0, 3)
    go_on(tmp_path / "run", *KINDS["rd"])
    assert evidence(tmp_path / "run") == whole["rd"]
