"""The objective: shared passes, weights, published methods at their limits, validation of settings."""

from __future__ import annotations

import pytest
import torch

from advtrain.objective import (
    FUNCTIONS,
    TERMS,
    ForwardCache,
    ObjectiveConfig,
    ObjectiveModule,
    Teacher,
    TermSettings,
)
from advtrain.objective.terms import adv_ce, clean_ce, trades_kl
from tests.kit import Busy


def config(**values):
    return ObjectiveConfig.model_validate(values)


def batch(n=4):
    return torch.rand(n, 1, 8, 8), torch.rand(n, 1, 8, 8), torch.arange(n)


@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        ({"clean_ce": 1}, 1),
        ({"adv_ce": 1}, 1),
        ({"clean_ce": 0.5, "adv_ce": 0.5}, 2),
        ({"clean_ce": 1, "adv_ce": 1, "trades_kl": 6, "alp": 1, "mart_kl": 1, "adv_cw": 1}, 2),
        ({"clean_ce": 1, "input_gradient": 1}, 1),
        ({"clean_ce": 1, "llr_gap": 4, "llr_slope": 3, "adv_ce": 1}, 2),
        ({"clean_ce": 1, "input_gradient": 1, "cure": 1}, 2),
    ],
)
def test_forward_passes_are_shared_between_terms(weights, passes):
    model, calls = Busy(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    x, x_adv, y = batch()
    ObjectiveModule(config(**weights), model)(x, x_adv, y)
    assert len(calls) == passes


def test_loss_is_weighted_sum_per_sample():
    model = Busy().eval()
    x, x_adv, y = batch()
    f = ForwardCache(model, x, x_adv, y, options=TermSettings())
    loss, sums = ObjectiveModule(config(clean_ce=0.3, trades_kl=6), model)(x, x_adv, y)
    assert torch.allclose(loss, 0.3 * clean_ce(f) + 6 * trades_kl(f), atol=1e-5)
    assert torch.allclose(sums["trades_kl"], trades_kl(f).sum(), atol=1e-5)
    assert sums["clean_correct"] == (f.clean_logits.argmax(1) == y).sum()


def test_adversarial_terms_equal_clean_terms_without_attack():
    """With eps 0 or no attack, each adversarial term equals its clean term and each distance is 0."""
    model = Busy().eval()
    x, _, y = batch()
    for x_adv in (None, x):
        f = ForwardCache(model, x, x_adv, y, options=TermSettings(), teacher=Teacher(model), gradient=True)
        assert torch.allclose(adv_ce(f), clean_ce(f))
        for name in ("trades_kl", "mart_kl", "alp", "llr_gap", "llr_slope"):
            assert FUNCTIONS[name](f).abs().max() < 1e-6, name
        f.y = model(x).argmax(1)  # helper samples equal the clean ones, labeled by the teacher
        assert torch.allclose(FUNCTIONS["hat"](f), adv_ce(f))


def gradients(weights, x, x_adv, y):
    torch.manual_seed(0)
    model = Busy().eval()
    ObjectiveModule(config(**weights), model)(x, x_adv, y)[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ({"clean_ce": 1, "trades_kl": 0}, {"clean_ce": 1}),
        ({"mart_bce": 1, "mart_kl": 0}, {"mart_bce": 1}),
        ({"adv_ce": 1, "alp": 0}, {"adv_ce": 1}),
        ({"label_noise_ce": 1, "label_noise_eps": 0}, {"adv_ce": 1}),
        ({"label_noise_ce": 1, "label_noise_eps": 0, "label_noise": "worst"}, {"adv_ce": 1}),
        ({"adv_ce": 1, "distill_adv": 0, "distill_clean": 0, "feature_match": 0, "l2_sp": 0}, {"adv_ce": 1}),
        ({"clean_ce": 1, "llr_gap": 0, "cure": 0, "grad_align": 0, "input_gradient": 0}, {"clean_ce": 1}),
    ],
    ids=str,
)
def test_objective_with_zero_weight_equals_its_limit(method, limit):
    x, x_adv, y = batch()
    assert torch.allclose(gradients(method, x, x_adv, y), gradients(limit, x, x_adv, y), atol=1e-6)


