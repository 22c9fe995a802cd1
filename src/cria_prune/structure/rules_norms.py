"""Rules of what normalises or reduces.

A statistic over a dimension of units changes with the units that leave. In a normalisation that is
what its smaller self does too, so the dimension passes, marked `normed`: its masked twin leaves the
removed units out of the statistic. In any other reduction it is frozen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes
from cria_prune.structure.capture import operation_name
from cria_prune.structure.rules import (
    RULES,
    Context,
    argument,
    dim_argument,
    elementwise,
    freeze_all,
    rule,
    shape,
)
from cria_prune.structure.rules_layers import follow_units


@rule("batch_norm", "instance_norm")
def batch_norm(node: Node, context: Context) -> Axes:
    """Per channel: weight, bias and running statistics follow the channels."""
    axes = context.of(node.args[0])
    follow_units(context, node, axes[1], *node.args[1:5])
    if axes[1] is not None:
        context.count(node, len(axes[1]), axes[1], "num_features")
    if operation_name(node) == "instance_norm":
        freeze_all(axes[2:], context, f"is reduced over by {context.where(node)}")
    return axes


@rule("layer_norm", "rms_norm")
def layer_norm(node: Node, context: Context) -> Axes:
    """Over the last dimension: weight and bias follow it. Over several: they are frozen."""
    axes = context.of(node.args[0])
    depth = len(argument(node, 1, "normalized_shape"))
    parameters = [argument(node, 2, "weight"), argument(node, 3, "bias") if len(node.args) > 3 else None]
    if depth == 1:
        follow_units(context, node, axes[-1], *(item for item in parameters if isinstance(item, Node)))
        context.units.mark(axes[-1], "normed")
        context.count(node, shape(node)[-1], axes[-1], "normalized_shape")
        return axes
    reason = f"is one of several dimensions that are normalised by {context.where(node)}"
    freeze_all(axes[-depth:], context, reason)
    for item in parameters:
        if isinstance(item, Node):
            freeze_all(context.of(item), context, reason)
    return axes


@rule("group_norm")
def group_norm(node: Node, context: Context) -> Axes:
    """Groups are normalised apart: a whole group leaves at a time; a single group is a layer norm."""
    axes, groups = context.of(node.args[0]), int(argument(node, 1, "num_groups"))
    freeze_all(axes[2:], context, f"is reduced over by {context.where(node)}")
    channels = axes[1]
    parameters = (argument(node, 2, "weight"), argument(node, 3, "bias"))
    follow_units(context, node, channels, *(item for item in parameters if isinstance(item, Node)))
    if channels is None:
        return axes
    if groups == 1:
        context.units.mark(channels, "normed")
    else:
        rows = channels.reshape(groups, -1)
        context.units.tie(np.repeat(rows[:, 0], rows.shape[1]), channels, "")
        context.count(node, groups, rows[:, 0], "num_groups", "groups")
    context.count(node, len(channels), channels, "num_channels")
    return axes


@rule(
    *["mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "any", "all"],
    *["prod", "nansum", "var_mean", "std_mean", "max", "min", "argmax", "argmin"],
)
def reduction(node: Node, context: Context) -> Any:
    """A reduced dimension of units is frozen, but for the statistic of a hand-written normalisation."""
    axes = context.of(node.args[0])
    if isinstance(argument(node, 1, "other"), Node):  # max(x, y)
        return freeze_pair(node, context)
    name = operation_name(node)
    reduced = reduced_dims(node, len(axes))
    normalises = len(reduced) == 1 and name in STATISTICS and _is_broadcast_back(node, *reduced)
    for dim in reduced:
        if normalises:
            context.units.mark(axes[dim], "normed")
            if axes[dim] is not None:
                context.statistics[node] = (dim - len(axes), np.asarray(axes[dim]))
        else:
            context.units.freeze(axes[dim], f"is reduced over by {context.where(node)}")
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    if len(first.shape) == len(axes):
        result: Axes = [None if dim in reduced else item for dim, item in enumerate(axes)]
    else:
        result = [item for dim, item in enumerate(axes) if dim not in reduced]
    return [list(result) for _ in value] if isinstance(value, (tuple, list)) else result


def reduced_dims(node: Node, rank: int) -> set[int]:
    """Return the dimensions that a reduction takes, counted from the front."""
    dims = argument(node, 2 if operation_name(node) in {"linalg_vector_norm", "norm"} else 1, "dim")
    if isinstance(dims, bool):  # std(x, unbiased): the second argument is no dimension
        dims = None
    dims = range(rank) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    reduced = {int(dim) % rank for dim in dims} if rank else set()
    return reduced or set(range(rank))


def freeze_pair(node: Node, context: Context) -> Axes:
    """Freeze both tensors of an operation that is used as an elementwise maximum."""
    for item in node.all_input_nodes:
        freeze_all(context.of(item), context, f"no rule for the operation {context.where(node)}")
    return [None] * len(shape(node))


STATISTICS = {"mean", "var", "std", "sum", "amax", "amin", "linalg_vector_norm", "norm"}


def _is_broadcast_back(node: Node, dim: int) -> bool:
    """Say whether a statistic over `dim` (kept with size one) only ever meets that dimension again.

    So it is in a hand-written normalisation, x / sqrt(mean(x²)): nothing else reads the statistic.
    """
    if any(item == 0 for item in shape(node)) or len(shape(node)) != len(shape(node.all_input_nodes[0])):
        return False
    back = dim - len(shape(node))
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if operation_name(user) == "_assert_tensor_metadata":
                continue
            meets = RULES.get(operation_name(user)) is elementwise or operation_name(user) == "expand_as"
            if not meets or len(shape(user)) < -back:
                return False
            if shape(user)[back] == 1:
                waiting.append(user)
    return True


@rule("softmax", "log_softmax", "_softmax", "cumsum", "cumprod", "logcumsumexp")
def along(node: Node, context: Context) -> Axes:
    """One dimension is reduced over or accumulated, and frozen; the others pass."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    context.units.freeze(axes[dim], f"is reduced over by {context.where(node)}")
    return axes


@rule("glu")
def glu(node: Node, context: Context) -> Axes:
    """The first half times the sigmoid of the second: the same positions leave both."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes), -1)
    units = axes[dim]
    if units is not None:
        first, second = np.split(units, 2)
        axes[dim] = context.units.tie(first, second, "")
        context.units.mark(first, "gated")
    return axes
