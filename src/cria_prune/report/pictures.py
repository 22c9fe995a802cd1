"""Pictures of a run and of its layers. Each takes a matplotlib `ax` (or makes one) and gives it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cria_prune.base.errors import needed
from cria_prune.base.files import atomic
from cria_prune.base.metrics import Metric
from cria_prune.graph.graph import Graph
from cria_prune.planning.plan import Plan
from cria_prune.spectrum.embedding import laplacian_embedding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, GONE, LINE, INK = "#2a6f97", "#dfa27a", "#b3420f", "#333333"
GREY = "#8a8a8a"
MANY = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#333333", "#56b4e9", "#e69f00")
MARKS = "osD^vPX<>*h"
WIDE, NARROW = 4.2, 2.6
"""Widths in inches: a picture on a telephone, and one of two side by side there."""


def write_picture(path: Path, title: str, size: tuple[float, float], draw: Callable[[Axes], Any]) -> None:
    """Write a PNG, whole or not at all.

    Args:
        path: the file.
        title: above the picture.
        size: width and height in inches.
        draw: takes the axes.

    Raises:
        PackageError: matplotlib is not installed.
        ArtifactError: the system refuses.
    """
    ax, figure = new_axes(size, f"The picture {path}")
    figure.suptitle(title, fontsize=8, parse_math=False)
    draw(ax)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def new_axes(size: tuple[float, float], asked: str = "A picture") -> tuple[Axes, Figure]:
    """Return axes on a new figure of `size` inches; a PackageError where matplotlib is missing."""
    with needed("report", asked):
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure.subplots(), figure


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the axes without its upper and right line, or new ones of `size` inches."""
    ax = new_axes(size)[0] if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def legend(ax: Axes, columns: int) -> None:
    """Put the legend above the axes, so that it covers nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize=8)


def short(name: str) -> str:
    """Keep the ends of a long name: the layer's number is often at one of them."""
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def common_prefix(names: Sequence[str]) -> str:
    """Return what all names begin with, up to a dot: said once, it leaves room for what differs.

    >>> common_prefix(["model.layers.0.up", "model.layers.11.up"])
    'model.layers.'
    """
    if len(names) < 2:
        return ""
    pairs = zip(min(names), max(names), strict=False)  # all others lie between the two
    shared = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return shared[: shared.rfind(".") + 1]


def styles(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Return name -> (colour, marker, line): no two of up to 77 names are the same.

    >>> styles(["a", "b"])["b"]
    ('#d55e00', 's', '-')
    """
    lines = ["-"] * len(MANY) + ["--"] * len(MANY)
    three = zip(cycle(MANY), cycle(MARKS), cycle(lines), strict=False)
    return dict(zip(names, islice(three, len(names)), strict=True))


def metric_axis(ax: Axes, metric: Metric, values: Sequence[float]) -> float:
    """Name the axis y after a metric and choose its scale; return the factor for its values.

    Shares are drawn as per cent and never beyond 0 and 100; a metric of which lower is better on a
    logarithmic axis where the largest is over 10 times the smallest.

    Args:
        ax: where.
        metric: what is drawn.
        values: all that are drawn, as they are in files.
    """
    ax.set_ylabel(f"{metric.name} (%)" if metric.share else metric.name, parse_math=False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    if not metric.higher_is_better and values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
        plain_numbers(ax)
    return 100.0 if metric.share else 1.0


def plain_numbers(ax: Axes) -> None:
    """Write the numbers of a logarithmic axis y as 0.5 or 200, at 1, 2 and 5 times the powers of ten.

    The usual ones are formulas, which the page does not set: names of layers may hold a dollar sign.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = ax.dataLim.intervaly
    wide = not (0 < low <= high < 50 * low)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def size_scale(largest: float) -> tuple[float, str]:
    """Return what to divide a number of parameters by, and the letter for it."""
    steps = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((step, letter) for step, letter in steps if largest >= step), (1.0, ""))


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


