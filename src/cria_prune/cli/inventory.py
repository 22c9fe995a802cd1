"""What `inspect` knows about a model: one row per unit group, and the shares that can be removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cria_prune.plan import Budget, count_macs, count_parameters, largest_reachable
from cria_prune.structure import UnitGroups, without_residual
from cria_prune.structure.fold import Row

SHARES = ("parameters", "prunable", "macs")


@dataclass(frozen=True)
class Inventory:
    """Everything that `inspect` prints about the structure of a model.

    Attributes:
        rows: one per group, in the order of the network.
        parameters: of the model, tied ones once.
        macs: multiply-accumulates of its weights per example.
        floor: share of each group's units that always stays.
        removable: cost (parameters, prunable, macs) -> largest share that can leave, without the
            residual widths.
        removable_with_residual: the same with them.
    """

    rows: tuple[Row, ...]
    parameters: int
    macs: float
    floor: float
    removable: Mapping[str, float]
    removable_with_residual: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, `rows` under the key `groups`."""
        plain = asdict(self)
        return {"groups": plain.pop("rows"), **plain}


def inventory(groups: UnitGroups, floor: float) -> Inventory:
    """Return what `inspect` prints of the groups of a model.

    Args:
        groups: as `discover` found them, with their residual widths.
        floor: share of each group's units that always stays.
    """
    inner = without_residual(groups)
    return Inventory(
        rows=groups.rows(),
        parameters=count_parameters(groups),
        macs=count_macs(groups),
        floor=floor,
        removable=_shares(inner, floor),
        removable_with_residual=_shares(groups, floor),
    )


def _shares(groups: UnitGroups, floor: float) -> dict[str, float]:
    """Return cost -> largest share that can leave; a cost of which the model has none is left at 0."""
    return {
        of: largest_reachable(groups, floor, of) if Budget(groups, of).total > 0 else 0.0 for of in SHARES
    }
