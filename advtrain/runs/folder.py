"""Run folder: all files of a run. Any process that writes to it may die at any moment.

runs/digits-3f2a9c-1/
  recipe.yaml       the resolved recipe
  run.json          status, MLflow run, environment, how far it got
  data.json         what the data set held, see data/summary.py; the tokenizer of texts is in tokenizer.json
  metrics.jsonl     one line per finished epoch, written after its checkpoint
  progress.json     the current epoch, rewritten about twice a second
  guard.json        each collapse that the guard detected, and the settings used after it
  start/            weights that the run started from, see start.py
  attempts.jsonl    one line per worker group: first step, nodes, what ended the group before
  checkpoints/      step-00000120/, ...: see checkpoint.py
  evaluations/      cached results of each evaluation of the run's models
  rows/             records of the samples of its data and of its ancestors' data, see data/rows.py
  report/           report.html and report.json, samples.parquet, model_card.md, figures
  tracking.json     MLflow run, and what was sent to it
  stop              requests that the workers save and stop
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from advtrain.documents import dump_json, finite, parse_json, read_record
from advtrain.environment import private_folder
from advtrain.errors import UserError, nearest
from advtrain.runs.object_store import leased
from advtrain.runs.sealed import next_line, read_lines, sealed_all, sealed_json, unsealed, unsealed_all
from advtrain.runs.storage import mirror_of, shared_place
from advtrain.user_paths import user_path

os.umask(_umask := os.umask(0o077))  # os.umask reads only by setting: do it before threads start
#: Mode of this user's new files; files of mkstemp and safetensors get it by chmod.
FILE_MODE = 0o666 & ~_umask

WriteStart = Callable[[Path], dict[str, Any]]  # writes the start weights, returns entries of run.json
#: Files of a run that its workers write while the command reads them.
OF_WORKERS = ("metrics.jsonl", "progress.json", "guard.json", "attempts.jsonl")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: readers see either the old or the new content."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(descriptor, FILE_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # on a full disk the error does not name the file
        raise


def append_durably(path: Path, text: str) -> None:
    """Append to a file and fsync it; a kill may leave part of the text at its end."""
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def lock_folder() -> Path:
    """Return this user's folder of locks on this machine."""
    return private_folder("set TMPDIR to a folder of your own", tempfile.gettempdir())


