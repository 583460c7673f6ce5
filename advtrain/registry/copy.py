"""Copies of a version with its evidence, for example from staging to production."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation import load_report
from advtrain.registry.aliases import record_registration
from advtrain.registry.audit_log import create_model, read_chain, require_model
from advtrain.registry.export import description_of
from advtrain.registry.versions import Registered, opened, resolve
from advtrain.runs.lineage import ANCESTORS_TAG, ancestors_tag, named_in_tag, version_in
from advtrain.tracking.metrics import log_metrics
from advtrain.tracking.store import find_experiment, open_client, store_errors

#: Tag of a copy: URI of the source, and its store if that is another server.
ORIGIN_TAG = "advtrain.copied_from"
#: Description of a registered model that a copy creates.
COPIES = "Copies of versions of other registered models."


@dataclass(frozen=True)
class Publication:
    """Content of a version, independent of its store."""

    folder: Path  # with model/, report/ and recipe.yaml
    tags: dict[str, str]  # of the version
    run_name: str
    run_tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def copy(uri: str, tracking_uri: str, name: str, to_tracking_uri: str | None = None) -> Registered:
    """Copy a version into the registered model `name` as challenger.

    The files are checked first. On the same server, MLflow's `copy_model_version` keeps the run. On another server, a
    new run gets the parameters, last metrics, tags, report and decisions of the version. The tag with its ancestors
    names their server then.

    Raises:
        UserError: the version does not exist, a file was changed, or a store cannot be used.
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
                    f"'{uri}' is already a version of '{name}'; choose another model or --to-tracking-uri"
                )
            with store_errors(tracking_uri), _quietly():
                create_model(client, name, COPIES)
                made = client.copy_model_version(origin, name)
                client.set_model_version_tag(name, made.version, ORIGIN_TAG, origin)
        else:
            assert to_tracking_uri is not None
            publication = _publication(client, version, folder, origin, tracking_uri)
            client = open_client(to_tracking_uri, to_tracking_uri)
            with store_errors(to_tracking_uri):
                made = publish(client, to_tracking_uri, name, publication)
    return Registered(name, str(made.version), record_registration(client, name, str(made.version), report))


def publish(client: Any, uri: str, name: str, publication: Publication) -> Any:
    """Create a finished run with the publication, register its model, return the version."""
    from mlflow.entities import Param, RunTag

    experiment = find_experiment(client, uri, name)
    tags = [RunTag(key, value) for key, value in publication.run_tags.items()]
    run = client.create_run(experiment, run_name=publication.run_name)
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in publication.params.items()],
        tags=tags,
    )
    log_metrics(client, run.info.run_id, publication.metrics, step=0)
    client.log_artifacts(run.info.run_id, str(publication.folder))
    client.set_terminated(run.info.run_id, status="FINISHED")
    create_model(client, name, COPIES)
    source = f"runs:/{run.info.run_id}/model"
    return client.create_model_version(
        name,
        source,
        run_id=run.info.run_id,
        tags=publication.tags,
        description=description_of(publication.folder),
    )


def _publication(client: Any, version: Any, folder: Path, origin: str, store: str) -> Publication:
    run = client.get_run(version.run_id)
    kept = {
        k: v for k, v in run.data.tags.items() if k.startswith("advtrain.") or k.startswith("mlflow.source.")
    }
    about = [
        d.model_dump() for d in read_chain(client, version.name).records if d.version == str(version.version)
    ]
    (folder / "decisions.json").write_text(json.dumps(about, indent=1))
    tags = {**_from_store(version.tags, store), ORIGIN_TAG: f"{origin} at {store}"}
    run_tags = _from_store(kept, store)
    return Publication(folder, tags, run.info.run_name, run_tags, run.data.params, run.data.metrics)


def _from_store(tags: Mapping[str, str], store: str) -> dict[str, str]:
    """Return tags for another server, on which the versions of the ancestors are other models."""
    named = [
        replace(each, reference=f"{each.reference} at {store}") if version_in(each.reference) else each
        for each in named_in_tag(tags.get(ANCESTORS_TAG))
    ]
    return {**tags, **ancestors_tag(named)}


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress what MLflow prints about the copy."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()):
        yield
