"""Teacher of a run: copy of its weights and architecture, read by every resume.

runs/digits-3f2a9c-1/
  start/teacher.safetensors  its weights
  start/teacher.json         its reference, digests and architecture
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.models.serialized import Architecture
from advtrain.recipe import Recipe
from advtrain.recipe.model import ModelConfig, runs_code
from advtrain.runs.folder import write_atomically
from advtrain.runs.sealed import sealed_json, unsealed
from advtrain.runs.start import START, ResolvedWeights, read_tensors, write_records, write_tensors


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
        made = self.architecture
        facts: dict[str, Any] = {
            "reference": self.resolved.ancestor.reference,
            "weights_digest": self.resolved.digest,
            "model": made.config.architecture,
            "shape": list(made.shape),
            "num_classes": made.num_classes,
            "target_scale": made.target_scale,
        }
        try:
            facts["file_digest"] = write_tensors(folder / START / "teacher.safetensors", self.weights)
            write_records(folder, self.resolved.records)
            write_atomically(folder / START / "teacher.json", sealed_json(facts))
        except OSError as error:
            raise UserError(f"cannot write the teacher in '{folder}': {error.strerror}") from error


def require_same_code(theirs: ModelConfig, own: ModelConfig, what: str) -> None:
    """Raise a UserError if a teacher runs other code than the recipe's own model.

    The arguments must be the same too. `--allow-code` permits the code that the recipe names, and no other.
    """
    if not runs_code(theirs.name):
        return
    if theirs.name != own.name:
        raise UserError(
            f"{what} has the model '{theirs.name}', which runs code; a teacher may only use the code that the recipe "
            f"itself names, here '{own.name}'"
        )
    if theirs.args != own.args:
        raise UserError(
            f"{what} calls '{theirs.name}' with the arguments {theirs.args}; a teacher that runs code must have those "
            f"of model.args, here {own.args}"
        )


def read_teacher(folder: Path, recipe: Recipe) -> nn.Module:
    """Return the teacher in a run folder.

    Args:
        folder: the run folder.
        recipe: recipe of the run, with `objective.teacher_digest`, which the teacher's weights must have.

    Raises:
        UserError: it is missing or damaged, or runs code that is not that of the recipe's own model.
    """
    path = folder / START
    try:
        facts = unsealed(
            read_record(path / "teacher.json", "weights_digest", "file_digest", "model", "shape")
        )
        if facts["weights_digest"] != recipe.objective.teacher_digest:
            raise ValueError("it has another digest than objective.teacher_digest")
        weights = read_tensors(path / "teacher.safetensors", facts["file_digest"])
        config = ModelConfig.model_validate(facts["model"])
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the teacher in '{path}' is missing or damaged ({error}); train again as a new run"
        ) from error
    # Whoever can write the file can also write new digests.
    require_same_code(config, recipe.model, f"the teacher in '{path}'")
    scale = facts["target_scale"]
    made = Architecture(
        config,
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
