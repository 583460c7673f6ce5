"""The threat model against its defining properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from advtrain.errors import UserError
from advtrain.threat import ThreatModel, alongside

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
norms = st.sampled_from(["linf", "l2", "l1"])
radii = st.sampled_from([0.0, 1e-3, 8 / 255, 0.3, 1.0, 3.0])


@settings(max_examples=300, deadline=None)
@given(
    shape=shapes,
    norm=norms,
    eps=radii,
    spread=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
@example(shape=(2, 2), norm="l1", eps=1.0, spread=30.0, seed=2)  # the distance to one bound is exactly eps
def test_projection_is_the_nearest_point_of_ball_and_box(shape, norm, eps, spread, seed):
    """Oracle: p is the projection of z onto a convex set iff p is in it and (z - p)(w - p) <= 0 for all w in it.

    The points w are random points of the set and extreme ones, towards z.
    """
    generator = torch.Generator().manual_seed(seed)
    threat = ThreatModel(norm, eps)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, x.round(), x)  # bounds are the hard cases
    z = x + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    p = threat.project(z, x)
    assert p.min() >= 0
    assert p.max() <= 1
    assert threat.distance(p, x).max() <= eps * (1 + 1e-12) + 1e-14 * (1 + spread)
    witnesses = [x, threat.project(p + (z - p) * 1e3, x), threat.project(2 * p - x, x)]
    witnesses += [threat.random_start(x, generator) for _ in range(20)]
    for w in witnesses:
        product = ((z - p) * (w - p)).flatten(1).sum(1)
        assert product.max() <= 1e-9 * (1 + spread)


@settings(max_examples=50, deadline=None)
@given(shape=shapes, norm=norms, seed=st.integers(0, 10**6))
def test_projection_keeps_points_inside_ball_and_box(shape, norm, seed):
    generator = torch.Generator().manual_seed(seed)
    threat = ThreatModel(norm, 0.3)
    x = torch.rand(shape, generator=generator)
    inside = threat.random_start(x, generator)
    assert torch.allclose(threat.project(inside, x), inside, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes, norm=norms, eps=radii, spread=st.sampled_from([0.0, 1.0, 30.0]), seed=st.integers(0, 10**6)
)
def test_box_first_scales_clipped_point_into_ball(shape, norm, eps, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    threat = ThreatModel(norm, eps).with_radius_scale(torch.rand(shape[0], generator=generator))
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    z = x + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    p, clipped = threat.projection(x).box_first(z), z.clamp(0, 1)
    assert p.min() >= 0
    assert p.max() <= 1
    radius, far = eps * threat.radius_scale, threat.distance(clipped, x)
    assert (threat.distance(p, x) <= radius * (1 + 1e-6) + 1e-14).all()
    if norm != "l2":
        assert torch.equal(p, threat.project(z, x))
        return
    share = alongside(torch.where(far > radius, radius / far, 1.0), x)
    assert torch.allclose(p, x + share * (clipped - x), rtol=0, atol=1e-7)


def test_l2_projection_matches_bisection():
    """Oracle: the scale s of clip(x + s (z - x)) found by bisection, in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(64, 30, generator=generator, dtype=torch.float64)
    z = x + 2 * torch.randn(64, 30, generator=generator, dtype=torch.float64)
    low, high = torch.zeros(64, 1, dtype=torch.float64), torch.ones(64, 1, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        fits = ((x + middle * (z - x)).clamp(0, 1) - x).norm(dim=1, keepdim=True) <= 0.5
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    expected = (x + low * (z - x)).clamp(0, 1)
    assert torch.allclose(ThreatModel("l2", 0.5).project(z, x), expected, atol=1e-12)


def test_l1_projection_matches_quadratic_program():
    """Oracle: scipy's SLSQP on min |x + u - v - z|^2 with u, v >= 0, sum(u + v) <= eps, the point in the box."""
    import numpy as np
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    for eps in (0.1, 0.7, 2.0):
        for _ in range(6):
            x, z = rng.random(4), rng.random(4) * 3 - 1

            def objective(w, x=x, z=z):
                return ((x + w[:4] - w[4:] - z) ** 2).sum()

            limits = [
                {"type": "ineq", "fun": lambda w, eps=eps: eps - w.sum()},
                {"type": "ineq", "fun": lambda w, x=x: x + w[:4] - w[4:]},
                {"type": "ineq", "fun": lambda w, x=x: 1 - x - w[:4] + w[4:]},
            ]
            best = minimize(
                objective, np.zeros(8), bounds=[(0, None)] * 8, constraints=limits, options={"ftol": 1e-13}
            ).x
            ours = ThreatModel("l1", eps).project(torch.tensor(z)[None], torch.tensor(x)[None])[0]
            assert torch.allclose(ours, torch.tensor(x + best[:4] - best[4:]), atol=2e-5)


def test_l1_projection_is_soft_thresholding_away_from_box_bounds():
    """Oracle: the sorting algorithm of Duchi et al. 2008, figure 1, without a box."""
    x, d = torch.full((8, 20), 0.5, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64) / 20
    projected = ThreatModel("l1", 0.3).project(x + d, x) - x
    for row, got in zip(d, projected, strict=True):
        mu = row.abs().sort(descending=True).values
        rho = max(j for j in range(1, 21) if mu[j - 1] - (mu[:j].sum() - 0.3) / j > 0)
        theta = ((mu[:rho].sum() - 0.3) / rho).clamp_min(0)
        assert torch.allclose(got, row.sign() * (row.abs() - theta).clamp_min(0), atol=1e-12)


def test_l1_step_moves_largest_gradients_up_to_box_bounds():
    threat = ThreatModel("l1", 1.0)
    z, g = torch.tensor([[0.9, 0.0, 0.5, 0.5]]), torch.tensor([[5.0, -3.0, 1.0, 2.0]])
    assert torch.allclose(threat.step(z, g, 0.3), torch.tensor([[1.0, 0.0, 0.5, 0.7]]))
    assert torch.allclose(threat.step(z, g, 1.0), torch.tensor([[1.0, 0.0, 0.9, 1.0]]))
    assert torch.equal(threat.step(z, torch.zeros(1, 4), 1.0), z)


def test_l1_step_moves_at_least_one_percent_of_coordinates():
    g = torch.randn(2, 1000)
    moved = ThreatModel("l1", 1.0).step(torch.full((2, 1000), 0.5), g, 0.1) - 0.5
    assert (moved != 0).sum(1).tolist() == [10, 10]
    assert torch.allclose(moved.abs().sum(1), torch.full((2,), 0.1))
    assert set(moved[0].nonzero().flatten().tolist()) == set(g[0].abs().topk(10).indices.tolist())


def test_random_l1_starts_fill_the_ball_uniformly():
    """Oracle: for a uniform point of the d-ball, (r / eps)^d is uniform in [0, 1]."""
    x = torch.full((20_000, 3), 0.5)
    start = ThreatModel("l1", 0.1).random_start(x, torch.Generator().manual_seed(0))
    uniform = (ThreatModel("l1", 0.1).distance(start, x) / 0.1) ** 3
    assert uniform.max() <= 1 + 1e-5
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs((start - x).mean()) < 1e-3


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", float("inf"))])
def test_steepest_reaches_the_dual_norm(norm, dual):
    """Oracle: max over ||d|| <= 1 of g d is the dual norm of g."""
    g = torch.randn(5, 3, 4)
    direction = ThreatModel(norm, 1.0).steepest(g)
    assert torch.allclose((g * direction).flatten(1).sum(1), g.flatten(1).norm(p=dual, dim=1), rtol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steepest_handles_tiny_and_zero_gradients(norm):
    threat = ThreatModel(norm, 1.0)
    tiny = threat.steepest(torch.full((1, 4), 1e-30))
    assert torch.allclose(tiny, threat.steepest(torch.ones(1, 4)))
    assert torch.equal(threat.steepest(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_random_l2_starts_fill_the_ball_uniformly():
    """Oracle: for a uniform point of the d-ball, (r / eps)^d is uniform in [0, 1]."""
    x = torch.full((20_000, 3), 0.5)
    start = ThreatModel("l2", 0.1).random_start(x, torch.Generator().manual_seed(0))
    uniform = (ThreatModel("l2", 0.1).distance(start, x) / 0.1) ** 3
    assert uniform.max() <= 1 + 1e-5
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs((uniform < 0.1).float().mean() - 0.1) < 0.01


def test_random_start_uses_only_given_generator():
    before = torch.get_rng_state()
    ThreatModel("linf", 0.1).random_start(
        torch.rand(2, 3, generator=torch.Generator()), torch.Generator().manual_seed(3)
    )
    assert torch.equal(before, torch.get_rng_state())


def test_parse_and_str_keep_fractions_exact():
    threat = ThreatModel.parse("linf:8/255")
    assert threat.eps == 8 / 255
    assert str(threat) == "linf:8/255"
    assert str(ThreatModel.parse("l2:0.5")) == "l2:0.5"


@pytest.mark.parametrize("text", ["linf", "linf:x", "l7:0.1", "linf:8/0"])
def test_parse_rejects_invalid_threat_model(text):
    with pytest.raises(UserError, match="linf:8/255"):
        ThreatModel.parse(text)


def test_negative_radius_is_rejected():
    with pytest.raises(UserError, match="at least 0"):
        ThreatModel("linf", -0.1)


@settings(max_examples=60, deadline=None)
@given(norm=norms, eps=radii, seed=st.integers(0, 10**6), bounded=st.booleans())
def test_fixed_positions_do_not_affect_free_positions(norm, eps, seed, bounded):
    """Oracle: projection, step and direction of the free positions alone. Their number differs per sample."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (0.0, 1.0) if bounded else (-torch.inf, torch.inf)
    alone = ThreatModel(norm, eps, low, high)
    x = torch.rand(5, 2, 4, generator=generator, dtype=torch.float64)
    z, gradient = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    free = torch.rand(x.shape, generator=generator) < 0.6
    threat = ThreatModel(norm, eps, low, high, free=free)
    start = threat.random_start(x, generator)
    found = [threat.project(z, x), threat.step(x, gradient, 0.1), threat.steepest(gradient), start]
    found.append(threat.projection(x).box_first(z))
    assert all(torch.equal(f[~free], o[~free]) for f, o in zip(found, [x, x, 0 * x, x, x], strict=True))
    assert (threat.distance(start, x) <= eps * (1 + 1e-9) + 1e-15).all()
    for i in range(len(x)):
        if not (own := free[i]).any():
            continue
        here, there, g = (v[i][own][None] for v in (x, z, gradient))
        expected = [alone.project(there, here), alone.step(here, g, 0.1), alone.steepest(g)]
        for f, e in zip(found[:3], expected, strict=True):
            assert torch.allclose(f[i][own], e[0], atol=1e-12)
        rows = threat.rows(torch.tensor([i]))
        assert torch.equal(rows.project(z[i : i + 1], x[i : i + 1])[0], found[0][i])


@settings(max_examples=60, deadline=None)
@given(norm=norms, eps=radii, seed=st.integers(0, 10**6))
def test_token_group_gives_each_token_its_own_ball(norm, eps, seed):
    """Oracle: tokens as separate samples, each with the radius of its sample."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(3, generator=generator)
    threat = ThreatModel(norm, eps, radius_scale=scale, group="token")
    tokens = ThreatModel(norm, eps).with_radius_scale(scale.repeat_interleave(4))
    x = torch.rand(3, 4, 5, generator=generator)
    z, gradient = (torch.randn(x.shape, generator=generator) for _ in range(2))
    flat = [v.flatten(0, 1) for v in (z, x, gradient)]
    assert torch.equal(threat.project(z, x).flatten(0, 1), tokens.project(*flat[:2]))
    assert torch.equal(
        threat.projection(x).box_first(z).flatten(0, 1), tokens.projection(flat[1]).box_first(flat[0])
    )
    assert torch.equal(threat.step(x, gradient, 0.1).flatten(0, 1), tokens.step(flat[1], flat[2], 0.1))
    assert torch.equal(threat.steepest(gradient).flatten(0, 1), tokens.steepest(flat[2]))
    assert torch.equal(threat.distance(z, x), tokens.distance(*flat[:2]).view(3, 4).amax(1))
    taken = threat.projection(x).take(torch.tensor([2, 0]))
    assert torch.equal(taken(z[[2, 0]]), threat.project(z, x)[[2, 0]])
    parts = [threat.rows(part).projection(x[part]) for part in (slice(0, 1), slice(1, 3))]
    assert torch.equal(parts[0].join(parts[1:])(z), threat.project(z, x))
    start = threat.random_start(x, generator)
    assert (
        tokens.distance(start.flatten(0, 1), flat[1]) <= eps * tokens.radius_scale * (1 + 1e-5) + 1e-6
    ).all()


def test_token_group_rejects_inputs_without_tokens():
    with pytest.raises(UserError, match=r"a norm over tokens needs x \(N, L, ...\), not \(3, 4\)"):
        ThreatModel("l2", 1.0, group="token").project(torch.rand(3, 4), torch.rand(3, 4))


def test_random_start_fills_ball_of_free_positions():
    """With one free position the start is uniform in [-eps, eps] for l2 and linf."""
    x, free = torch.full((4000, 6), 0.5), torch.zeros(4000, 6, dtype=torch.bool)
    free[:, 2] = True
    for norm in ("l2", "l1", "linf"):
        threat = ThreatModel(norm, 0.1, free=free)
        delta = threat.random_start(x, torch.Generator().manual_seed(0))[:, 2] - 0.5
        expected = (1 / 12) ** 0.5 * 0.2 if norm != "l1" else None
        assert delta.abs().max() <= 0.1 + 1e-6
        if expected is not None:
            assert abs(float(delta.std()) - expected) < 0.003
