"""References to weights: each source gives its own outputs, bit for bit, and is pinned by its digest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

from advtrain.data import ArraySplit, Dataset, Place
from advtrain.documents import read_record
from advtrain.environment import describe_environment
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.start import weights_digest
from advtrain.optim import optimizer_tensors
from advtrain.recipe import load_stored_recipe
from advtrain.recipe.model import ModelConfig
from advtrain.registry import register
from advtrain.registry.weights import resolve_weights
from advtrain.runs.checkpoint import TrainState, save_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import Lineage, write_rows
from advtrain.runs.lineage import Ancestor
from advtrain.runs.start import ResolvedWeights, read_start
from advtrain.tracking.tracker import Tracker
from advtrain.training import Session, build_components
from advtrain.training.start import prepare_start
from advtrain.training.worker import build_loop
from tests.kit import digits_data, digits_recipe
from tests.registry_kit import flags, make_evaluation

DATA = digits_data()
NET = "model={name: cnn2, args: {width: 4}}"


def resolver(folder: Path, **options):
    """Return a function that resolves references to runs in `folder`."""
    return partial(resolve_weights, runs=folder, **{"tracking_uri": "sqlite:///none.db"} | options)


def stored_run(folder: Path, *overrides: str) -> tuple[RunFolder, torch.nn.Module]:
    """Create a run with one checkpoint of random weights; return it and its model."""
    recipe = digits_recipe(NET, *overrides)
    model = build_model(recipe.model, DATA.shape, DATA.num_classes).eval()
    facts = {
        "status": "finished",
        "data_digest": DATA.digest,
        "environment": describe_environment("cnn2"),
    }
    run = RunFolder.create(folder, "source", recipe.digest(), recipe.to_yaml(), facts)
    line = {"epoch": 1, "val_robust_accuracy": 0.5, "epoch_seconds": 1.0}
    state = TrainState(1, 1, 0, recipe.digest(), model.state_dict(), {}, history=[line])
    save_checkpoint(state, run.checkpoints, 1)
    return run, model


def new_run(
    folder: Path, *overrides: str, data: Dataset = DATA, **options
) -> tuple[RunFolder, torch.nn.Module]:
    """Create a run that starts from weights; return it and its model before the first step."""
    recipe = digits_recipe(NET, *overrides)
    start = prepare_start(recipe, data, resolver(folder, **options))
    facts = {"status": "running", "data_digest": DATA.digest}
    run = RunFolder.create(folder, "child", start.recipe.digest(), start.recipe.to_yaml(), facts, start.write)
    loop = build_loop(start.recipe, data, run, Session())
    return run, loop.components.model.eval()


def outputs(model: torch.nn.Module, data: Dataset = DATA) -> torch.Tensor:
    (batch,) = data.test.take(range(100)).batches(100, Place())
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


TEACHER = Ancestor("teacher", "runs/standard-1", "")


@pytest.mark.parametrize("recorded", [(), (Ancestor("teacher", "models:/t/1", "a" * 64),)])
def test_an_unrecorded_teacher_of_the_source_is_an_ancestor(tmp_path, recorded):
    source, _ = stored_run(tmp_path, "objective={adv_ce: 1, hat: 0.5, teacher: runs/standard-1}")
    source.update(ancestors=[ancestor.as_json() for ancestor in recorded])
    found = resolver(tmp_path)(source.name).ancestor
    assert found.ancestors == (recorded or (TEACHER,))
    unknown = Lineage("d", (found,), {}).check().unknown
    assert recorded or any(TEACHER.reference in sentence for sentence in unknown)


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


@pytest.mark.slow
def test_registered_version_equals_its_model(tmp_path, store):
    """An alias is resolved to its version; the lineage of its run is found in the run folder."""
    source, model = stored_run(tmp_path, "model.mean=[0.5]", "model.std=[0.25]")
    older = Ancestor("start", "models:/older/1", "a" * 64)
    source.update(ancestors=[older.as_json()])
    write_rows(source.rows, DATA)
    recipe = load_stored_recipe(source.path / "recipe.yaml")
    tracker = Tracker.start(source, recipe, DATA, store)
    report = make_evaluation(flags(8, 8), flags(8, 8)).report
    register(source, tracker, model, recipe, DATA, report)
    where = {"tracking_uri": store}
    scale = ("model.mean=[0.5]", "model.std=[0.25]")
    for reference in (f"models:/{recipe.name}@challenger", f"models:/{recipe.name}/1"):
        run, loaded = new_run(tmp_path, f"model.from={reference}", *scale, **where)
        assert torch.equal(outputs(loaded), outputs(model))
        (ancestor,) = map(Ancestor.from_json, run.facts()["ancestors"])
        weights = weights_digest(model.state_dict())
        assert ancestor == Ancestor(
            "start", f"models:/{recipe.name}/1", weights, source.name, DATA.digest, (older,)
        )
        assert list(Lineage.of_run(run).records) == [DATA.digest]
    run.update(environment=describe_environment("cnn2"))
    child = load_stored_recipe(run.path / "recipe.yaml")
    found = Tracker.start(run, child, DATA, store).client.get_run(run_id_of(run)).data
    assert found.tags["advtrain.start"] == "8 tensors loaded"
    assert found.params["model.from"] == f"models:/{recipe.name}/1"
    assert found.params["model.from_digest"] == child.model.from_digest
    with pytest.raises(UserError, match="need model.mean: .0.5., model.std: .0.25."):
        new_run(tmp_path, f"model.from=models:/{recipe.name}/1", **where)
    for reference in ("models:/none@champion", f"models:/{recipe.name}/2"):
        with pytest.raises(UserError, match=f"model.from '{reference}': cannot load"):
            resolver(tmp_path, **where)(reference)


def run_id_of(run: RunFolder) -> str:
    """Return the id of the MLflow run of a run folder."""
    return str(read_record(run.path / "tracking.json")["run_id"])


COLOR = replace(
    DATA,
    shape=(3, 32, 32),
    train=ArraySplit(np.zeros((4, 3, 32, 32), np.uint8), np.arange(4)),
    test=ArraySplit(
        np.random.default_rng(0).integers(0, 256, (100, 3, 32, 32), np.uint8), np.zeros(100, int)
    ),
)


def torchvision_cache(folder: Path, monkeypatch) -> torch.nn.Module:
    """Put random weights into the cache of torchvision; return their network."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    network = torchvision.models.squeezenet1_1().eval()
    file = folder / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    return network


