"""Which positions and tokens are looked at, what numbers their samples, and how they become signals.

Legend: B = examples, C = n = features along a tap's dimension, P = positions per example, S = samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPAN = 2**36  # numbers of one stream, about
STREAMS = 2**27
ONE_IN = 8  # tokens of a long text: neighbours say much the same

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def _mix(state: np.ndarray) -> np.ndarray:
    """Scramble uint64 (SplitMix64; Steele, Lea and Flood 2014): a generator that can start anywhere."""
    state = state + _STEP
    for shift, factor in _MIX:
        state = (state ^ (state >> shift)) * factor
    return state ^ (state >> np.uint64(31))


def draw_positions(seed: int, first: int, examples: int, shape: Sequence[int], count: int) -> np.ndarray:
    """Draw distinct spatial positions, the same for an example however the examples are batched.

    The flattened positions are cut into `count` pieces of equal length (up to one), and one is drawn
    from each. The draw depends only on the seed, the example's index and the spatial shape, so an
    input side and an output side of equal shape are read at the same places.

    Args:
        seed: the recording's seed.
        first: index of the first example in the whole stream.
        examples: B.
        shape: the spatial shape, (H, W) for an image.
        count: positions per example; all of them are returned where there are no more.

    Returns:
        (B, min(count, H·W)) int64, flat positions in ascending order.

    >>> draw_positions(0, first=0, examples=3, shape=(2, 2), count=8)[0].tolist()
    [0, 1, 2, 3]
    >>> both = draw_positions(0, first=0, examples=3, shape=(8, 8), count=4)
    >>> bool((draw_positions(0, first=2, examples=1, shape=(8, 8), count=4) == both[2]).all())
    True
    """
    total = int(np.prod(shape))
    if total <= count:
        return np.tile(np.arange(total), (examples, 1))
    key = np.array([seed % 2**64], dtype=np.uint64)
    for length in shape:
        key = _mix(key ^ np.uint64(length))
    rows = _mix(key + np.arange(first, first + examples, dtype=np.uint64))[:, None]
    noise = _mix(rows + np.arange(count, dtype=np.uint64))
    bounds = np.arange(count + 1) * total // count
    return bounds[:-1] + (noise % np.diff(bounds).astype(np.uint64)).astype(np.int64)


def draw_tokens(seed: int, first: int, mask: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw distinct tokens of each example, the same for an example however it is batched and padded.

    The tokens of an example are cut into pieces of equal length, `tokens_drawn` of them, and one is drawn
    from each.

    Args:
        seed: the recording's seed.
        first: index of the first example in the whole stream.
        mask: (B, T) bool, the tokens that count; T are padded.
        least: tokens per example, at least; all where there are no more.

    Returns:
        Places (B, P) int64 among T, P = tokens_drawn(T, least), and (B, P) bool, which are to be taken.

    >>> mask = np.array([[True] * 6, [True, True, False, False, False, False]])
    >>> places, taken = draw_tokens(0, first=0, mask=mask, least=3)
    >>> taken.sum(axis=1).tolist(), places[1][taken[1]].tolist()
    ([3, 2], [0, 1])
    """
    lengths = mask.sum(axis=1, keepdims=True)
    pieces = np.array([[max(1, tokens_drawn(int(length), least))] for length in lengths[:, 0]])
    place = np.arange(tokens_drawn(mask.shape[1], least) + 1)
    examples = np.arange(first, first + len(mask), dtype=np.uint64)
    rows = _mix(_mix(np.array([seed % 2**64], np.uint64)) + examples)
    noise = _mix(rows[:, None] + place[:-1].astype(np.uint64))
    bounds = np.minimum(place, pieces) * lengths // pieces
    widths = np.diff(bounds)
    ranks = bounds[:, :-1] + (noise % np.maximum(widths, 1).astype(np.uint64)).astype(np.int64)
    order = np.argsort(~mask, axis=1, kind="stable")  # the tokens that count come first
    return np.take_along_axis(order, np.minimum(ranks, mask.shape[1] - 1), axis=1), widths > 0


def tokens_drawn(tokens: int, least: int | None) -> int:
    """Return how many of an example's tokens are drawn: one in eight, `least` at least; all if None.

    >>> tokens_drawn(10, 16), tokens_drawn(100, 16), tokens_drawn(2048, 16), tokens_drawn(100, None)
    (10, 16, 256, 100)
    """
    return tokens if least is None else min(tokens, max(least, tokens // ONE_IN))


def gather_positions(activation: Tensor, positions: Tensor) -> Tensor:
    """Pick spatial positions: activation (B, C, ...) and positions (B, P) to (B, P, C), a copy."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    return activation.flatten(2)[rows, :, positions]


def unit_signals(samples: Tensor, units: int) -> Tensor:
    """Turn samples (S, units·width) into signals (units, width·S); the features of a unit are in a row."""
    return samples.reshape(len(samples), units, -1).permute(1, 2, 0).reshape(units, -1)


class Origin(NamedTuple):
    """Where the samples (S,) of an activation come from.

    Attributes:
        example: (S,) int64, each one's example in the whole stream.
        place: (S,) int64, its place (position, token) in its example.
        places: places per example.
        alone: 0, or else what sets these examples apart from others of the same index.
    """

    example: Tensor
    place: Tensor
    places: int
    alone: int = 0

    def numbers(self, width: int, halves: int, taps: int, call: int, columns: int) -> Tensor:
        """Return the numbers of the unit signals that these samples become, for a sketch.

        They depend on nothing but the example, the place in it and the call, so on no other batch. Examples
        of one length and as many calls as taps are numbered without a gap, and their sketch is exact up to
        its columns; another length or further calls begin another stream of numbers, for two samples of one
        number would share bucket and sign.

        Args:
            width: features per unit.
            halves: 2 where this is every second example alone, else 1.
            taps: calls of one batch that are expected.
            call: calls of this batch before this one.
            columns: of the sketch.

        Returns:
            (width·S,) int64, in the order of `unit_signals`.
        """
        each = self.places * width
        first = ((self.example // halves * taps + call % taps) * self.places + self.place) * width
        stream = hash((each, call // taps, self.alone)) % STREAMS
        inside = (torch.arange(width)[:, None] + first).reshape(-1) % (SPAN // columns * columns)
        return stream * (SPAN // columns * columns) + inside
