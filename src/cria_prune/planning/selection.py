"""Which units stay: thresholds over all groups or shares of each, in the numbers that are permitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from cria_prune.base.errors import SignalError, StructureError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import Budget, Ledger, least_kept
from cria_prune.structure.groups import UnitGroup, UnitGroups, counted_together

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
    any number of heads and KV groups) down to max(1, ceil(floor * original units)). Where `allowed`
    names a group, only the numbers in it remain, all units too only if it says so.

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
    classes = counted_together(prunable.values()) if config.uniform else [(name,) for name in prunable]
    return tuple(_stair([prunable[name] for name in names], config, allowed) for names in classes)


def fewest(made: Iterable[Stair]) -> dict[str, int]:
    """Return group name -> units at the foot of its stair."""
    return {name: int(stair.counts[-1]) for stair in made for name in stair.names}


def reachable(
    groups: UnitGroups, config: PlanConfig, *, dense: UnitGroups | None = None, allowed: Allowed | None = None
) -> float:
    """Return the largest share of the dense cost `config.of` that can be gone; see `stairs`."""
    budget = Budget(groups if dense is None else dense, config.of)
    return budget.reduction(groups, fewest(stairs(groups, config, allowed)))


def _stair(members: Sequence[UnitGroup], config: PlanConfig, allowed: Allowed) -> Stair:
    least = max(least_kept(group, config.floor) for group in members)
    size = members[0].size
    counts = np.arange(size, least - 1, -1, dtype=np.int64)
    if config.multiple > 1 and members[0].kind in ROUNDED:
        counts = counts[(counts % config.multiple == 0) | (counts == size)]
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


# Shares are quotients of exact counts; a target such as 3 * 0.1 misses them by a rounding error.
SLACK = 1e-12


def select(
    groups: UnitGroups,
    scores: Mapping[str, np.ndarray],
    target: float,
    config: PlanConfig,
    *,
    dense: UnitGroups | None = None,
    allowed: Allowed | None = None,
) -> dict[str, np.ndarray]:
    """Choose the units that stay so that at least `target` of the dense cost is gone.

    A step leads a group, or every group of a class, from one number of units that may stay to the
    next lower one (see `stairs`); the lowest scores of each group leave. Priority of a step:

    - ranking `uniform`: the share of the original units that are gone after it, so that every group
      loses the same share.
    - ranking `global`: mean over the units that leave of score / mean score of their group, divided
      by the share of the cost that one unit frees, so that units of all groups, or classes, compete.
    - ranking `loss`: the same with the scores as they are, for criteria whose scores mean the same in
      every group (a change of the loss, a squared error).

    Of equal priorities the earlier group and the lower index leave first. The overshoot is less
    than what the last step frees. With `uniform`, a last step is left out as long as the steps after it
    reach the target with less overshoot.

    Args:
        groups: the structure now.
        scores: group name -> (units,) importance, higher stays; one entry per prunable group.
        target: share of the dense cost to be gone, strictly between 0 and 1, earlier rounds counted in.
        config: all but `reduction`, `rounds` and `residual` is used.
        dense: structure of the dense network; `groups` itself by default.
        allowed: group name -> the numbers of units that may stay; any number for groups not named.

    Returns:
        Group name -> ascending int64 indices (of now) that stay, for every prunable group.

    Raises:
        TargetError: the target is not in (0, 1) or cannot be reached.
        StructureError: nothing is prunable, scores are missing or of the wrong length, or `allowed`
            does not fit, see `stairs`.
        SignalError: a score is NaN or infinite, or negative unless the ranking is `uniform`.
    """
    check_reachable(groups, target, config, dense=dense, allowed=allowed)
    arrays = {group.name: checked_scores(group, scores, config.ranking) for group in groups.prunable}
    budget = Budget(groups if dense is None else dense, config.of)
    ledger = budget.ledger(groups)
    made = stairs(groups, config, allowed)
    owner = _order(made, arrays, config.ranking, ledger)
    walk = Walk(made, ledger, budget, target)
    counts = _kept(made, walk.nearest(owner) if config.uniform else walk.steps(owner, walk.shortest(owner)))
    return {
        group.name: np.sort(np.argsort(arrays[group.name], kind="stable")[group.size - counts[group.name] :])
        for group in groups.prunable
    }


def check_reachable(
    groups: UnitGroups,
    target: float,
    config: PlanConfig,
    *,
    dense: UnitGroups | None = None,
    allowed: Allowed | None = None,
) -> float:
    """Return the largest share that can be removed, at least the target; see `select` for the arguments.

    Raises:
        TargetError: the target is not in (0, 1) or beyond that share.
        StructureError: nothing is prunable, or `allowed` does not fit.
    """
    check_share(target)
    check_prunable(groups)
    most = reachable(groups, config, dense=dense, allowed=allowed)
    if target > most + SLACK:
        limits = [
            f"a floor of {config.floor:g} of each group",
            *(["equal numbers in alike groups"] if config.uniform else []),
            *([f"multiples of {config.multiple}"] if config.multiple > 1 else []),
            *(["the numbers that are allowed"] if allowed else []),
        ]
        raise TargetError(
            f"Removing {target:.2%} of the {config.of}",
            f"at most {most:.2%} can be removed with {', '.join(limits)}",
            f"Ask for {np.floor(most * 1e4) / 1e4:g} or less, or lower the floor",
        )
    return most


def check_share(target: float) -> None:
    """Raise a TargetError unless the target is a number strictly between 0 and 1."""
    if not (isinstance(target, Real) and 0 < target < 1):
        raise TargetError(
            f"A reduction of {target!r}",
            "it is not between 0 and 1",
            "Give the share to remove, such as 0.5 for half",
        )


def check_prunable(groups: UnitGroups) -> None:
    """Raise a StructureError, with every group's reason, if no group can be pruned."""
    if groups.prunable:
        return
    reasons = [f"{group.name}: {group.frozen or 'one unit is left, which always stays'}" for group in groups]
    raise StructureError(
        "Choosing units to remove",
        "no group can be pruned" + (f" ({'; '.join(reasons)})" if reasons else ", the model has no groups"),
        "Use a model with at least one prunable layer, or mend what the reasons name",
    )


