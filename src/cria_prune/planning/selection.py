"""Which groups a plan may cut, and which units stay: thresholds or shares, in permitted numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from cria_prune.base.errors import CriaError, SignalError, StructureError, TargetError, some
from cria_prune.config import PlanConfig
from cria_prune.planning.allocation import Losses, allocate
from cria_prune.planning.budget import SLACK, Budget, Cost
from cria_prune.planning.control import check_alike, fixed_sizes, kept_whole, left_alone, settled
from cria_prune.planning.latency import LatencyTable
from cria_prune.planning.serving import served
from cria_prune.planning.stairs import Allowed, Stair, fewest, stairs
from cria_prune.structure.groups import UnitGroup, UnitGroups, freeze, without_experts, without_residual
from cria_prune.vanilla import holdable


def reachable(
    groups: UnitGroups,
    config: PlanConfig,
    *,
    dense: UnitGroups | None = None,
    allowed: Allowed | None = None,
    latency: LatencyTable | None = None,
) -> float:
    """Return the largest share of the dense cost `config.of` that can be gone; see `stairs`."""
    budget = Budget(groups if dense is None else dense, config.of, latency)
    return budget.reduction(groups, fewest(stairs(groups, config, allowed)))


def select(
    groups: UnitGroups,
    scores: Mapping[str, np.ndarray],
    target: float,
    config: PlanConfig,
    *,
    dense: UnitGroups | None = None,
    allowed: Allowed | None = None,
    losses: Losses | None = None,
    latency: LatencyTable | None = None,
) -> dict[str, np.ndarray]:
    """Choose the units that stay so that at least `target` of the dense cost is gone.

    A step leads a group, or every group of a class, from one number of units that may stay to the
    next lower one (see `stairs`); the lowest scores of each group leave. Priority of a step:

    - ranking `uniform`: the share of the original units that are gone after it, so that every group
      loses the same share.
    - ranking `global`: mean over the units that leave of score / mean score of their group, divided by the
      squared share of the group's scores that is not gone yet, and by the share of the cost that one unit
      frees, so that units of all groups, or classes, compete and none of them is emptied.
    - ranking `loss`: the same with the scores as they are, for criteria whose scores mean the same in
      every group (a change of the loss, a squared error).

    With ranking `measured` there is no order of steps: see `allocate`. `auto` without losses is `uniform`.

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
        losses: what `allocate` shares out by, where the ranking is `measured`.
        latency: what seconds were measured, where they are the cost.

    Returns:
        Group name -> ascending int64 indices (of now) that stay, for every prunable group.

    Raises:
        TargetError: the target is not in (0, 1) or cannot be reached.
        StructureError: nothing is prunable, scores are missing or of the wrong length, or `allowed`
            does not fit, see `stairs`; the ranking is `measured` and there are no losses.
        SignalError: a score is NaN or infinite, or negative under the rankings `global` and `loss`.
    """
    check_reachable(groups, target, config, dense=dense, allowed=allowed, latency=latency)
    ranking = ranking_of(config, losses)
    arrays = {group.name: checked_scores(group, scores, ranking) for group in groups.prunable}
    budget = Budget(groups if dense is None else dense, config.of, latency)
    ledger = budget.ledger(groups)
    made = stairs(groups, config, allowed)
    if ranking == "measured":
        assert losses is not None
        counts = allocate(made, losses, ledger, budget.total, target)
    else:
        owner = _order(made, arrays, ranking, ledger)
        walk = Walk(made, ledger, budget, target)
        # Free plans take the shortest prefix of the order, so a larger target only adds
        # to a smaller one. A step of a uniform plan takes a unit of every layer and can
        # overshoot by far, so these end nearer and are not nested (docs/decisions/0008).
        taken = walk.nearest(owner) if config.uniform else walk.steps(owner, walk.shortest(owner))
        counts = _kept(made, taken)
    return {group.name: highest(arrays[group.name], counts[group.name]) for group in groups.prunable}


def ranking_of(config: PlanConfig, losses: Losses | None) -> str:
    """Return the ranking that a plan is made by.

    Raises:
        StructureError: it is `measured`, and there are no losses.
    """
    if config.shared_by != "measured" or losses is not None:
        return config.shared_by
    if config.ranking == "auto":  # what makes a plan of scores alone has nothing to measure with
        return "uniform"
    raise StructureError(
        "The ranking measured", "found no measured losses",
        "Give losses (prune measures them), or use another ranking",
    )  # fmt: skip


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return so many units of the highest scores, ascending; of equal scores the lower index leaves first."""
    return np.sort(np.argsort(scores, kind="stable")[len(scores) - count :])


