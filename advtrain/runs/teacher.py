"""Teacher of a run: copy of its weights and architecture, read by every resume.

runs/digits-3f2a9c-1/
  start/teacher.safetensors  its weights
  start/teacher.json         its reference, digests and architecture
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.models.serialized import Architecture
from advtrain.recipe.model import ModelConfig
from advtrain.runs.folder import write_atomically
from advtrain.runs.sealed import sealed_json, unsealed
from advtrain.runs.start import START, ResolvedWeights, read_tensors, write_records


@dataclass(frozen=True)
class RunTeacher:
    """Teacher of a new run."""

    resolved: ResolvedWeights
    weights: dict[str, Tensor]  # in the names of its network
    architecture: Architecture

    def build(self) -> nn.Module:
        """Build the network with its weights."""
        return _built(self.architecture, self.weights)

    def write(self, folder: Path) -> None:
        """Write the teacher into the start folder of a run folder."""
        content = safetensors.torch.save(self.weights)
        made = self.architecture
        facts = {
            "reference": self.resolved.ancestor.reference,
            "weights_digest": self.resolved.digest,
            "file_digest": hashlib.sha256(content).hexdigest(),
            "model": made.config.architecture,
            "shape": list(made.shape),
            "num_classes": made.num_classes,
            "target_scale": made.target_scale,
        }
        try:
            (folder / START).mkdir(parents=True, exist_ok=True)
            write_atomically(folder / START / "teacher.safetensors", content)
            write_records(folder, self.resolved.records)
            write_atomically(folder / START / "teacher.json", sealed_json(facts))
        except OSError as error:
            raise UserError(f"cannot write the teacher in '{folder}': {error.strerror}") from error


def read_teacher(folder: Path, digest: str) -> nn.Module:
    """Return the teacher in a run folder.

    Args:
        folder: the run folder.
        digest: `objective.teacher_digest`, which its weights must have.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / START
    try:
        facts = unsealed(
            read_record(path / "teacher.json", "weights_digest", "file_digest", "model", "shape")
        )
        if facts["weights_digest"] != digest:
            raise ValueError("it has another digest than objective.teacher_digest")
        weights = read_tensors(path / "teacher.safetensors", facts["file_digest"])
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the teacher in '{path}' is missing or damaged ({error}); train again as a new run"
        ) from error
    scale = facts["target_scale"]
    made = Architecture(
        ModelConfig.model_validate(facts["model"]),
        tuple(facts["shape"]),
        facts["num_classes"],
        None if scale is None else (scale[0], scale[1]),
    )
    return _built(made, weights)


def _built(made: Architecture, weights: dict[str, Tensor]) -> nn.Module:
    """Build a network with weights; the random number generator is left as it was."""
    with torch.random.fork_rng([]):
        network = made.build()
    network.load_state_dict(weights)
    return network
