"""From activations to the moments of each group, side and half, while the model runs.

Legend: B = examples of a batch, n = features of an activation, S = samples, d = units of a group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cria_prune.base.batches import SMALLER, named_shortage
from cria_prune.base.errors import SignalError, StructureError
from cria_prune.base.modules import give_back
from cria_prune.config import RecordConfig
from cria_prune.graph.moments import SINGLE, MomentAccumulator, Moments, Total
from cria_prune.recording.sampling import Buffer, Origin, Sampler, unit_signals
from cria_prune.recording.states import EVERYTHING, FeatureSums, GroupStates, Read, reads_for
from cria_prune.structure.groups import Site, Tap, UnitGroup

Halves = tuple[Buffer, Buffer]


class Call(NamedTuple):
    """One activation that is received: `name` and `site` of its tap, its `shape`, bytes of a number in it."""

    name: str
    site: Site
    shape: tuple[int, ...]
    itemsize: int


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


@dataclass
class Reader:
    """One tap of one side of a group, and the accumulators of that side's two halves.

    Attributes:
        group: its name.
        tap: where it reads.
        taps: how many taps the side has.
        halves: moments of the units, shared by the side's taps.
        sums: moments of the features that this tap reads, where a unit is several features wide.
        consumed: second moments of those features, where they are asked for and are not the units' own.
    """

    group: str
    tap: Tap
    taps: int
    halves: Halves
    sums: FeatureSums | None = None
    consumed: Buffer | None = None

    def __post_init__(self) -> None:
        # All features in their order are the activation itself, and need no copy.
        flat = np.ascontiguousarray(self.tap.positions, dtype=np.int64).reshape(-1)
        self.positions = torch.from_numpy(flat)
        self.features = int(flat.max()) + 1
        self.in_order = bool((flat == np.arange(len(flat))).all())
        totals = [buffer.total for buffer in (*self.halves, self.consumed) if buffer]
        self.sketched = any(total.pairs and not total.exact for total in totals)

    def add(self, half: int, samples: Tensor, first: int, origin: Origin | None) -> None:
        """Add samples (S, n) of the batch that begins with example `first` to a half.

        Raises:
            StructureError: the activation has fewer features than the tap names.
        """
        features = samples.shape[1]
        if features < self.features:
            raise StructureError(
                f"Reading group {self.group!r} at {self.tap.tensor!r}",
                f"the activation has {features} features, the group needs {self.features}",
                "Discover the unit groups of this model again",
            )
        whole = self.in_order and features == len(self.positions)
        if self.positions.device != samples.device:
            self.positions = self.positions.to(samples.device)
        if not whole:
            samples = samples.index_select(1, self.positions)
        units, width = self.tap.positions.shape
        buffer = self.halves[half]
        # Numbers are for sketches alone: bucket and sign of a
        # sample go by its number, so that no batching changes them.
        numbers = buffer.number(origin, half, first, width, self.taps) if origin else None
        buffer.add(unit_signals(samples, units), numbers)
        if self.sums:
            self.sums.add(half, samples)
        if self.consumed:
            numbers = self.consumed.number(origin, half, first) if origin else None
            self.consumed.add(samples.T, numbers)

    def adding_bytes(self, samples: int, features: int, itemsize: int) -> int:
        """Return the most that `add` of so many samples of n features asks for."""
        units, width = self.tap.positions.shape
        own = samples * units * width * itemsize
        most = (own if width > 1 else 0) + self.halves[0].adding_bytes(samples * width)  # turned into signals
        if self.sums:
            most = max(most, self.sums.adding_bytes(samples))
        if self.consumed:
            most = max(most, self.consumed.adding_bytes(samples))
        return most + (own if units * width < features else 0)  # a copy of some of the features


class Collector:
    """Receives activations from `Taps` and keeps the moments of every group.

    Args:
        groups: the groups to record.
        config: positions, tokens, sketches and the seed.
        consumed: keep the second moments of the features that each consumer reads.
        reads: what else to keep than the outputs' means and variances.
        graphs: names of groups of which both sides are kept in any case.

    Attributes:
        wanted: the (tensor, site) pairs to read.
    """

    def __init__(
        self,
        groups: Sequence[UnitGroup],
        config: RecordConfig,
        consumed: bool = False,
        reads: frozenset[Read] = EVERYTHING,
        graphs: Collection[str] = (),
    ) -> None:
        self._config, self._sampler = config, Sampler(config)
        self._consumed: dict[str, dict[str, Buffer]] = {}
        self._units_alone: dict[str, str] = {}  # group -> its only consumer, which reads the units themselves
        self._sides: dict[str, tuple[Halves | None, Halves]] = {}
        self._sums: dict[str, dict[str, FeatureSums]] = {}
        self._readers: dict[tuple[str, Site], dict[int, list[Reader]]] = {}
        for group in groups:
            # What a criterion does not read is not kept: second
            # moments are most of the work (docs/decisions/0017).
            own = reads_for(group.name, reads, graphs)
            before = self._accumulators(group.size) if "input" in own else None
            sides = (
                before,
                self._accumulators(group.size, positive="positive" in own, pairs="output" in own),
            )
            # The moments of a unit join its features as samples of one signal. Criteria that
            # weigh each feature need means and variances of their own, where there are several.
            wide = any(tap.positions.shape[1] > 1 for tap in group.outputs)
            sums = {tap.tensor: FeatureSums(*tap.positions.shape) for tap in group.outputs if wide}
            self._sides[group.name], self._sums[group.name] = sides, sums
            kept = self._consumed[group.name] = {}
            if not consumed or group.normed:  # those are never repaired
                pass
            elif "output" in own and not wide and len(group.outputs) == 1:
                # The repair needs the second moments of what the consumer reads.
                # Those are the output side's here, and nothing is recorded twice.
                self._units_alone[group.name] = group.outputs[0].tensor
            else:
                kept |= {tap.tensor: self._accumulator(tap.positions.size) for tap in group.outputs}
            for taps, halves in zip((group.inputs, group.outputs), sides, strict=True):
                if halves is None:
                    continue
                for tap in taps:
                    by_dim = self._readers.setdefault((tap.tensor, tap.site), {})
                    out = halves is sides[1]
                    further = (sums.get(tap.tensor), kept.get(tap.tensor)) if out else ()
                    reader = Reader(group.name, tap, len(taps), halves, *further)
                    by_dim.setdefault(tap.dim, []).append(reader)
        self.wanted = tuple(self._readers)
        self.begin(0, 1, None)

    def _accumulators(self, units: int, positive: bool = False, pairs: bool = True) -> Halves:
        """Return a side's two halves; their sketches must not share signs, for they are merged."""
        return self._accumulator(units, 0, positive, pairs), self._accumulator(units, 1, positive, pairs)

    def _accumulator(
        self, units: int, half: int | None = None, positive: bool = False, pairs: bool = True
    ) -> Buffer:
        config = self._config
        # The halves are merged in the end, so their sketches have different cards.
        exact, seed = units <= config.exact_units, 2 * config.seed + (half or 0)
        total = MomentAccumulator(units, exact, config.sketch_columns, seed, positive, pairs)
        return Buffer(total, halves=1 if half is None else 2)

    def begin(self, first: int, examples: int, mask: Tensor | None) -> None:
        """Say what comes next: the first example's index, how many, their attention mask (B, tokens)."""
        self._first, self._examples = first, examples
        self._sampler.begin(first, examples, mask)

    def receive(self, name: str, site: Site, activation: Tensor) -> None:
        """Add the samples of an activation to every group that reads it. Nothing of it is kept."""
        # The forward may run with gradients, for Taylor and Fisher: the sums must not hold on to its graph.
        with torch.no_grad():
            for dim, readers in self._readers[name, site].items():
                sketched = any(reader.sketched for reader in readers)
                for half, samples, origin in self._sampler.halves(activation, dim, name, sketched):
                    for reader in readers:
                        with self._named(reader.group, reader.halves[0].total.units):
                            reader.add(half, samples, self._first, origin)

    def memory(self, calls: Iterable[Call] = (), examples: int = 1) -> list[GroupMemory]:
        """Return what every group keeps.

        Args:
            calls: the activations of one batch; without them no signals are held back.
            examples: of that batch.
        """
        held, batches = dict.fromkeys(self._sides, 0), -(-self._config.examples // examples)
        for call in calls:
            for dim, readers in self._readers[call.name, call.site].items():
                half = -(-self._sampler.taken(call.shape, dim, examples) // 2)
                for reader in readers:
                    found = reader.halves[0].holds(half * reader.tap.positions.shape[1], batches)
                    held[reader.group] = max(held[reader.group], found)
        return [self._memory(name, numbers) for name, numbers in held.items()]

    def _memory(self, group: str, held: int) -> GroupMemory:
        """Return what a group keeps, where each of its buffers comes to hold so many numbers."""
        sides = [halves[0].total for halves in self._sides[group] if halves]  # the other half is like it
        read = [buffer.total for buffer in self._consumed[group].values()]
        sums = self._sums[group].values()
        return GroupMemory(
            name=group,
            units=sides[0].units,
            sketched=any(total.pairs and not total.exact for total in sides),
            collected=2 * sum(total.held_bytes() for total in sides)
            + sum(item.held_bytes() for item in sums),
            collected_consumed=sum(total.held_bytes() for total in read),
            states=3 * sum(total.moments_bytes() for total in sides)
            + sum(item.held_bytes(halves=3) for item in sums),
            consumed=sum(total.moments_bytes() for total in read),
            buffered=SINGLE * held * (2 * len(sides) + len(read)),
            closing=max(total.closing_bytes() for total in (*sides, *read)),
        )

    def receiving_bytes(self, call: Call, examples: int) -> int:
        """Return the most that `receive` of an activation of so many examples asks for beside the sums."""
        most, item = 0, max(call.itemsize, SINGLE)
        for dim, readers in self._readers[call.name, call.site].items():
            features, taken = call.shape[dim], self._sampler.taken(call.shape, dim, examples)
            half, shared = -(-taken // 2), 0
            if taken * features < math.prod(call.shape) or item != call.itemsize:  # drawn, or half precision
                shared += taken * features * item
            if taken > call.shape[0]:  # the samples of one half lie apart, and are copied
                shared += half * features * item
            most = max(most, shared + max(reader.adding_bytes(half, features, item) for reader in readers))
        return most

    def _named(self, group: str, units: int) -> AbstractContextManager[None]:
        """Name the group and the batch where the memory does not suffice, see `named_shortage`."""
        config = self._config
        return named_shortage(
            f"Recording the {units} units of group {group!r} from {self._examples} examples at once",
            f"{SMALLER}; wide groups take less with a lower record.exact_units ({config.exact_units}) or "
            f"record.sketch_columns ({config.sketch_columns}), and all without the repair "
            "(--repair none)",
        )

    def pool(self, total: Total, device: torch.device | str) -> None:
        """Take in what the collectors of all processes have received; see `MomentAccumulator.pool`."""
        for name, sides in self._sides.items():
            for buffer in (*(sides[0] or ()), *sides[1], *self._consumed[name].values()):
                buffer.flush().pool(total, device)
            for sums in self._sums[name].values():
                sums.pool(total, device)

    def states(self, taylor: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> dict[str, GroupStates]:
        """Return the states of every group, with what the gradients gave by its name.

        The collector is empty afterwards: what a group has collected is let go as soon as its moments are
        there, so that not all of both is held at once.

        Raises:
            SignalError: a side was never reached, has an empty half, or holds NaN or infinity.
        """
        states = {}
        self._readers.clear()  # they hold on to the accumulators
        give_back()
        for name in list(self._sides):
            with self._named(name, self._sides[name][1][0].total.units):
                states[name] = self._state(name, taylor.get(name), fisher.get(name))
        return states

    def _state(self, name: str, taylor: Tensor | None, fisher: Tensor | None) -> GroupStates:
        """Return the states of a group, and let go of its accumulators."""
        before, after = self._sides.pop(name)
        inputs, whole_input = _moments(name, "input", before) if before else (None, None)
        outputs, whole_output = _moments(name, "output", after)
        del before, after
        give_back()
        features, even, odd = (
            {tensor: found for tensor, sums in self._sums[name].items() if (found := sums.moments(half))}
            for half in (None, 0, 1)
        )
        consumed = {tensor: total.flush().moments() for tensor, total in self._consumed.pop(name).items()}
        if name in self._units_alone:
            consumed[self._units_alone[name]] = whole_output
        return GroupStates(
            name,
            inputs,
            outputs,
            whole_input,
            whole_output,
            taylor,
            features,
            (even, odd),
            consumed,
            fisher,
        )


def _moments(group: str, side: str, halves: Halves) -> tuple[tuple[Moments, Moments], Moments]:
    """Return the moments of a side's halves, and of both together, once checked."""
    totals = [half.flush() for half in halves]
    found = [total.samples for total in totals]
    if not all(found):
        reached = "it was never reached: no layer call used the tensors of its taps"
        raise SignalError(
            f"Recording the {side} side of group {group!r}",
            f"{found[0]} and {found[1]} samples in the two halves of the examples" if any(found) else reached,
            "Pass two examples at least, and batches that run this layer; or freeze the group",
        )
    # Each half first: how well their scores agree is the ceiling of what a comparison of criteria can mean.
    even, odd = (total.moments() for total in totals)
    both = totals[0].merge(totals[1]).moments()
    both.check_finite(f"group {group!r}, {side} side")
    return (even, odd), both
