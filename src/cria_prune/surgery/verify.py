"""Masked equals pruned: the proof, part of every run, that surgery did what the plan says.

There are two masked twins. One is the dense model with zeros in the columns that
read a removed unit (docs/decisions/0003). Where a normalisation takes its
statistics over the units it is the dense model's captured operations, run one by
one without the removed positions (0006). Neither shares code with the slicing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import (
    Batch,
    map_tensors,
    model_inputs,
    move,
    named_shortage,
    outputs,
    ran_out,
    without_target,
)
from cria_prune.base.errors import VerificationError, said
from cria_prune.base.events import passed
from cria_prune.base.experts import plain_experts
from cria_prune.base.inputs import read_one
from cria_prune.base.kinds import of_plain_models
from cria_prune.base.modules import copy_of, device_of, named_tensors, random_kept, shared_copy
from cria_prune.planning.plan import Plan
from cria_prune.structure.rules.core import SOFTMAX, argument, dim_argument, operation_name
from cria_prune.structure.rules.layers import STATISTICS, reduced_dims
from cria_prune.structure.trace import Forward, Trace, live_nodes, trace, wrapped_graph
from cria_prune.surgery.training import Training, training_outputs


class Twin:
    """Runs the captured operations of a dense model without the units that a plan removes.

    Args:
        traced: its trace, of a model of the type that the comparison is made in.
        example: one batch of that type.
        forward: what was captured with it; by default that is the trace's first forward.
    """

    def __init__(self, traced: Trace, example: Batch, forward: Forward | None = None) -> None:
        self._trace = traced
        self._forward = forward or Forward(traced.program, traced.names)
        self._inputs = [item for item in tree_leaves(model_inputs(example)) if isinstance(item, Tensor)]
        self._device = next((item.device for item in traced.tensors.values()), torch.device("cpu"))

    def outputs(self, plan: Plan) -> list[Tensor]:
        """Return the tensors of the model's output, in the order of its tree."""
        context, resolved = self._trace.context, self._trace.resolved
        # A cut names some of a unit's places. Its class of atoms has them all, those between operations too.
        removed = np.zeros(int(resolved.classes.max(initial=-1)) + 1, dtype=bool)
        for cut in plan.cuts:
            gone = np.setdiff1d(np.arange(cut.size), cut.kept)
            removed[resolved.classes[context.labels[cut.tensor][cut.dim][gone]]] = True
        run = _Run(self, removed)
        signature, graph = self._forward.program.graph_signature, self._forward.program.graph
        with torch.no_grad(), random_kept():
            run.run(graph, self._placeholders(graph))
        found = {node.name: run.values.get(node) for node in graph.nodes}
        names = [name for name in signature.user_outputs if isinstance(name, str)]
        return [item for item in (found[name] for name in names) if isinstance(item, Tensor)]

    def _placeholders(self, graph: Graph) -> list[Any]:
        program, names = self._forward.program, self._forward.names
        signature = program.graph_signature
        constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
        given = iter(self._inputs)
        values: list[Any] = []
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                values.append(self._trace.tensors[names[node.name]].detach())
            elif node.name in constants:
                values.append(program.constants[constants[node.name]])
            else:
                # A forward may write into its input, and the twin runs for several plans.
                values.append(next(given).clone() if isinstance(node.meta.get("val"), Tensor) else None)
        return values

    def gone(self, node: Node, removed: np.ndarray) -> list[Any]:
        """Return, for every dimension of a node's result, its removed positions (None if there are none)."""

        def positions(item: Any) -> Any:
            if isinstance(item, list):
                return [positions(part) for part in item]
            if item is None:
                return None
            found = np.flatnonzero(removed[self._trace.resolved.classes[item]])
            # Indices that stayed on the CPU made every trial of a model on a GPU fail,
            # and a trial that fails freezes its group without a word (docs/log.md).
            return torch.from_numpy(found).to(self._device) if len(found) else None

        return cast(list[Any], positions(self._trace.context.axes.get(node, [])))


