"""The look at a data set: `advtrain data`, and what a training stores and warns of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from advtrain.data import DataConfig, load_data
from advtrain.runs.sealed import unsealed
from advtrain.tracking.store import open_client
from tests.kit import advtrain, run_here

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with d.npz, 40 samples of two classes of which two are equal, and a model of it."""
    folder = tmp_path_factory.mktemp("rows")
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    x[39] = x[1]
    np.savez(folder / "d.npz", x=x, y=np.array(["cat", "dog"])[np.arange(40) % 2])
    np.savez(folder / "new.npz", x=x[:10], y=np.array(["dog", "cat"] * 5))
    np.savez(folder / "birds.npz", x=x[:10], y=np.array(["dog", "bird"] * 5))
    np.savez(folder / "wide.npz", x=np.zeros((10, 5, 5), np.uint8), y=np.array(["dog", "cat"] * 5))
    (folder / "r.yaml").write_text(RECIPE)
    done = advtrain("train", "r.yaml", cwd=folder, env={"ADVTRAIN_DATA_ROOT": str(folder)})
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def folder(trained, monkeypatch):
    """Return the folder of the model, as the working folder."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("ADVTRAIN_DATA_ROOT", str(trained))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
    return trained


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


def test_training_begins_with_the_data_and_stores_what_it_saw(folder):
    shown = (folder / "output.txt").read_text()
    assert shown.index("29 train, 3 validation, 8 test samples of 1 x 4 x 4, 2 classes") < shown.index(
        "run rows-"
    )
    (file,) = folder.glob("runs/rows-*/data.json")
    stored = unsealed(json.loads(file.read_text()))
    assert len(stored["data_digest"]) == 64
    assert stored["classes"]["cat"] == {"train": 14, "validation": 2, "test": 4}


@pytest.mark.parametrize("data", ["d.npz", "r.yaml", "new.npz"])
def test_a_model_is_evaluated_on_data_at_a_path(folder, capsys, data):
    """Its own data has a test split of 8; other data is evaluated whole, with classes matched by name."""
    options = ["--data", data, "--suite", "pgd-1", "--json", "-"]
    assert run_here("evaluate", "models:/rows/1", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clean"]["total"] == (10 if data == "new.npz" else 8)
    assert [figure["name"] for figure in report["per_class"]] == ["cat", "dog"]
    assert ("training_copies" in report) == (data == "new.npz")


def test_copies_of_training_samples_in_other_data_are_counted(folder, capsys, tmp_path):
    """new.npz holds the first 10 samples of d.npz."""
    training = load_data(DataConfig(source="npz", path="d.npz"), folder).train.images[:, 0]
    new = np.load(folder / "new.npz")["x"]
    copied = sum(any(np.array_equal(x, known) for known in training) for x in new)
    assert 0 < copied < 10
    command = ["evaluate", "models:/rows/1", "--data", str(folder / "new.npz"), "--suite", "pgd-1"]
    assert run_here(*command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{copied} of 10 samples of new.npz are copies of training samples of models:/rows/1" in shown
    assert run_here(*command, "--data-root", str(tmp_path)) == 0  # without the training data
    assert f"{copied} of 10 samples of new.npz are copies" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("birds.npz", "bird"),
        ("wide.npz", "the model has inputs (1, 4, 4)"),
        ("nothing", "no such file or folder"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(folder, capsys, data, message):
    assert run_here("evaluate", "models:/rows/1", "--data", data) == 2
    assert message in capsys.readouterr().err


def test_a_table_is_trained_on_judged_and_predicted(tmp_path, monkeypatch, capsys):
    """Columns are scaled by the training split; new rows are scaled alike, in any order of columns."""
    rng = np.random.default_rng(0)
    age, color = rng.integers(20, 80, 60), rng.choice(["red", "blue"], 60)
    rows = [f"{a},{c},{'old' if a > 50 else 'young'}" for a, c in zip(age, color, strict=True)]
    (tmp_path / "people.csv").write_text("\n".join(["age,color,group", *rows]) + "\n")
    (tmp_path / "new.csv").write_text("color,age\nred,25\ngreen,75\nblue,300\n")
    text = RECIPE.replace("source: npz, path: d.npz", "source: csv, path: people.csv, label: group")
    text = text.replace("epochs: 1", "epochs: 20").replace("lr: 2e-3", "lr: 0.05")
    (tmp_path / "r.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVTRAIN_DATA_ROOT", str(tmp_path))
    store = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert run_here("train", "r.yaml", *store) == 0
    assert run_here("predict", "models:/rows/1", "new.csv", "--out", "p.jsonl", *store) == 0
    found = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [record["name"] for record in found] == ["young", "old", "old"]
    capsys.readouterr()
    assert run_here("evaluate", "models:/rows/1", "--data", "people.csv", "--suite", "pgd-1", *store) == 0
    shown = capsys.readouterr().out
    assert "test samples of people.csv, linf:0.01" in shown
    assert "linf:0.01 in the units of the features" in shown
    (tmp_path / "narrow.csv").write_text(
        "\n".join(["age,color,group", *[r for r in rows if r[0] in "45"]]) + "\n"
    )
    (tmp_path / "narrow.yaml").write_text(text.replace("people.csv", "narrow.csv"))
    assert run_here("evaluate", "models:/rows/1", "--data", "narrow.yaml", "--suite", "pgd-1", *store) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "│ age" in line)
    assert [cell.strip() for cell in row.split("│")[1:4]] == [
        "age",
        "20 to 78",
        "± 0.58",
    ]  # scaled as in training, not by its own rows
    run = open_client(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])[0]
    assert {each.dataset.name for each in run.inputs.dataset_inputs} == {
        f"people.csv-{split}" for split in ("train", "validation", "test")
    }
    for command in (["show", "r.yaml"], ["data", "r.yaml"]):
        assert run_here(*command) == 0
        shown = capsys.readouterr().out
        assert "change at linf:0.01 (evaluation)" in shown
        assert "color (one-hot, 2 categories)" in shown
    assert run_here("show", "r.yaml", "--data-root", "elsewhere") == 0
    assert "radii in the units of the features are not shown" in capsys.readouterr().out
    assert run_here("predict", "models:/rows/1", "r.yaml", *store) == 2
    assert "age, color" in capsys.readouterr().err
