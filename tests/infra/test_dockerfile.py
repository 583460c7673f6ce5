"""The Dockerfile without Docker: its stages are checked, and executed in a throwaway root.

Not executed: the base images are not downloaded. This machine's root file system takes their place, so a package that
Debian 13 lacks would go unnoticed. In the slow tests, pip writes down its calls and installs only the project, because
PyTorch's packages are gigabytes. The test marked `study` downloads all packages of the target mlflow and checks their
hashes. `EXPOSE` and NVIDIA's variables have no effect without a container.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.infra.docker_kit import Builder, chain, copied, copy_context, is_ignored, read_stages
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


@pytest.fixture
def context(tmp_path):
    """Return the build context: what git holds, without what .dockerignore leaves out."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy_context(files.split(), tmp_path / "context")
    return tmp_path / "context"


@pytest.fixture
def work(tmp_path):
    """Return a folder for the throwaway roots; skip the test where overlays cannot be mounted."""
    folder = tmp_path / "work"
    folder.mkdir()
    options = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
    lines = [
        f"mount -t tmpfs tmpfs {folder}",
        f"mkdir {folder}/upper {folder}/work {folder}/merged",
        f"mount -t overlay overlay -o {options} {folder}/merged",
    ]
    tried = ["unshare", "--mount", "sh", "-ec", "\n".join(lines)]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("overlays cannot be mounted here")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "calls"),
    [
        ("", ["--require-hashes --no-deps -r requirements.lock", "--no-deps ."]),
        (
            "https://torch.example/cpu",
            [
                "--index-url https://torch.example/cpu -c constraints.txt torch torchvision",
                "-c constraints.txt .[cluster,text,vision]",
            ],
        ),
    ],
    ids=["hashes", "torch-index"],
)
def test_lines_of_the_training_image_run(index, calls, context, work):
    programs = "for name in git tini wget; do command -v $name; done"
    files = "cd /usr/local && cat pip.log && if [ -f constraints.txt ]; then cat constraints.txt; fi"
    builder = Builder(work, context, {"TORCH_INDEX": index}, download=False)
    printed = builder.build("cpu", ["id -u; pwd; echo $PPID", programs, files]).splitlines()
    assert printed[:3] == ["1000", "/app", "1"], "user, working directory, and tini is process 1"
    assert [Path(line).name for line in printed[3:6]] == ["git", "tini", "wget"]
    assert printed[6:8] == [f"install --no-cache-dir --prefix=/install {call}" for call in calls]
    end = next(n for n, line in enumerate(printed) if line.startswith("Usage: advtrain"))
    locked = re.findall(r"^(\S+==\S+)", (ROOT / "infra" / "requirements.lock").read_text(), re.MULTILINE)
    constraints = [str(Requirement(line)) for line in printed[8:end] if line]
    assert constraints == ([str(Requirement(line)) for line in locked] if index else [])


@pytest.mark.slow
@pytest.mark.study
def test_lines_of_the_mlflow_image_run_with_all_packages(context, work):
    checks = [
        "id -u; pwd; echo $PPID",
        "for name in pg_dump pg_restore tini wget; do command -v $name; done",
        "python -c 'import boto3, flask_wtf, psycopg, pyarrow, mlflow.server.auth'",
        "python -c 'import torch' 2>&1 | tail -n 1",
        "ls -x",
    ]
    printed = Builder(work, context, {}, download=True).build("mlflow", checks).splitlines()
    assert printed[:3] == ["1000", "/app", "1"]
    assert [Path(line).name for line in printed[3:7]] == ["pg_dump", "pg_restore", "tini", "wget"]
    assert printed[7] == "ModuleNotFoundError: No module named 'torch'"
    assert printed[8].split() == [
        "backup.sh",
        "backup_daily.sh",
        "migrate.py",
        "restore.sh",
        "restore_daily.sh",
    ]
    assert printed[9].startswith("Usage: mlflow server")


def test_image_of_mlflow_server_installs_the_lock_without_torch():
    """`test_packages_of_mlflow_image_are_locked_alike_and_without_torch` checks the lock."""
    _, stages = read_stages()
    assert [stage.name for stage in chain(stages, "mlflow")] == ["mlflow"]
    assert copied(stages["mlflow-build"]) == ["infra/mlflow/requirements.lock"]
    assert ("COPY", "--from=mlflow-build /install /usr/local") in stages["mlflow"].instructions
