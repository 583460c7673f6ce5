"""References to weights: resolve `model.from` to tensors, their digest and their lineage."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import Tensor

from advtrain.data.pretrained_tokenizer import given_digest
from advtrain.data.summary import distinct_names
from advtrain.data.texts import TOKENIZER, tokenizer_digest
from advtrain.data.unseen import Accepts
from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.hub import is_pretrained
from advtrain.models.pretrained import pretrained_weights
from advtrain.models.serialized import Architecture, read_tensors, spellings
from advtrain.models.start import Weights, plain_names, weights_digest
from advtrain.recipe import Recipe, load_stored_recipe
from advtrain.recipe.model import MODEL_LIBRARIES, ModelConfig
from advtrain.recipe.sections import STATE_DICTS
from advtrain.registry.versions import load_registered, resolve
from advtrain.runs.checkpoint import best_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import Lineage
from advtrain.runs.lineage import Ancestor, Role
from advtrain.runs.sealed import unsealed
from advtrain.runs.start import ResolvedWeights
from advtrain.tracking.store import open_client
from advtrain.user_paths import user_path


def resolve_weights(
    reference: str,
    *,
    runs: Path,
    tracking_uri: str,
    allow_download: bool = False,
) -> ResolvedWeights:
    """Return the weights that a reference names.

    Args:
        reference: models:/NAME@ALIAS, models:/NAME/VERSION, name or folder of a run (its best checkpoint), a file
            with a state dict (.safetensors, .pt, .pth), timm:NAME, torchvision:NAME/WEIGHTS, or hf:FOLDER_OR_NAME.
        runs: folder of the run folders.
        tracking_uri: MLflow store with the registered models.
        allow_download: whether weights of libraries may be downloaded; else they are read from the cache.

    Raises:
        UserError: there are no such weights, they hold more than tensors, or a download is needed and not allowed.
    """
    source, colon, name = reference.partition(":")
    path = user_path(reference, "model.from")
    try:
        if reference.startswith("models:/"):
            return _of_version(reference, tracking_uri)
        if colon and source in MODEL_LIBRARIES:
            return _of_library(reference, source, name, allow_download)
        if path.suffix in STATE_DICTS:
            return _of_file(reference, path)
        return _of_run(reference, runs)
    except UserError as error:
        raise UserError(f"model.from '{reference}': {error}") from error


def _of_run(reference: str, runs: Path) -> ResolvedWeights:
    run = RunFolder.find(runs, reference)
    # The weights are data: the code that the recipe names is not imported.
    recipe = load_stored_recipe(run.path / "recipe.yaml", allow_code=True)
    weights = dict(best_checkpoint(run.checkpoints).best_weights())
    lineage = Lineage.of_run(run)
    digest = weights_digest(weights)
    older = _ancestors(recipe, lineage)
    ancestor = Ancestor("start", reference, digest, run.name, lineage.data_digest, older)
    made, classes = _samples_of(run, recipe)
    tokenizer = _tokenizer_at(run.path)
    return ResolvedWeights(weights, ancestor, recipe.model, made, classes, lineage.records, tokenizer)


def _tokenizer_at(folder: Path) -> str | None:
    """Return the digest of the tokenizer in a folder; None if there is none."""
    path = folder / TOKENIZER
    return given_digest(str(path).replace("$", "$$")) if path.is_file() else None


def _ancestors(recipe: Recipe, lineage: Lineage) -> tuple[Ancestor, ...]:
    """Return the recorded ancestors, and those that the recipe names without a record of their data."""
    model, objective = recipe.model, recipe.objective
    named: dict[Role, tuple[str | None, str | None]] = {
        "start": (model.from_, model.from_digest),
        "teacher": (objective.teacher, objective.teacher_digest),
    }
    recorded = {ancestor.role for ancestor in lineage.ancestors}
    unrecorded = [
        Ancestor(role, reference, digest or "")
        for role, (reference, digest) in named.items()
        if reference is not None and role not in recorded
    ]
    return (*lineage.ancestors, *unrecorded)


def _samples_of(run: RunFolder, recipe: Recipe) -> tuple[Architecture | None, list[str] | None]:
    """Return the architecture of a run's model and its classes.

    They are None for a regression, or if data.json lacks the shape.
    """
    with suppress(OSError, ValueError):
        facts = unsealed(read_record(run.path / "data.json", "shape", "classes"))
        if facts["classes"]:
            classes = list(facts["classes"])
            return Architecture(recipe.model, tuple(facts["shape"]), len(classes)), classes
    return None, None


def _of_version(reference: str, tracking_uri: str) -> ResolvedWeights:
    version = resolve(open_client(tracking_uri), reference)
    pinned = f"models:/{version.name}/{version.version}"
    source, recipe, data_digest, accepts, lineage = load_registered(pinned, tracking_uri)
    # The archive holds the model in a wrapper that checks the range of inputs.
    weights = {name.removeprefix("model."): value for name, value in source.load().state_dict().items()}
    run, digest = version.tags.get("advtrain.run"), weights_digest(weights)
    ancestor = Ancestor("start", pinned, digest, run, data_digest, _ancestors(recipe, lineage))
    made = _registered(recipe, accepts)
    classes = None if made is None else distinct_names(accepts.class_names, accepts.num_classes)
    tokenizer = None if accepts.text is None else tokenizer_digest(accepts.text.tokenizer)
    return ResolvedWeights(weights, ancestor, recipe.model, made, classes, lineage.records, tokenizer)


def _registered(recipe: Recipe, accepts: Accepts) -> Architecture | None:
    if not accepts.num_classes:  # a regression: the scale of its target is in the archive only
        return None
    return Architecture(recipe.model, accepts.shape, accepts.num_classes)


def _of_file(reference: str, path: Path) -> ResolvedWeights:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}") from error
    weights = _inner(next(spellings(read_tensors(path, content), path)))
    ancestor = Ancestor("start", reference, weights_digest(weights))
    return ResolvedWeights(weights, ancestor, tokenizer=_tokenizer_at(path.parent))


def _of_library(reference: str, library: str, name: str, allow_download: bool) -> ResolvedWeights:
    found = pretrained_weights(library, name, allow_download=allow_download)
    weights = _inner(found.weights)
    config = ModelConfig(
        name=f"{library}:{found.name}", args=dict(found.args), mean=found.mean, std=found.std
    )
    made = None if found.shape is None else Architecture(config, found.shape, found.num_classes)
    ancestor = Ancestor("start", reference, weights_digest(weights))
    tokenizer = given_digest(reference) if is_pretrained(reference) else None
    return ResolvedWeights(weights, ancestor, config, made, tokenizer=tokenizer)


def _inner(weights: Weights) -> dict[str, Tensor]:
    """Return the weights in the names of a model of `build_model`, whose network they belong to."""
    return {f"network.{plain}": weights[name] for plain, name in plain_names(weights).items()}
