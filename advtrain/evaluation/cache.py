"""The cache of an evaluation: a folder to which each finished work item is added at once.

    evaluations/mnist-linf-0.3-1f0c2a9b77de/
      evaluation.json   everything that shapes a result: model, data, split, attacks, threat model, seed, versions
      units.jsonl       one line for each finished work item
      report/           the report, once all is done

The folder's name holds the digest of evaluation.json, so that the same evaluation, started again, finds its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation.worst_case import Runner, WorkItem, WorkResult
from advtrain.runs.folder import append_durably, file_lock, write_atomically


class ResultCache:
    """Work items and their results, by key. A line cut by a kill is done again."""

    def __init__(self, parent: Path, label: str, facts: dict[str, Any]) -> None:
        self.facts = json.dumps(facts, indent=1, sort_keys=True)
        digest = hashlib.sha256(self.facts.encode()).hexdigest()
        self.path = parent / f"{label}-{digest[:12]}"
        self.results: dict[str, WorkResult] = {}
        self.all_known = True

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder for this process, and read what it has; `all_known` says whether that was enough.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except OSError as error:
            raise UserError(
                f"cannot write '{self.path}': {error.strerror}; choose another place with --runs"
            ) from error
        with file_lock(
            self.path / "lock", f"the evaluation '{self.path.name}' is under way in another process"
        ):
            self._read()
            write_atomically(self.path / "evaluation.json", self.facts)
            yield

    def through(self, run: Runner) -> Runner:
        """Return a runner that asks `run` only for items that are not stored yet, and stores what it gives."""

        def stored(items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
            missing = []
            for item in items:
                if item.key in self.results:
                    yield item, self.results[item.key]
                else:
                    missing.append(item)
            self.all_known = self.all_known and not missing
            for item, result in run(missing):
                self._add(item.key, result)
                yield item, result

        return stored

    def _read(self) -> None:
        path = self.path / "units.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        for line in lines:
            entry = json.loads(line)
            self.results[entry["unit"]] = entry["result"]
        # Always rewritten: a kill may have left half a line, to which the next one would stick.
        write_atomically(path, "".join(line + "\n" for line in lines))

    def _add(self, key: str, result: WorkResult) -> None:
        line = json.dumps({"unit": key, "result": result}) + "\n"
        append_durably(self.path / "units.jsonl", line)
        self.results[key] = json.loads(line)["result"]
