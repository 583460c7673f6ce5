"""Cache of the forward passes of one batch: each runs once, when a term first needs it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from advtrain.attacks.losses import cross_entropy
from advtrain.objective.references import Anchor, Teacher, head_inputs, the_features
from advtrain.recipe.objective import TermSettings
from advtrain.seeding import seed_default_generator
from advtrain.threat import ThreatModel


class ForwardCache:
    """Input of the terms: one batch, with its forward passes and gradients.

    Args:
        model: z (N, ...) -> outputs (N, K).
        z: (N, ...) float, the perturbed tensor at the clean point: inputs in [0, 1], or their embedding.
        z_adv: (N, ...), adversarial z, equal to z for samples without attack; None: no attack.
        y: (N,) int64 labels, or float32 targets in their own units.
        options: settings of the terms.
        threat: training threat model of this step, for terms that use other points of the ball.
        generator: on z's device; the only source of randomness.
        teacher: model that teaches.
        anchor: start weights.
        x: (N, ...), inputs of which z is the embedding; None: z.
        dropout_seed: if given, every pass draws the same dropout masks, so outputs differ only by their inputs.
        scale: unit of errors in regression terms, the standard deviation of the training targets.
        edited: True if z_adv is the embedding of edited texts, with a gradient of its own; its length may differ.
        gradient: True if some term needs the gradient at the clean input.
        features: True if some term needs the inputs of the last layer.
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
        teacher: Teacher | None = None,
        anchor: Anchor | None = None,
        x: Tensor | None = None,
        dropout_seed: int | None = None,
        scale: float = 1.0,
        edited: bool = False,
        gradient: bool = False,
        features: bool = False,
    ) -> None:
        # One pass serves the clean outputs and their gradient.
        self.z = z if not gradient or z.requires_grad else z.detach().requires_grad_()
        self.model, self.z_adv, self.y, self.options = model, z_adv, y, options
        self.threat, self.generator, self.teacher, self.scale = threat, generator, teacher, scale
        self.anchor, self.x, self.needs_features = anchor, z.detach() if x is None else x, features
        self.edited = edited
        self.dropout_seed, self.trains_embedding, self.needs_gradient = (
            dropout_seed,
            z.requires_grad,
            gradient,
        )

    def outputs(self, z: Tensor, *, second_derivative: bool = False) -> Tensor:
        """Run the model on z (N, ...) and return its outputs (N, K) float32.

        Args:
            z: any points. If the embedding is trained, the gradient reaches its weights.
            second_derivative: True if a gradient of this pass is differentiated again. torch.compile does not
                support that, so such a pass runs eagerly.
        """
        if self.dropout_seed is not None:
            seed_default_generator(z.device, self.dropout_seed)
        with torch.compiler.set_stance("force_eager") if second_derivative else nullcontext():
            outputs: Tensor = self.model(self._attached(z)).float()
        return outputs

    def _attached(self, z: Tensor) -> Tensor:
        """Return z with the gradient of the clean point if an embedding is trained.

        Then z = embed(x) + a constant. The embedding of an edited text has its own gradient.
        """
        if not self.trains_embedding or z is self.z or (self.edited and z is self.z_adv):
            return z
        return z + (self.z - self.z.detach())

    @cached_property
    def _clean(self) -> tuple[Tensor, list[Tensor]]:
        """Outputs and inputs of the last layer at the clean point."""
        return self._pass(self.z, second_derivative=self.needs_gradient)

    @cached_property
    def _adv(self) -> tuple[Tensor, list[Tensor]]:
        """Outputs and inputs of the last layer at the adversarial point."""
        return self._clean if self.z_adv is None else self._pass(self.z_adv)

    def _pass(self, z: Tensor, *, second_derivative: bool = False) -> tuple[Tensor, list[Tensor]]:
        if not self.needs_features:
            return self.outputs(z, second_derivative=second_derivative), []
        with head_inputs(self.model) as features:
            return self.outputs(z, second_derivative=second_derivative), features

    @cached_property
    def clean_logits(self) -> Tensor:
        """Outputs at the clean point, (N, K) float32."""
        return self._clean[0]

    @cached_property
    def adv_logits(self) -> Tensor:
        """Outputs at the adversarial point, (N, K) float32; clean outputs without an attack."""
        return self._adv[0]

    @property
    def adv_features(self) -> Tensor:
        """Inputs of the last linear layer at the adversarial point, (N, D) float32."""
        return the_features(self._adv[1], "the model")

    @cached_property
    def clean_loss(self) -> Tensor:
        """Cross-entropy l(z) at the clean point, (N,)."""
        return cross_entropy(self.clean_logits, self.y)

    @cached_property
    def clean_gradient(self) -> Tensor:
        """Gradient d l(z_i) / d z_i, (N, ...), which can be differentiated again."""
        return differentiable_gradient(self.clean_loss, self.z)

    def gradient_at(self, z: Tensor) -> Tensor:
        """Return d l(z_i) / d z_i at other points (N, ...), by a separate pass.

        The gradient can be differentiated again.
        """
        z = z.detach().requires_grad_()
        return differentiable_gradient(cross_entropy(self.outputs(z, second_derivative=True), self.y), z)


def differentiable_gradient(loss: Tensor, z: Tensor) -> Tensor:
    """Return d sum(loss) / d z with its own graph, for another backward pass through it.

    `torch.autograd.grad` sets no `.grad` and runs no hook of a distributed wrapper.
    """
    (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    return gradient
