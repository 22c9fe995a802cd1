"""Rules of the operations that reorder channels, or move rows by number along other dimensions."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from cria_prune.structure.rules.core import (
    Context,
    argument,
    dim_argument,
    freeze_all,
    no_rule,
    operation_name,
    rule,
    shape,
    sizes_argument,
)


@rule("flip")
def flip(node: Node, context: Context) -> Any:
    """The order is turned around, and what stays of it is turned around too."""
    axes = context.of(node.args[0])
    for dim in sizes_argument(node):
        units = axes[dim]
        axes[dim] = None if units is None else units[::-1].copy()
    return axes


@rule("roll")
def roll(node: Node, context: Context) -> Any:
    """What is rolled past the end stays, so that the same number of places still leads to its front."""
    axes = context.of(node.args[0])
    shifts, dims = (
        [item] if isinstance(item, int) else list(item)
        for item in (argument(node, 1, "shifts"), argument(node, 2, "dims", ()))
    )
    if not dims:  # over the flattened tensor
        freeze_all(axes, context, f"is reordered by {context.where(node)}")
    for dim, shift in zip(dims, shifts, strict=False):
        units = axes[dim]
        if units is None or shift % len(units) == 0:
            continue
        # Rolled by 2, the last two channels come first. Any of the others may leave: the last
        # two still do. The number may also be worked out from the width, which a trial shows.
        past = units[-shift:] if shift > 0 else units[:-shift]
        context.units.freeze(past, f"is rolled past the end by {context.where(node)}")
        context.units.assume(units, f"{context.where(node)} rolls by a fixed number")
        axes[dim] = np.roll(units, shift)
    return axes


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(node: Node, context: Context) -> Any:
    """Channels as (groups, n) become (n, groups): the same position leaves every group."""
    axes, groups = context.of(node.args[0]), int(cast(int, node.args[1]))
    if axes[1] is not None:
        rows = axes[1].reshape(groups, -1)
        context.units.tie(np.tile(rows[0], groups), axes[1], "")
        axes[1] = rows.T.ravel()
    return axes


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(node: Node, context: Context) -> Any:
    """Along one dimension rows go where the index says, and it is fixed. Along the others all meet."""
    data, picks, source = (
        argument(node, place, name) for place, name in ((0, "self"), (2, "index"), (3, "src"))
    )
    dim = dim_argument(node, 1, "dim", len(shape(node)))
    parts = [item for item in (data, picks, source) if isinstance(item, Node)]
    others = [place for place in range(len(shape(node))) if place != dim]
    if len({tuple(shape(item)[place] for place in others) for item in parts}) > 1 or into_part(data, context):
        return no_rule(node, context)
    axes = _meet(node, parts, dim, others, context)
    # Of numbers that a ranking gave a mask is made, which has the places of what was ranked and no units of
    # its own: a router's groups of experts, each of which it then repeats for the experts in it.
    if isinstance(picks, Node) and picks in context.points and not isinstance(source, Node):
        axes[dim] = None
    return axes


@rule("index_add", "index_copy", "index_reduce", "index_fill")
def index_rows(node: Node, context: Context) -> Any:
    """Rows of one dimension go where the index says, and it is fixed. Along the others both meet."""
    data, picks, source = node.args[0], node.args[2], node.args[3]
    dim = dim_argument(node, 1, "dim", len(shape(node)))
    freeze_all(context.of(picks), context, f"is an index in {context.where(node)}")
    parts = [cast(Node, data), *([source] if isinstance(source, Node) and shape(source) else [])]
    if into_part(parts[0], context):
        return no_rule(node, context)
    return _meet(node, parts, dim, [place for place in range(len(shape(node))) if place != dim], context)


def _meet(node: Node, parts: list[Node], dim: int, others: list[int], context: Context) -> Any:
    """Tie the parts along all dimensions but one, which is frozen."""
    axes = [context.of(item) for item in parts]
    freeze_all([item[dim] for item in axes], context, f"is picked from by index in {context.where(node)}")
    result = axes[0]
    # An index is most often expanded to the size of the data, and a tensor of that size made for it.
    for place in others:
        for other in axes[1:]:
            fixed = f"meets a tensor of fixed size in {context.where(node)}"
            result[place] = context.units.tie(result[place], other[place], fixed)
    return result


@rule("index_put", "_unsafe_index_put")
def index_put(node: Node, context: Context) -> Any:
    """Values go where indices or a mask say, along the first dimensions, which are fixed; the rest meets."""
    data, indices, values = cast(tuple[Node, list[Node | None], Node], node.args[:3])
    given = [item for item in indices if item is not None]
    masks = [item for item in given if "bool" in str(item.meta["val"].dtype)]
    if indices[: len(given)] != given or (masks and len(given) > 1) or into_part(data, context):
        return no_rule(node, context)
    axes, put = context.of(data), context.of(values)
    first = len(shape(masks[0])) if masks else len(given)
    reason = f"is picked from by index in {context.where(node)}"
    rest = len(axes) - first
    freeze_all([*axes[:first], *put[: max(0, len(put) - rest)]], context, reason)
    freeze_all([context.of(item) for item in given], context, f"is an index in {context.where(node)}")
    for back in range(1, min(rest, len(put)) + 1):
        if shape(values)[-back] != 1:
            fixed = f"meets a tensor of fixed size in {context.where(node)}"
            axes[-back] = context.units.tie(axes[-back], put[-back], fixed)
    return axes


@rule("masked_scatter")
def masked_scatter(node: Node, context: Context) -> Any:
    """Rows of another tensor in place of those that a mask names: the last dimensions meet.

    So vision-language models put what they saw among the words. A mask that differs along the last
    dimension would take single numbers in turn, and there is no rule for that.
    """
    data, mask, source = cast(tuple[Node, Node, Node], node.args[:3])
    axes, rows = context.of(data), context.of(source)
    whole = len(axes) > 1 and bool(rows) and shape(source)[-1] == shape(data)[-1]
    if not whole or not _repeats(mask) or into_part(data, context):
        return no_rule(node, context)
    reason = f"is picked by the mask of {context.where(node)}"
    freeze_all([*axes[:-1], *rows[:-1], *context.of(mask)[:-1]], context, reason)
    fixed = f"meets a tensor of fixed size in {context.where(node)}"
    for other, size in ((rows[-1], 0), (context.of(mask)[-1], shape(mask)[-1])):
        if size != 1:
            axes[-1] = context.units.tie(axes[-1], other, fixed)
    return axes


ALIKE = {"to", "_to_copy", "clone", "contiguous", "alias", "detach", "logical_not", "bitwise_not"}


def _repeats(mask: Node) -> bool:
    """Say whether a mask is one value along its last dimension, as far as the operations before it show."""
    while shape(mask) and shape(mask)[-1] != 1:
        source = mask.args[0] if mask.args else None
        expands = operation_name(mask) in {"expand", "expand_as", "broadcast_to"}
        if not isinstance(source, Node) or not (expands or operation_name(mask) in ALIKE):
            return False
        mask = source
    return True


def picked(node: Node, index: Node, units: Any, context: Context) -> Any:
    """Return the units at numbered positions (n,) in their order, or None where that freezes them.

    Numbers that are written in the code need what stands before them (or behind, if they count from the end)
    to stay. Numbers that the code works out have to fit after a cut, which a trial shows. Those that a buffer
    holds are cut with their units, if they name each of them once, and counted anew.
    """
    if units is None or len(shape(index)) != 1:
        return None
    name, size = context.names.get(index), len(units)
    if name is not None:
        value = context.values.get(index)
        if value is None or not _is_order(value, size) or not _only_picks(index):
            return None
        context.units.tie(context.labels[name][0], units[value.numpy()], "")
        context.picks.add((name, 0))
        return units[value.numpy()]
    found = _numbers(index, context)
    if found is None:
        return None
    value, written = found
    if written:
        reason = f"is picked from at a fixed position by {context.where(node)}"
        context.units.freeze(units[: max([-1, *value.tolist()]) + 1], reason)
        context.units.freeze(units[size + min([0, *value.tolist()]) :], reason)
    else:
        context.units.assume(units, f"{context.where(node)} takes its positions from its input")
    return units[value.numpy()]


def _is_order(value: Tensor, size: int) -> bool:
    """Say whether whole numbers (n,) name each of `size` positions once."""
    order = torch.arange(size, device=value.device, dtype=value.dtype)
    return value.device.type != "meta" and len(value) == size and bool((value.sort().values == order).all())


def _only_picks(index: Node) -> bool:
    """Say whether nothing but a picking by index reads a buffer: its values change with a cut."""
    for user in index.users:
        name = operation_name(user)
        if name in ALIKE:
            if not _only_picks(user):
                return False
        elif name not in {"index", "index_select"} or user.args[0] is index:
            return False
    return True


def _numbers(node: Node, context: Context) -> tuple[Tensor, bool] | None:
    """Return whole numbers that no input and no buffer has a part in, and whether they are written down."""
    if node in context.values and node not in context.names:
        return context.values[node].cpu(), True
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or value.is_floating_point():
        return None
    if value.ndim != 1 or value.numel() > MOST:
        return None
    found = {item: _numbers(item, context) for item in node.all_input_nodes}
    values = {item: pair[0] for item, pair in found.items() if pair is not None}
    if len(values) < len(found) or (not found and operation_name(node) != "arange"):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: values[item])
    kwargs = {name: item for name, item in kwargs.items() if name not in ("device", "layout", "pin_memory")}
    written = bool(found) and all(pair is not None and pair[1] for pair in found.values())
    return cast(Any, node.target)(*args, **kwargs).cpu(), written


MOST = 2**16
"""Numbers that are worked out at most."""


def into_part(target: Any, context: Context) -> bool:
    """Say whether a tensor is a view of numbered units of another, which what is written goes into."""
    view = target
    while operation_name(view) in {"slice", "select"}:
        whole = cast(Node, view.args[0])
        dim = dim_argument(view, 1, "dim", len(shape(whole)))
        if context.axes[whole][dim] is not None and shape(view) != shape(whole):
            return True
        view = whole
    return False
