"""A run, a checkpoint or a registered model -> a report on the test split of its data."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from advtrain.attacks import build_suite
from advtrain.checkpoint import load_checkpoint
from advtrain.config import Recipe, load_recipe
from advtrain.data import Dataset, stratified
from advtrain.evaluation import Report, evaluate
from advtrain.lookup import UserError
from advtrain.models import build_model
from advtrain.registry import load_registered
from advtrain.runfolder import RunFolder, write_atomically
from advtrain.threat import ThreatModel
from advtrain.training import default_device
from pipelines.console import console
from pipelines.train import Places, load_dataset, load_trained, print_report


def evaluate_model(
    reference: str,
    places: Places,
    *,
    threat: str | None,
    suite: str | None,
    sample: int | None,
    json: Path | None,
) -> int:
    """Judge a model under its recipe's threat model and attacks, or others; return the exit code."""
    if suite is not None:
        build_suite(suite)  # refuse a typo before anything is loaded
    model, recipe, dataset = _load(reference, places)
    threat_model = ThreatModel.parse(threat) if threat else recipe.evaluation.threat_model
    split = dataset.test
    if sample is not None:
        if sample < 1:
            raise UserError(f"--sample must be at least 1, not {sample}")
        split = stratified(split, sample, recipe.evaluation.seed)
    device = default_device()
    report, samples = evaluate(
        model.to(device),
        split,
        dataset,
        suite or recipe.evaluation.judged_with,
        threat_model,
        name=reference,
        seed=recipe.evaluation.seed,
        batch_size=recipe.evaluation.batch_size,
        device=device,
    )
    if json is not None:
        try:
            write_atomically(json, report.model_dump_json(indent=1))
        except OSError as error:
            raise UserError(f"cannot write '{json}': {error.strerror}") from error
    print_report(report, [])
    if isinstance(report, Report):
        worst = min(report.per_class, key=lambda c: c.robust.value)
        console.print(f"worst class: {worst.name}, robust {worst.robust}")
    return 0


def _load(reference: str, places: Places) -> tuple[nn.Module, Recipe, Dataset]:
    """Load by `models:/...` URI, run name, or path of a run or checkpoint folder."""
    if reference.startswith("models:/"):
        model, recipe, digest = load_registered(reference, places.tracking_uri)
        return model, recipe, load_dataset(recipe, places, digest)
    path = Path(reference)
    if (path / "state.json").is_file():
        run = RunFolder(path.resolve().parents[1])
    else:
        run = RunFolder.find(places.runs, reference)
    recipe = load_recipe(run.path / "recipe.yaml", allow_code=run.facts()["allow_code"])
    dataset = load_dataset(recipe, places, run.facts()["data_digest"])
    if not (path / "state.json").is_file():
        return load_trained(run, recipe, dataset), recipe, dataset
    model = build_model(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
    model.load_state_dict(load_checkpoint(path).best_weights())
    return model.eval(), recipe, dataset
