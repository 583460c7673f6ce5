"""Files of labelled texts: tsv, csv, jsonl, parquet, and lines `label text`."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.arrays import SPLITS, class_labels
from advtrain.data.found import Found
from advtrain.data.parquet import (
    declared_names,
    open_parquet,
    read_column,
    refuse_arrow,
    split_files,
    to_array,
    values,
)
from advtrain.data.request import Request, Source, existing_path
from advtrain.data.stored_texts import StoredTexts
from advtrain.data.text_columns import text_columns
from advtrain.data.texts import RawText, separate
from advtrain.errors import UserError
from advtrain.recipe.data import TEXT_FILES

#: Suffixes of files of texts, in the order in which a folder is searched for them.
SUFFIXES = ("parquet", "jsonl", "csv", "tsv", "txt")
#: Starts of the names of the files of each split.
_SPLITS = {**SPLITS, "validation": (*SPLITS["validation"], "dev")}
#: Encoding and class names of the built-in data sets.
_BUILT_IN: dict[str, tuple[str, list[str] | None]] = {
    "sst2": ("utf-8", ["negative", "positive"]),
    "trec": ("latin-1", ["description", "entity", "abbreviation", "human", "location", "number"]),
    "sms": ("utf-8", None),
}

#: Place of a row in its file, such as "line 7", with its text and its label.
Row = tuple[str, Any, Any]


def text(request: Request) -> Source:
    """Load texts and their labels from a file, or from a folder with the files of the splits.

    Files are .parquet, .jsonl, .csv or .tsv with the columns data.text and data.label, or .txt with lines
    `label text`. A .tsv has no quotes around its cells, and no header if neither column is set: its lines are
    `label text`. The files of a folder are train* and, if there are such, val* or dev* and test*. With data.stream, the
    training texts stay in their .parquet files.
    """
    return _load(request, existing_path(request))


def built_in_texts(name: str) -> Callable[[Request], Source]:
    """Return the source of a data set that lies in a known folder below the data root."""

    def load(request: Request) -> Source:
        path = request.root / TEXT_FILES[name]
        if not path.is_dir():
            raise UserError(
                f"{name} is not in '{path}'; set the folder that contains {TEXT_FILES[name]} with --data-root"
            )
        return _load(request, path, *_BUILT_IN[name])

    load.__doc__ = f"Load the texts of {name} from {TEXT_FILES[name]} below the data root."
    return load


def _load(request: Request, path: Path, encoding: str = "utf-8", called: list[str] | None = None) -> Source:
    """Return the texts below a path. `called` are the names of the classes that the files number."""
    if request.regression:
        raise UserError("data.task regression does not apply to texts")
    files, notes = _find_files(path)
    if request.stream and (other := [f for f in files["train"] if f.suffix.lower() != ".parquet"]):
        raise UserError(
            f"data.stream reads texts of .parquet files, not '{other[0]}'; convert it, or unset data.stream"
        )
    encoding = request.encoding or encoding
    names = request.class_names
    parts: dict[str, RawText] = {}
    named: dict[str, bool] = {}
    for part in (name for name in ("train", "validation", "test") if name in files):
        stream = request.stream and part == "train"
        parts[part], names, is_named = _read(files[part], request, encoding, names, called, stream=stream)
        if is_named is not None:
            named[part] = is_named
    if len(set(named.values())) > 1:
        kinds = ", ".join(f"{part}: {'texts' if each else 'numbers'}" for part, each in named.items())
        raise UserError(
            f"'{path}': labels are texts in one split and numbers in another ({kinds}); use one kind"
        )
    if request.class_names is None and len(np.unique(parts["train"].labels)) < 2:
        raise UserError(f"{parts['train'].where}: all texts have one label; a classifier needs two classes")
    train, validation, more = separate(parts["train"], parts.get("validation"), parts.get("test"))
    found = Found(files=sum(map(len, files.values())), notes=[*notes, *more])
    return Source(train, parts.get("test"), len(names) if names else None, names, found, validation)


def _find_files(path: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of each split, and notes."""
    if not path.is_dir():
        if path.suffix.lower().removeprefix(".") not in SUFFIXES:
            raise UserError(f"'{path}' is no file of texts; expected {', '.join(f'.{s}' for s in SUFFIXES)}")
        return {"train": [path]}, []
    for suffix in SUFFIXES:
        try:
            files = split_files(path, suffix, _SPLITS)
        except UserError:
            if any(path.rglob(f"train*.{suffix}")):  # an incomplete series
                raise
            continue
        if "test" in files or "validation" not in files:
            return files, []
        note = "there are no test files, so the validation files are the test split"
        return {"train": files["train"], "test": files["validation"]}, [note]
    single = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*.{suffix}"))]
    if len(single) == 1:
        return {"train": single}, []
    refuse_arrow(path)
    raise UserError(
        f"'{path}' has no file train*.{{{','.join(SUFFIXES)}}}, and not a single file of texts either"
    )


