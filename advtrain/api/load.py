"""Loading of models from run folders, registries and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from advtrain.api.checks import validate
from advtrain.api.texts import TextClassifier
from advtrain.data import TextSpec, load_data
from advtrain.data import data_root as default_data_root
from advtrain.data.pretrained_tokenizer import kept_tokenizer
from advtrain.errors import UserError
from advtrain.models import TEXT_MODELS
from advtrain.models.serialized import Architecture, read_model_file
from advtrain.recipe import load_stored_recipe
from advtrain.recipe.model import ModelConfig
from advtrain.runs.folder import RunFolder
from advtrain.training.trained_model import move_hint, trained_model


def load_model(
    source: str | Path,
    *,
    model: str | None = None,
    shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    tracking_uri: str | None = None,
    data_root: str | Path | None = None,
    allow_code: bool = False,
    **architecture: Any,
) -> nn.Module:
    """Load a model on the CPU, in evaluation mode, with inputs in [0, 1].

    A text model maps a list of texts, or their token ids (N, L) int64, to logits. It has its tokenizer in `text`, and
    `encode(texts)` returns the ids. Attacks need its run folder: a registered model hides the embeddings.

    Args:
        source: a run folder of `advtrain train` (its best model by validation robust accuracy), a registered model
            (models:/NAME@ALIAS or models:/NAME/VERSION), a .pt2 archive, or a state dict as .pt, .pth or .safetensors.
        model, shape, num_classes: for a state dict: architecture ("cnn2", ...), shape of a sample, number of classes.
        tracking_uri: for a registered model: MLflow tracking URI; None: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db.
        data_root: for a run folder: folder of the data; None: $ADVTRAIN_DATA_ROOT or ./data.
        allow_code: for a run folder: allow its recipe to import a user-defined model.
        **architecture: for a state dict: arguments of the architecture (depth=34, ...), mean=[...], std=[...].

    Raises:
        UserError: no such source, a modified file, a file with Python objects, or weights of another architecture.
    """
    if str(source).startswith("models:/"):
        from advtrain.registry import load_registered
        from advtrain.tracking.store import tracking_uri as absolute_uri

        found = load_registered(str(source), absolute_uri(tracking_uri))
        return _with_tokenizer(found.source.load(), found.accepts.text, found.accepts.class_names)
    path = Path(source)
    if (path / "run.json").is_file():
        return _of_run(RunFolder(path), None if data_root is None else str(data_root), allow_code)
    if path.suffix == ".pt2":
        return read_model_file(path, None).load()
    if model is None or shape is None or num_classes is None:
        raise UserError(
            f"'{path}' is not a run folder or .pt2 archive; for a state dict, pass model, shape and num_classes, for "
            "example load_model('weights.pt', model='cnn2', shape=(1, 28, 28), num_classes=10)"
        )
    if model in TEXT_MODELS:
        raise UserError(
            f"a state dict of {model} has no tokenizer; load the run folder that trained it, or the registered model"
        )
    values: dict[str, Any] = {key: architecture.pop(key) for key in ("mean", "std") if key in architecture}
    config = validate(ModelConfig, {"name": model, "args": architecture} | values)
    return read_model_file(path, Architecture(config, shape, num_classes)).load()


def _of_run(run: RunFolder, data_root: str | None, allow_code: bool) -> nn.Module:
    """Return the best model of a run, with the tokenizer that it keeps."""
    recipe = load_stored_recipe(run.path / "recipe.yaml", allow_code=allow_code)
    data_config = recipe.data.at(run.facts().get("data_path"))
    kept = None
    if data_config.given_tokenizer is not None:
        kept = kept_tokenizer(run.path, data_config.text, data_config.label)
    try:
        data = load_data(data_config, default_data_root(data_root), like=kept)
    except UserError as error:
        if data_config.path is None:
            raise
        raise UserError(f"{error}; if the data has moved, {move_hint(run)}") from error
    return _with_tokenizer(trained_model(run, recipe, data).load(), data.text, data.class_names)


def _with_tokenizer(model: nn.Module, text: TextSpec | None, class_names: list[str] | None) -> nn.Module:
    """Return a model that takes texts if there is a tokenizer, else the model itself."""
    return model if text is None else TextClassifier(model, text, class_names)
