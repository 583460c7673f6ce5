"""Models of normalized inputs, or with other outputs than logits (N, K)."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import advtrain
from tests.kit import Busy, Linear, Pixels

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Outputs = namedtuple("Outputs", ["logits", "aux_logits"])


class Returns(nn.Module):
    """Linear model of 16 features and two classes; a function changes its logits (0, z)."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = Linear(16), change

    def forward(self, x):
        return self.change(self.model(x))


def batch(n=40):
    x = 0.2 + 0.6 * torch.rand(n, 16, generator=torch.Generator().manual_seed(0))
    return x, Linear(16)(x).argmax(1)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 6, 5)], ids=["table", "sequence", "image"])
@pytest.mark.parametrize("kind", [list, torch.as_tensor], ids=["list", "tensor"])
def test_wrapped_model_normalizes_channels(shape, kind):
    x, flatten = torch.rand(shape, generator=torch.Generator().manual_seed(0)), nn.Flatten()
    model = advtrain.wrap_model(flatten, mean=kind(MEAN.tolist()), std=kind(STD.tolist()))
    expected = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    assert torch.allclose(model(x), expected.flatten(1), atol=1e-6)
    assert torch.equal(advtrain.wrap_model(flatten)(x), x.flatten(1))
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_wrapped_model_gives_same_robustness_as_normalization_in_weights():
    """(x - 0.45) / 0.22 can be moved into the weights of a linear model."""
    x, y = batch()
    inner, outer = Linear(16), Linear(16)
    with torch.no_grad():
        outer.weight.div_(0.22)
        outer.bias.sub_(0.45 * outer.weight.sum())
    y = outer(x).argmax(1)
    wrapped = advtrain.wrap_model(inner, mean=[0.45], std=[0.22])
    found, expected = (advtrain.attack(m, x, y, "linf:0.1", "apgd-ce-20") for m in (wrapped, outer))
    broken = [m(z).argmax(1) != y for m, z in ((wrapped, found), (outer, expected))]
    assert torch.equal(*broken)
    assert 0 < int(broken[0].sum()) < len(x)
    assert float((found - x).abs().max()) <= 0.1 + 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda z: SimpleNamespace(logits=z),
        lambda z: Outputs(z, None),
        lambda z: {"logits": z, "loss": None},
        lambda z: OrderedDict(logits=z),
        lambda z: (z, "rest"),
        lambda z: [z],
        lambda z: z[:, 1:],
        lambda z: z[:, 1],
        lambda z: {"logits": z[:, 1:]},
        lambda z: z,
    ],
    ids=["object", "namedtuple", "dict", "mapping", "tuple", "list", "column", "flat", "nested", "logits"],
)
def test_wrapped_model_returns_logits(change):
    x, y = batch()
    model = advtrain.wrap_model(Returns(change))
    assert torch.equal(model(x), Linear(16)(x))
    assert torch.equal(model(x[:1]), Linear(16)(x[:1]))
    assert advtrain.evaluate(model, x, y, "linf:0.01", suite="pgd-2", full=False).clean_accuracy == 1
    advtrain.attack(model, x, y, "linf:0.01", "square-2")
    advtrain.Adversary("linf:0.01", num_steps=2)(model, x, y)


@pytest.mark.parametrize(
    "change",
    [lambda z: z.softmax(1), lambda z: z[:, 1].sigmoid(), lambda z: (z[:, 1:].sigmoid(), None)],
    ids=["softmax", "sigmoid", "column"],
)
def test_wrapped_model_takes_logarithm_of_probabilities(change):
    x, y = batch()
    model = advtrain.wrap_model(Returns(change), from_probabilities=True)
    assert torch.allclose(model(x), Linear(16)(x).log_softmax(1), atol=1e-4)
    assert advtrain.evaluate(model, x, y, "linf:0.01", suite="pgd-2", full=False).clean_accuracy == 1


def test_wrapped_model_gives_finite_logits_for_probability_0():
    model = advtrain.wrap_model(nn.Identity(), from_probabilities=True)
    logits = model(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert logits.isfinite().all()
    assert logits.argmax(1).tolist() == [1, 0]


def test_wrapped_model_refuses_contradiction_to_from_probabilities():
    x, _ = batch()
    with pytest.raises(advtrain.UserError, match="from_probabilities=True"):
        advtrain.wrap_model(Returns(lambda z: z.softmax(1)))(x)
    for change in (lambda z: z, lambda z: z[:, 1]):
        with pytest.raises(advtrain.UserError, match="leave it out"):
            advtrain.wrap_model(Returns(change), from_probabilities=True)(x)


def test_wrapped_model_keeps_modes_and_adds_no_weights():
    inner = Busy().eval()
    inner.body[3].train()
    model = advtrain.wrap_model(inner, mean=[0.5], std=[0.5])
    assert not model.training
    assert [m.training for m in inner.modules()].count(True) == 1
    assert set(model.state_dict()) == {f"model.{name}" for name in inner.state_dict()}


def test_wrapped_model_can_be_exported():
    x, _ = batch()
    model = advtrain.wrap_model(Returns(lambda z: (z,)), mean=[0.5], std=[0.5]).eval()
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: advtrain.wrap_model(Linear(16), std=[0.0]), "std above 0"),
        (lambda x: advtrain.wrap_model(Linear(16), mean=[float("nan")]), "mean must be finite"),
        (lambda x: advtrain.wrap_model(Pixels((1, 8, 8), 10)), "EmbeddingModel"),
        (lambda x: advtrain.wrap_model(nn.Flatten(), mean=MEAN)(x), r"3 values, but x \(40, 16\) has 16"),
        (lambda x: advtrain.wrap_model(Returns(lambda z: {"scores": z}))(x), "returns dict; .*'logits'"),
        (
            lambda x: advtrain.wrap_model(Returns(lambda z: z[..., None]))(x),
            r"Tensor torch.float32 \(40, 2, 1\)",
        ),
        (lambda x: advtrain.wrap_model(Returns(lambda z: z.argmax(1)))(x), "Tensor torch.int64"),
        (lambda x: advtrain.wrap_model(Returns(lambda z: ()))(x), "returns tuple; "),
    ],
)
def test_wrap_model_refuses_bad_arguments_and_outputs(make, message):
    with pytest.raises(advtrain.UserError, match=message):
        make(batch()[0])
