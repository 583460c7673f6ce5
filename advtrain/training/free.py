"""Training steps whose passes give the gradients of both weights and perturbation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advtrain.attacks import GradientAttack
from advtrain.data import Batch
from advtrain.errors import UserError
from advtrain.models.network import attack_view
from advtrain.threat import ThreatModel, alongside
from advtrain.training.step import (
    Components,
    Progress,
    StepConfig,
    Sums,
    TrainStep,
    attacked_rows,
    compute_gradients,
    train_step,
    train_step_awp,
    train_step_sam,
    training_threat,
    update,
)


def choose_step(config: StepConfig) -> TrainStep:
    """Return the training step for these settings."""
    if config.adversary.name in ("free", "freelb"):
        return train_step_free if config.adversary.name == "free" else train_step_freelb
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
    assert isinstance(components.attack, GradientAttack)
    attack, ball = components.attack.scaled(scale), config.adversary.threat.scaled(scale)
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


def train_step_freelb(components: Components, batch: Batch, progress: Progress) -> Sums:
    """Train with FreeLB (Zhu et al. 2020, arXiv 1909.11764, alg. 1).

    The loss is the mean over num_steps points z + d_t, with one update of the weights. The backward pass at each point
    but the last also gives the ascent d_{t+1} = Proj(d_t + alpha steepest(gradient)). As in the authors' code, d_0 is
    not projected (`random_start`). With `start: none` the first point is the clean z; otherwise there is no clean pass,
    as in that code. Samples that adversary.fraction leaves out stay at the clean z. Returns the mean sums of the
    points. Deviation: linf steps by the sign of the gradient; the code divides it by its largest entry.
    """
    adversary, scale = components.config.adversary, components.config.eps_scale(progress.epoch)
    if not components.is_attacked(progress):
        return train_step(components, batch, progress)
    threat = training_threat(components, batch, progress)
    if adversary.fraction < 1:
        rows = attacked_rows(adversary.fraction, batch, progress)
        factor = torch.zeros(len(batch.y), device=rows.device)
        factor[rows] = 1.0 if threat.radius_scale is None else threat.radius_scale[rows]
        threat = threat.with_radius_scale(factor)
    _, z, threat = attack_view(components.network, batch.x, threat)
    assert isinstance(components.attack, GradientAttack)
    attack, project, sums = components.attack.scaled(scale), threat.projection(z), Sums()
    if adversary.start == "uniform":
        size = scale * (adversary.eps if adversary.init_mag is None else adversary.init_mag)
        z = random_start(z, threat, size, components.generator("attack", progress.step))
    for point in range(adversary.num_steps):
        z = z.detach().requires_grad_()
        found = compute_gradients(components, batch, z, progress, point, adversary.num_steps)
        sums = {name: sums.get(name, 0) + value / adversary.num_steps for name, value in found.items()}
        if point < adversary.num_steps - 1:
            z = project(threat.step(z.detach(), _gradient(components, z), attack.step_size(threat)))
    return sums | update(components, batch, progress)


def random_start(z: Tensor, threat: ThreatModel, size: float, generator: torch.Generator | None) -> Tensor:
    """Return z plus U(-1, 1) size / n^(1/p) at the n free coordinates of each ball.

    It is FreeLB's random start. The norm of the perturbation is at most `size`. Only free coordinates consume draws, so
    the padding of texts does not change the start.

    Args:
        z: (N, ...) float, the clean points.
        threat: threat model on z; `radius_scale` also scales the start.
        size: length, at least 0, in the units of z.
        generator: source of the draws, on z's device.
    """
    if threat.group == "token":
        tokens = threat.by_token(z)
        return random_start(z.flatten(0, 1), tokens, size, generator).view_as(z)
    free = torch.ones_like(z, dtype=torch.bool) if threat.free is None else threat.free.expand_as(z)
    draws = torch.rand(int(free.sum()), generator=generator, device=z.device, dtype=z.dtype) * 2 - 1
    count = alongside(free.flatten(1).sum(1).clamp_min(1).to(z.dtype), z)
    divisor = {"linf": torch.ones_like(count), "l2": count.sqrt(), "l1": count}[threat.norm]
    moved = torch.zeros_like(z).masked_scatter(free, draws) * (threat.per_sample(size, z) / divisor)
    return (z + moved).clamp(threat.low, threat.high)


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
