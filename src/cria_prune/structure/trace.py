"""Model and example inputs -> its ATen operations, by torch.export (non-strict), with the axes of each.

Rules are applied in order, wrappers opened. The model's mode and random state are as before; nothing is left
on it.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import reduce
from io import StringIO
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from cria_prune.base.attention import plain_attention
from cria_prune.base.batches import SMALLER, Batch, check_memory, map_tensors, model_inputs
from cria_prune.base.errors import CaptureError, DataError, said
from cria_prune.base.events import passed
from cria_prune.base.experts import plain_experts
from cria_prune.base.modules import cache_off, named_tensors, random_kept, shared_copy, state_kept
from cria_prune.base.rebound import held_outside
from cria_prune.base.written import entries_kept
from cria_prune.structure.axes import Resolved, Units
from cria_prune.structure.forwards import find_copies, freeze_around, tie_copies, unread_said, weights_read
from cria_prune.structure.one_run import OneRun, one_run
from cria_prune.structure.packed import PackedRows
from cria_prune.structure.rules import (  # noqa: F401  (they register their rules)
    attention,
    computed,
    experts,
    layers,
    positions,
    recurrent,
    shape,
)
from cria_prune.structure.rules.core import RULES, Context, freeze_all, no_rule, operation_name
from cria_prune.structure.skips import skipped

LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
"""Their rules look at the shapes of weights and results only."""


@dataclass(frozen=True)
class Forward:
    """One forward that was captured: its operations, and placeholder -> canonical name of its weights."""

    program: ExportedProgram | OneRun
    names: Mapping[str, str]


@dataclass(frozen=True)
class Trace:
    """What a model does to its units.

    Attributes:
        program: the captured operations of the first example, in evaluation mode.
        context: axes of every node, uses of weights, of this forward and of the others.
        tensors: canonical name -> parameter or buffer.
        names: placeholder -> canonical name of its parameter or buffer.
        resolved: the units of all atoms.
        uses: how many of the context's uses are those of `program`; they come first.
        others: forwards of the further examples, None where one could not be captured.
        copies: path of a module -> path of the module that it is a copy of, see `forwards.find_copies`.
        same: tensor of a copy -> that of its original.
        read: parameters and buffers that an operation of any forward takes.
        notes: what the user should know of how the operations were found, a line each.
    """

    program: ExportedProgram | OneRun
    context: Context
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    resolved: Resolved
    uses: int
    others: tuple[Forward | None, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def reads(self) -> bool:
        """Whether the operations depend on values of the first example: those of another one may differ."""
        return bool(run_said(self.program))


def trace(model: nn.Module, example: Batch, examples: Sequence[Batch] = ()) -> Trace:
    """Capture a model and follow its units through every operation.

    Args:
        model: it is left as it was.
        example: one batch.
        examples: further ones, which may take other ways through its code. Where the evaluation of all leaves
            parameters unread, the training-mode forward is followed as well.

    Raises:
        CaptureError: the operations cannot be captured.
        DataError: the forward does not accept the example.
    """
    tensors = canonical_tensors(model)
    context = Context(Units())
    for name, tensor in tensors.items():
        context.labels[name] = [context.units.fresh(size) for size in tensor.shape]
    first = _followed(model, capture(model, example), context, "is part of the model's output")
    uses, others = len(context.uses), list[Forward | None]()
    for number, batch in enumerate(examples, 1):
        try:
            further = capture(model, batch)
            others.append(_followed(model, further, context, "is part of the model's output"))
        except CaptureError:  # its cuts are tried and compared all the same
            others.append(None)
        except DataError as error:
            raise DataError(
                f"{error.asked}, further example {number} of {len(examples)}", error.found,
                "Give further examples that the model's forward accepts, each as its batches are given",
            ) from error  # fmt: skip
    captured = [first, *(item for item in others if item is not None)]
    read = set[str]().union(*(weights_read(item.program.graph, item.names) for item in captured))
    parameters = [name for name, item in tensors.items() if isinstance(item, nn.Parameter)]
    copies = find_copies(model, read)
    same = tie_copies(model, copies, context)
    untrained = ""
    if not read.issuperset(parameters):
        trained, untrained = _trained(model, (example, *examples), context)
        captured += trained
        read.update(*(weights_read(item.program.graph, item.names) for item in trained))
    unread = [name for name in parameters if name not in read and name not in same]
    freeze_around(model, [item.program.graph for item in captured], context, unread, untrained)
    notes = [note for item in captured for note in run_said(item.program)]
    if unread:
        notes.append(unread_said(unread))
    resolved = context.units.resolve()
    marks = {**resolved.marks, "residual": skipped(context, resolved.classes)}
    return Trace(
        first.program, context, tensors, first.names, replace(resolved, marks=marks), uses, tuple(others),
        copies, same, frozenset(read), tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def _followed(model: nn.Module, program: ExportedProgram | OneRun, context: Context, reason: str) -> Forward:
    """Follow the units through one forward; `reason` says why what it gives stays."""
    names = parameter_names(program, model)
    _start(program.graph, context, names)
    _note_values(program, context, canonical_tensors(model))
    for item in tree_leaves(follow(program.graph, context)):
        if isinstance(item, Node):
            freeze_all([*context.axes[item], context.points.get(item)], context, reason)
    return Forward(program, names)


def _trained(model: nn.Module, batches: Sequence[Batch], context: Context) -> tuple[list[Forward], str]:
    """Follow the training-mode forward of the first batch that it accepts; without one, return why not."""
    why = ""
    for batch in batches:
        try:
            program = capture(model, batch, training=True)
        except (CaptureError, DataError) as error:  # it may need targets
            why = why or error.found
            continue
        return [_followed(model, program, context, "is part of the model's output in training")], ""
    return [], why


def run_said(program: ExportedProgram | OneRun) -> list[str]:
    """Return the line that says where the operations are those of one run only; none where they are not."""
    if not (isinstance(program, OneRun) and program.reads):
        return []
    return [
        f"the operations are those of one run, for the code reads values at {program.at}: what other data "
        "would run is seen where a further example (examples=[...]) runs it"
    ]


def capture(
    model: nn.Module, example: Batch, dynamic: Any = None, *, training: bool = False
) -> ExportedProgram | OneRun:
    """Return the model's operations on the example batch, in evaluation mode.

    Where torch.export stops, at a branch on the data or `float(tensor)`, they are those of one run.

    Args:
        model: it is left as it was.
        example: one batch.
        dynamic: which of its sizes are to stay open, as torch.export's `dynamic_shapes`; none by default.
            A single run has no open sizes.
        training: in training mode instead.

    Raises:
        DataError: the model's forward does not accept the example.
        CaptureError: the forward runs, but its operations cannot be captured; the text names
            the operation and the line of the model's code.
        StructureError: the model cannot be copied.
    """
    passed("capture", model=model)
    args, kwargs = model_inputs(example)
    with (
        cache_off(model),
        plain_attention(model),
        plain_experts(model),
        PackedRows() if any(isinstance(item, nn.RNNBase) for item in model.modules()) else nullcontext(),
        random_kept(),
        torch.no_grad(),
        warnings.catch_warnings(),
        entries_kept(held_outside(model)),
    ):
        # A recurrent layer lists its weights once more; the list of this copy is let go with it.
        warnings.filterwarnings("ignore", r"The tensor attributes? self\.[\w.]*_flat_weights")
        # A copy for each try: some forwards keep caches on their module, and those of a failed export hold no
        # values.
        try:
            # The old weight norm leaves its weight on the module, and computes it anew in every forward.
            warnings.filterwarnings("ignore", message=r".*assigned during export")
            exported = shared_copy(model).train(training)
            with _hushed():
                return torch.export.export(exported, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            check_memory(error, f"Capturing the operations of {type(model).__name__}", SMALLER)
            stopped, at = error, _offender(exported, error)
        _check_forward(shared_copy(model).train(training), example, stopped)
        if dynamic is None:
            args, kwargs = model_inputs(
                map_tensors(example, torch.clone)
            )  # a forward may write into its input
            try:
                return one_run(shared_copy(model).train(training), args, kwargs, at)
            except Exception as error:
                check_memory(error, f"Following a run of {type(model).__name__}", SMALLER)
    raise CaptureError(
        f"The operations of {type(model).__name__}",
        f"torch.export stops at {at} with {said(stopped)}",
        "Write that line with tensor operations whose control flow does not depend on the data",
    ) from stopped


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep away the graph that torch.export prints where it stops: a thousand lines of a large model."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    logs = [(log, log.level) for log in map(logging.getLogger, names)]
    try:
        for log, _ in logs:
            log.setLevel(logging.CRITICAL + 1)
        with redirect_stderr(StringIO()):
            yield
    finally:
        for log, level in logs:
            log.setLevel(level)


def _check_forward(model: nn.Module, example: Batch, stopped: Exception) -> None:
    # The plain forward is run first: if it fails as well, the example is at fault and not the capture.
    args, kwargs = model_inputs(map_tensors(example, torch.clone))
    try:
        with state_kept(model):
            model(*args, **kwargs)
    except Exception as forward:
        shapes = [tuple(item.shape) for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
        raise DataError(
            f"A forward pass of {type(model).__name__} on the example inputs of shape {shapes}",
            said(forward),
            "Pass one batch of inputs that the model accepts",
        ) from stopped


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


def _note_values(program: ExportedProgram | OneRun, context: Context, tensors: Mapping[str, Tensor]) -> None:
    """Note the constants and the whole numbers of buffers, which may be positions that are picked."""
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        held = tensors.get(context.names.get(node, ""))
        value = program.constants[constants[node.name]] if node.name in constants else held
        if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
            context.values[node] = value


def follow(graph: Graph, context: Context) -> Any:
    """Apply the rule of every operation of a graph in order; return the arguments of its output."""
    # What nothing reads is run by Python all the same, so its weights are cut with the rest and what meets
    # in it has to fit. But it must not freeze what it touches, and export leaves such operations behind.
    alive, around = live_nodes(graph), context.units.unread
    for node in graph.nodes:
        context.units.unread = around or node not in alive
        if node.op == "get_attr":
            context.axes[node] = [None] * len(getattr(node.meta.get("val"), "shape", ()))
        elif node.op == "call_function":
            # Two things are carried from node to node. Data is what depends on the input: a weight
            # that scales the units is no second branch. Sources are the layers that an output
            # comes from: GELU written out adds x and x³ of one layer, and only where different
            # layers meet may one go around another (docs/log.md, structure of any network).
            if not context.data.isdisjoint(node.all_input_nodes):
                context.data.add(node)
            for table in (context.sources, context.upstream):
                table[node] = reduce(or_, (table.get(item, 0) for item in node.all_input_nodes), 0)
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
                experts.follow_points(node, context)
                if node not in context.data:
                    context.weight_ties[node] = range(ties, context.units.ties)
            else:
                # A block under no_grad or autocast comes as a graph of
                # its own. Without a look inside all of it would freeze.
                context.axes[node] = _wrapper(wrapped, context)
            # A wrapper may hold layers whose outputs nothing reads: nothing comes from them.
            noted = [number for number in range(uses, len(context.uses)) if context.uses[number].read]
            context.upstream[node] |= sum(1 << number for number in noted)
            # A rule that notes a use with outputs was a layer's: what comes out of it has this one source.
            own = sum(1 << number for number in noted if context.uses[number].produced)
            context.sources[node] = own or context.sources[node]
            if not noted and node not in context.lost:
                for item in node.all_input_nodes:
                    if item in context.lost:
                        context.lost[node] = context.lost[item]
        elif node.op == "output":
            context.units.unread = around
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
            if outer in context.points:
                context.points[inner] = context.points[outer]
            context.sources[inner] = context.sources.get(outer, 0)
            context.upstream[inner] = context.upstream.get(outer, 0)
        else:
            context.axes[inner] = []
    result = follow(graph, context)
    if isinstance(result, Node):
        return context.axes[result]
    return [context.axes[item] if isinstance(item, Node) else [] for item in result]


def parameter_names(program: ExportedProgram | OneRun, model: nn.Module) -> dict[str, str]:
    """Return placeholder -> canonical name, of every parameter and buffer that a captured program reads."""
    first = {id(tensor): name for name, tensor in canonical_tensors(model).items()}
    everything, signature = named_tensors(model), program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: first[id(everything[name])] for node, name in inputs.items() if name in everything}
