"""Locations of run folders: a disk, or an object store with a local mirror (mirror.py)."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.runs.mirror import PATIENCE_S, Mirror, active
from advtrain.runs.object_store import connect, is_uri, process_space

logger = logging.getLogger(__name__)


def forget(path: Path) -> None:
    """Delete a folder locally, and also in the object store if runs are in one."""
    shutil.rmtree(path, ignore_errors=True)
    if found := mirror_of(path):
        found[0].remove(found[1])


def mirror_of(path: Path) -> tuple[Mirror, str] | None:
    """Return the mirror that contains a folder and the path in it; None if it is only local."""
    for mirror in active:
        if path.is_relative_to(mirror.folder):
            name = str(path.relative_to(mirror.folder))
            return mirror, "" if name == "." else name
    return None


def shared_place(path: Path) -> str:
    """Return a folder's location for other machines: its URI, or its path."""
    found = mirror_of(path)
    return f"{found[0].uri}/{found[1]}".rstrip("/") if found else str(path)


def ray_storage(path: Path) -> dict[str, Any]:
    """Return the settings with which Ray stores its own files in a folder."""
    place = shared_place(path)
    store, where = connect(place) if is_uri(place) else (None, place)
    return {"storage_path": where, "storage_filesystem": store}


def attach(
    uri: str, tell: Callable[[str], None] = logger.warning, *, patience_s: float | None = None
) -> Mirror:
    """Start a mirror in a new local folder; with `patience_s`, wait so long for the store."""
    kind = f"advtrain-store-{re.sub('[^0-9]', '', process_space())}"
    for left in Path(tempfile.gettempdir()).glob(f"{kind}-*-*"):  # left by killed processes
        if not Path(f"/proc/{left.name.split('-')[3]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    parent = Path(tempfile.mkdtemp(prefix=f"{kind}-{os.getpid()}-"))
    mirror = Mirror(parent / uri.rstrip("/").rpartition("/")[2], uri, tell)
    mirror.patience_s = PATIENCE_S if patience_s is None else patience_s
    mirror.folder.mkdir()
    mirror.start(patient=patience_s is not None)
    return mirror


def detach(mirror: Mirror) -> None:
    """Stop a mirror; delete its folder if everything was uploaded."""
    mirror.stop()
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)


def detach_all() -> list[str]:
    """Stop all mirrors of this process; return the error messages."""
    problems = []
    for mirror in list(active):
        try:
            detach(mirror)
        except UserError as error:
            problems.append(str(error))
    return problems


@contextmanager
def opened(
    place: str,
    fetched: tuple[str, ...] = ("*",),
    watched: tuple[str, ...] = (),
    tell: Callable[[str], None] = logger.warning,
    patience_s: float = PATIENCE_S,
) -> Iterator[Path]:
    """Yield the folder at a `shared_place`: the folder itself, or a mirror of the object store.

    Args:
        fetched: patterns of the files to download.
        watched: patterns of the files that other processes change.
    """
    if not is_uri(place):
        yield Path(place)
        return
    mirror = attach(place, tell, patience_s=patience_s)
    try:
        mirror.fetch(*fetched)
        mirror.watch("", *watched)
        yield mirror.folder
    finally:
        detach(mirror)
