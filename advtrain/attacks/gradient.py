"""Gradient ascent on the input: one loop, and the published attacks as presets of it.

- `fgsm`    one step of length eps from the clean input (Goodfellow et al. 2015, arXiv 1412.6572)
- `fgsm_rs` one step of 1.25 eps from a uniform start, projected (Wong et al. 2020, arXiv 2001.03994)
- `n_fgsm`  one step of eps from noise of 2 eps, not projected onto the ball: for training only, since it
            leaves the threat model by design (de Jorge et al. 2022, arXiv 2202.01181)
- `mi_fgsm` k steps of eps / k along the decaying sum of gradients (Dong et al. 2018, arXiv 1710.06081, alg. 1)
- `pgd`     k projected steps from a uniform start (Madry et al. 2018, arXiv 1706.06083)
- `free`    num_steps replays of a batch, each one backward pass for weights and input alike: for training
            only, where the step does it (Shafahi et al. 2019, arXiv 1904.12843; `training/step.py`)

Deviation: the projection is onto ball and box together (the nearest point of B(x)); published l2 and l1 code
projects onto the ball and then clips, which is another point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from advtrain.attacks.base import BatchNormMode, InputGradients, attacked, predictions
from advtrain.attacks.losses import ATTACK_LOSSES, REGRESSION_LOSSES, AttackLoss, residual
from advtrain.attacks.together import in_parts
from advtrain.cores import cut, side_by_side
from advtrain.lookup import Config, Number
from advtrain.models.recorded import OFTEN
from advtrain.threat import ThreatModel, alongside

AttackName = Literal["fgsm", "fgsm_rs", "n_fgsm", "mi_fgsm", "pgd", "free"]

PRESETS: dict[str, dict[str, Any]] = {
    "fgsm": {"num_steps": 1, "start": "none"},
    "fgsm_rs": {"num_steps": 1, "start": "uniform"},
    "n_fgsm": {"num_steps": 1, "start": "uniform", "noise": 2.0},
    "mi_fgsm": {"num_steps": 10, "start": "none", "momentum": 1.0},
    "pgd": {"num_steps": 10, "start": "uniform"},
    "free": {"num_steps": 4, "start": "none"},
}

#: Called with an iterate z (N, ...) and the model's outputs there.
Keep = Callable[[Tensor, Tensor], None]


class AttackConfig(Config):
    """A gradient attack. The radius is not part of it: it comes with the threat model."""

    name: AttackName = "pgd"
    """fgsm, fgsm_rs, n_fgsm, mi_fgsm, pgd or free (the last and n_fgsm: to train against only)"""
    num_steps: int = Field(ge=1)
    """gradient steps (fgsm, fgsm_rs, n_fgsm: 1; free: replays of a batch)"""
    step_size: Number | None = Field(default=None, gt=0)
    """step length in input units; null: eps (fgsm, n_fgsm, free), 1.25 eps (fgsm_rs), eps / num_steps (mi_fgsm),
    2.5 eps / num_steps (pgd)"""
    start: Literal["uniform", "gaussian", "none"]
    """uniform in the ball; gaussian: 0.001 N(0, 1), as TRADES starts; none: the clean input"""
    noise: Number = Field(default=1.0, gt=0)
    """n_fgsm: radius of its uniform start in multiples of eps"""
    momentum: Number = Field(default=0.0, ge=0)
    """decay of the sum of past gradients, each divided by its l1 norm (mi_fgsm: 1); 0: none"""
    num_restarts: int = Field(default=1, ge=1)
    """independent starts; per sample the one with the highest loss counts"""
    loss: Literal["ce", "kl", "margin", "dlr", "linearity", "mse", "mae", "over", "under"] = "ce"
    """what the attack climbs: ce of the label, kl from the clean prediction (TRADES), margin of the best wrong
    class, dlr (that over the spread of logits), linearity (LLR); of a regression mse or mae (huber is highest where
    mae is), over or under"""
    target: Literal["none", "random", "least_likely"] = "none"
    """climb towards this wrong class instead of away from the label (Kurakin et al. 2017)"""
    friendly: int | None = Field(default=None, ge=0)
    """steps that a sample still takes once it is misclassified (Zhang et al. 2020, tau); null: all of them"""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return PRESETS.get(str(given.get("name", "pgd")), PRESETS["pgd"]) | given
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        one_step = self.name in ("fgsm", "fgsm_rs", "n_fgsm")
        if one_step and self.num_steps != 1:
            raise ValueError(f"{self.name} takes one step, not {self.num_steps}; use pgd for more")
        if self.name in ("fgsm", "free") and self.start != "none":
            raise ValueError(f"{self.name} starts at the clean input; use fgsm_rs for a random start")
        if self.name == "n_fgsm" and self.start != "uniform":
            raise ValueError(f"n_fgsm starts uniformly, not '{self.start}'")
        if self.noise != 1 and self.name != "n_fgsm":
            raise ValueError(f"{self.name} has no noise; it belongs to n_fgsm")
        if self.momentum and one_step:
            raise ValueError(f"momentum does nothing in the one step of {self.name}; use mi_fgsm or pgd")
        if self.num_restarts > 1 and self.start == "none":
            raise ValueError("restarts from the same point give the same result; set start: uniform")
        if self.loss in ("kl", "linearity") and self.start == "none" and self.name != "free":
            how = "use fgsm_rs" if self.name == "fgsm" else "set start: gaussian"
            raise ValueError(f"the gradient of {self.loss} is 0 at the clean input; {how}")
        if self.target != "none" and self.loss not in ("ce", "margin"):
            raise ValueError(f"a targeted attack climbs ce or margin, not {self.loss}")
        if self.friendly is not None and self.loss in REGRESSION_LOSSES:
            raise ValueError("friendly stops at a wrong class, which a regression has not")
        return self._check_free()

    def _check_free(self) -> Self:
        if self.name == "free":
            for name in ("num_restarts", "loss", "target", "friendly", "momentum"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"free climbs the objective itself; it has no {name}")
        return self


class GradientAttack:
    """The attack that an AttackConfig describes."""

    def __init__(self, config: AttackConfig, batch_norm: BatchNormMode = "eval", cores: int = 1) -> None:
        self.config, self.cores = config, cores
        self.batch_norm: BatchNormMode = batch_norm

    @property
    def name(self) -> str:
        """As reports show it: pgd-50x5 is PGD with 50 steps and 5 restarts."""
        config = self.config
        steps = f"-{config.num_steps}" if config.name in ("pgd", "mi_fgsm") else ""
        restarts = f"x{config.num_restarts}" if config.num_restarts > 1 else ""
        loss = "" if config.loss == "ce" else f"-{config.loss}"
        target = "" if config.target == "none" else f"-{config.target}"
        return f"{config.name}{loss}{target}{steps}{restarts}"

    @property
    def num_rounds(self) -> int:
        """Starts, each over the samples that still stand."""
        return self.config.num_restarts

    def scaled(self, factor: float) -> GradientAttack:
        """Return the attack with `factor` times the step size, for a scaled threat model."""
        size = self.config.step_size
        if size is None:  # relative to eps already
            return self
        return self.changed(step_size=size * factor)

    def changed(self, **values: Any) -> GradientAttack:
        """Return the attack with other values of its configuration."""
        return GradientAttack(self.config.model_copy(update=values), self.batch_norm, self.cores)

    def step_size(self, threat: ThreatModel) -> float:
        """Return the step length in input units, for samples at the full radius."""
        config = self.config
        if config.step_size is not None:
            return config.step_size
        factor = {"fgsm_rs": 1.25, "mi_fgsm": 1 / config.num_steps, "pgd": 2.5 / config.num_steps}
        return factor.get(config.name, 1.0) * threat.eps

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return adversarial inputs (N, ...): per sample the restart with the highest final loss."""
        with attacked(model, self.batch_norm):
            loss = self._loss(model, x, y, generator)
            climb = self._climb if self.config.friendly is None else self._climb_friendly
            x_adv = climb(model, x, y, threat, loss, generator)
            if self.config.num_restarts == 1:
                return x_adv
            with torch.no_grad():
                best = loss(model(x_adv).float(), x_adv)
                for _ in range(self.config.num_restarts - 1):
                    again = climb(model, x, y, threat, loss, generator)
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
        """One start, for evaluation: return (x_adv (N, ...), fooled (N,) bool). All rounds are alike.

        Every iterate counts: a sample misclassified on the way keeps the iterate that did it.
        """
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
        """One start, for evaluation of a regression: return (x_adv (N, ...), |f(x_adv) - y| (N,)).

        Every iterate counts; an output that is not finite is an infinite error.
        """
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
        with attacked(model, self.batch_norm):
            loss = self._loss(model, x, y, generator)
            x_adv = self._climb(model, x, y, threat, loss, generator, keep)
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
        generator: torch.Generator | None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Climb from one start, z_{t+1} = Proj_B(x)(z_t + alpha steepest(gradient)); return the last iterate."""
        start = self._start(x, threat, generator)
        gradients = InputGradients(model, 1 if self.cores > 1 else OFTEN)

        def climb(rows: slice) -> Tensor:
            z, ball, here = start[rows], threat.rows(rows), loss.take(rows)
            project, velocity = self._projection(ball, x[rows]), None
            for _ in range(self.config.num_steps):
                gradient, outputs = gradients(z, here)
                if keep is not None:
                    keep(z, outputs)
                if self.config.momentum:
                    velocity = gradient = self._accumulate(velocity, gradient)
                z = project(ball.step(z, gradient, alpha))
            return z

        alpha = self.step_size(threat)
        apart = keep is None and gradients.recordable
        ends = side_by_side(climb, cut(x, self.cores if apart else 1))
        return torch.cat(ends) if len(ends) > 1 else ends[0]

    def _climb_friendly(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        loss: AttackLoss,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Climb as `_climb`, but a sample ends its climb after `friendly` more steps from misclassified points.

        The batch shrinks as samples end: the passes are made on those that still climb.
        """
        z = self._start(x, threat, generator).clone()
        active = torch.arange(len(x), device=x.device)
        left = torch.full_like(active, self.config.friendly or 0)
        velocity: Tensor | None = None
        gradients = InputGradients(model)
        for _ in range(self.config.num_steps):
            gradient, outputs = gradients(z[active], loss)
            left = left - (predictions(outputs) != y[active]).long()
            if self.config.momentum:
                velocity = gradient = self._accumulate(velocity, gradient)
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

    def _accumulate(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        """Return momentum * velocity + gradient / ||gradient||_1 (Dong et al. 2018)."""
        size = gradient.flatten(1).abs().sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient / alongside(size, gradient)
        return gradient if velocity is None else self.config.momentum * velocity + gradient

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> AttackLoss:
        """Return what is climbed; for a targeted attack, down the loss of another class than the label."""
        build = ATTACK_LOSSES[self.config.loss]
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
        if self.config.start == "none":
            return x.detach()
        if self.config.start == "uniform":
            ball = threat if self.config.noise == 1 else threat.scaled(self.config.noise)
            return ball.random_start(x, generator)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return threat.project(x + 0.001 * noise, x)
