"""What a network costs, counted exactly from the shapes of its tensors.

A tensor of shape (n_0, n_1, ...) keeps, after k of the units of a group have left whose slice
along dimension d is `width` positions per unit, n_d - k * width positions along d. Groups never
share a position of one tensor dimension (checked here), so the count per tensor is a product of
such differences and no array is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from cria_prune.base.errors import StructureError, TargetError
from cria_prune.config import OF
from cria_prune.planning.latency import LatencyTable
from cria_prune.structure.groups import ParameterSlice, UnitGroups, least_kept

# Shares are quotients of exact counts; a target such as 3 * 0.1 misses them by a rounding error.
SLACK = 1e-12


class Cost(Protocol):
    """What numbers of units cost: parameters and MACs by `budget.Ledger`, seconds by `latency.Seconds`."""

    def count(self, kept: Mapping[str, int] | None = None) -> float:
        """Return the cost when `kept` units of the named groups stay, and all of the others."""

    def along(self, names: Sequence[str], counts: np.ndarray, kept: Mapping[str, int]) -> np.ndarray:
        """Return (n,) the cost of each number of units of these groups, up to a constant."""


class Ledger:
    """Counts a weighted number of elements for any number of kept units, without arrays.

    Args:
        groups: the structure now.
        weights: tensor name -> cost of one of its elements; tensors not named cost nothing.
        shared: what an expert did the others do when it leaves: each token still goes to as many (MACs).

    Raises:
        StructureError: two slices of prunable groups share a position of one tensor dimension.
    """

    def __init__(self, groups: UnitGroups, weights: Mapping[str, float], shared: bool = False) -> None:
        self._sizes = {group.name: group.size for group in groups.prunable}
        spans: dict[tuple[str, int], list[tuple[str, ParameterSlice]]] = {}
        for group in groups.prunable:
            for item in _distinct(group.slices):
                if item.tensor in weights and not (shared and group.shares(item)):
                    spans.setdefault((item.tensor, item.dim), []).append((group.name, item))
        for (tensor, dim), items in spans.items():
            _check_disjoint(tensor, dim, items)
        self._rows = [
            (
                weight,
                [
                    (n, [(name, item.positions.shape[1]) for name, item in spans.get((tensor, dim), ())])
                    for dim, n in enumerate(groups.shapes[tensor])
                ],
            )
            for tensor, weight in weights.items()
        ]
        self._touched: dict[str, list[int]] = {}
        for number, (_, dims) in enumerate(self._rows):
            for name in {name for _, terms in dims for name, _ in terms}:
                self._touched.setdefault(name, []).append(number)

    def count(self, kept: Mapping[str, int] | None = None) -> float:
        """Return the cost when `kept` units of the named groups stay, and all units of the others.

        Raises:
            StructureError: a group is unknown or frozen, or the number is not in 1..size.
        """
        removed = dict.fromkeys(self._sizes, 0)
        for name, stays in (kept or {}).items():
            if not 1 <= stays <= self._sizes.get(name, 0):
                raise StructureError(
                    f"Counting with {stays} units kept of group {name!r}",
                    f"found {self._sizes[name]} units"
                    if name in self._sizes
                    else "found no such prunable group",
                    "Keep between 1 and all units of prunable groups",
                )
            removed[name] = self._sizes[name] - stays
        return sum(
            weight * math.prod(n - sum(removed[name] * width for name, width in terms) for n, terms in dims)
            for weight, dims in self._rows
        )

    def along(self, names: Sequence[str], counts: np.ndarray, kept: Mapping[str, int]) -> np.ndarray:
        """Return what each of several numbers of units costs, but for what these groups do not touch.

        Differences of two of them are those of `count`, without a walk over all tensors.

        Args:
            names: prunable groups that keep the same number.
            counts: (n,) how many units each of them keeps.
            kept: the same for the other groups; all units where it names none.

        Returns:
            (n,) float64.
        """
        removed: dict[str, Any] = {name: size - kept.get(name, size) for name, size in self._sizes.items()}
        removed |= {name: self._sizes[name] - np.asarray(counts, dtype=np.float64) for name in names}
        total = np.zeros(len(counts))
        for number in sorted({number for name in names for number in self._touched.get(name, ())}):
            weight, dims = self._rows[number]
            product: Any = weight
            for n, terms in dims:
                product = product * (n - sum(removed[name] * width for name, width in terms))
            total += product
        return total


@dataclass(frozen=True)
class Budget:
    """Shares of one cost of the dense network.

    Over rounds the dense network stays the denominator, whatever the network is now.

    Attributes:
        dense: structure of the dense network.
        of: `parameters` (all), `prunable` (elements of the parameters that at least one
            prunable group of the dense network touches), `non-embedding` (all but
            `UnitGroups.embeddings`), `macs` (per example) or `latency` (seconds of a batch).
        latency: what the seconds were measured to be; needed for `latency` alone.
    """

    dense: UnitGroups
    of: str = "parameters"
    latency: LatencyTable | None = None

    def __post_init__(self) -> None:
        if self.of not in OF.texts:
            raise TargetError(f"A share of {self.of!r}", "no such cost", f"Known: {', '.join(OF.texts)}")
        if self.of == "latency" and self.latency is None:
            raise TargetError(
                f"A share of the {OF.texts[self.of]}", "nothing was measured",
                "Give a table of latencies, or prune in memory, which measures one",
            )  # fmt: skip

    @cached_property
    def weights(self) -> dict[str, float]:
        """Tensor name -> cost of one element."""
        if self.of == "macs":
            return dict(self.dense.positions)
        if self.of == "parameters":
            return dict.fromkeys(self.dense.parameters, 1)
        if self.of == "non-embedding":
            return {name: 1 for name in self.dense.parameters if name not in self.dense.embeddings}
        touched = {item.tensor for group in self.dense.prunable for item in group.slices}
        return {name: 1 for name in self.dense.parameters if name in touched}

    @cached_property
    def total(self) -> float:
        """Cost of the dense network: parameters, multiply-accumulates per example, or seconds of a batch."""
        return self.ledger(self.dense).count()

    def ledger(self, groups: UnitGroups) -> Cost:
        """Return the counter of this cost on the network as it is now."""
        if self.of == "latency":
            assert self.latency is not None
            return self.latency.ledger(groups)
        if self.of == "macs":  # experts that are left have more rows each than in the dense network
            return Ledger(groups, groups.positions, shared=True)
        return Ledger(groups, self.weights)

    def amount(self, groups: UnitGroups, kept: Mapping[str, int] | None = None) -> float:
        """Return the cost of `groups` with `kept` units (group name -> number) left; None keeps all."""
        return self.ledger(groups).count(kept)

    def reduction(self, groups: UnitGroups, kept: Mapping[str, int] | None = None) -> float:
        """Return the share of the dense cost that is gone, between 0 and 1.

        Raises:
            TargetError: the dense network has none of this cost.
        """
        return self.share(self.amount(groups, kept))

    def share(self, amount: float) -> float:
        """Return the share of the dense cost that is gone when `amount` is left."""
        if self.total <= 0:
            raise TargetError(
                f"A share of the {self.of}", f"the dense network has {self.total}", "Choose another cost"
            )
        return 1.0 - amount / self.total


def count_parameters(groups: UnitGroups, kept: Mapping[str, int] | None = None) -> int:
    """Return the number of parameters, tied ones once, with `kept` units (name -> number) left."""
    return int(Budget(groups, "parameters").amount(groups, kept))


def count_macs(groups: UnitGroups, kept: Mapping[str, int] | None = None) -> float:
    """Return the multiply-accumulates per example with `kept` units (name -> number) left."""
    return float(Budget(groups, "macs").amount(groups, kept))


def largest_reachable(groups: UnitGroups, floor: float, of: str, *, dense: UnitGroups | None = None) -> float:
    """Return the largest share of the dense cost that can be gone with the floor kept.

    With `uniform`, a multiple or allowed numbers it is less: see `planning.selection.reachable`.

    Args:
        groups: the structure now.
        floor: share of each group's original units that always stays.
        of: `parameters`, `prunable`, `non-embedding` or `macs`.
        dense: structure of the dense network; `groups` itself by default.
    """
    kept = {group.name: least_kept(group, floor) for group in groups.prunable}
    return Budget(groups if dense is None else dense, of).reduction(groups, kept)


def _distinct(slices: Iterable[ParameterSlice]) -> list[ParameterSlice]:
    """A weight that is used twice may bring the same slice twice: keep one."""
    found: list[ParameterSlice] = []
    for item in slices:
        if not any(
            (item.tensor, item.dim) == (other.tensor, other.dim)
            and np.array_equal(item.positions, other.positions)
            for other in found
        ):
            found.append(item)
    return found


def _check_disjoint(tensor: str, dim: int, items: list[tuple[str, ParameterSlice]]) -> None:
    positions = np.concatenate([item.positions.ravel() for _, item in items])
    if np.bincount(positions).max() > 1:  # a hundredth of the time of np.unique
        raise StructureError(
            "Counting what groups cost",
            f"{sorted({name for name, _ in items})} share positions of {tensor!r} along dimension {dim}",
            "Units of different groups must not share a position; this is a fault of the structure's rules",
        )
