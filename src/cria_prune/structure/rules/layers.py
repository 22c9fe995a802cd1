"""Rules of the layers: what sums over weights, pools, resizes, normalises or reduces."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes, Dim
from cria_prune.structure.rules.core import (
    EXPERTS,
    RULES,
    SOFTMAX,
    Context,
    argument,
    argument_shape,
    dim_argument,
    elementwise,
    freeze_all,
    no_rule,
    operation_name,
    rule,
    shape,
)


@rule("linear")
def linear(node: Node, context: Context) -> Axes:
    """y = x W^T + b over the last dimension."""
    data, weight = cast(tuple[Node, Node], node.args[:2])
    axes, weights = context.of(data), context.of(weight)
    context.units.tie(axes[-1], weights[1], context.fixed_by(data))
    follow_units(context, node, weights[0], argument(node, 2, "bias"))
    # Each element of the weight multiplies once for every row, which is what the MACs are counted by.
    context.use(node, weight, (1, 0), -1, axes[-1], weights[0], float(np.prod(shape(node)[:-1])))
    return [*axes[:-1], weights[0]]


@rule("embedding")
def embedding(node: Node, context: Context) -> Axes:
    """Rows of a table, picked by the data: its columns are produced."""
    weight, indices = cast(tuple[Node, Node], node.args[:2])
    rows, columns = context.of(weight)
    context.units.fix(rows, "are the rows of an embedding, picked by the data")
    # Rows are picked and not multiplied, so there are no MACs.
    context.use(node, weight, (None, 1), -1, None, columns, 0.0)
    freeze_all(context.of(indices), context, f"picks rows in {context.where(node)}")
    return [*[None] * len(shape(indices)), columns]


@rule(*[f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)])
def convolution(node: Node, context: Context) -> Any:
    """Sum over input channels and window; grouped: the same positions leave every group.

    A transposed one has the weight's first two dimensions exchanged.
    """
    data, weight = cast(tuple[Node, Node], node.args[:2])
    groups = int(argument(node, 6, "groups", 1))
    turned = operation_name(node).startswith("conv_transpose")
    axes, weights = context.of(data), context.of(weight)
    summed, leaving = weights[:2] if turned else (weights[1], weights[0])
    depthwise = not turned and groups > 1 and argument_shape(node, 1)[1] == 1
    # A weight without atoms is a constant, or computed by an operation without a rule. The one input of a
    # depthwise filter may be a dimension that was squeezed and put back.
    if (summed is None and not depthwise) or leaving is None:
        return no_rule(node, context)
    dims: tuple[int | None, int | None] = (0, 1) if turned else (1, 0)
    spatial = len(weights) - 2
    channel = len(axes) - spatial - 1
    entering = axes[channel]
    freeze_all(axes[channel + 1 :], context, f"is a spatial dimension of {context.where(node)}")
    freeze_all(weights[2:], context, "is a window of a convolution")
    if turned and groups > 1:
        # The first dimension has the inputs of all groups, the second the outputs of one.
        leaving, dims = _turned_groups(node, entering, weights, groups, context)
    elif depthwise:
        # Depthwise: each input channel makes its own outputs, so both leave together.
        # A depthwise filter follows its channel like a bias: it has no dimension that sums over channels.
        multiplier = len(leaving) // groups
        repeated = None if entering is None else np.repeat(entering, multiplier)
        context.units.tie(repeated, leaving, context.fixed_by(data))
        context.units.freeze(summed, "is the single input of a depthwise filter")
        dims = (None, None)
    elif groups > 1 and summed is not None:
        # The weight has one dimension for the inputs of all groups. A group that lost more than another would
        # need a weight of another shape; so position i leaves all of them, on the side of the outputs too.
        context.units.tie(entering, np.tile(summed, groups), context.fixed_by(data))
        rows = leaving.reshape(groups, -1)
        context.units.tie(np.tile(rows[0], groups), leaving, "")
    else:
        context.units.tie(entering, summed, context.fixed_by(data))
    follow_units(context, node, leaving, argument(node, 2, "bias"))
    sizes = argument_shape(node) if turned else shape(node)
    positions = float(np.prod(sizes[:channel] + sizes[channel + 1 :]))
    context.use(node, weight, dims, channel, entering, leaving, positions)
    return [*axes[:channel], leaving, *[None] * spatial]


def _turned_groups(
    node: Node, entering: Dim, weights: Axes, groups: int, context: Context
) -> tuple[np.ndarray, tuple[int | None, int | None]]:
    """Tie the channels of a grouped transposed convolution; return what it makes, and its dimensions."""
    inputs, outputs = np.asarray(weights[0]), np.asarray(weights[1])
    context.units.tie(entering, inputs, context.fixed_by(cast(Node, node.args[0])))
    if len(inputs) == groups:
        # Depthwise: each channel makes its own, by filters that follow it like a bias.
        context.units.freeze(outputs, "are the outputs of one depthwise filter")
        return np.repeat(inputs, len(outputs)), (None, None)
    # As in the plain one: position i leaves every group, on both sides.
    rows = inputs.reshape(groups, -1)
    context.units.tie(np.tile(rows[0], groups), inputs, "")
    return np.tile(outputs, groups), (0, 1)


def follow_units(context: Context, node: Node, units: Dim, *parameters: Any) -> None:
    """Tie one-dimensional parameters (biases, statistics, slopes) to the units they belong to."""
    for item in parameters:
        if isinstance(item, Node) and np.prod(shape(item)) != 1:  # a single number is broadcast
            reason = f"meets a fixed tensor in {context.where(node)}"
            context.units.tie(units, context.of(item)[-1], reason)


@rule("prelu")
def prelu(node: Node, context: Context) -> Axes:
    """A slope per channel follows the channels; a single slope is free."""
    axes = context.of(node.args[0])
    follow_units(context, node, axes[1], node.args[1])
    return axes


@rule(
    *[f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)],
    *[f"max_pool{n}d_with_indices" for n in (1, 2, 3)],
)
def pooling(node: Node, context: Context) -> Any:
    """Spatial dimensions are reduced; channels pass. Some maxima give values and indices."""
    axes = context.of(node.args[0])
    spatial = int(operation_name(node).split("pool")[1][0])
    freeze_all(axes[-spatial:], context, f"is a spatial dimension of {context.where(node)}")
    result = [*axes[:-spatial], *[None] * spatial]
    return [result, list(result)] if isinstance(node.meta["val"], tuple) else result


@rule(
    *["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"],
    *["upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"],
    *["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"],
)
def resize(node: Node, context: Context) -> Axes:
    """Spatial dimensions are resized; channels pass."""
    axes = context.of(node.args[0])
    freeze_all(axes[2:], context, f"is a spatial dimension of {context.where(node)}")
    return [*axes[:2], *[None] * (len(axes) - 2)]


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(node: Node, context: Context) -> Axes:
    """Channels × r² become space, or back: the r² positions of a channel leave together."""
    axes, before, after = context.of(node.args[0]), argument_shape(node), shape(node)
    freeze_all(axes[-2:], context, f"is a spatial dimension of {context.where(node)}")
    ratio = max(before[-3], after[-3]) // min(before[-3], after[-3])
    units = axes[-3]
    if units is not None:
        if before[-3] > after[-3]:
            # The r² channels behind each other make one channel of the larger picture.
            rows = units.reshape(-1, ratio)
            context.units.tie(np.repeat(rows[:, 0], ratio), units, "")
            units = rows[:, 0]
        else:
            units = np.repeat(units, ratio)
    return [*axes[:-3], units, None, None]


@rule("im2col")
def windows(node: Node, context: Context) -> Axes:
    """Each channel appears once per position of the window."""
    axes = context.of(node.args[0])
    freeze_all(axes[-2:], context, f"is a spatial dimension of {context.where(node)}")
    units = axes[-3]
    repeated = None if units is None else np.repeat(units, shape(node)[-2] // len(units))
    return [*axes[:-3], repeated, None]


@rule("col2im")
def folded_windows(node: Node, context: Context) -> Any:
    """The positions of each channel's window are added up where they lie: they leave together."""
    axes, size = context.of(node.args[0]), shape(node)[-3]
    context.units.freeze(axes[-1], f"is a spatial dimension of {context.where(node)}")
    units = axes[-2]
    if units is not None:
        rows = units.reshape(size, -1)
        context.units.tie(np.repeat(rows[:, 0], rows.shape[1]), units, "")
        units = np.ascontiguousarray(rows[:, 0])
    return [*axes[:-2], units, None, None]


