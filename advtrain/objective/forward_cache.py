"""One batch and the passes over it: each runs when a term first asks for it, and once."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from advtrain.attacks.losses import cross_entropy
from advtrain.schema import Config, Number
from advtrain.seeding import seed_default_generator
from advtrain.threat import ThreatModel


class TermSettings(Config):
    """The settings of single terms; one whose term has weight 0 must stay as it is."""

    cw_margin: Number = Field(default=1.0, ge=0)
    """adv_cw: margin that is asked for, in logits"""
    label_noise: Literal["uniform", "random", "worst"] = "uniform"
    """label_noise_ce: towards which distribution the label is moved"""
    label_noise_eps: Number = Field(default=0.1, ge=0, le=1)
    """label_noise_ce: by how much"""
    hat_teacher: str | None = None
    """hat: run folder of a standard model on the same data"""
    hat_factor: Number = Field(default=2.0, gt=0)
    """hat: how many times the adversarial perturbation a helper sample is moved"""
    cure_h: Number = Field(default=1.5, gt=0)
    """cure: length of the finite difference, l2 in input units"""
    huber_delta: Number = Field(default=1.0, gt=0)
    """adv_huber: where it turns linear, in standard deviations of the training targets"""


class ForwardCache:
    """What terms see of a batch.

    Args:
        model: (N, ...) -> outputs (N, K).
        x: (N, ...) float in [0, 1].
        x_adv: (N, ...), the same where not attacked; None: nothing was attacked.
        y: (N,) int64 labels, or float32 targets in their own units.
        options: the terms' settings.
        threat: the training threat model of this step, for terms that look around x.
        generator: on x's device; the only source of randomness.
        teacher: (N, ...) -> logits of a standard model, for HAT.
        dropout_seed: if given, every pass draws the same dropout masks, so that outputs differ by their inputs alone.
        scale: unit in which regression terms measure errors: the training targets' standard deviation.
        gradient: whether some term needs the gradient at the clean input.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        x_adv: Tensor | None,
        y: Tensor,
        *,
        options: TermSettings,
        threat: ThreatModel | None = None,
        generator: torch.Generator | None = None,
        teacher: nn.Module | None = None,
        dropout_seed: int | None = None,
        scale: float = 1.0,
        gradient: bool = False,
    ) -> None:
        # One pass serves the clean outputs and their gradient.
        self.x = x.detach().requires_grad_() if gradient else x
        self.model, self.x_adv, self.y, self.options = model, x_adv, y, options
        self.threat, self.generator, self.teacher, self.scale = threat, generator, teacher, scale
        self.dropout_seed = dropout_seed

    def outputs(self, x: Tensor, *, second_derivative: bool = False) -> Tensor:
        """Run the model: (N, ...) -> (N, K) float32.

        Args:
            second_derivative: whether a gradient of this pass will be differentiated again. torch.compile cannot do
                that, so such a pass runs eagerly.
        """
        if self.dropout_seed is not None:
            seed_default_generator(x.device, self.dropout_seed)
        with torch.compiler.set_stance("force_eager") if second_derivative else nullcontext():
            outputs: Tensor = self.model(x).float()
        return outputs

    @cached_property
    def clean_logits(self) -> Tensor:
        """Outputs at the clean inputs, (N, K) float32."""
        return self.outputs(self.x, second_derivative=self.x.requires_grad)

    @cached_property
    def adv_logits(self) -> Tensor:
        """Outputs at the adversarial inputs, (N, K) float32; the clean ones if nothing was attacked."""
        if self.x_adv is None:
            return self.clean_logits
        return self.outputs(self.x_adv)

    @cached_property
    def clean_loss(self) -> Tensor:
        """l(x): the cross-entropy at the clean inputs, (N,)."""
        return cross_entropy(self.clean_logits, self.y)

    @cached_property
    def clean_gradient(self) -> Tensor:
        """d l(x_i) / d x_i, (N, ...), differentiable again."""
        return differentiable_gradient(self.clean_loss, self.x)

    def gradient_at(self, z: Tensor) -> Tensor:
        """Return d l(z_i) / d z_i at other points (N, ...), by a pass of its own; differentiable again."""
        z = z.detach().requires_grad_()
        return differentiable_gradient(cross_entropy(self.outputs(z, second_derivative=True), self.y), z)


def differentiable_gradient(loss: Tensor, x: Tensor) -> Tensor:
    """Return d sum(loss) / d x with its own graph, for one more backward pass through it.

    `torch.autograd.grad` fills no `.grad` and fires no hook of a distributed wrapper.
    """
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    return gradient
