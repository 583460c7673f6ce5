"""MLflow tracking: sends the data of a run folder that MLflow does not have yet.

Only this module and `parent_run` write runs to MLflow tracking. Training never waits for the store. If it is
unreachable, the run folder keeps the unsent data, which is sent at the next tick, at the end of the run, or by
`advtrain sync`.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from advtrain.data import ArraySplit, Dataset
from advtrain.documents import read_record
from advtrain.environment import warn_after
from advtrain.errors import UserError
from advtrain.evaluation import load_report
from advtrain.recipe import Recipe
from advtrain.runs.folder import RunFolder, write_atomically
from advtrain.runs.lineage import ancestors_in, ancestors_tag
from advtrain.runs.sealed import sealed_json, unsealed
from advtrain.runs.storage import shared_place
from advtrain.tracking.metrics import log_metrics, metric_name, system_metrics
from advtrain.tracking.store import (
    STATUS,
    check_registry,
    find_experiment,
    open_client,
    present_uri,
    reason_of,
    store_errors,
    tracking_uri,
    user,
)

logger = logging.getLogger(__name__)

#: Seconds between retries while the store is unreachable.
RETRY_S = 10.0

#: Keys of tracking.json.
_STATE = ("uri", "run_id", "experiment_id", "inputs", "epochs", "artifacts", "status", "test")


class Tracker:
    """Tracker that keeps one MLflow run in sync with one run folder."""

    def __init__(self, run: RunFolder, client: Any, state: dict[str, Any]) -> None:
        self.run, self.client, self.state = run, client, state
        self._unreachable_since: float | None = None
        self._next_try = 0.0
        self._is_reconciled = True
        self.reason = ""  # of the last failure

    @classmethod
    def start(
        cls,
        run: RunFolder,
        recipe: Recipe,
        dataset: Dataset,
        uri: str,
        *,
        parent: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> Tracker:
        """Create the MLflow run of a new run folder; `parent` is the id of a parent run."""
        client = open_client(uri, with_registry=False)
        with store_errors(uri):
            experiment_id = find_experiment(client, uri, recipe.name)
            facts = run.facts()
            tags = {
                **(tags or {}),
                "mlflow.user": user(),
                "mlflow.source.name": "advtrain",
                "advtrain.run": run.name,
                "advtrain.recipe_digest": recipe.digest(),
                "advtrain.data_digest": dataset.digest,
                "advtrain.threat": str(recipe.evaluation.threat_model),
                "advtrain.checkpoints": shared_place(run.checkpoints),
                **({"advtrain.start": facts["start"]} if "start" in facts else {}),
                **ancestors_tag(ancestors_in(facts)),
                **({"mlflow.parentRunId": parent} if parent else {}),
                **{f"advtrain.version.{k}": v for k, v in facts["environment"]["versions"].items()},
            }
            git = facts["environment"]["git"]
            if git:
                tags |= {"mlflow.source.git.commit": git["commit"], "advtrain.git_dirty": git["dirty"]}
            made = client.create_run(experiment_id, run_name=run.name, tags=tags)
            state = {
                "uri": uri,
                "run_id": made.info.run_id,
                "experiment_id": experiment_id,
                "inputs": False,
                "epochs": 0,
                "artifacts": [],
                "status": "running",
                "test": False,
            }
            # Written at once: without this file, nothing could find the MLflow run to end it.
            write_atomically(run.path / "tracking.json", sealed_json(state, indent=None))
            tracker = cls(run, client, state)
            tracker._log_inputs(recipe, dataset)
            tracker._send_recipe(made.info.artifact_uri)
        return tracker

    def _send_recipe(self, artifact_uri: str) -> None:
        """Send recipe.yaml; raise a UserError if artifacts can never be written from this machine."""
        path = self.run.path / "recipe.yaml"
        try:
            self.client.log_artifact(self.state["run_id"], str(path))
        except Exception as error:  # from MLflow, the operating system, or any artifact store
            self.client.set_terminated(self.state["run_id"], status=STATUS["failed"])
            raise UserError(
                f"MLflow keeps the artifacts of this experiment in '{artifact_uri}', not writable from here: "
                f"{error}; use the server that made the experiment, or another name with --set name=NAME"
            ) from error
        self._note(artifacts=[_key(path)])

    @classmethod
    def reopen(cls, run: RunFolder, uri: str) -> Tracker:
        """Reopen the MLflow run of an existing run folder. The store may be unreachable.

        Args:
            run: run folder.
            uri: tracking URI of the command: the store may have been moved there.

        Raises:
            UserError: the run was never tracked, or its SQLite store is gone.
        """
        try:
            state = unsealed(read_record(run.path / "tracking.json", *_STATE))
            state["uri"] = present_uri(tracking_uri(state["uri"]), uri)  # earlier versions stored passwords
        except FileNotFoundError as error:
            raise UserError(f"run '{run.name}' was never tracked: it has no tracking.json") from error
        except (OSError, ValueError) as error:
            raise UserError(f"'{run.path / 'tracking.json'}' is unreadable: {error}") from error
        tracker = cls(run, None, state)
        tracker._is_reconciled = False
        tracker._attempt(tracker._reconcile)
        return tracker

    def complete_inputs(self, recipe: Recipe, dataset: Dataset) -> None:
        """Log parameters and data if the process was killed before it had logged them."""
        if not self.state["inputs"]:
            self._attempt(lambda: self._log_inputs(recipe, dataset))

    def sync(self) -> bool:
        """Send all unsent data; return whether MLflow now has everything."""
        return self._attempt(self._send)

    def can_register(self) -> bool:
        """Send pending data; return whether both the store and the registry take what comes next."""
        if not self.sync():
            return False
        try:
            check_registry(self.client, self.state["uri"])
        except UserError as error:
            logger.warning("%s", error)
            return False
        return True

    def pause(self) -> None:
        """Mark the MLflow run as stopped; it can be resumed later."""
        self._attempt(lambda: self.client.set_terminated(self.state["run_id"], status=STATUS["stopped"]))
        self._note(status="stopped")

    def tick(self) -> None:
        """Send new data; after a failure, at most every RETRY_S seconds."""
        if time.monotonic() >= self._next_try:
            self.sync()

    def system_metrics(self) -> AbstractContextManager[None]:
        """Record CPU, memory, disk, network and GPU use of this machine while inside."""
        return system_metrics(self.state["run_id"])

    def _attempt(self, action: Any) -> bool:
        known = self._unreachable_since is not None
        uri = self.state["uri"]
        try:
            with nullcontext() if known else warn_after(10, f"waiting for MLflow at {uri}"):
                if self.client is None or known:  # the first request has short timeouts
                    self.client = open_client(uri, announce=False, with_registry=False)
                action()
        except Exception as error:  # noqa: BLE001 (no tracking error may end training)
            self._next_try, self.reason = time.monotonic() + RETRY_S, reason_of(error)[:200]
            if self._unreachable_since is None:
                self._unreachable_since = time.monotonic()
                logger.warning(
                    "MLflow at %s is unreachable (%s); training continues, and unsent data stays in %s",
                    self.state["uri"],
                    self.reason,
                    self.run.path,
                )
            return False
        if self._unreachable_since is not None:
            logger.warning("MLflow is reachable again; all unsent data was sent")
            self._unreachable_since = None
        return True

    def _reconcile(self) -> None:
        """Read the last sent epoch from MLflow once, in case a kill prevented recording it here.

        Earlier versions logged metrics without groups. Such a run gets all its metrics again, with groups.
        """
        if self._is_reconciled:
            return
        history = self._sent_losses()
        if not history:
            self._note(epochs=0, test=False, recoveries=0, attempts=0)
        self._note(epochs=max([self.state["epochs"], *(m.step for m in history)]))
        self._is_reconciled = True

    def _send(self) -> None:
        self._reconcile()  # if the store was unreachable when the run was reopened
        run_id, lines = self.state["run_id"], self.run.metrics()
        if lines and lines[-1]["epoch"] < self.state["epochs"]:
            # the run was rolled back, or cloned from another trial (population-based training)
            again = max(self.state["epochs"], self.state.get("again", 0))
            self._note(epochs=lines[-1]["epoch"], again=again)
        for line in lines:
            if line["epoch"] > self.state["epochs"]:
                if not self._was_sent(line):
                    self._log(line, step=line["epoch"])
                self._note(epochs=line["epoch"])
        # recipe.yaml is sent again if population-based training has added to training.changes.
        names = ("recipe.yaml", "data.json", "tokenizer.json")
        top = [path for name in names if (path := self.run.path / name).exists()]
        for path in [*top, *sorted(self.run.report.glob("*"))]:
            key = _key(path)
            if path.is_file() and not path.name.startswith(".") and key not in self.state["artifacts"]:
                folder = None if path in top else "report"
                self.client.log_artifact(run_id, str(path), folder)
                self._note(artifacts=[*self.state["artifacts"], key])
        if not self.state["test"] and (self.run.report / "report.json").exists():
            metrics = load_report(self.run.report).metrics
            self._log({f"test_{k}": v for k, v in metrics.items()}, step=self.state["epochs"])
            self._note(test=True)
        self._send_incidents(run_id)
        facts = self.run.facts()
        if facts["status"] != self.state["status"]:
            message = facts.get("message", "")[:5000]
            if message:
                self.client.set_tag(run_id, "advtrain.message", message)
            elif self.state.get("message"):  # the message is outdated
                self.client.delete_tag(run_id, "advtrain.message")
            if facts["status"] == "running":
                self.client.update_run(run_id, status="RUNNING")
            else:
                self.client.set_terminated(run_id, status=STATUS[facts["status"]])
            self._note(status=facts["status"], message=message)

    def _was_sent(self, line: dict[str, Any]) -> bool:
        """Return whether MLflow already has this line.

        An epoch that is trained again from an older checkpoint gives the same metrics.
        """
        if line["epoch"] > self.state.get("again", 0):
            return False
        return any((m.step, m.value) == (line["epoch"], line["train_loss"]) for m in self._sent_losses())

    def _sent_losses(self) -> list[Any]:
        """Return the training losses in MLflow; every sent epoch has one."""
        return list(self.client.get_metric_history(self.state["run_id"], metric_name("train_loss")))

    def _send_incidents(self, run_id: str) -> None:
        """Send the recoveries of the guard and the interruptions of the worker group."""
        records = self.run.recoveries()
        if len(records) > self.state.get("recoveries", 0):
            self.client.set_tag(run_id, "advtrain.guard", json.dumps(records)[:5000])
            for number, record in enumerate(records, 1):
                self._log({"guard_recoveries": number}, step=record["epoch"])
            self._note(recoveries=len(records))
        attempts = self.run.attempts()
        if len(attempts) > max(1, self.state.get("attempts", 0)):  # restarts after a failure or a resize
            self.client.set_tag(run_id, "advtrain.interruptions", json.dumps(attempts[1:])[-5000:])
            self._log({"interruptions": len(attempts) - 1}, step=self.state["epochs"])
            self._note(attempts=len(attempts))

    def _log_inputs(self, recipe: Recipe, dataset: Dataset) -> None:
        """Log every hyperparameter, and the data set with its digest."""
        import mlflow.data
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag, Param

        run_id = self.state["run_id"]
        leaves = [(path, value) for path, value, _ in recipe.leaves() if value is not None]
        self.client.log_batch(run_id, params=[Param(path, str(value)[:6000]) for path, value in leaves])
        inputs, title = [], dataset.title.rstrip("/")
        for context in ("train", "validation", "test"):
            split = getattr(dataset, context)
            features = split.images if isinstance(split, ArraySplit) else split.labels
            data = mlflow.data.from_numpy(
                features,
                targets=split.labels,
                name=f"{title}-{context}",
                digest=dataset.digest[:36],
            )
            inputs.append(DatasetInput(data._to_mlflow_entity(), [InputTag("mlflow.data.context", context)]))
        for ancestor in ancestors_in(self.run.facts()):
            if ancestor.data_digest is not None:
                source = CodeDatasetSource({"advtrain.model": ancestor.reference})
                known = MetaDataset(source, f"data of {ancestor.reference}", ancestor.data_digest[:36])
                tag = InputTag("mlflow.data.context", ancestor.role)
                inputs.append(DatasetInput(known._to_mlflow_entity(), [tag]))
        self.client.log_inputs(run_id, inputs)
        self._note(inputs=True)

    def _log(self, values: dict[str, Any], step: int) -> None:
        log_metrics(self.client, self.state["run_id"], values, step)

    def _note(self, **changes: Any) -> None:
        self.state |= changes
        write_atomically(self.run.path / "tracking.json", sealed_json(self.state, indent=None))


def _key(path: Path) -> str:
    """Return the name of a sent file with the time of its last change."""
    return f"{path.name} {path.stat().st_mtime_ns}"
