"""Texts: files and encodings, copies across splits, tokenizers and token ids."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from advtrain.data import AugmentConfig, BatchPlan, DataConfig, Place, load_data
from advtrain.data.locate import data_config
from advtrain.data.summary import DataSummary
from advtrain.data.text_files import read_unlabelled_texts
from advtrain.data.texts import RawText, encode_texts, fit_tokenizer
from advtrain.data.unseen import Accepts, fitted, load_unseen
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.recipe import load_recipe
from advtrain.recipe.data import TextShape
from advtrain.recipe.model import ModelConfig
from advtrain.training.trained_model import check_model
from tests.kit import RECIPES

WORDS = ["red", "green", "blue", "gray", "pink", "teal", "gold", "lime", "navy", "plum"]


def texts(n=40):
    return [(["bad", "good"][i % 2], f"{WORDS[i % 10]} {WORDS[i // 10]} thing, no. {i}") for i in range(n)]


def write(path, rows, columns=("text", "label")):
    text, label = columns
    if path.suffix == ".parquet":
        pq.write_table(pa.table({text: [t for _, t in rows], label: [y for y, _ in rows]}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({label: y, text: t}) + "\n" for y, t in rows))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{y} {t}\n" for y, t in rows))
    else:
        cell = "{0}" if path.suffix == ".tsv" else '"{0}"'
        mark = "\t" if path.suffix == ".tsv" else ";"
        lines = [f"{cell.format(t)}{mark}{y}" for y, t in rows]
        path.write_text("\r\n".join([f"{text}{mark}{label}", *lines, ""]))
    return path


def load(path, **settings):
    return load_data(DataConfig(source="text", path=path.name, **settings), path.parent)


def raw(*given):
    return RawText("here", np.array(given, object), np.zeros(len(given), np.int64))


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_data_set(tmp_path, suffix):
    wanted = load(write(tmp_path / "a.txt", texts()))
    columns = {} if suffix == "txt" else {"text": "words", "label": "kind"}
    found = load(write(tmp_path / f"b.{suffix}", texts(), ("words", "kind")), **columns)
    assert found.digest == wanted.digest
    assert found.class_names == ["bad", "good"]
    assert found.train.texts.tolist() == wanted.train.texts.tolist()
    assert found.shape == (found.text.max_length,)
    assert found.shape.vocabulary == found.text.vocabulary


def write_hub(folder, splits=("train", "test")):
    """Write texts as the Hugging Face Hub stores them: data/SPLIT-00000-of-00002.parquet, with a ClassLabel."""
    rows = [(i % 2, t) for i, (_, t) in enumerate(texts(30 * len(splits)))]
    names = {"info": {"features": {"label": {"names": ["ham", "spam"], "_type": "ClassLabel"}}}}
    (folder / "data").mkdir(parents=True)
    for number, split in enumerate(splits):
        for shard in range(2):
            part = rows[30 * number + 15 * shard :][:15]
            table = pa.table(
                {"idx": range(15), "sentence": [t for _, t in part], "label": [y for y, _ in part]}
            )
            pq.write_table(
                table.replace_schema_metadata({"huggingface": json.dumps(names)}),
                folder / "data" / f"{split}-0000{shard}-of-00002.parquet",
            )
    return folder


def test_parquet_of_the_hub_has_its_splits_and_the_class_names_of_its_schema(tmp_path):
    data = load(write_hub(tmp_path / "set", ("train", "validation", "test")))
    assert data.class_names == ["ham", "spam"]
    assert [len(split) for split in (data.train, data.validation, data.test)] == [30, 30, 30]
    assert data.found.files == 6
    assert data.test.texts[16] == texts(90)[76][1]
    assert data.test.labels.tolist() == [0, 1] * 15
    with pytest.raises(UserError, match="set data.image, or data.source=text for texts"):
        load_data(data_config(str(tmp_path / "set"), tmp_path), tmp_path)


def test_parquet_of_the_hub_without_test_files_is_tested_on_its_validation_files(tmp_path):
    data = load(write_hub(tmp_path / "set", ("train", "validation")))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [27, 3, 30]
    (tmp_path / "set" / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 files of 'train'; file 1 is missing"):
        load(tmp_path / "set")


@pytest.mark.parametrize("place", [".", "train"])
def test_arrow_files_of_save_to_disk_are_refused_with_the_way_to_parquet(tmp_path, place):
    """`datasets` is not installed, so the test writes the files that save_to_disk of datasets 4 writes."""
    folder = tmp_path / "set" / place
    folder.mkdir(parents=True)
    table = pa.table({"text": [t for _, t in texts()], "label": [i % 2 for i in range(40)]})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    if place != ".":
        (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for read in (load, lambda path: load_data(DataConfig(source="parquet", path="set"), tmp_path)):
        with pytest.raises(UserError, match=r"holds arrow files, .*data\['train'\].to_parquet"):
            read(tmp_path / "set")
    with pytest.raises(UserError, match="holds arrow files"):
        data_config(str(tmp_path / "set"), tmp_path)


@pytest.mark.parametrize("names", [["spam", "ham"], ["ham", "spam"], None])
def test_splits_whose_schemas_number_the_classes_otherwise_are_refused(tmp_path, names):
    for split, called in (("train", ["ham", "spam"]), ("test", names)):
        rows = texts()[:30] if split == "train" else texts()[30:]
        table = pa.table({"text": [t for _, t in rows], "label": [i % 2 for i in range(len(rows))]})
        about = {"info": {"features": {"label": {"names": called}}}}
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / f"{split}.parquet"
        )
    if names != ["spam", "ham"]:
        assert load(tmp_path).class_names == ["ham", "spam"]
        return
    with pytest.raises(UserError, match="test.parquet': labels 0, 1, ... are spam, ham, but .* ham, spam"):
        load(tmp_path)


@pytest.mark.parametrize("numbers", ["train", "test"])
def test_labels_that_are_numbers_in_one_split_only_are_refused(tmp_path, numbers):
    for split in ("train", "test"):
        rows = texts()[:30] if split == "train" else texts()[30:]
        rows = [(i % 2 if split == numbers else y, t) for i, (y, t) in enumerate(rows)]
        write(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(UserError, match=f"labels are texts in one split and numbers .*{numbers}: numbers"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "columns", [("words", "kind"), ("text", "kind"), ("words", "label"), ("sentence", "class")]
)
def test_evaluation_finds_the_columns_of_the_training_or_the_usual_ones(tmp_path, suffix, columns):
    data = load(write(tmp_path / "a.jsonl", texts(), ("words", "kind")), text="words", label="kind")
    accepts = Accepts(data.shape, 2, data.class_names, text=data.text)
    write(tmp_path / f"b.{suffix}", texts(6), columns)
    if suffix == "tsv":
        accepts = replace(accepts, text=data.text.model_copy(update={"column": "words", "label": "kind"}))
    found = load_unseen(fitted(data_config(f"b.{suffix}", tmp_path), accepts), tmp_path, accepts).test
    assert found.texts.tolist() == [t for _, t in texts(6)]
    assert found.labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([(0, "red"), (1, "blue")], ("text", "label"), "labels are numbers, but the classes of the model"),
        ([("awful", "red")], ("text", "label"), "label 'awful' of sample 0 is no class"),
        ([("bad", "red")], ("review", "label"), "columns .words, text, .* call the column of texts words"),
        ([("bad", "red")], ("text", "stars"), "call the column of labels kind"),
        ([("bad", " ")], ("text", "label"), "line 1: the text is empty"),
    ],
)  # fmt: skip
def test_evaluation_refuses_texts_whose_labels_or_columns_are_unknown(tmp_path, rows, columns, message):
    data = load(write(tmp_path / "a.jsonl", texts(), ("words", "kind")), text="words", label="kind")
    accepts = Accepts(data.shape, 2, data.class_names, text=data.text)
    write(tmp_path / "b.jsonl", rows, columns)
    with pytest.raises(UserError, match=message):
        load_unseen(data_config("b.jsonl", tmp_path), tmp_path, accepts)


def test_evaluation_takes_numbers_for_classes_that_are_numbers(tmp_path):
    rows = [(i % 2, t) for i, (_, t) in enumerate(texts())]
    data = load(write(tmp_path / "a.jsonl", rows))
    accepts = Accepts(data.shape, 2, data.class_names, text=data.text)
    assert (
        load_unseen(data_config("a.jsonl", tmp_path), tmp_path, accepts).test.labels.tolist() == [0, 1] * 20
    )


def test_names_of_the_columns_are_no_part_of_the_digest(tmp_path):
    one = load(write(tmp_path / "a.jsonl", texts()))
    other = load(write(tmp_path / "b.jsonl", texts(), ("words", "kind")), text="words", label="kind")
    assert (other.text.column, other.text.label) == ("words", "kind")
    assert one.digest == other.digest


def test_copies_of_a_text_never_cross_splits(tmp_path):
    copies = [(y, f"  {t.upper()} ") for y, t in texts(20)]
    data = load(write(tmp_path / "a.txt", [*texts(), *copies, ("good", texts()[0][1])]))
    summary = DataSummary.of(data)
    assert sum(summary.samples.values()) == 61
    assert sum(summary.copies.within.values()) == 21
    assert set(summary.copies.across.values()) == {0}
    assert summary.copies.conflicts >= 2


def test_copies_of_test_texts_leave_the_training_texts(tmp_path):
    write(tmp_path / "train.txt", texts())
    write(tmp_path / "dev.txt", texts(44)[36:])
    write(tmp_path / "test.txt", texts(4))
    data = load_data(DataConfig(source="text", path="."), tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 8, 4)
    assert data.found.notes[:2] == [
        "4 training texts are left out, because they are copies of test texts",
        "4 training texts are left out, because they are copies of validation texts",
    ]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"a one\nb tw\xe9\n", {}, "line 2: byte 0xe9 is not utf-8; set data.encoding"),
        (b"a one\n", {"encoding": "latin"}, None),
        (b"a one\n", {"encoding": "martian"}, "'martian' is no text encoding"),
        (b"a one\n", {"encoding": "undefined"}, "'undefined' is no text encoding"),
        (b"a one\n", {"encoding": "utf\0"}, "is no text encoding"),
        (b"a one\nb\n", {}, "line 2: the text is empty"),
        (b"a one\na two\n", {}, "all texts have one label"),
        (b"\n\n", {}, "no texts found"),
        (b"a one\nb two\n", {"text": "words"}, "has lines `label text`, no columns"),
        (b"a one\nb two\n", {"stream": True}, "data.stream reads texts of .parquet files, not .*a.txt"),
        (b"a one\nb two\n", {"features": ["x"]}, "data.features does not apply to text"),
    ],
)
def test_faulty_lines_and_settings_are_refused(tmp_path, content, settings, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message or "one label"):
        load(tmp_path / "a.txt", **settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nhello,\n", "line 2: the label is empty"),
        ("a.csv", "text,label\nhello,a\n,\n", "line 3: the text is empty"),
        ("a.csv", "words,label\nhello,a\n", "none of the usual columns .*set data.text"),
        (
            "a.csv",
            "text,kind\nhello,a\n",
            "usual columns .label, labels, .*columns are text, kind; set data.label",
        ),
        ("a.csv", "text,label,text\nhello,a,x\n", "several columns text; rename all but one"),
        ("a.csv", "", "no texts found"),
        ("a.csv", 'text,label\n"hello,a\n', "line 3: unexpected end"),
        ("a.tsv", "text\tlabel\none\ttwo\ta\n", "line 2 has 3 cells, the header has 2; cells of a .tsv"),
        (
            "a.jsonl",
            '{"text": "one", "label": 0}\n{"text": 5, "label": 1}\n',
            "line 2: the text is 5, no text",
        ),
        (
            "a.jsonl",
            '{"text": "one", "label": 0}\n{"text": "x", "label": "b"}\n',
            "of several types: int, str",
        ),
        ("a.jsonl", '{"text": "\\ud800", "label": 0}\n', "half of a surrogate pair"),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.doc", "x", "no file of texts"),
    ],
)
def test_faulty_rows_are_refused_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / name, **({"label": "label"} if name.endswith(".tsv") else {}))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", None], [0, 1], "row 1: the text is empty"),
        (["a", " "], [0, 1], "row 1: the text is empty"),
        ([["a"], ["b"]], [0, 1], r"row 0: the text is \['a'\], no text"),
        (["a", "b"], [0, None], "column label: the label of row 1 is null"),
        (["a", "b"], [1, 1], "all texts have one label; a classifier needs two classes"),
        (["a", "b"], [-1, -1], "every label is -1, which marks texts without labels; remove these files"),
        (["a", "b"], [0.5, 1], "label 0.5 of sample 0 is not a whole number"),
    ],
)
def test_faulty_rows_of_parquet_are_refused_with_their_row(tmp_path, texts, labels, message):
    pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a.parquet'.*{message}"):
        load(tmp_path / "a.parquet")


def test_share_of_texts_that_are_cut_is_a_warning_and_in_the_summary(tmp_path):
    rows = [(y, f"{t} {'more ' * (i % 4 == 0)}") for i, (y, t) in enumerate(texts())]
    data = load(write(tmp_path / "a.txt", rows), max_length=7)
    note = "10 of 40 texts (25.0%) are longer than 7 tokens, and their ends are cut off; data.max_length sets"
    assert data.found.notes[0].startswith(note)
    assert DataSummary.of(data).remarks()[0].startswith(note)
    assert not any("cut off" in each for each in load(tmp_path / "a.txt").found.notes)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_classes_with_other_names_in_the_test_split_are_refused(tmp_path, suffix):
    write(tmp_path / f"train.{suffix}", texts()[:30])
    write(
        tmp_path / f"test.{suffix}",
        [({"bad": "negative", "good": "positive"}[y], t) for y, t in texts()[30:]],
    )
    with pytest.raises(
        UserError, match="'negative' of sample 0 is no class of .*; the classes are bad, good"
    ):
        load(tmp_path)


def test_copies_with_another_label_in_the_test_split_are_counted(tmp_path):
    """Numbers that mean different classes in two splits show only in copies with other labels."""
    write(tmp_path / "train.txt", texts())
    other = {"bad": "good", "good": "bad"}
    write(tmp_path / "test.txt", [(other[y] if i else y, t) for i, (y, t) in enumerate(texts(6))])
    note = "6 training texts are left out, because they are copies of test texts; 5 of them have another label there"
    assert load(tmp_path).found.notes[0] == note


def test_encoding_of_parquet_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", texts())
    with pytest.raises(UserError, match="data.encoding does not apply to .*a.parquet"):
        load(path, encoding="latin-1")


def test_label_that_only_the_test_split_has_is_refused(tmp_path):
    write(tmp_path / "train.txt", texts())
    write(tmp_path / "test.txt", [("1", "one"), ("0", "two")])
    with pytest.raises(UserError, match="label '0' of sample 1 is no class of the training samples"):
        load_data(DataConfig(source="text", path="."), tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".tsv", ".jsonl"])
def test_path_of_texts_is_recognized(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", texts())
    assert data_config(str(path), tmp_path).source == "text"
    assert data_config(str(tmp_path), tmp_path).source == "text"


@pytest.mark.parametrize("name", ["README.txt", "labels.tsv", "about.jsonl"])
def test_folder_of_images_with_a_file_of_text_is_no_folder_of_texts(tmp_path, name):
    (tmp_path / name).write_text("about the images\n")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.PNG").write_bytes(b"")
    assert data_config(str(tmp_path), tmp_path).source == "image_folder"


def test_folder_of_texts_without_labels_is_refused(tmp_path):
    write(tmp_path / "a.txt", texts())
    with pytest.raises(UserError, match="is a folder; pass one file of texts: .parquet, .jsonl"):
        read_unlabelled_texts(tmp_path, None)


@pytest.mark.parametrize(
    ("name", "column", "content", "message"),
    [
        ("a.txt", None, b"tw\xe9\n", "byte 0xe9 is not utf-8; save the file in UTF-8"),
        ("a.tsv", None, b"one text\n", "call the column of texts text, in the first line"),
        ("a.tsv", "review", b"text\none\n", "no column review; .*call the column of texts review"),
    ],
)
def test_advice_on_texts_without_labels_names_no_setting(tmp_path, name, column, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as found:
        read_unlabelled_texts(tmp_path / name, column)
    assert "data." not in str(found.value)


def test_words_are_lower_case_and_the_most_frequent_ones_of_the_training_texts():
    spec = fit_tokenizer(raw("The cat, the dog.", "the CAT!"), "words", 4, None)
    made = Tokenizer.from_str(spec.tokenizer)
    assert spec.vocabulary == 6
    assert spec.max_length == 6
    assert made.encode("THE [PAD] cat zebra").tokens == ["the", "[UNK]", "[UNK]", "[UNK]", "cat", "[UNK]"]
    assert 0 not in made.encode("[PAD] [UNK] \0").ids  # a text cannot hold padding
    ids, cut, unknown = encode_texts(spec, ["the cat", "the the the the the the the"], "here")
    assert ids[0].tolist()[2:] == [0, 0, 0, 0]
    assert cut.tolist() == [False, True]
    assert unknown == 0


def test_bytes_are_those_of_utf8_with_case():
    spec = fit_tokenizer(raw("x"), "bytes", None, 8)
    ids, cut, _ = encode_texts(spec, ["aA é", "\t[PAD]123"], "here")
    assert spec.vocabulary == 257
    assert len(set(ids[0][:5].tolist())) == 5
    assert ids[0].tolist()[5:] == [0, 0, 0]
    assert cut.tolist() == [False, True]
    assert (ids[1] > 0).all()
    with pytest.raises(UserError, match="there are always 256 bytes"):
        fit_tokenizer(raw("x"), "bytes", 10, None)


def test_tokenizer_is_that_of_the_training_split_and_part_of_the_digest(tmp_path):
    path = write(tmp_path / "a.txt", texts())
    data, short = load(path), load(path, vocabulary=5)
    known = Tokenizer.from_str(data.text.tokenizer).get_vocab()
    seen = {word for text in data.train.texts for word in text.replace(",", " ,").replace(".", " .").split()}
    assert set(known) == seen | {"[PAD]", "[UNK]"}
    assert data.digest != short.digest


def test_batch_is_as_long_as_its_longest_text(tmp_path):
    rows = [(y, "word " * (1 + i % 7)) for i, (y, _) in enumerate(texts(40))]
    split = load(write(tmp_path / "a.txt", [(y, f"{t}{i}") for i, (y, t) in enumerate(rows)])).train
    for batch in pickle.loads(pickle.dumps(split)).train_batches(3, 0, 0, AugmentConfig(), Place()):
        lengths = (batch.x != 0).sum(1)
        assert batch.x.shape[1] == lengths.max()
        assert batch.x.is_floating_point() is False


@pytest.fixture
def lengths(tmp_path):
    """Return a function that loads 203 training texts of 1 to 30 words."""
    rng = np.random.default_rng(0)
    rows = [(i % 2, f"{'word ' * int(rng.integers(0, 30))}{i}") for i in range(283)]
    write(tmp_path / "a.txt", rows)
    return lambda **settings: load(tmp_path / "a.txt", **settings).train


def epoch_of(split, epoch=0, place=None, start=0, seed=0):
    return list(split.train_batches(7, seed, epoch, AugmentConfig(), place or Place(), start))


def test_grouped_batches_hold_each_text_once_and_little_padding(lengths):
    plain, grouped = lengths(), lengths(group_by_length=True)
    assert len(grouped) == 203

    def padding(split):
        batches = epoch_of(split)
        assert sorted(int(x[x != 0][-1]) for b in batches for x in b.x) == sorted(
            int(x[x != 0][-1]) for x in split.images
        )
        assert {len(b.y) for b in batches} == {7}
        return sum(int((b.x == 0).sum()) for b in batches) / sum(b.x.numel() for b in batches)

    assert padding(plain) > 0.3
    assert padding(grouped) < 0.1


@pytest.mark.parametrize(("n", "batch_size"), [(1, 7), (203, 7), (700, 7), (1001, 5), (351, 7)])
def test_grouped_plan_is_a_permutation_of_similar_lengths_in_random_order(n, batch_size):
    lengths = np.random.default_rng(1).integers(1, 60, n)
    plan = BatchPlan(np.random.default_rng(2).permutation(n), batch_size)
    grouped = plan.grouped_by_length(lengths, np.random.default_rng(3))
    assert sorted(grouped.order.tolist()) == list(range(n))
    if n < 200:
        return
    ranges = [np.ptp(lengths[grouped.part(step, 0, 1)[0]]) for step in range(plan.num_steps)]
    assert np.mean(ranges) < 12
    means = [lengths[grouped.part(step, 0, 1)[0]].mean() for step in range(plan.num_steps)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4
    whole = grouped.part(0, 0, 1)[0]
    assert not np.array_equal(lengths[whole], np.sort(lengths[whole])) or len(set(lengths[whole])) == 1


def test_grouped_batches_are_a_function_of_seed_epoch_and_step(lengths):
    split = lengths(group_by_length=True)
    whole = epoch_of(split, 3)
    rest = epoch_of(pickle.loads(pickle.dumps(split)), 3, start=9)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(whole[9:], rest, strict=True))
    firsts = {
        tuple(batches[0].x.flatten().tolist())
        for batches in (whole, epoch_of(split, 4), epoch_of(split, 3, seed=1))
    }
    assert len(firsts) == 3


def test_grouped_global_batches_do_not_depend_on_the_number_of_workers(lengths):
    split = lengths(group_by_length=True).take(np.arange(200))
    ranks = [epoch_of(split, place=Place(rank, 3)) for rank in range(3)]
    for step, batch in enumerate(epoch_of(split)):
        parts = [ids for rank in ranks for ids in rank[step].x]
        assert [x[x != 0].tolist() for x in parts] == [x[x != 0].tolist() for x in batch.x]


def test_order_without_grouping_is_that_of_earlier_runs(lengths):
    """A run that was started before the setting existed must be resumed with its own batches."""
    split = lengths()
    order = np.random.default_rng([5, 2]).permutation(203)
    found = torch.cat([b.y for b in epoch_of(split, 2, seed=5)]).numpy()
    assert np.array_equal(found, split.labels[order])


def test_grouping_by_length_is_refused_for_images():
    config = DataConfig(source="digits", group_by_length=True)
    with pytest.raises(
        UserError, match="data.group_by_length does not apply to digits; it is for text, sst2"
    ):
        load_data(config, Path())


def test_other_texts_are_encoded_by_the_tokenizer_of_the_model(tmp_path):
    data = load(write(tmp_path / "a.txt", texts()))
    accepts = Accepts(data.shape, 2, data.class_names, None, data.text)
    config = DataConfig(source="text", path="b.txt")
    write(tmp_path / "b.txt", [("good", "red thing"), ("bad", "unheard of")])
    other = load_unseen(config, tmp_path, accepts)
    assert other.test.images.shape == (2, data.text.max_length)
    assert other.test.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="the model has no tokenizer"):
        load_unseen(config, tmp_path)


def test_model_of_images_refuses_texts():
    with pytest.raises(UserError, match="but the samples are texts"):
        build_model(ModelConfig(name="mlp"), TextShape(9, 50), 2)


def test_shape_of_texts_survives_copies():
    shape = pickle.loads(pickle.dumps(TextShape(9, 50)))
    assert (shape, shape.vocabulary) == ((9,), 50)


def test_settings_of_texts_change_the_digest_only_if_set():
    path = RECIPES / "digits.yaml"
    one = load_recipe(path)
    # the digest from before recipes had settings of texts
    assert one.digest() == "dd494689b15cdc8d9e308c5265b6b65bcda08927b32536d0bf0c34ec7c415e14"
    assert one.digest() == load_recipe(path, ["data.text=null", "data.encoding=null"]).digest()
    assert one.digest() == load_recipe(path, ["data.group_by_length=false"]).digest()
    assert one.digest() != load_recipe(path, ["data.max_length=12"]).digest()
    assert one.digest() != load_recipe(path, ["data.group_by_length=true"]).digest()


def test_shortcuts_read_the_published_files(data_root):
    data = load_data(DataConfig(source="trec"), data_root)
    assert len(data.test) == 500
    assert data.class_names[:3] == ["description", "entity", "abbreviation"]
    assert data.test.texts[3] == "What is an atom ?"
    assert data.class_names[data.test.labels[3]] == "description"


@pytest.mark.parametrize("name", ["sms", "sst2", "trec"])
def test_shipped_recipe_of_texts_fits_its_data(name, data_root):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.data.source == name
    assert check_model(recipe, load_data(recipe.data, data_root)) == []


def test_shortcut_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="sms is not in .*--data-root"):
        load_data(DataConfig(source="sms"), tmp_path)
