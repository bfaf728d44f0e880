"""Joins a Ray cluster, or starts one on this machine."""

import contextlib
import logging
import os
import secrets
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedlq_ray.errors import ConfigError, FedLQError, first_line
from fedlq_ray.hosts.ray import starter

# Ray puts sockets into BASE/ray/session_DATE_TIME_PID/sockets/; the system limits paths to 107 bytes (macOS: 103).
_LONGEST_BASE = 35


def require_address() -> None:
    """Checks that a run can join Ray, before anything is written.

    Raises:
        ConfigError: RAY_ADDRESS is not the address of a cluster that answers, or this program uses Ray Client.
    """
    import ray

    if ray.util.client.ray.is_connected():
        raise ConfigError(
            "this program is connected to Ray by Ray Client (ray://), but a run needs a node of the cluster; call "
            f"ray.shutdown() first, or {_INSTEAD}"
        )
    address = _cluster()
    if ray.is_initialized() or address in (None, "auto"):
        return
    host, _, port = str(address).rpartition(":")
    if "://" in str(address) or not host or not port.isdecimal():
        kind = {"http": "a dashboard's address", "https": "a dashboard's address", "ray": "an address of Ray Client"}
        found = kind.get(urlsplit(str(address)).scheme, "not an address of Ray")
        raise ConfigError(
            f"RAY_ADDRESS={address}: is {found}; it must be HOST:PORT of a cluster that this machine is a node of "
            f"(such as 127.0.0.1:6379), or auto; unset it to start Ray on this machine; or {_INSTEAD}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as exc:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray cluster answers ({getattr(exc, 'strerror', None) or first_line(exc)}); "
            "unset it to start Ray on this machine"
        ) from exc


_INSTEAD = "send the run to the cluster: fedlq submit --address http://HEAD:8265"


def _cluster() -> str | None:
    """Returns RAY_ADDRESS if it names a cluster, else None."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def anticipate(workers: bool = True) -> None:
    """Lets the servers that Ray's processes fork from start now, if this program will start Ray.

    Args:
        workers: False if `starter.fork` follows.
    Raises:
        ConfigError: RAY_TMPDIR is wrong.
    """
    ray = sys.modules.get("ray")
    if _cluster() is None and not (ray and ray.is_initialized()):
        _provide_folder()
        _provide_token()
        starter.start(workers)


def start_ray() -> None:
    """Joins the cluster of RAY_ADDRESS, or starts one on this machine; a second call has no effect.

    Raises:
        ConfigError: RAY_ADDRESS or RAY_TMPDIR is wrong.
        FedLQError: Ray does not start.
    """
    anticipate()
    import ray

    require_address()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {}
    address = _cluster()
    if address is None:
        options = {"address": "local", "include_dashboard": False}
    try:
        with starter.forking() if address is None else contextlib.nullcontext():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as exc:  # ValueError, ConnectionError, RuntimeError, and other errors of the system
        hint = f"is there a cluster at RAY_ADDRESS={address}?" if address else "is there room in /dev/shm and in /tmp?"
        raise FedLQError(f"Ray did not start: {first_line(exc)}; {hint}") from exc


def _provide_folder() -> None:
    """Makes Ray put its sockets elsewhere if TMPDIR is too long for their names, or cannot be written.

    Raises:
        ConfigError: RAY_TMPDIR has this fault, or no folder is suitable.
    """
    given = os.environ.get("RAY_TMPDIR")
    candidates = [given] if given else [os.environ.get("TMPDIR") or "/tmp", "/tmp"]
    faults = {base: _unfit(base) for base in candidates}
    fit = next((base for base, fault in faults.items() if not fault), None)
    if fit is None:
        told = "; ".join(f"{base} {fault}" for base, fault in faults.items())
        raise ConfigError(
            f"Ray has no folder for its sockets: {told}; set RAY_TMPDIR to a folder that can be written and has "
            f"at most {_LONGEST_BASE} characters"
        )
    if fit != candidates[0]:
        os.environ["RAY_TMPDIR"] = fit


def _unfit(base: str) -> str | None:
    """Returns why Ray cannot put its folder into this one; None if it can."""
    if len(os.fsencode(base)) > _LONGEST_BASE:
        return f"has {len(os.fsencode(base))} characters"
    try:
        Path(base, "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(base, "ray")):
            return None
    except OSError as exc:
        return f"cannot be written ({exc.strerror})"


def _provide_token() -> None:
    """Sets a token for Ray in the environment if Ray cannot store one in the home folder; else Ray would not start.

    Ray requires a token from processes that join the cluster it starts. The processes of this run inherit it.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    home = os.path.expanduser("~/.ray")
    try:
        if not os.path.isabs(home):
            raise OSError("there is no home folder")
        if not Path(home, "auth_token").exists():
            Path(home).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=home).close()
        elif not os.access(Path(home, "auth_token"), os.R_OK):
            raise OSError("it belongs to another user")
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
