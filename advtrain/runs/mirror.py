"""Mirrors of run folders: a local folder and its copy under a URI such as s3://bucket/runs.

Every process works on local files. A background thread syncs both sides about every 1.5 seconds: it uploads local
changes and downloads remote changes of watched files. Each file has one writer (the command writes run.json, rank 0 the
checkpoints), so no file changes on both sides. Files are transferred whole and in order: a checkpoint's state.json
after its tensors, so that a partial upload is not taken for a checkpoint, and metrics.jsonl after the checkpoint of its
last line. While the store is unreachable, training continues and unsent files stay in the local folder.
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

#: Seconds between syncs, between retries while the store is unreachable, and until a blocking call gives up.
PERIOD_S, RETRY_S, PATIENCE_S = 1.5, 5.0, 600.0
#: Never uploaded: temporary files, locks and Ray's own files.
_OURS_ALONE = (".*", "*/.*", "lock", "*/lock", "lease", "*/lease", "*ray/attempt-*", "*tune/attempt-*[0-9]/*")
#: Files whose deletion is synced; other files that are deleted here stay in the store.
_PASSING = (
    "*checkpoints/step-*",
    "*stop",
    "*interruption.json",
    "*placement-group",
    "*incoming/*",
    "*error.txt",
    "*guard.json",
)
#: File -> its place in the upload order. These files mark others as complete: they are read before those, and
#: uploaded after them.
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

#: Mirrors of this process.
active: list[Mirror] = []


class Mirror:
    """Local folder and its copy in an object store."""

    def __init__(self, folder: Path, uri: str, tell: Callable[[str], None] = logger.warning) -> None:
        self.folder, self.uri, self.tell = folder.resolve(), uri.rstrip("/"), tell
        self.store, self.root = connect(uri)
        self.patience_s = PATIENCE_S
        self.watched: dict[str, tuple[str, ...]] = {}  # folder -> patterns of files to download
        self._here: dict[str, Stamp] = {}  # stamps of both sides at the last sync
        self._there: dict[str, Stamp] = {}
        self._lock = threading.RLock()
        self._away, self._fine = False, time.monotonic()  # time of the last success
        self._given_up = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beside, name="storage", daemon=True)

    def start(self, *, patient: bool = False) -> None:
        """Check the store and start the background sync.

        Raises:
            UserError: the store cannot be used; with `patient`, only after `patience_s` seconds of retries.
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
        """Stop the background sync and upload remaining changes."""
        self._end.set()
        self._thread.join()
        try:
            self.flush()
        finally:
            active.remove(self)

    def give_up(self) -> None:
        """Stop uploading because another process has taken over the run."""
        self._given_up = True
        self.tell(f"another process has taken over a run in {self.uri}; this process stops uploading")

    def fetch(self, *patterns: str, below: str = "") -> None:
        """Download changed files below a folder that match the patterns, waiting for the store."""
        self._patiently(lambda: self._pull(below, patterns or ("*",)))

    def watch(self, folder: str, *patterns: str) -> None:
        """Download matching files of a folder in the background when other processes change them."""
        self.watched[folder] = patterns

    def has(self, name: str) -> bool:
        """Return whether the store has this file."""
        return bool(self.store.get_file_info(f"{self.root}/{name}").type.name == "File")

    def remove(self, folder: str) -> None:
        """Delete a folder in the store; errors are ignored."""
        with suppress(OSError):
            self.store.delete_dir(f"{self.root}/{folder}")

    def flush(self) -> None:
        """Upload all changes, waiting for the store.

        Raises:
            UserError: the store stayed unreachable.
        """
        self._patiently(self._push)

    def _beside(self) -> None:
        while not self._end.wait(RETRY_S if self._away else PERIOD_S):
            try:
                self._once(self._together)
            except OSError:
                pass  # already reported
            except Exception:
                logger.exception("syncing %s with %s failed; it will be retried", self.folder, self.uri)

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
                        f"the storage {self.uri} is still unreachable ({_first(error)}); unsent files: {self.folder}"
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
                    f"the storage {self.uri} is unreachable ({_first(error)}); unsent files stay in {self.folder}"
                )
            raise
        if self._away:
            seconds = time.monotonic() - self._fine
            self._away = False
            self.tell(f"the storage {self.uri} is reachable again after {seconds:.0f} s; syncing has resumed")
        self._fine = time.monotonic()

    def _files(self) -> list[str]:
        """Return the local files that may be uploaded."""
        found = []
        for place, _, names in os.walk(self.folder):  # unlike glob, it ignores deleted files
            found += [os.path.relpath(os.path.join(place, name), self.folder) for name in names]
        return [name for name in found if not _private(name)]

    def _unsent(self, least: int, most: int) -> Iterator[tuple[str, Stamp, bytes]]:
        """Yield local files changed since the last sync whose upload order is in [least, most]."""
        for name in sorted(self._files(), key=_turn):
            if not least <= _turn(name)[0] <= most:
                continue
            with suppress(FileNotFoundError):  # deleted since then: the next sync handles it
                stamp = _stamp(self.folder / name)
                if self._here.get(name) != stamp:
                    yield name, stamp, (self.folder / name).read_bytes()

    def _push(self) -> None:
        """Upload local changes since the last sync, then delete remotely what was deleted here."""
        if self._given_up:
            return
        late = list(self._unsent(2, 9))  # read before the files that they describe
        for group in (self._unsent(0, 1), late):
            for name, stamp, content in group:
                self._send(name, content)
                self._here[name] = stamp
        here = set(self._files())
        gone = [name for name in self._here.keys() - here if _matches(name, _PASSING)]
        if not gone or not self.folder.is_dir() or any(True for _ in self._unsent(0, 1)):
            return  # upload the replacement first
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
        """Download remote changes since the last sync, then delete here what was deleted remotely."""
        files = self._list(folder, recursive)

        def wanted(name: str) -> bool:
            inside = Path(name).is_relative_to(folder) and (recursive or Path(name).parent == Path(folder))
            return (
                inside
                and _matches(name[len(folder) :].lstrip("/"), patterns)
                and not self._changed_here(name)
            )

        for name in sorted(filter(wanted, files), key=_turn):
            tensors = fnmatch.fnmatch(name, "*checkpoints/step-*.safetensors")
            whole = not tensors or f"{Path(name).parent}/state.json" in files
            if whole and self._there.get(name) != files[name]:
                with suppress(FileNotFoundError):  # deleted since then: the next sync handles it
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
        """Return an object's content, reading it again if it changes during the read.

        pyarrow requests the size first and then the parts.
        """
        path = f"{self.root}/{name}"
        for _ in range(20):
            before = _remote(self.store.get_file_info(path))
            with self.store.open_input_stream(path, compression=None) as source:
                content: bytes = source.read()
            if before == _remote(self.store.get_file_info(path)) and len(content) == before[0]:
                return content
        raise OSError(f"'{path}' kept changing while it was read")

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
