"""Exact projections onto the intersection of an l2 or l1 ball with a box.

Arguments: z (N, ...), any points; x (N, ...) in [low, high], the centers; radius, a number or (N, 1), one for each
sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

Radius = float | Tensor


def project_l1(z: Tensor, x: Tensor, radius: Radius, low: float, high: float) -> Tensor:
    """Return the point of the l1 ball and the box that is nearest to `z`, (N, ...).

    The KKT conditions give |y_i - x_i| = min(max(|d_i| - m, 0), r_i). Here d = z - x, r is the distance to the box
    boundary on d's side, and m >= 0 is the least multiplier with sum_i |y_i - x_i| <= radius. The sum is piecewise
    linear in m with a bend at each |d_i| and each |d_i| - r_i. The bends are sorted, and m is computed between the two
    where the sum passes the radius (Duchi et al. 2008, generalized to the box). Computed in float64.
    """
    d = (z - x).flatten(1).double()
    length = d.abs()
    room = torch.where(d > 0, high - x.flatten(1), x.flatten(1) - low).double()
    bends = torch.cat([length, (length - room).clamp_min(0)], 1)
    signs = torch.cat([torch.ones_like(length), -torch.ones_like(length)], 1)
    bends, order = bends.sort(dim=1, descending=True)
    signs = signs.gather(1, order)
    total_slope, total = signs.cumsum(1), (signs * bends).cumsum(1)
    eps = torch.as_tensor(radius, dtype=torch.float64, device=x.device)
    at_bend = total - bends * total_slope  # the sum at m = bend; it does not decrease along the row
    passed = (at_bend < eps).sum(1, keepdim=True)
    last = (passed - 1).clamp_min(0)
    # An integer; 0 where the coordinates inside the box sum to the radius exactly.
    slope = total_slope.gather(1, last)
    m = torch.where(slope > 0, (total.gather(1, last) - eps) / slope.clamp_min(1), bends.gather(1, last))
    m = torch.where(passed == 0, bends[:, :1], m.clamp_min(0))  # radius 0: nothing moves
    m = torch.where(total[:, -1:] <= eps, 0, m)
    kept = torch.minimum((length - m).clamp_min(0), room)
    return (x + (d.sign() * kept).to(x.dtype).view_as(x)).clamp_(low, high)


def project_l2(z: Tensor, x: Tensor, radius: Radius, low: float, high: float) -> Tensor:
    """Return the point of the l2 ball and the box that is nearest to `z`, (N, ...).

    The KKT conditions give y(s) = clip(x + s (z - x)) for one s in (0, 1] per sample, the largest with
    ||y(s) - x|| <= radius. Clipping first and scaling then, or the reverse, gives another point. With r the distance to
    the box boundary on the side of d = z - x, ||y(s) - x||^2 = sum min(s |d|, r)^2. Each round fixes the coordinates
    that are at the boundary and solves for s on the others. s only grows, and the rounds end with the exact s as soon
    as no further coordinate reaches the boundary.
    """
    d = z - x
    length = d.flatten(1).abs()
    room = torch.where(d > 0, high - x, x - low).flatten(1)
    # Scaled to a longest coordinate of 1: squares of tiny differences must not underflow.
    unit = length.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    length, room, eps = length / unit, room / unit, radius / unit
    s = (eps / length.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)
    while True:
        walled = s * length >= room
        rest = torch.where(walled, 0, length).square().sum(1, keepdim=True)
        left = (eps.square() - torch.where(walled, room, 0).square().sum(1, keepdim=True)).clamp_min(0)
        grown = torch.where(rest > 0, (left / rest.clamp_min(torch.finfo(x.dtype).tiny)).sqrt(), 1.0)
        grown = torch.maximum(s, grown.clamp_max(1.0))
        if torch.equal(grown * length >= room, walled):
            break
        s = grown
    return (x + grown.view(-1, *[1] * (x.dim() - 1)) * d).clamp_(low, high)
