"""Lengths of a training attack that are relative to the word embeddings of the network."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from advtrain.errors import UserError
from advtrain.recipe.attack import AttackConfig
from advtrain.schema import Length, Number, Relative


def is_length(path: str) -> bool:
    """Return whether a recipe path is a length that may be relative to embeddings."""
    section, _, name = path.rpartition(".")
    return section == "adversary" and name in ("eps", "eps_low", "init_mag", "step_size")


class EmbeddingLengths(AttackConfig):
    """Attack whose lengths may be multiples of the mean norm of the network's embeddings."""

    step_size: Length | None = Field(default=None, gt=0)
    """step length in input units, or relative to the embeddings as 0.1x; null: eps (fgsm, n_fgsm, vat, free), 1.25 eps
    (fgsm_rs), eps / num_steps (mi_fgsm, freelb), 2.5 eps / num_steps (pgd)"""
    embedding_norm: Number | None = Field(default=None, gt=0)
    """unit of lengths that are written as 0.5x; null: a new run fills in the mean l2 norm of the rows of the network's
    embedding table before training, without padding"""

    @property
    def relative(self) -> dict[str, Relative]:
        """Lengths that are relative to the embeddings of the network, by their names."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, Relative)}

    @property
    def absolute(self) -> Self:
        """Attack with all lengths in input units.

        Raises:
            UserError: a length is relative, and `embedding_norm`, which a new run fills in, is unknown.
        """
        if not self.relative:
            return self
        if self.embedding_norm is None:
            name, value = next(iter(self.relative.items()))
            raise UserError(
                f"adversary.{name} = {value} is relative to the embeddings of a network, and a run measures them when "
                "it starts; set adversary.embedding_norm, or write a number"
            )
        lengths = {name: float(value) * self.embedding_norm for name, value in self.relative.items()}
        return self.model_copy(update=lengths)

    def pinned_as(self, stored: EmbeddingLengths) -> Self:
        """Return the attack with the embedding norm that a run filled in."""
        if not self.relative or self.embedding_norm is not None:
            return self
        return self.model_copy(update={"embedding_norm": stored.embedding_norm})