@contextmanager
def file_lock(path: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, waiting up to `wait_s` seconds for another process.

    The operating system releases the lock of a dead process.

    Raises:
        UserError: another process holds it; `busy` is the message.
    """
    deadline = time.monotonic() + wait_s
    try:  # a link at that place could name a file of somebody else
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        raise UserError(f"cannot lock '{path}': {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise UserError(busy) from None
                time.sleep(0.2)
        yield


@contextmanager
def run_lock(folder: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock, and if it is in an object store also its lease there."""
    with file_lock(folder / "lock", busy, wait_s), ExitStack() as holds:
        if found := mirror_of(folder):
            mirror, name = found
            path = f"{mirror.root}/{name}".rstrip("/") + "/lease"
            holds.enter_context(leased(mirror.store, path, busy, wait_s, mirror.give_up))
            sync(folder)  # download the changes of the last holder
            holds.callback(mirror.flush)  # upload before the next holder reads
        yield


def exists_remotely(file: Path) -> bool:
    """Return whether the object store has this file, which may be missing here."""
    found = mirror_of(file)
    return found is not None and found[0].has(found[1])


def sync(folder: Path, patterns: tuple[str, ...] = ("*",)) -> None:
    """Upload new files and download matching ones if the folder is in an object store."""
    if found := mirror_of(folder.resolve()):
        mirror, name = found
        mirror.flush()
        mirror.fetch(*patterns, below=name)


@contextmanager
def idempotent_start(parent: Path, key: str | None, record: str) -> Iterator[str | None]:
    """Yield the name of the folder that was started under `key`, or None if there is none.

    The key stays locked until the caller has started its folder, so of two processes one starts a folder and the other
    finds it. Without a key the result is always None.

    Args:
        parent: folder that contains the folders.
        key: idempotency key, or None.
        record: file in each folder whose entry `once` is the key: run.json or campaign.json.
    """
    if key is None:
        yield None
        return
    name = hashlib.sha256(f"{shared_place(parent.resolve())} {key}".encode()).hexdigest()[:16]
    lock = lock_folder() / f"once-{name}.lock"
    busy = f"'{key}' is being started by another process"
    with file_lock(lock, busy, wait_s=60), ExitStack() as holds:
        if found := mirror_of(parent.resolve()):
            mirror, _ = found
            holds.enter_context(leased(mirror.store, f"{mirror.root}/once-{name}/lease", busy, 60))
            mirror.fetch(f"*/{record}")
            holds.callback(mirror.flush)  # upload before another process reads
        for path in sorted(parent.glob(f"*/{record}")):
            with suppress(OSError, ValueError):
                if read_record(path).get("once") == key:
                    yield path.parent.name
                    return
        yield None


class RunFolder:
    """Folder of one run; `path.name` is the run's name."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    @classmethod
    def create(
        cls,
        parent: Path,
        name: str,
        digest: str,
        recipe_yaml: str,
        facts: dict[str, Any],
        write_start: WriteStart | None = None,
    ) -> RunFolder:
        """Create `parent/NAME-DIGEST6-K` with the first free K, which counts runs of the recipe."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for k in range(1, 10_000):
                run = cls(parent / f"{name}-{digest[:6]}-{k}")
                try:
                    run.path.mkdir()
                except FileExistsError:
                    continue
                if exists_remotely(run.path / "run.json"):  # created on another machine in the meantime
                    continue
                run.begin(recipe_yaml, facts, write_start)
                run.fetch()
                return run
        except OSError as error:
            raise UserError(
                f"cannot write the run folder below '{parent}': {error.strerror}; "
                "choose another folder with --runs or make room"
            ) from error
        raise UserError(f"'{parent}' already has 9,999 runs of this recipe; move some, or change --runs")

    def begin(self, recipe_yaml: str, facts: dict[str, Any], write_start: WriteStart | None = None) -> None:
        """Write recipe.yaml, the start weights, then run.json, which makes the folder a run."""
        write_atomically(self.path / "recipe.yaml", recipe_yaml)
        write_atomically(
            self.path / "run.json", sealed_json(facts | (write_start(self.path) if write_start else {}))
        )

    @classmethod
    def find(cls, parent: Path, name: str) -> RunFolder:
        """Return the run with the given name or path."""
        for path in (parent / name, user_path(name, "run"), *parent.glob(f"*/trials/{name}")):
            if (path / "run.json").is_file():
                run = cls(path)
                run.fetch()
                return run
        known = [p.name for p in parent.glob("*/") if (p / "run.json").is_file()]
        raise UserError(
            f"no run '{name}' in '{parent}'{nearest(name, known) if known else '; there are no runs'}"
        )

    def fetch(self, *, whole: bool = True) -> None:
        """Upload new files and download changed ones if runs are in an object store.

        Without `whole`, download only the files that workers change.
        """
        sync(self.path, ("*",) if whole else OF_WORKERS)

    def watch(self) -> None:
        """Download the files that workers change in the background, if in an object store."""
        if found := mirror_of(self.path):
            found[0].watch(found[1], *OF_WORKERS)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def rows(self) -> Path:
        """Folder of the records of samples, see runs/leaks.py."""
        return self.path / "rows"

    @property
    def evaluations(self) -> Path:
        """Folder of the evaluations of this run's models, see evaluation/cache.py."""
        return self.path / "evaluations"

    def locked(self, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Lock the run for this process, waiting up to `wait_s` seconds for another process."""
        return run_lock(self.path, f"run '{self.name}' is in use by another process", wait_s)

    def facts(self) -> dict[str, Any]:
        """Return the content of run.json."""
        try:
            return unsealed(read_record(self.path / "run.json", "status", "data_digest"))
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.path / 'run.json'}' is unreadable: {error}") from error

    def update(self, **changes: Any) -> None:
        """Change entries of run.json."""
        write_atomically(self.path / "run.json", sealed_json(self.facts() | changes))

    def recoveries(self) -> list[dict[str, Any]]:
        """Return the records of guard.json, one for each collapse that the guard detected."""
        try:
            return unsealed_all(parse_json((self.path / "guard.json").read_text()))
        except FileNotFoundError:
            return []
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"'{self.path / 'guard.json'}' is unreadable: {error}") from error

    def write_recoveries(self, records: list[dict[str, Any]]) -> None:
        """Replace guard.json."""
        write_atomically(self.path / "guard.json", dump_json(sealed_all(finite(records)), 1))

    def attempts(self) -> list[dict[str, Any]]:
        """Return the lines of attempts.jsonl: one per worker group."""
        return read_lines(self.path / "attempts.jsonl")

    def append_attempt(self, entry: dict[str, Any]) -> None:
        """Append a line to attempts.jsonl."""
        path = self.path / "attempts.jsonl"
        append_durably(path, next_line(path, {"time": time.time(), **entry}))

    def note_interruption(self, cause: str) -> None:
        """Record what ended a worker group."""
        write_atomically(self.path / "interruption.json", dump_json({"cause": cause}))

    def take_interruption(self) -> str:
        """Return and delete the record of what ended the last worker group; "" if there is none."""
        try:
            cause = str(read_record(self.path / "interruption.json", "cause")["cause"])
        except (OSError, ValueError):
            return ""
        (self.path / "interruption.json").unlink(missing_ok=True)
        return cause

    def request_stop(self) -> None:
        """Request that the training loop saves and stops at its next check."""
        (self.path / "stop").touch()

    def stop_requested(self) -> bool:
        """Return whether a stop was requested."""
        return (self.path / "stop").exists()

    def clear_stop(self) -> None:
        """Delete a previous stop request."""
        (self.path / "stop").unlink(missing_ok=True)

    def write_progress(self, values: dict[str, Any]) -> None:
        """Replace progress.json; write errors are ignored."""
        temporary = self.path / ".progress"
        with suppress(OSError):
            temporary.write_text(dump_json(values))
            os.replace(temporary, self.path / "progress.json")

    def progress(self) -> dict[str, Any] | None:
        """Return the content of progress.json, or None."""
        with suppress(OSError, ValueError):
            return read_record(self.path / "progress.json")
        return None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl without a truncated last line."""
        return read_lines(self.path / "metrics.jsonl")

    def training_seconds(self) -> float:
        """Return the training time of all epochs in seconds, without validation."""
        return float(sum(line["epoch_seconds"] for line in self.metrics()))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append the metrics of one finished epoch and fsync the file."""
        path = self.path / "metrics.jsonl"
        append_durably(path, next_line(path, line))

    def rewind_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl by the lines up to the checkpoint from which training resumes."""
        # Rewritten even if all lines are kept: a kill may have left a partial line at the end.
        text = "".join(dump_json(line) + "\n" for line in sealed_all(finite(lines)))
        write_atomically(self.path / "metrics.jsonl", text)