class _Run:
    """One run with one set of removed units."""

    def __init__(self, twin: Twin, removed: np.ndarray) -> None:
        self.twin, self.removed = twin, removed
        self.values: dict[Node, Any] = {}
        self.gone: dict[Node, list[Any]] = {}

    def run(self, graph: Graph, inputs: list[Any]) -> Any:
        """Run a graph on the values of its placeholders; return its output."""
        given = iter(inputs)
        alive = live_nodes(graph)
        for node in graph.nodes:
            if node not in alive:
                continue
            if node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda item: self.values[item])
            if node.op == "placeholder":
                value = next(given)
            elif node.op == "get_attr":
                value = _attribute(node)
            else:
                value = self._call(node)
            # After every operation anew: exp, a bias or a softmax
            # make something else of the zeros that went in.
            self.gone[node] = self.twin.gone(node, self.removed)
            self.values[node] = _without(value, self.gone[node])
        return None

    def _call(self, node: Node) -> Any:
        args, kwargs = cast(
            tuple[Any, Any], torch.fx.node.map_arg((node.args, node.kwargs), lambda item: self.values[item])
        )
        wrapped = wrapped_graph(node)
        if wrapped is not None:
            graph, arguments = wrapped
            inner = [self.values[item] if isinstance(item, Node) else item for item in arguments]
            # The operations of an autocast block stand in a graph that does not know of it.
            cast_on = operation_name(node) == "wrap_with_autocast" and bool(args[2])
            with torch.autocast(args[0], dtype=args[1]) if cast_on else nullcontext():
                return self.run(graph, inner)
        cast_to = node.meta.get("autocast")
        if cast_to is None:
            return self._apply(node, args, kwargs)
        with torch.autocast(cast_to[0], dtype=cast_to[1], enabled=cast_to[2]):
            return self._apply(node, args, kwargs)

    def _apply(self, node: Node, args: Any, kwargs: Any) -> Any:
        source = node.args[0] if node.args else None
        gone = self.gone.get(source, []) if isinstance(source, Node) else []
        name, target = operation_name(node), cast(Any, node.target)
        # A norm over a dimension from which units left: its statistics are those of the units that stay.
        if name in {"layer_norm", "rms_norm"} and gone and gone[-1] is not None:
            return _over_kept(target, args, gone[-1], -1)
        if name == "group_norm" and gone[1] is not None and argument(node, 1, "num_groups") == 1:
            return _over_kept(target, args, gone[1], 1)
        # The same of a weight that is standardised by a batch norm over its inputs.
        if name == "batch_norm" and argument(node, 5, "training") and gone:
            return _standardised(target, args, gone)
        # Experts that left are never chosen: the others are ranked, and share out the weights.
        if name in SOFTMAX and gone:
            dim = dim_argument(node, 1, "dim", len(gone))
            if gone[dim] is not None:
                return _softmax_over_kept(target, args, kwargs, gone[dim], dim)
        if name == "topk" and gone:
            dim = dim_argument(node, 2, "dim", len(gone), -1)
            if gone[dim] is not None:
                return target(args[0].index_fill(dim, gone[dim], float("-inf")), *args[1:], **kwargs)
        # The same of a norm that is written out: the mean, variance or norm is taken without them.
        if name in STATISTICS and any(item is not None for item in gone):
            return target(_kept(args[0], gone, node), *args[1:], **kwargs)
        return target(*args, **kwargs)


def _attribute(node: Node) -> Any:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _without(value: Any, gone: list[Any]) -> Any:
    """Return a result with its removed positions set to zero."""
    if isinstance(value, (tuple, list)):
        return [_without(*pair) for pair in zip(value, gone, strict=True)] if gone else value
    for dim, positions in enumerate(gone):
        # A view whose removed positions are zero already stays a view: it may be written into.
        if positions is not None and value.index_select(dim, positions).count_nonzero():
            value = value.index_fill(dim, positions, 0)
    return value


def _kept(value: Tensor, gone: list[Any], node: Node) -> Tensor:
    """Return a tensor without the removed positions of the dimensions that a node reduces."""
    for dim in reduced_dims(node, value.ndim):
        if gone[dim] is not None:
            value = value.index_select(dim, _complement(value.shape[dim], gone[dim]))
    return value


