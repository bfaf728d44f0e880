"""`ray up`, `ray exec`, `ray submit`, `ray down` with cluster/local.yaml, over a real sshd.

Ray's launcher runs `ray stop`, which ends every Ray that it sees, uses fixed ports, and writes into the home folder. So
all of this happens in namespaces of its own: processes, network, and mounts, with an empty home and an empty /tmp/ray.
"""

import getpass
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
NAMESPACES = ["unshare", "--pid", "--mount", "--net", "--fork", "--mount-proc", "--kill-child"]
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])
CONFIG = "name: small\nrounds: 3\nclients: {count: 5, cohort: 3, hosting: packed, actors: 1}\ntracking: {uri: null}\n"


def missing():
    """Why this cannot be run here, or None."""
    lacking = [tool for tool in ("unshare", "ssh", "ssh-keygen", "rsync", "ip", "mount") if not shutil.which(tool)]
    if lacking or not SSHD:
        return f"not installed: {', '.join(lacking + ([] if SSHD else ['sshd']))}"
    if subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode:
        return "namespaces cannot be made here"
    return None


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.skipif("FEDLQ_CLUSTER" not in os.environ, reason="takes minutes; FEDLQ_CLUSTER=1 runs it")
def test_up_exec_submit_and_down_over_ssh(tmp_path):
    why = missing()
    if why:
        pytest.skip(why)
    script = [*NAMESPACES, sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert "1 node" in told["status"] or "Active:" in told["status"], told
    assert told["left"] == [] and told["before"] > 0
    from fedlq_ray import simulate
    from fedlq_ray.config.load import load

    settings = load(tmp_path / "small.yaml", ["clients.hosting=serial", f"out={tmp_path}/serial"])
    assert simulate(settings).summary["weights_sha256"] == told["weights_sha256"]


def inside(folder):
    """In the namespaces: a home, an sshd, and the four commands."""
    home = Path.home()
    python = Path(sys.base_prefix)
    kept = home / python.relative_to(home).parts[0] if python.is_relative_to(home) else None
    if kept:  # this Python lies in the home that is to be covered
        (folder / "kept").mkdir()
        call("mount", "--bind", str(kept), str(folder / "kept"))
    Path("/tmp/ray").mkdir(exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for covered in (home, "/tmp/ray"):
        call("mount", "-t", "tmpfs", "-o", "mode=700", "none", str(covered))
    if kept:
        kept.mkdir()
        call("mount", "--bind", str(folder / "kept"), str(kept))
    call("ip", "link", "set", "lo", "up")

    (home / ".ssh").mkdir(mode=0o700)
    for key in (home / ".ssh/id_ed25519", folder / "host_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    shutil.copy(home / ".ssh/id_ed25519.pub", home / ".ssh/authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nListenAddress 127.0.0.1:22\nPasswordAuthentication no\n"
    )
    subprocess.Popen([SSHD, "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")])

    # The environment stands for what pip would have installed.
    (home / "fedlq").mkdir()
    (home / "fedlq/venv").symlink_to(sys.prefix)
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("ab" * 32)
    (home / ".bashrc").write_text(f"export PYTHONPATH={ROOT}\n")
    (folder / "dist").mkdir()
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / "small.yaml").write_text(CONFIG)
    config = yaml.safe_load((ROOT / "cluster/local.yaml").read_text())
    config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    config |= {"min_workers": 0, "max_workers": 0}
    config["auth"]["ssh_user"] = getpass.getuser()
    config["setup_commands"] = [line for line in config["setup_commands"] if "pip install" not in line]
    config["head_start_ray_commands"][1] += " --num-cpus=1 --disable-usage-stats"
    (folder / "local.yaml").write_text(yaml.safe_dump(config))

    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    for command in (["up", "-y"], ["rsync-up"]):
        call(*ray, *command, "local.yaml", *(["small.yaml", "small.yaml"] if "rsync-up" in command else []), cwd=folder)
    status = call(*ray, "exec", "local.yaml", "RAY_AUTH_MODE=token ray status", cwd=folder)
    run = ["--", "small.yaml", f"out={folder}/run"]
    call(*ray, "submit", "local.yaml", str(ROOT / "cluster/run.py"), *run, cwd=folder)
    before = len(raylets())
    call(*ray, "down", "-y", "local.yaml", cwd=folder)
    end = time.monotonic() + 30
    while raylets() and time.monotonic() < end:
        time.sleep(0.5)
    summary = json.loads((folder / "run/summary.json").read_text())
    told = {"status": status, "before": before, "left": raylets(), "weights_sha256": summary["weights_sha256"]}
    print(json.dumps(told))


def call(*command, cwd=None):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def raylets():
    """Of this namespace; who has ended and is not waited for does not count."""
    found = [file.read_text().rsplit(")", 1) for file in Path("/proc").glob("[0-9]*/stat")]
    return [head for head, tail in found if head.endswith(("(raylet", "(gcs_server")) and tail.split()[0] != "Z"]


if __name__ == "__main__":
    inside(Path(sys.argv[1]))
