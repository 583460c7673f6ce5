"""Regularization terms on the input gradient, which need a second derivative.

l is the cross-entropy of a sample, and its gradients are with respect to the input. With batch norm in training mode
the loss and gradient of a sample depend on the other samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advtrain.attacks.losses import cross_entropy
from advtrain.objective.forward_cache import ForwardCache
from advtrain.threat import alongside

#: Below this largest entry a gradient has no direction that float32 can resolve.
VANISHED = 1e-30


def input_gradient(f: ForwardCache) -> Tensor:
    """Return ||grad l(x)||_2^2 per sample, (N,).

    Ross & Doshi-Velez 2018, arXiv 1711.09404; Drucker & LeCun 1992.
    """
    return f.clean_gradient.flatten(1).square().sum(1)


def cure(f: ForwardCache) -> Tensor:
    """Return the curvature ||grad l(x + h v) - grad l(x)||_2^2 along v, (N,).

    CURE (Moosavi-Dezfooli et al. 2019, arXiv 1811.09716). v = sign(grad l(x)) / ||sign(grad l(x))||_2 is taken as a
    constant, and h is `objective.cure_h`, l2 in input units. The norm is squared, as in the paper.
    """
    sign = f.clean_gradient.detach().sign()
    length = alongside(sign.flatten(1).norm(dim=1).clamp_min(1.0), sign)
    moved = f.gradient_at(f.z + f.options.cure_h * sign / length)
    return (moved - f.clean_gradient).flatten(1).square().sum(1)


def _slope(f: ForwardCache) -> Tensor:
    """Return (x_adv - x) . grad l(x), (N,)."""
    if f.z_adv is None:
        return 0 * f.clean_loss
    return ((f.z_adv - f.z.detach()) * f.clean_gradient).flatten(1).sum(1)


def llr_gap(f: ForwardCache) -> Tensor:
    """Return |l(x_adv) - l(x) - (x_adv - x) . grad l(x)|, the deviation from linearity, (N,).

    Local linearity regularization (Qin et al. 2019, arXiv 1907.02610); the weight is lambda in the paper. In the
    paper x_adv maximizes this deviation: `adversary.loss: linearity`.
    """
    return (cross_entropy(f.adv_logits, f.y) - f.clean_loss - _slope(f)).abs()


def llr_slope(f: ForwardCache) -> Tensor:
    """Return |(x_adv - x) . grad l(x)|, the linear change of l at x_adv, (N,).

    Qin et al. 2019; the weight is mu in the paper.
    """
    return _slope(f).abs()


def grad_align(f: ForwardCache) -> Tensor:
    """Return 1 - cos(grad l(x), grad l(x + d)) with d uniform in the ball (GradAlign), (N,).

    Andriushchenko & Flammarion 2020, arXiv 2007.02617. As in the authors' code, only the second gradient is
    differentiated. A sample whose gradient has vanished counts as aligned.
    """
    assert f.threat is not None
    first = f.clean_gradient.detach().flatten(1)
    second = f.gradient_at(f.threat.random_start(f.z.detach(), f.generator)).flatten(1)
    sizes = [g.detach().abs().amax(1, keepdim=True) for g in (first, second)]
    vanished = (sizes[0] < VANISHED) | (sizes[1] < VANISHED)
    # Scaled to a largest entry of 1, or replaced if vanished, because squares of tiny entries underflow.
    one, other = (
        torch.where(vanished, 1, g / s.clamp_min(VANISHED))
        for g, s in zip((first, second), sizes, strict=True)
    )
    return torch.where(vanished.squeeze(1), 0, 1 - F.cosine_similarity(one, other, dim=1))
