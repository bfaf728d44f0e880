"""Runs that earlier versions left unfinished are still read and finished. Their first rounds stay as they were written;
what is trained from there may differ in the last bits between processors."""

import shutil
from pathlib import Path

import pytest

from fedlq_ray import resume
from fedlq_ray.runs import rundir
from fedlq_ray.runs.storage import Folder, latest

GOLDEN = sorted(folder.name for folder in (Path(__file__).parent / "golden").iterdir() if folder.is_dir())


@pytest.mark.parametrize("name", GOLDEN)
def test_an_old_run_is_read_and_finished(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(Path(__file__).parent / "golden" / name, folder)
    before = rundir.journal(folder)
    saved, faults = latest(Folder(str(folder / "checkpoints")), len(before))
    assert saved is not None and not faults and saved["round"] > 0
    result = resume(folder)
    assert result.summary["rounds"] == 4
    assert rundir.journal(folder)[: saved["round"]] == before[: saved["round"]]


def test_there_are_golden_runs() -> None:
    assert len(GOLDEN) >= 3
