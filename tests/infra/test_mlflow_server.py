"""The MLflow server as Compose and Kubernetes start it, with PostgreSQL and an S3 store (moto).

Commands and variables are read from the files below infra/mlflow. Only host names, ports, passwords and the path of
auth.ini are replaced. Not covered: PostgreSQL's password check (the test's cluster trusts every connection), the
containers' read-only root and the network policies.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
import requests
import yaml

from tests.infra.docker_kit import copied, read_stages
from tests.kit import ROOT, user_environment, wait_for
from tests.servers import answers, free_port, postgresql, running, s3

pytestmark = pytest.mark.slow

FOLDER = ROOT / "infra" / "mlflow"
ADMIN = ("admin", "password-of-the-admin")
TRAINER = ("trainer", "password-of-a-trainer")
README = (FOLDER / "README.md").read_text()
USERS = "api/2.0/mlflow/users"


@dataclass(frozen=True)
class Deployment:
    """Command lines and variables of one way to deploy, with example values for secrets."""

    migrate: list[str]
    serve: list[str]
    back_up: list[str]
    restore: list[str]
    env: dict[str, str]
    auth_config: Path


def read_env(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE))


def compose() -> Deployment:
    """Return what compose.yaml starts, with a value for each variable of example.env."""
    values = {key: value or f"value-of-{key}" for key, value in read_env(FOLDER / "example.env").items()}
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda m: values[m[1]], (FOLDER / "compose.yaml").read_text())
    document = yaml.safe_load(text)
    migrate, server, backup = (document["services"][name] for name in ("migrate", "server", "backup"))
    assert migrate["environment"] == server["environment"] == backup["environment"]
    (mount,) = server["configs"]
    assert mount["target"] == server["environment"]["MLFLOW_AUTH_CONFIG_PATH"]
    source = FOLDER / document["configs"][mount["source"]]["file"]
    (words,) = re.findall(r"docker compose run --rm backup (/app/restore\S+.*)", README)
    commands = (migrate["command"], server["command"], backup["command"], words.split())
    return Deployment(*commands, server["environment"], source)


def kubernetes() -> Deployment:
    """Return what the Deployment starts, with settings.env and a value for each key of the secret."""
    folder = FOLDER / "kubernetes"
    pod = list(yaml.safe_load_all((folder / "server.yaml").read_text()))[-1]["spec"]["template"]["spec"]
    (migrate,), (server,) = pod["initContainers"], pod["containers"]
    backup, restore = (scheduled(folder / name) for name in ("backup.yaml", "restore.yaml"))
    generated = yaml.safe_load((folder / "kustomization.yaml").read_text())["configMapGenerator"]
    maps = {entry["name"]: entry for entry in generated}
    sources = [{"configMapRef": {"name": "mlflow"}}, {"secretRef": {"name": "mlflow"}}]
    assert migrate["envFrom"] == server["envFrom"] == backup["envFrom"] == restore["envFrom"] == sources
    assert restore["image"] == backup["image"] == server["image"]
    env = read_env(folder / maps["mlflow"]["envs"][0])
    env |= {key: f"value-of-{key}" for key in read_env(folder / "example.secret.env")}
    (auth,) = [v["configMap"]["name"] for v in pod["volumes"] if v["name"] == "auth"]
    (mounted,) = maps[auth]["files"]
    (mount,) = [m["mountPath"] for m in server["volumeMounts"] if m["name"] == "auth"]
    assert env["MLFLOW_AUTH_CONFIG_PATH"] == f"{mount}/{mounted}"
    commands = (migrate["command"], server["command"], backup["command"], restore["command"])
    return Deployment(*commands, env, folder / mounted)


def scheduled(path: Path) -> dict[str, Any]:
    """Return the container of a CronJob."""
    job = list(yaml.safe_load_all(path.read_text()))[-1]["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


@dataclass(frozen=True)
class Stores:
    """The database, the S3 store and a folder with the files that the image has in its working directory."""

    database: str
    s3: dict[str, str]
    image: Path

    def environment(self, deployment: Deployment) -> dict[str, str]:
        """Return the deployment's variables with the test's hosts, ports and administrator."""
        port = re.search(r":(\d+)/", self.database)[1]  # type: ignore[index]
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        return user_environment(
            {
                **deployment.env,
                "PGHOST": "127.0.0.1",
                "PGPORT": port,
                "MLFLOW_AUTH_CONFIG_PATH": str(deployment.auth_config),
                "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
                "MLFLOW_S3_ENDPOINT_URL": self.s3["MLFLOW_S3_ENDPOINT_URL"],
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "HOME": str(self.image),
                "PATH": path,
            }
        )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return a PostgreSQL with an empty database mlflow, and an S3 store with a bucket mlflow."""
    folder = tmp_path_factory.mktemp("stores")
    image = tmp_path_factory.mktemp("image")
    for source in copied(read_stages()[1]["mlflow"]):
        shutil.copy(ROOT / source, image)
    with postgresql() as database, s3(folder) as env:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("CREATE ROLE mlflow LOGIN")
            connection.execute("CREATE DATABASE mlflow OWNER mlflow")
        bucket_store(env).create_bucket(Bucket="mlflow")
        yield Stores(database.replace("advtrain@", "mlflow@").replace("/postgres", "/mlflow"), env, image)


