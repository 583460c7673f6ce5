"""Beam search over sets of edits, and random draws of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from advtrain.edits.candidates import Chosen
from advtrain.edits.problem import CHUNK, STALLED, WIDTH, Problem, Steps

#: Share of the budget of a restart, and fewest queries.
_RESTART_SHARE, _RESTART_LEAST = 8, 64
#: Fewest candidates of a round of draws: when few queries are left, most draws were sent before.
_FEWEST_DRAWS = 256


def beam(problem: Problem, first: int = 1) -> Steps[None]:
    """Search the radii from `first` to `at_most` until a text is misclassified.

    Single edits are ranked by their margins. For each radius, the best WIDTH sets of the radius before get one more
    edit, in the order of the ranking. Restarts begin at another edit with a random half of the edits. Draws from all
    candidates use the rest of the budget. Finally, edits that a misclassified candidate does not need are undone.

    Args:
        problem: its radii below `first` are proven.
        first: smallest radius.
    """
    if first == 1:
        yield from _rank(problem)
    if problem.broken is None and problem.at_most > 1 and problem.singles:
        ranked = sorted(problem.singles, key=lambda i: (problem.singles[i], i))
        yield from _grow(
            problem, problem.states.get(max(1, first - 1), []), ranked, max(2, first), problem.left
        )
        yield from _restart(problem, ranked)
    if problem.broken is None:
        yield from draws(problem)
    yield from _undo(problem)


def draws(problem: Problem) -> Steps[None]:
    """Draw candidates of 1 to `at_most` edits, all equally likely, within the budget.

    The search ends after STALLED rounds without a new text.
    """
    stalled = 0
    if problem.at_most == 1 and len(problem.singles) == len(problem.candidates.edits):
        return
    while problem.broken is None and problem.left > 0 and stalled < STALLED:
        before = problem.queries
        size = min(max(problem.left, _FEWEST_DRAWS), CHUNK)
        drawn = [problem.candidates.draw(problem.at_most, problem.generator) for _ in range(size)]
        yield from problem.query_all(problem.with_texts(drawn), problem.left)
        stalled = 0 if problem.queries > before else stalled + 1


def random_search(problem: Problem) -> Steps[None]:
    """Draw candidates, and undo the edits that a misclassified one does not need."""
    yield from draws(problem)
    yield from _undo(problem)


def expand(problem: Problem, states: Sequence[tuple[float, Chosen]], pool: Sequence[int]) -> Iterator[Chosen]:
    """Yield each state with one more edit of the pool, without repetitions.

    The first edits of the pool come first.
    """
    seen: set[Chosen] = set()
    for edit in pool:
        for _, chosen in states:
            if problem.candidates.fits(chosen, edit):
                grown = tuple(sorted((*chosen, edit)))
                if grown not in seen:
                    seen.add(grown)
                    yield grown


def _rank(problem: Problem) -> Steps[None]:
    """Search single edits: all if half of the budget suffices, else those of the best places."""
    edits = problem.candidates.edits
    share = problem.left if problem.at_most == 1 else (problem.left + 1) // 2
    if len(edits) <= share:
        yield from problem.query_all(problem.candidates.all(1), problem.left)
        return
    places: dict[tuple[int, int], list[int]] = {}
    for i, edit in enumerate(edits):
        places.setdefault((edit.low, edit.high), []).append(i)
    probes = [problem.generator.choice(each) for each in places.values()]
    problem.generator.shuffle(probes)
    before = problem.queries
    yield from problem.query_all(problem.with_texts((i,) for i in probes), share)
    best = sorted(problem.singles, key=lambda i: (problem.singles[i], i))
    others = [(j,) for i in best for j in places[edits[i].low, edits[i].high] if j not in problem.singles]
    yield from problem.query_all(problem.with_texts(others), share - (problem.queries - before))


def _grow(
    problem: Problem, states: Sequence[tuple[float, Chosen]], pool: Sequence[int], first: int, budget: int
) -> Steps[None]:
    """Add edits of the pool to the states, up to `at_most`; each radius has its share of the budget."""
    spent = problem.queries
    for size in range(first, problem.at_most + 1):
        left = min(problem.left, budget - (problem.queries - spent))
        if problem.broken is not None or left <= 0:
            return
        outer = problem.states.pop(size, [])
        quota = max(1, left // (problem.at_most - size + 1))
        yield from problem.query_all(problem.with_texts(expand(problem, states, pool)), quota)
        states = problem.states.get(size, [])
        problem.states[size] = sorted({*outer, *states})[:WIDTH]
        if not states:
            return


def _restart(problem: Problem, ranked: Sequence[int]) -> Steps[None]:
    """Search from other edits, those with low margins more often, until nothing is new."""
    generator, stalled = problem.generator, 0
    share = max(_RESTART_LEAST, problem.left // _RESTART_SHARE)
    while problem.broken is None and problem.left > 0 and stalled < STALLED:
        before = problem.queries
        start = ranked[int(len(ranked) * generator.random() ** 2)]
        pool = [edit for edit in ranked if generator.random() < 0.5]
        yield from _grow(problem, [(problem.singles[start], (start,))], pool, 2, share)
        stalled = 0 if problem.queries > before else stalled + 1


def _undo(problem: Problem) -> Steps[None]:
    """Remove edits of the misclassified candidate as long as it stays misclassified."""
    while (chosen := problem.broken) is not None and len(chosen) > problem.proven + 1:
        fewer = [chosen[:i] + chosen[i + 1 :] for i in range(len(chosen))]
        while fewer and problem.left > 0 and problem.broken == chosen:
            # Some of them may be known, so fewer queries are used than there are texts.
            part, fewer = fewer[: problem.left], fewer[problem.left :]
            yield from problem.query(part, [problem.candidates.apply(each) for each in part])
        if problem.broken == chosen:
            return
