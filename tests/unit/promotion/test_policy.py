"""The policy file: shipped ones load, what is wrong in one is named, and its digest is over all its values."""

from __future__ import annotations

import pytest

from advtrain.errors import UserError
from advtrain.promotion import Policy, load_policy
from tests.kit import ROOT

SHIPPED = sorted((ROOT / "pipelines" / "policies").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_policies_load_under_their_own_name(path):
    assert load_policy(path).name == path.stem


def test_the_default_file_says_what_the_defaults_are():
    values = {"name": "default", "version": 1, "description": load_policy(SHIPPED[0]).description}
    assert load_policy(SHIPPED[0]) == Policy(**values)


def test_the_digest_names_the_values():
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
        ("name: p", "version"),
        ("name: p\nversion: 1\nsuite: autoatack", "did you mean 'autoattack'"),
        ("name: p\nversion: 1\nneighbours: [1.1]", "no radius 1.1"),
        ("name: p\nversion: 1\nneighbours: []", "neighbours"),
        ("- p", "must be a map"),
        ("name: [", "not YAML"),
    ],
)
def test_what_is_wrong_in_a_policy_is_named(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "p.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the policy"):
        load_policy(tmp_path / "none.yaml")
