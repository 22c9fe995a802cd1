"""Rules of the operations that take positions of a dimension by number: slice, index, roll, pad."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes
from cria_prune.structure.capture import operation_name
from cria_prune.structure.rules import (
    Context,
    argument,
    argument_shape,
    broadcast,
    dim_argument,
    fixed_atoms,
    freeze_all,
    no_rule,
    rule,
    shape,
    sizes_argument,
)


@rule("slice", "narrow")
def slice_dimension(node: Node, context: Context) -> Axes:
    """A slice that takes all passes; a part of the units at numbered positions needs numbers that adapt."""
    axes, before = context.of(node.args[0]), argument_shape(node)
    dim = dim_argument(node, 1, "dim", len(axes))
    units = axes[dim]
    if units is None:
        return axes
    start, stop, step = (
        argument(node, 2, "start") or 0,
        argument(node, 3, "end"),
        argument(node, 4, "step", 1),
    )
    if operation_name(node) == "narrow":
        stop, step = start + int(cast(int, stop)), 1
    part = units[slice(start, stop, step)]
    if step != 1:
        context.units.freeze(units, f"is sliced at fixed positions by {context.where(node)}")
    elif len(part) < before[dim]:
        context.units.assume(units, f"{context.where(node)} takes its bounds from its input")
        context.count(node, len(part), part)
    return [*axes[:dim], part, *axes[dim + 1 :]]


@rule("select")
def select(node: Node, context: Context) -> Axes:
    """One position of a dimension, which is fixed."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    context.units.fix(axes[dim], f"is picked from at a fixed position by {context.where(node)}")
    return axes[:dim] + axes[dim + 1 :]


@rule("copy")
def write_into(node: Node, context: Context) -> Any:
    """Values written into a tensor meet its units; into a numbered part of the units: no rule."""
    target, source = cast(tuple[Node, Node], node.args[:2])
    view = target
    while operation_name(view) in {"slice", "select"}:
        whole = cast(Node, view.args[0])
        dim = dim_argument(view, 1, "dim", len(shape(whole)))
        if context.axes[whole][dim] is not None and shape(view) != shape(whole):
            return no_rule(node, context)
        view = whole
    items = [(context.of(item), shape(item)) for item in (target, source)]
    return broadcast(items, len(shape(node)), node, context)


@rule("index")
def index(node: Node, context: Context) -> Any:
    """Dimensions that are indexed by tensors are fixed; the others pass."""
    source, indices = cast(tuple[Node, list[Node | None]], node.args[:2])
    axes = context.of(source)
    indexed = [place for place, item in enumerate(indices) if item is not None]
    if any(
        len(shape(item)) > 1 and "bool" in str(item.meta["val"].dtype) for item in indices if item is not None
    ):
        return no_rule(node, context)
    for item in indices:
        if item is not None:
            freeze_all(context.of(item), context, f"is an index in {context.where(node)}")
    freeze_all(
        [axes[place] for place in indexed], context, f"is picked from by index in {context.where(node)}"
    )
    rank = len(shape(node)) - (len(axes) - len(indexed))
    adjacent = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    left = axes[: indexed[0]] if adjacent else []
    right = [item for place, item in enumerate(axes) if place not in indexed and place >= len(left)]
    return [*left, *[None] * rank, *right]


@rule("index_select")
def index_select(node: Node, context: Context) -> Axes:
    """The dimension that is picked from is fixed; the others pass."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    context.units.freeze(axes[dim], f"is picked from by index in {context.where(node)}")
    axes[dim] = None
    return axes


@rule("gather", "take_along_dim")
def gather(node: Node, context: Context) -> Any:
    """The dimension that is picked from is fixed. Along the others the index meets the data one to one."""
    data, picks = cast(Node, node.args[0]), cast(Node, argument(node, 2, "index"))
    dim = dim_argument(node, 1, "dim", len(shape(data)))
    axes, indices = context.of(data), context.of(picks)
    others = [place for place in range(len(axes)) if place != dim]
    if any(shape(data)[place] != shape(picks)[place] for place in others) or indices[dim] is not None:
        return no_rule(node, context)
    context.units.freeze(axes[dim], f"is picked from by index in {context.where(node)}")
    axes[dim] = None
    for place in others:
        if indices[place] is None:  # most often expanded to the size of the data
            context.units.assume(axes[place], f"{context.where(node)} takes its sizes from its input")
        elif axes[place] is None:
            context.units.freeze(indices[place], f"meets a tensor of fixed size in {context.where(node)}")
        else:
            context.units.tie(axes[place], indices[place], "")
    return axes


@rule("roll", "flip")
def roll(node: Node, context: Context) -> Any:
    """The dimensions that are rolled or flipped are fixed; the others pass."""
    axes = context.of(node.args[0])
    dims = argument(node, 2, "dims", []) if operation_name(node) == "roll" else sizes_argument(node)
    for dim in [dims] if isinstance(dims, int) else dims or range(len(axes)):
        context.units.freeze(axes[int(dim)], f"is reordered by {context.where(node)}")
    return axes


@rule("triu", "tril")
def triangle(node: Node, context: Context) -> Any:
    """The last two dimensions are fixed; the others pass."""
    axes = context.of(node.args[0])
    freeze_all(axes[-2:], context, f"is cut to a triangle by {context.where(node)}")
    return axes


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
