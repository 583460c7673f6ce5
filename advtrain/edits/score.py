"""Scores of texts: the logits of a model, for the candidates of a search."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advtrain.data.texts import PAD, TextSpec, loaded_tokenizer, unknown_id
from advtrain.errors import UserError

#: Texts that are tokenized at the same time, for memory.
ENCODED_TEXTS = 2048
#: Most texts of a batch.
BATCH_TEXTS = 4096
#: Most tokens of a batch, with padding, on CPUs and on other devices. On CPUs, larger batches do not fit the caches.
CPU_TOKENS, DEVICE_TOKENS = 16_384, 131_072


class Score(Protocol):
    """Model that texts are sent to. Texts of one key have the same logits."""

    def keys(self, texts: Sequence[str]) -> list[Hashable]:
        """Return the key of each text, and None for a text without tokens, which models refuse."""

    def logits(self, keys: Sequence[Hashable]) -> Tensor:
        """Return logits (n, K) for n >= 1 keys that `keys` has returned, without None."""


class TextScore:
    """Score of a function from texts to logits (n, K). The key of a text is the text."""

    def __init__(self, function: Callable[[list[str]], Tensor]) -> None:
        self.function = function

    def keys(self, texts: Sequence[str]) -> list[Hashable]:
        """Return the texts."""
        return list(texts)

    def logits(self, keys: Sequence[Hashable]) -> Tensor:
        """Return the logits (n, K) of the texts."""
        return self.function([str(key) for key in keys])


class TokenScore:
    """Score of a model of token ids. The key of a text is its ids.

    Texts of the same ids are one query.

    Args:
        model: maps ids (n, L) int64, padded with 0, to logits (n, K).
        spec: tokenizer, with the length at which a text is cut.
        device: device of the ids.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], spec: TextSpec, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.device = model, torch.device(device)
        self.encoder = Encoder(spec)

    def keys(self, texts: Sequence[str]) -> list[Hashable]:
        """Return the ids of each text as bytes, and None for a text without tokens."""
        return [ids or None for ids in self.encoder.ids(texts)]

    def logits(self, keys: Sequence[Hashable]) -> Tensor:
        """Return the logits (n, K) of n >= 1 keys, which are sent in batches of similar lengths.

        Raises:
            UserError: a key is None, or the model returns another number of rows.
        """
        rows = [key_ids(key) for key in keys]
        lengths = np.array([len(row) for row in rows])
        most = CPU_TOKENS if self.device.type == "cpu" else DEVICE_TOKENS
        order, found, start = np.argsort(lengths, kind="stable")[::-1], [], 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            batch = order[start : start + min(BATCH_TEXTS, max(1, most // longest))]
            with torch.no_grad():
                part = self.model(self._padded([rows[i] for i in batch], longest))
            found.append(check_rows(part, len(batch)))
            start += len(batch)
        logits = torch.cat(found)
        return torch.empty_like(logits).index_copy_(
            0, torch.from_numpy(order.copy()).to(logits.device), logits
        )

    def _padded(self, rows: Sequence[NDArray[np.uint32]], longest: int) -> Tensor:
        ids = np.full((len(rows), longest), PAD, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return torch.from_numpy(ids).to(self.device)


class Encoder:
    """Tokenizer of a model, without padding."""

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        self._tokenizer, self._token_ids = loaded_tokenizer(spec.tokenizer)

    def ids(self, texts: Iterable[str]) -> list[bytes]:
        """Return the token ids of each text, cut at `max_length`, as bytes of uint32."""
        return [array("I", self._token_ids.of(found)).tobytes() for found in self._encoded(texts)]

    def ids_and_unknown(self, texts: Iterable[str]) -> Iterator[tuple[bytes, int]]:
        """Yield for each text its ids, as `ids`, and its unknown words, with those behind the cut."""
        for found in self._encoded(texts):
            ids, unknown = self._token_ids.of(found), -1 if self.unknown is None else self.unknown
            behind = sum(self._token_ids.of(part).count(unknown) for part in found.overflowing)
            yield array("I", ids).tobytes(), ids.count(unknown) + behind

    def _encoded(self, texts: Iterable[str]) -> Iterator[Any]:
        rest = iter(texts)
        while part := list(islice(rest, ENCODED_TEXTS)):
            yield from self._tokenizer.encode_batch_fast(part)

    def end(self, text: str) -> int | None:
        """Return the position after the last used character of a text; None if it is not cut."""
        found = self._tokenizer.encode(text)
        return max(end for _, end in found.offsets) if found.overflowing else None

    @cached_property
    def unknown(self) -> int | None:
        """Id of unknown words; None if the tokenizer has none."""
        return unknown_id(self._tokenizer)

    def __reduce__(self) -> tuple[object, ...]:
        return Encoder, (self.spec,)


def key_ids(key: Hashable) -> NDArray[np.uint32]:
    """Return the token ids of a key, which is their bytes."""
    if not isinstance(key, bytes):
        raise UserError("a text without tokens has no logits; remove it from the data")
    return np.frombuffer(key, np.uint32)


def check_rows(logits: Tensor, texts: int) -> Tensor:
    """Return the logits of a number of texts.

    Raises:
        UserError: there is not one row for each text.
    """
    if logits.ndim != 2 or len(logits) != texts:
        raise UserError(f"the model returned logits of shape {tuple(logits.shape)} for {texts} texts")
    return logits


def margins(logits: Tensor, label: int) -> NDArray[np.float64]:
    """Return the margins (n,) of a label: its logit - max of the other logits.

    The margin is -inf if a logit is not finite. A text is misclassified if its margin is not above 0, so a tie is a
    misclassification.

    Args:
        logits: (n, K), K >= 2.
        label: class in [0, K).

    Raises:
        UserError: the logits have another shape, or the label is not in [0, K).
    """
    z = logits.detach().cpu().double().numpy()  # some devices have no float64
    if z.ndim != 2 or not 2 <= z.shape[1] > label >= 0:
        raise UserError(f"a model of texts with label {label} returned logits of shape {tuple(z.shape)}")
    with np.errstate(invalid="ignore"):  # inf - inf
        found = z[:, label] - np.delete(z, label, 1).max(1)
    return np.where(np.isfinite(z).all(1), found, -np.inf)
