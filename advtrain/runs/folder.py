"""What a run leaves on disk. The folder is the run: every process that touches it may die at any moment.

runs/digits-3f2a9c-1/
  recipe.yaml       the resolved recipe
  run.json          status, MLflow run, environment, how far it got
  metrics.jsonl     one line a finished epoch, written once its checkpoint is safe
  progress.json     the present epoch, rewritten about twice a second
  guard.json        each collapse that the guard noticed, and with what the run went on
  attempts.jsonl    one line a worker group: where it began, on which nodes, what ended the one before
  checkpoints/      step-00000120/, ...: see checkpoint.py
  evaluations/      what each evaluation of the run's models has found so far
  report/           report.html and report.json, samples.parquet, model_card.md, pictures
  tracking.json     how much of all this MLflow has
  stop              asks the workers to save and end
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from advtrain.errors import UserError, nearest
from advtrain.runs.object_store import leased
from advtrain.runs.storage import mirror_of, shared_place

_umask = os.umask(0o077)  # to ask is to set it, so once, before there are threads
os.umask(_umask)
#: Rights of the files that this user makes, which those of mkstemp and safetensors lack.
FILE_MODE = 0o666 & ~_umask


#: Files of a run that its workers change while the command that started it looks on.
OF_WORKERS = ("metrics.jsonl", "progress.json", "guard.json", "attempts.jsonl")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader, or a kill, sees the old content or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(descriptor, FILE_MODE)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # on a full disk nothing else says which
        raise


def append_durably(path: Path, text: str) -> None:
    """Add to a file; a kill may leave a part of the text at its end."""
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def file_lock(path: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` for this process, waiting so long for another to end; a dead holder's lock is free.

    Raises:
        UserError: another process holds it; `busy` says so.
    """
    deadline = time.monotonic() + wait_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise UserError(busy) from error
                time.sleep(0.2)
        yield


