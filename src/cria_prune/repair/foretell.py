"""What a walk will hold, before it runs: its networks are run on shapes alone, by two examples.

Legend: N = calibration examples, G, n, o = groups, regressors and outputs of a layer (`regress`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import nn

from cria_prune.base.batches import EXAMPLES, Batch, batch_size, cut, hold_out_every, map_tensors
from cria_prune.base.modules import meta_copy
from cria_prune.base.room import free_memory
from cria_prune.repair.program import Program, Run
from cria_prune.repair.regress import HELD, WIDEST
from cria_prune.repair.sites import Site, find_sites
from cria_prune.repair.spill import Storages, Waiting
from cria_prune.repair.walk import FEWEST, SAMPLES, layer_size
from cria_prune.structure.trace import canonical_tensors


@dataclass(frozen=True)
class Stop:
    """A layer where a walk stops.

    Attributes:
        weight: its name.
        streams: bytes that one network holds there for an example.
        size: (G, n, o); positions: outputs of an example; number: bytes of one of them.
    """

    weight: str
    streams: float
    size: tuple[int, int, int]
    positions: int
    number: int

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
        rows = min(n, WIDEST)
        square = 3 * G * n * n if n <= WIDEST else 2 * (G * rows * n + rows * rows)
        drawn = min(self.positions, max(1, ceil(max(SAMPLES * n, FEWEST) / max(examples, 1))))
        held = min(HELD, ceil(examples * drawn / hold_out_every(max(examples, 2))))
        taken = batch * drawn * G * (n + 2 * o) * self.number
        return {
            "streams": streams,
            "sums": 8 * (G * rows * n + 2 * G * o * rows),
            "held out": held * G * (n + 2 * o) * self.number,
            # The samples of a batch as they are drawn and as they are added; later the system itself.
            "solving": max(2 * taken, 8 * square),
        }


def stops(model: nn.Module, batch: Batch) -> list[Stop]:
    """Return the layers that a walk would stop at, for the dense network of the two.

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
        for site in find_sites(program)[0]:
            run.release()
            run.advance(min([site.step, *site.path]), tensors.__getitem__)
            until = site.step + 1 if site.meeting is None else site.meeting.at
            run.advance(until, tensors.__getitem__, free=False)
            found.append(_stop(site, run, tensors[site.weight], waiting.held(0) / examples, examples))
    return found


def _stop(site: Site, run: Run, weight: torch.Tensor, streams: float, examples: int) -> Stop:
    output = run.values[site.step]
    places = prod(output.shape[2:]) if site.spatial else prod(output.shape[:-1]) // examples
    return Stop(site.weight, streams, layer_size(site, weight), places, output.element_size())


def largest(
    found: Iterable[Stop], examples: int, batch: int, device: torch.device
) -> tuple[dict[str, int], str]:
    """Return what is held where a walk holds most, by part, and the layer; see `Stop.parts`."""
    free = free_memory(device if device.type == "cuda" else torch.device("cpu"))
    memory = None if free is None else free // 2
    each = [(item.parts(examples, batch, memory), item.weight) for item in found]
    return max(each, key=lambda item: sum(item[0].values()), default=({}, ""))
