"""From the moments of the signals to a graph of the neurons (docs/method.md section 2).

Legend: d = units, k = neighbours, D² = squared distance per sample, med = median D² of the edges.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cria_prune.errors import SignalError
from cria_prune.graph.graph import Graph
from cria_prune.graph.moments import Moments
from cria_prune.graph.neighbors import edge_distances, nearest_neighbors

COMPLETE_UNITS = 64
REFINE_UNITS = 2048
SOFTENING = 1e-3
SAME = 1e-10  # distances under this share of the mean variance are between duplicates


def learn_graph(
    moments: Moments,
    neighbors: int = 32,
    ridge: float = 1e-2,
    grounded: bool = False,
    complete: int = COMPLETE_UNITS,
) -> Graph:
    """Return the graph of the units' signals.

    Edges: all pairs up to `complete` units, above that the `neighbors` nearest, made symmetric. Weight
    1 / (D²/med + 1e-3), without unit; duplicates get 1,000. Where half of the distances are between
    duplicates (median under 1e-10 of the mean variance), the mean of the other distances stands in for
    the median, and where there is no other, the mean variance.

    Args:
        moments: of the signals (d, M), with covariance or sketch, all finite.
        neighbors: k.
        ridge: e in mean weighted degrees; in units of 1 where there is no edge.
        grounded: join every unit to the zero signal: D² is its variance.
        complete: up to this many units every pair is an edge.

    Raises:
        SignalError: the moments hold neither covariance nor sketch, or k < 1 or ridge < 0.
    """
    if moments.covariance is None and moments.sketch is None:
        raise SignalError("A graph from signals", f"found {moments}", "Record a covariance or a sketch")
    if neighbors < 1 or ridge < 0:
        raise SignalError(
            "A graph from signals", f"found neighbors={neighbors}, ridge={ridge}", "Use k >= 1 and ridge >= 0"
        )
    d = moments.units
    rows, cols = nearest_neighbors(moments, d if d <= complete else neighbors)
    squared = edge_distances(moments, rows, cols)
    variance = moments.variance.cpu()
    med = _typical(squared, float(variance.mean()))
    weights = 1 / (squared / med + SOFTENING)
    ground = 1 / (variance / med + SOFTENING) if grounded else None
    mean_degree = float(2 * weights.sum() / d) if len(rows) else 1.0
    return Graph(d, rows, cols, weights, ridge * mean_degree, ground)


def most_edges(units: int, neighbors: int = 32, complete: int = COMPLETE_UNITS) -> int:
    """Return how many edges a graph of so many units has at most: every pair, or k for each unit."""
    if units <= max(complete, neighbors + 1):
        return units * (units - 1) // 2
    return units * neighbors


def refine_graph(graph: Graph, iterations: int = 10) -> Graph:
    """Return the graph with its weights learned on the same edges: max log det Θ − tr(Θ S).

    Fixed point w ← w·√(R_e/d_e²), R_e the effective resistance under the current weights and d_e² the
    distance without unit that the graph was built from, 1/w of the argument. The ridge stays; ground
    weights are refined in the same way, their resistance being (L⁻¹)[p, p].

    Raises:
        SignalError: more than 2,048 units (the inverse is dense).
    """
    if graph.units > REFINE_UNITS:
        raise SignalError(
            "Refining a graph", f"found {graph.units} units", f"Refine up to {REFINE_UNITS}; skip it above"
        )
    squared, current = 1 / graph.weights, graph
    grounds = None if graph.ground is None else 1 / graph.ground
    for _ in range(iterations):
        weights = current.weights * (current.effective_resistances() / squared).sqrt()
        ground = current.ground
        if ground is not None and grounds is not None:
            K = torch.cholesky_inverse(torch.linalg.cholesky(current.dense_laplacian()))
            ground = ground * (K.diagonal() / grounds).sqrt()
        current = replace(current, weights=weights, ground=ground)
    return current


def _typical(squared: Tensor, variance: float) -> float:
    """Return the scale of D² (m,): median, or mean of what is not 0, or the mean variance, or 1."""
    least = SAME * variance
    med = float(np.median(squared.numpy())) if len(squared) else 0.0
    if med > least:
        return med
    apart = squared[squared > least]
    return float(apart.mean()) if len(apart) else variance or 1.0