def _read(
    files: Sequence[Path],
    request: Request,
    encoding: str,
    names: list[str] | None,
    called: list[str] | None,
    *,
    stream: bool,
) -> tuple[RawText, list[str] | None, bool | None]:
    """Return the texts of all files of a split, the class names, and whether labels are texts (None: declared)."""
    texts: list[str] = []
    labels: list[Any] = []
    is_declared = False
    where = f"'{files[0]}'" if len(files) == 1 else f"'{files[0].parent}', {len(files)} files"
    for file in files:
        rows, declared = _rows(file, request, encoding)
        if declared and names and declared != names and names != [str(n) for n in range(len(names))]:
            raise UserError(
                f"'{file}': labels 0, 1, ... are {', '.join(declared[:10])}, but the earlier files or the model have "
                f"{', '.join(names[:10])}; store the labels as texts"
            )
        names, is_declared = names or declared, is_declared or declared is not None
        for place, label, words in rows:
            words = _checked_text(file, place, words)
            if label is None or label == "":
                raise UserError(f"'{file}', {place}: the label is empty; every sample needs one")
            if not stream:
                texts.append(words)
            labels.append(label)
    if not labels:
        raise UserError(f"{where}: no texts found")
    if called is not None:
        by_number = {str(number): name for number, name in enumerate(called)}
        labels, names = [by_number.get(label, label) for label in labels], names or called
    array = _as_array(labels, where)
    if not is_declared:
        _require_names(array, request.class_names, where)
    numbers, names = class_labels(array, f"{where}: labels", names)
    if (numbers == -1).all():
        raise UserError(f"{where}: every label is -1, which marks texts without labels; remove these files")
    is_named = None if is_declared else array.dtype.kind == "U"
    found = _stored(files, request) if stream else np.array(texts, object)
    return RawText(where, found, numbers), names, is_named


def _require_names(labels: NDArray[Any], names: list[str] | None, where: str) -> None:
    """Raise UserError for numbers whose meaning is unknown, because the classes of the model have names."""
    if labels.dtype.kind in "iuf" and names and names != [str(number) for number in range(len(names))]:
        raise UserError(
            f"{where}: the labels are numbers, but the classes of the model are {', '.join(names[:10])}; store the "
            "labels as texts"
        )


def _as_array(labels: list[Any], where: str) -> NDArray[Any]:
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise UserError(
            f"{where}: labels are of several types: {', '.join(sorted(k.__name__ for k in kinds))}"
        )
    return np.array(labels)


def _rows(file: Path, request: Request, encoding: str) -> tuple[Iterator[Row], list[str] | None]:
    """Return the rows of a file, and the class names that a parquet file declares."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        if request.encoding is not None:
            raise UserError(f"data.encoding does not apply to '{file}': texts in parquet are UTF-8")
        return _parquet_rows(file, request)
    lines = _decoded(file, encoding, labelled=request.labelled).removeprefix("\ufeff").split("\n")
    columns = request.text is not None or request.label is not None or not request.labelled
    if suffix == ".jsonl":
        return _json_rows(file, lines, request), None
    if suffix == ".csv" or (suffix == ".tsv" and (columns or any(request.known))):
        return _delimited_rows(file, lines, request), None
    if columns:
        raise UserError(f"'{file}' has lines `label text`, no columns; leave out data.text and data.label")
    return _plain_rows(file, lines), None


def _decoded(file: Path, encoding: str, *, labelled: bool) -> str:
    """Return the content of a file; raise UserError for bytes that are not in the encoding."""
    content = file.read_bytes()
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        setting = "set data.encoding, for example latin-1, or " if labelled else ""
        raise UserError(
            f"'{file}', line {line}: byte 0x{content[error.start]:02x} is not {encoding}; {setting}save the file "
            "in UTF-8"
        ) from error
    except (LookupError, ValueError) as error:
        raise UserError(
            f"data.encoding {encoding!r} is no text encoding; examples: utf-8, latin-1"
        ) from error


def _plain_rows(file: Path, lines: list[str]) -> Iterator[Row]:
    """Yield the rows of lines `label text`, whose label ends at the first blank or tab."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label, *rest = line.split(None, 1)
        yield f"line {number}", label, rest[0].rstrip("\r") if rest else ""


