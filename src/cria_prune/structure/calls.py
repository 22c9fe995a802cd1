"""Calls of a model's code that ask for sizes, and the sizes that they have to give once units are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cria_prune.base.sizes import Operation, Size, Sizing
from cria_prune.structure.axes import Dim
from cria_prune.structure.rules.core import Factor, Sized


@dataclass(frozen=True)
class Extent:
    """How many positions a dimension has: `size` now, fewer by `widths[group]` for each unit that leaves."""

    size: int
    widths: Mapping[str, int]

    def without(self, gone: Mapping[str, int]) -> Extent:
        """Return it after so many units of the groups left."""
        lost = sum(width * gone.get(name, 0) for name, width in self.widths.items())
        return Extent(self.size - lost, self.widths)


@dataclass(frozen=True)
class SizedCall:
    """A call that asks for sizes.

    Attributes:
        module: qualified name of the module whose code calls; `` for the model itself.
        place: which of the captured operations it is.
        operation, passes, dim: see `base.sizes.Sizing`.
        takes, gives: the same as there, with extents in place of numbers.
    """

    module: str
    place: int
    operation: Operation
    takes: tuple[Extent | None, ...]
    gives: tuple[Extent | tuple[int, ...] | None, ...]
    passes: tuple[int | None, ...]
    dim: int = -1

    @property
    def groups(self) -> set[str]:
        """Names of the groups whose units it takes or gives."""
        return {
            name for item in (*self.takes, *self.gives) if isinstance(item, Extent) for name in item.widths
        }

    def without(self, gone: Mapping[str, int]) -> SizedCall:
        """Return it after so many units of the groups left."""
        takes = tuple(None if item is None else item.without(gone) for item in self.takes)
        gives = tuple(item.without(gone) if isinstance(item, Extent) else item for item in self.gives)
        return replace(self, takes=takes, gives=gives)

    def sizing(self) -> Sizing:
        """Return its numbers."""
        takes = tuple(None if item is None else item.size for item in self.takes)
        gives: tuple[Size, ...]
        gives = tuple(item.size if isinstance(item, Extent) else item for item in self.gives)
        return Sizing(self.operation, takes, gives, self.passes, self.dim)


def sized_calls(
    sized: Iterable[Sized], classes: np.ndarray, owner: Mapping[int, str]
) -> tuple[SizedCall, ...]:
    """Return the calls whose sizes follow from units.

    Args:
        sized: operations that ask for sizes; `classes`: (atoms,) the class of each atom.
        owner: class -> the group whose unit it is. A dimension without any is the input's.
    """
    found = []
    for place, item in enumerate(sized):
        # The number of examples or of positions may have atoms too (a table of positions has), and is
        # none of the model's. So sizes are given to what is made of dimensions that hold units, no others.
        holds = [
            atoms is not None and not owner.keys().isdisjoint(classes[atoms].tolist()) for atoms in item.takes
        ]
        takes = tuple(
            _extent(atoms, classes, owner) if held and dim not in item.mixed else None
            for dim, (atoms, held) in enumerate(zip(item.takes, holds, strict=True))
        )
        gives: list[Extent | tuple[int, ...] | None] = []
        for size in item.gives:
            if isinstance(size, Factor):
                extent = _extent(size.atoms, classes, owner)
                whole = all(takes[dim] is not None for dim in size.of)
                gives.append(extent if extent is not None and (extent.widths or whole) else None)
            else:
                gives.append(size if size is not None and any(holds[dim] for dim in size) else None)
        if any(size is not None for size in gives):
            passes = tuple(
                size[0] if isinstance(size, tuple) and len(size) == 1 else None for size in item.gives
            )
            found.append(SizedCall(item.module, place, item.operation, takes, tuple(gives), passes, item.dim))
    return tuple(found)


def _extent(atoms: Dim, classes: np.ndarray, owner: Mapping[int, str]) -> Extent | None:
    """Return how a dimension's size follows from its units; None where it follows from more than them."""
    if atoms is None:
        return None
    units, times = np.unique(classes[atoms], return_counts=True)
    widths: dict[str, set[int]] = {}
    for unit, count in zip(units.tolist(), times.tolist(), strict=True):
        if unit in owner:
            widths.setdefault(owner[unit], set()).add(count)
    if any(len(width) > 1 for width in widths.values()):
        return None
    return Extent(len(atoms), {name: min(width) for name, width in widths.items()})
