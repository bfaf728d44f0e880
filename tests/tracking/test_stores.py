"""Addresses of MLflow's stores: odd paths, wrong addresses, and what a run's files keep of them."""

import contextlib
import http.server
import json
import shutil
import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlq_ray import Config, ConfigError, resume, simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation.events import Hosting, Prepared
from fedlq_ray.tracking import log as tracking
from fedlq_ray.tracking import stores

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test's own folder, without a store, is the working directory."""
    monkeypatch.chdir(tmp_path)


ODD = ["o'brien", "a?b", "a#b", "a%b", "a%20b", "a%3Fb", "a b", 'q"q', "[x]", "été", "a:b@c", "a&b=c?d=e", "~"]


def asked(file, query):
    with contextlib.closing(sqlite3.connect(file)) as database:
        return database.execute(query).fetchall()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store that MLflow has made, with an experiment that is deleted."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = stores.connect(f"sqlite:///{file}")
    client.delete_experiment(client.create_experiment("gone"))
    return file


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("odd", ["folder", "file"])
def test_a_path_of_any_characters_is_that_path_with_its_artifacts_beside_it(name, odd, made, tmp_path):
    file = tmp_path / (f"{name}/mlflow.db" if odd == "folder" else f"plain/{name}.db")
    if (name, odd) == ("a&b=c?d=e", "file"):
        pytest.skip("?d=e.db at the end is an option of SQLAlchemy's")
    file.parent.mkdir()
    shutil.copy(made, file)
    Path("note.txt").write_text("here", encoding="utf-8")
    where = tracking.Tracking(f"sqlite:///{file}", "fedlq", "key", 1)
    stores.require_usable(where.uri, where.experiment)
    client = stores.connect(where.uri)
    run_id = tracking.find_or_create(client, where, 'it\'s "any" `text`; -- %\n', "name", {}, 1)
    assert tracking.find_or_create(client, where, 'it\'s "any" `text`; -- %\n', "name", {}, 1) == run_id
    client.log_artifact(run_id, "note.txt")
    assert [found.path for found in client.list_artifacts(run_id)] == ["note.txt"]
    assert asked(file, "select run_uuid from runs") == [(run_id,)]
    assert list(file.parent.glob("mlruns/*/artifacts/note.txt"))
    assert {path.name for path in tmp_path.iterdir()} == {file.parent.name, "note.txt"}


def test_a_path_that_an_old_sqlalchemy_would_cut_is_refused(monkeypatch):
    import sqlalchemy.engine

    monkeypatch.setattr(
        sqlalchemy.engine, "make_url", lambda uri: SimpleNamespace(database=uri.removeprefix("sqlite:///"))
    )
    assert stores.for_mlflow("sqlite:////srv/a%20b.db") == "sqlite:////srv/a%20b.db"
    with pytest.raises(ConfigError, match=r"^tracking.uri: .*a\?b\.db: SQLAlchemy before 2\.1 takes no path with a \?"):
        simulate(Config(tracking={"uri": "sqlite:///a?b.db"}))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "is not an address of an MLflow store; name a file, such as sqlite:///mlflow.db"),
        ("mlruns", "no stores in folders any more; name a file"),
        ("file:///tmp/mlruns", "no stores in folders any more"),
        ("foo://x", "is not an address of an MLflow store"),
        ("sqlite://mlflow.db", "is not an address of an MLflow store; name a file, such as sqlite:///mlflow.db"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///none/mlflow.db", "there is no folder .*none; create it"),
        ("sqlite:///folder", "folder is not a file"),
        ("sqlite:///text.db", r"text\.db is not a SQLite database"),
        ("postgresql+psycopg2://h/d", "needs the Python package psycopg2; install it"),
        ("mysql://user:secret@h/d", r"mysql://user:\*\*\*@h/d: needs the Python package MySQLdb"),
        ("postgresql+none://h/d", "is not an address of a database"),
        ("http://", "is not an address of a server"),
        ("http://host:port", "is not an address of a server"),
    ],
)
def test_a_wrong_address_is_refused_before_anything_is_written(uri, message, tmp_path):
    Path("folder").mkdir()
    Path("text.db").write_text("no database, but longer than SQLite's header of a hundred bytes " * 3, encoding="utf-8")
    config = Config(tracking={"uri": uri}, clients={"hosting": "serial"}, rounds=1)
    with pytest.raises(ConfigError, match=f"^tracking.uri: .*{message}"):
        simulate(config)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "text.db"}


