"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest

from tests.kit import ROOT
from tests.unit.test_layers import sources

README = (ROOT / "README.md").read_text()


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
    (step,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "adversarial_step"]
    assert step.end_lineno - step.lineno + 1 <= 40


def test_the_readmes_tree_is_the_tree():
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "advtrain", "tuning", "pipelines"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    block = README.split("```tree\n")[1].split("```")[0]
    shown, stack = set(), []
    for line in block.splitlines():
        name = line.split("#")[0].rstrip()
        if not name.strip():
            continue
        depth = (len(name) - len(name.lstrip())) // 2
        stack = [*stack[:depth], name.strip()]
        if not stack[-1].endswith("/"):
            for single in stack[-1].split():
                shown.add("".join(stack[:-1]) + single)
    wanted = {p for p in tracked if p.endswith((".py", ".yaml")) and not p.endswith("__init__.py")}
    assert {s for s in shown if not s.endswith("__init__.py")} == wanted


def test_no_machines_path_is_written_down():
    files = subprocess.run(
        ["git", "grep", "-nIE", r"/(work|root|home|farm|opt)/[a-z]", "--", ".", ":!tests/unit/test_house.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert files == ""


def test_the_readme_names_only_commands_that_exist():
    files = [ROOT / "pipelines" / name for name in ("__main__.py", "registry_cli.py", "jobs_cli.py")]
    commands = set(
        re.findall(r"@(?:app\.)?command(?:\(.*\))?\ndef (\w+)", "".join(file.read_text() for file in files))
    )
    for used in re.findall(
        r"advtrain (\w+)",
        README.split("## ")[0] + "".join(re.findall(r"```(?:sh|bash)?\n(.*?)```", README, re.S)),
    ):
        assert used in commands | {"attacks"}, used
