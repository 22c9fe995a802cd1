"""Rules of mixtures of experts: weights of three dimensions, and how tokens are sent to them.

Legend: E = experts, T = tokens, k = experts that a token goes to. A layer's weights are (E, outputs, inputs)
or (E, inputs, outputs): a unit is neuron i of every expert of the layer, for the tensor stays a rectangle. Or
it is a whole expert with its row of the router, where all that the router makes of its logits can be followed
to the numbers by which the weights are picked. A removed expert is one that is never chosen, as if its logit
were minus infinity: the twin of operations ranks and normalises the others alone.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes
from cria_prune.structure.rules.core import (
    EXPERTS,
    Context,
    argument,
    dim_argument,
    freeze_all,
    operation_name,
    rule,
    shape,
)
from cria_prune.structure.rules.layers import follow_units

STAY = "are whole experts, which stay: what removes one changes where the router sends its tokens"
PASSES = {
    *("getitem", "to", "_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh_copy"),
    *("view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze", "transpose", "permute"),
    *("expand", "slice", "select"),
}
"""Operations that leave numbers what they are; they may move them."""
PICKS = {"routed_mm", "gather"}
"""Operations that take what numbers point to, so that both may be counted anew; their rules tie the two."""


@rule("routed_mm")
def routed_mm(node: Node, context: Context) -> Axes:
    """Every row times the weight of its expert: inputs are summed over, outputs made, experts picked."""
    data, weight, experts = cast(tuple[Node, Node, Node], node.args[:3])
    axes, (along, inputs, outputs) = context.of(data), context.of(weight)
    freeze_all(context.of(experts), context, STAY)
    points = context.points.get(experts)
    if points is None or along is None or len(points) != len(along):
        context.units.freeze(along, STAY)
    else:
        context.units.tie(along, points, STAY)
        context.units.mark(along, EXPERTS)
        # Zeros are no twin: an expert whose row of the router is zero may be chosen.
        context.units.mark(along, "normed")
    context.units.tie(axes[-1], inputs, context.fixed_by(data))
    bias = argument(node, 3, "bias")
    if isinstance(bias, Node):
        context.units.tie(along, context.of(bias)[0], STAY)
        follow_units(context, node, outputs, bias)
    # The network itself runs them by transformers' grouped product, whose kernel wants aligned rows.
    for item in (inputs, outputs):
        context.units.mark(item, "aligned")
    # Each row meets one of the experts, so an element of a weight multiplies for its share of the rows.
    rows = float(np.prod(shape(node)[:-1])) / shape(weight)[0]
    context.use(node, weight, (1, 2), -1, axes[-1], outputs, rows)
    return [*axes[:-1], outputs]


def stacked(node: Node, data: Node, weight: Node, context: Context) -> Axes:
    """(E, T, inputs) times (E, inputs, outputs): each expert's tokens lie behind each other."""
    axes, (along, inputs, outputs) = context.of(data), context.of(weight)
    freeze_all([along, axes[0]], context, STAY)
    context.units.tie(axes[-1], inputs, context.fixed_by(data))
    context.use(node, weight, (1, 2), -1, axes[-1], outputs, float(shape(node)[1]))
    return [None, axes[1], outputs]


@rule("view_as_complex", "view_as_real")
def complex_pairs(node: Node, context: Context) -> Axes:
    """Two numbers become one or one becomes two, in the last dimension; the others pass."""
    axes = context.of(node.args[0])
    if shape(node) and len(shape(node)) > len(axes):
        return [*axes, None]
    context.units.fix(axes[-1], f"are the parts of a complex number in {context.where(node)}")
    return axes[:-1]


@rule("topk")
def ranked(node: Node, context: Context) -> Any:
    """The dimension that is ranked is fixed, unless experts are; the others pass, of values and places."""
    data = cast(Node, node.args[0])
    axes, count = context.of(data), int(argument(node, 1, "k"))
    dim = dim_argument(node, 2, "dim", len(axes), -1)
    best = bool(argument(node, 3, "largest", True)) and data.meta["val"].is_floating_point()
    context.units.freeze(axes[dim], f"is ranked by {context.where(node)}", EXPERTS if best else "")
    units = axes[dim]
    if units is not None and best:
        context.points[node] = units
        context.ranked.append((units, count))
    axes[dim] = None
    return [list(axes) for _ in node.meta["val"]]


def follow_points(node: Node, context: Context) -> None:
    """Note which numbers still point to units after an operation; other uses of such numbers freeze these.

    What counts or compares numbers of experts, or looks them up, would be wrong once some have left.
    """
    name = operation_name(node)
    for item in node.all_input_nodes:
        units = context.points.get(item)
        if units is None:
            continue
        if isinstance(item.meta.get("val"), (tuple, list)):  # of a ranking, the places are the second output
            if name != "getitem":
                context.units.freeze(units, f"is numbered in {context.where(node)}")
            elif node.args[1] == 1:
                context.points[node] = units
        elif name in PASSES and node.args[0] is item:
            context.points[node] = units
        elif name not in PICKS or item in (node.args[0], argument(node, 3, "bias")):
            context.units.freeze(units, f"is numbered in {context.where(node)}, which reads the numbers")
