"""What `inspect` knows about a model: one row per unit group, and the shares that can be removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cria_prune.plan import Budget, largest_reachable
from cria_prune.structure import UnitGroup, UnitGroups, without_residual

Status = Literal["prunable", "residual", "frozen"]
SHARES = ("parameters", "prunable", "macs")
LAST_UNIT = "has one unit, and one always stays"


@dataclass(frozen=True)
class Row:
    """A unit group as `inspect --json` prints it; the attributes are the keys.

    Attributes:
        name: of the group: the module that makes its first slice.
        kind: channel, neuron, gated, head, kv group or residual.
        units: how many there are.
        status: `prunable`; `residual`, which is pruned only with --residual; or `frozen`.
        frozen: why it cannot be pruned, or None.
        parameters_per_unit: parameters that leave when one unit leaves and nothing else; None if frozen.
        macs_per_unit: multiply-accumulates per example that leave with it; None if frozen.
        producers: parameters whose output dimension the units are.
        consumers: parameters that sum over the units.
    """

    name: str
    kind: str
    units: int
    status: Status
    frozen: str | None
    parameters_per_unit: int | None
    macs_per_unit: float | None
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


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
    parameters, macs = Budget(groups, "parameters"), Budget(groups, "macs")
    counters = parameters.ledger(groups), macs.ledger(groups)
    prunable = {group.name for group in groups.prunable}
    rows = []
    for group in groups:
        costs: tuple[float | None, float | None] = (None, None)
        if group.name in prunable:
            costs = tuple(ledger.count() - ledger.count({group.name: group.size - 1}) for ledger in counters)  # type: ignore[assignment]
        rows.append(_row(group, group.name in prunable, *costs))
    inner = without_residual(groups)
    return Inventory(
        rows=tuple(rows),
        parameters=int(parameters.total),
        macs=macs.total,
        floor=floor,
        removable=_shares(inner, floor),
        removable_with_residual=_shares(groups, floor),
    )


def _row(group: UnitGroup, prunable: bool, parameters: float | None, macs: float | None) -> Row:
    status: Status = "frozen"
    if prunable:
        status = "residual" if group.kind == "residual" else "prunable"
    return Row(
        name=group.name,
        kind=group.kind,
        units=group.size,
        status=status,
        frozen=None if prunable else group.frozen or LAST_UNIT,
        parameters_per_unit=None if parameters is None else int(parameters),
        macs_per_unit=macs,
        producers=tuple(sorted({item.tensor for item in group.producers})),
        consumers=tuple(sorted({item.tensor for item in group.consumers})),
    )


def _shares(groups: UnitGroups, floor: float) -> dict[str, float]:
    """Return cost -> largest share that can leave; a cost of which the model has none is left at 0."""
    return {
        of: largest_reachable(groups, floor, of) if Budget(groups, of).total > 0 else 0.0 for of in SHARES
    }
