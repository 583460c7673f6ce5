"""Teacher and start weights: their terms by hand, one pass a batch, weights that never change, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from advtrain.attacks import AttackConfig, build_attack
from advtrain.errors import UserError
from advtrain.objective import Anchor, ObjectiveConfig, ObjectiveModule, Teacher
from advtrain.threat import ThreatModel
from tests.kit import Busy


def net(seed, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def batch(n=4):
    generator = torch.Generator().manual_seed(5)
    x, x_adv = (torch.rand(n, 1, 8, 8, generator=generator) for _ in range(2))
    return x, x_adv, torch.arange(n)


def objective(model, teacher=None, anchor=None, **weights):
    name = {} if teacher is None else {"teacher": "a run"}
    config = ObjectiveConfig.model_validate(weights | name)
    return ObjectiveModule(config, model, teacher=teacher and Teacher(teacher), anchor=anchor)


def features(model, x):
    return torch.tanh(x.flatten(1) @ model[1].weight.T + model[1].bias)


def test_feature_match_is_squared_distance_to_the_clean_features_of_the_teacher():
    model, teacher = net(0), net(1)
    x, x_adv, y = batch()
    loss, sums = objective(model, teacher, feature_match=2)(x, x_adv, y)
    difference = features(model, x_adv) - features(teacher, x)
    assert torch.allclose(loss, 2 * difference.square().sum(1), atol=1e-6)
    assert torch.allclose(sums["feature_match"], difference.square().sum())
    loss.sum().backward()
    expected = 4 * (difference * (1 - features(model, x_adv) ** 2)).sum(0)
    assert torch.allclose(model[1].bias.grad, expected, atol=1e-5)
    assert model[3].weight.grad is None  # the last layer has no part in it
    assert objective(model, copy.deepcopy(model), feature_match=1)(x, None, y)[0].abs().max() < 1e-10


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (net(0, width=7), "6 features of the model, but 7 of the teacher"),
        (nn.Flatten(), "teacher runs 0 times"),
    ],
    ids=["width", "no linear layer"],
)
def test_feature_match_refuses_a_teacher_with_other_features(teacher, message):
    x, x_adv, y = batch()
    with pytest.raises(UserError, match=message):
        objective(net(0), teacher, feature_match=1)(x, x_adv, y)


def test_l2_sp_gives_its_weight_times_the_distance_to_the_start_weights():
    model = net(0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, x_adv, y = batch()
    sp, plain = (
        objective(model, anchor=Anchor(model, start), adv_ce=1, **w) for w in ({"l2_sp": 0.3}, {"l2_sp": 0})
    )
    assert torch.equal(sp(x, x_adv, y)[0], plain(x, x_adv, y)[0])  # at the start weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    gap = [model[1].weight - start["1.weight"], model[1].bias - start["1.bias"]]  # without the last layer
    added = sp(x, x_adv, y)[0].mean() - plain(x, x_adv, y)[0].mean()
    assert torch.allclose(added, 0.3 / 2 * sum(g.square().sum() for g in gap), rtol=1e-4)
    gradients = []
    for module in (sp, plain):
        model.zero_grad()
        module(x, x_adv, y)[0].mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs, drift in zip(*gradients, [*gap, 0, 0], strict=True):
        assert torch.allclose(ours, theirs + 0.3 * drift, atol=1e-5)


def test_l2_sp_does_not_depend_on_the_split_over_workers():
    """Each rank's sum is scaled by world size / global batch; DDP takes the mean over ranks."""
    model = net(0)
    module = objective(model, anchor=Anchor(model, net(1).state_dict()), adv_ce=1, l2_sp=0.3)
    x, x_adv, y = batch(5)
    found = []
    for parts in ([slice(0, 5)], [slice(0, 3), slice(3, 5)]):
        model.zero_grad()
        for part in parts:
            loss, _ = module(x[part], x_adv[part], y[part])
            (loss.sum() * (len(parts) / 5) / len(parts)).backward()
        found.append(model[1].weight.grad.clone())
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("start", [{}, {"3.weight": torch.zeros(10, 6)}], ids=["nothing", "last layer only"])
def test_l2_sp_refuses_a_start_without_weights(start):
    with pytest.raises(UserError, match="set model.from"):
        Anchor(net(0), start)
    with pytest.raises(UserError, match="set model.from"):
        objective(net(0), adv_ce=1, l2_sp=1)