def check_reachable(
    groups: UnitGroups,
    target: float,
    config: PlanConfig,
    *,
    dense: UnitGroups | None = None,
    allowed: Allowed | None = None,
    latency: LatencyTable | None = None,
) -> float:
    """Return the largest share that can be removed, at least the target; see `select` for the arguments.

    Raises:
        TargetError: the target is not in (0, 1) or beyond that share; the text says what keeps the most
            parameters in place, and what would let them leave.
        StructureError: nothing is prunable, or `allowed` does not fit.
    """
    check_share(target)
    check_prunable(groups)
    most = reachable(groups, config, dense=dense, allowed=allowed, latency=latency)
    if target > most + SLACK:
        limits = [
            f"a floor of {config.floor:g} of each group",
            *(["equal numbers in alike groups"] if config.uniform else []),
            *([f"multiples of {config.multiple}"] if config.multiple > 1 else []),
            *(["what is left alone (ignore, protect)"] if config.ignore or config.protect != "none" else []),
            *(["the sizes that are given (share, keep)"] if config.share or config.keep else []),
            *(["the numbers that are allowed"] if allowed and not (config.share or config.keep) else []),
        ]
        whole = Budget(groups if dense is None else dense, config.of, latency).total
        left = "" if config.of == "latency" else f" (down to {(1 - most) * whole:,.0f} {config.of})"
        stays = groups.account(least=fewest(stairs(groups, config, allowed)))
        raise TargetError(
            f"Removing {target:.2%} of the {config.of}{_as_speedup(config, target)}",
            f"at most {most:.2%} can be removed{_as_speedup(config, most)} with {', '.join(limits)}. "
            f"What stays of the parameters: {' | '.join(map(str, stays.largest()))}",
            f"Ask for {np.floor(most * 1e4) / 1e4:g} or less{left}, or lower the floor" + merging(groups),
        )
    return most


def _as_speedup(config: PlanConfig, share: float) -> str:
    return f" ({1 / (1 - share):.3g} times as fast)" if config.of == "latency" and share < 1 else ""


def check_share(target: float) -> None:
    """Raise a TargetError unless the target is a number strictly between 0 and 1."""
    if not (isinstance(target, Real) and 0 < target < 1):
        raise TargetError(
            f"A reduction of {target!r}",
            "it is not between 0 and 1",
            "Give the share to remove, such as 0.5 for half",
        )


def check_prunable(groups: UnitGroups) -> None:
    """Raise a StructureError, with the reasons that keep the most in place, if no group can be pruned."""
    if groups.prunable:
        return
    reasons = [f"{group.name}: {group.whole}" for group in groups]
    found = f" ({some(reasons, between='; ')})" if reasons else ", the model has no groups"
    stays = " | ".join(map(str, groups.account().largest()))
    raise StructureError(
        "Choosing units to remove",
        f"no group can be pruned{found}" + (f". What stays of the parameters: {stays}" if stays else ""),
        "Use a model with at least one prunable layer, or mend what the reasons name" + merging(groups),
    )


def merging(groups: UnitGroups) -> str:
    """Return how the adapters of a model are merged into its weights; empty where it has none."""
    if not any(".lora_" in name for name in groups.parameters):
        return ""
    return "; adapters (LoRA) can be merged into the weights first: model = model.merge_and_unload() in peft"


