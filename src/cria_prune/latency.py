"""Measuring seconds: what each group saves when it is cut, and how fast the pruned network is.

A network and a smaller one take turns in one loop, and what counts is the median of the quotients of
neighbouring runs: a machine that slows down or is busy for a while slows both. Every group is really cut by
the surgery, alone, to a few widths. The table of it, `planning.latency.LatencyTable`, is plain numbers; this
module is beside the stages and no part of planning, for it cuts and runs networks.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import (
    Batch,
    batch_size,
    map_tensors,
    model_inputs,
    rows_of,
)
from cria_prune.base.errors import DataError
from cria_prune.base.events import passed
from cria_prune.base.modules import buffers_kept, device_of, unchanged
from cria_prune.base.progress import QUIET, Progress
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import Budget
from cria_prune.planning.latency import LatencyTable, Timed, drawn, structure_digest, together
from cria_prune.planning.plan import make_plan
from cria_prune.planning.stairs import Allowed, Stair, levels, stairs
from cria_prune.structure.groups import UnitGroups
from cria_prune.surgery.removal import apply

Timer = Callable[[nn.Module, Batch], float]
"""(model in evaluation mode, batch on its device) -> seconds of one forward."""

SECONDS = 0.5  # of measuring for each width of a group
LEAST, MOST = 5, 200  # turns for each width
WARM = 2  # runs before the first turn
FINAL = 5.0  # seconds of measuring the pruned network beside the dense one
PARTS = (0.25, 0.5, 0.75)  # of all groups that are gone at once, to see what they save together
TOGETHER = 4.0  # times as long: all that is foretold leans on these few
NORMAL, MEDIAN = 1.4826, 1.2533  # deviation over the median one, error of a median over that of a mean
TRIES, NEAR = 5, 0.03  # networks that are measured at most for a speed-up, and how near is near enough


def wall(model: nn.Module, batch: Batch) -> float:
    """Return the wall time of one forward; of a GPU until it has finished."""
    args, kwargs = model_inputs(batch)
    device = device_of(model)
    _finish(device)
    start = time.perf_counter()
    model(*args, **kwargs)
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@dataclass(frozen=True)
class Speed:
    """Two networks side by side; prints as one line.

    Attributes:
        dense, pruned: median seconds of a batch.
        ratio: median of pruned / dense over neighbouring runs.
        turns: how many runs of each.
        error: standard error of the ratio, by the median deviation of the turns.
    """

    dense: float
    pruned: float
    ratio: float
    turns: int
    error: float = 0.0

    @property
    def reduction(self) -> float:
        """Share of the seconds that is gone; negative where the pruned network is slower."""
        return 1 - self.ratio

    @property
    def speedup(self) -> float:
        """How many times as fast the pruned network is."""
        return 1 / self.ratio

    def __str__(self) -> str:
        return (
            f"{1e3 * self.dense:.3g} -> {1e3 * self.pruned:.3g} ms a batch, {self.speedup:.2f} times as fast"
        )


def compare_speed(
    dense: nn.Module, pruned: nn.Module, batch: Batch, *, seconds: float = FINAL, timer: Timer = wall
) -> Speed:
    """Run two networks in turns for some seconds, 5 turns at least, in evaluation mode without gradients.

    Args:
        dense, pruned: on one device; left as they were.
        batch: on that device.
        seconds: of measuring, for both together.
        timer: what measures a run; for tests.

    Raises:
        ResourceError: the memory does not suffice, see `base.batches.forward`.
    """
    turns = list[tuple[float, float]]()
    with ExitStack() as stack:
        for net in (dense, pruned):
            stack.enter_context(unchanged(net))
            stack.enter_context(buffers_kept(net))
        stack.enter_context(torch.inference_mode())
        dense.eval(), pruned.eval()
        for _ in range(WARM):
            timer(dense, batch), timer(pruned, batch)
        while len(turns) < LEAST or (sum(map(sum, turns)) < seconds and len(turns) < MOST):
            # Who goes first changes: the second finds what the first left in the caches.
            if len(turns) % 2:
                second = timer(pruned, batch)
                turns.append((timer(dense, batch), second))
            else:
                turns.append((timer(dense, batch), timer(pruned, batch)))
    before, after = (median(side) for side in zip(*turns, strict=True))
    # A clock may be too coarse for a tiny network: then it says nothing, and not infinity.
    ratios = [small / large if large else 1.0 for large, small in turns]
    ratio = median(ratios)
    deviation = NORMAL * median(abs(one - ratio) for one in ratios)
    return Speed(before, after, ratio, len(turns), MEDIAN * deviation / len(turns) ** 0.5)


def timing_batch(batches: Iterable[Batch], device: torch.device, examples: int | None = None) -> Batch:
    """Return the batch that is timed, on a device: the first one, cut or filled up with itself again.

    Args:
        batches: calibration batches.
        device: where the model is.
        examples: how many; as many as the first batch has if None.

    Raises:
        DataError: there is no batch.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise DataError("A batch to be timed", "found no calibration batch", "Pass at least one batch")
    if examples is not None:
        batch = rows_of(batch, list(islice(cycle(range(batch_size(batch))), examples)))
    # A copy: a forward may write into its input, and others read the batch after it.
    return map_tensors(batch, lambda item: item.to(device, copy=True))


