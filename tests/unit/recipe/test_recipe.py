"""Recipes: accepted and rejected values, error messages, and round trips through YAML."""

from __future__ import annotations

import pytest
import yaml
from pydantic import BaseModel

from advtrain.documents import read_yaml
from advtrain.errors import UserError
from advtrain.recipe import Recipe, load_recipe, load_stored_recipe, override
from advtrain.schema import Config, configurations
from tests.hf_kit import hf_recipe
from tests.kit import RECIPES, digits_recipe


def test_shipped_recipe_round_trips_through_yaml(shipped_recipe, tmp_path):
    recipe = load_recipe(shipped_recipe)
    assert recipe.name == shipped_recipe.stem
    assert recipe.description
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe
    assert load_recipe(copy).digest() == recipe.digest()
    assert recipe.warnings(eight_bit=True) == []


def test_fractions_are_exact_and_kept_in_yaml():
    recipe = digits_recipe("adversary.eps=8/255", "evaluation.threat.eps=0.3")
    assert recipe.adversary.eps == 8 / 255
    assert "eps: 8/255" in recipe.to_yaml()
    assert recipe.evaluation.threat.eps == 0.3


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2/255", 2 / 255), ("3", 3.0), ("0.5", 0.5)])
def test_numbers_accept_common_notations(text, value):
    assert digits_recipe(f"optimizer.lr={text}").optimizer.lr == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.beta3=0.9", r"unknown key 'optimizer.beta3'; did you mean 'beta2'\?"),
        ("adversry.eps=0.1", "unknown key 'adversry'; did you mean 'adversary'"),
        ("evaluation.threat.epsilon=0.1", "unknown key 'evaluation.threat.epsilon'; did you mean 'eps'"),
        ("data.augment.flp=true", "unknown key 'data.augment.flp'; did you mean 'flip'"),
        ("adversary.eps=-0.1", "'adversary.eps': Input should be greater than or equal to 0"),
        ("adversary.eps=.nan", "'adversary.eps'.*finite"),
        ("adversary.eps=8/0", "'adversary.eps'"),
        ("training.epochs=ten", "'training.epochs': .*integer.*ten"),
        ("training.epochs=1.5", "'training.epochs'"),
        ("training.compile=1", "'training.compile'.*boolean"),
        ("optimizer.name=admw", "'optimizer.name'"),
        ("optimizer.momentum=0.9", "'adamw' has no momentum; it belongs to sgd"),
        ("optimizer.schedule.gamma=0.5", "'one_cycle' has no gamma"),
        ("training.batch_size=1", "smaller than the number of workers"),
        ("training.num_workers=[2,1]", "min <= max"),
        ("adversary.eps_warmup_epochs=99", "must be below training.epochs"),
        (
            "adversary.eps_delay_epochs=2",
            r"adversary.eps_delay_epochs \+ eps_warmup_epochs = 2 must be below",
        ),
        ("adversary.eps_schedule=cosine", "does nothing without eps_warmup_epochs"),
        ("data.augment.resized_crop=0.5", "stream: true"),
        ("name=../x", "'name'"),
        ("adversary=3", "'adversary'"),
        ("optimizer", "path=value"),
        ("optimizer.lr.top=3", "'lr' is a value, not a section"),
    ],
)
def test_recipe_error_names_path_of_invalid_setting(override, message):
    with pytest.raises(UserError, match=message):
        digits_recipe("training.num_workers=2", override)


def test_recipe_with_custom_code_needs_allow_code():
    override = ["model.name=tests.kit:Busy"]
    with pytest.raises(UserError, match="--allow-code"):
        load_recipe(RECIPES / "digits.yaml", override)
    assert load_recipe(RECIPES / "digits.yaml", override, allow_code=True).model.name == "tests.kit:Busy"
    assert load_recipe(RECIPES / "digits.yaml", ["model.name=torchvision:resnet18"])


def test_recipe_error_names_missing_key():
    values = yaml.safe_load((RECIPES / "digits.yaml").read_text())
    del values["adversary"]["eps"]
    from advtrain.recipe import parse_recipe

    with pytest.raises(UserError, match=r"here: 'adversary.eps' is missing"):
        parse_recipe(values, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "mapping"),
        (None, "cannot read"),
        ("model: {name: mlp}\ndata: {}\nmodel: {}", r"(?s)'model' is a duplicate key.*line 3, column 1"),
        ("data: {source: npz, source: digits}", "'source' is a duplicate key"),
    ],
)
def test_load_recipe_rejects_invalid_file(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_yaml_key_overrides_merged_mapping(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, y: 3}")
    assert read_yaml(path, "recipe") == {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}}


