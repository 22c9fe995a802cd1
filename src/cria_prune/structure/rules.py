"""One small rule per operation: how units pass through it.

A rule takes the node and a `Context` and returns the axes of its output (a list per output
where there are several). An operation without a rule freezes what touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes, Dim, Units
from cria_prune.structure.capture import module_path, operation_name

Rule = Callable[[Node, "Context"], Any]
RULES: dict[str, Rule] = {}


@dataclass
class WeightUse:
    """One call of an operation that sums over a weight: where its units come in and go out."""

    node: Node
    weight: str
    in_dim: int | None
    out_dim: int | None
    channel: int
    entering: Dim
    leaving: Dim
    per_element: float


@dataclass
class Context:
    """What the rules know: the atoms, the axes of each node so far, and the uses of weights."""

    units: Units
    axes: dict[Node, Any] = field(default_factory=dict)
    tensors: dict[Node, str] = field(default_factory=dict)
    uses: list[WeightUse] = field(default_factory=list)

    def of(self, node: Any) -> Axes:
        """Return the axes of a tensor argument."""
        return list(self.axes[node])

    def where(self, node: Node) -> str:
        """Say where a node is, for a reason."""
        return f"{operation_name(node)} in {module_path(node) or 'the model'}"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by their base name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def shape(node: Node) -> list[int]:
    """Return the shape that a node's tensor had in the capture."""
    return [int(size) for size in node.meta["val"].shape]


def tensor_arguments(node: Node) -> list[Node]:
    """Return every argument node that carries a tensor, lists opened."""
    return [item for item in node.all_input_nodes if hasattr(item.meta.get("val"), "shape")]


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def no_rule(node: Node, context: Context) -> Any:
    """Freeze all that touches an operation that has no rule."""
    for item in node.all_input_nodes:
        axes = context.axes.get(item, [])
        freeze_all(axes, context, f"no rule for the operation {context.where(node)}")
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [[None] * len(getattr(item, "shape", ())) for item in value]
    return [None] * len(getattr(value, "shape", ()))


def freeze_all(axes: Iterable[Any], context: Context, reason: str) -> None:
    """Freeze each dimension in (possibly nested) axes."""
    for item in axes:
        if isinstance(item, list):
            freeze_all(item, context, reason)
        else:
            context.units.freeze(item, reason)


@rule(
    *[
        "abs",
        "add",
        "alias",
        "alpha_dropout",
        "celu",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clone",
        "contiguous",
    ],
    *["cos", "detach", "div", "dropout", "elu", "eq", "erf", "exp", "feature_dropout", "floor", "ge", "gelu"],
    *[
        "gt",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "le",
        "leaky_relu",
        "lift_fresh_copy",
        "log",
        "logical_not",
    ],
    *[
        "logit",
        "lt",
        "maximum",
        "minimum",
        "mish",
        "mul",
        "ne",
        "neg",
        "positive",
        "pow",
        "reciprocal",
        "relu",
    ],
    *[
        "relu6",
        "round",
        "rsqrt",
        "rsub",
        "selu",
        "sigmoid",
        "silu",
        "sin",
        "softplus",
        "sqrt",
        "square",
        "sub",
    ],
    *["_to_copy", "tanh", "threshold", "to", "type_as", "where"],
)
def elementwise(node: Node, context: Context) -> Axes:
    """Broadcast the arguments and tie what meets."""
    out = shape(node)
    result: Axes = [None] * len(out)
    met = [False] * len(out)
    items = tensor_arguments(node)
    if operation_name(node) in {"to", "type_as"}:
        items = items[:1]  # the other tensor gives its type only
    for item in items:
        axes, sizes = context.of(item), shape(item)
        for back in range(1, len(sizes) + 1):
            if out[-back] == 1:
                continue
            if sizes[-back] == 1:
                continue
            dim = axes[-back]
            if met[-back]:
                if operation_name(node) in {"add", "sub"} and item not in context.tensors and dim is not None:
                    context.units.sum(result[-back])
                result[-back] = context.units.tie(
                    result[-back], dim, f"meets a tensor of fixed size in {context.where(node)}"
                )
            else:
                result[-back], met[-back] = dim, True
    return result


@rule("_assert_tensor_metadata")
def nothing(node: Node, context: Context) -> Axes:
    """A check that export writes beside a change of type; it gives nothing."""
    return []


def argument_shape(node: Node, index: int = 0) -> list[int]:
    """Return the shape of a tensor argument given by position."""
    return shape(cast(Node, node.args[index]))


def sizes_argument(node: Node, index: int = 1) -> list[int]:
    """Return a list-of-sizes argument given by position."""
    return [int(size) for size in cast(list[int], node.args[index])]


def dim_argument(node: Node, index: int, name: str, rank: int, default: int = 0) -> int:
    """Return a dimension argument, counted from the front."""
    return int(argument(node, index, name, default)) % rank


def fixed_atoms(context: Context, size: int, reason: str) -> np.ndarray:
    """Return new atoms that are frozen."""
    atoms = context.units.fresh(size)
    context.units.freeze(atoms, reason)
    return atoms
