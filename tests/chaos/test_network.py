"""Faults of the network between nodes in network namespaces."""

from __future__ import annotations

import time

from tests.chaos.network import network
from tests.chaos.story import SLOW, finished, same, start
from tests.cluster_kit import ray_cluster


def test_network_cut_between_two_workers(slow_calm, story, tmp_path):
    """Both nodes still reach the head. The ranks time out, and training continues once the link is back."""
    with network() as net, ray_cluster(tmp_path, nodes=2, network=net) as cluster:
        training = start(cluster, tmp_path, **SLOW, training__timeout_s="15")
        training.until(3)
        net.cut(2, 3)
        cut = time.monotonic()
        training.wait(lambda: (training.run.path / "interruption.json").exists(), "the end of the group", 60)
        noticed = time.monotonic() - cut
        net.mend(2, 3)
        training.wait(lambda: len(training.run.attempts()) > 1, "a new worker group", 90)
        story.back = f"noticed after {noticed:.0f} s, back after {time.monotonic() - cut:.0f} s"
        story.result = same(finished(training), slow_calm)
        story.line = training.find_line("note: rank .*resumed from step")
        assert "timed out" in story.line or "lost its connection" in story.line
        assert noticed < 40
