"""Hostile pt2 archives: none may run code, and none may remember its inputs.

Each touches a file if its code runs. Where torch itself falls for it, a test shows that the file is touched, so that
the corpus is known to be armed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.models.archive import load_archive, refusal

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
Records = list[tuple[str, bytes]]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("memory", torch.ones(8))
        self.constant = torch.arange(3.0)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async((x >= 0).all(), "input values must lie in [0, 1]")
        with torch.no_grad():
            scale = x.sum() * 0 + 1
        hidden = nn.functional.relu(self.linear(self.bn(x)), inplace=True).flatten(1)
        return hidden * scale + self.constant + self.memory.sum()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def export(module: nn.Module) -> bytes:
    written = io.BytesIO()
    batch = {0: torch.export.Dim("batch", min=1)}
    torch.export.save(torch.export.export(module, (torch.ones(2, 4),), dynamic_shapes=(batch,)), written)
    return written.getvalue()


@pytest.fixture(scope="module")
def honest() -> bytes:
    return export(Small().eval())


def records_of(content: bytes) -> Records:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(i.filename.removeprefix("archive/"), archive.read(i)) for i in archive.infolist()]


def archive_of(records: Records, compression: int = zipfile.ZIP_STORED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names
        for name, content in records:
            archive.writestr(f"archive/{name}", content)
    return written.getvalue()


def with_json(records: Records, name: str, change: Callable[[Any], None]) -> Records:
    values = json.loads(dict(records)[name])
    change(values)
    return [(n, json.dumps(values).encode() if n == name else c) for n, c in records]


def saved(value: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


def graph(values: Any) -> Any:
    return values["graph_module"]["graph"]


def call(values: Any) -> Any:
    return values["graph_module"]["module_call_graph"][0]["signature"]


def renamed(values: Any, old: str, new: str) -> Any:
    if isinstance(values, dict):
        return {new if k == old else k: renamed(v, old, new) for k, v in values.items()}
    if isinstance(values, list):
        return [renamed(v, old, new) for v in values]
    return new if values == old else values


def expression(values: Any, text: str) -> Any:
    if isinstance(values, dict):
        return {k: text if k == "expr_str" else expression(v, text) for k, v in values.items()}
    return [expression(v, text) for v in values] if isinstance(values, list) else values


def node_that_touches(path: Path) -> dict[str, Any]:
    argument = {"name": "", "arg": {"as_string": f"touch {path}"}, "kind": 1}
    node = {"target": "torch.os.system", "inputs": [argument], "outputs": [], "metadata": {}}
    return node | {"is_hop_single_tensor_return": None, "name": "touched"}


def file_mapping(path: Path) -> dict[str, Any]:
    values = [("filename", {"as_string": str(path)}), ("shared", {"as_bool": True}), ("size", {"as_int": 8})]
    inputs = [{"name": name, "arg": value, "kind": 1} for name, value in values]
    made = {"target": "torch.ops.aten.from_file.default", "inputs": inputs, "metadata": {}}
    return made | {"outputs": [{"as_tensor": {"name": "file"}}], "name": "file"}


def method_of_a_tensor(path: Path) -> list[dict[str, Any]]:
    """Return nodes that call `memory.numpy().tofile(path)`.

    A value called `self` becomes a variable of the generated code, so that a region called `numpy` means its method.
    """
    meta = {
        "dtype": 7,
        "sizes": [{"as_int": 8}],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
    }
    meta |= {"strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7}

    def tensor(name: str) -> dict[str, Any]:
        return {"as_tensor": {"name": name}}

    def body(inputs: str, outputs: str, nodes: list[Any], single: bool = False) -> dict[str, Any]:
        empty: dict[str, Any] = {
            f"{kind}_values": {} for kind in ("sym_int", "sym_bool", "sym_float", "custom_obj")
        }
        names = {*inputs.split(), *outputs.split()}
        ends = {
            "inputs": [tensor(n) for n in inputs.split()],
            "outputs": [tensor(n) for n in outputs.split()],
        }
        values = {"tensor_values": dict.fromkeys(names, meta), "is_single_tensor_return": single}
        return {**ends, "nodes": nodes, **empty, **values}

    def region(name: str, graph: Any, arguments: list[Any], outputs: str, node: str) -> dict[str, Any]:
        given = [{"as_bool": False}, {"as_graph": {"name": name, "graph": graph}}, *arguments]
        found = {"target": "torch.ops.higher_order.wrap_with_set_grad_enabled", "metadata": {}, "name": node}
        found |= {"inputs": [{"name": "", "arg": value, "kind": 1} for value in given]}
        return found | {"outputs": [tensor(n) for n in outputs.split()], "is_hop_single_tensor_return": True}

    def stage(method: str, arguments: list[Any]) -> dict[str, Any]:
        same = region("same", body("p", "p", [], True), [tensor("a")], "self", "n1")
        return body("a", "r self", [same, region(method, body("", "", []), arguments, "r", "n2")])

    first = region("one", stage("numpy", []), [tensor("b_memory")], "v u", "h0")
    return [first, region("two", stage("tofile", [{"as_string": str(path)}]), [tensor("v")], "w z", "h1")]


#: Each changes the records of an honest archive; the path is the file that its code touches.
CORPUS: dict[str, Callable[[Records, Path], Records]] = {
    "pickled example input": lambda r, p: [(n, saved((Touch(p),)) if "sample" in n else c) for n, c in r],
    "pickled weight": lambda r, p: [
        (n, saved(Touch(p)) if n.endswith("/weight_0") else c)
        for n, c in with_json(
            r,
            WEIGHTS,
            lambda v: next(iter(v["config"].values())).update(use_pickle=True, path_name="weight_0"),
        )
    ],
    "pickled weight that a second entry calls raw": lambda r, p: with_json(
        [*r, ("data/weights/weight_99", saved(Touch(p)))],
        WEIGHTS,
        lambda v: v["config"].update(
            x=next(iter(v["config"].values())) | {"use_pickle": True, "path_name": "weight_99"}
        ),
    ),
    "old weights file": lambda r, p: [*r, ("data/weights/model.pt", saved({"x": Touch(p)}))],
    "old constants file": lambda r, p: [*r, ("data/constants/model.pt", saved({"x": Touch(p)}))],
    "opaque object": lambda r, p: with_json(
        [*r, ("data/constants/opaque_obj_0", pickle.dumps(Touch(p)))],
        "data/constants/model_constants_config.json",
        lambda v: next(iter(v["config"].values())).update(path_name="opaque_obj_0", use_pickle=True),
    ),
    "name twice": lambda r, p: [*r, ("data/sample_inputs/model.pt", saved((Touch(p),)))],
    "name in two cases": lambda r, p: [*r, ("data/Sample_inputs/model.pt", saved((Touch(p),)))],
    "case twin of the weights": lambda r, p: [*r, ("DATA/weights/weight_0", saved(Touch(p)))],
    "absolute name": lambda r, p: with_json(
        [*r, ("/weight_0", saved(Touch(p)))],
        WEIGHTS,
        lambda v: next(iter(v["config"].values())).update(use_pickle=True, path_name="/archive//weight_0"),
    ),
    "name with ..": lambda r, p: [*r, ("data/../data/sample_inputs/model.pt", saved((Touch(p),)))],
    "name with //": lambda r, p: [*r, ("data//sample_inputs/model.pt", saved((Touch(p),)))],
    "second model": lambda r, p: [*r, ("models/other.json", dict(r)[MODEL])],
    "compiled library": lambda r, p: [*r, ("data/aotinductor/model/a.so", b"\x7fELF")],
    "Python function as operator": lambda r, p: with_json(
        r, MODEL, lambda v: graph(v)["nodes"].insert(0, node_that_touches(p))
    ),
    "operator that maps a file": lambda r, p: with_json(
        r, MODEL, lambda v: graph(v)["nodes"].insert(0, file_mapping(p))
    ),
    "method of a tensor as region": lambda r, p: with_json(
        r, MODEL, lambda v: graph(v)["nodes"].__setitem__(slice(0, 0), method_of_a_tensor(p))
    ),
    "size expression": lambda r, p: with_json(
        r, MODEL, lambda v: v.update(expression(v, f"__import__('pathlib').Path('{p}').touch()"))
    ),
    "size expression without quotes": lambda r, p: with_json(
        r, MODEL, lambda v: v.update(expression(v, "eval(chr(49))"))
    ),
    "size expression without end": lambda r, p: with_json(
        r, MODEL, lambda v: v.update(expression(v, "Integer(9)**Integer(9)**Integer(9)**Integer(9)"))
    ),
    "power of a number": lambda r, p: with_json(
        r, MODEL, lambda v: v.update(expression(v, "Pow(Integer(9), Integer(3))"))
    ),
    "large power of a size": lambda r, p: with_json(
        r, MODEL, lambda v: v.update(expression(v, "Pow(Symbol('s0', integer=True), Integer(999999999))"))
    ),
    "input name with code": lambda r, p: with_json(
        r, MODEL, lambda v: v.update(renamed(v, "x", f"x, y=__import__('pathlib').Path('{p}').touch()"))
    ),
    "argument name with code": lambda r, p: with_json(
        r, MODEL, lambda v: call(v).update(forward_arg_names=[f"x=__import__('pathlib').Path('{p}').touch()"])
    ),
    "structure with keyword names": lambda r, p: with_json(
        r,
        MODEL,
        lambda v: call(v).update(in_spec=call(v)["in_spec"].replace("[]", f"[open('{p}', 'w')]", 1)),
    ),
    "region name with code": lambda r, p: with_json(
        r,
        MODEL,
        lambda v: v.update(renamed(v, "submod_1", f"a\"), __import__('pathlib').Path('{p}').touch(), (\"")),
    ),
    "guard with code": lambda r, p: with_json(
        r, MODEL, lambda v: v.update(guards_code=[f"__import__('pathlib').Path('{p}').touch() or True"])
    ),
    "metadata with code": lambda r, p: with_json(
        r,
        MODEL,
        lambda v: [n["metadata"].update(nn_module_stack=f"x,{p},os.system") for n in graph(v)["nodes"]],
    ),
    "number without end": lambda r, p: [
        (n, c.replace(b'"min_val": 1', b'"min_val": 1' + b"0" * 5000)) for n, c in r
    ],
    "deep nesting": lambda r, p: [(n, b"[" * 100_000 if n == MODEL else c) for n, c in r],
    "tensor without end": lambda r, p: with_json(
        r,
        WEIGHTS,
        lambda v: next(iter(v["config"].values()))["tensor_meta"].update(sizes=[{"as_int": 10**15}]),
    ),
}
#: Parts that are left out of the fresh archive instead of refused.
DROPPED = ("argument name with code", "guard with code", "metadata with code")
#: Cases that torch.export.load and one call fall for.
ARMED = (
    "pickled example input",
    "pickled weight",
    "pickled weight that a second entry calls raw",
    "old weights file",
    "old constants file",
    "opaque object",
    "size expression",
    "input name with code",
    "guard with code",
)


@pytest.mark.parametrize("case", CORPUS)
def test_hostile_archive_runs_no_code(case, honest, tmp_path):
    content, touched = (
        archive_of(CORPUS[case](records_of(honest), tmp_path / "touched")),
        tmp_path / "touched",
    )
    if case in DROPPED:
        assert refusal(content) == ""
        load_archive(content)(torch.ones(2, 4))
    else:
        assert refusal(content), "the gate must name it"
        with pytest.raises(UserError, match="is not loaded"):
            load_archive(content)
    assert not touched.exists()


@pytest.mark.parametrize("case", ARMED)
def test_corpus_is_armed(case, honest, tmp_path):
    """Torch itself runs the code of these archives: a corpus that nobody falls for would prove nothing."""
    content = archive_of(CORPUS[case](records_of(honest), tmp_path / "touched"))
    with suppress(Exception):  # after its code ran, the archive need not be a model
        torch.export.load(io.BytesIO(content)).module()(torch.ones(2, 4))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("where", ["before", "after", "comment", "compressed"])
def test_archive_within_other_bytes_is_refused(where, honest):
    records = records_of(honest)
    content = {
        "before": b"#!/bin/sh\n" + archive_of(records),
        "after": archive_of(records) + b"more",
        "comment": archive_of(records)[:-2] + b"\x04\x00more",
        "compressed": archive_of(records, zipfile.ZIP_DEFLATED),
    }[where]
    with pytest.raises(UserError, match="is not loaded"):
        load_archive(content)


def test_honest_archive_computes_the_same(honest):
    torch.manual_seed(0)
    model = Small().eval()
    model.bn.running_mean.uniform_()
    x = torch.rand(5, 4)
    assert torch.equal(load_archive(export(model))(x), model(x))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


#: Ways to a tensor that shares the memory of a buffer, some of which torch's version counters do not see.
ALIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": lambda m, x: m,
    "view": lambda m, x: m.view(2, 4),
    "detach": lambda m, x: m.detach(),
    "dropout": lambda m, x: nn.functional.dropout(m, 0.1, False),
    "same type": lambda m, x: m.type_as(x),
    "broadcast": lambda m, x: torch.broadcast_tensors(m, x.sum())[0],
    "unsafe view": lambda m, x: torch.ops.aten._unsafe_view.default(m, [2, 4]),
    "unsafe split": lambda m, x: torch.ops.aten.unsafe_split.Tensor(m, 4)[0],
    "set": lambda m, x: torch.ops.aten.set_.source_Tensor(torch.zeros(8), m),
    "relu": lambda m, x: m.relu_(),
}


@pytest.mark.parametrize("alias", [*ALIASES, "batch norm"])
def test_graph_remembers_nothing(alias):
    """Either the archive is refused, or its outputs are the same after other inputs were asked."""

    class Memory(Small):
        def forward(self, x: Tensor) -> Tensor:
            if alias != "batch norm":
                ALIASES[alias](self.memory, x).add_(x.sum())
            return super().forward(x)

    content = export(Memory() if alias == "batch norm" else Memory().eval())
    try:
        model = load_archive(content)
    except UserError as error:
        assert "when it is called" in str(error) or "has the target" in str(error)  # noqa: PT017 (a refusal is one of two right answers)
        return
    x = torch.rand(2, 4)
    first = model(x)
    model(torch.ones(3, 4) * 7)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "empty.memory_format",
            "empty_like.default",
            "new_empty.default",
            "_reshape_alias.default",
            "as_strided.default",
        ),
        *(
            "max_pool2d_with_indices_backward.default",
            "from_file.default",
            "_print.default",
            "add.out",
            "save.default",
        ),
        *(
            "set_.source_Tensor",
            "resize_.default",
            "_embedding_bag_backward.default",
            "quantize_per_tensor.default",
        ),
    ],
)
def test_operator_that_reaches_memory_or_files_is_refused(name, honest):
    """Without checks of indices or sizes, they read and write any address, or what an earlier call left behind."""

    def replaced(values: Any) -> None:
        graph(values)["nodes"][-1]["target"] = f"torch.ops.aten.{name}"

    with pytest.raises(UserError, match="has the target"):
        load_archive(archive_of(with_json(records_of(honest), MODEL, replaced)))


def test_names_of_values_become_our_own(honest):
    """A value called `torch` or `self` computes as any other."""

    def renaming(values: Any) -> None:
        values.update(renamed(renamed(values, "x", "torch"), "linear", "self"))

    x = torch.rand(3, 4)
    assert torch.equal(
        load_archive(archive_of(with_json(records_of(honest), MODEL, renaming)))(x), load_archive(honest)(x)
    )


def test_squares_of_sizes_are_read_as_attention_has_them():
    class Scores(nn.Module):
        def forward(self, x):
            square = x.unsqueeze(1) * x.unsqueeze(2)
            return (
                square.reshape(x.shape[0] * x.shape[1] * x.shape[1]).view(x.shape[0], -1).sum(1, keepdim=True)
            )

    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    file = io.BytesIO()
    torch.export.save(torch.export.export(Scores(), (torch.ones(2, 5),), dynamic_shapes=[sizes]), file)
    with zipfile.ZipFile(io.BytesIO(file.getvalue())) as archive:
        assert any(b"Pow(Symbol(" in archive.read(name) for name in archive.namelist())
    x = torch.rand(3, 4)
    assert torch.allclose(load_archive(file.getvalue())(x), x.sum(1, keepdim=True) ** 2)
