"""Workspace: locations of runs, data, tracking store and Ray, and the loading of data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from advtrain.cluster import check_cores, cluster_address, ray_is_up, start_ray
from advtrain.data import DataConfig, Dataset, TextSpec, load_data
from advtrain.data.loading import is_table
from advtrain.data.pretrained_tokenizer import kept_tokenizer
from advtrain.data.sources import IMAGE_FILES
from advtrain.edits import load_table
from advtrain.environment import check_interfaces, describe_environment
from advtrain.errors import UserError
from advtrain.events import Message, Progress, ignore
from advtrain.hub import PREFIX, download, is_pretrained
from advtrain.recipe import Recipe, parse_override
from advtrain.recipe.edits import EditThreatConfig
from advtrain.recipe.model import runs_code
from advtrain.registry.export import check_export
from advtrain.registry.weights import resolve_weights
from advtrain.runs.start import ResolvedWeights
from advtrain.threat import ThreatModel
from advtrain.training import trained_model
from advtrain.training.contract import check_code, check_data
from advtrain.training.start import pinned_as
from advtrain.user_paths import user_path
from tuning.text import duration


@dataclass(frozen=True)
class Workspace:
    """Locations that a job uses. They do not affect its results."""

    runs: Path
    tracking_uri: str
    data_root: Path
    address: str | None = None  # Ray cluster; None: $RAY_ADDRESS or a local one
    allow_download: bool = False  # whether weights of libraries may be downloaded

    def weights(self, reference: str) -> ResolvedWeights:
        """Return the weights that model.from names, see `resolve_weights`."""
        return resolve_weights(
            reference, runs=self.runs, tracking_uri=self.tracking_uri, allow_download=self.allow_download
        )


def first_facts(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return the initial content of a run's run.json."""
    return {
        "status": "running",
        "trained": False,
        "environment": describe_environment(recipe.model.name),
        "data_digest": dataset.digest,
        "started": time.time(),
    }


def training_threat(recipe: Recipe) -> ThreatModel | None:
    """Return the training threat model; its radius is 0 without adversarial training.

    None: the training edits texts, so its threat model is no ball.
    """
    adversary = recipe.adversary
    attacks = recipe.objective.adversarial and adversary.fraction > 0
    if adversary.name == "edits" and attacks:
        return None
    return adversary.threat if attacks else adversary.threat.scaled(0.0)


def check_machine(recipe: Recipe, workspace: Workspace) -> None:
    """Raise a UserError if this machine cannot run the workers that are to be started on it."""
    training = recipe.training
    check_cores(training.min_workers, training.cpus_per_worker, workspace.address)
    if training.num_workers != 0 and cluster_address(workspace.address) is None and not ray_is_up():
        use_gpu = training.accelerator != "cpu" and torch.cuda.is_available()
        check_interfaces("nccl" if use_gpu else "gloo")


def start_for(config: DataConfig, workspace: Workspace) -> None:
    """Start or join Ray if a data set has images in files, which Ray decodes.

    Raises:
        UserError: a parquet file is missing or damaged.
    """
    if config.source in IMAGE_FILES and not is_table(config, workspace.data_root):
        start_ray(workspace.address)


def open_data(config: DataConfig, workspace: Workspace, tokenizer: TextSpec | None = None) -> Dataset:
    """Load a data set, with Ray if it needs it (`start_for`).

    Args:
        config: settings of the data.
        workspace: locations of data and Ray.
        tokenizer: tokenizer of texts; None: the one that the settings name.
    """
    start_for(config, workspace)
    return load_data(config, workspace.data_root, like=tokenizer)


def _kept_tokenizer(recipe: Recipe, kept: Path | TextSpec | None) -> TextSpec | None:
    """Return the kept tokenizer; None if it is made from the training texts."""
    if recipe.data.given_tokenizer is None or not isinstance(kept, Path):
        return None if isinstance(kept, Path) else kept
    return kept_tokenizer(kept, recipe.data.text, recipe.data.label)


def check_model(
    recipe: Recipe, dataset: Dataset, progress: Progress = ignore, *, is_registered: bool = True
) -> None:
    """Raise a UserError if user code is missing, or the model is not fit for the whole run.

    The model must be one that can be trained, evaluated and registered.

    Args:
        recipe: recipe of the training.
        dataset: its data.
        progress: called with each note about the model.
        is_registered: whether the trained model is to be registered. Models of user code and of transformers are then
            exported once, on trial.
    """
    check_code(recipe)
    for note in trained_model.check_model(recipe, dataset):
        progress(Message(f"model '{recipe.model.name}': {note}", "note"))
    if is_registered and (runs_code(recipe.model.name) or is_pretrained(recipe.model.name)):
        with torch.random.fork_rng([]):
            check_export(trained_model.architecture(recipe, dataset).build(), dataset.shape)


def about_report(
    recipe: Recipe | None, seconds: float, training_seconds: float | None = None
) -> dict[str, str]:
    """Return the facts for the head of a report: date, recipe, objective and times.

    Args:
        recipe: recipe of the model; None: unknown.
        seconds: time of the evaluation.
        training_seconds: time of the training; None: unknown.
    """
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    if recipe is not None:
        facts["recipe"] = ", ".join(
            [recipe.name, recipe.description] if recipe.description else [recipe.name]
        )
        facts["objective"] = recipe.objective.formula
        facts["training attack"] = _training_attack(recipe)
    if training_seconds is not None:
        facts["training time"] = duration(training_seconds)
    return facts | {"evaluation time": duration(seconds)}


