"""Search for a misclassified candidate of each text: exact, beam, random and default."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from advtrain.edits.beam import beam, expand, random_search
from advtrain.edits.candidates import Candidates
from advtrain.edits.problem import Change, Problem, Steps
from advtrain.edits.score import Score, check_rows, margins
from advtrain.edits.threats import EditThreat
from advtrain.errors import UserError, find

#: Most texts that are searched at the same time, so that their candidates share batches. It is the same on all
#: machines, because the size of a batch may change the last bits of logits.
CONCURRENT_TEXTS = 32
#: Most queries of all texts that are searched at the same time, for memory, since their keys are kept.
_MOST_QUERIES = 1_000_000
#: Single edits of these texts above which no further text is begun, for memory.
_MOST_EDITS = 200_000

#: Candidates for each single edit above which the likely candidates are scored first.
_MANY = 20

T = TypeVar("T")
#: Search of one text: its state, its label, and the steps that send texts and return the result.
Job = tuple[Problem, int, Steps[T]]

Status = Literal["misclassified", "broken", "proven", "not broken"]


@dataclass(frozen=True)
class Verdict:
    """Result of the search for one text.

    Args:
        at_most: radius k that was searched.
        broken_at: fewest edits of a misclassified candidate that was found; 0: the text itself; None: none was found.
        proven: largest radius of which every candidate was scored and none is misclassified; -1: the text is.
        queries: texts that were sent to the model, with the original one.
        margin: margin of the original text.
        lowest: lowest margin of all texts that were sent.
        text: the misclassified text with the fewest edits; None: none was found.
        changes: its edits.
    """

    at_most: int
    broken_at: int | None
    proven: int
    queries: int
    margin: float
    lowest: float
    text: str | None = None
    changes: tuple[Change, ...] = ()

    @property
    def status(self) -> Status:
        """Outcome at radius `at_most`; `not broken`: neither broken nor proven."""
        if self.broken_at is not None:
            return "broken" if self.broken_at else "misclassified"
        return "proven" if self.proven >= self.at_most else "not broken"


def _has_room(active: Collection[_Running[Any]], budget: int, most: int) -> bool:
    """Return True if one more text may be searched at the same time."""
    edits = sum(len(each.problem.candidates.edits) for each in active)
    texts = max(1, min(most, _MOST_QUERIES // budget))
    return len(active) < texts and edits < _MOST_EDITS


class _Running(Generic[T]):
    """Search that is under way: the texts that it sends, or its results, one or none yet."""

    def __init__(self, problem: Problem, label: int, steps: Steps[T]) -> None:
        self.problem, self.label, self._steps = problem, label, steps
        self.results: list[T] = []
        self.texts = next(self._steps)

    def answer(self, found: NDArray[np.float64]) -> None:
        """Continue with the margins (n,) of the texts."""
        try:
            self.texts = self._steps.send(found)
        except StopIteration as end:
            self.texts, self.results = [], [end.value]


def _search_one(problem: Problem, method: Callable[[Problem], Steps[None]]) -> Steps[Verdict]:
    """Search if the original text is classified correctly, and return the verdict.

    Without candidates, the radius is proven.
    """
    found = yield from problem.query([()], [problem.text])
    if not problem.queries:
        raise UserError(f"the text {problem.text!r:.60} has no token; remove it from the data")
    if problem.broken is None:
        problem.proven = 0
        if problem.at_most > 0 and problem.candidates.edits:
            yield from method(problem)
        else:
            problem.proven = problem.at_most
    chosen = problem.broken
    return Verdict(
        at_most=problem.at_most,
        broken_at=None if chosen is None else len(chosen),
        proven=problem.proven,
        queries=problem.queries,
        margin=float(found[0]),
        lowest=problem.lowest,
        text=None if chosen is None else problem.candidates.apply(chosen),
        changes=problem.changes(),
    )


def _answer(score: Score, active: Sequence[_Running[Any]]) -> None:
    """Send the texts that were not sent before, in common batches, and continue the searches."""
    rest = iter(score.keys([text for each in active for text in each.texts]))
    own = [list(islice(rest, len(each.texts))) for each in active]
    fresh = [
        list(dict.fromkeys(key for key in keys if key is not None and key not in each.problem.known))
        for each, keys in zip(active, own, strict=True)
    ]
    index = {key: i for i, key in enumerate(dict.fromkeys(key for keys in fresh for key in keys))}
    logits = check_rows(score.logits(list(index)), len(index)) if index else torch.empty(0, 2)
    for each, keys, new in zip(active, own, fresh, strict=True):
        known = each.problem.known
        if len(new) > each.problem.left:
            raise RuntimeError(f"a search sends {len(new)} texts, but {each.problem.left} queries are left")
        if new:
            rows = logits[[index[key] for key in new]]
            known.update(zip(new, margins(rows, each.label).tolist(), strict=True))
        each.answer(np.array([np.inf if key is None else known[key] for key in keys]))


def _exact(problem: Problem) -> Steps[bool]:
    """Search all candidates of each radius that fits the budget; return True if all radii do."""
    for k in range(1, problem.at_most + 1):
        if (count := problem.candidates.count(k)) > problem.left:
            return False
        if count == 0:  # nor are there candidates of more edits
            problem.proven = problem.at_most
            return True
        edits, states = range(len(problem.candidates.edits)), problem.states.get(k - 1, [])
        if k > 1 and count > _MANY * len(edits):
            # A misclassified candidate is probably among these, which are few.
            yield from problem.query_all(problem.with_texts(expand(problem, states, edits)))
        if problem.broken is None:
            yield from problem.query_all(problem.candidates.all(k))
        if problem.broken is not None:
            return True
        problem.proven = k
    return True


def _exact_only(problem: Problem) -> Steps[None]:
    yield from _exact(problem)


def _exact_then_beam(problem: Problem) -> Steps[None]:
    done = yield from _exact(problem)
    if not done:
        yield from beam(problem, problem.proven + 1)


METHODS: dict[str, Callable[[Problem], Steps[None]]] = {
    "default": _exact_then_beam,
    "exact": _exact_only,
    "beam": beam,
    "random": random_search,
}


def search(
    score: Score, text: str, label: int, threat: EditThreat, budget: int, seed: int, method: str = "default"
) -> Verdict:
    """Search for a misclassified candidate of one text, see `search_texts`."""
    return search_texts(score, [text], [label], threat, budget, [seed], method)[0]


def search_texts(
    score: Score,
    texts: Sequence[str],
    labels: Sequence[int],
    threat: EditThreat,
    budget: int,
    seeds: Sequence[int],
    method: str = "default",
) -> list[Verdict]:
    """Search for a misclassified candidate of each text.

    Methods:
        exact: every candidate of 1 edit, then of 2, and so on, as long as their number fits the rest of the budget.
            It stops at the first misclassification.
        beam: the best edits and sets of edits first, see `beam.py`.
        random: random candidates.
        default: exact, then beam for the radii that do not fit the budget.

    Args:
        score: model.
        texts: N original texts.
        labels: N labels.
        threat: threat model.
        budget: most queries of each text, at least 1, with that of the original text.
        seeds: N seeds. A text gets the same verdict for the same seed, up to the last bits of logits that depend on the
            other texts of a batch.
        method: see above.

    Returns:
        N verdicts.

    Raises:
        UserError: an unknown method, a budget that is no integer of at least 1, another number of labels or seeds than
            of texts, a text without tokens, or logits of another shape.
    """
    run = find(METHODS, method, "search of edits")
    found = problems(texts, labels, threat, budget, seeds)
    jobs = ((problem, label, _search_one(problem, run)) for problem, label in found)
    return run_jobs(score, jobs, budget)


def problems(
    texts: Sequence[str], labels: Sequence[int], threat: EditThreat, budget: int, seeds: Sequence[int]
) -> Iterator[tuple[Problem, int]]:
    """Return an iterator over the problem and the label of each text; see `search_texts`."""
    _check_budget(budget)
    if not len(texts) == len(labels) == len(seeds):
        raise UserError(
            f"a search needs a label and a seed for each text (got {len(texts)} texts, {len(labels)} labels and "
            f"{len(seeds)} seeds)"
        )

    def problem(text: str, seed: int) -> Problem:
        generator = random.Random(operator.index(seed))  # noqa: S311 (nothing secret)
        return Problem(text, Candidates(text, threat.edits(text)), threat.at_most, budget, generator)

    return (
        (problem(text, seed), operator.index(label))
        for text, label, seed in zip(texts, labels, seeds, strict=True)
    )


def run_jobs(score: Score, jobs: Iterable[Job[T]], budget: int, most: int = CONCURRENT_TEXTS) -> list[T]:
    """Run searches so that their texts share batches, and return the result of each.

    Args:
        score: model.
        jobs: searches, which are begun in this order.
        budget: most queries of each of them.
        most: most searches at the same time.
    """
    results: dict[int, T] = {}
    waiting = iter(enumerate(jobs))
    active: dict[int, _Running[T]] = {}
    while True:
        while _has_room(active.values(), budget, most) and (job := next(waiting, None)) is not None:
            active[job[0]] = _Running(*job[1])
        if not active:
            return [results[row] for row in range(len(results))]
        _answer(score, list(active.values()))
        for row in [row for row, each in active.items() if each.results]:
            (results[row],) = active.pop(row).results


def _check_budget(budget: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UserError(f"the budget of a search must be an integer of at least 1 query (got {budget!r})")
