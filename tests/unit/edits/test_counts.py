"""Numbers of candidates of published data sets; they were counted before by another program."""

from __future__ import annotations

from statistics import median

import pytest

from advtrain.data import DataConfig, load_data
from advtrain.edits import COUNTERFITTED, Candidates, CharEdits, WordEdits, load_table


@pytest.fixture(scope="module")
def trec(data_root):
    if not (data_root / "text" / "trec").is_dir() or not (data_root / COUNTERFITTED).is_file():
        pytest.skip("the data root has no TREC or no counter-fitted table")
    return [str(text) for text in load_data(DataConfig(source="trec"), data_root).test.texts]


def counted(texts, threat):
    """Return the numbers of candidates of 1 to `at_most` edits of each text."""
    found = [Candidates(text, threat.edits(text)) for text in texts]
    return [sum(each.count(k) for k in range(1, threat.at_most + 1)) for each in found]


@pytest.mark.parametrize(("k", "middle", "total"), [(1, 10, 5.3e3), (2, 27, 3.7e4), (3, 35, 1.6e5)])
def test_word_candidates_of_trec(trec, data_root, k, middle, total):
    numbers = counted(trec, WordEdits(load_table("counterfitted", data_root), k))
    assert median(numbers) == pytest.approx(middle, abs=1)
    assert sum(numbers) == pytest.approx(total, rel=0.03)


def test_inner_letter_candidates_of_trec(trec):
    numbers = counted(trec, CharEdits(1))
    assert median(numbers) == pytest.approx(633, rel=0.03)
    assert sum(numbers) == pytest.approx(3.5e5, rel=0.03)


def test_candidates_of_any_character_of_trec(trec):
    alphabet = "".join(sorted(set("".join(trec))))
    threat = CharEdits(1, "anywhere", alphabet, ("substitute", "delete", "insert"), frozenset())
    numbers = [(2 * len(text) + 1) * len(alphabet) for text in trec]
    assert len(alphabet) == 69
    assert counted(trec[:20], threat) == numbers[:20]
    assert sum(numbers) == pytest.approx(2.5e6, rel=0.03)
