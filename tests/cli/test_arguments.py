"""What commands take: files among key=value, folders, and `~` in every path."""

import os
import pwd
import signal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from faults import round_of

from fedlq_ray import Config, ConfigError, resume, simulate
from fedlq_ray.cli import main as cli
from fedlq_ray.cli import submit
from fedlq_ray.cli.arguments import PATH, split
from fedlq_ray.config.load import load
from fedlq_ray.data import datasets
from fedlq_ray.runs.interrupts import Terminated
from fedlq_ray.tracking import stores

pytestmark = pytest.mark.usefixtures("own_folder")

SERIAL = ["rounds=1", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "tracking.uri=null"]


def fedlq(*arguments):
    """What a command prints; raises what it raises."""
    done = CliRunner().invoke(cli.cli, list(arguments), catch_exceptions=False)
    return done.output


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder beside the working directory."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def no_home(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])


def test_an_argument_that_is_a_file_is_the_file():
    Path("runs/lr=0.1").mkdir(parents=True)
    Path("runs/lr=0.1/config.yaml").write_text("rounds: 7\n", encoding="utf-8")
    Path("rounds=3").write_text("seed: 5\n", encoding="utf-8")
    assert split(["seed=1", "runs/lr=0.1/config.yaml", "seed=2"]) == ("runs/lr=0.1/config.yaml", ["seed=1", "seed=2"])
    assert split(["rounds=3"]) == ("rounds=3", []) and split(["rounds=4"]) == (None, ["rounds=4"])
    assert split(["x" * 5000 + "=1"]) == (None, ["x" * 5000 + "=1"])
    assert split(["clients.labels.zone/a=b"]) == (None, ["clients.labels.zone/a=b"])
    assert "rounds: 7" in fedlq("config", "runs/lr=0.1/config.yaml", "seed=3")
    assert "rounds: 7" in fedlq("config", "seed=3", "./runs/lr=0.1/config.yaml")


@pytest.mark.parametrize("command", ["run", "config", "layers", "submit"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["runs/lr=0.1"],
            "runs/lr=0.1: is a folder; runs/lr=0.1/config.yaml runs it again, and fedlq resume runs/lr=0.1",
        ),
        (["empty"], "empty: is a folder; give a configuration file"),
        (["one.yaml", "rounds=2", "two.yaml"], "one.yaml and two.yaml: only one of the arguments may be a file"),
        (["one.yaml", "none.yaml"], "one.yaml and none.yaml: only one"),
        (["runs/lr=0.1/confg.yaml"], "runs/lr=0.1/confg.yaml: no such file, and runs/lr is not a setting"),
        (["none.yaml"], "none.yaml: no such file, and no key=value"),
    ],
)
def test_folders_two_files_and_missing_ones_are_told(command, arguments, message):
    for folder in ("runs/lr=0.1", "empty", "train.lr=0.1"):
        Path(folder).mkdir(parents=True)
    for file in ("runs/lr=0.1/config.yaml", "one.yaml", "two.yaml"):
        Path(file).write_text("rounds: 1\n", encoding="utf-8")
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(ConfigError) as caught:
        fedlq(command, *arguments)
    assert str(caught.value).startswith(message) and sorted(Path.cwd().rglob("*")) == before


def test_a_setting_is_one_where_a_folder_has_its_name():
    Path("train.lr=0.1").mkdir()
    assert "lr: 0.1" in fedlq("config", "train.lr=0.1")


