"""Damaged and hostile files: each command ends with one line and code 2, soon, and runs nothing."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advtrain.data import DataConfig, load_data
from advtrain.errors import UserError
from advtrain.evaluation import load_report
from advtrain.runs.folder import RunFolder
from advtrain.schema import parse_number
from advtrain.tracking.tracker import Tracker
from tests.kit import digits_recipe, run_here

pytestmark = pytest.mark.timeout(60)

DEEP, LONG = "[" * 100_000, "9" * 5000
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)
)

#: Text of a recipe, campaign, study or policy.
YAML = {
    "not YAML": "name: [",
    "not text": b"\xff\xfe\x00name",
    "control characters": "name: \x00\x07",
    "deep nesting": DEEP,
    "deep mapping": "{a: " * 50_000,
    "number of 5,000 digits": f"seed: {LONG}",
    "30 megabytes": "# " + "x" * 30_000_000,
    "aliases that stand for a billion values": ALIASES,
    "alias of itself": "a: &a [*a]",
    "Python object": "name: !!python/object/apply:os.system ['touch touched']",
    "impossible date": "name: 2026-13-45",
    "base 60": "seed: 1:30:00",
    "a list": "[1, 2]",
    "a number": "12",
    "nothing": "",
}


def refused(capsys: Any, *words: str) -> str:
    """Run a command, check that it is refused in a few plain lines, and return them."""
    code = run_here(*words)
    shown = capsys.readouterr().err
    assert code == 2, shown
    assert "error: " in shown
    assert "Traceback" not in shown
    assert len(shown) < 5000
    return str(shown)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("case", YAML)
@pytest.mark.parametrize("words", [("show",), ("tune",), ("compare",), ("promote", "digits", "--policy")])
def test_yaml(case, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *words, str(write(tmp_path / "file.yaml", YAML[case])))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "text", ["1e-99999999", "1e99999999", "9" * 5000, "1/1e-99999999", "nan", "--1", "1/0"]
)
def test_absurd_number_ends_soon(text, tmp_path, capsys):
    assert not isinstance(parse_number(text), float)
    assert "adversary.eps" in refused(capsys, "show", "digits", "--set", f"adversary.eps={text}")


def test_numbers_of_recipes_are_the_nearest_floats():
    assert [parse_number(t) for t in ("8/255", "1e-4", "0.1", " 3 / 4 ", "1e3/3")] == [
        8 / 255,
        1e-4,
        0.1,
        0.75,
        1e3 / 3,
    ]


@pytest.mark.parametrize(
    "setting",
    [
        "adversary.eps=4000000000.0",
        "training.epochs=100000000000",
        "training.batch_size=1000000000000",
        "optimizer.lr=1.0e+20",
        "seed=99999999999999999999",
        pytest.param("seed=" + "9" * 4000, id="seed of 4,000 digits"),
        pytest.param("optimizer.lr=" + "9" * 4000, id="rate of 4,000 digits"),
        "data.num_classes=1000000000",
        "objective.adv_ce=1.0e+12",
        "optimizer.schedule.milestones=[1.0e+12]",
    ],
)
def test_numbers_have_upper_bounds(setting, capsys):
    assert setting.partition("=")[0].rpartition(".")[2] in refused(capsys, "show", "digits", "--set", setting)


def npy(header: str, content: bytes = b"") -> bytes:
    raw = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + content


def npz(**arrays: Any) -> bytes:
    written = io.BytesIO()
    np.savez_compressed(written, **arrays)
    return written.getvalue()


def header(shape: str) -> str:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"


GRAY = np.zeros((20, 1, 4, 4), np.uint8)
NPZ: dict[str, Callable[[], bytes]] = {
    "objects": lambda: npz(x=np.array([{}, []] * 10, object), y=np.arange(20)),
    "labels of uint64 maximum": lambda: npz(x=GRAY, y=np.full(20, 2**64 - 1, np.uint64)),
    "a label of 10^9": lambda: npz(x=GRAY, y=np.array([0] * 19 + [10**9])),
    "cut": lambda: npz(x=GRAY, y=np.arange(20) % 2)[:150],
    "empty": lambda: b"",
    "text": lambda: b"x,y\n1,2\n",
    "huge shape": lambda: npy(header("(1000000000000000,)")),
    "negative shape": lambda: npy(header("(-1,)")),
    "code in the header": lambda: npy(header("(open('touched', 'w'),)")),
    "deep header": lambda: npy("(" * 5000),
    "header of a gigabyte": lambda: b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + b" " * 100,
}


@pytest.mark.parametrize("case", NPZ)
def test_npz(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.npz", NPZ[case]())
    words = ["train", "digits", "--set", "data.source=npz", "--set", f"data.path={tmp_path / 'data.npz'}"]
    refused(capsys, *words, "--set", "model={name: mlp, args: {width: 4}}")
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "runs").exists()


def test_npz_larger_than_the_memory_is_not_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("advtrain.data.arrays.os.sysconf", lambda name: 1000)
    write(tmp_path / "data.npz", npz(x=np.zeros((2000, 1, 28, 28), np.uint8), y=np.arange(2000) % 2))
    words = ["train", "digits", "--set", "data.source=npz", "--set", f"data.path={tmp_path / 'data.npz'}"]
    assert "bytes of memory" in refused(capsys, *words)


def png(width: int, height: int, content: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


IMAGES = {
    "bomb": png(60_000, 60_000),
    "cut": png(8, 8, b"\0" * 20)[:60],
    "text": b"not an image",
    "empty": b"",
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case, tmp_path):
    for number in range(10):
        for kind in ("a", "b"):
            write(tmp_path / "images" / kind / f"{number}.png", IMAGES[case])
    with pytest.raises(UserError, match="cannot decode"):
        load_data(DataConfig(source="image_folder", path=str(tmp_path / "images")), tmp_path)


PARQUET = {"text": b"PAR1" + b"x" * 100 + b"PAR1", "cut": b"PAR1\x15\x04", "empty": b""}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet(case, tmp_path):
    write(tmp_path / "train.parquet", PARQUET[case])
    with pytest.raises(UserError, match="not a readable parquet"):
        load_data(DataConfig(source="parquet", path="train.parquet"), tmp_path)


class Touch:
    """Object whose unpickling makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("touched", "w")


