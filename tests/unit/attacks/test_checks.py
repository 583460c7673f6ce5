"""Every attack refuses inputs, labels and outputs that it would misread."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from advtrain.attacks import AttackConfig, FastAdaptiveBoundary, TransferAttack, build_attack, build_suite
from advtrain.attacks.carlini_wagner import CarliniWagner
from advtrain.attacks.checks import check_inputs
from advtrain.errors import UserError
from advtrain.threat import ThreatModel
from tests.kit import Linear

L2 = ThreatModel("l2", 0.5)


class Source:
    """A second model, for the transfer attack."""

    digest = "0" * 64

    def load(self):
        return Linear(12, seed=1)


def make_custom():
    """Return a custom attack that does nothing."""
    return lambda model, x, y, threat, generator: x


def configured(**values):
    return build_attack(AttackConfig.model_validate({"num_steps": 2} | values))


def suite(name):
    return build_suite(name)[0].find_failures


#: Entry points (model, x, y, threat) of attacks on classifiers.
ATTACKS = {
    "pgd": lambda: configured(),
    "friendly": lambda: configured(friendly=1),
    "custom": lambda: configured(name=f"{__name__}:make_custom", num_steps=10),
    "pgd rounds": lambda: suite("pgd-2"),
    "apgd-ce": lambda: suite("apgd-ce-2"),
    "apgd-dlr": lambda: suite("apgd-dlr-2"),
    "apgd-t": lambda: suite("apgd-t-2"),
    "eot-apgd-ce": lambda: suite("eot-apgd-ce-2x2"),
    "fab-t": lambda: suite("fab-t-2"),
    "fab-t nearest": lambda: FastAdaptiveBoundary(2).find_nearest,
    "square": lambda: suite("square-2"),
    "rays": lambda: suite("rays-2"),
    "student": lambda: suite("student-2x1"),
    "cw": lambda: suite("cw-2x1"),
    "cw nearest": lambda: CarliniWagner(2, 1).find_nearest,
    "transfer": lambda: TransferAttack(Source(), num_steps=2).find_failures,
}


def batch(n=6):
    x = torch.rand(n, 12, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0, 1] * (n // 2))


def with_value(x, value):
    x = x.clone()
    x[-1, -1] = value
    return x


BAD_INPUTS = {
    "normalized": (lambda x, y: ((x - 0.5) / 0.25, y), r"outside the bounds \[0, 1\]"),
    "above": (lambda x, y: (with_value(x, 1.0001), y), "x holds 1.0001"),
    "below": (lambda x, y: (with_value(x, -0.25), y), "x holds -0.25"),
    "nan": (lambda x, y: (with_value(x, math.nan), y), "x holds nan"),
    "inf": (lambda x, y: (with_value(x, math.inf), y), "x holds inf"),
    "bytes": (lambda x, y: ((255 * x).byte(), y), "divide by 255"),
    "one-hot labels": (lambda x, y: (x, torch.eye(2)[y]), r"y must have shape \(6,\)"),
    "too few labels": (lambda x, y: (x, y[:-1]), r"y must have shape \(6,\)"),
    "int32 labels": (lambda x, y: (x, y.int()), r"int64 class labels, not torch.int32; .* y.long\(\)"),
    "negative label": (lambda x, y: (x, y - 1), "y holds the label -1"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_refuses_bad_input(attack, change, message):
    with pytest.raises(UserError, match=message):
        ATTACKS[attack]()(Linear(12), *change(*batch()), L2)


class Returns(nn.Module):
    """Model whose logits a function changes."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = Linear(12), change

    def forward(self, x):
        return self.change(self.model(x))


BAD_OUTPUTS = {
    "dict": (lambda z: {"logits": z}, "returns dict, .*wrap_model"),
    "tuple": (lambda z: (z, z), "returns tuple, .*wrap_model"),
    "one logit": (lambda z: z[:, 1:], r"one value for each sample, \(\d+, 1\).*wrap_model"),
    "flat": (lambda z: z[:, 1], "one value for each sample.*wrap_model"),
    "classes": (lambda z: z.long(), "not floating-point logits"),
    "maps": (lambda z: z[..., None], r"not logits \(\d+, K\)"),
    "batch of one": (lambda z: z[:1], r"returns \(1, 2\), not logits"),
}


@pytest.mark.parametrize(("change", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "custom"])
def test_attack_refuses_bad_output(attack, change, message):
    """A custom attack reads the outputs itself."""
    with pytest.raises(UserError, match=message):
        ATTACKS[attack]()(Returns(change), *batch(), L2)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "custom"])
def test_attack_refuses_label_without_logit(attack):
    x, y = batch()
    with pytest.raises(UserError, match="y holds the label 2; the model returns 2 logits"):
        ATTACKS[attack]()(Linear(12), x, y + 1, L2)


class Regression(nn.Module):
    def forward(self, x):
        return x.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (2 * x, y), "outside the bounds"),
        (lambda x, y: (x, y.long()), r"float targets, not torch.int64; .* y.float\(\)"),
        (lambda x, y: (x, y.unsqueeze(1)), "y must have shape"),
        (lambda x, y: (x, with_value(y[None], math.nan)[0]), "y holds nan"),
    ],
    ids=["outside", "labels", "shape", "nan"],
)
def test_attack_on_regression_refuses_bad_input(change, message):
    x, y = batch()
    attack = configured(loss="mae")
    for run in (attack, attack.find_worst):
        with pytest.raises(UserError, match=message):
            run(Regression(), *change(x, y.float()), L2)


def test_attack_on_regression_refuses_logits():
    x, y = batch()
    with pytest.raises(UserError, match=r"a regression returns \(6, 1\)"):
        configured(loss="mae").find_worst(Linear(12), x, y.float(), L2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_accepts_bounds_rounded_to_type_of_x(dtype):
    x, y = torch.tensor([[0.1], [0.7]], dtype=dtype), torch.tensor([0, 4])
    assert check_inputs(x, y, ThreatModel("linf", 0.1, low=0.1, high=0.7)) == 5
    with pytest.raises(UserError, match="outside the bounds"):
        check_inputs(x * 1.1, y, ThreatModel("linf", 0.1, low=0.1, high=0.7))


def test_check_accepts_any_finite_value_without_a_box():
    y, threat = torch.zeros(2, dtype=torch.int64), ThreatModel("l2", 0.1, low=-math.inf, high=math.inf)
    assert check_inputs(torch.tensor([[-1e6], [1e6]]), y, threat) == 1
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="x holds"):
            check_inputs(torch.tensor([[0.0], [value]]), y, threat)


def test_check_accepts_no_samples():
    assert check_inputs(torch.rand(0, 3), torch.zeros(0, dtype=torch.int64), L2) == 0


def test_training_attack_reads_no_values_without_checks():
    """The training data were checked when they were loaded, and reading values waits for the GPU."""
    x, y = batch()
    config = AttackConfig.model_validate({"num_steps": 1})
    for attack in (
        build_attack(config, check_inputs=False),
        build_attack(config, check_inputs=False).scaled(0.5),
    ):
        assert attack(Linear(12), 2 * x, y, L2).max() <= 1
