"""Models with a perturbed embedding: attacks, training, evaluation, masking checks and export."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import advtrain
from advtrain.attacks import build_suite
from advtrain.data import Place
from advtrain.errors import UserError
from advtrain.evaluation import EvalSpec, evaluate
from advtrain.models.network import EmbeddingModel, Network, attack_view, embed, from_perturbed
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.objective import ObjectiveConfig, ObjectiveModule, Teacher
from advtrain.registry.export import RangeChecked
from advtrain.threat import ThreatModel
from advtrain.training.trained_model import check_model
from tests.kit import Tokens, digits_data, digits_recipe, train_here

L2 = ThreatModel("l2", 0.5)


class LinearTokens(EmbeddingModel):
    """Model with logits (0, sum of w_t . z_t over the free tokens), whose worst case has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))

    def embed(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, 5, 4)
        mask = torch.arange(5)[None, :, None] < 1 + torch.arange(len(x))[:, None, None] % 5
        return torch.cat([tokens * mask, mask.float().expand(len(x), 5, 1)], 2)

    def classify(self, z: Tensor) -> Tensor:
        score = (z[..., :4] * z[..., 4:] * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score + 100 * (z[..., 4] - z[..., 4].round()).sum(1)], 1)

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        free = z[..., 4:].bool() & torch.tensor([True] * 4 + [False])
        return replace(threat, low=-math.inf, high=math.inf, free=free)

    def worst_move(self, z: Tensor, threat: ThreatModel) -> Tensor:
        """Return the largest possible change of the score, (N,)."""
        weight = self.weight * z[..., 4:]
        per_token = {"linf": weight.abs().sum(2), "l2": weight.norm(dim=2), "l1": weight.abs().amax(2)}
        tokens = per_token[threat.norm]
        if threat.group == "token" or threat.norm == "linf":
            return threat.eps * tokens.sum(1)
        return threat.eps * (tokens.norm(dim=1) if threat.norm == "l2" else tokens.amax(1))


def points(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 20, generator=generator), torch.randint(0, 2, (n,), generator=generator)


THREATS = [
    ThreatModel(norm, eps, group=group) for norm, eps in (("linf", 0.1), ("l2", 0.3), ("l1", 0.5))
    for group in ("sample", "token")
]  # fmt: skip


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_pgd_reaches_closed_form_and_moves_only_free_positions(threat):
    model, (x, y) = LinearTokens(), points()
    z = model.embed(x)
    z_adv = advtrain.attack(model, x, y, threat, num_steps=200, step_size=threat.eps / 20)
    away = torch.where(y == 1, -1.0, 1.0)
    moved = away * (model.classify(z_adv)[:, 1] - model.classify(z)[:, 1])
    slack = 1e-4 if threat.norm != "l1" else 0.02 * threat.eps  # SLIDE moves at least 1 % of the coordinates
    assert torch.allclose(moved, model.worst_move(z, threat), atol=1e-5, rtol=max(slack, 1e-4))
    free = model.threat_at(z, threat).free.expand_as(z)
    assert torch.equal(z_adv[~free], z[~free])
    assert threat.distance(z_adv, z).max() <= threat.eps * (1 + 1e-6)


@pytest.mark.parametrize("threat", [t for t in THREATS if (t.norm, t.group) != ("l1", "token")], ids=str)
@pytest.mark.parametrize("name", ["apgd-ce-50", "pgd-50"])
def test_suites_break_exactly_those_samples_that_can_be_broken(threat, name):
    """Batches are smaller than the set and broken samples leave them, so the mask must follow its sample."""
    model, (x, y) = LinearTokens(), points()
    z = model.embed(x)
    score = torch.where(y == 1, 1.0, -1.0) * model.classify(z)[:, 1]
    reach = model.worst_move(z, threat)
    z_adv = advtrain.attack(model, x, y, threat, name, batch_size=7)
    broken = model.classify(z_adv).argmax(1) != y
    clear = (score - reach).abs() > 0.02 * reach
    assert torch.equal(broken[clear], (score < reach)[clear])
    assert 5 < int((broken & (score > 0)).sum()) < 55
    free = model.threat_at(z, threat).free.expand_as(z)
    assert torch.equal(z_adv[~free], z[~free])


@pytest.mark.parametrize("name", ["fab-t", "square", "cw", "autoattack"])
def test_whole_input_attacks_reject_embeddings(name):
    model, (x, y) = LinearTokens(), points()
    with pytest.raises(UserError, match="searches balls around whole inputs in a finite box"):
        advtrain.attack(model, x, y, L2, name)


