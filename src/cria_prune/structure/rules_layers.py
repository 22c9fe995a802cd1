"""Rules of the layers: what sums over weights, normalises, pools or reduces."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes, Dim
from cria_prune.structure.capture import operation_name
from cria_prune.structure.rules import (
    Context,
    WeightUse,
    argument,
    argument_shape,
    dim_argument,
    freeze_all,
    no_rule,
    rule,
    shape,
)


@rule("linear")
def linear(node: Node, context: Context) -> Axes:
    """y = x W^T + b over the last dimension."""
    data, weight = node.args[0], node.args[1]
    axes, weights = context.of(data), context.of(weight)
    context.units.tie(axes[-1], weights[1], "is part of the model's input")
    _follow(context, node, weights[0], argument(node, 2, "bias"))
    positions = int(np.prod(shape(node)[:-1]))
    _use(context, node, weight, (1, 0), -1, axes[-1], weights[0], positions)
    return [*axes[:-1], weights[0]]


@rule("conv1d", "conv2d", "conv3d")
def convolution(node: Node, context: Context) -> Axes:
    """Sum over input channels and window; grouped: the same positions leave every group."""
    data, weight = node.args[0], node.args[1]
    groups = int(argument(node, 6, "groups", 1))
    axes, weights = context.of(data), context.of(weight)
    if weights[0] is None or weights[1] is None:  # a constant, or computed by an operation without a rule
        return no_rule(node, context)
    spatial = len(weights) - 2
    channel = len(axes) - spatial - 1
    entering, leaving = axes[channel], weights[0]
    freeze_all(axes[channel + 1 :], context, f"is a spatial dimension of {context.where(node)}")
    freeze_all(weights[2:], context, "is a window of a convolution")
    in_dim: int | None = 1
    out_dim: int | None = 0
    fixed = "is part of the model's input"
    if groups > 1 and argument_shape(node, 1)[1] == 1:
        # Depthwise: each input channel makes its own outputs, so both leave together.
        multiplier = len(leaving) // groups
        repeated = None if entering is None else np.repeat(entering, multiplier)
        context.units.tie(repeated, leaving, fixed)
        context.units.freeze(weights[1], "is the single input of a depthwise filter")
        in_dim = out_dim = None
    elif groups > 1:
        context.units.tie(entering, np.tile(weights[1], groups), fixed)
        rows = leaving.reshape(groups, -1)
        context.units.tie(np.tile(rows[0], groups), leaving, fixed)
    else:
        context.units.tie(entering, weights[1], fixed)
    _follow(context, node, leaving, argument(node, 2, "bias"))
    sizes = shape(node)
    _use(
        context, node, weight, (in_dim, out_dim), channel, entering, leaving,
        int(np.prod(sizes[:channel] + sizes[channel + 1 :])),
    )  # fmt: skip
    return [*axes[:channel], leaving, *[None] * spatial]


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(node: Node, context: Context) -> Any:
    """Like a convolution with the weight's first two dimensions exchanged."""
    if int(argument(node, 6, "groups", 1)) > 1:
        return no_rule(node, context)
    data, weight = node.args[0], node.args[1]
    axes, weights = context.of(data), context.of(weight)
    spatial = len(weights) - 2
    channel = len(axes) - spatial - 1
    freeze_all(
        [*axes[channel + 1 :], *weights[2:]], context, f"is a spatial dimension of {context.where(node)}"
    )
    context.units.tie(axes[channel], weights[0], "is part of the model's input")
    _follow(context, node, weights[1], argument(node, 2, "bias"))
    sizes = argument_shape(node)
    positions = int(np.prod(sizes[:channel] + sizes[channel + 1 :]))
    _use(context, node, weight, (0, 1), channel, axes[channel], weights[1], positions)
    return [*axes[:channel], weights[1], *[None] * spatial]


def _follow(context: Context, node: Node, units: Dim, *parameters: Any) -> None:
    for item in parameters:
        if isinstance(item, Node):
            context.units.tie(units, context.of(item)[0], f"meets a fixed tensor in {context.where(node)}")


def _use(
    context: Context, node: Node, weight: Any, dims: tuple[int | None, int | None],
    channel: int, entering: Dim, leaving: Dim, positions: int,
) -> None:  # fmt: skip
    if weight not in context.tensors:
        reason = f"the weight of {context.where(node)} is computed, not a parameter"
        freeze_all([entering, leaving], context, reason)
        return
    name = context.tensors[weight]
    context.uses.append(WeightUse(node, name, *dims, channel, entering, leaving, float(positions)))


@rule("batch_norm")
def batch_norm(node: Node, context: Context) -> Axes:
    """Per channel: weight, bias and running statistics follow the channels."""
    axes = context.of(node.args[0])
    _follow(context, node, axes[1], *node.args[1:5])
    return axes


@rule("prelu")
def prelu(node: Node, context: Context) -> Axes:
    """A slope per channel follows the channels; a single slope is free."""
    axes = context.of(node.args[0])
    if argument_shape(node, 1) != [1]:
        _follow(context, node, axes[1], node.args[1])
    return axes


@rule(*[f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)])
def pooling(node: Node, context: Context) -> Any:
    """Spatial dimensions are reduced; channels pass. Adaptive maxima give values and indices."""
    axes = context.of(node.args[0])
    spatial = int(operation_name(node)[-2])
    freeze_all(axes[-spatial:], context, f"is a spatial dimension of {context.where(node)}")
    result = [*axes[:-spatial], *[None] * spatial]
    return [result, list(result)] if isinstance(node.meta["val"], tuple) else result


@rule("upsample_nearest2d", "upsample_bilinear2d")
def resize(node: Node, context: Context) -> Axes:
    """Spatial dimensions are resized; channels pass."""
    axes = context.of(node.args[0])
    freeze_all(axes[-2:], context, f"is a spatial dimension of {context.where(node)}")
    return [*axes[:-2], None, None]


@rule("mean", "sum", "amax", "amin", "var", "std")
def reduction(node: Node, context: Context) -> Axes:
    """A reduced dimension of units is frozen: its value depends on how many there are."""
    axes = context.of(node.args[0])
    dims = argument(node, 1, "dim")
    if isinstance(dims, bool):  # std(x, unbiased): the second argument is no dimension
        dims = None
    dims = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    reduced = {int(dim) % len(axes) for dim in dims} or set(range(len(axes)))
    freeze_all([axes[dim] for dim in reduced], context, f"is reduced over by {context.where(node)}")
    if len(shape(node)) == len(axes):
        return [None if dim in reduced else item for dim, item in enumerate(axes)]
    return [item for dim, item in enumerate(axes) if dim not in reduced]


@rule("softmax", "log_softmax")
def softmax(node: Node, context: Context) -> Axes:
    """The normalised dimension is reduced over; the others pass."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    context.units.freeze(axes[dim], f"is reduced over by {context.where(node)}")
    axes[dim] = None
    return axes
