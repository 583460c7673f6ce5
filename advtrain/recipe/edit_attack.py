"""Training attack that edits texts: `adversary.name: edits`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from advtrain.recipe.data import TEXT_SOURCES
from advtrain.recipe.edits import DEFAULTS
from advtrain.recipe.lengths import EmbeddingLengths

#: Settings that only this attack has.
EDIT_SETTINGS = (
    "edits",
    "at_most",
    "table",
    "table_digest",
    "protect",
    "where",
    "alphabet",
    "operations",
    "search",
    "budget",
)
#: Settings that it shares with the other attacks.
SHARED_SETTINGS = ("name", "fraction", "eps_delay_epochs", "eps_warmup_epochs", "eps_schedule")
#: Values that fill settings that it does not have.
_UNUSED: dict[str, Any] = {"num_steps": 0, "start": "none", "eps": 0.0}
#: What to set instead of some of these settings.
_INSTEAD = {
    "eps": "; the radius is at_most",
    "eps_low": "; the radius is at_most",
    "num_steps": "; the search is limited by budget",
    "num_restarts": "; the search is limited by budget",
    "loss": "; the search minimizes the margin of the label",
}


class EditAttackConfig(EmbeddingLengths):
    """Attack on embeddings, or the edits of texts."""

    edits: Literal["words", "chars"] | None = None
    """edits: what is edited: words are replaced by words of a table; chars are replaced, swapped, deleted or
    inserted"""
    at_most: int | None = Field(default=None, ge=0, le=100)
    """edits: largest number of edits of a text; 0: clean texts"""
    table: str | None = None
    """edits of words: table of substitutions: counterfitted (default), a .json file {word: [words]}, or WordNet's
    database"""
    table_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """edits of words: SHA-256 of the substitutions; a new run fills it in, and another table is refused"""
    protect: Literal["stop_words", "none"] | None = None
    """edits: words that are never edited: stop_words (default, English function words) or none"""
    where: Literal["inner", "anywhere"] | None = None
    """edits of chars: inner (default) edits the letters within words of at least four letters; anywhere edits each
    position"""
    alphabet: str | None = None
    """edits of chars: characters that are put in: letters (default), data (all characters of the training texts), or a
    list such as abc"""
    operations: list[Literal["substitute", "swap", "delete", "insert"]] | None = Field(
        default=None, min_length=1
    )
    """edits of chars: edits that are allowed; default: all"""
    search: Literal["greedy", "random"] | None = None
    """edits: greedy (default) adds the edit with the smallest margin to the best text; random draws one text without
    the model"""
    budget: int | None = Field(default=None, ge=1)
    """edits, greedy: most queries of a text in a step, with the original text; default: 50"""

    @model_validator(mode="before")
    @classmethod
    def _fill_edits(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("name") != "edits":
            return given
        filled = {"protect": "stop_words", "search": "greedy", **DEFAULTS.get(str(given.get("edits")), {})}
        if given.get("search") in (None, "greedy"):
            filled["budget"] = 50
        return {"eps": 0.0, **given, **{k: v for k, v in filled.items() if given.get(k) is None}}

    @model_validator(mode="after")
    def _has_edits(self) -> Self:
        for name in EDIT_SETTINGS if self.name != "edits" else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to the attack edits, not to {self.name}; set name: edits")
        return self

    def _check_edits(self) -> Self:
        """Raise if a setting is missing, or is one of another attack or another kind of edits."""
        if self.edits is None or self.at_most is None:
            what = "edits: words or edits: chars" if self.edits is None else "at_most, the number of edits"
            raise ValueError(f"the attack edits needs {what}")
        for kind, settings in DEFAULTS.items():
            for name in (*settings, *(["table_digest"] if kind == "words" else [])):
                if kind != self.edits and getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to edits: {kind}, not to edits: {self.edits}")
        if self.search == "random" and self.budget is not None:
            raise ValueError("search: random sends no queries to the model; it has no budget")
        for name, field in type(self).model_fields.items():
            usual = _UNUSED.get(name, field.get_default(call_default_factory=True))
            if name not in EDIT_SETTINGS + SHARED_SETTINGS and getattr(self, name) != usual:
                raise ValueError(
                    f"the attack edits changes words or characters of texts; it has no {name}{_INSTEAD.get(name, '')}"
                )
        return self

    def pinned_as(self, stored: EmbeddingLengths) -> Self:
        """Return the attack with the embedding norm and the digest that a run filled in."""
        pinned = super().pinned_as(stored)
        if (
            not isinstance(stored, EditAttackConfig)
            or self.table != stored.table
            or self.table_digest is not None
        ):
            return pinned
        return pinned.model_copy(update={"table_digest": stored.table_digest})


def why_no_edits(recipe: Any) -> str:
    """Return why a recipe cannot edit its texts in training or evaluation; "" if it can."""
    source = recipe.data.source
    edits_texts = recipe.adversary.name == "edits"
    if source not in TEXT_SOURCES and (edits_texts or recipe.evaluation.edits is not None):
        path = "adversary.name edits" if edits_texts else "evaluation.threat.edits"
        how = "use an attack such as pgd" if edits_texts else "set norm and eps"
        return f"{path} is for texts; data.source {source} has none, so {how}"
    if not edits_texts:
        return ""
    if recipe.data.stream:
        return "adversary.name edits needs the texts of a batch, which a stream does not keep; set data.stream: false"
    if recipe.objective.regression:
        return "adversary.name edits lowers the margin of a class; a regression has none"
    if moved := [name for name, term in recipe.objective.used.items() if term.ball]:
        return (
            f"{', '.join(f'objective.{name}' for name in moved)} moves inputs within a ball, but adversary.name edits "
            "changes the texts; use other terms, for example adv_ce or trades_kl"
        )
    return ""
