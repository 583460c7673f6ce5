"""Evaluation of a text model under edits: the search of each text as work items.

The texts of an item are searched together (`advtrain/edits/search.py`). Items do not depend on the number of workers,
so neither does the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advtrain.attacks import attack_mode, predictions
from advtrain.data import Dataset, Split, stratified_rows
from advtrain.data.text_stream import StreamTextSplit
from advtrain.data.texts import TextSpec, TextSplit
from advtrain.edits import CharEdits, EditShares, EditThreat, TokenScore, Verdict, WordEdits, search_texts
from advtrain.edits.stop_words import STOP_WORDS
from advtrain.errors import UserError
from advtrain.evaluation.worst_case import (
    AttackRecord,
    Progress,
    Rows,
    Runner,
    SampleResults,
    WorkItem,
    WorkResult,
)
from advtrain.models.outputs import check_outputs, reject_probabilities
from advtrain.models.serialized import ModelSource
from advtrain.recipe.edits import EditThreatConfig
from advtrain.recipe.sections import AdversaryConfig
from advtrain.seeding import mix_seed, seeded

#: Texts of a work item.
ITEM_TEXTS = 32
#: Most training texts of the check `transfer`.
NUM_TRAINING = 2000
#: Texts and their labels (N,).
Training = tuple[Sequence[str], NDArray[np.int64]]


def attack_name(budget: int) -> str:
    """Return the name of the search in a report: `edits-` and the budget of a text."""
    return f"edits-{budget}"


def build_threat(config: EditThreatConfig | AdversaryConfig, dataset: Dataset) -> EditThreat:
    """Return the threat model of the settings of an evaluation, or of a training attack.

    Args:
        config: settings.
        dataset: texts. Edits of words need its table `synonyms`, and the alphabet `data` its test texts. Those of a
            training attack need `training_synonyms` and the training texts.

    Raises:
        UserError: the samples are no texts, or the table is not the one of the settings.
    """
    trains = isinstance(config, AdversaryConfig)
    split = dataset.train if trains else dataset.test
    texts_of(split)
    at_most = int(config.at_most or 0)
    protect = STOP_WORDS if config.protect == "stop_words" else frozenset()
    if config.edits == "words":
        table = dataset.training_synonyms if trains else dataset.synonyms
        if table is None or table.name != config.table:
            section = "adversary" if trains else "evaluation.threat"
            raise UserError(f"the table '{config.table}' of {section} is not loaded with the data")
        return WordEdits(table, at_most, protect)
    alphabet = str(config.alphabet)
    if alphabet == "data":
        alphabet = "".join(sorted(set("".join(texts_of(split)))))
    return CharEdits(at_most, config.where or "inner", alphabet, tuple(config.operations or ()), protect)


def texts_of(split: Split) -> list[str]:
    """Return the texts of a split.

    Raises:
        UserError: the samples are no texts.
    """
    if not isinstance(split, TextSplit | StreamTextSplit):
        raise UserError(
            "edits are for texts, but the samples of the data are none; write --threat as linf:8/255"
        )
    return [str(text) for text in split.texts]


def training_texts(dataset: Dataset, seed: int) -> Training | None:
    """Return up to NUM_TRAINING training texts, stratified by label, and their labels.

    None: the data has no training split, so its splits are the evaluated samples.
    """
    train = dataset.train
    if train is dataset.test or not isinstance(train, TextSplit | StreamTextSplit):
        return None
    train = train.take(stratified_rows(train, NUM_TRAINING, mix_seed("transfer", seed)))
    return texts_of(train), train.labels.astype(np.int64)


@dataclass
class EditEvaluator:
    """Model and texts of an evaluation under edits; runs work items.

    Attributes:
        model: maps ids (n, L) int64 to logits (n, K).
        texts, labels: N samples.
        threat: threat model.
        spec: tokenizer of the model.
        budget: most queries of a text.
        seed: seed of the searches.
        device: device of the model.
        num_classes: K.
        probes: functions of (evaluator, item), by the first word of the item's probe.
        training: training texts for the check `transfer`; None: unknown.
    """

    model: nn.Module
    texts: Sequence[str]
    labels: NDArray[np.int64]
    threat: EditThreat
    spec: TextSpec
    budget: int
    seed: int
    device: torch.device
    num_classes: int
    probes: dict[str, Callable[[EditEvaluator, WorkItem], WorkResult]] = field(default_factory=dict)
    training: Training | None = None
    #: Counts of the single edits of texts, which several checks read, by the bytes of their rows.
    shares: dict[bytes, EditShares] = field(default_factory=dict)

    @cached_property
    def score(self) -> TokenScore:
        """Logits of texts."""
        return TokenScore(self._logits, self.spec, self.device)

    def _logits(self, ids: Tensor) -> Tensor:
        with attack_mode(self.model), torch.no_grad():
            logits: Tensor = self.model(ids)
        return logits

    def logits(self, texts: Sequence[str]) -> Tensor:
        """Return the logits (n, K) float32 of texts, and check them.

        Raises:
            UserError: the outputs are not logits of the data's classes.
        """
        outputs = self.score.logits(self.score.keys(texts))
        logits = check_outputs(outputs, len(texts), num_labels=0, num_classes=self.num_classes)
        reject_probabilities(logits)
        return logits.float()

    def verdicts(self, rows: Rows, **changed: Any) -> list[Verdict]:
        """Search the texts of the rows; `changed` are other arguments of `search_texts`.

        The seed of a row does not depend on the work item.
        """
        seeds = [mix_seed("edits", self.seed, row) for row in rows.tolist()]
        wanted = {"score": self.score, "threat": self.threat, "budget": self.budget, "seeds": seeds}
        texts, labels = [self.texts[row] for row in rows], self.labels[rows].tolist()
        return search_texts(texts=texts, labels=labels, **(wanted | changed))

    def do(self, item: WorkItem) -> WorkResult:
        """Run one item; a stochastic model draws from a generator that is seeded for the item."""
        with seeded(self.device, mix_seed("edits", self.seed, *item.probe.encode())):
            kind = item.probe.split(" ")[0]
            return self._search(item) if kind == "edits" else self.probes[kind](self, item)

    def run(self, items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
        """Run items one after another, as a `Runner`."""
        for item in items:
            yield item, self.do(item)

    def _search(self, item: WorkItem) -> WorkResult:
        """Search the texts of an item; return the predictions that agree with the verdicts, and the verdicts."""
        logits = self.logits([self.texts[row] for row in item.rows])
        labels, found = self.labels[item.rows].tolist(), self.verdicts(item.rows)
        wrong = [verdict.broken_at == 0 for verdict in found]
        clean = _agreeing(predictions(logits).tolist(), labels, wrong)
        rows = [row for row, verdict in enumerate(found) if verdict.broken_at]
        adversarial = list(clean)
        if rows:
            texts = [str(found[row].text) for row in rows]
            fooled = predictions(self.logits(texts)).tolist()
            fooled = _agreeing(fooled, [labels[row] for row in rows], [True] * len(rows))
            for row, predicted in zip(rows, fooled, strict=True):
                adversarial[row] = predicted
        return {
            "predictions": clean,
            "confidences": logits.softmax(1).amax(1).nan_to_num(nan=1.0).tolist(),
            "verdicts": [asdict(verdict) for verdict in found],
            "adversarial": adversarial,
        }


def _agreeing(predicted: list[int], labels: list[int], wrong: list[bool]) -> list[int]:
    """Return the predictions (n,) of a pass, changed where they contradict the verdicts of the search.

    A tie is a misclassification, and another batch may round the logits differently. The prediction is the label of a
    text that is not `wrong`, and -1 (no class) for a wrong text whose largest logit is that of the label.
    """
    agreed = []
    for each, label, is_wrong in zip(predicted, labels, wrong, strict=True):
        if is_wrong:
            agreed.append(-1 if each == label else each)
        else:
            agreed.append(label)
    return agreed


@dataclass(frozen=True)
class EditFactory:
    """Factory that a worker process calls to load the model and build its evaluator."""

    model: nn.Module | ModelSource
    texts: Sequence[str]
    labels: NDArray[np.int64]
    threat: EditThreat
    spec: TextSpec
    budget: int
    seed: int
    num_classes: int
    probes: dict[str, Callable[[EditEvaluator, WorkItem], WorkResult]]
    training: Training | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module | ModelSource,
        split: Split,
        dataset: Dataset,
        config: EditThreatConfig,
        seed: int,
        probes: dict[str, Callable[[EditEvaluator, WorkItem], WorkResult]],
    ) -> EditFactory:
        """Return the factory for the texts of a split; `dataset` has the tokenizer and the table.

        Probes get some of its training texts.
        """
        threat, texts = build_threat(config, dataset), texts_of(split)
        assert dataset.text is not None
        labels = split.labels.astype(np.int64)
        how = (threat, dataset.text, config.budget, seed, dataset.num_classes)
        return cls(model, texts, labels, *how, probes, training_texts(dataset, seed) if probes else None)

    def share_memory_of(self, equal: EditFactory) -> None:
        """Do nothing: texts are small."""

    def __call__(self, device: torch.device) -> EditEvaluator:
        """Load the model on `device` and return its evaluator."""
        model = self.model.load() if isinstance(self.model, ModelSource) else self.model
        how = (self.texts, self.labels, self.threat, self.spec, self.budget, self.seed)
        rest = (device, self.num_classes, self.probes, self.training)
        return EditEvaluator(model.to(device), *how, *rest)


@dataclass
class EditResults(SampleResults):
    """Per-text results, in the order of the split."""

    texts: Sequence[str] = ()
    verdicts: list[dict[str, Any]] = field(default_factory=list)  # of `Verdict`, see advtrain/edits/search.py

    @property
    def proven(self) -> NDArray[np.bool_]:
        """Flags (N,) of the texts of which every candidate was scored and none is misclassified."""
        found = np.array([verdict["proven"] >= verdict["at_most"] for verdict in self.verdicts], bool)
        return found & self.robust

    @property
    def queries(self) -> NDArray[np.int64]:
        """Number of texts that were sent to the model for each text, (N,)."""
        return np.array([verdict["queries"] for verdict in self.verdicts], np.int64)

    def robust_within(self, edits: int) -> NDArray[np.bool_]:
        """Return flags (N,) of the texts that no found candidate of at most `edits` edits breaks."""
        broken = [verdict["broken_at"] for verdict in self.verdicts]
        return np.array([at is None or at > edits for at in broken], bool)

    def columns(self) -> dict[str, Any]:
        """Return the columns of samples.parquet."""
        broken = [verdict["broken_at"] for verdict in self.verdicts]
        return super().columns() | {
            "text": list(self.texts),
            "proven_edits": [verdict["proven"] for verdict in self.verdicts],
            "broken_edits": broken,
            "broken_text": [v["text"] if v["broken_at"] else None for v in self.verdicts],
            "changes": [list(v["changes"]) if v["broken_at"] else None for v in self.verdicts],
            "queries": self.queries,
        }


def evaluate_texts(
    run: Runner, split: Split, config: EditThreatConfig, progress: Progress | None = None
) -> EditResults:
    """Search every text for a misclassified candidate."""
    labels, texts = split.labels.astype(np.int64), texts_of(split)
    clean, adversarial = np.empty_like(labels), np.empty_like(labels)
    confidences, verdicts = np.zeros(len(labels)), [dict[str, Any]()] * len(labels)
    items = edit_items(len(labels))
    for done, (item, result) in enumerate(run(items), start=1):
        clean[item.rows], confidences[item.rows] = result["predictions"], result["confidences"]
        adversarial[item.rows] = result["adversarial"]
        for row, verdict in zip(item.rows.tolist(), result["verdicts"], strict=True):
            verdicts[row] = verdict
        if progress is not None:
            progress(attack_name(config.budget), done, len(items), None)
    codes = {None: -1, 0: -2}
    broken_by = np.array([codes.get(verdict["broken_at"], 0) for verdict in verdicts], np.int64)
    results = EditResults(labels, clean, adversarial, broken_by, clean_confidences=confidences)
    results.texts, results.verdicts = texts, verdicts
    before, after = int(results.clean.sum()), int(results.robust.sum())
    results.attacks.append(AttackRecord(attack_name(config.budget), before, before - after, after))
    return results


def edit_items(number: int) -> list[WorkItem]:
    """Return the work items of the searches of `number` texts."""
    blocks = np.split(np.arange(number), range(ITEM_TEXTS, number, ITEM_TEXTS))
    return [WorkItem(rows, block=k, probe=f"edits {k}") for k, rows in enumerate(blocks)]
