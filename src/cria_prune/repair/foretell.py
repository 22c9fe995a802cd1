"""What a walk and measuring losses will hold, before they run: by two examples, on shapes alone.

Legend: N = calibration examples, G, n, o = groups, regressors and outputs of a layer (`regress`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor, nn

from cria_prune.base.batches import EXAMPLES, Batch, batch_size, cut, hold_out_every, map_tensors
from cria_prune.base.modules import meta_copy
from cria_prune.base.ranks import World
from cria_prune.repair import levels
from cria_prune.repair.fidelity import PIECE
from cria_prune.repair.program import Program, Run
from cria_prune.repair.regress import HELD, WIDEST
from cria_prune.repair.sites import Site, find_sites
from cria_prune.repair.spill import Storages, Waiting, room_for
from cria_prune.repair.walk import SAMPLES, layer_size, places_each
from cria_prune.structure.groups import UnitGroup
from cria_prune.structure.trace import canonical_tensors


@dataclass(frozen=True)
class Course:
    """A network on its way over the examples.

    Attributes:
        stops: the layers in the order of the data.
        outputs: bytes of the outputs of an example.
    """

    stops: tuple[Stop, ...] = ()
    outputs: float = 0.0


@dataclass(frozen=True)
class Stop:
    """A layer where a walk stops.

    Attributes:
        weight: its name.
        streams: bytes that one network holds there for an example.
        size: (G, n, o); positions: outputs of an example; number: bytes of one of them.
        experts: G counts experts, and a row goes to one of them.
    """

    weight: str
    streams: float
    size: tuple[int, int, int]
    positions: int
    number: int
    experts: bool = False

    def parts(self, examples: int, batch: int, memory: int | None) -> dict[str, int]:
        """Return what is held there, by part, in bytes.

        Args:
            examples: N; batch: of them in a batch.
            memory: bytes that batches may hold between their turns, see `walk`; None for any number.
        """
        G, n, o = self.size
        streams = ceil(2 * self.streams * examples)  # both networks; the smaller one takes less
        if memory is not None:
            streams = min(streams, memory + ceil(2 * self.streams * batch))
        rows, drawn = min(n, WIDEST), self.drawn(examples)
        each = 1 if self.experts else G
        square = 3 * G * n * n if n <= WIDEST else 2 * (G * rows * n + rows * rows)
        held = min(HELD, ceil(examples * drawn / hold_out_every(max(examples, 2))))
        taken = batch * drawn * each * (n + 2 * o) * self.number
        return {
            "streams": streams,
            "sums": 8 * (G * rows * n + 2 * G * o * rows),
            "held out": held * G * (n + 2 * o) * self.number,
            # The samples of a batch as they are drawn and as they are added; later the system itself.
            "solving": max(2 * taken, 8 * square),
        }

    def drawn(self, examples: int) -> int:
        """Return how many positions are drawn of each example."""
        wanted = places_each(self.size[1], SAMPLES, max(examples, 1))
        return min(self.positions, wanted * self.size[0] if self.experts else wanted)


def course(model: nn.Module, batch: Batch) -> Course:
    """Return the layers that a walk would stop at, for the dense network of the two, and what it gives.

    Args:
        model: on any device, meta too; it is left as it was.
        batch: two examples of it are run, on shapes alone; what they hold grows with the examples.

    Raises:
        CaptureError: the operations cannot be captured.
        RuntimeError: shapes alone do not say how they go on.
    """
    structure, meta = meta_copy(model), torch.device("meta")
    tensors, fixed = canonical_tensors(structure), Storages()
    examples = min(batch_size(batch), EXAMPLES)
    batch = map_tensors(cut(batch, batch_size(batch), examples), lambda item: item.to(meta))
    program = Program(structure, batch)
    run = Run(program, batch, meta)
    waiting, found = Waiting([[run]], fixed, None), list[Stop]()
    for value in tensors.values():
        fixed.add(value)
    with torch.no_grad():
        for site in find_sites(program, experts=tensors.keys())[0]:
            run.release()
            run.advance(min([site.step, *site.path]), tensors.__getitem__)
            until = site.step + 1 if site.meeting is None else site.meeting.at
            run.advance(until, tensors.__getitem__, free=False)
            found.append(_stop(site, run, tensors[site.weight], waiting.held(0) / examples, examples))
    given = [program.steps[number].value for number in program.outputs]
    return Course(tuple(found), sum(item.nbytes for item in given if isinstance(item, Tensor)) / examples)


def _stop(site: Site, run: Run, weight: torch.Tensor, streams: float, examples: int) -> Stop:
    output = run.values[site.step]
    places = prod(output.shape[2:]) if site.spatial else prod(output.shape[:-1]) // examples
    size, number = layer_size(site, weight), output.element_size()
    return Stop(site.weight, streams, size, places, number, site.experts is not None)


def largest(
    found: Iterable[Stop], examples: int, batch: int, device: torch.device
) -> tuple[dict[str, int], str]:
    """Return what is held where a walk holds most, by part, and the layer; see `Stop.parts`."""
    memory = _room(device)
    each = [(item.parts(examples, batch, memory), item.weight) for item in found]
    return max(each, key=lambda item: sum(item[0].values()), default=({}, ""))


def largest_of_losses(
    way: Course, groups: Sequence[UnitGroup], examples: int, batch: int, device: torch.device, repaired: bool
) -> tuple[dict[str, int], str]:
    """Return what is held where measuring losses holds most, by part, and the layer; see `levels.losses_of`.

    Args:
        way: of the network.
        groups: those that are measured.
        examples, batch: as in `Stop.parts`.
        device: where the network runs.
        repaired: with the best weights for the units that stay.
    """
    memory, every = _room(device), hold_out_every(max(examples, 2))
    judges = min(levels.EXAMPLES, ceil(examples * (every - 1) / every))
    most = max((item.streams for item in way.stops), default=0.0)
    given = batch * way.outputs
    # Both networks' outputs without what is ruled out, and pieces of both in double precision.
    beyond = {"a forward": ceil(batch * most + 4 * given + 8 * 8 * min(given, PIECE))}
    each = []
    for stop, kept, solving in _held(way, groups, examples, batch, repaired):
        # The examples that losses are measured on may wait at an earlier layer, with more.
        streams = ceil(stop.streams * examples + (most + way.outputs) * judges)
        if memory is not None:
            streams = min(streams, memory + ceil(batch * (most + way.outputs)))
        held = {"streams": streams, **kept}
        each += [({**held, "solving": solving}, stop.weight), ({**held, **beyond}, stop.weight)]
    return max(each, key=lambda item: sum(item[0].values()), default=({}, ""))


def _held(
    way: Course, groups: Sequence[UnitGroup], examples: int, batch: int, repaired: bool
) -> Iterator[tuple[Stop, dict[str, int], int]]:
    """Yield a layer, what is kept at it, and what solving takes there, in the order of the data."""
    place = {item.weight: number for number, item in enumerate(way.stops)}
    ends = dict.fromkeys(place, 0)
    for group in groups:
        end = max((place.get(item.tensor, -1) for item in group.consumers), default=-1)
        for item in group.consumers:
            # What a layer reads is kept until the last layer of its group is measured.
            ends[item.tensor] = max(ends.get(item.tensor, 0), end)
    read = {item.tensor for group in groups for item in group.consumers}
    kept = dict[str, int]()
    for number, stop in enumerate(way.stops):
        if stop.weight not in read or stop.experts:  # of experts no losses are measured
            continue
        G, n, o = stop.size
        solving = 8 * G * o * n
        if repaired and n <= levels.WIDEST:
            kept[stop.weight] = 8 * G * n * n
            drawn = batch * stop.drawn(examples) * G * n * (2 * stop.number + 2 * 8)
            solving = max(drawn + 8 * G * n * n, 8 * (4 * G * n * n + 4 * G * o * n))
        yield stop, {"moments": sum(kept.values()), "changed": G * o * n * stop.number}, solving
        kept = {name: size for name, size in kept.items() if ends[name] > number}


def _room(device: torch.device) -> int | None:
    return room_for(device if device.type == "cuda" else torch.device("cpu"), World())
