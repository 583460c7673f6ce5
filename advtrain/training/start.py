"""Start of a new run from weights: fit them to its model, and complete its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advtrain.data import Dataset
from advtrain.data.rows import RowRecord, merge_records
from advtrain.data.texts import TOKENIZER, tokenizer_digest
from advtrain.errors import UserError
from advtrain.hub import PREFIX, is_pretrained
from advtrain.models.hf import complete_args
from advtrain.models.start import FROM_SCRATCH, FittedWeights, StartWeights, fit_weights
from advtrain.recipe import Recipe
from advtrain.recipe.model import ModelConfig
from advtrain.runs.folder import write_atomically
from advtrain.runs.lineage import Ancestor
from advtrain.runs.start import ResolvedWeights, write_start
from advtrain.runs.teacher import RunTeacher
from advtrain.seeding import mix_seed
from advtrain.training.teacher import prepare_teacher
from advtrain.training.trained_model import architecture, require_table

#: Settings of transformers that change what a network computes, but not the shapes of its tensors.
_FORWARD = {"model_type", "num_attention_heads", "n_heads", "hidden_act", "activation"}
#: Function that returns the weights that a reference names.
Resolver = Callable[[str], ResolvedWeights]


@dataclass(frozen=True)
class RunStart:
    """Recipe of a new run, and the weights that it starts from."""

    recipe: Recipe
    resolved: ResolvedWeights | None = None  # None: random weights
    fitted: FittedWeights | None = None
    teacher: RunTeacher | None = None
    tokenizer: str | None = None  # content of tokenizer.json; None: the data has no texts

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the start folder and the tokenizer of a run folder; return entries for its run.json."""
        facts: dict[str, Any] = {}
        if self.tokenizer is not None:
            write_atomically(folder / TOKENIZER, self.tokenizer)
        if self.resolved is not None and self.fitted is not None:
            facts = write_start(folder, self.resolved, self.fitted)
        if self.teacher is not None:
            self.teacher.write(folder)
            facts["ancestors"] = [*facts.get("ancestors", ()), self.teacher.resolved.ancestor.as_json()]
        return facts

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        """Direct ancestors of the run."""
        return tuple(source.ancestor for source in self._sources)

    @property
    def records(self) -> Mapping[str, RowRecord]:
        """Records of the samples that the ancestors were trained on."""
        return merge_records(record for source in self._sources for record in source.records.values())

    @property
    def _sources(self) -> list[ResolvedWeights]:
        taught_by = None if self.teacher is None else self.teacher.resolved
        return [source for source in (self.resolved, taught_by) if source is not None]

    def __str__(self) -> str:
        """Return what the run starts from, for the user; "" for random weights without a teacher."""
        said = [] if self.teacher is None else [f"teacher: {self.teacher.resolved.ancestor.reference}"]
        if self.resolved is not None:
            said.append(f"start weights: {self.resolved.ancestor.reference}, {self.fitted}")
        adversary = self.recipe.adversary
        for name, length in adversary.relative.items():
            if adversary.embedding_norm is not None:
                known = f"{length} = {getattr(adversary.absolute, name):g}"
                said.append(
                    f"adversary.{name}: {known} (mean norm of the embeddings: {adversary.embedding_norm:g})"
                )
        return "\n".join(said)


def prepare_start(recipe: Recipe, dataset: Dataset, resolve: Resolver) -> RunStart:
    """Resolve start weights and teacher of a recipe; the result's recipe has their digests.

    Args:
        recipe: recipe of a new run.
        dataset: its data.
        resolve: returns the weights that `model.from` and `objective.teacher` name.

    Raises:
        UserError: the weights cannot be read, are not those of `model.from_digest`, do not fit the model, or need
            another normalization. Or the teacher does not suit the run, see `prepare_teacher`.
    """
    if dataset.text is not None and recipe.objective.teacher is not None:
        raise UserError(
            "objective.teacher is not supported for texts yet; start from its weights with model.from"
        )
    recipe, teacher = prepare_teacher(recipe, dataset, resolve)
    tokenizer = None if dataset.text is None else dataset.text.tokenizer
    config = recipe.model
    if config.from_ is None:
        own = with_embedding_norm(with_sources(recipe, dataset), dataset)
        return RunStart(own, teacher=teacher, tokenizer=tokenizer)
    resolved = resolve(config.from_)
    if config.from_digest not in (None, resolved.digest):
        raise UserError(
            f"model.from '{config.from_}' has other weights (digest {resolved.digest[:12]}) than model.from_digest "
            f"({str(config.from_digest)[:12]}); name the weights that are meant, or remove model.from_digest"
        )
    if dataset.text is not None:
        _check_tokenizer(config, resolved, tokenizer_digest(dataset.text.tokenizer))
    recipe = with_sources(recipe, dataset, resolved.config)
    config = recipe.model
    filled: dict[str, Any] = {"from_digest": resolved.digest}
    theirs = resolved.config
    if theirs is not None:
        if config.starts_from_library and config.mean is None and config.std is None:
            filled |= {"mean": theirs.mean, "std": theirs.std}
        else:
            _check_normalization(config, theirs)
    model = recipe.model_copy(update={"model": config.model_copy(update=filled)})
    fitted = _fitted(model, dataset, resolved)
    start = StartWeights(fitted.weights, new=tuple(fitted.new))
    return RunStart(with_embedding_norm(model, dataset, start), resolved, fitted, teacher, tokenizer)


