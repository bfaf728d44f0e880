# Every command makes .venv first, where it is missing or older than what defines it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test reliability check docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "fedlq-ray needs Python 3.11 to 3.13, this is %d.%d; name another with: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

demo: install
	$(BIN)/fedlq demo

# Three processes for two cores: tests under Ray mostly wait. A file's tests stay together, for they share a Ray; the files
# that take longest come first (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST)

# What `test` has of docs/reliability.md, alone.
reliability: install
	$(PYTEST) $(addprefix tests/,runs federation/test_fold.py test_hostile.py tracking/test_tracking_faults.py hosts/test_ray_faults.py hosts/test_ray_points.py)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/build.py

clean:
	rm -rf .venv build dist *.egg-info
