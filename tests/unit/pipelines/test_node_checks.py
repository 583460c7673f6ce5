"""Checks of `advtrain doctor` on the nodes of a cluster."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from advtrain import cluster
from advtrain.environment import library_versions
from advtrain.errors import UserError
from pipelines import doctor, node_checks
from pipelines.node_checks import NodeFacts, check_nodes
from pipelines.workspace import Workspace
from tests.servers import free_port

HERE = {"python": "3.11.7", "torch": "2.14.1"}


@pytest.mark.parametrize(
    ("facts", "is_seen", "expected"),
    [
        (NodeFacts(HERE), True, []),
        (NodeFacts(HERE | {"torch": "2.9"}), True, ["torch is 2.9 there and 2.14.1 here; install the same"]),
        (NodeFacts({"python": "3.11.7"}), True, ["torch is None there"]),
        (NodeFacts(HERE), False, ["run folder '/mnt' is another folder there"]),
        (NodeFacts(HERE, "Permission denied"), False, ["run folder '/mnt': Permission denied; use --runs"]),
        (
            NodeFacts(HERE | {"python": "3.12"}, "", "timed out"),
            False,
            [
                "python is 3.12 there",
                "run folder '/mnt' is another",
                "MLflow does not answer there: timed out",
            ],
        ),
    ],
)
def test_each_problem_of_a_node_is_named(facts, is_seen, expected):
    found = node_checks._problems(facts, HERE, "/mnt", is_seen=is_seen)
    assert [part in text for part, text in zip(expected, found, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("https://mlflow.example/base/", ("https://mlflow.example/base", "", 0)),
        ("postgresql+psycopg://user@db/name", ("", "db", 5432)),
        ("mysql://db:3307/name", ("", "db", 3307)),
        ("sqlite:////mnt/mlflow.db", ("", "", 0)),
        ("postgresql:///mlflow", ("", "", 0)),
        ("postgresql://h1:5432,h2:5432/mlflow", ("", "", 0)),
    ],
)
def test_server_of_a_tracking_uri(uri, server):
    assert node_checks.server_of(uri) == server


class Refusing(BaseHTTPRequestHandler):
    """Server that asks for credentials."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_look_reports_an_unwritable_folder_and_a_server_that_answers(tmp_path):
    look = node_checks._look()
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    versions, folder, mlflow = look(
        ("torch", "no-such-library"), str(tmp_path / "none"), "file", url, "", 0, {}
    )
    server.shutdown()
    server.server_close()
    assert versions["torch"] == library_versions()["torch"]
    assert versions["no-such-library"] == "not installed"
    assert (folder, mlflow) == ("No such file or directory", "")
    _, folder, mlflow = look((), str(tmp_path), "file", url, "", 0, {})
    assert folder == ""
    assert "refused" in mlflow
    assert (tmp_path / "file").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_nodes_of_a_cluster_are_checked(ray_cluster, tmp_path, monkeypatch):
    def problems(uri: str = "sqlite:////mnt/mlflow.db") -> list[str]:
        ((node, versions, found),) = check_nodes(tmp_path / "runs", uri)
        assert node.partition(" ")[0].count(".") == 3
        assert not found or "no answer" in found[0] or f"torch {library_versions()['torch']}" in versions
        assert list(tmp_path.iterdir()) == []
        return found

    assert problems() == []
    (found,) = problems(f"http://127.0.0.1:{free_port()}")
    assert "MLflow does not answer there" in found
    with monkeypatch.context() as patch:
        patch.setattr(node_checks, "_take", lambda place, name: False)
        (found,) = problems()
    assert "is another folder there" in found
    monkeypatch.setattr(node_checks, "versions_here", lambda: {"torch": "0.1"})
    (found,) = problems()
    assert found.startswith("torch is ")


def test_doctor_checks_no_node_if_the_cluster_does_not_answer(tmp_path, monkeypatch):
    def refuse(address: str | None) -> None:
        raise UserError(f"cannot reach Ray at '{address}'")

    monkeypatch.setattr(doctor, "_store", lambda uri: uri)
    monkeypatch.setattr(doctor, "ray_is_up", lambda: False)  # other tests share a Ray
    monkeypatch.setattr(cluster, "start_ray", refuse)
    verdicts = {
        c.name: c.verdict for c in doctor.check_all(Workspace(tmp_path, "", Path("none"), "head:6379"))
    }
    assert verdicts["Ray"] == "FAIL"
    assert not [name for name in verdicts if name.startswith("node")]
