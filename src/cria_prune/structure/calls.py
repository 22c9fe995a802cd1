"""Calls of a model's code that ask for sizes, and the sizes that they have to give once units are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
        operation, dim: see `base.sizes.Sizing`.
        takes, gives: the same as there, with extents in place of numbers.
    """

    module: str
    place: int
    operation: Operation
    takes: tuple[Extent | None, ...]
    gives: tuple[Extent | tuple[int, ...] | None, ...]
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
        return SizedCall(self.module, self.place, self.operation, takes, gives, self.dim)

    def sizing(self) -> Sizing:
        """Return its numbers."""
        takes = tuple(None if item is None else item.size for item in self.takes)
        gives: tuple[Size, ...]
        gives = tuple(item.size if isinstance(item, Extent) else item for item in self.gives)
        return Sizing(self.operation, takes, gives, self.dim)


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
        extents = [_extent(atoms, classes, owner) for atoms in item.takes]
        # The number of examples or of positions may have atoms too (a table of positions has), and is
        # none of the model's. So sizes are given for factors of dimensions that hold units, no others.
        held = [extent is not None and bool(extent.widths) for extent in extents]
        takes = tuple(extent if holds else None for extent, holds in zip(extents, held, strict=True))
        gives: list[Extent | tuple[int, ...] | None] = []
        for size in item.gives:
            if isinstance(size, Factor):
                extent = _extent(size.atoms, classes, owner)
                known = extent is not None and (extent.widths or all(held[dim] for dim in size.of))
                gives.append(extent if known else None)
            else:
                gives.append(size)
        # A dimension of examples and heads in one holds units too, but its size is not known.
        counted = any(isinstance(size, Extent) for size in gives)
        if (any(held) or counted) and any(size is not None for size in gives):
            found.append(SizedCall(item.module, place, item.operation, takes, tuple(gives), item.dim))
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
