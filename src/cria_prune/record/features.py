"""Moments of every feature of units that are several features wide, such as attention heads.

Legend: S = samples, n = features of an activation, d = units of a group, width = features per unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cria_prune.graph.accumulator import Total
from cria_prune.graph.moments import DOUBLE

PIECE = 2**20  # numbers that are looked at as float64 at a time


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean and variance of each feature of each unit; they merge exactly.

    The unit's own `Moments` hold all features of a unit as samples of one signal, so its variance counts
    the distances between their means, and no weight can be given to a feature.

    Attributes:
        samples: S, of each feature.
        mean: (d, width) float64.
        variance: (d, width) float64, mean of the squared centred samples (not unbiased).

    Examples:
        >>> one = FeatureMoments.from_samples(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), units=1)
        >>> one.mean.tolist(), one.variance.tolist()
        ([[2.0, 5.0]], [[1.0, 0.0]])
    """

    samples: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def from_samples(cls, samples: Tensor, units: int) -> Self:
        """Return the moments of samples (S, units·width), S >= 1, the features of a unit in a row."""
        total: Self | None = None
        for piece in samples.detach().split(max(1, PIECE // samples.shape[1])):
            wide = piece.to(torch.float64)
            mean = wide.mean(dim=0)
            variance = (wide - mean).square_().mean(dim=0)
            part = cls(len(piece), mean.reshape(units, -1), variance.reshape(units, -1))
            total = part if total is None else total.merge(part)
        assert total is not None
        return total

    def merge(self, other: Self) -> Self:
        """Return the moments of both sets of samples together (Chan, Golub and LeVeque's formula)."""
        total = self.samples + other.samples
        a, b = self.samples / total, other.samples / total
        step = other.mean - self.mean
        variance = a * self.variance + b * other.variance + a * b * step.square()
        return type(self)(total, self.mean + b * step, variance)


class FeatureSums:
    """Adds up the features that one consumer reads, the two halves of the examples apart.

    Args:
        units: d.
        width: features per unit.
    """

    def __init__(self, units: int, width: int) -> None:
        self._units, self._width = units, width
        self._halves: dict[int, FeatureMoments] = {}

    def add(self, half: int, samples: Tensor) -> None:
        """Add samples (S, d·width), S >= 1, on any device, to a half (0 or 1)."""
        part = FeatureMoments.from_samples(samples, self._units)
        self._halves[half] = self._halves[half].merge(part) if half in self._halves else part

    def held_bytes(self, halves: int = 2) -> int:
        """Return the bytes of the means and variances of the halves once samples have come."""
        return halves * 2 * DOUBLE * self._units * self._width

    def adding_bytes(self, samples: int) -> int:
        """Return the most that `add` of so many samples asks for: a piece as float64, centred, squared."""
        return 3 * DOUBLE * min(PIECE, samples * self._units * self._width)

    def pool(self, total: Total, device: torch.device | str) -> None:
        """Take in what all processes have added up; see `MomentAccumulator.pool`."""
        nothing = torch.zeros(self._units, self._width, dtype=torch.float64)
        for half in (0, 1):
            own = self._halves.get(half) or FeatureMoments(0, nothing, nothing)
            count = int(total(torch.tensor([own.samples])))
            if not count:
                continue
            mean = total(own.mean * own.samples) / count
            step = mean - own.mean.cpu()
            variance = total((own.variance.cpu() + step.square()) * own.samples) / count
            self._halves[half] = FeatureMoments(count, mean.to(device), variance.to(device))

    def moments(self, half: int | None) -> FeatureMoments | None:
        """Return the moments of a half, or of all samples (None), on the CPU; None where there are none."""
        parts = [self._halves[key] for key in sorted(self._halves) if half in (None, key)]
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
        return FeatureMoments(total.samples, total.mean.cpu(), total.variance.cpu())
