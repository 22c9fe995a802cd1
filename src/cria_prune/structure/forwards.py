"""What the evaluation of the first example does not run, and a cut must not break.

A head that runs in training only is captured in training mode. An average of the weights, updated by a method
that no forward calls, is known by being a copy in shape. Around weights that nothing read no unit leaves.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from cria_prune.base.errors import some
from cria_prune.structure.rules.core import Context, arrays_of, module_path


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
    model: nn.Module,
    graphs: Sequence[Graph],
    context: Context,
    unread: Sequence[str],
    untrained: str,
) -> None:
    """Freeze the units that code which never ran may count on: as many as its weights have, and in its sight.

    In sight of a weight is what the forward of the module around it handles: the results of its own
    operations, and of the modules that it calls. A weight that no code names is only left over.

    Args:
        model: it is only looked at.
        graphs: of all forwards that were captured.
        context: with their axes.
        unread: the parameters that none of the graphs reads.
        untrained: why the training mode is not among them; empty where it was not asked for, or is.
    """
    if not unread:
        return
    way = "give an example that runs it (examples=[...])"
    if untrained:
        way += f"; training mode failed: {untrained}"
    ran = {path for graph in graphs for node in graph.nodes for path in _stack(node)} | {""}
    sizes: dict[str, dict[int, str]] = {}
    for name in unread:
        around = name.rpartition(".")[0]
        while around not in ran:
            around = around.rpartition(".")[0]
        if _is_named(model, around, name):
            lengths = map(len, context.labels[name])
            sizes.setdefault(around, {}).update({size: name for size in lengths if size > 1})
    for node in (node for graph in graphs for node in graph.nodes):
        for around in _in_sight(node, ran) & sizes.keys():
            for atoms in arrays_of(context.axes.get(node)):
                weight = sizes[around].get(len(atoms))
                reason = f"no forward that was tried reads {weight!r}, which may count on these units: {way}"
                context.units.freeze(None if weight is None else atoms, reason)


def _is_named(model: nn.Module, around: str, name: str) -> bool:
    """Say whether the code of a module, or of one around it, names what a weight below it is reached by.

    Code that cannot be read may name anything.
    """
    attribute = name.removeprefix(f"{around}." if around else "").partition(".")[0]
    while True:
        for kind in type(model.get_submodule(around)).__mro__:
            if kind is nn.Module:
                break
            if kind.__module__ == CONTAINERS:
                continue
            if kind.__module__.startswith("torch.nn.") or attribute in _names_in(kind):
                return True
        if not around:
            return False
        around = around.rpartition(".")[0]


@lru_cache(maxsize=1024)
def _names_in(kind: type) -> Collection[str]:
    """Return the attributes and texts that the methods of a class name, but those that make it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return _Everything()
    found = set[str]()
    for method in ast.walk(tree):
        if not isinstance(method, ast.FunctionDef) or method.name in MAKING:
            continue
        for item in ast.walk(method):
            if isinstance(item, ast.Attribute):
                found.add(item.attr)
            elif isinstance(item, ast.Constant) and isinstance(item.value, str):
                found.add(item.value)
    return found


MAKING = {"__init__", "reset_parameters", "init_weights", "_init_weights", "extra_repr"}


CONTAINERS = "torch.nn.modules.container"


class _Everything(frozenset[str]):
    """Holds every name."""

    def __contains__(self, name: object) -> bool:
        return True


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


def unread_said(unread: Sequence[str]) -> str:
    """Return the line that names parameters which no forward reads."""
    return (
        f"no forward that was tried reads {some(unread)}: what uses them is not followed; give an example "
        "that does (examples=[...])"
    )
