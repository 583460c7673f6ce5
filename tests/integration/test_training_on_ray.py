"""Training on real Ray Train workers: streamed data, elasticity, missing resources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advtrain.data import load_data
from advtrain.errors import UserError
from advtrain.recipe import load_recipe
from advtrain.runs.checkpoint import load_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training import Session, build_components, launch
from tests.kit import RECIPES, digits_data, digits_recipe, train_here, write_images, write_parquet_texts

pytestmark = pytest.mark.ray


def folder(tmp_path, recipe) -> RunFolder:
    return RunFolder.create(
        tmp_path / "runs", recipe.name, recipe.digest(), recipe.to_yaml(), {"status": "running"}
    )


@pytest.mark.slow
def test_imagenet_recipe_trains_on_streamed_images_with_two_workers(ray_cluster, tmp_path):
    write_images(tmp_path / "imagenet", {"train": 16, "val": 4}, size=40)
    recipe = load_recipe(
        RECIPES / "imagenet_folder.yaml",
        [
            "data.image_size=32",
            "data.validation_fraction=0.25",
            "training.epochs=3",
            "training.batch_size=12",
            "training.num_workers=2",
            "training.cpus_per_worker=1",
            "training.compile=false",
            "training.precision=fp32",
            "evaluation.validation.num_steps=2",
            "evaluation.batch_size=12",
        ],
    )
    data = load_data(recipe.data, tmp_path)
    run = folder(tmp_path, recipe)
    assert launch(recipe, data, run).status == "finished"
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["train_loss"]) for line in lines)
    assert lines[-1]["step"] == 3 * 3
    assert lines[-1]["num_workers"] == 2


@pytest.mark.slow
def test_elastic_range_uses_available_workers(ray_cluster, tmp_path):
    """The cluster has four CPUs and the range allows two workers. Two are used."""
    recipe = digits_recipe("training.num_workers=[1, 2]", "training.epochs=2")
    run = folder(tmp_path, recipe)
    data = digits_data(recipe)
    assert launch(recipe, data, run).status == "finished"
    assert run.metrics()[-1]["num_workers"] == 2
    assert not data.train.images.flags.writeable, "the driver keeps a copy beside the one in Ray's store"


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["false", pytest.param("true", marks=pytest.mark.study)])
def test_texts_train_on_an_elastic_range_of_workers_as_in_one_process(ray_cluster, tmp_path, stream):
    """Batches of texts of similar length are split over two workers, and each pads its own part."""
    path = write_parquet_texts(tmp_path / "texts", {"train": slice(120)})
    recipe = load_recipe(
        RECIPES / "trec.yaml",
        [
            f"data={{source: text, path: {path}, group_by_length: true, stream: {stream}}}",
            "model.args={dim: 8, channels: 6, dropout: 0}",
            "optimizer.lr=0.02",
            "training.epochs=3",
            "training.batch_size=9",
            "training.num_workers=[1, 2]",
            "training.cpus_per_worker=1",
        ],
    )
    data = load_data(recipe.data, tmp_path)
    run = folder(tmp_path, recipe)
    assert launch(recipe, data, run).status == "finished"
    _, alone = train_here(recipe, tmp_path / "alone", load_data(recipe.data, tmp_path))
    assert [line["num_workers"] for line in run.metrics()] == [2, 2, 2]
    names = ("train_loss", "train_grad_norm", "val_clean_accuracy", "val_robust_accuracy")
    curves = [[line[name] for line in each.metrics() for name in names] for each in (run, alone)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert run.metrics()[-1]["train_loss"] < run.metrics()[0]["train_loss"]


def test_launch_rejects_more_workers_than_cluster_has(ray_cluster, tmp_path):
    recipe = digits_recipe("training.num_workers=64")
    with pytest.raises(UserError, match=r"needs 64 CPUs, but the cluster has 4; .*--workers"):
        launch(recipe, digits_data(recipe), folder(tmp_path, recipe))


@pytest.mark.slow
def test_launch_reports_recipe_error_without_retries(ray_cluster, tmp_path):
    recipe = digits_recipe("training.num_workers=2", "model.name=cnn4")
    outcome = launch(recipe, digits_data(recipe), folder(tmp_path, recipe))
    assert outcome.status == "failed"
    assert "needs larger images" in outcome.message


@pytest.mark.slow
def test_frozen_blocks_are_trained_from_unfreezing_on_with_two_workers(ray_cluster, tmp_path):
    """Weights and batch norm statistics of the frozen blocks are those of one process, bit for bit."""
    recipe = digits_recipe(
        "model={name: wide_resnet, args: {depth: 10, width: 1}, freeze: ['0', '1'], unfreeze_epoch: 1}",
        "optimizer.layer_decay=0.7",
        "adversary.num_steps=1",
        "training.num_workers=2",
        "training.batch_size=200",
    )
    data = digits_data(recipe)
    start = build_components(recipe, data, Session()).model.state_dict()
    run = folder(tmp_path, recipe)
    assert launch(recipe, data, run).status == "finished"
    first, second = map(load_checkpoint, sorted(run.checkpoints.glob("step-*")))
    frozen = {name for name in start if name.startswith(("network.0.", "network.1."))}
    assert {name for name, tensor in start.items() if torch.equal(tensor, first.model[name])} == frozen
    assert not any(torch.equal(tensor, second.model[name]) for name, tensor in start.items())
