"""Single edits that do not reach the model, or that it sees as unknown words."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass
from hashlib import blake2b

from advtrain.edits.candidates import Candidates
from advtrain.edits.score import Encoder
from advtrain.edits.threats import EditThreat


@dataclass(frozen=True)
class EditShares:
    """Counts of the single edits of texts.

    Args:
        edits: all single edits.
        same_ids: edits that leave the token ids as they are, without those behind the cut.
        cut: edits behind the end of the text that the model sees, which leave the ids as they are.
        empty: edits that leave no token, so that the model refuses the text.
        unknown: edits that change the ids and add an unknown word. The words behind the cut are counted, too, so an
            edit that only moves the cut is not one of them.
        distinct: different token ids of the edited texts, without those of the original text.
        cut_texts: original texts that are longer than the model sees.
    """

    edits: int = 0
    same_ids: int = 0
    cut: int = 0
    empty: int = 0
    unknown: int = 0
    distinct: int = 0
    cut_texts: int = 0

    def __add__(self, other: EditShares) -> EditShares:
        """Return the counts of the texts of both."""
        return EditShares(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def edit_shares(encoder: Encoder, threat: EditThreat, text: str) -> EditShares:
    """Count the single edits of a text by what the tokenizer makes of them.

    Args:
        encoder: tokenizer of the model.
        threat: threat model; its radius does not matter.
        text: original text.
    """
    candidates = Candidates(text, threat.edits(text))
    end, ((own, own_unknown),) = encoder.end(text), encoder.ids_and_unknown([text])
    counts, distinct = Counter[str](), set[bytes]()
    edited = encoder.ids_and_unknown(each for _, each in candidates.all(1))
    for edit, (ids, unknown) in zip(candidates.edits, edited, strict=True):
        counts["empty"] += not ids
        if ids == own:
            counts["cut" if end is not None and edit.start >= end else "same_ids"] += 1
        else:
            counts["unknown"] += unknown > own_unknown
            distinct.add(blake2b(ids, digest_size=16).digest())  # for memory
    return EditShares(
        edits=len(candidates.edits), distinct=len(distinct), cut_texts=int(end is not None), **counts
    )
