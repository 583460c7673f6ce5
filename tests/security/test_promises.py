"""SECURITY.md promises only what a test shows."""

from __future__ import annotations

import ast
import re

from tests.kit import ROOT


def promises() -> list[list[str]]:
    """Return the cells of each row of the first table: promise, how it is checked, out of scope."""
    text = (ROOT / "SECURITY.md").read_text().partition("## Services")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_promise_names_a_file_of_tests():
    assert len(promises()) >= 10
    for promise, how, *_ in promises():
        named = re.findall(r"`(tests/[\w/]+\.py)`", how)
        assert named, f"no test is named for: {promise}"
        for name in named:
            tree = ast.parse((ROOT / name).read_text())
            tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
            assert tests, f"{name} has no tests"


def test_every_file_of_security_tests_belongs_to_a_promise():
    named = {name for _, how, *_ in promises() for name in re.findall(r"`(tests/[\w/]+\.py)`", how)}
    files = {f"tests/security/{path.name}" for path in (ROOT / "tests" / "security").glob("test_*.py")}
    assert files - {"tests/security/test_promises.py"} <= named
