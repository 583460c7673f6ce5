"""Training under edits of texts: the greedy search by hand, its limits, exact resumes and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advtrain.data import AugmentConfig, Batch, Dataset, Place, load_data
from advtrain.edits import STOP_WORDS, CharEdits, Encoder, Table, TextScore, WordEdits, greedy_texts
from advtrain.errors import UserError
from advtrain.recipe import Recipe, parse_recipe
from advtrain.recipe.paths import override
from advtrain.training import Session, build_components
from advtrain.training.edits import EditAttack
from advtrain.training.step import Components, Progress, perturb
from tests.linear_text_kit import WORDS, text_recipe, write_texts
from tests.unit.training.test_loop import check_resume

#: Some of the words are stop words, and some are not in the vocabulary of 12 words. Some entries have two words.
TABLE = {word: [WORDS[i - 3], f"{WORDS[i - 5]} sea"] for i, word in enumerate(WORDS[:-1])} | {"sea": ["n3"]}
EDITS = {"name": "edits", "edits": "words", "at_most": 2, "table": "small", "norm": "linf", "eps": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def recipe_of(folder: Path, adversary: dict | None = None, **changes) -> Recipe:
    return text_recipe(folder, EDITS | (adversary or {}), **changes)


def data_of(recipe: Recipe) -> Dataset:
    data = load_data(recipe.data, Path())
    return replace(data, training_synonyms=Table.build("small", TABLE)) if recipe.adversary.table else data


def built(recipe: Recipe) -> tuple[Components, Dataset]:
    data = data_of(recipe)
    components = build_components(recipe, data, Session())
    components.train_mode()
    return components, data


def batches(data: Dataset, count: int, place: Place = Place()) -> list[Batch]:  # noqa: B008 (frozen)
    found = data.train.train_batches(6, 0, 0, AugmentConfig(), place)
    return [batch for _, batch in zip(range(count), found, strict=False)]


def padded(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def ids_of(data: Dataset, texts: list[str]) -> list[list[int]]:
    return [list(memoryview(ids).cast("I")) for ids in Encoder(data.text).ids(texts)]


def lowest_by_hand(components: Components, data: Dataset, text: str, label: int, protect: bool) -> list[int]:
    """Return the ids of the best of: the text, its single edits, and the best single edit with another edit."""
    network = components.model.network
    table, weight, bias = (
        each.detach().double() for each in (network.table.weight, network.head.weight, network.head.bias)
    )

    def scored(words: list[str]) -> tuple[float, list[int]]:
        (ids,) = ids_of(data, [" ".join(words)])
        logits = weight @ table[ids].sum(0) + bias
        others = [z for k, z in enumerate(logits.tolist()) if k != label]
        return round(float(logits[label]) - max(others), 9), ids

    def edited(words: list[str]) -> list[list[str]]:
        own = text.split()
        return [
            [*words[:i], new, *words[i + 1 :]]
            for i, word in enumerate(own)
            if words[i] == word and not (protect and word in STOP_WORDS)
            for new in TABLE.get(word, [])
        ]

    own = text.split()
    singles = sorted(((*scored(words), words) for words in edited(own)), key=lambda each: each[0])
    found = [scored(own), *(single[:2] for single in singles)]
    if singles:
        found += [scored(words) for words in edited(singles[0][2])]
    return min(found, key=lambda each: each[0])[1]


@pytest.mark.parametrize("protect", ["stop_words", "none"])
def test_greedy_edits_of_a_linear_model_equal_those_by_hand(folder, protect):
    components, data = built(recipe_of(folder, {"protect": protect, "budget": 1000}))
    changed, longer = 0, 0
    for step, batch in enumerate(batches(data, 4)):
        wanted = [
            lowest_by_hand(components, data, text, label, protect == "stop_words")
            for text, label in zip(batch.texts, batch.y.tolist(), strict=True)
        ]
        found = perturb(components, batch, Progress(step, 0.0))
        # The same words in another order have the same margin, up to rounding.
        assert [sorted(filter(None, row)) for row in found.tolist()] == [sorted(row) for row in wanted]
        pairs = list(zip(wanted, ids_of(data, list(batch.texts)), strict=True))
        changed += sum(a != b for a, b in pairs)
        longer += sum(len(a) > len(b) for a, b in pairs)
        components.train_step(components, batch, Progress(step, 0.0))
    assert changed > 12
    assert longer  # the entry of two words


@pytest.mark.parametrize("objective", [{"adv_ce": 1}, {"clean_ce": 1, "adv_ce": 2}, {"trades_kl": 3}])
def test_gradient_is_that_of_the_loss_on_edited_texts(folder, objective):
    components, data = built(recipe_of(folder, objective=objective))
    (batch,) = batches(data, 1)
    x_adv = perturb(components, batch, Progress(0, 0.0))
    network = components.model.network
    clean, adv = network(batch.x), network(x_adv)
    loss = objective.get("clean_ce", 0) * F.cross_entropy(clean, batch.y)
    loss = loss + objective.get("adv_ce", 0) * F.cross_entropy(adv, batch.y)
    kl = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="batchmean")
    loss = loss + objective.get("trades_kl", 0) * kl
    wanted = torch.autograd.grad(loss, list(network.parameters()))
    components.train_step(components, batch, Progress(0, 0.0))
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
        assert gradient.abs().max() > 0


CNN = {"model": {"name": "text_cnn", "args": {"dim": 8, "channels": 6}}}


@pytest.mark.parametrize("adversary", [{"at_most": 0}, {"fraction": 0}, {"eps_delay_epochs": 1}])
def test_training_without_edits_is_plain_cross_entropy_bit_for_bit(folder, adversary):
    found = []
    for attack, objective in (
        (EDITS | adversary, {"adv_ce": 1}),
        ({"name": "pgd", "eps": 0}, {"clean_ce": 1}),
    ):
        components, data = built(text_recipe(folder, attack, objective=objective, **CNN))
        for step, batch in enumerate(batches(data, 3)):
            components.train_step(components, batch, Progress(step, 0.0))
        found.append(components.model.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def differences(data: Dataset, batch: Batch, x_adv: Tensor) -> list[int]:
    """Return the number of different tokens of each text; edits must not change its length."""
    x = F.pad(batch.x, (0, max(0, x_adv.shape[1] - batch.x.shape[1])))
    x_adv = F.pad(x_adv, (0, x.shape[1] - x_adv.shape[1]))
    return (x != x_adv).sum(1).tolist()


CHARS = {"name": "edits", "edits": "chars", "at_most": 2, "protect": "none", "norm": "linf", "eps": 0}
BYTES = {"source": "text", "path": "", "tokenizer": "bytes"}


def test_edits_of_characters_change_bytes_within_the_radius(folder):
    data = BYTES | {"path": str(folder / "texts.jsonl")}
    chars = CHARS | {"operations": ["substitute"], "alphabet": "data", "where": "anywhere"}
    components, data = built(text_recipe(folder, chars, data=data))
    (batch,) = batches(data, 1)
    counts = differences(data, batch, perturb(components, batch, Progress(0, 0.0)))
    assert set(counts) <= {1, 2}


def test_radius_rises_in_whole_edits_during_a_warm_up(folder, monkeypatch):
    warm_up = {"at_most": 3, "eps_delay_epochs": 0.5, "eps_warmup_epochs": 1}
    components, data = built(recipe_of(folder, warm_up))
    (batch,) = batches(data, 1)
    radii: list[int] = []
    monkeypatch.setattr(
        EditAttack, "__call__", lambda _, model, batch, rows, at_most, seeds: radii.append(at_most)
    )
    for epoch in (0.0, 0.4, 0.5, 0.8):
        assert perturb(components, batch, Progress(0, epoch)) is None
    assert radii == []
    for epoch in (0.84, 1.16, 1.17, 1.49, 1.5, 1.9):
        perturb(components, batch, Progress(0, epoch))
    assert radii == [1, 1, 2, 2, 3, 3]


def test_random_edits_need_no_model_and_follow_the_step(folder, monkeypatch):
    components, data = built(recipe_of(folder, {"search": "random"}))
    (batch,) = batches(data, 1)
    monkeypatch.setattr(components.model.network, "classify", None)
    found = [perturb(components, batch, Progress(step, 0.0)) for step in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])


@pytest.mark.parametrize("search", ["greedy", "random"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("fraction", [0.5, 1])
def test_workers_edit_the_texts_of_the_global_batch_as_one_worker(folder, search, world, fraction):
    budget = {"budget": 9} if search == "greedy" else {}
    components, data = built(recipe_of(folder, {"search": search, "fraction": fraction} | budget))
    for step in range(3):
        whole = batches(data, 3)[step]
        wanted = perturb(components, whole, Progress(step, 0.0))
        rows: list[list[int]] = []
        for rank in range(world):
            own = replace(components, session=Session(rank, world))
            part = perturb(own, batches(data, 3, Place(rank, world))[step], Progress(step, 0.0))
            rows += [[token for token in row if token] for row in part.tolist()]
        assert torch.equal(padded(rows), wanted)
        same = sum(n == 0 for n in differences(data, whole, wanted))
        assert same >= (1 - fraction) * len(rows)


@pytest.mark.parametrize("threat", [WordEdits(Table.build("small", TABLE), 2), CharEdits(3)])
@pytest.mark.parametrize("budget", [1, 2, 5, 30])
def test_greedy_search_stays_within_its_budget_and_returns_its_lowest_text(threat, budget):
    texts = ["place thing day sea found", "made found ?", "who is the"]
    sent: list[str] = []

    def logits(given: list[str]) -> Tensor:
        sent.extend(given)
        return torch.tensor([[1 - (each not in texts) * float(crc32(each.encode())), 0] for each in given])

    found = [greedy_texts(TextScore(logits), [text], [0], threat, budget, [7])[0] for text in texts]
    used: list[list[str]] = []
    for text, best in zip(texts, found, strict=True):
        sent.clear()
        assert greedy_texts(TextScore(logits), [text], [0], threat, budget, [7]) == [best]
        used.append(list(sent))
        assert len(sent) == len(set(sent)) <= budget
        assert sent[0] == text
        margins = [float(logits([each])[0, 0]) for each in list(sent)]
        assert best == used[-1][margins.index(min(margins))]
    assert greedy_texts(TextScore(logits), texts, [0] * 3, threat, budget, [7] * 3) == found
    assert (found == texts) is (budget == 1)


class NormedBag:
    """Factory of a bag of words with batch norm and dropout."""

    def __new__(cls, shape, num_classes):
        from torch import nn

        from tests.linear_text_kit import DropoutBag

        model = DropoutBag(shape, num_classes)
        model.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, num_classes))
        return model


def test_search_leaves_the_model_and_global_generators_unchanged(folder):
    components, data = built(recipe_of(folder, model={"name": f"{__name__}:NormedBag"}))
    first, second = batches(data, 2)
    components.train_step(components, first, Progress(0, 0.0))
    model, masks = components.model, components.model.network.masks
    masks.clear()
    model.network.head[0].eval()  # a frozen layer
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random = torch.get_rng_state()
    x_adv = perturb(components, second, Progress(1, 0.0))
    assert x_adv is not None
    assert not torch.equal(x_adv, second.x)
    assert masks == []  # no pass in training mode
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(
        p.requires_grad and torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"epochs": 2, "batch_size": 6, "accumulate": 2}},
        {"optimizer": {"name": "sgd", "lr": 0.1, "awp_gamma": 0.01, "ema_decay": 0.9}},
        {"optimizer": {"name": "sgd", "lr": 0.1, "sam_rho": 0.05, "swa_start_epoch": 0}},
    ],
    ids=["accumulate", "awp", "sam and swa"],
)
def test_resumed_run_equals_an_uninterrupted_run(folder, changes):
    settings = {"budget": 7, "fraction": 0.7, "eps_warmup_epochs": 0.3}
    given = {"source": "text", "path": str(folder / "texts.jsonl"), "vocabulary": 12, "group_by_length": True}
    net = {"model": {"name": "tests.linear_text_kit:DropoutBag"}}
    recipe = recipe_of(folder, settings, objective={"clean_ce": 1, "adv_ce": 1}, data=given, **net, **changes)
    check_resume(folder, recipe, data_of(recipe))


@pytest.mark.parametrize(
    ("adversary", "changes", "message"),
    [
        ({"edits": None}, {}, "the attack edits needs edits: words or edits: chars"),
        ({"at_most": None}, {}, "the attack edits needs at_most"),
        ({"at_most": -1}, {}, "greater than or equal to 0"),
        ({"eps": 0.1}, {}, "it has no eps; the radius is at_most"),
        ({"norm": "l2"}, {}, "it has no norm"),
        ({"per": "token"}, {}, "it has no per"),
        ({"eps_low": 0}, {}, "it has no eps_low"),
        ({"num_steps": 3}, {}, "it has no num_steps; the search is limited by budget"),
        ({"start": "uniform"}, {}, "it has no start"),
        ({"step_size": 1}, {}, "it has no step_size"),
        ({"loss": "kl"}, {}, "it has no loss; the search minimizes the margin"),
        ({"batch_norm": "train"}, {}, "it has no batch_norm"),
        ({"friendly": 1}, {}, "it has no friendly"),
        ({"where": "inner"}, {}, "where belongs to edits: chars"),
        ({"edits": "chars"}, {}, "table belongs to edits: words"),
        ({"search": "random", "budget": 5}, {}, "search: random sends no queries"),
        ({"name": "pgd"}, {}, "edits belongs to the attack edits, not to pgd; set name: edits"),
        ({}, {"objective": {"adv_ce": 1, "llr_gap": 1}}, "objective.llr_gap moves inputs within a ball"),
        ({}, {"objective": {"adv_ce": 1, "grad_align": 1}}, "objective.grad_align moves inputs"),
        ({}, {"objective": {"adv_mae": 1}}, "a regression has none"),
        ({}, {"data": {"source": "text", "path": "x", "stream": True}}, "which a stream does not keep"),
        ({}, {"data": {"source": "digits"}}, "edits is for texts; data.source digits has none"),
        (
            {},
            {"training": {"epochs": 2, "batch_size": 6, "num_workers": 2, "sharding": "fsdp"}},
            "cannot be combined with adversary.name edits",
        ),
        (
            {},
            {
                "training": {
                    "epochs": 2,
                    "batch_size": 6,
                    "changes": [{"epoch": 1, "settings": {"adversary.table": "other.json"}}],
                }
            },
            "adversary.table cannot change within a run",
        ),
        (
            {},
            {"evaluation": {"threat": {"eps": 1}, "attack": {"name": "edits"}}},
            "edits is for training only; to evaluate under edits of texts, set evaluation.threat",
        ),
    ],
)
def test_recipe_rejects_what_does_not_suit_edits(folder, adversary, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(folder, adversary, **changes)


def test_python_interface_refuses_edits():
    import advtrain

    with pytest.raises(UserError, match="edits is for training only"):
        advtrain.Adversary("l2:1", "edits")


def test_table_must_be_loaded_with_the_data(folder):
    recipe = recipe_of(folder)
    with pytest.raises(UserError, match="the table 'small' of adversary is not loaded"):
        build_components(recipe, load_data(recipe.data, Path()), Session())


def test_defaults_are_written_into_the_recipe_and_read_back(folder):
    recipe = text_recipe(folder, {"norm": "linf", "eps": 0, "name": "edits", "edits": "chars", "at_most": 1})
    values = {path: value for path, value, _ in recipe.leaves() if path.startswith("adversary.")}
    assert values["adversary.where"] == "inner"
    assert values["adversary.search"] == "greedy"
    assert values["adversary.budget"] == 50
    assert values["adversary.protect"] == "stop_words"
    assert values["adversary.table"] is None
    again = parse_recipe(recipe.values(), "again", allow_code=True)
    assert again == recipe
    assert again.digest() == recipe.digest()
    short = {k: v for k, v in recipe.values()["adversary"].items() if k in ("name", "edits", "at_most")}
    assert parse_recipe(recipe.values() | {"adversary": short}, "short", allow_code=True) == recipe


def test_change_of_the_attack_drops_the_settings_of_edits(folder):
    values = recipe_of(folder, {"fraction": 0.5}).values()
    override(values, {"adversary.eps": 0.3, "adversary.name": "pgd"})
    found = parse_recipe(values, "changed", allow_code=True).adversary
    assert (found.name, found.eps, found.fraction, found.num_steps) == ("pgd", 0.3, 0.5, 10)


def test_digest_of_the_table_replaces_its_path_in_that_of_the_recipe(folder):
    digests = {
        recipe_of(folder, {"table": table, "table_digest": digest}).digest()
        for table, digest in (("a.json", "0" * 64), ("b.json", "0" * 64), ("a.json", "1" * 64))
    }
    assert len(digests) == 2


def test_new_run_keeps_the_digest_of_its_table_and_refuses_another(folder, monkeypatch):
    from advtrain.training.start import pinned_as, prepare_start
    from pipelines.workspace import Workspace, load_dataset

    (folder / "mine.json").write_text(json.dumps(TABLE))
    workspace = Workspace(folder / "runs", "", folder)
    recipe = recipe_of(folder, {"table": "mine.json"})
    data = load_dataset(recipe, workspace)
    stored = prepare_start(recipe, data, lambda _: pytest.fail("no weights")).recipe
    assert stored.adversary.table_digest == Table.build("any", TABLE).digest
    assert pinned_as(recipe, stored) == stored
    plain = text_recipe(folder, {"name": "pgd"})
    assert prepare_start(plain, data, lambda _: pytest.fail("no weights")).recipe == plain
    assert load_dataset(stored, workspace).training_synonyms == data.training_synonyms
    (folder / "mine.json").write_text(json.dumps(TABLE | {"sea": ["day"]}))
    with pytest.raises(UserError, match=r"adversary\.table 'mine\.json' has other substitutions"):
        load_dataset(stored, workspace)
    assert load_dataset(stored, workspace, with_table=False).training_synonyms is None


def test_study_loads_the_table_of_its_cells_and_takes_only_one(folder):
    from pipelines.compare import _with_table

    plain, small, other = (
        text_recipe(folder, {"name": "pgd"}),
        recipe_of(folder),
        recipe_of(folder, {"table": "other.json"}),
    )
    assert _with_table("texts", [plain, small, small]) is small
    assert _with_table("texts", [plain]) is plain
    with pytest.raises(UserError, match=r"its cells differ in adversary\.table \(small, other\.json\)"):
        _with_table("texts", [plain, small, other])
