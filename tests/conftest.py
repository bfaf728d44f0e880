"""What every test shares: no writing to the user's home, and one thread, as client processes have."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from faults import KINDS, evidence, start

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token to the home folder
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
subprocess.Popen = warm.Popen
# A shell's background job ignores SIGINT, and so do the programs that it starts: tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, in the order in which they start: none is left for one process at the end.
LONGEST = (
    "hosts/test_ray_faults.py", "cluster/test_jobs.py", "runs/test_output.py", "hosts/test_ray.py",
    "sweeps/test_many.py", "docs/test_docs_code.py", "models/test_adapters.py",
    "cli/test_cli.py", "test_wheel.py", "runs/test_fault_points.py",
    "tracking/test_tracking_faults.py", "test_startup.py", "tracking/test_tracking.py", "sweeps/test_sweep.py",
    "runs/test_resume.py", "training/test_own.py",
    "cluster/test_nodes.py", "hosts/test_ray_points.py", "hosts/test_forkserver.py",
    "analysis/test_compare.py", "hosts/test_raysession.py", "docs/test_notebooks.py", "docs/test_site.py",
    "quantization/test_contract.py", "quantization/test_eden.py", "significance/test_bounds.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    root = Path(__file__).parent
    ranks = {str(root / name): rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))  # keeps the order within a file


@pytest.fixture(scope="session", autouse=True)
def no_variables_of_mlflow_at_first():
    """Variables of MLflow's are defaults of settings: modules' fixtures must not see them."""
    _forget_variables_of_mlflow()


@pytest.fixture(autouse=True)
def no_variables_of_mlflow():
    """The same for each test: MLflow's server and `mlflow.set_tracking_uri` set them."""
    _forget_variables_of_mlflow()


def _forget_variables_of_mlflow():
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(variable, None)


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory):
    """A Ray of two cores for a module's tests, which are in a folder of their own."""
    import ray

    from fedlq_ray.hosts.ray import starter

    where = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("runs"))
    with starter.forking():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.chdir(where)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The bytes of a run without a fault, of each kind of tests/faults.py."""
    found = {}
    for kind, settings in KINDS.items():
        out = tmp_path_factory.mktemp("whole") / kind
        start(out, *settings)
        found[kind] = evidence(out)
    return found


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    """The file of an empty store with MLflow's tables, to be copied: making one takes two seconds."""
    from fedlq_ray.tracking import stores

    folder = tmp_path_factory.mktemp("store")
    stores.connect(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def cold(monkeypatch):
    """Programs start as always, not forked from one that has imported what they need (tests/warm.py)."""
    monkeypatch.setenv(warm.COLD, "1")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test's own folder is the working directory."""
    monkeypatch.chdir(tmp_path)
