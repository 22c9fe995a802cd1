"""What several seeds say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes as long to import as torch

LEVEL = 0.95


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float | None]:
    """Return the mean and the half width of its t-interval; None for one value, which has none.

    Args:
        values: one per seed, finite.
        level: how often such an interval holds the true mean, if the values are normal.

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, (1 + level) / 2)) * spread
