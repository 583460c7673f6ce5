"""Auto-PGD and Square against closed forms and their papers' schedules; suites by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from advtrain.attacks import SEARCHES, build_suite
from advtrain.attacks.active_batches import State, advance, parts
from advtrain.attacks.apgd import AutoPGD, checkpoints
from advtrain.attacks.apgd_l1 import _adapt, _Climbing, phases, sparse_step
from advtrain.attacks.carlini_wagner import CarliniWagner
from advtrain.attacks.losses import build_cross_entropy, dlr, targeted_dlr
from advtrain.attacks.square import Square, _Draws, hill, two_halves, window_share
from advtrain.data import ArraySplit
from advtrain.errors import UserError
from advtrain.evaluation import attack_samples
from advtrain.recipe.suites import BUDGETS
from advtrain.threat import Projection, ThreatModel
from tests.kit import Busy, Linear, digits_data, digits_recipe, train_here
from tests.unit.attacks.test_pgd import worst_score


def linear_problem(n=60):
    """Return a linear model, correctly classified samples, and a function that flags breakable ones."""
    model, x = Linear(12), torch.rand(n, 12)
    y = model(x).argmax(1)

    def is_broken(threat):
        score = worst_score(model.weight, x, y, threat) + model.bias
        return torch.where(y == 1, score < 0, score > 0)

    return model, x, y, is_broken


THREATS = [
    ThreatModel("linf", 0.05),
    ThreatModel("linf", 0.15),
    ThreatModel("l2", 0.2),
    ThreatModel("l1", 0.3),
    ThreatModel("l1", 0.8),
]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "square", "eot-apgd-ce-100x2", "cw"])
def test_suite_attack_breaks_exactly_the_samples_of_linear_worst_case(name, threat):
    """Square is a random search and may miss up to two samples outside linf."""
    if name == "cw" and threat.norm != "l2":
        pytest.skip("cw searches l2 balls")
    model, x, y, is_broken = linear_problem()
    (attack,) = build_suite(name)
    at_once = len(x) if name == "square" else 13  # its thousands of steps cost the same for any batch
    x_adv, fooled = attack.find_failures(
        model, x, y, threat, torch.Generator().manual_seed(0), batch_size=at_once
    )
    missed = is_broken(threat) & ~fooled
    assert int(missed.sum()) <= (2 if name == "square" and threat.norm != "linf" else 0)
    assert not (fooled & ~is_broken(threat)).any()
    assert 0 < int(fooled.sum()) < len(x)
    assert threat.distance(x_adv, x).max() <= threat.eps + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (model(x_adv).argmax(1) != y)[fooled].all()


@pytest.mark.parametrize(("num_steps", "gap"), [(100, 1e-5), (10, 1e-2)])
@pytest.mark.parametrize("eps", [2.0, 4.0])
def test_apgd_l2_reaches_linear_worst_case(eps, num_steps, gap):
    """A third of the pixels is at a bound. Clipping every step to the box first would miss 1 to 10 %."""
    model, x, y = Linear(100), torch.rand(60, 100), torch.ones(60, dtype=torch.int64)
    x[torch.rand(x.shape) < 1 / 3] = 0
    threat = ThreatModel("l2", eps)
    with torch.no_grad():
        model.weight /= 10  # so that the cross-entropy's gradient does not underflow
        score = model(x)[:, 1]
        drop = score - worst_score(model.weight, x, y, threat)
        model.bias.fill_(1 - (score - drop).min())  # all samples are robust by a margin of at least 1
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, logits: seen.append(logits[:, 1].detach()))
    generator = torch.Generator().manual_seed(0)
    _, fooled = AutoPGD("ce", num_steps=num_steps).find_failures(model, x, y, threat, generator)
    assert not fooled.any()
    reached = score + model.bias.detach() - torch.stack(seen).amin(0)
    assert (reached / drop).min() > 1 - gap


def test_carlini_wagner_approximates_distance_to_plane():
    """Oracle: |w x + b| / ||w|| for samples whose nearest point lies inside the box."""
    model, x, y, _ = linear_problem(80)
    score = model(x)[:, 1]
    length = score.abs() / model.weight.norm()
    nearest = x - (score / model.weight.norm() ** 2).unsqueeze(1) * model.weight
    inside = ((nearest >= 0) & (nearest <= 1)).all(1)
    assert inside.sum() > 10
    _, found = CarliniWagner(400, 8).find_nearest(model, x, y, ThreatModel("l2", 1.0))
    assert (found[inside] >= length[inside] - 1e-5).all()
    assert (found[inside] <= 1.05 * length[inside] + 0.01).all()


def test_carlini_wagner_moves_pixels_at_box_bounds():
    """Most pixels of MNIST are at 0 or 1."""
    model, x = Linear(50), (torch.rand(60, 50) > 0.5).float()
    y, threat = model(x).argmax(1), ThreatModel("l2", 1.0)
    (reference,) = build_suite("apgd-ce")
    strong = reference.find_failures(model, x, y, threat, torch.Generator().manual_seed(0))[1]
    ours = CarliniWagner(200, 5).find_failures(model, x, y, threat)[1]
    assert int(strong.sum()) > 20
    assert int((strong & ~ours).sum()) <= 2


def test_square_window_is_square_unless_image_is_a_strip():
    for shape, expected in (((1, 28, 28), (18, 18)), ((1, 1, 64), (1, 26)), ((3, 4, 40), (4, 16))):
        draw = _Draws(ThreatModel("linf", 0.1), torch.zeros(1, *shape), None)
        assert draw._window_size(0.4) == expected


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 4)])
def test_square_pattern_matches_published_rings(norm, power):
    """Oracle: the rings of a 5 x 2 and of a 5 x 3 half, counted by hand. l2 is eq. 3, l1 is the authors' code."""
    one, two, three = (sum(1 / k**power for k in range(first, 4)) for first in (1, 2, 3))
    left = torch.tensor([[three, three], [two, two], [two, one], [two, two], [three, three]])
    right = torch.tensor([[three] * 3, [two] * 3, [two, one, two], [two] * 3, [three] * 3])
    order = {"l2": 2, "l1": 1}[norm]
    left, right = (half / half.norm(order) for half in (left, right))
    assert torch.allclose(hill(5, 2, norm), left)
    expected = torch.cat([left, -right], 1) / 2 ** (1 / order)
    assert torch.allclose(two_halves(5, 5, norm), expected)
    assert torch.allclose(two_halves(5, 1, norm), two_halves(1, 5, norm).t())
    assert two_halves(1, 1, norm) == 1


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_window_is_odd_and_at_least_three_pixels_wide(norm):
    """The published sides on MNIST, from the start to the end of 10,000 queries."""
    draw = _Draws(ThreatModel(norm, 0.1), torch.zeros(1, 1, 28, 28), None)
    sides = [draw._window_size(0.8 / 2**k) for k in range(10)]
    assert sides == [(s, s) for s in (25, 19, 13, 9, 7, 5, 3, 3, 3, 3)]
    for shape, expected in (((1, 4, 4), (4, 4)), ((1, 1, 12), (1, 10)), ((1, 1, 2), (1, 2))):
        assert _Draws(ThreatModel(norm, 0.1), torch.zeros(1, *shape), None)._window_size(0.8) == expected