def bucket_store(env: dict[str, str]) -> Any:
    keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=env["MLFLOW_S3_ENDPOINT_URL"], **keys)


def serve(stack: ExitStack, deployment: Deployment, stores: Stores, log: Path) -> str:
    """Start the deployment's server on a free port of loopback until the stack closes; return its URL."""
    port = free_port()
    words = [word.replace("5000", str(port)).replace("=0.0.0.0", "=127.0.0.1") for word in deployment.serve]
    stack.enter_context(running(words, log, stores.environment(deployment), cwd=stores.image))
    return f"http://localhost:{port}"


def status(url: str, account: tuple[str, str] | None = None, host: str | None = None) -> int:
    """Return the HTTP status of a GET with an account and a Host header; the URL's port is added to it."""
    headers = {"Host": f"{host}:{url.split(':')[2].split('/')[0]}"} if host else {}
    return requests.get(url, auth=account, headers=headers, timeout=30).status_code


def create_account(url: str, account: tuple[str, str], host: str) -> int:
    """Create an account as the administrator; return the HTTP status."""
    return requests.post(
        f"{url}/{USERS}/create",
        json={"username": account[0], "password": account[1]},
        auth=ADMIN,
        headers={"Host": f"{host}:{url.split(':')[2]}"},
        timeout=30,
    ).status_code


