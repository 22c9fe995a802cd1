"""The masked twin of operations: the dense network, operation by operation, without the removed units.

Zeroing what the consumers read is no twin where a normalisation takes its statistics over the units:
the mean of a LayerNorm over 64 features of which 32 are zero is not the mean of the 32 that stay.
Here the captured operations of the dense model are run one by one; the removed positions of every
result are set to zero, and a normalisation is computed over the positions that stay. It uses the dense
weights only and runs none of the model's code, so it shares neither slicing nor the restated sizes
with the pruned model. See docs/decisions/0006.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import Batch, model_inputs
from cria_prune.planning.plan import Plan
from cria_prune.structure.capture import operation_name
from cria_prune.structure.rules.core import argument
from cria_prune.structure.rules.layers import STATISTICS, reduced_dims
from cria_prune.structure.trace import Trace, live_nodes, wrapped_graph


class Twin:
    """Runs the captured operations of a dense model without the units that a plan removes.

    Args:
        traced: its trace, of a model of the type that the comparison is made in.
        example: one batch of that type.
    """

    def __init__(self, traced: Trace, example: Batch) -> None:
        self._trace = traced
        self._inputs = [item for item in tree_leaves(model_inputs(example)) if isinstance(item, Tensor)]
        self._device = next((item.device for item in traced.tensors.values()), torch.device("cpu"))

    def outputs(self, plan: Plan) -> list[Tensor]:
        """Return the tensors of the model's output, in the order of its tree."""
        context, resolved = self._trace.context, self._trace.resolved
        removed = np.zeros(int(resolved.classes.max(initial=-1)) + 1, dtype=bool)
        for cut in plan.cuts:
            gone = np.setdiff1d(np.arange(cut.size), cut.kept)
            removed[resolved.classes[context.labels[cut.tensor][cut.dim][gone]]] = True
        run = _Run(self, removed)
        signature = self._trace.program.graph_signature
        graph = self._trace.program.graph
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run.run(graph, self._placeholders(graph))
        found = {node.name: run.values.get(node) for node in graph.nodes}
        names = [name for name in signature.user_outputs if isinstance(name, str)]
        return [item for item in (found[name] for name in names) if isinstance(item, Tensor)]

    def _placeholders(self, graph: Graph) -> list[Any]:
        program, signature = self._trace.program, self._trace.program.graph_signature
        constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
        given = iter(self._inputs)
        values: list[Any] = []
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in self._trace.names:
                values.append(self._trace.tensors[self._trace.names[node.name]].detach())
            elif node.name in constants:
                values.append(program.constants[constants[node.name]])
            else:
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
            cast_on = operation_name(node) == "wrap_with_autocast" and bool(args[2])
            with torch.autocast(args[0], dtype=args[1]) if cast_on else nullcontext():
                return self.run(graph, inner)
        source = node.args[0] if node.args else None
        gone = self.gone.get(source, []) if isinstance(source, Node) else []
        name, target = operation_name(node), cast(Any, node.target)
        if name in {"layer_norm", "rms_norm"} and gone and gone[-1] is not None:
            return _over_kept(target, args, gone[-1], -1)
        if name == "group_norm" and gone[1] is not None and argument(node, 1, "num_groups") == 1:
            return _over_kept(target, args, gone[1], 1)
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


def _complement(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool, device=gone.device)
    stays[gone] = False
    return torch.nonzero(stays).ravel()
