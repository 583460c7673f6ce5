"""Models of user code are checked before a run starts: outputs, state, layout, gradients, batch sizes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import advtrain
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.blocks import block_parameters
from advtrain.optim import recompute_statistics
from advtrain.registry.export import check_export
from advtrain.training import Session, build_components
from advtrain.training.contract import fewest_rows, runs_channels_last, unused_parameters
from advtrain.training.trained_model import check_model
from tests.kit import digits_data, digits_recipe, train_here

DATA = digits_data()


class Net(nn.Module):
    """Network with one hidden layer, whose `form` turns (module, x, hidden units) into the outputs."""

    def __init__(self, form, outputs=10):
        super().__init__()
        self.body, self.head = (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()),
            nn.Linear(16, outputs),
        )
        self.form = form

    def forward(self, x):
        return self.form(self, x, self.body(x))


class Stateful(Net):
    """Network with state that is no tensor."""

    def get_extra_state(self):
        return {"count": 3}

    def set_extra_state(self, state):
        pass


class SpareHead(Net):
    """Network with a head that its outputs do not use."""

    def __init__(self):
        super().__init__(lambda m, x, h: m.head(h))
        self.spare = nn.Linear(16, 5)


class Viewed(nn.Module):
    """Network that flattens with view, which fails in the NHWC layout."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, 10)

    def forward(self, x):
        return self.head(self.conv(x).relu().view(x.size(0), -1))


def out_of_memory(m, x, h):
    raise RuntimeError("out of memory\nand a second line")


def to_norm():
    return nn.Sequential(nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))


FORMS = {
    "sound": lambda: Net(lambda m, x, h: m.head(h)),
    "object": lambda: Net(lambda m, x, h: SimpleNamespace(logits=m.head(h))),
    "mapping": lambda: Net(lambda m, x, h: {"logits": m.head(h), "features": h}),
    "pair": lambda: Net(lambda m, x, h: (m.head(h), h)),
    "pair_in_training": lambda: Net(lambda m, x, h: (m.head(h), h) if m.training else m.head(h)),
    "other_mapping": lambda: Net(lambda m, x, h: {"scores": m.head(h)}),
    "no_tensor": lambda: Net(lambda m, x, h: "ten"),
    "int": lambda: Net(lambda m, x, h: m.head(h).long()),
    "features": lambda: Net(lambda m, x, h: h),
    "one_logit": lambda: Net(lambda m, x, h: m.head(h), outputs=1),
    "squeezed": lambda: Net(lambda m, x, h: m.head(h).squeeze(1), outputs=1),
    "softmax": lambda: Net(lambda m, x, h: m.head(h).softmax(1)),
    "sigmoid": lambda: Net(lambda m, x, h: m.head(h).sigmoid()),
    "maps": lambda: Net(lambda m, x, h: m.head(h)[:, :, None]),
    "nan": lambda: Net(lambda m, x, h: m.head(h) / 0 * 0),
    "double": lambda: Net(lambda m, x, h: m.head(h)).double(),
    "half": lambda: Net(lambda m, x, h: m.head(h)).half(),
    "stateful": lambda: Stateful(lambda m, x, h: m.head(h)),
    "raises": lambda: Net(out_of_memory),
    "raises_in_training": lambda: Net(lambda m, x, h: h @ h if m.training else m.head(h)),
    "fixed_batch": lambda: Net(lambda m, x, h: m.head(h).view(4, 10)),
    "squeezes": lambda: Net(lambda m, x, h: m.head(h).squeeze()),
    "detached": lambda: Net(lambda m, x, h: m.head(h).detach()),
    "random": lambda: Net(lambda m, x, h: m.head(nn.functional.dropout(h, training=True))),
    "across_rows": lambda: Net(lambda m, x, h: m.head(h - h.mean(0))),
    "branches": lambda: Net(lambda m, x, h: m.head(h) if x.sum() > 0 else -m.head(h)),
    "by_size": lambda: Net(lambda m, x, h: m.head(h) if len(x) > 2 else m.head(h) + 0),
    "spare_head": SpareHead,
    "viewed": Viewed,
    "norm": to_norm,
    "norm_in_eval": lambda: to_norm().eval(),
    "lazy": lazy,
}


def __getattr__(name):
    """Return the factory of a form: recipes name it as module:form_NAME."""
    if name.removeprefix("form_") not in FORMS:
        raise AttributeError(name)
    return lambda shape, num_classes: FORMS[name.removeprefix("form_")]()


def recipe_of(form, *overrides):
    return digits_recipe(f"model.name={__name__}:form_{form}", *overrides)


def built(form):
    return build_model(recipe_of(form).model, DATA.shape, DATA.num_classes)


