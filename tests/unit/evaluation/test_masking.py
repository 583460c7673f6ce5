"""Models with gradient masking: the suite finds their true robustness, or a check fails."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from advtrain.attacks import build_suite
from advtrain.data import Place
from advtrain.evaluation import EvalSpec, SampleResults, evaluate
from advtrain.evaluation.checks import Check, beats_guessing, square_record, training_radius
from advtrain.evaluation.masking import CHECKS
from advtrain.evaluation.statistics import surely_above
from advtrain.evaluation.worst_case import AttackRecord, Evaluator, WorkItem, evaluate_samples
from advtrain.threat import ThreatModel
from tests import fakes
from tests.kit import digits_data, digits_recipe, train_here

THREAT = ThreatModel("linf", 0.15)
NUM_SAMPLES = 60


@functools.cache
def honest() -> nn.Module:
    """Return a network for digits trained with a one-step attack; it is robust on some samples only."""
    recipe = digits_recipe(
        "adversary={name: fgsm_rs, norm: linf, eps: 0.1}", "training.epochs=12", "data.source=digits"
    )
    with tempfile.TemporaryDirectory() as folder:
        return train_here(recipe, Path(folder))[0]


def report_of(model: nn.Module, suite: str = "apgd-ce-50,apgd-t-50,square-500"):
    data = digits_data()
    model.eval()
    return evaluate(
        EvalSpec(
            model,
            data.test.take(range(NUM_SAMPLES)),
            data,
            suite,
            THREAT,
            name="m",
            full=True,
            training_threat=THREAT,
        ),
    ).report


@functools.cache
def weak() -> nn.Module:
    """Return a network for digits that hardly any sample is robust on."""
    recipe = digits_recipe("adversary={name: fgsm_rs, norm: linf, eps: 0.01}", "training.epochs=8")
    with tempfile.TemporaryDirectory() as folder:
        return train_here(recipe, Path(folder))[0]


@functools.cache
def truth() -> float:
    return report_of(honest()).robust.high


def fake(kind: type[fakes.Fake]) -> nn.Module:
    """Return a fake around a network; one that knows its samples needs no robust network."""
    batch = next(digits_data().test.take(range(NUM_SAMPLES)).batches(NUM_SAMPLES, Place()))
    knows = issubclass(kind, fakes.Memory | fakes.TestSetInside | fakes.DecisionAlone)
    return kind(weak() if knows else honest(), batch.x, batch.y, THREAT.eps).eval()


def verdict(model: nn.Module, name: str, suite: str = "apgd-ce-20") -> Check:
    """Evaluate a model with a weak suite, and run one check on its correctly classified samples."""
    untouched, data = copy.deepcopy(model), digits_data()
    how = (build_suite(suite), THREAT, 0, 100, torch.device("cpu"), dict(CHECKS))
    other = data.test.take(np.arange(200, 300))
    split = data.test.take(np.arange(NUM_SAMPLES))
    evaluator = Evaluator(model, split, *how, fresh=lambda: copy.deepcopy(untouched), other=other)
    samples = evaluate_samples(evaluator.run, split, evaluator.attacks, 100)
    rows = np.flatnonzero(samples.robust if CHECKS[name].rows == "robust" else samples.clean)
    assert samples.clean.any()
    item = WorkItem(rows, probe=name, standing=np.flatnonzero(samples.robust))
    return Check.model_validate(evaluator.do(item))


def test_model_without_masking_is_trusted():
    report = report_of(honest())
    assert report.trust == "trusted", [c for c in report.checks if c.verdict == "failed"]
    assert {c.name for c in report.checks} == {
        *CHECKS,
        "square_record",
        "training_radius",
        "beats_guessing",
    } - {"embedding"}
    assert 0.05 < report.robust_accuracy < 0.8, "the test needs a model that some attacks break"
    assert all(c.evidence and not c.advice for c in report.checks if c.verdict == "passed")
    with_data = {c.name for c in report.checks if c.data}
    assert {"slope", "boundary", "labels_only", "fresh_copy", "batch", "square_record"} <= with_data


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (fakes.Quantised, "steps_inside"),
        (fakes.StraightThrough, "steps_inside"),
        (fakes.Argmax, "gradients"),
        (fakes.Saturated, "gradients"),
        (fakes.Dropout, "stochastic"),
        (fakes.Noisy, "stochastic"),
        (fakes.BatchNorm, "batch"),
        (fakes.Memory, "fresh_copy"),
        (fakes.FirstQueries, "fresh_copy"),
        pytest.param(fakes.SharedMemory, "labels_only", marks=pytest.mark.slow),
        (fakes.DecisionAlone, "boundary"),
        (fakes.SteepDecision, "boundary"),
        (fakes.SteepDecision, "labels_only"),
        (fakes.TestSetInside, "other_images"),
        (fakes.GradientAware, "beside"),
        (fakes.LargeChanges, "parts"),
        (fakes.WholeImage, "parts"),
        (fakes.InBatches, "batch"),
        (fakes.Purifier, "own_gradients"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_check_finds_the_kind_of_fake_that_it_is_for(kind, check):
    masked = fake(kind)
    found, plain = verdict(masked, check), verdict(masked.net, check)
    assert found.verdict == "failed", found
    assert found.advice
    assert plain.verdict == "passed", plain


def test_random_model_with_made_up_gradient_is_found_on_means():
    found = verdict(fake(fakes.RandomGradient), "slope", "eot-apgd-ce-5x10")
    assert found.verdict == "failed"
    assert found.data["on_means"]
    assert verdict(fake(fakes.Noisy), "slope", "eot-apgd-ce-5x10").verdict == "passed"


def test_model_that_answers_differently_when_asked_again_is_found_under_averaging_suite():
    assert verdict(fake(fakes.AskedAgain), "stochastic", "eot-apgd-ce-5x10").verdict == "failed"
    assert verdict(fake(fakes.Noisy), "stochastic", "eot-apgd-ce-5x10").verdict == "passed"


@pytest.mark.slow
def test_scaled_logits_are_broken_to_true_robustness_by_suite():
    report = report_of(fake(fakes.Scaled))
    assert report.robust_accuracy <= truth()
    assert report.trust == "trusted"
    (check,) = [c for c in report.checks if c.name == "gradients"]
    assert "with rescaled logits" in check.evidence


@pytest.mark.slow
def test_scaled_logits_are_not_trusted_when_suite_is_cross_entropy_only():
    """The only attack of the suite maximizes a loss that is flat."""
    report = report_of(fake(fakes.Scaled), "pgd-20")
    assert report.robust_accuracy > truth()
    assert report.trust == "broken"


def test_budget_check_fails_when_attack_is_too_weak():
    assert verdict(honest(), "budget", "pgd-1").verdict == "failed"


def test_training_radius_check_warns_about_smaller_radius():
    trained = (ThreatModel("linf", 0.05), THREAT, ThreatModel("l2", 0.05), None)
    verdicts = [training_radius(threat, THREAT).verdict for threat in trained]
    assert verdicts == ["warning", "passed", "warning", "skipped"]


def test_beats_guessing_check_warns_about_constant_model():
    labels = np.arange(400) % 4

    def said(robust: np.ndarray) -> str:
        broken_by = np.where(robust, -1, 0)
        return beats_guessing(SampleResults(labels, labels, labels, broken_by), ["a", "b", "c", "d"]).verdict

    assert said(labels == 2) == "warning"
    assert said(np.arange(400) < 110) == "warning", "110 of 400 may be luck"
    assert said(np.arange(400) < 150) == "passed"


@pytest.mark.slow
def test_stochastic_model_is_trusted_under_eot_suite():
    report = report_of(fake(fakes.Noisy), "eot-apgd-ce-20x10,eot-apgd-dlr-20x10,eot-square-100x10")
    verdicts = {c.name: c.verdict for c in report.checks}
    assert verdicts["stochastic"] == "passed"
    assert {verdicts[name] for name in ("one_step", "budget")} == {"skipped"}
    assert {c.name for c in report.checks if c.data.get("on_means")} >= {"slope", "black_box", "labels_only"}
    assert report.trust == "trusted", report.checks


def test_constant_model_passes_radius_check():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.eye(10)[:1] + 0 * x.flatten(1).sum(1, keepdim=True)

    check = verdict(Constant(), "radius", "pgd-5")
    assert check.verdict == "passed"
    assert "the same class" in check.evidence


def test_surely_above_needs_several_samples():
    assert not surely_above(1, 17, 0.01)
    assert surely_above(3, 17, 0.01)
    assert not surely_above(0, 0, 0.01)


@pytest.mark.parametrize(
    ("broken", "said"), [(0, "passed"), (3, "passed"), (12, "warning"), (200, "failed")], ids=str
)
def test_square_record_warns_or_fails_by_what_square_broke_after_gradients(broken, said):
    labels = np.zeros(1000, np.int64)
    attacks = [
        AttackRecord("apgd-ce-100", 980, 580, 400),
        AttackRecord("square-5000", 400, broken, 400 - broken),
    ]
    samples = SampleResults(labels, labels, labels, labels, attacks)
    assert square_record(samples).verdict == said
    assert square_record(SampleResults(labels, labels, labels, labels, attacks[1:])).verdict == "skipped"
