"""What a layer reads for its weight: a parameter, a view of one, or something computed from several.

A weight goes by the name of one parameter, its main one. The layers that read one parameter are told apart by
the view of it that they read. Both are found in the captured operations, and again by whoever records the
layers while the model runs: the rules here are those of both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

VIEWS = frozenset({
    *("t", "transpose", "permute", "numpy_T", "mT", "swapaxes", "adjoint", "movedim", "moveaxis"),
    *("to", "_to_copy", "detach", "alias", "contiguous", "clone", "view_as", "expand_as", "expand"),
    *("view", "reshape", "_unsafe_view", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("slice", "narrow", "select", "unbind", "chunk", "split", "split_with_sizes", "unsafe_chunk"),
    *("unsafe_split", "tensor_split", "getitem", "cat", "concat", "concatenate", "stack"),
})  # fmt: skip
"""Operations that only move elements: every element of the result is an element of a parameter."""

Layout = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset, sizes and strides of a view."""


def main_tensor(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name the parameter that a weight goes by, of those (in the model's order) that it is computed from.

    It is the first with the most dimensions: the directions of a weight norm, not its lengths. Sizes are no
    part of the choice, for a cut changes them.

    >>> main_tensor({"scale": (8, 1, 1), "weight": (8, 4, 3), "other": (8, 4, 3)})
    'weight'
    """
    return max(shapes, key=lambda name: sum(size > 1 for size in shapes[name]))


def layout(tensor: Any) -> Layout:
    """Return where the elements of a tensor lie in its memory."""
    return int(tensor.storage_offset()), tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))


class ViewNumbers:
    """Numbers the views of each parameter, in the order in which layers read them.

    Offsets and sizes change with a cut, and the order does not. Most are read in one way, which is number 0.
    """

    def __init__(self) -> None:
        self._seen: dict[str, dict[tuple[Layout, tuple[int, ...]], int]] = {}

    def of(self, name: str, read: Any, summed: Sequence[int]) -> int:
        """Return the number of what a layer reads of a parameter.

        Args:
            name: of the parameter.
            read: the tensor that the layer reads.
            summed: its dimensions that the layer sums over; a linear layer sums over the last, a product over
                the first. A layer that sums over none is taken for one that sums over the second.
        """
        seen = self._seen.setdefault(name, {})
        return seen.setdefault((layout(read), tuple(summed) or (1,)), len(seen))
