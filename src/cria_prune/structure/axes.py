"""The index algebra: every position of every tensor dimension carries the atom that it belongs to.

An *atom* is an integer. A dimension of n positions is either None (fixed: batch, space, model
input) or an (n,) int64 array of atoms. An operation ties atoms together (they leave together),
freezes them (they cannot leave), or notes an assumption about them (they can leave if a trial cut
shows that the forward adapts). Concatenation, slicing, tiling and padding of a dimension are then
plain array operations. A dimension that splits into several, or several that merge into one, are a
*grid*: see `grids.py`. The units are the connected components at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cria_prune.structure.grids import Grid, components, resolve_grids

Dim = np.ndarray | None
Axes = list[Dim]


class Units:
    """Atoms, the ties between them, the grids, and the reasons that keep some of them in place."""

    def __init__(self) -> None:
        self.count = 0
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._grids: list[Grid] = []
        self._frozen: list[tuple[np.ndarray, str]] = []
        self._fixed: list[tuple[np.ndarray, str]] = []
        self._assumed: list[tuple[np.ndarray, str]] = []
        self._marked: dict[str, list[np.ndarray]] = {}

    def fresh(self, size: int) -> np.ndarray:
        """Return `size` new atoms."""
        atoms = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return atoms

    def tie(self, first: Dim, second: Dim, reason: str) -> Dim:
        """Tie two dimensions position by position; a fixed one freezes the other with `reason`."""
        if first is None or second is None:
            labelled = second if first is None else first
            self.freeze(labelled, reason)
            return labelled
        if len(first) != len(second):
            raise AssertionError(
                f"dimensions of {len(first)} and {len(second)} positions are tied ({reason})"
            )
        if first is not second:
            self._ties.append((first, second))
        return first

    def freeze(self, atoms: Dim, reason: str) -> None:
        """Keep these atoms, and all that are tied to them, in place."""
        if atoms is not None and atoms.size:
            self._frozen.append((atoms.ravel(), reason))

    def fix(self, atoms: Dim, reason: str) -> None:
        """Keep these atoms in place, with a reason that yields to any other: one dimension of a grid."""
        if atoms is not None and atoms.size:
            self._fixed.append((atoms.ravel(), reason))

    def assume(self, atoms: Dim, reason: str) -> None:
        """Note that removing these atoms is right only if `reason` holds."""
        if atoms is not None and atoms.size:
            self._assumed.append((atoms.ravel(), reason))

    def mark(self, atoms: Dim, name: str) -> None:
        """Say what these atoms are, such as `residual`, `head`, `gated`, `normed`."""
        if atoms is not None and atoms.size:
            self._marked.setdefault(name, []).append(atoms.ravel())

    def split(self, flat: Dim, sizes: Sequence[int]) -> Axes:
        """Split a dimension into several; which of them holds the units is decided by what follows."""
        if flat is None or len(sizes) == 1:
            return [flat] * len(sizes)
        grid = flat.reshape(sizes)
        varies = [axis for axis in range(len(sizes)) if (grid != grid.take([0], axis)).any()]
        result: Axes = [None] * len(sizes)
        constant = tuple(axis for axis in range(len(sizes)) if axis not in varies)
        grid = grid[tuple(0 if axis in constant else slice(None) for axis in range(len(sizes)))]
        if len(varies) < 2:
            if varies:
                result[varies[0]] = grid
            return result
        factors = tuple(self.fresh(sizes[axis]) for axis in varies)
        self._grids.append(Grid(grid, factors))
        for axis, factor in zip(varies, factors, strict=True):
            result[axis] = factor
        return result

    def merge(self, factors: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """Merge several dimensions into one; fixed ones repeat the units."""
        labelled = [axis for axis, item in enumerate(factors) if item is not None]
        if not labelled:
            return None
        held = [np.asarray(factors[axis]) for axis in labelled]
        inner = [size if axis in labelled else 1 for axis, size in enumerate(sizes)]
        if len(held) == 1:
            grid = held[0]
        else:
            grid = self.fresh(int(np.prod([len(item) for item in held]))).reshape(
                [len(item) for item in held]
            )
            self._grids.append(Grid(grid, tuple(held)))
        return np.broadcast_to(grid.reshape(inner), sizes).ravel()

    def resolve(self) -> Resolved:
        """Return the connected components with their reasons; the first reason noted is kept."""
        classes = components(self.count, self._ties)
        frozen: dict[int, str] = {}
        for atoms, reason in self._frozen:
            for item in np.unique(classes[atoms]).tolist():
                frozen.setdefault(item, reason)
        weak: dict[int, str] = {}
        for atoms, reason in self._fixed:
            for item in np.unique(classes[atoms]).tolist():
                weak.setdefault(item, reason)
        grids = [
            Grid(classes[grid.flat], tuple(classes[item] for item in grid.factors)) for grid in self._grids
        ]
        heads = classes[np.concatenate([np.zeros(0, dtype=np.int64), *self._marked.get("head", [])])]
        labels, frozen = resolve_grids(grids, int(classes.max(initial=-1)) + 1, frozen, weak, heads)
        classes = labels[classes]
        assumed: dict[int, tuple[str, ...]] = {}
        for atoms, reason in self._assumed:
            for item in np.unique(classes[atoms]).tolist():
                if reason not in assumed.get(item, ()):
                    assumed[item] = (*assumed.get(item, ()), reason)
        marks = {
            name: set(np.unique(classes[np.concatenate(parts)]).tolist())
            for name, parts in self._marked.items()
        }
        return Resolved(classes, frozen, assumed, marks)


@dataclass(frozen=True)
class Resolved:
    """Units after all ties.

    Attributes:
        classes: (atoms,) the unit of each atom.
        frozen: unit -> why it stays; assumed: unit -> what a trial cut has to show.
        marks: name -> the units that were marked so.
    """

    classes: np.ndarray
    frozen: dict[int, str]
    assumed: dict[int, tuple[str, ...]]
    marks: dict[str, set[int]]

    def marked(self, units: list[int], name: str) -> bool:
        """Say whether any of these units was marked with a name."""
        return not self.marks.get(name, set()).isdisjoint(units)


def reshape_segments(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of input and output dimensions with equal products; dimensions of one are left out.

    >>> reshape_segments([2, 64, 2, 2], [2, 256])
    [([0], [0]), ([1, 2, 3], [1])]
    """
    ins = [index for index, size in enumerate(before) if size != 1]
    outs = [index for index, size in enumerate(after) if size != 1]
    segments: list[tuple[list[int], list[int]]] = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        have, want = before[left[0]], after[right[0]]
        while have != want:
            if have < want:
                left.append(ins.pop(0))
                have *= before[left[-1]]
            else:
                right.append(outs.pop(0))
                want *= after[right[-1]]
        segments.append((left, right))
    return segments


def common_factors(before: list[int], after: list[int]) -> list[tuple[int, int, int]] | None:
    """Return the coarsest factors of two shapes of one segment: (size, input index, output index) each.

    None where the boundaries of the two shapes do not divide each other.

    >>> common_factors([2, 12], [6, 4])
    [(2, 0, 0), (3, 1, 0), (4, 1, 1)]
    >>> common_factors([4, 6], [6, 4]) is None
    True
    """
    ends = [np.cumprod(before).tolist(), np.cumprod(after).tolist()]
    factors, last = [], 1
    for end in sorted({*ends[0], *ends[1]}):
        if end % last:
            return None
        left, right = (next(index for index, item in enumerate(side) if item >= end) for side in ends)
        factors.append((end // last, left, right))
        last = end
    return factors
