"""One adversarial step: perturb, forward, backward, clip, update. Nothing else happens here."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from advtrain.attacks import GradientAttack, frozen_bn_stats
from advtrain.data import Batch
from advtrain.errors import UserError
from advtrain.objective import Objective
from advtrain.optim import clip_gradients, lr_factor
from advtrain.optim.weight_perturbation import perturbed_weights, weight_perturbation
from advtrain.recipe import Recipe
from advtrain.seeding import mix_seed
from advtrain.threat import ThreatModel
from advtrain.training.session import Session, Stopwatch, average_buffers


@dataclass
class Components:
    """What a recipe is built into."""

    model: nn.Module  # what is trained and saved
    network: nn.Module  # the model as it is run, in its precision: what is attacked and validated
    objective: Objective
    reduced: nn.Module  # the objective, behind DistributedDataParallel where there are several workers
    attack: GradientAttack
    threat: ThreatModel  # the training threat model at its full radius
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None  # of `model`
    average_network: nn.Module | None  # the average as it is run
    device: torch.device
    judged: Callable[[], nn.Module] | None = None  # makes what is validated, if that is not `network` itself
    replayed: Tensor | None = None  # free training: this rank's perturbation, carried from batch to batch
    attacking: Stopwatch = field(init=False)  # time in attacks, in which ranks do not wait for each other

    def __post_init__(self) -> None:
        self.attacking = Stopwatch(self.device)


def train_step(
    parts: Components,
    batch: Batch,
    step: int,  # global, from 0
    epoch: float,  # position in the run, in epochs
    recipe: Recipe,
    session: Session,
) -> dict[str, Tensor]:
    """Train on one batch; return sums over this rank's samples (0-dim tensors, still on the device)."""
    for group in parts.optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr * lr_factor(
            recipe.optimizer.schedule, epoch, recipe.training.epochs
        )
    # ------------------------------------------------------------------ attack
    if recipe.adversary.name == "free":
        return replay(parts, batch, step, epoch, recipe, session)
    away = weight_perturbation(recipe.optimizer, epoch)
    with parts.attacking:
        x_adv = perturb(parts, batch, step, epoch, recipe, session)
    # ----------------------------------------------------------------- descend
    with frozen_bn_stats(parts.model) if away == "awp" else nullcontext():
        sums = backward(parts, batch, x_adv, step, epoch, recipe, session)
    if away:  # the gradient of a worst case of the weights replaces that of the weights themselves
        with (
            perturbed_weights(recipe.optimizer, parts.model),
            frozen_bn_stats(parts.model) if away == "sam" else nullcontext(),
        ):
            backward(parts, batch, x_adv, step, epoch, recipe, session)
    return sums | update(parts, batch, recipe, session)


def backward(
    parts: Components,
    batch: Batch,
    x_adv: Tensor | None,
    step: int,
    epoch: float,
    recipe: Recipe,
    session: Session,
) -> dict[str, Tensor]:
    """Fill the gradients with those of the mean loss over the global batch; return the objective's sums."""
    parts.optimizer.zero_grad(set_to_none=True)
    generator = torch.Generator(parts.device)
    generator.manual_seed(mix_seed("terms", recipe.seed, step, session.rank))
    threat = threat_now(parts, batch, step, epoch, recipe, session)
    dropout = mix_seed("dropout", recipe.seed, step, session.rank)
    loss, sums = parts.reduced(batch.x, x_adv, batch.y, threat, generator, dropout)
    # Each rank's sum over the global batch size, times the world size that DDP's mean divides by: the
    # gradient is that of the mean over the global batch, however unevenly it is shared out.
    (loss.sum() * (session.world_size / batch.total)).backward()
    return dict(sums)


def update(parts: Components, batch: Batch, recipe: Recipe, session: Session) -> dict[str, Tensor]:
    """Clip and descend; then what follows the weights: batch norm's statistics and the moving average."""
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    norm, clipped = clip_gradients(recipe.optimizer, parameters)
    parts.optimizer.step()
    average_buffers(parts.model, session)
    if parts.average is not None and recipe.optimizer.ema_decay is not None:
        parts.average.update_parameters(parts.model)
    samples = torch.tensor(float(len(batch.y)), device=parts.device)
    share = len(batch.y) / batch.total  # so that a sum over ranks counts each step once
    return {
        "samples": samples,
        "steps": samples / batch.total,
        "grad_norm": norm.detach() * share,
        "clipped": clipped * share,
    }


