"""Fixtures of the fault tests: a cluster, an uninterrupted run, and the table of results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from advtrain.runs.folder import RunFolder
from tests.chaos.story import SLOW, Story, finished, start
from tests.cluster_kit import RayCluster, ray_cluster

_stories: list[Story] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in this folder."""
    for item in items:
        if "chaos" in Path(item.fspath).parts:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Start a head and two nodes. A test that kills a node adds another."""
    with ray_cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def calm(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return an uninterrupted run of two workers."""
    folder = tmp_path_factory.mktemp("calm")
    return finished(start(cluster, folder))


@pytest.fixture(scope="session")
def slow_calm(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return an uninterrupted run of a longer training."""
    return finished(start(cluster, tmp_path_factory.mktemp("slow-calm"), **SLOW))


@pytest.fixture
def story(request: pytest.FixtureRequest) -> Iterator[Story]:
    """Yield the row of the table that the test fills in."""
    story = Story(request.node.name.removeprefix("test_").replace("_", " "))
    yield story
    _stories.append(story)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if not _stories:
        return
    table = Table(title="faults", title_justify="left", show_lines=True)
    for name in ("fault", "back after", "result", "message to the user"):
        table.add_column(name, overflow="fold")
    for story in _stories:
        table.add_row(story.fault, story.back, story.result or "FAILED", story.line)
    terminalreporter.write_line("")
    Console(width=150).print(table)