def _over_kept(target: Any, args: tuple[Any, ...], gone: Tensor, dim: int) -> Tensor:
    """Normalise over the positions that stay; the others are zero in the result."""
    data = args[0]
    kept = _complement(data.shape[dim], gone)
    rest = [item.index_select(0, kept) if isinstance(item, Tensor) else item for item in args[2:]]
    shape = [len(kept)] if dim == -1 else args[1]
    result = torch.zeros_like(data)
    result.index_copy_(dim, kept, target(data.index_select(dim, kept), shape, *rest))
    return result


def _standardised(target: Any, args: tuple[Any, ...], gone: list[Any]) -> Tensor:
    """Normalise each channel by the statistics of what stays; the other positions are zero in the result."""
    data = args[0]
    kept = {
        dim: _complement(data.shape[dim], positions)
        for dim, positions in enumerate(gone)
        if dim != 1 and positions is not None
    }
    for dim, stays in kept.items():
        data = data.index_select(dim, stays)
    value = target(data, *args[1:])
    for dim, stays in kept.items():
        whole = value.new_zeros([*value.shape[:dim], args[0].shape[dim], *value.shape[dim + 1 :]])
        value = whole.index_copy_(dim, stays, value)
    return cast(Tensor, value)


def _softmax_over_kept(target: Any, args: Any, kwargs: Any, gone: Tensor, dim: int) -> Tensor:
    """Share out among the positions that stay; the others are zero in the result."""
    kept = _complement(args[0].shape[dim], gone)
    value = target(args[0].index_select(dim, kept), *args[1:], **kwargs)
    return value.new_zeros(args[0].shape).index_copy_(dim, kept, value)


def _complement(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool, device=gone.device)
    stays[gone] = False
    return torch.nonzero(stays).ravel()


# Both sides add the same numbers, in another order. Right cuts came out at about 1e-15 on every
# network tried (docs/log.md), so the bounds leave room for depth and none for a wrong unit.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
TRAINED = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Tolerance in training mode, where batch norms divide by the deviation of a few values."""
ROUNDED = 1e-6
"""Tolerance in float64 where the forward rounds to float32 on its way, as the norms of transformers' Llama
do: sums that differ in their last bit can round apart there."""


@dataclass(frozen=True)
class Verification:
    """How far the pruned model is from the masked one.

    Attributes:
        difference: largest absolute difference over the outputs, divided by the largest output.
        tolerance: what was allowed.
        dtype: the arithmetic of both passes.
        twin: the masked model: `weights` (weights that read a removed unit are zero) or `operations`
            (normalisations leave the removed units out).
        training: how a training-mode forward was compared: `equal`; `runs`, where chance or a normalisation
            leaves only the shapes to compare; or why it was not tried.
    """

    difference: float
    tolerance: float
    dtype: str
    twin: str = "weights"
    training: str = ""


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the dense model in which no consumer reads a removed unit."""
    masked = copy_of(model)
    zero_consumers(named_tensors(masked), plan)
    return masked


