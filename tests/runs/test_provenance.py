"""What made a result is reported as far as it is known; what is not known ends no run."""

import getpass
import os
import stat
import subprocess
from pathlib import Path

import pytest

from fedlq_ray.runs import provenance


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no username")])
def test_a_user_without_an_entry_has_a_number(error, monkeypatch):
    def unknown():
        raise error

    monkeypatch.setattr(getpass, "getuser", unknown)
    assert provenance.tags()["mlflow.user"] == str(os.getuid())


def git(folder, script):
    program = folder / "git"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("script", [None, "exit 128", "sleep 60", "echo 'fatal: dubious ownership' >&2; exit 128"])
def test_a_git_that_is_missing_slow_or_refuses_tells_no_commit(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else str(tmp_path))
    whole = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, timeout, **more: whole(*given, timeout=0.5, **more))
    if script:
        git(tmp_path, script)
    assert provenance.commit() is None


def test_what_git_says_need_not_be_text(tmp_path, monkeypatch):
    git(tmp_path, r"printf 'v\377'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert provenance.commit() == "v\N{REPLACEMENT CHARACTER}"


def test_a_machine_without_proc_has_a_name(monkeypatch):
    def unreadable(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr(os, "sched_getaffinity", unreadable)
    assert provenance.machine().endswith(f"{os.cpu_count()} cores")


def test_a_working_directory_that_was_removed_has_no_commit(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert provenance.made_by()["commit"] is None
