"""Products of a sketch with itself in float64, a block of units at a time.

Legend: d = units, r = sketch columns, M = samples. With B = sketch / √M, B Bᵀ (d, d) stands in for the
covariance; what is needed of it comes from BᵀB (r, r), so that no (d, d) matrix is formed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 4096
"""Units that are held in float64 at a time: 64 MB at 2,048 columns."""


def sketch_rows(sketch: Tensor, samples: int, units: Tensor | None = None) -> Iterator[Tensor]:
    """Yield B (at most 4,096, r) float64, block by block, of all units or of those at `units` (n,) int64."""
    count = len(sketch) if units is None else len(units)
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        rows = sketch[block] if units is None else sketch[units[block].to(sketch.device)]
        yield rows.to(torch.float64, copy=True).div_(samples**0.5)


def sketch_gram(sketch: Tensor, samples: int, units: Tensor | None = None) -> Tensor:
    """Return BᵀB (r, r) float64 of a sketch (d, r), of all units or of those at `units`; O(d r²) time."""
    columns = sketch.shape[1]
    total = torch.zeros(columns, columns, dtype=torch.float64, device=sketch.device)
    for rows in sketch_rows(sketch, samples, units):
        total.addmm_(rows.T, rows)
        del rows  # or it would be held while the next block is made
    return total
