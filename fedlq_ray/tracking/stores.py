"""Addresses of MLflow's stores: what they mean, and what can be known to be wrong with one before a run begins."""

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

# A path is taken as it is written, percent signs too; options of SQLAlchemy's may follow it, such as ?timeout=9
_SQLITE = re.compile(r"sqlite(?:\+pysqlite)?:///(?P<path>.*?)(?P<options>\?\w+=[^/?]*)?", re.DOTALL)
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9.-]*)(\+\w+)?:")
_DATABASES = ("postgresql", "mysql", "mssql")
_SERVERS = ("http", "https", "databricks")
_EXAMPLES = "name a file, such as sqlite:///mlflow.db, or a server, such as http://HOST:5000"
_WAIT_S = 2.0  # for a server, to learn whether the experiment is deleted


class Names(NamedTuple):
    """What messages call an address and an experiment."""

    uri: str = "tracking.uri"
    experiment: str = "tracking.experiment"


SETTINGS = Names()


def from_environment(tracking: TrackingConfig) -> dict[str, str]:
    """The variable that each setting of a tracked run comes from, by the setting; those that are named are left out."""
    if tracking.uri is None:
        return {}
    taken = {name: variable for name, variable in VARIABLES.items() if name not in tracking.model_fields_set}
    return {name: variable for name, variable in taken.items() if os.environ.get(variable)}


def heard(tracking: TrackingConfig) -> list[str]:
    """A sentence on each variable of MLflow's that is set: what it does here."""
    taken = from_environment(tracking)
    told = [f"tracking.{name} is {_masked(getattr(tracking, name))}, from {taken[name]}" for name in taken]
    if tracking.uri is not None and os.environ.get("MLFLOW_EXPERIMENT_ID"):
        told.append(
            "MLFLOW_EXPERIMENT_ID is not used; MLFLOW_EXPERIMENT_NAME or tracking.experiment name the experiment"
        )
    return told


def _masked(uri: str) -> str:
    """Without a password."""
    return re.sub(r"(?<=://)([^/@]*):[^/@]*@", r"\1:***@", uri)


def sqlite_file(uri: str, folder: Path | None = None, name: str = "tracking.uri") -> Path | None:
    """The file of a SQLite store, as an absolute path; None for other stores.

    Args:
        folder: what a relative path begins at; by default the working directory.
        name: of the setting, for messages.
    Raises:
        ConfigError: the path begins with `~`, and the home folder is not known.
    """
    found = _SQLITE.fullmatch(uri)
    return found and (folder or Path.cwd()).joinpath(expand(found["path"], name)).resolve()


def absolute(uri: str, folder: Path | None = None) -> str:
    """The same store, also from another working directory; `~` stays, since a file that is read may have it.

    Args:
        folder: what a relative path begins at; by default the working directory.
    """
    found = _SQLITE.fullmatch(uri)
    if not found or found["path"].startswith("~"):
        return uri
    return f"sqlite:///{sqlite_file(uri, folder)}{found['options'] or ''}"


def kept(uri: str, folder: Path, start: Path | None = None) -> str:
    """An address as a file in `folder` keeps it: a relative path, which begins at `start`, then begins at `folder`.

    Args:
        start: by default the working directory.
    """
    found = _SQLITE.fullmatch(uri)
    if not found or found["path"].startswith(("/", "~")):
        return uri
    return f"sqlite:///{os.path.relpath(str(sqlite_file(uri, start)), folder.resolve())}{found['options'] or ''}"


def for_mlflow(uri: str, name: str = "tracking.uri") -> str:
    """An address as MLflow and SQLAlchemy take it.

    Args:
        name: of the setting, for messages.
    Raises:
        ConfigError: the path of a SQLite file has a `?`, and this SQLAlchemy cuts it there.
    """
    found, file = _SQLITE.fullmatch(uri), str(sqlite_file(uri, name=name))
    if not found:
        return uri
    if set("%?") & set(file):
        from sqlalchemy.engine import make_url

        if make_url("sqlite:///%3F").database == "?":  # from SQLAlchemy 2.1 on
            file = quote(file, safe="")  # slashes as well: MLflow makes the folder of the path as it is written here
        elif "?" in file:
            raise ConfigError(f"{name}: {file}: SQLAlchemy before 2.1 takes no path with a ?; name another")
    return f"sqlite:///{file}{found['options'] or ''}"


