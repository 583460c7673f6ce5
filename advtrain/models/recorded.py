"""Passes recorded once, as the operators that they call, and from then on run without Python and autograd.

A pass through a small network on a CPU is a hundred operators of some microseconds each, and a fifth of its time is
spent between them: in Python, modules and autograd's graph. And as Python lets in one thread at a time, two threads
cannot share it. So the operators of a pass, forward and backward, are written down as TorchScript while they run. The
same operators with the same arguments in the same order give the same numbers, to the last bit.

That holds for what calls the same operators each time. So networks are recorded only if all their layers are known
(`known.py`), on a CPU in float32, and a pass is not if one of its operators draws, gives Python a value or a shape that
depends on data, or uses a tensor that is neither weight nor input. A network that changes is told by its layers,
settings and weights' layout. What Python does beside layers and operators is done once, when the pass is recorded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from threading import Lock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from advtrain.models.known import look

#: Passes of one kind from which on it is recorded: to record takes as long as some ten passes save.
OFTEN = 30
#: Kinds of passes that are known of a network at the same time.
MOST = 128

#: (network, *inputs) -> tensors by name.
Pass = Callable[..., dict[str, Tensor]]

#: Tags of operators that do not give the same, or the same shape, each time, or that change a tensor's shape.
_TOLD = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}


class RecordingError(Exception):
    """A pass that cannot be recorded."""


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


class Recording:
    """`function(network, *inputs)` for inputs of these shapes, whatever the network's weights are.

    What depends on the weights alone is done apart, in `prepare`, for several passes.

    Raises:
        RecordingError: The pass does anything that operators on weights and inputs do not say.
    """

    def __init__(self, function: Pass, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        network = deepcopy(network)  # another thread may be in a pass through the network itself
        tape = _Tape()
        seen, values = look(network), [_copy(tensor) for tensor in inputs]  # a pass may write to its inputs
        if seen is None:
            raise RecordingError(
                "a network of which it is not known that it calls the same operators each time"
            )
        weights = seen.weights
        for number, tensor in enumerate(weights):
            tape.name(tensor, f"w{number}", fixed=True)
        for number, tensor in enumerate(values):
            tape.name(tensor, f"x{number}")
        with tape:
            outputs = function(network, *values)
        self._names = list(outputs)
        results = [tape.give(output) for output in outputs.values()]
        prepared = [name for name in tape.fixed if name in tape.used]
        self._prepare = _compiled([f"w{i}" for i in range(len(weights))], tape.early, prepared)
        self._run = _compiled([f"x{i}" for i in range(len(values))] + prepared, tape.late, results)

    def prepare(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return what the passes need of the network's present weights."""
        return self._prepare(*(weight.detach() for weight in weights))

    def __call__(self, inputs: Sequence[Tensor], prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what the function gives for these inputs."""
        return dict(zip(self._names, self._run(*inputs, *prepared), strict=True))


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())


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
        self._made: dict[str, str] = {}  # an early value -> its name
        self._kept: list[Any] = []  # an id is a tensor's own only as long as the tensor lives
        self._count = 0

    def name(self, tensor: Tensor, name: str, fixed: bool = False) -> None:
        """Know a tensor by this name."""
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        if fixed:
            self.fixed[name] = None

    def give(self, tensor: Tensor) -> str:
        """Return the name of a result, of one that several passes share that of a copy."""
        used: list[str] = []
        name = self._text(tensor, used)
        self.used.update(used)
        return self._write(f"torch.ops.aten.clone({name})", False) if name in self.fixed else name

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and write it down."""
        kwargs = kwargs or {}
        used: list[str] = []
        parts = [self._text(value, used) for value in args]
        parts += [f"{key}={self._text(value, used)}" for key, value in kwargs.items()]
        self._check(function, args, kwargs)
        fixed = bool(used) and all(name in self.fixed for name in used)
        if not fixed:
            self.used.update(used)
        self._kept.append((args, kwargs))
        outputs = function(*args, **kwargs)
        if function is torch.ops.aten.detach.default:  # the same numbers, and there is no graph to leave
            self.name(outputs, used[0], fixed)
            return outputs
        operator = function._schema.name.replace("::", ".")
        name = self._write(f"torch.ops.{operator}({', '.join(parts)})", fixed)
        if isinstance(outputs, Tensor):
            self.name(outputs, name, fixed)
        elif isinstance(outputs, tuple | list):
            for number, output in enumerate(outputs):
                if isinstance(output, Tensor):
                    self.name(output, self._write(f"{name}[{number}]", fixed), fixed)
        else:
            raise RecordingError(f"{function} gives a value")
        return outputs

    def _check(self, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not _TOLD.isdisjoint(function.tags):
            raise RecordingError(f"{function} draws, changes a shape, or its result's depends on data")
        changed: list[str] = []
        for number, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._text(args[number] if number < len(args) else kwargs[argument.name], changed)
        if not self.fixed.keys().isdisjoint(changed):
            raise RecordingError(f"{function} changes weights, or what is made of them alone")

    def _write(self, value: str, fixed: bool) -> str:
        """Write down where a value comes from; return its name."""
        if value in self._made:
            return self._made[value]
        self._count += 1
        name = f"v{self._count}"
        (self.early if fixed else self.late).append(f"{name} = {value}")
        if fixed:  # nothing changes it: the second time it is the same
            self._made[value] = name
        return name

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


def _forked() -> None:
    global _recording
    _recording = Lock()  # a thread that held it is not in the child


os.register_at_fork(after_in_child=_forked)


class Passes:
    """A network's passes while its layers and weights stay as they are; a kind of passes made `often` is recorded."""

    def __init__(self, network: nn.Module, often: int = OFTEN) -> None:
        self._network, self._often = network, often
        self._seen = look(network)
        self._kinds: dict[Hashable, int | Recording | None] = {}
        self._prepared: dict[Recording, list[Tensor]] = {}
        if self._seen is not None:
            self._kinds = _passes.setdefault(network, {})
            self._layers = tuple(self._seen.layers)

    @property
    def recordable(self) -> bool:
        """Whether passes of this network may be recorded."""
        return self._seen is not None

    def __call__(self, function: Pass, same: Hashable, *inputs: Tensor) -> dict[str, Tensor]:
        """Return `function(network, *inputs)`.

        `same` is the same for functions that do the same, or None for one of which that is not known.
        """
        recording = self.recording(function, same, *inputs)
        return function(self._network, *inputs) if recording is None else self.run(recording, *inputs)

    def recording(self, function: Pass, same: Hashable, *inputs: Tensor) -> Recording | None:
        """Return the recording of such a pass; None if there is none (yet). It counts as a pass of its kind."""
        if self._seen is None or same is None:
            return None
        kind = (same, self._layers, *((t.shape, t.stride(), t.dtype) for t in inputs))
        known = self._kinds.get(kind, 0)
        if isinstance(known, int):
            with _recording:
                known = self._count(kind, function, inputs)
        return known if isinstance(known, Recording) else None

    def run(self, recording: Recording, *inputs: Tensor) -> dict[str, Tensor]:
        """Return what the recorded pass gives."""
        if recording not in self._prepared:
            assert self._seen is not None
            self._prepared[recording] = recording.prepare(self._seen.weights)
        return recording(inputs, self._prepared[recording])

    def _count(self, kind: Hashable, function: Pass, inputs: Sequence[Tensor]) -> int | Recording | None:
        known = self._kinds.get(kind, 0)
        if not isinstance(known, int):
            return known
        known = known + 1
        if known >= self._often:
            try:
                known = Recording(function, self._network, inputs)
            except (RecordingError, RuntimeError, TypeError):  # what is the function's own it raises again
                known = None
        if kind not in self._kinds and len(self._kinds) >= MOST:
            self._kinds.pop(next(iter(self._kinds)))
        self._kinds[kind] = known
        return known
