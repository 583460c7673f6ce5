"""A run records the commit of the project in the working folder, and runs no program of its git configuration."""

from __future__ import annotations

import builtins
import io
import os
import pwd
import subprocess
from contextlib import nullcontext
from importlib import metadata

import psutil
import pytest

from advtrain import environment
from advtrain.environment import (
    available_cores,
    check_interfaces,
    describe_environment,
    drop_launcher,
    git_state,
    library_versions,
    prepare_home,
    private_folder,
)
from advtrain.errors import UserError


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "own.py").write_text("a = 1\n")
    git("add", "own.py")
    git("commit", "-qm", "first")
    return git


def test_environment_has_the_commit_of_the_working_folder(project, tmp_path):
    assert describe_environment()["git"] == {"commit": project("rev-parse", "HEAD"), "dirty": "false"}
    (tmp_path / "own.py").write_text("a = 2\n")
    assert git_state()["dirty"] == "true"


def test_folder_outside_a_project_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_state() == {}
    assert describe_environment()["versions"]["torch"]


def test_versions_have_timm_for_its_networks_only():
    assert "timm" not in library_versions("mlp")
    assert library_versions("timm:resnet26")["timm"] == metadata.version("timm")


@pytest.mark.parametrize(
    "settings",
    [
        {"core.fsmonitor": "touch ran"},
        {"filter.a.clean": "touch ran; cat"},
        {"filter.a.process": "touch ran"},
    ],
)
def test_git_configuration_of_the_project_runs_no_program(settings, project, tmp_path):
    for key, value in {**settings, "filter.a.required": "true"}.items():
        project("config", key, value)
    (tmp_path / ".git" / "info" / "attributes").write_text("*.py filter=a\n")
    (tmp_path / "own.py").write_text("a = 2\n")
    assert git_state()["dirty"] == "true"
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / ".git" / "ran").exists()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ({}, 8),
    ],
)
def test_available_cores_respects_the_limit_of_a_container(monkeypatch, files, cores):
    exists, read = os.path.exists, open
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os.path, "exists", lambda p: p in files if "cgroup" in str(p) else exists(p))
    monkeypatch.setattr(
        builtins, "open", lambda p, *a, **k: io.StringIO(files[p]) if p in files else read(p, *a, **k)
    )
    assert available_cores() == cores


def test_available_cores_respects_process_cpu_count(monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 1, raising=False)
    assert available_cores() == 1


def test_drop_launcher_returns_and_removes_the_variables_of_torchrun(monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**given, "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert drop_launcher().items() >= given.items()
    assert drop_launcher() == {}
    assert os.environ["SLURM_PROCID"] == "1"


@pytest.mark.parametrize(
    ("backend", "value", "exists"),
    [
        ("gloo", None, True),
        ("gloo", "eth0", True),
        ("gloo", "eth0,lo", True),
        ("gloo", "eth9", False),
        ("gloo", "eth0,eth9", False),
        ("gloo", "eth", False),
        ("nccl", "eth", True),
        ("nccl", "ib,eth", True),
        ("nccl", "=eth", False),
        ("nccl", "=eth0", True),
        ("nccl", "^docker", True),
        ("nccl", "ib", False),
    ],
)
def test_check_interfaces_names_the_interfaces_that_exist(monkeypatch, backend, value, exists):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "eth0": []})
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(f"{backend.upper()}_SOCKET_IFNAME", value)
    message = f"^{backend.upper()}_SOCKET_IFNAME={value} .* node 7, which has eth0, lo; unset"
    with nullcontext() if exists else pytest.raises(UserError, match=message):
        check_interfaces(backend, "node 7")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Return a home folder; no path below it can be written if the folder `read_only` is in it."""
    (tmp_path / "given").mkdir()
    for name in ("HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / "given"))
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr(environment, "private_folder", lambda remedy: tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not (tmp_path / "given" / "read_only").exists())
    return tmp_path / "given"


def test_prepare_home_changes_nothing_if_the_home_is_writable(home):
    prepare_home()
    assert os.environ["HOME"] == str(home)
    assert "MPLCONFIGDIR" not in os.environ


def test_prepare_home_keeps_a_read_only_home_and_replaces_the_folder_of_matplotlib(home):
    (home / "read_only").touch()
    prepare_home()
    assert os.environ["HOME"] == str(home)
    assert os.environ["MPLCONFIGDIR"] == str(home.parent / "home")


@pytest.mark.parametrize("value", [None, "/nonexistent"])
def test_prepare_home_gives_a_home_to_a_user_without_one(home, monkeypatch, value):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    if value:
        monkeypatch.setenv("HOME", value)
    prepare_home()
    assert os.environ["HOME"] == str(home.parent / "home")


def test_private_folder_is_accessible_to_this_user_only(tmp_path):
    folder = private_folder("do this", str(tmp_path))
    assert folder == tmp_path / f"advtrain-{os.getuid()}"
    assert folder.stat().st_mode & 0o077 == 0
    assert private_folder("do this", str(tmp_path)) == folder
    folder.chmod(0o750)
    with pytest.raises(UserError, match="only you can access; remove it, or do this"):
        private_folder("do this", str(tmp_path))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="only you can access; remove it, or do this"):
        private_folder("do this", str(tmp_path))
    folder.unlink()
    folder.touch()
    with pytest.raises(UserError, match="cannot be made .*; do this"):
        private_folder("do this", str(tmp_path))
