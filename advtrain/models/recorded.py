"""Passes recorded once, as the operators that they call, and from then on run without Python and autograd.

A pass through a small network on a CPU is a hundred operators of some microseconds each, and a fifth of its time is
spent between them: in Python, modules and autograd's graph. And as Python lets in one thread at a time, two threads
cannot share it. So the operators of a pass, forward and backward, are written down as TorchScript while they run. The
same operators with the same arguments in the same order give the same numbers, to the last bit.

That holds for what calls the same operators each time. So networks are recorded only if all their layers are in
`KNOWN`, on a CPU in float32, and no pass is that draws, asks for a value or uses a tensor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from threading import Lock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from advtrain.models.conv import Conv2d, FirstConv2d, FlatLinear, plain_pass
from advtrain.models.normalized import Normalized

#: Modules that call the same operators for the same shapes; one may say `recordable = False` of itself.
KNOWN: set[type[nn.Module]] = {
    nn.Sequential,
    nn.Flatten,
    nn.Linear,
    nn.Conv2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    Conv2d,
    FirstConv2d,
    FlatLinear,
    Normalized,
}
#: Passes of one kind from which on it is recorded: to record takes as long as some ten passes save.
OFTEN = 30

#: (network, its parameters, *inputs) -> tensors.
Pass = Callable[..., Sequence[Tensor]]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class RecordingError(Exception):
    """A pass that cannot be recorded."""


def recordable(network: nn.Module) -> bool:
    """Whether passes through this network, as it is now, are known to call the same operators each time."""
    if not plain_pass("cpu") or torch.is_inference_mode_enabled():
        return False
    for module in network.modules():
        known = type(module) in KNOWN and getattr(module, "recordable", True)
        known = known or (type(module) is nn.Dropout and not module.training)
        changed = "forward" in vars(module) or module._compiled_call_impl is not None
        if not known or changed or any(getattr(module, hooks) for hooks in _HOOKS):
            return False
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in _weights(network))


def identity(function: Callable[..., Any]) -> Hashable:
    """Return what is the same for functions that do the same, or None: of one with a closure that is not known."""
    if (
        not isinstance(function, FunctionType)
        or function.__closure__
        or function.__defaults__
        or function.__kwdefaults__
    ):
        return None
    return function.__module__, function.__code__


def _weights(network: nn.Module) -> list[Tensor]:
    held = (t for m in network.modules() for t in (*m._parameters.values(), *m._buffers.values()))
    return [tensor for tensor in held if tensor is not None]


class Recording:
    """`function(network, parameters, *inputs)` for inputs of these shapes, whatever the network's weights are.

    What depends on the weights alone is done apart, in `prepare`, for several passes.

    Raises:
        RecordingError: The pass does anything that operators on weights and inputs do not say.
    """

    def __init__(self, function: Pass, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        network = deepcopy(network)  # another thread may be in a pass through the network itself
        tape = _Tape()
        weights, values = _weights(network), [tensor.detach() for tensor in inputs]
        for number, tensor in enumerate(weights):
            tape.name(tensor, f"w{number}", fixed=True)
        for number, tensor in enumerate(values):
            tape.name(tensor, f"x{number}")
        with tape:
            outputs = function(network, list(network.parameters()), *values)
        results = [tape.use(output) for output in outputs]
        prepared = [name for name in tape.fixed if name in tape.used]
        self._prepare = _compiled([f"w{i}" for i in range(len(weights))], tape.early, prepared)
        self._run = _compiled([f"x{i}" for i in range(len(values))] + prepared, tape.late, results)

    def prepare(self, network: nn.Module) -> list[Tensor]:
        """Return what the passes need of the network's present weights."""
        return self._prepare(*(weight.detach() for weight in _weights(network)))

    def __call__(self, inputs: Sequence[Tensor], prepared: Sequence[Tensor]) -> list[Tensor]:
        """Return what the function gives for these inputs."""
        return self._run(*inputs, *prepared)


def _compiled(
    given: Sequence[str], lines: Sequence[str], results: Sequence[str]
) -> Callable[..., list[Tensor]]:
    arguments = ", ".join(f"{name}: Tensor" for name in given)
    found = f"[{', '.join(results)}]" if results else "torch.jit.annotate(List[Tensor], [])"
    body = "".join(f"    {line}\n" for line in [*lines, f"return {found}"])
    unit = torch.jit.CompilationUnit(f"def run({arguments}) -> List[Tensor]:\n{body}")

    def run(*tensors: Tensor) -> list[Tensor]:
        # optimised, TorchScript calls other operators, which round otherwise; the setting is a thread's own
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            outputs: list[Tensor] = unit.run(*tensors)
        return outputs

    return run


