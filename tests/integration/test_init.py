"""`advtrain init`: a first recipe for data, written after a look at it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from advtrain.recipe import load_recipe
from tests.kit import run_here


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return an empty folder, the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVTRAIN_DATA_ROOT", raising=False)
    return tmp_path


def _npz(name, distance):
    """Write two classes of tables at the given L-inf distance."""
    x = np.full((60, 3), 0.2, np.float32)
    x[30:, 1] += distance
    np.savez(name, x=x + np.linspace(0, 1e-4, 60, dtype=np.float32)[:, None], y=np.repeat(["a", "b"], 30))


def test_init_writes_a_recipe_that_trains(folder, capsys):
    _npz("two groups.npz", 0.5)
    assert run_here("init", "two groups.npz") == 0
    shown = capsys.readouterr().out
    assert (
        shown.index("copies: none")
        < shown.index("name: two_groups")
        < shown.index("advtrain train two_groups.yaml")
    )
    recipe = load_recipe("two_groups.yaml")
    assert (recipe.data.source, recipe.model.name) == ("npz", "mlp")
    assert recipe.adversary.eps == recipe.evaluation.threat.eps == 0.05
    quick = ["--set", "training.epochs=1", "--set", "evaluation.suite=pgd-1", "--workers", "0"]
    assert run_here("train", "two_groups.yaml", "--data-root", ".", *quick) == 0


@pytest.mark.parametrize(("distance", "radius"), [(0.5, "0.05"), (0.05, "0.02"), (0.0, "1/255")])
def test_radius_keeps_the_classes_apart(folder, capsys, distance, radius):
    _npz("d.npz", distance)
    assert run_here("init", "d.npz", "-o", "r.yaml", "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    text = (folder / "r.yaml").read_text()
    assert f"eps: {radius}}}" in text
    assert printed["recipe"] == text
    assert f"With eps {radius}, " in printed["reasons"][-1]


def test_init_takes_settings_of_a_table(folder):
    rows = "\n".join(f"{n},{n * n % 7},{n / 3}" for n in range(40))
    (folder / "t.csv").write_text(f"a,b,price\n{rows}\n")
    assert run_here("init", "t.csv", "--set", "data.label=price", "--set", "data.task=regression") == 0
    recipe = load_recipe("t.yaml")
    assert recipe.objective.regression
    assert recipe.data.label == "price"


@pytest.mark.slow  # images in files are decoded by Ray
def test_init_resizes_images_of_several_sizes(folder):
    noise = np.random.default_rng(0)
    for number in range(24):
        path = folder / "pets" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40 + number, 50, 3), np.uint8)).save(path)
    assert run_here("init", "pets") == 0
    recipe = load_recipe("pets.yaml")
    assert recipe.data.image_size == 64
    assert recipe.evaluation.threat.eps == pytest.approx(8 / 255)


@pytest.mark.parametrize("name", ["2024", "on", "true", "null", "010", "1e3"])
def test_init_names_a_recipe_after_a_file_that_yaml_would_read_as_a_value(folder, capsys, name):
    _npz(f"{name}.npz", 0.5)
    assert run_here("init", f"{name}.npz", "-o", "my recipe.yaml") == 0
    assert load_recipe("my recipe.yaml").name == name
    assert "advtrain train 'my recipe.yaml'" in capsys.readouterr().out


def test_init_overwrites_nothing(folder, capsys):
    _npz("d.npz", 0.5)
    (folder / "d.yaml").write_text("mine")
    assert run_here("init", "d.npz") == 2
    assert "'d.yaml' exists; name another file with --output" in capsys.readouterr().err
    assert (folder / "d.yaml").read_text() == "mine"
