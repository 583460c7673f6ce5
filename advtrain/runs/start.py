"""Start folder: copy of the weights that a run started from, read by every resume.

runs/digits-3f2a9c-1/
  start/model.safetensors  the loaded tensors, in the names of the run's model
  start/start.json         reference, digests, and which tensors were loaded, new or ignored
  rows/                    records of the samples that its ancestors were trained on, see leaks.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from advtrain.data.rows import RowRecord
from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.models.serialized import Architecture
from advtrain.models.start import FittedWeights, StartWeights
from advtrain.recipe.model import ModelConfig
from advtrain.runs.folder import write_atomically
from advtrain.runs.leaks import add_record
from advtrain.runs.lineage import Ancestor
from advtrain.runs.sealed import sealed_json, unsealed

#: Folder in a run.
START = "start"


@dataclass(frozen=True)
class ResolvedWeights:
    """Weights that a reference names, and where they come from."""

    weights: dict[str, Tensor]
    ancestor: Ancestor
    config: ModelConfig | None = None  # model of advtrain or of a library; None: a file
    architecture: Architecture | None = None  # None: unknown, as for a file
    classes: list[str] | None = None  # distinct names, in the order of the labels; None: unknown
    records: Mapping[str, RowRecord] = field(default_factory=dict)  # of its samples and its ancestors'
    tokenizer: str | None = None  # digest of its tokenizer; None: unknown, or a network that takes no texts

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, see `advtrain.models.start.weights_digest`."""
        return self.ancestor.digest


def write_start(folder: Path, resolved: ResolvedWeights, fitted: FittedWeights) -> dict[str, Any]:
    """Write the start folder of a run folder; return entries for its run.json."""
    facts: dict[str, Any] = {
        "reference": resolved.ancestor.reference,
        "weights_digest": resolved.digest,
        "loaded": sorted(fitted.weights),
        "new": fitted.new,
        "ignored": fitted.ignored,
    }
    try:
        facts["file_digest"] = write_tensors(folder / START / "model.safetensors", fitted.weights)
        write_records(folder, resolved.records)
        write_atomically(folder / START / "start.json", sealed_json(facts))  # last: the folder is complete
    except OSError as error:
        raise UserError(f"cannot write the start weights in '{folder}': {error.strerror}") from error
    return {"ancestors": [resolved.ancestor.as_json()], "start": str(fitted)}


def save_weights(folder: Path, resolved: Mapping[str, ResolvedWeights]) -> None:
    """Save resolved weights, by their reference, in the folder of a campaign or study.

    Its trials and cells start from them, whatever becomes of the source.
    """
    for reference, found in resolved.items():
        path = _saved(folder, reference)
        made = found.architecture
        tensors = {name: tensor.contiguous().clone() for name, tensor in found.weights.items()}
        facts = {
            "reference": reference,
            "file_digest": write_tensors(path.with_suffix(".safetensors"), tensors),
            "ancestor": found.ancestor.as_json(),
            "config": None if found.config is None else found.config.architecture,
            "samples": None if made is None else [list(made.shape), made.num_classes],
            "classes": found.classes,
            "tokenizer": found.tokenizer,
        }
        write_records(folder, found.records)
        write_atomically(path, sealed_json(facts))


def saved_weights(folder: Path, reference: str) -> ResolvedWeights:
    """Return weights that `save_weights` has saved; their records are in the folder.

    Raises:
        UserError: the files are missing or damaged.
    """
    path = _saved(folder, reference)
    try:
        facts = unsealed(read_record(path, "file_digest", "ancestor", "config", "samples"))
        weights = read_tensors(path.with_suffix(".safetensors"), facts["file_digest"])
        config = None if facts["config"] is None else ModelConfig.model_validate(facts["config"])
        made = None
        if config is not None and facts["samples"] is not None:
            shape, num_classes = facts["samples"]
            made = Architecture(config, tuple(shape), num_classes)
        ancestor = Ancestor.from_json(facts["ancestor"])
        tokenizer = facts.get("tokenizer")
        return ResolvedWeights(weights, ancestor, config, made, facts.get("classes"), tokenizer=tokenizer)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"the weights '{reference}' in '{path.parent}' are missing or damaged ({error})"
        ) from error


def is_saved(folder: Path, reference: str) -> bool:
    """Return whether `save_weights` has saved these weights in the folder."""
    return _saved(folder, reference).is_file()


def _saved(folder: Path, reference: str) -> Path:
    return folder / START / f"{hashlib.sha256(reference.encode()).hexdigest()[:16]}.json"


def write_records(folder: Path, records: Mapping[str, RowRecord]) -> None:
    """Write records of samples into the rows folder of a run, campaign or study."""
    for record in records.values():
        add_record(folder / "rows", record)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors to a safetensors file, with its folder; return the SHA-256 of the file."""
    content = safetensors.torch.save(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file; raise a ValueError if its SHA-256 differs."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"the digest of {path.name} differs")
    return safetensors.torch.load(content)


def read_start(folder: Path, config: ModelConfig) -> StartWeights:
    """Return the start weights of a run folder; random weights if its model has no `from`.

    Raises:
        UserError: the start folder is missing or damaged.
    """
    if config.from_ is None:
        return StartWeights()
    path = folder / START
    try:
        facts = unsealed(read_record(path / "start.json", "weights_digest", "file_digest", "new"))
        if facts["weights_digest"] != config.from_digest:
            raise ValueError("they have another digest than model.from_digest")
        weights = read_tensors(path / "model.safetensors", facts["file_digest"])
        return StartWeights(weights, new=tuple(facts["new"]))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the start weights in '{path}' are missing or damaged ({error}); train again as a new run"
        ) from error
