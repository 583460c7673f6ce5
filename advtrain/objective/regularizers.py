"""Terms that hold the gradient of the input: they need a second derivative, and no attack.

l is the cross-entropy of a sample; gradients of l are with respect to the input. With a norm over the batch
(batch norm in training mode) a sample's loss depends on the others, and so does its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advtrain.attacks.losses import cross_entropy
from advtrain.objective.forward_cache import ForwardCache
from advtrain.threat import alongside

#: A gradient whose largest entry is below this has no direction that float32 could tell.
VANISHED = 1e-30


def input_gradient(f: ForwardCache) -> Tensor:
    """||grad l(x)||_2^2 (Ross & Doshi-Velez 2018, arXiv 1711.09404; Drucker & LeCun 1992)."""
    return f.clean_gradient.flatten(1).square().sum(1)


def cure(f: ForwardCache) -> Tensor:
    """||grad l(x + h v) - grad l(x)||_2^2, v = sign(grad l(x)) / ||sign(grad l(x))||_2: the curvature along v.

    CURE (Moosavi-Dezfooli et al. 2019, arXiv 1811.09716); h is `objective.cure_h`, in input units of l2.
    v is taken as a constant. The norm is squared, as in the paper.
    """
    sign = f.clean_gradient.detach().sign()
    length = alongside(sign.flatten(1).norm(dim=1).clamp_min(1.0), sign)
    moved = f.gradient_at(f.z + f.options.cure_h * sign / length)
    return (moved - f.clean_gradient).flatten(1).square().sum(1)


def _slope(f: ForwardCache) -> Tensor:
    """(x_adv - x) . grad l(x), (N,)."""
    if f.z_adv is None:
        return 0 * f.clean_loss
    return ((f.z_adv - f.z.detach()) * f.clean_gradient).flatten(1).sum(1)


def llr_gap(f: ForwardCache) -> Tensor:
    """|l(x_adv) - l(x) - (x_adv - x) . grad l(x)|: how far l is from linear at x_adv.

    Local linearity regularisation (Qin et al. 2019, arXiv 1907.02610); the weight is their lambda. Their
    x_adv has the largest gap: `adversary.loss: linearity`.
    """
    return (cross_entropy(f.adv_logits, f.y) - f.clean_loss - _slope(f)).abs()


def llr_slope(f: ForwardCache) -> Tensor:
    """|(x_adv - x) . grad l(x)|: the linear change of l at x_adv (Qin et al. 2019); their weight mu."""
    return _slope(f).abs()


def grad_align(f: ForwardCache) -> Tensor:
    """1 - cos(grad l(x), grad l(x + d)), d uniform in the ball: GradAlign.

    Andriushchenko & Flammarion 2020, arXiv 2007.02617. As in the authors' code the gradient flows through
    the second one only. A sample whose gradient has vanished counts as aligned.
    """
    assert f.threat is not None
    first = f.clean_gradient.detach().flatten(1)
    second = f.gradient_at(f.threat.random_start(f.z.detach(), f.generator)).flatten(1)
    sizes = [g.detach().abs().amax(1, keepdim=True) for g in (first, second)]
    vanished = (sizes[0] < VANISHED) | (sizes[1] < VANISHED)
    # Scaled to a largest entry of 1, or replaced where there is none: squares of tiny entries would underflow.
    one, other = (
        torch.where(vanished, 1, g / s.clamp_min(VANISHED))
        for g, s in zip((first, second), sizes, strict=True)
    )
    return torch.where(vanished.squeeze(1), 0, 1 - F.cosine_similarity(one, other, dim=1))
