"""The examples of README and docs: they run as written, or their command lines are parsed.

A comment before a block says how: `needs: X` (not run; `advtrain` commands are parsed), `file: NAME` (written to that
file), `exit: 0 or 1` (exit codes that are allowed).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from advtrain.attacks import SEARCHES
from advtrain.data.sources import SOURCES
from advtrain.models import MODELS
from advtrain.objective import TERMS
from pipelines.cli.cluster import parse_command
from pipelines.cli.main import app
from tests.kit import ROOT, digits_data, user_environment

GENERATED = ROOT / "docs" / "reference" / "generated"
PAGES = [
    ROOT / "README.md",
    *sorted(
        p for p in (ROOT / "docs").rglob("*.md") if GENERATED not in p.parents and "_build" not in p.parts
    ),
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    note: str  # "needs", "file", "exit", or ""
    value: str

    @property
    def lines(self) -> list[str]:
        """Lines of a shell, with continued lines joined."""
        return self.text.replace("\\\n", " ").splitlines()


def blocks(page: Path) -> Iterator[Block]:
    pattern = r"(?:<!-- (needs|file|exit): (.*?) -->\n)?^```(\w+)\n(.*?)^```$"
    for note, value, language, text in re.findall(pattern, page.read_text(), re.S | re.M):
        yield Block(language, text, note, value)


def commands(block: Block) -> list[list[str]]:
    """The words of each `advtrain` command, without the comment behind it."""
    if block.language not in ("sh", "text"):
        return []
    written = [line for line in block.lines if line.startswith("advtrain ")]
    lines = [shlex.split(line, comments=True) for line in written]
    return [words[1:] for words in lines]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def restored_tables() -> Iterator[None]:
    """Examples add rows to the tables; remove them afterwards."""
    tables = (MODELS, SEARCHES, SOURCES, TERMS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def has(page: Path, language: str) -> bool:
    return any(b.note != "needs" and b.language == language for b in blocks(page))


def write_files(page: Path) -> None:
    for block in blocks(page):
        if block.note == "file":
            Path(block.value).write_text(block.text)


def run_python(page: Path) -> None:
    """Run the Python blocks in their order, given a model and data."""
    data = digits_data()
    x, y = torch.from_numpy(data.test.images).float() / 255, torch.from_numpy(data.test.labels)
    namespace = {"__name__": "example", "model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}
    namespace |= {"x": x[:20], "y": y[:20]}
    for block in blocks(page):
        if block.language == "python" and block.note != "needs":
            exec(compile(block.text, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if has(p, "python")], ids=page_id)
def test_python_examples_of_a_page_run_in_order(page, tmp_path, monkeypatch, restored_tables):
    monkeypatch.chdir(tmp_path)
    run_python(page)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("page", [p for p in PAGES if has(p, "sh")], ids=page_id)
def test_shell_examples_of_a_page_run_in_order(page, tmp_path, monkeypatch, restored_tables):
    monkeypatch.chdir(tmp_path)
    write_files(page)
    run_python(page)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for block in blocks(page):
        if block.language != "sh" or block.note == "needs":
            continue
        allowed = {int(code) for code in block.value.split(" or ")} if block.note == "exit" else {0}
        for line in block.lines:
            done = subprocess.run(
                ["bash", "-c", line],
                env=user_environment({"PATH": path}),
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"


PARSED = [(page_id(page), words) for page in PAGES for b in blocks(page) for words in commands(b)]


@pytest.mark.parametrize(("page", "words"), PARSED, ids=lambda v: v if isinstance(v, str) else shlex.join(v))
def test_commands_of_the_pages_are_parsed_by_the_command_line(page, words):
    rest = parse_command(words)
    if words[0] == "submit":
        rest = parse_command(rest)
    assert rest == []


def test_make_targets_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)", page.read_text(), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page_id(page)}: make {target}"


def test_environment_variables_are_documented():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    sources = [p.read_text() for f in ("advtrain", "tuning", "pipelines") for p in (ROOT / f).rglob("*.py")]
    assert set(re.findall(r"ADVTRAIN_[A-Z_]+", "".join(sources))) <= set(
        re.findall(r"ADVTRAIN_[A-Z_]+", page)
    )


def test_commands_named_in_the_text_exist():
    known = set(typer.main.get_command(app).commands)
    for page in PAGES:
        assert set(re.findall(r"`advtrain (\w+)", page.read_text())) <= known, page_id(page)


def test_links_of_readme_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_quoted_errors_of_the_troubleshooting_page_exist():
    sources = "".join(
        p.read_text() for f in ("advtrain", "tuning", "pipelines") for p in (ROOT / f).rglob("*.py")
    )
    joined = re.sub(r"\"\s*f?\"", "", sources)  # strings that Python joins
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^`([^`]+)`\n: ", page, re.M)
    assert len(quoted) > 10
    foreign = {"CUDA out of memory", "CPU", "GLOO_SOCKET_IFNAME="}
    for message in quoted:
        for part in re.split(r"'?\.\.\.'?", message):
            assert part.strip("'?; ") in joined or part.strip() in foreign, (
                f"{message}: no code prints '{part}'"
            )
