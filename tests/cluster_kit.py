"""A Ray cluster of several raylets on this machine, each a node with its own address and CPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.network import Network
from tests.kit import user_environment, wait_for
from tests.servers import free_port

RAY = str(Path(sys.executable).with_name("ray"))
#: Declare a node dead 4 s after its last response, instead of Ray's 30 s.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_health_check_initial_delay_ms": "1000",
}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
QUIET = ["--disable-usage-stats", "--block"]


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    try:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


@dataclass
class Node:
    """A raylet and its processes."""

    ip: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Kill the raylet and all its processes, like a power failure."""
        kill_family(self.process)


class RayCluster:
    """Ray head without CPUs, and nodes with a loopback address or a network namespace each.

    Args:
        folder: Folder for logs.
        network: Gives each node its address and the prefix of its commands.
    """

    def __init__(
        self, folder: Path, env: dict[str, str] | None = None, network: Network | None = None
    ) -> None:
        self.folder, self.env = (
            folder,
            user_environment(IMPATIENT | TOKEN | {"OMP_NUM_THREADS": "1"} | (env or {})),
        )
        self.network = network
        self.nodes: list[Node] = []
        self.placed = 1  # addresses assigned so far; none is reused
        self.port, self.dashboard, self.metrics = free_port(), free_port(), free_port()
        self.temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")  # socket paths have at most 107 bytes
        self.head = self.start_head()

    @property
    def behind(self) -> list[str]:
        """Command prefix that runs a command on the head."""
        return self._place(1)[1]

    @property
    def address(self) -> str:
        """Address of the cluster (host:port)."""
        return f"{self.head.ip}:{self.port}"

    def start_head(self) -> Node:
        """Start or restart the head."""
        ip, behind = self._place(1)
        command = [
            RAY,
            "start",
            "--head",
            f"--port={self.port}",
            "--num-cpus=0",
            f"--temp-dir={self.temporary}",
        ]
        command += [f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        command += [
            f"--metrics-export-port={self.metrics}",
            f"--node-ip-address={ip}",
            f"--dashboard-host={ip}",
        ]
        command += ["--include-dashboard=true", *QUIET]
        self.head = head = self._run([*behind, *command], ip, "head")
        wait_for(lambda: ip in self.alive(), "the head", 60)
        return head

    def add(self, cpus: int = 1, env: dict[str, str] | None = None) -> Node:
        """Start a node and wait until it has joined the cluster."""
        self.placed += 1
        ip, behind = self._place(self.placed)
        command = [RAY, "start", f"--address={self.address}", f"--num-cpus={cpus}", f"--node-ip-address={ip}"]
        command += [
            f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            *QUIET,
        ]
        node = self._run([*behind, *command], ip, f"node-{ip}", env)
        self.nodes.append(node)
        wait_for(lambda: ip in self.alive(), f"the node {ip}", 60)
        return node

    def node_id(self, node: Node) -> str:
        """Return Ray's id of a node."""
        return self.alive()[node.ip]

    def stop(self) -> None:
        """Kill every node."""
        for node in [*self.nodes, self.head]:
            node.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _place(self, number: int) -> tuple[str, list[str]]:
        if self.network is None:
            return f"127.0.0.{10 + number}", []
        return self.network.place(number)

    def _run(self, command: list[str], ip: str, name: str, env: dict[str, str] | None = None) -> Node:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env | (env or {}),
                start_new_session=True,
            )
        return Node(ip, process)

    def alive(self) -> dict[str, str]:
        """Return {address: node id} of the nodes that are alive; empty if the head does not answer."""
        url = f"http://{self.head.ip}:{self.dashboard}/nodes?view=summary"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"})
        try:
            summary = json.load(urllib.request.urlopen(request, timeout=5))["data"]["summary"]
        except (OSError, ValueError):
            return {}
        infos = [node["raylet"] for node in summary]
        return {i["nodeManagerAddress"]: i["nodeId"] for i in infos if i.get("state") == "ALIVE"}


@contextmanager
def ray_cluster(folder: Path, nodes: int, **how: object) -> Iterator[RayCluster]:
    """Run a cluster of a head and `nodes` nodes with one CPU each."""
    cluster = RayCluster(folder, **how)  # type: ignore[arg-type]
    try:
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.stop()
