"""Project rules that can be checked automatically."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.kit import ROOT


def sources() -> list[Path]:
    return sorted(p for folder in ("advtrain", "tuning", "pipelines") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_has_docstring_and_at_most_350_lines(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert text.count("\n") <= 350


def test_no_function_is_longer_than_60_lines():
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}:{node.name} {node.end_lineno - node.lineno + 1}")
    assert long == []


def test_train_step_has_at_most_40_lines():
    tree = ast.parse((ROOT / "advtrain" / "training" / "step.py").read_text())
    (step,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= 40


def imported_modules(path: Path) -> set[str]:
    return {
        n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module
    }


def test_no_module_imports_its_package_in_a_cycle():
    """import-linter checks siblings only, not a package's __init__ against its modules."""
    wrong = []
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        package = module.rpartition(".")[0]
        fronted = module in imported_modules(path.with_name("__init__.py"))
        if path.name != "__init__.py" and fronted and package in imported_modules(path):
            wrong.append(module)
    assert wrong == []


def test_no_absolute_machine_path_is_committed():
    files = subprocess.run(
        ["git", "grep", "-nIE", r"/(work|root|home|farm|opt)/[a-z]", "--", ".", ":!tests/unit/test_house.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert files == ""
