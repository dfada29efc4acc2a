"""The files for clusters in scripts/: their commands are sweeps of this repository, and their parts fit together."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_fixtures import ROOT, Composer

from sparsegrad.sweeps.config import make_plan

KUBERNETES = ROOT / "scripts" / "kubernetes"
TASK = ROOT / "scripts" / "skypilot" / "sweep.yaml"
SLURM = ROOT / "scripts" / "slurm" / "sweep.sh"
OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    (one["kind"], one["metadata"]["name"]): one
    for name in ("outputs", "postgres", "proxy", "workers")
    for one in yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text())
}
# Of each object that starts containers, by its name: the pod's metadata and specification.
PODS: dict[str, dict[str, Any]] = {
    name: one if kind == "Pod" else one["spec"]["template"]
    for (kind, name), one in OBJECTS.items()
    if kind not in ("Service", "PersistentVolumeClaim")
}
WORKER: dict[str, Any] = PODS["sparsegrad-sweep"]["spec"]["containers"][0]
SECRET = "sparsegrad-storage"
ADDRESS = "postgresql://sparsegrad@sparsegrad-postgres/sparsegrad"
RUN = {"SPARSEGRAD_STORAGE": "postgresql://me@db.example.com/sweeps?sslmode=require", "BUCKET": "my-sweeps"}


def read_commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """The words of each cluster's command, and the variables that its worker sees."""
    task = yaml.safe_load(TASK.read_text())
    example = re.search(r"sweep\.sh (sweep=.*)", SLURM.read_text())
    default = re.search(r"SPARSEGRAD_STORAGE:-(.*)}", SLURM.read_text())
    assert example is not None
    assert default is not None
    variables = {"SPARSEGRAD_STORAGE": ADDRESS, **{one["name"]: one["value"] for one in WORKER["env"]}}
    return {
        "kubernetes": (WORKER["args"], variables),
        "skypilot": (shlex.split(task["run"].replace("$SWEEP", task["envs"]["SWEEP"])), RUN),
        "slurm": (["python", "run.py", *shlex.split(example[1])], {"SPARSEGRAD_STORAGE": default[1]}),
    }


