"""Networks against their published sizes; weights of earlier versions; invalid configurations."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from torch import nn

from advtrain.errors import UserError
from advtrain.evaluation import EvalSpec
from advtrain.models import MODELS, ModelConfig, build_model
from advtrain.models.libraries import libraries_used
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.threat import ThreatModel
from tests.kit import digits_data


def build(name, shape=(3, 32, 32), **values):
    return build_model(ModelConfig(name=name, **values), shape, 10)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_maps_images_to_logits(name):
    args = {"args": {"depth": 10, "width": 1}} if name == "wide_resnet" else {}
    model = build(name, **args)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "shape", "args", "parameters"),
    [
        # 16 16 + 16, 32 256 + 32, 1568 100 + 100, 100 10 + 10: Wong et al. 2020, MNIST
        ("cnn2", (1, 28, 28), {}, 166_406),
        ("cnn4", (1, 28, 28), {}, 312_202),  # SmallCNN of the TRADES code
        ("preact_resnet18", (3, 32, 32), {}, 11_172_170),  # 11.17 M, with the batch norm before pooling
        (
            "wide_resnet",
            (3, 32, 32),
            {"depth": 28, "width": 10},
            36_479_194,
        ),  # WRN-28-10 of the paper: 36.5 M
        ("wide_resnet", (3, 32, 32), {"depth": 34, "width": 10}, 46_160_474),  # WRN-34-10 of TRADES
    ],
)
def test_parameter_count_matches_published_code(name, shape, args, parameters):
    model = build(name, shape, args=args)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_normalization_is_first_layer():
    plain = build("mlp")
    shifted = build("mlp", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    shifted.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    assert torch.allclose(shifted(x), plain((x - mean) / std), atol=1e-6)


@pytest.mark.parametrize("name", ["cnn2", "cnn4"])
def test_hidden_layer_loads_weights_of_earlier_versions(name):
    """Earlier versions stored (units, H W, channels). The model must give the same logits."""
    model, again = build(name, (1, 28, 28)).eval(), build(name, (1, 28, 28)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    weights = model.state_dict()
    key = next(k for k, w in weights.items() if k.endswith("weight") and w.dim() == 2)
    channels = 32 if name == "cnn2" else 64
    earlier = weights | {key: weights[key].unflatten(1, (channels, -1)).transpose(1, 2).contiguous()}
    assert earlier[key].dim() == 3
    again.load_state_dict(earlier)
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(model(x), again(x))


def test_cnn4_starts_at_zero_logits_as_published():
    assert torch.equal(build("cnn4", (1, 28, 28))(torch.rand(2, 1, 28, 28)), torch.zeros(2, 10))


def test_torchvision_model_is_built_by_name():
    assert build("torchvision:resnet18")(torch.rand(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "shape", "args"),
    [
        ("resnet26", (1, 28, 28), {}),
        ("vit_tiny_patch16_224", (3, 32, 32), {"patch_size": 8, "depth": 2}),
        ("vit_tiny_patch16_224", (3, 32, 32), {"img_size": 32, "depth": 1}),
    ],
)
def test_timm_model_takes_channels_and_size_of_the_data(name, shape, args):
    model = build(f"timm:{name}", shape, args=args)
    assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_missing_timm_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'advtrain\[vision\]'"):
        build("timm:resnet26")
    with pytest.raises(UserError, match="did you mean 'torchvision:resnet50'"):
        build("resnet50")


def test_custom_factory_is_built_by_module_and_name():
    model = build("tests.unit.models.test_models:my_factory", args={"width": 7})
    assert model.network[1].out_features == 7


def transformers_factory(shape, num_classes):
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    return nn.Sequential(nn.Flatten(), nn.Linear(8, num_classes), transformers.BertModel(config))


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("mlp", []),
        ("timm:resnet10t", ["timm"]),
        ("tests.unit.models.test_models:transformers_factory", ["transformers"]),
        ("tests.unit.models.test_models:my_factory", []),
    ],
)
def test_report_lists_versions_of_libraries_of_the_network(name, libraries):
    source = ModelSource(b"", Architecture(ModelConfig(name=name), (3, 8, 8), 10))
    facts = EvalSpec(
        source, digits_data().test, digits_data(), "pgd-1", ThreatModel("linf", 0.1), "m"
    ).facts()
    assert [name for name in ("timm", "transformers") if name in facts["versions"]] == libraries
    assert libraries_used(source.architecture.build()) == libraries


def my_factory(shape, num_classes, *, width=3):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.Linear(width, num_classes)
    )


@pytest.mark.parametrize(
    ("name", "shape", "values", "message"),
    [
        ("cnn3", (1, 28, 28), {}, "did you mean 'cnn"),
        ("cnn4", (1, 8, 8), {}, "needs larger images"),
        ("mlp", (1, 8, 8), {"args": {"widht": 3}}, "did you mean 'width'"),
        ("wide_resnet", (3, 32, 32), {"args": {"depth": 11}}, "6 n"),
        ("mlp", (3, 8, 8), {"mean": [0.1, 0.2]}, "3 channels"),
        ("mlp", (3, 8, 8), {"std": [0.0]}, "above 0"),
        ("resnet50", (3, 32, 32), {}, "did you mean 'torchvision:resnet50'"),
        ("torchvision:resnet19", (3, 32, 32), {}, "did you mean"),
        ("torchvision:resnet18", (1, 28, 28), {}, "3 channels"),
        ("torchvision:resnet18", (30,), {}, "the samples are tables"),
        ("vit_tiny_patch16", (3, 32, 32), {}, "did you mean 'timm:vit_tiny_patch16"),
        ("resnet26", (3, 32, 32), {}, "did you mean 'timm:resnet26'"),
        ("timm:resnet27", (3, 32, 32), {}, "did you mean 'resnet2"),
        ("timm:hf-hub:someone/net", (3, 32, 32), {}, "unknown timm model"),
        (
            "timm:vit_tiny_patch16_224",
            (3, 32, 32),
            {"args": {"embed_dim": -8}},
            "model.args of timm:vit_tiny",
        ),
        ("timm:resnet26", (3, 32, 32), {"args": {"nothing": 1}}, "model.args of timm:resnet26: .*'nothing'"),
        ("timm:resnet26", (3, 32, 32), {"args": {"checkpoint_path": "x.pth"}}, "starts from random weights"),
        ("nowhere:net", (1, 28, 28), {}, "cannot import"),
        ("tests.kit:nothing", (1, 28, 28), {}, "no 'nothing'"),
        ("tests.kit:SMALL", (1, 28, 28), {}, "SMALL"),
    ],
)
def test_build_model_rejects_invalid_config(name, shape, values, message):
    with pytest.raises(UserError, match=message):
        build(name, shape, **values)
