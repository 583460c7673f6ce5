"""Confusion matrices of a classifier: clean, and under attack."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from advtrain.evaluation.html import Html, fill, html_table, joined
from advtrain.evaluation.worst_case import SampleResults

#: Largest number of classes that is shown as a matrix. More classes are shown as a list.
MATRIX_CLASSES = 20
#: Number of entries of that list.
MOST_FREQUENT = 15


def confusion_section(samples: SampleResults, names: Mapping[int, str]) -> Html:
    """Return the section with the confusion matrices as HTML.

    Args:
        samples: per-sample results.
        names: class names by label; a label without a name is shown as a number.
    """
    columns = {
        "Without attack": samples.clean_predictions,
        "Under attack": samples.adv_predictions,
    }
    found = np.unique(np.concatenate([samples.labels, *columns.values()]))
    shown = [names.get(int(label), str(label)) for label in found]
    draw = _matrix if len(found) <= MATRIX_CLASSES else _most_frequent
    parts = joined(
        fill("<h3>{}</h3>{}", title, draw(confusion_matrix(samples.labels, predicted, found), shown))
        for title, predicted in columns.items()
    )
    rows = "Rows are true classes, columns are predicted classes, entries are numbers of samples."
    return fill(
        "<h2>Confusions between classes</h2>{}<p class=dim>{} Under attack, the prediction for a broken sample is the "
        "one for the input that fooled the model. For any other sample it is the one for the clean input.</p>",
        parts,
        rows if draw is _matrix else f"The {MOST_FREQUENT} most frequent confusions.",
    )


def confusion_matrix(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of samples (K, K) by label and prediction.

    Args:
        labels: (N,) labels.
        predicted: (N,) predicted labels.
        classes: (K,) sorted labels of the rows and columns.
    """
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (np.searchsorted(classes, labels), np.searchsorted(classes, predicted)), 1)
    return counts


def _matrix(counts: NDArray[np.int64], names: list[str]) -> Html:
    """Return the counts (K, K) as a table with the names of the K classes."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = []
    for row, name in enumerate(names):
        cells = joined(
            fill(
                "<td class='{}' style='--share:{}'>{}</td>",
                "hit" if row == column else "miss",
                f"{shares[row, column]:.2f}",
                counts[row, column] or "",
            )
            for column in range(len(names))
        )
        rows.append(fill("<tr><td>{}</td>{}</tr>", name, cells))
    head = joined(fill("<th>{}</th>", name) for name in names)
    return fill(
        "<div class=wide tabindex=0><table class=confusion><tr><th></th>{}</tr>{}</table></div>",
        head,
        joined(rows),
    )


def _most_frequent(counts: NDArray[np.int64], names: list[str]) -> Html:
    """Return the most frequent entries of the counts (K, K) off the diagonal."""
    counts = counts.copy()
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:MOST_FREQUENT]
    rows = []
    for row, column in zip(*np.unravel_index(order, counts.shape), strict=True):
        if counts[row, column]:
            rows.append([names[row], names[column], f"{counts[row, column]:,}"])
    return html_table(["true class", "predicted", "samples"], rows) if rows else fill("<p>None.</p>")
