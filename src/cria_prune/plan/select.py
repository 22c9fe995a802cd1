"""Scores, groups and a target -> the units that stay.

Units are sorted by (priority, order of the group, index) and the shortest prefix that reaches the
target leaves. Counting is exact and falls with every unit, so the prefix is found by bisection.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import numpy as np

from cria_prune.errors import SignalError, StructureError, TargetError
from cria_prune.plan.budget import Budget, Ledger, largest_reachable, least_kept
from cria_prune.structure.groups import UnitGroup, UnitGroups

RANKINGS = ("uniform", "global")

# Shares are quotients of exact counts; a target such as 3 * 0.1 misses them by a rounding error.
SLACK = 1e-12


def select(
    groups: UnitGroups,
    scores: Mapping[str, np.ndarray],
    target: float,
    *,
    dense: UnitGroups | None = None,
    of: str = "parameters",
    ranking: str = "uniform",
    floor: float = 0.1,
) -> dict[str, np.ndarray]:
    """Choose the units that stay so that at least `target` of the dense cost is gone.

    `uniform` gives a group's unit of rank r (0 is the lowest score) the priority
    (units removed before + r + 1) / original units: every group loses the same share.
    `global` gives it score / mean score of the group / share of the cost that one unit of the
    group frees: units of all groups compete. Of equal priorities the earlier group and the
    lower index leave first. max(1, ceil(floor * original units)) units of a group stay.

    Args:
        groups: the structure now.
        scores: group name -> (units,) importance, higher stays; one entry per prunable group.
        target: share of the dense cost to be gone, strictly between 0 and 1, earlier rounds counted in.
        dense: structure of the dense network; `groups` itself by default.
        of: `parameters`, `prunable` or `macs`.
        ranking: `uniform` or `global`.
        floor: share of each group's original units that always stays.

    Returns:
        Group name -> ascending int64 indices (of now) that stay, for every prunable group.

    Raises:
        TargetError: the target is not in (0, 1), cannot be reached, or the ranking is unknown.
        StructureError: nothing is prunable, or scores are missing or of the wrong length.
        SignalError: a score is NaN or infinite, or negative under `global`.
    """
    dense = groups if dense is None else dense
    if ranking not in RANKINGS:
        raise TargetError(f"A {ranking!r} ranking", "no such ranking", f"Known: {', '.join(RANKINGS)}")
    check_reachable(groups, target, dense=dense, of=of, floor=floor)
    arrays = {group.name: _checked_scores(group, scores, ranking) for group in groups.prunable}
    budget = Budget(dense, of)
    ledger = budget.ledger(groups)
    owner, unit = _order(groups, arrays, ranking, floor, ledger)
    left = _shortest_prefix(groups, owner, ledger, budget, target)
    kept = {}
    for number, group in enumerate(groups.prunable):
        gone = unit[:left][owner[:left] == number]
        kept[group.name] = np.setdiff1d(np.arange(group.size, dtype=np.int64), gone)
    return kept


def check_reachable(
    groups: UnitGroups, target: float, *, dense: UnitGroups | None = None, of: str, floor: float
) -> float:
    """Return the largest share that can be removed, at least the target; see `select` for the arguments.

    Raises:
        TargetError: the target is not in (0, 1) or beyond that share.
        StructureError: nothing is prunable.
    """
    check_target(target)
    _check_prunable(groups)
    reachable = largest_reachable(groups, floor, of, dense=dense)
    if target > reachable + SLACK:
        raise TargetError(
            f"Removing {target:.2%} of the {of}",
            f"at most {reachable:.2%} can be removed with a floor of {floor:g} of each group",
            f"Ask for {np.floor(reachable * 1e4) / 1e4:g} or less, or lower the floor",
        )
    return reachable


def check_target(target: float) -> None:
    """Raise a TargetError unless the target is a number strictly between 0 and 1."""
    if not (isinstance(target, Real) and 0 < target < 1):
        raise TargetError(
            f"A reduction of {target!r}",
            "it is not between 0 and 1",
            "Give the share to remove, such as 0.5 for half",
        )


def _check_prunable(groups: UnitGroups) -> None:
    if groups.prunable:
        return
    reasons = [f"{group.name}: {group.frozen or 'one unit is left, which always stays'}" for group in groups]
    raise StructureError(
        "Choosing units to remove",
        "no group can be pruned" + (f" ({'; '.join(reasons)})" if reasons else ", the model has no groups"),
        "Use a model with at least one prunable layer, or mend what the reasons name",
    )


def _checked_scores(group: UnitGroup, scores: Mapping[str, np.ndarray], ranking: str) -> np.ndarray:
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
    if ranking == "global" and (values < 0).any():
        raise SignalError(
            f"Ranking the units of group {group.name!r} against other groups",
            f"found negative scores, the lowest {values.min():g}",
            "Give scores that are not negative, or use the uniform ranking",
        )
    return values


def _order(
    groups: UnitGroups, scores: Mapping[str, np.ndarray], ranking: str, floor: float, ledger: Ledger
) -> tuple[np.ndarray, np.ndarray]:
    """Group number and unit index, (removable units,) each, in the order in which they leave."""
    priorities, owners, units = [], [], []
    whole = ledger.count() if ranking == "global" else 0.0
    for number, group in enumerate(groups.prunable):
        values = scores[group.name]
        ranked = np.argsort(values, kind="stable")[: group.size - least_kept(group, floor)]
        if ranking == "uniform":
            gone = group.original_size - group.size
            priority = (gone + np.arange(len(ranked)) + 1) / group.original_size
        else:
            mean = values.mean()
            relative = values[ranked] / mean if mean > 0 else np.ones(len(ranked))
            freed = whole - ledger.count({group.name: group.size - 1})
            # A unit that frees nothing is the last to leave.
            priority = relative / (freed / whole) if freed > 0 else np.full(len(ranked), np.inf)
        priorities.append(priority)
        owners.append(np.full(len(ranked), number))
        units.append(ranked)
    owner, unit = np.concatenate(owners), np.concatenate(units)
    order = np.lexsort((unit, owner, np.concatenate(priorities)))
    return owner[order], unit[order]


def _shortest_prefix(
    groups: UnitGroups, owner: np.ndarray, ledger: Ledger, budget: Budget, target: float
) -> int:
    """Smallest number of leading units whose removal reaches the target."""
    prunable = groups.prunable

    def reached(length: int) -> bool:
        gone = np.bincount(owner[:length], minlength=len(prunable))
        kept = {group.name: group.size - int(count) for group, count in zip(prunable, gone, strict=True)}
        return budget.share(ledger.count(kept)) >= target - SLACK

    low, high = 0, len(owner)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle + 1, high)
    return low
