"""Texts: copies across splits, the tokenizer of the training split, and token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from advtrain.data.batches import ArraySplit, Batch, BatchPlan, Labels, Rows
from advtrain.data.stored_texts import CHUNK, StoredTexts
from advtrain.data.token_ids import PAD as PAD
from advtrain.data.token_ids import TokenIds
from advtrain.errors import UserError
from advtrain.seeding import mix_seed

Unit = Literal["words", "bytes"]
Texts = NDArray[np.object_]

#: File with the tokenizer of texts, in a run folder and in the folder of a registered model.
TOKENIZER = "tokenizer.json"
#: Id, with words, of every word that is not in the vocabulary.
UNKNOWN = 1
#: Most words of a vocabulary, and most tokens of a text, if the recipe sets none.
MOST_WORDS, MOST_TOKENS = 20_000, 512


@dataclass(frozen=True)
class RawText:
    """Texts before they become token ids."""

    where: str  # file, for errors
    texts: Texts | StoredTexts  # (N,) str
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Rows) -> RawText:
        """Return only the given rows."""
        return RawText(self.where, self.texts[rows], self.labels[rows])

    @property
    def keys(self) -> list[bytes]:
        """Hash of each text without case and repeated blanks; rows of one key are copies."""
        return [hashlib.blake2b(text_key(text).encode(), digest_size=16).digest() for text in self.texts]

    def groups(self) -> Rows:
        """Return numbers (N,) that are equal where the texts are copies, in order of appearance."""
        number: dict[bytes, int] = {}
        return np.array([number.setdefault(key, len(number)) for key in self.keys], np.int64)


class TextSpec(BaseModel):
    """Tokenizer of the training texts: how a text becomes the token ids that a model takes."""

    model_config = ConfigDict(frozen=True)
    max_length: int
    """most tokens of a text; the rest of a longer text is cut off"""
    vocabulary: int
    """number of token ids; id 0 is padding"""
    tokenizer: str
    """content of tokenizer.json"""
    column: str | None = None
    """name of the column of texts; null: the usual names"""
    label: str | None = None
    """name of the column of labels; null: the usual names"""


class TextSplit(ArraySplit):
    """Token ids (N, L) int64 in memory, padded with 0; a batch is as long as its longest text.

    With `group_by_length`, a training batch holds texts of similar length.
    """

    def __init__(
        self, ids: NDArray[np.int64], labels: Labels, texts: Texts, *, group_by_length: bool = False
    ) -> None:
        super().__init__(ids, labels)
        self.texts, self.group_by_length = texts, group_by_length

    def take(self, rows: Rows) -> TextSplit:
        """Return a split with only the given rows."""
        return TextSplit(
            self.images[rows],  # type: ignore[arg-type]
            self.labels[rows],
            self.texts[rows],
            group_by_length=self.group_by_length,
        )

    def _plan(self, batch_size: int, seed: int, epoch: int) -> BatchPlan:
        plan = super()._plan(batch_size, seed, epoch)
        if not self.group_by_length:
            return plan
        rng = np.random.default_rng(mix_seed("length", seed, epoch))
        return plan.grouped_by_length((self.images != PAD).sum(1), rng)

    def to_inputs(self, x: Tensor) -> Tensor:
        """Return the ids (n, L) of a batch without the padding that all rows share."""
        return without_padding(x)

    def _batch(self, rows: Rows, batch: Batch) -> Batch:
        return replace(batch, texts=self.texts[rows])

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "texts": self.texts, "group_by_length": self.group_by_length}


def without_padding(ids: Tensor) -> Tensor:
    """Return ids (n, L) without the columns at the end that are padding in every row."""
    used = (ids != PAD).any(0).nonzero()
    return ids[:, : int(used.max()) + 1 if len(used) else 1]


def text_key(text: str) -> str:
    """Return a text without case and repeated blanks; texts of one key are copies."""
    return " ".join(text.split()).casefold()


def separate(
    train: RawText, validation: RawText | None, test: RawText | None
) -> tuple[RawText, RawText | None, list[str]]:
    """Return training and validation texts without copies of later splits, and notes.

    The test split is left as it is published. A copy of a test text leaves the validation and the training split, and
    a copy of a validation text leaves the training split.
    """
    notes: list[str] = []

    def without(part: RawText, name: str, other: RawText, called: str) -> RawText:
        known: dict[bytes, set[int]] = {}
        for key, label in zip(other.keys, other.labels.tolist(), strict=True):
            known.setdefault(key, set()).add(label)
        copies = [known.get(key) for key in part.keys]
        keep = np.array([copy is None for copy in copies], bool)
        conflicts = sum(
            c is not None and y not in c for c, y in zip(copies, part.labels.tolist(), strict=True)
        )
        if not keep.all():
            differ = f"; {conflicts:,} of them have another label there" if conflicts else ""
            notes.append(
                f"{(~keep).sum():,} {name} texts are left out, because they are copies of {called} texts{differ}"
            )
        return part.take(np.flatnonzero(keep))

    if test is not None:
        train = without(train, "training", test, "test")
        if validation is not None:
            validation = without(validation, "validation", test, "test")
    if validation is not None:
        train = without(train, "training", validation, "validation")
    if len(train) == 0:
        raise UserError(f"{train.where}: every training text is a copy of a validation or test text")
    return train, validation, notes


def fit_tokenizer(
    train: RawText,
    unit: Unit,
    vocabulary: int | None,
    max_length: int | None,
    column: str | None = None,
    label: str | None = None,
) -> TextSpec:
    """Return the tokenizer of the training texts.

    Words are lower case, and each punctuation mark is a word. The vocabulary holds the most frequent ones; a tie goes
    to the first in order of code points. Bytes are those of UTF-8, with case.

    Args:
        train: training texts.
        unit: words or bytes.
        vocabulary: most words, without padding and the unknown word; None: MOST_WORDS.
        max_length: most tokens of a text; None: those of the longest training text, at most MOST_TOKENS.
        column, label: names of the columns of texts and labels, for later files.

    Raises:
        UserError: the package tokenizers is not installed, or the unit has no vocabulary to choose.
    """
    if unit == "bytes" and vocabulary is not None:
        raise UserError("data.vocabulary is for words; there are always 256 bytes")
    made = _words(train.texts, vocabulary or MOST_WORDS) if unit == "words" else _bytes()
    length = max_length
    if length is None:
        longest = longest_text(made, train)
        length = min(max(longest, 3), MOST_TOKENS)  # torch.export may fix a dimension of 1 or 2
    made.enable_truncation(length)
    made.enable_padding(pad_id=PAD, pad_token="[PAD]")  # noqa: S106 (a token of text, no password)
    return TextSpec(
        max_length=length,
        vocabulary=made.get_vocab_size(),
        tokenizer=made.to_str(),
        column=column,
        label=label,
    )


def tokenizer_digest(content: str) -> str:
    """Return the SHA-256 of a tokenizer, whatever the length of its texts.

    Args:
        content: its tokenizer.json.
    """
    values = {
        key: value for key, value in json.loads(content).items() if key not in ("truncation", "padding")
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def longest_text(tokenizer: Any, train: RawText) -> int:
    """Return the number of tokens of the longest training text."""
    chunks = (train.texts[first : first + CHUNK].tolist() for first in range(0, len(train), CHUNK))
    return max(len(found.ids) for chunk in chunks for found in tokenizer.encode_batch(chunk))


def tokenizer_library() -> Any:
    """Return the package tokenizers; raise a UserError if it is not installed."""
    try:
        import tokenizers  # optional
    except ImportError as error:
        raise UserError("texts need the package tokenizers: pip install 'advtrain[text]'") from error
    return tokenizers


@lru_cache(maxsize=4)
def loaded_tokenizer(content: str) -> tuple[Any, TokenIds]:
    """Return a tokenizer without padding, from its tokenizer.json; the last ones are kept."""
    made = tokenizer_library().Tokenizer.from_str(content)
    made.no_padding()
    return made, TokenIds(made, content)


def _words(texts: Iterable[str], most: int) -> Any:
    """Return a tokenizer of words.

    Padding and the unknown word are plain entries of the vocabulary. As special tokens they would also be found in a
    text, which could then hide its words behind padding.
    """
    lib = tokenizer_library()
    counter = lib.Tokenizer(lib.models.WordLevel(unk_token="[UNK]"))  # noqa: S106
    made = lib.Tokenizer(lib.models.WordLevel({"[PAD]": PAD, "[UNK]": UNKNOWN}, unk_token="[UNK]"))  # noqa: S106
    for each in (counter, made):
        each.normalizer = lib.normalizers.Sequence([lib.normalizers.NFC(), lib.normalizers.Lowercase()])
        each.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
    counter.train_from_iterator(
        texts, lib.trainers.WordLevelTrainer(vocab_size=most, show_progress=False, special_tokens=[])
    )
    ranks = counter.get_vocab()
    words = sorted(ranks, key=ranks.__getitem__)
    ids = {"[PAD]": PAD, "[UNK]": UNKNOWN} | {word: number for number, word in enumerate(words, UNKNOWN + 1)}
    made.model = lib.models.WordLevel(ids, unk_token="[UNK]")  # noqa: S106
    return made


def _bytes() -> Any:
    """Return a tokenizer of the 256 bytes of UTF-8: byte-level BPE without merges."""
    lib = tokenizer_library()
    alphabet = sorted(lib.pre_tokenizers.ByteLevel.alphabet())
    ids = {"[PAD]": PAD} | {letter: number for number, letter in enumerate(alphabet, 1)}
    made = lib.Tokenizer(lib.models.BPE(ids, []))
    made.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made


def require_texts(texts: Sequence[str], where: str) -> None:
    """Raise UserError unless `texts` is a list of texts; `where` is its name in errors."""
    if isinstance(texts, str):
        raise UserError(f"{where} is a single text; pass a list of texts, such as [{texts[:40]!r}]")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{where}[{row}] is {text!r:.50}, no text; pass a list of texts")


def encode_texts(
    spec: TextSpec, texts: Sequence[str], where: str, first: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_], float]:
    """Return token ids, which texts are cut, and the share of unknown words.

    Args:
        spec: tokenizer.
        texts: N texts.
        where: their file, for errors.
        first: number of the first text, for errors.

    Returns:
        Ids (N, max_length) int64, padded with 0; cut (N,) bool; share in [0, 1].

    Raises:
        UserError: a text has no token but special ones.
    """
    made, token_ids = loaded_tokenizer(spec.tokenizer)
    ids = np.full((len(texts), spec.max_length), PAD, np.int64)
    cut = np.zeros(len(texts), bool)
    for row, found in enumerate(made.encode_batch(list(texts))):
        if not (used := token_ids.of(found)):
            raise UserError(f"{where}: text {first + row} has no words: {texts[row][:80]!r}")
        ids[row, : len(used)] = used
        cut[row] = bool(found.overflowing)
    used, unknown = ids != PAD, unknown_id(made)
    count = 0 if unknown is None else (used & (ids == unknown)).sum()
    return ids, cut, float(count / max(1, used.sum()))


def unknown_id(tokenizer: Any) -> int | None:
    """Return the id of unknown words of a `tokenizers.Tokenizer`; None if it has none."""
    names = (getattr(tokenizer.model, "unk_token", None), "[UNK]", "<unk>")
    ids = (tokenizer.token_to_id(name) for name in names if name is not None)
    return next((each for each in ids if each is not None), None)


def to_splits(
    spec: TextSpec, parts: Sequence[RawText], *, group_by_length: bool = False
) -> tuple[list[TextSplit], list[str]]:
    """Return the splits as token ids, and notes on texts that are cut and on unknown words.

    `parts` are the training, validation and test texts. `group_by_length` is for training batches.
    """
    splits, notes = [], []
    cut = total = 0
    for part in parts:
        texts = part.texts.tolist()
        ids, long, unknown = encode_texts(spec, texts, part.where)
        splits.append(TextSplit(ids, part.labels, np.array(texts, object), group_by_length=group_by_length))
        cut, total = cut + int(long.sum()), total + len(part)
    notes.extend(note_cut(spec, cut, total))
    if unknown:
        notes.append(f"{unknown:.1%} of the words of the test texts are not in the vocabulary")
    return splits, notes


def note_cut(spec: TextSpec, cut: int, total: int, kind: str = "") -> list[str]:
    """Return a note on texts whose ends are cut off, or none."""
    if not cut:
        return []
    return [
        f"{cut:,} of {total:,} {kind}texts ({cut / total:.1%}) are longer than {spec.max_length} tokens, and their "
        "ends are cut off; data.max_length sets another length"
    ]
