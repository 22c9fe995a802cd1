"""Grids: one dimension of units seen as several, as when a projection splits into heads × head size.

What is removed must leave a rectangle, so the positions along all but one dimension of a grid leave
together. Which one stays free is often not known where the split happens, only from what follows:
the head size is summed over by the attention's product, the `3` of a fused projection is unbound.
So each dimension gets atoms of its own, and the grids are resolved at the end, when it is known
which of them are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True)
class Grid:
    """Atoms of a flat dimension, arranged (n1, n2, ...), and of its factors (n1,), (n2,), ..."""

    flat: np.ndarray
    factors: tuple[np.ndarray, ...]

    def ties(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ties if the units lie along `axis`."""
        sizes = [-1 if index == axis else 1 for index in range(self.flat.ndim)]
        rows = np.broadcast_to(self.factors[axis].reshape(sizes), self.flat.shape)
        return self.flat.ravel(), rows.ravel()


def components(count: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return (count,) labels of the connected components."""
    empty = np.zeros(0, dtype=np.int64)
    rows = np.concatenate([empty, *(first for first, _ in ties)])
    cols = np.concatenate([empty, *(second for _, second in ties)])
    links = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(count, count))
    return connected_components(links, directed=False)[1].astype(np.int64)


class State:
    """Labels so far, and the reasons of the frozen ones; strong reasons win over weak ones."""

    def __init__(self, count: int, frozen: dict[int, str], weak: dict[int, str]) -> None:
        self.labels = np.arange(count)
        self.strong, self.weak = dict(frozen), dict(weak)

    def reason(self, atoms: np.ndarray) -> tuple[bool, str] | None:
        """Return (is strong, reason) if every one of these atoms is frozen."""
        units = self.labels[np.unique(atoms)].tolist()
        if not all(unit in self.strong or unit in self.weak for unit in units):
            return None
        strong = next((self.strong[unit] for unit in units if unit in self.strong), None)
        return (True, strong) if strong is not None else (False, self.weak[units[0]])

    def freeze(self, atoms: np.ndarray, reason: tuple[bool, str]) -> None:
        """Freeze atoms."""
        table = self.strong if reason[0] else self.weak
        for unit in np.unique(self.labels[atoms]).tolist():
            table.setdefault(unit, reason[1])

    def tie(self, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Join labels, and what was said of them."""
        pairs = [(self.labels[first], self.labels[second]) for first, second in ties]
        joined = components(int(self.labels.max(initial=-1)) + 1, pairs)
        for name in ("strong", "weak"):
            moved: dict[int, str] = {}
            for unit, reason in getattr(self, name).items():
                moved.setdefault(int(joined[unit]), reason)
            setattr(self, name, moved)
        self.labels = joined[self.labels]


def resolve_grids(
    grids: Sequence[Grid], count: int, frozen: dict[int, str], weak: dict[int, str], heads: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """Decide for every grid along which dimension its units lie.

    A grid with one free dimension (not all frozen) takes it; with none it is frozen. Where several
    stay free, one of heads or that is the units of another grid is taken, else the longest, else the
    outermost.

    Args:
        grids: of labels below `count`.
        frozen, weak: label -> why it stays, strongly or weakly.
        heads: labels along which two activations met in an attention.

    Returns:
        (count,) a unit for each of the given labels, and unit -> why it is frozen.
    """
    state = State(count, frozen, weak)
    chosen = heads  # labels that are the units of some grid
    waiting = list(grids)
    while waiting:
        undecided, ties = [], []
        for grid in waiting:
            axis = _free_axis(grid, state)
            if axis is None:
                undecided.append(grid)
            elif axis >= 0:
                ties.append(grid.ties(axis))
                chosen = np.append(chosen, grid.factors[axis])
        if len(undecided) == len(waiting):
            _choose(undecided, state, chosen)
        state.tie(ties)
        waiting = undecided
    return state.labels, {**state.weak, **state.strong}


def _free_axis(grid: Grid, state: State) -> int | None:
    """Return the axis of the units, None if it is open, -1 if the grid is frozen (which is then noted)."""
    whole = state.reason(grid.flat)
    if whole is not None:
        for factor in grid.factors:
            state.freeze(factor, whole)
        return -1
    reasons = [state.reason(factor) for factor in grid.factors]
    free = [axis for axis, reason in enumerate(reasons) if reason is None]
    if not free:
        found = [reason for reason in reasons if reason is not None]
        state.freeze(grid.flat, next((reason for reason in found if reason[0]), found[0]))
        return -1
    return free[0] if len(free) == 1 else None


def _choose(grids: Sequence[Grid], state: State, chosen: np.ndarray) -> None:
    """Of the first grid that touches units of another one, else of the first, fix all axes but one."""
    known = set(state.labels[chosen].tolist())

    def free(grid: Grid) -> list[int]:
        return [axis for axis, factor in enumerate(grid.factors) if state.reason(factor) is None]

    def touching(grid: Grid) -> list[int]:
        return [
            axis for axis in free(grid) if not known.isdisjoint(state.labels[grid.factors[axis]].tolist())
        ]

    grid = next((grid for grid in grids if touching(grid)), grids[0])
    axes = touching(grid) or free(grid)
    axis = max(axes, key=lambda item: (len(grid.factors[item]), -item))
    for other in free(grid):
        if other != axis:
            state.freeze(grid.factors[other], (False, "shares its positions with other units"))
