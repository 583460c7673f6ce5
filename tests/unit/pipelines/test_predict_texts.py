"""Inputs of a prediction with a text model: every kind of file, and a list of texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from advtrain.data.texts import RawText, encode_texts, fit_tokenizer
from advtrain.errors import UserError
from advtrain.recipe.data import TextShape
from advtrain.registry.predictor import Served
from pipelines.predict import _read
from tests.text_kit import question

TEXTS = [question(n) for n in range(6)]


def served(column: str | None = None) -> Served:
    spec = fit_tokenizer(
        RawText("here", np.array(TEXTS, object), np.zeros(6, np.int64)), "words", None, None, column
    )
    shape = TextShape(spec.max_length, spec.vocabulary)
    return Served("models:/questions/1", b"", shape, ["human", "location"], text=spec)


def write(path: Path, column: str) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(6), column: TEXTS}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": n, column: t}) + "\n" for n, t in enumerate(TEXTS)))
    elif path.suffix == ".txt":
        path.write_text("\n".join(TEXTS))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        path.write_text("\n".join([f"id{mark}{column}", *(f"{n}{mark}{t}" for n, t in enumerate(TEXTS))]))
    return path


@pytest.mark.parametrize("column", [None, "review"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_inputs_of_a_list_of_texts(tmp_path, suffix, column):
    model = served(column)
    listed = _read(model, None, TEXTS)
    found = _read(model, write(tmp_path / f"a.{suffix}", column or "text"), ())
    assert found.names == listed.names == TEXTS
    for each in (found, listed, _read(model, None, tuple(TEXTS))):
        assert np.array_equal(each.arrays, encode_texts(model.text, TEXTS, "")[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("who is it ?", "--text is a single text; pass a list of texts, such as"),
        ([1], r"--text\[0\] is 1, no text"),
        (["who", " "], "text 1 has no words"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(texts, message):
    with pytest.raises(UserError, match=message):
        _read(served(), None, texts)


def test_missing_file_of_texts_names_the_kinds_that_the_model_takes(tmp_path):
    with pytest.raises(UserError, match=r"a.txt' does not exist; pass .parquet, .jsonl, .csv, .tsv, .txt"):
        _read(served(), tmp_path / "a.txt", ())
