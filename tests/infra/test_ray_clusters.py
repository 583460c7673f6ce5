"""The files of `ray up`: Ray refuses their placeholders, and their clusters admit only holders of the token."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from tests.cluster_kit import kill_family
from tests.kit import ROOT, user_environment, wait_for
from tests.servers import free_port

FOLDER = ROOT / "infra" / "ray"
FILES = sorted(FOLDER.glob("*.yaml"))
CLOUDS = [FOLDER / "aws.yaml", FOLDER / "gcp.yaml"]
TOKEN = "0123456789abcdef" * 4
#: A comment with what to write, and the placeholder below it.
PLACEHOLDER = re.compile(r"^( *)# (- |\w+: )(.*)\n\1\2null$", re.MULTILINE)


def filled(path: Path) -> str:
    """Return the file with its placeholders replaced as their comments say."""
    text = PLACEHOLDER.sub(r"\1\2\3", path.read_text())
    return re.sub(r"^( *)# (head_ip|worker_ips): ", r"\1\2: ", text, flags=re.MULTILINE)


def check(config: dict[str, Any]) -> None:
    """Check a file as `ray up` does before it starts a machine."""
    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_filled_cluster_file_is_accepted(path):
    assert not re.search(r"\snull$", filled(path), re.MULTILINE)
    config = yaml.safe_load(filled(path))
    check(config)
    with pytest.raises(Exception, match="upscaling_sped"):
        check({**config, "upscaling_sped": 1})


@pytest.mark.parametrize(
    ("path", "message"),
    [*((path, "image name") for path in CLOUDS), (FOLDER / "onprem.yaml", "head_ip")],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_cluster_file_is_refused_as_shipped(path, message):
    with pytest.raises(Exception, match=message):
        check(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_each_remaining_placeholder_is_refused(path):
    text = filled(path)
    places = [match[3] for match in PLACEHOLDER.finditer(path.read_text())]
    assert len(places) >= 2
    for value in places:
        config = yaml.safe_load(text.replace(value, "null", 1))
        if "project_id" in config["provider"] and config["provider"]["project_id"] is None:
            continue  # below
        with pytest.raises(Exception, match="image name|None is not of type 'string'"):
            check(config)


def test_cluster_on_google_cloud_needs_project(monkeypatch):
    libraries = (
        "googleapiclient",
        "googleapiclient.discovery",
        "googleapiclient.errors",
        "google_auth_httplib2",
    )
    for name in (*libraries, "httplib2"):  # not installed for tests
        monkeypatch.setitem(sys.modules, name, MagicMock())
    from ray.autoscaler._private.gcp.config import _configure_project

    with pytest.raises(AssertionError, match="'project_id' must be set"):
        _configure_project(yaml.safe_load((FOLDER / "gcp.yaml").read_text()), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cluster_file_sends_token_and_starts_ray_with_known_options(path):
    config = yaml.safe_load(path.read_text())
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]
    home = "/app" if "docker" in config else "~"
    assert list(config["file_mounts"]) == [f"{home}/.ray/auth_token"]
    if "docker" in config:
        assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    known = {option for parameter in ray_start.params for option in parameter.opts}
    for part in ("head", "worker"):
        command = config[f"{part}_start_ray_commands"][-1]
        assert command.startswith("RAY_AUTH_MODE=token ray start --")
        assert {word.partition("=")[0] for word in command.split()[3:]} <= known
    starts = config["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in starts
    assert "--dashboard-host=127.0.0.1" in starts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_of_cluster_file_set_all_their_variables(path):
    config = yaml.safe_load(filled(path))
    for key, commands in config.items():
        if not key.endswith("_commands"):
            continue
        for command in commands:
            subprocess.run(["bash", "-n", "-c", command], check=True)
            assert set(re.findall(r"\$\{?(\w+)", command)) <= {"RAY_HEAD_IP"}, "Ray sets only this one"


def test_image_has_home_and_programs_that_clusters_use():
    text = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
    assert "--uid 1000 --create-home --home-dir /app" in text
    for program in ("openssh-client", "rsync"):  # the autoscaler's, to set up workers
        assert program in text


@dataclass
class Machine:
    """A home folder, and the Ray that is started from it."""

    home: Path
    ip: str
    temporary: str

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of a login shell on this machine."""
        plain = {k: v for k, v in user_environment().items() if not k.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return plain | {"HOME": str(self.home), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | more

    def start(self, command: str, *options: str, **env: str) -> subprocess.Popen[bytes]:
        """Run a start command of a cluster file with more options."""
        ports = [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
        words = " ".join([command, *ports, f"--node-ip-address={self.ip}", *options, "--block"])
        with (self.home / "ray.log").open("ab") as log:
            return subprocess.Popen(
                ["bash", "-c", f"exec env {words}"],
                env=self.env(**env),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        """Return what Ray has printed."""
        return (self.home / "ray.log").read_text()


def nodes(machine: Machine, address: str, **env: str) -> tuple[int, str]:
    """Return the number of nodes that are alive as a client sees it, and its errors."""
    client = "import ray; ray.init(log_to_driver=False); print('nodes', sum(n['Alive'] for n in ray.nodes()))"
    done = subprocess.run(
        [sys.executable, "-c", client],
        env=machine.env(RAY_ADDRESS=address, **env),
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = re.search(r"^nodes (\d+)$", done.stdout, re.MULTILINE)
    return int(found[1]) if found else 0, done.stdout + done.stderr


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Return a head, a worker, and a machine without the token."""
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
    found = [Machine(tmp_path / name, f"127.0.0.{31 + i}", temporary) for i, name in enumerate("hws")]
    for machine in found:
        machine.home.mkdir()
    for machine in found[:2]:
        (machine.home / ".ray").mkdir()
        (machine.home / ".ray" / "auth_token").write_text(TOKEN)
    yield found
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_cluster_admits_only_nodes_and_clients_with_the_token(machines):
    """The start commands of onprem.yaml, with other ports and without the autoscaler."""
    config = yaml.safe_load((FOLDER / "onprem.yaml").read_text())
    port, (head, worker, stranger) = free_port(), machines
    start = config["head_start_ray_commands"][-1]
    start = start.replace("6379", str(port)).replace(" --autoscaling-config=~/ray_bootstrap_config.yaml", "")
    join = config["worker_start_ray_commands"][-1].replace("6379", str(port))
    address, started = f"{head.ip}:{port}", []
    options = [f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    try:
        started.append(head.start(start, *options, f"--temp-dir={head.temporary}"))
        wait_for(lambda: "Ray runtime started" in head.log(), "the head", 120)
        started.append(worker.start(join, RAY_HEAD_IP=head.ip))
        wait_for(lambda: "Ray runtime started" in worker.log(), "the worker", 120)
        count, errors = nodes(head, address, RAY_AUTH_MODE="token")
        assert count == 2, errors

        started.append(stranger.start(join, RAY_HEAD_IP=head.ip))
        assert started[-1].wait(120) != 0
        assert "no authentication token" in stranger.log().lower()
        open_join = join.replace("RAY_AUTH_MODE=token ", "")
        started.append(stranger.start(open_join, RAY_HEAD_IP=head.ip))
        assert started[-1].wait(180) != 0
        assert "Ray runtime started" not in stranger.log()
        count, errors = nodes(stranger, address)
        assert count == 0
        assert "Authentication token is missing" in errors
        assert nodes(stranger, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)[0] == 0
        count, errors = nodes(head, address, RAY_AUTH_MODE="token")
        assert count == 2, errors
    finally:
        for process in started:
            kill_family(process)
