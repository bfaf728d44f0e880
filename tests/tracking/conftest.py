"""A store with MLflow's tables for each test: making them takes two seconds. `test_stores.py` makes its own."""

import shutil
from pathlib import Path

import pytest

from fedlq_ray.tracking import stores


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    stores.connect(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def own_folder(tmp_path, monkeypatch, new_store):
    """The test's own folder, with an empty store, is the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(new_store, Path("mlflow.db"))
