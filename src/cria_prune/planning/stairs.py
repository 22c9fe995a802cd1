"""The numbers of units that groups may keep: down stairs, in classes, multiples and allowed numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cria_prune.base.errors import StructureError
from cria_prune.config import PlanConfig
from cria_prune.structure.groups import UnitGroup, UnitGroups, counted_together, least_kept

Allowed = Mapping[str, Sequence[int]]
ROUNDED = ("neuron", "gated", "channel")


@dataclass(frozen=True)
class Stair:
    """Groups that keep the same number of units, and the numbers that they may keep.

    Attributes:
        groups: the groups, all of one size.
        counts: (steps + 1,) int64, descending: units that each group keeps after so many steps.
    """

    groups: tuple[UnitGroup, ...]
    counts: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(group.name for group in self.groups)


def stairs(groups: UnitGroups, config: PlanConfig, allowed: Allowed | None = None) -> tuple[Stair, ...]:
    """Return the stairs of the prunable groups, in the order of the network.

    All units may stay, and every multiple of `config.multiple` (neurons, gated neurons and channels;
    any number of heads and KV groups) and of the group's own `multiple`, down to `least_kept`. Where
    `allowed` names a group, only the numbers in it remain, all units too only if it says so.

    Args:
        groups: the structure now.
        config: `floor`, `multiple` and `uniform` are used. With `uniform`, the classes are those
            of `counted_together`.
        allowed: group name -> numbers of units that may stay.

    Raises:
        StructureError: `allowed` names an unknown group, holds something else than whole numbers,
            or leaves a class no number.
    """
    allowed = {} if allowed is None else allowed
    _check_names(groups, allowed)
    prunable = {group.name: group for group in groups.prunable}
    # A configuration says one number for all layers, so groups that one field counts go down together.
    classes = counted_together(prunable.values()) if config.uniform else [(name,) for name in prunable]
    return tuple(_stair([prunable[name] for name in names], config, allowed) for names in classes)


def fewest(made: Iterable[Stair]) -> dict[str, int]:
    """Return group name -> units at the foot of its stair."""
    return {name: int(stair.counts[-1]) for stair in made for name in stair.names}


def levels(stair: Stair, parts: int = 8) -> list[int]:
    """Return the numbers of units at which a stair is measured, descending: 1/8, ..., 7/8 gone, and its foot.

    Each is the nearest that may stay; the number that there is now is left out.

    >>> levels(Stair((), np.arange(16, 0, -1)))
    [14, 12, 10, 8, 6, 4, 2, 1]
    >>> levels(Stair((), np.array([16, 12, 8])))
    [12, 8]
    """
    size = stair.groups[0].size if stair.groups else int(stair.counts[0])
    wanted = [size * (1 - part / parts) for part in range(1, parts)]
    nearest = {int(stair.counts[np.argmin(np.abs(stair.counts - count))]) for count in wanted}
    return sorted((nearest | {int(stair.counts[-1])}) - {size}, reverse=True)


def permitted(group: UnitGroup, config: PlanConfig, allowed: Sequence[int] | None = None) -> list[int]:
    """Return how many units of a group may stay, descending, the number of now first; see `stairs`."""
    return _stair([group], config, {} if allowed is None else {group.name: allowed}).counts.tolist()


def _stair(members: Sequence[UnitGroup], config: PlanConfig, allowed: Allowed) -> Stair:
    least = max(least_kept(group, config.floor) for group in members)
    size = members[0].size
    counts = np.arange(size, least - 1, -1, dtype=np.int64)
    asked = config.multiple if members[0].kind in ROUNDED else 1
    multiple = math.lcm(asked, *(group.multiple for group in members))
    counts = counts[(counts % multiple == 0) | (counts == size)]
    for group in members:
        if group.name in allowed:
            counts = counts[np.isin(counts, np.asarray(allowed[group.name]))]
    if not len(counts):
        names = ", ".join(group.name for group in members)
        raise StructureError(
            f"Keeping an allowed number of units of {names}",
            f"none of {sorted({count for group in members for count in allowed.get(group.name, ())})} fits: "
            f"there are {size} units, {least} always stay, and {config.multiple} is to divide what is kept",
            "Allow the number that there are now, lower the floor, or use a multiple of 1",
        )
    return Stair(tuple(members), counts)


def _check_names(groups: UnitGroups, allowed: Allowed) -> None:
    asked, todo = "Allowed numbers of units", "Give whole numbers for names of groups"
    unknown = sorted(set(allowed) - {group.name for group in groups})
    if unknown:
        raise StructureError(asked, f"found no group {unknown[0]!r}", todo)
    for name, counts in allowed.items():
        if np.asarray(counts).ndim != 1 or np.asarray(counts).dtype.kind not in "iu":
            raise StructureError(asked, f"found {counts!r} for group {name!r}", todo)
