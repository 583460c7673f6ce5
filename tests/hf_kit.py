"""Small pretrained encoders of transformers, written without a download, and recipes that train them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advtrain.recipe import Recipe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "who",
    "what",
    "where",
    "is",
    "made",
    "was",
    "the",
    "thing",
    "place",
    "person",
    "?",
    "##s",
    *"1234567890",
]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}


def tokenizer_json(words: list[str] = WORDS, special: list[str] = SPECIAL) -> str:
    """Return a WordPiece tokenizer of lower-case words, as BERT has it, which cuts texts after 5 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: number for number, token in enumerate([*special, *words])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(special)
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made.enable_truncation(5)
    return str(made.to_str())


def bert_folder(folder: Path, *, head: bool = False, seed: int = 0, **settings: Any) -> str:
    """Write a BERT with random weights as transformers saves it; return `hf:FOLDER`."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(**{"vocab_size": len(SPECIAL) + len(WORDS), **SIZES, **settings})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        (BertForSequenceClassification if head else BertModel)(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return f"hf:{folder}"


def questions(file: Path, number: int = 80, start: int = 0) -> Path:
    """Write texts of two classes."""
    kinds = [("who made thing", "human"), ("where is place", "location")]
    rows = [
        {"text": f"{kinds[n % 2][0]} {n} ?", "label": kinds[n % 2][1]} for n in range(start, start + number)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def hf_recipe(file: Path, /, model: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    """Return a recipe that trains a network on texts for two epochs."""
    values = {
        "name": "questions",
        "data": {"source": "text", "path": str(file)},
        "model": model,
        "adversary": {"name": "pgd", "norm": "l2", "eps": 0.05, "num_steps": 2},
        "objective": {"clean_ce": 1, "adv_ce": 1},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "training": {"epochs": 2, "batch_size": 16},
        "evaluation": {
            "threat": {"norm": "l2", "eps": 0.05},
            "attack": {"name": "pgd", "num_steps": 2},
            "validation": {"name": "pgd", "num_steps": 2},
        },
    }
    merged = {
        key: {**part, **sections.get(key, {})} if isinstance(part, dict) else part
        for key, part in values.items()
    }
    return Recipe.model_validate(merged)