def _json_rows(file: Path, lines: list[str], request: Request) -> Iterator[Row]:
    names: tuple[str, str | None] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{file}', line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"'{file}', line {number} is no JSON object with a text and a label")
        names = names or text_columns(list(row), request, file)
        label = None if names[1] is None else row.get(names[1])
        if not isinstance(label, str | int | None):
            raise UserError(f"'{file}', line {number}: the label must be a text or a whole number")
        yield f"line {number}", label, row.get(names[0])


def _delimited_rows(file: Path, lines: list[str], request: Request) -> Iterator[Row]:
    """Yield the rows of a .csv, whose delimiter is the most frequent one in its header, or of a .tsv."""
    tabs = file.suffix.lower() == ".tsv"
    head = lines[0] if lines else ""
    delimiter = "\t" if tabs else max(",;\t|", key=head.count)
    reader = csv.reader(
        (f"{line}\n" for line in lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=not tabs,
    )
    try:
        header = [name.strip() for name in next(reader)]
        if not header:
            return
        names = text_columns(header, request, file)
        at = [None if name is None else header.index(name) for name in names]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                quotes = (
                    "; cells of a .tsv have no quotes, so save texts with tabs or line breaks as .csv"
                    if tabs
                    else ""
                )
                raise UserError(
                    f"'{file}', line {reader.line_num} has {len(row)} cells, the header has {len(header)}{quotes}"
                )
            yield f"line {reader.line_num}", None if at[1] is None else row[at[1]].strip(), row[at[0] or 0]
    except csv.Error as error:
        raise UserError(f"'{file}', line {reader.line_num}: {error}") from error


def _parquet_rows(file: Path, request: Request) -> tuple[Iterator[Row], list[str] | None]:
    schema = open_parquet(file).schema_arrow
    names = text_columns(schema.names, request, file)
    labels: Iterable[Any] = itertools.repeat(None)
    if names[1] is not None:
        where = f"'{file}': the column {names[1]}"
        labels = to_array(read_column(file, names[1]), where, "label").tolist()
    rows = ((f"row {n}", *pair) for n, pair in enumerate(zip(labels, values(file, names[0]), strict=False)))
    return rows, declared_names(schema, names[1])


def _stored(files: Sequence[Path], request: Request) -> StoredTexts:
    names = [text_columns(open_parquet(file).schema_arrow.names, request, file)[0] for file in files]
    return StoredTexts.of(files, names)


def read_unlabelled_texts(path: Path, column: str | None) -> list[str]:
    """Return the texts of a file in UTF-8: the lines of a .txt, or a column of another file.

    Args:
        path: .txt, .csv, .tsv, .jsonl or .parquet.
        column: name of the column; None: the first usual name.

    Raises:
        UserError: the file is of another kind or damaged, or a text is empty.
    """
    if path.is_dir():
        raise UserError(
            f"'{path}' is a folder; pass one file of texts: {', '.join(f'.{s}' for s in SUFFIXES)}"
        )
    (file,) = _find_files(path)[0]["train"]
    if file.suffix.lower() == ".txt":
        lines = _decoded(file, "utf-8", labelled=False).removeprefix("\ufeff").split("\n")
        found = [line.rstrip("\r") for line in lines if line.strip()]
    else:
        request = Request(path.parent, path, False, False, text=column, labelled=False)
        rows, _ = _rows(file, request, "utf-8")
        found = [_checked_text(file, place, words) for place, _, words in rows]
    if not found:
        raise UserError(f"'{path}': no texts found")
    return found


def _checked_text(file: Path, place: str, words: Any) -> str:
    """Return a text; raise UserError if it is empty, no text, or not Unicode."""
    if not isinstance(words, str) or not words.strip():
        kind = "is empty" if words is None or isinstance(words, str) else f"is {words!r:.50}, no text"
        raise UserError(f"'{file}', {place}: the text {kind}; every sample needs one")
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"'{file}', {place}: the text holds half of a surrogate pair") from error
    return words
