"""RayS: search over directions that needs only the predicted class (Chen & Gu 2020).

arXiv 2006.12792, algorithm 3. A direction is a vector of signs. Its radius is the smallest t at which x + t signs,
clipped to the box, is misclassified. The search flips the signs of ever smaller blocks, and keeps a flip if the model
is already fooled at the best radius so far. Since no score is used, scores that say nothing cannot mislead it.

Deviation: the paper is for linf. In l2 and l1 the same points are tried, and count where they lie in the ball.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advtrain.attacks.active_batches import Failures, State, advance, parts
from advtrain.attacks.base import InputSearch, attack_mode, predictions
from advtrain.attacks.checks import checked
from advtrain.threat import ThreatModel

#: The radius of a direction is bisected to this precision, as a fraction of the box.
PRECISION = 1e-3


class RayS(InputSearch):
    """RayS attack with a budget of queries."""

    kind = "rays"

    def __init__(self, num_queries: int = 2000) -> None:
        self.num_queries, self.num_rounds = num_queries, 1

    @property
    def cost(self) -> int:
        """Largest number of forward passes of a sample."""
        return self.num_queries

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"rays-{self.num_queries}"

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x_adv (N, ...), fooled (N,) bool); the generator is not used."""
        model, failures, searching = checked(model, x, y, threat), Failures(x), []
        for rows in parts(x, batch_size):
            searching.append(_begin(rows, x[rows], y[rows], threat.high - threat.low))

        def step(state: _Search) -> _Search:
            signs, radius = state.proposal()
            moved = state.x.flatten(1) + radius[:, None] * signs
            z = moved.clamp_(threat.low, threat.high).view_as(state.x)
            logits = model(z).float()
            fooled = predictions(logits) != state.y
            limit = threat.rows(state.rows).per_sample(threat.eps, radius)
            inside = fooled & (threat.distance(z, state.x) <= limit)
            failures.keep(state.rows[inside], state.y[inside], z[inside], logits[inside])
            state.note(signs, radius, fooled, PRECISION * (threat.high - threat.low))
            return state.without(inside.nonzero().flatten())

        with attack_mode(model), torch.no_grad():
            for _ in range(self.num_queries):
                searching = advance(searching, step, batch_size)
        return failures.x_adv, failures.fooled


@dataclass
class _Search(State):
    """State of the samples that are still robust; D is the number of elements of a sample."""

    x: Tensor  # (n, ...): clean inputs
    y: Tensor  # (n,) int64
    signs: Tensor  # (n, D): best direction so far
    radius: Tensor  # (n,): radius of that direction
    block: Tensor  # (n,) int64: the block to flip, counted over all levels: 1, then 2 and 3, then 4 to 7, ...
    bisecting: Tensor  # (n,) bool: the radius of `signs` is being bisected
    floor: Tensor  # (n,): largest radius that is known not to fool the model, while bisecting

    def proposal(self) -> tuple[Tensor, Tensor]:
        """Return the direction (n, D) and the radius (n,) to ask for."""
        size = self.signs.shape[1]
        level = 2 ** torch.log2(self.block.double()).floor().long()  # number of blocks of this level
        first, last = (
            (self.block - level + end) * size // level for end in (0, 1)
        )  # a block is [first, last)
        place = torch.arange(size, device=self.signs.device)
        flip = (place >= first[:, None]) & (place < last[:, None]) & ~self.bisecting[:, None]
        middle = (self.floor + self.radius) / 2
        return torch.where(flip, -self.signs, self.signs), torch.where(self.bisecting, middle, self.radius)

    def note(self, signs: Tensor, radius: Tensor, fooled: Tensor, precision: float) -> None:
        """Advance the search with the answers (n,) bool to a proposal."""
        self.floor = torch.where(self.bisecting, torch.where(fooled, self.floor, radius), 0.0)
        self.signs = torch.where(fooled[:, None], signs, self.signs)
        self.radius = torch.where(fooled, radius, self.radius)
        going = (self.bisecting | fooled) & (self.radius - self.floor > precision)
        self.block = torch.where(going, self.block, self.block + 1)
        # After the level of single elements the search begins again with the largest block.
        self.block = torch.where(self.block >= 2 * self.signs.shape[1], 1, self.block)
        self.bisecting = going


def _begin(rows: Tensor, x: Tensor, y: Tensor, span: float) -> _Search:
    n, device = len(rows), x.device
    return _Search(
        rows,
        x,
        y,
        signs=torch.ones_like(x.flatten(1)),
        radius=torch.full((n,), span, device=device),
        block=torch.ones(n, dtype=torch.int64, device=device),
        bisecting=torch.zeros(n, dtype=torch.bool, device=device),
        floor=torch.zeros(n, device=device),
    )
