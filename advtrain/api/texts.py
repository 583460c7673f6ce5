"""Text models with their tokenizer: modules that take texts as well as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advtrain.data.batches import Labels
from advtrain.data.texts import PAD, TextSpec, TextSplit, encode_texts, require_texts
from advtrain.errors import UserError
from advtrain.models.network import embed, embeds, threat_at
from advtrain.threat import ThreatModel

#: Texts, as a user passes them.
Texts = Sequence[str]


class TextClassifier(nn.Module):
    """Module that maps N texts, or their token ids (N, L) int64, to logits (N, K) float32.

    Attributes:
        model: network, or exported network, of token ids.
        text: tokenizer; `text.max_length` is the largest L.
        class_names: names of the classes in the order of the logits; None: they have none.
    """

    def __init__(self, model: nn.Module, text: TextSpec, class_names: list[str] | None = None) -> None:
        super().__init__()
        self.model, self.text, self.class_names = model, text, class_names
        self.training = model.training  # an exported network does not support eval()

    @property
    def embeds(self) -> bool:
        """True if attacks can perturb the embeddings; False for an exported network."""
        return embeds(self.model)

    def encode(self, texts: Texts) -> Tensor:
        """Return the token ids (N, L) int64 of N texts, on the model's device.

        Shorter texts are padded with 0.

        Raises:
            UserError: there are no texts, or one is no text or has no tokens.
        """
        ids = torch.from_numpy(_encoded(self.text, texts))
        device = next(iter([*self.parameters(), *self.buffers()]), ids).device
        return ids[:, : int((ids != PAD).sum(1).max())].to(device)

    def embed(self, x: Texts | Tensor) -> Tensor:
        """Return the word embeddings (N, L, D), which attacks perturb."""
        return embed(self.model, self._ids(x))

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return the threat model on the embeddings z."""
        return threat_at(self.model, z, threat)

    def forward(self, x: Texts | Tensor, *, embedded: bool = False) -> Tensor:
        """Return logits (N, K) of texts or token ids; with `embedded`, x is the output of `embed`.

        Raises:
            UserError: a text has no tokens, or ids have another type or shape, or are not in the vocabulary.
        """
        if embedded:
            logits: Tensor = self.model(x, embedded=True)
            return logits
        found: Tensor = self.model(self._ids(x))
        return found

    def _ids(self, x: Texts | Tensor) -> Tensor:
        """Return token ids that were checked."""
        if not isinstance(x, Tensor):
            return self.encode(x)
        if x.dtype != torch.int64 or x.ndim != 2 or not 1 <= x.shape[1] <= self.text.max_length:
            raise UserError(
                f"token ids must be int64 (N, L) with L from 1 to {self.text.max_length}, not {x.dtype} "
                f"{tuple(x.shape)}; the model also takes a list of texts"
            )
        if bool(((x < 0) | (x >= self.text.vocabulary)).any() | (x == PAD).all(1).any()):
            raise UserError(
                f"token ids must lie in [0, {self.text.vocabulary}), with one above 0 in every text; are they of "
                "another tokenizer?"
            )
        return x


def are_texts(x: Any) -> TypeGuard[Texts]:
    """Return whether x is a text, or a list, tuple or array whose first element is one."""
    return isinstance(x, str) or (
        isinstance(x, list | tuple | np.ndarray) and len(x) > 0 and isinstance(x[0], str)
    )


def to_tensor(model: nn.Module, x: Any) -> Tensor:
    """Return inputs as a tensor: the token ids of texts, or x itself.

    Raises:
        UserError: x is neither a tensor nor texts, or the model takes no texts.
    """
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, str | list | tuple | np.ndarray):
        raise UserError(f"x must be a tensor, or a list of texts, not {type(x).__name__}")
    if not isinstance(model, TextClassifier):
        raise UserError(
            "x must be a tensor; only a text model from advtrain.load_model takes a list of texts, because it has a "
            "tokenizer"
        )
    return model.encode(x)  # type: ignore[arg-type]


def text_split(model: TextClassifier, texts: Texts, labels: Labels) -> TextSplit:
    """Return texts and labels (N,) as a split."""
    return TextSplit(_encoded(model.text, texts), labels, np.array(list(texts), object))


def _encoded(spec: TextSpec, texts: Texts) -> NDArray[np.int64]:
    """Return the token ids (N, max_length) of texts that were checked."""
    require_texts(texts, "x")
    if len(texts) == 0:
        raise UserError("x holds no texts")
    return encode_texts(spec, list(texts), "x")[0]


def require_embeddings(model: nn.Module) -> None:
    """Raise a UserError for a text model whose embeddings attacks cannot reach."""
    if isinstance(model, TextClassifier) and not model.embeds:
        raise UserError(
            "the registered model is an archive that maps token ids to logits, and attacks need its embeddings; load "
            "the run that trained it, advtrain.load_model('runs/NAME')"
        )
