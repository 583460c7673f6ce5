"""Other data for a finished text model: tables of texts, and the file that it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from advtrain.data import load_data
from advtrain.errors import UserError
from pipelines.model_ref import ExternalModelSpec, find_model
from pipelines.workspace import Workspace
from tests.kit import train_here
from tests.text_kit import KINDS, question, text_recipe


def write(path: Path, numbers: range, head: str) -> Path:
    lines = [f'"{question(n)}",{KINDS[n % 2]}' for n in numbers]
    path.write_text("\n".join([head, *lines, ""]))
    return path


@pytest.fixture
def trained(tmp_path):
    """Return the run folder of a model that was trained on the columns `words` and `kind` of a csv."""
    path = write(tmp_path / "train.csv", range(80), "words,kind")
    recipe = text_recipe(
        tmp_path, f"data.path={path}", "data.text=words", "data.label=kind", "training.epochs=1"
    )
    (tmp_path / "runs").mkdir()
    _, run = train_here(recipe, tmp_path / "runs", load_data(recipe.data, Path()))
    return run


def found(run, data: Path):
    workspace = Workspace(run.path.parent, "", run.path.parent)
    return find_model(str(run.path), workspace, ExternalModelSpec(), data=str(data), threat=None).dataset


def test_evaluation_reads_a_table_of_texts_by_the_columns_of_the_training(trained, tmp_path):
    test = found(trained, write(tmp_path / "new.csv", range(500, 506), "words,kind")).test
    assert test.texts.tolist() == [question(n) for n in range(500, 506)]
    assert test.labels.tolist() == [0, 1] * 3
    test = found(trained, write(tmp_path / "usual.csv", range(500, 504), "sentence,label")).test
    assert test.labels.tolist() == [0, 1] * 2
    with pytest.raises(UserError, match="call the column of labels kind"):
        found(trained, write(tmp_path / "odd.csv", range(500, 504), "words,sort"))


def test_table_that_a_text_model_was_trained_on_keeps_its_split(trained, tmp_path):
    digest = trained.facts()["data_digest"]
    assert found(trained, tmp_path / "train.csv").digest == digest
    assert 0 < len(found(trained, tmp_path / "train.csv").test) < 80
    moved = (tmp_path / "train.csv").rename(tmp_path / "moved.csv")
    assert found(trained, moved).digest == digest


def test_evaluation_loads_the_table_of_its_own_threat_model_only(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("advtrain.training.trained_model.require_recipe", lambda *_: None)
    stored = trained.path / "recipe.yaml"
    values = yaml.safe_load(stored.read_text())
    values["evaluation"] = {"threat": {"edits": "words", "at_most": 1, "table": "gone.json"}}
    stored.write_text(yaml.safe_dump(values))
    (tmp_path / "here.json").write_text('{"who": ["what"]}')
    workspace = Workspace(trained.path.parent, "", tmp_path)

    def table(threat, data=None):
        external = ExternalModelSpec()
        return find_model(str(trained.path), workspace, external, data=data, threat=threat).dataset.synonyms

    for data in (None, str(tmp_path / "train.csv")):
        assert table("words:1,table=here.json", data).name == "here.json"
        assert table("chars:1", data) is None
        with pytest.raises(UserError, match=r"gone\.json"):
            table(None, data)
