"""A model's captured operations, run step by step over batches, so that a network can be stopped and mended.

Two things cannot be had from a forward: to stop between two operations for all batches at once, and to free
what nobody reads any more. A `Program` is the list of operations that `torch.export` gives, with weights
looked up when they are read; a `Run` carries one batch through it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from cria_prune.base.batches import Batch, map_tensors, model_inputs, move
from cria_prune.base.errors import CaptureError
from cria_prune.base.modules import device_of
from cria_prune.structure.one_run import OneRun
from cria_prune.structure.rules.core import operation_name
from cria_prune.structure.trace import capture, live_nodes, parameter_names, wrapped_graph

SHAPES = 3
"""Different shapes of batches that are captured one by one; more are captured at once, with open sizes."""


@dataclass(frozen=True)
class Ref:
    """The result of a step, as an argument of another."""

    number: int


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Attributes:
        number: its place in the program.
        kind: `call`, or what is there before: `input`, `weight`, `constant`.
        name: of the operation, the weight (its canonical name) or the input (its place among the tensors).
        target: what is called, or the constant.
        args, kwargs: with a `Ref` in place of every result.
        reads: the steps whose results it takes.
        data: it depends on the inputs of the model.
        autocast: arguments of the autocast that it runs in; None outside.
        value: what the capture knows of its result: a tensor without values, a number, a list.
    """

    number: int
    kind: str
    name: str
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[int, ...] = ()
    data: bool = False
    autocast: tuple[Any, ...] | None = None
    value: Any = None

    @property
    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        schema = getattr(self.target, "_schema", None)
        return self.kind == "call" and schema is not None and bool(schema.is_mutable)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of its result on the captured batch; None where that is no tensor."""
        value = self.value
        return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


class Program:
    """The operations of a model for batches of one shape, or of any shape where its sizes are open.

    Args:
        model: its structure is captured; weights are looked up by name when the program runs.
        batch: as the forward takes it; it is captured on the device of the model, which may be meta.
        open_sizes: (place of an input tensor, dimension) pairs of any size.

    Attributes:
        steps: all that the output depends on, in order.
        outputs: the steps that give the tensors of the output.
        readers: step -> steps that take its result.
        written: weights and constants that a step may write into, such as a counter of the forwards.
        reads: the operations depend on values of this very batch.

    Raises:
        CaptureError: the operations cannot be captured, or an open size was taken for a fixed one.
    """

    def __init__(self, model: nn.Module, batch: Batch, open_sizes: frozenset[tuple[int, int]] = frozenset()):
        self.steps: list[Step] = []
        batch = move(batch, device_of(model))
        program = capture(model, batch, _dynamic(batch, open_sizes))
        names = parameter_names(program, model)
        self.reads = isinstance(program, OneRun) and program.reads
        signature = program.graph_signature
        constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
        numbers: dict[Node, Any] = {}
        place = 0
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            if node.name in names:
                numbers[node] = self._add("weight", names[node.name], value=value)
            elif node.name in constants:
                numbers[node] = self._add("constant", node.name, program.constants[constants[node.name]])
            elif isinstance(value, Tensor):
                numbers[node] = self._add("input", str(place), value=value, data=True)
                _check_open(value, place, open_sizes)
                place += 1
            else:
                numbers[node] = self._add("constant", node.name, None)
        self._follow(program.graph, numbers, None)
        output = next(node for node in program.graph.nodes if node.op == "output")
        given = [item for item in tree_leaves(output.args) if isinstance(item, Node)]
        users = {name for name in signature.user_outputs if isinstance(name, str)}
        self.outputs = [numbers[item].number for item in given if item.name in users]
        self.readers: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}
        for step in self.steps:
            for number in step.reads:
                self.readers.setdefault(number, []).append(step.number)
                self.last[number] = step.number
        for number in self.outputs:
            self.last[number] = len(self.steps)
            self.readers.setdefault(number, []).append(len(self.steps))
        self.written = frozenset(self._written())

    def _written(self) -> Iterator[int]:
        """Yield the weights and constants that a step may write into, or into a view of them."""
        for step in self.steps:
            waiting = [*step.reads[:1]] if step.writes else []
            while waiting:
                source = self.steps[waiting.pop()]
                if source.kind in ("weight", "constant"):
                    yield source.number
                waiting += source.reads[:1]

    def takes(self, batch: Batch) -> bool:
        """Say whether the operations are those for a batch's sizes, as far as its open ones go."""
        known, guards = dict[Any, int](), list[Any]()
        places = [step.value for step in self.steps if step.kind == "input"]
        for place, item in zip(places, tensors_of(batch), strict=True):
            for expected, size in zip(place.shape, item.shape, strict=True):
                if is_concrete_int(expected):
                    if int(expected) != size:
                        return False
                    continue
                # Sizes that the capture took for one are one symbol; others may hang together.
                node = expected.node
                guards = node.shape_env.guards
                if node.expr.is_symbol and known.setdefault(node.expr, size) != size:
                    return False
                if not node.expr.is_symbol and node.expr.xreplace(known) != size:
                    return False
                replace = node.shape_env.replace
        # Where the forward asked how large a size is, the operations are those of one answer.
        return all(replace(guard.expr).xreplace(known) != False for guard in guards)  # noqa: E712

    def _add(self, kind: str, name: str, target: Any = None, **more: Any) -> Ref:
        self.steps.append(Step(len(self.steps), kind, name, target, **more))
        return Ref(len(self.steps) - 1)

    def _follow(self, graph: Graph, numbers: dict[Node, Any], autocast: tuple[Any, ...] | None) -> Any:
        """Add the operations of a graph; return the argument of its output."""
        alive = live_nodes(graph)
        for node in graph.nodes:
            if node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda item: numbers[item])
            if node.op == "get_attr" and node in alive:
                numbers[node] = self._add("constant", str(node.target), _attribute(node))
            elif node.op == "call_function" and node in alive:
                wrapped = wrapped_graph(node)
                if wrapped is None:
                    numbers[node] = self._call(node, numbers, node.meta.get("autocast", autocast))
                    continue
                inner, arguments = wrapped
                places = [item for item in inner.nodes if item.op == "placeholder"]
                for within, outer in zip(places, arguments, strict=True):
                    numbers[within] = numbers[outer] if isinstance(outer, Node) else outer
                on = autocast
                if operation_name(node) == "wrap_with_autocast":
                    on = tuple(node.args[:3])
                numbers[node] = self._pack(self._follow(inner, numbers, on))
        return ()

    def _pack(self, value: Any) -> Any:
        """Return what a wrapper gives as one step, for the steps that take an item of it."""
        if isinstance(value, Ref):
            return value
        refs = [item for item in value if isinstance(item, Ref)]
        data = any(self.steps[ref.number].data for ref in refs)
        return self._add(
            "call", "pack", lambda *items: list(items), args=tuple(value),
            reads=tuple(ref.number for ref in refs), data=data,
        )  # fmt: skip

    def _call(self, node: Node, numbers: dict[Node, Any], autocast: tuple[Any, ...] | None) -> Ref:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: numbers[item])
        reads = tuple(
            dict.fromkeys(ref.number for ref in tree_leaves((args, kwargs)) if isinstance(ref, Ref))
        )
        return self._add(
            "call", operation_name(node), node.target, args=tuple(args), kwargs=dict(kwargs), reads=reads,
            data=any(self.steps[number].data for number in reads), autocast=autocast,
            value=node.meta.get("val"),
        )  # fmt: skip


