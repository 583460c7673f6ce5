"""The layers of the code: imports point down only; Ray and MLflow stay in the files that are named here."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.kit import ROOT

#: From the bottom up; a module may import from its own group and from groups before it.
LAYERS = [
    {"lookup"},
    {"seeding", "environment"},
    {"cluster"},
    {"threat"},
    {"data", "models"},
    {"attacks", "modelsource"},
    {"objective", "optim"},
    {"weights", "sections"},
    {"objectstore", "mirror", "storage"},
    {"runfolder"},
    {"config", "checkpoint"},
    {"evaluation"},
    {"trackingstore"},
    {"tracking", "monitoring"},
    {"training"},
    {"registry"},
    {"promotion"},
]
RAY = {
    "advtrain/data/stream.py",
    "advtrain/cluster.py",
    "advtrain/evaluation/shards.py",
    "advtrain/monitoring.py",
    "advtrain/training/on_ray.py",
    "tuning/schedulers.py",
    "tuning/room.py",
    "tuning/search.py",
    "tuning/trainable.py",
    "pipelines/compare.py",
    "pipelines/doctor.py",
    "pipelines/jobs.py",
    "pipelines/predict.py",
}
MLFLOW = {
    "advtrain/trackingstore.py",
    "advtrain/tracking.py",
    "advtrain/registry/archive.py",
    "advtrain/registry/champion.py",
    "advtrain/registry/decisions.py",
    "advtrain/registry/transfer.py",
    "advtrain/registry/versions.py",
    "advtrain/promotion/evidence.py",
}


def sources() -> list[Path]:
    return sorted(p for folder in ("advtrain", "tuning", "pipelines") for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> int:
    return next(i for i, group in enumerate(LAYERS) if name in group)


def test_every_part_of_the_library_has_a_layer():
    parts = {
        p.stem if p.suffix else p.name
        for p in (ROOT / "advtrain").iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set().union(*LAYERS)


def test_imports_point_down_only():
    wrong = []
    for path in sources():
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "tuning":
            wrong += [f"{relative}: {name}" for name in imports(path) if name.split(".")[0] == "pipelines"]
        if relative.parts[0] != "advtrain" or relative.parts == ("advtrain", "__init__.py"):
            continue
        here = relative.parts[1].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if (
                parts[0] in ("pipelines", "tuning")
                or parts[0] == "advtrain"
                and len(parts) > 1
                and layer(parts[1]) > layer(here)
            ):
                wrong.append(f"{relative}: {name}")
    assert wrong == []


def test_siblings_import_modules_and_not_their_package_front():
    wrong = []
    for path in sources():
        package = ".".join(path.parent.relative_to(ROOT).parts)
        if (
            path.name != "__init__.py"
            and package not in ("advtrain", "tuning", "pipelines")
            and package in imports(path)
        ):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_ray_and_mlflow_are_imported_in_the_named_files_only():
    for library, allowed in (("ray", RAY), ("mlflow", MLFLOW)):
        users = {
            str(p.relative_to(ROOT)) for p in sources() if any(n.split(".")[0] == library for n in imports(p))
        }
        assert users == allowed