def test_a_store_that_may_answer_later_is_none_that_is_wrong(made, tmp_path, monkeypatch):
    Path("empty.db").touch()
    shutil.copy(made, "locked.db")
    lock = sqlite3.connect("locked.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    for uri in ("sqlite:///new.db", "sqlite:///empty.db", "sqlite:///locked.db?timeout=9", "http://127.0.0.1:9/x"):
        stores.require_usable(uri, "gone")
    stores.require_usable("databricks", "gone")
    lock.close()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    stores.require_usable("mlruns", "gone")
    assert {path.name for path in tmp_path.iterdir()} == {"empty.db", "locked.db"}


def test_a_deleted_experiment_is_refused_with_the_remedy(made):
    remedy = r"'gone' in sqlite.* is deleted; restore it \(mlflow experiments restore\), or choose another"
    with pytest.raises(ConfigError, match=f"^tracking.experiment: .*{remedy}"):
        stores.require(Config(tracking={"uri": f"sqlite:///{made}", "experiment": "gone"}).tracking)
    where = tracking.Tracking(f"sqlite:///{made}", "gone", "key", 1)
    with pytest.raises(ConfigError, match=remedy):  # as of a database that nothing could be known of before
        tracking.find_or_create(stores.connect(where.uri), where, "key", "name", {}, 1)


@pytest.mark.parametrize(
    ("status", "answer", "wrong"),
    [
        (200, {"experiment": {"lifecycle_stage": "deleted"}}, True),
        (200, {"experiment": {"lifecycle_stage": "active"}}, False),
        (200, ["no MLflow"], False),
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}, False),
        (401, {}, False),
    ],
)
def test_a_server_is_asked_for_the_experiment(status, answer, wrong):
    asked = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/"
        if wrong:
            with pytest.raises(ConfigError, match="^tracking.experiment: .* is deleted"):
                stores.require_usable(uri, "a b&c")
        else:
            stores.require_usable(uri, "a b&c")
        server.shutdown()
    assert asked == ["/api/2.0/mlflow/experiments/get-by-name?experiment_name=a+b%26c"]


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("sqlite:///mlflow.db", "sqlite:///../../mlflow.db"),
        ("sqlite:///../a?b/x.db?timeout=9", "sqlite:///../../../a?b/x.db?timeout=9"),
        ("sqlite:////srv/x.db", "sqlite:////srv/x.db"),
        ("sqlite:///~/x.db", "sqlite:///~/x.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_a_file_keeps_a_relative_address_from_its_own_folder(written, kept, tmp_path, monkeypatch):
    folder = tmp_path / "runs/demo-0"
    folder.mkdir(parents=True)
    assert stores.kept(written, folder) == kept
    here = stores.absolute(written)
    monkeypatch.chdir("/")
    assert stores.absolute(kept, folder) == here
    deeper = tmp_path / "runs/put/aside/demo-0"
    assert stores.absolute(stores.kept(kept, deeper, folder), deeper) == here


def test_variables_are_defaults_that_named_settings_beat(monkeypatch):
    assert stores.heard(Config().tracking) == [] and Config().tracking.uri == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    tracked = load(None, ["rounds=1"]).tracking
    assert (tracked.uri, tracked.experiment) == ("http://me:secret@host", "fedlq")
    assert stores.heard(tracked) == [
        "tracking.uri is http://me:***@host, from MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_ID is not used; MLFLOW_EXPERIMENT_NAME or tracking.experiment name the experiment",
    ]
    assert stores.heard(Config(tracking={"uri": None}).tracking) == []
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    Path("c.yaml").write_text("tracking: {uri: 'http://named'}\n", encoding="utf-8")
    named = load("c.yaml"), load(None, ["tracking.uri=http://named"]), Config(tracking={"uri": "http://named"})
    for config in named:
        assert config.tracking.uri == "http://named" and stores.heard(config.tracking) == []


def test_a_fault_names_the_variable_that_it_comes_from(monkeypatch, made):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(ConfigError, match="^MLFLOW_TRACKING_URI: 'mlruns'"):
        simulate(load(None, ["clients.hosting=serial"]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    with pytest.raises(ConfigError, match="^MLFLOW_EXPERIMENT_NAME: .* is deleted"):
        simulate(Config())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "x" * 501)
    with pytest.raises(ConfigError, match="^MLFLOW_EXPERIMENT_NAME: must have at most 500 characters"):
        Config()


def test_a_run_says_first_what_comes_from_the_environment_and_resumes_elsewhere(made, monkeypatch, capsys):
    from fedlq_ray.runs.progress import watch

    for name in ("env.db", "new.db"):
        shutil.copy(made, name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///env.db")
    monkeypatch.setattr(tracking, "_WAIT_S", 60)
    events = []
    config = load(None, ["rounds=1", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "out=here"])
    with watch(config) as show:
        simulate(config, watch=lambda event: (events.append(event), show(event)))
    assert isinstance(events[0], Prepared) and isinstance(events[1], Hosting)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "demo-0: digits: 1437 training and 360 test samples of 10 classes; grey images of 8x8; "
        "tracking.uri is sqlite:///env.db, from MLFLOW_TRACKING_URI"
    )
    assert "uri: sqlite:///env.db" in Path("here/config.yaml").read_text(encoding="utf-8")
    assert json.loads(Path("here/tracking.json").read_text(encoding="utf-8"))["uri"] == "sqlite:///../env.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    Path("here/summary.json").unlink()
    Path("env.db").write_text("spoilt " * 40, encoding="utf-8")
    before = Path("here/config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"^tracking.uri: .*env\.db is not a SQLite database"):
        resume("here", ["rounds=2"])
    assert Path("here/config.yaml").read_bytes() == before
    resume("here", ["rounds=2", "tracking.uri=sqlite:///new.db"])
    assert json.loads(Path("here/tracking.json").read_text(encoding="utf-8"))["uri"] == "sqlite:///../new.db"
    assert asked("new.db", "select count(*) from metrics where key = 'accuracy'") == [(2,)]
