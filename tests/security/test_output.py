"""What a page, a card or a terminal shows is never code or a control sequence of somebody else."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

from advtrain.evaluation.html import fill
from advtrain.evaluation.model_card import build_card
from advtrain.evaluation.report_html import build_page
from advtrain.registry import Decision, build_dashboard
from advtrain.runs.lineage import Ancestor, ancestors_tag
from advtrain.text import one_line, printable
from pipelines.cli.console import SafeConsole
from tests.registry_kit import flags, make_evaluation

ATTACK = "'\"><script>alert(1)</script><img src=x onerror=alert(1)> onmouseover=alert(1) javascript:alert(1)"


class Tags(HTMLParser):
    """Collects what a browser would run."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.active.append(tag)
        for name, value in attributes:
            if name.startswith("on") or (value or "").strip().lower().startswith("javascript:"):
                self.active.append(f"{tag} {name}={value}")


def active(page: str) -> list[str]:
    tags = Tags()
    tags.feed(page)
    return tags.active


def test_fill_escapes_all_but_html():
    assert fill("<p class='{}'>{}{}</p>", "a'b", "<i>", fill("<b>{}</b>", "x & y")) == (
        "<p class='a&#x27;b'>&lt;i&gt;<b>x &amp; y</b></p>"
    )


def hostile_report() -> Any:
    report = make_evaluation(flags(40, 38), flags(40, 20)).report
    classes = [c.model_copy(update={"name": ATTACK}) for c in report.per_class]
    checks = [
        c.model_copy(update={"question": ATTACK, "evidence": ATTACK, "advice": ATTACK}) for c in report.checks
    ]
    words = {
        "model": ATTACK,
        "data": ATTACK,
        "command": ATTACK,
        "versions": {ATTACK: ATTACK},
        "split": ATTACK,
    }
    attacks = [a.model_copy(update={"name": ATTACK}) for a in report.attacks]
    return report.model_copy(update=words | {"per_class": classes, "checks": checks, "attacks": attacks})


def test_report_page_and_card_run_nothing():
    failure = {"label": 0, "predicted_as": 1, "distance": 0.1, "images": [ATTACK] * 3}
    page = build_page(hostile_report(), [failure])
    assert ATTACK[5:30] not in page
    assert active(page) == []
    card = build_card(hostile_report(), ancestors=[Ancestor("start", ATTACK, ATTACK)])
    assert "<script" not in card
    assert active(card) == []


class Client:
    """MLflow client of a store in which every text is hostile."""

    def get_registered_model(self, name: str) -> Any:
        return SimpleNamespace(aliases={"champion": "1", ATTACK: "1"}, tags={})

    def search_model_versions(self, text: str, **_: Any) -> Any:
        page = [] if ".decisions" in text else [self.version()]
        return type("Page", (list,), {"token": None})(page)

    def version(self) -> Any:
        keys = ("suite", "threat", "trust", "robust_accuracy", "clean_accuracy", "robust_interval")
        tags = {f"advtrain.{key}": ATTACK for key in keys}
        references = [ATTACK, f"models:/{ATTACK}/1"]
        tags |= ancestors_tag(Ancestor(ATTACK, reference, ATTACK) for reference in references)  # type: ignore[arg-type]
        return SimpleNamespace(version="1", tags=tags, run_id=ATTACK, name=ATTACK, aliases=[])

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(experiment_id=ATTACK, run_name=ATTACK))


def test_dashboard_of_a_hostile_store_runs_nothing():
    page = build_dashboard(Client(), [ATTACK], ATTACK, ATTACK)
    assert "javascript" in page
    assert active(page) == []


RULE = {"rule": "suite", "verdict": "passed", "figures": "1", "threshold": "2"}
POLICY = {"name": "default", "version": 1, "digest": "0" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"evidence": {"rules": [RULE | {"verdict": ATTACK}]}},
        {"evidence": {"rules": [RULE | {"figures": {}}]}},
        {"evidence": {"rules": ATTACK}},
        {"policy": POLICY | {"version": ATTACK}},
        {"policy": POLICY | {"digest": 12}},
        {"policy": {"name": "default"}},
        {"version": ATTACK},
        {"champion": ATTACK},
        {"kind": ATTACK},
    ],
)
def test_decision_with_text_in_place_of_a_verdict_is_no_decision(changes):
    values = {
        "kind": "allowed",
        "model": "digits",
        "version": "2",
        "champion": "1",
        "actor": "a",
        "time": "2026-01-01T00:00:00+00:00",
        "policy": POLICY,
        "evidence": {"rules": [RULE]},
        "sequence": 1,
        "previous": "0" * 64,
    }
    assert Decision.model_validate_json(json.dumps(values)).findings[0].verdict == "passed"
    with pytest.raises(ValueError, match="validation error"):
        Decision.model_validate_json(json.dumps(values | changes))


def test_terminal_shows_no_control_sequences():
    hostile = "name\x1b[2J\x1b]0;title\x07\x9b31m\r\u202egpj\x00"
    assert printable(hostile) == "name[2J]0;title31mgpj"
    assert one_line("a\nb\t c\x1b") == "a b c"
    out = io.StringIO()
    console = SafeConsole(file=out, width=120)
    console.print(hostile, markup=False)
    assert "\x1b" not in out.getvalue()
    assert "\x9b" not in out.getvalue()
