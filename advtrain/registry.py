"""Export, register, load: models leave as pt2 archives without pickle, and come back by URI."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from advtrain.config import Recipe, parse_recipe
from advtrain.data import Dataset
from advtrain.evaluation import AnyReport
from advtrain.lookup import UserError
from advtrain.modelsource import ModelSource
from advtrain.runfolder import RunFolder
from advtrain.tracking import Tracker
from advtrain.trackingstore import open_client

CHAMPION = "champion"


@dataclass(frozen=True)
class Registered:
    """A version in the registry; `champion` tells whether this call gave it the alias."""

    name: str
    version: str
    champion: bool

    @property
    def uri(self) -> str:
        """The version's URI."""
        return f"models:/{self.name}/{self.version}"


def register(
    run: RunFolder, tracker: Tracker, model: nn.Module, recipe: Recipe, dataset: Dataset, report: AnyReport
) -> Registered:
    """Log `model` to the run's MLflow run, register it, and make it champion if there is none.

    Done twice for one run it returns the first version: a resumed or repeated job registers nothing twice.
    """
    client, run_id = tracker.client, tracker.state["run_id"]
    if client is None:
        raise UserError(f"the tracking store is away; `advtrain sync {run.name}` registers the model later")
    name = recipe.name
    for version in _versions(client, name):
        if version.tags.get("advtrain.run") == run.name and version.run_id == run_id:
            return Registered(name, str(version.version), _take_vacant_alias(client, name, version.version))
    try:
        info = _log_model(run_id, model.eval().cpu(), dataset)
    except Exception as error:
        raise UserError(f"the model of run '{run.name}' cannot be exported or logged: {error}") from error
    _create_name(client, name)
    tags = {
        "advtrain.run": run.name,
        "advtrain.model_id": str(info.model_id),
        "advtrain.data": dataset.name,
        "advtrain.data_digest": dataset.digest,
        "advtrain.threat": report.threat,
        **{f"advtrain.{name}": value for name, value in report.tags.items()},
        "advtrain.recipe_digest": recipe.digest(),
    }
    version = client.create_model_version(
        name, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id
    )
    return Registered(name, str(version.version), _take_vacant_alias(client, name, version.version))


def _log_model(run_id: str, model: nn.Module, dataset: Dataset) -> Any:
    """Log a pt2 archive with signature and example; the batch is dynamic, so the example has two rows."""
    import mlflow
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    example = np.zeros((2, *dataset.shape), np.float32)
    with torch.no_grad():
        outputs = model(torch.from_numpy(example))
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.float32), (-1, *dataset.shape))]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, outputs.shape[1]))]),
    )
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        return mlflow.pytorch.log_model(
            model,
            name="model",
            signature=signature,
            input_example=example,
            serialization_format="pt2",
            pip_requirements=[
                f"mlflow=={mlflow.__version__}",
                f"torch=={torch.__version__.split('+')[0]}",
                "numpy",
            ],
        )


def _versions(client: Any, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _create_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _take_vacant_alias(client: Any, name: str, version: str) -> bool:
    """Make the version champion if no version is; return whether it was made so here."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # A store that cannot be reached raises the same class: it must not pass for a vacant alias.
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            raise
        client.set_registered_model_alias(name, CHAMPION, version)
        return True
    return False


def load_registered(uri: str, tracking_uri: str) -> tuple[ModelSource, Recipe, str]:
    """Read a model by `models:/NAME@ALIAS` or `models:/NAME/VERSION`, its recipe, and its data's digest.

    Raises:
        UserError: no such model or version, or it was not registered by this project.
    """
    client = open_client(tracking_uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        version = _resolve(client, uri)
        digest = version.tags.get("advtrain.data_digest")
        with tempfile.TemporaryDirectory() as folder:
            path = mlflow.artifacts.download_artifacts(
                run_id=version.run_id, artifact_path="recipe.yaml", dst_path=folder
            )
            # A registered model is an exported graph: the recipe's own code, if it has any, is not run.
            recipe = parse_recipe(yaml.safe_load(Path(path).read_text()), uri, allow_code=True)
            archive = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
            source = ModelSource((Path(archive) / "data" / "model.pt2").read_bytes())
    except MlflowException as error:
        raise UserError(
            f"cannot load '{uri}': {error}; URIs look like models:/NAME@champion or models:/NAME/1"
        ) from error
    if digest is None:
        raise UserError(f"'{uri}' was not registered by advtrain: it has no tag advtrain.data_digest")
    return source, recipe, digest


def _resolve(client: Any, uri: str) -> Any:
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at:
        return client.get_model_version_by_alias(name, alias)
    name, _, version = name.rpartition("/")
    return client.get_model_version(name, version)