def test_square_l1_starts_at_projected_tiles():
    """25 tiles of norm 1 around the image's center, before the projection."""
    x = torch.full((3, 1, 28, 28), 0.5)
    start = _Draws(ThreatModel("l1", 30.0), x, torch.Generator().manual_seed(0)).tiles()
    moved = (start - x)[:, 0]
    assert torch.allclose(moved.abs().sum((1, 2)), torch.tensor(25.0))
    assert (moved[:, 1:26, 1:26] != 0).all()
    assert torch.equal((moved != 0).flatten(1).sum(1), torch.full((3,), 25 * 25))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("share", [0.8, 0.1, 0.002])
def test_square_move_mass_stays_in_ball_and_uses_full_radius(norm, share):
    """Away from the box bounds the full radius is used. l1: the projection may remove a window of little mass."""
    threat, x = ThreatModel(norm, 0.3), torch.full((20, 3, 9, 9), 0.5)
    draw = _Draws(threat, x, torch.Generator().manual_seed(0))
    z = draw.tiles()
    assert torch.allclose(threat.distance(z, x), torch.full((20,), 0.3), atol=1e-5)
    for _ in range(5):
        moved = draw.move_mass(z, share)
        assert (threat.distance(moved, x) <= 0.3 + 1e-5).all()
        assert (threat.distance(moved, x) >= 0.25).all()
        changed = (moved != z).flatten(1).any(1)
        assert changed.all() if norm == "l2" else changed.sum() >= 5
        z = moved


