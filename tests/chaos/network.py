"""Network namespaces, one per node on one bridge, so that the link between two nodes can be cut."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

#: A hardware address that no port of the bridge has: frames to it are dropped silently.
NOBODY = "02:00:00:00:00:ff"


def _run(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """A bridge. Node N has the address 10.77.K.N."""

    def __init__(self) -> None:
        self.kind = os.getpid() % 200 + 20
        self.bridge = f"advb{self.kind}"
        self.spaces: dict[int, str] = {}

    def __enter__(self) -> Network:
        _run("link", "add", self.bridge, "type", "bridge")
        _run("addr", "add", f"{self.ip(254)}/24", "dev", self.bridge)
        _run("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for space in self.spaces.values():
            _run("netns", "del", space)
        _run("link", "del", self.bridge)

    def ip(self, number: int) -> str:
        """Return the address of a node."""
        return f"10.77.{self.kind}.{number}"

    def place(self, number: int) -> tuple[str, list[str]]:
        """Return the address of a node and the command prefix that runs a command on it."""
        if number not in self.spaces:
            space, outside = f"advn{self.kind}-{number}", f"adv{self.kind}-{number}"
            _run("netns", "add", space)
            self.spaces[number] = space
            _run("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("link", "set", outside, "master", self.bridge, "up")
            for words in (
                ["addr", "add", f"{self.ip(number)}/24", "dev", "eth0"],
                ["link", "set", "lo", "up"],
                ["link", "set", "eth0", "up"],
            ):
                _run("-n", space, *words)
        return self.ip(number), ["ip", "netns", "exec", self.spaces[number]]

    def cut(self, one: int, other: int) -> None:
        """Drop all packets between two nodes. Both still reach the other nodes."""
        for here, there in ((one, other), (other, one)):
            words = ["neigh", "replace", self.ip(there), "lladdr", NOBODY, "dev", "eth0", "nud", "permanent"]
            _run("-n", self.spaces[here], *words)

    def mend(self, one: int, other: int) -> None:
        """Undo `cut`."""
        for here, there in ((one, other), (other, one)):
            _run("-n", self.spaces[here], "neigh", "del", self.ip(there), "dev", "eth0")


@contextmanager
def network() -> Iterator[Network]:
    """Create a network; skip the test where that is not permitted."""
    if os.getuid() != 0:
        pytest.skip("only root can make network namespaces")
    try:
        made = Network().__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        yield made
    finally:
        made.__exit__()