def pickled(value: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


WEIGHTS = {
    "object.pth": lambda: pickled({"state_dict": Touch()}),
    "old.pt": lambda: (
        b"\x80\x02c__builtin__\nopen\nq\x00X\x07\x00\x00\x00touchedq\x01X\x01\x00\x00\x00wq\x02\x86R."
    ),
    "text.pth": lambda: b"weights",
    "empty.pt": lambda: b"",
    "cut.pth": lambda: pickled({"w": torch.zeros(1000)})[:500],
    "size.safetensors": lambda: struct.pack("<Q", 2**60) + b"{}",
    "deep.safetensors": lambda: struct.pack("<Q", 100_000) + DEEP.encode(),
    "offsets.safetensors": lambda: (
        struct.pack("<Q", 70)
        + json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}).encode().ljust(70)
    ),
    "text.pt2": lambda: b"archive",
    "empty.pt2": lambda: b"",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, WEIGHTS[name]())
    words = ["evaluate", name, "--data", "digits", "--threat", "linf:0.1"]
    refused(capsys, *words, *([] if name.endswith("pt2") else ["--model", "cnn2"]))
    assert not (tmp_path / "touched").exists()


#: Content of a JSON file of a run folder.
JSON = {
    "not JSON": "{",
    "not text": b"\xff\xfe",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "no keys": "{}",
    "deep nesting": DEEP,
    "number of 5,000 digits": f'{{"status": {LONG}}}',
    "empty": "",
}


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize("command", [("train", "--resume"), ("evaluate",), ("sync",)])
def test_run_json(case, command, tmp_path, capsys):
    write(tmp_path / "run" / "recipe.yaml", digits_recipe().to_yaml())
    write(tmp_path / "run" / "run.json", JSON[case])
    refused(capsys, *command, str(tmp_path / "run"), "--runs", str(tmp_path))


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize("file", ["tracking.json", "report/report.json"])
def test_other_records(case, file, tmp_path):

    write(tmp_path / file, JSON[case])
    with pytest.raises(UserError):
        load_report(tmp_path / "report") if "report" in file else Tracker.reopen(
            RunFolder(tmp_path), "sqlite:////none.db"
        )


@pytest.mark.parametrize("case", [c for c in JSON if c not in ("empty", "no keys", "not JSON")])
def test_metrics_jsonl(case, tmp_path):

    content = JSON[case]
    write(tmp_path / "metrics.jsonl", (content if isinstance(content, bytes) else content.encode()) + b"\n")
    with pytest.raises(UserError, match="metrics.jsonl"):
        RunFolder(tmp_path).metrics()
