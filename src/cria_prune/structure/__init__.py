"""What may be removed: unit groups, found from a model's ATen operations."""

from cria_prune.structure.alike import alike, counted_together
from cria_prune.structure.capture import capture
from cria_prune.structure.discover import discover
from cria_prune.structure.groups import (
    Count,
    ParameterSlice,
    Tap,
    UnitGroup,
    UnitGroups,
    freeze,
    removed_positions,
    shrink,
    shrunk_shapes,
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
    "alike",
    "capture",
    "counted_together",
    "discover",
    "freeze",
    "removed_positions",
    "shrink",
    "shrunk_shapes",
    "trace",
    "without_residual",
]
