"""The index algebra: every position of every tensor dimension carries the atom that it belongs to.

An *atom* is an integer. A dimension of n positions is either None (fixed: batch, space, model
input) or an (n,) int64 array of atoms. An operation ties atoms together (they leave together),
freezes them (they cannot leave), or notes an assumption about them (they can leave if a trial cut
shows that the forward adapts). Concatenation, slicing, flattening, tiling and padding of a
dimension are then plain array operations, and the units are the connected components at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Dim = np.ndarray | None
Axes = list[Dim]


class Units:
    """Atoms, the ties between them, and the reasons that keep some of them in place."""

    def __init__(self) -> None:
        self.count = 0
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._frozen: list[tuple[np.ndarray, str]] = []
        self._assumed: list[tuple[np.ndarray, str]] = []
        self._summed: list[np.ndarray] = []

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

    def assume(self, atoms: Dim, reason: str) -> None:
        """Note that removing these atoms is right only if `reason` holds."""
        if atoms is not None and atoms.size:
            self._assumed.append((atoms.ravel(), reason))

    def sum(self, atoms: Dim) -> None:
        """Note that these atoms are the width of a sum of two branches: a residual stream."""
        if atoms is not None:
            self._summed.append(atoms.ravel())

    def resolve(self) -> Resolved:
        """Return the connected components with their reasons; the first reason noted is kept."""
        if self._ties:
            rows = np.concatenate([first for first, _ in self._ties])
            cols = np.concatenate([second for _, second in self._ties])
        else:
            rows = cols = np.zeros(0, dtype=np.int64)
        links = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(self.count, self.count))
        _, classes = connected_components(links, directed=False)
        frozen: dict[int, str] = {}
        for atoms, reason in self._frozen:
            for item in np.unique(classes[atoms]).tolist():
                frozen.setdefault(item, reason)
        assumed: dict[int, tuple[str, ...]] = {}
        for atoms, reason in self._assumed:
            for item in np.unique(classes[atoms]).tolist():
                if reason not in assumed.get(item, ()):
                    assumed[item] = (*assumed.get(item, ()), reason)
        summed = np.unique(classes[np.concatenate(self._summed)]) if self._summed else np.zeros(0)
        return Resolved(classes.astype(np.int64), frozen, assumed, {int(unit) for unit in summed})


@dataclass(frozen=True)
class Resolved:
    """Units after all ties.

    Attributes:
        classes: (atoms,) the unit of each atom.
        frozen: unit -> why it stays; assumed: unit -> what a trial cut has to show.
        summed: units of residual streams.
    """

    classes: np.ndarray
    frozen: dict[int, str]
    assumed: dict[int, tuple[str, ...]]
    summed: set[int]


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
