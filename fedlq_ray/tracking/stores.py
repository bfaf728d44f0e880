"""Addresses of MLflow's stores: parsing, and the checks that are possible before a run starts."""

import contextlib
import json
import os
import re
import sqlite3
import tempfile
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import urlopen

from fedlq_ray.config.settings import VARIABLES, TrackingConfig
from fedlq_ray.errors import ConfigError
from fedlq_ray.files import alone, expand

# Paths are taken literally, percent signs included; SQLAlchemy options may follow, such as ?timeout=9
_SQLITE = re.compile(r"sqlite(?:\+pysqlite)?:///(?P<path>.*?)(?P<options>\?\w+=[^/?]*)?", re.DOTALL)
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9.-]*)(\+\w+)?:")
_DATABASES = ("postgresql", "mysql", "mssql")
_SERVERS = ("http", "https", "databricks")
_EXAMPLES = "name a file, such as sqlite:///mlflow.db, or a server, such as http://HOST:5000"
_WAIT_S = 2.0  # timeout for asking a server whether the experiment is deleted


class Names(NamedTuple):
    """The names of the address and the experiment in messages."""

    uri: str = "tracking.uri"
    experiment: str = "tracking.experiment"


SETTINGS = Names()


def from_environment(tracking: TrackingConfig) -> dict[str, str]:
    """Maps settings of a tracked run to the environment variables that set them; explicit settings are not included."""
    if tracking.uri is None:
        return {}
    taken = {name: variable for name, variable in VARIABLES.items() if name not in tracking.model_fields_set}
    return {name: variable for name, variable in taken.items() if os.environ.get(variable)}


def heard(tracking: TrackingConfig) -> list[str]:
    """Explains the effect of each MLflow environment variable that is set, one sentence each."""
    taken = from_environment(tracking)
    told = [f"tracking.{name} is {_masked(getattr(tracking, name))}, from {taken[name]}" for name in taken]
    if tracking.uri is not None and os.environ.get("MLFLOW_EXPERIMENT_ID"):
        told.append(
            "MLFLOW_EXPERIMENT_ID is not used; MLFLOW_EXPERIMENT_NAME or tracking.experiment name the experiment"
        )
    return told


def _masked(uri: str) -> str:
    """Masks the password in an address."""
    return re.sub(r"(?<=://)([^/@]*):[^/@]*@", r"\1:***@", uri)


def sqlite_file(uri: str, folder: Path | None = None, name: str = "tracking.uri") -> Path | None:
    """Returns the file of a SQLite store as an absolute path; None for other stores.

    Args:
        folder: base of a relative path; by default the working directory.
        name: name of the setting, for messages.
    Raises:
        ConfigError: the path starts with `~`, and the home folder is not known.
    """
    found = _SQLITE.fullmatch(uri)
    return found and (folder or Path.cwd()).joinpath(expand(found["path"], name)).resolve()


def absolute(uri: str, folder: Path | None = None) -> str:
    """Makes an address independent of the working directory; keeps `~`, since stored files may contain it.

    Args:
        folder: base of a relative path; by default the working directory.
    """
    found = _SQLITE.fullmatch(uri)
    if not found or found["path"].startswith("~"):
        return uri
    return f"sqlite:///{sqlite_file(uri, folder)}{found['options'] or ''}"


def kept(uri: str, folder: Path, start: Path | None = None) -> str:
    """Converts an address for storage in a file in `folder`: a path relative to `start` becomes relative to `folder`.

    Args:
        start: base of a relative path; by default the working directory.
    """
    found = _SQLITE.fullmatch(uri)
    if not found or found["path"].startswith(("/", "~")):
        return uri
    return f"sqlite:///{os.path.relpath(str(sqlite_file(uri, start)), folder.resolve())}{found['options'] or ''}"


def for_mlflow(uri: str, name: str = "tracking.uri") -> str:
    """Converts an address to the form that MLflow and SQLAlchemy accept.

    Args:
        name: name of the setting, for messages.
    Raises:
        ConfigError: the path of a SQLite file has a `?`, at which this SQLAlchemy would truncate it.
    """
    found, file = _SQLITE.fullmatch(uri), str(sqlite_file(uri, name=name))
    if not found:
        return uri
    if set("%?") & set(file):
        from sqlalchemy.engine import make_url

        if make_url("sqlite:///%3F").database == "?":  # from SQLAlchemy 2.1 on
            file = quote(file, safe="")  # slashes as well, because MLflow creates the folder of the path as given
        elif "?" in file:
            raise ConfigError(f"{name}: {file}: SQLAlchemy before 2.1 takes no path with a ?; choose another")
    return f"sqlite:///{file}{found['options'] or ''}"


def connect(uri: str) -> Any:
    """Returns a client of an MLflow store or server."""
    # A server that is down must cost seconds, not the twenty minutes of MLflow's defaults.
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", "5"), ("BACKOFF_FACTOR", "1")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    os.environ.pop("MLFLOW_RUN_ID", None)  # else MLflow would use an enclosing run
    import logging

    import mlflow

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with exclusive(uri):  # two processes that create a file's tables at the same time corrupt it
        return mlflow.MlflowClient(tracking_uri=for_mlflow(uri))


