"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.kit import ROOT

README = (ROOT / "README.md").read_text()


def sources() -> list[Path]:
    return sorted(p for folder in ("advtrain", "tuning", "pipelines") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_opens_with_a_sentence_and_fits_a_sitting(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert text.count("\n") <= 350


def test_no_function_is_longer_than_sixty_lines():
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}:{node.name} {node.end_lineno - node.lineno + 1}")
    assert long == []


def test_the_step_fits_on_a_screen():
    tree = ast.parse((ROOT / "advtrain" / "training" / "step.py").read_text())
    (step,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= 40


def imported_modules(path: Path) -> set[str]:
    return {
        n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module
    }


def test_no_module_imports_a_front_that_imports_it():
    """import-linter looks at siblings; a package's front and its modules are parent and children."""
    wrong = []
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        package = module.rpartition(".")[0]
        fronted = module in imported_modules(path.with_name("__init__.py"))
        if path.name != "__init__.py" and fronted and package in imported_modules(path):
            wrong.append(module)
    assert wrong == []


def test_no_machines_path_is_written_down():
    files = subprocess.run(
        ["git", "grep", "-nIE", r"/(work|root|home|farm|opt)/[a-z]", "--", ".", ":!tests/unit/test_house.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert files == ""


def test_the_readme_names_only_commands_that_exist():
    files = (ROOT / "pipelines" / "cli").glob("*.py")
    commands = set(
        re.findall(r"@(?:app\.)?command(?:\(.*\))?\ndef (\w+)", "".join(file.read_text() for file in files))
    )
    for used in re.findall(
        r"advtrain (\w+)",
        README.split("## ")[0] + "".join(re.findall(r"```(?:sh|bash)?\n(.*?)```", README, re.S)),
    ):
        assert used in commands | {"attacks"}, used