def test_every_path_of_the_settings_takes_the_home_folder(home):
    found = datasets.load("digits")
    digits = {name: getattr(found, name) for name in datasets.ARRAYS}
    np.savez(home / "x.npz", **digits)
    row = "1,1,1,1\n"
    (home / "p.csv").write_text("uplink_mbps,downlink_mbps,latency_ms,compute_gflops\n" + row * 8, encoding="utf-8")
    places = [
        "data.name=npz",
        "data.path=~/x.npz",
        "clients.profiles=~/p.csv",
        "checkpoint.path=~/saved",
        "checkpoint.every_rounds=1",
    ]

    def stop(event):
        if round_of(event) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        simulate(load(None, [*SERIAL, *places, "rounds=8", "out=~/x"]), watch=stop)
    assert list((home / "saved").glob("*.ckpt"))
    written = (home / "x/config.yaml").read_text(encoding="utf-8")
    assert "~/x.npz" in written and "~/p.csv" in written and "~/saved" in written and str(home) not in written
    result = resume("~/x")
    assert result.path == home / "x" and not list((home / "saved").glob("*"))
    assert {path.name for path in Path.cwd().iterdir()} == {"home"}


def test_a_store_in_the_home_folder(home):
    settings = Config(tracking={"uri": "sqlite:///~/a?b.db"}).tracking
    stores.require(settings)
    assert stores.sqlite_file(settings.uri) == home / "a?b.db"
    assert stores.for_mlflow(settings.uri).endswith("%2Fhome%2Fa%3Fb.db")
    (home / "a?b.db").touch()
    assert cli._store("sqlite:///~/a?b.db") == settings.uri


def test_every_path_of_a_command_takes_the_home_folder(home):
    options = {
        f"{name} {param.opts[0]}": param.type
        for name, command in cli.cli.commands.items()
        for param in command.params
        if any(word in param.opts[0] for word in ("out", "dir", "folder", "file", "where", "sources", "run"))
        and not param.opts[0].endswith(("-wait", "arguments"))
    }
    assert len(options) >= 13 and [name for name, kind in options.items() if kind is not PATH] == []
    (home / "c.yaml").write_text("rounds: 9\n", encoding="utf-8")
    assert "rounds: 9" in fedlq("config", "~/c.yaml")
    simulate(load(None, [*SERIAL, "out=~/x"]))
    with pytest.raises(ConfigError, match=f"{home}/x: the run is finished"):
        fedlq("resume", "~/x")
    fedlq("compare", "~/x", "--out=~/table.txt")
    assert (home / "table.txt").is_file() and {path.name for path in Path.cwd().iterdir()} == {"home"}


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("out=~/x", "out"),
        ("data.path=~/x.npz", "data.path"),
        ("clients.profiles=~/p.csv", "clients.profiles"),
        ("checkpoint.path=~/c", "checkpoint.path"),
        ("tracking.uri=sqlite:///~/x.db", "tracking.uri"),
        ("out=~no-such-user/x", "out"),
    ],
)
def test_without_a_home_folder_the_setting_is_named(setting, name, no_home):
    more = ["data.name=npz"] if name == "data.path" else []
    with pytest.raises(ConfigError, match=rf"^{name}: ~.*: there is no home folder ~.*; write the whole path"):
        simulate(load(None, [*SERIAL, *more, setting]))
    assert not list(Path.cwd().iterdir())


def test_without_a_home_folder_an_option_is_named_and_what_needs_none_works(no_home, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="^--out: ~/x: there is no home folder ~"):
        fedlq("report", "runs/x", "--out=~/x")
    with pytest.raises(ConfigError, match="^RUN_DIR: ~/x: there is no home folder"):
        fedlq("resume", "~/x")
    monkeypatch.setattr(datasets, "_idx_folder", lambda folder: None)
    with pytest.raises(ConfigError, match=r"mnist was not found in .*no home folder to download it to; .*data\.path"):
        datasets.load("mnist")
    found = datasets.load("digits")
    arrays = tuple(getattr(found, name) for name in datasets.ARRAYS)
    monkeypatch.setattr(datasets, "_idx_folder", lambda folder: arrays if folder == Path("data/MNIST/raw") else None)
    assert datasets.load("mnist").name == "mnist"


def test_results_of_a_job_are_fetched_to_the_home_folder(home):
    config = Config(out="~/x")
    assert not submit._stays(config) and submit._local(config) == home / "x"
    (home / "x").mkdir()
    with pytest.raises(ConfigError, match="out: .*home/x already exists"):
        submit._local(config)
