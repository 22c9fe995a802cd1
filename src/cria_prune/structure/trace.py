"""The captured operations with the axes of each of them: rules applied in order, wrappers opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from cria_prune.base.batches import Batch
from cria_prune.structure.axes import Resolved, Units
from cria_prune.structure.capture import capture, operation_name
from cria_prune.structure.rules import attention, layers, shape  # noqa: F401  (they register their rules)
from cria_prune.structure.rules.core import RULES, Context, freeze_all, no_rule

LAYERS = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
}  # their rules look at the shapes of weights and results only
VIEWS = {
    "t",
    "transpose",
    "permute",
    "numpy_T",
    "mT",
    "to",
    "_to_copy",
    "detach",
    "alias",
    "contiguous",
    "clone",
}


@dataclass(frozen=True)
class Trace:
    """What a model does to its units.

    Attributes:
        program: the captured operations.
        context: axes of every node, uses of weights.
        tensors: canonical name -> parameter or buffer.
        names: placeholder -> canonical name of its parameter or buffer.
        resolved: the units of all atoms.
    """

    program: ExportedProgram
    context: Context
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    resolved: Resolved


def trace(model: nn.Module, example: Batch) -> Trace:
    """Capture a model and follow its units through every operation.

    Raises:
        CaptureError: the operations cannot be captured.
        DataError: the forward does not accept the example.
    """
    program = capture(model, example)
    tensors = canonical_tensors(model)
    context = Context(Units())
    for name, tensor in tensors.items():
        context.labels[name] = [context.units.fresh(size) for size in tensor.shape]
    names = _parameter_names(program, model, tensors)
    _start(program.graph, context, names)
    for item in _outputs(follow(program.graph, context)):
        freeze_all(context.axes[item], context, "is part of the model's output")
    _freeze_two_ways(context)
    return Trace(program, context, tensors, names, context.units.resolve())


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _start(graph: Graph, context: Context, names: Mapping[str, str]) -> None:
    for node in graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            if name is None:
                context.axes[node] = [None] * len(getattr(node.meta.get("val"), "shape", ()))
                context.data.add(node)
            else:
                labels: list[np.ndarray | None] = [*context.labels[name]]
                context.axes[node] = labels
                context.tensors[node] = name


def follow(graph: Graph, context: Context) -> Any:
    """Apply the rule of every operation of a graph in order; return the arguments of its output."""
    alive = live_nodes(graph)
    for node in graph.nodes:
        if node not in alive:
            continue
        if node.op == "get_attr":
            context.axes[node] = [None] * len(getattr(node.meta.get("val"), "shape", ()))
        elif node.op == "call_function":
            if not context.data.isdisjoint(node.all_input_nodes):
                context.data.add(node)
            inherited = [context.sources[item] for item in node.all_input_nodes if item in context.sources]
            context.sources[node] = frozenset().union(*inherited)
            uses = len(context.uses)
            wrapped = wrapped_graph(node)
            if wrapped is None:
                read = [] if operation_name(node) in LAYERS else node.all_input_nodes
                known = all(map(_has_plain_shape, (node, *read)))
                rule = RULES.get(operation_name(node), no_rule) if known else no_rule
                context.axes[node] = rule(node, context)
                source = node.args[0] if node.args else None
                if operation_name(node) in VIEWS and source in context.tensors:
                    context.tensors[node] = context.tensors[source]
            else:
                context.axes[node] = _wrapper(wrapped, context)
            if any(use.out_dim is not None for use in context.uses[uses:]):
                context.sources[node] = frozenset([node])
        elif node.op == "output":
            return node.args[0]
    return ()


def _has_plain_shape(node: Node) -> bool:
    """Say whether a node gives tensors, if anything, whose sizes do not depend on the data."""
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else [value]
    sizes = [getattr(item, "shape", () if item is None else (None,)) for item in items]
    return all(type(size) is int for item in sizes for size in item)


def live_nodes(graph: Graph) -> set[Node]:
    """Return the nodes that the output depends on, and those that write into a tensor."""
    alive: set[Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        writes = schema is None or schema.is_mutable
        if node.op in ("output", "placeholder") or (
            node.op == "call_function" and writes and operation_name(node) != "getitem"
        ):
            alive.add(node)
        if node in alive:
            alive.update(node.all_input_nodes)
    return alive


def wrapped_graph(node: Node) -> tuple[Graph, list[Any]] | None:
    """Return the graph that a wrapper runs, such as a block without gradients, and its arguments."""
    if not operation_name(node).startswith("wrap_with_"):
        return None
    for place, item in enumerate(node.args):
        if isinstance(item, Node) and item.op == "get_attr" and node.graph.owning_module is not None:
            module = getattr(node.graph.owning_module, str(item.target), None)
            if isinstance(module, GraphModule):
                return module.graph, list(node.args[place + 1 :])
    return None


def _wrapper(wrapped: tuple[Graph, list[Any]], context: Context) -> Any:
    """Follow the units through the graph of a wrapper."""
    graph, arguments = wrapped
    places = [node for node in graph.nodes if node.op == "placeholder"]
    for inner, outer in zip(places, arguments, strict=True):
        if isinstance(outer, Node):
            context.axes[inner] = context.axes[outer]
            if outer in context.tensors:
                context.tensors[inner] = context.tensors[outer]
            if outer in context.data:
                context.data.add(inner)
            context.sources[inner] = context.sources.get(outer, frozenset())
        else:
            context.axes[inner] = []
    result = follow(graph, context)
    if isinstance(result, Node):
        return context.axes[result]
    return [context.axes[item] if isinstance(item, Node) else [] for item in result]


def _freeze_two_ways(context: Context) -> None:
    """Freeze a weight that is multiplied from both sides: its signals could not be told apart."""
    roles: dict[tuple[str, int | None], set[str]] = {}
    for use in context.uses:
        if operation_name(use.node) != "embedding":
            roles.setdefault((use.weight, use.in_dim), set()).add("consumes")
            roles.setdefault((use.weight, use.out_dim), set()).add("produces")
    for (weight, dim), found in roles.items():
        if dim is not None and len(found) > 1:
            freeze_all(context.labels[weight], context, f"{weight!r} is used forwards and transposed")


def _outputs(result: Any) -> list[Node]:
    return (
        [item for item in result if isinstance(item, Node)] if isinstance(result, (tuple, list)) else [result]
    )


def _parameter_names(
    program: ExportedProgram, model: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    first = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
    everything: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    everything.update(model.named_buffers(remove_duplicate=False))
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: first[id(everything[name])] for node, name in inputs.items() if name in everything}
