"""Networks of texts: `text_cnn`, `char_cnn` and `transformer`.

Attacks change the word embeddings. The inputs are token ids (N, L) int64, and z (N, L, D) are the rows of the embedding
table. Padding, id 0, has an embedding of zeros and does not change the logits of a text, however long it is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.models.network import EmbeddingModel
from advtrain.recipe.data import TextShape
from advtrain.threat import ThreatModel

#: Width of the uniform initialization of the embeddings (Kim 2014).
_INITIAL = 0.25
#: Attention score that is added for padding; its softmax is 0 in float32 and bfloat16.
_IGNORED = -1e4


class TextModel(EmbeddingModel):
    """Base class of the networks: an embedding table, in whose space attacks search."""

    def __init__(self, shape: TextShape, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.vocabulary, dim, padding_idx=0)
        with torch.no_grad():
            self.table.weight[1:].uniform_(-_INITIAL, _INITIAL)

    def embed(self, x: Tensor) -> Tensor:
        """Map token ids (N, L) int64 to their embeddings (N, L, D); those of padding are zeros."""
        z: Tensor = self.table(x) * (x != 0).unsqueeze(-1)
        return z

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return `threat` without a box, and with radius 0 for padding."""
        return replace(threat, low=-math.inf, high=math.inf, free=is_token(z))


def is_token(z: Tensor) -> Tensor:
    """Return where embeddings (N, L, D) are those of a token and not of padding, (N, L, 1) bool."""
    return (z != 0).any(-1, keepdim=True)


class TextCNN(TextModel):
    """Convolutions of several widths over words, and the maximum of each over the text."""

    def __init__(
        self,
        shape: TextShape,
        num_classes: int,
        dim: int,
        widths: list[int],
        channels: int,
        dropout: float,
    ) -> None:
        super().__init__(shape, dim)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, channels, width) for width in widths)
        self.margin = max(widths)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels * len(widths), num_classes))

    def classify(self, z: Tensor) -> Tensor:
        """Map embeddings (N, L, D) to logits (N, K)."""
        # With this margin, every convolution also sees a window of zeros, so more padding adds no other window.
        h = F.pad(z.transpose(1, 2), (self.margin, self.margin))
        found = [F.relu(convolution(h)).amax(2) for convolution in self.convolutions]
        logits: Tensor = self.head(torch.cat(found, 1))
        return logits


class CharCNN(TextModel):
    """A stack of convolutions over bytes, and the maximum over the text."""

    def __init__(
        self,
        shape: TextShape,
        num_classes: int,
        dim: int,
        channels: int,
        depth: int,
        width: int,
        dropout: float,
    ) -> None:
        super().__init__(shape, dim)
        sizes = [dim] + [channels] * depth
        self.convolutions = nn.ModuleList(
            nn.Conv1d(one, other, width, padding=width // 2)
            for one, other in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))

    def classify(self, z: Tensor) -> Tensor:
        """Map embeddings (N, L, D) to logits (N, K)."""
        h, mask = z.transpose(1, 2), is_token(z).transpose(1, 2)
        for convolution in self.convolutions:
            h = F.relu(convolution(h)) * mask
        logits: Tensor = self.head(h.amax(2))
        return logits


class Transformer(TextModel):
    """A small transformer encoder, and the mean over the tokens of the text."""

    def __init__(
        self, shape: TextShape, num_classes: int, dim: int, heads: int, depth: int, dropout: float
    ) -> None:
        super().__init__(shape, dim)
        self.positions = nn.Parameter(torch.empty(shape[0], dim).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, num_classes)

    def classify(self, z: Tensor) -> Tensor:
        """Map embeddings (N, L, D) to logits (N, K)."""
        mask = is_token(z)
        # A finite score: the reader of exported models refuses infinite constants.
        ignored = torch.where(mask.squeeze(-1), 0.0, _IGNORED)
        h = self.encoder(z + self.positions[: z.shape[1]], src_key_padding_mask=ignored)
        logits: Tensor = self.head((h * mask).sum(1) / mask.sum(1))
        return logits


def text_cnn(
    shape: TextShape,
    num_classes: int,
    *,
    dim: int = 300,
    widths: tuple[int, ...] = (3, 4, 5),
    channels: int = 100,
    dropout: float = 0.5,
) -> nn.Module:
    """Build CNN-rand of Kim 2014, arXiv 1408.5882.

    Convolutions of 3, 4 and 5 words with 100 channels each, over embeddings that start at U(-0.25, 0.25). Deviation:
    the weights of the last layer are not rescaled to a norm of 3.
    """
    if not widths or min(widths) < 1:
        raise UserError(f"model.args.widths must be numbers of words above 0, not {list(widths)}")
    return TextCNN(shape, num_classes, dim, list(widths), channels, dropout)


def char_cnn(
    shape: TextShape,
    num_classes: int,
    *,
    dim: int = 32,
    channels: int = 128,
    depth: int = 3,
    width: int = 5,
    dropout: float = 0.5,
) -> nn.Module:
    """Build `depth` convolutions of `width` tokens for `data.tokenizer: bytes`."""
    if width % 2 == 0:
        raise UserError(f"model.args.width must be odd, not {width}")
    return CharCNN(shape, num_classes, dim, channels, depth, width, dropout)


def transformer(
    shape: TextShape,
    num_classes: int,
    *,
    dim: int = 128,
    heads: int = 4,
    depth: int = 2,
    dropout: float = 0.1,
) -> nn.Module:
    """Build a pre-norm transformer encoder with learned positions.

    Vaswani et al. 2017, arXiv 1706.03762.
    """
    return Transformer(shape, num_classes, dim, heads, depth, dropout)
