"""The instructions of infra/docker/Dockerfile, and its build context as .dockerignore leaves it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
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


#: Replaces pip where packages must not be downloaded. It writes down each call and installs only the project.
RECORDING_PIP = """#!/bin/sh
mkdir -p /install
echo "$*" >> /install/pip.log
if [ -f constraints.txt ]; then cp constraints.txt /install; fi
case "$*" in
  *' .'*) exec python -m pip install --no-cache-dir --no-deps --prefix=/install . ;;
esac
"""


@dataclass
class Builder:
    """Execute a target's instructions in throwaway roots, as one shell script.

    Each stage is an overlay on this machine's root file system. In place of the base image, /usr/local contains this
    Python alone, and no user has the id 1000. Nothing outside of `work` is changed, where the script mounts a tmpfs.
    """

    work: Path
    context: Path
    arguments: dict[str, str]
    download: bool

    def build(self, target: str, commands: list[str]) -> str:
        """Return what the commands print that run in the finished image as its user, after its ENTRYPOINT."""
        lines = [
            "set -euo pipefail",
            f"mount -t tmpfs tmpfs {self.work}",
            *self._mount("image", "/"),
            *self._python(self.work / "image" / "merged"),
        ]
        _, stages = read_stages()
        for stage in needed(stages, target):
            lines += self._stage(stage, stages)
        lines += self._run(chain(stages, target), commands)
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", "\n".join(lines)],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def _mount(self, name: str, lower: str) -> list[str]:
        folder = self.work / name
        options = f"lowerdir={lower},upperdir={folder}/upper,workdir={folder}/work"
        return [
            f"mkdir -p {folder}/upper {folder}/work {folder}/merged",
            f"mount -t overlay overlay -o {options} {folder}/merged",
            f"mount -t proc proc {folder}/merged/proc",
            f"mount --rbind /dev {folder}/merged/dev",
        ]

    def _python(self, root: Path) -> list[str]:
        """Return the commands that turn a root into that of the base image."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        local, base = root / "usr" / "local", Path(sys.base_prefix)
        library = base / "lib" / version
        lines = [
            f"rm -rf {local}",
            f"mkdir -p {local}/bin {local}/lib/{version}/site-packages",
            f"cp -a {base}/bin/{version} {local}/bin",
            f"ln -s {version} {local}/bin/python3",
            f"ln -s {version} {local}/bin/python",
            f"cp -a $(ls -d {library}/* | grep -v -e /site-packages -e /test$ -e /config-) {local}/lib/{version}",
            f"cp -a {base}/lib/libpython* {local}/lib || true",  # of a Python that is built as a shared library
            f"chroot {root} ldconfig",
            f"sed -i /:x:1000:/d {root}/etc/passwd {root}/etc/group",
            f"chroot {root} /usr/local/bin/python -m ensurepip --default-pip >&2",
        ]
        if not self.download:
            lines += [f"printf %s {shlex.quote(RECORDING_PIP)} > {local}/bin/pip"]
        return lines

    def _stage(self, stage: Stage, stages: dict[str, Stage]) -> list[str]:
        lowers = [f"{self.work}/{s.name}/upper" for s in reversed(chain(stages, stage.name)[:-1])]
        lines = self._mount(stage.name, ":".join([*lowers, f"{self.work}/image/upper", "/"]))
        root = self.work / stage.name / "merged"
        for position, (name, text) in enumerate(stage.instructions):
            workdir, env = self._state(chain(stages, stage.name), stage, position)
            if name == "RUN":
                lines.append(self._chroot(root, workdir, env, ["sh", "-c", text]) + " >&2")
            elif name == "WORKDIR":
                lines.append(f"mkdir -p {root}{text}")
            elif name == "COPY":
                lines += self._copy(root, workdir, text.split())
            else:
                assert name in ("ARG", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"), (
                    f"{name} is not executed"
                )
        return lines

    def _copy(self, root: Path, workdir: str, words: list[str]) -> list[str]:
        origin = self.context
        if words[0].startswith("--from="):
            origin = self.work / words[0].removeprefix("--from=") / "merged"
            words = words[1:]
        *sources, target = words
        place = f"{root}{Path(workdir) / target}"
        found = [f"{origin}/{source.lstrip('/')}" for source in sources]
        contents = [f"{path}/." if Path(path).is_dir() or origin != self.context else path for path in found]
        return [f"mkdir -p {place}", f"cp -r {' '.join(contents)} {place}"]

    def _state(self, stages: list[Stage], last: Stage, position: int) -> tuple[str, dict[str, str]]:
        """Return the working directory and the variables before an instruction."""
        workdir, env = "/", {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"}
        env |= {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
        for stage in stages:
            for name, text in stage.instructions[: position if stage is last else None]:
                if name == "WORKDIR":
                    workdir = text
                elif name == "ENV":
                    env |= dict(word.split("=", 1) for word in shlex.split(text))
                elif name == "ARG":
                    key, _, value = shlex.split(text)[0].partition("=")
                    env[key] = self.arguments.get(key, value)
        return workdir, env

    def _chroot(self, root: Path, workdir: str, env: dict[str, str], words: list[str], user: str = "") -> str:
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        variables = [f"{key}={value}" for key, value in env.items()]
        return shlex.join(["chroot", str(root), *become, "env", "-i", "-C", workdir, *variables, *words])

    def _run(self, stages: list[Stage], commands: list[str]) -> list[str]:
        """Return the lines that run commands and CMD, with a read-only root, a writable /tmp, and tini as process 1."""
        root = self.work / stages[-1].name / "merged"
        instructions = dict(i for stage in stages for i in stage.instructions)
        workdir, env = self._state(stages, stages[-1], len(stages[-1].instructions))
        env |= {} if self.download else {"PYTHONPATH": "/packages"}
        entry = json.loads(instructions["ENTRYPOINT"])
        words = [*(["sh", "-c", command] for command in commands), json.loads(instructions["CMD"])]
        return [
            f"mkdir -p {root}/packages",
            f"mount --bind {sysconfig.get_path('purelib')} {root}/packages",
            f"mount -o remount,ro {root}",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
            *(
                "unshare --pid --fork " + self._chroot(root, workdir, env, [*entry, *w], instructions["USER"])
                for w in words
            ),
        ]


def needed(stages: dict[str, Stage], target: str) -> list[Stage]:
    """Return the stages that a target is built from, in the order of the file."""
    wanted = {stage.name for stage in chain(stages, target)}
    for stage in reversed(stages.values()):
        if stage.name in wanted:
            wanted |= {part.name for part in chain(stages, stage.name)}
            wanted |= set(re.findall(r"--from=(\S+)", " ".join(text for _, text in stage.instructions)))
    return [stage for stage in stages.values() if stage.name in wanted]
