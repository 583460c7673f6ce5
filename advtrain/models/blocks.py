"""Blocks of a network, from its input to its head: their names, parameters and freezing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from advtrain.errors import UserError, nearest
from advtrain.models.network import Normalized
from advtrain.text import listed

#: Normalization layers.
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
#: Modules that only hold other modules.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: Number of block names in a message.
_MOST_NAMES = 40


def block_names(network: nn.Module) -> list[str]:
    """Return the names of a network's blocks, in order from the input to the head.

    A block is a layer or a residual block. Its name is that in `network.named_modules()`. Modules that hold a stack of
    blocks, such as the encoder of a transformer, are not blocks themselves. The last block is the head. The order is
    that in which the modules are defined.

    Raises:
        UserError: no module of the network has parameters.
    """
    return list(_blocks(network))


def block_parameters(model: Normalized) -> dict[str, list[str]]:
    """Return the names of each block's parameters, as in `model.named_parameters()`.

    The blocks are in the order of `block_names`. Parameters outside of all blocks, such as position embeddings, belong
    to the first block. A shared parameter belongs to the first block that uses it.
    """
    blocks = _blocks(model.network)
    first = next(iter(blocks))
    owners = {module: block for block, modules in blocks.items() for module in modules}
    found: dict[str, list[str]] = {block: [] for block in blocks}
    for name, _ in model.network.named_parameters():
        parts = name.split(".")
        paths = [".".join(parts[:length]) for length in range(1, len(parts))]
        block = next((owners[path] for path in paths if path in owners), first)
        found[block].append(f"network.{name}")
    return found


def head_tensors(model: nn.Module) -> list[str]:
    """Return the names of the head's tensors in `model.state_dict()`.

    The head is the last block.
    """
    network, prefix = (model.network, "network.") if isinstance(model, Normalized) else (model, "")
    blocks = _blocks(network)
    prefixes = tuple(f"{prefix}{name}." for name in blocks[next(reversed(blocks))])
    return [name for name in model.state_dict() if name.startswith(prefixes)]


def freeze_blocks(model: Normalized, names: str | Sequence[str]) -> list[nn.Module]:
    """Freeze blocks of a model, and return their modules in evaluation mode.

    Frozen parameters require no gradient.

    Args:
        model: model from `build_model`.
        names: `backbone` for all blocks but the head, or names of blocks, or of modules that hold blocks.

    Raises:
        UserError: there is no such block, nothing is left to train, or a trained block shares a frozen parameter.
    """
    blocks, owned = _blocks(model.network), block_parameters(model)
    parameters = dict(model.named_parameters())
    chosen = _chosen(list(blocks), names)
    modules = [model.network.get_submodule(name) for block in chosen for name in blocks[block]]
    frozen = {parameters[name] for block in chosen for name in owned[block]}
    frozen.update(parameter for module in modules for parameter in module.parameters())
    for block in blocks:
        if block not in chosen and not frozen.isdisjoint(model.network.get_submodule(block).parameters()):
            raise UserError(
                f"model.freeze: the trained block '{block}' shares parameters with a frozen block; freeze both or none"
            )
    if not any(p.requires_grad for p in parameters.values() if p not in frozen):
        raise UserError("model.freeze leaves no parameter to train; leave out the head")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return [module.eval() for module in modules]


def _chosen(blocks: list[str], names: str | Sequence[str]) -> list[str]:
    """Return the blocks that `names` names, see `freeze_blocks`."""
    if isinstance(names, str):
        if len(blocks) == 1:
            raise UserError(f"model.freeze: the network has no backbone, only the block '{blocks[0]}'")
        return blocks[:-1]
    for name in names:
        if not any(_holds(name, block) for block in blocks):
            raise UserError(
                f"model.freeze: unknown block '{name}'{_nearest_block(name, blocks)}; the blocks are, from the input "
                f"to the head: {listed(blocks, _MOST_NAMES)}"
            )
    return [block for block in blocks if any(_holds(name, block) for name in names)]


def _nearest_block(name: str, blocks: list[str]) -> str:
    close = nearest(name, blocks)
    return close if close.startswith("; did") else ""


def _blocks(network: nn.Module) -> dict[str, list[str]]:
    """Return the names of each block's modules.

    Norms and modules without parameters belong to the block before them, or else to the first block.
    """
    found: dict[str, list[str]] = {}
    before: list[str] = []
    own: Sequence[str] | None = getattr(network, "head_modules", None)  # of encoders of transformers
    for name, module in _layers(network, "", own or ()):
        if not isinstance(module, NORMS) and next(module.parameters(), None) is not None:
            found[name] = [*before, name]
            before = []
        elif found:
            found[next(reversed(found))].append(name)
        else:
            before.append(name)
    if not found:
        raise UserError("the network has no blocks: no module in it has parameters, so it has no head")
    heads = own or (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(heads, tuple | list):  # networks of timm with several heads, for example for distillation
        _merge_heads(found, heads)
    return found


def _merge_heads(blocks: dict[str, list[str]], heads: Sequence[str]) -> None:
    """Replace the blocks that are heads, hold them or lie in them by one last block."""
    last = next(reversed(blocks))
    merged = [
        block
        for block in blocks
        if block == last or any(_holds(block, head) or _holds(head, block) for head in heads)
    ]
    modules = [module for block in merged for module in blocks[block]]
    for block in merged[:-1]:
        del blocks[block]
    blocks[last] = modules


def _holds(name: str, other: str) -> bool:
    """Return whether a module is another or holds it, by their names."""
    return f"{other}.".startswith(f"{name}.")


def _layers(module: nn.Module, prefix: str, heads: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are no containers and hold neither a stack of blocks nor a head, as they are defined."""
    children = dict(module.named_children())
    kinds = Counter(map(type, children.values()))
    for name, child in children.items():
        is_block = kinds[type(child)] > 1 and type(child) not in _CONTAINERS
        holds = any(head.startswith(f"{prefix}{name}.") for head in heads)
        if type(child) in _CONTAINERS or holds or (not is_block and any(map(_is_stack, child.modules()))):
            yield from _layers(child, f"{prefix}{name}.", heads)
        else:
            yield f"{prefix}{name}", child


def _is_stack(module: nn.Module) -> bool:
    """Return whether a container holds two or more blocks of one class, as transformers and ResNets do."""
    kinds = Counter(
        type(child)
        for child in module.children()
        if not isinstance(child, _CONTAINERS) and next(child.children(), None) is not None
    )
    return type(module) in _CONTAINERS and max(kinds.values(), default=0) > 1
