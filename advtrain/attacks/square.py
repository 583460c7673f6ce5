"""Square attack: random search that needs only logits (Andriushchenko et al. 2020).

arXiv 1912.00049; linf, l2 and l1. Every proposal changes a square window, and is kept if it lowers the margin
(algorithm 1). It needs no gradient, so it also works on models with masked gradients.

- linf: each channel of the window is set to the lower or the upper bound of B(x), at random (algorithm 2).
- l2: a pattern with a positive and a negative half is added in one window. The perturbation of another window is
  removed, so that the norm stays within the radius (algorithm 3).
- l1: as l2, with sums of absolute values, steeper patterns, and the exact projection onto ball and box (Croce & Hein
  2021, arXiv 2103.01208).

As in AutoAttack, the window is halved at fixed queries, whatever the budget. `docs/explanation/deviations.md` lists the
deviations from the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advtrain.attacks.active_batches import Failures, State, advance, parts
from advtrain.attacks.base import InputSearch, attack_mode
from advtrain.attacks.checks import checked
from advtrain.attacks.draws import MeanOfDraws
from advtrain.attacks.losses import margin
from advtrain.threat import ThreatModel

#: Queries after which the window's fraction of the image is halved (section 4.1).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: l2, l1: number of tiles along each side of the initial perturbation, and the smallest side of a window.
TILES, SMALLEST = 5, 3
#: Exponent of the pattern's rings: eq. 3 for l2, the authors' code for l1.
EXPONENTS = {"l2": 2, "l1": 4}

Size = tuple[int, int]


def window_share(query: int, start: float) -> float:
    """Return the area of the window at a query, as a fraction of the image."""
    return float(start / 2 ** sum(query > at for at in HALVINGS))


def hill(height: int, width: int, norm: str) -> Tensor:
    """Return eta^(h1, h2) of eq. 3, (height, width), with l2 or l1 norm 1.

    Its rings increase inwards as sums of 1 / (n + 1 - k)^2 for l2, and ^4 for l1.
    """
    row, column = torch.arange(height)[:, None], torch.arange(width)[None]
    outwards = torch.maximum((row - height // 2).abs(), (column - width // 2).abs())
    terms = torch.arange(max(height, width) // 2 + 1, 0, -1, dtype=torch.float64) ** -EXPONENTS[norm]
    pattern = terms.cumsum(0).flip(0)[outwards]
    return (pattern / _length(pattern.flatten(), norm)).float()


def two_halves(height: int, width: int, norm: str) -> Tensor:
    """Return a positive next to a negative hill of equal norm, (height, width), with norm 1."""
    if width < 2:
        return hill(1, 1, norm) if height < 2 else two_halves(width, height, norm).t().contiguous()
    left = width // 2
    pattern = torch.cat([hill(height, left, norm), -hill(height, width - left, norm)], dim=1)
    return pattern / _length(pattern.flatten(), norm)


def _length(flat: Tensor, norm: str) -> Tensor:
    """Return the l2 or l1 norm over the last dimension, above 0."""
    length = flat.norm(dim=-1) if norm == "l2" else flat.abs().sum(-1)
    return length.clamp_min(1e-12)


class Square(InputSearch):
    """Square attack with a budget of queries, each the mean over `num_draws` passes."""

    kind = "square"

    def __init__(self, num_queries: int = 5000, start_share: float = 0.8, num_draws: int = 1) -> None:
        self.num_queries, self.start_share, self.num_rounds = num_queries, start_share, 1
        self.num_draws = num_draws

    @property
    def cost(self) -> int:
        """Largest number of forward passes of a sample."""
        return self.num_queries * self.num_draws

    @property
    def name(self) -> str:
        """Name in the report."""
        if self.num_draws > 1:
            return f"eot-square-{self.num_queries}x{self.num_draws}"
        return f"square-{self.num_queries}"

    def find_failures(
        self,
        model: nn.Module,
        x: Tensor,  # (N, C, H, W), or (N, F) as an image of one row
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        number: int = 0,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x_adv (N, ...), fooled (N,) bool)."""
        model = checked(model, x, y, threat)
        failures, shape = Failures(x), x.shape[1:]
        model = MeanOfDraws(model, self.num_draws) if self.num_draws > 1 else model
        x = x if x.dim() == 4 else x.flatten(1)[:, None, None]
        searching = []
        for rows in parts(x, batch_size):
            draws = _Draws(threat, x[rows], generator)
            best = torch.full((len(rows),), float("inf"), device=x.device)
            searching.append(_Search(rows, y[rows], draws, draws.start(), best))
        with attack_mode(model), torch.no_grad():
            first = searching[0].z.view(-1, *shape)
            steady = torch.equal(model(first), model(first))  # a stochastic model runs on all points
            for query in range(self.num_queries):
                share = window_share(query, self.start_share) if query else None

                def step(state: _Search, share: float | None = share) -> _Search:
                    asked, tried = state.draws.change(state.z, share, steady)
                    if len(asked) == 0:
                        return state
                    y, logits = state.y[asked], model(tried.view(-1, *shape)).float()
                    value = -margin(logits, y)
                    better = value < state.best[asked]
                    state.z[asked[better]], state.best[asked[better]] = tried[better], value[better]
                    new = failures.keep(state.rows[asked], y, tried, logits)
                    return state.without(asked[new])

                searching = advance(searching, step, batch_size)
        return failures.x_adv, failures.fooled


