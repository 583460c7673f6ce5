"""The workspace: where runs, data, tracking and Ray are; and what every job loads from it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advtrain.cluster import start_ray
from advtrain.data import Dataset, load_data
from advtrain.environment import describe_environment
from advtrain.errors import UserError
from advtrain.events import Message, Progress, ignore
from advtrain.recipe import Recipe
from advtrain.threat import ThreatModel


@dataclass(frozen=True)
class Workspace:
    """Where things lie: none of this shapes a result."""

    runs: Path
    tracking_uri: str
    data_root: Path
    address: str | None = None  # of a Ray cluster


def first_facts(dataset: Dataset, allow_code: bool) -> dict[str, Any]:
    """Return what run.json says of a run that starts."""
    return {
        "status": "running",
        "trained": False,
        "allow_code": allow_code,
        "environment": describe_environment(),
        "data_digest": dataset.digest,
        "started": time.time(),
    }


def training_threat(recipe: Recipe) -> ThreatModel:
    """Return the threat model that a recipe trains against; of radius 0 if it attacks nothing."""
    adversary = recipe.adversary
    attacks = recipe.objective.adversarial and adversary.fraction > 0
    return ThreatModel(adversary.norm, adversary.eps if attacks else 0.0)


def load_dataset(
    recipe: Recipe,
    workspace: Workspace,
    expected_digest: str | None = None,
    *,
    progress: Progress = ignore,
) -> Dataset:
    """Load a recipe's data, and refuse it if it is not what a model was trained on.

    On other data the splits would be cut anew, and the test split could hold what the model has seen.
    """
    if recipe.data.source in ("parquet", "image_folder"):  # decoded by Ray: on the cluster that was named
        start_ray(workspace.address, recipe.training.max_workers * recipe.training.cpus_per_worker)
    dataset = load_data(recipe.data, workspace.data_root)
    recipe.check_data(dataset)
    if expected_digest not in (None, dataset.digest):
        raise UserError(
            f"the data has changed since training (digest {str(expected_digest)[:12]}, now {dataset.digest[:12]}), "
            "so its test split may hold training samples; point --data-root at the same data, or train anew"
        )
    for remark in recipe.warnings(dataset.eight_bit):
        progress(Message(remark, "warning"))
    return dataset