@pytest.mark.parametrize(("eps", "levels"), [("0.031", 8), ("0.0157", 4), ("0.0627", 16), ("0.0314", 8)])
def test_rounded_fraction_gives_warning_with_exact_fraction(eps, levels):
    (remark,) = digits_recipe(f"adversary.eps={eps}").warnings(eight_bit=True)
    assert f"{levels}/255" in remark
    assert digits_recipe(f"adversary.eps={eps}").warnings(eight_bit=False) == []


def test_rounded_fraction_in_eps_low_or_changes_gives_warning():
    changes = "training.changes=[{epoch: 1, settings: {adversary.eps: 0.031}}]"
    recipe = digits_recipe("adversary.eps_low=0.0157", changes)
    assert [remark.partition(" = ")[0] for remark in recipe.warnings(eight_bit=True)] == [
        "adversary.eps_low",
        "training.changes, epoch 1: adversary.eps",
    ]


@pytest.mark.parametrize("eps", ["8/255", "0.3", "0.1", "0.05", "0.01", "0"])
def test_intended_radius_gives_no_warning(eps):
    assert digits_recipe(f"adversary.eps={eps}").warnings(eight_bit=True) == []


def test_recipe_digest_depends_only_on_settings_that_affect_result():
    base = digits_recipe()
    for same in ("training.num_workers=2", "training.max_failures=9", "name=other", "data.download=true"):
        assert digits_recipe(same).digest() == base.digest()
    for other in (
        "seed=1",
        "optimizer.lr=0.1",
        "adversary.eps=0.2",
        "training.batch_size=32",
        "training.accumulate=2",
        "evaluation.threat.eps=0.2",
    ):
        assert digits_recipe(other).digest() != base.digest()


def classes(model: type[BaseModel]):
    yield model
    for field in model.model_fields.values():
        for inner in configurations(field.annotation):
            yield from classes(inner)


def test_nested_configs_forbid_unknown_keys_and_are_frozen():
    for config in classes(Recipe):
        assert issubclass(config, Config)
        assert config.model_config["extra"] == "forbid"
        assert config.model_config["frozen"]


def test_every_hyperparameter_is_described():
    undescribed = [path for path, _, description in digits_recipe().leaves() if not description]
    assert undescribed == []


def test_renamed_key_is_rejected_in_user_file_and_accepted_in_stored_recipe(tmp_path):
    values = digits_recipe().values()
    values["objective"] = {"adv_ce": 1.0, "own": {"function": "os:getcwd", "weight": 0.5}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="own is now called custom"):
        load_recipe(file, allow_code=True)
    recipe = load_stored_recipe(file, allow_code=True)
    assert recipe.objective.custom.function == "os:getcwd"


