"""Which added branches skip: a sum is a residual stream where one branch goes around a layer of the other.

Legend: uses of weights are numbered as in `Context.uses`, and a set of them is a whole number with one bit
for each. `sources` of a node are the layers whose outputs it holds, with no other layer between; `upstream`
are all the uses that it depends on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cria_prune.structure.rules.core import Addition, Context


def skipped(context: Context, classes: np.ndarray) -> set[int]:
    """Return the units of every sum of which one branch skips a layer of another.

    Of two branches that are added the first skips if a layer of the second depends, through a layer that
    sums over these very units, on what the first holds. Branches that start apart (a 3x3 beside a 1x1
    convolution, the two paths of LoRA) are added too, and there nothing skips.

    Args:
        context: after all rules.
        classes: (atoms,) the unit of each atom.
    """
    found: set[int] = set()
    for addition in context.additions:
        units = set(np.unique(classes[addition.atoms]).tolist())
        if not units <= found and _skips(addition, units, context, classes):
            found |= units
    return found


def _skips(addition: Addition, units: set[int], context: Context, classes: np.ndarray) -> bool:
    uses, upstream = context.uses, context.upstream
    for around in addition.branches:
        held = {uses[number].weight for number in numbers(around)}
        for through in addition.branches:
            for last in numbers(through & ~around):
                # The cell of an LSTM adds what it remembers to what its gates let in. Both come from
                # the same weights at different times, which is recurrence and no skip.
                if uses[last].weight in held or not upstream[uses[last].node] & around:
                    continue
                if any(
                    upstream[uses[number].node] & around and _reads(number, units, context, classes)
                    for number in numbers(upstream[uses[last].node])
                ):
                    return True
    return False


def _reads(number: int, units: set[int], context: Context, classes: np.ndarray) -> bool:
    """Say whether a use sums over any of these units."""
    use = context.uses[number]
    return bool(use.consumed) and any(
        not units.isdisjoint(np.unique(classes[signal.atoms]).tolist()) for signal in use.entering
    )


def numbers(bits: int) -> Iterator[int]:
    """Yield the places of the bits that are set.

    >>> list(numbers(0b1101))
    [0, 2, 3]
    """
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
