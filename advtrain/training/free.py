"""Training steps whose passes give the gradients of both weights and perturbation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advtrain.attacks import GradientAttack
from advtrain.data import Batch
from advtrain.errors import UserError
from advtrain.models.network import attack_view
from advtrain.training.step import (
    Components,
    Progress,
    StepConfig,
    Sums,
    TrainStep,
    compute_gradients,
    train_step,
    train_step_awp,
    train_step_sam,
    update,
)


def choose_step(config: StepConfig) -> TrainStep:
    """Return the training step for these settings."""
    if config.adversary.name == "free":
        return train_step_free
    if config.optimizer.sam_rho is not None:
        return train_step_sam
    return train_step if config.optimizer.awp_gamma is None else train_step_awp


def train_step_free(components: Components, batch: Batch, progress: Progress) -> Sums:
    """Train with free adversarial training (Shafahi et al. 2019, arXiv 1904.12843, alg. 1).

    Each of num_steps replays of the batch takes one backward pass at z = x + delta. It updates both the weights and
    delta <- Proj(delta + alpha steepest(gradient)), and delta carries over to the next batch. For token ids, delta
    starts at 0 in each batch, because the next texts have other lengths and words. Returns the sums of the last
    replay. Deviation: delta is projected onto ball and box of the sample that it perturbed; the published code clips
    delta to the ball and the sum to the box.
    """
    config, scale = components.config, components.config.eps_scale(progress.epoch)
    attack, ball = components.attack.scaled(scale), config.adversary.threat.scaled(scale)
    assert isinstance(attack, GradientAttack)
    sums: Sums = {}
    _, clean, _ = attack_view(components.network, batch.x, ball)
    delta = _first_perturbation(components, batch, clean)
    for _ in range(config.adversary.num_steps):
        _, clean, threat = attack_view(components.network, batch.x, ball)
        project = threat.projection(clean)
        z = project(clean + delta).requires_grad_()
        sums = compute_gradients(components, batch, z, progress)
        moved = threat.step(z.detach(), _gradient(components, z), attack.step_size(threat))
        delta.copy_(project(moved) - clean)
        sums |= update(components, batch, progress)
    return sums


def _first_perturbation(components: Components, batch: Batch, clean: Tensor) -> Tensor:
    """Return the perturbation of the last batch, a view that is updated in place; zeros for token ids."""
    if not batch.x.is_floating_point():
        return torch.zeros_like(clean)
    if components.replayed is None:
        rows = math.ceil(components.config.batch_size / components.session.world_size)
        components.replayed = torch.zeros(rows, *clean.shape[1:], device=clean.device)
    return components.replayed[: len(batch.y)]


def _gradient(components: Components, z: Tensor) -> Tensor:
    """Return the gradient of the objective at the perturbed z, (N, ...), which a backward pass has left there."""
    if z.grad is None:
        name = components.config.adversary.name
        raise UserError(
            f"adversary.name {name} maximizes the objective, but none of its terms uses the adversarial inputs"
        )
    return z.grad