def eps_scale(recipe: Recipe, epoch: float) -> float:
    """Return the share of the training radius that the warm-up has reached, in [0, 1]."""
    warm_up = recipe.adversary.eps_warmup_epochs
    return min(1.0, epoch / warm_up) if warm_up else 1.0


def threat_now(
    parts: Components, batch: Batch, step: int, epoch: float, recipe: Recipe, session: Session
) -> ThreatModel:
    """Return the training threat model of this batch: warmed up, and with each sample's own radius if drawn."""
    threat, adversary = parts.threat.scaled(eps_scale(recipe, epoch)), recipe.adversary
    if adversary.eps_low is None or adversary.eps == 0:
        return threat
    generator = torch.Generator(parts.device).manual_seed(mix_seed("radius", recipe.seed, step, session.rank))
    low = adversary.eps_low / adversary.eps
    draws = torch.rand(len(batch.y), generator=generator, device=parts.device)
    return threat.with_radius_scale(low + (1 - low) * draws)


def attack_generator(parts: Components, step: int, recipe: Recipe, session: Session) -> torch.Generator:
    """Return the generator of all draws of a step's attack."""
    return torch.Generator(parts.device).manual_seed(mix_seed("attack", recipe.seed, step, session.rank))


def perturb(
    parts: Components, batch: Batch, step: int, epoch: float, recipe: Recipe, session: Session
) -> Tensor | None:
    """Return the batch with its share adversary.fraction attacked, or None if nothing is.

    The attacked samples are spread evenly over the run's batches, so which ones they are does not depend
    on the number of workers, and a share below one sample a batch attacks one now and then.
    """
    adversary, scale = recipe.adversary, eps_scale(recipe, epoch)
    if not parts.objective.adversarial or adversary.fraction == 0 or adversary.eps == 0 or scale == 0:
        return None
    generator = attack_generator(parts, step, recipe, session)
    attack = parts.attack if scale == 1.0 else parts.attack.scaled(scale)
    threat = threat_now(parts, batch, step, epoch, recipe, session)
    if adversary.fraction == 1:
        return attack(parts.network, batch.x, batch.y, threat, generator)
    first = step * batch.total + batch.offset
    ends = [math.floor((first + i) * adversary.fraction + 1e-9) for i in range(len(batch.y) + 1)]
    chosen = [i for i in range(len(batch.y)) if ends[i + 1] > ends[i]]
    x_adv = batch.x.clone()
    if chosen:
        rows = torch.tensor(chosen, device=parts.device)
        x_adv[rows] = attack(parts.network, batch.x[rows], batch.y[rows], threat.rows(rows), generator)
    return x_adv


def replay(
    parts: Components, batch: Batch, step: int, epoch: float, recipe: Recipe, session: Session
) -> dict[str, Tensor]:
    """Free adversarial training: num_steps times over, one backward pass moves weights and perturbation.

    Shafahi et al. 2019 (arXiv 1904.12843), algorithm 1: theta descends and delta <- Proj(delta + alpha
    steepest(gradient)), both by the gradient at x + delta; delta goes on to the next batch. Returns the sums of
    the last replay. Deviation: delta is projected onto ball and box of the sample that it moved; published code
    cuts it to the ball, and the sum to the box.
    """
    threat = parts.threat.scaled(eps_scale(recipe, epoch))
    attack = parts.attack.scaled(eps_scale(recipe, epoch))
    if parts.replayed is None:
        rows = math.ceil(recipe.training.batch_size / session.world_size)
        parts.replayed = torch.zeros(rows, *batch.x.shape[1:], device=parts.device)
    carried, project = parts.replayed[: len(batch.y)], threat.projection(batch.x)
    sums: dict[str, Tensor] = {}
    for _ in range(recipe.adversary.num_steps):
        z = project(batch.x + carried).requires_grad_()
        sums = backward(parts, batch, z, step, epoch, recipe, session)
        if z.grad is None:
            raise UserError(
                "adversary.name free climbs the objective, but none of its terms looks at the adversarial inputs"
            )
        moved = threat.step(z.detach(), z.grad, attack.step_size(threat))
        carried.copy_(project(moved) - batch.x)
        sums |= update(parts, batch, recipe, session)
    return sums
