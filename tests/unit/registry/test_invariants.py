"""Invariants of the registry under random sequences of operations, kills and alias changes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from advtrain.promotion import LostRaceError, move_champion, put_on_record
from advtrain.registry import Draft, read_chain, reconcile_aliases, replay
from advtrain.registry.aliases import record_registration
from advtrain.tracking.store import open_client
from tests.registry_kit import flags, make_evaluation

WRITES = (
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_registered_model_tag",
)
REPORT = make_evaluation(flags(100, 90), flags(100, 70)).report


class KilledError(BaseException):
    """Stands for a kill -9: no code after it runs."""


class Mortal:
    """A client whose process is killed at write number `at`, before or after the write arrives."""

    def __init__(self, client: Any, at: int, arrives: bool) -> None:
        self.client, self.left, self.arrives = client, at, arrives

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if name not in WRITES:
            return method

        def write(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0 and not self.arrives:
                raise KilledError
            result = method(*args, **kwargs)
            if self.left < 0:
                raise KilledError
            return result

        return write


kills = st.none() | st.tuples(st.integers(0, 6), st.booleans())


class Registry(RuleBasedStateMachine):
    """State machine of one registered model on a real store; `may_be` holds the possible champions."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        shutil.copy(self.template, self.folder / "mlflow.db")
        self.client = open_client(f"sqlite:///{self.folder / 'mlflow.db'}")
        self.client.create_registered_model("m")
        self.run_id = self.client.create_run("0").info.run_id
        self.number = 0
        self.may_be: set[str | None] = {None}
        self.past: list[str] = []

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def does(self, action: Any, kill: tuple[int, bool] | None, leads_to: str | None) -> None:
        """Run an action. If it is killed, the champion is either the old or the new one."""
        before = self.champion()
        try:
            action(self.client if kill is None else Mortal(self.client, *kill))
        except KilledError:
            self.may_be = {before, leads_to}
        else:
            self.may_be = {leads_to}

    def champion(self) -> str | None:
        return replay(read_chain(self.client, "m").decisions).champion

    @rule(kill=kills)
    def register(self, kill):
        made = self.client.create_model_version("m", f"runs:/{self.run_id}/model", run_id=self.run_id)
        self.number = int(made.version)
        version = str(made.version)
        self.does(lambda client: record_registration(client, "m", version, REPORT), kill, self.champion())

    @precondition(lambda self: self.number > 0)
    @rule(kill=kills, data=st.data())
    def promote(self, kill, data):
        version = str(data.draw(st.integers(1, self.number)))
        before = self.champion()
        if version == before:
            return
        draft = Draft("allowed", version, before, self.run_id)
        self.does(lambda client: move_champion(client, "m", draft), kill, version)

    @precondition(lambda self: self.number > 1)
    @rule(data=st.data())
    def promote_against_a_champion_that_is_gone(self, data):
        stale = str(data.draw(st.integers(1, self.number)))
        before = self.champion()
        if before is None or stale == before:
            return
        with pytest.raises(LostRaceError) as lost:
            move_champion(self.client, "m", Draft("allowed", "1", stale, self.run_id))
        assert lost.value.winner.version == before
        self.may_be = {before}

    @precondition(lambda self: self.number > 0)
    @rule(kill=kills)
    def refuse(self, kill):
        draft = Draft("refused", str(self.number), self.champion(), self.run_id)
        self.does(lambda client: put_on_record(client, "m", draft), kill, self.champion())

    @precondition(lambda self: replay(read_chain(self.client, "m").decisions).previous is not None)
    @rule(kill=kills)
    def roll_back(self, kill):
        standing = replay(read_chain(self.client, "m").decisions)
        draft = Draft("rolled_back", standing.previous, standing.champion, self.run_id)
        self.does(lambda client: move_champion(client, "m", draft), kill, standing.previous)

    @precondition(lambda self: self.number > 0 and self.champion() is not None)
    @rule(alias=st.sampled_from(["champion", "previous"]), data=st.data())
    def a_person_moves_an_alias(self, alias, data):
        version = data.draw(st.none() | st.integers(1, self.number))
        if version is None:
            self.client.delete_registered_model_alias("m", alias)
        else:
            self.client.set_registered_model_alias("m", alias, str(version))
        reconcile_aliases(self.client, "m")

    @invariant()
    def the_record_is_whole_and_says_who(self):
        chain = read_chain(self.client, "m")
        assert chain.faults == []
        standing = replay(chain.decisions)
        assert standing.champion in self.may_be
        if self.past:
            assert standing.champion is not None, "there was a champion, and there is none"
        if standing.champion is not None:
            self.past.append(standing.champion)
        # The next command repairs the aliases after a kill.
        aliases = {a: str(v) for a, v in (self.client.get_registered_model("m").aliases or {}).items()}
        if len(standing.past_champions) > 1:
            assert "champion" in aliases, "never none, not even before the repair"
        reconcile_aliases(self.client, "m")
        aliases = {a: str(v) for a, v in (self.client.get_registered_model("m").aliases or {}).items()}
        assert aliases.get("champion") == standing.champion
        assert aliases.get("previous") == standing.previous
        assert aliases.get("challenger") is None or aliases["challenger"] != standing.champion


def test_registry_invariants_hold_for_random_operations(store):
    Registry.template = Path(store.removeprefix("sqlite:///"))
    few = settings(
        max_examples=10,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    run_state_machine_as_test(Registry, settings=few)
