"""Recorded passes against the passes that they record: the same to the last bit, or not recorded at all."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advtrain.attacks import ATTACK_LOSSES
from advtrain.attacks.base import InputGradients, attacked
from advtrain.attacks.losses import build_lead, build_targeted_dlr
from advtrain.models import ModelConfig, build_model, recorded
from advtrain.models.conv import only_input_gradients, twice_differentiable
from advtrain.models.known import recordable
from advtrain.models.normalized import Normalized
from advtrain.models.recorded import MOST, OFTEN, Passes, Recording, identity
from tests.kit import Busy

CLASSIFICATION = sorted(set(ATTACK_LOSSES) - {"mse", "mae", "over", "under", "linearity"})


def network(name: str, shape=(1, 28, 28), **values) -> nn.Module:
    return build_model(ModelConfig(name=name, **values), shape, 10)


def recordings(model: nn.Module) -> list[Recording]:
    return [known for known in recorded._passes.get(model, {}).values() if isinstance(known, Recording)]


def losses(model, x, y):
    built = {name: ATTACK_LOSSES[name](model, x, y) for name in CLASSIFICATION}
    target = (y + 1) % 10
    return built | {"targeted dlr": build_targeted_dlr(y, target), "lead": build_lead(y, target)}


def forward(net, x):
    return {"out": net(x)}


def gradients(model, x, y, often):
    """The gradients and outputs of all losses, each asked for twice."""
    with attacked(model):
        passes = InputGradients(model, often)
        return [passes(x, loss) for loss in losses(model, x, y).values() for _ in range(2)]


def same(a, b) -> bool:
    return all(
        torch.equal(one, other) for x, y in zip(a, b, strict=True) for one, other in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("name", "size"), [("mlp", 5), ("cnn2", 1), ("cnn2", 7), ("cnn2", 60), ("cnn4", 7)], ids=str
)
def test_recorded_gradients_are_those_of_autograd_to_the_last_bit_for_whatever_weights(name, size, layout):
    shape = (3, 28, 28)
    model = network(name, shape, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]).to(memory_format=layout)
    x, y = torch.rand(size, *shape), torch.randint(0, 10, (size,))
    assert same(gradients(model, x, y, 1), gradients(model, x, y, math.inf))
    count = len(recordings(model))
    assert count == len(losses(model, x, y))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert same(gradients(model, x.flip(0), y, 1), gradients(model, x.flip(0), y, math.inf))
    model.load_state_dict(network(name, shape, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]).state_dict())
    assert same(gradients(model, x, y, 1), gradients(model, x, y, math.inf))
    assert len(recordings(model)) == count  # none of it was recorded anew


def test_gradients_of_weights_are_recorded_too_and_new_layouts_are_another_kind():
    model, y = network("cnn2"), torch.randint(0, 10, (9,))
    x = torch.rand(9, 1, 28, 28)

    def descend(net, x, y):
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        return {str(number): gradient for number, gradient in enumerate(gradients)}

    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for _ in range(2):
            found = Passes(model, 1)(descend, "descend", x, y)
            assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    assert len(recordings(model)) == 2


def test_a_kind_of_pass_is_recorded_once_it_is_made_often():
    model, x = network("mlp"), torch.rand(3, 1, 28, 28)
    passes = Passes(model)
    for _ in range(OFTEN - 1):
        passes(forward, "forward", x)
    assert recordings(model) == []
    Passes(model)(forward, "forward", x)
    assert len(recordings(model)) == 1
    passes(forward, "forward", x[:2])
    assert len(recordings(model)) == 1  # other shapes are of another kind
    for _ in range(OFTEN - 1):
        passes(forward, "forward", x[:2])
    assert len(recordings(model)) == 2


def unknown_layer(model):
    model[2] = Busy()


def hook(model):
    model[0].register_forward_hook(lambda *_: None)


def patched(model):
    model[0].forward = lambda x: x


def patched_inside(model):
    model.append(nn.Conv2d(1, 1, 1))
    model[-1]._conv_forward = lambda x, weight, bias: x


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model[1])


@pytest.mark.parametrize(
    "change",
    [
        unknown_layer,
        hook,
        patched,
        patched_inside,
        parametrised,
        lambda model: model.double(),
        lambda model: model.append(nn.Dropout(0.5)),
        lambda model: model.append(nn.BatchNorm1d(10)),
        lambda model: model.append(type("Own", (nn.ReLU,), {})()),
        lambda model: model.compile(),
        lambda model: model.append(nn.MaxPool2d([2, 2])),
    ],
    ids=[
        "unknown",
        "hook",
        "patched",
        "patched inside",
        "parametrised",
        "double",
        "dropout",
        "batch norm",
        "subclass",
        "compiled",
        "unhashable setting",
    ],
)
def test_what_may_call_other_operators_the_next_time_is_not_recorded(change):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Identity())
    model[2] = nn.ReLU()
    assert recordable(model)
    change(model)
    assert not recordable(model)


def test_passes_in_mixed_precision_or_under_torch_func_or_to_be_differentiated_twice_are_not_recorded():
    model = network("mlp")
    for kind in (twice_differentiable, only_input_gradients):
        with kind():
            assert not recordable(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recordable(model)
    seen = []
    torch.func.vmap(lambda x: seen.append(recordable(model)) or x)(torch.ones(2))
    assert seen == [False]
    assert recordable(model)


OWN = torch.ones(3, 10)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: F.dropout(net(x)),
        lambda net, x: net(x) * float(net(x).sum()),
        lambda net, x: net(x)[net(x).sum(1) > 0],
        lambda net, x: net(x) + OWN,
        lambda net, x: net(x).detach().unsqueeze_(0),
        lambda net, x: net(x) if next(net.parameters()).mul_(1) is not None else None,
        lambda net, x: net(x) + torch.zeros_like(list(net.parameters())[-1]).add_(net(x)[0]),
    ],
    ids=[
        "draws",
        "asks for a value",
        "asks for a shape",
        "tensor of its own",
        "changes a shape",
        "changes weights",
        "adds to theirs",
    ],
)
def test_a_pass_that_operators_do_not_tell_is_made_every_time(function):
    model, x = network("mlp").requires_grad_(False), torch.rand(3, 1, 28, 28)
    torch.manual_seed(1)
    expected = function(model, x)
    for _ in range(3):
        torch.manual_seed(1)
        found = Passes(model, 1)(lambda net, x: {"out": function(net, x)}, "own", x)
        assert torch.equal(found["out"], expected)
    assert recordings(model) == []


def other_stride(model):
    model[0].stride = (2, 2)


def other_padding(model):
    model[0].padding = (0, 0)


def other_layer(model):
    model[1] = nn.MaxPool2d(1)


def other_scale(model):
    model[4].target_scale = (1.0, 3.0)


def tied(model):
    model[3].weight = model[2][-1].weight


def shared(model):
    model[3] = model[2][-1]


def frozen(model):
    model[0].weight.requires_grad_(False)


def other_order(model):
    bias = model[0].bias
    del model[0].bias
    weight = model[0].weight
    del model[0].weight
    model[0].bias, model[0].weight = bias, weight


@pytest.mark.parametrize(
    "change",
    [other_stride, other_padding, other_layer, other_scale, tied, shared, frozen, other_order],
    ids=lambda f: f.__name__,
)
def test_a_network_that_is_changed_is_recorded_anew(change):
    linear = nn.Linear(64, 64)
    middle = nn.Sequential(nn.AvgPool2d(1), nn.Flatten(2), nn.Linear(64, 64))
    end = Normalized(nn.Flatten(), None, None)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), middle, linear, end)
    if change in (other_stride, other_padding):
        model[2], model[3] = nn.ReLU(), nn.ReLU()
    x = torch.rand(3, 1, 8, 8)

    def differentiate(net, x):
        trained = [p for p in net.parameters() if p.requires_grad]
        return {str(i): g for i, g in enumerate(torch.autograd.grad(net(x).square().sum(), trained))}

    for kinds in (1, 2):
        for _ in range(2):
            found, expected = Passes(model, 1)(differentiate, "d", x), differentiate(model, x)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert len(recordings(model)) == kinds
        change(model)


def test_no_pass_is_recorded_within_another_or_beside_hooks_of_tensors_and_of_all_modules():
    model, x = network("mlp"), torch.rand(3, 1, 28, 28)
    inner = network("mlp")

    def nested(net, x):
        return {"out": Passes(inner.requires_grad_(False), 1)(forward, "inner", x)["out"] * 0 + net(x)}

    assert torch.equal(Passes(model, 1)(nested, "nested", x)["out"], model(x))  # and does not wait for ever
    handle = next(model.parameters()).register_hook(lambda gradient: 2 * gradient)
    assert not recordable(model)
    handle.remove()
    assert recordable(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not recordable(model)
    handle.remove()
    assert recordable(model)


def test_the_kinds_that_are_known_of_a_network_are_bounded():
    model = network("mlp")
    for number in range(MOST + 3):
        Passes(model)(forward, number, torch.rand(1, 1, 28, 28))
    known = [kind[0] for kind in recorded._passes[model]]
    assert known == list(range(3, MOST + 3))


def test_what_depends_on_weights_alone_is_made_once_for_several_passes_and_once_where_it_is_asked_for_twice():
    model, x = network("mlp"), torch.rand(3, 1, 28, 28)

    def twice(net, x):
        weight = list(net.parameters())[-2]
        return {"out": weight.flip(0).sum() + weight.flip(0).sum() * x}

    passes = Passes(model, 1)
    found = [passes(twice, "twice", x)["out"] for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], twice(model, x)["out"])
    (recording,) = recordings(model)
    assert len(recording.prepare([*model.parameters(), *model.buffers()])) == 1  # any order does


def test_an_error_of_the_pass_is_its_own():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Passes(network("mlp"), 1)(forward, "forward", torch.rand(3, 5))


def test_functions_are_told_apart_by_code_and_not_known_with_a_closure():
    def make(factor):
        return lambda outputs, z: factor * outputs

    assert identity(make(1)) is None
    assert identity(lambda outputs, z, factor=2: outputs) is None
    first, second = ((lambda outputs, z: outputs) for _ in range(2))
    assert identity(first) == identity(second) is not None
    assert identity(first) != identity(lambda outputs, z: -outputs)


def test_recordings_end_with_their_network():
    model = network("mlp")
    before = len(recorded._passes)
    Passes(model, 1)(forward, "forward", torch.rand(3, 1, 28, 28))
    assert len(recorded._passes) == before + 1
    del model
    assert len(recorded._passes) == before


def test_a_pass_that_writes_does_it_once_and_to_its_own():
    model, x = network("mlp").requires_grad_(False), torch.rand(3, 1, 28, 28)

    def write(net, x):
        first, second = x.new_zeros(3), x.new_zeros(3)  # alike, until one is written to
        first.add_(x.sum())
        bias = next(reversed(list(net.parameters()))).flip(0)
        return {"x": x.add_(1), "first": first, "second": second, "bias": bias, "again": bias}

    passes, expected = Passes(model, 1), write(model, x.clone())
    for _ in range(2):
        given = x.clone()
        found = passes(write, "write", given)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(given, x + 1)
        found["bias"].zero_()  # what is given away is not what the next pass uses
    assert len(recordings(model)) == 1