def timed_here(groups: UnitGroups, batch: Batch, device: torch.device) -> Timed:
    """Return what seconds of a batch here would be of; see `Timed`."""
    name = f"{device.type} {platform.processor() or platform.machine()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    args, kwargs = model_inputs(batch)
    inputs = [
        f"{str(item.dtype).removeprefix('torch.')} {tuple(item.shape)}"
        for item in tree_leaves((args, kwargs))
        if isinstance(item, Tensor)
    ]
    return Timed(
        device=name, threads=torch.get_num_threads() if device.type == "cpu" else 0, batch=batch_size(batch),
        inputs=tuple(inputs), structure=structure_digest(groups), torch=torch.__version__,
    )  # fmt: skip


def measure_latency(
    model: nn.Module,
    groups: UnitGroups,
    config: PlanConfig,
    batch: Batch,
    *,
    allowed: Allowed | None = None,
    seconds: float = SECONDS,
    timer: Timer = wall,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the seconds of a batch, and what every group saves of them at a few widths.

    Each group, or class of groups that go down together, is cut alone to every eighth and to the smallest
    number that may stay; what a class saves is shared out evenly. Then parts of all groups are cut at once.

    Args:
        model: the dense network; it is left as it was.
        groups: its structure, frozen where a plan leaves it alone.
        config: `floor`, `multiple` and `uniform` are used.
        batch: on the model's device, see `timing_batch`.
        allowed: group name -> numbers of units that may stay.
        seconds: of measuring for every width.
        timer: what measures a run; for tests.
        progress: where to show it.

    Raises:
        ResourceError: the memory does not suffice.
    """
    made = stairs(groups, config, allowed)
    points = [(stair, count) for stair in made for count in levels(stair)]
    joint = [_part(made, part) for part in PARTS] if len(made) > 1 else []
    cuts = [dict.fromkeys(stair.names, count) for stair, count in points] + joint
    speeds = list[Speed]()
    passed("time", model=model, groups=groups)
    with (progress or QUIET).bar("measure latency", len(cuts)) as bar:
        for number, kept in enumerate(cuts):
            spent = seconds * (TOGETHER if number >= len(points) else 1.0)
            smaller = apply(
                model, make_plan(groups, {name: np.arange(count) for name, count in kept.items()})
            )
            speeds.append(compare_speed(model, smaller, batch, seconds=spent, timer=timer))
            bar.update(ms=1e3 * speeds[-1].pruned)
    # Shares of the dense seconds of the same turns were measured; the table has one dense network.
    alone, all_cut = speeds[: len(points)], speeds[len(points) :]
    times = [speed.dense for speed in alone] or [
        compare_speed(model, model, batch, seconds=seconds, timer=timer).dense
    ]
    shares = _shares(groups, cuts, alone, [speed.reduction for speed in all_cut])
    saved: dict[str, dict[int, float]] = {name: {} for stair in made for name in stair.names}
    for (stair, count), share in zip(points, shares, strict=True):
        for name in stair.names:
            saved[name][count] = float(share) * median(times) / len(stair.groups)
    table = LatencyTable(
        of=timed_here(groups, batch, device_of(model)), dense=median(times),
        sizes={group.name: group.size for group in groups.prunable}, saved=saved,
    )  # fmt: skip
    ledger = table.ledger(groups)
    factor = together(
        [ledger.saved(kept) for kept in joint], [speed.reduction * table.dense for speed in all_cut]
    )
    return table.model_copy(update={"together": factor})


def _shares(
    groups: UnitGroups, cuts: Sequence[Mapping[str, int]], alone: Sequence[Speed], joint: Sequence[float]
) -> np.ndarray:
    """Return the shares of the dense seconds that single cuts save, drawn towards those of their MACs.

    Args:
        groups: the structure.
        cuts: group name -> units kept of each network, those with all groups cut last.
        alone: what was measured of the first.
        joint: what was measured to be gone of the last: many cuts at once stand out of the noise.
    """
    found = [speed.reduction for speed in alone]
    if not joint:
        return np.array(found)
    macs = Budget(groups, "macs")
    if not macs.total:
        return np.array(found)
    gone = np.array([macs.reduction(groups, kept) for kept in cuts])
    one, many = gone[: len(alone)], gone[len(alone) :]
    rate = max(float(many @ np.array(joint)) / float(many @ many), 0.0) if many.any() else 0.0
    return drawn(found, (rate * one).tolist(), [speed.error for speed in alone])


def _part(made: Sequence[Stair], part: float) -> dict[str, int]:
    """Return the units that stay of every group when about a part of each is gone."""
    return {name: _nearest(stair, part) for stair in made for name in stair.names}


def _nearest(stair: Stair, part: float) -> int:
    """Return the number of units nearest to a part gone, of those that may stay."""
    size = stair.groups[0].size
    return int(stair.counts[np.argmin(np.abs(stair.counts - (1 - part) * size))])


def known_latency(
    model: nn.Module,
    groups: UnitGroups,
    config: PlanConfig,
    batches: Iterable[Batch],
    *,
    allowed: Allowed | None = None,
    keep: str | Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Return the latencies that are kept in `config.latency_table` or `keep`, or measure and keep them.

    Args:
        model, groups, config, allowed, progress: see `measure_latency`.
        batches: calibration batches; `config.latency_batch` says how many examples are timed.
        keep: a file for it where the configuration names none.

    Raises:
        ArtifactError: the file is no such table, or is one of another device, batch or network.
    """
    path = config.latency_table or keep
    batch = timing_batch(batches, device_of(model), config.latency_batch)
    if path is not None and Path(path).is_file():
        table = LatencyTable.read(path)
        table.check(timed_here(groups, batch, device_of(model)))
        table.ledger(groups)  # every group that may be cut is in it
        return table
    table = measure_latency(model, groups, config, batch, allowed=allowed, progress=progress)
    if path is not None:
        table.write(path)
    return table


def next_aim(
    asked: float, points: Sequence[tuple[float, float]], most: float, near: float = NEAR
) -> float | None:
    """Return the share to aim for next, after networks were measured; None: one is near, or none is left.

    Between two networks, of which one is too slow and the other too fast, shares are taken to lie on a line.
    Before there are two, what the table foretells is taken to be off by the same factor a little further on.

    Args:
        asked: share of the seconds that is to be gone.
        points: (share that the table foretold, share that was measured to be gone) of each network so far.
        most: largest share that the table says can be gone.
        near: by how much the seconds that are left may differ from those that were asked for.

    >>> next_aim(0.4, [(0.4, 0.39)], 0.9) is None
    True
    >>> round(next_aim(0.4, [(0.4, 0.3)], 0.9), 3), round(next_aim(0.4, [(0.4, 0.5)], 0.9), 3)
    (0.533, 0.32)
    >>> round(next_aim(0.4, [(0.4, 0.3), (0.533, 0.45)], 0.9), 3)
    0.489
    """
    foretold, reached = points[-1]
    if any(abs((1 - found) / (1 - asked) - 1) <= near for _, found in points):
        return None
    if any(before == foretold for before, _ in points[:-1]):  # the same widths: there are none between
        return None
    slow = [(found, share) for share, found in points if found < asked]
    fast = [(found, share) for share, found in points if found > asked]
    if slow and fast:
        (below, low), (above, high) = max(slow), min(fast)
        # By noise a network that the table says to be slower may have been the faster one.
        return low + (high - low) * (asked - below) / (above - below) if low < high else None
    # A network that got no faster says nothing about the factor: half of the way to the most.
    further = min(asked * foretold / reached if reached > 0 else (foretold + most) / 2, most)
    return None if further == foretold else further
