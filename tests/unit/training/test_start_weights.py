"""Training from given weights."""

from __future__ import annotations

import pytest
import torch

from advtrain.errors import UserError
from advtrain.models.start import StartWeights
from advtrain.training import Session, build_components
from tests.kit import digits_data, digits_recipe


def test_training_starts_from_the_given_weights():
    recipe, other = digits_recipe(), digits_recipe("seed=7")
    weights = build_components(other, digits_data(other), Session()).model.state_dict()
    model = build_components(recipe, digits_data(recipe), Session(), StartWeights(weights)).model
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_architecture_are_rejected():
    recipe = digits_recipe()
    start = StartWeights({"network.0.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="do not fit the model"):
        build_components(recipe, digits_data(recipe), Session(), start)
