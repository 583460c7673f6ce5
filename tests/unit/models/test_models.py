"""Networks against their published sizes; the first convolution against nn.Conv2d."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from advtrain.attacks.base import attacked
from advtrain.lookup import UserError
from advtrain.models import MODELS, ModelConfig, build_model, conv
from advtrain.models.conv import Conv2d, FirstConv2d, FlatLinear, only_input_gradients, twice_differentiable


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
def test_sizes_are_those_of_the_published_code(name, shape, args, parameters):
    model = build(name, shape, args=args)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_normalisation_is_the_first_layer():
    plain = build("mlp")
    shifted = build("mlp", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    shifted.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    assert torch.allclose(shifted(x), plain((x - mean) / std), atol=1e-6)


@pytest.fixture(params=["blocks", "taps"])
def any_way(request, monkeypatch):
    """Blocks, or planes of taps, where they are possible, not only where they pay."""
    monkeypatch.setattr(conv, "_many", lambda x: request.param == "blocks")
    monkeypatch.setattr(conv, "MANY", 0)


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize(
    ("kind", "any_way"),
    [(FirstConv2d, "blocks"), (FirstConv2d, "taps"), (Conv2d, "blocks")],
    indirect=["any_way"],
)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"),
    [(4, 2, 1, True), (3, 1, 0, True), (3, 1, 1, False), (2, 2, 3, False), ((2, 6), (1, 3), (4, 0), True)],
)
def test_our_convolutions_have_the_outputs_and_all_gradients_of_conv2d(
    kind, twice, order, kernel, stride, padding, bias
):
    """First derivatives, and those of a function of all of them: input, weight and bias."""
    ours = kind(2, 5, kernel, stride=stride, padding=padding, bias=bias).double().to(memory_format=order)
    theirs = nn.Conv2d(2, 5, kernel, stride=stride, padding=padding, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.rand(
            3, 2, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        with twice_differentiable(twice):
            y = layer(x)
        first = torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()], create_graph=True)
        once = torch.autograd.grad(first[0].square().sum(), [x, layer.weight], retain_graph=True)
        every = torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, *layer.parameters()])
        results.append([y, *first, *once, *every])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*results, strict=True))


def test_a_pass_for_the_input_alone_makes_no_gradient_of_the_weights_and_the_same_of_the_input(monkeypatch):
    """And the gradient of that gradient, which is what a regulariser trains with, is the same too."""
    asked, made = [], conv._gradients
    monkeypatch.setattr(conv, "_gradients", lambda *args: (asked.append(args[-2]), made(*args))[1])
    layer = Conv2d(2, 5, 3).double()
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64).requires_grad_()
    results = []
    for only in (only_input_gradients, nullcontext):
        asked.clear()
        with twice_differentiable():
            y = layer(x)
        with only():
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        assert asked == [[True, False, False] if only is only_input_gradients else [True, True, True]]
        results.append([first, *torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_of_an_image_is_exact_for_any_size_and_padding_and_lies_in_one_piece(
    stride, spans, padding, channels
):
    layer = FirstConv2d(channels, 4, stride * spans, stride=stride, padding=padding).double()
    layer = layer.to(memory_format=torch.channels_last)
    for size in range(6, 10):
        x = torch.rand(2, channels, size, 15 - size, dtype=torch.float64).requires_grad_()
        (found,) = torch.autograd.grad(layer(x).square().sum(), x)
        (expected,) = torch.autograd.grad(nn.Conv2d.forward(layer, x).square().sum(), x)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert found.is_contiguous() or found.is_contiguous(memory_format=torch.channels_last)


def test_the_fast_gradients_are_taken(monkeypatch):
    """A rule that never held would leave every gradient right."""
    asked = []

    def watch(name: str) -> None:
        way = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *args: (asked.append((name, *args[1].shape)), way(*args))[1])

    watch("_by_blocks")
    watch("_by_taps")
    model = build("cnn2", (1, 28, 28)).to(memory_format=torch.channels_last)
    x = torch.rand(50, 1, 28, 28).requires_grad_()
    with attacked(model):
        torch.autograd.grad(model(x).sum(), x)
    assert asked == [("_by_blocks", 32, 16, 4, 4), ("_by_taps", 16, 1, 4, 4)]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_passes_without_gradients_give_the_same_in_the_order_that_is_fastest(shape):
    model = build("cnn2", shape).to(memory_format=torch.channels_last)
    x = torch.rand(3, *shape)
    orders = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _layer, _inputs, out: orders.append(out.is_contiguous()))
    with torch.no_grad():
        found = [model(x), model(x.contiguous(memory_format=torch.channels_last))]
    expected = model(x)
    assert orders == [True, True, shape[0] == 1, shape[0] == 1, False, False]
    assert all(torch.allclose(logits, expected, atol=1e-6) for logits in found)


def test_a_pass_asks_for_a_parametrised_weight_once():
    """A weight that is drawn at each look would be drawn twice, spectral norm would make two steps."""

    class Drawn(nn.Module):
        def forward(self, weight):
            looks.append(1)
            return weight

    layer = Conv2d(4, 5, 2, stride=2)
    nn.utils.parametrize.register_parametrization(layer, "weight", Drawn(), unsafe=True)
    for gradients in (torch.enable_grad, torch.no_grad):
        looks = []
        with gradients():
            layer(torch.rand(2, 4, 64, 64).requires_grad_())
        assert looks == [1]


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("kind", [FirstConv2d, Conv2d])
def test_convolutions_take_an_empty_batch_and_tensors_without_data(kind):
    layer = kind(4, 8, 6, stride=2).requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.rand(0, 4, 10, 10).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert found.shape == x.shape
    assert layer.to("meta")(torch.zeros(2, 4, 10, 10, device="meta")).shape == (2, 8, 3, 3)


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}]
)
def test_convolutions_refuse_what_they_do_not_do(options):
    with pytest.raises(ValueError, match=r"take nn\.Conv2d"):
        Conv2d(4, 8, 3, **options)


def test_an_attack_sees_weights_that_a_model_changes_in_its_forward_pass_even_past_autograd():
    """A randomised defence that were seen as deterministic would be judged without averages over its draws."""
    model = build("cnn2", (1, 28, 28)).to(memory_format=torch.channels_last)
    weight = next(m.weight for m in model.modules() if isinstance(m, FlatLinear))
    x = torch.rand(4, 1, 28, 28)
    with attacked(model), torch.no_grad():
        before = model(x)
        weight.data.add_(torch.ones_like(weight))  # raises no version counter
        assert not torch.allclose(model(x), before)


def test_networks_work_under_torch_func_and_give_what_plain_layers_give_in_either_memory_order():
    model, x = build("cnn2", (1, 28, 28)).eval().double(), torch.rand(3, 1, 28, 28, dtype=torch.float64)
    plain = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    ).double()
    model.load_state_dict(dict(zip(model.state_dict(), plain.state_dict().values(), strict=True)))
    (layer,) = (module for module in model.modules() if isinstance(module, FlatLinear))
    assert torch.equal(layer.plain_weight(), plain[5].weight)
    gradients = []
    for network in (plain, model, copy.deepcopy(model).to(memory_format=torch.channels_last)):
        z = x.clone().requires_grad_()
        out = network(z)
        gradients.append([out, *torch.autograd.grad(out.square().sum(), [z, *network.parameters()])])

        def loss(one, network=network):
            return network(one).square().sum()

        gradients[-1].append(torch.func.grad(loss)(x))
        gradients[-1].append(torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(1)).squeeze(1))
    for expected, *found in zip(*gradients, strict=True):
        flat = [one.transpose(1, 2).flatten(1) if one.dim() == 3 else one for one in found]
        assert all(torch.allclose(one, expected, rtol=1e-9) for one in flat)


def test_cnn4_starts_at_zero_logits_as_published():
    assert torch.equal(build("cnn4", (1, 28, 28))(torch.rand(2, 1, 28, 28)), torch.zeros(2, 10))


def test_torchvision_models_come_by_name():
    assert build("torchvision:resnet18")(torch.rand(1, 3, 64, 64)).shape == (1, 10)


def test_a_users_factory_comes_by_module_and_name():
    model = build("tests.unit.models.test_models:my_factory", args={"width": 7})
    assert model.network[1].out_features == 7


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
        ("torchvision:resnet19", (3, 32, 32), {}, "did you mean"),
        ("torchvision:resnet18", (1, 28, 28), {}, "3 channels"),
        ("nowhere:net", (1, 28, 28), {}, "cannot import"),
        ("tests.kit:nothing", (1, 28, 28), {}, "no 'nothing'"),
        ("tests.kit:SMALL", (1, 28, 28), {}, "SMALL"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_reason(name, shape, values, message):
    with pytest.raises(UserError, match=message):
        build(name, shape, **values)
