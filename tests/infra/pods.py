"""Pods that Kubernetes and KubeRay create from the manifests, and the check of the Pod Security Standard `restricted`.

KubeRay's part follows its source (ray-operator/controllers/ray: common/pod.go, common/job.go): it adds the autoscaler
to the head, the containers `wait-gcs-ready` to the workers and `wait-for-tls-ip-san` to both, and a submitter to each
RayJob.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


@dataclass(frozen=True)
class Pod:
    """A pod as the API server will see it."""

    name: str
    namespace: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(manifests: list[dict[str, Any]]) -> list[Pod]:
    """Return one pod for each template in the manifests, with what KubeRay adds."""
    return [pod for manifest in manifests for pod in _pods(manifest)]


def _pods(manifest: dict[str, Any]) -> Iterator[Pod]:
    kind, spec = manifest["kind"], manifest.get("spec", {})
    name, namespace = manifest["metadata"]["name"], manifest["metadata"].get("namespace", "")
    if kind == "RayCluster":
        yield from _cluster_pods(name, namespace, spec)
    elif kind == "RayJob":
        yield from _cluster_pods(name, namespace, spec["rayClusterSpec"])
        if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
            yield _pod(f"{name}-submitter", namespace, spec.get("submitterPodTemplate") or _submitter(spec))
    elif kind == "Pod":
        yield _pod(name, namespace, manifest)
    elif kind == "CronJob":
        yield _pod(name, namespace, spec["jobTemplate"]["spec"]["template"])
    elif kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"):
        yield _pod(name, namespace, spec["template"])


def _pod(name: str, namespace: str, template: dict[str, Any], **labels: str) -> Pod:
    own = template.get("metadata", {}).get("labels", {})
    return Pod(name, namespace, {**own, **labels}, copy.deepcopy(template["spec"]))


def _submitter(spec: dict[str, Any]) -> dict[str, Any]:
    """Return KubeRay's default submitter: the head's image, without label and security context."""
    image = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    return {"spec": {"restartPolicy": "Never", "containers": [{"name": "ray-job-submitter", "image": image}]}}


def _cluster_pods(name: str, namespace: str, spec: dict[str, Any]) -> Iterator[Pod]:
    labels = {"ray.io/is-ray-node": "yes", "ray.io/cluster": name}
    head = _pod(f"{name}-head", namespace, spec["headGroupSpec"]["template"], **labels)
    if spec.get("enableInTreeAutoscaling"):
        options = spec.get("autoscalerOptions", {})
        autoscaler = {"name": "autoscaler", "image": head.spec["containers"][0]["image"]}
        if "securityContext" in options:
            autoscaler["securityContext"] = options["securityContext"]
        head.spec["containers"].append(autoscaler)
        head.spec.setdefault("serviceAccountName", name)
    yield _with_tls(head, spec)
    for group in spec["workerGroupSpecs"]:
        worker = _pod(f"{name}-{group['groupName']}", namespace, group["template"], **labels)
        ray = worker.spec["containers"][0]
        copied = {key: ray[key] for key in ("image", "securityContext", "volumeMounts") if key in ray}
        worker.spec.setdefault("initContainers", []).append({"name": "wait-gcs-ready", **copied})
        yield _with_tls(worker, spec)


def _with_tls(pod: Pod, spec: dict[str, Any]) -> Pod:
    """Add what KubeRay adds for `tlsOptions`: the secret, and a container that waits for the pod's certificate."""
    if spec.get("tlsOptions", {}).get("enabled"):
        ray = pod.spec["containers"][0]
        copied = {key: ray[key] for key in ("image", "securityContext") if key in ray}
        pod.spec.setdefault("initContainers", []).insert(0, {"name": "wait-for-tls-ip-san", **copied})
        pod.spec.setdefault("volumes", []).append(
            {"name": "ray-tls", "secret": {"secretName": "from-cert-manager"}}
        )
    return pod


def pod_security_violations(pod: Pod) -> list[str]:
    """Return what the Pod Security Standard `restricted` refuses about a pod (Kubernetes 1.31, Linux)."""
    spec, context = pod.spec, pod.spec.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += [
        f"volume {volume['name']}: {kind}"
        for volume in spec.get("volumes", [])
        for kind in volume.keys() - {"name"} - VOLUMES
    ]
    if context.get("sysctls"):
        found.append("sysctls")
    for container in pod.containers:
        found += [f"{container['name']}: {what}" for what in _container_violations(container, context)]
    return found


def _container_violations(container: dict[str, Any], of_pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**of_pod, **own}
    capabilities = own.get("capabilities", {})
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if own.get("privileged"):
        yield "privileged"
    if both.get("runAsNonRoot") is not True:
        yield "runAsNonRoot"
    if both.get("runAsUser") == 0:
        yield "runAsUser"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities.drop"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities.add"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "hostPort"


def autoscalers_without_token(manifests: list[dict[str, Any]]) -> list[str]:
    """Return the clusters whose autoscaler cannot call the Kubernetes API."""
    tokenless = {
        manifest["metadata"]["name"]
        for manifest in manifests
        if manifest["kind"] == "ServiceAccount" and manifest.get("automountServiceAccountToken") is False
    }
    return [
        pod.name
        for pod in pods(manifests)
        if any(container["name"] == "autoscaler" for container in pod.containers)
        and not pod.spec.get("automountServiceAccountToken", pod.spec["serviceAccountName"] not in tokenless)
    ]
