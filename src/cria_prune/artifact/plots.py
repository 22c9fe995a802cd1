"""Pictures of a run. Each takes a matplotlib `ax` (or makes one) and gives it back.

matplotlib is imported inside, and a new figure is no part of pyplot: nothing pops up or stays open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cria_prune.artifact.canvas import GONE, KEPT, LINE, axes_of, common_prefix, legend, short, size_scale
from cria_prune.plan.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_widths(plan: Plan | Mapping[str, Sequence[int]], ax: Axes | None = None) -> Axes:
    """Draw the units of every group before and after, as bars.

    Args:
        plan: a plan, or group name -> (units before, units after).
        ax: where to draw.
    """
    widths = (
        {name: (size, len(plan.kept[name])) for name, size in plan.sizes.items()}
        if isinstance(plan, Plan)
        else {name: (int(pair[0]), int(pair[1])) for name, pair in plan.items()}
    )
    ax = axes_of(ax, (4.2, 0.7 + 0.19 * max(len(widths), 2)))
    rows = np.arange(len(widths))
    before = np.array([pair[0] for pair in widths.values()])
    after = np.array([pair[1] for pair in widths.values()])
    ax.barh(rows, before, color=GONE, height=0.78, label="removed")
    ax.barh(rows, after, color=KEPT, height=0.78, label="kept")
    edge = before.max(initial=1)
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        ax.text(
            old + edge * 0.015, row, str(new) if new == old else f"{old} → {new}", va="center", fontsize=7.5
        )
    ax.set_xlim(0, edge * 1.25)
    ax.set_ylim(len(widths) - 0.4, -0.6)
    prefix = common_prefix(list(widths))
    labels = [short(name[len(prefix) :]) for name in widths]
    ax.set_yticks(rows, labels=labels, parse_math=False, fontsize=7.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"units of {prefix}…" if prefix else "units", parse_math=False)
    legend(ax, 2)
    return ax


def plot_rounds(history: Sequence[Mapping[str, Any]], ax: Axes | None = None, metric: str = "metric") -> Axes:
    """Draw the parameters (bars, left) and the metric (line, right) over the rounds.

    Args:
        history: one mapping per round with `round` and, where known, `parameters` and `metric`.
        ax: where to draw.
        metric: name of the metric.
    """
    ax = axes_of(ax, (4.2, 2.7))
    places = np.arange(len(history))
    labels = [str(row.get("round", place)) for place, row in enumerate(history)]
    counts = [row.get("parameters") or 0 for row in history]
    scale, unit = size_scale(max(counts, default=0))
    ax.bar(places, np.array(counts, dtype=float) / scale, color=KEPT, alpha=0.3, width=0.6)
    ax.set_xticks(places, labels=labels, parse_math=False)
    ax.set_xlabel("round")
    ax.set_ylabel(f"parameters{f' ({unit})' if unit else ''}", color=KEPT)
    known = [(place, row["metric"]) for place, row in enumerate(history) if row.get("metric") is not None]
    if known:
        right = ax.twinx()
        factor = 100 if metric == "accuracy" else 1
        values = [value * factor for _, value in known]
        for left in range(len(known) - 1):
            (start, _), (stop, _) = known[left : left + 2]
            style = "-" if stop == start + 1 else ":"  # dotted across rounds that were not measured
            right.plot([start, stop], values[left : left + 2], style, color=LINE)
        right.plot([place for place, _ in known], values, "o", color=LINE, markersize=4)
        for number, (place, _) in enumerate(known):
            beside = values[max(number - 1, 0) : number] + values[number + 1 : number + 2]
            below = bool(beside) and values[number] < min(beside)
            right.annotate(
                f"{values[number]:.4g}",
                (place, values[number]),
                (0, -11 if below else 5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=LINE,
            )
        right.margins(y=0.18)
        right.set_ylabel(f"{metric} (%)" if factor == 100 else metric, color=LINE, parse_math=False)
        right.spines["top"].set_visible(False)
    return ax


def plot_scores(scores: Sequence[float] | np.ndarray, kept: Sequence[int], ax: Axes | None = None) -> Axes:
    """Draw how the scores of one group's units are spread, and where the cut lies.

    Args:
        scores: (units,) importance.
        kept: indices of the units that stay.
        ax: where to draw.
    """
    ax = axes_of(ax, (2.6, 1.6))
    values = np.asarray(scores, dtype=float)
    stays = np.zeros(len(values), dtype=bool)
    stays[np.asarray(kept, dtype=int)] = True
    finite = np.isfinite(values)
    if finite.any():
        edges = np.histogram_bin_edges(values[finite], bins=min(24, max(6, len(values) // 3)))
        ax.hist(
            [values[finite & ~stays], values[finite & stays]],
            bins=list(edges),
            stacked=True,
            color=[GONE, KEPT],
            label=["removed", "kept"],
        )
        if (finite & stays).any() and (finite & ~stays).any():
            ax.axvline(values[finite & stays].min(), color=LINE, linewidth=1.2, linestyle="--")
    ax.locator_params(axis="both", nbins=3)
    ax.ticklabel_format(axis="x", scilimits=(-2, 3))
    return ax
