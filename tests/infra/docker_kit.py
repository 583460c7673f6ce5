"""The instructions of infra/docker/Dockerfile, and its build context as .dockerignore leaves it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from tests.kit import ROOT

DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"


@dataclass
class Stage:
    """One stage: its base (an image or another stage) and its instructions as (name, text)."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def read_stages(text: str | None = None) -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the global arguments with their defaults, and the stages by name."""
    lines = re.sub(r"^#.*\n", "", text or DOCKERFILE.read_text(), flags=re.MULTILINE)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, re.sub(r"\\\n", " ", lines).split("\n"))):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.split()
            base = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base)
            stages[name] = Stage(name, base)
        elif word == "ARG" and not stages:
            key, _, value = rest.partition("=")
            arguments[key] = value
        else:
            list(stages.values())[-1].instructions.append((word, rest.strip()))
    return arguments, stages


def chain(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Return a stage and those it is based on, the first one first."""
    stage = stages[name]
    return [*(chain(stages, stage.base) if stage.base in stages else []), stage]


def copied(stage: Stage) -> list[str]:
    """Return the sources that a stage copies from the build context."""
    return [
        word
        for name, text in stage.instructions
        if name == "COPY" and not text.startswith("--from")
        for word in text.split()[:-1]
    ]


def is_ignored(path: str) -> bool:
    """Return whether .dockerignore leaves a file out of the build context; the last matching pattern decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        name = pattern.removeprefix("!")
        parts = path.split("/")
        prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatchcase(prefix, name) for prefix in prefixes) or (
            name.startswith("**/") and name.removeprefix("**/") in parts
        ):
            ignored = not pattern.startswith("!")
    return ignored


def copy_context(files: list[str], folder: Path) -> None:
    """Copy those of the repository's files that .dockerignore leaves in the build context."""
    for file in files:
        if not is_ignored(file) and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
