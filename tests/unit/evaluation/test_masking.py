"""Models with gradient masking: the suite finds their true robustness, or a check fails."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advtrain.evaluation import EvalSpec, SampleResults, evaluate
from advtrain.evaluation.checks import beats_guessing, training_radius
from advtrain.evaluation.masking import CHECKS
from advtrain.evaluation.statistics import surely_above
from advtrain.threat import ThreatModel
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
def truth() -> float:
    return report_of(honest()).robust.high


class Around(nn.Module):
    """The network without masking, wrapped by a masking layer in subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = honest()

    def forward(self, x):
        return self.net(x)


class Scaled(Around):
    def forward(self, x):
        return 10_000 * self.net(x)


class Saturated(Around):
    """Sigmoids that saturate to 0 or 1 in float32; a small linear term keeps the order."""

    def forward(self, x):
        z = self.net(x)
        return torch.sigmoid(50 * (z - z.amax(1, keepdim=True).detach() + 0.5)) + 1e-4 * z.detach()


class Quantised(Around):
    def forward(self, x):
        return self.net((4 * x).round() / 4)


class StraightThrough(Around):
    """Quantized inputs with a straight-through gradient."""

    def forward(self, x):
        return self.net(x + ((4 * x).round() / 4 - x).detach())


class Argmax(Around):
    def forward(self, x):
        return F.one_hot(self.net(x).argmax(1), 10).float()


class Dropout(Around):
    def forward(self, x):
        return self.net(F.dropout(x, 0.3, training=True))


class BatchNorm(Around):
    def forward(self, x):
        return self.net(0.9 * x + 0.1 * F.batch_norm(x, None, None, training=True))


class Noisy(Around):
    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


def test_model_without_masking_is_trusted():
    report = report_of(honest())
    assert report.trust == "trusted", [c for c in report.checks if c.verdict == "failed"]
    assert {c.name for c in report.checks} == {*CHECKS, "training_radius", "beats_guessing"} - {"embedding"}
    assert 0.05 < report.robust_accuracy < 0.8, "the test needs a model that some attacks break"
    assert all(c.evidence and not c.advice for c in report.checks if c.verdict == "passed")


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Quantised, "steps_inside"),
        pytest.param(StraightThrough, "steps_inside", marks=pytest.mark.slow),
        (Argmax, "gradients"),
        pytest.param(Saturated, "gradients", marks=pytest.mark.slow),
        pytest.param(Dropout, "stochastic", marks=pytest.mark.slow),
        (Noisy, "stochastic"),
        (BatchNorm, "batch"),
    ],
)
def test_gradient_masking_is_detected_and_explained(kind, check):
    report = report_of(kind())
    failed = {c.name: c for c in report.checks if c.verdict == "failed"}
    assert report.trust == "broken"
    assert check in failed, failed
    assert failed[check].advice


@pytest.mark.slow
def test_scaled_logits_are_broken_to_true_robustness_by_suite():
    report = report_of(Scaled())
    assert report.robust_accuracy <= truth()
    assert report.trust == "trusted"
    (check,) = [c for c in report.checks if c.name == "gradients"]
    assert "with rescaled logits" in check.evidence


@pytest.mark.slow
def test_scaled_logits_are_not_trusted_when_suite_is_cross_entropy_only():
    """The only attack of the suite maximizes a loss that is flat."""
    report = report_of(Scaled(), "pgd-20")
    assert report.robust_accuracy > truth()
    assert report.trust == "broken"


def test_budget_check_fails_when_attack_is_too_weak():
    report = report_of(honest(), "pgd-1")
    assert "budget" in {c.name for c in report.checks if c.verdict == "failed"}


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
    report = report_of(Noisy(), "eot-apgd-ce-20x10,eot-apgd-dlr-20x10")
    verdicts = {c.name: c.verdict for c in report.checks}
    assert verdicts["stochastic"] == "passed"
    assert {verdicts[name] for name in ("one_step", "black_box", "budget")} == {"skipped"}
    assert report.trust == "trusted", report.checks


def test_constant_model_passes_radius_check():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.eye(10)[:1] + 0 * x.flatten(1).sum(1, keepdim=True)

    report = report_of(Constant(), "pgd-5")
    assert report.robust_accuracy == report.clean_accuracy > 0
    (check,) = [c for c in report.checks if c.name == "radius"]
    assert check.verdict == "passed"
    assert "the same class" in check.evidence


def test_surely_above_needs_several_samples():
    assert not surely_above(1, 17, 0.01)
    assert surely_above(3, 17, 0.01)
    assert not surely_above(0, 0, 0.01)
