"""Settings and results of data sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from advtrain.data.batches import Split
from advtrain.data.found import Found
from advtrain.data.survey import ImageSettings
from advtrain.data.tables import RawTable
from advtrain.data.texts import RawText
from advtrain.errors import UserError

#: Samples that become inputs only when the training split is known.
Raw = RawTable | RawText


@dataclass(frozen=True)
class Request:
    """Settings of a data source."""

    root: Path
    path: Path | None
    download: bool
    stream: bool
    images: ImageSettings = ImageSettings()
    regression: bool = False
    image: str | None = None
    label: str | None = None
    class_names: list[str] | None = None  # of a model, in which the classes of the data are looked up
    features: list[str] | None = None
    scale: bool = False  # scale tables of an npz
    text: str | None = None  # column of texts
    encoding: str | None = None  # of files of texts
    labelled: bool = True  # read the labels of texts
    known: tuple[str | None, str | None] = (
        None,
        None,
    )  # columns of a model's texts and labels, if a file has them


@dataclass(frozen=True)
class Source:
    """Samples loaded by a source; `test` and `validation` are None without such a split."""

    train: Split | Raw
    test: Split | Raw | None
    num_classes: int | None  # None: inferred from the labels; 0: regression
    class_names: list[str] | None = None
    found: Found = Found()
    validation: Split | Raw | None = None  # None: a part of the training samples


def existing_path(request: Request) -> Path:
    """Return data.path below the data root; raise UserError if it is not set or does not exist."""
    if request.path is None:
        raise UserError("data.path is not set; set it to a path, absolute or relative to the data root")
    path = request.root / request.path
    if not path.exists():
        raise UserError(f"'{path}' does not exist; set data.path, or the data root with --data-root")
    return path