@pytest.mark.parametrize("form", ["sound", "object", "mapping", "pair", "pair_in_training", "lazy", "norm"])
def test_sound_models_pass_and_can_be_exported(form):
    assert check_model(recipe_of(form), DATA) == []
    check_export(built(form), DATA.shape)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("other_mapping", "returns dict with the keys scores; return the outputs as a tensor"),
        ("no_tensor", "returns str"),
        ("int", "not floating-point logits"),
        ("features", "returns 16 logits, but the data have 10 classes"),
        ("one_logit", r"one value for each sample, \(4, 1\), for 10 classes"),
        ("squeezed", r"one value for each sample, \(4,\), for 10 classes"),
        ("softmax", "returns probabilities"),
        ("sigmoid", r"values in \[0, 1\] whatever its weights are"),
        ("maps", r"returns \(4, 10, 1\), not logits"),
        ("nan", "returns NaN or infinite values"),
        ("double", r"parameters in float64 \(body.1.weight, .*return model.float"),
        ("half", "parameters in float16"),
        ("stateful", r"state that is no tensor \(_extra_state\)"),
        ("raises", "fails on a batch of 4 rows, .*: RuntimeError: out of memory$"),
        ("raises_in_training", "fails on a batch in training mode"),
        ("fixed_batch", r"has 2 faults:\n- fails on a batch of one row.*\n- fails on a batch of 3 rows"),
        ("squeezes", r"returns \(10,\), not logits \(1, K\) \(on a batch of one row\)"),
        ("detached", "do not depend on any parameter"),
    ],
)
def test_faulty_model_is_rejected_with_its_fault(form, message):
    with pytest.raises(UserError, match=message):
        check_model(recipe_of(form), DATA)


@pytest.mark.parametrize(
    ("form", "note"),
    [
        ("random", "depend on the other samples of its batch, or on random draws"),
        ("across_rows", "depend on the other samples of its batch"),
        ("spare_head", "do not depend on spare.weight, spare.bias: these parameters get no gradient"),
        ("viewed", "trains as with training.channels_last=false"),
    ],
)
def test_doubtful_model_passes_with_a_note(form, note):
    (found,) = check_model(recipe_of(form), DATA)
    assert note in found


@pytest.mark.parametrize(
    ("form", "message"),
    [("branches", "cannot be exported with torch.export"), ("by_size", "its code fixes the batch size")],
)
def test_model_that_cannot_be_registered_is_rejected(form, message):
    with pytest.raises(UserError, match=message):
        check_export(built(form), DATA.shape)


def test_check_leaves_the_random_generator_as_it_was():
    before = torch.get_rng_state()
    check_model(recipe_of("random"), DATA)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["training.batch_size=1"], True),
        (["training.batch_size=8", "training.num_workers=8"], True),
        (["training.batch_size=8", "training.num_workers=[1, 6]"], True),
        (["training.batch_size=8", "training.num_workers=2"], False),
        (["training.batch_size=8", "training.num_workers=2", "training.accumulate=4"], True),
        (["training.batch_size=18", "training.num_workers=2", "training.accumulate=4"], False),
        (["training.batch_size=4", "adversary.batch_norm=train", "adversary.fraction=0.3"], True),
    ],
)
def test_batch_norm_on_one_row_is_rejected(overrides, refused):
    recipe = recipe_of("norm", *overrides)
    if refused:
        with pytest.raises(
            UserError, match="batch norm, which needs two rows, but the smallest batch of a worker has [01];"
        ):
            check_model(recipe, DATA)
    else:
        assert fewest_rows(recipe, DATA) > 1
        assert check_model(recipe, DATA) == []


def test_batch_norm_that_a_factory_returns_in_evaluation_mode_is_checked():
    with pytest.raises(UserError, match="needs two rows"):
        check_model(recipe_of("norm_in_eval", "training.batch_size=1"), DATA)


def test_swa_recomputes_statistics_that_a_factory_returns_in_evaluation_mode():
    recipe = recipe_of("norm_in_eval", "optimizer.swa_start_epoch=0")
    average = build_components(recipe, DATA, Session()).average_network
    norm = next(module for module in average.modules() if isinstance(module, nn.BatchNorm2d))
    recompute_statistics(average, [torch.rand(4, 1, 8, 8)])
    assert bool((norm.running_mean != 0).all())


def test_built_in_network_with_1x1_maps_is_checked_for_one_row():
    with pytest.raises(UserError, match="needs two rows"):
        check_model(digits_recipe("model={name: preact_resnet18}", "training.batch_size=1"), DATA)


@pytest.mark.parametrize("form", ["viewed", "pair_in_training", "lazy"])
def test_unusual_model_trains_with_default_settings(form, tmp_path):
    recipe = recipe_of(form, "training.epochs=1")
    model, _ = train_here(recipe, tmp_path, DATA)
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_layout_falls_back_only_for_networks_that_need_it():
    found = {
        form: runs_channels_last(built(form), recipe_of(form), DATA) for form in ("viewed", "sound", "norm")
    }
    assert found == {"viewed": False, "sound": True, "norm": True}


@pytest.mark.parametrize(("head", "refused"), [(False, True), (True, False)])
def test_frozen_blocks_must_leave_a_layer_that_features_reach(head, refused):
    recipe = digits_recipe("model={name: cnn2, args: {width: 4}}", "objective={feature_match: 1, teacher: x}")
    *below, last = block_parameters(build_model(recipe.model, DATA.shape, DATA.num_classes))
    names = [below[0], last] if head else below
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"freeze": names})})
    with pytest.raises(UserError, match="trains only the last layer") if refused else nullcontext():
        check_model(recipe, DATA)


def test_unused_parameters_are_found_without_changing_the_model():
    model = built("spare_head")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert unused_parameters(model, DATA.shape) == ["network.spare.weight", "network.spare.bias"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrapped_one_logit_trains_as_the_message_says():
    model = advtrain.wrap_model(Net(lambda m, x, h: m.head(h), outputs=1))
    check_export(model, DATA.shape)
    assert model(torch.rand(4, 1, 8, 8)).shape == (4, 2)