def _training_attack(recipe: Recipe) -> str:
    """Return the training attack and its radius for the head of a report."""
    adversary, threat = recipe.adversary, training_threat(recipe)
    if (adversary.radius if threat is None else threat.eps) == 0:
        return "none"
    if threat is None:
        return f"edits, {adversary.edits}:{adversary.at_most}, {adversary.search}"
    unit = f" ({adversary.eps} the mean embedding norm)" if "eps" in adversary.relative else ""
    return f"{adversary.name}, {threat}{unit}"


def data_at(recipe: Recipe, path: str | None) -> Recipe:
    """Return the recipe with another data.path; None: unchanged.

    Raises:
        UserError: its data has no path.
    """
    if path is None:
        return recipe
    if recipe.data.path is None:
        raise UserError(
            f"--set data.path: recipe '{recipe.name}' has no data.path (data.source: {recipe.data.source}); "
            "name the folder of its data with --data-root"
        )
    return recipe.model_copy(update={"data": recipe.data.at(path)})


def differs(recipe: Recipe, other: Recipe) -> bool:
    """Return whether the recipe of a run and another one differ in more than data.path.

    What the run has filled in for its start weights, teacher and embedding norm is no difference.
    """
    other = pinned_as(other, recipe)

    def digest(recipe: Recipe) -> str:
        data = recipe.data.model_copy(update={"path": None})
        return recipe.model_copy(update={"data": data}).digest()

    return digest(recipe) != digest(other)


def moved_data(overrides: Sequence[str], allowed: Sequence[str] = ()) -> str | None:
    """Return data.path from the overrides of a resumed run or campaign, or None.

    Args:
        overrides: `path=value` settings.
        allowed: other paths that may be among them.

    Raises:
        UserError: an override would change the result: its path is neither data.path nor in `allowed`. Or data.path is
            no text.
    """
    found = None
    for text in overrides:
        path, value = parse_override(text)
        if path == "data.path":
            if not isinstance(value, str):
                given = text.partition("=")[2]
                raise UserError(f"--set data.path takes a path (got {given}); write data.path=\"'{given}'\"")
            found = value
        elif path not in allowed:
            raise UserError(
                f"--set {path}: a resumed run or campaign keeps its recipe, except for "
                f"{', '.join([*allowed, 'data.path'])}; to change {path}, name a recipe and start a new run"
            )
    return found


def data_exists(config: DataConfig, workspace: Workspace) -> bool:
    """Return whether there is a file or folder at data.path, or none is needed."""
    try:
        return config.path is None or (workspace.data_root / user_path(config.path, "data.path")).exists()
    except UserError:  # a variable in the path is not set here
        return False


def _download(recipe: Recipe) -> None:
    """Download the networks of the Hugging Face hub that a recipe names, unless they are in its cache."""
    for name in {recipe.model.name, recipe.model.from_, recipe.data.tokenizer}:
        if name is not None and is_pretrained(name):
            download(name.removeprefix(PREFIX))


def load_dataset(
    recipe: Recipe,
    workspace: Workspace,
    expected_digest: str | None = None,
    *,
    moved: str = "",
    kept: Path | TextSpec | None = None,
    with_table: bool = True,
    progress: Progress = ignore,
) -> Dataset:
    """Load a recipe's data; raise a UserError if it differs from the expected digest.

    Changed data is split again, and its new test split may contain training samples.

    Args:
        recipe: recipe of the training.
        workspace: locations of data and Ray.
        expected_digest: digest that the data must have; None: any.
        moved: what to do if the data has moved; ends the error if there is nothing at data.path.
        kept: folder of the run or campaign, or the tokenizer of a registered model; its tokenizer is used instead of
            the one that the recipe names. None: that of the recipe.
        with_table: whether the tables of the recipe's edits are loaded, in training and evaluation; False if nothing is
            trained, and others may replace those of the evaluation.
        progress: called with each warning.
    """
    try:
        if kept is None and workspace.allow_download:
            _download(recipe)
        dataset = open_data(recipe.data, workspace, _kept_tokenizer(recipe, kept))
    except UserError as error:
        if not moved or data_exists(recipe.data, workspace):
            raise
        raise UserError(f"{error}; if the data has moved, {moved}") from error
    check_data(recipe, dataset)
    if expected_digest not in (None, dataset.digest):
        raise UserError(
            f"the data has changed since training (digest {str(expected_digest)[:12]}, now {dataset.digest[:12]}), "
            "so its test split may hold training samples; point --data-root at the same data, or train again"
        )
    for remark in recipe.warnings(dataset.eight_bit):
        progress(Message(remark, "warning"))
    if not with_table:
        return dataset
    return with_synonyms(
        _with_training_synonyms(dataset, recipe, workspace), recipe.evaluation.edits, workspace
    )


def _with_training_synonyms(dataset: Dataset, recipe: Recipe, workspace: Workspace) -> Dataset:
    """Return the data set with the table of substitutions of the adversary, if it has one.

    Raises:
        UserError: there is no such table, it is not readable, or it has another digest than that of the recipe.
    """
    adversary = recipe.adversary
    if adversary.table is None:
        return dataset
    table = load_table(adversary.table, workspace.data_root, "adversary.table")
    if adversary.table_digest not in (None, table.digest):
        raise UserError(
            f"adversary.table '{adversary.table}' has other substitutions (digest {table.digest[:12]}) than "
            f"adversary.table_digest ({str(adversary.table_digest)[:12]}); restore the table, or start a new run"
        )
    return replace(dataset, training_synonyms=table)


def with_synonyms(dataset: Dataset, edits: EditThreatConfig | None, workspace: Workspace) -> Dataset:
    """Return the data set with the table of substitutions that edits of words need.

    Raises:
        UserError: there is no such table, or it is not readable.
    """
    if edits is None or edits.table is None or dataset.text is None:
        return dataset
    return replace(dataset, synonyms=load_table(edits.table, workspace.data_root))
