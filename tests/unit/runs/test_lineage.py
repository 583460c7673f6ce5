"""Lineage of a run."""

import json

import pytest

from advtrain.runs.lineage import (
    ANCESTORS_TAG,
    Ancestor,
    all_ancestors,
    ancestor_rows,
    ancestors_tag,
    named_in_tag,
)


def test_ancestors_survive_json_and_are_found_at_every_depth() -> None:
    oldest = Ancestor("teacher", "runs/teacher", "c" * 64)
    parent = Ancestor("start", "models:/mnist/3", "a" * 64, "mnist-1", "b" * 64, (oldest,))

    assert Ancestor.from_json(parent.as_json()) == parent
    assert list(all_ancestors([parent, oldest])) == [parent, oldest, oldest]


def test_tag_names_direct_ancestors_and_table_names_all() -> None:
    oldest = Ancestor("teacher", "weights.pth", "c" * 64)
    parent = Ancestor("start", "models:/mnist/3", "a" * 64, "mnist-1", "b" * 64, (oldest,))

    (named,) = named_in_tag(ancestors_tag([parent])[ANCESTORS_TAG])
    assert (named.reference, named.digest, named.data_digest) == ("models:/mnist/3", "a" * 64, "b" * 64)
    assert list(ancestor_rows([parent])) == [
        ["start", "models:/mnist/3", "a" * 12, "b" * 12],
        ["teacher of models:/mnist/3", "weights.pth", "c" * 12, "unknown"],
    ]
    assert ancestors_tag([]) == {}


VALID = {"role": "start", "reference": "r", "digest": "d"}


@pytest.mark.parametrize(
    "text",
    ["", "[", "7", "[7]", '["a"]', '[{"role": "start"}]', '[{"a": 1}]', "null"]
    + [json.dumps([VALID | {key: value}]) for key in VALID for value in (None, 1, {})]
    + [json.dumps([VALID | {"ancestors": value}]) for value in (1, ["a"], [VALID | {"digest": None}])],
)
def test_other_text_in_the_tag_names_nothing(text: str) -> None:
    assert named_in_tag(text) == []