@rule("batch_norm", "instance_norm")
def batch_norm(node: Node, context: Context) -> Axes:
    """Per channel: weight, bias and running statistics follow the channels."""
    axes = context.of(node.args[0])
    follow_units(context, node, axes[1], *node.args[1:5])
    if axes[1] is not None:
        context.count(node, len(axes[1]), axes[1], "num_features")
    reduced = [*axes[:1], *axes[2:]]
    if operation_name(node) == "instance_norm":
        freeze_all(axes[2:], context, f"is reduced over by {context.where(node)}")
    elif node not in context.data:
        # A standardised weight: its statistics are those of the inputs that stay, see the twin of operations.
        for atoms in reduced:
            context.units.mark(atoms, "normed")
    return axes


@rule("layer_norm", "rms_norm")
def layer_norm(node: Node, context: Context) -> Axes:
    """Over the last dimension: weight and bias follow it. Over several: they are frozen."""
    axes = context.of(node.args[0])
    depth = len(argument(node, 1, "normalized_shape"))
    parameters = [argument(node, 2, "weight"), argument(node, 3, "bias") if len(node.args) > 3 else None]
    if depth == 1:
        follow_units(context, node, axes[-1], *(item for item in parameters if isinstance(item, Node)))
        # The statistics are over the units, and zeros would count in
        # them: the masked twin runs the operations (docs/decisions/0006).
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
        # A group has statistics of its own. When it leaves whole, those of the
        # others do not change, and the number of groups still divides the channels.
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
        return no_rule(node, context)
    name = operation_name(node)
    reduced = reduced_dims(node, len(axes))
    # x / sqrt(mean(x²)) is a norm that is written out: the
    # mean comes back to the very positions it was taken over.
    kept = not isinstance(node.meta["val"], (tuple, list)) and len(shape(node)) == len(axes)
    normalises = name in STATISTICS and all(_is_broadcast_back(node, dim) for dim in reduced)
    normalises = normalises and (kept or len(reduced) == 1)
    for dim in reduced:
        if node not in context.data and name in STATISTICS:
            # Of a weight: the others change with it, as the twin of operations shows.
            context.units.mark(axes[dim], "normed")
        elif normalises:
            context.units.mark(axes[dim], "normed")
            if axes[dim] is not None:
                table = context.statistics if kept else context.dropped
                table.setdefault(node, []).append((dim - len(axes), np.asarray(axes[dim])))
        elif name == "sum" and not context.units.made_by("factor", axes[dim]):
            # A sum by hand (the scores of attention pooling) is a layer whose weights are one: it loses what
            # the units add. They are no zeros where a bias or exp stands between, so operations are the twin.
            context.units.mark(axes[dim], "normed")
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


