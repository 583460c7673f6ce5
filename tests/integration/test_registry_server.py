"""The registry on an MLflow server with PostgreSQL and S3: races, kills, tampering and copies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from advtrain.promotion import PromotionRequest
from advtrain.registry import copy, log_name, read_chain, replay
from advtrain.registry.audit_log import RECORD_TAG
from advtrain.registry.predictor import load_served
from advtrain.tracking.store import open_client
from pipelines.workspace import Workspace
from tests.cli_kit import history, promote
from tests.integration.test_promotion import DEFAULT
from tests.kit import ROOT, user_environment
from tests.registry_kit import aliases, flags, make_archive, make_evaluation, make_version
from tests.servers import mlflow_server, postgresql, s3

pytestmark = pytest.mark.slow

#: Promotes one version once all processes are ready, because imports take a different time in each.
PROMOTER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from advtrain.promotion import PromotionRequest
from tests.cli_kit import promote
from pipelines.workspace import Workspace
from advtrain.promotion import load_policy
store, version, folder, total = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
policy = load_policy(Path({root!r}) / "pipelines" / "policies" / "default.yaml")
policy = policy.model_copy(update={{"repeat_units": 0}})
from advtrain.tracking.store import open_client
import mlflow, torch
open_client(store, must_exist=True).search_registered_models(max_results=1)
(folder / f"ready-{{version}}").touch()
while len(list(folder.glob("ready-*"))) < total:
    time.sleep(0.01)
request = PromotionRequest(version, policy, False, "race", False, 0)
sys.exit(promote({name!r}, Workspace(folder, store, folder), request))
"""


@dataclass(frozen=True)
class Server:
    """An MLflow server, its database and the S3 environment."""

    uri: str
    database: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with (
        postgresql() as database,
        s3(folder) as env,
        mlflow_server(database, "s3://advtrain/artifacts", env, folder) as uri,
    ):
        yield Server(uri, database, env)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    return make_archive(f"sqlite:///{folder / 'mlflow.db'}", folder / "model")


def add(store: str, archive: Path, folder: Path, name: str, robust: int) -> str:
    return make_version(
        store, archive, folder, make_evaluation(flags(1000, 950), flags(1000, robust)), name=name
    )


