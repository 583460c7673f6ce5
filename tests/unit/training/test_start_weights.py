"""Training from given weights with a part of the model frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from advtrain.data import AugmentConfig, Place
from advtrain.errors import UserError
from advtrain.models.start import StartWeights
from advtrain.training import Session, build_components
from advtrain.training.step import Progress
from tests.kit import digits_data, digits_recipe

NET = "model={name: wide_resnet, args: {depth: 10, width: 1}}"


def trained(start: StartWeights, *overrides: str, steps: int = 3):
    """Train a few steps; return the components and the state before."""
    recipe = digits_recipe(NET, "adversary.num_steps=1", *overrides)
    data = digits_data(recipe)
    components = build_components(recipe, data, Session(), start)
    before = {k: v.clone() for k, v in components.model.state_dict().items()}
    components.train_mode()
    batches = data.train.train_batches(40, 0, 0, AugmentConfig(), Place())
    for step, batch in zip(range(steps), batches, strict=False):
        components.train_step(components, batch, Progress(step, step / 10))
    return components, before


def given_weights() -> dict[str, torch.Tensor]:
    recipe = digits_recipe(NET, "seed=7")
    return build_components(recipe, digits_data(recipe), Session()).model.state_dict()


def test_training_starts_from_the_given_weights():
    weights = given_weights()
    _, before = trained(StartWeights(weights))
    assert all(torch.equal(before[k], weights[k]) for k in weights)


@pytest.mark.parametrize("extra", [(), ("optimizer.decay_all=false",), ("optimizer.awp_gamma=0.01",)])
def test_frozen_modules_are_unchanged_and_others_are_trained(extra):
    """Stem and first stage, half of the network, are frozen."""
    frozen = ("network.0", "network.1")
    components, before = trained(StartWeights(given_weights(), frozen), *extra)
    after = components.model.state_dict()
    for name, tensor in after.items():
        kept = name.startswith(tuple(f"{prefix}." for prefix in frozen))
        if kept or tensor.is_floating_point():
            assert torch.equal(tensor, before[name]) == kept, name
    trained_parameters = {p for group in components.optimizer.param_groups for p in group["params"]}
    assert trained_parameters == {p for p in components.model.parameters() if p.requires_grad}
    norms = [m for m in components.model.network[1].modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (StartWeights({"network.0.weight": torch.zeros(1)}), "do not fit the model"),
        (StartWeights(frozen=("network.99",)), "no module 'network.99' to freeze"),
        (StartWeights(frozen=("network",)), "nothing is left to train"),
        (StartWeights(frozen=("network.0",)), "statistics of frozen modules"),
    ],
)
def test_invalid_start_weights_are_rejected(start, message):
    with pytest.raises(UserError, match=message):
        trained(start, "optimizer.swa_start_epoch=1", steps=0)