class _Tape(TorchDispatchMode):
    """Writes every operator down as a line of TorchScript: `early` if it depends on weights alone, else `late`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.early: list[str] = []
        self.late: list[str] = []
        self.fixed: dict[str, None] = {}  # what depends on weights alone, in its order
        self.used: set[str] = set()  # what late lines or results use
        self._names: dict[int, str] = {}
        self._kept: list[Any] = []  # an id is a tensor's own only as long as the tensor lives
        self._count = 0

    def name(self, tensor: Tensor, name: str, fixed: bool = False) -> None:
        """Know a tensor by this name."""
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        if fixed:
            self.fixed[name] = None

    def use(self, tensor: Tensor) -> str:
        """Return the name of a result."""
        used: list[str] = []
        text = self._text(tensor, used)
        self.used.update(used)
        return text

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and write it down."""
        used: list[str] = []
        parts = [self._text(value, used) for value in args]
        parts += [f"{key}={self._text(value, used)}" for key, value in (kwargs or {}).items()]
        fixed = bool(used) and all(name in self.fixed for name in used)
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise RecordingError(f"{function} draws")
        if function._schema.is_mutable and any(name in self.fixed for name in used[:1]):
            raise RecordingError(f"{function} changes weights")
        self._kept.append((args, kwargs))
        outputs = function(*args, **(kwargs or {}))
        self._count += 1
        name = f"v{self._count}"
        lines = self.early if fixed else self.late
        lines.append(f"{name} = torch.ops.{function._schema.name.replace('::', '.')}({', '.join(parts)})")
        if not fixed:
            self.used.update(used)
        if isinstance(outputs, Tensor):
            self.name(outputs, name, fixed)
        elif isinstance(outputs, tuple | list):
            for number, output in enumerate(outputs):
                if isinstance(output, Tensor):
                    lines.append(f"{name}_{number} = {name}[{number}]")
                    self.name(output, f"{name}_{number}", fixed)
        else:
            raise RecordingError(f"{function} gives a value")
        return outputs

    def _text(self, value: Any, used: list[str]) -> str:
        """Return an argument as TorchScript has it; `used` gets the names in it."""
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                raise RecordingError("a tensor that is neither weight nor input")
            used.append(self._names[id(value)])
            return used[-1]
        if isinstance(value, list | tuple):
            inside = ", ".join(self._text(entry, used) for entry in value)
            return f"[{inside}]" if inside else "torch.jit.annotate(List[int], [])"
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if isinstance(value, torch.device):
            return f"torch.device('{value}')"
        if value is None or isinstance(value, int | float | torch.dtype | torch.layout | torch.memory_format):
            return str(value)
        raise RecordingError(f"an argument of type {type(value).__name__}")


#: Of each network its passes by kind: how many there were, their recording, or None if they cannot be recorded.
_passes: WeakKeyDictionary[nn.Module, dict[Hashable, int | Recording | None]] = WeakKeyDictionary()
_recording = Lock()


class Passes:
    """A network's passes while its weights and mode stay as they are; a kind of passes made `often` is recorded."""

    def __init__(self, network: nn.Module, often: int = OFTEN) -> None:
        self._network, self._often = network, often
        self._parameters = list(network.parameters())
        self._layout = tuple((p.shape, p.stride(), p.requires_grad) for p in self._parameters)
        self._known = _passes.setdefault(network, {}) if recordable(network) else None
        self._prepared: dict[Hashable, list[Tensor]] = {}

    @property
    def recordable(self) -> bool:
        """Whether passes of this network may be recorded."""
        return self._known is not None

    def __call__(self, function: Pass, same: Hashable, *inputs: Tensor) -> Sequence[Tensor]:
        """Return `function(network, parameters, *inputs)`.

        `same` is the same for functions that do the same, or None for one of which that is not known.
        """
        if self._known is None or same is None:
            return function(self._network, self._parameters, *inputs)
        kind = (same, self._layout, *((t.shape, t.stride(), t.dtype) for t in inputs))
        if not isinstance(self._known.get(kind, 0), Recording):
            with _recording:
                self._count(kind, function, inputs)
        known = self._known[kind]
        if not isinstance(known, Recording):
            return function(self._network, self._parameters, *inputs)
        if kind not in self._prepared:
            self._prepared[kind] = known.prepare(self._network)
        return known(inputs, self._prepared[kind])

    def _count(self, kind: Hashable, function: Pass, inputs: Sequence[Tensor]) -> None:
        assert self._known is not None
        known = self._known.get(kind, 0)
        if not isinstance(known, int):
            return
        self._known[kind] = known + 1
        if known + 1 >= self._often:
            try:
                self._known[kind] = Recording(function, self._network, inputs)
            except (RecordingError, RuntimeError, TypeError):  # what is the function's own it raises again
                self._known[kind] = None
