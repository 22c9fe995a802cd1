"""What a group of Torch-Pruning cuts, and which units of Cria those lines are.

Both are matched by positions of the weights of convolutions, linear layers and embeddings. What follows a
unit (norms, biases, depthwise filters) is left out of the comparison, and so is the input side of a grouped
convolution, whose positions stand for several channels.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from cria_prune.modules import named_tensors
from cria_prune.structure import UnitGroups

Place = tuple[int, int, int]
"""id of a weight, dimension, position: one line of parameters that leaves."""
Unit = tuple[str, int]
"""Name of a unit group, number of the unit."""


class UnscoredError(Exception):
    """A group has no score; `warn` where the two libraries disagree about it."""

    def __init__(self, reason: str, warn: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.warn = reason, warn


class Units:
    """Which unit of Cria owns which line of a weight.

    Args:
        model: the live model; groups: its unit groups.
    """

    def __init__(self, model: nn.Module, groups: UnitGroups) -> None:
        self._names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        sides = (cut_side(module, out) for module in model.modules() for out in (True, False))
        compared = {side for side in sides if side is not None}
        self.frozen: dict[str, str | None] = {}
        self.owners: dict[Place, Unit] = {}
        self.places: dict[Unit, set[Place]] = {}
        tensors = named_tensors(model)
        for group in groups:
            self.frozen[group.name] = group.frozen
            self.places |= {(group.name, unit): set() for unit in range(group.size)}
            for item in group.slices:
                side = (id(tensors[item.tensor]), item.dim)
                if side not in compared:
                    continue
                for unit, positions in enumerate(item.positions.tolist()):
                    for position in positions:
                        self.owners[*side, position] = (group.name, unit)
                        self.places[group.name, unit].add((*side, position))

    def owner_of(self, place: Place | None) -> Unit:
        """Return the unit that a line belongs to.

        Raises:
            UnscoredError: there is none, or it may not leave.
        """
        owner = None if place is None else self.owners.get(place)
        if owner is None:
            raise UnscoredError("Cria found no unit at these channels")
        if (reason := self.frozen[owner[0]]) is not None:
            raise UnscoredError(reason)
        return owner

    def difference(self, owner: Unit, theirs: set[Place]) -> str:
        """Say in what a cut of Torch-Pruning differs from the unit."""
        apart = sorted({self._names.get(tensor, "?") for tensor, _, _ in theirs ^ self.places[owner]})
        names = ", ".join(apart[:3]) + (f" and {len(apart) - 3} more" if len(apart) > 3 else "")
        return (
            f"Torch-Pruning cuts something else than unit {owner[1]} of {owner[0]!r}: they differ in {names}"
        )


def cut_side(module: Any, out: bool) -> tuple[int, int] | None:
    """Return (id of the weight, dimension) that a cut of a layer's outputs or inputs goes along.

    None for what follows other layers (norms, activations, depthwise convolutions), for layers of another
    kind, and for the side of a grouped convolution on which one position stands for several channels.
    """
    if isinstance(module, _ConvNd):
        if module.groups > 1 and (module.groups == module.out_channels or out == module.transposed):
            return None
        return id(module.weight), int(out == module.transposed)
    if isinstance(module, nn.Linear):
        return id(module.weight), int(not out)
    return (id(module.weight), 1) if isinstance(module, nn.Embedding) else None


def layer_cut(item: Any) -> tuple[Any, bool]:
    """Return the layer of an item of a group, and whether its outputs are cut."""
    return item.dep.target.module, item.dep.handler.__name__ == "prune_out_channels"


def places_of(item: Any) -> list[Place | None]:
    """Return the line that each index of an item of a group cuts; None where `cut_side` has none."""
    side = cut_side(*layer_cut(item))
    return [None if side is None else (*side, int(index)) for index in item.idxs]


def cut_places(group: Any) -> dict[int, set[Place]]:
    """Return root channel -> the lines that leave with it.

    Raises:
        UnscoredError: an index is of no root channel, so that what leaves with which is not known.
    """
    found: dict[int, set[Place]] = {}
    for number in range(len(group)):
        for place, channel in zip(places_of(group[number]), group[number].root_idxs, strict=True):
            if place is not None and channel is None:
                raise UnscoredError("Torch-Pruning does not say which channels leave together", warn=True)
            if place is not None:
                found.setdefault(channel, set()).add(place)
    return found
