"""A run with a teacher and start weights: pinned, copied, checked, and the same after a resume."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from advtrain.data import Place
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.start import weights_digest
from advtrain.recipe import load_stored_recipe
from advtrain.recipe.model import ModelConfig
from advtrain.recipe.paths import override
from advtrain.registry.weights import resolve_weights
from advtrain.runs.checkpoint import TrainState, load_checkpoint, save_checkpoint
from advtrain.runs.folder import RunFolder, write_atomically
from advtrain.runs.sealed import sealed_json, unsealed
from advtrain.runs.start import save_weights, saved_weights
from advtrain.training import Session, build_components, loop, run_worker
from advtrain.training.start import prepare_start
from advtrain.training.step import Progress
from advtrain.training.worker import build_loop
from tests.kit import digits_data, digits_recipe
from tests.unit.training.test_loop import equal, stop_at

DATA = digits_data()
NET = "model={name: cnn2, args: {width: 4}}"
RSLAD = ("adversary.loss=kl_teacher", "adversary.start=gaussian")
WEIGHTS = "objective={distill_adv: 5/6, distill_clean: 1/6, teacher: "


def teacher_run(
    folder: Path, *overrides: str, shape=(1, 8, 8), classes=10, data_digest=DATA.digest, names=None
):
    """Create a run with one checkpoint of random weights; return it and its model."""
    recipe = digits_recipe(*(overrides or ("model={name: cnn2, args: {width: 6}}",)))
    torch.manual_seed(4)
    model = build_model(recipe.model, shape, classes).eval()
    facts = {"status": "finished", "trained": True, "data_digest": data_digest}
    run = RunFolder.create(folder, "taught", recipe.digest(), recipe.to_yaml(), facts)
    summary = {"shape": list(shape), "classes": {name: {} for name in names or map(str, range(classes))}}
    write_atomically(run.path / "data.json", sealed_json(summary))
    line = {"epoch": 1, "val_robust_accuracy": 0.5, "epoch_seconds": 1.0}
    save_checkpoint(
        TrainState(1, 1, 0, recipe.digest(), model.state_dict(), {}, history=[line]), run.checkpoints, 1
    )
    return run, model


def prepared(folder: Path, *overrides: str, net: str = NET):
    resolve = partial(resolve_weights, runs=folder, tracking_uri=f"sqlite:///{folder / 'none.db'}")
    return prepare_start(digits_recipe(net, *overrides), DATA, resolve)


def new_run(folder: Path, *overrides: str) -> tuple[RunFolder, object]:
    """Create a run that a recipe describes; return it and its complete recipe."""
    start = prepared(folder, *overrides)
    facts = {"status": "running", "data_digest": DATA.digest}
    recipe = start.recipe
    run = RunFolder.create(folder, "child", recipe.digest(), recipe.to_yaml(), facts, start.write)
    return run, load_stored_recipe(run.path / "recipe.yaml")


def test_new_run_pins_and_copies_its_teacher(tmp_path):
    source, model = teacher_run(tmp_path)
    run, recipe = new_run(tmp_path, f"{WEIGHTS}{source.name}}}", *RSLAD)
    assert recipe.objective.teacher_digest == weights_digest(model.state_dict())
    (ancestor,) = run.facts()["ancestors"]
    assert (ancestor["role"], ancestor["run"], ancestor["data_digest"]) == (
        "teacher",
        source.name,
        DATA.digest,
    )
    file = tmp_path / "teacher.safetensors"
    safetensors.torch.save_file({k: v.clone() for k, v in model.state_dict().items()}, file)
    with pytest.raises(UserError, match="does not fit"):  # the recipe's own network is smaller
        prepared(tmp_path, f"{WEIGHTS}{file}}}", *RSLAD)
    same = prepared(tmp_path, f"{WEIGHTS}{file}}}", *RSLAD, net="model={name: cnn2, args: {width: 6}}").recipe
    assert same.objective.teacher_digest == recipe.objective.teacher_digest
    shutil.rmtree(source.path)
    components = build_loop(recipe, DATA, run, Session()).components
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(components.objective.teacher(x), model(x))


def test_digest_of_a_pinned_recipe_does_not_depend_on_the_place_of_its_teacher(tmp_path):
    source, _ = teacher_run(tmp_path)
    moved = shutil.copytree(source.path, tmp_path / "elsewhere")
    one, two = (prepared(tmp_path, f"{WEIGHTS}{place}}}").recipe for place in (source.name, moved))
    assert one.digest() == two.digest()
    assert one.digest() != digits_recipe(NET, f"{WEIGHTS}{source.name}}}").digest()
    assert prepared(tmp_path, f"{WEIGHTS}{source.name}, teacher_digest: {one.objective.teacher_digest}}}")


def test_resume_with_deleted_teacher_and_start_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECK_STEPS", 1)
    taught, _ = teacher_run(tmp_path)
    source, model = teacher_run(tmp_path, NET)
    settings = [
        f"{WEIGHTS}{taught.name}, l2_sp: 0.5}}",
        *RSLAD,
        f"model.from={source.name}",
        "training.epochs=2",
        "training.batch_size=400",
        "adversary.num_steps=1",
        "evaluation.validation_samples=20",
    ]
    whole, parted = (new_run(tmp_path, *settings)[0] for _ in range(2))
    recipe = load_stored_recipe(whole.path / "recipe.yaml")
    for run in (taught, source):
        shutil.rmtree(run.path)
    assert run_worker(recipe, DATA, whole, Session()).status == "finished"
    for step in (1, whole.metrics()[0]["step"] + 1):  # within each epoch
        assert stop_at(recipe, parted, step).status == "stopped"
        anchor = build_loop(recipe, DATA, parted, Session()).components.objective.anchor
        for _, tensor in anchor.pairs:  # the start weights, not those of the checkpoint
            assert any(torch.equal(tensor, start) for start in model.state_dict().values())
    assert run_worker(recipe, DATA, parted, Session()).status == "finished"
    assert equal(*(load_checkpoint(sorted(r.checkpoints.glob("step-*"))[-1]) for r in (whole, parted)))


@pytest.mark.parametrize("extra", [(), ("training.accumulate=3",), ("optimizer.sam_rho=0.05",)], ids=str)
def test_teacher_runs_once_on_each_sample_of_a_step(tmp_path, extra):
    source, _ = teacher_run(tmp_path)
    recipe = digits_recipe(NET, f"{WEIGHTS}{source.path}}}", *RSLAD, "training.batch_size=12", *extra)
    parts, rows = build_components(recipe, DATA, Session()), []
    parts.objective.teacher.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    (batch,) = DATA.train.take(range(12)).batches(12, Place())
    parts.train_mode()
    parts.train_step(parts, batch, Progress(0, 0.0))
    assert sum(rows) == 12
    assert len(rows) == recipe.training.accumulate


def test_workers_do_not_wait_for_gradients_of_a_head_that_features_leave_out(tmp_path):
    """DDP raises an error in the second step if it waits for them."""
    source, _ = teacher_run(tmp_path, NET)
    recipe = digits_recipe(NET, f"objective={{feature_match: 1, teacher: {source.path}}}")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parts = build_components(recipe, DATA, Session(0, 2))
        x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
        for _ in range(2):
            parts.ddp_objective(x, x, y)[0].sum().backward()
    finally:
        dist.destroy_process_group()
    without = [name for name, parameter in parts.model.named_parameters() if parameter.grad is None]
    assert [name.rpartition(".")[2] for name in without] == ["weight", "bias"]  # those of the head


@pytest.mark.parametrize(
    ("taught", "settings", "message"),
    [
        ({"shape": (1, 12, 12)}, (), r"inputs of shape \(1, 12, 12\), but digits has \(1, 8, 8\)"),
        ({"classes": 7}, (), "classes: 7, but digits has 10"),
        ({"data_digest": "f" * 64}, ("objective={hat: 1, teacher: %s}",), "other data or another split"),
        ({}, (f"{WEIGHTS}%s, teacher_digest: {'a' * 64}}}",), "has other weights"),
        ({}, ("model={name: mlp, args: {width: 20}}", "objective={feature_match: 1, teacher: %s}"), "20 features"),
        ({}, ("objective={distill_adv: 1, teacher: nowhere}",), "no run 'nowhere'"),
    ],
    ids=["shape", "classes", "data", "digest", "features", "unknown"],
)  # fmt: skip
def test_teacher_that_does_not_suit_the_run_is_refused(tmp_path, taught, settings, message):
    source, _ = teacher_run(tmp_path, **taught)
    settings = settings or ("objective={distill_adv: 1, teacher: %s}",)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, *(text.replace("%s", source.name) for text in settings))


NUMBERS, WORDS = [str(k) for k in range(10)], list("abcdefghij")


@pytest.mark.parametrize(
    ("theirs", "own", "message"),
    [
        (WORDS, WORDS, None),
        (WORDS[::-1], WORDS, "has 'j' as class 0, but digits has 'a'"),
        ([str(k + 1) for k in range(10)], NUMBERS, "has '1' as class 0, but digits has '0'"),
        (NUMBERS, [str(k + 10) for k in range(10)], "has '0' as class 0, but digits has '10'"),
        ([f"a ({k})" for k in range(10)], ["a"] * 10, None),
        (NUMBERS, WORDS, None),  # no names
        (WORDS, None, None),
    ],
    ids=["same", "order", "data without names", "other numbers", "equal names", "no names", "no own names"],
)  # fmt: skip
@pytest.mark.parametrize("is_kept", [False, True])
def test_teacher_of_other_classes_is_refused(tmp_path, theirs, own, message, is_kept):
    source, _ = teacher_run(tmp_path, names=theirs)
    resolve = partial(resolve_weights, runs=tmp_path, tracking_uri=f"sqlite:///{tmp_path / 'none.db'}")
    if is_kept:  # as in a campaign
        save_weights(tmp_path / "kept", {source.name: resolve(source.name)})
        resolve = partial(saved_weights, tmp_path / "kept")
    recipe = digits_recipe(NET, f"{WEIGHTS}{source.name}}}")
    with pytest.raises(UserError, match=message) if message else nullcontext():
        prepare_start(recipe, replace(DATA, class_names=own), resolve)


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.json"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)]
)
def test_damaged_teacher_is_refused(tmp_path, name, damage):
    source, _ = teacher_run(tmp_path)
    run, recipe = new_run(tmp_path, f"{WEIGHTS}{source.name}}}")
    damage(run.path / "start" / name)
    with pytest.raises(UserError, match="teacher in .* is missing or damaged"):
        build_loop(recipe, DATA, run, Session())


def test_teacher_with_code_that_the_recipe_does_not_name_is_refused(tmp_path):
    source, _ = teacher_run(tmp_path)
    text = (source.path / "recipe.yaml").read_text().splitlines()
    changed = "\n".join(text[:-1]).replace("name: cnn2", "name: os:getcwd")
    (source.path / "recipe.yaml").write_text(changed)
    with pytest.raises(UserError, match="model 'os:getcwd', which runs code"):
        prepared(tmp_path, f"{WEIGHTS}{source.name}}}")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"name": "cnn2"}, "model 'tests.kit:fails', which runs code"),
        ({"name": "tests.kit:fails", "args": {"path": "b"}}, r"arguments \{'path': 'a'\}"),
    ],
    ids=["other code", "other arguments"],
)
def test_resume_refuses_code_that_was_put_into_the_copy_of_the_teacher(tmp_path, own, message):
    source, _ = teacher_run(tmp_path)
    run, recipe = new_run(tmp_path, f"{WEIGHTS}{source.name}}}")
    file = run.path / "start" / "teacher.json"
    facts = unsealed(json.loads(file.read_text()))
    facts["model"] = {"name": "tests.kit:fails", "args": {"path": "a"}, "mean": None, "std": None}
    file.write_text(sealed_json(facts))
    changed = recipe.model_copy(update={"model": ModelConfig.model_validate(own)})
    with pytest.raises(UserError, match=message):
        build_loop(changed, DATA, run, Session())


def test_l2_sp_needs_start_weights():
    with pytest.raises(UserError, match="objective.l2_sp .* set model.from"):
        digits_recipe(NET, "objective.l2_sp=0.1")


def test_changing_the_teacher_drops_its_digest():
    recipe = digits_recipe(NET, f"{WEIGHTS}one, teacher_digest: {'a' * 64}}}")
    values = recipe.values()
    override(values, {"objective.teacher": "two"})
    assert "teacher_digest" not in values["objective"]