def checked_scores(group: UnitGroup, scores: Mapping[str, np.ndarray], ranking: str) -> np.ndarray:
    """Return a group's scores, (units,) float64.

    Raises:
        StructureError: they are missing, or of another length.
        SignalError: one is NaN or infinite, or negative under the rankings `global` and `loss`.
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
    if ranking in ("global", "loss") and (values < 0).any():
        raise SignalError(
            f"Ranking the units of group {group.name!r} against other groups",
            f"found negative scores, the lowest {values.min():g}",
            "Give scores that are not negative, or use the uniform ranking",
        )
    return values


def _order(made: Sequence[Stair], scores: Mapping[str, np.ndarray], ranking: str, ledger: Cost) -> np.ndarray:
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
    # Equal priorities are told apart by the order of the network, so that a plan is the same everywhere.
    return owner[np.lexsort((number, owner, np.concatenate(priorities)))]


def _shares_gone(stair: Stair) -> np.ndarray:
    """(steps,) share of the original units that are gone after each step."""
    # Of the dense network in every round, as the target is:
    # a group that has lost more so far waits for the others.
    original = max(group.original_size for group in stair.groups)
    return (original - stair.counts[1:]) / original


def _scores_per_cost(
    stair: Stair, scores: Mapping[str, np.ndarray], ledger: Cost, whole: float
) -> np.ndarray:
    """(steps,) mean score of the units that leave with each step / share that one unit frees."""
    if len(stair.counts) == 1:
        return np.zeros(0)
    size = stair.groups[0].size
    # The price of a unit is what the first one frees. It falls as layers
    # around it shrink, for a weight between two groups costs the product of
    # both; taken once, the order of the steps does not depend on the way down.
    freed = whole - ledger.count(dict.fromkeys(stair.names, size - 1))
    if freed <= 0:  # what frees nothing is the last to leave
        return np.full(len(stair.counts) - 1, np.inf)
    ranked = np.mean([np.sort(scores[name]) for name in stair.names], axis=0)
    # With step i the units ranked starts[i] to starts[i + 1]
    # leave; reduceat adds the scores of each such run.
    starts = size - stair.counts
    sums = np.add.reduceat(ranked[: starts[-1]], starts[:-1])
    means = np.maximum.accumulate(sums / np.diff(starts))  # against rounding: steps go down in order
    return np.asarray(means / (freed / len(stair.groups) / whole))


def _relative(values: np.ndarray) -> np.ndarray:
    """Return each score over its group's mean, over the squared share of the group's scores not yet gone.

    Scores have no common unit between layers, so they are compared to their own group's mean. That alone
    empties narrow layers, whose units free the most: what is left of a group has to grow dearer as it goes.
    """
    whole = values.sum()
    if whole <= 0:
        return np.ones(len(values))
    order = np.argsort(values, kind="stable")
    left = np.cumsum(values[order][::-1])[::-1] / whole  # with the unit itself
    dearer = np.empty(len(values))
    dearer[order] = 1 / np.maximum(left, 1 / len(values)) ** 2
    return np.asarray(values * len(values) / whole * dearer)


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
    ledger: Cost
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
        # What is gone grows with every step, so the length is found by
        # halving: to count a network's cost takes a walk over all its tensors.
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
            # With a step its whole stair ends there: the steps below it cannot be taken without it.
            others = np.concatenate([owner[: length - 1], owner[length:][owner[length:] != last]])
            further = self.shortest(others)
            if further > len(others) or self.excess(others, further) >= self.excess(owner, length) - SLACK:
                break
            owner, length = others, further
        return self.steps(owner, length)


HEADS = ("head", "kv group")
NEURONS = ("neuron", "gated", "channel")
KINDS = {
    "neurons": (*NEURONS, "residual"),
    "heads": (*HEADS, "residual"),
    "experts": ("experts", "residual"),
}


@dataclass(frozen=True)
class Scope:
    """What may be cut.

    Attributes:
        groups: the structure, with everything frozen that the plan leaves alone.
        allowed: group name -> numbers of units that may stay; any number for groups not named.
        sizes: group name -> units that stay, where the plan says that of single groups.
        plan: the configuration with its target as a share.
    """

    groups: UnitGroups
    allowed: Allowed = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    plan: PlanConfig = field(default_factory=PlanConfig)


def scope(model: nn.Module, groups: UnitGroups, config: PlanConfig) -> Scope:
    """Freeze what a plan is not to cut: residual widths, experts, kinds, groups by name, what vanilla lacks.

    Args:
        model: the dense model, also on the meta device; only looked at.
        groups: its structure.
        config: all but the costs is used.

    Raises:
        StructureError: `vanilla` is asked for a model that no configuration of transformers describes.
        ConfigError, TargetError: what is said of single groups fits no group, or cannot be; see
            `planning.control`.
    """
    if not config.residual:
        groups = without_residual(groups)
    if not config.experts:
        groups = without_experts(groups)
    if config.units != "all":
        wanted = KINDS[config.units]
        reason = f"the plan cuts {config.units} alone (units)"
        groups = freeze(groups, lambda group: None if group.kind in wanted else reason)
    before, groups = groups, left_alone(groups, config)
    if config.vanilla:
        check_alike(before, groups)
        held = holdable(model, groups)
        groups, allowed = held.groups, held.allowed
        if config.serve != "any":
            groups, allowed = served(model, groups, allowed, config)
        return sized(groups, config, allowed)
    return sized(groups, config, {})


def sized(groups: UnitGroups, config: PlanConfig, allowed: Allowed) -> Scope:
    """Return the scope of groups with the sizes that a plan gives to single ones, its target as a share."""
    sizes = fixed_sizes(groups, config, allowed)
    plan = settled(config, groups, sizes)
    groups = kept_whole(groups, sizes)
    sizes = {group.name: sizes[group.name] for group in groups.prunable if group.name in sizes}
    return Scope(groups, {**allowed, **{name: (count,) for name, count in sizes.items()}}, sizes, plan)


def check_reach(
    model: nn.Module,
    groups: UnitGroups,
    config: PlanConfig,
    found: Scope | None = None,
    latency: LatencyTable | None = None,
) -> Scope:
    """Return the scope if the reduction can be reached in it.

    Args:
        model, groups, config: see `scope`.
        found: what that returned, if it is there already.
        latency: what seconds were measured, where they are the cost.

    Raises:
        TargetError: it cannot; the text says the most that can be removed, and what would lift it.
        StructureError: see `scope`, or nothing can be pruned.
    """
    found = found or scope(model, groups, config)
    try:
        check_reachable(found.groups, config.reduction, config, allowed=found.allowed, latency=latency)
    except TargetError as error:
        # What further units would save was not measured.
        known = found.groups.prunable and latency is None
        lifts = _lifts(model, groups, config) if known else []
        if not lifts:
            raise
        raise TargetError(error.asked, error.found, f"{error.todo}; or {', or '.join(lifts)}") from error
    return found


PER_LAYER: dict[str, Any] = {"vanilla": False, "uniform": False, "serve": "any", "tensor_parallel": 1}
"""What a plan for any layers says in place of one for a plain configuration."""


def _lifts(model: nn.Module, groups: UnitGroups, config: PlanConfig) -> list[str]:
    """Say how much more could go if the plan might cut other units too: one change at a time."""
    most = _most(model, groups, config, {})
    changes: list[tuple[str, Mapping[str, Any]]] = [
        ("cut heads too (units all)", {"units": "all"}),
        ("cut what a vanilla configuration cannot hold (per-layer)", PER_LAYER),
        ("both of these", {"units": "all", **PER_LAYER}),
        ("cut the residual width too (residual)", {"residual": True}),
        ("cut whole experts too (experts)", {"experts": True}),
    ]
    lifts: list[str] = []
    for text, values in changes:
        reached = _most(model, groups, config, values)
        if reached > most + 1e-3 and (text != "both of these" or len(lifts) == 2):
            lifts.append(f"{text}: at most {np.floor(reached * 1e4) / 1e2:g} %")
    return lifts


def _most(model: nn.Module, groups: UnitGroups, config: PlanConfig, values: Mapping[str, Any]) -> float:
    changed = config.model_copy(update=dict(values))
    if changed == config and values:
        return 0.0
    try:
        found = scope(model, groups, changed)
        return reachable(found.groups, changed, allowed=found.allowed)
    except CriaError:
        return 0.0