DRAWN_EDGES = 3
"""Of a dense graph only so many edges are drawn per unit: its strongest."""


def plot_spectrum(
    values: Sequence[float] | Mapping[str, Sequence[float]], ax: Axes | None = None, names: bool = True
) -> Axes:
    """Draw the top generalized eigenvalues z of a layer's pencil, largest first.

    The axis is logarithmic where the largest is over 20 times the smallest. At the dotted line, z = 1, the
    layer stretches nothing.

    Args:
        values: z, descending; or up to two spectra by their names: dots and crosses.
        ax: where to draw.
        names: say which is which, where there are two.
    """
    named = values if isinstance(values, Mapping) else {"": values}
    ax = axes_of(ax, (NARROW, 1.6))
    for (name, found), (colour, mark) in zip(named.items(), ((KEPT, "o"), (LINE, "x")), strict=False):
        z = np.asarray(found, dtype=float)
        good = np.isfinite(z) & (z > 0)
        ax.plot(np.arange(1, len(z) + 1)[good], z[good], mark, color=colour, markersize=3.5, label=name)
    low, high = ax.dataLim.intervaly
    if 0 < 20 * low < high < np.inf:
        ax.set_yscale("log")
        plain_numbers(ax)
    else:
        ax.locator_params(axis="y", nbins=4)
    ax.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("z")
    ax.locator_params(axis="x", integer=True, nbins=4)
    if names and len(named) > 1:
        legend(ax, 2)
    return ax


def plot_neuron_graph(graph: Graph, removed: Iterable[int] = (), ax: Axes | None = None) -> Axes:
    """Draw the neurons of a layer where the spectrum of their own graph puts them.

    The places are the first two eigenvectors after the constant one, see `laplacian_embedding`; units
    outside the largest piece have none and are not drawn. Of every unit its three strongest edges are drawn.

    Args:
        graph: of d units.
        removed: which of them were removed: crosses; all others are dots.
        ax: where to draw.
    """
    ax = axes_of(ax, (WIDE, 3.6))
    places = laplacian_embedding(graph).numpy()
    gone = np.zeros(graph.units, dtype=bool)
    gone[np.fromiter(removed, dtype=int)] = True
    rows, cols = strongest_edges(graph)
    ends = np.stack([places[rows], places[cols], np.full((len(rows), 2), np.nan)], axis=1).reshape(-1, 2)
    # One line with gaps, because a page holds one path far better than thousands.
    ax.plot(ends[:, 0], ends[:, 1], color=GREY, linewidth=0.4, alpha=0.5, zorder=1)
    size = float(np.clip(1500 / max(graph.units, 1), 11, 28))
    for chosen, colour, mark, name in ((~gone, KEPT, "o", "kept"), (gone, LINE, "x", "removed")):
        where = places[chosen & np.isfinite(places[:, 0])]
        look: dict[str, Any] = {"s": size, "c": colour, "marker": mark, "linewidths": 1}
        ax.scatter(where[:, 0], where[:, 1], label=name, zorder=2, **look)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    legend(ax, 2)
    return ax


def strongest_edges(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and cols (m,) of the edges that are among the DRAWN_EDGES strongest of one end."""
    rows, cols, weights = graph.rows.numpy(), graph.cols.numpy(), graph.weights.numpy()
    order = np.argsort(-weights, kind="stable")
    ends = np.stack([rows[order], cols[order]], axis=1).ravel()
    # The rank of an edge among those of a unit: how often the unit has come before, strongest first.
    first = np.argsort(ends, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(ends[first])) + 1] if len(ends) else np.zeros(0, dtype=int)
    rank = np.empty(len(ends), dtype=int)
    rank[first] = np.arange(len(ends)) - np.repeat(starts, np.diff(np.r_[starts, len(ends)]))
    chosen = np.sort(order[(rank.reshape(-1, 2) < DRAWN_EDGES).any(axis=1)])
    return rows[chosen], cols[chosen]
