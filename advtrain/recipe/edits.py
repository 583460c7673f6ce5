"""Evaluation threat model of a recipe: a ball, or edits of texts with a budget of queries."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from advtrain.schema import Config, Norm, Number, parse_relative

#: Settings of one kind of edits, with their defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "words": {"table": "counterfitted"},
    "chars": {
        "where": "inner",
        "alphabet": "letters",
        "operations": ["substitute", "swap", "delete", "insert"],
    },
}


class ThreatConfig(Config):
    """Norm and radius of the evaluation threat model."""

    norm: Norm = "linf"
    """norm of the perturbation: linf, l2 or l1"""
    eps: Number = Field(ge=0)
    """radius in input units (pixels in [0, 1]); write 8/255, not 0.031"""

    @field_validator("eps", mode="before")
    @classmethod
    def _is_absolute(cls, given: Any) -> Any:
        if parse_relative(given) is not None:
            raise ValueError(
                "models are compared at the same radius, and a relative one differs between networks; write a number"
            )
        return given


class EditThreatConfig(Config):
    """Edits of a text: an attacker may change up to `at_most` words or characters."""

    edits: Literal["words", "chars"]
    """what is edited: words are replaced by words of a table; chars are replaced, swapped, deleted or inserted"""
    at_most: int = Field(ge=1, le=100)
    """largest number of edits of a text"""
    table: str | None = None
    """words: table of substitutions: counterfitted, a .json file {word: [words]}, or WordNet's database"""
    protect: Literal["stop_words", "none"] = "stop_words"
    """words that are never edited: stop_words (English function words) or none"""
    where: Literal["inner", "anywhere"] | None = None
    """chars: inner edits the letters within words of at least four letters; anywhere edits each position"""
    alphabet: str | None = None
    """chars: characters that are put in: letters, data (all characters of the test texts), or a list such as abc"""
    operations: list[Literal["substitute", "swap", "delete", "insert"]] | None = Field(
        default=None, min_length=1
    )
    """chars: edits that are allowed"""
    budget: int = Field(default=20_000, ge=1)
    """most queries of a text: candidates are enumerated while they fit, then a beam search takes what is left"""
    validation_budget: int = Field(default=100, ge=1)
    """most queries of a text in validation, which selects the best checkpoint"""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: Any) -> Any:
        defaults = DEFAULTS.get(str(given.get("edits")), {}) if isinstance(given, dict) else {}
        return {**given, **{k: v for k, v in defaults.items() if given.get(k) is None}} if defaults else given

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        for kind, settings in DEFAULTS.items():
            for name in settings if kind != self.edits else ():
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to edits: {kind}, not to edits: {self.edits}")
        return self

    @property
    def norm(self) -> Literal["words", "chars"]:
        """Unit of the radius in a report."""
        return self.edits

    @property
    def eps(self) -> float:
        """Radius in a report: the largest number of edits."""
        return float(self.at_most)

    def __str__(self) -> str:
        return f"{self.edits}:{self.at_most}"


def is_edited(given: Any) -> bool:
    """Return whether a threat model, as written or parsed, is edits of texts."""
    return isinstance(given, EditThreatConfig) or isinstance(given, dict) and "edits" in given


def _kind(given: Any) -> str:
    return "threat-edits" if is_edited(given) else "threat-ball"


#: A ball, or the edits of a text. The tags are parts of the location of an error, which `explain` leaves out.
AnyThreat = Annotated[
    Annotated[ThreatConfig, Tag("threat-ball")] | Annotated[EditThreatConfig, Tag("threat-edits")],
    Discriminator(_kind),
]
