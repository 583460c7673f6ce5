"""The look at a data set: `advtrain data`, and what a training stores and warns of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from advtrain.runs.sealed import unsealed
from tests.kit import run_here

RECIPE = """
name: rows
data: {source: npz, path: d.npz}
model: {name: mlp, args: {width: 8}}
adversary: {name: fgsm, eps: 0.1}
objective: {clean_ce: 1}
optimizer: {name: adam, lr: 2e-3}
training: {epochs: 1, batch_size: 16}
evaluation: {threat: {eps: 0.01}, suite: pgd-1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the working folder, with d.npz: 40 samples of two classes, of which two are equal."""
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    x[39] = x[1]
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(40) % 2)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVTRAIN_DATA_ROOT", str(tmp_path))
    return tmp_path


def test_data_shows_a_path_and_a_recipe_alike(folder, capsys):
    found = []
    for target in ("d.npz", "r.yaml"):
        assert run_here("data", target, "--json", "-") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["samples"] == {"train": 29, "validation": 3, "test": 8}
    assert run_here("data", "d.npz") == 0
    shown = capsys.readouterr().out
    assert "samples of shape (1, 4, 4), uint8" in shown
    assert "copies: 1 " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d.npz", "--set", "data.validation_fraction=2"], "validation_fraction"),
        (["d.npz", "--set", "optimizer.lr=2"], "only settings of data"),
        (["digts"], "did you mean 'digits'"),
    ],
)
def test_data_refuses_what_it_cannot_do(folder, capsys, arguments, message):
    assert run_here("data", *arguments) == 2
    assert message in capsys.readouterr().err


def test_training_begins_with_the_data_and_stores_what_it_saw(folder, capsys):
    assert run_here("train", "r.yaml") == 0
    shown = capsys.readouterr().out
    assert shown.index("29 train, 3 validation, 8 test samples of 1 x 4 x 4, 2 classes") < shown.index(
        "run rows-"
    )
    (file,) = folder.glob("runs/rows-*/data.json")
    stored = unsealed(json.loads(file.read_text()))
    assert len(stored["data_digest"]) == 64
    assert stored["classes"]["0"] == {"train": 15, "validation": 1, "test": 4}
