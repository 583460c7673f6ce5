"""Run folders in an object store: a folder on this machine, and its copy under a URI such as s3://bucket/runs.

Every process works on files of its own, as it would without a store, and a thread beside it brings both sides together
every second or two: what was changed here is sent, what was changed there and is watched is fetched. Each file has one
writer (the command writes run.json, rank 0 the checkpoints), so no file is changed on both sides. Files arrive whole, a
checkpoint's state.json after its tensors, so that what is cut off by a kill is not taken for a checkpoint, and lines of
metrics.jsonl after the checkpoint that they speak of. While the store is away training goes on, and what is unsent
waits here.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.runs.object_store import connect

logger = logging.getLogger(__name__)

#: Seconds between looks at both sides, between tries while the store is away, and for which an end waits for it.
PERIOD_S, RETRY_S, PATIENCE_S = 1.5, 5.0, 600.0
#: Never sent: temporary files, locks, what Ray keeps for itself.
_OURS_ALONE = (".*", "*/.*", "lock", "*/lock", "lease", "*/lease", "*ray/attempt-*", "*tune/attempt-*[0-9]/*")
#: What is removed on one side when it is removed on the other; whatever else disappears here stays there.
_PASSING = (
    "*checkpoints/step-*",
    "*stop",
    "*interruption.json",
    "*placement-group",
    "*incoming/*",
    "*error.txt",
    "*guard.json",
)
#: Files that say that others are whole, and so are read before and sent after them.
_LAST = {
    "state.json": 1,
    "metrics.jsonl": 2,
    "report.json": 2,
    "attempts.jsonl": 3,
    "tracking.json": 3,
    "run.json": 4,
    "campaign.json": 4,
}

Stamp = tuple[int, int]  # size and time of change

#: Those of this process.
active: list[Mirror] = []


class Mirror:
    """A folder here and its copy there."""

    def __init__(self, folder: Path, uri: str, tell: Callable[[str], None] = logger.warning) -> None:
        self.folder, self.uri, self.tell = folder.resolve(), uri.rstrip("/"), tell
        self.store, self.root = connect(uri)
        self.patience_s = PATIENCE_S
        self.watched: dict[str, tuple[str, ...]] = {}  # folder -> patterns of files that others change
        self._here: dict[str, Stamp] = {}  # both as they were when they were last alike
        self._there: dict[str, Stamp] = {}
        self._lock = threading.RLock()
        self._away, self._fine = False, time.monotonic()  # when it last answered
        self._given_up = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beside, name="storage", daemon=True)

    def start(self, *, patient: bool = False) -> None:
        """Bring both sides together from now on.

        Raises:
            UserError: the store does not answer, or refuses; at once, or if it is `patient` after a while.
        """
        bucket = self.root.partition("/")[0]

        def look() -> None:
            if self.store.get_file_info(bucket).type.name == "NotFound":
                raise UserError(f"the storage {self.uri} cannot be used: there is no bucket '{bucket}'")
            self._list("", recursive=False)

        try:
            if patient:
                self._patiently(look)
            else:
                look()
        except OSError as error:
            raise UserError(f"the storage {self.uri} cannot be used: {_first(error)}") from error
        active.append(self)
        self._thread.start()

    def stop(self) -> None:
        """Send what is left, and end."""
        self._end.set()
        self._thread.join()
        try:
            self.flush()
        finally:
            active.remove(self)

    def give_up(self) -> None:
        """Send nothing any more: another process has the run."""
        self._given_up = True
        self.tell(f"another process has taken over a run in {self.uri}; nothing more is sent from here")

    def fetch(self, *patterns: str, below: str = "") -> None:
        """Fetch what has changed of the files below a folder whose paths match, waiting for the store."""
        self._patiently(lambda: self._pull(below, patterns or ("*",)))

    def watch(self, folder: str, *patterns: str) -> None:
        """From now on fetch what others change of the files directly in a folder."""
        self.watched[folder] = patterns

    def has(self, name: str) -> bool:
        """Whether there is such a file there."""
        return bool(self.store.get_file_info(f"{self.root}/{name}").type.name == "File")

    def remove(self, folder: str) -> None:
        """Remove a folder there, if the store answers."""
        with suppress(OSError):
            self.store.delete_dir(f"{self.root}/{folder}")

    def flush(self) -> None:
        """Send everything, waiting for the store.

        Raises:
            UserError: it stayed away.
        """
        self._patiently(self._push)

    def _beside(self) -> None:
        while not self._end.wait(RETRY_S if self._away else PERIOD_S):
            try:
                self._once(self._together)
            except OSError:
                pass  # told already
            except Exception:
                logger.exception(
                    "bringing %s and %s together failed; it is tried again", self.folder, self.uri
                )

    def _together(self) -> None:
        self._push()
        for folder, patterns in list(self.watched.items()):
            self._pull(folder, patterns, recursive=False)

    def _patiently(self, action: Callable[[], None]) -> None:
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return self._once(action)
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"the storage {self.uri} stayed away ({_first(error)}); what is unsent lies in {self.folder}"
                    ) from error
                time.sleep(RETRY_S)

    def _once(self, action: Callable[[], None]) -> None:
        try:
            with self._lock:
                action()
        except OSError as error:
            if not self._away:
                self._away = True
                self.tell(
                    f"the storage {self.uri} is away ({_first(error)}); what is unsent waits in {self.folder}"
                )
            raise
        if self._away:
            seconds = time.monotonic() - self._fine
            self._away = False
            self.tell(f"the storage {self.uri} is back after {seconds:.0f} s; nothing is lost")
        self._fine = time.monotonic()

    def _files(self) -> list[str]:
        """Return the files here that are for others too."""
        found = []
        for place, _, names in os.walk(self.folder):  # unlike glob, it ignores files that vanish meanwhile
            found += [os.path.relpath(os.path.join(place, name), self.folder) for name in names]
        return [name for name in found if not _private(name)]

    def _unsent(self, least: int, most: int) -> Iterator[tuple[str, Stamp, bytes]]:
        """Yield what was changed here since both were alike, of files with such places in the order of sending."""
        for name in sorted(self._files(), key=_turn):
            if not least <= _turn(name)[0] <= most:
                continue
            with suppress(FileNotFoundError):  # removed since: the next look sees it
                stamp = _stamp(self.folder / name)
                if self._here.get(name) != stamp:
                    yield name, stamp, (self.folder / name).read_bytes()

    def _push(self) -> None:
        """Send what was changed here since both were alike, then remove there what has passed here."""
        if self._given_up:
            return
        late = list(self._unsent(2, 9))  # read before what they speak of
        for group in (self._unsent(0, 1), late):
            for name, stamp, content in group:
                self._send(name, content)
                self._here[name] = stamp
        here = set(self._files())
        gone = [name for name in self._here.keys() - here if _matches(name, _PASSING)]
        if not gone or not self.folder.is_dir() or any(True for _ in self._unsent(0, 1)):
            return  # what replaces it is sent first
        for name in sorted(gone, key=lambda name: not name.endswith("state.json")):
            with suppress(FileNotFoundError):
                self.store.delete_file(f"{self.root}/{name}")
            del self._here[name]
            self._there.pop(name, None)

    def _send(self, name: str, content: bytes) -> None:
        path = f"{self.root}/{name}"
        with self.store.open_output_stream(path, compression=None) as out:
            out.write(content)
        self._there[name] = _remote(self.store.get_file_info(path))

    def _pull(self, folder: str, patterns: tuple[str, ...], *, recursive: bool = True) -> None:
        """Fetch what was changed there since both were alike, then remove here what was removed there."""
        files = self._list(folder, recursive)

        def wanted(name: str) -> bool:
            inside = Path(name).is_relative_to(folder) and (recursive or Path(name).parent == Path(folder))
            return (
                inside
                and _matches(name[len(folder) :].lstrip("/"), patterns)
                and not self._changed_here(name)
            )

        for name in sorted(filter(wanted, files), key=_turn):
            whole = not name.endswith(".safetensors") or f"{Path(name).parent}/state.json" in files
            if whole and self._there.get(name) != files[name]:
                with suppress(FileNotFoundError):  # removed since: the next look sees it
                    self._take(name, files[name])
        gone = [name for name in self._there if name not in files and wanted(name)]
        for name in filter(lambda name: _matches(name, _PASSING), gone):
            (self.folder / name).unlink(missing_ok=True)
            self._there.pop(name)
            self._here.pop(name, None)

    def _list(self, folder: str, recursive: bool) -> dict[str, Stamp]:
        from pyarrow import fs

        base = f"{self.root}/{folder}".rstrip("/")
        found = self.store.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=recursive))
        return {i.path[len(self.root) + 1 :]: _remote(i) for i in found if i.type == fs.FileType.File}

    def _take(self, name: str, stamp: Stamp) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self._read(name)
        temporary = path.with_name(f".{path.name}.fetched")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        self._here[name], self._there[name] = _stamp(path), stamp

    def _read(self, name: str) -> bytes:
        """Return an object. pyarrow asks for its size first and then for its parts: one that is written anew in between
        is read again."""
        path = f"{self.root}/{name}"
        for _ in range(20):
            before = _remote(self.store.get_file_info(path))
            with self.store.open_input_stream(path, compression=None) as source:
                content: bytes = source.read()
            if before == _remote(self.store.get_file_info(path)) and len(content) == before[0]:
                return content
        raise OSError(f"'{path}' changes again and again as it is read")

    def _changed_here(self, name: str) -> bool:
        path = self.folder / name
        return path.exists() and self._here.get(name) != _stamp(path)


def _turn(name: str) -> tuple[int, str]:
    return _LAST.get(Path(name).name, 0), name


def _private(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _OURS_ALONE)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not _private(name) and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _remote(info: Any) -> Stamp:
    return info.size, info.mtime_ns or 0


def _first(error: BaseException) -> str:
    return str(error).split("\n")[0][:160]
