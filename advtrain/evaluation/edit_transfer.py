"""Masking check of texts: edits against a fresh text_cnn are sent to the evaluated model."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from advtrain.data.texts import PAD
from advtrain.edits import Score, TokenScore, key_ids, margins
from advtrain.evaluation.edits import EditEvaluator
from advtrain.evaluation.masking.context import BROKEN_SHARE, Answer
from advtrain.evaluation.statistics import surely_above
from advtrain.evaluation.worst_case import WorkItem
from advtrain.models.text import TextCNN
from advtrain.recipe.data import TextShape
from advtrain.seeding import mix_seed, seeded

#: Texts of the check, queries of each one to the text_cnn, and texts with its lowest margins that the model gets.
NUM_TEXTS, QUERIES, NUM_SENT = 100, 200, 10
#: Steps of the training, texts of a step, and learning rate of Adam.
STEPS, BATCH_SIZE, LR = 300, 32, 3e-3
#: Raises the logit of the label, so that a search does not end at the first text that fools the text_cnn.
_LIFT = 1e6


def transfer(e: EditEvaluator, item: WorkItem) -> tuple[Answer, str, dict[str, float]]:
    """Send the edits with the lowest margins of a fresh text_cnn to the model.

    The rows of the item are texts that the search neither broke nor proved. The network is trained and searched on the
    CPU with one thread, so the result does not depend on the workers.
    """
    if e.training is None:
        return "skipped", "not run: the training texts are unknown", {}
    if not len(item.rows):
        return "skipped", "every text is misclassified, broken or proven, so transfer can break no other", {}
    with _one_thread(), seeded(torch.device("cpu"), mix_seed("transfer", e.seed)):
        network, labels, correct = _trained(e, *e.training)
        number, accuracy = len(labels), correct / len(labels)
        if not surely_above(correct, number, np.bincount(labels).max() / number):
            evidence = f"not run: a text_cnn learns nothing from {number:,} training texts"
            return "skipped", evidence, {"accuracy": accuracy}
        score = TokenScore(network, e.spec)
        found = [_lowest(e, score, row) for row in item.rows.tolist()]
    keys = list(dict.fromkeys(key for each in found for key in each))
    logits = dict(zip(keys, e.score.logits(keys), strict=True))
    broken = sum(
        bool((margins(torch.stack([logits[key] for key in each]), label) <= 0).any())
        for each, label in zip(found, e.labels[item.rows].tolist(), strict=True)
    )
    evidence = (
        f"edits against a text_cnn with {100 * accuracy:.1f} % training accuracy break {broken} of {len(found)} texts "
        "that the search did not break"
    )
    fine: Answer = not broken or "warning"
    if surely_above(broken, len(found), BROKEN_SHARE):
        fine = False
    return fine, evidence, {"broken": broken, "texts": len(found), "accuracy": accuracy}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, as workers do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trained(
    e: EditEvaluator, texts: Sequence[str], labels: NDArray[np.int64]
) -> tuple[nn.Module, NDArray[np.int64], int]:
    """Return a small text_cnn that was trained on the texts, their labels, and how many it classifies correctly.

    Texts without tokens are left out.
    """
    keys = e.score.encoder.ids(texts)
    labels = labels[[bool(key) for key in keys]]
    ids = [torch.from_numpy(key_ids(key).astype(np.int64)) for key in keys if key]
    shape = TextShape(e.spec.max_length, e.spec.vocabulary)
    network = TextCNN(shape, e.num_classes, dim=48, widths=[3, 4, 5], channels=32, dropout=0.1)
    optimizer, rows = torch.optim.Adam(network.parameters(), lr=LR), list[int]()
    for _ in range(STEPS):
        rows = rows or torch.randperm(len(ids)).tolist()
        batch, rows = rows[:BATCH_SIZE], rows[BATCH_SIZE:]
        x = pad_sequence([ids[row] for row in batch], batch_first=True, padding_value=PAD)
        loss = F.cross_entropy(network(x), torch.from_numpy(labels[batch]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = TokenScore(network.eval(), e.spec).logits([key for key in keys if key]).argmax(1)
    return network, labels, int((found.numpy() == labels).sum())


class _Recorder:
    """Score that keeps the margins of all keys, and raises the logit of the label."""

    def __init__(self, score: Score, label: int) -> None:
        self.score, self.label = score, label
        self.margins: dict[Hashable, float] = {}

    def keys(self, texts: Sequence[str]) -> list[Hashable]:
        return self.score.keys(texts)

    def logits(self, keys: Sequence[Hashable]) -> Tensor:
        logits = self.score.logits(keys).double()
        self.margins.update(zip(keys, margins(logits, self.label).tolist(), strict=True))
        logits[:, self.label] += _LIFT
        return logits


def _lowest(e: EditEvaluator, score: TokenScore, row: int) -> list[Hashable]:
    """Return the keys of the candidates of a text with the lowest margins of the text_cnn."""
    recorder = _Recorder(score, int(e.labels[row]))
    e.verdicts(np.array([row]), score=recorder, budget=QUERIES, method="beam")
    return sorted(recorder.margins, key=lambda key: recorder.margins[key])[:NUM_SENT]
