"""Checks of all files below infra/ without a cluster: schemas, Ray's validator, shell, command line."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from advtrain.errors import UserError
from pipelines.cli.cluster import check_command
from pipelines.cli.main import app  # noqa: F401 (all commands)
from tests.infra.manifests import INFRA, RENDERED, VERSION, check_ray, documents, files, rendered
from tests.kit import ROOT

MANIFESTS = files()
OF_RAY = [(p, d) for p, d in MANIFESTS if d["apiVersion"] == "ray.io/v1"]
OF_KUEUE = [(p, d) for p, d in MANIFESTS if d["apiVersion"].startswith("kueue")]
OF_OTHERS = [(p, d) for p, d in MANIFESTS if d["apiVersion"].startswith("monitoring.coreos.com")]
OF_KUBERNETES = [m for m in MANIFESTS if m not in OF_RAY and m not in OF_KUEUE and m not in OF_OTHERS]


def name(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.relative_to(INFRA)) if value.is_relative_to(INFRA) else value.name
    return (
        f"{value['kind']}-{value['metadata']['name']}"
        if isinstance(value, dict) and "kind" in value
        else str(value)
    )


@pytest.mark.parametrize(("path", "document"), OF_RAY, ids=name)
def test_kuberay_manifest_matches_crd_schema(path, document):
    check_ray(document)
    broken = copy.deepcopy(document)
    broken["spec"]["entryPoint"] = "typo"
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        check_ray(broken)


@pytest.mark.parametrize(("path", "document"), OF_KUBERNETES, ids=name)
def test_kubernetes_manifest_matches_schema(path, document):
    kubernetes_validate.validate(document, VERSION, strict=True)
    broken = {**document, "metadata": {**document["metadata"], "lables": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


@pytest.mark.parametrize("folder", RENDERED)
def test_kustomize_folder_renders_valid_manifests(folder):
    found = rendered(folder)
    assert len(found) > (3 if "overlays" in folder else 0)
    for document in found:
        if document["apiVersion"] == "ray.io/v1":
            check_ray(document)
        elif not document["apiVersion"].startswith("kueue"):
            kubernetes_validate.validate(document, VERSION, strict=True)


def clusters(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


@pytest.mark.parametrize(("path", "document"), OF_RAY, ids=name)
def test_ray_cluster_uses_installed_version_and_secure_pods(path, document):
    spec = clusters(document)
    assert spec["rayVersion"] == metadata.version("ray")
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["workerGroupSpecs"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        check_pod(group["template"]["spec"])
    worker = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"


def check_pod(spec: dict[str, Any], probes: bool = True) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in (*spec.get("initContainers", []), *spec["containers"]):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert set(container["resources"]) == {"requests", "limits"}
        if probes and container in spec["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container)
        assert not container["image"].endswith(":latest")
        assert ":" in container["image"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes | {"data"}
        for variable in container.get("env", []):
            if re.search("PASSWORD|SECRET|KEY|TOKEN|STORE_URI", variable["name"]):
                assert "valueFrom" in variable, f"{variable['name']} is written into the manifest"


@pytest.mark.parametrize(
    ("path", "document"),
    [(p, d) for p, d in OF_KUBERNETES if d["kind"] in ("Deployment", "StatefulSet")],
    ids=name,
)
def test_server_pods_are_secure(path, document):
    check_pod(document["spec"]["template"]["spec"])


@pytest.mark.parametrize(
    ("path", "document"), [(p, d) for p, d in OF_KUBERNETES if d["kind"] == "CronJob"], ids=name
)
def test_scheduled_pods_are_secure_and_do_not_overlap(path, document):
    assert document["spec"]["concurrencyPolicy"] == "Forbid"
    check_pod(document["spec"]["jobTemplate"]["spec"]["template"]["spec"], probes=False)


@pytest.mark.parametrize(("path", "document"), [(p, d) for p, d in OF_RAY if d["kind"] == "RayJob"], ids=name)
def test_ray_job_has_retries_deadline_and_cleanup(path, document):
    spec = document["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 1
    assert spec["submitterConfig"]["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 3600
    assert "--once" in spec["entrypoint"], "tried again, it would start over"


def commands() -> list[tuple[Path, str]]:
    """Return (path, command line) of every advtrain command in a file below infra/."""
    found = []
    for path in sorted(p for p in INFRA.rglob("*") if p.is_file()):
        for match in re.finditer(
            r"(?:python -m pipelines|advtrain(?: submit)?|train\.sbatch) ((?:train|tune|evaluate|promote)\b[^\n`']*)",
            path.read_text(),
        ):
            words = re.sub(r'"\$\{words\[@\]\}"', "", match[1].strip())
            if "|" not in words:
                found.append((path, words))
    return found


@pytest.mark.parametrize(("path", "words"), commands(), ids=name)
def test_infra_command_is_accepted_by_cli(path, words):
    words = [word for word in shlex.split(words.split(" --address")[0])]
    assert check_command(words) == words
    with pytest.raises(UserError, match="No such option"):
        check_command([*words, "--wrokers", "2"])


def test_infra_commands_are_found():
    found = {path.parent.name for path, _ in commands()}
    assert found >= {"template", "train", "campaign", "queued", "dev", "slurm"}


SCRIPTS = [*sorted((INFRA / "mlflow").glob("*.sh")), INFRA / "slurm" / "train.sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shell_script_is_parsed_by_bash_and_stops_at_errors(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shell_script_passes_shellcheck(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "--severity=warning", "--shell=bash", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_names_each_program_without_which_tests_are_skipped():
    sources = [path.read_text() for path in sorted((ROOT / "tests" / "infra").glob("*.py"))]
    programs = {word for text in sources for word in re.findall(r'shutil\.which\("(\w+)"\) is None', text)}
    assert programs >= {"kubectl", "promtool", "prometheus", "shellcheck"}
    tested = (INFRA / "README.md").read_text().partition("## What is tested")[2]
    assert {program for program in programs if f"`{program}`" not in tested} == set()


def lock_entries(name: str) -> list[str]:
    """Return the entries of a lock file, each with the lines of its hashes."""
    return re.split(r"\n(?=[a-z0-9])", (INFRA / name).read_text().strip(), flags=re.IGNORECASE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("requirements.lock", "torch torchvision ray mlflow flask-wtf optuna pydantic typer cryptography"),
        ("requirements-dev.lock", "torch torchvision ray mlflow flask-wtf optuna pytest moto"),
        ("mlflow/requirements.lock", "mlflow flask-wtf psycopg psycopg-binary boto3 pyarrow"),
    ],
)
def test_locks_match_installed_versions_and_have_hashes(name, expected):
    entries = lock_entries(name)
    pins = dict(re.match(r"([^=\s]+)==([^\s;]+)", entry).groups() for entry in entries)  # type: ignore[union-attr]
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in "".join(entries), "an index must not be part of the lock"
    assert set(expected.split()) <= set(pins)
    assert {package: metadata.version(package).split("+")[0] for package in pins} == pins, "run `make lock`"


def test_packages_of_mlflow_image_are_locked_alike_and_without_torch():
    """The licenses and the audit of requirements.lock therefore cover the image of the MLflow server."""
    entries = lock_entries("mlflow/requirements.lock")
    assert set(entries) <= set(lock_entries("requirements.lock"))
    assert not any(entry.startswith(("torch", "ray=", "nvidia", "triton")) for entry in entries)


def test_licenses_name_every_locked_package():
    listed = re.findall(r"^\| ([^ |]+) \| ([^ |]+) \|", (INFRA / "LICENSES.md").read_text(), re.MULTILINE)
    locked = re.findall(r"^([^=\s]+)==([^\s;]+)", (INFRA / "requirements.lock").read_text(), re.MULTILINE)
    assert [pair for pair in listed if pair[0] != "package"] == locked, "run `make licenses`"


def test_compose_references_are_defined():
    compose = yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        for needed in service.get("depends_on", {}):
            assert needed in services
        for volume in service.get("volumes", []):
            assert (
                volume["type"] == "bind"
                if isinstance(volume, dict)
                else volume.split(":")[0] in compose["volumes"]
            )
        for config in service.get("configs", []):
            assert (INFRA / "mlflow" / compose["configs"][config["source"]]["file"]).is_file()
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        assert not service["image"].endswith("latest")
    text = (INFRA / "mlflow" / "compose.yaml").read_text()
    wanted = set(re.findall(r"\$\{(\w+):\?", text))
    assert set(re.findall(r"\$\{(\w+)", text)) == wanted, "a variable without a value must stop it"
    assert wanted == set(re.findall(r"^(\w+)=", (INFRA / "mlflow" / "example.env").read_text(), re.M))


@pytest.mark.parametrize(
    "path", [INFRA / "mlflow" / "compose.yaml", INFRA / "mlflow" / "kubernetes" / "server.yaml"], ids=name
)
def test_mlflow_server_accepts_configured_options(path):
    import click
    from mlflow.cli import cli

    server = cli.commands["server"]
    document = yaml.safe_load(path.read_text()) if path.name == "compose.yaml" else documents(path)[-1]
    if path.name == "compose.yaml":
        words = document["services"]["server"]["command"]
    else:
        words = document["spec"]["template"]["spec"]["containers"][0]["command"]
    assert words[:2] == ["mlflow", "server"]
    server.make_context("server", words[2:], parent=click.Context(cli))
    assert "--app-name=basic-auth" in words
    assert any(word.startswith("--allowed-hosts=") for word in words)
