"""Pictures of a metric: against the size, the share that was ablated, the reduction; with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes as long to import as torch

from cria_prune.base.metrics import metric as metric_of
from cria_prune.report.pictures import (
    GREY,
    INK,
    KEPT,
    LINE,
    WIDE,
    axes_of,
    legend,
    metric_axis,
    size_scale,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.95  # how often such an interval holds the true mean, if the values are normal


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of finite values, one per seed, and half of its t-interval; None for one value alone.

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * spread


Curve = Sequence[tuple[float, Sequence[float | None]]]
"""Points (share removed, one value of the metric per seed; None for one that is no finite number)."""

TRADEOFF = {"dense": ("s", INK, INK), "pruned": ("v", "white", LINE), "recovered": ("o", KEPT, KEPT)}
ABLATION = {
    "lowest": ("lowest scores first", KEPT, "o", "-"),
    "random": ("at random", GREY, "s", "--"),
    "highest": ("highest scores first", LINE, "v", "-."),
}
LABELLED = 8  # so many points have room for their values


def plot_tradeoff(
    series: Mapping[str, Sequence[tuple[float, float]]], ax: Axes | None = None, metric: str = "metric"
) -> Axes:
    """Draw the metric against the size of models.

    Args:
        series: `dense`, `pruned`, `recovered` or any other name -> (parameters, metric) of its models. A
            dotted line leads from each pruned model to the recovered one of the same size.
        ax: where to draw.
        metric: its name; accuracy as a share.
    """
    ax = axes_of(ax, (WIDE, 2.7))
    series = {name: _finite(points) for name, points in series.items()}
    values = [value for points in series.values() for _, value in points]
    sizes = [size for points in series.values() for size, _ in points]
    factor = metric_axis(ax, metric_of(metric), values)
    scale, letter = size_scale(max(sizes, default=0))
    ax.set_xlabel(f"parameters{f' ({letter})' if letter else ''}")
    for size, value in series.get("pruned", []):
        for other, after in series.get("recovered", []):
            if other == size:
                ax.plot([size / scale] * 2, [value * factor, after * factor], ":", color=GREY, linewidth=1.2)
    for name, points in series.items():
        mark, face, edge = TRADEOFF.get(name, (".", GREY, GREY))
        x, y = [size / scale for size, _ in points], [value * factor for _, value in points]
        style: dict[str, Any] = {
            "marker": mark,
            "markerfacecolor": face,
            "markeredgecolor": edge,
            "markersize": 6,
        }
        ax.plot(x, y, linestyle="none", label=name, **style)
        known = name in TRADEOFF and len(values) <= LABELLED
        for left, right in zip(x, y, strict=True) if known else ():
            ax.annotate(
                f"{right:.4g}", (left, right), (6, 0), textcoords="offset points", va="center", fontsize=7.5
            )
    ax.margins(x=0.16, y=0.12)
    if sizes:
        ax.set_xlim(left=0)
        legend(ax, 3)
    return ax


def plot_ablation(ablation: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw what removing neurons does to the metric: the lowest scores first, the highest first, at random.

    Where there are several seeds, the line is their mean and the band its 95 % t-interval.

    Args:
        ablation: `curves` (`lowest`, `random`, `highest` -> points (share removed, values per seed)),
            `metric` (its name) and `dense` (its value without removal).
        ax: where to draw.
    """
    ax = axes_of(ax, (WIDE, 2.9))
    curves = {name: _finite_seeds(ablation["curves"].get(name, [])) for name in ABLATION}
    values = [value for curve in curves.values() for _, found in curve for value in found]
    dense = ablation.get("dense")
    factor = metric_axis(ax, metric_of(str(ablation.get("metric"))), values)
    if isinstance(dense, (int, float)) and math.isfinite(dense):
        ax.axhline(dense * factor, color=INK, linewidth=0.8, linestyle=":", label="dense")
    for name, curve in curves.items():
        if not curve:
            continue
        label, colour, mark, line = ABLATION[name]
        x = [100 * share for share, _ in curve]
        means, halves = _intervals(curve)
        ax.plot(x, means * factor, mark + line, color=colour, label=label, markersize=4)
        if np.isfinite(halves).any():
            half = np.nan_to_num(halves)
            ax.fill_between(
                x, (means - half) * factor, (means + half) * factor, color=colour, alpha=0.18, linewidth=0
            )
    ax.set_xlabel("units removed (%)")
    _within(ax, metric_of(str(ablation.get("metric"))).share)
    legend(ax, 2)
    return ax


def plot_bench(
    series: Mapping[str, Curve],
    ax: Axes | None = None,
    metric: str = "metric",
    dense: Sequence[float] = (),
    names: Sequence[str] | None = None,
) -> Axes:
    """Draw the metric against the reduction, one line per criterion.

    A point is the mean over the seeds; its whisker is the 95 % t-interval of the mean where there are at
    least two. The criteria stand a little beside each other, so that whiskers do not hide.

    Args:
        series: criterion -> points (share removed, one value per seed).
        ax: where to draw.
        metric: its name; accuracy as a share.
        dense: the metric of the dense models, one per seed; their mean is a dotted line.
        names: all criteria that have a colour, so that two pictures agree; those of `series` if None.
    """
    ax = axes_of(ax, (WIDE, 3.6))
    found = {name: _finite_seeds(curve) for name, curve in series.items()}
    drawn = {name: curve for name, curve in found.items() if curve}
    values = [value for curve in drawn.values() for _, seeds in curve for value in seeds]
    known = metric_of(metric)
    factor = metric_axis(ax, known, [*values, *dense])
    shares = sorted({share for curve in drawn.values() for share, _ in curve})
    step = 0.35 * min(np.diff(shares), default=0.1) / max(len(drawn), 1)
    if dense:
        ax.axhline(mean_interval(dense)[0] * factor, color=INK, linewidth=0.8, linestyle=":", label="dense")
    look = styles(list(names or series))
    for place, (name, curve) in enumerate(drawn.items()):
        colour, mark, line = look[name]
        means, halves = _intervals(curve)
        beside = step * (place - (len(drawn) - 1) / 2)
        ax.errorbar(
            [100 * (share + beside) for share, _ in curve],
            means * factor,
            yerr=None if np.isnan(halves).all() else np.nan_to_num(halves) * factor,
            fmt=mark, linestyle=line, color=colour, label=name, markersize=5, linewidth=1, elinewidth=1,
        )  # fmt: skip
    ax.set_xticks([100 * share for share in shares], labels=[f"{100 * share:g}" for share in shares])
    if len(shares) == 1:
        ax.margins(x=0.3)
    ax.set_xlabel("asked to remove (%)")
    _within(ax, known.share)
    if drawn:
        legend(ax, 3 if max(map(len, drawn)) <= 12 else 2)
    return ax


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(size, value) for size, value in points if math.isfinite(size) and math.isfinite(value)]


def _finite_seeds(curve: Curve) -> list[tuple[float, list[float]]]:
    """Return the points, in order of the share, that have a finite value."""
    kept = [
        (share, [value for value in values if value is not None and math.isfinite(value)])
        for share, values in curve
    ]
    return sorted((share, values) for share, values in kept if values)


def _intervals(curve: Sequence[tuple[float, Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Return means and half widths (points,), NaN where there is one seed."""
    both = [mean_interval(values) for _, values in curve]
    halves = [math.nan if half is None else half for _, half in both]
    return np.array([mean for mean, _ in both]), np.array(halves)


def _within(ax: Axes, share: bool) -> None:
    """Cut what an interval of shares says beyond 0 and 100 %."""
    if share:
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -2.0), min(high, 102.0))
