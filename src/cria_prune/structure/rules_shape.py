"""Rules of the operations that only move positions: reshape, permute, concatenate, slice, pad."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes, reshape_segments
from cria_prune.structure.capture import operation_name
from cria_prune.structure.rules import (
    Context,
    argument,
    argument_shape,
    dim_argument,
    fixed_atoms,
    freeze_all,
    no_rule,
    rule,
    shape,
    sizes_argument,
)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def reshape(node: Node, context: Context) -> Axes:
    """Flatten repeats the units; a split keeps the outer dimension as units, its inner positions tied."""
    axes, before, after = context.of(node.args[0]), argument_shape(node), shape(node)
    literal = sizes_argument(node) if operation_name(node) in {"view", "reshape", "_unsafe_view"} else None
    result: Axes = [None] * len(after)
    if 0 in before:
        return no_rule(node, context)
    for ins, outs in reshape_segments(before, after):
        labelled = [dim for dim in ins if axes[dim] is not None]
        if not labelled:
            continue
        if len(labelled) > 1 or (len(ins) > 1 and len(outs) > 1):
            freeze_all([axes[dim] for dim in labelled], context, f"is mixed by {context.where(node)}")
            continue
        source = axes[labelled[0]]
        assert source is not None
        sizes = [before[dim] if dim == labelled[0] else 1 for dim in ins]
        full = np.broadcast_to(source.reshape(sizes), [before[dim] for dim in ins]).ravel()
        if len(outs) > 1:
            rows = full.reshape(after[outs[0]], -1)
            context.units.tie(np.repeat(rows[:, 0], rows.shape[1]), rows.ravel(), "")
            full = rows[:, 0]
        result[outs[0]] = full
        if (literal and literal[outs[0]] != -1) or operation_name(node) == "unflatten":
            context.units.assume(full, f"{context.where(node)} takes its sizes from its input")
    return result


@rule("transpose", "permute", "t", "swapaxes", "numpy_T")
def permute(node: Node, context: Context) -> Axes:
    """Reorder the dimensions."""
    axes = context.of(node.args[0])
    if operation_name(node) == "permute":
        return [axes[dim] for dim in sizes_argument(node)]
    if operation_name(node) in {"t", "numpy_T"}:
        return axes[::-1]
    first, second = dim_argument(node, 1, "dim0", len(axes)), dim_argument(node, 2, "dim1", len(axes))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("unsqueeze")
def unsqueeze(node: Node, context: Context) -> Axes:
    """A new dimension of one."""
    axes = context.of(node.args[0])
    axes.insert(dim_argument(node, 1, "dim", len(axes) + 1), None)
    return axes


@rule("squeeze")
def squeeze(node: Node, context: Context) -> Axes:
    """Dimensions of one go."""
    axes, before = context.of(node.args[0]), argument_shape(node)
    dims = argument(node, 1, "dim")
    chosen = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {int(dim) % len(axes) for dim in chosen if before[int(dim)] == 1}
    return [item for dim, item in enumerate(axes) if dim not in gone]


@rule("expand", "expand_as")
def expand(node: Node, context: Context) -> Axes:
    """Dimensions of one are repeated and stay fixed; the others pass."""
    axes, before, after = context.of(node.args[0]), argument_shape(node), shape(node)
    new = len(after) - len(before)
    kept: Axes = [item if before[dim] == after[dim + new] else None for dim, item in enumerate(axes)]
    sizes = sizes_argument(node) if operation_name(node) == "expand" else [-1] * len(after)
    for dim, item in enumerate(kept):
        if sizes[dim + new] != -1:
            context.units.assume(item, f"{context.where(node)} takes its sizes from its input")
    return [*[None] * new, *kept]


@rule("repeat", "tile")
def repeat(node: Node, context: Context) -> Axes:
    """Units along a repeated dimension appear several times."""
    times = sizes_argument(node)
    axes = context.of(node.args[0])
    axes = [*[None] * (len(times) - len(axes)), *axes]
    times = [1] * (len(axes) - len(times)) + times
    return [None if item is None else np.tile(item, count) for item, count in zip(axes, times, strict=True)]


@rule("cat", "concat", "concatenate")
def concatenate(node: Node, context: Context) -> Axes:
    """Units of the parts, one after the other; a fixed part stays."""
    parts = [item for item in cast(list[Node], node.args[0]) if shape(item) != [0]]
    dim = dim_argument(node, 1, "dim", len(shape(node)))
    result = context.of(parts[0])
    meets = f"meets a tensor of fixed size in {context.where(node)}"
    for item in parts[1:]:
        for index, other in enumerate(context.of(item)):
            if index != dim:
                result[index] = context.units.tie(result[index], other, meets)
    along = [context.of(item)[dim] for item in parts]
    if all(item is None for item in along):
        result[dim] = None
        return result
    reason = f"is a fixed part of {context.where(node)}"
    result[dim] = np.concatenate(
        [
            fixed_atoms(context, shape(part)[dim], reason) if item is None else item
            for part, item in zip(parts, along, strict=True)
        ]
    )
    return result


@rule("stack")
def stack(node: Node, context: Context) -> Axes:
    """Tie the parts and add a fixed dimension."""
    parts = [context.of(item) for item in cast(list[Node], node.args[0])]
    result = parts[0]
    for other in parts[1:]:
        reason = f"meets a tensor of fixed size in {context.where(node)}"
        result = [context.units.tie(left, right, reason) for left, right in zip(result, other, strict=True)]
    result.insert(dim_argument(node, 1, "dim", len(result) + 1), None)
    return result


@rule("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def split(node: Node, context: Context) -> list[Axes]:
    """Equal parts: the same position leaves every part. Unequal parts have fixed sizes."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 2, "dim", len(axes))
    sizes = [int(item.shape[dim]) for item in node.meta["val"]]
    units = axes[dim]
    if units is None:
        return [list(axes) for _ in sizes]
    parts = np.split(units, np.cumsum(sizes)[:-1])
    if len(set(sizes)) == 1:
        for part in parts[1:]:
            context.units.tie(parts[0], part, "")
        if "chunk" not in operation_name(node):
            context.units.assume(units, f"{context.where(node)} takes its sizes from its input")
    else:
        context.units.freeze(units, f"is split at fixed positions by {context.where(node)}")
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in parts]