def l1_state(**changes):
    x, y = torch.tensor([[0.5, 0.5, 1.0, 0.5]]), torch.zeros(1, dtype=torch.long)
    values = {
        "rows": torch.arange(1),
        "x": x,
        "y": y,
        "loss": build_cross_entropy(Linear(4), x, y),
        "z": x.clone(),
        "best": torch.zeros(1, 4),
        "best_gradient": torch.zeros(1, 4),
        "best_loss": torch.zeros(1),
        "sparsity": torch.tensor([3.0]),
        "eta": torch.tensor([1.0]),
    }
    return _Climbing(**values | changes)


def test_l1_step_moves_largest_movable_entries():
    step = sparse_step(l1_state(), torch.tensor([[1.0, -3.0, 9.0, 2.0]]), ThreatModel("l1", 0.4))
    assert torch.allclose(step, torch.tensor([[0.0, -0.2, 0.0, 0.2]]))


@pytest.mark.parametrize(
    ("sparsity", "eta", "new_eta", "restarts"),
    [(4.0, 0.5, 1.0, True), (3.0, 0.6, 0.4, False), (2.0, 0.12, 0.1, False)],
)
def test_l1_step_is_reset_when_best_point_becomes_sparser(sparsity, eta, new_eta, restarts):
    """The best point differs from x in 3 coordinates. A ratio from 0.95 shortens the step by 1.5, down to 0.1."""
    best = torch.tensor([[0.4, 0.4, 1.0, 0.4]])
    state = l1_state(best=best, sparsity=torch.tensor([sparsity]), eta=torch.tensor([eta]))
    _adapt(state, torch.ones(1, 4))
    assert state.eta.item() == pytest.approx(new_eta)
    assert torch.equal(state.z, best if restarts else state.x)
    assert state.sparsity.item() == 3


def test_apgd_l1_phases_match_autoattack():
    """Three radii with 30, 30 and 40 steps. Each phase also evaluates its start, as AutoAttack does."""
    assert phases(100) == [(3.0, 30), (2.0, 30), (1.0, 40)]
    assert phases(5) == [(3.0, 2), (2.0, 2), (1.0, 1)]
    model, sizes = Linear(6), []
    model.register_forward_hook(lambda module, inputs, logits: sizes.append(len(logits)))
    x, y = torch.rand(8, 6), torch.ones(8, dtype=torch.long)
    model.bias.data.fill_(100.0)
    AutoPGD("ce").find_failures(model, x, y, ThreatModel("l1", 0.1), torch.Generator().manual_seed(0))
    assert sizes == [8] * 103


def test_eot_breaks_noisy_model_at_linear_worst_case():
    """A stochastic linear model: the mean over draws has the worst case of the plain one."""
    model, x, y, is_broken = linear_problem()

    class Noisy(nn.Module):
        def forward(self, z):
            return model(z + 0.3 * torch.randn_like(z))

    threat = ThreatModel("linf", 0.15)
    (attack,) = build_suite("eot-apgd-ce-50x30")
    _, fooled = attack.find_failures(Noisy(), x, y, threat, torch.Generator().manual_seed(0))
    assert int((fooled ^ is_broken(threat)).sum()) <= 5


