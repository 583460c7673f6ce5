"""Every pod passes its namespace's Pod Security Standard, and each of these checks reports a broken pod."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import yaml

from tests.infra.manifests import INFRA, RENDERED, check_ray, documents, files, rendered
from tests.infra.pods import Pod, autoscalers_without_token, pod_security_violations, pods
from tests.kit import ROOT

WRITTEN = [document for _, document in files()]
SETS = ["files", *RENDERED]


def manifests(source: str) -> list[dict[str, Any]]:
    return WRITTEN if source == "files" else rendered(source)


def pod(name: str) -> Pod:
    return next(pod for pod in pods(copy.deepcopy(WRITTEN)) if pod.name == name)


def job(**changes: Any) -> dict[str, Any]:
    found = copy.deepcopy(next(document for document in WRITTEN if document["kind"] == "RayJob"))
    found["spec"].update(changes)
    return found


@pytest.mark.parametrize("source", SETS)
def test_pods_pass_restricted_policy_and_have_a_namespace(source):
    for pod in pods(manifests(source)):
        assert pod_security_violations(pod) == [], pod.name
        assert pod.namespace.startswith("advtrain"), pod.name
        assert all(container.get("image") for container in pod.containers)


def test_pods_of_all_kinds_are_found():
    found = {pod.name for pod in pods(WRITTEN)}
    assert found >= {"advtrain-head", "advtrain-gpu", "train-submitter", "train-head", "train-gpu"}
    assert found >= {"mlflow", "database"}
    names = {pod.name: [container["name"] for container in pod.containers] for pod in pods(WRITTEN)}
    assert names["advtrain-head"] == ["ray-head", "autoscaler"]
    assert names["advtrain-gpu"] == ["wait-gcs-ready", "ray-worker"]


@pytest.mark.parametrize("kind", ["Deployment", "Job", "CronJob", "Pod"])
def test_pods_finds_template_of_kind(kind):
    template: dict[str, Any] = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": []}}
    spec: dict[str, Any] = {"template": template}
    if kind == "CronJob":
        spec = {"jobTemplate": {"spec": spec}}
    meta = {"name": "x", "namespace": "y", "labels": {"a": "b"}}
    manifest = {"kind": kind, "metadata": meta, "spec": template["spec"] if kind == "Pod" else spec}
    assert pods([manifest]) == [Pod("x", "y", {"a": "b"}, {"containers": []})]


BROKEN = {
    "hostNetwork": lambda pod: pod.spec.update(hostNetwork=True),
    "hostPID": lambda pod: pod.spec.update(hostPID=True),
    "volume disk: hostPath": lambda pod: pod.spec["volumes"].append({"name": "disk", "hostPath": {}}),
    "sysctls": lambda pod: pod.spec["securityContext"].update(sysctls=[{"name": "a", "value": "b"}]),
    "runAsNonRoot": lambda pod: pod.spec["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda pod: pod.spec["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda pod: pod.spec["securityContext"].pop("seccompProfile"),
    "allowPrivilegeEscalation": lambda pod: context(pod).pop("allowPrivilegeEscalation"),
    "privileged": lambda pod: context(pod).update(privileged=True),
    "procMount": lambda pod: context(pod).update(procMount="Unmasked"),
    "capabilities.drop": lambda pod: context(pod).pop("capabilities"),
    "capabilities.add": lambda pod: context(pod)["capabilities"].update(add=["SYS_ADMIN"]),
    "hostPort": lambda pod: pod.spec["containers"][0]["ports"].append({"containerPort": 1, "hostPort": 1}),
}


def context(pod: Pod) -> dict[str, Any]:
    found: dict[str, Any] = pod.spec["containers"][0]["securityContext"]
    return found


@pytest.mark.parametrize("violation", BROKEN)
def test_pod_security_violations_reports_broken_pod(violation):
    broken = pod("advtrain-gpu")
    BROKEN[violation](broken)
    assert {found.removeprefix("ray-worker: ") for found in pod_security_violations(broken)} >= {violation}


def test_pod_security_violations_reports_default_submitter_and_autoscaler():
    submitter = pods([job(submitterPodTemplate=None)])[-1]
    assert "ray-job-submitter: runAsNonRoot" in pod_security_violations(submitter)
    without = job()
    del without["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"]
    assert "autoscaler: capabilities.drop" in pod_security_violations(pods([without])[0])
    without["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = False
    assert pod_security_violations(pods([without])[0]) == []
    assert len(pods([job(submissionMode="HTTPMode")])) == len(pods([job()])) - 1


@pytest.mark.parametrize("source", SETS)
def test_submitter_can_run_as_a_kubernetes_job_and_has_its_label(source):
    for found in manifests(source):
        if found["kind"] == "RayJob":
            template = found["spec"]["submitterPodTemplate"]
            assert template["spec"]["restartPolicy"] in ("Never", "OnFailure")
            assert template["metadata"]["labels"] == {"advtrain.io/submits": "true"}
            head = found["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
            assert template["spec"]["containers"][0]["image"] == head["containers"][0]["image"]


def test_autoscaler_has_a_token():
    assert autoscalers_without_token(WRITTEN) == []
    broken = copy.deepcopy(WRITTEN)
    account = next(document for document in broken if document["kind"] == "ServiceAccount")
    account["metadata"]["name"] = "advtrain"
    assert autoscalers_without_token(broken) == ["advtrain-head"]
    broken = job()
    broken["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] = (
        False
    )
    assert autoscalers_without_token([broken]) == ["train-head"]


def test_upgrade_page_deletes_the_account_that_takes_the_token_of_the_autoscaler():
    """Earlier manifests had an account with the name of the cluster, which `kubectl apply` does not delete."""
    account = copy.deepcopy(next(document for document in WRITTEN if document["kind"] == "ServiceAccount"))
    account["metadata"]["name"] = "advtrain"
    assert autoscalers_without_token([*WRITTEN, account]) == ["advtrain-head"]
    page = (ROOT / "docs" / "guides" / "upgrade.md").read_text()
    assert "`kubectl -n advtrain delete serviceaccount advtrain`" in page


def test_job_template_has_the_cluster_of_the_long_running_cluster():
    """The job's cluster differs in its number of workers only."""
    cluster = copy.deepcopy(
        next(document["spec"] for document in WRITTEN if document["kind"] == "RayCluster")
    )
    of_job = job()["spec"]["rayClusterSpec"]
    for spec in (cluster, of_job):
        for key in ("replicas", "minReplicas", "maxReplicas"):
            spec["workerGroupSpecs"][0].pop(key)
    assert cluster == of_job


