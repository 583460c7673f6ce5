"""Who may register a model cannot make it champion: decisions of the gate are signed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from advtrain.errors import UserError
from advtrain.promotion import load_policy
from advtrain.registry import (
    Draft,
    append,
    find_recorded,
    load_registered,
    log_name,
    read_chain,
    reconcile_aliases,
    registration,
    replay,
    unsigned,
)
from advtrain.registry.audit_log import SIGNATURE_TAG
from advtrain.registry.signing import public_key
from advtrain.tracking.store import actor, open_client, user
from pipelines.cli.options import POLICIES
from pipelines.promote import PromotionRequest, promote, rollback
from pipelines.workspace import Workspace
from tests.cli_kit import history
from tests.registry_kit import aliases, flags, make_archive, make_evaluation, make_version

DEFAULT = load_policy(POLICIES / "default.yaml").model_copy(update={"repeat_units": 0})
REQUIRED = DEFAULT.model_copy(update={"signed": "required"})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two key pairs, made as the documentation says."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("gate", "other"):
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return make_archive(f"sqlite:///{folder / 'mlflow.db'}", folder / "model")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    for name in ("ADVTRAIN_SIGNING_KEY", "ADVTRAIN_PUBLIC_KEY", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)
    return Workspace(tmp_path / "runs", f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path)


def as_gate(monkeypatch: pytest.MonkeyPatch, keys: Path) -> None:
    monkeypatch.setenv("ADVTRAIN_SIGNING_KEY", str(keys / "gate.pem"))
    monkeypatch.setenv("ADVTRAIN_PUBLIC_KEY", str(keys / "gate.pub"))


def as_trainer(monkeypatch: pytest.MonkeyPatch, keys: Path) -> None:
    monkeypatch.delenv("ADVTRAIN_SIGNING_KEY", raising=False)
    monkeypatch.setenv("ADVTRAIN_PUBLIC_KEY", str(keys / "gate.pub"))


def register(workspace: Workspace, archive: Path, robust: int) -> str:
    found = make_evaluation(flags(1000, 950), flags(1000, robust))
    return make_version(workspace.tracking_uri, archive, workspace.runs.parent, found)


def forge(workspace: Workspace, version: str) -> Any:
    """Write an allowed decision as anyone with write access to the store can."""
    client = open_client(workspace.tracking_uri)
    chain = read_chain(client, "digits")
    champion = replay(chain.decisions).champion
    return append(client, "digits", Draft("allowed", version, champion, None, "forged"), chain)


def test_trainer_registers_and_only_the_gate_promotes(workspace, archive, keys, monkeypatch, capsys):
    as_trainer(monkeypatch, keys)
    version = register(workspace, archive, 700)
    assert "champion" not in aliases(workspace.tracking_uri), "the first champion must be signed too"
    with pytest.raises(UserError, match="ADVTRAIN_SIGNING_KEY"):
        promote("digits", workspace, PromotionRequest(version, REQUIRED))
    as_gate(monkeypatch, keys)
    first = promote("digits", workspace, PromotionRequest(version, REQUIRED))
    assert first.status == "promoted", first.findings
    better = register(workspace, archive, 800)
    assert promote("digits", workspace, PromotionRequest(better, REQUIRED)).status == "promoted"
    assert rollback("digits", workspace, to=None, reason="test").is_champion
    client = open_client(workspace.tracking_uri)
    assert unsigned(read_chain(client, "digits").decisions, public_key()) == []
    as_trainer(monkeypatch, keys)
    assert history("digits", workspace, verify=True) == 0
    assert "are signed with the key" in capsys.readouterr().out


def test_forged_decision_moves_nothing(workspace, archive, keys, monkeypatch, capsys):
    as_gate(monkeypatch, keys)
    register(workspace, archive, 700)
    worse = register(workspace, archive, 500)
    assert aliases(workspace.tracking_uri)["champion"] == "1"
    monkeypatch.delenv("ADVTRAIN_SIGNING_KEY")
    monkeypatch.delenv("ADVTRAIN_PUBLIC_KEY")
    forge(workspace, worse)
    as_trainer(monkeypatch, keys)
    with pytest.raises(UserError, match="version 2 champion, is not signed"):
        reconcile_aliases(open_client(workspace.tracking_uri), "digits")
    assert aliases(workspace.tracking_uri)["champion"] == "1"
    assert history("digits", workspace, verify=True) == 1
    assert "is not signed" in capsys.readouterr().out


def test_policy_with_public_key_stops_before_an_alias_moves(workspace, archive, keys, monkeypatch):
    as_gate(monkeypatch, keys)
    register(workspace, archive, 700)
    worse = register(workspace, archive, 500)
    monkeypatch.delenv("ADVTRAIN_PUBLIC_KEY")
    monkeypatch.setenv("ADVTRAIN_SIGNING_KEY", str(keys / "other.pem"))
    forge(workspace, worse)
    monkeypatch.setenv("ADVTRAIN_SIGNING_KEY", str(keys / "gate.pem"))
    policy = REQUIRED.model_copy(update={"public_key": (keys / "gate.pub").read_text()})
    with pytest.raises(UserError, match="has a signature of another key"):
        promote("digits", workspace, PromotionRequest("1", policy))
    assert aliases(workspace.tracking_uri)["champion"] == "1"


def test_signature_of_one_decision_does_not_fit_another(workspace, archive, keys, monkeypatch):
    as_gate(monkeypatch, keys)
    register(workspace, archive, 700)
    register(workspace, archive, 500)
    client = open_client(workspace.tracking_uri)
    (first,) = client.search_model_versions(f"name = '{log_name('digits')}'")
    monkeypatch.delenv("ADVTRAIN_SIGNING_KEY")
    monkeypatch.delenv("ADVTRAIN_PUBLIC_KEY")
    forge(workspace, "2")
    client.set_model_version_tag(log_name("digits"), "2", SIGNATURE_TAG, first.tags[SIGNATURE_TAG])
    as_trainer(monkeypatch, keys)
    assert "another key" in read_chain(client, "digits").faults[0]


def test_unsigned_history_says_so(workspace, archive, capsys):
    register(workspace, archive, 700)
    assert history("digits", workspace, verify=True) == 0
    assert "not signed: 1 decisions that move an alias" in capsys.readouterr().out


def test_registrations_are_in_a_log_of_their_own(workspace, archive):
    for robust in (700, 710, 720):
        register(workspace, archive, robust)
    client = open_client(workspace.tracking_uri)
    chain = read_chain(client, "digits")
    assert [d.kind for d in chain.decisions] == ["allowed"]
    assert [d.kind for d in chain.registrations] == ["registered"] * 3
    assert len(client.search_model_versions("name = 'digits.registrations'")) == 3


def test_actor_is_the_account_at_the_server_or_the_user_id(monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody else")
    monkeypatch.setenv("USER", "somebody else")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    assert user() != "somebody else"
    assert actor("http://host") == user()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "gate")
    assert actor("http://host") == "gate"
    assert actor("sqlite:///x.db") == user()


@pytest.mark.parametrize("content", ["no key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"])
def test_bad_key_is_an_error(content, tmp_path, monkeypatch):
    (tmp_path / "key").write_text(content)
    monkeypatch.setenv("ADVTRAIN_PUBLIC_KEY", str(tmp_path / "key"))
    with pytest.raises(UserError, match="not a public key"):
        public_key()


def test_refusal_cannot_replace_the_files_of_the_champion(workspace, archive, keys, monkeypatch):
    """The record of a refusal needs no signature, so it must not count as evidence on files."""
    as_gate(monkeypatch, keys)
    register(workspace, archive, 700)
    client = open_client(workspace.tracking_uri)
    chain = read_chain(client, "digits")
    as_trainer(monkeypatch, keys)
    evidence = {"files_digest": "0" * 64, "origin": {"commit": "forged"}, "run_id": "forged"}
    for kind in ("refused", "asked"):
        append(
            client,
            "digits",
            Draft(kind, "1", "1", None, "x", evidence=evidence),
            read_chain(client, "digits"),
        )
    append(
        client,
        "digits",
        Draft("registered", "1", "1", None, "x", evidence=evidence),
        read_chain(client, "digits"),
    )
    assert registration(read_chain(client, "digits"), "1") == registration(chain, "1")
    assert find_recorded(client, "digits", "1", read_chain(client, "digits")) is not None


def test_alias_set_by_hand_is_not_adopted(workspace, archive, keys, monkeypatch):
    as_trainer(monkeypatch, keys)
    register(workspace, archive, 700)
    register(workspace, archive, 800)
    client = open_client(workspace.tracking_uri)
    client.set_registered_model_alias("digits", "champion", "1")
    with pytest.raises(UserError, match="no signed decision"):
        load_registered("models:/digits@champion", workspace.tracking_uri)
    as_gate(monkeypatch, keys)
    assert promote("digits", workspace, PromotionRequest("2", DEFAULT)).status == "promoted"
    assert [d.kind for d in read_chain(client, "digits").decisions] == ["asked", "allowed"]
    assert aliases(workspace.tracking_uri)["champion"] == "2"


def test_policy_refuses_an_alias_without_a_signed_decision(workspace, archive, keys, monkeypatch):
    as_trainer(monkeypatch, keys)
    register(workspace, archive, 700)
    open_client(workspace.tracking_uri).set_registered_model_alias("digits", "champion", "1")
    monkeypatch.delenv("ADVTRAIN_PUBLIC_KEY")
    monkeypatch.setenv("ADVTRAIN_SIGNING_KEY", str(keys / "gate.pem"))
    policy = REQUIRED.model_copy(update={"public_key": str(keys / "gate.pub")})
    with pytest.raises(UserError, match="without a signed decision"):
        promote("digits", workspace, PromotionRequest("1", policy))
