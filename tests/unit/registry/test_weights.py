"""References to weights: each source gives its own outputs, bit for bit, and is pinned by its digest."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from advtrain.data import Place
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.start import weights_digest
from advtrain.optim import optimizer_tensors
from advtrain.recipe import load_stored_recipe
from advtrain.registry.weights import resolve_weights
from advtrain.runs.checkpoint import TrainState, save_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.lineage import Ancestor
from advtrain.runs.start import read_start
from advtrain.training import Session, build_components
from advtrain.training.start import prepare_start
from advtrain.training.worker import build_loop
from tests.kit import digits_data, digits_recipe

DATA = digits_data()
NET = "model={name: cnn2, args: {width: 4}}"


def resolver(folder: Path, **options):
    """Return a function that resolves references to runs in `folder`."""
    return partial(resolve_weights, runs=folder, tracking_uri=f"sqlite:///{folder / 'none.db'}", **options)


def stored_run(folder: Path, *overrides: str, **facts) -> tuple[RunFolder, torch.nn.Module]:
    """Create a run with one checkpoint of random weights; return it and its model."""
    recipe = digits_recipe(NET, *overrides)
    model = build_model(recipe.model, DATA.shape, DATA.num_classes).eval()
    facts = {"status": "finished", "trained": True, "data_digest": DATA.digest} | facts
    run = RunFolder.create(folder, "source", recipe.digest(), recipe.to_yaml(), facts)
    line = {"epoch": 1, "val_robust_accuracy": 0.5, "epoch_seconds": 1.0}
    state = TrainState(1, 1, 0, recipe.digest(), model.state_dict(), {}, history=[line])
    save_checkpoint(state, run.checkpoints, 1)
    return run, model


def new_run(folder: Path, *overrides: str) -> tuple[RunFolder, torch.nn.Module]:
    """Create a run that starts from weights; return it and its model before the first step."""
    start = prepare_start(digits_recipe(NET, *overrides), DATA, resolver(folder))
    facts = {"status": "running", "data_digest": DATA.digest}
    run = RunFolder.create(folder, "child", start.recipe.digest(), start.recipe.to_yaml(), facts, start.write)
    loop = build_loop(start.recipe, DATA, run, Session())
    return run, loop.components.model.eval()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    (batch,) = DATA.test.take(range(100)).batches(100, Place())
    with torch.no_grad():
        return model(batch.x)


def file_of(folder: Path, name: str, weights) -> str:
    path = folder / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.clone() for k, v in weights.items()}, path)
    else:
        torch.save(weights, path)
    return str(path)


def as_run(folder, run, model):
    return run.name


def as_folder(folder, run, model):
    return str(run.path)


def as_safetensors(folder, run, model):
    return file_of(folder, "weights.safetensors", model.network.state_dict())


def as_wrapped_checkpoint(folder, run, model):
    wrapped = {f"module.{name}": value for name, value in model.network.state_dict().items()}
    return file_of(folder, "weights.pth", {"state_dict": wrapped})


@pytest.mark.parametrize("reference", [as_run, as_folder, as_safetensors, as_wrapped_checkpoint])
def test_loaded_network_equals_its_source(tmp_path, reference):
    source, model = stored_run(tmp_path)
    place = reference(tmp_path, source, model)
    run, loaded = new_run(tmp_path, f"model.from={place}", "seed=9")
    assert torch.equal(outputs(loaded), outputs(model))
    facts = run.facts()
    (ancestor,) = map(Ancestor.from_json, facts["ancestors"])
    assert (ancestor.role, ancestor.reference, ancestor.digest) == (
        "start",
        place,
        weights_digest(model.state_dict()),
    )
    assert ancestor.run == (source.name if reference in (as_run, as_folder) else None)
    assert facts["start"] == "8 tensors loaded"


def test_new_run_pins_the_weights(tmp_path):
    """The recipe has their digest, not their place, and other weights at that place are refused."""
    _, model = stored_run(tmp_path)
    one = file_of(tmp_path, "one.safetensors", model.state_dict())
    two = file_of(tmp_path, "two.pth", model.network.state_dict())
    recipes = [
        prepare_start(recipe, DATA, resolver(tmp_path)).recipe
        for recipe in (digits_recipe(NET, f"model.from={place}") for place in (one, two))
    ]
    assert recipes[0].model.from_digest == weights_digest(model.state_dict())
    assert recipes[0].digest() == recipes[1].digest() != digits_recipe(NET).digest()
    assert prepare_start(recipes[0], DATA, resolver(tmp_path)).recipe == recipes[0]
    _, other = stored_run(tmp_path)
    file_of(tmp_path, "one.safetensors", other.state_dict())
    with pytest.raises(UserError, match="has other weights .* than model.from_digest"):
        prepare_start(recipes[0], DATA, resolver(tmp_path))


def test_resume_never_reads_the_source(tmp_path):
    source, model = stored_run(tmp_path)
    run, _ = new_run(tmp_path, f"model.from={source.name}")
    shutil.rmtree(source.path)
    recipe = load_stored_recipe(run.path / "recipe.yaml")
    moved = RunFolder(run.path.rename(tmp_path / "elsewhere"))
    assert torch.equal(
        outputs(build_loop(recipe, DATA, moved, Session()).components.model.eval()), outputs(model)
    )
    other = build_model(recipe.model, DATA.shape, DATA.num_classes).eval()
    state = TrainState(1, 1, 0, recipe.until(2).digest(), other.state_dict(), {}, history=[])
    components = build_components(recipe, DATA, Session())
    state.optimizer = optimizer_tensors(components.optimizer)
    save_checkpoint(state, moved.checkpoints, 1)
    assert torch.equal(
        outputs(build_loop(recipe, DATA, moved, Session()).components.model.eval()), outputs(other)
    )


@pytest.mark.parametrize("name", ["model.safetensors", "start.json"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)]
)
def test_damaged_start_folder_is_refused(tmp_path, name, damage):
    source, _ = stored_run(tmp_path)
    run, _ = new_run(tmp_path, f"model.from={source.name}")
    damage(run.path / "start" / name)
    with pytest.raises(UserError, match="start weights in .* are missing or damaged"):
        read_start(run.path, load_stored_recipe(run.path / "recipe.yaml").model)


def test_backbone_keeps_the_random_head(tmp_path):
    """A head with another number of classes is left out, and the rest is loaded."""
    _, model = stored_run(tmp_path)
    weights = model.state_dict() | {"network.3.weight": torch.ones(3, 100), "network.3.bias": torch.ones(3)}
    place = f"model.from={file_of(tmp_path, 'three.safetensors', weights)}"
    run, loaded = new_run(tmp_path, place, "model.load=backbone")
    fresh = build_components(digits_recipe(NET), DATA, Session()).model
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("network.3") else model).state_dict()[name]), (
            name
        )
    assert run.facts()["start"] == (
        "6 tensors loaded; new: network.3.weight, network.3.bias; ignored: network.3.bias, network.3.weight"
    )
    with pytest.raises(
        UserError, match=r"another head .*network.3.weight: 3x100, here 10x100.*load: backbone"
    ):
        new_run(tmp_path, place)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"0.0.weight": None}, r"missing: network.0.0.weight\)"),
        ({"0.0.weight": None, "3.bias": None}, "missing: network.0.0.weight, network.3.bias"),
        ({"3.bias": None}, r"another head than this model \(network.3.bias\)"),
        ({"extra.weight": torch.ones(1)}, "unexpected: network.extra.weight"),
        ({"0.0.weight": torch.ones(4, 3, 4, 4)}, "shapes: network.0.0.weight: 4x3x4x4, here 4x1x4x4"),
        ({"1.bias": torch.ones(100).double()}, "network.1.bias: 100 float64, here 100"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, message):
    _, model = stored_run(tmp_path)
    changed = model.network.state_dict() | weights
    place = file_of(tmp_path, "w.safetensors", {k: v for k, v in changed.items() if v is not None})
    with pytest.raises(UserError, match=message):
        new_run(tmp_path, f"model.from={place}")
    assert not list(tmp_path.glob("child*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "model.mean differs from .* need model.mean: \\[0.5\\], model.std: null"),
        (["model.mean=[0.4]"], "need model.mean: \\[0.5\\]"),
        (["model.mean=[0.5]", "model.std=[0.2]"], "model.std differs"),
    ],
)
def test_another_normalization_is_refused(tmp_path, overrides, message):
    source, model = stored_run(tmp_path, "model.mean=[0.5]")
    with pytest.raises(UserError, match=message):
        new_run(tmp_path, f"model.from={source.name}", *overrides)
    _, loaded = new_run(tmp_path, f"model.from={source.name}", "model.mean=[0.5]")
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "model.from 'nothing': no run 'nothing'"),
        ("sourc-1", "did you mean 'source-"),
        ("none.safetensors", "cannot read the file: No such file"),
        ("objects.pth", "not a state dict of tensors; Python objects are not loaded"),
        ("empty.pt", "holds no state dict"),
        ("torchvision:squeezenet1_1", "name its weights.*IMAGENET1K_V1"),
        ("torchvision:squeezenet1_1/V9", "name its weights"),
        ("torchvision:squeezenet1/V1", "unknown torchvision model 'squeezenet1'; did you mean"),
        (
            "torchvision:squeezenet1_1/IMAGENET1K_V1",
            "not in the local cache; allow its download with --allow-down",
        ),
        ("timm:resnet", "unknown timm model 'resnet'"),
        ("timm:resnet10t.nothing", "no pretrained weights"),
        ("timm:resnet10t", "'timm/resnet10t.c3_in1k' of the Hugging Face hub is not in the local cache"),
    ],
)
def test_invalid_references_are_refused(tmp_path, monkeypatch, reference, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    stored_run(tmp_path)
    torch.save({"weight": Path("x")}, "objects.pth")
    torch.save({}, "empty.pt")
    with pytest.raises(UserError, match=message):
        resolver(tmp_path)(reference)


def test_load_without_weights_is_refused():
    for setting in ("model.load=backbone", f"model.from_digest={'a' * 64}"):
        with pytest.raises(UserError, match="need `from`, the weights to start from"):
            digits_recipe(setting)
