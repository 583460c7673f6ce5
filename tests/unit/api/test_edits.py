"""Edits of texts in Python: the engine and the figures of the command, and clear errors."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

import advtrain
from advtrain.api.texts import TextClassifier
from advtrain.data import load_data
from advtrain.errors import UserError
from advtrain.events import ignore
from pipelines.evaluate import Request, evaluate_model
from pipelines.workspace import Workspace
from tests.kit import Busy, train_here
from tests.text_kit import KINDS, text_recipe

#: A question about a human may become one about a location, and not the reverse.
TABLE = {"who": ["where", "thing"], "made": ["is"], "thing": ["place"], "place": ["things"]}
THREAT = "words:2,table=table.json,protect=none,budget=40"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return a folder with a table, and a run whose model errs on some edited questions."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "table.json").write_text(json.dumps(TABLE))
    (folder / "runs").mkdir()
    recipe = text_recipe(folder, "training.epochs=1")
    train_here(recipe, folder / "runs", load_data(recipe.data, folder))
    return folder


@pytest.fixture(scope="module")
def run(work):
    (found,) = (work / "runs").glob("questions-*")
    return found


@pytest.fixture(scope="module")
def model(run):
    return advtrain.load_model(run)


@pytest.fixture(scope="module")
def samples(work):
    """Return the test texts and their labels."""
    test = load_data(text_recipe(work).data, work).test
    return [str(text) for text in test.texts], torch.from_numpy(test.labels)


@pytest.fixture(scope="module")
def command(work, run):
    """Return what `advtrain evaluate` finds."""
    workspace = Workspace(work / "runs", "sqlite:///none.db", work)
    return evaluate_model(str(run), workspace, Request(THREAT), progress=ignore).found


def test_report_has_the_figures_of_the_command(work, model, samples, command):
    report = advtrain.evaluate(model, *samples, THREAT, data_root=work)
    for name in ("clean", "robust", "edits", "curve", "attacks", "per_class", "threat", "suite"):
        assert getattr(report, name) == getattr(command.report, name), name
    assert 0 < report.edits.proven.count <= report.robust.count < report.clean.count
    others = {check.name: check for check in command.report.checks}
    for check in report.checks:
        if check.name == "transfer":  # only the command knows the training texts
            assert check.evidence == "not run: the training texts are unknown"
        else:
            assert check == others[check.name]


def test_attack_returns_the_edited_texts_of_the_command(work, model, samples, command):
    texts, labels = samples
    found = advtrain.attack(model, texts, labels, THREAT, data_root=work)
    wanted = [
        v["text"] if v["broken_at"] else text for text, v in zip(texts, command.samples.verdicts, strict=True)
    ]
    assert found == wanted
    changed = [i for i, text in enumerate(texts) if found[i] != text]
    assert len(changed) == command.report.clean.count - command.report.robust.count
    assert (model([found[i] for i in changed]).argmax(1) != labels[changed]).all()


def test_saved_samples_of_the_command_have_the_same_texts(work, model, samples, command):
    command.save(work / "report")
    broken = pq.read_table(work / "report" / "samples.parquet").to_pydict()["broken_text"]
    found = advtrain.attack(model, *samples, THREAT, data_root=work)
    assert [a or b for a, b in zip(broken, samples[0], strict=True)] == found


def test_edits_of_characters_need_no_table(model, samples):
    texts, labels = (part[:8] for part in samples)
    report = advtrain.evaluate(model, texts, labels, "chars:1,budget=30", full=False)
    assert (report.threat, report.trust, report.robust.total) == ("chars:1", "unchecked", 8)
    loader = [(texts[:5], labels[:5]), (texts[5:], labels[5:])]
    assert advtrain.evaluate(model, loader, threat="chars:1,budget=30", full=False) == report


def test_settings_of_a_recipe_are_a_threat_model(work, model, samples):
    threat = {"edits": "words", "at_most": 2, "table": "table.json", "protect": "none", "budget": 40}
    recipe = text_recipe(work, f"evaluation={json.dumps({'threat': threat})}")
    how = {"data_root": work, "full": False}
    found = advtrain.evaluate(model, *samples, recipe.evaluation.threat, **how)
    assert found == advtrain.evaluate(model, *samples, THREAT, **how)


class Archive(torch.nn.Module):
    """Network of token ids that hides its embeddings, such as a registered model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, ids):
        return self.inner(ids)


def test_model_without_embeddings_is_searched(work, model, samples):
    hidden = TextClassifier(Archive(model.model), model.text, list(KINDS)).eval()
    assert not hidden.embeds
    found, other = (advtrain.attack(m, *samples, THREAT, data_root=work) for m in (hidden, model))
    assert found == other


TEXTS, LABELS = ["who made thing 1 ?", "where is place 2 ?"], torch.tensor([0, 1])
CHARS = "chars:1,budget=9"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: advtrain.attack(m, m.encode(TEXTS), LABELS, CHARS), "change texts; pass a list of texts as x"),
        (lambda m: advtrain.evaluate(m, m.encode(TEXTS), LABELS, CHARS), "not a tensor of token ids"),
        (lambda m: advtrain.attack(m, "who is it ?", LABELS, CHARS), "x is a single text; pass a list of texts"),
        (lambda m: advtrain.attack(m, [], LABELS[:0], CHARS), "x holds no texts"),
        (lambda m: advtrain.attack(m, ["who", " "], LABELS, CHARS), "x: text 1 has no words"),
        (lambda m: advtrain.attack(Busy().eval(), TEXTS, LABELS, CHARS), "only a text model from advtrain.load_model"),
        (lambda m: advtrain.attack(m, TEXTS, [0, 1], CHARS), "y must be a tensor, one label for each input, not list"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS[:1], CHARS), r"y must have shape \(2,\)"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS.float(), CHARS), "y must hold int64 class labels"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS - 1, CHARS), "y holds the label -1"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS + 1, CHARS), "label"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS, CHARS, suite="quick"), "suite is for attacks on tensors"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS, CHARS, batch_size=9), "batch_size is for attacks on tensors"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS, CHARS, other=(TEXTS, LABELS)), "other is for attacks"),
        (lambda m: advtrain.attack(m, TEXTS, LABELS, CHARS, "pgd"), "name is for attacks on tensors"),
        (lambda m: advtrain.attack(m, TEXTS, LABELS, CHARS, num_steps=3), "num_steps is for attacks on tensors"),
        (lambda m: advtrain.attack(m, TEXTS, LABELS, CHARS, data_root="x"), "data_root is for the table"),
        (lambda m: advtrain.attack(m, TEXTS, LABELS, "l2:1", data_root="x"), "data_root is for the table"),
        (lambda m: advtrain.attack(m, TEXTS, LABELS, "words:1", data_root="x"), "the table counterfitted is not in"),
        (lambda m: advtrain.attack(m, TEXTS, LABELS, "words:0"), "threat: 'at_most'"),
        (lambda m: advtrain.attack(m, TEXTS, LABELS, "words:1,tables=x"), "threat: unknown key 'tables'"),
        (lambda m: advtrain.Adversary("words:2"), r"edits of texts \(words:2\) are a threat model of advtrain.attack"),
        (
            lambda m: advtrain.Objective(clean_ce=1)(m, TEXTS, None, LABELS, "words:2"),
            "a training loop perturbs tensors within a ball",
        ),
    ],
)  # fmt: skip
def test_edits_refuse_what_they_cannot_take(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)
