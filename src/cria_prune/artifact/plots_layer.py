"""Pictures of one layer: its spectrum, its neuron graphs. Each takes an `ax` and gives it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cria_prune.artifact.canvas import GREY, KEPT, LINE, NARROW, WIDE, axes_of, legend, plain_numbers
from cria_prune.graph import Graph
from cria_prune.spectrum import laplacian_embedding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def strongest_edges(graph: Graph, each: int = DRAWN_EDGES) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and cols (m,) of the edges that are among the `each` strongest of one of their ends."""
    rows, cols, weights = graph.rows.numpy(), graph.cols.numpy(), graph.weights.numpy()
    order = np.argsort(-weights, kind="stable")
    ends = np.stack([rows[order], cols[order]], axis=1).ravel()
    # The rank of an edge among those of a unit: how often the unit has come before, strongest first.
    first = np.argsort(ends, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(ends[first])) + 1] if len(ends) else np.zeros(0, dtype=int)
    rank = np.empty(len(ends), dtype=int)
    rank[first] = np.arange(len(ends)) - np.repeat(starts, np.diff(np.r_[starts, len(ends)]))
    chosen = np.sort(order[(rank.reshape(-1, 2) < each).any(axis=1)])
    return rows[chosen], cols[chosen]
