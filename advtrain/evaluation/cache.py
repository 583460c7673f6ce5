"""On-disk cache of an evaluation, which stores the result of each work item at once.

    evaluations/mnist-linf-0.3-1f0c2a9b77de/
      evaluation.json   everything that affects a result: model, data, split, attacks, threat model, seed, versions
      units.jsonl       one line per finished work item
      report/           the report, written when all work items are finished

The folder's name contains the digest of evaluation.json, so a restarted evaluation finds its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation.worst_case import Runner, WorkItem, WorkResult
from advtrain.runs.folder import append_durably, file_lock, write_atomically
from advtrain.runs.sealed import read_lines, sealed, sealed_all


class ResultCache:
    """Cached results of work items, by key.

    A line that was truncated by a kill is ignored, and its item runs again.
    """

    def __init__(self, parent: Path, label: str, facts: dict[str, Any]) -> None:
        self.facts = json.dumps(facts, indent=1, sort_keys=True)
        digest = hashlib.sha256(self.facts.encode()).hexdigest()
        self.path = parent / f"{label}-{digest[:12]}"
        self.results: dict[str, WorkResult] = {}
        self.all_known = True
        self._last = ""  # digest of the last line

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder for this process and read the cached results.

        `all_known` stays true as long as every requested item is in the cache.

        Raises:
            UserError: another process has locked the folder, or the folder is not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except OSError as error:
            raise UserError(
                f"cannot write '{self.path}': {error.strerror}; choose another folder with --runs"
            ) from error
        with file_lock(
            self.path / "lock", f"the evaluation '{self.path.name}' is already running in another process"
        ):
            self._read()
            write_atomically(self.path / "evaluation.json", self.facts)
            yield

    def through(self, run: Runner) -> Runner:
        """Return a runner that passes only uncached items to `run` and caches their results.

        Cached items are yielded first, with `is_cached` set.
        """

        def stored(items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
            missing = []
            for item in items:
                if item.key in self.results:
                    yield replace(item, is_cached=True), self.results[item.key]
                else:
                    missing.append(item)
            self.all_known = self.all_known and not missing
            for item, result in run(missing):
                self._add(item.key, result)
                yield item, result

        return stored

    def _read(self) -> None:
        path = self.path / "units.jsonl"
        units = read_lines(path)
        try:
            self.results = {unit["unit"]: unit["result"] for unit in units}
        except (KeyError, TypeError) as error:
            raise UserError(
                f"'{path}' is damaged: a line has no {error}; delete it to evaluate again"
            ) from error
        # Always rewrite the file: the next append would extend a partial line that a kill left behind.
        lines = sealed_all(units)
        self._last = str(lines[-1]["digest"]) if lines else ""
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))

    def _add(self, key: str, result: WorkResult) -> None:
        made = sealed({"unit": key, "result": result}, self._last)
        self._last, line = str(made["digest"]), json.dumps(made) + "\n"
        append_durably(self.path / "units.jsonl", line)
        self.results[key] = json.loads(line)["result"]
