"""Check of an exported graph: it has tensor operators alone, and remembers nothing.

The strings of a stored graph become Python: operator names are looked up attribute by attribute, size expressions are
evaluated, and names are compiled into source code. So operators are chosen from a list, expressions and names must
match a grammar, and everything that torch does not need to compute is left out.
"""

from __future__ import annotations

import json
import keyword
import re
from typing import Any

import torch
from torch.export import ExportedProgram

from advtrain.models.operators import OPERATORS

#: Python functions that torch writes for arithmetic on sizes, by module.
_ARITHMETIC = {
    "_operator": (
        *("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "abs", "and_", "or_", "not_", "getitem"),
        *("eq", "ne", "lt", "le", "gt", "ge"),
    ),
    "torch": ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum"),
    "math": ("ceil", "floor", "trunc"),
}
#: Region without gradients: (enabled, graph, *tensors).
_REGION = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_OPERATOR = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,400}")
_PATH = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,40}")
_TEXT = re.compile(r"[A-Za-z0-9 _.,:;()\[\]<>=+*/&|%!?#@^~-]{0,200}")
#: Size expressions as sympy's srepr writes them. Of powers, which can be made to take forever, only the square and the
#: cube of a size are allowed: attention has L x L scores.
_EXPRESSION = re.compile(
    r"(?:Pow\(Symbol\('[su][0-9]{1,6}'(?:, (?:positive|integer|nonnegative|negative)=(?:True|False)){0,4}\), "
    r"Integer\([23]\)\)|"
    r"(?:Add|Mul|Max|Min|Mod|FloorDiv|CleanDiv|CeilDiv|PythonMod|Integer|Rational|Equality|Unequality|StrictLessThan|"
    r"LessThan|StrictGreaterThan|GreaterThan|And|Or|Not)\(|Symbol\('[su][0-9]{1,6}'|\)|, |"
    r"(?:positive|integer|nonnegative|negative)=(?:True|False)|-?[0-9]{1,18}(?![0-9]))+"
)
#: One positional input and one output, as torch writes the structure of arguments.
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_INPUTS = {
    "type": "builtins.tuple",
    "context": "null",
    "children_spec": [
        {"type": "builtins.tuple", "context": "null", "children_spec": [_LEAF]},
        {"type": "builtins.dict", "context": "[]", "children_spec": []},
    ],
}
#: Keys whose values would become objects, pickles, or changes of state.
_REFUSED_KEYS = {
    *("as_custom_obj", "custom_obj", "as_operator", "as_string_to_argument", "token"),
    *("buffer_mutation", "parameter_mutation", "user_input_mutation", "loss_output"),
    *("gradient_to_parameter", "gradient_to_user_input"),
}
_MOST_DEPTH = 60
#: Operators whose result is a new tensor; operators that may change such a result in place, or return a view of it.
_NEW_NAMES = """
add sub mul div matmul bmm addmm linear conv1d conv2d conv3d convolution batch_norm layer_norm
group_norm instance_norm cat clone mean relu softmax sigmoid max_pool2d avg_pool2d adaptive_avg_pool2d
new_zeros zeros
"""
#: Other changes in place, which are allowed only if rewriting the graph removes them.
_CHANGE_NAMES = """
copy_ fill_ zero_ index_put_ masked_fill_ scatter_ scatter_add_ index_add_ clamp_min_
"""
_VIEW_NAMES = """
view flatten reshape squeeze unsqueeze permute transpose slice select
"""
_IN_PLACE_NAMES = """
relu_ relu6_ leaky_relu_ elu_ celu_ selu_ silu_ mish_ gelu_ hardtanh_ hardswish_ hardsigmoid_ sigmoid_
tanh_ clamp_ add_ sub_ mul_ div_ dropout_
"""
_NEW, _CHANGES = frozenset(_NEW_NAMES.split()), frozenset(_CHANGE_NAMES.split())
_VIEWS, _IN_PLACE = frozenset(_VIEW_NAMES.split()), frozenset(_IN_PLACE_NAMES.split())


class RefusedError(Exception):
    """Part of an archive that torch would run, or that no export writes."""


def checked_program(program: Any) -> dict[str, Any]:
    """Return the parts of `models/model.json` that compute, after checking each.

    Raises:
        RefusedError: a part is not what the export of a module with one input and one output writes.
    """
    try:
        module = program["graph_module"]
        _check(module["graph"], "graph", 0)
        _check(module["signature"], "signature", 0)
        _check(program["range_constraints"], "range_constraints", 0)
        call = next(entry for entry in module["module_call_graph"] if entry["fqn"] == "")
        for key, wanted in (("in_spec", _INPUTS), ("out_spec", _LEAF)):
            if json.loads(call["signature"][key]) != [1, wanted]:
                raise RefusedError("its module does not have one input and one output")
        signature = {
            "inputs": [],
            "outputs": [],
            "in_spec": json.dumps([1, _INPUTS]),
            "out_spec": json.dumps([1, _LEAF]),
            "forward_arg_names": ["x"],
        }
        return {
            "graph_module": {
                "graph": _computing(module["graph"]),
                "signature": _computing(module["signature"]),
                "module_call_graph": [{"fqn": "", "signature": signature}],
                "metadata": {},
                "treespec_namedtuple_fields": {},
            },
            "opset_version": {"aten": int(program["opset_version"]["aten"])},
            "range_constraints": _computing(program["range_constraints"]),
            "schema_version": {key: int(program["schema_version"][key]) for key in ("major", "minor")},
            "verifiers": ["TRAINING"],
            "torch_version": torch.__version__,
            "guards_code": [],
        }
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise RefusedError(f"its graph is not what torch.export writes ({error!r})") from error


