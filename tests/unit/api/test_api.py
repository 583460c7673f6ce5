"""The Python API: any module, tensors in and out, no side effects, helpful errors."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advtrain
from advtrain.recipe import load_recipe
from tests.kit import RECIPES, Busy, Linear, digits_data, digits_recipe, train_here


def batch(n=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (n,), generator=generator)


def linear_batch():
    """Return correctly classified inputs away from the box bounds, where the closed form holds."""
    model = Linear(16)
    x = 0.3 + 0.4 * torch.rand(200, 16, generator=torch.Generator().manual_seed(2))
    return model, x, (model(x)[:, 1] > 0).long()


@pytest.mark.parametrize("name", ["pgd", "apgd-ce,square-200"])
def test_attack_breaks_exactly_the_samples_of_linear_worst_case(name):
    model, x, y = linear_batch()
    x_adv = advtrain.attack(model, x, y, "linf:0.05", name)
    assert float((x_adv - x).abs().max()) <= 0.05 + 1e-6
    margin = model(x)[:, 1].abs()
    is_broken = margin < 0.05 * model.weight.abs().sum()
    assert torch.equal(model(x_adv).argmax(1) != y, is_broken)
    assert 0.1 < float(is_broken.float().mean()) < 0.9


def test_evaluate_matches_linear_closed_form_for_tensors_and_loader():
    model, x, y = linear_batch()
    is_broken = model(x)[:, 1].abs() < 0.05 * model.weight.abs().sum()
    report = advtrain.evaluate(model, x, y, "linf:0.05", suite="quick", full=False)
    assert report.clean_accuracy == 1
    assert report.robust_accuracy == pytest.approx(1 - float(is_broken.float().mean()))
    assert report.robust.low < report.robust_accuracy < report.robust.high
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    again = advtrain.evaluate(
        model, loader, threat=advtrain.ThreatModel("linf", 0.05), suite="quick", full=False
    )
    assert again == report


def test_evaluate_checks_for_masking_by_default():
    model, x, y = linear_batch()
    report = advtrain.evaluate(model, x[:60], y[:60], "linf:0.05", suite="standard", other=(x[60:], y[60:]))
    assert report.trust == "trusted"
    assert {c.name: c.verdict for c in report.checks}["other_images"] == "passed"


def test_custom_bounds_give_same_verdicts_as_unit_box():
    model, x, y = linear_batch()

    class Centered(nn.Module):
        def forward(self, z):
            return model((z + 1) / 2)

    unit = advtrain.evaluate(model, x[:60], y[:60], "linf:0.05", suite="standard")
    wide = advtrain.ThreatModel("linf", 0.1, low=-1, high=1)
    centered = advtrain.evaluate(Centered(), 2 * x[:60] - 1, y[:60], wide, suite="standard")
    assert centered.robust_accuracy == unit.robust_accuracy
    assert [c.verdict for c in centered.checks] == [c.verdict for c in unit.checks]
    x_adv = advtrain.attack(Centered(), 2 * x - 1, y, wide)
    assert -1 <= float(x_adv.min()) < 0


def test_evaluate_supports_regression():
    weights = torch.linspace(-1, 1, 8)

    class Regression(nn.Module):
        def forward(self, x):
            return (x @ weights).unsqueeze(1)

    x = 0.3 + 0.4 * torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    report = advtrain.evaluate(Regression(), x, x @ weights + 0.5, "linf:0.1", full=False)
    assert report.clean_mae.value == pytest.approx(0.5, abs=1e-5)
    assert report.robust_mae.value == pytest.approx(0.5 + 0.1 * float(weights.abs().sum()), abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_api_does_not_change_model_or_rng_state(training):
    model, (x, y) = Busy(), batch()
    model(x).sum().backward()
    model.train(training)
    model.body[1].eval()  # batch norm in training mode is for Adversary only
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.random.get_rng_state()
    advtrain.attack(model, x, y, "linf:0.1", num_steps=2)
    advtrain.attack(model, x, y, "l2:0.5", "apgd-ce-5")
    advtrain.evaluate(model, x, y, "linf:0.1", suite="pgd-2", full=False)
    model.body[1].train(training)
    advtrain.Adversary("linf:0.1", num_steps=2)(model, x, y)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training is training for m in model.modules())


def test_adversary_draws_new_start_at_each_call_and_repeats_given_step():
    model, (x, y) = Busy().eval(), batch()
    adversary = advtrain.Adversary("linf:0.1", num_steps=1, name="fgsm_rs")
    first, second = adversary(model, x, y), adversary(model, x, y)
    assert not torch.equal(first, second)
    assert torch.equal(adversary(model, x, y, step=0), first)
    assert torch.equal(advtrain.Adversary("linf:0.1", num_steps=1, name="fgsm_rs")(model, x, y), first)
    assert float((adversary(model, x, y, eps_scale=0.5) - x).abs().max()) <= 0.05 + 1e-6


def test_objective_is_weighted_mean_of_terms():
    model, (x, y) = Busy().eval(), batch()
    x_adv = (x + 0.1).clamp(0, 1)
    clean, adversarial = model(x), model(x_adv)
    kl = F.kl_div(adversarial.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
    expected = F.cross_entropy(clean, y) + 6 * kl
    loss = advtrain.Objective(clean_ce=1, trades_kl=6)(model, x, x_adv, y)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert loss.requires_grad


def apart(f):
    """Return the squared distance of the adversarial logits to the teacher's, as a custom term of a user."""
    return (f.adv_logits - f.teacher(f.x)).square().sum(1)


