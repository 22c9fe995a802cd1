"""Rules of products: matmul, bmm, einsum, and scaled-dot-product attention."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes, Dim
from cria_prune.structure.rules.computed import product_of_parameters
from cria_prune.structure.rules.core import (
    Context,
    Signal,
    argument,
    broadcast,
    no_rule,
    rule,
    shape,
    tensor_arguments,
)
from cria_prune.structure.rules.experts import stacked
from cria_prune.structure.rules.layers import follow_units


@rule("matmul", "mm", "bmm", "mv")
def matmul(node: Node, context: Context) -> Any:
    """A weight is used as in a linear; two activations: the summed dimension is fixed, batches meet."""
    left, right = cast(tuple[Node, Node], node.args[:2])
    return product(node, left, right, context)


@rule("addmm")
def addmm(node: Node, context: Context) -> Any:
    """y = b + x W, as in GPT-2's Conv1D."""
    bias, data, weight = cast(tuple[Node, Node, Node], node.args[:3])
    if weight in context.data:
        return no_rule(node, context)
    result = product(node, data, weight, context)
    follow_units(context, node, result[-1], bias)
    return result


@rule("baddbmm")
def baddbmm(node: Node, context: Context) -> Any:
    """A product with something added."""
    added, left, right = cast(tuple[Node, Node, Node], node.args[:3])
    result = product(node, left, right, context)
    items = [(result, shape(node)), (context.of(added), shape(added))]
    return broadcast(items, len(shape(node)), node, context)


def product(node: Node, left: Node, right: Node, context: Context) -> Any:
    """Return the axes of left @ right."""
    first, second = context.of(left), context.of(right)
    apart = left not in context.data and right not in context.data
    if apart and len(first) == len(second) == 2:
        return product_of_parameters(node, left, right, context)
    if len(shape(right)) == 1:
        add_up(node, first[-1], second[0], context)
        return first[:-1]
    if len(shape(left)) == 1:
        add_up(node, second[-2], first[0], context)
        return [*second[:-2], second[-1]]
    if apart:
        return product_of_parameters(node, left, right, context)
    if right not in context.data and len(second) == 2 and context.is_weight(right):
        context.units.tie(first[-1], second[0], context.fixed_by(left))
        context.use(node, right, (0, 1), -1, first[-1], second[1], float(np.prod(shape(node)[:-1])))
        return [*first[:-1], second[1]]
    if left not in context.data and len(first) == 2 and context.is_weight(left):
        context.units.tie(first[1], second[-2], context.fixed_by(right))
        sizes = shape(node)
        times = float(np.prod(sizes)) / sizes[-2]
        context.use(node, left, (1, 0), len(sizes) - 2, second[-2], first[0], times)
        return [*second[:-2], first[0], second[-1]]
    if len(first) == len(second) == 3 and left in context.data and context.is_weight(right):
        return stacked(node, left, right, context)
    # Two activations: their sum has no weight to cut. The dimension is fixed weakly,
    # for it is the size of a head, and the heads beside it in the grid are free.
    reason = f"is summed over by {context.where(node)}"
    fix_sum(context, [first[-1], second[-2]], reason)
    batch = meet_batches(node, context, (first[:-2], shape(left)[:-2]), (second[:-2], shape(right)[:-2]))
    return [*batch, first[-2], second[-1]]


def add_up(node: Node, units: Dim, other: Dim, context: Context) -> None:
    """Tie the units of a sum of products with a vector, such as the query of attention pooling."""
    together = context.units.tie(units, other, f"meets a tensor of fixed size in {context.where(node)}")
    if context.units.made_by("factor", units):
        context.units.fix(together, f"is summed over by {context.where(node)}")
    else:
        context.units.mark(together, "normed")  # the twin of weights knows no such consumer


def fix_sum(context: Context, dims: list[Dim], reason: str) -> None:
    """Fix dimensions that two activations are summed over: part of a unit, or none at all."""
    for dim in dims:
        context.units.fix(dim, reason)


def meet_batches(node: Node, context: Context, *items: tuple[Axes, list[int]]) -> Axes:
    """Tie batch dimensions; where two activations have units along them, the units are heads."""
    batch = broadcast(list(items), max(len(sizes) for _, sizes in items), node, context)
    for back in range(1, len(batch) + 1):
        along = [axes[-back] for axes, sizes in items if back <= len(sizes)]
        # Where both sides of a product have units along a batch dimension,
        # each meets its own: queries and keys of a head. Fewer different units
        # on one side are KV heads that were repeated for several query heads.
        held = [item for item in along if item is not None]
        if len(held) > 1:
            context.units.mark(held[0], "head")
            if len({len(np.unique(item)) for item in held}) > 1:
                context.units.mark(held[0], "grouped")
    return batch