def test_every_term_has_a_weight_and_every_weight_a_term():
    assert set(TERMS) == set(ObjectiveConfig.model_fields) - set(TermSettings.model_fields) - {"custom"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "every weight is 0"),
        ({"adv_ce": 1, "adv_mse": 1}, "mix terms"),
        ({"adv_ce": 1, "cure_h": 2.0}, "belongs to cure"),
        ({"adv_ce": 1, "label_noise": "worst"}, "belongs to label_noise_ce"),
        ({"adv_ce": 1, "hat": 0.5}, "hat: set objective.teacher"),
        ({"adv_ce": 1, "hat_teacher": "x"}, "hat_teacher is now called teacher"),
        ({"adv_ce": 1, "distill_temperature": 30}, "belongs to distill_adv, which has weight 0"),
        ({"distill_adv": 1, "distill_temperature": 0, "teacher": "x"}, "greater than 0"),
        ({"distill_adv": 1, "distill_clean": 1}, "distill_adv, distill_clean: set objective.teacher"),
        ({"distill_adv": 1, "adv_mse": 1, "teacher": "x"}, "mix terms"),
        ({"adv_ce": 1, "teacher_digest": "0" * 64}, "set objective.teacher"),
        ({"l2_sp": 1}, "add another term"),
        ({"label_noise_ce": 1, "label_noise_eps": 1.5}, "less than or equal to 1"),
        ({"custom": {"function": "no colon"}}, "pattern"),
    ],
)
def test_objective_config_rejects_invalid_settings(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"feature_match": 1}, False),
        ({"feature_match": 1, "l2_sp": 0.1}, False),
        ({"feature_match": 1, "clean_ce": 0.1}, True),
        ({"adv_ce": 1, "l2_sp": 0.1}, True),
        ({"feature_match": 1, "custom": {"function": "tests.kit:fails", "weight": 1}}, True),
        ({"feature_match": 1, "custom": {"function": "tests.kit:fails", "weight": 0}}, False),
    ],
)
def test_objective_of_features_and_weights_only_does_not_read_the_outputs(terms, expected):
    assert config(**terms, teacher="x" if "feature_match" in terms else None).reads_outputs is expected


@pytest.mark.parametrize("term", ["adv_ce", "adv_mse"])
def test_feature_match_and_l2_sp_suit_both_tasks(term):
    values = config(**{"feature_match": 1, "l2_sp": 1, term: 1}, teacher="x")
    assert values.regression is (term == "adv_mse")
    assert config(feature_match=1, teacher="x").regression is None


def my_term(f):
    """Return the confidence on adversarial inputs, as a custom term of a user."""
    return f.adv_logits.softmax(1).amax(1)


def my_scalar(f):
    return f.adv_logits.mean()


def test_custom_term_is_added_to_loss():
    x, x_adv, y = batch()
    model = Busy().eval()
    custom = {"function": "tests.unit.objective.test_objective:my_term", "weight": 0.5}
    loss, sums = ObjectiveModule(config(adv_ce=1, custom=custom), model)(x, x_adv, y)
    plain, _ = ObjectiveModule(config(adv_ce=1), model)(x, x_adv, y)
    confidence = model(x_adv).softmax(1).amax(1)
    assert torch.allclose(loss, plain + 0.5 * confidence, atol=1e-6)
    assert torch.allclose(sums["custom"], confidence.sum())


def test_custom_term_must_return_one_value_per_sample():
    x, x_adv, y = batch()
    custom = {"function": "tests.unit.objective.test_objective:my_scalar"}
    with pytest.raises(Exception, match=r"gave \(\), not a tensor \(4,\)"):
        ObjectiveModule(config(custom=custom), Busy())(x, x_adv, y)
