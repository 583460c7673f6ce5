"""Attacks that see only the predicted class: RayS, and the transfer from a student."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.attacks import RayS, StudentTransfer, build_suite
from advtrain.attacks.draws import MeanOfDraws
from advtrain.threat import ThreatModel
from tests.kit import Linear

THREAT = ThreatModel("linf", 0.1)


def samples(num_samples: int = 60) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """Return a linear model, inputs away from the box boundary, its classes there, and their linf distances."""
    generator = torch.Generator().manual_seed(0)
    model = Linear(64)
    x = 0.5 + 0.2 * (torch.rand(num_samples, 1, 8, 8, generator=generator) - 0.5)
    with torch.no_grad():
        logits = model(x)
        gap = (logits[:, 1] - logits[:, 0]).abs()
    return model, x, logits.argmax(1), gap / model.weight.detach().abs().sum()


class Decisions(nn.Module):
    """A model that gives only the predicted class of another one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(self.model(x).argmax(1), 2).float()


def test_rays_finds_nearly_the_linear_worst_case_and_stays_in_the_ball():
    model, x, y, distance = samples()
    x_adv, fooled = RayS(3000).find_failures(model, x, y, THREAT)
    assert THREAT.distance(x_adv, x).max() <= THREAT.eps + 1e-6
    assert not fooled[distance > THREAT.eps].any()
    assert fooled[distance < 0.9 * THREAT.eps].all()
    assert (distance < 0.9 * THREAT.eps).sum() > 10
    assert (model(x_adv).argmax(1) != y)[fooled].all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_rays_needs_no_scores_and_respects_the_norm(norm):
    model, x, y, _ = samples()
    threat = ThreatModel(norm, {"linf": 0.1, "l2": 1.0, "l1": 7.0}[norm])
    with_scores = RayS(300).find_failures(model, x, y, threat, batch_size=7)
    without = RayS(300).find_failures(Decisions(model), x, y, threat, batch_size=7)
    assert torch.equal(with_scores[1], without[1])
    assert without[1].any()
    assert torch.equal(with_scores[0], without[0])
    assert (threat.distance(without[0], x) <= threat.eps * (1 + 1e-5)).all()


def test_student_that_sees_only_classes_breaks_a_model_without_scores():
    model, x, y, distance = samples(100)
    attack = StudentTransfer(num_steps=10, num_epochs=20)
    state = torch.get_rng_state()
    x_adv, fooled = attack.find_failures(Decisions(model), x, y, THREAT, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert fooled[distance < 0.3 * THREAT.eps].float().mean() > 0.8
    assert (THREAT.distance(x_adv, x) <= THREAT.eps + 1e-6).all()
    assert (model(x_adv).argmax(1) != y)[fooled].all()


def test_square_on_means_breaks_a_noisy_model():
    model, x, y, distance = samples()

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x) + torch.randn(len(x), 2)

    (attack,) = build_suite("eot-square-300x8")
    assert attack.num_draws == 8
    assert attack.name == "eot-square-300x8"
    torch.manual_seed(0)
    _, fooled = attack.find_failures(Noisy(), x, y, THREAT, torch.Generator().manual_seed(0))
    assert fooled[distance < 0.5 * THREAT.eps].float().mean() > 0.5


def test_mean_of_draws_repeats_its_draws_and_keeps_the_global_generator():
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    x = torch.zeros(1000, 2)
    repeated = MeanOfDraws(Noise(), 16, seed=3)
    state = torch.get_rng_state()
    first = repeated(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, repeated(x))
    assert abs(float(first.std()) - 0.25) < 0.02, "the mean of 16 draws has a quarter of the noise"
    assert not torch.equal(MeanOfDraws(Noise(), 16)(x), MeanOfDraws(Noise(), 16)(x))
