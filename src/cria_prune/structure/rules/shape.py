"""Rules of the operations that rearrange dimensions, or take positions of them by number."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch.fx import Node

from cria_prune.structure.axes import Axes, common_factors, reshape_segments
from cria_prune.structure.rules.core import (
    EXPERTS,
    Context,
    Factor,
    Given,
    argument,
    argument_shape,
    broadcast,
    dim_argument,
    fixed_atoms,
    freeze_all,
    meet_statistics,
    no_rule,
    operation_name,
    rule,
    shape,
    sizes_argument,
)
from cria_prune.structure.rules.positions import picked


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def reshape(node: Node, context: Context) -> Axes:
    """Each run of dimensions with equal products is split to its common factors, which are then merged."""
    axes, before, after = context.of(node.args[0]), argument_shape(node), shape(node)
    result: Axes = [None] * len(after)
    as_type = operation_name(node) == "view" and isinstance(node.args[1], torch.dtype)
    # Products of an empty shape are all 0, and a view of another
    # type has other numbers: no position can be followed.
    if 0 in before or as_type:
        return no_rule(node, context)
    gives: list[Given] = [None] * len(after)
    for ins, outs in reshape_segments(before, after):
        # What is made of whole dimensions has their sizes, whatever
        # they are; the factors of one have sizes of their own.
        if len(outs) == 1:
            gives[outs[0]] = tuple(ins)
        if all(axes[dim] is None for dim in ins):
            continue
        factors = common_factors([before[dim] for dim in ins], [after[dim] for dim in outs])
        # A boundary of one shape lies inside a factor of the
        # other, so a new position takes from several units.
        if factors is None:
            freeze_all([axes[dim] for dim in ins], context, f"is mixed by {context.where(node)}")
            continue
        parts: Axes = []
        for index, dim in enumerate(ins):
            parts += context.units.split(axes[dim], [size for size, source, _ in factors if source == index])
        for index, dim in enumerate(outs):
            inside = [place for place, factor in enumerate(factors) if factor[2] == index]
            result[dim] = context.units.merge(
                [parts[place] for place in inside], [factors[place][0] for place in inside]
            )
        # The sizes of both shapes may be attributes of the module,
        # such as `num_heads`, which then have to be restated.
        for sizes, held, places in ((before, axes, ins), (after, result, outs)):
            for dim in places:
                context.count(node, sizes[dim], held[dim])
        for dim in outs if len(outs) > 1 else ():
            units = result[dim]
            gives[dim] = None if units is None or context.units.is_mixed(units) else Factor(units, tuple(ins))
    context.size(node, "reshape", axes, gives)
    _note_literals(node, context, result)
    return result


def _note_literals(node: Node, context: Context, result: Axes) -> None:
    """A size that is a number may be written down in the code: a trial cut has to show that it is not."""
    name = operation_name(node)
    literal = sizes_argument(node) if name in {"view", "reshape", "_unsafe_view"} else None
    for dim, atoms in enumerate(result):
        # Torch works a −1 out by itself. Any other number may be read from
        # x.shape or written down; the capture holds the same number for both.
        if (literal and literal[dim] != -1) or name == "unflatten":
            context.units.assume(atoms, f"{context.where(node)} takes its sizes from its input")


@rule("transpose", "permute", "t", "swapaxes", "numpy_T", "mT", "adjoint", "movedim", "moveaxis")
def permute(node: Node, context: Context) -> Axes:
    """Reorder the dimensions."""
    axes, name = context.of(node.args[0]), operation_name(node)
    if name == "permute":
        return [axes[dim] for dim in sizes_argument(node)]
    if name in {"t", "numpy_T"}:
        return axes[::-1]
    if name in {"mT", "adjoint"}:
        return [*axes[:-2], axes[-1], axes[-2]]
    if name in {"movedim", "moveaxis"}:
        return _moved(node, axes)
    first, second = dim_argument(node, 1, "dim0", len(axes)), dim_argument(node, 2, "dim1", len(axes))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _moved(node: Node, axes: Axes) -> Axes:
    ends = [[item] if isinstance(item, int) else list(cast(list[int], item)) for item in node.args[1:3]]
    source, target = ([int(dim) % len(axes) for dim in end] for end in ends)
    order = [dim for dim in range(len(axes)) if dim not in source]
    for place, dim in sorted(zip(target, source, strict=True)):
        order.insert(place, dim)
    return [axes[dim] for dim in order]


@rule("unsqueeze")
def unsqueeze(node: Node, context: Context) -> Axes:
    """A new dimension of one."""
    axes = context.of(node.args[0])
    if node.args[0] in context.dropped:
        context.statistics[node] = context.dropped[cast(Node, node.args[0])]
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


@rule("expand", "broadcast_to")
def expand(node: Node, context: Context) -> Axes:
    """A dimension of one is repeated as often as a number says that may count units; the others pass."""
    axes, before, after = context.of(node.args[0]), argument_shape(node), shape(node)
    new = len(after) - len(before)
    result: Axes = [*[None] * new, *axes]
    sizes = sizes_argument(node)
    passing: list[Given] = [None] * len(after)
    for dim, size in enumerate(after):
        if size != 1 and (dim < new or before[dim - new] == 1):
            # The one key of all query heads is expanded to as many as there are.
            # The number may be held by the module, so it has atoms as `zeros` has.
            result[dim] = context.units.spread(size)
            context.count(node, size, result[dim])
        elif result[dim] is not None:
            passing[dim] = (dim - new,)
        if sizes[dim] != -1:
            context.units.assume(result[dim], f"{context.where(node)} takes its sizes from its input")
    context.size(node, "expand", axes, passing)
    return result


@rule("expand_as")
def expand_as(node: Node, context: Context) -> Axes:
    """The sizes are those of the other tensor, and so are the units."""
    nodes = cast(list[Node], list(node.args[:2]))
    result = broadcast([(context.of(item), shape(item)) for item in nodes], len(shape(node)), node, context)
    meet_statistics(node, nodes, result, context)
    return result


@rule("broadcast_tensors")
def broadcast_tensors(node: Node, context: Context) -> Any:
    """Every tensor comes out in the shape of all of them."""
    nodes = [item for item in cast(list[Any], node.args[0]) if isinstance(item, Node)]
    if any(item in context.statistics for item in nodes):
        return no_rule(node, context)
    results = node.meta["val"]
    rank = len(results[0].shape)
    common = broadcast([(context.of(item), shape(item)) for item in nodes], rank, node, context)
    return [list(common) for _ in results]


@rule("repeat", "tile")
def repeat(node: Node, context: Context) -> Axes:
    """Units along a repeated dimension appear several times."""
    times = sizes_argument(node)
    axes = context.of(node.args[0])
    axes = [*[None] * (len(times) - len(axes)), *axes]
    times = [1] * (len(axes) - len(times)) + times
    return [None if item is None else np.tile(item, count) for item, count in zip(axes, times, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(node: Node, context: Context) -> Any:
    """Each unit along a dimension appears several times in a row."""
    times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return no_rule(node, context)
    axes = context.of(node.args[0])
    units = axes[int(dim)]
    axes[int(dim)] = None if units is None else np.repeat(units, times)
    return axes


@rule("cat", "concat", "concatenate")
def concatenate(node: Node, context: Context) -> Axes:
    """Units of the parts, one after the other; a fixed part stays."""
    # torch.cat passes over an empty tensor of one dimension, whatever the others' shapes.
    parts = [item for item in cast(list[Node], node.args[0]) if shape(item) != [0]]
    dim = dim_argument(node, 1, "dim", len(shape(node)))
    result = context.of(parts[0])
    meets = f"meets a tensor of fixed size in {context.where(node)}"
    for item in parts[1:]:
        for index, other in enumerate(context.of(item)):
            if index != dim and shape(node)[index] != 1:
                result[index] = context.units.tie(result[index], other, meets)
    along = [context.of(item)[dim] for item in parts]
    if all(item is None for item in along):
        result[dim] = None
        return result
    # A fixed part takes places as well. Without atoms the
    # units behind it would be counted from a wrong place.
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


@rule("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def split(node: Node, context: Context) -> list[Axes]:
    """Equal parts: the same position leaves every part. Unequal parts need sizes that adapt."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 2, "dim", len(axes))
    sizes = [int(item.shape[dim]) for item in node.meta["val"]]
    units = axes[dim]
    if units is None:
        return [list(axes) for _ in sizes]
    # Two kinds of code come here. `chunk` divides by a number of parts: equal parts
    # stay equal if all lose the same positions, and unequal ones would be divided
    # elsewhere after a cut. `split` has sizes, which the code may compute or hold;
    # equal parts may have one number for all, so they lose the same positions too.
    parts = np.split(units, np.cumsum(sizes)[:-1])
    by_number = operation_name(node) in {"chunk", "unsafe_chunk", "tensor_split"}
    if len(set(sizes)) == 1:
        for part in parts[1:]:
            context.units.tie(parts[0], part, "")
        context.count(node, sizes[0], parts[0])
    elif by_number:
        context.units.freeze(units, f"is split into unequal parts by {context.where(node)}")
    else:
        for size, part in zip(sizes, parts, strict=True):
            context.count(node, size, part)
    if not by_number:
        context.size(node, "split", axes, [Factor(part, (dim,)) for part in parts], dim)
        context.units.assume(units, f"{context.where(node)} takes its bounds from its input")
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in parts]


