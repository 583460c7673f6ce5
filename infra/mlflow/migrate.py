"""Create or upgrade MLflow's tables and those of its accounts, once when several replicas start together.

MLflow's own lock is a file, which does not protect a database from two machines, and the tables of the accounts have no
lock. Here, PostgreSQL's advisory lock makes the second replica wait. It then finds the tables up to date.
"""

from __future__ import annotations

import configparser
import os

import psycopg
from mlflow.cli import cli as mlflow
from mlflow.server.auth.cli import commands as mlflow_auth

#: Any number that no other program uses for an advisory lock in this database.
LOCK = 6_350_217


def main() -> None:
    """Run both of MLflow's upgrade commands while holding the lock."""
    config = configparser.ConfigParser()
    with open(os.environ["MLFLOW_AUTH_CONFIG_PATH"]) as file:
        config.read_file(file)
    tracking, accounts = os.environ["MLFLOW_BACKEND_STORE_URI"], config["mlflow"]["database_uri"]
    with psycopg.connect(tracking, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        # MLflow creates its tables only in an empty database, so they come first.
        mlflow(["db", "upgrade", tracking], standalone_mode=False)
        mlflow_auth(["db", "upgrade", "--url", accounts], standalone_mode=False)


if __name__ == "__main__":
    main()