def timm_cache(folder: Path, monkeypatch) -> torch.nn.Module:
    """Put random weights into the cache of the hub; return their network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    network = timm.create_model("test_convnext").eval()
    place = folder / "hub" / "models--timm--test_convnext.r160_in1k"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    safetensors.torch.save_file(network.state_dict(), place / "snapshots" / ("0" * 40) / "model.safetensors")
    return network


@pytest.mark.parametrize(
    ("cache", "name", "reference", "mean"),
    [
        (torchvision_cache, "torchvision:squeezenet1_1", "torchvision:squeezenet1_1/IMAGENET1K_V1", 0.485),
        (timm_cache, "timm:test_convnext", "timm:test_convnext.r160_in1k", 0.5),
    ],
)
def test_pretrained_weights_come_with_their_normalization(
    tmp_path, monkeypatch, cache, name, reference, mean
):
    """They are read from the cache; their network is trained on 1,000 classes."""
    network = cache(tmp_path, monkeypatch)
    data = replace(COLOR, num_classes=1000)
    settings = (f"model={{name: {name}, from: {reference}}}", "training.channels_last=false")
    run, loaded = new_run(tmp_path, *settings, data=data)
    recipe = load_stored_recipe(run.path / "recipe.yaml")
    assert recipe.model.mean[0] == pytest.approx(mean)
    assert recipe.model.from_digest == weights_digest(network.state_dict())
    (batch,) = data.test.batches(100, Place())
    scale = [torch.tensor(values).view(3, 1, 1) for values in (recipe.model.mean, recipe.model.std)]
    with torch.no_grad():
        assert torch.equal(loaded(batch.x), network((batch.x - scale[0]) / scale[1]))
    own = (*settings, "model.mean=[0.1]", "model.std=[0.2]")
    kept = prepare_start(digits_recipe(*own), data, resolver(tmp_path)).recipe.model
    assert (kept.mean, kept.std) == ([0.1], [0.2])
    with pytest.raises(UserError, match="has another head than this model"):
        prepare_start(digits_recipe(*settings), COLOR, resolver(tmp_path))
    few = prepare_start(digits_recipe(*settings, "model.load=backbone"), COLOR, resolver(tmp_path))
    assert sorted(few.fitted.new) == few.fitted.ignored != []


LIBRARY, VERSION = "timm:resnet10t", "models:/m/1"
PLAIN, SCALED, HALF = (None, None), ([0.5], [0.25]), ([0.5], None)


@pytest.mark.parametrize(
    ("reference", "theirs", "own", "filled"),
    [
        (LIBRARY, SCALED, PLAIN, SCALED),
        (LIBRARY, SCALED, ([0.1], [0.2]), ([0.1], [0.2])),
        (LIBRARY, SCALED, ([0.1], None), "model.std differs .* need model.mean: .0.5., model.std: .0.25."),
        (LIBRARY, SCALED, (None, [0.2]), "model.mean differs .* need model.mean: .0.5., model.std: .0.25."),
        (LIBRARY, PLAIN, HALF, HALF),
        (VERSION, SCALED, SCALED, SCALED),
        (VERSION, SCALED, PLAIN, "model.mean differs .* need model.mean: .0.5., model.std: .0.25."),
        (VERSION, PLAIN, HALF, "model.mean differs .* need model.mean: null, model.std: null"),
    ],
)
def test_normalization_of_the_source(reference, theirs, own, filled):
    """The version has no record of its run. It needs its normalization as a run does."""
    recipe = digits_recipe(NET, f"model.from={reference}")
    model = build_model(recipe.model, DATA.shape, DATA.num_classes)
    weights, (mean, std) = model.state_dict(), theirs
    source = ModelConfig(name="cnn2", args=recipe.model.args, mean=mean, std=std)
    resolved = ResolvedWeights(weights, Ancestor("start", reference, weights_digest(weights)), source)
    recipe = digits_recipe(
        NET,
        f"model.from={reference}",
        *(
            f"model.{key}={'null' if value is None else value}"
            for key, value in zip(("mean", "std"), own, strict=True)
        ),
    )
    if isinstance(filled, str):
        with pytest.raises(UserError, match=filled):
            prepare_start(recipe, DATA, lambda _: resolved)
    else:
        found = prepare_start(recipe, DATA, lambda _: resolved).recipe.model
        assert (found.mean, found.std) == filled
