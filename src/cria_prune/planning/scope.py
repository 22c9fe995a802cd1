"""Which of a model's groups a plan may cut, and what would make more of them reachable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from cria_prune.base.errors import CriaError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.planning.selection import Allowed, check_reachable, reachable
from cria_prune.structure.groups import UnitGroups, freeze, without_residual
from cria_prune.vanilla import holdable

HEADS = ("head", "kv group")
NEURONS = ("neuron", "gated", "channel")
KINDS = {"neurons": (*NEURONS, "residual"), "heads": (*HEADS, "residual")}


@dataclass(frozen=True)
class Scope:
    """What may be cut.

    Attributes:
        groups: the structure, with everything frozen that the plan leaves alone.
        allowed: group name -> numbers of units that may stay; any number for groups not named.
    """

    groups: UnitGroups
    allowed: Allowed = field(default_factory=dict)


def scope(model: nn.Module, groups: UnitGroups, config: PlanConfig) -> Scope:
    """Freeze what a plan is not to cut: residual widths, kinds of units, what a vanilla configuration lacks.

    Args:
        model: the dense model, also on the meta device; only looked at.
        groups: its structure.
        config: `residual`, `units` and `vanilla` are used.

    Raises:
        StructureError: `vanilla` is asked for a model that no configuration of transformers describes.
    """
    if not config.residual:
        groups = without_residual(groups)
    if config.units != "all":
        wanted = KINDS[config.units]
        reason = f"the plan cuts {config.units} alone (units)"
        groups = freeze(groups, lambda group: None if group.kind in wanted else reason)
    if config.vanilla:
        held = holdable(model, groups)
        return Scope(held.groups, held.allowed)
    return Scope(groups)


def check_reach(
    model: nn.Module, groups: UnitGroups, config: PlanConfig, found: Scope | None = None
) -> Scope:
    """Return the scope if the reduction can be reached in it.

    Args:
        model, groups, config: see `scope`.
        found: what that returned, if it is there already.

    Raises:
        TargetError: it cannot; the text says the most that can be removed, and what would lift it.
        StructureError: see `scope`, or nothing can be pruned.
    """
    found = found or scope(model, groups, config)
    try:
        check_reachable(found.groups, config.reduction, config, allowed=found.allowed)
    except TargetError as error:
        lifts = _lifts(model, groups, config) if found.groups.prunable else []
        if not lifts:
            raise
        raise TargetError(error.asked, error.found, f"{error.todo}; or {', or '.join(lifts)}") from error
    return found


def _lifts(model: nn.Module, groups: UnitGroups, config: PlanConfig) -> list[str]:
    """Say how much more could go if the plan might cut other units too: one change at a time."""
    most = _most(model, groups, config, {})
    changes: list[tuple[str, Mapping[str, Any]]] = [
        ("cut heads too (units all)", {"units": "all"}),
        ("cut what a vanilla configuration cannot hold (per-layer)", {"vanilla": False, "uniform": False}),
        ("both of these", {"units": "all", "vanilla": False, "uniform": False}),
        ("cut the residual width too (residual)", {"residual": True}),
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
