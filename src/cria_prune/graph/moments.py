"""Second moments of signals, exact or as a countsketch of the sample axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from cria_prune.base.errors import SignalError

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


DEAD_TOLERANCE = 1e-6
DOUBLE, SINGLE = 8, 4
"""Bytes of a number, float64 and float32."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and centred second moments of signals (d, M); sums over samples, so they merge exactly.

    Attributes:
        samples: M.
        mean: (d,) float64.
        variance: (d,) float64, mean of the squared centred rows, exact.
        covariance: (d, d) float64, X_c X_c^T / M of the centred rows; None where a sketch stands in.
        sketch: (d, r) float32 centred countsketch S, S S^T / M ~ covariance, rows scaled to their
            exact variance; None where the covariance is kept.
        positive: (d,) float64, the share of the samples above 0; None where it was not counted.

    Examples:
        >>> Moments.from_signals(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        Moments of 2 units over 2 samples, exact covariance
    """

    samples: int
    mean: Tensor
    variance: Tensor
    covariance: Tensor | None = None
    sketch: Tensor | None = None
    positive: Tensor | None = None

    @property
    def units(self) -> int:
        """d."""
        return int(self.mean.shape[0])

    @property
    def has_pairs(self) -> bool:
        """Whether there are second moments between units, exact or as a sketch."""
        return self.covariance is not None or self.sketch is not None

    @classmethod
    def from_signals(cls, X: Tensor) -> Self:
        """Return the exact moments of signals X (units, samples), computed in float64.

        Raises:
            SignalError: X is not a matrix, or has no sample.
        """
        if X.ndim != 2 or X.shape[1] == 0:
            raise SignalError(
                "Moments of signals", f"found shape {tuple(X.shape)}", "Pass (units, samples), samples >= 1"
            )
        mean, covariance = centred_gram(X)
        covariance = covariance / X.shape[1]
        positive = positive_samples(X) / X.shape[1]
        return cls(X.shape[1], mean, covariance.diagonal().clone(), covariance, positive=positive)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples together (Chan, Golub and LeVeque's formula).

        Exact for mean, variance, covariance and, where both counted it, the positive share. Two sketches
        cannot be told from raw sums any more: use `MomentAccumulator.merge`, which keeps them.

        Raises:
            SignalError: the numbers of units differ, or one side holds a sketch.
        """
        if self.units != other.units or self.covariance is None or other.covariance is None:
            raise SignalError(
                "Merging moments",
                f"found {self} and {other}",
                "Merge exact ones; accumulators merge sketches",
            )
        total = self.samples + other.samples
        a, b = self.samples / total, other.samples / total
        step = other.mean - self.mean
        covariance = a * self.covariance + b * other.covariance + a * b * torch.outer(step, step)
        positive = None
        if self.positive is not None and other.positive is not None:
            positive = a * self.positive + b * other.positive
        variance = covariance.diagonal().clone()
        return Moments(total, self.mean + b * step, variance, covariance, positive=positive)

    def select(self, indices: Tensor) -> Moments:
        """Return the moments of the units at `indices` (n,) int64, in that order."""
        indices = indices.to(self.mean.device)
        covariance = self.covariance
        return replace(
            self,
            mean=self.mean[indices],
            variance=self.variance[indices],
            covariance=None if covariance is None else covariance[indices][:, indices],
            sketch=None if self.sketch is None else self.sketch[indices],
            positive=None if self.positive is None else self.positive[indices],
        )

    def scaled(self, factors: Tensor) -> Moments:
        """Return the moments of the signals times `factors` (units,), one for each unit, not negative."""
        by = factors.to(self.mean)
        sketch = None if self.sketch is None else self.sketch * by.to(self.sketch)[:, None]
        return replace(
            self,
            mean=self.mean * by,
            variance=self.variance * by.square(),
            covariance=None if self.covariance is None else self.covariance * torch.outer(by, by),
            sketch=sketch,
        )

    def check_finite(self, name: str) -> None:
        """Check that every moment is a finite number.

        Raises:
            SignalError: NaN or infinity; the text names `name` and counts the units.
        """
        bad = ~(torch.isfinite(self.mean) & torch.isfinite(self.variance))
        for second in (self.covariance, self.sketch):
            # One bad unit spoils its column of the covariance, so the rows count only where the means do not.
            if second is not None and not bad.any():
                bad = ~torch.isfinite(second).all(dim=1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise SignalError(
                f"The signals of {name}",
                f"found NaN or infinity in {int(bad.sum())} of {self.units} units, the first is unit {first}",
                "Check the model's weights and the calibration batches for overflow, or run it in float32",
            )

    def __repr__(self) -> str:
        kind = "exact covariance"
        if self.covariance is None:
            kind = "no second moments" if self.sketch is None else f"sketch of {self.sketch.shape[1]} columns"
        return f"Moments of {self.units} units over {self.samples} samples, {kind}"


def centred_gram(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the Gram matrix of the centred rows (d, d) of X (d, M), in float64."""
    X = X.detach().to(torch.float64)
    mean = X.mean(dim=1)
    centred = X - mean[:, None]
    return mean, centred @ centred.T


def positive_samples(X: Tensor) -> Tensor:
    """Return how many samples of each unit of X (d, M) are above 0: (d,) float64."""
    return (X.detach() > 0).sum(dim=1).to(torch.float64)


def dead_units(moments: Moments) -> Tensor:
    """Return which units are constant over the samples: (d,) bool.

    A unit is dead where sqrt(variance) <= 1e-6 |mean| (docs/method.md section 2, per sample).
    """
    return moments.variance.clamp(min=0).sqrt() <= DEAD_TOLERANCE * moments.mean.abs()