def test_hat_recipe_keeps_its_digest_under_the_new_name_of_its_teacher(tmp_path):
    values = digits_recipe().values()
    values["objective"] = {"clean_ce": 1.0, "hat": 0.5, "hat_teacher": "runs/standard-1"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    recipe = load_stored_recipe(file)
    assert recipe.objective.teacher == "runs/standard-1"
    assert recipe.digest() == (
        "d04dcb95ac1095c67e4b7a765a4fd46c322a0952ad9dd7010fad26dc1a406a44"  # as before the renaming
    )
    taught = recipe.objective.model_copy(update={"teacher_digest": "0" * 64})
    assert recipe.model_copy(update={"objective": taught}).digest() != recipe.digest()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adversary.loss=kl_teacher"], "adversary.loss kl_teacher: set objective.teacher"),
        (
            ["objective.teacher=x"],
            "objective.teacher has no effect: set objective.hat, objective.distill_adv",
        ),
        (["objective={feature_match: 1, teacher: x}", "training.compile=true"], "training.compile: false"),
        (
            ["objective={feature_match: 1, teacher: x}", "training.sharding=fsdp"],
            "combined with objective.feature_match",
        ),
        (["objective.l2_sp=0.1", "training.sharding=fsdp"], "combined with objective.l2_sp"),
        (["objective={feature_match: 1, teacher: x}", "model.freeze=backbone"], "trains only the last layer"),
        (
            [
                "objective={feature_match: 1, l2_sp: 1, teacher: x}",
                "model={name: mlp, from: y, freeze: backbone}",
            ],
            "objective.feature_match, objective.l2_sp does not reach",
        ),
        (
            ["objective={feature_match: 1, teacher: x}", "model.freeze=backbone", "model.unfreeze_epoch=1"],
            "trains only the last layer",
        ),
        (
            [
                "objective={adv_ce: 1, feature_match: 1, teacher: x}",
                "model.freeze=backbone",
                "training.changes=[{epoch: 1, settings: {objective.adv_ce: 0}}]",
            ],
            "trains only the last layer",
        ),
        (["evaluation.validation.loss=kl_teacher"], "loss kl_teacher is for training only"),
        (
            [
                "objective={distill_adv: 1, teacher: x}",
                "adversary.loss=kl_teacher",
                "adversary.target=random",
            ],
            "targeted attack needs loss ce or margin",
        ),
        (
            [
                "objective={distill_adv: 1, teacher: x}",
                "training.changes=[{epoch: 1, settings: {objective.teacher: y}}]",
            ],
            "except the teacher",
        ),
    ],
)
def test_recipe_rejects_settings_of_a_teacher_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        digits_recipe(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.teacher=x", "adversary.loss=kl_teacher"],
        ["objective.teacher=x", "training.changes=[{epoch: 1, settings: {objective.distill_adv: 1}}]"],
        [
            "objective={adv_ce: 1, distill_clean: 1, teacher: x}",
            "training.changes=[{epoch: 1, settings: {objective.distill_clean: 0}}]",
        ],
        [
            "objective={adv_ce: 1, feature_match: 1, teacher: x}",
            "model.freeze=backbone",
            "model.unfreeze_epoch=1",
            "training.changes=[{epoch: 1, settings: {objective.adv_ce: 0}}]",
        ],
    ],
    ids=["attack", "later", "until later", "features after LP-FT"],
)
def test_recipe_accepts_a_teacher_that_the_attack_or_a_change_uses(overrides):
    recipe = digits_recipe(*overrides)
    assert recipe.in_force(1, 0).objective.teacher == "x"


COMPLETE = {
    "model": {"name": "hf:a", "args": {"model_type": "bert", "hidden_size": 16}},
    "data": {"source": "text", "path": "q.jsonl", "tokenizer": "hf:a", "tokenizer_digest": "a" * 64},
}


@pytest.mark.parametrize("by", ["override", "--set"])
def test_another_pretrained_network_has_its_own_settings_and_tokenizer(tmp_path, by):
    def changed(changes):
        values = hf_recipe(tmp_path / "q.jsonl", **COMPLETE).values()
        if by == "override":
            override(values, changes)
            return Recipe.model_validate(values)
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(tmp_path / "r.yaml", [f"{key}={value}" for key, value in changes.items()])

    new = changed({"model.args.hidden_size": 8, "model.name": "hf:b"})
    assert new.model.args == {"hidden_size": 8}
    assert (new.data.tokenizer, new.data.tokenizer_digest) == ("hf:b", None)
    same = changed({"model.args.hidden_size": 8, "model.name": "hf:a"})
    assert same.model.args == {"model_type": "bert", "hidden_size": 8}
    assert same.data.tokenizer_digest == "a" * 64
    own = changed({"model.name": "hf:b", "data.tokenizer": "t.json"})
    assert (own.data.tokenizer, own.data.tokenizer_digest) == ("t.json", None)
    assert changed({"model.name": "text_cnn"}).data.tokenizer is None


def test_start_weights_are_written_and_set_as_model_from():
    """The digest replaces the reference in the recipe's digest; another reference removes it."""
    plain = digits_recipe()
    recipe = digits_recipe("model.from=a", f"model.from_digest={'a' * 64}")
    assert ("model.from", "a") in [(path, value) for path, value, _ in recipe.leaves()]
    assert recipe.values()["model"]["from"] == "a"
    assert "from" not in plain.values()["model"]
    assert len({recipe.digest(), plain.digest(), digits_recipe("model.from=a").digest()}) == 3
    assert recipe.digest() == digits_recipe("model.from=b", f"model.from_digest={'a' * 64}").digest()
    values = recipe.values()
    override(values, {"model.from": "b"})
    assert Recipe.model_validate(values).model.from_digest is None
    with pytest.raises(UserError, match="model.from_digest"):
        digits_recipe("model.from=a", "model.from_digest=abc")
    with pytest.raises(UserError, match="did you mean 'from'"):
        digits_recipe("model.frm=a")
