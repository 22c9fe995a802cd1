"""What the evaluation of the first example does not run, and a cut must not break.

A head that runs in training only is captured in training mode. An average of the weights, updated by a method
that no forward calls, is known by being a copy in shape. Around weights that nothing read no unit leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from cria_prune.base.errors import some
from cria_prune.structure.rules.core import Context, module_path


def weights_read(graph: Graph, names: Mapping[str, str]) -> set[str]:
    """Return the canonical names of the parameters and buffers that an operation of a graph takes."""
    return {
        names[node.name]
        for node in graph.nodes
        if node.op == "placeholder" and node.name in names and node.users
    }


def find_copies(model: nn.Module, read: set[str]) -> dict[str, str]:
    """Return path -> path of the modules that no evaluation reads, and of which they are copies in shape.

    So an exponential average of a network is: the same class, the same tensors, and of the two one is not
    trained, or their values are still the same. Two trained heads of one shape are two heads.
    """
    modules, found = dict(model.named_modules()), dict[str, str]()
    unread = {path for path, module in modules.items() if path and _none_read(path, module, read)}
    for path in modules:
        if path not in unread or any(path.startswith(f"{other}.") for other in found):
            continue
        sources = [
            other
            for other, module in modules.items()
            if other and other not in unread and not f"{path}.".startswith(f"{other}.")
            and _is_copy(modules[path], module)
        ]  # fmt: skip
        if len(sources) == 1:  # of several alike blocks nobody can tell
            found[path] = sources[0]
    return found


def _none_read(path: str, module: nn.Module, read: set[str]) -> bool:
    names = [f"{path}.{name}" for name, _ in module.named_parameters()]
    return bool(names) and read.isdisjoint(names)


def _is_copy(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other):
        return False
    ours, theirs = _tensors(one), _tensors(other)
    if {name: item.shape for name, item in ours.items()} != {
        name: item.shape for name, item in theirs.items()
    }:
        return False
    trained = [any(item.requires_grad for item in module.parameters()) for module in (one, other)]
    return not all(trained) or all(
        not item.is_meta and torch.equal(item, theirs[name]) for name, item in ours.items()
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def tie_copies(model: nn.Module, copies: Mapping[str, str], context: Context) -> dict[str, str]:
    """Let the units of copies leave with those of what they are copies of; return tensor -> its original."""
    same = dict[str, str]()
    for path, source in copies.items():
        for name in _tensors(model.get_submodule(path)):
            one, other = f"{path}.{name}", f"{source}.{name}"
            # A tensor that the two share is one already.
            if one in context.labels and other in context.labels:
                same[one] = other
                for first, second in zip(context.labels[other], context.labels[one], strict=True):
                    context.units.tie(first, second, "")
    return same


def freeze_around(
    graphs: Sequence[Graph], context: Context, shapes: Mapping[str, tuple[int, ...]], unread: Sequence[str]
) -> None:
    """Freeze the units that code which never ran may count on: as many as its weights have, and in its sight.

    In sight of a weight is what the forward of the module around it handles: the results of its own
    operations, and of the modules that it calls.

    Args:
        graphs: of all forwards that were captured.
        context: with their axes.
        shapes: of the parameters.
        unread: the parameters that none of the graphs reads.
    """
    if not unread:
        return
    ran = {path for graph in graphs for node in graph.nodes for path in _stack(node)} | {""}
    sizes: dict[str, dict[int, str]] = {}
    for name in unread:
        around = name.rpartition(".")[0]
        while around not in ran:
            around = around.rpartition(".")[0]
        sizes.setdefault(around, {}).update({size: name for size in shapes[name] if size > 1})
    for node in (node for graph in graphs for node in graph.nodes):
        for around in _in_sight(node, ran) & sizes.keys():
            for atoms in _flat(context.axes.get(node)):
                weight = sizes[around].get(len(atoms))
                reason = f"no forward that was tried reads {weight!r}, which may count on these units"
                context.units.freeze(None if weight is None else atoms, reason)


def _stack(node: Node) -> list[str]:
    return [str(value[0]) for value in (node.meta.get("nn_module_stack") or {}).values()]


def _in_sight(node: Node, ran: Collection[str]) -> set[str]:
    """Return the modules whose forwards handle the result of a node: it leaves those that it is made in."""
    path = module_path(node)
    found = {path}
    readers = [module_path(user) for user in node.users]
    while path:
        if all(f"{reader}.".startswith(f"{path}.") for reader in readers):
            break  # it stays inside
        path = path.rpartition(".")[0]
        while path not in ran:
            path = path.rpartition(".")[0]
        found.add(path)
    return found


def _flat(axes: object) -> Iterator[np.ndarray]:
    if isinstance(axes, (list, tuple)):
        for item in axes:
            yield from _flat(item)
    elif isinstance(axes, np.ndarray):
        yield axes


def unread_said(unread: Sequence[str]) -> str:
    """Return the line that names parameters which no forward reads."""
    return (
        f"no forward that was tried reads {some(unread)}: what uses them is not followed; give an example "
        "that does (examples=[...])"
    )