STATISTICS = {
    *("mean", "var", "std", "var_mean", "std_mean"),
    *("sum", "amax", "amin", "linalg_vector_norm", "norm"),
}


def _is_broadcast_back(node: Node, dim: int) -> bool:
    """Say whether a statistic over `dim` only ever meets that dimension again, with size one or put back.

    So it is in a hand-written normalisation, x / sqrt(mean(x²)): nothing else reads the statistic.
    """
    if isinstance(node.meta["val"], (tuple, list)):  # mean and variance at once are not followed
        return False
    rank = len(shape(node.all_input_nodes[0]))
    if any(item == 0 for item in shape(node)):
        return False
    back = dim - rank
    # Every reader is followed as long as the dimension has size
    # one, and what it meets at last has to be elementwise.
    waiting = [(node, len(shape(node)) == rank)]
    while waiting:
        item, there = waiting.pop()
        for user in item.users:
            name = operation_name(user)
            if name == "_assert_tensor_metadata":
                continue
            if not there:
                put_back = name == "unsqueeze" and dim_argument(user, 1, "dim", rank) == dim
                if not put_back and (RULES.get(name) is not elementwise or shape(user) != shape(item)):
                    return False
                waiting.append((user, put_back))
                continue
            meets = RULES.get(name) is elementwise or name == "expand_as"
            if not meets or len(shape(user)) < -back:
                return False
            if shape(user)[back] == 1:
                waiting.append((user, True))
    return True


@rule(*SOFTMAX, "cumsum", "cumprod", "logcumsumexp")
def along(node: Node, context: Context) -> Axes:
    """One dimension is reduced over or accumulated, and frozen; the others pass."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    # Over the experts of a router the others share out what one of them had.
    spared = EXPERTS if operation_name(node) in SOFTMAX else ""
    context.units.freeze(axes[dim], f"is reduced over by {context.where(node)}", spared)
    return axes


@rule("glu")
def glu(node: Node, context: Context) -> Axes:
    """The first half times the sigmoid of the second: the same positions leave both."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes), -1)
    units = axes[dim]
    if units is not None:
        # The halves are multiplied position by position, so they leave together.
        first, second = np.split(units, 2)
        axes[dim] = context.units.tie(first, second, "")
        context.units.mark(first, "gated")
    return axes