@dataclass
class _Search(State):
    """State of the samples that are still robust."""

    y: Tensor
    draws: _Draws  # holds the clean inputs
    z: Tensor  # (n, C, H, W): best point so far
    best: Tensor  # (n,): margin of the label at z


class _Draws:
    """Random perturbations around clean inputs x (N, C, H, W)."""

    def __init__(self, threat: ThreatModel, x: Tensor, generator: torch.Generator | None) -> None:
        self.threat, self.x, self.generator = threat, x, generator
        self.project = threat.projection(x)

    def take(self, index: Tensor) -> _Draws:
        """Return the draws of the samples `index`."""
        return _Draws(self.threat, self.x[index], self.generator)

    def join(self, others: Sequence[_Draws]) -> _Draws:
        """Return the draws of these samples followed by those of `others`."""
        return _Draws(self.threat, torch.cat([self.x, *(other.x for other in others)]), self.generator)

    def start(self) -> Tensor:
        """Return the initial points (N, C, H, W)."""
        return self.stripes() if self.threat.norm == "linf" else self.tiles()

    def change(self, z: Tensor, share: float | None, steady: bool) -> tuple[Tensor, Tensor]:
        """Return the indices (M,) int64 of changed samples and their new points (M, C, H, W).

        If `share` is None (the first query), return all samples with their points z unchanged.
        """
        if share is not None and self.threat.norm == "linf":
            return self.window(z, share, steady)
        return torch.arange(len(z), device=z.device), z if share is None else self.move_mass(z, share)

    def stripes(self) -> Tensor:
        """Return the linf start: stripes one pixel wide, with a sign per stripe and channel."""
        n, channels, _, width = self.x.shape
        return self.project(self.x + self.threat.eps * self._signs((n, channels, 1, width)))

    def tiles(self) -> Tensor:
        """Return the l2 or l1 start: TILES x TILES patterns with random signs and orientations.

        l2: scaled to the radius. l1: projected.
        """
        n, channels, height, width = self.x.shape
        delta = torch.zeros_like(self.x)
        tall, wide = max(1, height // TILES), max(1, width // TILES)
        for top in range(max(0, height - TILES * tall) // 2, height - tall + 1, tall):
            for left in range(max(0, width - TILES * wide) // 2, width - wide + 1, wide):
                delta[:, :, top : top + tall, left : left + wide] = self._pattern((tall, wide))
        if self.threat.norm == "l2":
            delta *= self.threat.eps / self._length(delta.flatten(1)).view(-1, 1, 1, 1)
        return self.project(self.x + delta)

    def window(self, z: Tensor, share: float, steady: bool) -> tuple[Tensor, Tensor]:
        """Return the linf proposal: a window per sample, each channel at a bound of B(x).

        A small window often has these values already, and the point does not change. If the model is `steady`
        (deterministic), such a sample is left out, because its output is known.
        """
        n, channels, height, width = z.shape
        tall, wide = self._window_size(share)
        rows = self._corner(height - tall) + torch.arange(tall, device=z.device)
        columns = self._corner(width - wide) + torch.arange(wide, device=z.device)
        window = (rows[:, :, None] * width + columns[:, None]).view(n, 1, -1).expand(-1, channels, -1)
        up = self._signs((n, channels, 1)) > 0
        lower, upper = (end.flatten(2).gather(2, window) for end in self.project.known)
        ends, held = torch.where(up, upper, lower), z.flatten(2)
        changed = (ends != held.gather(2, window)).flatten(1).any(1)
        asked = changed.nonzero().flatten() if steady else torch.arange(n, device=z.device)
        moved = held[asked].scatter_(2, window[asked], ends[asked])  # indexing copies z
        return asked, moved.view(-1, channels, height, width)

    def move_mass(self, z: Tensor, share: float) -> Tensor:
        """Return the l2 or l1 proposal: z with a pattern added in one window.

        The window's new norm combines the old norms of two windows and the unused part of the radius. The other window
        is set to 0. As in AutoAttack, l1 multiplies the new norm by the number of channels before the projection.
        """
        n, channels, height, width = z.shape
        tall, wide = self._window_size(share)
        delta = z - self.x
        first, second = (self._window(height, width, (tall, wide)) for _ in range(2))
        here = torch.zeros((n, 1, height, width), dtype=torch.bool, device=z.device)
        here[first] = True
        here[second] = True
        power, factor = (2, 1) if self.threat.norm == "l2" else (1, channels)
        unused = (self.threat.eps**power - self._length(delta.flatten(1)) ** power).clamp_min(0)
        held = self._length((delta * here).flatten(2)) ** power  # (N, C)
        available = factor * (held + unused.unsqueeze(1) / channels) ** (1 / power)
        old = delta[self._channels(first, channels)]
        old = old / self._length(old.flatten(2))[..., None, None]
        new = old + self._pattern((tall, wide))
        new = new / self._length(new.flatten(2))[..., None, None]
        delta[self._channels(second, channels)] = 0
        delta[self._channels(first, channels)] = new * available[..., None, None]
        return self.project(self.x + delta)

    def _pattern(self, size: Size) -> Tensor:
        """Return a pattern with a sign per channel and an orientation per sample, (N, C, tall, wide)."""
        n, channels = self.x.shape[:2]
        pattern = two_halves(*size, self.threat.norm).to(self.x)
        if size[0] == size[1]:
            pattern = torch.where(self._signs((n, 1, 1, 1)) > 0, pattern, pattern.t())
        return pattern * self._signs((n, channels, 1, 1))

    def _window_size(self, share: float) -> Size:
        height, width = self.x.shape[2:]
        side = max(1, round(math.sqrt(share * height * width)))
        if self.threat.norm != "linf":
            side = max(side, SMALLEST) | 1  # odd
        side = min(side, max(height, width))
        if side <= min(height, width):
            return side, side
        tall = min(side, height)  # a strip of the same area, if it fits
        return tall, min(max(1, round(share * height * width / tall)), width)

    def _window(self, height: int, width: int, size: Size) -> tuple[Tensor, ...]:
        """Return an index that selects a random window per sample from a tensor (N, 1, H, W).

        The selected values have the shape (N, 1, tall, wide).
        """
        n, device = len(self.x), self.x.device
        rows = self._corner(height - size[0]) + torch.arange(size[0], device=device)
        columns = self._corner(width - size[1]) + torch.arange(size[1], device=device)
        samples = torch.arange(n, device=device)[:, None, None, None]
        return samples, torch.zeros_like(samples), rows[:, None, :, None], columns[:, None, None, :]

    def _channels(self, window: tuple[Tensor, ...], channels: int) -> tuple[Tensor, ...]:
        """Return the index of the same window in all channels, which selects (N, C, tall, wide)."""
        samples, _, rows, columns = window
        return samples, torch.arange(channels, device=self.x.device)[None, :, None, None], rows, columns

    def _length(self, flat: Tensor) -> Tensor:
        return _length(flat, self.threat.norm)

    def _corner(self, room: int) -> Tensor:
        size = (len(self.x), 1)
        return torch.randint(0, room + 1, size, generator=self.generator, device=self.x.device)

    def _signs(self, shape: tuple[int, ...]) -> Tensor:
        draw = torch.randint(0, 2, shape, generator=self.generator, device=self.x.device)
        return (2 * draw - 1).to(self.x.dtype)
