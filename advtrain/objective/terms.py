"""Terms of the training objective: functions of a ForwardCache to (N,), without reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advtrain.attacks.losses import cross_entropy, kl_divergence, margin, residual, symmetric_kl
from advtrain.objective.forward_cache import ForwardCache
from advtrain.objective.references import require_same_width


def clean_ce(f: ForwardCache) -> Tensor:
    """Return -log p_y(x), the loss of standard training."""
    return f.clean_loss


def adv_ce(f: ForwardCache) -> Tensor:
    """Return -log p_y(x_adv), the loss of PGD training (Madry et al. 2018, arXiv 1706.06083)."""
    return cross_entropy(f.adv_logits, f.y)


def trades_kl(f: ForwardCache) -> Tensor:
    """Return KL(p(x) || p(x_adv)), the boundary term of TRADES.

    Zhang et al. 2019, arXiv 1901.08573. The gradient flows through both distributions, as in the authors' code. The
    weight is their beta (1/lambda); the sum over classes is averaged over the batch.
    """
    return kl_divergence(F.log_softmax(f.clean_logits, dim=1), f.adv_logits)


def kl_sym(f: ForwardCache) -> Tensor:
    """Return KL(p(x) || p(x_adv)) + KL(p(x_adv) || p(x)), the term of SMART, ALUM and R3F.

    SMART: Jiang et al. 2020, arXiv 1911.03437. ALUM: Liu et al. 2020, arXiv 2004.08994. R3F: Aghajanyan et al. 2021,
    arXiv 2008.03156. The gradient flows through both distributions. Deviation from R3F's code: if the embeddings are
    trained, the gradient of both branches reaches them. There the branch with noise starts at a detached copy.
    """
    return symmetric_kl(f.clean_logits, f.adv_logits)


def mart_bce(f: ForwardCache) -> Tensor:
    """Return -log p_y(x_adv) - log(1 - max_{k != y} p_k(x_adv)), MART's boosted cross-entropy.

    Wang et al. 2020 (ICLR, "Improving adversarial robustness requires revisiting misclassified examples").
    The second logarithm is computed from the logits of the other classes, so it needs no small constant.
    """
    logits = f.adv_logits
    rival = logits.scatter(1, f.y.unsqueeze(1), float("-inf")).argmax(1, keepdim=True)
    rest = logits.scatter(1, rival, float("-inf"))
    return cross_entropy(logits, f.y) - (rest.logsumexp(1) - logits.logsumexp(1))


def mart_kl(f: ForwardCache) -> Tensor:
    """Return KL(p(x) || p(x_adv)) (1 - p_y(x)), MART's misclassification-weighted KL.

    Wang et al. 2020; the weight is lambda in the paper. The gradient flows through all three probabilities, as in the
    authors' code.
    """
    log_p = F.log_softmax(f.clean_logits, dim=1)
    wrong = 1 - log_p.gather(1, f.y.unsqueeze(1)).squeeze(1).exp()
    return kl_divergence(log_p, f.adv_logits) * wrong


def alp(f: ForwardCache) -> Tensor:
    """Return ||z(x) - z(x_adv)||^2, adversarial logit pairing.

    Kannan et al. 2018, arXiv 1803.06373. It is broken as a defense on its own (Engstrom et al. 2018, arXiv 1807.10272)
    and serves as a baseline.
    """
    return (f.clean_logits - f.adv_logits).square().sum(1)


def adv_cw(f: ForwardCache) -> Tensor:
    """Return max(0, max_{k != y} z_k(x_adv) - z_y(x_adv) + m), a hinge loss on the margin.

    Carlini & Wagner (2017, arXiv 1608.04644, f6) attack this margin; m is `objective.cw_margin`, in logits.
    """
    return (margin(f.adv_logits, f.y) + f.options.cw_margin).clamp_min(0)


def label_noise_ce(f: ForwardCache) -> Tensor:
    """Return the cross-entropy -sum_k q_k log p_k(x_adv) against a perturbed label q.

    q = (1 - e) e_y + e r with e = `objective.label_noise_eps` stays on the simplex for e in [0, 1]. Values of
    `objective.label_noise`:
    - uniform: r_k = 1/K, which is label smoothing (Szegedy et al. 2016, arXiv 1512.00567);
    - random:  r ~ Dirichlet(1, ..., 1), drawn for each sample and step; on average label smoothing;
    - worst:   the distribution within total variation e of e_y with the highest cross-entropy. It moves the
      mass e to the least likely class k*, so the term is -log p_y + e (z_y - z_{k*}), at least -log p_y.
    """
    eps, logits = f.options.label_noise_eps, f.adv_logits
    log_p = F.log_softmax(logits, dim=1)
    of_label = log_p.gather(1, f.y.unsqueeze(1)).squeeze(1)
    if f.options.label_noise == "worst":
        return -of_label + eps * (of_label - log_p.amin(1))
    if f.options.label_noise == "uniform":
        noise = torch.full_like(log_p, 1 / log_p.shape[1])
    else:
        noise = torch.empty_like(log_p).exponential_(generator=f.generator)
        noise = noise / noise.sum(1, keepdim=True)
    return -(1 - eps) * of_label - eps * (noise * log_p).sum(1)


def hat(f: ForwardCache) -> Tensor:
    """Return -log p_t(x + 2 (x_adv - x)), HAT's loss on helper samples.

    t is the class that a standard model, `objective.teacher`, predicts for x_adv. Rade & Moosavi-Dezfooli 2022
    (ICLR, "Reducing excessive margin to achieve a better accuracy vs. robustness trade-off"). The weight is gamma in
    the paper, next to clean_ce 1 and trades_kl beta. The factor 2 is `objective.hat_factor`. The helper is not clipped
    to the box, as in the authors' code.
    """
    assert f.teacher is not None
    x = f.z.detach()
    x_adv = x if f.z_adv is None else f.z_adv
    label = f.teacher.logits_at(x_adv).argmax(1)
    return cross_entropy(f.outputs(x + f.options.hat_factor * (x_adv - x)), label)


def distill_adv(f: ForwardCache) -> Tensor:
    """Return T^2 KL(p_t(x; T) || p(x_adv; T)), the loss of ARD and RSLAD.

    p(x; T) = softmax(z(x) / T) with T = `objective.distill_temperature`, and p_t is that of `objective.teacher`. ARD
    (Goldblum et al. 2020, arXiv 1905.09747) has T = 30; RSLAD (Zi et al. 2021, arXiv 2108.07969) has T = 1. Deviation:
    the sum over classes; both authors' codes take the mean, which is K times smaller.
    """
    return _distill(f, f.adv_logits)


def distill_clean(f: ForwardCache) -> Tensor:
    """Return T^2 KL(p_t(x; T) || p(x; T)), distillation on clean inputs (see `distill_adv`).

    Hinton et al. 2015, arXiv 1503.02531. With the start model as the teacher it is the term of LwF (Li & Hoiem 2016,
    arXiv 1606.09282), whose temperature is 2.
    """
    return _distill(f, f.clean_logits)


def _distill(f: ForwardCache, logits: Tensor) -> Tensor:
    assert f.teacher is not None
    temperature = f.options.distill_temperature
    target = F.log_softmax(f.teacher(f.x) / temperature, dim=1)
    return temperature**2 * kl_divergence(target, logits / temperature)


def feature_match(f: ForwardCache) -> Tensor:
    """Return ||h(x_adv) - h_t(x)||_2^2, with h and h_t features of model and teacher.

    Features are the input of the last linear layer. FARE (Schlarmann et al. 2024, arXiv 2402.12336), with the model
    that training starts from as the teacher. There h is the embedding of CLIP's image encoder.
    """
    assert f.teacher is not None
    found, target = f.adv_features, f.teacher.features(f.x)
    require_same_width(found, target)
    return (found - target).square().sum(1)


def l2_sp(f: ForwardCache) -> Tensor:
    """Return ||w - w_0||_2^2 / 2 for every sample, with w_0 the start weights.

    L2-SP (Li et al. 2018, arXiv 1802.01483), whose alpha is the weight here. The last layer is left out. Every sample
    has the same value, so the mean over a batch is the paper's term, on any number of workers.
    """
    assert f.anchor is not None
    return f.anchor.half_squared_distance().expand(len(f.y))


def clean_mse(f: ForwardCache) -> Tensor:
    """Return ((f(x) - y) / s)^2, with s the standard deviation of the training targets."""
    return (residual(f.clean_logits, f.y) / f.scale).square()


def clean_mae(f: ForwardCache) -> Tensor:
    """Return |f(x) - y| / s, with s the standard deviation of the training targets."""
    return (residual(f.clean_logits, f.y) / f.scale).abs()


def adv_mse(f: ForwardCache) -> Tensor:
    """Return ((f(x_adv) - y) / s)^2.

    For linear f without a box the worst case is (|f(x) - y| + eps ||w||_q)^2 / s^2, with q the exponent of the dual
    norm (Xu, Caramanis & Mannor 2010, arXiv 0811.1790).
    """
    return (residual(f.adv_logits, f.y) / f.scale).square()


def adv_mae(f: ForwardCache) -> Tensor:
    """Return |f(x_adv) - y| / s.

    For linear f without a box the worst case is (|f(x) - y| + eps ||w||_q) / s.
    """
    return (residual(f.adv_logits, f.y) / f.scale).abs()


def adv_huber(f: ForwardCache) -> Tensor:
    """Return Huber's loss (1964) of (f(x_adv) - y) / s.

    It is half the square up to `objective.huber_delta`, and linear beyond.
    """
    error = residual(f.adv_logits, f.y) / f.scale
    return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=f.options.huber_delta)
