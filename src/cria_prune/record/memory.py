"""The bytes that recording takes, in closed form: what each group keeps, and what each batch asks for.

Legend: d = units, m = signals of one half of a batch, n = features, r = sketch columns, p = samples
at a time. Counted in the terms of `graph/accumulator.py`, `graph/moments.py` and `record/signals.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cria_prune.config import RecordConfig
from cria_prune.record.buffer import BUFFERED
from cria_prune.record.features import PIECE
from cria_prune.record.states import EVERYTHING, Read, reads_for
from cria_prune.structure.groups import Tap, UnitGroup

DOUBLE, SINGLE = 8, 4
DEALT = 4096  # samples that a sketch takes in at a time


@dataclass(frozen=True)
class GroupMemory:
    """What one group keeps, in bytes.

    Attributes:
        name: of the group.
        units: d.
        sketched: a sketch stands in for the covariance of its units.
        collected: both halves of the sides that are read, while batches come.
        collected_consumed: the features that its consumers read, while batches come.
        states: moments of both halves and of all examples, of the same sides, once the batches are through.
        consumed: moments of the features that its consumers read, for the repair.
        buffered: signals that are held back.
        closing: what turning one into the other takes for a moment.
    """

    name: str
    units: int
    sketched: bool
    collected: int
    collected_consumed: int
    states: int
    consumed: int
    buffered: int
    closing: int

    @property
    def while_recording(self) -> int:
        """All that it keeps while batches come."""
        return self.collected + self.collected_consumed + self.buffered

    @property
    def afterwards(self) -> int:
        """All that it keeps once the batches are through."""
        return self.states + self.consumed


def accumulator_bytes(units: int, config: RecordConfig, positive: bool = False, pairs: bool = True) -> int:
    """Return what a `MomentAccumulator` of d units holds: mean, squares, shift; Gram matrix or buckets."""
    lines = (4 if positive else 3) * DOUBLE * units
    if not pairs:
        return lines
    if units <= config.exact_units:
        return lines + DOUBLE * units**2
    return lines + config.sketch_columns * (SINGLE * units + DOUBLE)


def moments_bytes(units: int, config: RecordConfig, positive: bool = False, pairs: bool = True) -> int:
    """Return what `Moments` of d units hold: mean, variance; covariance or sketch."""
    lines = (3 if positive else 2) * DOUBLE * units
    if not pairs:
        return lines
    if units <= config.exact_units:
        return lines + DOUBLE * units**2
    return lines + SINGLE * units * config.sketch_columns


def consumed_features(group: UnitGroup, reads: frozenset[Read] = EVERYTHING) -> tuple[int, ...]:
    """Return the features of every tap whose second moments are kept apart for the repair.

    None where a normalisation takes its statistics over the units, and none where the only consumer reads
    the units themselves, whose moments are there already.
    """
    wide = any(tap.positions.shape[1] > 1 for tap in group.outputs)
    if group.normed or ("output" in reads and not wide and len(group.outputs) == 1):
        return ()
    return tuple({tap.tensor: int(tap.positions.size) for tap in group.outputs}.values())


def group_bytes(
    group: UnitGroup,
    config: RecordConfig,
    consumed: bool,
    held: int,
    reads: frozenset[Read] = EVERYTHING,
) -> GroupMemory:
    """Return what a group keeps.

    Args:
        group: d units.
        config: `exact_units` and `sketch_columns`.
        consumed: the second moments of what its consumers read are kept.
        held: numbers that each of its buffers comes to hold.
        reads: as in `record`.
    """
    d, read = group.size, consumed_features(group, reads) if consumed else ()
    after = ("positive" in reads, "output" in reads)
    sides = ((False, True), after) if "input" in reads else (after,)  # (positive, pairs) of each
    widths = (*([d] if any(pairs for _, pairs in sides) else []), *read)
    # Two lines of zeros are as good as nothing; feature sums are two lines per half and once for all.
    features = 2 * DOUBLE * sum(tap.positions.size for tap in group.outputs if tap.positions.shape[1] > 1)
    return GroupMemory(
        name=group.name,
        units=d,
        sketched=d > config.exact_units and any(pairs for _, pairs in sides),
        collected=2 * sum(accumulator_bytes(d, config, *side) for side in sides) + 2 * features,
        collected_consumed=sum(accumulator_bytes(n, config) for n in read),
        states=3 * sum(moments_bytes(d, config, *side) for side in sides) + 3 * features,
        consumed=sum(moments_bytes(n, config) for n in read),
        buffered=SINGLE * held * (2 * len(sides) + len(read)),
        closing=max((_closing(width, config) for width in widths), default=0),
    )


def _closing(units: int, config: RecordConfig) -> int:
    """Both halves as one beside the result, or the check of the result: of a sketch, five of its size."""
    if units <= config.exact_units:
        return (DOUBLE + 2) * units**2
    return 4 * SINGLE * units * config.sketch_columns


def closing_peak(groups: Iterable[GroupMemory]) -> dict[str, int]:
    """Return what is held at most while accumulators become moments, one group after the other, by part."""
    groups = list(groups)
    moments = sum(group.collected + group.buffered for group in groups)
    consumed = sum(group.collected_consumed for group in groups)
    most = {"moments": moments, "for the repair": consumed, "closing": 0}
    for group in groups:
        moments, consumed = moments + group.states, consumed + group.consumed
        now = {"moments": moments, "for the repair": consumed, "closing": group.closing}
        most = max(most, now, key=lambda parts: sum(parts.values()))
        moments -= group.collected + group.buffered
        consumed -= group.collected_consumed
    return most


@dataclass(frozen=True)
class Reading:
    """One call of a layer that is read, of a whole batch.

    Attributes:
        samples: of the batch, as they lie in the activation.
        taken: samples that are taken, less than `samples` where positions are drawn.
        features: n of the activation.
        itemsize: bytes of one of its numbers.
        strided: the samples of one half lie apart, and are copied.
    """

    samples: int
    taken: int
    features: int
    itemsize: int
    strided: bool


class Tapped(NamedTuple):
    """A tap of a group, and whether second moments are kept of what it reads."""

    group: UnitGroup
    tap: Tap
    pairs: bool


def reading_bytes(
    reading: Reading, taps: Iterable[Tapped], config: RecordConfig, consumed: bool = True
) -> int:
    """Return the most that taking in one activation asks for beyond what is kept.

    Args:
        reading: the call.
        taps: the groups that read it, and where.
        config: `exact_units` and `sketch_columns`.
        consumed: the second moments of what consumers read are kept.
    """
    half = -(-reading.taken // 2)
    item = reading.itemsize if reading.itemsize >= SINGLE else SINGLE
    shared = 0
    if reading.taken < reading.samples or item != reading.itemsize:  # drawn positions, or half precision
        shared += reading.taken * reading.features * item
    if reading.strided:
        shared += half * reading.features * item
    return shared + max(
        (_adding(half, reading.features, item, tapped, config, consumed) for tapped in taps), default=0
    )


def _adding(half: int, features: int, item: int, tapped: Tapped, config: RecordConfig, consumed: bool) -> int:
    """Return what one tap adds: a copy of its features, and the most that one of its totals asks for."""
    units, width = tapped.tap.positions.shape
    copied = half * units * width * item if units * width < features else 0
    turned = half * units * width * item if width > 1 else 0
    most = turned + _accumulating(half * width, units, config, tapped.pairs)
    if width > 1:
        most = max(most, 3 * DOUBLE * min(PIECE, half * units * width))
    if consumed and (width > 1 or not tapped.pairs):
        most = max(most, _accumulating(half, units * width, config))
    return copied + most


def _accumulating(m: int, d: int, config: RecordConfig, pairs: bool = True) -> int:
    """Return what `MomentAccumulator.add` of m signals asks for; small ones come in buffers."""
    columns = max(1, BUFFERED // d)
    m = max(m, columns // 2) if is_buffered(m, d) else m
    if pairs and d <= config.exact_units:
        return DOUBLE * m * d
    if not pairs:
        return max(DOUBLE * m * d, 3 * DOUBLE * min(m, DEALT) * d)
    p, dealt = min(m, DEALT), min(m, config.sketch_columns)
    return max(DOUBLE * m * d, 3 * DOUBLE * p * d, (DOUBLE + SINGLE) * p * d + 2 * SINGLE * dealt * d)


def is_buffered(m: int, d: int) -> bool:
    """Say whether m signals of d units are held back in a `Buffer`."""
    return 2 * m <= max(1, BUFFERED // d)


def held_back(m: int, d: int, batches: int) -> int:
    """Return the numbers that a `Buffer` comes to hold of so many batches of m signals of d units."""
    return min(BUFFERED, m * d * batches) if is_buffered(m, d) else 0


def taps_of(
    groups: Iterable[UnitGroup], reads: frozenset[Read] = EVERYTHING, graphs: Collection[str] = ()
) -> Iterator[Tapped]:
    """Yield every tap that is read, with its group; `reads` and `graphs` as in `record`."""
    for group in groups:
        own = reads_for(group.name, reads, graphs)
        for tap in group.inputs if "input" in own else ():
            yield Tapped(group, tap, True)
        for tap in group.outputs:
            yield Tapped(group, tap, "output" in own)
