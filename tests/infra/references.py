"""References of pods to ConfigMaps, Secrets, ServiceAccounts and claims, and the objects that they resolve to."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.infra.manifests import INFRA
from tests.infra.pods import Pod
from tests.kit import ROOT


class Object(NamedTuple):
    """A namespaced object."""

    kind: str
    namespace: str
    name: str


#: Fields of a pod that name an object, and its kind.
KINDS = {
    **dict.fromkeys(("secret", "secretRef", "secretKeyRef"), "Secret"),
    **dict.fromkeys(("configMap", "configMapRef", "configMapKeyRef"), "ConfigMap"),
    "persistentVolumeClaim": "PersistentVolumeClaim",
    "serviceAccountName": "ServiceAccount",
}
#: Keys of the data of each object that is there.
Objects = dict[Object, set[str]]


def references(pod: Pod) -> Iterator[tuple[Object, set[str]]]:
    """Yield each object that a pod needs to start, with the keys that it reads; optional ones are left out."""
    for source in _sources(pod):
        for field in source.keys() & KINDS.keys():
            found = source[field]
            name = found.get("name") or found.get("secretName") or found.get("claimName")
            keys = {part["key"] for part in (found, *found.get("items", [])) if "key" in part}
            if not found.get("optional"):
                yield Object(KINDS[field], pod.namespace, name), keys


def _sources(pod: Pod) -> Iterator[dict[str, Any]]:
    spec = pod.spec
    for container in pod.containers:
        yield from container.get("envFrom", [])
        yield from (variable.get("valueFrom", {}) for variable in container.get("env", []))
    for volume in spec.get("volumes", []):
        yield from (volume, *volume.get("projected", {}).get("sources", []))
    yield from ({"secretRef": secret} for secret in spec.get("imagePullSecrets", []))
    if "serviceAccountName" in spec:  # else it is `default`, which each namespace has
        yield {"serviceAccountName": {"name": spec["serviceAccountName"]}}


def unresolved(pods: list[Pod], objects: Objects) -> list[str]:
    """Return the references of pods to objects or keys that are not there."""
    return [
        f"{pod.name}: {wanted.kind} {wanted.namespace}/{wanted.name} {sorted(keys)}"
        for pod in pods
        for wanted, keys in references(pod)
        if wanted not in objects or not keys <= objects[wanted]
    ]


def declared(manifests: list[dict[str, Any]]) -> Objects:
    """Return the objects of manifests, and the service accounts that KubeRay creates for autoscalers."""
    found: Objects = {}
    for manifest in manifests:
        name, namespace = manifest["metadata"]["name"], manifest["metadata"].get("namespace", "")
        found[Object(manifest["kind"], namespace, name)] = set(manifest.get("data", {}))
        spec = manifest.get("spec", {})
        cluster = spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec", {})
        head = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {})
        if cluster.get("enableInTreeAutoscaling") and "serviceAccountName" not in head:
            found[Object("ServiceAccount", namespace, name)] = set()
    return found


def generated() -> Objects:
    """Return the ConfigMaps and Secrets that the kustomizations generate, under their names without hash."""
    found: Objects = {}
    for path in INFRA.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text())
        for kind in ("ConfigMap", "Secret"):
            for part in document.get(f"{kind[0].lower()}{kind[1:]}Generator", []):
                namespace = document.get("namespace") or part.get("namespace", "")
                keys = {Path(file.partition("=")[0]).name for file in part.get("files", [])}
                keys |= {line.partition("=")[0] for line in part.get("literals", [])}
                for file in part.get("envs", []):
                    keys |= variables(path.parent / file)
                found[Object(kind, namespace, part["name"])] = keys
    return found


def documented() -> Objects:
    """Return the secrets that the commands of the READMEs create."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("-n", "--namespace", default="default")
    for option in ("literal", "file", "env-file"):
        parser.add_argument(f"--from-{option}", action="append", default=[])
    found: Objects = {}
    for path in INFRA.rglob("README.md"):
        text = re.sub(r"\\\n", " ", path.read_text())
        for line in re.findall(r"^ *(kubectl .*\bcreate secret generic .*)$", text, re.M):
            asked = parser.parse_intermixed_args(shlex.split(line))
            keys = {pair.partition("=")[0] for pair in (*asked.from_literal, *asked.from_file)}
            for file in asked.from_env_file:
                at = ROOT / file
                keys |= variables(at.with_name(f"example.{at.name}"))  # git ignores the file itself
            found[Object("Secret", asked.namespace, asked.words[4])] = keys
    return found


def variables(path: Path) -> set[str]:
    """Return the names in a file of NAME=VALUE lines."""
    return set(re.findall(r"^(\w+)=", path.read_text(), re.M))