CUSTOM = {"function": "tests.unit.api.test_api:apart"}
NO_WEIGHT = CUSTOM | {"weight": 0}


def test_custom_term_of_an_objective_reads_the_teacher():
    model, (x, y) = Busy().eval(), batch()
    loss = advtrain.Objective(clean_ce=1, custom=CUSTOM, teacher=copy.deepcopy(model))(model, x, x, y)
    assert torch.allclose(loss, F.cross_entropy(model(x), y), atol=1e-5)


def test_objective_and_adversary_distill_a_teacher_as_rslad():
    model, teacher = Busy().eval(), Busy().train()
    x, y = batch()
    adversary = advtrain.Adversary("linf:0.1", loss="kl_teacher", start="gaussian", teacher=teacher)
    x_adv = adversary(model, x, y)
    with torch.no_grad():
        p = copy.deepcopy(teacher).eval()(x).log_softmax(1)
    kl_clean, kl_adv = (
        F.kl_div(model(z).log_softmax(1), p, reduction="batchmean", log_target=True) for z in (x, x_adv)
    )
    assert kl_adv > kl_clean
    objective = advtrain.Objective(distill_adv=5 / 6, distill_clean=1 / 6, teacher=teacher)
    assert torch.allclose(objective(model, x, x_adv, y), 5 / 6 * kl_adv + kl_clean / 6, atol=1e-5)
    assert teacher.training


def test_load_model_gives_same_model_from_run_state_dict_and_archive(tmp_path):
    recipe = digits_recipe("training.epochs=1")
    model, run = train_here(recipe, tmp_path)
    x, _ = batch(4)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    archive = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=1)}})
    torch.export.save(archive, tmp_path / "model.pt2")
    loaded = [
        advtrain.load_model(run.path),
        advtrain.load_model(tmp_path / "weights.pt", model="cnn2", shape=(1, 8, 8), num_classes=10),
        advtrain.load_model(tmp_path / "model.pt2"),
    ]
    assert all(torch.allclose(other(x), model(x), atol=1e-6) for other in loaded)
    test = next(digits_data(recipe).test.batches(50, advtrain_place()))
    assert (
        advtrain.evaluate(loaded[0], test.x, test.y, "linf:0.1", suite="quick", full=False).clean_accuracy
        > 0.2
    )


def advtrain_place():
    from advtrain.data import Place

    return Place()


