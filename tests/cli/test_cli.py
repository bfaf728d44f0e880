"""The command, as a user calls it."""

import json
import subprocess
import sys

import numpy as np
import pytest

FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]
SERIAL = ["clients.hosting=serial", "tracking.uri=null", "rounds=2"]


def fedlq(*arguments, cwd):
    return subprocess.run([*FEDLQ, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_prints_its_result_and_json_for_machines(tmp_path):
    plain = fedlq("run", *SERIAL, cwd=tmp_path)
    assert plain.returncode == 0 and "final accuracy" in plain.stdout and "round 2/2" in plain.stderr
    machine = fedlq("run", "--json", *SERIAL, cwd=tmp_path)
    lines = [json.loads(line) for line in machine.stdout.splitlines()]
    assert [line.get("round") for line in lines] == [0, 1, None]
    assert lines[-1]["path"] == "runs/demo-0-2"


def test_config_and_schema(tmp_path):
    shown = fedlq("config", "rounds=7", cwd=tmp_path).stdout
    assert "rounds: 7" in shown and "unit: bits per parameter" in shown
    assert "properties" in json.loads(fedlq("config", "--schema", cwd=tmp_path).stdout)


def test_own_parts_are_found_in_the_working_directory(tmp_path):
    (tmp_path / "my_part.py").write_text(
        "from torch import nn\nimport numpy as np\n"
        "def model(input_shape, num_classes): return nn.Linear(input_shape[0], num_classes)\n"
        "def data():\n x = np.random.default_rng(0).random((300, 4)); y = np.arange(300) % 3\n return x, y, x, y\n"
    )
    own = ["data.name=my_part:data", "model.name=my_part:model", "clients.count=5", "clients.cohort=2"]
    done = fedlq("run", *SERIAL, *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-500:]


def wrong_inputs(folder):
    x, y = np.ones((60, 3)), np.arange(60) % 3
    np.savez(folder / "no_y.npz", x_train=x, y_train=y, x_test=x)
    np.savez(folder / "nan.npz", x_train=np.full((60, 3), np.nan), y_train=y, x_test=x, y_test=y)
    np.savez(folder / "range.npz", x_train=x, y_train=y, x_test=x, y_test=y + 9)
    (folder / "few.csv").write_text("uplink_mbps,downlink_mbps,latency_ms\n1,1,1\n")
    (folder / "negative.csv").write_text("uplink_mbps,downlink_mbps,latency_ms,compute_gflops\n" + "-1,1,1,1\n" * 50)
    (folder / "seven.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lrr=1"], "did you mean train.lr"),
        (["rounds=x"], "rounds"),
        (["clients.cohort=99"], "clients.count"),
        (["nowhere.yaml"], "no such file"),
        (["data.name=npz", "data.path=none.npz"], "none.npz: no such file"),
        (["data.name=npz", "data.path=no_y.npz"], "has no y_test"),
        (["data.name=npz", "data.path=nan.npz"], "NaN"),
        (["data.name=npz", "data.path=range.npz"], "y_test[0] is 9"),
        (["model.name=seven:make"], "10 classes"),
        (["model.name=nomodule:make"], "cannot import"),
        (["strategy.name=fedlk"], "did you mean 'fedlq'"),
        (["clients.profiles=few.csv"], "compute_gflops"),
        (["clients.profiles=negative.csv"], "uplink_mbps"),
    ],
)
def test_wrong_input_is_one_message_and_code_2_and_nothing_is_written(arguments, message, tmp_path):
    wrong_inputs(tmp_path)
    before = {f.name for f in tmp_path.iterdir()}
    done = fedlq("run", *SERIAL, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-600:]
    assert {f.name for f in tmp_path.iterdir()} - {"__pycache__"} == before


def test_a_failed_run_has_code_1(tmp_path):
    failed = fedlq("run", *SERIAL, "train.lr=1000", "rounds=20", cwd=tmp_path)
    assert failed.returncode == 1 and "training diverged: layer" in failed.stderr


def test_layers_makes_a_table_and_a_heat_map(tmp_path):
    done = fedlq("layers", *SERIAL, "strategy.payload=model", cwd=tmp_path)
    assert done.returncode == 0 and "significance" in done.stdout, done.stderr[-500:]
    assert (tmp_path / "layers.png").stat().st_size > 5000
