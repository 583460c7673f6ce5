"""Block `edits` of a report: what was searched, and bounds of the robust accuracy of texts."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from advtrain.data import Dataset, Split
from advtrain.errors import UserError
from advtrain.evaluation.edits import EditResults, texts_of
from advtrain.evaluation.statistics import Share
from advtrain.recipe.edits import EditThreatConfig
from advtrain.recipe.explain import explain_all

#: Settings of the threat model that a report has. The budget of the validation does not affect it.
SETTINGS = ("edits", "at_most", "table", "protect", "where", "alphabet", "operations", "budget")


class EditFigures(BaseModel):
    """Search of edits: its settings, both bounds of the robust accuracy, and the queries."""

    model_config = ConfigDict(frozen=True)
    edits: Literal["words", "chars"]
    """what is edited"""
    at_most: int
    """largest number of edits of a text"""
    table: str | None
    """table of the substitutions of words"""
    table_digest: str | None
    """SHA-256 of the table; null for characters"""
    texts_digest: str
    """SHA-256 of the evaluated texts; for the alphabet `data`, also of the test texts"""
    protect: Literal["stop_words", "none"]
    """words that are not edited"""
    where: Literal["inner", "anywhere"] | None
    """edited positions; null for words"""
    alphabet: str | None
    """characters that are put in; null for words"""
    operations: list[str] | None
    """edits of characters; null for words"""
    budget: int
    """most queries of a text"""
    proven: Share
    """texts of which every candidate was scored, and none is misclassified: a lower bound of the robust accuracy"""
    not_broken: Share
    """texts of which no misclassified candidate was found: an upper bound, equal to `robust`"""
    queries: int
    """texts that were sent to the model; for one sample, candidates of the same token ids count once"""
    queries_median: float
    """median of the queries of a text"""
    queries_max: int
    """most queries of a text"""

    @classmethod
    def of(cls, samples: EditResults, config: EditThreatConfig, dataset: Dataset, split: Split) -> Self:
        """Return the figures of an evaluation of the split."""
        return cls(
            **edit_facts(config, dataset, split),
            proven=Share.of(samples.proven),
            not_broken=Share.of(samples.robust),
            queries=int(samples.queries.sum()),
            queries_median=float(np.median(samples.queries)),
            queries_max=int(samples.queries.max()),
        )

    @property
    def rows(self) -> list[list[str]]:
        """Rows of the table of a report."""
        return [
            ["proven robust accuracy", str(self.proven)],
            [
                "queries",
                f"{self.queries:,}, median {self.queries_median:,.0f} a text, most {self.queries_max:,}",
            ],
        ]

    @property
    def bounds(self) -> str:
        """Both bounds as a sentence."""
        return (
            f"The robust accuracy of these texts lies between {100 * self.proven.value:.2f} % (proven: every candidate "
            f"was scored) and {100 * self.not_broken.value:.2f} % (no misclassified candidate found)."
        )

    @property
    def description(self) -> str:
        """Threat model as a sentence."""
        protect = "no word is protected" if self.protect == "none" else "stop words are protected"
        if self.edits == "words":
            digest = (self.table_digest or "")[:12]
            what = f"up to {self.at_most} words are replaced by words of the table {self.table} (digest {digest})"
        else:
            operations, where = ", ".join(self.operations or ()), self.where or ""
            what = (
                f"up to {self.at_most} edits of characters ({operations}; {where}; alphabet {self.alphabet})"
            )
        return f"{what}; {protect}; at most {self.budget:,} queries a text"

    @property
    def settings(self) -> EditThreatConfig:
        """Settings of the threat model.

        Raises:
            UserError: the report has settings that no evaluation takes.
        """
        values = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
        try:
            return EditThreatConfig.model_validate(values)
        except ValidationError as error:
            raise UserError(explain_all(error.errors(), "report.json: edits", EditThreatConfig)) from error


def edit_facts(config: EditThreatConfig, dataset: Dataset, split: Split) -> dict[str, Any]:
    """Return the settings of a threat model, and the digests of its table and of the texts.

    The digest of the data has token ids only, and texts with other unknown words have the same ids.

    Args:
        config: settings.
        dataset: texts, with the table of edits of words.
        split: evaluated texts.

    Raises:
        UserError: the samples are no texts.
    """
    digest = dataset.synonyms.digest if config.edits == "words" else None
    splits = [split, dataset.test] if config.alphabet == "data" else [split]
    texts = hashlib.sha256(json.dumps([texts_of(each) for each in splits]).encode()).hexdigest()
    settings = {name: getattr(config, name) for name in SETTINGS}
    return settings | {"table_digest": digest, "texts_digest": texts}