def _attribute(node: Node) -> Any:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _dynamic(batch: Batch, open_sizes: frozenset[tuple[int, int]]) -> Any:
    """Return what torch.export is told of the open sizes of a batch; None where there are none."""
    if not open_sizes:
        return None
    args, kwargs = model_inputs(batch)
    place = iter(range(len(tree_leaves((args, kwargs)))))

    def sizes(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None
        number = next(place)
        return {dim: Dim.AUTO for at, dim in sorted(open_sizes) if at == number}

    return tree_map(sizes, kwargs) if kwargs else tree_map(sizes, args)


def _check_open(value: Tensor, place: int, open_sizes: frozenset[tuple[int, int]]) -> None:
    for at, dim in open_sizes:
        if at == place and is_concrete_int(value.shape[dim]):
            raise CaptureError(
                f"Operations for any size of dimension {dim} of an input",
                f"the forward takes it for {int(value.shape[dim])}",
                "Pass batches of one shape",
            )


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the input tensors of a batch, in the order of the program's inputs."""
    return [item for item in tree_leaves(model_inputs(batch)) if isinstance(item, Tensor)]


def _form(batch: Batch) -> tuple[Any, ...]:
    """Return the shapes of a batch, and all else of it that a capture depends on."""
    leaves, tree = tree_flatten(model_inputs(batch))
    return str(tree), *(
        (tuple(item.shape), item.dtype) if isinstance(item, Tensor) else repr(item) for item in leaves
    )


def programs_for(model: nn.Module, batches: Sequence[Batch]) -> list[Program]:
    """Return the program of every batch: one for all where sizes can be left open, else one per shape.

    Raises:
        CaptureError: the operations cannot be captured.
    """
    forms = [_form(batch) for batch in batches]
    distinct = dict(zip(forms, batches, strict=True))
    if len(distinct) > SHAPES:
        shared = _open_program(model, list(distinct.values()))
        if shared is not None:
            return [shared] * len(batches)
    made = {form: Program(model, batch) for form, batch in distinct.items()}
    # What was read of a batch's values holds for this batch alone.
    return [
        Program(model, batch) if made[form].reads and batch is not distinct[form] else made[form]
        for form, batch in zip(forms, batches, strict=True)
    ]


def _open_program(model: nn.Module, batches: Sequence[Batch]) -> Program | None:
    """Return one program for batches whose tensors differ in some sizes; None where that cannot be."""
    shapes = [[tuple(item.shape) for item in tensors_of(batch)] for batch in batches]
    if len({tuple(map(len, item)) for item in shapes}) > 1:
        return None
    varying = frozenset(
        (place, dim)
        for place, sizes in enumerate(zip(*shapes, strict=True))
        for dim, found in enumerate(zip(*sizes, strict=True))
        if len(set(found)) > 1
    )
    # torch.export takes a size of 0 or 1 for fixed, so the example is one where all of them are larger.
    largest = max(range(len(batches)), key=lambda item: min(shapes[item][at][dim] for at, dim in varying))
    try:
        found = Program(model, batches[largest], varying)
    except CaptureError:
        return None
    return found if all(map(found.takes, batches)) else None


Look = Callable[[str], Tensor]
"""Name of a weight -> its value now."""


class Run:
    """One batch on its way through a program.

    Args:
        program: of the batch's shape.
        batch: its tensors are copied, for a forward may write into them.
        device: where it runs.

    Attributes:
        values: step -> result, of those that are still read.
        at: the next step.
    """

    def __init__(self, program: Program, batch: Batch, device: torch.device) -> None:
        self.program, self._device, self.at = program, device, 0
        self.values: dict[int, Any] = {}
        given = tensors_of(map_tensors(batch, lambda item: item.to(device, copy=True)))
        for step in program.steps:
            if step.kind == "input":
                self.values[step.number] = given[int(step.name)]
            elif step.kind == "constant":
                value = step.target
                if isinstance(value, Tensor):
                    value = value.to(device, copy=step.number in program.written)
                self.values[step.number] = value

    def advance(self, until: int, look: Look, *, free: bool = True) -> None:
        """Run the steps before `until`; results that no later step reads are let go, unless `free` is off."""
        steps = self.program.steps
        while self.at < until:
            step = steps[self.at]
            if step.kind == "call":
                self.call(step, look)
            self.at += 1
            if free:
                for number in step.reads:
                    if self.program.last[number] < self.at:
                        self.values.pop(number, None)
                if step.number not in self.program.last:
                    self.values.pop(step.number, None)

    def call(self, step: Step, look: Look) -> Any:
        """Run one step, keep its result and return it."""
        args, kwargs = self.of(step.args, look), self.of(step.kwargs, look)
        if step.autocast is None:
            value = step.target(*args, **kwargs)
        else:
            kind, dtype, enabled = step.autocast
            with torch.autocast(kind, dtype=dtype) if enabled else nullcontext():
                value = step.target(*args, **kwargs)
        self.values[step.number] = value
        return value

    def of(self, item: Any, look: Look) -> Any:
        """Return an argument with the results in place of the references."""
        if isinstance(item, Ref):
            step = self.program.steps[item.number]
            if step.kind != "weight":
                return self.values[item.number]
            if item.number not in self.program.written:
                return look(step.name)
            # The model is left as it was: each batch writes into a copy of its own.
            if item.number not in self.values:
                self.values[item.number] = look(step.name).clone()
            return self.values[item.number]
        if isinstance(item, (list, tuple)):
            return type(item)(self.of(part, look) for part in item)
        if isinstance(item, Mapping):
            return {key: self.of(part, look) for key, part in item.items()}
        if isinstance(item, torch.device) and item.type == "meta":
            return self._device  # captured on shapes alone
        return item

    def forget(self, step: Step) -> None:
        """Let go of the copies of weights that a step reads: they have changed since."""
        for number in step.reads:
            if self.program.steps[number].kind == "weight":
                self.values.pop(number, None)

    def outputs(self, look: Look) -> list[Tensor]:
        """Run to the end; return the tensors of the output, which may be weights too."""
        self.advance(len(self.program.steps), look)
        given = [self.of(Ref(number), look) for number in self.program.outputs]
        return [item for item in given if isinstance(item, Tensor)]

    def fork(self) -> Run:
        """Return another run of the same batch from here on; what it writes into is its own."""
        other = object.__new__(Run)
        other.program, other._device, other.at = self.program, self._device, self.at
        other.values = dict(self.values)
        if any(step.writes for step in self.program.steps[self.at :]):
            # Views share what they are of, so all that lives is copied with its aliases.
            other.values = copy.deepcopy(self.values)
        return other

    def release(self) -> None:
        """Let go of the results that no step from here on reads."""
        for number in [item for item in self.values if self.program.last.get(item, -1) < self.at]:
            if self.program.steps[number].kind != "constant":
                del self.values[number]
