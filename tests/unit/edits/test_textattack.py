"""TextAttack with our table breaks no text that exact search proves.

TextAttack has many dependencies, so no extra of this package installs it. The test is skipped without it. TextAttack
scores with probabilities, and it has no semantic constraint here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advtrain.data import DataConfig, Dataset, load_data
from advtrain.edits import COUNTERFITTED, STOP_WORDS, TokenScore, WordEdits, load_table, search_texts
from advtrain.models.text import text_cnn
from advtrain.recipe.data import TextShape

pytestmark = pytest.mark.slow


def trained(data: Dataset) -> nn.Module:
    """Train a small text_cnn for an epoch."""
    assert data.text is not None
    net = text_cnn(
        TextShape(data.text.max_length, data.text.vocabulary), data.num_classes, dim=50, channels=50
    )
    ids, labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels).long()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for rows in torch.randperm(len(ids))[:10_000].split(64):
        optimizer.zero_grad()
        x = data.train.to_inputs(ids[rows])
        nn.functional.cross_entropy(net(x), labels[rows]).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("source", ["trec", "sst2"])
@pytest.mark.parametrize("k", [1, 2])
def test_textattack_breaks_no_text_that_exact_search_proves(source, k, data_root):
    textattack = pytest.importorskip("textattack")
    from textattack.constraints.pre_transformation import (
        MaxNumWordsModified,
        RepeatModification,
        StopwordModification,
    )
    from textattack.goal_functions import UntargetedClassification
    from textattack.search_methods import GreedyWordSwapWIR
    from textattack.transformations import WordSwap

    if not (data_root / "text" / source).is_dir() or not (data_root / COUNTERFITTED).is_file():
        pytest.skip(f"the data root has no {source} or no counter-fitted table")
    data = load_data(DataConfig(source=source), data_root)
    net = trained(data)
    score = TokenScore(net, data.text)
    threat = WordEdits(load_table("counterfitted", data_root), k)
    rows = np.linspace(0, len(data.test) - 1, 100).astype(int)
    texts, labels = [str(data.test.texts[i]) for i in rows], data.test.labels[rows].tolist()
    verdicts = search_texts(score, texts, labels, threat, 100_000, rows.tolist(), "exact")

    class Wrapper(textattack.models.wrappers.ModelWrapper):
        model = net

        def __call__(self, given: list[str]) -> Tensor:
            return score.logits(score.keys(given))

    class TableSwap(WordSwap):
        def _get_replacement_words(self, word):
            return [edit.new for edit in threat.edits(word) if (edit.start, edit.end) == (0, len(word))]

    attack = textattack.Attack(
        UntargetedClassification(Wrapper()),
        [RepeatModification(), StopwordModification(STOP_WORDS), MaxNumWordsModified(k)],
        TableSwap(),
        GreedyWordSwapWIR("delete"),
    )
    broken = []
    for text, label, verdict in zip(texts, labels, verdicts, strict=True):
        if verdict.status == "misclassified":
            broken.append(False)
            continue
        result = attack.attack(text, label)
        broken.append(isinstance(result, textattack.attack_results.SuccessfulAttackResult))
        assert not (broken[-1] and verdict.status == "proven"), (text, result.perturbed_text())
    ours = sum(verdict.status == "broken" for verdict in verdicts)
    assert 0 < sum(broken) <= ours
    print(f"{source} words:{k}: TextAttack breaks {sum(broken)} of 100 texts, exact search {ours}")
