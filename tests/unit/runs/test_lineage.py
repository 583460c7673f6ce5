"""Lineage of a run."""

from advtrain.runs.lineage import Ancestor, all_ancestors


def test_ancestors_survive_json_and_are_found_at_every_depth() -> None:
    oldest = Ancestor("teacher", "runs/teacher", "c" * 64)
    parent = Ancestor("start", "models:/mnist/3", "a" * 64, "mnist-1", "b" * 64, (oldest,))

    assert Ancestor.from_json(parent.as_json()) == parent
    assert list(all_ancestors([parent, oldest])) == [parent, oldest, oldest]
