"""Single edits that do not reach the model, or that it sees as unknown words."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

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
        unknown: edits that put in an unknown word.
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
    end, (own, *others) = encoder.end(text), encoder.ids([text, *(each for _, each in candidates.all(1))])
    unchanged = [edit for edit, ids in zip(candidates.edits, others, strict=True) if ids == own]
    cut = sum(end is not None and edit.start >= end for edit in unchanged)
    found = set(others) - {own}
    more_unknown = {ids for ids in found if _unknown(encoder, ids) > _unknown(encoder, own)}
    return EditShares(
        edits=len(others),
        same_ids=len(unchanged) - cut,
        cut=cut,
        empty=others.count(b""),
        unknown=sum(ids in more_unknown for ids in others),
        distinct=len(found),
        cut_texts=int(end is not None),
    )


def _unknown(encoder: Encoder, ids: bytes) -> int:
    return int((np.frombuffer(ids, np.uint32) == encoder.unknown).sum()) if encoder.unknown is not None else 0
