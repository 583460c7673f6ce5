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
        model: z (N, ...) -> outputs (N, K).
        z: (N, ...) float, what is perturbed: the inputs in [0, 1], or what the network embeds them to.
        z_adv: (N, ...), the same where not attacked; None: nothing was attacked.
        y: (N,) int64 labels, or float32 targets in their own units.
        options: the terms' settings.
        threat: the training threat model of this step, for terms that look around z.
        generator: on z's device; the only source of randomness.
        teacher: z -> logits of a standard model, for HAT.
        dropout_seed: if given, every pass draws the same dropout masks, so that outputs differ by their inputs alone.
        scale: unit in which regression terms measure errors: the training targets' standard deviation.
        gradient: whether some term needs the gradient at the clean input.
    """

    def __init__(
        self,
        model: nn.Module,
        z: Tensor,
        z_adv: Tensor | None,
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
        self.z = z if not gradient or z.requires_grad else z.detach().requires_grad_()
        self.model, self.z_adv, self.y, self.options = model, z_adv, y, options
        self.threat, self.generator, self.teacher, self.scale = threat, generator, teacher, scale
        self.dropout_seed, self.trains_embedding, self.needs_gradient = (
            dropout_seed,
            z.requires_grad,
            gradient,
        )

    def outputs(self, z: Tensor, *, second_derivative: bool = False) -> Tensor:
        """Run the model: (N, ...) -> (N, K) float32.

        Args:
            z: any point. Where the network embeds inputs by weights that are trained, its gradient reaches them.
            second_derivative: whether a gradient of this pass will be differentiated again. torch.compile cannot do
                that, so such a pass runs eagerly.
        """
        if self.dropout_seed is not None:
            seed_default_generator(z.device, self.dropout_seed)
        with torch.compiler.set_stance("force_eager") if second_derivative else nullcontext():
            outputs: Tensor = self.model(self._attached(z)).float()
        return outputs

    def _attached(self, z: Tensor) -> Tensor:
        """Return z, with the gradient of the clean point where an embedding is trained: z = embed(x) + a constant."""
        if not self.trains_embedding or z is self.z:
            return z
        return z + (self.z - self.z.detach())

    @cached_property
    def clean_logits(self) -> Tensor:
        """Outputs at the clean point, (N, K) float32."""
        return self.outputs(self.z, second_derivative=self.needs_gradient)

    @cached_property
    def adv_logits(self) -> Tensor:
        """Outputs at the adversarial point, (N, K) float32; the clean ones if nothing was attacked."""
        if self.z_adv is None:
            return self.clean_logits
        return self.outputs(self.z_adv)

    @cached_property
    def clean_loss(self) -> Tensor:
        """l(z): the cross-entropy at the clean point, (N,)."""
        return cross_entropy(self.clean_logits, self.y)

    @cached_property
    def clean_gradient(self) -> Tensor:
        """d l(z_i) / d z_i, (N, ...), differentiable again."""
        return differentiable_gradient(self.clean_loss, self.z)

    def gradient_at(self, z: Tensor) -> Tensor:
        """Return d l(z_i) / d z_i at other points (N, ...), by a pass of its own; differentiable again."""
        z = z.detach().requires_grad_()
        return differentiable_gradient(cross_entropy(self.outputs(z, second_derivative=True), self.y), z)


def differentiable_gradient(loss: Tensor, z: Tensor) -> Tensor:
    """Return d sum(loss) / d z with its own graph, for one more backward pass through it.

    `torch.autograd.grad` fills no `.grad` and fires no hook of a distributed wrapper.
    """
    (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    return gradient