def test_apgd_l1_rejects_token_group():
    with pytest.raises(UserError, match="searches l1 balls around samples, not around tokens"):
        build_suite("apgd-ce")[0].check(ThreatModel("l1", 1.0, group="token"))


def test_attack_moves_only_free_pixels():
    """`free` restricts attacks on any model, here to a patch."""
    data = digits_data()
    (batch,) = data.test.batches(len(data.test), Place())
    model, _ = plain_model()
    free = torch.zeros(len(batch.x), 1, 8, 8, dtype=torch.bool)
    free[:, :, 2:5, 2:5] = True
    y = model(batch.x).argmax(1)
    threat = ThreatModel("linf", 0.5, free=free)
    x_adv = advtrain.attack(model, batch.x, y, threat, batch_size=50)
    assert torch.equal(x_adv[~free], batch.x[~free])
    assert (x_adv != batch.x).flatten(1).any(1).all()


def plain_model():
    recipe = digits_recipe("model={name: cnn2}")
    data = digits_data(recipe)
    return Architecture(recipe.model, data.shape, data.num_classes).build(), data


def test_embedding_layer_gets_gradient_at_fixed_perturbation():
    """Oracle: d/dw of cross_entropy(classify(embed(x) + delta)) with a constant delta."""
    torch.manual_seed(0)
    model = Tokens((1, 8, 8), 10, trained=True)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    view, z, threat = attack_view(model, x, L2)
    assert not z.requires_grad
    z_adv = threat.random_start(z, torch.Generator().manual_seed(0))
    objective = ObjectiveModule(ObjectiveConfig(adv_ce=1, clean_ce=0.5), model)
    objective(x, z_adv, y)[0].sum().backward()
    found = model.project.weight.grad.clone()
    model.zero_grad()
    loss = F.cross_entropy(model.classify(model.embed(x) + (z_adv - z)), y, reduction="sum")
    (loss + 0.5 * F.cross_entropy(model(x), y, reduction="sum")).backward()
    assert torch.allclose(found, model.project.weight.grad, atol=1e-6)
    assert found.abs().max() > 1e-3
    assert torch.equal(view(z), model(x))


@pytest.mark.parametrize("weights", [{"input_gradient": 1}, {"cure": 1}, {"llr_gap": 1}, {"grad_align": 1}])
def test_gradient_terms_use_embedding(weights):
    torch.manual_seed(0)
    model, (x, y) = Tokens((1, 8, 8), 10, trained=True), (torch.rand(6, 1, 8, 8), torch.arange(6))
    _, z, threat = attack_view(model, x, L2)
    z_adv = threat.random_start(z, torch.Generator().manual_seed(0))
    module = ObjectiveModule(ObjectiveConfig(**weights), model)
    loss, _ = module(x, z_adv, y, L2, torch.Generator().manual_seed(1))
    loss.sum().backward()
    assert loss.shape == (6,)
    assert model.project.weight.grad.isfinite().all()
    assert model.head[0].weight.grad.abs().max() > 0


def test_hat_rejects_embedding_model():
    with pytest.raises(UserError, match="this model perturbs embed"):
        ObjectiveModule(
            ObjectiveConfig(hat=1, teacher="x"), Tokens((1, 8, 8), 10), teacher=Teacher(torch.nn.Identity())
        )


def test_distillation_gives_the_teacher_of_an_embedding_model_the_inputs():
    torch.manual_seed(0)
    model, teacher = Tokens((1, 8, 8), 10), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    x = torch.rand(4, 1, 8, 8)
    objective = ObjectiveModule(ObjectiveConfig(distill_adv=1, teacher="x"), model, teacher=Teacher(teacher))
    loss, _ = objective(x, model.embed(x).detach(), torch.arange(4))
    expected = (teacher(x).softmax(1) * (teacher(x).log_softmax(1) - model(x).log_softmax(1))).sum(1)
    assert torch.allclose(loss, expected, atol=1e-6)


def test_embed_must_give_floating_point_rows():
    model = Tokens((1, 8, 8), 10)
    model.embed = lambda x: x.long()
    with pytest.raises(UserError, match=r"embed\(x\) must be floating point with 2 rows, not torch.int64"):
        embed(model, torch.rand(2, 1, 8, 8))


SHORT = ("training.epochs=2", "training.batch_size=100", "adversary.num_steps=2")


