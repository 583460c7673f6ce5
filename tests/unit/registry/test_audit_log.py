"""The audit log: the first of two concurrent decisions counts, and tampering is detected."""

from __future__ import annotations

import json
import threading

import pytest

from advtrain.errors import UserError
from advtrain.registry import ConflictError, Draft, append, log_name, read_chain, reconcile_aliases, replay
from advtrain.registry.audit_log import DIGEST_TAG, RECORD_TAG


@pytest.fixture
def chain(client, run_id, make):
    """Write five decisions about m: version 1 first, 2 refused, 3 promoted, rolled back to 1."""
    for _ in range(3):
        make()
    for kind, version, before in (
        ("first", "1", None),
        ("asked", "2", "1"),
        ("refused", "2", "1"),
        ("allowed", "3", "1"),
        ("rolled_back", "1", "3"),
    ):
        append(client, "m", Draft(kind, version, before, run_id, "for a reason"), read_chain(client, "m"))
    return reconcile_aliases(client, "m")[0]


def test_read_chain_returns_decisions_in_order(client, chain):
    read = read_chain(client, "m")
    assert read.faults == []
    assert [d.sequence for d in read.decisions] == [1, 2, 3, 4, 5]
    assert [d.previous for d in read.decisions[1:]] == [d.digest for d in read.decisions[:-1]]
    assert replay(read.decisions).champion == "1"
    assert replay(read.decisions).previous is None


def test_append_raises_conflict_when_another_decision_came_first(client, chain, run_id):
    append(client, "m", Draft("allowed", "2", "1", run_id, "mine"), chain)
    with pytest.raises(ConflictError):
        append(client, "m", Draft("allowed", "3", "1", run_id, "too late"), chain)
    read = read_chain(client, "m")
    assert read.faults == []
    assert replay(read.decisions).champion == "2"
    assert "too late" not in {d.reason for d in read.decisions}
    assert (
        len(client.search_model_versions(f"name = '{log_name('m')}'")) == 7
    )  # the late one is stored but void


def test_concurrent_appends_lose_no_decision(client, chain, run_id):
    def write(who: int) -> None:
        while True:
            try:
                append(client, "m", Draft("asked", "2", "1", run_id, str(who)), read_chain(client, "m"))
                return
            except ConflictError:
                continue

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = read_chain(client, "m")
    assert read.faults == []
    assert {d.reason for d in read.decisions[5:]} == {str(n) for n in range(6)}


def record(client, number):
    return json.loads(client.get_model_version(log_name("m"), number).tags[RECORD_TAG])


def rewrite(client, number, text, digest=None):
    client.set_model_version_tag(log_name("m"), number, RECORD_TAG, text)
    if digest is not None:
        client.set_model_version_tag(log_name("m"), number, DIGEST_TAG, digest)


def alter(client):
    rewrite(client, 3, json.dumps(record(client, 3) | {"reason": "it was fine"}))


def alter_with_digest(client):
    from advtrain.registry import Decision

    forged = Decision(**record(client, 3) | {"kind": "allowed"})
    rewrite(client, 3, forged.text, forged.digest)


def swap(client):
    tags = [client.get_model_version(log_name("m"), n).tags for n in (2, 3)]
    for number, other in ((3, tags[0]), (2, tags[1])):
        rewrite(client, number, other[RECORD_TAG], other[DIGEST_TAG])


def delete(client):
    client.delete_model_version(log_name("m"), 3)


def delete_last(client):
    client.delete_model_version(log_name("m"), 5)


def delete_all(client):
    client.delete_registered_model(log_name("m"))


def empty(client):
    client.delete_model_version_tag(log_name("m"), 2, RECORD_TAG)


@pytest.mark.parametrize(
    ("tamper", "word"),
    [
        (alter, "record 3 was altered"),
        (alter_with_digest, "record 4 was altered or moved"),
        (swap, "record 2 was altered or moved"),
        (delete, "record 3 is missing"),
        (delete_last, "missing from the end: there were 5"),
        (delete_all, "missing from the end: there were 5"),
        (empty, "record 2 was altered"),
    ],
)
def test_tampering_is_detected_and_blocks_decisions(client, chain, tamper, word):
    tamper(client)
    assert any(word in fault for fault in read_chain(client, "m").faults)
    with pytest.raises(UserError, match="is damaged"):
        reconcile_aliases(client, "m")


