"""MLflow run over the runs of a study or a campaign."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from advtrain.tracking.metrics import log_metrics, log_params, system_metrics
from advtrain.tracking.store import (
    STATUS,
    find_experiment,
    open_client,
    present_uri,
    store_errors,
    user,
)


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    """Yield a client of the store; convert errors while it is used into a UserError."""
    client = open_client(uri, with_registry=False)
    with store_errors(uri):
        yield client


@dataclass(frozen=True)
class ParentRun:
    """MLflow run of a study or campaign, the parent of its runs."""

    uri: str
    run_id: str
    experiment_id: str

    @classmethod
    def start(cls, uri: str, experiment: str, name: str, tags: dict[str, str]) -> ParentRun:
        """Create the parent run."""
        with _opened(uri) as client:
            tags = {"mlflow.user": user(), "mlflow.source.name": "advtrain"} | tags
            made = client.create_run(find_experiment(client, uri, experiment), run_name=name, tags=tags)
        return cls(uri, str(made.info.run_id), str(made.info.experiment_id))

    def reopened(self, uri: str) -> ParentRun:
        """Return the parent run with status running; its store may have been moved to `uri`."""
        found = replace(self, uri=present_uri(self.uri, uri))
        with _opened(found.uri) as client:
            client.update_run(self.run_id, status="RUNNING")
        return found

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics; raise UserError if the store cannot be used."""
        with _opened(self.uri) as client:
            log_metrics(client, self.run_id, metrics, step)

    def log_params(self, params: dict[str, str]) -> None:
        """Log parameters; raise UserError if the store cannot be used."""
        with _opened(self.uri) as client:
            log_params(client, self.run_id, params)

    def system_metrics(self) -> AbstractContextManager[None]:
        """Record CPU, memory, disk, network and GPU use of this machine while inside."""
        return system_metrics(self.run_id)

    def finish(
        self,
        metrics: dict[str, float],
        folder: Path | None,
        status: str = "finished",
        tags: dict[str, str] | None = None,
        step: int = 0,
    ) -> None:
        """Log metrics, tags and every file of a folder, and end the run."""
        with _opened(self.uri) as client:
            for name, value in (tags or {}).items():
                client.set_tag(self.run_id, name, value[:5000])
            log_metrics(client, self.run_id, metrics, step)
            if folder is not None:
                client.log_artifacts(self.run_id, str(folder), "report")
            client.set_terminated(self.run_id, status=STATUS[status])
