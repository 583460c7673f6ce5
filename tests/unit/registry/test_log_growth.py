"""A command reads the audit log once, however long it is; its later reads fetch new records only."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from advtrain.errors import UserError
from advtrain.registry import Decision, Draft, append, read_chain, reconcile_aliases, replay
from advtrain.registry.aliases import record_registration
from advtrain.registry.decision import Replay
from advtrain.registry.stored_log import DIGEST_TAG, PAGE, RECORD_TAG, REGISTRATIONS, SUFFIX, genesis
from tests.registry_kit import flags, make_evaluation

REPORT = make_evaluation(flags(100, 90), flags(100, 70)).report


class Page(list[Any]):
    token: str | None = None


class Store:
    """Registry in memory with the calls that the audit log makes; counts the versions that searches return."""

    tracking_uri = "sqlite:///memory.db"

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.versions: dict[str, list[Any]] = {}
        self.returned = self.searches = 0

    def create_registered_model(self, name: str, description: str | None = None) -> None:
        self.models.setdefault(name, SimpleNamespace(name=name, tags={}, aliases={}))
        self.versions.setdefault(name, [])

    def get_registered_model(self, name: str) -> Any:
        return self.models[name]

    def create_model_version(
        self, name: str, source: str, run_id: str | None = None, tags: Any = (), description: str = ""
    ) -> Any:
        number = len(self.versions[name]) + 1
        made = SimpleNamespace(name=name, version=number, run_id=run_id, tags=dict(tags))
        self.versions[name].append(made)
        return made

    def get_model_version(self, name: str, version: str) -> Any:
        return self.versions[name][int(version) - 1]

    def search_model_versions(
        self, text: str, max_results: int, order_by: list[str], page_token: str | None = None
    ) -> Page:
        found = self.versions.get(text.split("'")[1], [])
        start = int(page_token or 0)
        page = Page((found[::-1] if "DESC" in order_by[0] else found)[start : start + max_results])
        page.token = str(start + max_results) if start + max_results < len(found) else None
        self.returned, self.searches = self.returned + len(page), self.searches + 1
        return page

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags={}))

    def set_registered_model_tag(self, name: str, tag: str, value: str) -> None:
        self.models[name].tags[tag] = value

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.models[name].aliases[alias] = version

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self.models[name].aliases.pop(alias, None)


def filled(count: int) -> Store:
    """Return a store with `count` versions of m, each registered and then made champion."""
    store = Store()
    for name in ("m", "m" + REGISTRATIONS, "m" + SUFFIX):
        store.create_registered_model(name)
    last, champion = {REGISTRATIONS: genesis("m"), SUFFIX: genesis("m")}, None
    for number in range(1, count + 1):
        store.create_model_version("m", "", f"run{number}", {"advtrain.files_digest": "d"})
        for suffix, kind in ((REGISTRATIONS, "registered"), (SUFFIX, "allowed")):
            decision = Decision(
                kind=kind,
                model="m",
                version=str(number),
                champion=champion if suffix == SUFFIX else None,
                actor="a",
                time="2026-01-01T00:00:00+00:00",
                evidence={"files_digest": "d", "run_id": f"run{number}"},
                sequence=number,
                previous=last[suffix],
            )
            last[suffix] = decision.digest
            store.create_model_version(
                "m" + suffix, "", tags={RECORD_TAG: decision.text, DIGEST_TAG: decision.digest}
            )
        champion = str(number)
    reconcile_aliases(store, "m")
    store.create_model_version("m", "", "new", {})
    store.returned = store.searches = 0
    return store


class Counter:
    """Counts the calls of a function that it replaces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str, real: Any) -> None:
        self.calls = 0

        def counted(*args: Any) -> Any:
            self.calls += 1
            return real(*args)

        monkeypatch.setattr(target, counted)


@pytest.mark.parametrize("count", [100, 1_000, 10_000])
def test_registration_reads_the_log_once(count, monkeypatch):
    from advtrain.registry.stored_log import _parse

    store = filled(count)
    parsed = Counter(monkeypatch, "advtrain.registry.stored_log._parse", _parse)
    applied = Counter(monkeypatch, "advtrain.registry.decision.Replay.apply", Replay.apply)
    assert record_registration(store, "m", str(count + 1), REPORT) is False
    assert parsed.calls == 2 * count + 2, "each record of the two logs, and the new one twice"
    assert store.returned <= 2 * count + 200
    assert store.searches <= 2 * -(-count // PAGE) + 14
    assert applied.calls <= 7 * count
    assert read_chain(store, "m").registrations[-1].version == str(count + 1)
    assert store.models["m"].aliases == {
        "champion": str(count),
        "previous": str(count - 1),
        "challenger": str(count + 1),
    }


def test_each_command_finds_an_old_record_that_was_altered():
    store = filled(100)
    record = store.versions["m" + REGISTRATIONS][2]
    record.tags[RECORD_TAG] = json.dumps(json.loads(record.tags[RECORD_TAG]) | {"reason": "another"})
    assert "registrations: record 3 was altered" in read_chain(store, "m").faults[0]
    with pytest.raises(UserError, match="record 3 was altered"):
        record_registration(store, "m", "101", REPORT)


def test_later_read_of_a_command_is_that_of_the_whole_log(monkeypatch):
    from advtrain.registry.stored_log import _parse

    store = filled(50)
    chain = read_chain(store, "m")
    parsed = Counter(monkeypatch, "advtrain.registry.stored_log._parse", _parse)
    for number in range(60):  # more than a page of new records
        append(store, "m", Draft("asked", "51", "50", "new", str(number)), read_chain(store, "m", chain))
    parsed.calls = 0
    found = read_chain(store, "m", chain)
    assert parsed.calls == 60
    assert found == read_chain(store, "m")
    assert len(chain.decisions) == 50
    store.versions["m" + SUFFIX][-1].tags[RECORD_TAG] = "{}"
    assert "record 110 was altered" in read_chain(store, "m", chain).faults[0]
    del store.versions["m" + SUFFIX][55]
    assert "record 56 is missing" in read_chain(store, "m", chain).faults


def replay_by_definition(decisions: list[Decision]) -> tuple[str, ...]:
    line: tuple[str, ...] = ()
    for decision in decisions:
        version = decision.version
        if decision.kind == "rolled_back" and version in line:
            line = line[: line.index(version) + 1]
        elif not line or line[-1] != version:
            line = (*(v for v in line if v != version), version)
    return line


def test_replay_keeps_the_champion_history():
    generator = random.Random(0)
    decisions = [
        Decision.model_construct(kind=generator.choice(("allowed", "allowed", "rolled_back")), version=str(v))
        for v in (generator.randrange(12) for _ in range(300))
    ]
    for count in range(len(decisions) + 1):
        standing = replay(decisions[:count])
        assert standing.champion_history == replay_by_definition(decisions[:count])
        assert standing.past_champions == tuple(d.version for d in decisions[:count])
