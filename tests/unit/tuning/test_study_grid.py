"""Studies: their grid, the recipes of its cells, and validation before training starts."""

from __future__ import annotations

import pytest
import yaml

from advtrain.errors import UserError
from advtrain.objective import TERMS
from tests.kit import ROOT
from tuning.study.grid import Study, cells, load_study, merge

STUDIES = sorted((ROOT / "pipelines" / "studies").glob("*.yaml"))

SMALL = {
    "name": "small",
    "base": {"model": {"name": "mlp"}, "optimizer": {"name": "sgd", "lr": 0.1}},
    "datasets": {
        "digits": {
            "data": {"source": "digits"},
            "adversary": {"eps": 0.1, "num_steps": 3},
            "training": {"epochs": 2, "batch_size": 64},
            "evaluation": {"threat": {"eps": 0.1}},
        }
    },
    "architectures": {"mlp": {}},
    "optimizers": {"sgd": {}, "adam": {"optimizer.name": "adam", "optimizer.lr": 1e-3}},
    "methods": {"standard": {"objective": {"clean_ce": 1}}, "madry": {"objective": {"adv_ce": 1}}},
    "seeds": [0, 1],
    "baseline": {"method": "madry"},
}


def write(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def small(tmp_path, **changes):
    study = load_study(write(tmp_path, **changes), quick=False)
    return cells(study, quick=False, allow_code=False)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_every_cell_of_a_shipped_study_is_a_valid_recipe(path, quick):
    study = load_study(path, quick=quick)
    assert study.name == path.stem + ("-quick" if quick else "")
    assert study.description
    grid = cells(study, quick=quick, allow_code=False)
    assert len({cell.name for cell in grid}) == len(grid) >= 2


#: Terms that compare with the weights or outputs of a model that was trained before.
OF_TRANSFER = {"distill_adv", "distill_clean", "feature_match", "l2_sp"}
#: Terms that were published for texts.
OF_TEXTS = {"kl_sym"}


def test_losses_study_uses_every_classification_term():
    study = load_study(ROOT / "pipelines" / "studies" / "losses.yaml", quick=False)
    used = {name for settings in study.methods.values() for name in settings["objective"]}
    assert used >= {name for name, term in TERMS.items() if not term.regression} - OF_TRANSFER - OF_TEXTS
    assert set(study.datasets) == {"digits", "mnist"}
    assert len(study.architectures) == 2


def test_text_methods_study_uses_the_terms_and_attacks_of_texts():
    study = load_study(ROOT / "pipelines" / "studies" / "text_methods.yaml", quick=False)
    assert {name for settings in study.methods.values() for name in settings["objective"]} >= OF_TEXTS
    attacks = {cell.recipe.adversary.name for cell in cells(study, quick=False, allow_code=False)}
    assert attacks >= {"fgsm", "pgd", "free", "freelb", "vat", "noise"}


def test_optimizers_study_sweeps_both_betas_around_defaults():
    study = load_study(ROOT / "pipelines" / "studies" / "optimizers.yaml", quick=False)
    found = {
        (o["optimizer"]["name"], o["optimizer"].get("beta1", 0.9), o["optimizer"].get("beta2", 0.999))
        for o in study.optimizers.values()
    }
    assert {name for name, _, _ in found} == {
        "sgd",
        "momentum",
        "nesterov",
        "adagrad",
        "rmsprop",
        "adam",
        "adamw",
    }
    adams = {(b1, b2) for name, b1, b2 in found if name == "adam"}
    assert adams >= {(b1, b2) for b1 in (0.8, 0.9, 0.95) for b2 in (0.99, 0.999, 0.9999)}


def test_grid_is_product_of_axes_and_seeds(tmp_path):
    grid = small(tmp_path)
    assert len(grid) == 2 * 2 * 2
    assert {(c.optimizer, c.method, c.seed) for c in grid} == {
        (o, m, s) for o in ("sgd", "adam") for m in ("standard", "madry") for s in (0, 1)
    }
    for cell in grid:
        assert cell.recipe.seed == cell.seed
        assert cell.recipe.optimizer.name == cell.optimizer
        assert cell.recipe.objective.adv_ce == (cell.method == "madry")


def test_cell_name_depends_on_settings_that_affect_result(tmp_path):
    before, again = small(tmp_path), small(tmp_path, name="renamed", description="other words")
    assert [c.name for c in before] == [c.name for c in again]
    changed = small(
        tmp_path, base=SMALL["base"] | {"training.epochs": 2, "optimizer": {"name": "sgd", "lr": 0.2}}
    )
    assert all(a.name != b.name for a, b in zip(before, changed, strict=True) if a.optimizer == "sgd")


def test_teacher_cells_come_before_student_cells(tmp_path):
    methods = {"hat": {"objective": {"clean_ce": 1, "hat": 0.5}, "teacher": "standard"}, **SMALL["methods"]}
    grid = small(tmp_path, methods=methods)
    order = [cell.method for cell in grid]
    assert order.index("hat") > max(i for i, m in enumerate(order) if m == "standard")
    assert all(cell.needs == ({"teacher": "standard"} if cell.method == "hat" else {}) for cell in grid)
    student = grid[-1]
    assert [(path, c.method, c.seed) for path, c in student.needed(grid).items()] == [
        ("objective.teacher", "standard", student.seed)
    ]


#: A recipe with other data than the cells.
SOURCE = {
    **SMALL["datasets"]["digits"],
    "data": {"source": "digits", "train_samples": 600},
    "model": {"name": "cnn2"},
    "optimizer": {"name": "adam", "lr": 1e-2},
    "training": {"epochs": 4, "batch_size": 64},
    "objective": {"clean_ce": 1},
}
DISTILLED = {"objective": {"distill_adv": 1}, "teacher": "large"}


def test_source_is_trained_once_before_the_cells_that_name_it(tmp_path):
    methods = SMALL["methods"] | {"distilled": DISTILLED}
    grid = small(tmp_path, sources={"large": SOURCE, "unused": SOURCE}, methods=methods)
    assert [cell.is_source for cell in grid] == [True] + [False] * 12
    source = grid[0]
    assert (source.recipe.model.name, source.recipe.data.train_samples) == ("cnn2", 600)
    students = [cell for cell in grid if cell.method == "distilled"]
    assert all(cell.needed(grid) == {"objective.teacher": source} for cell in students)
    changed = small(tmp_path, sources={"large": SOURCE | {"seed": 1}}, methods=methods)
    assert {c.name for c in changed}.isdisjoint({source.name, *(c.name for c in students)})
    assert {c.name for c in grid if not c.needs} - {source.name} < {c.name for c in changed}


def test_quick_settings_apply_to_sources(tmp_path):
    quick = {"seeds": [0], "base": {"training.epochs": 1}}
    study = load_study(
        write(tmp_path, quick=quick, sources={"large": SOURCE}, methods=SMALL["methods"] | {"d": DISTILLED}),
        quick=True,
    )
    assert {c.recipe.training.epochs for c in cells(study, quick=True, allow_code=False)} == {1}


def test_needed_method_that_is_left_out_or_needs_another_is_rejected(tmp_path):
    methods = SMALL["methods"] | {"hat": {"objective": {"clean_ce": 1, "hat": 1}, "teacher": "standard"}}
    study = load_study(write(tmp_path, quick={"methods": ["hat", "madry"]}, methods=methods), quick=True)
    with pytest.raises(UserError, match="teacher 'standard' of method 'hat' is left out by quick"):
        cells(study, quick=True, allow_code=False)
    again = {"objective": {"clean_ce": 1, "hat": 1}, "teacher": "hat"}
    with pytest.raises(
        UserError, match="teacher 'hat' of method 'again' needs the training of teacher itself"
    ):
        small(tmp_path, methods=methods | {"again": again})


def test_merge_combines_sections_and_sets_paths():
    values = {"optimizer": {"name": "sgd", "lr": 0.1}}
    settings = {"optimizer": {"lr": 0.2}, "optimizer.momentum": 0.9, "training.epochs": 3}
    merge(values, settings)
    assert values == {"optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9}, "training": {"epochs": 3}}
    merge(values, {"optimizer.lr": 9})
    assert settings["optimizer"] == {"lr": 0.2}  # the source of the merge is not modified


def test_quick_study_selects_named_entries(tmp_path):
    quick = {"optimizers": ["adam"], "seeds": [1], "base": {"training.epochs": 1}}
    study = load_study(write(tmp_path, quick=quick), quick=True)
    grid = cells(study, quick=True, allow_code=False)
    assert {(c.optimizer, c.seed, c.recipe.training.epochs) for c in grid} == {("adam", 1, 1)}


def test_dataset_may_override_seeds(tmp_path):
    large = SMALL["datasets"]["digits"] | {"seeds": [7]}
    grid = small(tmp_path, datasets={**SMALL["datasets"], "large": large})
    assert {c.seed for c in grid if c.dataset == "large"} == {7}
    assert {c.seed for c in grid if c.dataset == "digits"} == {0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basline": {}}, "unknown key 'basline'; did you mean 'baseline'"),
        ({"baseline": {"method": "madri"}}, "did you mean 'madry'"),
        ({"baseline": {"method": "madry", "optimizer": "sgd"}}, "one axis"),
        ({"seeds": []}, "seeds"),
        ({"quick": {"methods": ["none"]}}, "quick.methods 'none'"),
        ({"methods": {"madry": {"objective": {"adv_ce": 1}, "teacher": "standart"}}}, "teacher 'standart'"),
        (
            {"base": {"start": "mnits"}, "sources": {"mnist": SMALL["base"]}},
            "base.start 'mnits'.*mean 'mnist'",
        ),
        ({"sources": {"madry": SMALL["base"]}}, "'madry' is both a source and a method"),
        (
            {"sources": {"a": {"start": "b"}, "b": {}}},
            "sources.a.start: a source cannot need another training",
        ),
    ],
)
def test_load_study_rejects_invalid_study(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_study(write(tmp_path, **changes), quick=False)


def test_load_study_names_all_missing_keys_at_once(tmp_path):
    (tmp_path / "s.yaml").write_text("name: s")
    with pytest.raises(UserError, match=r"^\S+s\.yaml: '\w+', '\w+', .* are missing; they must be given$"):
        load_study(tmp_path / "s.yaml", quick=False)


def test_invalid_cell_recipe_is_named_in_error(tmp_path):
    bad = SMALL["methods"] | {"typo": {"objective": {"adv_c": 1}}}
    with pytest.raises(UserError, match=r"cell digits/mlp/\w+/typo: unknown key 'objective.adv_c'"):
        small(tmp_path, methods=bad)


def test_load_study_distinguishes_missing_file_from_invalid_yaml(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_study(tmp_path / "none.yaml", quick=False)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_study(tmp_path / "bad.yaml", quick=False)


def test_every_study_field_has_description():
    assert all(field.description for field in Study.model_fields.values())
