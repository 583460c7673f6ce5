"""Versions of registered models: register the model of a run, and load versions by URI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from advtrain.data import Dataset
from advtrain.data.unseen import Accepts
from advtrain.documents import read_yaml
from advtrain.errors import UserError, nearest
from advtrain.evaluation import AnyReport
from advtrain.models.serialized import ModelSource
from advtrain.recipe import Recipe, parse_recipe
from advtrain.recipe.data import TextShape
from advtrain.registry.aliases import CHAMPION, PREVIOUS, record_registration
from advtrain.registry.audit_log import (
    create_model,
    is_log,
    read_chain,
    registration,
    require_model,
    require_whole,
)
from advtrain.registry.decision import replay
from advtrain.registry.export import (
    changed_files,
    description_of,
    digest_tags,
    downloaded,
    file_digests,
    log_archive,
    shape_of,
)
from advtrain.registry.facts import facts_of, table_of, text_of
from advtrain.registry.lineage import log_lineage, read_lineage
from advtrain.registry.signing import public_key
from advtrain.registry.stored_log import named
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import Lineage
from advtrain.runs.lineage import ancestors_tag
from advtrain.schema import with_present_names
from advtrain.tracking.store import open_client
from advtrain.tracking.tracker import Tracker


@dataclass(frozen=True)
class Registered:
    """A version in the registry; `champion` is true if it has that alias."""

    name: str
    version: str
    champion: bool

    @property
    def uri(self) -> str:
        """URI of the version, `models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


def register(
    run: RunFolder, tracker: Tracker, model: nn.Module, recipe: Recipe, dataset: Dataset, report: AnyReport
) -> Registered:
    """Log `model` to the MLflow run of `run` and register it as challenger.

    A model whose report is not `trusted` gets no alias. A second call for the same run returns the first version, so a
    resumed job registers nothing twice.
    """
    client, run_id = tracker.client, tracker.state["run_id"]
    if client is None:
        raise UserError(f"the tracking store is unreachable; run `advtrain sync {run.name}` later")
    name = recipe.name
    require_model(name)
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name and version.tags.get("advtrain.run") == run.name:
            return _recorded(client, version, report)
    _forget_unregistered(client, run_id)
    try:
        info = log_archive(run_id, model.eval().cpu(), dataset)
    except Exception as error:
        raise UserError(f"the model of run '{run.name}' cannot be exported or logged: {error}") from error
    lineage = log_lineage(client, run_id, run, dataset)
    create_model(client, name, f"Models of the recipe {name}.")
    tags = {
        "advtrain.run": run.name,
        "advtrain.model_id": str(info.model_id),
        "advtrain.data": dataset.title,
        "advtrain.data_digest": dataset.digest,
        "advtrain.threat": report.threat,
        **{f"advtrain.{name}": value for name, value in report.tags.items()},
        "advtrain.recipe_digest": recipe.digest(),
        **ancestors_tag(lineage.ancestors),
    }
    with downloaded(client, info.model_uri, run_id) as folder:  # digest the stored files
        tags |= digest_tags(file_digests(folder))
        card = description_of(folder)
    version = client.create_model_version(
        name, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id, description=card
    )
    return _recorded(client, version, report)


def _forget_unregistered(client: Any, run_id: str) -> None:
    """Delete the models of a run that a kill left logged and not registered."""
    experiment = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"):
        client.delete_logged_model(model.model_id)


def _recorded(client: Any, version: Any, report: AnyReport) -> Registered:
    name, number = version.name, str(version.version)
    return Registered(name, number, record_registration(client, name, number, report))


def versions(client: Any, name: str) -> list[Any]:
    """Return the versions of a registered model, oldest first."""
    found, token = [], None
    while True:
        page = client.search_model_versions(named(name), max_results=1000, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda v: int(v.version))


def resolve(client: Any, uri: str) -> Any:
    """Return the version, with its tags, for `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    `champion` and `previous` are resolved from the audit log, even if the aliases differ.

    Raises:
        UserError: the version does not exist, or the audit log is damaged.
    """
    from mlflow.exceptions import MlflowException

    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at and alias in (CHAMPION, PREVIOUS):
            chain = read_chain(client, name)
            require_whole(chain, name)
            standing = replay(chain.decisions)
            number = standing.champion if alias == CHAMPION else standing.previous
            if number is not None:
                return client.get_model_version(name, number)
            if public_key() is not None:
                raise UserError(f"'{uri}': no signed decision made a version {alias}")
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, version = name.rpartition("/")
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(
            f"cannot load '{uri}': {error}; URIs look like models:/NAME@champion or models:/NAME/1"
        ) from error


@contextmanager
def opened(client: Any, version: Any) -> Iterator[Path]:
    """Yield a folder with the checked files of a version, see `export.downloaded`.

    Raises:
        UserError: the files cannot be downloaded, or one was changed after registration.
    """
    with downloaded(client, f"models:/{version.name}/{version.version}", version.run_id) as folder:
        recorded = registration(read_chain(client, version.name), str(version.version)).get("files_digest")
        if changed := changed_files(version.tags, folder, recorded=recorded):
            raise UserError(
                f"models:/{version.name}/{version.version} is not what was registered: {'; '.join(changed)}; "
                "it is not loaded"
            )
        yield folder


class RegisteredModel(NamedTuple):
    """A registered model with recipe, digest of its data, data that it accepts, and ancestors."""

    source: ModelSource
    recipe: Recipe
    data_digest: str
    accepts: Accepts
    lineage: Lineage


def load_registered(uri: str, tracking_uri: str) -> RegisteredModel:
    """Load `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: the model or version does not exist, advtrain did not register it, or a file was changed.
    """
    client = open_client(tracking_uri)
    version = resolve(client, uri)
    digest = version.tags.get("advtrain.data_digest")
    if digest is None:
        raise UserError(f"'{uri}' was not registered by advtrain: it has no tag advtrain.data_digest")
    with opened(client, version) as folder:
        # A registered model is an exported graph: nothing imports the code that its recipe names.
        values = with_present_names(read_yaml(folder / "recipe.yaml", "recipe"), Recipe)
        recipe = parse_recipe(values, uri, allow_code=True)
        source = ModelSource((folder / "model" / "data" / "model.pt2").read_bytes())
        shape, outputs = shape_of(folder / "model" / "MLmodel")
        facts, text = facts_of(folder / "model" / "MLmodel"), text_of(folder / "model")
        lineage = read_lineage(folder)
    if text is not None:
        shape = TextShape(text.max_length, text.vocabulary)
    num_classes = 0 if recipe.objective.regression else outputs[0]
    accepts = Accepts(shape, num_classes, facts.get("class_names"), table_of(facts), text)
    return RegisteredModel(source, recipe, digest, accepts, lineage)


def registered_model(client: Any, name: str) -> Any | None:
    """Return the registered model with its aliases; None if it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def registered_names(client: Any) -> list[str]:
    """Return the names of all registered models, without the audit logs."""
    found, token = [], None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        found += [model.name for model in page if not is_log(model.name)]
        token = page.token
        if not token:
            return sorted(found)


def require_registered(client: Any, name: str) -> Any:
    """Return the registered model with this name.

    Raises:
        UserError: the model does not exist.
    """
    require_model(name)
    model = registered_model(client, name)
    if model is None:
        raise UserError(f"no registered model '{name}'{nearest(name, registered_names(client))}")
    return model
