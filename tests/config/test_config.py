import pytest

from fedlq_ray import Config, ConfigError, simulate
from fedlq_ray.config.load import digest, load, to_yaml
from fedlq_ray.config.sections import keys


def test_what_is_written_reads_back_the_same(tmp_path):
    config = load(None, ["rounds=3", "rounds=4", "name=12", "strategy.levels=[1,2,8]", "train.lr=1e-2"])
    assert (config.rounds, config.name, config.strategy.levels, config.train.lr) == (4, "12", (1, 2, 8), 0.01)
    for commented in (False, True):
        (tmp_path / "c.yaml").write_text(to_yaml(config, commented=commented))
        assert load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr: unknown key; did you mean train.lr?"),
        ("cohort=3", "cohort: unknown key; did you mean clients.cohort?"),
        ("rounds=many", "rounds: .*integer.*many"),
        ("rounds=true", "rounds: .*integer"),
        ("train.lr=-1", "train.lr: .*greater than 0.*-1"),
        ("train.lr=.nan", "train.lr: .*finite"),
        ("train.lr=.inf", "train.lr: .*finite"),
        ("clients.cohort=51", r"clients.cohort \(51\).*clients.count \(50\)"),
        ("strategy.budget=deadline", "deadline_s"),
        ("strategy.levels=[3,1]", "rise"),
        ("rounds", "neither a file nor key=value|no such file"),
        ("name=../x", "name: "),
    ],
)
def test_each_fault_is_told_with_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_all_faults_come_at_once():
    with pytest.raises(ConfigError) as caught:
        load(None, ["rounds=0", "train.lr=0", "sed=1"])
    assert all(word in str(caught.value) for word in ("rounds:", "train.lr:", "seed"))


def test_the_digest_covers_what_can_change_a_result():
    base = digest(Config())
    for same in ("name=x", "out=y", "tracking.uri=null", "clients.hosting=serial", "clients.actors=2"):
        assert digest(load(None, [same])) == base
    for other in ("seed=1", "train.lr=0.2", "strategy.floor_bits=3", "clients.dropout=0.1"):
        assert digest(load(None, [other])) != base


def test_every_key_has_a_meaning():
    assert all(field.description for _, field, _ in keys(Config)) and len(list(keys(Config))) > 40


def test_a_dict_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "strategy: {name: 'my:own', args: {fraction: 0.1}}\nclients: {resources: {big: 1}}"
    )
    found = load(tmp_path / "c.yaml", ["clients.resources={small: 2}", "strategy.bits=3"])
    assert found.clients.resources == {"small": 2} and found.strategy.args == {"fraction": 0.1}
    assert load(tmp_path / "c.yaml", ["strategy.args={}"]).strategy.args == {}
    assert load(tmp_path / "c.yaml", ["strategy.args.x=1"]).strategy.args == {"fraction": 0.1, "x": 1}
    assert load(None, ["strategy={name: uniform}", "strategy.bits=3"]).strategy.name == "uniform"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.path=nowhere.npz"], "data.path: digits is part of fedlq_ray"),
        (["strategy.name=dadaquant", "strategy.phi=2.5"], r"^strategy.phi: input should be a valid integer .*2.5"),
        (["strategy.name=fedpaq", "strategy.levels=7.5"], r"^strategy.levels: input should be a valid integer"),
    ],
)
def test_what_cannot_be_is_told_before_a_round(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        simulate(load(None, [*settings, f"out={tmp_path}/run", "tracking.uri=null", "clients.hosting=serial"]))
    assert not (tmp_path / "run").exists()


def test_documented_defaults_do_not_depend_on_the_environment(monkeypatch):
    def documented():
        return {path: default for path, _, default in keys(Config)}, Config.model_json_schema()

    before = documented()
    assert before[0]["tracking.uri"] == "sqlite:///mlflow.db" and before[0]["tracking.experiment"] == "fedlq"
    assert before[1]["$defs"]["TrackingConfig"]["properties"]["uri"]["default"] == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    assert documented() == before
    assert "http://elsewhere" in to_yaml(Config(), commented=True)  # what a run would have
