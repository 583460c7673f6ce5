"""Tokenizers of pretrained networks, and of a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advtrain.data.texts import (
    MOST_TOKENS,
    PAD,
    TOKENIZER,
    RawText,
    TextSpec,
    Unit,
    fit_tokenizer,
    longest_text,
    tokenizer_digest,
    tokenizer_library,
)
from advtrain.data.token_ids import added_ids
from advtrain.errors import UserError
from advtrain.hub import PREFIX, is_pretrained, pretrained_folder, read_config
from advtrain.recipe.data import DataConfig
from advtrain.user_paths import user_path

#: Largest file in bytes; those of 250,000 tokens have 20 MB.
_MOST_BYTES = 2**28


def tokenizer_of(config: DataConfig, train: RawText) -> TextSpec:
    """Return a tokenizer fitted to the training texts, or the one that `data.tokenizer` names."""
    given = config.given_tokenizer
    if given is None:
        unit: Unit = "bytes" if config.tokenizer == "bytes" else "words"
        return fit_tokenizer(train, unit, config.vocabulary, config.max_length, config.text, config.label)
    if config.vocabulary is not None:
        raise UserError(f"data.vocabulary is for words; the tokenizer '{given}' has its own vocabulary")
    spec = pretrained_tokenizer(train, given, config.max_length, config.text)
    found = tokenizer_digest(spec.tokenizer)
    if config.tokenizer_digest not in (None, found):
        raise UserError(
            f"data.tokenizer '{given}' is another tokenizer (digest {found[:12]}) than data.tokenizer_digest "
            f"({str(config.tokenizer_digest)[:12]}); name the tokenizer that is meant, or remove data.tokenizer_digest"
        )
    return spec.model_copy(update={"label": config.label})


def pretrained_tokenizer(
    train: RawText, given: str, max_length: int | None, column: str | None = None
) -> TextSpec:
    """Return the tokenizer of a pretrained network or of a file.

    Its special tokens, such as [CLS] and [SEP], are added to each text, and a long text keeps them when it is cut. The
    same letters within a text are ordinary letters or an unknown word, because a text could otherwise hide its words
    behind padding.

    Args:
        train: training texts.
        given: hf:FOLDER_OR_NAME, or the path of a tokenizer.json.
        max_length: most tokens of a text; None: those of the longest training text, at most MOST_TOKENS or the
            positions of the network.
        column: name of the column of texts, for later files.

    Raises:
        UserError: there is no such tokenizer, it is damaged, or its token 0 is not padding.
    """
    path, most = _find(given)
    made = _open(path)
    made.no_truncation()
    made.no_padding()
    length = max_length or min(longest_text(made, train), most)
    length = max(length, 3)  # torch.export may fix a dimension of 1 or 2
    if length <= (added := len(made.encode("").ids)):
        raise UserError(
            f"data.max_length {length} has no place for words: '{path}' adds {added} special tokens"
        )
    made.enable_truncation(length)
    made.enable_padding(pad_id=PAD, pad_token=made.id_to_token(PAD))
    return TextSpec(
        max_length=length, vocabulary=made.get_vocab_size(), tokenizer=made.to_str(), column=column
    )


def given_digest(given: str) -> str | None:
    """Return the digest of a tokenizer that data.tokenizer may name; None if it cannot be read."""
    try:
        path, _ = _find(given)
        return tokenizer_digest(_open(path).to_str()) if path.is_file() else None
    except UserError:
        return None


def kept_tokenizer(folder: Path, column: str | None = None, label: str | None = None) -> TextSpec:
    """Return the tokenizer that a run or a campaign keeps in its folder.

    Args:
        folder: folder of the run or campaign.
        column, label: names of the columns of texts and labels, for later files.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / TOKENIZER
    content = _read(path)
    made = _parsed(content, path)
    truncation = made.truncation or {}
    if "max_length" not in truncation:
        raise UserError(f"'{path}' is damaged: it does not say how long a text may be")
    return TextSpec(
        max_length=truncation["max_length"],
        vocabulary=made.get_vocab_size(),
        tokenizer=content,
        column=column,
        label=label,
    )


def special_ids(content: str) -> tuple[int, ...]:
    """Return the ids of the tokens that a tokenizer adds to every text.

    Args:
        content: its tokenizer.json.
    """
    made = tokenizer_library().Tokenizer.from_str(content)
    made.no_padding()
    return tuple(dict.fromkeys(added_ids(made)))


def _find(given: str) -> tuple[Path, int]:
    """Return the file of a tokenizer, and the most tokens of a text."""
    if not is_pretrained(given):
        return user_path(given, "data.tokenizer"), MOST_TOKENS
    folder = pretrained_folder(given.removeprefix(PREFIX))
    positions = read_config(folder).get("max_position_embeddings")
    most = min(positions, MOST_TOKENS) if isinstance(positions, int) and positions > 0 else MOST_TOKENS
    if not (folder / TOKENIZER).is_file():
        raise UserError(
            f"'{folder}' has no {TOKENIZER}; write it with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), or set data.tokenizer to the path of one"
        )
    return folder / TOKENIZER, most


def _open(path: Path) -> Any:
    """Return the tokenizer in a file, whose special tokens are not found in the letters of a text."""
    try:
        values = json.loads(_read(path))
        vocabulary = values["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = values.get("added_tokens") or []
        _require_padding(values, vocabulary, path)
        values["added_tokens"] = [
            token
            for token in added
            if not token["special"] or vocabulary.get(token["content"]) != token["id"]
        ]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is no tokenizer of the package tokenizers: {error}") from error
    return _parsed(json.dumps(values), path)


def _require_padding(values: Any, vocabulary: dict[str, int], path: Path) -> None:
    """Raise a UserError if token 0 is not padding."""
    padding = values.get("padding") or {}
    names = ("[PAD]", "<pad>", padding.get("pad_token", "[PAD]"))
    first = next((token for token, number in vocabulary.items() if number == PAD), None)
    if padding.get("pad_id", PAD) != PAD or first not in names:
        raise UserError(
            f"'{path}': token 0 is {first!r}, which is not its padding, but token 0 is padding here; use the tokenizer "
            "of an encoder such as BERT, DistilBERT, ELECTRA, ALBERT or MiniLM"
        )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"'{path}' has more than {_MOST_BYTES:,} bytes; it is no tokenizer")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the tokenizer '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the tokenizer '{path}' is damaged: it is not UTF-8 text") from error


def _parsed(content: str, path: Path) -> Any:
    try:
        return tokenizer_library().Tokenizer.from_str(content)
    except UserError:
        raise
    except Exception as error:  # the package raises no narrower type
        raise UserError(f"'{path}' is no tokenizer of the package tokenizers: {error}") from error
