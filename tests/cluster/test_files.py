"""The files in cluster/ are what Ray's launcher, KubeRay, Kubernetes, Docker and YAML's linter take."""

import copy
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHER = ["aws", "gcp", "local"]
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY = "2.60.0"


def load(name):
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_launcher_takes_the_file(name, monkeypatch):
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = load(name)
    schema = json.loads((Path(ray.autoscaler.__path__[0]) / "ray-schema.json").read_text())
    # Not in the schema, and yet what a local cluster's size is read from.
    raw = {key: value for key, value in given.items() if (name, key) != ("local", "min_workers")}
    jsonschema.validate(raw, schema)
    monkeypatch.chdir(ROOT)
    validate_config(prepare_config(copy.deepcopy(given)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw | {"max_worker": 3}, schema)


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_cluster_has_tokens_and_is_not_open_to_the_network(name):
    config = load(name)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert commands[0] == "ray stop" and all("RAY_AUTH_MODE=token ray start" in line for line in commands[1:])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_workers_are_spot_and_the_head_is_not(name):
    def spot(kind):
        node = config["available_node_types"][kind]["node_config"]
        market = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        return market or any(s.get("preemptible") for s in node.get("scheduling", []))

    config = load(name)
    assert [spot(kind) for kind in ("head", "cpu_spot", "gpu_spot")] == [False, True, True]
    assert config["provider"]["cache_stopped_nodes"] is False


def documents():
    return [
        pytest.param(document, id=f"{file.stem}-{document['kind']}")
        for file in MANIFESTS
        for document in yaml.safe_load_all(file.read_text())
    ]


def strict(schema):
    """A Kubernetes schema that refuses unknown keys, and takes numbers where Kubernetes does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
    if isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    return schema


def definition(kind):
    """The schema of a KubeRay kind in FEDLQ_CRD_DIR, or None."""
    where = os.environ.get("FEDLQ_CRD_DIR")
    file = Path(where or ".") / f"ray.io_{kind.lower()}s.crd.yaml.gz"
    if not where or not file.exists():
        return None
    found = yaml.load(gzip.decompress(file.read_bytes()), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return next(strict(v["schema"]["openAPIV3Schema"]) for v in found["spec"]["versions"] if v["name"] == "v1")


CLUSTER_KEYS = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
JOB_KEYS = {
    "entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "activeDeadlineSeconds", "rayClusterSpec",
}  # fmt: skip
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def check_cluster(spec):
    """The keys that a RayCluster's spec may have here, by hand, where there is no definition."""
    assert set(spec) <= CLUSTER_KEYS and set(spec["headGroupSpec"]) == {"rayStartParams", "template"}
    assert spec["authOptions"] == {"mode": "token"}
    assert set(spec.get("autoscalerOptions", {})) <= {"idleTimeoutSeconds"}
    for group in spec["workerGroupSpecs"]:
        assert set(group) == GROUP_KEYS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("document", documents())
def test_a_manifest_has_known_keys_alone(document):
    kind, spec = document["kind"], document["spec"]
    if kind in ("RayCluster", "RayJob"):
        assert document["apiVersion"] == "ray.io/v1"
        schema = definition(kind)
        if schema:
            jsonschema.validate(document, schema)
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(document | {"spec": spec | {"rayVersoin": "1"}}, schema)
        if kind == "RayJob":
            assert set(spec) <= JOB_KEYS and spec["shutdownAfterJobFinishes"] is True
        check_cluster(spec if kind == "RayCluster" else spec["rayClusterSpec"])
    else:
        kinds = {"PersistentVolumeClaim": {"accessModes", "resources"}, "Service": {"selector", "ports"}}
        kinds["Deployment"] = {"replicas", "strategy", "selector", "template"}
        assert set(spec) == kinds[kind]


def test_manifests_speak_of_each_other():
    """Claims that exist, one Ray version, the server's name, and the folder of the results in every pod of Ray."""
    found = [document for file in MANIFESTS for document in yaml.safe_load_all(file.read_text())]
    claims = {d["metadata"]["name"] for d in found if d["kind"] == "PersistentVolumeClaim"}
    text = "".join(file.read_text() for file in MANIFESTS)
    assert set(re.findall(r"claimName: (\S+)", text)) == claims
    assert text.count("ray.io/v1") == text.count(f"rayVersion: {RAY}") == 2
    assert text.count("mountPath: /results") == 4 and "/results/" in text
    (job,) = (d["spec"] for d in found if d["kind"] == "RayJob")
    from fedlq_ray.config.load import parse

    settings = yaml.safe_load(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["FEDLQ_CONFIG"])
    assert parse(settings).tracking.uri == "http://mlflow:5000"
    assert {d["metadata"]["name"] for d in found if d["kind"] == "Service"} == {"mlflow"}


def test_one_version_of_ray_and_of_the_package_everywhere():
    files = [*CLUSTER.rglob("*.yaml"), CLUSTER / "Dockerfile", CLUSTER / "README.md"]
    text = "".join(file.read_text() for file in files)
    assert set(re.findall(r"rayproject/ray:([0-9.]+)-", text)) == {RAY}
    assert f"ray=={RAY}\n" in (ROOT / "constraints.txt").read_text()
    assert set(re.findall(r"fedlq:([0-9.]+[0-9])", text)) == {version("fedlq-ray")}


def test_compose_has_known_services_and_tells_of_a_missing_token():
    compose = load("docker-compose")
    assert set(compose) == {"name", "x-ray", "services", "volumes"}
    assert set(compose["services"]) == {"results", "head", "worker", "mlflow"}
    assert compose["services"]["worker"]["deploy"] == {"replicas": 2}
    for name in ("head", "worker"):
        environment = compose["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN"].startswith(
            "${RAY_AUTH_TOKEN:?"
        )
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:8265:8265", "127.0.0.1:5000:5000"]


def lint(tool, *arguments):
    command = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([command, *arguments], cwd=CLUSTER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_yaml_is_clean():
    lint("yamllint", "--strict", "-c", ".yamllint", ".")


def test_the_dockerfile_is_clean():
    lint("hadolint", "Dockerfile")