def connect(uri: str) -> Any:
    """A client of an MLflow store or server."""
    # A server that is down must cost seconds, not the twenty minutes of MLflow's defaults.
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", "5"), ("BACKOFF_FACTOR", "1")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    os.environ.pop("MLFLOW_RUN_ID", None)  # else an enclosing run would be taken for ours
    import logging

    import mlflow

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with exclusive(uri):  # two that make a file's tables at the same time spoil it
        return mlflow.MlflowClient(tracking_uri=for_mlflow(uri))


def exclusive(uri: str) -> AbstractContextManager[None]:
    """No other process of this machine in here with the same store, if it is a file; with no server, if it is one."""
    file = sqlite_file(uri)
    return alone(file.parent if file and file.parent.is_dir() else Path(tempfile.gettempdir()))


def require(tracking: TrackingConfig) -> None:
    """Refuse where a run cannot be tracked as its settings say; a server that does not answer may do so later.

    Raises:
        ConfigError: names the setting, or the variable that it comes from, and what would be right.
    """
    if tracking.uri is not None:
        variables = from_environment(tracking)
        names = Names(variables.get("uri", "tracking.uri"), variables.get("experiment", "tracking.experiment"))
        require_usable(tracking.uri, tracking.experiment, names)


def require_usable(uri: str, experiment: str, names: Names = SETTINGS) -> None:
    """The same for an address and an experiment; makes no file, and takes milliseconds but for a slow server.

    Raises:
        ConfigError: what is wrong with which of the two, by its name.
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
        why = "MLflow has no stores in folders any more" if old else "is no address of an MLflow store"
        raise ConfigError(f"{names.uri}: {uri!r}: {why}; {_EXAMPLES}")
    if deleted:
        raise ConfigError(f"{names.experiment}: {deleted_experiment(experiment, uri)}")


def _is_other_store(scheme: str) -> bool:
    """Whether MLflow is allowed to write to folders, and this is one, or a plug-in of MLflow's has such stores."""
    if scheme in ("", "file"):
        return os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    return scheme in {found.name for found in entry_points(group="mlflow.tracking_store")}


def deleted_experiment(experiment: str, uri: str) -> str:
    """What is wrong, and what to do."""
    return (
        f"MLflow's experiment {experiment!r} in {_masked(uri)} is deleted; restore it (mlflow experiments restore), or "
        "name another"
    )


def _require_file(uri: str, experiment: str, names: Names) -> bool:
    """Whether the experiment is deleted in a SQLite file, which may not be there yet."""
    file = sqlite_file(uri, name=names.uri)
    if not file or uri.endswith((":///", ":///:memory:")):
        raise ConfigError(f"{names.uri}: {uri!r}: names no file; {_EXAMPLES}")
    for_mlflow(uri, names.uri)
    if not file.parent.is_dir():
        raise ConfigError(f"{names.uri}: {uri}: there is no folder {file.parent}; make it, or {_EXAMPLES}")
    if file.exists() and not file.is_file():
        raise ConfigError(f"{names.uri}: {uri}: {file} is no file; {_EXAMPLES}")
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
        raise ConfigError(f"{names.uri}: {uri}: {file} is no SQLite database ({exc}); {_EXAMPLES}") from exc
    return bool(rows) and all(stage == "deleted" for (stage,) in rows)


def _require_server(uri: str, experiment: str, names: Names) -> bool:
    """Whether the experiment is deleted on a server; False also where that cannot be known now."""
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
    except (URLError, OSError, ValueError, LookupError, TypeError):  # it is down, or wants a password, or is new
        return False


def _require_driver(uri: str, names: Names) -> bool:
    """Refuse a database whose Python package is missing; its experiments are not looked at: False."""
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
    """
    Raises:
        ConfigError: it is no address of a store, or of a SQLite file that does not exist; MLflow would make it.
    """
    require_usable(uri, "", Names(name))
    file = sqlite_file(uri, name=name)
    if file and not file.is_file():
        raise ConfigError(f"{name}: {file}: no such MLflow store")
