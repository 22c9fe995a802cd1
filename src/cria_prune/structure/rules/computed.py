"""Rules of operations that make a weight of parameters: weight norms, and products of parameters.

A cut changes what such a weight is for the units that stay (a norm over fewer of them). So the units are
marked: masked and pruned are compared by the twin of operations, see `surgery/verify.py`.
"""

from __future__ import annotations

from typing import Any, cast

from torch.fx import Node

from cria_prune.structure.axes import Axes
from cria_prune.structure.rules.core import Context, argument, broadcast, no_rule, operation_name, rule, shape

FIXED = "meets a tensor of fixed size in"


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(node: Node, context: Context) -> Any:
    """Directions of norm one along all dimensions but one, times lengths: as the directions are."""
    directions, lengths = cast(tuple[Node, Node], node.args[:2])
    kept = int(argument(node, 2, "dim", 0))
    axes = context.of(directions)
    for dim, (atoms, other) in enumerate(zip(axes, context.of(lengths), strict=True)):
        if dim != kept % len(axes):
            context.units.mark(atoms, "normed")
        elif shape(lengths)[dim] != 1:
            context.units.tie(atoms, other, f"{FIXED} {context.where(node)}")
    if operation_name(node) == "_weight_norm":
        return axes
    return [axes, context.of(lengths)]


@rule("mv", "dot", "vdot", "inner")
def sum_of_products(node: Node, context: Context) -> Any:
    """A matrix or vector times a vector, as in a spectral norm: what is summed is tied."""
    left, right = cast(tuple[Node, Node], node.args[:2])
    if node in context.data or len(shape(left)) > 2 or len(shape(right)) != 1:
        return no_rule(node, context)
    axes = context.of(left)
    summed = context.units.tie(axes[-1], context.of(right)[0], f"{FIXED} {context.where(node)}")
    # A unit that is zero adds nothing to the sum, and what the sum is used for may be all other units.
    context.units.mark(summed, "normed")
    return axes[:-1]


def product_of_parameters(node: Node, left: Node, right: Node, context: Context) -> Axes:
    """Return the axes of a product of two weights, as of the two factors of a low-rank update."""
    first, second = context.of(left), context.of(right)
    summed = context.units.tie(first[-1], second[-2], f"{FIXED} {context.where(node)}")
    context.units.fix(summed, f"is summed over inside a weight by {context.where(node)}")
    items = [(axes[:-2], shape(item)[:-2]) for axes, item in ((first, left), (second, right))]
    batch = broadcast(items, len(shape(node)) - 2, node, context)
    return [*batch, first[-2], second[-1]]
