"""Sweeps and comparisons as calls: the rows of the commands, and their errors before anything is written."""

import json

import pytest

import fedlq_ray

BASE = {
    "rounds": 2,
    "clients": {"count": 6, "cohort": 3, "hosting": "serial"},
    "train": {"max_samples": 16, "local_epochs": 1},
    "tracking": {"uri": None},
}
RUNS = {"fedavg": ["strategy.name=fedavg"], "uniform": ["strategy.name=uniform", "strategy.bits=2"]}


def test_a_sweep_and_a_comparison_of_its_folder_have_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlq_ray.sweeps.many.abreast", lambda configs: [])  # without Ray: the runs are tiny
    found = fedlq_ray.sweep({"base": BASE, "runs": RUNS, "seeds": [0, 1]}, out=tmp_path / "s")
    assert list(found.table["run"]) == ["fedavg", "uniform"] and list(found.table["seeds"]) == [2, 2]
    assert [len(folders) for folders in found.runs.values()] == [2, 2]
    assert {"table.json", "accuracy.png", "report.html"} <= {file.name for file in (tmp_path / "s").iterdir()}
    assert json.loads((tmp_path / "s" / "table.json").read_text())["rows"][1]["run"] == "uniform"
    again = fedlq_ray.compare(tmp_path / "s")
    assert list(again.table["uplink_mb"]) == list(found.table["uplink_mb"]) and again.path is None
    assert "uniform" in found._repr_html_()
    with pytest.raises(fedlq_ray.ConfigError, match="no run x"):
        fedlq_ray.compare(tmp_path / "s", reference="x")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"runs": {}}, "runs is required"),
        ({"runs": {"a": ["strategy.name=lgreco", "strategy.floor_bits=2"]}}, "strategy.floor_bits: lgreco does not"),
        ({"runs": {"a": []}, "seed": [1]}, "a sweep has"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_is_written(runs, message, tmp_path):
    with pytest.raises(fedlq_ray.ConfigError, match=message):
        fedlq_ray.sweep(runs, out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_what_the_base_sets_for_another_strategy_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlq_ray.sweeps.many.abreast", lambda configs: [])
    base = BASE | {"strategy": {"name": "fedlq", "probe_samples": 16}}
    runs = {"fedlq": [], "fedavg": ["strategy.name=fedavg"]}
    found = fedlq_ray.sweep({"base": base, "runs": runs}, out=tmp_path / "s")
    assert list(found.table["run"]) == ["fedlq", "fedavg"]
