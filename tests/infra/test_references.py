"""Each name that a pod refers to exists, also in the manifests of the pages."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.infra.manifests import INFRA, RENDERED, VERSION, check_ray, files, rendered
from tests.infra.pods import Pod, pod_security_violations, pods
from tests.infra.references import Object, declared, documented, generated, references, unresolved
from tests.kit import ROOT

WRITTEN = [document for _, document in files()]
AVAILABLE = declared(WRITTEN) | generated() | documented()


def on_pages() -> list[tuple[Path, dict[str, Any]]]:
    """Return (page, manifest) of every Kubernetes manifest in a page of the documentation."""
    pages = [*sorted(INFRA.rglob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [
        (page, block) for page in pages for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)
    ]
    return [
        (page.relative_to(ROOT), document)
        for page, block in blocks
        if re.search("^apiVersion:", block, re.M)
        for document in yaml.safe_load_all(block)
    ]


def test_references_of_pods_as_written_resolve():
    assert unresolved(pods(WRITTEN), AVAILABLE) == []


@pytest.mark.parametrize("folder", RENDERED)
def test_references_of_rendered_pods_resolve(folder):
    """The jobs and the data pod use the namespace of the overlay, which is applied before them."""
    found = rendered(folder)
    available = declared(rendered("infra/kuberay/overlays/production")) | declared(found) | documented()
    assert unresolved(pods(found), available) == []


@pytest.mark.parametrize(("page", "document"), on_pages(), ids=lambda value: str(getattr(value, "stem", "")))
def test_manifest_of_a_page_is_valid_and_its_references_resolve(page, document):
    if document["apiVersion"] == "ray.io/v1":
        check_ray(document)
    else:
        kubernetes_validate.validate(document, VERSION, strict=True)
    assert unresolved(pods([document]), AVAILABLE) == []
    assert [pod.name for pod in pods([document]) if pod_security_violations(pod)] == []


def test_manifests_of_pages_are_found():
    assert any(document["kind"] == "NetworkPolicy" for _, document in on_pages())


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        (Object("Secret", "advtrain-mlflow", "mlflow"), {"PGPASSWORD"}),
        (Object("ConfigMap", "advtrain-mlflow", "mlflow"), set()),
        (Object("ConfigMap", "advtrain-mlflow", "mlflow-auth"), set()),
        (Object("PersistentVolumeClaim", "advtrain-mlflow", "backups"), set()),
        (Object("Secret", "advtrain", "advtrain-mlflow"), {"password"}),
        (Object("ServiceAccount", "advtrain", "advtrain-worker"), set()),
        (Object("ServiceAccount", "advtrain", "advtrain"), set()),
        (Object("PersistentVolumeClaim", "advtrain", "advtrain-shared"), set()),
    ],
)
def test_unresolved_reports_an_object_and_a_key_that_are_missing(wanted, keys):
    found = pods(WRITTEN)
    assert any((wanted, keys) == reference for pod in found for reference in references(pod))
    without = {name: data for name, data in AVAILABLE.items() if name != wanted}
    assert any(wanted.name in line for line in unresolved(found, without))
    if keys:
        assert any(wanted.name in line for line in unresolved(found, AVAILABLE | {wanted: set()}))


SOURCES = [
    {"volumes": [{"name": "v", "secret": {"secretName": "x", "items": [{"key": "k", "path": "p"}]}}]},
    {
        "volumes": [
            {"name": "v", "projected": {"sources": [{"secret": {"name": "x", "items": [{"key": "k"}]}}]}}
        ]
    },
    {"initContainers": [{"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "x", "key": "k"}}}]}]},
    {"imagePullSecrets": [{"name": "x"}]},
    {"containers": [{"envFrom": [{"secretRef": {"name": "x"}}]}]},
]


@pytest.mark.parametrize("spec", SOURCES, ids=lambda spec: next(iter(spec)))
def test_references_finds_a_secret_wherever_a_pod_reads_one(spec):
    found = dict(references(Pod("pod", "here", {}, {"containers": [], **spec})))
    assert Object("Secret", "here", "x") in found
    assert found[Object("Secret", "here", "x")] == ({"k"} if "k" in str(spec) else set())


def test_references_leaves_out_what_is_optional():
    spec = copy.deepcopy(SOURCES[0])
    spec["volumes"][0]["secret"]["optional"] = True
    found = dict(references(Pod("pod", "here", {}, {"containers": [], **spec})))
    assert found == {}


def waits() -> list[list[str]]:
    """Return the words of every `kubectl wait` in a page."""
    pages = [*sorted(INFRA.rglob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    return [shlex.split(line) for line in lines if re.match(r" *kubectl .*\bwait\b", line)]


def test_kubectl_wait_has_a_timeout_and_its_pod_a_readiness_probe():
    """The default of 30 s is too short to pull an image. A pod without a probe is ready before its command ran."""
    probes = {
        f"pod/{document['metadata']['name']}": all(
            "readinessProbe" in c for c in document["spec"]["containers"]
        )
        for document in WRITTEN
        if document["kind"] == "Pod"
    }
    assert len(waits()) >= 3
    for words in waits():
        assert any(word.startswith("--timeout") for word in words), words
        for target in (word for word in words if word.startswith("pod/")):
            assert probes[target], target
