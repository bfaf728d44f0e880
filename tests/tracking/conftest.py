"""The store of each test has MLflow's tables: making them takes two seconds. `test_stores.py` makes its own."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def own_folder(tmp_path, monkeypatch, new_store):
    """The test's own folder, with an empty store, is the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(new_store, Path("mlflow.db"))
