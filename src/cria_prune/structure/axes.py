"""The index algebra: every position of every tensor dimension carries the atom that it belongs to.

Legend: an atom is a whole number, one for each position of each dimension of a
parameter. `Dim`: the atoms (n,) of one dimension of an activation, None where it is
fixed. A tie says that two atoms leave together, a unit is a connected component of ties,
a grid is a dimension that is a product of others. See docs/decisions/0001 and 0005.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        # Each flat position is tied to the one position of the axis
        # that it lies over: along the others all leave together.
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
        # A dimension with a frozen part still holds units (a stream to which channels
        # are padded), so only one that is frozen as a whole is out of the question.
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
    # A grid that is decided ties and freezes labels that others look at, so the rest is looked at again.
    # A choice is made only where none decides itself, for one grid, and may then decide the others.
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
    # Reasons go both ways, from the flat dimension to its
    # factors and back, so that every unit can say why it stays.
    whole = state.reason(grid.flat)
    if whole is not None:
        for factor in grid.factors:
            state.freeze(factor, whole)
        return -1
    reasons = [state.reason(factor) for factor in grid.factors]
    free = [axis for axis, reason in enumerate(reasons) if reason is None]
    if not free:
        found = [reason for reason in reasons if reason is not None]
        # That a head's size is summed over says little. A strong
        # reason, such as an operation without a rule, goes first.
        state.freeze(grid.flat, next((reason for reason in found if reason[0]), found[0]))
        return -1
    return free[0] if len(free) == 1 else None


def _choose(grids: Sequence[Grid], state: State, chosen: np.ndarray) -> None:
    """Of the first grid that touches units of another one, else of the first, fix all axes but one."""
    # No place in the network tells which factor holds the units. Where heads met they
    # are heads, and what are units of another grid are units here. The outermost factor
    # alone would be right for heads, and wrong for a shuffle and for a fused projection.
    # Where this rule is wrong, a trial cut freezes the group (docs/decisions/0005).
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


Dim = np.ndarray | None
Axes = list[Dim]
NONE = np.zeros(0, dtype=np.int64)


class Units:
    """Atoms, the ties between them, the grids, and the reasons that keep some of them in place.

    Attributes:
        unread: what is followed now is read by nothing, so that it keeps nothing in place.
    """

    def __init__(self) -> None:
        self.count = 0
        self._starts: list[int] = []
        self._parents: dict[int, tuple[np.ndarray, ...]] = {}
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._grids: list[Grid] = []
        self._frozen: list[tuple[np.ndarray, str, str]] = []
        self._fixed: list[tuple[np.ndarray, str]] = []
        self._assumed: list[tuple[np.ndarray, str]] = []
        self._marked: dict[str, list[np.ndarray]] = {}
        self._made: dict[str, list[tuple[int, int]]] = {"spread": [], "factor": []}
        self._mixed: dict[int, np.ndarray] = {}
        self.unread = False

    def fresh(self, size: int, *parents: np.ndarray) -> np.ndarray:
        """Return `size` new atoms; `parents` are the atoms of the dimensions that they are a view of."""
        atoms = np.arange(self.count, self.count + size, dtype=np.int64)
        if size:
            self._starts.append(self.count)
            self._parents[self.count] = parents
        self.count += size
        return atoms

    def spread(self, size: int) -> np.ndarray:
        """Return new atoms of a dimension along which one position is repeated, as `expand` does it."""
        return self._noted("spread", self.fresh(size))

    def _noted(self, name: str, atoms: np.ndarray) -> np.ndarray:
        self._made[name].append((int(atoms[0]), self.count))
        return atoms

    def made_by(self, name: str, atoms: Dim) -> bool:
        """Say whether these atoms were made by a repetition (`spread`) or a reshape (`factor`)."""
        if atoms is None or not atoms.size:
            return False
        return any(start <= atoms.flat[0] < stop for start, stop in self._made[name])

    @property
    def ties(self) -> int:
        """How many ties were noted so far: a place in the order in which they came."""
        return len(self._ties)

    def blocks(self, atoms: np.ndarray) -> frozenset[int]:
        """Return the first atoms of the dimensions that some atoms were made for."""
        places = np.searchsorted(self._starts, np.unique(atoms), side="right") - 1
        return frozenset(self._starts[place] for place in np.unique(places).tolist())

    def origins(self, atoms: np.ndarray, ties: Iterable[int]) -> frozenset[int]:
        """Return the blocks that a dimension comes from: through views, and these ties.

        Args:
            atoms: of the dimension.
            ties: of the operations on weights alone, see `ties`; other ties say nothing of where a weight
                comes from.
        """
        neighbours: dict[int, set[int]] = {}
        for number in ties:
            first, second = map(self.blocks, self._ties[number])
            for one, other in ((first, second), (second, first)):
                for block in one:
                    neighbours.setdefault(block, set()).update(other)
        found, waiting = set[int](), [*self.blocks(atoms)]
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += neighbours.get(block, ())
                waiting += [item for parent in self._parents[block] for item in self.blocks(parent)]
        return frozenset(found)

    def tie(self, first: Dim, second: Dim, reason: str) -> Dim:
        """Tie two dimensions position by position; a fixed one freezes the other with `reason`."""
        if first is None or second is None:
            # A fixed dimension has no atoms that could leave, so what meets it cannot leave either.
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

    def freeze(self, atoms: Dim, reason: str, unless: str = "") -> None:
        """Keep these atoms, and all that are tied to them, in place; not those that are marked `unless`."""
        if atoms is not None and atoms.size and not self.unread:
            self._frozen.append((atoms.ravel(), reason, unless))

    def fix(self, atoms: Dim, reason: str) -> None:
        """Keep these atoms in place, with a reason that yields to any other: one dimension of a grid."""
        if atoms is not None and atoms.size and not self.unread:
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
        # Along an axis on which the atoms repeat (tiled, expanded) there are
        # no units. With one axis left there is nothing to decide, and no grid.
        varies = [axis for axis in range(len(sizes)) if (grid != grid.take([0], axis)).any()]
        result: Axes = [None] * len(sizes)
        constant = tuple(axis for axis in range(len(sizes)) if axis not in varies)
        grid = grid[tuple(0 if axis in constant else slice(None) for axis in range(len(sizes)))]
        if len(varies) < 2:
            if varies:
                result[varies[0]] = grid
            return result
        # A projection splits into heads × size, a fused one into 3 × heads ×
        # size, a shuffle into 2 × half. At the split these look alike; so
        # every factor gets atoms, and what the operations do to each decides.
        factors = tuple(self._noted("factor", self.fresh(sizes[axis], grid)) for axis in varies)
        self._grids.append(Grid(grid, factors))
        for axis, factor in zip(varies, factors, strict=True):
            result[axis] = factor
        return result

    def merge(self, factors: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """Merge several dimensions into one; fixed ones repeat the units."""
        labelled = [axis for axis, item in enumerate(factors) if item is not None]
        if not labelled:
            return None
        # A dimension along which units are repeated (a key-value head for each of its query
        # heads) holds none of its own, unless nothing else is there that could be a unit.
        own = [axis for axis in labelled if not self.made_by("spread", factors[axis])]
        labelled = own or labelled
        held = [np.asarray(factors[axis]) for axis in labelled]
        inner = [size if axis in labelled else 1 for axis, size in enumerate(sizes)]
        # A merge of several factors is the same question from the other side, so it makes a grid as well.
        if len(held) == 1:
            grid = held[0]
        else:
            sizes_held = [len(item) for item in held]
            grid = self.fresh(int(np.prod(sizes_held)), *held).reshape(sizes_held)
            self._grids.append(Grid(grid, tuple(held)))
        merged = np.broadcast_to(grid.reshape(inner), sizes).ravel()
        if any(axis not in labelled and size > 1 for axis, size in enumerate(sizes)):
            self._mixed[id(merged)] = merged
        return merged

    def is_mixed(self, atoms: np.ndarray) -> bool:
        """Say whether a dimension was merged from units and a fixed one, which may be the examples."""
        return id(atoms) in self._mixed

    def resolve(self) -> Resolved:
        """Return the connected components with their reasons; the first reason noted is kept."""
        # Ties come first: whether an axis of a grid is free depends
        # on all that is tied to it anywhere in the network.
        classes = components(self.count, self._ties)
        frozen, weak = dict[int, str](), dict[int, str]()
        spared = {
            name: set(np.unique(classes[np.concatenate(self._marked.get(name, [NONE]))]).tolist())
            for name in {unless for _, _, unless in self._frozen}
        }
        for grid in self._grids:  # experts in groups of a router are experts along each factor
            for units in spared.values():
                if units and units.issuperset(classes[grid.flat].ravel().tolist()):
                    units.update(int(unit) for factor in grid.factors for unit in classes[factor].tolist())
        for atoms, reason, unless in self._frozen:
            for item in np.unique(classes[atoms]).tolist():
                if item not in spared[unless]:
                    frozen.setdefault(item, reason)
        for atoms, reason in self._fixed:
            for item in np.unique(classes[atoms]).tolist():
                weak.setdefault(item, reason)
        grids = [
            Grid(classes[grid.flat], tuple(classes[item] for item in grid.factors)) for grid in self._grids
        ]
        heads = classes[np.concatenate([NONE, *self._marked.get("head", [])])]
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
    # Boundaries are compared as products from the left. Where one does not divide the next,
    # a position of the new shape takes from several of the old, and no factor passes whole.
    ends = [np.cumprod(before).tolist(), np.cumprod(after).tolist()]
    factors, last = [], 1
    for end in sorted({*ends[0], *ends[1]}):
        if end % last:
            return None
        left, right = (next(index for index, item in enumerate(side) if item >= end) for side in ends)
        factors.append((end // last, left, right))
        last = end
    return factors