@pytest.mark.parametrize("where", read_commands())
def test_a_worker_is_a_sweep_of_this_repository(where: str, conf: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    words, variables = read_commands()[where]
    assert words[1] == "run.py"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plan = make_plan(conf(*words[2:]))
    # The variable is the one that the code reads; and never SQLite, which does not work on a network's file system.
    assert plan.sweep.storage == variables["SPARSEGRAD_STORAGE"]
    assert plan.sweep.storage.startswith(("postgresql://", "journal:"))
    if where != "slurm":  # Slurm's workers start in a folder that they share
        assert plan.base.results_dir == "/outputs"
        assert Path("/outputs") in Path(plan.base.work_dir).parents


def test_pods_refer_to_what_exists() -> None:
    for name, pod in PODS.items():
        spec, owner = pod["spec"], OBJECTS.get(("StatefulSet", name), pod)
        mountable = {one["metadata"]["name"] for one in owner["spec"].get("volumeClaimTemplates", [])}
        for volume in spec.get("volumes", []):
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in OBJECTS
            mountable.add(volume["name"])
        for container in spec["containers"]:
            assert {one["name"] for one in container.get("volumeMounts", [])} <= mountable
            assert all(one["secretRef"]["name"] == SECRET for one in container.get("envFrom", []))
    assert WORKER["envFrom"] == [{"secretRef": {"name": SECRET}}]
    assert WORKER["volumeMounts"][0]["mountPath"] == "/outputs"


def test_services_lead_to_their_pods_and_addresses_to_services() -> None:
    for kind, name in OBJECTS:
        if kind == "Service":
            service, pod = OBJECTS[kind, name]["spec"], PODS[name]
            assert service["selector"] == pod["metadata"]["labels"]
            (port,) = service["ports"]
            assert pod["spec"]["containers"][0]["ports"] == [{"name": port["name"], "containerPort": port["port"]}]
    assert f"SPARSEGRAD_STORAGE={ADDRESS}" in (ROOT / "docs" / "sweeps.md").read_text()
    # The line that users of the proxy uncomment.
    (line,) = re.findall(r"# - ({name: SPARSEGRAD_STORAGE.*})", (KUBERNETES / "workers.yaml").read_text())
    port = OBJECTS["Service", "sparsegrad-proxy"]["spec"]["ports"][0]["port"]
    assert yaml.safe_load(line)["value"] == f"grpc://sparsegrad-proxy:{port}"
    database = {one["name"]: one for one in PODS["sparsegrad-postgres"]["spec"]["containers"][0]["env"]}
    user, _, _, name = re.fullmatch(r"postgresql://(\w+)(@)(.+)/(\w+)", ADDRESS).groups()  # type: ignore[union-attr]
    assert (database["POSTGRES_USER"]["value"], database["POSTGRES_DB"]["value"]) == (user, name)
    assert database["POSTGRES_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": SECRET, "key": "PGPASSWORD"}


def test_a_killed_worker_starts_again_and_has_time_for_its_checkpoint() -> None:
    job, pod = OBJECTS["Job", "sparsegrad-sweep"]["spec"], PODS["sparsegrad-sweep"]["spec"]
    assert job["completionMode"] == "Indexed"  # a limit per index needs it, and `Never`
    assert pod["restartPolicy"] == "Never"
    assert job["completions"] == job["parallelism"]  # they can be changed together
    assert job["backoffLimitPerIndex"] > 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert pod["terminationGracePeriodSeconds"] >= 180  # as long as Slurm's


def test_the_image_has_what_its_commands_need() -> None:
    ignored = (KUBERNETES / "Dockerfile.dockerignore").read_text().split()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert all((ROOT / name).exists() for name in kept)
    scripts = {container["args"][1] for pod in PODS.values() for container in pod["spec"]["containers"]
               if container["image"] == "sparsegrad" and container["args"][0] == "python"}  # fmt: skip
    assert scripts == {"run.py", "scripts/storage_proxy.py"}
    dockerfile = (KUBERNETES / "Dockerfile").read_text()
    copied = re.search(r"^COPY (pyproject.*) \./$", dockerfile, re.MULTILINE)
    assert copied is not None
    for needed in (*copied[1].split(), *scripts, "conf/config.yaml", "sparsegrad/sweeps"):
        assert (ROOT / needed).exists()
        assert needed.split("/")[0] in kept
    assert 'ENTRYPOINT ["tini", "--"]' in dockerfile


def build(value: Any, kind: str, client: Any, where: str) -> Any:
    """The client's object of a manifest's value: every key is a field, of its type, and no required one is missing."""
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        return [build(one, inner[1], client, f"{where}[]") for one in value]
    if inner := re.fullmatch(r"dict[\[(]str, (.+)[\])]", kind):
        return {key: build(one, inner[1], client, f"{where}.{key}") for key, one in value.items()}
    if kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, where
    if not kind.startswith("V1"):
        return value
    model = getattr(client, kind)
    names = {name: attribute for attribute, name in model.attribute_map.items()}
    assert value.keys() <= names.keys(), f"{where}: unknown {sorted(value.keys() - names.keys())}"
    given = {
        names[key]: build(one, model.openapi_types[names[key]], client, f"{where}.{key}") for key, one in value.items()
    }
    return model(**given)


@pytest.mark.parametrize(("kind", "name"), OBJECTS, ids=lambda one: str(one))
def test_kubernetes_client_knows_every_field(kind: str, name: str) -> None:
    client = pytest.importorskip("kubernetes.client", reason="pip install kubernetes")
    one = OBJECTS[kind, name]
    assert client.ApiClient().sanitize_for_serialization(build(one, f"V1{kind}", client, kind)) == one


def test_kustomize_sets_the_image_everywhere() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES], capture_output=True, text=True, check=True)
    built = {(one["kind"], one["metadata"]["name"]) for one in yaml.safe_load_all(done.stdout)}
    assert built == OBJECTS.keys() - {("Service", "sparsegrad-proxy"), ("Deployment", "sparsegrad-proxy")}
    images = re.findall(r"image: (.*)", done.stdout)
    assert sorted(images) == ["postgres:17", *["registry.example.com/sparsegrad:1"] * 2]


def test_skypilot_accepts_the_task() -> None:
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    task = sky.Task.from_yaml_config(
        yaml.safe_load(TASK.read_text()), env_overrides=RUN, secrets_overrides={"PGPASSWORD": "x"}
    )
    assert task.num_nodes == 1
    assert all(one.use_spot for one in task.resources)
