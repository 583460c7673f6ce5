"""Start weights of texts: the source is read once, tokenizers must be equal, and leaks are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest
import safetensors.torch
import torch

import advtrain
from advtrain.errors import UserError
from advtrain.events import ignore
from advtrain.recipe import Recipe, load_stored_recipe
from advtrain.runs.checkpoint import TrainState, best_checkpoint, save_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.leaks import Lineage
from advtrain.runs.start import read_start
from advtrain.training.trained_model import architecture
from pipelines import train as job
from pipelines import tune
from pipelines import workspace as places
from pipelines.model_ref import ExternalModelSpec, find_model
from pipelines.predict import predict
from pipelines.start import kept_weights
from pipelines.workspace import Workspace, load_dataset
from tests.hf_kit import WORDS, bert_folder, hf_recipe, questions, tokenizer_json
from tests.unit.tuning.surface import CAMPAIGN
from tuning.campaign import make_plan, parse_campaign
from tuning.trials import Ledger

CNN = {"name": "text_cnn", "args": {"dim": 8, "channels": 4}}


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    """Return a workspace without a tracking store; runs are created and not trained."""
    monkeypatch.chdir(tmp_path)
    for module in (job, tune):
        monkeypatch.setattr(module, "check_store", lambda *args: None)
    monkeypatch.setattr(job, "_start_tracking", lambda *args: None)
    monkeypatch.setattr(places, "check_export", lambda *args: None)  # slow, and tested with the models
    monkeypatch.setattr(job, "_drive", lambda run, *args: run)
    return Workspace(tmp_path / "runs", "", tmp_path)


@pytest.fixture
def name(tmp_path) -> str:
    return bert_folder(tmp_path / "bert")


def start_of(name: str, **settings: object) -> dict[str, object]:
    return {"name": name, "from": name, "load": "backbone", **settings}


def stored(run: RunFolder) -> Recipe:
    return load_stored_recipe(run.path / "recipe.yaml")


def with_checkpoint(run: RunFolder, workspace: Workspace) -> dict[str, torch.Tensor]:
    """Write a checkpoint of random weights into a run; return them."""
    recipe = stored(run)
    data = load_dataset(recipe, workspace, kept=run.path)
    weights = architecture(recipe, data).build().state_dict()
    line = {"epoch": 1, "val_robust_accuracy": 0.5, "epoch_seconds": 1.0}
    state = TrainState(1, 1, 0, recipe.digest(), weights, {}, history=[line])
    save_checkpoint(state, run.checkpoints, 1)
    return weights


def test_run_keeps_network_tokenizer_and_weights_of_a_folder(workspace, name, tmp_path):
    """Later commands need the folder no more, and the run has one digest wherever the folder was."""
    recipe = hf_recipe(questions(tmp_path / "q.jsonl"), start_of(name, freeze="backbone", unfreeze_epoch=1))
    run = job.train(recipe, workspace, once="key")
    pretrained = safetensors.torch.load_file(tmp_path / "bert" / "model.safetensors")
    (tmp_path / "bert").rename(tmp_path / "moved")
    kept = stored(run)
    assert kept.model.args["model_type"] == "bert"
    weights = read_start(run.path, kept.model).weights
    body = "network.transformer.bert."
    assert {key.removeprefix(body) for key in weights} == set(pretrained)
    assert all(torch.equal(weights[body + key], value) for key, value in pretrained.items())
    data = load_dataset(kept, workspace, run.facts()["data_digest"], kept=run.path)
    read_start(run.path, kept.model).apply(architecture(kept, data).build())
    run.update(trained=True)
    assert job.train(recipe, workspace, once="key").name == run.name
    moved = hf_recipe(
        tmp_path / "q.jsonl", start_of(f"hf:{tmp_path / 'moved'}", freeze="backbone", unfreeze_epoch=1)
    )
    assert stored(job.train(moved, workspace)).digest() == kept.digest()
    with pytest.raises(UserError, match="there is no such folder"):
        job.train(recipe, workspace)


def test_run_of_a_folder_is_loaded_in_python_without_the_folder(workspace, name, tmp_path):
    recipe = hf_recipe(questions(tmp_path / "q.jsonl"), start_of(name), data={"label": "label"})
    run = job.train(recipe, workspace)
    weights = with_checkpoint(run, workspace)
    shutil.rmtree(tmp_path / "bert")
    model = advtrain.load_model(run.path)
    assert model(["who made thing 3 ?"]).shape == (1, 2)
    assert model.text.label == "label"
    assert all(torch.equal(value, weights[key]) for key, value in model.model.state_dict().items())


def test_changed_weights_and_tokenizers_of_a_folder_are_refused_by_their_digests(workspace, name, tmp_path):
    run = job.train(hf_recipe(questions(tmp_path / "q.jsonl"), start_of(name)), workspace)
    text = tmp_path / "pinned.yaml"
    text.write_text((run.path / "recipe.yaml").read_text())
    bert_folder(tmp_path / "bert", seed=1)
    with pytest.raises(UserError, match=r"has other weights .* than model.from_digest"):
        job.train(load_stored_recipe(text), workspace)
    bert_folder(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_text(tokenizer_json(WORDS[::-1]))
    with pytest.raises(UserError, match="is another tokenizer"):
        job.train(load_stored_recipe(text), workspace)


def test_weights_of_a_run_start_another_with_the_same_tokenizer(workspace, tmp_path):
    parent = job.train(hf_recipe(questions(tmp_path / "q.jsonl"), CNN), workspace)
    weights = with_checkpoint(parent, workspace)
    child = job.train(hf_recipe(tmp_path / "q.jsonl", {**CNN, "from": parent.name}), workspace)
    found = read_start(child.path, stored(child).model).weights
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert [ancestor.run for ancestor in Lineage.of_run(child).ancestors] == [parent.name]

    other = questions(tmp_path / "other.jsonl", start=500)
    with pytest.raises(
        UserError, match=r"was trained with another tokenizer .*; set data.tokenizer: PATH of its"
    ):
        job.train(hf_recipe(other, {**CNN, "from": parent.name}), workspace)
    given = {"tokenizer": str(parent.path / "tokenizer.json")}
    child = job.train(hf_recipe(other, {**CNN, "from": parent.name}, data=given), workspace)
    assert stored(child).data.tokenizer_digest is not None


def test_test_texts_that_an_ancestor_was_trained_on_are_found(workspace, tmp_path):
    parent = job.train(hf_recipe(questions(tmp_path / "q.jsonl"), CNN), workspace)
    with_checkpoint(parent, workspace)
    given = {"tokenizer": str(parent.path / "tokenizer.json"), "split_seed": 1}
    recipe = hf_recipe(tmp_path / "q.jsonl", {**CNN, "from": parent.name}, data=given)
    with pytest.raises(
        UserError, match=rf"test samples are training samples of its ancestor {parent.name} \(q.jsonl"
    ):
        job.train(recipe, workspace)


def test_file_of_weights_needs_its_tokenizer(workspace, tmp_path):
    recipe = hf_recipe(questions(tmp_path / "q.jsonl"), CNN)
    run = job.train(recipe, workspace)
    weights = with_checkpoint(run, workspace)
    (tmp_path / "w").mkdir()
    file = tmp_path / "w" / "model.safetensors"
    safetensors.torch.save_file({key: value.clone() for key, value in weights.items()}, file)
    child = hf_recipe(tmp_path / "q.jsonl", {**CNN, "from": str(file)})
    with pytest.raises(UserError, match=r"there is no tokenizer.json beside the weights, so it is unknown"):
        job.train(child, workspace)
    shutil.copy(run.path / "tokenizer.json", tmp_path / "w")
    started = job.train(child, workspace)
    found = read_start(started.path, stored(started).model).weights
    assert all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*WORDS, *map(str, range(200, 400))],
            r"embeds 27 tokens, but the tokenizer has \d+, so it does not belong",
        ),
        (WORDS[::-1], "was trained with another tokenizer .* set data.tokenizer: hf:"),
    ],
)
def test_tokenizer_that_does_not_belong_to_the_weights_is_refused(workspace, name, tmp_path, words, message):
    other = tmp_path / "tokenizer.json"
    other.write_text(tokenizer_json(words))
    recipe = hf_recipe(questions(tmp_path / "q.jsonl"), start_of(name), data={"tokenizer": str(other)})
    with pytest.raises(UserError, match=message):
        job.train(recipe, workspace)
    assert not workspace.runs.exists()


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        (
            {"hidden_size": 32},
            WORDS,
            "does not fit the model .*; model.name is '{b}', so set model.from: {b}, or",
        ),
        (
            {"num_attention_heads": 4},
            WORDS,
            r"is another network \(num_attention_heads: 2, here 4\); .* model.from: {b}",
        ),
        (
            {},
            WORDS[::-1],
            "was trained with another tokenizer .*; model.name is '{b}', so set model.from: {b}, or",
        ),
    ],
)
def test_weights_of_another_folder_that_do_not_fit_are_refused(
    workspace, name, tmp_path, settings, words, message
):
    other = bert_folder(tmp_path / "other", **settings)
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer_json(words))
    recipe = hf_recipe(questions(tmp_path / "q.jsonl"), start_of(name) | {"name": other})
    with pytest.raises(UserError, match=message.format(b=other)):
        job.train(recipe, workspace)


def test_weights_of_another_folder_with_the_same_network_are_loaded(workspace, name, tmp_path):
    other = bert_folder(tmp_path / "other", hidden_dropout_prob=0.2, seed=1)
    recipe = hf_recipe(questions(tmp_path / "q.jsonl"), start_of(name) | {"name": other})
    kept = stored(job.train(recipe, workspace)).model
    assert (kept.from_, kept.args["hidden_dropout_prob"]) == (name, 0.2)


def test_pooled_network_is_probed_and_its_weights_start_another_run(workspace, name, tmp_path):
    pooled = start_of(name, args={"pooling": "mean"}, freeze="backbone", unfreeze_epoch=1)
    parent = job.train(hf_recipe(questions(tmp_path / "q.jsonl"), pooled), workspace)
    kept = stored(parent).model
    assert (kept.args["pooling"], kept.args["model_type"]) == ("mean", "bert")
    weights = with_checkpoint(parent, workspace)
    assert advtrain.load_model(parent.path)(["who made thing 3 ?"]).shape == (1, 2)
    further = {"name": name, "args": {"pooling": "mean"}, "from": parent.name}
    given = {"tokenizer": str(parent.path / "tokenizer.json")}
    child = job.train(hf_recipe(tmp_path / "q.jsonl", further, data=given), workspace)
    found = read_start(child.path, stored(child).model).weights
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_teacher_is_refused_for_texts(workspace, tmp_path):
    parts = {"objective": {"teacher": "some", "distill_clean": 1}}
    with pytest.raises(
        UserError, match="objective.teacher is not supported for texts yet; start from its weights"
    ):
        job.train(hf_recipe(questions(tmp_path / "q.jsonl"), CNN, **parts), workspace)


def test_campaign_keeps_network_tokenizer_and_weights_of_a_folder(workspace, name, tmp_path):
    base = hf_recipe(questions(tmp_path / "q.jsonl"), start_of(name))
    values = CAMPAIGN | {"space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}}
    plan = make_plan(parse_campaign(values, "here"), base, "here", allow_code=False)
    ledger, _ = tune._begin(plan, workspace, {"spent": {}}, ignore)
    (tmp_path / "bert").rename(tmp_path / "gone")
    ledger = Ledger.find(workspace.runs, ledger.name, {})
    kept, digest = ledger.plan.base, ledger.facts()["data_digest"]
    data = load_dataset(kept, workspace, digest, kept=ledger.folder)
    trial = ledger.begin({"optimizer.lr": 0.01}, {}, dataset=data)
    recipe = stored(trial.run)
    assert recipe.model.args == kept.model.args
    assert (trial.run.path / "tokenizer.json").read_text() == data.text.tokenizer
    read_start(trial.run.path, recipe.model).apply(architecture(recipe, data).build())


def test_study_keeps_the_digest_of_the_tokenizer_of_its_weights(workspace, name, tmp_path):
    reference = start_of(name)["from"]
    resolve = kept_weights(tmp_path / "study", workspace.weights, save=True)
    found = resolve(reference)
    shutil.rmtree(tmp_path / "bert")
    again = kept_weights(tmp_path / "study", workspace.weights, save=False)(reference)
    assert again.tokenizer == found.tokenizer is not None
    assert again.config == found.config


@pytest.mark.study
@pytest.mark.slow
def test_pretrained_network_is_trained_registered_and_trained_further(store, name, tmp_path):
    """Linear probe, then fine-tuning; the folder is deleted after the first run has started."""
    workspace = Workspace(tmp_path / "runs", store, tmp_path)
    rates = {"layer_decay": 0.9, "head_lr": 0.02}
    model = start_of(name, args={"pooling": "mean"}, freeze="backbone", unfreeze_epoch=1)
    judge = {"attack": {"name": "pgd", "num_steps": 20}}
    recipe = hf_recipe(questions(tmp_path / "q.jsonl"), model, optimizer=rates, evaluation=judge)
    result = job.train(recipe, workspace)
    shutil.rmtree(tmp_path / "bert")
    run, uri = result.run, result.registered.uri
    assert result.status == "finished"
    assert [attack.name for attack in result.report.attacks][-1].startswith("pgd-20")
    source = find_model(run.name, workspace, ExternalModelSpec(), data=None, threat=None)
    assert source.dataset.digest == run.facts()["data_digest"]
    found = predict(uri, None, workspace, texts=["who made thing 3 ?", "where is place 4 ?"])
    assert len(found.records) == 2
    folder = Path(mlflow.artifacts.download_artifacts(uri, tracking_uri=store))
    assert (folder / "tokenizer.json").read_text() == (run.path / "tokenizer.json").read_text()
    further = hf_recipe(
        questions(tmp_path / "more.jsonl", start=300),
        {"name": name, "from": uri},
        data={"tokenizer": str(run.path / "tokenizer.json")},
    )
    with pytest.raises(UserError, match="there is no such folder"):
        job.train(further, workspace)  # its network is not complete
    complete = stored(run).model.args
    further = hf_recipe(
        tmp_path / "more.jsonl",
        {"name": name, "args": complete, "from": uri},
        data={"tokenizer": str(run.path / "tokenizer.json")},
    )
    child = job.train(further, workspace).run
    assert [ancestor.reference for ancestor in Lineage.of_run(child).ancestors] == [uri]
    start = read_start(child.path, stored(child).model).weights
    best = best_checkpoint(run.checkpoints).best_weights()
    assert all(torch.equal(start[key], best[key]) for key in start)
