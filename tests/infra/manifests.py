"""The manifests below infra/: as written, as kubectl renders them, and their check against KubeRay's schema."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.kit import ROOT

INFRA = ROOT / "infra"
#: Folders that `kubectl apply -k` accepts.
RENDERED = sorted(
    str(path.parent.relative_to(ROOT))
    for path in INFRA.rglob("kustomization.yaml")
    if yaml.safe_load(path.read_text())["kind"] == "Kustomization"
)
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
#: Version of Kubernetes whose schemas and rules are checked.
VERSION = "1.31"


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


@functools.cache
def files() -> list[tuple[Path, dict[str, Any]]]:
    """Return (path, manifest) of every Kubernetes manifest below infra/, as written."""
    found = [(path, document) for path in sorted(INFRA.rglob("*.yaml")) for document in documents(path)]
    return [
        (path, document)
        for path, document in found
        if isinstance(document.get("apiVersion"), str)
        and document["kind"] not in ("Kustomization", "Component")
    ]


@functools.cache
def _render(folder: str) -> str:
    command = ["kubectl", "kustomize", folder]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def rendered(folder: str) -> list[dict[str, Any]]:
    """Return the manifests that `kubectl apply -k` sends; skip the test if kubectl is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl renders the folders")
    return [d for d in yaml.safe_load_all(_render(folder)) if d]


def strict(schema: Any) -> Any:
    """Return the schema without support for unknown fields, which the operator would drop silently."""
    if isinstance(schema, dict):
        found = {key: strict(value) for key, value in schema.items()}
        open_ended = "additionalProperties" in found or found.get("x-kubernetes-preserve-unknown-fields")
        if "properties" in found and not open_ended:
            found["additionalProperties"] = False
        return found
    return [strict(part) for part in schema] if isinstance(schema, list) else schema


@functools.cache
def _schema(kind: str) -> Any:
    if not SCHEMAS.is_dir():
        pytest.skip("the schemas of KubeRay's kinds are not beside the repository")
    schema = strict(json.loads((SCHEMAS / f"{kind.lower()}.v1.json").read_text()))
    return schema.get("openAPIV3Schema", schema)


def check_ray(document: dict[str, Any]) -> None:
    """Raise if a RayCluster or RayJob does not match KubeRay's schema."""
    # The schema does not describe metadata.
    values = {key: value for key, value in document.items() if key != "metadata"}
    jsonschema.Draft202012Validator(_schema(document["kind"])).validate(values)