@rule("unbind")
def unbind(node: Node, context: Context) -> list[Axes]:
    """One output per position of a dimension, which is fixed."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    context.units.freeze(axes[dim], f"is taken apart by {context.where(node)}")
    return [axes[:dim] + axes[dim + 1 :] for _ in node.meta["val"]]


@rule("getitem")
def getitem(node: Node, context: Context) -> Any:
    """One output of several."""
    source, index = cast(tuple[Node, int], node.args)
    return context.axes[source][index]


@rule("slice")
def slice_dimension(node: Node, context: Context) -> Axes:
    """A slice that takes all passes; a part of the units at fixed positions freezes them."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    start, stop, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    units = axes[dim]
    if units is not None:
        part = units[slice(start, stop, step)]
        axes[dim] = part
        if len(part) != len(units) or stop not in (None, 2**63 - 1):
            context.units.freeze(units, f"is sliced at fixed positions by {context.where(node)}")
    return axes


@rule("select")
def select(node: Node, context: Context) -> Axes:
    """One position of a dimension, which is fixed."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    context.units.freeze(axes[dim], f"is picked from at a fixed position by {context.where(node)}")
    return axes[:dim] + axes[dim + 1 :]


@rule("pad", "constant_pad_nd")
def pad(node: Node, context: Context) -> Axes:
    """Padded positions are fixed, and so is what is added to them; the others pass."""
    axes, before = context.of(node.args[0]), argument_shape(node)
    widths = sizes_argument(node)
    mode = str(argument(node, 2, "mode", "constant")) if operation_name(node) == "pad" else "constant"
    for back in range(len(widths) // 2):
        left, right = widths[2 * back : 2 * back + 2]
        dim = len(before) - 1 - back
        units = axes[dim]
        if units is None or (left == 0 and right == 0):
            continue
        if left < 0 or right < 0 or mode != "constant":
            context.units.freeze(units, f"is padded or cropped at fixed positions by {context.where(node)}")
            axes[dim] = None
            continue
        reason = f"is padded with a fixed number of channels by {context.where(node)}"
        ends = [fixed_atoms(context, left, reason), units, fixed_atoms(context, right, reason)]
        axes[dim] = np.concatenate(ends)
    return axes
