"""Training attack on texts: edits of words or characters, found under the current weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advtrain.attacks import attack_mode
from advtrain.data import Batch, Dataset
from advtrain.data.texts import PAD, without_padding
from advtrain.edits import EditThreat, TokenScore, greedy_texts, key_ids, random_texts
from advtrain.evaluation.edits import build_threat
from advtrain.recipe import AdversaryConfig


class EditAttack:
    """Search over edits of the texts of a batch, with the tokenizer of its data.

    Args:
        config: the attack edits.
        dataset: texts; edits of words need its table `training_synonyms`.

    Raises:
        UserError: the samples are no texts, or the table is not the one of the settings.
    """

    def __init__(self, config: AdversaryConfig, dataset: Dataset) -> None:
        self.threat: EditThreat = build_threat(config, dataset)
        self.budget = config.budget  # None: random edits
        assert dataset.text is not None
        self.spec = dataset.text

    def __call__(
        self, model: nn.Module, batch: Batch, rows: NDArray[np.int64], at_most: int, seeds: Sequence[int]
    ) -> Tensor:
        """Return the token ids of the edited batch, (n, L') int64, padded with 0.

        The search runs in evaluation mode and without gradients. It leaves the model and the global random generators
        as they were. A row without an edit keeps its ids.

        Args:
            model: maps ids (n, L) to logits (n, K).
            batch: batch of texts.
            rows: (m,) rows that are edited.
            at_most: largest number of edits.
            seeds: m seeds of the draws.
        """
        assert batch.texts is not None
        texts = [str(batch.texts[row]) for row in rows]
        threat, score = self.threat.within(at_most), TokenScore(model, self.spec, batch.x.device)
        if self.budget is None:
            edited = random_texts(texts, threat, seeds)
        else:
            labels = batch.y.cpu().numpy()[rows].tolist()
            with attack_mode(model):
                edited = greedy_texts(score, texts, labels, threat, self.budget, seeds)
        changed = [(row, new) for row, old, new in zip(rows, texts, edited, strict=True) if new != old]
        ids = score.encoder.ids(new for _, new in changed)
        return _replaced(batch.x, [row for row, _ in changed], ids)


def _replaced(x: Tensor, rows: Sequence[int], ids: Sequence[bytes]) -> Tensor:
    """Return a copy of x (n, L) int64 with other ids in some rows; a text without tokens changes nothing."""
    found = [key_ids(each).astype(np.int64) for each in ids]
    longest = max([x.shape[1], *map(len, found)])
    out = x.new_full((len(x), longest), PAD)
    out[:, : x.shape[1]] = x
    for row, each in zip(rows, found, strict=True):
        if len(each):
            out[row] = PAD
            out[row, : len(each)] = torch.from_numpy(each).to(x.device)
    return without_padding(out)
