"""Model and example inputs -> its ATen operations, by torch.export (non-strict), with the axes of each.

Rules are applied in order, wrappers opened. The model's mode and random state are as before; nothing is left
on it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from cria_prune.base.attention import plain_attention
from cria_prune.base.batches import SMALLER, Batch, check_memory, model_inputs
from cria_prune.base.errors import CaptureError, DataError, said
from cria_prune.base.events import passed
from cria_prune.base.modules import cache_off, named_tensors, shared_copy
from cria_prune.structure.axes import Resolved, Units
from cria_prune.structure.rules import attention, computed, layers, shape  # noqa: F401  (they register their rules)
from cria_prune.structure.rules.core import RULES, Context, freeze_all, no_rule, operation_name

LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
"""Their rules look at the shapes of weights and results only."""


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
    names = parameter_names(program, model)
    _start(program.graph, context, names)
    for item in tree_leaves(follow(program.graph, context)):
        if isinstance(item, Node):
            freeze_all(context.axes[item], context, "is part of the model's output")
    return Trace(program, context, tensors, names, context.units.resolve())


def capture(model: nn.Module, example: Batch, dynamic: Any = None) -> ExportedProgram:
    """Return the model's operations on the example batch, in evaluation mode.

    Args:
        model: it is left as it was.
        example: one batch.
        dynamic: which of its sizes are to stay open, as torch.export's `dynamic_shapes`; none by default.

    Raises:
        DataError: the model's forward does not accept the example.
        CaptureError: the forward runs, but its operations cannot be captured; the text names
            the operation and the line of the model's code.
        StructureError: the model cannot be copied.
    """
    passed("capture", model=model)
    args, kwargs = model_inputs(example)
    model = shared_copy(model)  # some forwards keep caches on their module
    with (
        cache_off(model),
        plain_attention(model),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        model.eval()
        try:
            with warnings.catch_warnings():
                # The old weight norm leaves its weight on the module, and computes it anew in every forward.
                warnings.filterwarnings("ignore", message=r".*assigned during export")
                return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            check_memory(error, f"Capturing the operations of {type(model).__name__}", SMALLER)
            _raise_clear(model, args, kwargs, error)
            raise AssertionError("unreachable") from error


def _raise_clear(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
    # The plain forward is run first: if it fails as well, the example is at fault and not the capture.
    try:
        model(*args, **kwargs)
    except Exception as forward:
        shapes = [tuple(item.shape) for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
        raise DataError(
            f"A forward pass of {type(model).__name__} on the example inputs of shape {shapes}",
            said(forward),
            "Pass one batch of inputs that the model accepts",
        ) from error
    raise CaptureError(
        f"The operations of {type(model).__name__}",
        f"torch.export stops at {_offender(model, error)} with {said(error)}",
        "Write that line with tensor operations whose control flow does not depend on the data",
    ) from error


def _offender(model: nn.Module, error: BaseException) -> str:
    """Name the deepest frame of the traceback that runs a module of the model, and its code line."""
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    place = f"module {type(model).__name__}"
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        code = trace.tb_frame.f_code
        if id(owner) in names and "torch/" not in code.co_filename.replace("\\", "/"):
            place = f"module {names[id(owner)]!r}, {code.co_name}() line {trace.tb_lineno}"
        trace = trace.tb_next
    operation = re.search(r"\baten[.:]+[\w.]+", str(error))
    return f"{operation.group(0)} in {place}" if operation else place


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _start(graph: Graph, context: Context, names: Mapping[str, str]) -> None:
    for node in graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            if name is None:
                # An input of the model: its sizes are the caller's,
                # so they are fixed, and what depends on it is data.
                context.axes[node] = [None] * len(getattr(node.meta.get("val"), "shape", ()))
                context.data.add(node)
            else:
                context.axes[node] = [*context.labels[name]]
                context.names[node] = name


def follow(graph: Graph, context: Context) -> Any:
    """Apply the rule of every operation of a graph in order; return the arguments of its output."""
    # What nothing reads must not freeze the units that it touches, and export leaves such operations behind.
    alive = live_nodes(graph)
    for node in graph.nodes:
        if node not in alive:
            continue
        if node.op == "get_attr":
            context.axes[node] = [None] * len(getattr(node.meta.get("val"), "shape", ()))
        elif node.op == "call_function":
            # Two things are carried from node to node. Data is what depends on the input: a weight
            # that scales the units is no second branch. Sources are the layers that an output
            # comes from: GELU written out adds x and x³ of one layer, and only where different
            # layers meet is there a residual stream (docs/log.md, structure of any network).
            if not context.data.isdisjoint(node.all_input_nodes):
                context.data.add(node)
            inherited = [context.sources[item] for item in node.all_input_nodes if item in context.sources]
            context.sources[node] = frozenset().union(*inherited)
            uses = len(context.uses)
            wrapped = wrapped_graph(node)
            if wrapped is None:
                # A size that depends on the data counts no atoms, and no rule can follow it. Layers
                # look at their weights and results alone, so the size of their input is not asked for.
                read = [] if operation_name(node) in LAYERS else node.all_input_nodes
                known = all(map(_has_plain_shape, (node, *read)))
                rule = RULES.get(operation_name(node), no_rule) if known else no_rule
                ties = context.units.ties
                context.axes[node] = rule(node, context)
                if node not in context.data:
                    context.weight_ties[node] = range(ties, context.units.ties)
            else:
                # A block under no_grad or autocast comes as a graph of
                # its own. Without a look inside all of it would freeze.
                context.axes[node] = _wrapper(wrapped, context)
            # A rule that notes a use with outputs was a layer's: what comes out of it has this one source.
            if any(use.produced for use in context.uses[uses:]):
                context.sources[node] = frozenset([node])
        elif node.op == "output":
            return node.args[0]
    return ()


def _has_plain_shape(node: Node) -> bool:
    """Say whether a node gives tensors, if anything, whose sizes do not depend on the data."""
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else [value]
    sizes = [getattr(item, "shape", () if item is None else (None,)) for item in items]
    return all(type(size) is int for found in sizes for size in found)


def live_nodes(graph: Graph) -> set[Node]:
    """Return the nodes that the output depends on, and those that write into a tensor."""
    alive: set[Node] = set()
    for node in reversed(graph.nodes):
        # A write goes into another node's tensor, and no edge of the graph leads there: it counts as
        # read. What has no schema is taken for one, so that nothing is passed over that may matter.
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
            context.outer[inner] = outer
            if outer in context.data:
                context.data.add(inner)
            context.sources[inner] = context.sources.get(outer, frozenset())
        else:
            context.axes[inner] = []
    result = follow(graph, context)
    if isinstance(result, Node):
        return context.axes[result]
    return [context.axes[item] if isinstance(item, Node) else [] for item in result]


def parameter_names(program: ExportedProgram, model: nn.Module) -> dict[str, str]:
    """Return placeholder -> canonical name, of every parameter and buffer that a captured program reads."""
    first = {id(tensor): name for name, tensor in canonical_tensors(model).items()}
    everything, signature = named_tensors(model), program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: first[id(everything[name])] for node, name in inputs.items() if name in everything}