@pytest.mark.parametrize(
    "method",
    [
        ("adversary={name: pgd, eps: 0.1, num_steps: 3, num_restarts: 2, momentum: 0.5}",),
        ("adversary={name: free, eps: 0.1, num_steps: 2}", "optimizer.swa_start_epoch=1"),
        ("adversary={name: pgd, eps: 0.1, num_steps: 2, fraction: 0.5, friendly: 0}",),
        ("adversary={name: n_fgsm, eps: 0.1}", "objective={adv_ce: 1, grad_align: 0.2}"),
    ],
)
def test_identity_embedding_trains_bit_identical_weights(method, tmp_path):
    plain, _ = train_here(digits_recipe(*SHORT, *method, "model={name: cnn2}"), tmp_path / "plain")
    ours, _ = train_here(
        digits_recipe(*SHORT, *method, "model={name: 'tests.kit:Pixels'}"), tmp_path / "ours"
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


TOKENS = (
    "model={name: 'tests.kit:Tokens', args: {trained: true}}",
    "adversary={norm: l2, eps: 0.5, num_steps: 3}",
    "evaluation={threat: {norm: l2, eps: 0.5}, suite: 'apgd-ce-20,apgd-t-20x3'}",
)


def test_token_model_is_trained_evaluated_and_exported(tmp_path):
    recipe = digits_recipe(*TOKENS, "training.epochs=8", "training.batch_size=50")
    data = digits_data(recipe)
    model, run = train_here(recipe, tmp_path, data)
    lines = run.metrics()
    assert lines[-1]["val_robust_accuracy"] > 0.5
    assert not torch.equal(model.network.project.weight, Tokens((1, 8, 8), 10).project.weight)

    source = ModelSource.of(model.state_dict(), Architecture(recipe.model, data.shape, data.num_classes))
    spec = EvalSpec(source, data.test, data, recipe.evaluation.suite, L2, "tokens", full=True)
    done = evaluate(spec)
    report = done.report
    assert 0.4 < report.robust_accuracy < report.clean_accuracy
    verdicts = {check.name: check.verdict for check in report.checks}
    assert verdicts["black_box"] == "skipped"
    assert verdicts["embedding"] == "warning"
    assert "failed" not in verdicts.values()
    assert "no bounds" in next(c.evidence for c in report.checks if c.name == "radius")
    assert done.failures == []
    assert [p.value for p in report.curve] == sorted((p.value for p in report.curve), reverse=True)
    # the attacks alone give the same robust accuracy
    (batch,) = data.test.batches(len(data.test), Place())
    z_adv = advtrain.attack(model, batch.x, batch.y, L2, "apgd-ce-50,apgd-t-50x9")
    with torch.no_grad():
        robust = float((from_perturbed(model)(z_adv).argmax(1) == batch.y).float().mean())
    assert abs(robust - report.robust_accuracy) < 0.02

    example = torch.rand(2, 1, 8, 8)
    batch_size = torch.export.Dim.DYNAMIC
    exported = torch.export.export(RangeChecked(model), (example,), dynamic_shapes=({0: batch_size},))
    with torch.no_grad():
        assert torch.allclose(exported.module()(batch.x), model(batch.x), atol=1e-5)


def test_precision_wrapper_forwards_embedding():
    model = Tokens((1, 8, 8), 10)
    network = Network(model, "bf16", channels_last=True)
    x = torch.rand(3, 1, 8, 8)
    view, z, threat = attack_view(network, x, L2)
    assert z.dtype == torch.float32
    assert torch.equal(threat.free, model.threat_at(z, L2).free)
    assert view(z).dtype == torch.float32
    assert torch.equal(view(z), network(x))


@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel("l2", 0.5, group="token"),
        ThreatModel("l2", 0.5, free=torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        ThreatModel("l2", 0.5).with_radius_scale(torch.ones(1)),
    ],
)
def test_evaluate_rejects_radius_scale_free_and_token_group(threat):
    model, data = plain_model()
    with pytest.raises(UserError, match="evaluate takes no radius_scale, free or group 'token'"):
        evaluate(EvalSpec(model, data.test, data, "quick", threat, "model"))


def test_suite_that_cannot_attack_embedding_is_rejected_before_training():
    recipe = digits_recipe(*TOKENS, "evaluation.suite=autoattack")
    with pytest.raises(UserError, match="fab-t searches balls around whole inputs"):
        check_model(recipe, digits_data(recipe))
    check_model(digits_recipe(*TOKENS), digits_data(recipe))
