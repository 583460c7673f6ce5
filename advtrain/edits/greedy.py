"""Edited texts for training: a greedy search for the smallest margin, and random edits.

Unlike the searches of an evaluation (`search.py`), the greedy one does not stop at a misclassification.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

from advtrain.edits.beam import expand
from advtrain.edits.candidates import Candidates, Chosen
from advtrain.edits.problem import Problem, Steps
from advtrain.edits.score import Score
from advtrain.edits.search import problems, run_jobs
from advtrain.edits.threats import EditThreat


def greedy_texts(
    score: Score,
    texts: Sequence[str],
    labels: Sequence[int],
    threat: EditThreat,
    budget: int,
    seeds: Sequence[int],
) -> list[str]:
    """Search greedily for the candidate of each text with the smallest margin.

    The first round scores the text and its single edits. Each further round adds one of these edits to the best set of
    the round before, those with small margins first. The rounds have equal shares of the budget. If there are more
    single edits than the share of the first round, some of them are drawn.

    Args:
        score: model.
        texts: N original texts.
        labels: N labels.
        threat: threat model.
        budget: most queries of each text, at least 1, with that of the original text.
        seeds: N seeds of the draws.

    Returns:
        N texts. A text is returned unchanged if no candidate that was scored has a smaller margin.

    Raises:
        UserError: as `search_texts`.
    """
    found = problems(texts, labels, threat, budget, seeds)
    jobs = ((problem, label, _lowest(problem)) for problem, label in found)
    return run_jobs(score, jobs, budget, most=len(texts))


def _lowest(problem: Problem) -> Steps[str]:
    """Run the rounds, and return the text with the smallest margin."""
    edits, rounds = range(len(problem.candidates.edits)), problem.at_most
    share = min(len(edits), _share(problem.left - 1, rounds))
    first = edits if share == len(edits) else sorted(problem.generator.sample(edits, share))
    yield from _query(problem, [(), *((i,) for i in first)])
    ranked = sorted(problem.singles, key=lambda i: (problem.singles[i], i))
    for size in range(2, rounds + 1):
        best = problem.states.get(size - 1, [])[:1]
        grown = list(islice(expand(problem, best, ranked), _share(problem.left, rounds - size + 1)))
        if not grown:
            break
        yield from _query(problem, grown)
    _, chosen = min(state for states in problem.states.values() for state in states)
    return problem.candidates.apply(chosen)


def _share(queries: int, rounds: int) -> int:
    """Return the queries of the next of these rounds, rounded up."""
    return -(-queries // max(1, rounds))


def _query(problem: Problem, sets: list[Chosen]) -> Steps[None]:
    yield from problem.query(sets, [problem.candidates.apply(each) for each in sets])


def random_texts(texts: Sequence[str], threat: EditThreat, seeds: Sequence[int]) -> list[str]:
    """Draw a candidate of at least one edit for each text, all with the same probability.

    A text without edits is returned unchanged.

    Args:
        texts: N original texts.
        threat: threat model.
        seeds: N seeds of the draws.
    """
    found = []
    for text, seed in zip(texts, seeds, strict=True):
        candidates = Candidates(text, threat.edits(text))
        is_edited = threat.at_most > 0 and candidates.edits
        generator = random.Random(seed)  # noqa: S311 (nothing secret)
        found.append(candidates.apply(candidates.draw(threat.at_most, generator)) if is_edited else text)
    return found
