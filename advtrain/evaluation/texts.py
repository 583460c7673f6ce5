"""Evaluated texts in a report: facts of their tokenizer, and misclassified and broken texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from advtrain.data import Split
from advtrain.data.texts import TextSpec, TextSplit, encode_texts
from advtrain.evaluation.html import Html, fill, joined
from advtrain.evaluation.worst_case import SampleResults
from advtrain.text import one_line

#: Number of texts of each kind that a page shows, and that a model card shows.
PAGE_TEXTS, CARD_TEXTS = 12, 5
#: Largest number of characters of a text on a page, and in a card.
PAGE_LENGTH, CARD_LENGTH = 400, 120
#: Tokens of the tokenizers that are trained on the data, by the type in tokenizer.json.
_TOKENS = {"WordLevel": "words", "BPE": "bytes"}


class TextFacts(BaseModel):
    """Tokenizer of the model, and what it leaves out of the evaluated texts."""

    model_config = ConfigDict(frozen=True)
    tokenizer: str
    """tokens: words, bytes, or the type of the tokenizer of a pre-trained model"""
    vocabulary: int
    """number of token ids"""
    max_length: int
    """most tokens of a text; the rest of a longer text is cut off"""
    cut: float
    """share of the evaluated texts that are cut, in [0, 1]"""
    unknown: float
    """share of the tokens of the evaluated texts that are not in the vocabulary, in [0, 1]"""

    def rows(self) -> dict[str, str]:
        """Return the facts by name, for readers."""
        return {
            "tokenizer": f"{self.tokenizer}, {self.vocabulary:,} token ids",
            "longest text": f"{self.max_length:,} tokens; {self.cut:.1%} of the evaluated texts are cut",
            "unknown words": f"{self.unknown:.1%} of the evaluated texts' tokens",
        }


def text_facts(spec: TextSpec | None, split: Split) -> TextFacts | None:
    """Return the facts of the evaluated texts; None for other samples."""
    if spec is None or not isinstance(split, TextSplit):
        return None
    _, cut, unknown = encode_texts(spec, split.texts.tolist(), "the evaluated texts")
    kind = str(json.loads(spec.tokenizer)["model"]["type"])
    return TextFacts(
        tokenizer=_TOKENS.get(kind, kind),
        vocabulary=spec.vocabulary,
        max_length=spec.max_length,
        cut=float(cut.mean()),
        unknown=unknown,
    )


def text_failures(samples: SampleResults, split: Split) -> list[dict[str, Any]]:
    """Return misclassified texts, then broken ones.

    The most confident errors and the least confident broken texts come first. Each has row, text, label, predicted_as,
    confidence of the clean prediction, and broken_by, the name of the attack; None: it is misclassified without attack.
    Samples that are no texts have none.
    """
    if not isinstance(split, TextSplit):
        return []
    confidence = samples.clean_confidences
    assert confidence is not None
    wrong, broken = np.flatnonzero(~samples.clean), np.flatnonzero(samples.clean & ~samples.robust)
    names = [attack.name for attack in samples.attacks]

    def chosen(rows: NDArray[np.int64], order: NDArray[np.float64]) -> list[dict[str, Any]]:
        return [
            {
                "row": int(row),
                "text": str(split.texts[row]),
                "label": int(samples.labels[row]),
                "predicted_as": int(samples.adv_predictions[row]),
                "confidence": float(confidence[row]),
                "broken_by": names[samples.broken_by[row]] if samples.clean[row] else None,
            }
            for row in rows[np.argsort(order[rows], kind="stable")[:PAGE_TEXTS]]
        ]

    return chosen(wrong, -confidence) + chosen(broken, confidence)


def text_section(failures: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Html:
    """Return the section of a page with the texts of `text_failures`.

    `names` are the class names by label.
    """
    parts = []
    for title, note, is_broken in (
        ("Misclassified texts", "Without attack; the most confident predictions first.", False),
        (
            "Texts whose embeddings an attack broke",
            "The text itself is unchanged: the attack moved its embeddings, and the prediction is the one after that. "
            "The least confident clean predictions come first.",
            True,
        ),
    ):
        found = [failure for failure in failures if (failure["broken_by"] is not None) == is_broken]
        cards = joined(_card(failure, names) for failure in found)
        if found:
            parts.append(fill("<h2>{}</h2><p class=dim>{}</p>{}", title, note, cards))
    return joined(parts)


def _card(failure: Mapping[str, Any], names: Mapping[int, str]) -> Html:
    label, taken = (names.get(failure[key], str(failure[key])) for key in ("label", "predicted_as"))
    attack = "" if failure["broken_by"] is None else f", after {failure['broken_by']}"
    return fill(
        "<figure class=text>{}<figcaption>{}, <b class=failed>predicted as {}</b>{}; confidence without attack {}"
        "</figcaption></figure>",
        shortened(failure["text"], PAGE_LENGTH),
        label,
        taken,
        attack,
        f"{failure['confidence']:.2f}",
    )


def card_rows(failures: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[list[str]]:
    """Return the rows of a model card's table of misclassified texts.

    Each row has text, label, prediction and confidence.
    """
    return [
        [
            shortened(failure["text"], CARD_LENGTH),
            *(names.get(failure[key], str(failure[key])) for key in ("label", "predicted_as")),
            f"{failure['confidence']:.2f}",
        ]
        for failure in [each for each in failures if "text" in each and each.get("broken_by", "") is None][
            :CARD_TEXTS
        ]
    ]


def shortened(text: str, most: int) -> str:
    """Return a text on one line, cut to `most` characters."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 3].rstrip()}..."