def zero_consumers(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """Zero, in place, what of these weights reads a removed unit."""
    with torch.no_grad():
        for cut in plan.cuts:
            # A consumer sums over this dimension, so zero columns are zero inputs. No hook is needed,
            # and nothing is shared with the slicing that is to be proved (docs/decisions/0003).
            if cut.role == "consumes" and cut.tensor in tensors:
                gone = torch.ones(cut.size, dtype=torch.bool)
                gone[list(cut.kept)] = False
                index = torch.nonzero(gone).ravel().to(tensors[cut.tensor].device)
                tensors[cut.tensor].index_fill_(cut.dim, index, 0)


@of_plain_models
def verify(
    model: nn.Module,
    plan: Plan,
    smaller: nn.Module,
    example: Batch,
    *,
    dtype: torch.dtype = torch.float64,
    examples: Sequence[Batch] = (),
) -> Verification:
    """Compare the masked and the pruned model on one batch, in evaluation and training mode, on copies.

    A model whose weights changed otherwise (repair, batch norms measured again, recovery) differs from its
    dense one: `prune` compares each of its cuts.

    Args:
        model: the dense model; smaller: the model that `apply` made of it.
        dtype: arithmetic of the comparison: float64 (relative tolerance 1e-10, or 1e-6 where the forward
            itself rounds to float32 on its way) or float32 (1e-4); float32 is taken too where the dense
            model does not run in float64.
        examples: further batches, on which they are compared too.

    Raises:
        VerificationError: they differ by more than the tolerance, or the smaller model does not run.
        DataError: the model does not accept one of the examples.
    """
    read = [read_one(model, item) for item in examples]
    return Reference(model, read_one(model, example), dtype=dtype, examples=read).compare(plan, smaller)


class _Rounding(TorchDispatchMode):
    """Notices whether an operation turns float64 into numbers of fewer bits."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        types_in, types_out = (
            {
                item.dtype
                for item in tree_leaves(side)
                if isinstance(item, Tensor) and item.is_floating_point()
            }
            for side in ((args, kwargs), out)
        )
        self.found = self.found or (torch.float64 in types_in and bool(types_out - {torch.float64}))
        return out


class Reference:
    """A copy of the dense model in one type, to be masked by several plans.

    Args:
        model: the dense model; it is left as it was.
        example: one batch.
        dtype: see `verify`.
        examples: further batches.
        training: compare a training-mode forward as well.

    Attributes:
        batches: the example and the further ones, on the model's device.
        model: the copy, dense between two calls.
        dtype: its type: `dtype`, or float32 once the model turned out not to run in float64.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        *,
        dtype: torch.dtype = torch.float64,
        examples: Sequence[Batch] = (),
        training: bool = True,
    ) -> None:
        passed("reference", model=model)
        self.dtype, self._training = dtype, training
        self.batches = [move(item, device_of(model)) for item in (example, *examples)]
        with named_shortage("A copy of the model, to compare its cut with", LESS):
            self.model = _in_type(copy_of(model), dtype)
        self._trace: Trace | None = None
        self._rounds: bool | None = None
        self._dense: Training | None = None

    def trace(self) -> Trace:
        """Return the copy's operations with the axes of each, captured once.

        Raises:
            CaptureError, DataError: see `capture`.
        """
        if self._trace is None:
            first, *others = map(self._batch, range(len(self.batches)))
            self._trace = trace(self.model, first, others)
        return self._trace

    def take(self, model: nn.Module) -> None:
        """Hold the weights of another model of the same structure; nothing is captured again."""
        with torch.no_grad():
            theirs = named_tensors(model)
            for name, mine in named_tensors(self.model).items():
                value = theirs[name].to(mine.device, mine.dtype)
                if not torch.equal(mine, value):  # a buffer may be a view that cannot be written into
                    mine.copy_(value)

    def compare(
        self, plan: Plan, smaller: nn.Module, *, training: bool = True, spare: bool = False
    ) -> Verification:
        """Compare a pruned model, of any type, with the masked twin; in training mode too unless it is off.

        Args:
            plan: what was removed; smaller: the pruned model.
            spare: it is not needed any more, so that its forward may leave something on it.

        Raises:
            VerificationError: they differ by more than the tolerance, or one of them does not run.
            ResourceError: the memory does not suffice.
        """
        passed("verify", plan=plan)
        with named_shortage("Comparing the pruned model with the masked one", LESS):
            numbers = range(len(self.batches))
            first, *others = (self._compared(plan, smaller, number, spare) for number in numbers)
            worst = max([first, *others], key=lambda item: item.difference)
            if not (training and self._training):
                return worst
            return replace(worst, training=self.compare_training(plan, smaller))

    def compare_training(self, plan: Plan, smaller: nn.Module) -> str:
        """Compare a training-mode forward of a pruned model with the masked one's; return how, or why not.

        Raises:
            VerificationError: they differ, or the pruned model does not run.
        """
        dense = self.dense_training()
        if dense.batch is None:
            return f"not tried: {dense.reason}"
        with self._masked(plan), plain_experts(self.model):
            expected = training_outputs(self.model, dense.batch)
        try:
            mine = self._of_type(smaller)
            with plain_experts(mine):
                found = training_outputs(mine, dense.batch)
        except Exception as error:
            if ran_out(error):
                raise
            raise VerificationError(
                "A training-mode forward of the pruned model", said(error), ADVICE
            ) from error
        apart = difference(expected, found)
        if apart <= TRAINED[self.dtype]:
            return "equal"
        alike, asked = _alike(expected, found), "Outputs in training mode of the pruned model"
        if alike:
            # Under a normalisation masked weights are no twin; a batch norm of few values magnifies rounding.
            if plan.normed or dense.chance or any(bool(item.isnan().any()) for item in expected):
                return "runs"
            if dense.is_sensitive(self.model, apart, difference):
                return "runs"
            raise VerificationError(
                f"{asked} equal to the masked model's", f"the relative difference is {apart:.3g}", ADVICE
            )
        shapes = [[tuple(item.shape) for item in side] for side in (found, expected)]
        raise VerificationError(asked, f"they have shapes {shapes[0]}, the dense model's {shapes[1]}", ADVICE)

    def dense_training(self) -> Training:
        """Return whether and how the dense model runs in training mode; it is run once."""
        if self._dense is None:
            with plain_experts(self.model):
                self._dense = Training(self.model, map(self._batch, range(len(self.batches))))
        return self._dense

    def _of_type(self, smaller: nn.Module) -> nn.Module:
        return smaller if _is_of(smaller, self.dtype) else _in_type(copy_of(smaller), self.dtype)

    def _compared(self, plan: Plan, smaller: nn.Module, number: int, spare: bool) -> Verification:
        # Zeroed weights are no twin under a normalisation, and an example whose operations could not be
        # captured has no other: its shapes are compared.
        shapes_only = number > 0 and plan.normed and self.trace().others[number - 1] is None
        expected = self._run(self.model, number) if shapes_only else self._expected(plan, number)
        try:
            last = spare and number == len(self.batches) - 1
            found = self._run(self._of_type(smaller), number, last)
        except Exception as error:
            # A lack of memory says nothing of the cut.
            if ran_out(error):
                raise
            # The twin of operations can run where the model itself does not: then both go to float32.
            if self.dtype is torch.float64 and not self._runs():
                self._to_single()
                return self._compared(plan, smaller, number, spare)
            raise VerificationError("A forward pass of the pruned model", said(error), ADVICE) from error
        apart = difference(expected, expected if shapes_only and _alike(expected, found) else found)
        result = Verification(
            apart,
            self._tolerance(apart, number),
            str(self.dtype).removeprefix("torch."),
            "operations" if plan.normed else "weights",
        )
        # Written so that NaN fails.
        if not result.difference <= result.tolerance:
            if any(bool(item.isnan().any()) for item in expected):
                raise VerificationError(
                    "Outputs of the pruned model equal to the masked model's",
                    "the masked model's hold NaN",
                    "Look for the layer whose outputs are no numbers in the dense network, or with few units",
                )
            raise VerificationError(
                f"Outputs of the pruned model equal to the masked model's within {result.tolerance:g}",
                f"the relative difference is {result.difference:.3g}",
                ADVICE,
            )
        return result

    def _tolerance(self, difference: float, number: int) -> float:
        """Return what is allowed; whether the forward rounds on its way is seen only where it matters."""
        usual = TOLERANCE[self.dtype]
        if difference <= usual or self.dtype is not torch.float64:
            return usual
        # Watching every operation is dear, and most cuts are within the usual bound.
        if self._rounds is None:
            with _Rounding() as seen:
                self._run(self.model, number)
            self._rounds = seen.found
        return ROUNDED if self._rounds else usual

    def _expected(self, plan: Plan, number: int) -> list[Tensor]:
        """Return the masked outputs; in float32 from now on if float64 does not run."""
        try:
            return self.masked_outputs(plan, number)
        except Exception as error:
            # Once for all further calls: the copy stays in float32.
            if self.dtype is torch.float64:  # the forward makes tensors of its own type, or memory is lacking
                self._to_single()
                return self._expected(plan, number)
            if ran_out(error):
                raise
            raise VerificationError(
                f"A forward pass of the dense model in {str(self.dtype).removeprefix('torch.')}",
                said(error),
                "Write its forward so that new tensors take the type of its input",
            ) from error

    def _to_single(self) -> None:
        """Compare in float32 from now on."""
        self.dtype, self._trace, self._dense = torch.float32, None, None
        self.model = _in_type(self.model, self.dtype)

    def _runs(self) -> bool:
        """Say whether the dense model runs in the type of the comparison."""
        try:
            self._run(self.model, 0)
        except Exception as error:  # whatever the model's code raises
            if ran_out(error):
                raise
            return False
        return True

    def masked_outputs(self, plan: Plan, number: int = 0) -> list[Tensor]:
        """Return the outputs of the masked twin for the example, or a further one by its number."""
        if plan.normed:
            traced = self.trace()
            forward = traced.others[number - 1] if number else None
            return Twin(traced, self._batch(number), forward).outputs(plan)
        with self._masked(plan):
            return self._run(self.model, number)

    @contextmanager
    def _masked(self, plan: Plan) -> Iterator[None]:
        # Masked in place and put back. A copy for each plan was what made trial cuts slow (docs/log.md).
        tensors = named_tensors(self.model)
        names = {cut.tensor for cut in plan.cuts if cut.role == "consumes"}
        before = {name: tensors[name].detach().clone() for name in names}
        zero_consumers(tensors, plan)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, values in before.items():
                    tensors[name].copy_(values)

    def _batch(self, number: int) -> Batch:
        batch: Batch = _cast(without_target(self.batches[number]), self.dtype)
        return batch

    def _run(self, model: nn.Module, number: int, spare: bool = False) -> list[Tensor]:
        model = model if spare else shared_copy(model)  # some forwards keep caches on their module
        with plain_experts(model):  # not every way of theirs runs in float64, or with any width
            return outputs(model, self._batch(number))


