"""Where Ray can start, and what is said where it cannot."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.errors import ConfigError
from fedlq_ray.hosts.ray import session as raysession

SMALL = ["rounds=1", "tracking.uri=null", "clients.count=4", "clients.cohort=2", "clients.hosting=packed"]


@pytest.fixture
def no_ray(monkeypatch, own_folder):
    """No Ray, and none of the variables that it reads."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:8265", "is a dashboard's address; it must be HOST:PORT"),
        ("ray://127.0.0.1:10001", "is an address of Ray Client; it must be HOST:PORT"),
        ("junk", "is not an address of Ray; it must be HOST:PORT"),
        ("127.0.0.1:ten", "is not an address of Ray"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
    ],
)
def test_an_address_that_is_none_of_a_cluster_is_named_before_anything_is_written(address, told, no_ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: ") as failure:
        simulate(load(None, SMALL))
    assert told in str(failure.value) and not str(failure.value).endswith(":") and not os.listdir()


def test_an_address_where_nobody_answers_costs_no_minute(no_ray, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        raysession.start_ray()


def test_ray_client_is_refused(no_ray, monkeypatch):
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    with pytest.raises(ConfigError, match="by Ray Client"):
        simulate(load(None, SMALL))
    assert not os.listdir()


def test_a_folder_for_sockets_is_short_and_can_be_written(no_ray, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 90)))
    raysession._provide_folder()
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    for wrong, told in (("x" * 90, "has 90 characters"), ("/proc/none", "cannot be written")):
        monkeypatch.setenv("RAY_TMPDIR", wrong)
        with pytest.raises(ConfigError, match=told):
            raysession._provide_folder()


def test_ray_keeps_its_folder_where_that_will_do(no_ray, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp")
    raysession._provide_folder()
    assert "RAY_TMPDIR" not in os.environ


def test_a_token_comes_by_the_environment_only_where_the_home_cannot_keep_it(no_ray, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    raysession._provide_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/proc/none")
    raysession._provide_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.ray
def test_a_run_with_a_home_that_cannot_be_written_and_a_long_tmpdir(tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": "/proc/none", "TMPDIR": str(long)}
    command = [sys.executable, "-m", "fedlq_ray.cli", "run", *SMALL]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path, "runs/demo-0/summary.json").exists()
