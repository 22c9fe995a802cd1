"""Unit groups: the parameter slices that leave a network together; and which groups are alike."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast, get_args

import numpy as np

from cria_prune.structure.account import LAST, Account, Held, account
from cria_prune.structure.calls import SizedCall
from cria_prune.structure.table import Row, Status, plain

Role = Literal["produces", "consumes", "follows", "picks"]
Site = str
"""Where a signal is read: `output`, `input` or `rows`; with the number of a view of the weight, `input:1`."""
ENDS = ("output", "input", "rows")


def site_of(end: str, view: int) -> Site:
    """Return the site at one end of the operation that reads a view of a weight.

    >>> site_of("input", 0), site_of("input", 2)
    ('input', 'input:2')
    """
    return f"{end}:{view}" if view else end


def end_of(site: Site) -> str:
    """Return which end of an operation a site is.

    >>> end_of("output:1")
    'output'
    """
    return site.partition(":")[0]


@dataclass(frozen=True)
class ParameterSlice:
    """Where a group's units lie in one tensor of the model.

    Attributes:
        tensor: qualified name of a parameter or buffer.
        dim: the dimension that the units lie along.
        positions: (units, width) int64, the positions of each unit along `dim`.
        role: `produces` (output dimension of a weight), `consumes` (a dimension that the
            weight sums over), `follows` (bias, batch norm statistics, depthwise filters), or `picks`
            (an index that a buffer holds: its values are positions too).
    """

    tensor: str
    dim: int
    positions: np.ndarray
    role: Role


@dataclass(frozen=True)
class Tap:
    """Where a signal of a group can be read while the model runs.

    Attributes:
        tensor: the operation is the one that is called with this parameter or buffer
            (a weight, or for a batch norm its weight, else its running mean).
        site: read the operation's `output` (input-side signal, before the activation)
            or its data `input` (output-side signal), or the `rows` that an embedding picks
            (input-side; the same weight may also be used in a product). Where an operation
            reads a view of the parameter (a slice, its transpose) the site says which one.
        dim: the dimension of that activation along which the units lie.
        positions: (units, width) int64, positions of each unit along `dim`.
    """

    tensor: str
    site: Site
    dim: int
    positions: np.ndarray


Sight = Literal["", "made", "enters"]


@dataclass(frozen=True)
class Count:
    """An attribute of a module that counts units, to be restated when some of them leave.

    Attributes:
        module: qualified name of the module; `` for the model itself.
        name: the attribute; `config.<field>` is a field of the module's configuration.
        place: which count it is; the contributions of several groups to one place add up.
        width: what the attribute loses with each unit.
        value: how many there are at this place now.
        said: what the attribute says now; several places may disagree, and it is then left.
        sure: its name says what it counts; otherwise it is restated only where a trial cut fails
            without that.
        sight: a tensor of this size is made in the module's sight, or enters it, and no operation counts its
            units; see `structure.checked`.
    """

    module: str
    name: str
    place: str
    width: int
    value: int
    said: int
    sure: bool
    sight: Sight = ""


@dataclass(frozen=True, repr=False)
class UnitGroup:
    """Units that can be removed one by one, each with all its parameter slices.

    Attributes:
        name: the module that produces the first slice; stable over rounds.
        kind: `channel` (convolution), `neuron` (fully connected), `gated` (a neuron that is the
            product of two), `head` (attention), `kv group` (a key-value head with its query heads),
            `experts` (whole experts of a layer with their rows of the router),
            or `residual` (the width of a stream that skips: of a sum of branches one of which goes
            around a layer of another, see `structure/skips.py`).
        size: units now; `original_size`: units in the dense model.
        slices: what leaves with a unit.
        inputs: taps of the input-side signal; outputs: taps of the output-side signal.
        frozen: why the group cannot be pruned, or None.
        assumes: what a trial cut has to show before the group may be pruned.
        counts: attributes of modules that say how many units there are.
        normed: a normalisation takes its statistics over the units, so that the others change
            when some leave: verified by the twin of operations, see `surgery/verify.py`.
        restated: modules whose calls get their sizes restated when some units leave, see `base.sizes`.
        multiple: of what a number of units that stay has to be, for a kernel to take it.
        least: units that have to stay: as many experts as a router picks for each token, else one.
    """

    name: str
    kind: str
    size: int
    original_size: int
    slices: tuple[ParameterSlice, ...]
    inputs: tuple[Tap, ...] = ()
    outputs: tuple[Tap, ...] = ()
    frozen: str | None = None
    assumes: tuple[str, ...] = ()
    counts: tuple[Count, ...] = ()
    normed: bool = False
    restated: tuple[str, ...] = ()
    multiple: int = 1
    least: int = 1

    def __repr__(self) -> str:
        before = f" of {self.original_size}" if self.size < self.original_size else ""
        frozen = f", frozen: {self.frozen}" if self.frozen else ""
        return f"UnitGroup({self.name!r}, {self.kind}, {self.size}{before} units{frozen})"

    @property
    def whole(self) -> str | None:
        """Why no unit can leave, or None."""
        if self.frozen is None and self.size <= self.least:
            return LAST if self.least == 1 else f"has {self.size} units, and {self.least} always stay"
        return self.frozen

    @property
    def producers(self) -> tuple[ParameterSlice, ...]:
        """Slices along output dimensions of weights."""
        return tuple(item for item in self.slices if item.role == "produces")

    def shares(self, item: ParameterSlice) -> bool:
        """Say whether others do the work of a unit's slice when it leaves: the weights of a whole expert."""
        return self.kind == "experts" and item.role == "follows"

    @property
    def consumers(self) -> tuple[ParameterSlice, ...]:
        """Slices along dimensions that a weight sums over."""
        return tuple(item for item in self.slices if item.role == "consumes")


