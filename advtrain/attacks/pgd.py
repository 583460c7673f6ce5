"""Projected gradient ascent on the input; published attacks are presets of it (`config.py`).

Deviation: the projection is onto the intersection of ball and box (the nearest point of B(x)). Published l2 and l1
code projects onto the ball and then clips, which gives another point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advtrain.attacks.active_batches import in_parts
from advtrain.attacks.base import SearchDefaults, attack_mode, input_gradient, predictions
from advtrain.attacks.checks import checked
from advtrain.attacks.losses import ATTACK_LOSSES, AttackLoss, residual
from advtrain.errors import UserError
from advtrain.recipe.attack import REGRESSION_LOSSES, AttackConfig, BatchNormMode
from advtrain.threat import ThreatModel, alongside

#: Called with an iterate z (N, ...) and the model's outputs there.
Keep = Callable[[Tensor, Tensor], None]


class GradientAttack(SearchDefaults):
    """Gradient attack that an AttackConfig describes.

    Args:
        config: settings of the attack.
        batch_norm: mode of the batch-norm layers during the attack.
        check_inputs: check inputs, labels and outputs in `__call__`, which waits for the device once.
        teacher: x (N, ...) -> logits (N, K), for the loss kl_teacher.

    Raises:
        UserError: the loss is kl_teacher, and there is no teacher.
    """

    def __init__(
        self,
        config: AttackConfig,
        batch_norm: BatchNormMode = "eval",
        *,
        check_inputs: bool = True,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if config.loss == "kl_teacher" and teacher is None:
            raise UserError("the loss kl_teacher needs a teacher, and attacks a model in training only")
        self.config, self.check_inputs, self.teacher = config, check_inputs, teacher
        self.batch_norm: BatchNormMode = batch_norm

    @property
    def name(self) -> str:
        """Name in reports: pgd-50x5 is PGD with 50 steps and 5 restarts."""
        config = self.config
        steps = f"-{config.num_steps}" if config.name in ("pgd", "mi_fgsm") else ""
        restarts = f"x{config.num_restarts}" if config.num_restarts > 1 else ""
        loss = "" if config.loss == "ce" else f"-{config.loss}"
        target = "" if config.target == "none" else f"-{config.target}"
        return f"{config.name}{loss}{target}{steps}{restarts}"

    @property
    def num_rounds(self) -> int:
        """Number of restarts, each run on the samples that are still robust."""
        return self.config.num_restarts

    @property
    def cost(self) -> int:
        """Forward passes of a sample in a restart; a backward pass counts as two."""
        return 3 * self.config.num_steps

    def scaled(self, factor: float) -> GradientAttack:
        """Return the attack with `factor` times the step size, for a scaled threat model."""
        size = self.config.step_size
        if size is None or factor == 1.0:  # None: relative to eps already
            return self
        return self.changed(step_size=size * factor)

    def changed(self, **values: Any) -> GradientAttack:
        """Return a copy of the attack with changed configuration values."""
        config = self.config.model_copy(update=values)
        return GradientAttack(config, self.batch_norm, check_inputs=self.check_inputs, teacher=self.teacher)

    def step_size(self, threat: ThreatModel) -> float:
        """Return the step length in input units, for samples at the full radius."""
        config = self.config
        if config.step_size is not None:
            return config.step_size
        steps = max(1, config.num_steps)
        factor = {"fgsm_rs": 1.25, "mi_fgsm": 1 / steps, "freelb": 1 / steps, "pgd": 2.5 / steps}
        return factor.get(config.name, 1.0) * threat.eps

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the adversarial input of each sample, (N, ...).

        With several restarts, a sample keeps the one with the highest final loss.
        """
        if self.check_inputs:
            model = self._checked(model, x, y, threat)
        with attack_mode(model, self.batch_norm):
            loss = self._loss(model, x, y, generator)
            climb = self._climb if self.config.friendly is None else self._climb_friendly
            x_adv = climb(model, x, y, threat, loss, self._start(x, threat, generator))
            if self.config.num_restarts == 1:
                return x_adv
            with torch.no_grad():
                best = loss(model(x_adv).float(), x_adv)
                for _ in range(self.config.num_restarts - 1):
                    again = climb(model, x, y, threat, loss, self._start(x, threat, generator))
                    value = loss(model(again).float(), again)
                    higher = value > best
                    best = torch.where(higher, value, best)
                    x_adv[higher] = again[higher]
            return x_adv

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one restart of an evaluation and return (x_adv (N, ...), fooled (N,) bool).

        All rounds are alike. Every iterate counts: a sample keeps the first iterate that is misclassified.
        """
        model = self._checked(model, x, y, threat)
        return in_parts(
            lambda x, y, threat: self._find(model, x, y, threat, generator), x, y, threat, batch_size
        )

    def _find(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        found_x, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def keep(z: Tensor, logits: Tensor) -> None:
            new = (predictions(logits) != y) & ~fooled
            found_x[new] = z[new]
            fooled.logical_or_(new)

        x_adv = self._climb_and_keep(model, x, y, threat, generator, keep)
        found_x[~fooled] = x_adv[~fooled]
        return found_x, fooled

    def find_worst(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one restart on a regression and return (x_adv (N, ...), |f(x_adv) - y| (N,)).

        Every iterate counts. An output that is not finite counts as an infinite error.
        """
        model = self._checked(model, x, y, threat)
        found_x, worst = x.clone(), torch.full((len(x),), -1.0, device=x.device)

        def keep(z: Tensor, outputs: Tensor) -> None:
            error = residual(outputs, y).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
            higher = error > worst
            found_x[higher] = z[higher]
            torch.maximum(worst, error, out=worst)

        self._climb_and_keep(model, x, y, threat, generator, keep)
        return found_x, worst

    def _climb_and_keep(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
        keep: Keep,
    ) -> Tensor:
        with attack_mode(model, self.batch_norm):
            loss = self._loss(model, x, y, generator)
            x_adv = self._climb(model, x, y, threat, loss, self._start(x, threat, generator), keep)
            with torch.no_grad():
                keep(x_adv, model(x_adv).float())
            return x_adv

    def _climb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        loss: AttackLoss,
        start: Tensor,
        keep: Keep | None = None,
    ) -> Tensor:
        """Run projected gradient ascent from `start` and return the last iterate.

        z_{t+1} = Proj_B(x)(z_t + alpha steepest(gradient)).
        """
        if self.config.name == "vat":
            return self._climb_from_clean(model, x, threat, loss, start, keep)
        z, project, velocity = start, self._projection(threat, x), None
        for _ in range(self.config.num_steps):
            gradient, outputs = input_gradient(model, z, loss)
            if keep is not None:
                keep(z, outputs)
            if self.config.momentum:
                velocity = gradient = self._accumulate(velocity, threat.where_free(gradient, 0.0))
            z = project(threat.step(z, gradient, self.step_size(threat)))
        return z

    def _climb_from_clean(
        self,
        model: nn.Module,
        x: Tensor,
        threat: ThreatModel,
        loss: AttackLoss,
        start: Tensor,
        keep: Keep | None,
    ) -> Tensor:
        """Run the power iterations of VAT and return x + eps steepest(gradient) in B(x).

        Miyato et al. 2018, algorithm 1: d <- steepest(gradient at x + xi d), then x + eps d. The gradient of the
        divergence is 0 at x, so a step d of length xi = `noise` times eps finds the direction of greatest curvature.
        """
        z, project, steps = start, self._projection(threat, x), self.config.num_steps
        for number in range(steps):
            gradient, outputs = input_gradient(model, z, loss)
            if keep is not None:
                keep(z, outputs)
            share = 1.0 if number == steps - 1 else self.config.noise
            z = project(threat.step(x, gradient, share * threat.eps))
        return z

    def _climb_friendly(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        loss: AttackLoss,
        start: Tensor,
    ) -> Tensor:
        """Run `_climb`, but stop a sample after `friendly` more steps once it is misclassified.

        Only steps from misclassified points count. The model runs only on samples that have not stopped.
        """
        z = start.clone()
        active = torch.arange(len(x), device=x.device)
        left = torch.full_like(active, self.config.friendly or 0)
        velocity: Tensor | None = None
        for _ in range(self.config.num_steps):
            gradient, outputs = input_gradient(model, z[active], loss)
            left = left - (predictions(outputs) != y[active]).long()
            if self.config.momentum:
                free = threat.rows(active).where_free(gradient, 0.0)
                velocity = gradient = self._accumulate(velocity, free)
            going = left >= 0
            if not going.all():
                active, left, gradient, loss = active[going], left[going], gradient[going], loss.take(going)
                velocity = velocity[going] if velocity is not None else None
            if len(active) == 0:
                break
            here, ball, centre = z[active], threat.rows(active), x[active]
            moved = ball.step(here, gradient, self.step_size(threat))
            z[active] = self._projection(ball, centre)(moved)
        return z

    def _checked(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> nn.Module:
        """Check the inputs, and return a view of the model that checks its outputs."""
        return checked(model, x, y, threat, regression=self.config.loss in REGRESSION_LOSSES)

    def _accumulate(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        """Return momentum * velocity + gradient / ||gradient||_1 (Dong et al. 2018)."""
        size = gradient.flatten(1).abs().sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient / alongside(size, gradient)
        return gradient if velocity is None else self.config.momentum * velocity + gradient

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> AttackLoss:
        """Return the loss to maximize; a targeted attack minimizes the loss of a wrong class."""
        build = ATTACK_LOSSES[self.config.loss]
        if self.config.loss == "kl_teacher" and self.teacher is not None:
            return build(self.teacher, x, y)
        if self.config.target == "none":
            return build(model, x, y)
        with torch.no_grad():
            logits = model(x).float()
        if self.config.target == "least_likely":
            target = logits.scatter(1, y.unsqueeze(1), float("inf")).argmin(1)
        else:
            offset = torch.randint(1, logits.shape[1], y.shape, generator=generator, device=y.device)
            target = (y + offset) % logits.shape[1]
        towards = build(model, x, target)
        return AttackLoss(lambda *values: -towards.function(*values), towards.context)

    def _projection(self, threat: ThreatModel, x: Tensor) -> Callable[[Tensor], Tensor]:
        if self.config.name == "n_fgsm":
            return lambda z: z.clamp(threat.low, threat.high)
        return threat.projection(x)

    def _start(self, x: Tensor, threat: ThreatModel, generator: torch.Generator | None) -> Tensor:
        """Return a starting point (N, ...): in B(x), except for n_fgsm and Gaussian noise."""
        if self.config.start == "none":
            return x.detach()
        if self.config.start == "uniform":
            ball = threat if self.config.noise == 1 else threat.scaled(self.config.noise)
            return ball.random_start(x, generator)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if self.config.name == "vat":
            return threat.project(threat.step(x, noise, self.config.noise * threat.eps), x)
        if self.config.name == "noise":
            if threat.norm != "linf":
                raise UserError(f"noise with start gaussian has no ball, so it needs linf, not {threat.norm}")
            noisy = x + threat.per_sample(threat.eps, x) * noise
            return threat.where_free(noisy.clamp(threat.low, threat.high), x)
        return threat.project(x + 0.001 * noise, x)
