"""Data of a recipe: source, fields, splits, augmentation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from advtrain.hub import is_pretrained
from advtrain.schema import Config, Number

#: Most classes: each is an output of the model, so a label of 10^9 by mistake would take gigabytes.
MOST_CLASSES = 100_000
#: Data sets of torchvision, and the file or folder of each below the data root.
TORCHVISION_FILES = {
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "svhn": "train_32x32.mat",
}
#: Data sets of texts, and the folder of each below the data root.
TEXT_FILES = {"sst2": "text/sst2", "trec": "text/trec", "sms": "text/sms"}
#: Sources of texts.
TEXT_SOURCES = ("text", *TEXT_FILES)
#: Tokenizers that are made from the training texts.
TOKENIZERS = ("words", "bytes")
#: Sources that may hold a table whose columns are scaled.
TABLE_FILES = ("npz", "csv", "parquet")


class TextShape(tuple[int, ...]):
    """Shape (L,) of a sample of text: at most L token ids, each below `vocabulary`.

    The tokenizer adds the tokens `special`, such as [CLS] and [SEP], to every text.
    """

    vocabulary: int
    special: tuple[int, ...]

    def __new__(cls, length: int, vocabulary: int, special: tuple[int, ...] = ()) -> TextShape:
        """Return the shape of texts of at most `length` tokens."""
        shape = super().__new__(cls, (length,))
        shape.vocabulary, shape.special = vocabulary, special
        return shape

    def __getnewargs__(self) -> tuple[int, int, tuple[int, ...]]:
        return self[0], self.vocabulary, self.special


class AugmentConfig(Config):
    """Augmentation of training images before the attack."""

    crop: int = Field(default=0, ge=0)
    """zero padding in pixels before a random crop to the original size (CIFAR: 4); 0: no crop"""
    flip: bool = False
    """flip each image horizontally with probability 1/2"""
    resized_crop: Number | None = Field(default=None, gt=0, le=1)
    """smallest area share of the random resized crop of streamed images (ImageNet: 0.08); null: off"""


class DataConfig(Config):
    """Data set and its split."""

    source: str
    """digits, mnist, fashion_mnist, cifar10, cifar100, svhn, npz, csv, parquet or image_folder; texts: sst2, trec, sms
    or text; regressions: diabetes, friedman1, linear"""
    task: Literal["classification", "regression"] = "classification"
    """type of the labels of npz, csv and parquet tables: class labels or regression targets"""
    path: str | None = None
    """file or folder of npz, csv, parquet, image_folder or text: absolute, or relative to the data root; ~
    and $VAR are expanded"""
    download: bool = False
    """allow torchvision to download the data set into the data root"""
    stream: bool = False
    """read images of parquet or image_folder data, or training texts in parquet, from disk in every epoch instead of
    keeping them in memory"""
    classes: list[int | str] | None = Field(default=None, min_length=2)
    """classes that are kept, by name or number; their labels become 0, 1, ... in this order; null: all"""
    train_samples: int | None = Field(default=None, ge=1)
    """number of training samples, a stratified random part by split_seed; validation and test stay; null: all"""
    center_crop: int | None = Field(default=None, ge=1)
    """side in pixels of the center crop of built-in images, taken before image_size (MNIST: the digits are in 20 of 28
    pixels); null: the whole image"""
    image_size: int | None = Field(default=None, ge=1)
    """side in pixels of resized images; null: that of all images, which must be equal (parquet, image_folder: shorter
    side resized, then a crop; built-in images: averages over areas)"""
    channels: Literal[1, 3] | None = None
    """channels of images, 1 (gray) or 3 (RGB); null: 3 if any parquet or image_folder image has color, else 1; built-in
    images: their own"""
    on_error: Literal["stop", "skip"] = "stop"
    """parquet or image_folder image that cannot be decoded: stop with an error that names it, or skip it, for which
    all images are decoded once more"""
    image: str | None = None
    """name of the array or column of samples in npz or parquet data; null: the first usual name, such as x or image"""
    label: str | None = None
    """name of the array or column of labels in npz, csv, parquet or text data; null: the first usual name, such as y or
    label; a table in csv or parquet needs it"""
    text: str | None = None
    """name of the column of texts; null: the first usual name, such as text or sentence"""
    encoding: str | None = None
    """encoding of files of texts, such as utf-8 or latin-1; null: utf-8 (trec: latin-1)"""
    tokenizer: str | None = None
    """tokens of a text: words (lower-case words and punctuation marks), bytes (of UTF-8), hf:FOLDER_OR_NAME, or the
    path of a tokenizer.json, such as that of a run; null: that of model.name if it is hf:FOLDER_OR_NAME, else words"""
    tokenizer_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of a tokenizer that was not made from the training texts; a new run fills it in, and another tokenizer is
    refused"""
    vocabulary: int | None = Field(default=None, ge=1)
    """maximum number of words in the vocabulary, which holds the most frequent training words (not for bytes); null:
    20,000"""
    max_length: int | None = Field(default=None, ge=3, le=8192)
    """maximum number of tokens of a text, the rest is cut off; null: the length of the longest training text, at most
    512"""
    group_by_length: bool = False
    """train on batches of texts of similar length, which need less padding"""
    features: list[str] | None = None
    """columns of a csv or parquet table that the model sees; null: all but data.label"""
    scale: Literal["minmax", "standard"] | None = None
    """scaling of a table's columns to [0, 1] by the training samples, also of npz tables (N, F); minmax, the default of
    csv and parquet: their range is 1; standard: a standard deviation is 0.1 and the mean 0.5"""
    missing: Literal["stop", "impute"] = "stop"
    """missing values of a table: an error, or the median or most frequent value of the training samples"""
    num_classes: int | None = Field(default=None, ge=2, le=MOST_CLASSES)
    """number of classes of npz, csv or parquet data; null: largest label + 1, and every class needs training samples"""
    validation_fraction: Number = Field(default=0.1, gt=0, lt=1)
    """share of the training samples held out for validation"""
    test_fraction: Number = Field(default=0.2, gt=0, lt=1)
    """share of all samples held out for testing if the source has no test split"""
    split_seed: int = Field(default=0, ge=0)
    """seed of the validation and test splits"""
    augment: AugmentConfig = AugmentConfig()
    """random crop and flip of training images"""

    @field_validator("tokenizer")
    @classmethod
    def _is_tokenizer(cls, given: str | None) -> str | None:
        if given is None or given in TOKENIZERS or is_pretrained(given) or given.endswith(".json"):
            return given
        raise ValueError(
            f"takes {', '.join(TOKENIZERS)}, hf:FOLDER_OR_NAME, or the path of a tokenizer.json, not '{given}'"
        )

    @model_validator(mode="after")
    def _has_digest_of_a_file(self) -> Self:
        if self.tokenizer_digest is not None and not self.given_tokenizer:
            raise ValueError(
                "tokenizer_digest needs a tokenizer from a file: hf:FOLDER_OR_NAME or a tokenizer.json"
            )
        return self

    @property
    def given_tokenizer(self) -> str | None:
        """Tokenizer that is not made from the training texts; None: words or bytes."""
        return None if self.tokenizer in TOKENIZERS else self.tokenizer

    def pinned_as(self, stored: DataConfig) -> DataConfig:
        """Return the settings with the digest that a run filled in, if they have the same tokenizer."""
        if self.tokenizer_digest is not None or self.tokenizer != stored.tokenizer:
            return self
        return self.model_copy(update={"tokenizer_digest": stored.tokenizer_digest})

    @field_validator("classes")
    @classmethod
    def _differ(cls, classes: list[int | str] | None) -> list[int | str] | None:
        if classes is not None and len({str(each) for each in classes}) < len(classes):
            raise ValueError(f"names a class twice: {classes}")
        return classes

    def at(self, path: str | None) -> DataConfig:
        """Return the settings with another path; None: unchanged."""
        return self if path is None else self.model_copy(update={"path": path})
