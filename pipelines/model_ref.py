"""Model references: resolve a user's reference to weights, data and evaluation settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from advtrain.data import SOURCES, DataConfig, Dataset, Place, Split, load_data
from advtrain.data.locate import data_config
from advtrain.data.rows import Keys
from advtrain.data.sources import TABLE_FILES
from advtrain.data.unseen import Accepts, as_texts, fitted, load_unseen
from advtrain.documents import parse_yaml
from advtrain.errors import UserError
from advtrain.events import Message, Progress, ignore
from advtrain.models.serialized import Architecture, ModelSource, read_model_file
from advtrain.recipe import Recipe, load_recipe, load_stored_recipe
from advtrain.recipe.data import TEXT_SOURCES
from advtrain.recipe.model import ModelConfig, runs_code
from advtrain.recipe.sections import STATE_DICTS, EvaluationConfig
from advtrain.recipe.threats import parse_threat
from advtrain.registry import load_registered
from advtrain.runs.checkpoint import load_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import Lineage
from advtrain.threat import ThreatModel
from advtrain.training.trained_model import architecture, move_hint, require_recipe, trained_model
from advtrain.user_paths import user_path
from pipelines.leaks import training_keys
from pipelines.threats import judged_at
from pipelines.workspace import (
    Workspace,
    data_at,
    data_exists,
    load_dataset,
    open_data,
    start_for,
    training_threat,
    with_synonyms,
)

#: Suffixes of files with a model that advtrain did not write.
SUFFIXES = (".pt2", *STATE_DICTS)
#: `find_model` loads the table of the edits at its end, since --threat may replace that of the recipe.
_load = partial(load_dataset, with_table=False)


@dataclass(frozen=True)
class ModelUnderTest:
    """Model to evaluate, with its data and evaluation settings."""

    source: ModelSource
    dataset: Dataset
    judge: EvaluationConfig
    trained: ThreatModel | None  # training threat model; None: unknown
    store: Path  # folder of its cached evaluations
    recipe: Recipe | None = None  # None: unknown
    training: Keys | None = (
        None  # keys of its training samples, to be found in other data; None: not searched
    )
    lineage: Lineage = Lineage()


@dataclass(frozen=True)
class ExternalModelSpec:
    """Architecture and normalization of an external state dict, as given by the user."""

    model: str | None = None
    arguments: list[str] = field(default_factory=list)
    mean: str | None = None
    std: str | None = None
    allow_code: bool = False

    def words(self) -> list[str]:
        """Return the options as command-line words."""
        pairs = [
            ("model", self.model),
            *(("arg", a) for a in self.arguments),
            ("mean", self.mean),
            ("std", self.std),
        ]
        words = [word for name, value in pairs if value is not None for word in (f"--{name}", value)]
        return words + self.permission()

    def permission(self) -> list[str]:
        """Return the word that permits user code, if it is permitted."""
        return ["--allow-code"] if self.allow_code else []

    def config(self) -> ModelConfig | None:
        """Return the model's configuration; return None if --model is missing.

        Raises:
            UserError: an argument is not NAME=VALUE, or user code is not allowed.
        """
        if self.model is None:
            if self.words():
                raise UserError(f"{self.words()[0]} needs --model, which is missing")
            return None
        if runs_code(self.model) and not self.allow_code:
            raise UserError(f"--model {self.model} runs your own code; allow it with --allow-code")
        values = {}
        for argument in self.arguments:
            name, equals, value = argument.partition("=")
            if not equals:
                raise UserError(f"--arg takes NAME=VALUE, not '{argument}'")
            values[name] = parse_yaml(value, f"--arg {name}: the value")
        mean, std = (_numbers(name, getattr(self, name)) for name in ("mean", "std"))
        return ModelConfig(name=self.model, args=values, mean=mean, std=std)


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{name} takes numbers separated by commas, not '{text}'") from error


def find_model(
    reference: str,
    workspace: Workspace,
    external: ExternalModelSpec,
    *,
    data: str | None,
    threat: str | None,
    search: bool = False,
    progress: Progress = ignore,
) -> ModelUnderTest:
    """Load a model by `models:/...` URI, run name, run or checkpoint folder, or file.

    Args:
        data: data set to evaluate on; None: the model's own.
        threat: evaluation threat model; None: that of the model's recipe.
        search: if `data` is other data, report what was found in it, and also load the training samples.

    Raises:
        UserError: unknown name, options that do not apply, or a file without data, threat or architecture.
    """
    if (path := user_path(reference, "the model")).suffix in SUFFIXES:
        return _from_file(path, workspace, external, data, threat)
    own: Dataset | None = None
    if reference.startswith("models:/"):
        store = workspace.runs / "evaluations"
        source, recipe, digest, accepts, lineage = load_registered(reference, workspace.tracking_uri)
        if data is None:
            moved = "name its new path with --data"
            dataset = _load(recipe, workspace, digest, moved=moved, kept=accepts.text, progress=progress)
        else:  # without the data of the training, which may not be on this machine
            dataset = other_data(data, workspace, accepts, recipe, digest)
    else:
        checkpoint = (path / "state.json").is_file()
        folder = path.resolve().parents[1] if checkpoint else None
        run = RunFolder(folder) if folder else RunFolder.find(workspace.runs, reference)
        store = run.evaluations
        recipe = load_stored_recipe(run.path / "recipe.yaml", allow_code=external.allow_code)
        digest, lineage = run.facts()["data_digest"], Lineage.of_run(run)
        own, dataset = _run_data(run, recipe, data, workspace, progress)
        if checkpoint:
            state = load_checkpoint(path)
            require_recipe(state, recipe)
            source = ModelSource.of(state.best_weights(), architecture(recipe, own))
        else:
            source = trained_model(run, recipe, own)
    training = None
    if search and data is not None and dataset.digest != digest:
        for remark in dataset.found.notes:
            progress(Message(remark, "note"))
        training = training_keys(lineage, lambda: _training_samples(own, recipe, digest, workspace), progress)
    trained, judge = training_threat(recipe), recipe.evaluation
    under_test = ModelUnderTest(source, dataset, judge, trained, store, recipe, training, lineage)
    if threat is not None:
        under_test = replace(under_test, judge=judged_at(under_test.judge, parse_threat(threat)))
    return replace(under_test, dataset=with_synonyms(under_test.dataset, under_test.judge.edits, workspace))


def _run_data(
    run: RunFolder, recipe: Recipe, data: str | None, workspace: Workspace, progress: Progress
) -> tuple[Dataset, Dataset]:
    """Return the data that a run was trained on, and the data to evaluate it on (`data`; None: its own).

    If its own data is missing, `data` may be its new path.
    """
    facts = run.facts()
    digest, at = facts["data_digest"], data_at(recipe, facts.get("data_path"))
    if data is not None:
        config = _settings(data, workspace)[0]
        config = as_texts(config) if at.data.source == "text" else config
        found = _moved(at, config, digest, workspace)
        if found is not None:
            return found, found
    own = _load(at, workspace, digest, moved=move_hint(run), kept=run.path, progress=progress)
    return own, own if data is None else other_data(data, workspace, accepted_by(own), at, digest)


def _training_samples(own: Dataset | None, recipe: Recipe, digest: str, workspace: Workspace) -> Split:
    """Return the training samples of a model."""
    if own is None and recipe.data.stream:  # its files would be opened to no use
        raise UserError("streamed training images are not compared")
    return (own or _load(recipe, workspace, digest)).train


def _from_file(
    path: Path, workspace: Workspace, external: ExternalModelSpec, data: str | None, threat: str | None
) -> ModelUnderTest:
    for option, value, example in (("--data", data, "mnist"), ("--threat", threat, "linf:0.3")):
        if value is None:
            raise UserError(
                f"'{path}' has no evaluation settings; add {option}, for example {option} {example}"
            )
    assert data is not None
    assert threat is not None
    dataset = other_data(data, workspace)
    if dataset.regression:
        raise UserError(f"{data} is a regression; models from files are evaluated as classifiers")
    config = external.config() if path.suffix in STATE_DICTS else None
    made = None if config is None else Architecture(config, dataset.shape, dataset.num_classes)
    source = read_model_file(path, made)
    _check_outputs(source, dataset, path)
    judge = EvaluationConfig(threat=parse_threat(threat))
    return ModelUnderTest(
        source, with_synonyms(dataset, judge.edits, workspace), judge, None, workspace.runs / "evaluations"
    )


def _check_outputs(source: ModelSource, dataset: Dataset, path: Path) -> None:
    """Raise a UserError unless the model returns one logit per class for any batch size."""
    model = source.load()
    for size in (1, 2):
        x = next(dataset.test.take(np.arange(size)).batches(size, Place())).x
        try:
            with torch.no_grad():
                shape = tuple(model(x).shape)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"'{path}' fails on a batch of {size} samples {dataset.shape} of {dataset.title}: {reason} "
                "(torch.export needs a dynamic batch)"
            ) from error
        if shape != (size, dataset.num_classes):
            raise UserError(
                f"'{path}' has outputs {shape} for {size} samples; {dataset.title} has {dataset.num_classes} classes"
            )


def accepted_by(dataset: Dataset) -> Accepts:
    """Return the data that a model of this data set accepts."""
    return Accepts(dataset.shape, dataset.num_classes, dataset.class_names, dataset.table, dataset.text)


def other_data(
    text: str,
    workspace: Workspace,
    accepts: Accepts | None = None,
    own: Recipe | None = None,
    own_digest: str | None = None,
) -> Dataset:
    """Load the data of a recipe, of a built-in name, or at a path, for an evaluation.

    A recipe and a built-in data set have a test split. So has the data that the model was trained on, also at another
    path. Other data without a test split is evaluated whole.

    Args:
        text: recipe, name or path.
        workspace: locations of data and Ray.
        accepts: the model's inputs and classes; None: unknown.
        own, own_digest: the recipe of the model, and the digest of its data.

    Raises:
        UserError: the data is missing, or the model's inputs or classes differ.
    """
    config, split = _settings(text, workspace)
    if accepts is not None and accepts.text is not None:
        config = as_texts(config)
    if own is not None and _same_place(config, own.data, workspace):
        return _load(own, workspace, own_digest, kept=None if accepts is None else accepts.text)
    if own is not None and (moved := _moved(own, config, own_digest, workspace)) is not None:
        return moved
    if not split:
        start_for(config if accepts is None else fitted(config, accepts), workspace)
        return load_unseen(config, workspace.data_root, accepts)
    if accepts is not None and accepts.table is not None and config.source in TABLE_FILES:
        config = fitted(config, accepts)
        other = load_data(config, workspace.data_root, class_names=accepts.class_names, like=accepts.table)
    elif accepts is not None and accepts.text is not None and config.source in TEXT_SOURCES:
        other = load_data(config, workspace.data_root, class_names=accepts.class_names, like=accepts.text)
    else:
        other = open_data(config, workspace)
    if accepts is not None and (other.shape, other.num_classes) != (accepts.shape, accepts.num_classes):
        raise UserError(
            f"the model has inputs {accepts.shape} and {accepts.num_classes} classes; {text} has {other.shape} "
            f"and {other.num_classes}"
        )
    return other


def _settings(text: str, workspace: Workspace) -> tuple[DataConfig, bool]:
    """Return the data settings of --data, and whether the data has a test split."""
    if text.endswith((".yaml", ".yml")):
        return load_recipe(user_path(text, "--data"), allow_code=True).data, True  # loading data runs no code
    return data_config(text, workspace.data_root), text in SOURCES


def _moved(own: Recipe, config: DataConfig, digest: str | None, workspace: Workspace) -> Dataset | None:
    """Return the data that the model was trained on if it has moved to another path; None if it is other data."""
    if digest is None or config.path is None or config.source != own.data.source:
        return None
    if data_exists(own.data, workspace):
        return None
    try:
        found = open_data(data_at(own, config.path).data, workspace)
    except UserError:  # it does not suit the settings of the recipe
        return None
    return found if found.digest == digest else None


def _same_place(one: DataConfig, other: DataConfig, workspace: Workspace) -> bool:
    """Return whether two settings name the same file, folder or built-in data set."""
    if one.source != other.source or (one.path is None) != (other.path is None):
        return False
    if not all(data_exists(config, workspace) for config in (one, other)):
        return False
    places = [workspace.data_root / user_path(path, "data.path") for path in (one.path, other.path) if path]
    return len({place.resolve() for place in places}) <= 1