def test_teacher_runs_once_a_batch_for_attack_and_terms():
    model, teacher, calls = net(0), net(1), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    module = objective(model, teacher, distill_adv=0.8, distill_clean=0.2, feature_match=1)
    config = AttackConfig(num_steps=3, start="gaussian", loss="kl_teacher", num_restarts=2)
    attack = build_attack(config, teacher=module.teacher)
    for _ in range(2):
        calls.clear()
        x, _, y = batch()
        x_adv = attack(model, x, y, ThreatModel("linf", 0.1), torch.Generator().manual_seed(0))
        for _ in range(2):  # as in SAM
            module(x[:], x_adv, y)
        assert len(calls) == 1
    x.add_(0.1)  # the same memory with other values is another batch
    loss, _ = module(x, x_adv, y)
    assert len(calls) == 2
    fresh = objective(model, teacher, distill_adv=0.8, distill_clean=0.2, feature_match=1)
    assert torch.equal(loss, fresh(x.clone(), x_adv, y)[0])


def test_teacher_keeps_the_outputs_of_each_part_of_a_batch():
    network, calls = net(1), []
    network.register_forward_hook(lambda *_: calls.append(1))
    x, teacher = batch()[0], Teacher(network)
    parts = [slice(0, 2), slice(2, 4)]
    for _ in range(2):  # training.accumulate: first the attack on each part, then its gradients
        found = [teacher(x[rows]) for rows in parts]
    assert len(calls) == 2
    assert torch.equal(torch.cat(found), Teacher(network)(x))


def test_teacher_never_changes_and_is_not_trained():
    teacher, model = Busy().train(), net(0)
    before, trained = copy.deepcopy(teacher.state_dict()), [p.requires_grad for p in teacher.parameters()]
    module = objective(model, teacher, adv_ce=1, hat=1, distill_adv=1)
    x, x_adv, y = batch()
    with torch.no_grad():
        target = copy.deepcopy(teacher).eval()(x).softmax(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module.train()
    loss, sums = module(x, x_adv, y)
    expected = (target * (target.log() - model(x_adv).log_softmax(1))).sum()
    assert torch.allclose(sums["distill_adv"], expected, atol=1e-4)  # in evaluation mode
    loss.sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert [p.requires_grad for p in teacher.parameters()] == trained
    assert teacher.training
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert not any("teacher" in name for name in module.state_dict())


def test_kl_teacher_attack_raises_the_divergence_from_the_teacher():
    model, teacher = net(0), net(1)
    x, _, y = batch()
    with torch.no_grad():
        p = teacher(x).log_softmax(1)

    def divergence(z):
        return (p.exp() * (p - model(z).log_softmax(1))).sum(1).detach()

    one = AttackConfig(name="fgsm", num_steps=1, start="none", loss="kl_teacher")
    x_adv = build_attack(one, teacher=Teacher(teacher))(model, x, y, ThreatModel("linf", 0.02))
    assert (divergence(x_adv) > divergence(x)).all()
    z = x.clone().requires_grad_()
    (p.exp() * (p - model(z).log_softmax(1))).sum().backward()
    assert torch.equal(x_adv, (x + 0.02 * z.grad.sign()).clamp(0, 1))


def test_kl_teacher_attack_needs_a_teacher():
    with pytest.raises(UserError, match="kl_teacher needs a teacher"):
        build_attack(AttackConfig(num_steps=1, start="none", loss="kl_teacher"))
