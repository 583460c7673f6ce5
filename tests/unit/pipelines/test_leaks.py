"""Leaks are refused before a training and in an evaluation, unless the training has allowed them."""

from __future__ import annotations

import pytest

from advtrain.data import DataConfig, load_data
from advtrain.data.rows import record_rows
from advtrain.errors import UserError
from advtrain.events import Message
from advtrain.runs.leaks import Lineage
from advtrain.runs.lineage import Ancestor
from pipelines.leaks import check_training, count_copies, training_keys

PARENT, CHILD = (load_data(DataConfig(source="digits", split_seed=seed), None) for seed in (0, 1))  # type: ignore[arg-type]
ANCESTOR = Ancestor("start", "models:/digits/1", "f" * 64, "digits-1", PARENT.digest)
RECORDS = {data.digest: record_rows(data) for data in (PARENT, CHILD)}
UNKNOWN = Ancestor("start", "weights.pth", "e" * 64)
LEAKS = r"100 of 144 validation samples are training samples of its ancestor models:/digits/1 \(digits\), numbers 0"


def test_another_split_is_refused_before_training():
    with pytest.raises(UserError, match=f"{LEAKS}.*--allow-leak REASON"):
        check_training(CHILD, [ANCESTOR], RECORDS, None, lambda event: None)


@pytest.mark.parametrize("ancestors", [[], [ANCESTOR]], ids=["no ancestor", "the same split"])
def test_training_without_leaks_records_nothing_and_refuses_the_option(ancestors):
    assert check_training(PARENT, ancestors, RECORDS, None, lambda event: None) == {}
    with pytest.raises(UserError, match="--allow-leak: no sample of an ancestor was found"):
        check_training(PARENT, ancestors, RECORDS, "a demo", lambda event: None)


def test_an_allowed_leak_is_recorded_and_a_warning():
    events: list[Message] = []
    facts = check_training(CHILD, [ANCESTOR], RECORDS, "a demo", events.append)
    assert facts["allowed_leak"]["reason"] == "a demo"
    assert len(facts["allowed_leak"]["leaks"]) == len(events) > 1
    assert {event.level for event in events} == {"warning"}
    with pytest.raises(UserError, match="needs a reason"):
        check_training(CHILD, [ANCESTOR], RECORDS, " ", events.append)


def test_an_unknown_ancestor_is_named():
    events: list[Message] = []
    assert check_training(CHILD, [UNKNOWN], RECORDS, None, events.append) == {}
    assert "the training data of weights.pth is unknown" in events[0].text


@pytest.mark.parametrize("allowed", [None, "a demo"])
def test_evaluation_refuses_or_counts_samples_of_an_ancestor(allowed):
    lineage = Lineage(CHILD.digest, (ANCESTOR,), RECORDS, allowed)
    events: list[Message] = []

    def count():
        return count_copies("models:/child/1", CHILD.test, CHILD, lineage, None, events.append)

    if allowed is None:
        with pytest.raises(UserError, match="test samples are training samples of its ancestor"):
            count()
    else:
        found = count()
        assert 200 < found <= len(CHILD.test)
        assert "which was allowed (a demo)" in events[0].text


def test_samples_of_the_own_training_in_other_data_are_counted_not_refused():
    """A model and an ancestor with the same training data: the samples are known as the model's own."""
    lineage = Lineage(PARENT.digest, (ANCESTOR,), RECORDS)
    training = training_keys(lineage, lambda: CHILD.test, lambda event: None)
    other = PARENT.train.take(range(50))
    data = type(PARENT)("other", other, other, other, 10, (1, 8, 8), "d" * 64)
    assert count_copies("m", other, data, lineage, training, lambda event: None) == 50


def test_training_keys_are_read_from_the_data_only_without_a_record():
    read: list[str] = []

    def train():
        read.append("read")
        return CHILD.train

    known = training_keys(Lineage(CHILD.digest, (), RECORDS), train, lambda event: None)
    assert (read, len(known)) == ([], len(RECORDS[CHILD.digest].keys["train"]))
    assert len(training_keys(Lineage(), train, lambda event: None)) == len(CHILD.train)