@rule("scaled_dot_product_attention")
def attention(node: Node, context: Context) -> Axes:
    """Queries, keys and values meet along the heads; with grouped KV a KV head meets its query heads."""
    query, key, value = cast(tuple[Node, Node, Node], node.args[:3])
    q, k, v = (context.of(item) for item in (query, key, value))
    sizes = [shape(item) for item in (query, key, value)]
    if argument(node, 7, "enable_gqa", False):
        for axes, size in ((k, sizes[1]), (v, sizes[2])):
            # The kernel repeats KV heads inside. Written out,
            # each of them meets the query heads that read it.
            repeats = sizes[0][-3] // size[-3]
            axes[-3] = None if axes[-3] is None else np.repeat(axes[-3], repeats)
            size[-3] *= repeats
    fix_sum(context, [q[-1], k[-1]], f"is summed over by {context.where(node)}")
    fix_sum(context, [q[-2], k[-2], v[-2]], f"is a sequence in {context.where(node)}")
    batch = meet_batches(
        node, context, *((axes[:-2], size[:-2]) for axes, size in zip((q, k, v), sizes, strict=True))
    )
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        # A mask may have a dimension of heads, as a position bias has, and is then cut with them.
        scores = ([*batch, None, None], [*shape(node)[:-1], sizes[1][-2]])
        batch = broadcast([scores, (context.of(mask), shape(mask))], len(batch) + 2, node, context)[:-2]
    return [*batch, None, v[-1]]


@rule("einsum")
def einsum(node: Node, context: Context) -> Any:
    """Letters that meet are tied; a summed letter is a weight's input, or fixed."""
    equation = str(node.args[0]).replace(" ", "")
    items = tensor_arguments(node)
    if "." in equation or "->" not in equation or len(cast(list[Any], node.args[1])) != len(items):
        return no_rule(node, context)
    terms, result = equation.split("->")[0].split(","), equation.split("->")[1]
    met: dict[str, Dim] = {}
    for letter in dict.fromkeys("".join(terms)):
        held = [
            context.axes[item][place]
            for item, term in zip(items, terms, strict=True)
            for place, other in enumerate(term)
            if other == letter and shape(item)[place] != 1
        ]
        met[letter] = held[0] if held else None
        for other in held[1:]:
            reason = f"meets a tensor of fixed size in {context.where(node)}"
            met[letter] = context.units.tie(met[letter], other, reason)
    if not _einsum_weight(node, items, terms, result, met, context):
        for letter, dim in met.items():
            vector = any(term == letter for term in terms)
            if letter not in result and vector and not context.units.made_by("factor", dim):
                context.units.mark(dim, "normed")
            elif letter not in result:
                context.units.fix(dim, f"is summed over by {context.where(node)}")
            elif (
                sum(letter in term for term, item in zip(terms, items, strict=True) if item in context.data)
                > 1
            ):
                context.units.mark(dim, "head")
    return [met[letter] for letter in result]


def _einsum_weight(
    node: Node, items: list[Node], terms: list[str], result: str, met: dict[str, Dim], context: Context
) -> bool:
    """Note the use of a weight: an activation times parameters, some letters summed and some made."""
    # A letter twice in one term is a diagonal.
    if len(items) != 2 or any(len(set(term)) != len(term) for term in terms):
        return False
    place = next((index for index in (0, 1) if items[index] not in context.data), None)
    if place is None or items[1 - place] not in context.data or not context.is_weight(items[place]):
        return False
    weight, data = terms[place], terms[1 - place]
    summed = [letter for letter in weight if letter in data and letter not in result]
    made = [letter for letter in weight if letter not in data and letter in result]
    # A letter of one term alone is summed before the other is looked at, and is no weight's input.
    if not summed or not made or any(item not in result + "".join(summed) for item in weight + data):
        return False
    sizes = dict(zip(data, shape(items[1 - place]), strict=True))
    times = float(np.prod([size for letter, size in sizes.items() if letter not in weight]))
    entering, leaving = (
        [Signal(term.index(letter), atoms) for letter in letters if (atoms := met[letter]) is not None]
        for letters, term in ((summed, data), (made, result))
    )
    dims = [weight.index(letter) for letter in summed], [weight.index(letter) for letter in made]
    context.use_along(node, items[place], dims, entering, leaving, times)
    return True
