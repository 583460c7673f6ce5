"""Policy files: shipped ones load, errors name the invalid value, the digest covers all values."""

from __future__ import annotations

import pytest

from advtrain.errors import UserError
from advtrain.promotion import Policy, load_policy
from tests.kit import ROOT

SHIPPED = sorted((ROOT / "pipelines" / "policies").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_policy_is_named_after_its_file(path):
    assert load_policy(path).name == path.stem


def test_default_policy_file_matches_defaults():
    values = {"name": "default", "version": 2, "description": load_policy(SHIPPED[0]).description}
    assert load_policy(SHIPPED[0]) == Policy(**values)


def test_policy_digest_depends_on_values():
    one = Policy(name="p", version=1)
    assert one.digest == Policy(name="p", version=1).digest
    assert (
        len({one.digest, Policy(name="p", version=2).digest, Policy(name="p", version=1, alpha=0.01).digest})
        == 3
    )
    assert one.record()["digest"] == one.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: p\nversion: 1\nmin_gian: 0", "did you mean 'min_gain'"),
        ("name: p\nversion: 1\nalpha: 0.7", "alpha"),
        ("name: p\nversion: 1\nalpha: '5 %'", "alpha"),
        ("name: p", "'version' is missing"),
        ("alpha: 0.01", "'name', 'version' are missing"),
        ("name: p\nversion: 1\nsuite: autoatack", "did you mean 'autoattack'"),
        ("name: p\nversion: 1\nneighbours: [1.1]", "no radius 1.1"),
        ("name: p\nversion: 1\nneighbours: []", "neighbours"),
        ("name: p\nversion: 1\nprovenance: {unknown_ancestors: accept}", "provenance.unknown_ancestors"),
        ("- p", "must be a map"),
        ("name: [", "not YAML"),
    ],
)
def test_load_policy_error_names_invalid_value(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "p.yaml")


def test_load_policy_rejects_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the policy"):
        load_policy(tmp_path / "none.yaml")
