"""Rules of mixtures of experts: weights of three dimensions, and how tokens are sent to them.

Legend: E = experts, T = tokens, k = experts that a token goes to. A layer's weights are (E, outputs, inputs)
or (E, inputs, outputs): a unit is neuron i of every expert of the layer, for the tensor stays a rectangle.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes
from cria_prune.structure.rules.core import (
    Context,
    argument,
    dim_argument,
    freeze_all,
    rule,
    shape,
)
from cria_prune.structure.rules.layers import follow_units

EXPERTS = "are whole experts, which stay: what removes one changes where the router sends its tokens"


@rule("routed_mm")
def routed_mm(node: Node, context: Context) -> Axes:
    """Every row times the weight of its expert: inputs are summed over, outputs made, experts stay."""
    data, weight, experts = cast(tuple[Node, Node, Node], node.args[:3])
    axes, (along, inputs, outputs) = context.of(data), context.of(weight)
    freeze_all([along, *context.of(experts)], context, EXPERTS)
    context.units.tie(axes[-1], inputs, context.fixed_by(data))
    bias = argument(node, 3, "bias")
    if isinstance(bias, Node):
        freeze_all(context.of(bias)[:1], context, EXPERTS)
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
    freeze_all([along, axes[0]], context, EXPERTS)
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
    """The dimension that is ranked is fixed; the others pass, of the values and of their places."""
    axes = context.of(node.args[0])
    dim = dim_argument(node, 2, "dim", len(axes), -1)
    context.units.freeze(axes[dim], f"is ranked by {context.where(node)}")
    axes[dim] = None
    return [list(axes) for _ in node.meta["val"]]
