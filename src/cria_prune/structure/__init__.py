"""What may be removed: unit groups, found from a model's ATen operations."""

from cria_prune.structure.capture import capture
from cria_prune.structure.discover import discover
from cria_prune.structure.groups import (
    Count,
    ParameterSlice,
    Tap,
    UnitGroup,
    UnitGroups,
    removed_positions,
    shrink,
    without_residual,
)
from cria_prune.structure.trace import Trace, trace

__all__ = [
    "Count",
    "ParameterSlice",
    "Tap",
    "Trace",
    "UnitGroup",
    "UnitGroups",
    "capture",
    "discover",
    "removed_positions",
    "shrink",
    "trace",
    "without_residual",
]
