"""Token ids of texts whose letters cannot give the ids of padding and special tokens."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from advtrain.errors import UserError

#: Id of padding.
PAD = 0


def added_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that a tokenizer without padding adds to every text."""
    empty = tokenizer.encode("")
    pairs = zip(empty.ids, empty.special_tokens_mask, strict=True)
    return [number for number, is_special in pairs if is_special]


class TokenIds:
    """Ids of encoded texts, in which only the tokenizer sets padding and special tokens.

    Some tokenizers also find these tokens in the letters of a text, which could then hide its words behind padding.
    There, they become unknown words.

    Args:
        tokenizer: a Tokenizer of the package tokenizers, without padding.
        content: its tokenizer.json.
    """

    def __init__(self, tokenizer: Any, content: str) -> None:
        self._tokenizer, self._content = tokenizer, content
        special = added_ids(tokenizer)
        self._reserved, self._added = {PAD, *special}, len(special)

    def of(self, found: Any) -> list[int]:
        """Return the ids of an Encoding, or [] if it has none but special tokens.

        Raises:
            UserError: the text holds a special token, and the tokenizer has no unknown word.
        """
        ids: list[int] = found.ids
        if len(ids) <= self._added:
            return []
        if sum(map(ids.count, self._reserved)) == self._added:
            return ids
        pairs = zip(ids, found.special_tokens_mask, strict=True)
        return [
            self._replaced(each) if each in self._reserved and not is_special else each
            for each, is_special in pairs
        ]

    @cached_property
    def _unknown(self) -> int | None:
        model = json.loads(self._content)["model"]
        token = model.get("unk_token")
        found = model.get("unk_id") if token is None else self._tokenizer.token_to_id(token)
        return None if found in self._reserved else found

    def _replaced(self, number: int) -> int:
        if self._unknown is None:
            raise UserError(
                f"a text holds the special token {self._tokenizer.id_to_token(number)!r}, and the tokenizer has no "
                "unknown word to replace it; remove it from the text"
            )
        return self._unknown