def test_apgd_checkpoints_match_paper():
    """Croce & Hein 2020, section 3.2: p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_square_window_schedule_matches_paper():
    """Section 4.1: halved at queries 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000, for any budget."""
    assert window_share(10, 0.8) == 0.8
    assert window_share(11, 0.8) == 0.4
    assert window_share(501, 0.8) == 0.05
    assert window_share(5_000, 0.8) == pytest.approx(0.8 / 128)
    assert window_share(9_000, 0.8) == pytest.approx(0.8 / 512)


def test_dlr_losses_are_invariant_to_logit_scale():
    """Oracle: eq. 6 and 7 with sorted logits, in float64."""
    z, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 6, (20,))
    target = (y + 1) % 6
    for row, label, t, value, towards in zip(
        z, y, target, dlr(z, y), targeted_dlr(z, y, target), strict=True
    ):
        order = row.sort(descending=True).values
        other = max(float(row[k]) for k in range(6) if k != label)
        assert float(value) == pytest.approx(-(float(row[label]) - other) / float(order[0] - order[2]))
        spread = float(order[0] - (order[2] + order[3]) / 2)
        assert float(towards) == pytest.approx(-float(row[label] - row[t]) / spread)
    assert torch.allclose(dlr(1e4 * z, y), dlr(z, y))


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_dlr_losses_are_finite_with_few_classes(classes):
    z, y = torch.randn(9, classes), torch.randint(0, classes, (9,))
    for value in (dlr(z, y), targeted_dlr(z, y, (y + 1) % classes)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", ["apgd-ce-20", "apgd-t-20", "square-200", "eot-apgd-dlr-5x2"])
def test_search_does_not_change_model_or_rng_state(name):
    model = Busy().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(5, 1, 8, 8)
    random = torch.get_rng_state()
    (attack,) = build_suite(name)
    generator = torch.Generator().manual_seed(0)
    attack.find_failures(model, x, torch.arange(5), ThreatModel("linf", 0.3), generator)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_standard_suite_is_as_strong_as_pgd_also_with_rescaled_logits(tmp_path):
    """Logits times 10,000 saturate the cross-entropy: PGD sees no gradient where apgd-t sees through."""
    recipe = digits_recipe("training.epochs=6", "model.name=mlp")
    data = digits_data(recipe)
    model, _ = train_here(recipe, tmp_path, data)

    class Rescaled(nn.Module):
        def forward(self, x):
            return 1e4 * model(x)

    split, threat = data.test.take(torch.arange(120).numpy()), ThreatModel("linf", 0.1)

    def robust(network, names):
        result = attack_samples(
            network, split, build_suite(names), threat, seed=0, batch_size=60, device=torch.device("cpu")
        )
        return int(result.robust.sum())

    honest = robust(model, "standard")
    assert honest <= robust(model, "pgd-50x2") + 1
    assert robust(model, "standard,square-500") <= honest
    assert robust(Rescaled(), "pgd-50x2") > honest + 10
    assert robust(Rescaled(), "standard") <= honest + 2


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.1), ThreatModel("l1", 0.5)], ids=str)
def test_batches_are_refilled_as_samples_are_broken(name, threat):
    """No pass exceeds the batch size. The last passes on the robust samples use as few batches as possible."""
    linear, x, y, _ = linear_problem(100)
    sizes = []

    class Counting(nn.Module):
        def forward(self, z):
            sizes.append(len(z))
            return linear(z)

    (attack,) = build_suite(name)
    _, fooled = attack.find_failures(
        Counting(), x, y, threat, torch.Generator().manual_seed(0), batch_size=20
    )
    standing = int((~fooled).sum())
    assert 0 < standing < 80, "the test needs a batch's worth that fall, and some that stand"
    assert max(sizes) == 20
    assert sum(sizes[-math.ceil(standing / 20) :]) == standing


def test_advance_uses_minimal_number_of_batches():
    """Oracle: samples that are broken at known steps."""
    ends = torch.randint(1, 30, (95,), generator=torch.Generator().manual_seed(0))

    @dataclass
    class Known(State):
        ends: Tensor
        box: Projection
        ball: Projection

    x, far, shares = torch.rand(95, 3), 2 * torch.rand(95, 3), torch.rand(95)
    box, ball = (ThreatModel(norm, 0.5).with_radius_scale(shares).projection(x) for norm in ("linf", "l2"))
    batches = [Known(rows, ends[rows], box.take(rows), ball.take(rows)) for rows in parts(ends, 10)]
    for number in range(1, 31):
        batches = advance(batches, lambda state, number=number: state.take(state.ends > number), 10)
        rows = torch.cat([state.rows for state in batches]) if batches else torch.empty(0, dtype=torch.long)
        assert sorted(rows.tolist()) == (ends > number).nonzero().flatten().tolist()
        assert len(batches) == -(-len(rows) // 10)
        assert all(0 < len(state) <= 10 for state in batches)
        for state in batches:
            assert torch.equal(state.ends, ends[state.rows])
            for found, whole in ((state.box, box), (state.ball, ball)):
                assert torch.equal(found(far[state.rows]), whole(far)[state.rows])


def test_square_skips_query_when_window_changes_nothing():
    model, asked = Linear(1), []

    class Counting(nn.Module):
        def forward(self, z):
            asked.append(z.clone())
            return model(z)

    x = torch.full((1, 1), 0.5)
    y = model(x).argmax(1)
    Square(40).find_failures(Counting(), x, y, ThreatModel("linf", 1e-6), torch.Generator().manual_seed(0))
    assert 2 <= len(asked) < 40


def test_targeted_apgd_targets_next_most_likely_class_each_round():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.tensor([[5.0, 1.0, 4.0, 2.0]]) + 0 * x.sum(1, keepdim=True)

    targeted, x, y = AutoPGD("t"), torch.rand(2, 3), torch.zeros(2, dtype=torch.long)
    targets = [targeted._loss(Fixed(), x, y, number) for number in range(4)]
    assert [loss.context[1].tolist() for loss in targets[:3]] == [[2, 2], [3, 3], [1, 1]]
    assert targets[3] is None


def test_square_attacks_tabular_inputs():
    model, x, y, _ = linear_problem(10)
    split = ArraySplit(x.numpy(), y.numpy())
    result = attack_samples(
        model,
        split,
        [Square(300)],
        ThreatModel("linf", 0.1),
        seed=0,
        batch_size=4,
        device=torch.device("cpu"),
    )
    assert result.attacks[0].name == "square-300"


def test_recipes_know_the_attacks_that_can_be_built():
    assert BUDGETS.keys() == SEARCHES.keys()


def test_build_suite_resolves_names_and_keeps_order():
    assert [a.name for a in build_suite("standard")] == ["apgd-ce-100", "apgd-t-100x9"]
    assert [a.name for a in build_suite("quick")] == ["pgd-20"]
    assert [a.name for a in build_suite("rand")] == [
        "eot-apgd-ce-100x20",
        "eot-apgd-dlr-100x20",
        "eot-square-1000x20",
    ]
    shared = ["fab-t-100x9", "square-5000"]
    assert [a.name for a in build_suite("autoattack", "l2")] == ["apgd-ce-100", "apgd-t-100x9", *shared]
    assert [a.name for a in build_suite("autoattack", "l1")] == ["apgd-ce-100x5", "apgd-t-100x5", *shared]
    assert [a.name for a in build_suite("apgd-ce,standard", "l1")] == [
        "apgd-ce-100",
        "apgd-ce-100x5",
        "apgd-t-100x5",
    ]
    names = [a.name for a in build_suite("pgd-10x3, apgd-dlr-50, apgd-t-30x4, square-100")]
    assert names == ["pgd-10x3", "apgd-dlr-50", "apgd-t-30x4", "square-100"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("standart", "did you mean 'standard'"),
        ("apgd-c", "did you mean 'apgd-ce'"),
        ("pgd-0", "no such budget"),
        ("square-5x5", "no such budget"),
    ],
)
def test_build_suite_rejects_unknown_names_and_budgets(names, message):
    with pytest.raises(UserError, match=message):
        build_suite(names)
    with pytest.raises(UserError, match="suite"):
        digits_recipe(f"evaluation.suite={names}")


def test_carlini_wagner_rejects_linf_threat():
    with pytest.raises(UserError, match="small l2 changes, not linf"):
        CarliniWagner(10).find_failures(
            Linear(3), torch.rand(1, 3), torch.zeros(1, dtype=torch.long), ThreatModel("linf", 0.1)
        )
