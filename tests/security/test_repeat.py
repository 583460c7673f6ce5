"""The gate repeats random parts of an evaluation: a report that the model does not give is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from advtrain.data import load_data
from advtrain.evaluation import EvalSpec, Evaluation, Workers, evaluate
from advtrain.evaluation.report import build_report
from advtrain.models.serialized import ModelSource
from advtrain.promotion import Outcomes, Policy
from advtrain.promotion.consistency import contradictions
from advtrain.registry.export import downloaded, log_archive
from advtrain.tracking.store import find_experiment, open_client
from advtrain.training.trained_model import architecture
from pipelines.promote import PromotionRequest, PromotionResult, promote
from pipelines.workspace import Workspace, load_dataset
from tests.kit import digits_data, digits_recipe, train_here
from tests.registry_kit import make_version

LENIENT = {"min_gain": None, "max_clean_drop": None, "min_worst_class": None, "min_neighbour_share": None}
POLICY = Policy(name="repeated", version=1, suite="pgd-10", repeat_units=3, clean_git=False, **LENIENT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """Return a real evaluation of a model without robustness, and the model's archive."""
    folder = tmp_path_factory.mktemp("repeat")
    recipe = digits_recipe("objective={clean_ce: 1}", "training.epochs=3")
    data = load_data(recipe.data, Path())
    model, _ = train_here(recipe, folder)
    source = ModelSource.of(model.state_dict(), architecture(recipe, data))
    spec = EvalSpec(source, data.test, data, "pgd-10", recipe.evaluation.threat_model, name="m")
    found = evaluate(spec, workers=Workers(0, None))
    store = f"sqlite:///{folder / 'mlflow.db'}"
    client = open_client(store)
    run = client.create_run(find_experiment(client, store, "archive"))
    info = log_archive(run.info.run_id, model, digits_data())
    with downloaded(client, info.model_uri, run.info.run_id) as files:
        shutil.copytree(files / "model", folder / "model")
    return found, folder / "model"


def rule(result: PromotionResult) -> tuple[str, str]:
    (found,) = [finding for finding in result.findings if finding.rule == "repeated"]
    return found.verdict, found.figures


def judged(evaluation: Evaluation, archive: Path, folder: Path, policy: Policy = POLICY) -> tuple[str, str]:
    store = f"sqlite:///{folder / 'mlflow.db'}"
    version = make_version(store, archive, folder, evaluation)
    version = make_version(store, archive, folder, evaluation) if version == "1" else version
    workspace = Workspace(folder / "runs", store, folder)
    return rule(promote("digits", workspace, PromotionRequest(version, policy, dry_run=True)))


def with_samples(evaluation: Evaluation, **changes: np.ndarray) -> Evaluation:
    """Return the evaluation that somebody writes who wants these results per sample."""
    samples, report = replace(evaluation.samples, **changes), evaluation.report
    robust = int(samples.robust.sum())
    samples.attacks = [
        replace(samples.attacks[0], num_broken=int(samples.clean.sum()) - robust, num_standing=robust)
    ]
    kept = (
        "model",
        "norm",
        "eps",
        "data",
        "split",
        "data_digest",
        "seed",
        "versions",
        "suite",
        "curve",
        "checks",
    )
    names = [figure.name for figure in report.per_class]
    return Evaluation(build_report(samples, names, **{key: getattr(report, key) for key in kept}), samples)


def test_honest_report_is_repeated(trained, tmp_path):
    verdict, figures = judged(*trained, tmp_path)
    assert verdict == "passed"
    assert figures.startswith("0 of "), figures


def test_report_without_failures_is_refused(trained, tmp_path):
    evaluation, archive = trained
    assert evaluation.report.robust_accuracy < 0.5, "the model must not be robust"
    clean = evaluation.samples.clean
    forged = with_samples(evaluation, broken_by=np.where(clean, -1, -2))
    assert forged.report.robust_accuracy == forged.report.clean_accuracy
    verdict, figures = judged(forged, archive, tmp_path)
    assert verdict == "failed", figures


@pytest.mark.slow
def test_report_of_better_clean_predictions_is_refused(trained, tmp_path):
    evaluation, archive = trained
    labels = evaluation.samples.labels
    broken = np.where(evaluation.samples.broken_by == -2, -1, evaluation.samples.broken_by)
    wrong = int((~evaluation.samples.clean).sum())
    assert wrong > 8, "the model must make mistakes"
    forged = with_samples(evaluation, clean_predictions=labels, broken_by=broken)
    assert judged(forged, archive, tmp_path)[0] == "failed"


@pytest.mark.slow
def test_missing_data_is_named_and_policy_can_skip(trained, tmp_path):
    evaluation, archive = trained
    other = Evaluation(evaluation.report.model_copy(update={"data_digest": "0" * 64}), evaluation.samples)
    verdict, figures = judged(other, archive, tmp_path)
    assert verdict == "failed"
    assert "cannot be repeated here" in figures
    skipped = judged(other, archive, tmp_path, POLICY.model_copy(update={"repeat_units": 0}))
    assert skipped == ("skipped", "not repeated")


def finding(evaluation: Evaluation, archive: Path, folder: Path, name: str) -> tuple[str, str]:
    store = f"sqlite:///{folder / 'mlflow.db'}"
    version = make_version(store, archive, folder, evaluation)
    policy = POLICY.model_copy(update={"repeat_units": 0})
    workspace = Workspace(folder / "runs", store, folder)
    request = PromotionRequest(version, policy, dry_run=True)
    version = make_version(store, archive, folder, evaluation)
    result = promote("digits", workspace, replace(request, version=version))
    (found,) = [f for f in result.findings if f.rule == name]
    return found.verdict, found.figures


@pytest.mark.parametrize("figure", ["robust", "per_class", "attacks"])
def test_report_that_its_own_samples_contradict_is_refused(figure, trained, tmp_path):
    evaluation, archive = trained
    best = with_samples(evaluation, broken_by=np.where(evaluation.samples.clean, -1, -2)).report
    changes = {figure: getattr(best, figure)}
    if figure == "robust":
        changes["robust_accuracy"] = best.robust_accuracy
    forged = Evaluation(evaluation.report.model_copy(update=changes), evaluation.samples)
    verdict, figures = finding(forged, archive, tmp_path, "integrity")
    assert verdict == "failed", figures
    assert contradictions(evaluation.report, Outcomes.of(evaluation.samples)) == []


def test_data_of_the_challengers_own_choice_are_refused(trained, tmp_path, monkeypatch):
    """Its recipe names data on which the model is right; its report claims the digest of the champion's."""
    evaluation, archive = trained
    real = load_dataset

    def easier(*args, **kwargs):
        return replace(real(digits_recipe(), args[1]), digest="e" * 64)

    monkeypatch.setattr("pipelines.promote.load_dataset", easier)
    verdict, figures = judged(evaluation, archive, tmp_path)
    assert (verdict, figures) == ("failed", "its recipe names other data than its report")