def test_jobs_render_from_one_template():
    found = {folder: rendered(folder) for folder in RENDERED if "/jobs/" in folder}
    specs = {
        manifest["metadata"]["name"]: manifest["spec"]
        for documents in found.values()
        for manifest in documents
        if manifest["kind"] == "RayJob"
    }
    assert specs.keys() == {
        "train",
        "train-cifar10",
        "train-cifar10-queued",
        "campaign-cifar10",
        "train-digits",
    }
    keys = {spec["entrypoint"].partition(" --once ")[2] for spec in specs.values()}
    assert len(keys) == len(specs), "a job would resume the run of another"
    queued = specs["train-cifar10-queued"]
    assert queued["suspend"] is True
    assert queued["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    assert "suspend" not in specs["train-cifar10"]
    images = {
        name: spec["submitterPodTemplate"]["spec"]["containers"][0]["image"] for name, spec in specs.items()
    }
    assert images["train-cifar10"] == "registry.example/advtrain:0.2.0-cuda"
    assert images["train-digits"] == "advtrain:0.2.0-cpu"


def test_kustomizations_name_files_that_exist():
    for path in INFRA.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text())
        for part in (*document.get("resources", []), *document.get("components", [])):
            at = path.parent / part
            assert at.is_file() or (at / "kustomization.yaml").is_file(), f"{path.relative_to(ROOT)}: {part}"


@pytest.mark.parametrize("folder", ["overlays/production", "jobs/train"])
def test_tls_component_renders_and_its_pods_pass_restricted_policy(folder, tmp_path):
    parts = {
        key: [os.path.relpath(INFRA / "kuberay" / part, tmp_path.resolve())]
        for key, part in (("resources", folder), ("components", "tls"))
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    found = rendered(str(tmp_path.resolve()))
    assert any(found_pod.containers[0]["name"] == "wait-for-tls-ip-san" for found_pod in pods(found))
    assert not any(pod_security_violations(found_pod) for found_pod in pods(found))
    for manifest in found:
        if manifest["apiVersion"] == "ray.io/v1":
            check_ray(manifest)


def test_production_claim_names_the_class_of_the_storage_examples():
    claim = next(
        d for d in rendered("infra/kuberay/overlays/production") if d["kind"] == "PersistentVolumeClaim"
    )
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    names = {
        path.stem: documents(path)[0]["metadata"]["name"] for path in INFRA.glob("kuberay/storage/*.yaml")
    }
    assert len(names) == 3
    assert set(names.values()) == {claim["spec"]["storageClassName"]}