def without_mutation(program: ExportedProgram) -> ExportedProgram:
    """Return a program that computes the same and changes no tensor that a later call sees.

    A graph that changes its weights or buffers can remember its inputs, so its outputs are not a function of them. If
    the graph changes anything but its own intermediate results, it is rewritten without changes in place, and refused
    if a change of a weight, buffer or input remains.

    Raises:
        RefusedError: the graph changes a weight, a buffer or its input.
    """
    if not any(_may_change_state(node) for node in _nodes(program.graph_module)):
        return program
    functional: ExportedProgram = program.run_decompositions({})
    signature = functional.graph_signature
    changed = {
        **signature.buffers_to_mutate,
        **signature.parameters_to_mutate,
        **signature.user_inputs_to_mutate,
    }
    left = [str(node.target) for node in _nodes(functional.graph_module) if _may_change_state(node)]
    if changed or left:
        raise RefusedError(
            f"its graph changes {', '.join(map(str, changed.values())) or left[0]} when it is called"
        )
    return functional


def _check(value: Any, key: str, depth: int) -> None:
    """Raise a RefusedError if a string in the graph is not of the kind that its key demands."""
    if depth > _MOST_DEPTH:
        raise RefusedError("its graph is nested too deeply")
    if isinstance(value, dict):
        if "target" in value and "inputs" in value:
            _check_node(value)
        for name, part in value.items():
            if name in _REFUSED_KEYS or (name == "custom_obj_values" and part):
                raise RefusedError(f"its graph has {name}")
            if not _is_name(name):
                raise RefusedError(f"its graph has the name {name!r:.100}")
            if name != "metadata":
                _check(part, name, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check(part, key, depth + 1)
    elif isinstance(value, str) and not _allowed(value, key):
        raise RefusedError(f"its graph has the {key} {value!r:.100}")
    elif isinstance(value, int) and abs(value) > 2**63:
        raise RefusedError(f"its graph has the number {str(value)[:30]}")


def _allowed(text: str, key: str) -> bool:
    if key == "target":
        module, _, name = text.partition(".")
        return name in _ARITHMETIC.get(module, ()) or text == _REGION or _is_tensor_operator(text)
    if key == "expr_str":
        return len(text) <= 1000 and _EXPRESSION.fullmatch(text) is not None
    if key in ("parameter_name", "buffer_name", "tensor_constant_name"):
        return _PATH.fullmatch(text) is not None and not text.startswith("__") and ".__" not in text
    if key in ("as_string", "as_strings"):
        return _TEXT.fullmatch(text) is not None
    return text == "" or _is_name(text)


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and not keyword.iskeyword(text)


def _is_tensor_operator(text: str) -> bool:
    """Return whether a name is an allowed operator of ATen, which may end in "_" for a change in place."""
    if (match := _OPERATOR.fullmatch(text)) is None:
        return False
    name, overload = match.groups()
    allowed = name in OPERATORS or name in _IN_PLACE or name in _CHANGES
    if not allowed or "out" in overload.split("_"):
        return False
    operator = getattr(getattr(torch.ops.aten, name, None), overload, None)
    return isinstance(operator, torch._ops.OpOverload)


def _check_node(node: dict[str, Any]) -> None:
    """Raise a RefusedError if a region calls anything but its own graph."""
    if node["target"] != _REGION:
        return
    kinds = [next(iter(argument["arg"])) for argument in node["inputs"]]
    rest = {"as_tensor", "as_sym_int", "as_int", "as_bool"}
    if (
        kinds[:2] != ["as_bool", "as_graph"]
        or not set(kinds[2:]) <= rest
        or any(i["name"] for i in node["inputs"])
    ):
        raise RefusedError("a region of its graph does not have the form that torch.export writes")


def _computing(value: Any, key: str = "") -> Any:
    """Return the graph with names of our own, and without the metadata of its nodes.

    Names of values become variables of the code that torch generates, and names of graphs attributes of its module.
    With a prefix, none can stand for `self`, `torch` or a method.
    """
    if isinstance(value, list):
        return [_computing(part, key) for part in value]
    if key == "as_name" and isinstance(value, str):
        return f"v_{value}"
    if not isinstance(value, dict):
        return value
    made: dict[str, Any] = {}
    for name, part in value.items():
        if name == "metadata":
            made[name] = {}
        elif name == "name" and "arg" not in value and isinstance(part, str) and part:
            made[name] = f"g_{part}" if "graph" in value else f"v_{part}"
        elif key.endswith("_values"):
            made[f"v_{name}"] = _computing(part, name)
        else:
            made[name] = _computing(part, name)
    return made


def _nodes(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    graphs = [part for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    return [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def _may_change_state(node: torch.fx.Node) -> bool:
    """Return whether a node may change a tensor that is not an intermediate result of this call."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    changed = _short(node)
    # The schema of batch_norm does not say that it changes its statistics.
    if "running_mean" in names and not changed.endswith("_no_training"):
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        training = values.get("training", values.get("use_input_stats", values.get("train", True)))
        if training is not False and values.get("running_mean") is not None:
            return True
    if not node.target._schema.is_mutable:
        return False
    source = node.args[0] if node.args else None
    while isinstance(source, torch.fx.Node) and changed in _IN_PLACE | _VIEWS:
        changed = _short(source)
        if changed in _NEW:
            return False
        source = source.args[0] if source.args else None
    return True


def _short(node: torch.fx.Node) -> str:
    target = node.target
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""