def with_embedding_norm(recipe: Recipe, dataset: Dataset, start: StartWeights = FROM_SCRATCH) -> Recipe:
    """Return the recipe with `adversary.embedding_norm`, if a length of it is relative.

    The norm is the mean l2 norm of the rows of the embedding table that training starts from, to 6 digits. It is fixed
    there, because the embeddings grow in training, and the radius would grow with them.

    Raises:
        UserError: the network has no embedding table.
    """
    if recipe.adversary.embedding_norm is not None or not recipe.relative_lengths:
        return recipe
    with torch.random.fork_rng([]):
        torch.manual_seed(mix_seed("initialisation", recipe.seed))
        model = architecture(recipe, dataset).build()
        start.apply(model)
    norm = float(f"{require_table(model, recipe).norm(dim=1).mean():.6g}")
    if not norm > 0:
        raise UserError(
            f"{recipe.relative_lengths[0]}: every row of the embedding table is 0; write a number"
        )
    adversary = recipe.adversary.model_copy(update={"embedding_norm": norm})
    return recipe.model_copy(update={"adversary": adversary})


def with_sources(recipe: Recipe, dataset: Dataset, theirs: ModelConfig | None = None) -> Recipe:
    """Return the recipe with what a new run takes from a folder of transformers and a table.

    These are the settings of the network and the digests of the tokenizer and of the substitutions. The run then needs
    the folder no more, and refuses another table.

    Args:
        recipe: recipe as the user wrote it.
        dataset: its data.
        theirs: network of the start weights, whose settings are taken if it has the same name.

    Raises:
        UserError: the folder of the network cannot be used.
    """
    parts: dict[str, Any] = {}
    config = recipe.model
    if dataset.text is not None and recipe.data.given_tokenizer is not None:
        found = {"tokenizer_digest": tokenizer_digest(dataset.text.tokenizer)}
        parts["data"] = recipe.data.model_copy(update=found)
    if recipe.adversary.table is not None and dataset.training_synonyms is not None:
        found = {"table_digest": dataset.training_synonyms.digest}
        parts["adversary"] = recipe.adversary.model_copy(update=found)
    if is_pretrained(config.name):
        if theirs is not None and theirs.name == config.name:
            args = {**theirs.args, **config.args}
        else:
            args = complete_args(config.name.removeprefix(PREFIX), config.args)
        parts["model"] = config.model_copy(update={"args": args})
    return recipe.model_copy(update=parts)


def _fitted(recipe: Recipe, dataset: Dataset, resolved: ResolvedWeights) -> FittedWeights:
    """Return the start weights in the names of the recipe's network, see `fit_weights`."""
    config, theirs = recipe.model, resolved.config
    other = _other_folder(config)
    if other and theirs is not None:
        for key in _FORWARD & theirs.args.keys():
            if theirs.args[key] != (own := config.args.get(key)):
                raise UserError(
                    f"model.from '{config.from_}' is another network ({key}: {theirs.args[key]}, here {own}){other}"
                )
    with torch.random.fork_rng([]):
        network = architecture(recipe, dataset).build()
    try:
        return fit_weights(resolved.weights, network, config.load, source=f"model.from '{config.from_}'")
    except UserError as error:
        raise UserError(f"{error}{other}") from error


def _other_folder(config: ModelConfig) -> str:
    """Return what to set if the network and its weights are of two folders of transformers, or ""."""
    if config.from_ == config.name or not (is_pretrained(config.from_) and is_pretrained(config.name)):
        return ""
    return f"; model.name is '{config.name}', so set model.from: {config.name}, or model.from: null for random weights"


def _check_tokenizer(config: ModelConfig, resolved: ResolvedWeights, own: str) -> None:
    """Raise a UserError unless the start weights were trained with the tokenizer of the data."""
    if resolved.tokenizer == own:
        return
    source = str(config.from_)
    if resolved.tokenizer is None:
        raise UserError(
            f"model.from '{source}': there is no tokenizer.json beside the weights, so it is unknown which words their "
            "token ids are; put the tokenizer.json with which they were trained into the same folder"
        )
    given = source if is_pretrained(source) else "PATH of its tokenizer.json"
    advice = _other_folder(config) or f"; set data.tokenizer: {given}"
    raise UserError(
        f"model.from '{source}' was trained with another tokenizer (digest {resolved.tokenizer[:12]}) than that of the "
        f"data ({own[:12]}), so its token ids are other words{advice}"
    )


def _check_normalization(own: ModelConfig, theirs: ModelConfig) -> None:
    """Raise a UserError if the source has another normalization, to which its first layer belongs.

    A recipe may replace the normalization of a library, but not half of it.
    """
    wrong = [key for key in ("mean", "std") if getattr(own, key) != getattr(theirs, key)]
    if own.starts_from_library:
        wrong = [key for key in wrong if getattr(own, key) is None]
    if wrong:
        right = ", ".join(f"model.{key}: {getattr(theirs, key) or 'null'}" for key in ("mean", "std"))
        raise UserError(
            f"model.{wrong[0]} differs from that of model.from '{own.from_}', whose weights need {right}"
        )


def pinned_as(recipe: Recipe, stored: Recipe) -> Recipe:
    """Return the recipe with the values that a run filled in, whose complete recipe is `stored`."""
    parts = {
        "data": recipe.data.pinned_as(stored.data),
        "model": recipe.model.pinned_as(stored.model),
        "objective": recipe.objective.pinned_as(stored.objective),
        "adversary": recipe.adversary.pinned_as(stored.adversary),
    }
    return recipe.model_copy(update=parts)