def test_load_recipe_matches_command_line():
    recipe = advtrain.load_recipe(RECIPES / "digits.yaml", ["adversary.eps=8/255"])
    assert recipe == load_recipe(RECIPES / "digits.yaml", ["adversary.eps=8/255"])
    assert recipe.adversary.eps == 8 / 255


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: advtrain.attack(m, x * 255, y, "linf:8/255"), r"outside the bounds \[0, 1\]"),
        (lambda m, x, y: advtrain.attack(m, x, y[:-1], "linf:8/255"), r"y must have shape \(20,\)"),
        (lambda m, x, y: advtrain.attack(m, x, y, "linf"), "write for example linf:8/255"),
        (lambda m, x, y: advtrain.attack(m, x, y, "linf:0.1", "pdg"), "did you mean 'pgd"),
        (lambda m, x, y: advtrain.attack(m, x, y, "linf:0.1", stps=3), "unknown setting 'stps'"),
        (
            lambda m, x, y: advtrain.attack(m, x, y, "linf:0.1", "square", num_steps=3),
            "belongs to a gradient attack",
        ),
        (lambda m, x, y: advtrain.attack(m, (255 * x).byte(), y, "linf:0.1"), "divide by 255"),
        (lambda m, x, y: advtrain.evaluate(m, x, threat="linf:0.1"), "needs labels"),
        (lambda m, x, y: advtrain.evaluate(m, x, y), "needs a threat model"),
        (lambda m, x, y: advtrain.evaluate(m, [], threat="linf:0.1"), "yields no batches"),
        (lambda m, x, y: advtrain.evaluate(m, x, y.float(), "linf:0.1", suite="quick"), "labels are int64"),
        (lambda m, x, y: advtrain.attack(m, x, y, "linf:0.1", "n_fgsm"), "for training only"),
        (lambda m, x, y: advtrain.Objective(grad_align=1)(m, x, None, y), "pass threat"),
        (lambda m, x, y: advtrain.Objective(trades_lk=6), "did you mean 'trades_kl'"),
        (lambda m, x, y: advtrain.Objective(), "every weight is 0"),
        (lambda m, x, y: advtrain.Objective(adv_ce=1, l2_sp=1), "advtrain train"),
        (lambda m, x, y: advtrain.Objective(distill_adv=1), "distill_adv: pass teacher, a module"),
        (lambda m, x, y: advtrain.Objective(distill_adv=1, teacher="runs/a"), "teacher must be a module"),
        (lambda m, x, y: advtrain.Objective(adv_ce=1, teacher=m), "teacher has no effect"),
        (lambda m, x, y: advtrain.Objective(adv_ce=1, custom=NO_WEIGHT, teacher=m), "teacher has no effect"),
        (lambda m, x, y: advtrain.Adversary("linf:0.1", teacher=m), "teacher has no effect"),
        (lambda m, x, y: advtrain.attack(m, x, y, "linf:0.1", loss="kl_teacher"), "needs a teacher"),
        (lambda m, x, y: advtrain.Adversary("linf:0.1", "free"), "advtrain train"),
        (lambda m, x, y: advtrain.load_model("nowhere.pt"), "pass model, shape and num_classes"),
    ],
)
def test_api_rejects_bad_input_with_suggestion(call, message):
    x, y = batch()
    with pytest.raises(advtrain.UserError, match=message):
        call(Busy().eval(), x, y)


def test_api_imports_neither_ray_nor_mlflow_nor_torchvision():
    code = (
        "import sys, torch, advtrain\n"
        "assert 'torch.nn' in sys.modules and 'advtrain.api' not in sys.modules\n"
        "m = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))\n"
        "x, y = torch.rand(8, 16), torch.randint(0, 3, (8,))\n"
        "advtrain.attack(m, x, y, 'linf:0.1'); advtrain.evaluate(m, x, y, 'linf:0.1', suite='quick')\n"
        "print(sorted({'ray', 'mlflow', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
