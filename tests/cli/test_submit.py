"""What `fedlq submit` uploads."""

import zipfile
from pathlib import Path

import fedlq_ray
from fedlq_ray.cli.submit import EXCLUDES

PACKAGE = Path(fedlq_ray.__file__).parent


def uploaded(folder, archive):
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), archive, include_gitignore=True, excludes=EXCLUDES)
    return {name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/")}


def test_the_package_is_uploaded_with_all_its_modules(tmp_path):
    modules = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")}
    assert modules <= uploaded(PACKAGE, tmp_path / "package.zip")
    assert "runs/rundir.py" in modules


def test_earlier_runs_and_stores_stay_here(tmp_path):
    here = tmp_path / "work"
    for name in ("own.py", "runs/a-0/model.safetensors", "x/runs/b/c/rounds.jsonl", "mlflow.db", "mlruns/1/meta.yaml"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    assert uploaded(here, tmp_path / "here.zip") == {"own.py"}