@contextmanager
def run_lock(folder: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock, and where it lies in an object store its lease there too."""
    with file_lock(folder / "lock", busy, wait_s), ExitStack() as holds:
        if found := mirror_of(folder):
            mirror, name = found
            path = f"{mirror.root}/{name}".rstrip("/") + "/lease"
            holds.enter_context(leased(mirror.store, path, busy, wait_s, mirror.give_up))
            sync(folder)  # what the last holder left
            holds.callback(mirror.flush)  # before the next one looks
        yield


def exists_remotely(file: Path) -> bool:
    """Whether an object store has a file that is not here."""
    found = mirror_of(file)
    return found is not None and found[0].has(found[1])


def sync(folder: Path, patterns: tuple[str, ...] = ("*",)) -> None:
    """Where a folder lies in an object store: send what is new here and fetch what matches; elsewhere nothing."""
    if found := mirror_of(folder.resolve()):
        mirror, name = found
        mirror.flush()
        mirror.fetch(*patterns, below=name)


@contextmanager
def idempotent_start(parent: Path, key: str | None, record: str) -> Iterator[str | None]:
    """Yield the name of the folder below `parent` that was begun for `key`, or None; hold the key until the caller has
    begun it, so that of two processes one begins and the other finds. Without a key there is never one.

    Args:
        record: the folder's file, run.json or campaign.json, whose entry `once` is the key.
    """
    if key is None:
        yield None
        return
    name = hashlib.sha256(f"{shared_place(parent.resolve())} {key}".encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"advtrain-{os.getuid()}-once-{name}.lock"
    busy = f"'{key}' is being begun by another process"
    with file_lock(lock, busy, wait_s=60), ExitStack() as holds:
        if found := mirror_of(parent.resolve()):
            mirror, _ = found
            holds.enter_context(leased(mirror.store, f"{mirror.root}/once-{name}/lease", busy, 60))
            mirror.fetch(f"*/{record}")
            holds.callback(mirror.flush)  # before another may look
        for path in sorted(parent.glob(f"*/{record}")):
            with suppress(OSError, ValueError):
                if json.loads(path.read_text()).get("once") == key:
                    yield path.parent.name
                    return
        yield None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines but the last if a kill has cut it; none if there is no file."""
    try:
        text = path.read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


class RunFolder:
    """One run's folder; `path.name` is the run's name everywhere."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    @classmethod
    def create(
        cls, parent: Path, name: str, digest: str, recipe_yaml: str, facts: dict[str, Any]
    ) -> RunFolder:
        """Make `parent/NAME-DIGEST6-K` with the first free K; K counts runs of the same recipe."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for k in range(1, 10_000):
                run = cls(parent / f"{name}-{digest[:6]}-{k}")
                try:
                    run.path.mkdir()
                except FileExistsError:
                    continue
                if exists_remotely(run.path / "run.json"):  # by a command elsewhere, in the meantime
                    continue
                run.begin(recipe_yaml, facts)
                run.fetch()
                return run
        except OSError as error:
            raise UserError(
                f"cannot write the run folder below '{parent}': {error.strerror}; "
                "choose another place with --runs or make room"
            ) from error
        raise UserError(f"'{parent}' holds 10,000 runs of this recipe; move some away")

    def begin(self, recipe_yaml: str, facts: dict[str, Any]) -> None:
        """Write recipe.yaml, then run.json, which makes the folder a run."""
        write_atomically(self.path / "recipe.yaml", recipe_yaml)
        write_atomically(self.path / "run.json", json.dumps(facts, indent=1))

    @classmethod
    def find(cls, parent: Path, name: str) -> RunFolder:
        """Return the run of that name, or at that path."""
        for path in (parent / name, Path(name), *parent.glob(f"*/trials/{name}")):
            if (path / "run.json").is_file():
                run = cls(path)
                run.fetch()
                return run
        known = [p.name for p in parent.glob("*/") if (p / "run.json").is_file()]
        raise UserError(
            f"no run '{name}' in '{parent}'{nearest(name, known) if known else '; there are none'}"
        )

    def fetch(self, *, whole: bool = True) -> None:
        """Where runs lie in an object store: send what is new here, and fetch what its workers have changed."""
        sync(self.path, ("*",) if whole else OF_WORKERS)

    def watch(self) -> None:
        """Where runs lie in an object store: fetch what the workers change, from now on, by itself."""
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
    def evaluations(self) -> Path:
        """Folder of the evaluations of this run's models, see evaluation/cache.py."""
        return self.path / "evaluations"

    def locked(self, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Hold the run for this process, waiting so long for another to end; a dead holder's lock is free."""
        return run_lock(self.path, f"run '{self.name}' is in use by another process", wait_s)

    def facts(self) -> dict[str, Any]:
        """Return run.json."""
        try:
            facts: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.path / 'run.json'}' is unreadable: {error}") from error
        return facts

    def update(self, **changes: Any) -> None:
        """Change entries of run.json."""
        write_atomically(self.path / "run.json", json.dumps(self.facts() | changes, indent=1))

    def recoveries(self) -> list[dict[str, Any]]:
        """Return the records of guard.json: one for each collapse."""
        try:
            records: list[dict[str, Any]] = json.loads((self.path / "guard.json").read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.path / 'guard.json'}' is unreadable: {error}") from error
        return records

    def write_recoveries(self, records: list[dict[str, Any]]) -> None:
        """Replace guard.json."""
        write_atomically(self.path / "guard.json", json.dumps(records, indent=1))

    def attempts(self) -> list[dict[str, Any]]:
        """Return the lines of attempts.jsonl: one a worker group."""
        return _lines(self.path / "attempts.jsonl")

    def append_attempt(self, entry: dict[str, Any]) -> None:
        """Add to attempts.jsonl."""
        append_durably(self.path / "attempts.jsonl", json.dumps({"time": time.time(), **entry}) + "\n")

    def note_interruption(self, cause: str) -> None:
        """Say what ended a worker group."""
        write_atomically(self.path / "interruption.json", json.dumps({"cause": cause}))

    def take_interruption(self) -> str:
        """Return what ended the last worker group, if anything did, and forget it."""
        try:
            cause = str(json.loads((self.path / "interruption.json").read_text())["cause"])
        except (OSError, ValueError, KeyError):
            return ""
        (self.path / "interruption.json").unlink(missing_ok=True)
        return cause

    def request_stop(self) -> None:
        """Ask the training loop, wherever it runs, to save and end at its next step."""
        (self.path / "stop").touch()

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return (self.path / "stop").exists()

    def clear_stop(self) -> None:
        """Forget a former `request_stop`."""
        (self.path / "stop").unlink(missing_ok=True)

    def write_progress(self, values: dict[str, Any]) -> None:
        """Replace progress.json; losing it does no harm."""
        temporary = self.path / ".progress"
        with suppress(OSError):
            temporary.write_text(json.dumps(values))
            os.replace(temporary, self.path / "progress.json")

    def progress(self) -> dict[str, Any] | None:
        """Return the last progress, or None."""
        try:
            values: dict[str, Any] = json.loads((self.path / "progress.json").read_text())
        except (OSError, ValueError):
            return None
        return values

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a line cut by a kill is left out."""
        return _lines(self.path / "metrics.jsonl")

    def training_seconds(self) -> float:
        """Return the seconds that its epochs took, without validations."""
        return float(sum(line["epoch_seconds"] for line in self.metrics()))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add the metrics of one finished epoch, durably."""
        append_durably(self.path / "metrics.jsonl", json.dumps(line) + "\n")

    def rewind_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Make metrics.jsonl hold exactly these lines: those up to the checkpoint that a resume starts from."""
        # Always rewritten: a kill may have left half a line, to which the next append would stick.
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
