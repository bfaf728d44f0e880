import math
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fedlq_ray import Config, ConfigError
from fedlq_ray.config.load import load, to_yaml
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.sweeps.sweep import load as load_sweep

AS_WRITTEN = ["0123", "1:30", "1_000", "1234e8", "0x1F", "0b11", "1e3", "yes", "2026-01-01", ".5", "+7", "007"]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_text_stays_as_it_is_written(text, tmp_path):
    paths = ("tracking.experiment", "data.path", "strategy.quantizer", "clients.profiles", "out")
    for path in paths:
        section, _, name = path.rpartition(".")
        (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: {text}\n" if section else f"{name}: {text}\n")
        for config in (load(None, [f"{path}={text}"]), load(tmp_path / "c.yaml")):
            assert getattr(getattr(config, section) if section else config, name) == text
    written = load(None, [f"data.path={text}"])
    (tmp_path / "again.yaml").write_text(to_yaml(written))
    assert load(tmp_path / "again.yaml").data.path == text


def test_a_name_keeps_its_zeros_and_its_quotes_are_taken_off(tmp_path):
    assert load(None, ["name=0123"]).name == "0123"
    assert load(None, ["name='0123'"]).name == load(None, ['name="0123"']).name == "0123"
    (tmp_path / "c.yaml").write_text("name: 0123\ndata: {path: 1_000, alpha: 1_000}\n")
    config = load(tmp_path / "c.yaml")
    assert config.name == "0123" and config.data.path == "1_000" and config.data.alpha == 1000


@pytest.mark.parametrize("text", ["{a}", "[b", "a: b", "@x", "%x", "*x", "&x", "!x", "#x", "x #y", "`x", "a, b"])
def test_text_may_hold_what_yaml_reserves(text):
    assert load(None, [f"data.path={text}"]).data.path == text


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_null_is_none_where_a_text_may_be_null(null):
    config = load(None, [f"tracking.uri={null}", f"data.path={null}"])
    assert config.tracking.uri is None and config.data.path is None
    assert load(None, ["name=null"]).name == "null"


def test_interpolations_work_in_text():
    assert load(None, ["strategy.name=uniform", "name=${strategy.name}-1"]).name == "uniform-1"


def test_a_sweep_keeps_text_and_the_names_of_its_runs(tmp_path):
    (tmp_path / "s.yaml").write_text("base: {name: 0123, rounds: 1}\nruns: {010: [], 1_0: [data.path=007]}\n")
    comparison = load_sweep(tmp_path / "s.yaml")
    assert list(comparison.runs) == ["010", "1_0"]
    assert comparison.runs["010"][0].name == "0123-010" and comparison.runs["1_0"][0].data.path == "007"


def test_python_takes_what_means_the_same():
    config = Config(
        out=Path("runs/x"),
        seed=np.int64(1),
        rounds=np.int32(4),
        stop_at_target=np.bool_(False),
        strategy={"levels": [1, 2, 4], "budget": "bits", "bits": np.float32(2.5)},
        data={"path": Path("d.npz"), "alpha": np.float64(0.5)},
        train=TrainConfig(lr=np.float64(0.2)),
    )
    assert config.out == "runs/x" and config.data.path == "d.npz" and config.train.lr == 0.2
    assert type(config.seed) is int and type(config.rounds) is int and config.strategy.bits == 2.5
    for levels in ((1, 2, 4), np.array([1, 2, 4]), range(1, 4)):
        assert Config(strategy={"levels": levels}).strategy.levels == tuple(int(level) for level in levels)
    assert load(None, ["strategy.levels=[1,2,4]"]).strategy.levels == (1, 2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roundz": 3}, r"^roundz: unknown key; did you mean rounds\?$"),
        ({"rounds": 0}, r"^rounds: .*greater than or equal to 1 \(given: 0\)$"),
        ({"rounds": 2.5}, r"^rounds: .*valid integer \(given: 2\.5\)$"),
        ({"rounds": "3"}, r"^rounds: .*valid integer \(given: '3'\)$"),
        ({"train": {"lr": -1, "momentum": math.nan}}, r"^train\.lr: .*\ntrain\.momentum: .*finite"),
        ({"strategy": {"levels": {1, 2}}}, r"^strategy\.levels: "),
        ({"clients": {"cohort": 9, "count": 3}}, r"^clients\.cohort \(9\) must not be larger"),
        ({"server": {"buffer": 11}}, r"^server\.buffer \(11\) must not be larger than clients\.cohort \(10\)"),
        ({"server": {"max_staleness": 2}}, r"^server\.max_staleness: .*; set server\.buffer or server\.deadline_s$"),
        (
            {"server": {"buffer": 5, "max_staleness": None}, "train": {"adaptive_work": 2}},
            r"^train\.adaptive_work .*server\.max_staleness=0$",
        ),
        (
            {"server": {"buffer": 5, "max_staleness": None}, "strategy": {"name": "signsgd"}},
            r"^strategy\.name=signsgd: .*server\.max_staleness=0$",
        ),
        ({"server": {"deadline_s": 0}}, r"^server\.deadline_s: .*greater than 0"),
    ],
)
def test_python_has_the_same_messages(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_sections_have_them_too_and_nothing_can_be_changed():
    with pytest.raises(ConfigError, match=r"^lr: .*greater than 0"):
        TrainConfig(lr=-1)
    with pytest.raises(
        ConfigError,
        match=r"rounds: settings cannot be changed; use model_copy\(update=\{'rounds': \.\.\.\}\)",
    ):
        Config().rounds = 3
    with pytest.raises(ConfigError, match="settings cannot be changed"):
        Config().train.lr = 3.0


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (nn.GELU, "act is a type"),
        (lambda x: x, "act is a function"),
        (nn.GELU(), "act is a GELU"),
        ({1: 2}, "act is a dict with keys that are not text"),
        ([1, {"deep": {1}}], r"act\[1\]\.deep is a set"),
        (1j, "act is a complex"),
    ],
)
@pytest.mark.parametrize("section", ["model", "strategy", "data"])
def test_arguments_that_config_yaml_cannot_hold_are_refused(section, value, what):
    with pytest.raises(
        ConfigError, match=rf"^{section}\.args: {what}, and config\.yaml holds only .*functools\.partial"
    ):
        Config(**{section: {"name": "own:part", "args": {"act": value}}})


def test_numpy_and_paths_in_arguments_become_plain(tmp_path):
    args = {
        "hidden": np.int64(3),
        "rate": np.float32(0.5),
        "wide": np.arange(2),
        "at": Path("x"),
        "deep": ({"a": np.int8(1)},),
    }
    config = Config(model={"args": args})
    assert config.model.args == {"hidden": 3, "rate": 0.5, "wide": [0, 1], "at": "x", "deep": ({"a": 1},)}
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "c.yaml").model.args["wide"] == [0, 1]


def test_every_door_has_the_same_manners():
    for door in (
        lambda **s: Config(**s),
        lambda **s: Config.model_validate(s),
        lambda **s: Config().model_copy(update=s),
    ):
        assert door(seed=np.int64(3), out=Path("x")).out == "x" and type(door(seed=np.int64(3)).seed) is int
        with pytest.raises(ConfigError, match=r"^rounds: .*\nunknown: unknown key"):
            door(rounds=0, unknown=1)
    changed = Config().model_copy(update={"train": TrainConfig(lr=0.2)})
    assert changed.train.lr == 0.2 and changed.model_copy() == changed
