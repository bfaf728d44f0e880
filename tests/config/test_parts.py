"""From a name to a part."""

import sys

import pytest

from fedlq_ray.config import parts
from fedlq_ray.errors import ConfigError


@pytest.fixture
def importable(own_folder, monkeypatch, tmp_path):
    """The working directory, after all libraries."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])


def test_a_module_of_python_comes_before_ones_own_of_that_name(importable, tmp_path):
    (tmp_path / "queue.py").write_text("def make(): pass\n")
    with pytest.raises(ConfigError, match=r"'queue' has no 'make'; it is .*queue.py, which comes before your queue.py"):
        parts.find("model.name", "queue:make", {})
    (tmp_path / "json").mkdir()
    (tmp_path / "json/__init__.py").write_text("def make(): pass\n")
    with pytest.raises(ConfigError, match=r"your json/__init__.py: rename yours"):
        parts.find("model.name", "json:make", {})
    (tmp_path / "sys.py").touch()
    with pytest.raises(ConfigError, match="it is a part of Python, which comes before your sys.py"):
        parts.find("model.name", "sys:make", {})


def test_a_module_without_the_attribute_is_nothing_else(importable, tmp_path):
    (tmp_path / "part_of_mine.py").write_text("def make(): pass\n")
    assert parts.find("model.name", "part_of_mine:make", {}).__name__ == "make"
    with pytest.raises(ConfigError, match=r"'part_of_mine' has no 'other'$"):
        parts.find("model.name", "part_of_mine:other", {})
    with pytest.raises(ConfigError, match=r"'math' has no 'other'$"):
        parts.find("model.name", "math:other", {})
