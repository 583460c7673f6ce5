"""Start weights of runs, campaigns and studies: resolve them once, and report them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from advtrain.data import Dataset
from advtrain.data.summary import DataSummary
from advtrain.errors import UserError
from advtrain.events import Message, Progress, ignore
from advtrain.runs.folder import write_atomically
from advtrain.runs.leaks import write_rows
from advtrain.runs.sealed import sealed_json
from advtrain.runs.start import START, ResolvedWeights, is_saved, save_weights, saved_weights
from advtrain.training.start import Resolver, RunStart, prepare_start
from pipelines.leaks import check_training
from pipelines.workspace import Workspace
from tuning.campaign import Plan
from tuning.space import combinations


def announced(start: RunStart, progress: Progress) -> RunStart:
    """Report which tensors a new run loads; return its start."""
    if text := str(start):
        progress(Message(text))
    return start


def write_inputs(folder: Path, start: RunStart, dataset: Dataset, summary: DataSummary) -> dict[str, Any]:
    """Write what a run starts from and its data holds; return entries for its run.json.

    It is called before run.json is written, so every run has these files.
    """
    facts = start.write(folder)
    write_atomically(folder / "data.json", sealed_json(summary.to_json()))
    write_rows(folder / "rows", dataset)
    return facts


def campaign_weights(
    plan: Plan, dataset: Dataset, workspace: Workspace, progress: Progress
) -> dict[str, ResolvedWeights]:
    """Resolve the start weights and teachers of trials; return them by their reference.

    Every combination of the choices of `model.*` and `objective.teacher` must fit. The terms `hat` and `feature_match`
    have further conditions on a teacher.

    Raises:
        UserError: weights cannot be read or do not fit a model, or there is a leak.
    """
    resolve = cache(workspace.weights)
    found: dict[str, ResolvedWeights] = {}
    prefixes = ("model.", "objective.teacher", "objective.hat", "objective.feature_match")
    varied = [path for path in plan.space if path.startswith(prefixes)]
    for point, recipe in combinations(plan.space, plan.base, varied, allow_code=plan.allow_code):
        references = {recipe.model.from_, recipe.objective.teacher} - {None}
        if not references:
            continue
        is_new = not references <= found.keys()
        try:
            start = prepare_start(recipe, dataset, resolve)
            if is_new:
                check_training(dataset, start.ancestors, start.records, None, progress)
        except UserError as error:
            raise UserError(f"space: {point}: {error}" if point else str(error)) from error
        if is_new:
            announced(start, progress)
        found |= {reference: resolve(reference) for reference in references if reference is not None}
    return found


def kept_weights(folder: Path, resolve: Resolver, *, save: bool, progress: Progress = ignore) -> Resolver:
    """Return a resolver that prefers the weights saved in `folder`; `save` saves others there.

    `progress` is called with what a saved reference was resolved to, because an alias may have moved since.
    """

    def find(reference: str) -> ResolvedWeights:
        if is_saved(folder, reference):
            saved = saved_weights(folder, reference)
            found_as = saved.ancestor.reference
            weights = f"the weights {saved.digest[:12]}" if found_as == reference else found_as
            progress(Message(f"{reference}: {weights}, as resolved before and kept in '{folder / START}'"))
            return saved
        found = resolve(reference)
        if save:
            save_weights(folder, {reference: found})
        return found

    return cache(find)
