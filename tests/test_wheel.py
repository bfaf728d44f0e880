"""The built wheel, installed elsewhere, has all that a run needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def call(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_runs_the_demo_from_another_folder(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "fedlq_ray", source / "fedlq_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("fedlq_ray-*.whl")
    call("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = call("-c", "import fedlq_ray; print(fedlq_ray.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(site) and (site / "fedlq_ray/py.typed").exists()
    quick = ("rounds=2", "clients.hosting=serial", "tracking.uri=null", "clients.profiles=mobile")
    told = call("-m", "fedlq_ray.cli", "demo", *quick, cwd=tmp_path, env=environment)
    assert "fedlq" in told and (tmp_path / "runs/demo/accuracy.png").exists()
