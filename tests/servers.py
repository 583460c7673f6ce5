"""Real servers for tests on loopback and free ports, each stopped by its process id."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import user_environment, wait_for

#: Credentials for moto's server, which accepts any.
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # the metadata service does not exist here
}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(url: str) -> bool:
    """Return whether a server responds at `url`; an HTTP error below 500 counts, 503 does not."""
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


@contextmanager
def running(
    command: list[str], log: Path, env: dict[str, str] | None = None, **how: object
) -> Iterator[subprocess.Popen]:
    """Run a server process inside the context."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=user_environment(env),
            start_new_session=True,
            **how,
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)


def _postgres(name: str) -> str:
    """Return the path of a PostgreSQL program, which Debian keeps outside PATH."""
    found = shutil.which(name) or next(
        (str(p) for p in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None
    )
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    return found


@contextmanager
def postgresql() -> Iterator[str]:
    """Run PostgreSQL on a new cluster; yield the URI of an empty database."""
    programs = [_postgres(name) for name in ("initdb", "postgres")]
    folder, port = Path(tempfile.mkdtemp(prefix="advtrain-pg-")), free_port()
    who: dict[str, object] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    try:
        subprocess.run(
            [
                programs[0],
                "-D",
                str(folder / "data"),
                "-U",
                "advtrain",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-sync",
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            **who,
        )
        command = [
            programs[1],
            "-D",
            str(folder / "data"),
            "-p",
            str(port),
            "-h",
            "127.0.0.1",
            "-k",
            str(folder),
        ]
        log = Path(tempfile.mkdtemp(prefix="advtrain-pglog-")) / "log"
        with running([*command, "-F"], log, cwd=folder, **who):
            uri = f"postgresql://advtrain@127.0.0.1:{port}/postgres"
            wait_for(lambda: _connects(uri), "PostgreSQL", 60)
            yield uri
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _connects(uri: str) -> bool:
    import psycopg

    try:
        psycopg.connect(uri).close()
    except psycopg.OperationalError:
        return False
    return True


@contextmanager
def s3(folder: Path) -> Iterator[dict[str, str]]:
    """Run moto's S3 with a bucket `advtrain`; yield the environment variables for clients."""
    import boto3

    port = free_port()
    program = str(Path(sys.executable).with_name("moto_server"))
    url = f"http://127.0.0.1:{port}"
    with running([program, "-H", "127.0.0.1", "-p", str(port)], folder / "moto.log"):
        wait_for(lambda: answers(url), "moto", 60)
        keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="advtrain")
        yield {"MLFLOW_S3_ENDPOINT_URL": url, "AWS_ENDPOINT_URL": url, **S3_KEYS}


@contextmanager
def mlflow_server(
    database: str, artifacts: str, env: dict[str, str], folder: Path, workers: int = 2
) -> Iterator[str]:
    """Run an MLflow server that proxies artifacts; yield its URI."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        database,
        "--artifacts-destination",
        artifacts,
        "--workers",
        str(workers),
    ]
    env = {**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight more processes, as in infra/mlflow
    with running(command, folder / "mlflow.log", env, cwd=folder):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/health"), "MLflow's server", 120)
        yield url
