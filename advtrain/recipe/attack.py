"""Gradient attacks of a recipe: published attacks are presets of one loop.

The loop is `attacks/pgd.py`.

- `fgsm`    one step of length eps from the clean input (Goodfellow et al. 2015, arXiv 1412.6572)
- `fgsm_rs` one step of 1.25 eps from a uniform start, projected (Wong et al. 2020, arXiv 2001.03994)
- `n_fgsm`  one step of eps from noise of 2 eps, not projected onto the ball; for training only, because it
            leaves the threat model by design (de Jorge et al. 2022, arXiv 2202.01181)
- `mi_fgsm` k steps of eps / k along the decaying sum of gradients (Dong et al. 2018, arXiv 1710.06081, alg. 1)
- `pgd`     k projected steps from a uniform start (Madry et al. 2018, arXiv 1706.06083)
- `vat`     a step of eps from the clean input, along the gradient of kl at a short Gaussian direction; each
            further step is a power iteration more (Miyato et al. 2017, arXiv 1605.07725, and 2018, arXiv 1704.03976)
- `noise`   no attack: random noise without a gradient (R3F, Aghajanyan et al. 2021, arXiv 2008.03156); for training
            only
- `free`    num_steps replays of a batch, with one backward pass each for both weights and input; for training
            only, implemented in `training/free.py` (Shafahi et al. 2019, arXiv 1904.12843)
- `edits`   no gradient but a search over edits of words or characters of texts; for training only (`edit_attack.py`)
- `freelb`  num_steps points of ascent, whose gradients of the weights are averaged; for training only, in the same
            module (Zhu et al. 2020, arXiv 1909.11764, alg. 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from advtrain.errors import nearest
from advtrain.schema import Config, Number

BatchNormMode = Literal["eval", "train"]

#: Losses of regression outputs (N, 1) and targets; the other losses take logits and labels.
REGRESSION_LOSSES = frozenset({"mse", "mae", "over", "under"})


@dataclass(frozen=True)
class Preset:
    """Published attack, as settings of the loop in `attacks/pgd.py`."""

    settings: dict[str, Any]
    one_step: bool = False  # takes exactly one step
    training_only: bool = False  # leaves the threat model, or needs the training step
    climbs_objective: bool = False  # ascends in the passes that train the weights


ATTACKS: dict[str, Preset] = {
    "fgsm": Preset({"num_steps": 1, "start": "none"}, one_step=True),
    "fgsm_rs": Preset({"num_steps": 1, "start": "uniform"}, one_step=True),
    "n_fgsm": Preset({"num_steps": 1, "start": "uniform", "noise": 2.0}, one_step=True, training_only=True),
    "mi_fgsm": Preset({"num_steps": 10, "start": "none", "momentum": 1.0}),
    "pgd": Preset({"num_steps": 10, "start": "uniform"}),
    "vat": Preset({"num_steps": 1, "start": "gaussian", "noise": 0.02, "loss": "kl"}),
    "noise": Preset({"num_steps": 0, "start": "uniform"}, training_only=True),
    "free": Preset({"num_steps": 4, "start": "none"}, training_only=True, climbs_objective=True),
    "edits": Preset({"num_steps": 0, "start": "none"}, training_only=True),
    "freelb": Preset({"num_steps": 3, "start": "uniform"}, training_only=True, climbs_objective=True),
}


class AttackConfig(Config):
    """Gradient attack; its radius comes from the threat model."""

    name: str = "pgd"
    """attack: fgsm, fgsm_rs, n_fgsm, mi_fgsm, pgd, vat, noise, free, freelb, edits, or module:factory for a custom
    attack (free, freelb, edits, noise, n_fgsm and custom attacks: training only)"""
    args: dict[str, Any] = Field(default_factory=dict)
    """custom: keyword arguments of the factory"""
    num_steps: int = Field(ge=0)
    """number of gradient steps (fgsm, fgsm_rs, n_fgsm: 1; noise: 0; vat: power iterations; free: replays of a batch;
    freelb: points, one more than the ascents)"""
    step_size: Number | None = Field(default=None, gt=0)
    """step length in input units; null: eps (fgsm, n_fgsm, vat, free), 1.25 eps (fgsm_rs), eps / num_steps (mi_fgsm,
    freelb), 2.5 eps / num_steps (pgd)"""
    start: Literal["uniform", "gaussian", "none"]
    """starting point: uniform in the ball (freelb: see init_mag); gaussian: 0.001 N(0, 1) added, as in TRADES (vat: a
    Gaussian direction; noise: N(0, eps^2) added, which leaves the ball); none: the clean input"""
    noise: Number = Field(default=1.0, gt=0)
    """n_fgsm, vat: radius of the start in multiples of eps"""
    momentum: Number = Field(default=0.0, ge=0)
    """decay of the sum of past gradients, each divided by its l1 norm (mi_fgsm: 1); 0: none"""
    num_restarts: int = Field(default=1, ge=1)
    """number of independent starts; each sample keeps the one with the highest loss"""
    loss: Literal[
        "ce", "kl", "kl_sym", "kl_teacher", "margin", "dlr", "linearity", "mse", "mae", "over", "under"
    ] = "ce"
    """loss to maximize: ce of the label, kl from the clean prediction (TRADES), kl_sym: the sum of kl both ways
    (SMART), kl_teacher from the teacher's clean prediction (RSLAD; training only), margin of the top wrong class, dlr
    (margin divided by the spread of the logits), linearity (LLR); for a regression mse, mae (also maximizes huber),
    over or under"""
    target: Literal["none", "random", "least_likely"] = "none"
    """wrong class to move towards, instead of away from the label (Kurakin et al. 2017)"""
    friendly: int | None = Field(default=None, ge=0)
    """steps that a sample takes after it is misclassified (Zhang et al. 2020, tau); null: all steps"""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return ATTACKS.get(str(given.get("name", "pgd")), ATTACKS["pgd"]).settings | given
        return given

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if ":" not in name and name not in ATTACKS:
            raise ValueError(f"'{name}' is neither an attack nor module:factory{nearest(name, ATTACKS)}")
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.args and not self.custom:
            raise ValueError(f"args belongs to a custom attack (module:factory), not to {self.name}")
        if self.custom or self.name == "edits":
            return self._check_without_gradient()
        one_step = ATTACKS[self.name].one_step
        if one_step and self.num_steps != 1:
            raise ValueError(f"{self.name} takes one step, not {self.num_steps}; use pgd for more")
        if self.name in ("fgsm", "free") and self.start != "none":
            raise ValueError(f"{self.name} starts at the clean input; use fgsm_rs for a random start")
        if self.name == "n_fgsm" and self.start != "uniform":
            raise ValueError(f"n_fgsm starts uniformly, not '{self.start}'")
        if self.noise != 1 and self.name not in ("n_fgsm", "vat"):
            raise ValueError(f"{self.name} has no noise; it belongs to n_fgsm and vat")
        if self.momentum and one_step:
            raise ValueError(f"momentum does nothing in the one step of {self.name}; use mi_fgsm or pgd")
        if self.num_restarts > 1 and self.start == "none":
            raise ValueError("restarts from the same point give the same result; set start: uniform")
        if self.loss in ("kl", "kl_sym", "linearity") and self.start == "none" and not self.climbs_objective:
            how = "use fgsm_rs" if self.name == "fgsm" else "set start: gaussian"
            raise ValueError(f"the gradient of {self.loss} is 0 at the clean input; {how}")
        if self.target != "none" and self.loss not in ("ce", "margin"):
            raise ValueError(f"a targeted attack needs loss ce or margin, not {self.loss}")
        if self.friendly is not None and self.loss in REGRESSION_LOSSES:
            raise ValueError("friendly stops at a wrong class, but a regression has no classes")
        self._check_vat()
        return self._check_without_attack()

    def _check_without_gradient(self) -> Self:
        return self._check_custom() if self.custom else self._check_edits()

    def _check_custom(self) -> Self:
        """Reject settings of gradient attacks: a custom attack takes only `name` and `args`."""
        for name, field in AttackConfig.model_fields.items():
            usual = ATTACKS["pgd"].settings.get(name, field.get_default(call_default_factory=True))
            if name not in ("name", "args") and getattr(self, name) != usual:
                raise ValueError(f"{name} does not apply to a custom attack; give it to the factory in args")
        return self

    def _check_edits(self) -> Self:
        """Raise, because edits of texts are no gradient attack; training has them (`EditAttackConfig`)."""
        raise ValueError(
            "edits is for training only; to evaluate under edits of texts, set evaluation.threat, or --threat words:2"
        )

    def _check_vat(self) -> None:
        """Raise if a setting does not suit vat, which moves by eps from the clean input."""
        if self.name != "vat":
            return
        if self.start != "gaussian":
            raise ValueError(f"vat starts along a Gaussian direction, not '{self.start}'")
        if self.loss not in ("kl", "kl_sym"):
            raise ValueError(
                f"vat maximizes a divergence from the clean prediction, kl or kl_sym, not {self.loss}"
            )
        self._refuse("vat moves by eps from the clean input", "step_size", "friendly", "momentum")

    def _check_without_attack(self) -> Self:
        """Reject settings of an attack for `free`, `freelb` and `noise`, which run none."""
        if self.num_steps == 0 and self.name != "noise":
            raise ValueError(f"{self.name} takes at least one step, not 0 (num_steps); noise takes none")
        others = ("num_restarts", "loss", "target", "friendly", "momentum")
        if self.climbs_objective:
            self._refuse(f"{self.name} maximizes the training objective itself", *others)
        if self.name == "freelb" and self.start == "gaussian":
            raise ValueError("freelb starts uniformly or at the clean input: set start to uniform or none")
        if self.name == "noise":
            if self.num_steps or self.start == "none":
                raise ValueError(
                    "noise takes no step from a random start: num_steps 0, start uniform or gaussian"
                )
            self._refuse("noise takes no step", *others, "step_size")
        return self

    def _refuse(self, why: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{why}; it has no {name}")

    @property
    def custom(self) -> bool:
        """True if the attack is a custom one, module:factory."""
        return ":" in self.name

    @property
    def climbs_objective(self) -> bool:
        """True if the attack ascends on the training objective, in the passes of the weights."""
        return not self.custom and ATTACKS[self.name].climbs_objective

    @property
    def training_only(self) -> bool:
        """True if the attack is for training and not for evaluation."""
        special = self.friendly is not None or self.loss == "kl_teacher"
        return self.custom or ATTACKS[self.name].training_only or special
