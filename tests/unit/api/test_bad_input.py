"""Attacks and evaluations refuse inputs, labels, outputs and models that they would misread."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import advtrain
from advtrain.attacks import AttackConfig
from advtrain.data import ArraySplit, Dataset
from advtrain.evaluation import EvalSpec
from advtrain.evaluation import evaluate as run_evaluation
from tests.kit import Busy, Linear
from tests.unit.api.test_wrap_model import Returns, batch


def dataset(x, y, num_classes=2):
    split = ArraySplit(x.numpy(), y.numpy())
    return Dataset("data", split, split, split, num_classes, tuple(x.shape[1:]), "0" * 64)


def spec(model, x, y, num_classes=2, suite="pgd-2"):
    data = dataset(x, y, num_classes)
    return EvalSpec(model, data.test, data, suite, advtrain.ThreatModel("linf", 0.01), "model")


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", None])
def test_seed_that_is_no_count_is_refused(seed):
    x, y = batch()
    for call in (
        lambda: advtrain.attack(Linear(16), x, y, "linf:0.01", seed=seed, num_steps=1),
        lambda: advtrain.attack(Linear(16), x, y, "linf:0.01", "square-2", seed=seed),
        lambda: advtrain.evaluate(Linear(16), x, y, "linf:0.01", suite="pgd-2", full=False, seed=seed),
    ):
        with pytest.raises(advtrain.UserError, match="a seed must be an integer of at least 0"):
            call()


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, 2**70])
def test_large_seed_is_a_seed(seed):
    x, y = batch()
    one, two = (advtrain.attack(Linear(16), x, y, "linf:0.01", seed=s, num_steps=1) for s in (seed, seed))
    assert torch.equal(one, two)


CALLS = {
    "attack": lambda m, x, y: advtrain.attack(m, x, y, "linf:0.01", num_steps=2),
    "attack with a suite": lambda m, x, y: advtrain.attack(m, x, y, "linf:0.01", "square-2"),
    "evaluate": lambda m, x, y: advtrain.evaluate(m, x, y, "linf:0.01", suite="pgd-2", full=False),
    "EvalSpec": lambda m, x, y: run_evaluation(spec(m, x, y)),
}
EVERYWHERE = CALLS | {
    "Adversary": lambda m, x, y: advtrain.Adversary("linf:0.01", num_steps=2)(m, x, y),
}


@pytest.mark.parametrize("call", ["attack", "attack with a suite", "evaluate", "Adversary"])
def test_labels_in_a_list_are_refused(call):
    x, y = batch()
    with pytest.raises(advtrain.UserError, match="y must be a tensor, one label for each input, not list"):
        EVERYWHERE[call](Linear(16), x, y.tolist())


def test_labels_of_an_objective_must_be_a_tensor_of_their_number():
    x, y = batch()
    loss = advtrain.Objective(clean_ce=1)
    for labels, message in ((y.tolist(), "y must be a tensor"), (y[1:], "y must have shape")):
        with pytest.raises(advtrain.UserError, match=message):
            loss(Linear(16), x, None, labels)


@pytest.mark.parametrize("call", EVERYWHERE)
def test_normalized_inputs_are_refused(call):
    """They were clipped into the box, by up to 1.64 at eps 8/255."""
    x, y = batch()
    with pytest.raises(advtrain.UserError, match=r"outside the bounds \[0, 1\].*wrap_model"):
        EVERYWHERE[call](Linear(16), (x - 0.45) / 0.22, y)


def test_normalized_inputs_are_refused_if_every_sample_is_misclassified():
    x, y = batch()
    with pytest.raises(advtrain.UserError, match="outside the bounds"):
        run_evaluation(spec(Linear(16), 2 * x, 1 - Linear(16)(2 * x).argmax(1)))


@pytest.mark.parametrize("call", EVERYWHERE)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: SimpleNamespace(logits=z), "returns SimpleNamespace.*wrap_model"),
        (lambda z: (z,), "returns tuple.*wrap_model"),
        (lambda z: z[:, 1:], "one value for each sample.*wrap_model"),
        (lambda z: z.argmax(1), "torch.int64"),
    ],
    ids=["object", "tuple", "one logit", "classes"],
)
def test_other_outputs_are_refused(call, change, message):
    with pytest.raises(advtrain.UserError, match=message):
        EVERYWHERE[call](Returns(change), *batch())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_refused(call, dtype):
    with pytest.raises(advtrain.UserError, match="returns probabilities.*from_probabilities"):
        CALLS[call](Returns(lambda z: (z / 9).softmax(1).to(dtype)), *batch())


@pytest.mark.parametrize("change", [torch.sigmoid, lambda z: F.one_hot(z.argmax(1), 2).float()])
def test_logits_between_0_and_1_are_accepted(change):
    x, y = batch()
    x_adv = advtrain.attack(Returns(change), x, y, "linf:0.01", num_steps=2)
    assert x_adv.shape == x.shape


@pytest.mark.parametrize("call", EVERYWHERE)
def test_label_without_logit_is_refused(call):
    x, y = batch()
    with pytest.raises(advtrain.UserError, match="y holds the label 2; the model returns 2 logits"):
        EVERYWHERE[call](Linear(16), x, y + 1)


def test_evaluation_refuses_other_number_of_classes():
    with pytest.raises(advtrain.UserError, match="returns 2 logits, but the data have 3 classes"):
        run_evaluation(spec(Linear(16), *batch(), num_classes=3))


def test_regression_refuses_several_outputs():
    x, y = batch()
    attack = AttackConfig.model_validate({"num_steps": 2, "loss": "mae"})
    with pytest.raises(advtrain.UserError, match=r"a regression returns \(40, 1\)"):
        run_evaluation(spec(Linear(16), x, y.float(), num_classes=0, suite=attack))


@pytest.mark.parametrize("name", ["attack", "evaluate"])
def test_batch_norm_in_training_mode_is_refused(name):
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    model = Busy().eval()
    model.body[1].train()
    with pytest.raises(advtrain.UserError, match=r"layer 'body\.1' is in training mode; call model.eval\(\)"):
        CALLS[name](model, x, y)
    CALLS[name](model.eval(), x, y)
    advtrain.Adversary("linf:0.01", num_steps=1)(model.train(), x, y)