@pytest.fixture(scope="module")
def migrations(stores):
    """Run the Deployment's init container twice at the same time on an empty database; return both logs."""
    deployment = kubernetes()
    processes = [
        subprocess.Popen(
            deployment.migrate,
            env=stores.environment(deployment),
            cwd=stores.image,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    logs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    return logs


def test_replicas_started_together_migrate_once(migrations):
    assert sorted("Creating initial MLflow database tables" in log for log in migrations) == [False, True]


@pytest.fixture(scope="module")
def account_status(migrations, stores, tmp_path_factory):
    """Start two replicas at once, create an account at one, use it at the other; return both HTTP statuses."""
    folder, host = tmp_path_factory.mktemp("replicas"), "mlflow.advtrain-mlflow.svc.cluster.local"
    with ExitStack() as stack:
        urls = [serve(stack, kubernetes(), stores, folder / f"{number}.log") for number in range(2)]
        for url in urls:
            wait_for(lambda url=url: answers(f"{url}/health"), "a replica", 180)
        return create_account(urls[0], TRAINER, host), status(f"{urls[1]}/{USERS}/current", TRAINER, host)


def test_account_is_accepted_by_the_other_replica(account_status):
    assert account_status == (200, 200)


@pytest.fixture(scope="module")
def server(account_status, stores, tmp_path_factory):
    """Start Compose's server on the database of the replicas, after both were stopped; yield its URL."""
    deployment = compose()
    subprocess.run(deployment.migrate, env=stores.environment(deployment), cwd=stores.image, check=True)
    with ExitStack() as stack:
        url = serve(stack, deployment, stores, tmp_path_factory.mktemp("server") / "log")
        wait_for(lambda: answers(f"{url}/health"), "the server", 180)
        yield url


@pytest.mark.parametrize(
    ("account", "host", "expected"),
    [
        (None, None, 401),
        ((ADMIN[0], "another-password"), None, 401),
        (("nobody", ADMIN[1]), None, 401),
        (ADMIN, None, 200),
        (TRAINER, None, 200),
        (ADMIN, "evil.example", 403),
    ],
)
def test_server_admits_known_accounts_and_hosts_only(server, account, host, expected):
    """The trainer's account was created before the restart."""
    assert status(f"{server}/{USERS}/current", account, host) == expected


def test_accounts_are_stored_in_postgresql(server, stores):
    with psycopg.connect(stores.database) as connection:
        rows = connection.execute("SELECT username, is_admin FROM users ORDER BY username").fetchall()
    assert rows == [("admin", True), ("trainer", False)]


def run_in_image(command: list[str], stores: Stores, env: dict[str, str], backups: Path) -> None:
    """Run a command of the image on a folder of backups."""
    paths = {"/app": str(stores.image), "/backups": str(backups)}
    words = [re.sub("^/(app|backups)", lambda m: paths[m[0]], word) for word in command]
    subprocess.run(words, env=env, cwd=stores.image, check=True)


def back_up(deployment: Deployment, stores: Stores, folder: Path, **variables: str) -> Path:
    """Run the deployment's scheduled backup into a folder; return the backup that it adds."""
    before = set(folder.iterdir())
    run_in_image(deployment.back_up, stores, stores.environment(deployment) | variables, folder)
    (found,) = set(folder.iterdir()) - before
    return found


def test_scheduled_backup_works_before_the_first_artifact(migrations, stores, tmp_path):
    found = back_up(kubernetes(), stores, tmp_path)
    assert [path.name for path in sorted(found.iterdir())] == ["SHA256SUMS", "artifacts", "database.dump"]


def test_artifact_is_stored_in_s3_through_the_server(server, stores, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", TRAINER[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", TRAINER[1])
    client = MlflowClient(server)
    run = client.create_run(client.create_experiment("robust"))
    (tmp_path / "note.txt").write_text("kept")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    (found,) = bucket_store(stores.s3).list_objects_v2(Bucket="mlflow")["Contents"]
    assert found["Key"].startswith("artifacts/")
    assert Path(client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))).read_text() == "kept"


def test_account_may_read_but_not_change_what_another_created(server):
    reader = ("reader", "password-of-a-reader")
    assert create_account(server, reader, "localhost") == 200
    url, statuses = f"{server}/api/2.0/mlflow/experiments", {}
    made = requests.post(f"{url}/create", json={"name": "owned"}, auth=TRAINER, timeout=30).json()
    for account in (reader, TRAINER):
        read = requests.get(f"{url}/get", params=made, auth=account, timeout=30).status_code
        changed = requests.post(f"{url}/update", json={**made, "new_name": "x"}, auth=account, timeout=30)
        statuses[account[0]] = (read, changed.status_code)
    assert statuses == {"reader": (200, 403), "trainer": (200, 200)}


