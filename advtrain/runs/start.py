"""Start folder: copy of the weights that a run started from, read by every resume.

runs/digits-3f2a9c-1/
  start/model.safetensors  the loaded tensors, in the names of the run's model
  start/start.json         reference, digests, and which tensors were loaded, new or ignored
  rows/                    records of the training rows of the source, if it has them
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.models.serialized import Architecture
from advtrain.models.start import FittedWeights, StartWeights
from advtrain.recipe.sections import ModelConfig
from advtrain.runs.folder import FILE_MODE, write_atomically
from advtrain.runs.lineage import Ancestor
from advtrain.runs.sealed import sealed_json, unsealed

#: Folders in a run: start weights, and records of training rows.
START, ROWS = "start", "rows"


@dataclass(frozen=True)
class ResolvedWeights:
    """Weights that a reference names, and where they come from."""

    weights: dict[str, Tensor]
    ancestor: Ancestor
    config: ModelConfig | None = None  # model of advtrain or of a library; None: a file
    architecture: Architecture | None = None  # None: unknown, as for a file
    rows: Mapping[str, bytes] = field(default_factory=dict)  # files of the source's rows folder

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, see `advtrain.models.start.weights_digest`."""
        return self.ancestor.digest


def write_start(folder: Path, resolved: ResolvedWeights, fitted: FittedWeights) -> dict[str, Any]:
    """Write the start folder of a run folder; return entries for its run.json."""
    content = safetensors.torch.save(fitted.weights)
    facts = {
        "reference": resolved.ancestor.reference,
        "weights_digest": resolved.digest,
        "file_digest": hashlib.sha256(content).hexdigest(),
        "loaded": sorted(fitted.weights),
        "new": fitted.new,
        "ignored": fitted.ignored,
    }
    try:
        (folder / START).mkdir(parents=True, exist_ok=True)
        write_bytes(folder / START / "model.safetensors", content)
        write_rows(folder, resolved.rows)
        write_atomically(folder / START / "start.json", sealed_json(facts))  # last: the folder is complete
    except OSError as error:
        raise UserError(f"cannot write the start weights in '{folder}': {error.strerror}") from error
    return {"ancestors": [resolved.ancestor.as_json()], "start": str(fitted)}


def write_rows(folder: Path, rows: Mapping[str, bytes]) -> None:
    """Write the rows folder of a run folder."""
    for name, content in rows.items():
        (folder / ROWS).mkdir(exist_ok=True)
        write_bytes(folder / ROWS / name, content)


def read_rows(folder: Path) -> dict[str, bytes]:
    """Return the files of the rows folder in `folder`; empty if there is none."""
    return {path.name: path.read_bytes() for path in sorted((folder / ROWS).glob("*.rows"))}


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
        content = (path / "model.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["file_digest"]:
            raise ValueError("the digest of model.safetensors differs")
        if facts["weights_digest"] != config.from_digest:
            raise ValueError("they have another digest than model.from_digest")
        return StartWeights(safetensors.torch.load(content), new=tuple(facts["new"]))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the start weights in '{path}' are missing or damaged ({error}); train again as a new run"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, FILE_MODE)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)