def exclusive(uri: str) -> AbstractContextManager[None]:
    """Excludes other processes of this machine that use the same file store, or, for servers, any server."""
    file = sqlite_file(uri)
    return alone(file.parent if file and file.parent.is_dir() else Path(tempfile.gettempdir()))


def require(tracking: TrackingConfig) -> None:
    """Checks that a run can be tracked with these settings; accepts a server that does not answer yet.

    Raises:
        ConfigError: a setting is wrong; the message names it, or its environment variable, and what is allowed.
    """
    if tracking.uri is not None:
        variables = from_environment(tracking)
        names = Names(variables.get("uri", "tracking.uri"), variables.get("experiment", "tracking.experiment"))
        require_usable(tracking.uri, tracking.experiment, names)


def require_usable(uri: str, experiment: str, names: Names = SETTINGS) -> None:
    """As `require`, for an address and an experiment; creates no file and takes milliseconds, unless a server is slow.

    Raises:
        ConfigError: one of the two is wrong; the message names it.
    """
    found = _SCHEME.match(uri)
    scheme = found["scheme"].lower() if found else "databricks" if uri == "databricks" else ""
    if _SQLITE.fullmatch(uri):
        deleted = _require_file(uri, experiment, names)
    elif scheme in _SERVERS:
        deleted = scheme != "databricks" and _require_server(uri, experiment, names)
    elif scheme in _DATABASES:
        deleted = _require_driver(uri, names)
    elif _is_other_store(scheme) and uri:
        deleted = False
    else:
        old = uri and scheme in ("", "file")
        why = "MLflow has no stores in folders any more" if old else "is not an address of an MLflow store"
        raise ConfigError(f"{names.uri}: {uri!r}: {why}; {_EXAMPLES}")
    if deleted:
        raise ConfigError(f"{names.experiment}: {deleted_experiment(experiment, uri)}")


def _is_other_store(scheme: str) -> bool:
    """Whether this is a folder and MLflow may write to folders, or an MLflow plug-in handles this scheme."""
    if scheme in ("", "file"):
        return os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    return scheme in {found.name for found in entry_points(group="mlflow.tracking_store")}


def deleted_experiment(experiment: str, uri: str) -> str:
    """Returns the message for a deleted experiment."""
    return (
        f"MLflow's experiment {experiment!r} in {_masked(uri)} is deleted; restore it (mlflow experiments restore), or "
        "choose another"
    )


def _require_file(uri: str, experiment: str, names: Names) -> bool:
    """Returns whether the experiment is deleted in a SQLite file; the file need not exist yet."""
    file = sqlite_file(uri, name=names.uri)
    if not file or uri.endswith((":///", ":///:memory:")):
        raise ConfigError(f"{names.uri}: {uri!r}: names no file; {_EXAMPLES}")
    for_mlflow(uri, names.uri)
    if not file.parent.is_dir():
        raise ConfigError(f"{names.uri}: {uri}: there is no folder {file.parent}; create it, or {_EXAMPLES}")
    if file.exists() and not file.is_file():
        raise ConfigError(f"{names.uri}: {uri}: {file} is not a file; {_EXAMPLES}")
    if not all(os.access(path, os.W_OK) for path in (file, file.parent) if path.exists()):
        raise ConfigError(f"{names.uri}: {uri}: {file} cannot be written; {_EXAMPLES}")
    if not file.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=0.1)) as database:
            rows = database.execute("select lifecycle_stage from experiments where name = ?", (experiment,)).fetchall()
    except sqlite3.OperationalError:  # it is locked, or has no tables yet
        return False
    except sqlite3.DatabaseError as exc:
        raise ConfigError(f"{names.uri}: {uri}: {file} is not a SQLite database ({exc}); {_EXAMPLES}") from exc
    return bool(rows) and all(stage == "deleted" for (stage,) in rows)


def _require_server(uri: str, experiment: str, names: Names) -> bool:
    """Returns whether the experiment is deleted on a server; also False if that cannot be determined now."""
    try:
        url = urlsplit(uri)
        if not url.hostname or url.port == 0:
            raise ValueError("it has no host")
    except ValueError as exc:
        raise ConfigError(f"{names.uri}: {uri!r} is not an address of a server ({exc}); {_EXAMPLES}") from exc
    asked = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{urlencode({'experiment_name': experiment})}"
    try:
        with urlopen(asked, timeout=_WAIT_S) as answer:
            return bool(json.loads(answer.read())["experiment"]["lifecycle_stage"] == "deleted")
    except (URLError, OSError, ValueError, LookupError, TypeError):  # it is down, needs a password, or is new
        return False


def _require_driver(uri: str, names: Names) -> bool:
    """Checks that the Python package of a database is installed; returns False, as experiments are not checked."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as exc:
        raise ConfigError(f"{names.uri}: {_masked(uri)}: needs the Python package {exc.name}; install it") from exc
    except (SQLAlchemyError, ValueError) as exc:
        raise ConfigError(f"{names.uri}: {_masked(uri)}: is not an address of a database; {_EXAMPLES}") from exc
    return False


def require_readable(uri: str, name: str) -> None:
    """Checks that a store can be read.

    Raises:
        ConfigError: not an address of a store, or the SQLite file does not exist (MLflow would create it).
    """
    require_usable(uri, "", Names(name))
    file = sqlite_file(uri, name=name)
    if file and not file.is_file():
        raise ConfigError(f"{name}: {file}: no such MLflow store")
