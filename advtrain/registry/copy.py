"""A version, with its evidence, in another registry: from staging to production, on one server or across two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation import load_report
from advtrain.registry.aliases import record_registration
from advtrain.registry.audit_log import create_name, read_chain, require_model
from advtrain.registry.versions import Registered, opened, resolve
from advtrain.tracking.store import find_experiment, open_client, store_errors, without_secrets

#: Of a copy: the URI, and for another server the store, that it came from.
ORIGIN_TAG = "advtrain.copied_from"


@dataclass(frozen=True)
class Publication:
    """What a version consists of, wherever it was made."""

    folder: Path  # with model/, report/ and recipe.yaml
    tags: dict[str, str]  # of the version
    run_name: str
    run_tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def copy(uri: str, tracking_uri: str, name: str, to_tracking_uri: str | None = None) -> Registered:
    """Copy a version into the registered model `name` as challenger: the gate there decides.

    Its files are checked first. On the same server it is MLflow's own `copy_model_version`, of the same run; on
    another one the run is made anew with parameters, last metrics, tags, report and what was decided about the version.

    Raises:
        UserError: no such version, a changed file, or a store that cannot be used.
    """
    client = open_client(tracking_uri)
    version = resolve(client, uri)
    origin = f"models:/{version.name}/{version.version}"
    require_model(name)
    with opened(client, version) as folder:
        report = load_report(folder / "report")
        if to_tracking_uri in (None, tracking_uri):
            if name == version.name:
                raise UserError(
                    f"'{uri}' is a version of '{name}' already; name another model or --to-tracking-uri"
                )
            with store_errors(tracking_uri), _quietly():
                made = client.copy_model_version(origin, name)
                client.set_model_version_tag(name, made.version, ORIGIN_TAG, origin)
        else:
            assert to_tracking_uri is not None
            publication = _publication(
                client, version, folder, f"{origin} at {without_secrets(tracking_uri)}"
            )
            client = open_client(to_tracking_uri, to_tracking_uri)
            with store_errors(to_tracking_uri):
                made = publish(client, to_tracking_uri, name, publication)
    return Registered(
        name, str(made.version), record_registration(client, name, str(made.version), report, vacant=False)
    )


def publish(client: Any, uri: str, name: str, publication: Publication) -> Any:
    """Make a finished run that holds the publication, and register its model; return the version."""
    from mlflow.entities import Metric, Param, RunTag

    experiment = find_experiment(client, uri, name)
    tags = [RunTag(key, value) for key, value in publication.run_tags.items()]
    run = client.create_run(experiment, run_name=publication.run_name)
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in publication.params.items()],
        metrics=[Metric(key, value, run.info.start_time, 0) for key, value in publication.metrics.items()],
        tags=tags,
    )
    client.log_artifacts(run.info.run_id, str(publication.folder))
    client.set_terminated(run.info.run_id, status="FINISHED")
    create_name(client, name)
    source = f"runs:/{run.info.run_id}/model"
    return client.create_model_version(name, source, run_id=run.info.run_id, tags=publication.tags)


def _publication(client: Any, version: Any, folder: Path, origin: str) -> Publication:
    run = client.get_run(version.run_id)
    kept = {
        k: v for k, v in run.data.tags.items() if k.startswith("advtrain.") or k.startswith("mlflow.source.")
    }
    about = [
        d.model_dump()
        for d in read_chain(client, version.name).decisions
        if d.version == str(version.version)
    ]
    (folder / "decisions.json").write_text(json.dumps(about, indent=1))
    tags = {**version.tags, ORIGIN_TAG: origin}
    return Publication(folder, tags, run.info.run_name, kept, run.data.params, run.data.metrics)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep MLflow from printing what it copied."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()):
        yield