@rule("unbind", "select")
def take_position(node: Node, context: Context) -> Any:
    """A dimension goes, which is fixed: one output per position of it, or the one at a number."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    every = operation_name(node) == "unbind"
    reason = "is taken apart by" if every else "is picked from at a fixed position by"
    context.units.fix(axes[dim], f"{reason} {context.where(node)}")
    rest = axes[:dim] + axes[dim + 1 :]
    return [list(rest) for _ in node.meta["val"]] if every else rest


@rule("getitem")
def getitem(node: Node, context: Context) -> Any:
    """One output of several."""
    source, index = cast(tuple[Node, int], node.args)
    return context.axes[source][index]


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
    # Every second position of what stays would be other units, unless they leave in pairs: then every
    # pair that stays still gives its first. A part from the front may end at `C // 2`, which adapts, or
    # at a number that is written down: a trial cut shows which.
    if step > 1 and start < step and len(part) * step == before[dim]:
        pairs = units.reshape(-1, step)
        context.units.tie(np.repeat(pairs[:, 0], step), units, "")
    elif step != 1:
        context.units.freeze(units, f"is sliced at fixed positions by {context.where(node)}")
    elif len(part) < before[dim]:
        context.units.assume(units, f"{context.where(node)} takes its bounds from its input")
        context.count(node, len(part), part)
    return [*axes[:dim], part, *axes[dim + 1 :]]


@rule("copy")
def write_into(node: Node, context: Context) -> Any:
    """Values written into a tensor meet its units; a dimension that is written in parts stays."""
    target, source = cast(tuple[Node, Node], node.args[:2])
    # The write goes through views into the whole tensor, so it is the whole one's units that it may meet.
    view = target
    while operation_name(view) in {"slice", "select"}:
        whole = cast(Node, view.args[0])
        dim = dim_argument(view, 1, "dim", len(shape(whole)))
        if shape(view) != shape(whole):
            context.units.freeze(context.axes[whole][dim], f"is written in parts by {context.where(node)}")
        view = whole
    items = [(context.of(item), shape(item)) for item in (target, source)]
    return broadcast(items, len(shape(node)), node, context)


@rule("index")
def index(node: Node, context: Context) -> Any:
    """Dimensions that are indexed by tensors are fixed; the others pass."""
    source, indices = cast(tuple[Node, list[Node | None]], node.args[:2])
    axes = context.of(source)
    indexed = [place for place, item in enumerate(indices) if item is not None]
    # A mask of several dimensions takes them all at once and gives one, of a size that the data decides.
    if any(
        len(shape(item)) > 1 and "bool" in str(item.meta["val"].dtype) for item in indices if item is not None
    ):
        return no_rule(node, context)
    alone = len(indexed) == 1 and indices[indexed[0]]
    units = picked(node, alone, axes[indexed[0]], context) if isinstance(alone, Node) else None
    if units is not None:
        return [*axes[: indexed[0]], units, *axes[indexed[0] + 1 :]]
    for item in indices:
        if item is not None:
            freeze_all(context.of(item), context, f"is an index in {context.where(node)}")
    freeze_all(
        [axes[place] for place in indexed], context, f"is picked from by index in {context.where(node)}"
    )
    rank = len(shape(node)) - (len(axes) - len(indexed))
    # As NumPy has it: indexed dimensions side by side leave
    # their result in their place, others put it in front.
    adjacent = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    left = axes[: indexed[0]] if adjacent else []
    right = [item for place, item in enumerate(axes) if place not in indexed and place >= len(left)]
    return [*left, *[None] * rank, *right]


@rule("index_select")
def index_select(node: Node, context: Context) -> Axes:
    """The dimension that is picked from is fixed; the others pass."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 1, "dim", len(axes))
    units = picked(node, cast(Node, argument(node, 2, "index")), axes[dim], context)
    if units is None:
        context.units.freeze(axes[dim], f"is picked from by index in {context.where(node)}")
    axes[dim] = units
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
    points = context.points.get(picks)
    reason = f"is picked from by index in {context.where(node)}"
    if points is not None and axes[dim] is not None and len(points) == len(np.asarray(axes[dim])):
        context.units.tie(axes[dim], points, reason)  # the numbers are counted anew with what they point to
        context.units.freeze(points, reason, EXPERTS)
    else:
        context.units.freeze(axes[dim], reason)
        context.units.freeze(points, reason)
    axes[dim] = None
    for place in others:
        if indices[place] is None:  # most often expanded to the size of the data
            context.units.assume(axes[place], f"{context.where(node)} takes its sizes from its input")
        elif axes[place] is None:
            context.units.freeze(indices[place], f"meets a tensor of fixed size in {context.where(node)}")
        else:
            context.units.tie(axes[place], indices[place], "")
    return axes


@rule("triu", "tril")
def triangle(node: Node, context: Context) -> Any:
    """The last two dimensions are fixed; the others pass."""
    axes = context.of(node.args[0])
    # Which entries stay is a matter of place: after a cut another diagonal would be kept.
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
        # Cropping drops numbered units, and reflected padding copies some of them.
        if left < 0 or right < 0 or mode != "constant":
            context.units.freeze(units, f"is padded or cropped at fixed positions by {context.where(node)}")
            axes[dim] = None
            continue
        # The shortcut of a CIFAR ResNet pads channels. The padded places stay, and
        # so do the units that are added to them; those in the middle may leave.
        reason = f"is padded with a fixed number of channels by {context.where(node)}"
        ends = [fixed_atoms(context, left, reason), units, fixed_atoms(context, right, reason)]
        axes[dim] = np.concatenate(ends)
    return axes
