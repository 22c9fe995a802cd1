"""Which axes of a network's inputs may have any size: the batch, and the length where the network lets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cria_prune.base.batches import Batch, batch_size
from cria_prune.base.errors import DataError
from cria_prune.base.inputs import like_a_mask
from cria_prune.deploy.session import Flat, tensors_of, tried

BATCH, LENGTH = "batch", "length"
Axes = tuple[dict[int, str], ...]
"""For each input: axis -> its name; axes of one name have one size. Others are fixed."""
DECODER = "decoder_"
LONGER = 3


def batch_axes(network: Flat, example: Batch) -> Axes:
    """Return the axes that count examples: the first ones, as long as that of the first tensor.

    Raises:
        DataError: the network does not run on another number of examples.
    """
    tensors, asked = tensors_of(example), f"A batch of any size for {type(network.network).__name__}"
    todo = (
        "Give an example whose first dimension counts examples, and a network that takes any number of them"
    )
    if not tensors[0].ndim:
        raise DataError(asked, f"its first input, {network.names[0]!r}, has no dimension", todo)
    count = batch_size(example)
    axes = tuple({0: BATCH} if item.ndim and len(item) == count else {} for item in tensors)
    for size in (2, 3):
        if problem := tried(network, resized(tensors, axes, {BATCH: size})):
            raise DataError(asked, f"on {size} examples in place of {count} it stops with {problem}", todo)
    return axes


def with_lengths(network: Flat, tensors: Sequence[Tensor], axes: Axes) -> Iterator[tuple[Axes, int]]:
    """Yield the axes with those of the length too, and by how much it may differ, where the network runs so.

    Tokens and masks (N, T), waves (N, T), sequences (N, T, C) and signals (N, C, T) are tried, in this order.
    The inputs of a decoder have a length of their own.
    """
    whole = [2 if not item.is_floating_point() and item.ndim == 2 else 0 for item in tensors]
    floating = [item.is_floating_point() for item in tensors]
    tries = [
        [1 if rank or (is_float and item.ndim in (2, 3)) else None
         for item, rank, is_float in zip(tensors, whole, floating, strict=True)],
        [1 if rank else None for rank in whole],
        [2 if item.ndim == 3 else None for item in tensors],
    ]  # fmt: skip
    seen = list[Axes]()
    for places in tries:
        made = tuple(
            {**known, place: f"{DECODER}{LENGTH}" if name.startswith(DECODER) else LENGTH}
            if place is not None and known else known
            for known, place, name in zip(axes, places, network.names, strict=True)
        )  # fmt: skip
        if made in seen or made == axes:
            continue
        seen.append(made)
        for by in (LONGER, -2):
            sizes = {name: max(1, size + by) for name, size in sizes_of(tensors, made).items()}
            if not tried(network, resized(tensors, made, {**sizes, BATCH: 2})):
                yield made, by
                break


def sizes_of(tensors: Sequence[Tensor], axes: Axes) -> dict[str, int]:
    """Return the size of every named axis."""
    named = zip(tensors, axes, strict=True)
    return {name: item.shape[axis] for item, known in named for axis, name in known.items()}


def resized(tensors: Sequence[Tensor], axes: Axes, sizes: Mapping[str, int]) -> list[Tensor]:
    """Return tensors of other sizes, filled up with themselves again; an axis without a size stays."""
    found = list[Tensor]()
    for item, known in zip(tensors, axes, strict=True):
        for axis, name in known.items():
            if name in sizes:
                index = torch.arange(sizes[name], device=item.device) % item.shape[axis]
                item = item.index_select(axis, index)
        found.append(item)
    return found


def padded(names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in which the masks of the first example hide its last positions, as padding does."""
    found = list[Tensor]()
    for name, item in zip(names, tensors, strict=True):
        if name.endswith("mask") and item.ndim == 2 and item.shape[1] > 2 and like_a_mask(item):
            item = item.clone()
            item[0, -2:] = 0
        found.append(item)
    return found
