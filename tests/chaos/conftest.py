"""What faults share: a cluster, a run that nothing happened to, and the table of what happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from advtrain.runs.folder import RunFolder
from tests.chaos.story import SLOW, Story, finished, start
from tests.cluster_kit import RayCluster, ray_cluster

_told: list[Story] = []


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
    """A head and two nodes; a test that kills one adds another."""
    with ray_cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def calm(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of two workers that nothing happened to."""
    folder = tmp_path_factory.mktemp("calm")
    return finished(start(cluster, folder))


@pytest.fixture(scope="session")
def slow_calm(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same of a training that takes longer."""
    return finished(start(cluster, tmp_path_factory.mktemp("slow-calm"), **SLOW))


@pytest.fixture
def story(request: pytest.FixtureRequest) -> Iterator[Story]:
    """What a test has to tell: a row of the table."""
    told = Story(request.node.name.removeprefix("test_").replace("_", " "))
    yield told
    _told.append(told)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if not _told:
        return
    table = Table(title="faults", title_justify="left", show_lines=True)
    for name in ("fault", "back after", "result", "what the user was told"):
        table.add_column(name, overflow="fold")
    for told in _told:
        table.add_row(told.fault, told.back, told.result or "FAILED", told.line)
    terminalreporter.write_line("")
    Console(width=150).print(table)
