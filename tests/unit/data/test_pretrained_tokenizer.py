"""Tokenizers of pretrained networks and of files: token ids, cuts, special tokens, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from advtrain.data import DataConfig, load_data
from advtrain.data.pretrained_tokenizer import kept_tokenizer, pretrained_tokenizer
from advtrain.data.texts import RawText, TextSpec, TextSplit, encode_texts, tokenizer_digest
from advtrain.edits import Encoder
from advtrain.errors import UserError
from advtrain.recipe import Recipe
from advtrain.recipe.paths import override
from tests.hf_kit import SPECIAL, WORDS, hf_recipe, questions, tokenizer_json

CLS, SEP = 2, 3


def texts(*given: str) -> RawText:
    return RawText("q", np.array(given, object), np.zeros(len(given), np.int64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 9}')
    return tmp_path / "bert"


def word(text: str) -> int:
    return len(SPECIAL) + WORDS.index(text)


def test_ids_are_those_of_the_pretrained_tokenizer(folder):
    train = texts("who made THINGS ?", "where is the place ?")
    spec = pretrained_tokenizer(train, f"hf:{folder}", None)
    ids, cut, _ = encode_texts(spec, train.texts.tolist(), "q")
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.no_truncation()
    for row, text in zip(ids, train.texts, strict=True):
        assert row[row != 0].tolist() == made.encode(text).ids
    assert ids[0].tolist() == [CLS, word("who"), word("made"), word("thing"), word("##s"), word("?"), SEP]
    assert not cut.any()
    assert (spec.max_length, spec.vocabulary) == (7, len(SPECIAL) + len(WORDS))


@pytest.mark.parametrize(("name", "number"), [("[UNK]", 1), ("[UNK]", 100), ("<unk>", 100), ("[OOV]", 7)])
def test_share_of_unknown_words_is_that_of_the_tokenizers_own_token(name, number):
    made = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 2, name: number}, unk_token=name))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_truncation(4)
    made.enable_padding()
    spec = TextSpec(max_length=4, vocabulary=101, tokenizer=made.to_str())
    assert encode_texts(spec, ["good zzqx", "good"], "q")[2] == 1 / 3
    assert Encoder(spec).unknown == number


def test_a_text_that_is_cut_keeps_its_special_tokens(folder):
    spec = pretrained_tokenizer(texts("who"), f"hf:{folder}", 5)
    ids, cut, _ = encode_texts(spec, ["who made the thing ?"], "q")
    assert ids[0].tolist() == [CLS, word("who"), word("made"), word("the"), SEP]
    assert cut.tolist() == [True]


def test_texts_are_no_longer_than_the_positions_of_the_network(folder):
    spec = pretrained_tokenizer(texts("who " * 50), f"hf:{folder}", None)
    assert spec.max_length == 9


def test_letters_of_special_tokens_hide_no_word(folder):
    spec = pretrained_tokenizer(texts("who made the thing ? 1"), f"hf:{folder}", 12)
    ids, _, _ = encode_texts(spec, ["who [PAD] made [SEP] it"], "q")
    assert (ids[0] != 0).sum() == 11  # [CLS], who, [ pad ], made, [ sep ], it, [SEP], of which one is cut
    assert (ids[0] == SEP).sum() == 1


def cased_words(folder: Path) -> TextSpec:
    """WordPiece that finds [PAD] and [SEP] in a text."""
    values = json.loads(tokenizer_json()) | {"normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return pretrained_tokenizer(texts("who"), f"hf:{folder}", 7)


def pieces(folder: Path) -> TextSpec:
    """Unigram that finds <pad> in a text."""
    scores = [("<pad>", 0.0), ("<unk>", 0.0), ("▁who", -1.0), ("▁is", -1.0), ("▁", -2.0)]
    made = Tokenizer(models.Unigram(scores, 1))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.save(str(folder / "tokenizer.json"))
    return pretrained_tokenizer(texts("who"), f"hf:{folder}", 7)


def test_special_tokens_in_a_text_are_unknown_words(folder):
    spec, text = cased_words(folder), "who [PAD] [SEP] is"
    ids, _, _ = encode_texts(spec, [text], "q")
    assert ids[0].tolist() == [CLS, word("who"), 1, 1, word("is"), SEP, 0]
    assert np.frombuffer(Encoder(spec).ids([text])[0], np.uint32).tolist() == ids[0, :6].tolist()
    assert next(Encoder(spec).ids_and_unknown([text + " is [PAD]"]))[1] == 3
    spec, text = pieces(folder), "who <pad> is"
    ids, _, _ = encode_texts(spec, [text], "q")
    assert ids[0].tolist() == [2, 4, 1, 3, 0, 0, 0]
    assert np.frombuffer(Encoder(spec).ids([text])[0], np.uint32).tolist() == [2, 4, 1, 3]


def test_special_token_in_a_text_is_refused_without_an_unknown_word(folder):
    ids = {token: number for number, token in enumerate(["<pad>", *"<pad>", "<p", "ad", "<pad"])}
    merges = [("a", "d"), ("<", "p"), ("<p", "ad"), ("<pad", ">")]
    Tokenizer(models.BPE(ids, merges)).save(str(folder / "tokenizer.json"))
    spec = pretrained_tokenizer(texts("pad"), f"hf:{folder}", 7)
    assert encode_texts(spec, ["pad"], "q")[0][0, :3].tolist() == [2, 7, 0]
    for encode in (lambda t: encode_texts(spec, t, "q"), Encoder(spec).ids):
        with pytest.raises(
            UserError, match="holds the special token '<pad>', and the tokenizer has no unknown"
        ):
            encode(["a<pad>a"])


def test_text_with_special_tokens_only_is_refused(folder):
    spec = pretrained_tokenizer(texts("who"), f"hf:{folder}", 7)
    for text in ("", " \n"):
        with pytest.raises(UserError, match="q: text 1 has no words"):
            encode_texts(spec, ["who", text], "q")
        assert Encoder(spec).ids(["who", text])[1] == b""


def test_batch_is_as_long_as_its_last_token():
    split = TextSplit(np.zeros((2, 5), np.int64), np.zeros(2, np.int64), np.array(["a", "b"], object))
    x = torch.tensor([[3, 0, 4, 0, 0], [3, 0, 0, 0, 0]])
    assert split.to_inputs(x).tolist() == [[3, 0, 4], [3, 0, 0]]
    assert split.to_inputs(torch.zeros(2, 5)).shape == (2, 1)


def test_data_has_the_special_tokens_in_its_shape(folder, tmp_path):
    questions(tmp_path / "q.jsonl")
    data = load_data(DataConfig(source="text", path="q.jsonl", tokenizer=f"hf:{folder}"), tmp_path)
    assert data.shape.special == (CLS, SEP)
    assert (data.train.images[:, 0] == CLS).all()
    words = load_data(DataConfig(source="text", path="q.jsonl"), tmp_path)
    assert words.shape.special == ()


@pytest.mark.parametrize("kind", ["words", "bytes", "hf"])
def test_kept_tokenizer_gives_the_same_data(folder, tmp_path, kind):
    questions(tmp_path / "q.jsonl")
    given = f"hf:{folder}" if kind == "hf" else kind
    config = DataConfig(source="text", path="q.jsonl", tokenizer=given)
    data = load_data(config, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(data.text.tokenizer)
    (folder / "tokenizer.json").unlink()
    kept = kept_tokenizer(tmp_path / "run")
    assert kept == data.text
    named = kept_tokenizer(tmp_path / "run", "question", "kind")
    assert (named.column, named.label) == ("question", "kind")
    assert load_data(config, tmp_path, like=kept).digest == data.digest
    by_path = config.model_copy(update={"tokenizer": str(tmp_path / "run" / "tokenizer.json")})
    again = load_data(by_path, tmp_path)
    assert tokenizer_digest(again.text.tokenizer) == tokenizer_digest(data.text.tokenizer)
    assert (again.train.images == data.train.images).all()


def test_digest_is_that_of_the_tokenizer_and_not_of_its_length(folder):
    found = [pretrained_tokenizer(texts("who"), f"hf:{folder}", n).tokenizer for n in (4, 8)]
    assert found[0] != found[1]
    assert len({tokenizer_digest(each) for each in found}) == 1
    (folder / "tokenizer.json").write_text(tokenizer_json(WORDS[::-1]))
    other = pretrained_tokenizer(texts("who"), f"hf:{folder}", 4).tokenizer
    assert tokenizer_digest(other) != tokenizer_digest(found[0])


def test_another_tokenizer_than_the_digest_says_is_refused(folder, tmp_path):
    questions(tmp_path / "q.jsonl")
    config = DataConfig(source="text", path="q.jsonl", tokenizer=f"hf:{folder}")
    digest = tokenizer_digest(load_data(config, tmp_path).text.tokenizer)
    pinned = config.model_copy(update={"tokenizer_digest": digest})
    assert load_data(pinned, tmp_path).text is not None
    (folder / "tokenizer.json").write_text(tokenizer_json(WORDS[::-1]))
    with pytest.raises(UserError, match=f"is another tokenizer .* than data.tokenizer_digest .{digest[:12]}"):
        load_data(pinned, tmp_path)


def test_recipe_has_the_tokenizer_of_its_network(tmp_path):
    model = {"name": "hf:here/bert"}
    assert hf_recipe(tmp_path / "q.jsonl", model).data.tokenizer == "hf:here/bert"
    assert hf_recipe(tmp_path / "q.jsonl", model, data={"tokenizer": "words"}).data.tokenizer == "words"
    assert hf_recipe(tmp_path / "q.jsonl", {"name": "text_cnn"}).data.tokenizer is None


def test_digest_of_a_complete_recipe_does_not_depend_on_the_folder(tmp_path):
    complete = {"args": {"model_type": "bert", "hidden_size": 16}}
    pinned = {"tokenizer_digest": "a" * 64}
    digests = {
        hf_recipe(tmp_path / "q.jsonl", {"name": name, **complete}, data=pinned).digest()
        for name in ("hf:one", "hf:other")
    }
    other = hf_recipe(
        tmp_path / "q.jsonl", {"name": "hf:one", **complete}, data={"tokenizer_digest": "b" * 64}
    )
    assert len(digests) == 1
    assert other.digest() not in digests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.write_text("{"), "is no tokenizer of the package tokenizers"),
        (lambda f: f.write_text("[]"), "is no tokenizer of the package tokenizers"),
        (
            lambda f: f.write_text(json.dumps({"model": {"vocab": {"[PAD]": 0}}})),
            "is no tokenizer of the package",
        ),
        (lambda f: f.write_bytes(b"\xff"), "is damaged: it is not UTF-8"),
        (lambda f: f.unlink(), r"has no tokenizer.json; write it with AutoTokenizer"),
        (
            lambda f: f.write_text(tokenizer_json(special=SPECIAL[::-1])),
            r"token 0 is '\[MASK\]', which is not its",
        ),
        (lambda f: f.write_text(tokenizer_json(special=["<x>", *SPECIAL])), "token 0 is '<x>'"),
    ],
)
def test_bad_tokenizer_is_refused(folder, change, message):
    change(folder / "tokenizer.json")
    with pytest.raises(UserError, match=message):
        pretrained_tokenizer(texts("who"), f"hf:{folder}", None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hf:", "hf: needs the folder or the name"),
        ("hf:./none", "there is no such folder; name a folder with config.json"),
        ("hf:nobody/nothing", "the cache of the Hugging Face hub lacks it; .* hf download nobody/nothing"),
        ("none/tokenizer.json", "cannot read the tokenizer 'none/tokenizer.json': No such file"),
    ],
)
def test_missing_tokenizer_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        pretrained_tokenizer(texts("who"), given, None)


def test_cached_repository_of_the_hub_is_found_by_its_name(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--bert" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert pretrained_tokenizer(texts("who"), "hf:org/bert", None).max_length == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "letters"}, "takes words, bytes, hf:FOLDER_OR_NAME"),
        (
            {"tokenizer": "words", "tokenizer_digest": "a" * 64},
            "tokenizer_digest needs a tokenizer from a file",
        ),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(source="sst2", **settings)


def test_vocabulary_is_refused_for_a_pretrained_tokenizer(folder, tmp_path):
    questions(tmp_path / "q.jsonl")
    config = DataConfig(source="text", path="q.jsonl", tokenizer=f"hf:{folder}", vocabulary=10)
    with pytest.raises(UserError, match=r"data.vocabulary is for words; the tokenizer 'hf:.*' has its own"):
        load_data(config, tmp_path)


def test_another_tokenizer_removes_the_digest(tmp_path):
    values = hf_recipe(tmp_path / "q.jsonl", {"name": "hf:a"}, data={"tokenizer_digest": "a" * 64}).values()
    override(values, {"data.tokenizer": "words"})
    assert Recipe.model_validate(values).data.tokenizer_digest is None
