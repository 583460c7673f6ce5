"""Data sets: a look at what they hold, before anything is trained on them."""

from __future__ import annotations

from pydantic import ValidationError

from advtrain.data import DataConfig, Dataset, load_data
from advtrain.data.loading import is_table
from advtrain.data.locate import data_config
from advtrain.data.summary import DataSummary
from advtrain.data.units import FeatureUnits, feature_units
from advtrain.errors import UserError
from advtrain.events import Message, Progress
from advtrain.recipe import Recipe, parse_override, set_path
from advtrain.recipe.edits import EditThreatConfig
from advtrain.recipe.explain import explain
from advtrain.threat import ThreatModel
from pipelines.workspace import Workspace, load_dataset, open_data, training_threat


def summarize(data: Recipe | str, workspace: Workspace, overrides: list[str] | None = None) -> DataSummary:
    """Load a recipe's data, or the data at a path or of a name, and summarize it.

    Args:
        data: recipe, path, or name of a built-in data set.
        workspace: locations of data and Ray.
        overrides: settings of the data at a path, such as "data.image_size=32".

    Raises:
        UserError: the data is missing or cannot be used; the message names the first fault.
    """
    if isinstance(data, Recipe):
        return DataSummary.of(load_dataset(data, workspace))
    return DataSummary.of(open_data(data_settings(data, workspace, overrides), workspace))


def data_settings(data: str, workspace: Workspace, overrides: list[str] | None = None) -> DataConfig:
    """Return the settings of the data at a path, or of a name, without loading it.

    Args:
        data: path, or name of a built-in data set.
        workspace: location of data.
        overrides: settings of the data, such as "data.image_size=32".

    Raises:
        UserError: there is no such data, or a setting is not one of data.
    """
    values = {"data": data_config(data, workspace.data_root).model_dump(exclude_unset=True)}
    for text in overrides or []:
        path, value = parse_override(text)
        if not path.startswith("data."):
            raise UserError(
                f"--set {text}: only settings of data apply to a path, such as data.image_size=32"
            )
        set_path(values, path, value)
    try:
        return DataConfig.model_validate(values["data"])
    except ValidationError as error:
        raise UserError("\n".join(explain(e, data, DataConfig) for e in error.errors())) from error


def radii(recipe: Recipe) -> dict[str, float]:
    """Return the radii of a recipe by their threat models, such as `linf:0.1 (training)`.

    A training radius that a run has still to measure is left out.
    """
    threats: dict[str, ThreatModel | EditThreatConfig | None] = {"evaluation": recipe.evaluation.threat_model}
    if recipe.adversary.embedding_norm is not None or not recipe.adversary.relative:
        threats["training"] = training_threat(recipe)
    return {f"{threat} ({use})": threat.eps for use, threat in threats.items() if threat and threat.eps > 0}


def table_features(recipe: Recipe, workspace: Workspace) -> list[FeatureUnits]:
    """Return the features of a recipe's table with their ranges; nothing if it has other data.

    Raises:
        UserError: the table cannot be read on this machine.
    """
    if not is_table(recipe.data, workspace.data_root):
        return []
    return feature_units(load_data(recipe.data, workspace.data_root).table)


def announce(dataset: Dataset, progress: Progress) -> DataSummary:
    """Report a data set in a line, and what looks wrong in warnings; return its summary."""
    summary = DataSummary.of(dataset)
    counts = ", ".join(f"{count:,} {name}" for name, count in summary.samples.items())
    unit = " tokens" if dataset.text is not None else " columns" if len(summary.shape) == 1 else ""
    shape = " x ".join(map(str, summary.shape)) + unit
    classes = f", {len(summary.classes)} classes" if summary.classes else ""
    progress(Message(f"data {summary.title}: {counts} samples of {shape}{classes}"))
    for remark in summary.remarks():
        progress(Message(remark, "warning"))
    return summary