LESS = (
    "The check holds a copy of the model in float64: run on a device with more memory, with a shorter first "
    "example, or prune its folder with prune_offloaded (cria prune --offload)"
)
BLOCK, PIECE = 2**22, 2**20
"""Numbers that the usual size of an output is taken of; numbers that are compared at a time: 8 MB, held
several times."""
ADVICE = (
    "The model's forward depends on a size in a way that its operations do not show; "
    "freeze the groups concerned, and please report the network"
)


def _alike(expected: list[Tensor], found: list[Tensor]) -> bool:
    return [item.shape for item in expected] == [item.shape for item in found]


def _is_of(model: nn.Module, dtype: torch.dtype) -> bool:
    tensors = named_tensors(model).values()
    return all(item.dtype == _type_of(item, dtype) for item in tensors)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    # Always a copy: a forward may write into its input.
    return map_tensors(inputs, lambda item: item.to(_type_of(item, dtype), copy=True))


def _type_of(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tensor in a comparison in `dtype`; complex ones stay complex."""
    if tensor.is_complex():
        return torch.complex128 if dtype is torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() else tensor.dtype


def _in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model._apply(lambda item: item.to(_type_of(item, dtype)))


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference, relative to the size of the outputs; infinity where shapes differ.

    The size is the largest value among those that are not exactly equal, and at least the median (up to
    one): a masked logit of -1e9 that is equal on both sides must not hide the others.
    """
    if not _alike(expected, found):
        return float("inf")
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if one.numel()]
    return max((_distance(one.reshape(-1), other.reshape(-1)) for one, other in pairs), default=0.0)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the difference of two outputs (n,), a block at a time: logits of a long text are large."""
    # A sample is enough for a median.
    usual = one[:: -(-len(one) // BLOCK)]  # every output, or as many as a block holds
    usual = (usual if usual.is_complex() else usual.double()).abs()
    usual = usual[usual.isfinite()]
    scale, worst = min(float(usual.median()), 1.0) if len(usual) else 0.0, 0.0
    for a, b in zip(one.split(PIECE), other.split(PIECE), strict=True):
        if not a.is_complex():  # truth values and whole numbers too
            a, b = a.double(), b.double()
        equal, sizes = a == b, a.abs()
        apart = (a - b).abs().masked_fill_(equal, 0.0)  # equal infinities are equal
        # NaN on one side, or on both: outputs that are no numbers prove nothing.
        if bool(apart.isnan().any()):
            return float("inf")
        # A logit that was masked to −1e9 on both sides would make any difference look small.
        differing = sizes[sizes.isfinite() & ~equal]
        scale = max(scale, float(differing.max()) if len(differing) else 0.0)
        worst = max(worst, float(apart.max()))
    return worst / (scale or 1.0)
