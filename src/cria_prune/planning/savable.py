"""What a plain folder of transformers can hold of a model, and what a target means there and per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cria_prune.config import OF, PlanConfig
from cria_prune.planning.budget import Budget, count_parameters
from cria_prune.planning.selection import PER_LAYER, Scope, reachable, scope
from cria_prune.structure.groups import UnitGroups
from cria_prune.vanilla import UNITS


@dataclass(frozen=True)
class Room:
    """What one way to save has room for.

    Attributes:
        units: units in words -> groups that can lose some.
        most: the largest share of the target's cost that can go.
        asked: parameters or MACs that the target is.
    """

    units: Mapping[str, int]
    most: float
    asked: float


@dataclass(frozen=True)
class Savable:
    """What is known of saving before anything is cut; prints as a few lines.

    Attributes:
        plain: in a folder that plain `from_pretrained` loads; layers: in one that Cria loads.
        alone: units in words -> why a plain folder cannot hold fewer; they need `per-layer`.
        reduction, of: the target.
    """

    plain: Room
    layers: Room
    alone: Mapping[str, str]
    reduction: float
    of: str

    def __str__(self) -> str:
        what = "MACs" if self.of == "macs" else "parameters"
        held = ", ".join(f"{name} of {count} groups" for name, count in self.plain.units.items())
        lines = [f"a plain folder can hold fewer {held}" if held else "a plain folder can hold nothing less"]
        lines += [f"per-layer alone: {name} ({reason})" for name, reason in self.alone.items()]
        cost = OF.texts[self.of]
        if self.of == "latency":
            return "\n".join(lines)
        both = (
            f"{room.asked:,.0f} {what} of at most {room.most:.1%} {way}"
            for way, room in (("in a plain folder", self.plain), ("per layer", self.layers))
        )
        return "\n".join([*lines, f"{self.reduction:.1%} of the {cost} are {'; '.join(both)}"])


def savable(model: nn.Module, groups: UnitGroups, config: PlanConfig, plain: Scope | None = None) -> Savable:
    """Say what a plain folder can hold of a model of transformers, and what a target means.

    Args:
        model: the model, also on the meta device; groups: all that was found of it.
        config: the plan, for a plain folder or not.
        plain: the scope of the plan for a plain folder where it is known already.

    Raises:
        StructureError: no configuration describes the model.
    """
    wide = config.model_copy(update=PER_LAYER)
    narrow = config if config.vanilla else config.model_copy(update={"vanilla": True, "uniform": True})
    free = scope(model, groups, wide)
    held = plain if plain is not None and config.vanilla else scope(model, groups, narrow)
    open_to = {group.name for group in free.groups.prunable}
    alone: dict[str, str] = {}
    for group in held.groups:
        if group.frozen is not None and group.name in open_to:
            alone.setdefault(UNITS.get(group.kind, f"{group.kind}s"), group.frozen)
    # Where some are held and others not, the ones that are not are no kind of their own.
    return Savable(_room(held, narrow), _room(free, wide), alone, config.reduction, config.of)


def _room(found: Scope, config: PlanConfig) -> Room:
    units: dict[str, int] = {}
    for group in found.groups.prunable:
        name = UNITS.get(group.kind, f"{group.kind}s")
        units[name] = units.get(name, 0) + 1
    if config.of == "latency":
        return Room(units, 1.0, 0.0)
    if not units:
        return Room(units, 0.0, 0.0)
    most = reachable(found.groups, config, allowed=found.allowed)
    total = Budget(found.groups, config.of).total
    return Room(units, most, config.reduction * (total or count_parameters(found.groups)))
