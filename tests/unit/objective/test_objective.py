"""Terms against their formulas, and the objective against what published methods reduce to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from advtrain.attacks.losses import kl_divergence
from advtrain.objective import Forwards, Objective, ObjectiveConfig
from advtrain.objective.terms import TERMS, adv_ce, clean_ce, trades_kl
from tests.kit import Busy


def forwards():
    model = nn.Linear(6, 4).double()
    x = torch.rand(5, 6, dtype=torch.float64)
    return Forwards(model, x, x + 0.1 * torch.rand_like(x), torch.tensor([0, 1, 2, 3, 0]))


def test_trades_kl_is_the_sum_over_classes_of_p_log_p_over_q():
    f = forwards()
    p, q = f.clean_logits.softmax(1), f.adv_logits.softmax(1)
    assert torch.allclose(trades_kl(f), (p * (p / q).log()).sum(1), atol=1e-6)


def test_cross_entropies_are_minus_log_of_the_labels_probability():
    f = forwards()
    for term, logits in ((clean_ce, f.clean_logits), (adv_ce, f.adv_logits)):
        assert torch.allclose(term(f), -logits.softmax(1)[torch.arange(5), f.y].log(), atol=1e-6)


def test_the_kl_has_finite_gradients_where_probabilities_underflow():
    """F.kl_div with a probability target gives NaN here."""
    clean = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    kl_divergence(clean.log_softmax(1), torch.tensor([[0.0, 1.0, 2.0]])).sum().backward()
    assert torch.isfinite(clean.grad).all()


def test_kl_gradients_match_finite_differences():
    p, q = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: kl_divergence(a.log_softmax(1), b), (p, q))


@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        ({"clean_ce": 1}, 1),
        ({"adv_ce": 1}, 1),
        ({"clean_ce": 0.5, "adv_ce": 0.5}, 2),
        ({"clean_ce": 1, "adv_ce": 1, "trades_kl": 6}, 2),
    ],
)
def test_each_forward_pass_runs_once_however_many_terms_need_it(weights, passes):
    model, calls = Busy(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    Objective(model, weights)(x, x.clone(), y)
    assert len(calls) == passes


def test_the_loss_is_the_weighted_sum_per_sample():
    model = Busy().eval()
    x, x_adv, y = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8), torch.arange(4)
    f = Forwards(model, x, x_adv, y)
    loss, sums = Objective(model, {"clean_ce": 0.3, "trades_kl": 6.0})(x, x_adv, y)
    assert torch.allclose(loss, 0.3 * clean_ce(f) + 6 * trades_kl(f), atol=1e-5)
    assert torch.allclose(sums["trades_kl"], trades_kl(f).sum(), atol=1e-5)
    assert sums["clean_correct"] == (f.clean_logits.argmax(1) == y).sum()


def test_without_an_attack_adversarial_terms_are_their_clean_ones():
    model = Busy().eval()
    f = Forwards(model, torch.rand(4, 1, 8, 8), None, torch.arange(4))
    assert torch.equal(adv_ce(f), clean_ce(f))
    assert trades_kl(f).abs().max() < 1e-6


def test_every_term_has_a_weight_and_every_weight_a_term():
    assert set(TERMS) == set(ObjectiveConfig.model_fields)


def test_an_objective_without_weight_is_refused():
    with pytest.raises(ValueError, match="every weight is 0"):
        ObjectiveConfig()