@pytest.mark.parametrize("deployment", [compose, kubernetes])
def test_scheduled_backup_holds_accounts_and_artifacts_and_keeps_the_newest(
    server, stores, tmp_path, deployment
):
    bucket_store(stores.s3).put_object(Bucket="mlflow", Key="artifacts/1/kept.txt", Body=b"kept")
    for name in ("2026-01-01T03-00-00", "2026-01-02T03-00-00", "2026-01-03T03-00-00.part"):
        (tmp_path / name).mkdir()
    found = back_up(deployment(), stores, tmp_path, BACKUPS_KEPT="2")
    assert (found / "artifacts" / "1" / "kept.txt").read_text() == "kept"
    table = subprocess.run(
        ["pg_restore", "--data-only", "--table=users", "--file=-", str(found / "database.dump")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "trainer" in table
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["2026-01-02T03-00-00", found.name]


def psql_words(tool: str) -> list[str]:
    """Return the psql command of the README that puts an empty database in the place of the old one."""
    (words,) = re.findall(rf"^ *{tool} .*exec .*(psql .*)$", README, re.MULTILINE)
    return shlex.split(words)


@pytest.mark.parametrize(("deployment", "tool"), [(compose, "docker compose"), (kubernetes, "kubectl")])
def test_restore_brings_back_accounts_and_artifacts(server, stores, tmp_path, deployment, tool):
    """The database that is lost has a table of a newer MLflow, which the backup could not remove."""
    bucket = bucket_store(stores.s3)
    bucket.put_object(Bucket="mlflow", Key="artifacts/2/lost.txt", Body=b"found again")
    back_up(deployment(), stores, tmp_path)
    for name in ("2026-01-01T03-00-00", "2999-01-03T03-00-00.part"):
        (tmp_path / name).mkdir()
    bucket.delete_object(Bucket="mlflow", Key="artifacts/2/lost.txt")
    with postgresql() as uri:
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute("CREATE ROLE mlflow LOGIN SUPERUSER")
            connection.execute("CREATE DATABASE mlflow OWNER mlflow")
        mlflow = uri.replace("advtrain@", "mlflow@").replace("/postgres", "/mlflow")
        with psycopg.connect(mlflow) as connection:
            connection.execute("CREATE TABLE experiments (experiment_id INTEGER PRIMARY KEY)")
            connection.execute("CREATE TABLE newer (id INTEGER REFERENCES experiments (experiment_id))")
        env = replace(stores, database=mlflow).environment(deployment())
        subprocess.run(psql_words(tool), env=env, check=True)
        run_in_image(deployment().restore, stores, env, tmp_path)
        subprocess.run(deployment().migrate, env=env, cwd=stores.image, check=True)
        with psycopg.connect(mlflow) as connection:
            users = {name for (name,) in connection.execute("SELECT username FROM users")}
            assert connection.execute("SELECT to_regclass('newer')").fetchone() == (None,)
        with psycopg.connect(mlflow.removesuffix("mlflow") + "before_restore") as connection:
            assert connection.execute("SELECT count(*) FROM newer").fetchone() == (0,)
    assert {"admin", "trainer"} <= users
    kept = bucket.get_object(Bucket="mlflow", Key="artifacts/2/lost.txt")["Body"].read()
    assert kept == b"found again"


@pytest.mark.parametrize("name", ["newest", "2026-01-31T03-00-00", "2026-01-31T03-00-00.part"])
def test_restore_names_a_backup_that_is_missing(stores, tmp_path, name):
    (tmp_path / "2026-01-31T03-00-00.part").mkdir()
    words = [*kubernetes().restore[:1], str(tmp_path), name]
    env = stores.environment(kubernetes())
    script = words[0].replace("/app", str(stores.image))
    done = subprocess.run([script, *words[1:]], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path} has no backup" in done.stderr


def test_readme_chooses_another_backup_in_the_manifest_of_the_job():
    """The command edits the job that `kubectl create job --from` prints."""
    (edit,) = re.findall(r"\| *\n? *sed '(s/[^']+)'|^ *sed '(s/[^']+)'", README, re.MULTILINE)
    template = (FOLDER / "kubernetes" / "restore.yaml").read_text().partition("jobTemplate")[2]
    command = ["sed", next(filter(None, edit))]
    edited = subprocess.run(command, input=template, capture_output=True, text=True, check=True).stdout
    assert "command: [/app/restore_daily.sh, /backups, 2026-01-31T03-00-00]" in edited
    assert "newest" not in edited


def test_restore_cannot_start_by_itself():
    spec = yaml.safe_load((FOLDER / "kubernetes" / "restore.yaml").read_text())["spec"]
    assert spec["suspend"] is True
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0


def test_server_writes_nothing_into_its_working_directory(server, stores):
    """The containers' root is read-only."""
    sources = copied(read_stages()[1]["mlflow"])
    assert {path.name for path in stores.image.iterdir()} == {Path(source).name for source in sources}