def checked_scores(group: UnitGroup, scores: Mapping[str, np.ndarray], ranking: str) -> np.ndarray:
    """Return a group's scores, (units,) float64.

    Raises:
        StructureError: they are missing, or of another length.
        SignalError: one is NaN or infinite, or negative under the ranking `global`.
    """
    if group.name not in scores:
        raise StructureError(
            f"Ranking the units of group {group.name!r}",
            f"found no scores for it, only for {sorted(scores)}",
            "Give one score per unit of every prunable group",
        )
    values = np.asarray(scores[group.name], dtype=np.float64)
    if values.shape != (group.size,):
        raise StructureError(
            f"Ranking the {group.size} units of group {group.name!r}",
            f"found scores of shape {values.shape}",
            "Give one score per unit, from the same network as the groups",
        )
    if not np.isfinite(values).all():
        raise SignalError(
            f"Ranking the units of group {group.name!r}",
            f"{int((~np.isfinite(values)).sum())} of {group.size} scores are NaN or infinite",
            "Check the model's weights and the calibration data for NaN",
        )
    if ranking != "uniform" and (values < 0).any():
        raise SignalError(
            f"Ranking the units of group {group.name!r} against other groups",
            f"found negative scores, the lowest {values.min():g}",
            "Give scores that are not negative, or use the uniform ranking",
        )
    return values


def _order(
    made: Sequence[Stair], scores: Mapping[str, np.ndarray], ranking: str, ledger: Ledger
) -> np.ndarray:
    """Return (steps,) the number of the stair that each step goes down, in the order of the steps."""
    whole = 0.0
    if ranking != "uniform":
        whole = ledger.count()
        if ranking == "global":
            scores = {name: _relative(values) for name, values in scores.items()}
    priorities = [
        _shares_gone(stair) if ranking == "uniform" else _scores_per_cost(stair, scores, ledger, whole)
        for stair in made
    ]
    owner = np.repeat(np.arange(len(made)), [len(item) for item in priorities])
    number = np.concatenate([np.arange(len(item)) for item in priorities])
    return owner[np.lexsort((number, owner, np.concatenate(priorities)))]


def _shares_gone(stair: Stair) -> np.ndarray:
    """(steps,) share of the original units that are gone after each step."""
    original = max(group.original_size for group in stair.groups)
    return (original - stair.counts[1:]) / original


def _scores_per_cost(
    stair: Stair, scores: Mapping[str, np.ndarray], ledger: Ledger, whole: float
) -> np.ndarray:
    """(steps,) mean score of the units that leave with each step / share that one unit frees."""
    if len(stair.counts) == 1:
        return np.zeros(0)
    size = stair.groups[0].size
    freed = whole - ledger.count(dict.fromkeys(stair.names, size - 1))
    if freed <= 0:  # what frees nothing is the last to leave
        return np.full(len(stair.counts) - 1, np.inf)
    ranked = np.mean([np.sort(scores[name]) for name in stair.names], axis=0)
    starts = size - stair.counts
    sums = np.add.reduceat(ranked[: starts[-1]], starts[:-1])
    means = np.maximum.accumulate(sums / np.diff(starts))  # against rounding: steps go down in order
    return np.asarray(means / (freed / len(stair.groups) / whole))


def _relative(values: np.ndarray) -> np.ndarray:
    mean = values.mean()
    return values / mean if mean > 0 else np.ones(len(values))


def _kept(made: Sequence[Stair], steps: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Return group name -> units that stay after `steps[i]` steps down the stair i."""
    return {
        name: int(stair.counts[taken])
        for stair, taken in zip(made, steps, strict=True)
        for name in stair.names
    }


@dataclass(frozen=True)
class Walk:
    """Down the stairs until the target is reached. `owner`: (steps,) the stair of every step, in order."""

    made: Sequence[Stair]
    ledger: Ledger
    budget: Budget
    target: float

    def steps(self, owner: np.ndarray, length: int) -> np.ndarray:
        """(stairs,) steps down each stair after the first `length` steps."""
        return np.bincount(owner[:length], minlength=len(self.made))

    def excess(self, owner: np.ndarray, length: int) -> float:
        """Return the share of the dense cost that is gone after `length` steps, beyond the target."""
        gone = self.budget.share(self.ledger.count(_kept(self.made, self.steps(owner, length))))
        return gone - self.target

    def shortest(self, owner: np.ndarray) -> int:
        """Return how many steps reach the target; one more than there are if all of them do not."""
        low, high = 0, len(owner) + 1
        while low < high:
            middle = (low + high) // 2
            reached = middle > len(owner) or self.excess(owner, middle) >= -SLACK
            low, high = (low, middle) if reached else (middle + 1, high)
        return low

    def nearest(self, owner: np.ndarray) -> np.ndarray:
        """(stairs,) steps down each stair; a last step is left out while going on without it ends nearer."""
        length = self.shortest(owner)
        while length:
            last = owner[length - 1]
            others = np.concatenate([owner[: length - 1], owner[length:][owner[length:] != last]])
            further = self.shortest(others)
            if further > len(others) or self.excess(others, further) >= self.excess(owner, length) - SLACK:
                break
            owner, length = others, further
        return self.steps(owner, length)
