"""Tables of substitutions from JSON and from WordNet's database."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from advtrain.edits import COUNTERFITTED, Table, load_table
from advtrain.errors import UserError

#: Three synsets in the format of wndb(5WN), after a line of the license.
DATA_ADJ = """  1 This software and database is being provided to you
00001740 00 a 02 able 0 capable 0 001 = 05207437 n 0000 | having the necessary means
00002098 00 s 03 galore(ip) 0 abundant 0 more_than_enough 0 001 & 00013887 a 0000 | in great numbers
00002312 00 a 01 abaxial 0 002 ;c 06074860 n 0000 ! 00002527 a 0101 | facing away
"""


def test_json_is_read_below_the_data_root(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"Good": ["fine", "fine", "good"], "x": []}))
    table = load_table("mine.json", tmp_path)
    assert dict(table.words) == {"good": ("fine",)}


def test_wordnet_has_the_words_of_each_synset(tmp_path):
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "data.adj").write_text(DATA_ADJ)
    expected = {"able": ("capable",), "capable": ("able",), "galore": ("abundant",), "abundant": ("galore",)}
    assert dict(load_table(str(tmp_path / "dict"), tmp_path).words) == expected
    assert dict(load_table("dict/data.adj", tmp_path).words) == expected


def test_digest_depends_on_the_substitutions_only():
    one = Table.build("one", {"a": ["b"], "c": ["d", "e"]})
    assert one.digest == Table.build("other", {"c": ["d", "e"], "a": ["b"], "f": []}).digest
    assert one.digest != Table.build("one", {"a": ["b"], "c": ["e", "d"]}).digest
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(one) == hash(Table.build("one", {"c": ["d", "e"], "a": ["b"]}))


def test_keys_have_one_case_and_one_apostrophe():
    table = Table.build("t", {"Rock\u2019n": ["roll", "ROCK'N"], "rock'n": ["pop"]})
    assert dict(table.words) == {"rock'n": ("roll", "pop")}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "[1]", "must hold an object"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": "b"}', "substitutions of 'a' must be a list of words"),
        ("a.json", '{"a": ["a"]}', "has no substitution"),
        ("a.txt", "hello\n", "neither a .json file nor a file of WordNet"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        load_table(name, tmp_path)


@pytest.mark.parametrize("name", ["a.json", "data.adj"])
def test_file_that_cannot_be_read_is_named(tmp_path, name, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_text("{}")
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=f"{name}' can't be read: Permission denied"):
        load_table(name, tmp_path)


def test_missing_tables_are_named(tmp_path):
    with pytest.raises(UserError, match="'absent.json' does not exist"):
        load_table("absent.json", tmp_path)
    with pytest.raises(UserError, match="set the folder that contains text/synonyms"):
        load_table("counterfitted", tmp_path)
    with pytest.raises(UserError, match=r"no file of WordNet's database: data\.noun"):
        load_table(str(tmp_path), tmp_path)


def test_counterfitted_is_the_published_table(data_root):
    if not (data_root / COUNTERFITTED).is_file():
        pytest.skip(f"the data root has no {COUNTERFITTED}")
    table = load_table("counterfitted", data_root)
    assert len(table) == 25_591
    assert table.words["good"] == ("alright", "buena", "well", "nice", "decent", "best")
