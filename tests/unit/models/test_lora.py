"""LoRA: the change of low rank by hand, which parameters train, start weights, export, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from advtrain.data import load_data
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.lora import LowRankLinear, add_lora, lora_tensors
from advtrain.models.pretrained import pretrained_weights
from advtrain.models.start import fit_weights
from advtrain.recipe.data import TextShape
from advtrain.recipe.model import ModelConfig
from advtrain.registry.export import check_export
from advtrain.training import Session, build_components
from advtrain.training.sharded import shard
from tests.hf_kit import SPECIAL, WORDS, bert_folder, hf_recipe, questions
from tests.kit import train_here

VOCABULARY = len(SPECIAL) + len(WORDS)
SHAPE = TextShape(12, VOCABULARY, (2, 3))
#: Linear layers of a BERT with two layers: query, key, value, output, up and down in each, and the pooler.
LAYERS = 13


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    return bert_folder(tmp_path_factory.mktemp("hf") / "bert", head=True, num_labels=3)


def built(name: str, **args: object) -> nn.Module:
    return build_model(ModelConfig(name=name, args=args), SHAPE, 3).eval()


def ids() -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))


def weights_of(name: str) -> dict[str, torch.Tensor]:
    found = pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False).weights
    return {f"network.{key}": value for key, value in found.items()}


def test_change_of_rank_one_by_hand():
    fixed = nn.Linear(2, 2)
    with torch.no_grad():
        fixed.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        fixed.bias.copy_(torch.tensor([10.0, 20]))
    layer = LowRankLinear(fixed, 1)
    x = torch.tensor([[1.0, 1]])
    assert torch.equal(layer(x), fixed(x))
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[1.0, -3]]))  # 1 - 3 = -2
        layer.lora_b.copy_(torch.tensor([[5.0], [-1]]))
    assert layer(x).tolist() == [[13 - 10, 27 + 2]]


def test_new_factors_leave_the_logits_of_the_start_weights_bit_for_bit(name):
    plain, model = built(name), built(name, lora=4)
    plain.load_state_dict(fit_weights(weights_of(name), plain).weights)
    fitted = fit_weights(weights_of(name), model)
    assert set(fitted.new) == lora_tensors(model)
    assert len(fitted.new) == 2 * LAYERS
    model.load_state_dict(fitted.weights, strict=False)
    assert torch.equal(model(ids()), plain(ids()))


def test_only_the_factors_and_the_head_train(name, tmp_path):
    file = questions(tmp_path / "questions.jsonl")
    recipe = hf_recipe(file, {"name": name, "args": {"lora": 4}}, training={"epochs": 1})
    dataset = load_data(recipe.data, Path())
    before = build_components(recipe, dataset, Session()).model.state_dict()
    model, _ = train_here(recipe, tmp_path / "runs", dataset)
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    head = {f"network.transformer.classifier.{part}" for part in ("weight", "bias")}
    assert moved == lora_tensors(model) | head


def test_weights_of_a_trained_lora_network_are_whole_start_weights(name):
    trained = built(name, lora=2)
    nn.init.normal_(trained.network.transformer.bert.pooler.dense.lora_b)
    other = built(name, lora=2)
    fitted = fit_weights(trained.state_dict(), other)
    assert not fitted.new
    other.load_state_dict(fitted.weights)
    assert torch.equal(other(ids()), trained(ids()))
    with pytest.raises(UserError, match="unexpected: .*lora_a"):
        fit_weights(trained.state_dict(), built(name))
    with pytest.raises(UserError, match="shapes: .*lora_a: 2x16, here 4x16"):
        fit_weights(trained.state_dict(), built(name, lora=4))


def test_sharded_network_trains_the_factors(name, tmp_path):
    model, y = built(name, lora=2), torch.tensor([0, 1, 2])
    F.cross_entropy(model(ids()), y).backward()
    wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard(model, torch.device("cpu"), 1)
        F.cross_entropy(model(ids()), y).backward()
        found = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in wanted)


def test_export_has_the_change(name):
    model = built(name, lora=2, pooling="mean")
    for key in lora_tensors(model):
        nn.init.normal_(model.get_parameter(key), std=0.1)
    check_export(model, SHAPE)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (17, "the rank 17 is larger than a weight; it can be 16 at most"),
        (-1, "must be a rank such as 8, or 0 to train all weights, not -1"),
        (True, "must be a rank such as 8, or 0 to train all weights, not True"),
        ("8", "must be a rank such as 8, or 0 to train all weights, not '8'"),
    ],
)
def test_unusable_rank_is_refused(name, rank, message):
    with pytest.raises(UserError, match=f"model.args.lora.*{message}"):
        built(name, lora=rank)


def test_encoder_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="model.args.lora: the encoder has no linear layer"):
        add_lora(nn.Embedding(3, 2), 1)
