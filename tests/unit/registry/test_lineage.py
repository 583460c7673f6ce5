"""Lineage of a version: ancestors and records of samples are kept beside its model and cannot be changed."""

from __future__ import annotations

import json

import pytest

from advtrain.data import DataConfig, load_data
from advtrain.errors import UserError
from advtrain.registry.export import changed_files, digest_tags, file_digests
from advtrain.registry.lineage import log_lineage, read_lineage
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import write_rows
from advtrain.runs.lineage import Ancestor


@pytest.fixture
def logged(client, run_id, tmp_path):
    """Return the downloaded files of a child whose parent has the same digits with another split."""
    parent, child = (load_data(DataConfig(source="digits", split_seed=seed), tmp_path) for seed in (0, 1))
    ancestor = Ancestor("start", "models:/digits/1", "f" * 64, "digits-1", parent.digest)
    facts = {"status": "running", "data_digest": child.digest, "ancestors": [ancestor.as_json()]}
    run = RunFolder.create(tmp_path / "runs", "child", "0" * 64, "model: {from: models:/digits/1}\n", facts)
    write_rows(run.rows, parent)
    log_lineage(client, run_id, run, child)
    client.log_artifact(run_id, str(run.path / "recipe.yaml"))
    client.download_artifacts(run_id, "", str(tmp_path / "files"))
    return tmp_path / "files", ancestor, child


def test_lineage_of_a_version_names_ancestors_and_finds_leaks(logged):
    folder, ancestor, child = logged
    lineage = read_lineage(folder)
    assert (lineage.ancestors, lineage.data_digest, lineage.unrecorded) == ((ancestor,), child.digest, ())
    assert {leak.split for leak in lineage.check().leaks} == {"validation", "test"}
    assert not lineage.check().unknown


def test_lineage_is_among_the_digested_files(logged):
    folder, ancestor, child = logged
    digests = file_digests(folder)
    assert {f"rows/{child.digest}.rows", f"rows/{ancestor.data_digest}.rows", "rows/lineage.json"} < set(
        digests
    )
    (folder / "rows" / "lineage.json").unlink()
    assert changed_files(digest_tags(digests), folder) == ["rows/lineage.json is missing"]


def test_a_source_without_a_recorded_ancestor_is_unknown(logged):
    folder, *_ = logged
    path = folder / "rows" / "lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ancestors": []}))
    assert read_lineage(folder).check().unknown == ["model.from has no recorded ancestor"]


def test_a_teacher_of_an_earlier_release_is_unknown(tmp_path):
    (tmp_path / "recipe.yaml").write_text("objective: {adv_ce: 1, hat: 0.5, hat_teacher: runs/standard-1}\n")
    assert read_lineage(tmp_path).check().unknown == ["objective.teacher has no recorded ancestor"]


@pytest.mark.parametrize(
    "values", [{"ancestors": ["a"]}, {"ancestors": 1}, {"allowed_leak": "x"}, {"ancestors": [{"role": None}]}]
)
def test_other_values_in_a_lineage_are_refused(tmp_path, values):
    (tmp_path / "rows").mkdir()
    facts = {"data_digest": "d", "ancestors": []}
    (tmp_path / "rows" / "lineage.json").write_text(json.dumps(facts | values))
    with pytest.raises(UserError, match="rows/lineage.json' of the version is damaged"):
        read_lineage(tmp_path)


def test_a_damaged_lineage_is_refused(logged):
    folder, ancestor, _ = logged
    rows = folder / "rows" / f"{ancestor.data_digest}.rows"
    rows.write_bytes(rows.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged: its digest"):
        read_lineage(folder)
    rows.unlink()
    (folder / "rows" / "lineage.json").write_text('{"data_digest": "d", "ancestors": [{"role": 1}]}')
    with pytest.raises(UserError, match="rows/lineage.json' of the version is damaged"):
        read_lineage(folder)


def test_a_version_of_an_earlier_release_has_no_ancestors(tmp_path):
    lineage = read_lineage(tmp_path)
    assert (lineage.ancestors, lineage.check().leaks, lineage.check().unknown) == ((), [], [])
