"""Second moments of signals, exact or as a countsketch of the sample axis; and how they are added up.

Legend: d = units, M = samples, m = samples of one batch, r = columns of a sketch (buckets),
X (d, M) = signals, S (d, r) = a sketch, B = S / √M, so that B Bᵀ stands for the covariance.

docs/method.md section 2 says why a sketch of the samples is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
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
        # Means and variances are looked at first: they name the units, and cost d numbers in place of d².
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
    # Relative to the mean: a constant output in float32 shows a deviation of rounding,
    # about 1e-7 of its size. A unit that is always 0 has 0 on both sides, and is dead too.
    return moments.variance.clamp(min=0).sqrt() <= DEAD_TOLERANCE * moments.mean.abs()


ROWS = 128  # of a Gram matrix at a time
PIECE = 4096  # samples that are looked at as float64, and dealt to a sketch, at a time

Total = Callable[[Tensor], Tensor]
"""A tensor -> its sum over all processes, on the CPU, the same bits on each; all call it in one order."""


class MomentAccumulator:
    """Adds up batches of signals and gives their moments.

    Exact: Gram matrix of the centred rows in float64, updated by Chan's formula; merging is exact. Only its
    lower triangle is computed, the rest is its mirror image.
    Sketch: every sample goes, with a random sign, to one of r buckets. The buckets are dealt like cards,
    without putting one back before all are used: up to r samples the sketch is exact. A sample's bucket and
    sign depend on its number alone, so the sketch is the same in whatever order and by however many
    processes the samples are added. The sum of the signs of a bucket is kept, so that the mean can be taken
    out at the end.

    Args:
        units: d.
        exact: keep the covariance (d, d); otherwise a sketch (d, r).
        columns: r.
        seed: of buckets and signs.
        positive: also count the samples above 0.
        pairs: keep second moments between the units; without, their means and variances alone.

    Examples:
        >>> total = MomentAccumulator(2)
        >>> total.add(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        >>> total.moments().variance.tolist()
        [1.0, 0.0]
    """

    def __init__(
        self,
        units: int,
        exact: bool = True,
        columns: int = 2048,
        seed: int = 0,
        positive: bool = False,
        pairs: bool = True,
    ) -> None:
        if units < 1 or columns < 1:
            raise SignalError(
                "A MomentAccumulator", f"found units={units}, columns={columns}", "Both must be at least 1"
            )
        self.units, self.exact, self.columns, self.seed, self.pairs = units, exact, columns, seed, pairs
        self.samples = 0
        # Of the last deal the cards are kept, for samples mostly come in the order of their numbers.
        self._deck = (-1, torch.empty(0), torch.empty(0))  # the last deal: its number, buckets and signs
        self._mean = torch.zeros(units, dtype=torch.float64)
        self._square = torch.zeros(units, dtype=torch.float64)  # sum of squared centred values, if not exact
        self._gram: Tensor | None = None  # (d, d) float64, right below and on the diagonal
        self._positive = self._mean if positive else None  # (d,) float64, samples above 0
        self._shift = self._mean  # what is subtracted before a sample enters its bucket
        self._buckets: Tensor | None = None  # (r, d) float32
        self._signs: Tensor | None = None  # (r,) float64, sum of the signs of a bucket

    def held_bytes(self) -> int:
        """Return the bytes of the tensors above once samples have come."""
        lines = DOUBLE * self.units * (3 if self._positive is None else 4)
        return lines + self._pairs_bytes() + (DOUBLE * self.columns if self.pairs and not self.exact else 0)

    def moments_bytes(self) -> int:
        """Return the bytes of the `Moments` that it gives."""
        return DOUBLE * self.units * (2 if self._positive is None else 3) + self._pairs_bytes()

    def adding_bytes(self, m: int) -> int:
        """Return the most that `add` of m samples asks for beside what is held."""
        d, p = self.units, min(m, PIECE)
        whole = DOUBLE * m * d  # all samples as float64: centred, or inside of their mean
        if self.pairs and self.exact:
            return whole
        piece = 3 * DOUBLE * p * d  # as float64, centred, squared
        if not self.pairs:
            return max(whole, piece)
        dealt = min(m, self.columns)  # a piece as both, and what of it goes to one deal, with its signs
        return max(whole, piece, (DOUBLE + SINGLE) * p * d + 2 * SINGLE * dealt * d)

    def closing_bytes(self) -> int:
        """Return what two of them ask for while they give their moments, and those of both, beside these.

        Both as one beside the result, or the check of the result: of a sketch, four more of its size.
        """
        if not self.pairs:
            return 0
        return (DOUBLE + 2) * self.units**2 if self.exact else 4 * self._pairs_bytes()

    def _pairs_bytes(self) -> int:
        """Return the bytes of the second moments: the Gram matrix or covariance, or buckets or sketch."""
        if not self.pairs:
            return 0
        return DOUBLE * self.units**2 if self.exact else SINGLE * self.units * self.columns

    def add(self, X: Tensor, numbers: Tensor | None = None) -> None:
        """Add a batch of signals X (units, m), on any device, in any floating type.

        Args:
            X: the signals.
            numbers: (m,) int64 >= 0 on the CPU, different for every sample ever added; those of one deal,
                j·r to (j + 1)·r - 1, share no bucket. Samples without are numbered as they come. Only a
                sketch asks for them.

        Raises:
            SignalError: X is not (units, m).
        """
        if X.ndim != 2 or X.shape[0] != self.units:
            raise SignalError(
                "A batch of signals", f"found shape {tuple(X.shape)}", f"Pass ({self.units}, samples)"
            )
        if X.shape[1] == 0:
            return
        if self._positive is not None:
            self._positive = self._positive.to(X.device) + positive_samples(X)
        X = X.detach()
        if self.pairs and self.exact:
            self._add_exact(X)
            return
        # In float64 whatever the signals are: nearly equal numbers are subtracted when they are centred.
        mean = X.mean(dim=1, dtype=torch.float64)
        if self._buckets is None and self.pairs:
            # A sample enters its bucket once, so it has to be centred by what is known then: the first
            # batch's mean, for all batches. What the shift is off by is taken out at the end, with the sum of
            # the signs. Without any shift a float32 bucket would hold the mean, and round the signal away.
            self._shift = mean
            self._buckets = torch.zeros(self.columns, self.units, dtype=torch.float32, device=X.device)
            self._signs = torch.zeros(self.columns, dtype=torch.float64, device=X.device)
        if numbers is None:
            numbers = torch.arange(self.samples, self.samples + X.shape[1])
        # The variances are exact also beside a sketch, whose rows are scaled to them at the end.
        square = torch.zeros_like(mean)
        for piece, part in zip(X.split(PIECE, dim=1), numbers.split(PIECE), strict=True):
            wide = piece.to(torch.float64)
            square += (wide - mean[:, None]).square().sum(dim=1)
            if self.pairs:
                self._deal((wide - self._shift[:, None]).T.to(torch.float32), part)
        self._pool(X.shape[1], mean, square)

    def _add_exact(self, X: Tensor) -> None:
        """Add a batch to mean and Gram matrix."""
        # A copy in any case: it is written into, and what came may be the model's own activation.
        centred = X.to(torch.float64, copy=True)
        mean = centred.mean(dim=1)
        centred -= mean[:, None]
        # The squares are in the diagonal of the Gram matrix; those that `_pool` keeps are not read here.
        self._pool(X.shape[1], mean, torch.zeros_like(mean))
        if self._gram is None:
            self._gram = torch.zeros(self.units, self.units, dtype=torch.float64, device=X.device)
        # Half of the products are enough of a symmetric matrix: each block of rows
        # up to its own end. They stay in float64, for a unit that others predict
        # to six digits is what `innovation` looks for (docs/decisions/0017).
        for start in range(0, self.units, ROWS):
            stop = start + ROWS
            self._gram[start:stop, :stop].addmm_(centred[start:stop], centred[:stop].T)

    def merge(self, other: MomentAccumulator) -> MomentAccumulator:
        """Return a new accumulator over the samples of both; neither argument changes.

        Exact for covariances. The buckets of `other` are shuffled and signed afresh, so that sketches
        made with one seed stay independent.

        Raises:
            SignalError: units, kind or columns differ.
        """
        kinds = [(item.units, item.exact, item.pairs) for item in (self, other)]
        if kinds[0] != kinds[1] or (not self.exact and self.columns != other.columns):
            raise SignalError(
                "Merging two accumulators",
                f"found {self.units} and {other.units} units, exact={self.exact} and {other.exact}, "
                f"pairs={self.pairs} and {other.pairs}, {self.columns} and {other.columns} columns",
                "Make both with the same arguments",
            )
        one, two = self._positive, other._positive
        total = MomentAccumulator(self.units, self.exact, self.columns, self.seed, pairs=self.pairs)
        total._positive = None if one is None or two is None else one + two.to(one.device)
        for part in (self, other):
            if part.samples:
                total._pool(part.samples, part._mean, part._square)
            if part._gram is not None:
                total._gram = part._gram.clone() if total._gram is None else total._gram.add_(part._gram)
        if self.pairs and not self.exact:
            total._merge_buckets(self, other)
        return total

    def pool(self, total: Total, device: torch.device | str = "cpu") -> None:
        """Take in what the accumulators of all processes hold, each of its own samples.

        Afterwards every one holds all samples, with the same bits. Exact up to rounding (the formula of Chan,
        Golub and LeVeque for many parts): every part is first moved about the common mean.

        Args:
            total: the sum over the processes.
            device: where the result goes.
        """
        # A process without a sample goes through every sum below with zeros: a sum waits for all of them.
        own, count = self.samples, int(total(torch.tensor([self.samples])))
        if not count:
            return
        # Each part is moved about the common mean before it is added. Sums of
        # uncentred squares would be simpler, and their difference would cancel.
        mean = total(self._mean * own).cpu() / count
        step = mean - self._mean.cpu()
        square = total(self._square.cpu() + own * step.square())
        if self._positive is not None:
            self._positive = total(self._positive).to(device)
        if not self.pairs:
            pass
        elif self.exact:
            nothing = torch.zeros(self.units, self.units, dtype=torch.float64)
            gram = nothing if self._gram is None else self._gram
            step = step.to(gram.device)
            self._gram = total(gram.addr(step, step, alpha=own)).to(device)
        else:
            self._pool_buckets(total, mean, device)
        self.samples, self._mean, self._square = count, mean.to(device), square.to(device)

    def _pool_buckets(self, total: Total, mean: Tensor, device: torch.device | str) -> None:
        """Sum the buckets of all processes about the common mean (d,), the new shift."""
        buckets, signs = self._buckets, self._signs
        if buckets is None or signs is None:
            buckets = torch.zeros(self.columns, self.units)
            signs = torch.zeros(self.columns, dtype=torch.float64)
        # Buckets of another shift cannot be added: each part
        # is first put about the common mean, by its own signs.
        step = (mean.to(buckets.device) - self._shift.to(buckets.device)).to(torch.float32)
        self._buckets = total(buckets.addr(signs.to(torch.float32), step, alpha=-1)).to(device)
        self._signs, self._shift = total(signs).to(device), mean.to(device)

    def moments(self) -> Moments:
        """Return the moments of all samples so far, on the device of the batches.

        Raises:
            SignalError: nothing was added.
        """
        if not self.samples:
            raise SignalError("The moments of signals", "found no sample", "Add at least one batch")
        variance = self._square / self.samples
        positive = None if self._positive is None else self._positive / self.samples
        if not self.pairs:
            return Moments(self.samples, self._mean.clone(), variance, positive=positive)
        if self.exact:
            assert self._gram is not None
            # The quotient is a new matrix, so `mirrored` may write into it and batches may still come.
            covariance = mirrored(self._gram / self.samples)
            variance = covariance.diagonal().clone()
            return Moments(self.samples, self._mean.clone(), variance, covariance, positive=positive)
        assert self._buckets is not None and self._signs is not None
        # A bucket holds its samples less the shift, each with its sign; so the
        # sum of the signs says how often the rest of the mean is still in it.
        step = (self._mean - self._shift).to(torch.float32)
        sketch = self._buckets - torch.outer(self._signs.to(torch.float32), step)
        # Signs make the norm of a row right in the mean only. Without the exact
        # norm a sketch is worse than a subsample (docs/method.md section 2).
        norm = sketch.square().sum(dim=0, dtype=torch.float64).sqrt()
        scale = torch.where(norm > 0, self._square.sqrt() / norm.clamp(min=1e-300), 0.0)
        sketch = (sketch * scale.to(torch.float32)).T.contiguous()
        return Moments(self.samples, self._mean.clone(), variance, sketch=sketch, positive=positive)

    def _pool(self, samples: int, mean: Tensor, square: Tensor) -> None:
        """Pool count, mean and squares of other samples into this accumulator, and move its Gram matrix."""
        if not self.samples:
            self.samples, self._mean, self._square = samples, mean.clone(), square.clone()
            return
        total = self.samples + samples
        step = mean - self._mean
        weight = self.samples * samples / total
        self._square = self._square + square + weight * step.square()
        if self._gram is not None:
            self._gram.addr_(step, step, alpha=weight)
        self._mean = self._mean + step * (samples / total)
        self.samples = total

    def _deal(self, rows: Tensor, numbers: Tensor) -> None:
        """Add shifted samples (m, d) float32 of these numbers (m,) to signed buckets."""
        assert self._buckets is not None and self._signs is not None
        deals, slots = numbers // self.columns, numbers % self.columns
        which, place = deals.unique(return_inverse=True)
        for index, deal in enumerate(which.tolist()):
            # Within a deal no bucket is used twice, so up to r
            # samples lie alone and their products are exact.
            if deal != self._deck[0]:
                self._deck = (deal, *_cards(self.columns, self.seed, deal))
            mine = slots if len(which) == 1 else slots[place == index]
            part = rows if len(which) == 1 else rows[(place == index).to(rows.device)]
            where, signs = (cards[mine].to(rows.device) for cards in self._deck[1:])
            # A bucket occurs once in `where`, so the order of additions, hence the result, is fixed.
            self._buckets.index_add_(0, where, part * signs.to(torch.float32)[:, None])
            self._signs.index_add_(0, where, signs)

    def _merge_buckets(self, first: MomentAccumulator, second: MomentAccumulator) -> None:
        """Take the buckets of `first`, and those of `second` shuffled and signed, about one shift."""
        for part, shuffled in ((first, False), (second, True)):
            if part._buckets is None or part._signs is None:
                continue
            buckets, signs = part._buckets, part._signs
            if shuffled:
                # Made with one seed, sample 7 of both parts would lie in one bucket
                # with one sign, and their product would not vanish in the mean. The
                # numbers of samples draw other cards, the same for the same two parts.
                order, flips = _cards(self.columns, self.seed, first.samples, second.samples)
                order, flips = order.to(buckets.device), flips.to(buckets.device)
                buckets = buckets[order] * flips.to(torch.float32)[:, None]
                signs = signs[order] * flips
            if self._buckets is None or self._signs is None:
                self._buckets, self._signs, self._shift = buckets.clone(), signs.clone(), part._shift
                continue
            # The sum keeps the first part's shift.
            step = (part._shift - self._shift).to(torch.float32)
            self._buckets = self._buckets + buckets + torch.outer(signs.to(torch.float32), step)
            self._signs = self._signs + signs


def mirrored(lower: Tensor) -> Tensor:
    """Return a matrix (d, d), of which only the blocks on and below the diagonal are right, made whole."""
    for start in range(0, len(lower), ROWS):
        stop = start + ROWS
        lower[:start, start:stop] = lower[start:stop, :start].T
    return lower


def _cards(columns: int, *key: int) -> tuple[Tensor, Tensor]:
    """Return buckets (columns,) int64 in an order, and signs (columns,) float64, drawn from the key alone."""
    # NumPy takes no negative number for a seed. NumPy's generator gives the same cards on every device.
    generator = np.random.default_rng([number % 2**64 for number in key])
    signs = generator.integers(0, 2, columns) * 2.0 - 1
    return torch.from_numpy(generator.permutation(columns)), torch.from_numpy(signs)
