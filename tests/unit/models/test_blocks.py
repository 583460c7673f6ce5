"""Blocks of networks: their order, their parameters, and freezing."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.blocks import block_names, block_parameters, freeze_blocks, head_tensors
from advtrain.models.network import Normalized
from advtrain.recipe.model import ModelConfig
from tests.kit import Linear, Tokens

STAGES = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
VIT_ARGS = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
#: name -> arguments, shape of the samples, blocks.
NETWORKS = {
    "mlp": ({}, (1, 8, 8), ["1", "3", "5"]),
    "cnn2": ({}, (1, 8, 8), ["0.0", "0.2", "1", "3"]),
    "cnn4": ({}, (1, 28, 28), ["0.0", "0.2", "0.5", "0.7", "1.0", "1.3", "2"]),
    "preact_resnet18": ({}, (3, 8, 8), [*map(str, range(9)), "13"]),
    "wide_resnet": ({"depth": 16, "width": 1}, (3, 8, 8), [*map(str, range(7)), "11"]),
    "torchvision:resnet18": ({}, (3, 32, 32), ["conv1", *STAGES, "fc"]),
    "timm:resnet18": ({}, (1, 32, 32), ["conv1", *STAGES, "fc"]),
    "timm:vit_tiny_patch16_224": (VIT_ARGS, (1, 16, 16), ["patch_embed", "blocks.0", "blocks.1", "head"]),
    "timm:convnext_atto": (
        {"depths": [1, 1, 2, 1], "dims": [4, 4, 8, 8]},
        (1, 32, 32),
        ["stem.0", "stages.0", "stages.1", "stages.2", "stages.3", "head"],
    ),
}


def built(name: str) -> Normalized:
    args, shape, _ = NETWORKS[name]
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    return build_model(ModelConfig(name=name, args=args), shape, 10)


class Encoder(nn.Module):
    """Text encoder as in transformers: a stack of layers two levels down, norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(4))
        self.norm = nn.LayerNorm(4)
        self.bert = nn.Module()
        self.bert.embeddings = nn.Embedding(5, 4)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2))
        self.dropout = nn.Dropout()
        self.classifier = nn.Linear(4, 2)


#: name -> arguments, size of the images, blocks, modules of the head.
SEVERAL_HEADS = {
    "deit_tiny_distilled_patch16_224": (
        VIT_ARGS,
        16,
        ["patch_embed", "blocks.0", "blocks.1", "head_dist"],
        ["head", "head_dist"],
    ),
    "levit_128s": (  # its classifiers are `head.linear` and `head_dist.linear`
        {"embed_dim": [16, 24, 32], "key_dim": 8, "num_heads": [2, 2, 2], "depth": [1, 1, 1]},
        64,
        ["stem", "stages.0", "stages.1", "stages.2", "head_dist"],
        ["head.bn", "head.linear", "head_dist.bn", "head_dist.linear"],
    ),
}


@pytest.mark.parametrize("name", SEVERAL_HEADS)
def test_several_heads_of_a_network_are_one_block(name):
    pytest.importorskip("timm")
    args, size, blocks, heads = SEVERAL_HEADS[name]
    model = build_model(ModelConfig(name=f"timm:{name}", args=args), (3, size, size), 10)
    owned = [f"network.{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    assert block_names(model.network) == blocks
    assert block_parameters(model)["head_dist"] == owned
    assert set(head_tensors(model)) & dict(model.named_parameters()).keys() == set(owned)
    freeze_blocks(model, "backbone")
    assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == owned


@pytest.mark.parametrize(
    ("heads", "merged"),
    [
        (("head.0", "head.1", "head.2"), ["head.0", "head.1", "head.2"]),
        (("head", "head.2"), ["head.0", "head.1", "head.2"]),
        (("head.1.linear", "hea"), ["head.1", "head.2"]),
    ],
)
def test_blocks_of_several_heads_are_merged_in_order(heads, merged):
    layers = {"stem": nn.Linear(2, 2), "head": nn.ModuleList(nn.Linear(2, 2, False) for _ in range(3))}
    network = nn.Sequential(OrderedDict(layers))
    network.pretrained_cfg = {"classifier": heads}
    assert head_tensors(network) == [f"{name}.weight" for name in merged]
    assert block_names(network) == [
        "stem",
        *(f"head.{k}" for k in range(2) if f"head.{k}" not in merged),
        "head.2",
    ]
    found = block_parameters(Normalized(network, None, None))["head.2"]
    assert found == [f"network.{name}.weight" for name in merged]


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_in_order_and_have_every_parameter_once(name):
    model = built(name)
    assert block_names(model.network) == NETWORKS[name][2]
    owned = block_parameters(model)
    assert list(owned) == NETWORKS[name][2]
    assert [p for names in owned.values() for p in names] == [p for p, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (Tokens((1, 8, 8), 10), ["project", "head.0", "head.2"]),
        (Encoder(), ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"]),
    ],
)
def test_blocks_of_user_code_come_from_its_modules(network, names):
    assert block_names(network) == names


def test_parameters_outside_of_blocks_belong_to_the_first_block():
    owned = block_parameters(Normalized(Encoder(), None, None))
    first = [
        f"network.{name}" for name in ("positions", "norm.weight", "norm.bias", "bert.embeddings.weight")
    ]
    assert owned["bert.embeddings"] == first


def test_network_without_a_head_is_refused():
    with pytest.raises(UserError, match="no head"):
        block_names(Linear(4))


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_backbone_leaves_only_the_head_in_training(name):
    model = built(name)
    modules = freeze_blocks(model, "backbone")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == block_parameters(model)[
        NETWORKS[name][2][-1]
    ]
    head = model.network.get_submodule(NETWORKS[name][2][-1])
    inside = {m for module in modules for m in module.modules()}
    leaves = {m for m in model.network.modules() if not list(m.children())}
    assert leaves - inside == leaves & set(head.modules())
    assert not any(module.training for module in inside)
    assert head.training


@pytest.mark.parametrize(
    ("names", "frozen"),
    [
        (["0.0"], ["0.0"]),
        (["0"], ["0.0", "0.2", "0.5", "0.7"]),  # a module that holds blocks
        (["2", "1.3"], ["1.3", "2"]),
    ],
)
def test_named_blocks_are_frozen(names, frozen):
    model = built("cnn4")
    freeze_blocks(model, names)
    still = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert still == [n for block in frozen for n in block_parameters(model)[block]]


class Tied(nn.Module):
    """Network whose embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("network", "names", "message"),
    [
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            ["0", "2"],
            "unknown block '2'; .*to the head: 0, 1",
        ),
        (Encoder(), ["clasifier"], "unknown block 'clasifier'; did you mean 'classifier'"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0", "1"], "leaves no parameter to train"),
        (nn.Sequential(nn.Linear(2, 2)), "backbone", "no backbone, only the block '0'"),
        (Tied(), "backbone", "trained block 'head' shares parameters"),
        (Tied(), ["head"], "trained block 'embedding' shares parameters"),
    ],
)
def test_invalid_freezing_is_refused(network, names, message):
    with pytest.raises(UserError, match=message):
        freeze_blocks(Normalized(network, None, None), names)
