"""Moments of a group's signals: all that the graphs need to know of them.

Legend: d = units, M = samples, r = sketch columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and centred second moments of signals (d, M); sums over samples, so they merge exactly.

    Attributes:
        samples: M.
        mean: (d,) float64.
        variance: (d,) float64, mean of the squared centred rows, exact.
        covariance: (d, d) float64, X_c X_c^T / M of the centred rows; None where a sketch stands in.
        sketch: (d, r) float32 centred countsketch S, S S^T / M ~ covariance, rows scaled to their
            exact variance; None where the covariance is kept.
    """

    samples: int
    mean: Tensor
    variance: Tensor
    covariance: Tensor | None = None
    sketch: Tensor | None = None

    @property
    def units(self) -> int:
        """d."""
        return int(self.mean.shape[0])