def start_promoters(store: str, name: str, versions: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    script = folder / "promoter.py"
    script.write_text(PROMOTER.format(root=str(ROOT), name=name))
    return [
        subprocess.Popen(
            [sys.executable, str(script), store, version, str(folder), str(len(versions))],
            env=user_environment({"OMP_NUM_THREADS": "1"}),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for version in versions
    ]


@pytest.mark.parametrize("where", [pytest.param("sqlite", marks=pytest.mark.study), "server"])
def test_exactly_one_of_eight_concurrent_promotions_wins(where, request, store, archive, tmp_path):
    """All eight are equally good. Later ones are refused by the rules, concurrent ones lose the race."""
    uri = store if where == "sqlite" else request.getfixturevalue("server").uri
    name = f"race-{where}"
    add(uri, archive, tmp_path, name, 700)
    versions = [add(uri, archive, tmp_path, name, 800) for _ in range(8)]
    processes = start_promoters(uri, name, versions, tmp_path)
    outputs = {
        version: process.communicate(timeout=300)[0]
        for version, process in zip(versions, processes, strict=True)
    }
    codes = {version: process.returncode for version, process in zip(versions, processes, strict=True)}
    (winner,) = [version for version, code in codes.items() if code == 0]
    waiting = {} if winner == versions[-1] else {"challenger": versions[-1]}
    assert aliases(uri, name) == {"champion": winner, "previous": "1"} | waiting
    chain = read_chain(open_client(uri), name)
    assert chain.faults == []
    assert [d.version for d in chain.decisions if d.kind == "allowed"] == ["1", winner]
    assert sorted(d.version for d in chain.decisions if d.kind == "refused") == sorted(
        set(versions) - {winner}
    )
    for version in set(versions) - {winner}:
        assert codes[version] == 1, outputs[version]
        assert f"version {winner}" in outputs[version] or f"champion {winner}" in outputs[version]
    overtaken = [v for v in versions if "was made champion by" in outputs[v]]
    assert overtaken, "all eight looked at the same champion: some must have been overtaken"


@pytest.mark.parametrize("where", [pytest.param("sqlite", marks=pytest.mark.study), "server"])
def test_killed_promotion_leaves_old_or_new_champion(where, request, store, archive, tmp_path):
    uri = store if where == "sqlite" else request.getfixturevalue("server").uri
    name = f"killed-{where}"
    champion, robust = add(uri, archive, tmp_path, name, 500), 500
    ended = []
    for delay in (0.05, 0.15, 0.3, 0.5, 0.8, 1.2):
        robust += 60
        version = add(uri, archive, tmp_path, name, robust)
        for ready in tmp_path.glob("ready-*"):
            ready.unlink()
        (process,) = start_promoters(uri, name, [version], tmp_path)
        while not list(tmp_path.glob("ready-*")):
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        chain = read_chain(open_client(uri), name)
        assert chain.faults == []
        now = replay(chain.decisions).champion
        assert now in (champion, version)
        assert aliases(uri, name)["champion"] in (champion, version), "never none"
        ended.append(now == version)
        # The next command repairs the aliases, so that the user only has to retry.
        workspace = Workspace(tmp_path, uri, tmp_path)
        assert promote(name, workspace, PromotionRequest(version, DEFAULT, False, "again", False, 0)) == 0
        assert aliases(uri, name)["champion"] == version
        champion = version
    assert history(name, Workspace(tmp_path, uri, tmp_path), verify=True) == 0
    assert ended.count(False) >= 1, "no promotion was killed before its end: the delays are too long"


def test_modified_s3_object_and_database_row_are_detected(server, archive, tmp_path, capsys):
    import boto3
    import psycopg

    name = "tampered"
    add(server.uri, archive, tmp_path, name, 700)
    version = add(server.uri, archive, tmp_path, name, 800)
    client = open_client(server.uri)
    run = client.get_run(client.get_model_version(name, version).run_id)
    keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests", "region_name": "us-east-1"}
    bucket = boto3.resource("s3", endpoint_url=server.env["MLFLOW_S3_ENDPOINT_URL"], **keys).Bucket(
        "advtrain"
    )
    (found,) = [o for o in bucket.objects.all() if run.info.run_id in o.key and o.key.endswith("model.pt2")]
    found.put(Body=b"other weights")
    workspace = Workspace(tmp_path, server.uri, tmp_path)
    assert promote(name, workspace, PromotionRequest(version, DEFAULT, False, "", False, 0)) == 1
    assert "refused: integrity" in capsys.readouterr().out
    assert aliases(server.uri, name)["champion"] == "1"

    assert history(name, workspace, verify=True) == 0
    with psycopg.connect(server.database) as connection, connection.cursor() as cursor:
        cursor.execute(
            "UPDATE model_version_tags SET value = replace(value, '\"refused\"', '\"allowed\"') "
            "WHERE name = %s AND key = %s",
            (log_name(name), RECORD_TAG),
        )
        assert cursor.rowcount
    connection.close()
    assert history(name, workspace, verify=True) == 1
    assert "was altered" in capsys.readouterr().out


def test_copy_to_another_server_keeps_evidence_and_needs_promotion(server, store, archive, tmp_path):
    staging, production = store, server.uri
    add(staging, archive, tmp_path, "digits", 700)
    assert promote_ok(staging, "digits", add(staging, archive, tmp_path, "digits", 800), tmp_path)
    first = copy("models:/digits/1", staging, "production", production)
    assert (first.version, first.champion) == ("1", False)
    assert promote_ok(production, "production", "1", tmp_path)
    second = copy("models:/digits@champion", staging, "production", production)
    assert (second.version, second.champion) == ("2", False)
    client = open_client(production)
    version = client.get_model_version("production", "2")
    assert version.tags["advtrain.robust_accuracy"] == "0.800000"
    assert version.tags["advtrain.copied_from"].startswith("models:/digits/2 at sqlite")
    path = client.download_artifacts(version.run_id, "decisions.json", str(tmp_path))
    assert [d["kind"] for d in json.loads(Path(path).read_text())] == ["registered", "asked", "allowed"]
    assert promote_ok(production, "production", "2", tmp_path)
    assert aliases(production, "production") == {"champion": "2", "previous": "1"}


def test_copy_on_same_server_keeps_run_and_tags(server, archive, tmp_path):
    add(server.uri, archive, tmp_path, "staging", 700)
    made = copy("models:/staging@champion", server.uri, "serving")
    client = open_client(server.uri)
    source, copied = (
        client.get_model_version("staging", "1"),
        client.get_model_version("serving", made.version),
    )
    assert copied.run_id == source.run_id
    assert {k: v for k, v in copied.tags.items() if k != "advtrain.copied_from"} == dict(source.tags)
    assert aliases(server.uri, "serving") == {"challenger": "1"}


def promote_ok(store: str, name: str, version: str, folder: Path) -> bool:
    return (
        promote(
            name, Workspace(folder, store, folder), PromotionRequest(version, DEFAULT, False, "", False, 0)
        )
        == 0
    )


def run_script(name: str, *words: str, server: Server) -> str:
    """Run one of infra/mlflow's scripts with PostgreSQL's programs and this Python in the path."""
    pg = Path(
        shutil.which("pg_dump") or next(str(p) for p in Path("/usr/lib/postgresql").glob("*/bin/pg_dump"))
    ).parent
    path = os.pathsep.join([str(Path(sys.executable).parent), str(pg), os.environ["PATH"]])
    env = user_environment({**server.env, "PATH": path})
    done = subprocess.run(
        [str(ROOT / "infra" / "mlflow" / name), *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_restored_backup_has_aliases_decisions_and_model(server, archive, tmp_path):
    import boto3

    name = "kept"
    add(server.uri, archive, tmp_path, name, 700)
    assert promote_ok(server.uri, name, add(server.uri, archive, tmp_path, name, 800), tmp_path)
    endpoint = server.env["MLFLOW_S3_ENDPOINT_URL"]
    options = f"?endpoint_override={endpoint}&region=us-east-1"
    run_script(
        "backup.sh", server.database, f"s3://advtrain/artifacts{options}", str(tmp_path / "b"), server=server
    )
    sums = (tmp_path / "b" / "SHA256SUMS").read_text().splitlines()
    assert any("database.dump" in line for line in sums)
    assert (tmp_path / "b" / "database.dump").stat().st_mode & 0o077 == 0, "it holds digests of passwords"
    keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket="restored")
    with postgresql() as database:
        run_script(
            "restore.sh", str(tmp_path / "b"), database, f"s3://restored/artifacts{options}", server=server
        )
        (tmp_path / "second").mkdir()
        with mlflow_server(database, "s3://restored/artifacts", server.env, tmp_path / "second") as uri:
            assert aliases(uri, name) == {"champion": "2", "previous": "1"}
            assert (
                read_chain(open_client(uri), name).decisions
                == read_chain(open_client(server.uri), name).decisions
            )
            assert history(name, Workspace(tmp_path, uri, tmp_path), verify=True) == 0
            assert load_served(f"models:/{name}@champion", uri).shape == (1, 8, 8)
    (tmp_path / "b" / "database.dump").write_bytes(b"cut")
    with pytest.raises(AssertionError, match="database.dump"):
        run_script("restore.sh", str(tmp_path / "b"), server.database, "s3://restored/x", server=server)
