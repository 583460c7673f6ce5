"""Run folders in an object store: a folder on this machine, and its copy under a URI such as s3://bucket/runs.

Every process works on files of its own, as it would without a store, and a thread beside it brings both sides together
every second or two: what was changed here is sent, what was changed there and is watched is fetched. Each file has one
writer (the command writes run.json, rank 0 the checkpoints), so no file is changed on both sides. Files arrive whole, a
checkpoint's state.json after its tensors, so that what is cut off by a kill is not taken for a checkpoint. While the
store is away training goes on, and what is unsent waits here.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from advtrain.lookup import UserError

logger = logging.getLogger(__name__)

#: Seconds between looks at both sides, between tries while the store is away, and for which an end waits for it.
PERIOD_S, RETRY_S, PATIENCE_S = 1.5, 5.0, 600.0
#: Never sent: temporary files, locks, what Ray Train keeps for itself.
_OURS_ALONE = (".*", "lock", "lease", "attempt-*[0-9]")

Stamp = tuple[int, int]  # size and time of change

_mirrors: list[Mirror] = []


def is_uri(place: str) -> bool:
    """Whether a place is in an object store rather than on a disk."""
    return "://" in place


def connect(uri: str) -> tuple[Any, str]:
    """Return pyarrow's filesystem and the path in it; an S3 endpoint of your own by $AWS_ENDPOINT_URL(_S3).

    Keys come from where the AWS SDK finds them (environment, profile, instance) and are never written down.

    Raises:
        UserError: no filesystem is known for the URI.
    """
    from pyarrow import fs

    try:
        if uri.startswith("file://"):
            raise ValueError("a folder is named by its path")
        if not uri.startswith("s3://"):
            return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        endpoint = endpoint or os.environ.get("MLFLOW_S3_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        scheme, _, host = (endpoint or "").rpartition("://")
        store = fs.S3FileSystem(
            endpoint_override=host or None,
            scheme=scheme or "https",
            region=region,
            connect_timeout=5,
            request_timeout=30,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        )
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"cannot use '{uri}': {error}; write s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        ) from error
    return store, uri.removeprefix("s3://").rstrip("/")


class Mirror:
    """A folder here and its copy there."""

    def __init__(self, folder: Path, uri: str, tell: Callable[[str], None] = logger.warning) -> None:
        self.folder, self.uri, self.tell = folder.resolve(), uri.rstrip("/"), tell
        self.store, self.root = connect(uri)
        self.watched: dict[str, tuple[str, ...]] = {}  # folder -> patterns of files that others change
        self._here: dict[str, Stamp] = {}  # both as they were when they were last alike
        self._there: dict[str, Stamp] = {}
        self._lock = threading.RLock()
        self._away, self._fine = False, time.monotonic()  # when it last answered
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beside, name="storage", daemon=True)

    def start(self) -> None:
        """Bring both sides together from now on.

        Raises:
            UserError: the store does not answer, or refuses.
        """
        bucket = self.root.partition("/")[0]
        try:
            there = self.store.get_file_info(bucket).type.name != "NotFound"
            self._list("", recursive=False)
        except OSError as error:
            raise UserError(f"the storage {self.uri} cannot be used: {_first(error)}") from error
        if not there:
            raise UserError(f"the storage {self.uri} cannot be used: there is no bucket '{bucket}'")
        _mirrors.append(self)
        self._thread.start()

    def stop(self) -> None:
        """Send what is left, and end."""
        self._end.set()
        try:
            self.flush()
        finally:
            _mirrors.remove(self)

    def fetch(self, *patterns: str, below: str = "") -> None:
        """Fetch what has changed of the files below a folder whose paths match, waiting for the store."""
        self._patiently(lambda: self._pull(below, patterns or ("*",)))

    def watch(self, folder: str, *patterns: str) -> None:
        """From now on fetch what others change of the files directly in a folder."""
        self.watched[folder] = patterns

    def flush(self) -> None:
        """Send everything, waiting for the store.

        Raises:
            UserError: it stayed away.
        """
        self._patiently(self._push)

    def _beside(self) -> None:
        while not self._end.wait(RETRY_S if self._away else PERIOD_S):
            with suppress(OSError):
                self._once(self._together)

    def _together(self) -> None:
        self._push()
        for folder, patterns in list(self.watched.items()):
            self._pull(folder, patterns, recursive=False)

    def _patiently(self, action: Callable[[], None]) -> None:
        deadline = time.monotonic() + PATIENCE_S
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

    def _push(self) -> None:
        """Send what was changed here since both were alike, then remove there what was removed here."""
        files = {str(p.relative_to(self.folder)): p for p in self.folder.rglob("*") if p.is_file()}
        files = {name: path for name, path in files.items() if not _private(name)}
        for name in sorted(files, key=_turn):
            with suppress(FileNotFoundError):  # removed since: the next look sees it
                stamp = _stamp(files[name])
                if self._here.get(name) != stamp:
                    content = files[name].read_bytes()
                    self._send(name, content)
                    self._here[name] = stamp
        for name in sorted(
            self._here.keys() - files.keys(), key=lambda name: not name.endswith("state.json")
        ):
            with suppress(FileNotFoundError):
                self.store.delete_file(f"{self.root}/{name}")
            del self._here[name]
            self._there.pop(name, None)

    def _send(self, name: str, content: bytes) -> None:
        path = f"{self.root}/{name}"
        with self.store.open_output_stream(path) as out:
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
        for name in [name for name in self._there if name not in files and wanted(name)]:
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
        with self.store.open_input_stream(f"{self.root}/{name}") as source:
            content = source.read()
        temporary = path.with_name(f".{path.name}.fetched")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        self._here[name], self._there[name] = _stamp(path), stamp

    def _changed_here(self, name: str) -> bool:
        path = self.folder / name
        return path.exists() and self._here.get(name) != _stamp(path)


#: Files that say that others are whole, and so are sent and fetched after them.
_LAST = {
    "state.json": 1,
    "metrics.jsonl": 2,
    "report.json": 2,
    "attempts.jsonl": 3,
    "run.json": 3,
    "campaign.json": 3,
}


def mirror_of(path: Path) -> tuple[Mirror, str] | None:
    """Return the mirror that a folder of this process lies in, and its name there; None if it is only here."""
    for mirror in _mirrors:
        if path.is_relative_to(mirror.folder):
            name = str(path.relative_to(mirror.folder))
            return mirror, "" if name == "." else name
    return None


def shared_place(path: Path) -> str:
    """Return where other machines find a folder: its URI, or its path."""
    found = mirror_of(path)
    return f"{found[0].uri}/{found[1]}".rstrip("/") if found else str(path)


def ray_storage(path: Path) -> dict[str, Any]:
    """Return the settings by which Ray keeps its own files there."""
    place = shared_place(path)
    store, where = connect(place) if is_uri(place) else (None, place)
    return {"storage_path": where, "storage_filesystem": store}


def attach(uri: str, tell: Callable[[str], None] = logger.warning) -> Mirror:
    """Start a mirror in a new folder of this machine, until `detach`."""
    parent = Path(tempfile.mkdtemp(prefix="advtrain-"))
    mirror = Mirror(parent / uri.rstrip("/").rpartition("/")[2], uri, tell)
    mirror.folder.mkdir()
    mirror.start()
    return mirror


def detach(mirror: Mirror) -> None:
    """End a mirror; its folder is removed if everything was sent."""
    mirror.stop()
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)


def detach_all() -> None:
    """End the mirrors of this process."""
    for mirror in list(_mirrors):
        detach(mirror)


@contextmanager
def opened(
    place: str,
    fetched: tuple[str, ...] = ("*",),
    watched: tuple[str, ...] = (),
    tell: Callable[[str], None] = logger.warning,
) -> Iterator[Path]:
    """Yield a folder by what `shared_place` gave: the folder, or a copy whose changes go back while inside.

    Args:
        fetched: patterns of the files that are needed.
        watched: of those that others change meanwhile.
    """
    if not is_uri(place):
        yield Path(place)
        return
    mirror = attach(place, tell)
    try:
        mirror.fetch(*fetched)
        mirror.watch("", *watched)
        yield mirror.folder
    finally:
        detach(mirror)


def _turn(name: str) -> tuple[int, str]:
    return _LAST.get(Path(name).name, 0), name


def _private(name: str) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in Path(name).parts for pattern in _OURS_ALONE)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not _private(name) and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _remote(info: Any) -> Stamp:
    return info.size, info.mtime_ns or 0


def _first(error: BaseException) -> str:
    return str(error).split("\n")[0][:160]