@dataclass(frozen=True, repr=False)
class UnitGroups:
    """The structure of a model: its groups and what they cost; prints as a table that fits a screen.

    Attributes:
        groups: every group, frozen ones too, in the order of the network.
        shapes: shape of every parameter and buffer that a group touches or that is counted.
        parameters: names of the parameters (each counted once; tied names appear once).
        positions: weight name -> multiply-accumulates per element of that weight and example,
            so that MACs = sum over weights of positions * elements.
        embeddings: names of the parameters that rows are picked from (tokens, positions, types), and
            of an output layer as large as the token embedding.
        loose: parameter -> dimension that no group touches -> why it has no units; -1 is the parameter.
        calls: calls of the model's code that ask for sizes which follow from units.
        notes: what to know of how the structure was found, a line each: operations of one run only,
            parameters that no forward reads, a training mode that was not tried.
    """

    groups: tuple[UnitGroup, ...]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    positions: Mapping[str, float]
    embeddings: tuple[str, ...] = ()
    loose: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    calls: tuple[SizedCall, ...] = ()
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[UnitGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> UnitGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; known: {', '.join(group.name for group in self.groups)}")

    @property
    def prunable(self) -> tuple[UnitGroup, ...]:
        """The groups that are not frozen and have more units than always stay."""
        return tuple(group for group in self.groups if group.whole is None)

    @property
    def recorded(self) -> tuple[UnitGroup, ...]:
        """The prunable groups whose units have signals of their own: all but whole experts."""
        return tuple(group for group in self.prunable if group.kind != "experts")

    def rows(self) -> tuple[Row, ...]:
        """Return what is printed of each group, in the order of the network."""
        prunable = {group.name for group in self.prunable}
        return tuple(self._row(group, group.name in prunable) for group in self.groups)

    def account(self, floor: float = 0.0, least: Mapping[str, int] | None = None) -> Account:
        """Return what becomes of every parameter: what can leave, and why the rest stays.

        The shares of the entries add up to one; each says what would let its parameters leave.

        Args:
            floor: share of each group's units that always stays; one unit does anyway.
            least: group name -> units that always stay, in place of what the floor says.
        """
        least, held = least or {}, []
        for group in self.groups:
            reason = group.whole
            places = tuple((item.tensor, item.dim, item.positions) for item in group.slices)
            stays = least.get(group.name, least_kept(group, floor))
            held.append(Held(group.name, group.size, reason, stays, places))
        return account(held, self.shapes, self.parameters, self.loose)

    def __str__(self) -> str:
        rows, sizes = self.rows(), {name: math.prod(shape) for name, shape in self.shapes.items()}
        parameters = sum(sizes[name] for name in self.parameters)
        macs = sum(times * sizes[name] for name, times in self.positions.items())
        counts = Counter(row.status for row in rows)
        said = [status for status in get_args(Status) if status != "experts" or counts[status]]
        head = ", ".join(f"{counts[status]} {status}" for status in said)
        lines = [f"groups: {head}; {parameters:,} parameters, {macs:,.0f} MACs per example", plain(rows)]
        return "\n".join([*lines, *self.notes])

    def __repr__(self) -> str:
        return f"UnitGroups({len(self.prunable)} of {len(self)} groups prunable)"

    def _row(self, group: UnitGroup, prunable: bool) -> Row:
        status: Status = "frozen"
        parameters, macs = self._unit_costs(group) if prunable else (None, None)
        if prunable:
            status = cast(Status, group.kind) if group.kind in ("residual", "experts") else "prunable"
        return Row(
            name=group.name,
            kind=group.kind,
            units=group.size,
            status=status,
            frozen=group.whole,
            parameters_per_unit=parameters,
            macs_per_unit=macs,
            producers=tuple(sorted({item.tensor for item in group.producers})),
            consumers=tuple(
                sorted(
                    {item.tensor for item in group.consumers}
                    | {
                        item.tensor
                        for item in group.slices
                        if group.shares(item) and item.tensor in self.positions
                    }
                )
            ),
        )

    def _unit_costs(self, group: UnitGroup) -> tuple[int, float]:
        """Return the parameters, and the multiply-accumulates per example, that leave with one unit alone."""
        removed = removed_positions([group], {group.name: range(group.size - 1)})
        before = {tensor: self.shapes[tensor] for tensor, _ in removed}
        after = shrunk_shapes(before, removed)
        gone = {tensor: math.prod(before[tensor]) - math.prod(after[tensor]) for tensor in before}
        shared = {item.tensor for item in group.slices if group.shares(item)}
        macs = sum(gone[tensor] * self.positions.get(tensor, 0.0) for tensor in gone if tensor not in shared)
        return sum(gone[tensor] for tensor in gone if tensor in self.parameters), float(macs)


def least_kept(group: UnitGroup, floor: float) -> int:
    """Return how many units always stay: max(least, ceil(floor * original size)), at most all of now.

    Where a kernel takes multiples only it is the next of them.
    """
    # 0.07 · 100 is 7.000000000000001 in floating point, and 8 units would stay.
    least = max(group.least, math.ceil(floor * group.original_size - 1e-9))
    return min(group.size, -(-least // group.multiple) * group.multiple)


def without_residual(groups: UnitGroups) -> UnitGroups:
    """Return the groups with every residual width frozen: it is pruned only when asked for."""
    reason = "residual width is pruned only when asked for (residual=True)"
    return freeze(groups, lambda group: reason if group.kind == "residual" else None)


def without_experts(groups: UnitGroups) -> UnitGroups:
    """Return the groups with whole experts frozen: they are pruned only when asked for."""
    reason = "whole experts are removed only when asked for (experts=True)"
    return freeze(groups, lambda group: reason if group.kind == "experts" else None)


def freeze(groups: UnitGroups, reason: Callable[[UnitGroup], str | None]) -> UnitGroups:
    """Return the groups with those frozen for which `reason` says one; an earlier reason stays."""
    return replace(
        groups, groups=tuple(replace(group, frozen=group.frozen or reason(group)) for group in groups)
    )


def removed_positions(
    groups: Sequence[UnitGroup], kept: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], np.ndarray]:
    """Positions that leave each (tensor, dim) when only the `kept` units of the named groups stay."""
    removed: dict[tuple[str, int], list[np.ndarray]] = {}
    for group in groups:
        if group.name in kept:
            gone = _gone(group, kept)
            for item in group.slices:
                removed.setdefault((item.tensor, item.dim), []).append(item.positions[gone].ravel())
    return {key: np.unique(np.concatenate(parts)) for key, parts in removed.items()}


def counted_values(
    groups: Sequence[UnitGroup], kept: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str, str], int]:
    """Return (module, attribute, place) -> what it counts when only the `kept` units stay; sure ones only."""
    values: dict[tuple[str, str, str], int] = {}
    for group in groups:
        gone = group.size - len(kept.get(group.name, range(group.size)))
        for item in group.counts:
            if item.sure:
                key = (item.module, item.name, item.place)
                values[key] = values.get(key, item.value) - gone * item.width
    return values


def said_values(
    groups: Sequence[UnitGroup], kept: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Return (module, attribute) -> (what it says now, what it says when only the `kept` units stay).

    An attribute whose places then disagree (layers of one configuration) is left as it is.
    """
    now = {(item.module, item.name): item.said for group in groups for item in group.counts}
    after: dict[tuple[str, str], set[int]] = {}
    for (module, name, _), value in counted_values(groups, kept).items():
        after.setdefault((module, name), set()).add(value)
    return {key: (now[key], min(values) if len(values) == 1 else now[key]) for key, values in after.items()}


def shrink(groups: UnitGroups, kept: Mapping[str, Sequence[int]]) -> UnitGroups:
    """Return the groups of the model after only the `kept` units (indices now) of the named groups stay."""
    removed = removed_positions(groups.groups, kept)
    read: dict[tuple[str, Site, int], list[np.ndarray]] = {}
    for group in groups:
        gone = _gone(group, kept)
        for tap in (*group.inputs, *group.outputs):
            read.setdefault((tap.tensor, tap.site, tap.dim), []).append(tap.positions[gone].ravel())
    left = {key: np.unique(np.concatenate(parts)) for key, parts in read.items()}
    values, said = counted_values(groups.groups, kept), said_values(groups.groups, kept)

    def smaller(group: UnitGroup) -> UnitGroup:
        stays = np.asarray(kept.get(group.name, range(group.size)), dtype=np.int64)

        def renumbered(positions: np.ndarray, gone: np.ndarray | None) -> np.ndarray:
            # Several groups may leave one dimension. A position
            # moves down by all that left before it, whoever left.
            rows = positions[stays]
            return rows if gone is None else rows - np.searchsorted(gone, rows)

        inputs, outputs = (
            tuple(
                replace(tap, positions=renumbered(tap.positions, left[tap.tensor, tap.site, tap.dim]))
                for tap in side
            )
            for side in (group.inputs, group.outputs)
        )
        slices = tuple(
            replace(item, positions=renumbered(item.positions, removed.get((item.tensor, item.dim))))
            for item in group.slices
        )
        counts = tuple(
            replace(
                item, value=values[item.module, item.name, item.place], said=said[item.module, item.name][1]
            )
            for item in group.counts
            if item.sure
        )
        return replace(group, size=len(stays), slices=slices, inputs=inputs, outputs=outputs, counts=counts)

    shapes = shrunk_shapes(groups.shapes, removed)
    positions = dict(groups.positions)
    for group in groups:
        for item in group.slices:
            if group.shares(item) and item.tensor in positions:  # as many rows as before, for fewer experts
                before, after = (table[item.tensor][item.dim] for table in (groups.shapes, shapes))
                positions[item.tensor] *= before / after
    calls = tuple(call.without(units_gone(groups, kept)) for call in groups.calls)
    return replace(
        groups, groups=tuple(map(smaller, groups)), shapes=shapes, calls=calls, positions=positions
    )


def units_gone(groups: UnitGroups, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return group name -> how many units leave when only the `kept` ones stay, of groups that lose some."""
    sizes = {group.name: group.size for group in groups}
    return {name: sizes[name] - len(stays) for name, stays in kept.items() if len(stays) < sizes[name]}


def _gone(group: UnitGroup, kept: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Return the units of a group that leave."""
    stays = np.asarray(kept.get(group.name, range(group.size)), dtype=np.int64)
    return np.setdiff1d(np.arange(group.size), stays)


def shrunk_shapes(
    shapes: Mapping[str, tuple[int, ...]], removed: Mapping[tuple[str, int], np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor without the `removed` positions of its dimensions."""
    after = {name: list(shape) for name, shape in shapes.items()}
    for (tensor, dim), gone in removed.items():
        after[tensor][dim] -= len(gone)
    return {name: tuple(shape) for name, shape in after.items()}


def alike(groups: Iterable[UnitGroup]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the groups by class: the same layer of different blocks.

    Groups are alike that have the same kind, the same number of units and the same name once its
    digits are taken out. Every group is in one class, in the order of the groups.

    Examples:
        >>> blocks = [UnitGroup(f"layer.{number}.fc", "neuron", 8, 8, ()) for number in (0, 1)]
        >>> alike([*blocks, UnitGroup("pooler", "neuron", 8, 8, ())])
        (('layer.0.fc', 'layer.1.fc'), ('pooler',))
    """
    classes: dict[Hashable, list[str]] = {}
    for group in groups:
        key = (group.kind, group.size, re.sub(r"\d+", "*", group.name))
        classes.setdefault(key, []).append(group.name)
    return tuple(map(tuple, classes.values()))


def counted_together(groups: Iterable[UnitGroup]) -> tuple[tuple[str, ...], ...]:
    """Return the classes of alike groups, those joined whose units one field of a configuration counts.

    The feed-forward layers of an encoder and of its decoder are two classes of `alike`; where one
    `d_ff` says the width of both, they are one here. Only classes of as many units are joined.
    """
    named = {group.name: group for group in groups}
    joined: list[tuple[set[Hashable], list[str]]] = []
    for names in alike(named.values()):
        members = [named[name] for name in names]
        fields: set[Hashable] = {
            (group.size, item.module, item.name, item.said)
            for group in members
            for item in group.counts
            if item.sure and item.name.startswith("config.")
        }
        # One class may share a field with two that share none: all three become one.
        same = [entry for entry in joined if entry[0] & fields]
        joined = [entry for entry in joined if entry not in same]
        merged = [name for _, earlier in same for name in earlier]
        joined.append((fields.union(*(earlier for earlier, _ in same)), [*merged, *names]))
    order = {name: number for number, name in enumerate(named)}
    classes = [tuple(sorted(names, key=order.__getitem__)) for _, names in joined]
    return tuple(sorted(classes, key=lambda names: order[names[0]]))
