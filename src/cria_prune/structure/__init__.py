"""What may be removed: unit groups, found from a model's ATen operations."""

from cria_prune.structure.capture import capture
from cria_prune.structure.discover import discover
from cria_prune.structure.groups import (
    ParameterSlice,
    Tap,
    UnitGroup,
    UnitGroups,
    removed_positions,
    shrink,
    without_residual,
)

__all__ = [
    "ParameterSlice",
    "Tap",
    "UnitGroup",
    "UnitGroups",
    "capture",
    "discover",
    "removed_positions",
    "shrink",
    "without_residual",
]
