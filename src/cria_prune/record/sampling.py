"""Which positions of an activation are looked at, and how it becomes samples.

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
