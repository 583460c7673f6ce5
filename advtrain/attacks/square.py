"""Square: random search that asks for logits only (Andriushchenko et al. 2020, arXiv 1912.00049), for linf.

Every change is a square window whose pixels go to one end of the ball, a sign for each channel; a change stays if it
lowers the margin (algorithm 1 and 2). It needs no gradient, so it sees through models that hide theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from advtrain.attacks.base import attacked, predictions
from advtrain.attacks.losses import margin
from advtrain.lookup import UserError
from advtrain.threat import ThreatModel

#: Queries, of 10,000, after which the window's share of the image is halved (section 4.1).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def window_share(query: int, num_queries: int, start: float) -> float:
    """Return the share of the image that a window covers at a query."""
    scaled = query * 10_000 / num_queries
    halvings = sum(scaled > at for at in HALVINGS)
    return float(start / 2**halvings)


class Square:
    """The attack with its budget."""

    def __init__(self, num_queries: int = 5000, start_share: float = 0.8) -> None:
        self.num_queries, self.start_share, self.num_rounds = num_queries, start_share, 1

    @property
    def name(self) -> str:
        """As the report shows it."""
        return f"square-{self.num_queries}"

    def check(self, threat: ThreatModel, shape: tuple[int, ...] = ()) -> None:
        """Refuse, with a UserError, a norm that it does not search."""
        if threat.norm != "linf":
            raise UserError(f"square searches linf balls, not {threat.norm}; leave it out of the suite")

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,  # (N, C, H, W), or (N, F): a strip of one row
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return (x_adv (N, ...), fooled (N,) bool).

        Raises:
            UserError: the norm is not linf.
        """
        self.check(threat)
        found, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        with attacked(model), torch.no_grad():
            self._search(model, x, y, threat, generator, (found, fooled))
        return found, fooled

    def _search(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
        kept: tuple[Tensor, Tensor],
    ) -> None:
        found, fooled = kept
        rows, shape = torch.arange(len(x), device=x.device), x.shape[1:]
        flat = x if x.dim() == 4 else x.flatten(1)[:, None, None]
        channels, height, width = flat.shape[1:]
        # Vertical stripes one pixel wide, a sign for each stripe and channel.
        stripes = self._signs((len(x), channels, 1, width), x, generator)
        z = threat.project((flat + threat.eps * stripes).view_as(x), x)
        best = torch.full((len(x),), float("inf"), device=x.device)
        candidate = z
        for query in range(self.num_queries):
            logits = model(candidate).float()
            value = -margin(logits, y)
            better = value < best
            best = torch.where(better, value, best)
            z = torch.where(better.view(-1, *[1] * len(shape)), candidate, z)
            new = predictions(logits) != y
            if new.any():
                found[rows[new]], fooled[rows[new]] = candidate[new], True
                going = ~new
                x, y, z, best, rows = x[going], y[going], z[going], best[going], rows[going]
            if len(rows) == 0:
                return
            candidate = self._change(z, x, query + 1, (channels, height, width), threat, generator)

    def _change(
        self,
        z: Tensor,
        x: Tensor,
        query: int,
        shape: tuple[int, int, int],
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return z with one window of each sample moved by +-2 eps, back inside the ball: at one of its ends."""
        channels, height, width = shape
        share = window_share(query, self.num_queries, self.start_share)
        side = max(1, round(math.sqrt(share * height * width)))
        tall, wide = min(side, height), min(max(1, round(share * height * width / min(side, height))), width)
        n = len(z)

        def corner(room: int) -> Tensor:
            return torch.randint(0, room + 1, (n, 1), generator=generator, device=z.device)

        row, column = torch.arange(height, device=z.device), torch.arange(width, device=z.device)
        top, left = corner(height - tall), corner(width - wide)
        inside = ((row >= top) & (row < top + tall))[:, None, :, None]
        inside = inside & ((column >= left) & (column < left + wide))[:, None, None, :]
        signs = self._signs((n, channels, 1, 1), z, generator)
        moved = z.view(n, *shape) + 2 * threat.eps * signs * inside
        return threat.project(moved.view_as(z), x)

    def _signs(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        draw = torch.randint(0, 2, shape, generator=generator, device=like.device)
        return (2 * draw - 1).to(like.dtype)
