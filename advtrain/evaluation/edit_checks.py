"""Masking checks of texts: whether the search may have missed misclassified candidates.

A check takes up to NUM_TEXTS correctly classified texts, and returns a `Check` as a dictionary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from advtrain.data.texts import PAD
from advtrain.edits import (
    Candidates,
    EditShares,
    Score,
    Table,
    Verdict,
    WordEdits,
    apply_edits,
    edit_shares,
    key_ids,
    margins,
)
from advtrain.edits.threats import WORD
from advtrain.evaluation import edit_transfer
from advtrain.evaluation.checks import Check
from advtrain.evaluation.edits import EditEvaluator, EditResults
from advtrain.evaluation.masking.context import ROUNDING, Answer, spread
from advtrain.evaluation.statistics import sign_test, surely_above
from advtrain.evaluation.worst_case import Progress, Runner, WorkItem, WorkResult, spread_rows
from advtrain.seeding import mix_seed

#: Texts of a check, queries of each text, and single edits that the tokenizer is checked on.
NUM_TEXTS, QUERIES, NUM_EDITS = 50, 300, 50_000
#: Texts and queries of each text if every word is free, substitutions of each word, and words that they are chosen of.
FREE_TEXTS, FREE_QUERIES, FREE_WORDS, FREE_POOL = 25, 500, 20, 5000
#: Share of the texts that may have the same logits for all edits.
MOST_FLAT = 0.1
#: Shares of edits above which a check warns.
MOST_IGNORED, MOST_UNKNOWN, MOST_CUT = 0.5, 0.5, 0.05

#: Verdict, evidence, and machine-readable results.
Finding = tuple[Answer, str, dict[str, float]]


@dataclass(frozen=True)
class TextCheck:
    """A check of texts, as a probe of an evaluation.

    Attributes:
        question: question that the check answers, for the report.
        advice: what to do if it fails or warns.
        judge: function (evaluator, item) -> Finding.
    """

    question: str
    advice: str
    judge: Callable[[EditEvaluator, WorkItem], Finding]

    def __call__(self, evaluator: EditEvaluator, item: WorkItem) -> WorkResult:
        """Run the check on the texts of the item."""
        fine, evidence, data = self.judge(evaluator, item)
        verdict = fine if isinstance(fine, str) else "passed" if fine else "failed"
        advice = "" if verdict in ("passed", "skipped") else self.advice
        about = {"name": item.probe, "question": self.question, "verdict": verdict}
        return Check.model_validate(
            about | {"evidence": evidence, "advice": advice, "data": data}
        ).model_dump()


def run_text_checks(run: Runner, samples: EditResults, progress: Progress | None = None) -> list[Check]:
    """Run all checks on texts that are spread over the correctly classified ones.

    `transfer` runs on those that the search neither broke nor proved.
    """
    if not samples.clean.any():
        return []
    open_rows = spread_rows(np.flatnonzero(samples.robust & ~samples.proven), edit_transfer.NUM_TEXTS)
    rows = spread_rows(np.flatnonzero(samples.clean), NUM_TEXTS)
    items = [WorkItem(open_rows if name == "transfer" else rows, probe=name) for name in TEXT_CHECKS]
    found = {}
    for done, (item, result) in enumerate(run(items), start=1):
        found[item.probe] = Check.model_validate(result)
        if progress is not None:
            progress("checks", done, len(items), None)
    return [found[name] for name in TEXT_CHECKS]


class _Scaled:
    """Score with the logits times a factor, in float64."""

    def __init__(self, score: Score, factor: float) -> None:
        self.score, self.factor = score, factor

    def keys(self, texts: Sequence[str]) -> list[Hashable]:
        return self.score.keys(texts)

    def logits(self, keys: Sequence[Hashable]) -> Tensor:
        return self.score.logits(keys).double() * self.factor


def _survives(verdict: Verdict) -> bool:
    return verdict.broken_at is None


def _temperature(e: EditEvaluator, item: WorkItem) -> Finding:
    """Search again with scaled logits, which would change a search by probabilities."""
    base, differing = e.verdicts(item.rows, budget=QUERIES), 0
    for factor in (1e4, 1e-4):
        other = e.verdicts(item.rows, budget=QUERIES, score=_Scaled(e.score, factor))
        differing += sum(a.broken_at != b.broken_at for a, b in zip(base, other, strict=True))
    evidence = f"{differing} of {2 * len(base)} verdicts differ with logits times 1e4 and 1e-4"
    return differing == 0, evidence, {"differing": differing}


def _guided(e: EditEvaluator, item: WorkItem) -> Finding:
    """Compare beam search and random draws on texts with more candidates than queries."""
    rows = np.array([row for row in item.rows if _num_candidates(e, row) > QUERIES], np.int64)
    if not len(rows):
        return "skipped", f"no text has more than {QUERIES} candidates", {}
    beam, other = (e.verdicts(rows, budget=QUERIES, method=name) for name in ("beam", "random"))
    only_random = sum(_survives(a) and not _survives(b) for a, b in zip(beam, other, strict=True))
    only_beam = sum(_survives(b) and not _survives(a) for a, b in zip(beam, other, strict=True))
    fine: Answer = only_random <= only_beam or "warning"
    if only_random > only_beam and sign_test(only_random, only_beam) < 0.01:
        fine = False
    evidence = f"with {QUERIES} queries only the beam breaks {only_beam} of {len(beam)} texts, only draws {only_random}"
    return fine, evidence, {"only_beam": only_beam, "only_random": only_random}


def _num_candidates(e: EditEvaluator, row: int) -> int:
    candidates = Candidates(e.texts[row], e.threat.edits(e.texts[row]))
    return sum(candidates.count(k) for k in range(1, e.threat.at_most + 1))


def _free_words(e: EditEvaluator, item: WorkItem) -> Finding:
    """Search with every word free to become one of the words with the largest margins."""
    words = sorted({match.lower() for text in e.texts for match in WORD.findall(text)})
    rows = item.rows[:: max(1, len(item.rows) // FREE_TEXTS)]
    texts = [e.texts[row] for row in rows]
    longest = max(len(WORD.findall(text)) for text in texts)
    if longest == 0 or len(words) < 2:
        return "skipped", "the texts have no words", {}
    threat = WordEdits(_strongest(e, words, texts), longest, frozenset())
    left = sum(map(_survives, e.verdicts(rows, threat=threat, budget=FREE_QUERIES, method="beam")))
    chance = 1 / e.num_classes
    fine: Answer = left <= chance * len(texts) or "warning"
    if surely_above(left, len(texts), chance):
        fine = False
    evidence = (
        f"{left} of {len(texts)} texts stay correct when every word is free, with {FREE_QUERIES:,} queries"
    )
    return fine, evidence, {"correct": left, "texts": len(texts)}


def _strongest(e: EditEvaluator, words: list[str], texts: list[str]) -> Table:
    """Return the words with the largest margins of each class as substitutions of all words of the texts."""
    generator = random.Random(mix_seed("free words", e.seed))  # noqa: S311 (nothing secret)
    pool = generator.sample(words, min(FREE_POOL, len(words)))
    found = e.score.keys(pool)
    pool = [word for word, key in zip(pool, found, strict=True) if key is not None]
    logits = e.score.logits([key for key in found if key is not None])
    best: dict[str, None] = {}
    for label in range(e.num_classes):
        order = np.argsort(-margins(logits, label), kind="stable")
        best |= {pool[i]: None for i in order[: max(1, FREE_WORDS // e.num_classes)].tolist()}
    return Table.build("free", {word: list(best) for text in texts for word in WORD.findall(text)})


def _some_edits(e: EditEvaluator, row: int, most: int) -> tuple[str, list[str]]:
    """Return a text and the texts of some of its single edits, evenly spaced."""
    text = e.texts[row]
    edits = e.threat.edits(text)
    step = max(1, -(-len(edits) // most))
    return text, [apply_edits(text, [edit]) for edit in edits[::step]]


def _flat_logits(e: EditEvaluator, item: WorkItem) -> Finding:
    flat = total = 0
    scale = spread(e.logits([e.texts[row] for row in item.rows]))
    for row in item.rows.tolist():
        text, edited = _some_edits(e, row, QUERIES)
        own = e.score.keys([text])
        keys = [key for key in dict.fromkeys(e.score.keys(edited)) if key and key != own[0]]
        if len(keys) < 3:
            continue
        logits = e.score.logits([*own, *keys]).double()
        total += 1
        flat += bool((logits[1:] - logits[0]).abs().max() <= 1e-6 * scale)
    if total == 0:
        return "skipped", "no text has three edits with other token ids", {}
    evidence = (
        f"{flat} of {total} texts have the same logits for all their edits, although the token ids differ"
    )
    return not surely_above(flat, total, MOST_FLAT), evidence, {"flat": flat, "texts": total}


def _stochastic(e: EditEvaluator, item: WorkItem) -> Finding:
    keys = e.score.keys([e.texts[row] for row in item.rows])
    first, second = e.score.logits(keys), e.score.logits(keys)
    noise = float((first - second).abs().max()) / spread(first)
    return (
        noise <= ROUNDING,
        f"two passes differ by {noise:.1e} of the logits' standard deviation",
        {"noise": noise},
    )


def _batch(e: EditEvaluator, item: WorkItem) -> Finding:
    """Compare the logits of a text alone, without padding, with those in a padded batch."""
    keys = [bytes(key) for key in e.score.encoder.ids([e.texts[row] for row in item.rows])]
    alone = torch.cat([e.score.logits([key]) for key in keys])
    longest = max(len(key_ids(key)) for key in keys)
    ids = np.full((len(keys), max(longest, e.spec.max_length)), PAD, np.int64)
    for row, key in zip(ids, keys, strict=True):
        found = key_ids(key)
        row[: len(found)] = found
    together = e.score.model(torch.from_numpy(ids).to(e.device))
    gap = float((alone - together).abs().max()) / spread(alone)
    evidence = f"alone and in a batch padded to {ids.shape[1]} tokens they differ by {gap:.1e} of their std"
    return gap <= ROUNDING, evidence, {"gap": gap}


def _shares(e: EditEvaluator, item: WorkItem) -> EditShares:
    """Count the single edits of texts up to NUM_EDITS, at least of one text."""
    if (rows := item.rows.tobytes()) not in e.shares:
        total = EditShares()
        for row in item.rows.tolist():
            total += edit_shares(e.score.encoder, e.threat, e.texts[row])
            if total.edits >= NUM_EDITS:
                break
        e.shares[rows] = total
    return e.shares[rows]


def _counted(found: EditShares, count: int, total: int, most: float, words: str) -> Finding:
    """Return a warning if more than a share `most` of the `total` single edits are counted."""
    share = count / max(1, total)
    facts = {name: float(value) for name, value in asdict(found).items()}
    return share <= most or "warning", f"{100 * share:.1f} % of {total:,} single edits {words}", facts


def _no_ops(e: EditEvaluator, item: WorkItem) -> Finding:
    found = _shares(e, item)
    return _counted(
        found,
        found.same_ids + found.empty,
        found.edits,
        MOST_IGNORED,
        "leave the token ids as they are, or none",
    )


def _unknown_tokens(e: EditEvaluator, item: WorkItem) -> Finding:
    if e.score.encoder.unknown is None:
        return "skipped", "the tokenizer has no token for unknown words", {}
    found = _shares(e, item)
    reached = found.edits - found.same_ids - found.empty - found.cut
    words = "that change the token ids put in a word that the model does not know"
    return _counted(found, found.unknown, reached, MOST_UNKNOWN, words)


def _truncation(e: EditEvaluator, item: WorkItem) -> Finding:
    found = _shares(e, item)
    words = f"are behind the cut of {e.spec.max_length} tokens, in {found.cut_texts} texts"
    return _counted(found, found.cut, found.edits, MOST_CUT, words)


#: Checks by name, in the order of the report.
TEXT_CHECKS: dict[str, TextCheck] = {
    "temperature": TextCheck(
        "Does the search find the same if the logits are scaled?",
        "the search must compare margins of logits: report this",
        _temperature,
    ),
    "guided": TextCheck(
        "Does the guided search break at least as many texts as random edits?",
        "margins mislead the search, so more texts may break: raise evaluation.threat.budget",
        _guided,
    ),
    "transfer": TextCheck(
        "Do edits against a fresh text_cnn break no text that the search did not break?",
        "the search missed misclassified candidates, so trust the proven share only: raise evaluation.threat.budget",
        edit_transfer.transfer,
    ),
    "free_words": TextCheck(
        "Does the accuracy fall to chance if every word may change?",
        "the search cannot follow the margins, so trust the proven share only",
        _free_words,
    ),
    "flat_logits": TextCheck(
        "Do the logits depend on the edits?",
        "saturated or rounded logits hide the direction of the search, so trust the proven share only",
        _flat_logits,
    ),
    "stochastic": TextCheck(
        "Does the model return the same logits for the same text?",
        "a random model has no worst case over single passes: remove the randomness",
        _stochastic,
    ),
    "batch": TextCheck(
        "Are the logits independent of padding and of other texts in the batch?",
        "mask the padding, and use no statistics of the batch",
        _batch,
    ),
    "no_ops": TextCheck(
        "Do the edits reach the model?",
        "the tokenizer ignores most edits: they are neither attacks nor robustness",
        _no_ops,
    ),
    "unknown_tokens": TextCheck(
        "Does the model know the words that the edits put in?",
        "unknown words share one embedding, so most edits are the same to the model: raise data.vocabulary",
        _unknown_tokens,
    ),
    "truncation": TextCheck(
        "Does the model read the texts to their end?",
        "edits behind the cut are neither attacks nor robustness: raise data.max_length",
        _truncation,
    ),
}
