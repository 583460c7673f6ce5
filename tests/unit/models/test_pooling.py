"""Mean pooling over encoders of transformers: logits, padding, blocks, weights, export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import advtrain
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.blocks import block_names, freeze_blocks, head_tensors
from advtrain.models.pretrained import pretrained_weights
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.models.start import fit_weights
from advtrain.recipe.data import TextShape
from advtrain.recipe.model import ModelConfig
from advtrain.registry.export import check_export
from advtrain.threat import ThreatModel
from advtrain.training.sharded import shard
from tests.hf_kit import SPECIAL, WORDS, bert_folder

VOCABULARY = len(SPECIAL) + len(WORDS)
SHAPE = TextShape(12, VOCABULARY, (2, 3))
L2 = ThreatModel("l2", 0.5)
Y = torch.tensor([0, 1, 2])


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    return bert_folder(tmp_path_factory.mktemp("hf") / "bert")


def built(name: str, shape: TextShape = SHAPE, **args: object) -> torch.nn.Module:
    return build_model(ModelConfig(name=name, args={"pooling": "mean", **args}), shape, 3)


def ids() -> torch.Tensor:
    x = torch.randint(5, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
    x[:, 0] = 2
    x[0, 7] = x[1, 4] = x[2, 2] = 3
    x[1, 5:] = x[2, 3:] = 0
    return x


def loaded(name: str, model: torch.nn.Module, load: str = "backbone"):
    found = pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False)
    return fit_weights({f"network.{key}": value for key, value in found.weights.items()}, model, load)


def test_logits_are_a_linear_map_of_the_mean_state_of_each_text(name):
    model, x = built(name).eval(), ids()
    pooled = model.network.transformer
    for row, logits in zip(x, model(x), strict=True):
        text = row[row != 0].unsqueeze(0)
        states = pooled.bert(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state
        assert torch.allclose(logits, pooled.head(states.mean(1))[0], atol=1e-6)


def test_padding_changes_neither_logits_nor_perturbation(name):
    model, x = built(name).eval(), ids()
    longer = F.pad(x, (0, 4))
    assert torch.allclose(model(longer), model(x), atol=1e-6)
    short, long = (advtrain.attack(model, each, Y, L2, num_steps=3, start="none") for each in (x, longer))
    assert torch.allclose(long[:, :8], short, atol=1e-5)
    moved = (short != model.embed(x)).any(-1)
    assert (moved == (x > 3)).all()  # neither padding nor special tokens


def test_head_has_the_dropout_of_the_classifier(name):
    head = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, x = built(name, **head, classifier_dropout=0.5).train(), ids()
    assert not torch.equal(model(x), model(x))
    model = built(name, **head).train()  # classifier_dropout null: hidden_dropout_prob
    assert torch.equal(model(x), model(x))


def test_frozen_backbone_leaves_the_linear_head_to_train(name):
    model = built(name)
    assert block_names(model.network) == [
        "transformer.bert.embeddings",
        *(f"transformer.bert.encoder.layer.{n}" for n in range(2)),
        "transformer.head",
    ]
    freeze_blocks(model, "backbone")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        trained == set(head_tensors(model)) == {f"network.transformer.head.{k}" for k in ("weight", "bias")}
    )


def test_every_parameter_has_a_gradient(name):
    """Without the pooler, because a parameter without one stops a distributed training."""
    model = built(name)
    F.cross_entropy(model(ids()), Y).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_of_the_encoder_are_loaded_without_pooler_and_classifier(name, tmp_path):
    model = built(name)
    fitted = loaded(name, model)
    assert fitted.new == [f"network.transformer.head.{part}" for part in ("weight", "bias")]
    ignored = [f"network.transformer.bert.pooler.dense.{part}" for part in ("bias", "weight")]
    assert fitted.ignored == ignored
    full = bert_folder(tmp_path, head=True, num_labels=3)
    classifier = [f"network.transformer.classifier.{part}" for part in ("bias", "weight")]
    assert loaded(full, model).ignored == [*ignored, *classifier]
    with pytest.raises(UserError, match="has another head than this model .*: set model.load: backbone"):
        loaded(full, model, "all")  # its classifier was trained over the pooler


def test_unknown_tensor_of_the_encoder_is_still_refused(name):
    model = built(name)
    weights = {**model.state_dict(), "network.transformer.bert.encoder.layer.2.x": torch.zeros(1)}
    with pytest.raises(UserError, match=r"unexpected: network.transformer.bert.encoder.layer.2.x"):
        fit_weights(weights, model)


def test_weights_of_a_pooled_network_fit_only_a_pooled_network(name):
    weights = built(name).state_dict()
    assert not fit_weights(weights, built(name)).new
    with pytest.raises(UserError, match="does not fit the model .*pooler"):
        fit_weights(weights, build_model(ModelConfig(name=name), SHAPE, 3))


def test_own_pooling_is_the_class_of_transformers(name):
    own, default = built(name, pooling="own"), build_model(ModelConfig(name=name), SHAPE, 3)
    assert own.state_dict().keys() == default.state_dict().keys()
    assert type(own.network.transformer).__name__ == "BertForSequenceClassification"


def test_export_takes_any_batch_and_length(name):
    check_export(built(name), SHAPE)


def test_another_process_builds_the_model_from_its_settings(name):
    complete = dict(pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False).args)
    made = Architecture(ModelConfig(name="hf:gone", args={**complete, "pooling": "mean"}), SHAPE, 3)
    model = made.build().eval()
    assert torch.equal(ModelSource.of(model.state_dict(), made).load()(ids()), model(ids()))


def test_sharded_network_has_the_same_perturbation(tmp_path):
    name = bert_folder(tmp_path, vocab_size=8000)
    model, x = built(name, TextShape(12, 8000, (2, 3))).eval(), ids()
    wanted = advtrain.attack(model, x, Y, L2, num_steps=2, start="none")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard(model, torch.device("cpu"), 1)
        found = advtrain.attack(model, x, Y, L2, num_steps=2, start="none")
    finally:
        dist.destroy_process_group()
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["albert", "distilbert", "electra"])
def test_other_encoders_are_pooled(tmp_path, kind):
    model = built(folder_of(tmp_path, kind, TINY | {"dim": 16, "n_heads": 2, "n_layers": 2})).eval()
    assert torch.allclose(model(F.pad(ids(), (0, 3))), model(ids()), atol=1e-6)
    freeze_blocks(model, "backbone")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"network.transformer.head.{part}" for part in ("weight", "bias")}


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dim": 32,
    "max_position_embeddings": 24,
}
FUNNEL = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "n_head": 2,
    "d_head": 8,
    "d_inner": 32,
    "block_sizes": [1, 1, 1],
}


def folder_of(folder: Path, kind: str, settings: dict[str, object]) -> str:
    """Write the config.json of a network."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("kind", "settings", "pooling", "message"),
    [
        ("bert", TINY, "max", "model.args.pooling must be own or mean, not 'max'"),
        ("bert", TINY, True, "model.args.pooling must be own or mean, not True"),
        (
            "squeezebert",
            TINY | {"embedding_size": 16},
            "mean",
            r"model.args.pooling: the encoder of 'hf:.*' \(squeezebert\) returns no hidden state of each token",
        ),
        (
            "funnel",
            FUNNEL,
            "mean",
            r"\(funnel\) returns no hidden state of each token .*; leave out model.args",
        ),
        (
            "funnel",
            FUNNEL,
            "own",
            "model 'hf:.*': the logits of a text depend on the padding after it, .*; use an encoder such as BERT",
        ),
    ],
)
def test_unusable_pooling_or_encoder_is_refused(tmp_path, kind, settings, pooling, message):
    with pytest.raises(UserError, match=message):
        built(folder_of(tmp_path, kind, settings), pooling=pooling)


def test_misspelled_pooling_is_refused(name):
    with pytest.raises(
        UserError, match="model.args.poolin: 'hf:.*' has no such setting; did you mean 'pooling'"
    ):
        build_model(ModelConfig(name=name, args={"poolin": "mean"}), SHAPE, 3)


def test_building_uses_the_same_random_numbers_as_before_the_trial(name):
    """The trial in evaluation mode draws none."""
    torch.manual_seed(0)
    build_model(ModelConfig(name=name), SHAPE, 3)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(name.removeprefix("hf:"), num_labels=3)
    AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    assert torch.equal(after, torch.random.get_rng_state())
