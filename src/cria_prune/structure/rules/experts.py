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
from cria_prune.structure.rules.layers import MODEL_INPUT

EXPERTS = "are whole experts, which stay: what removes one changes where the router sends its tokens"


@rule("routed_mm")
def routed_mm(node: Node, context: Context) -> Axes:
    """Every row times the weight of its expert: inputs are summed over, outputs made, experts stay."""
    data, weight, experts = cast(tuple[Node, Node, Node], node.args)
    axes, (along, inputs, outputs) = context.of(data), context.of(weight)
    freeze_all([along, *context.of(experts)], context, EXPERTS)
    context.units.tie(axes[-1], inputs, MODEL_INPUT)
    # Each row meets one of the experts, so an element of a weight multiplies for its share of the rows.
    rows = float(np.prod(shape(node)[:-1])) / shape(weight)[0]
    context.use(node, weight, (1, 2), -1, axes[-1], outputs, rows)
    return [*axes[:-1], outputs]


@rule("topk", "kthvalue", "sort", "argsort", "msort")
def ranked(node: Node, context: Context) -> Any:
    """The dimension that is ranked is fixed; the others pass."""
    axes = context.of(node.args[0])
    if axes:
        place = 1 if node.target is not None and "topk" not in str(node.target) else 2
        dim = dim_argument(node, place, "dim", len(axes), -1)
        context.units.freeze(axes[dim], f"is ranked by {context.where(node)}")
        axes[dim] = None
    value = node.meta["val"]
    return [list(axes) for _ in value] if isinstance(value, (tuple, list)) else axes
