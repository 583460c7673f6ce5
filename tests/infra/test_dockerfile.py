"""The Dockerfile's stages without Docker."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.infra.docker_kit import chain, copied, is_ignored, read_stages
from tests.kit import ROOT

TARGETS = ("cpu", "cuda", "mlflow")


def test_dockerfile_bases_are_pinned():
    _, stages = read_stages()
    assert set(TARGETS) <= set(stages)
    for stage in stages.values():
        assert stage.base in stages or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", stage.base), stage.base
        assert "ADD" not in [name for name, _ in stage.instructions]


@pytest.mark.parametrize("target", TARGETS)
def test_image_runs_as_non_root_after_all_files_are_written(target):
    _, stages = read_stages()
    instructions = [i for stage in chain(stages, target) for i in stage.instructions]
    names = [name for name, _ in instructions]
    assert [text for name, text in instructions if name == "USER"] == ["1000"]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name in ("RUN", "COPY"))
    assert '"tini"' in dict(instructions)["ENTRYPOINT"]
    installs = [text for name, text in instructions if "apt-get install" in text]
    assert all("--no-install-recommends" in text for text in installs)


def test_build_context_holds_exactly_what_is_copied():
    _, stages = read_stages()
    sources = {source for stage in stages.values() for source in copied(stage)}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept = {file for file in files.split() if not is_ignored(file)}
    for source in sources:
        assert any(file == source or file.startswith(f"{source}/") for file in kept), source
    unused = {f for f in kept if not any(f == source or f.startswith(f"{source}/") for source in sources)}
    assert unused == set()


def test_image_of_mlflow_server_installs_the_lock_without_torch():
    """`test_packages_of_mlflow_image_are_locked_alike_and_without_torch` checks the lock."""
    _, stages = read_stages()
    assert [stage.name for stage in chain(stages, "mlflow")] == ["mlflow"]
    assert copied(stages["mlflow-build"]) == ["infra/mlflow/requirements.lock"]
    assert ("COPY", "--from=mlflow-build /install /usr/local") in stages["mlflow"].instructions