def test_record_of_another_model_is_a_fault(client, chain, run_id):
    client.create_registered_model("n")
    client.create_model_version("n", f"runs:/{run_id}/model", run_id=run_id)
    client.create_registered_model(log_name("n"))
    stolen = client.get_model_version(log_name("m"), 1)
    client.create_model_version(log_name("n"), "runs:/x/report", tags=dict(stolen.tags))
    assert read_chain(client, "n").faults


def test_append_writes_one_decision_when_response_is_lost(client, chain, run_id, monkeypatch):
    """The write arrives but its response is lost, as when a server dies in between."""
    real = client.create_model_version

    def deaf(*args, **kwargs):
        real(*args, **kwargs)
        raise ConnectionError("no answer")

    monkeypatch.setattr(client, "create_model_version", deaf)
    append(client, "m", Draft("allowed", "2", "1", run_id), chain)
    read = read_chain(client, "m")
    assert len(read.decisions) == 6
    assert replay(read.decisions).champion == "2"


def test_append_raises_error_when_store_rejects_writes(client, chain, run_id, monkeypatch):
    def broken(*args, **kwargs):
        raise ConnectionError("gone")

    monkeypatch.setattr(client, "create_model_version", broken)
    monkeypatch.setattr("advtrain.registry.audit_log.ATTEMPTS", 2)
    with pytest.raises(UserError, match="cannot be recorded: gone"):
        append(client, "m", Draft("allowed", "2", "1", run_id), chain)


def test_reconcile_adopts_champion_that_predates_audit_log(client, make):
    make()
    number = make()
    client.set_registered_model_alias("m", "champion", number)
    assert reconcile_aliases(client, "m")[0].decisions == [], "looking is not deciding"
    with pytest.raises(UserError, match="advtrain did not register it"):
        reconcile_aliases(client, "m", adopt=True)
    client.set_model_version_tag("m", number, "advtrain.data_digest", "d")
    chain, notes = reconcile_aliases(client, "m", adopt=True)
    assert [d.kind for d in chain.decisions] == ["adopted"]
    assert replay(chain.decisions).champion == "2"
    assert notes == []


@pytest.mark.parametrize("moved", ["3", None])
def test_reconcile_restores_moved_alias_and_reports_it(client, chain, moved):
    if moved:
        client.set_registered_model_alias("m", "champion", moved)
    else:
        client.delete_registered_model_alias("m", "champion")
    _, notes = reconcile_aliases(client, "m")
    assert len(notes) == 1
    assert "alias champion reset from" in notes[0]
    assert str(client.get_model_version_by_alias("m", "champion").version) == "1"


def test_reconcile_reports_deleted_champion(client, chain):
    client.delete_model_version("m", "1")
    _, notes = reconcile_aliases(client, "m")
    assert "version 1 of 'm' is recorded as champion, but it was deleted" in notes[0]


def test_previous_alias_is_rollback_target(client, run_id, make):
    for _ in range(3):
        make()

    def move(kind, version):
        chain = read_chain(client, "m")
        append(client, "m", Draft(kind, version, replay(chain.decisions).champion, run_id), chain)
        standing = replay(reconcile_aliases(client, "m")[0].decisions)
        return standing.champion, standing.previous

    assert move("first", "1") == ("1", None)
    assert move("allowed", "2") == ("2", "1")
    assert move("allowed", "3") == ("3", "2")
    assert move("rolled_back", "2") == ("2", "1")
    assert move("rolled_back", "1") == ("1", None)
    assert move("allowed", "3") == ("3", "1")
    assert move("rolled_back", "2") == ("2", "3")
    assert {a: str(v) for a, v in client.get_registered_model("m").aliases.items()} == {
        "champion": "2",
        "previous": "3",
    }
