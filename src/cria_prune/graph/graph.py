"""From moments to a graph of the neurons: neighbours, weights, Laplacian; and the graphs that are kept.

Legend: d = units, m = edges, k = neighbours, r = columns of a sketch, C (d, d)
= covariance, S (d, r) = sketch, D² = squared distance of two signals per
sample, W = weights, e = ridge, L = diag(W1) − W + e·I = Laplacian.

docs/method.md section 2 has the weights and the ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from cria_prune.base.errors import SignalError
from cria_prune.graph.moments import DOUBLE, SINGLE, Moments, dead_units

BLOCK = 1024
EDGE_BLOCK = 2048
ROWS = 64  # of a block, whose distances are made at a time: they stay in the cache
# Below this share of the two variances a difference of products is rounding: a duplicate, at distance 0.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
COMMON_ROUNDING = 1e-13  # the same, of the variances before the common signal was taken out


def nearest_neighbors(moments: Moments, k: int) -> tuple[Tensor, Tensor]:
    """Return the edges rows < cols (m,), int64 on the CPU, of the symmetric k-nearest-neighbour graph.

    p and q are joined where one is among the k nearest of the other. Ties go to the lower index; the
    edges are sorted by row, then column. k >= d - 1 gives the complete graph.
    """
    d = moments.units
    if k >= d - 1:
        pairs = torch.triu_indices(d, d, offset=1)
        return pairs[0], pairs[1]
    # Exact neighbours, a block of units against all others: 1,024 × d distances at a time in place of d².
    products, norms = _products(moments)
    chosen = []
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        squared = _squared_in_place(norms[start:stop, None], norms[None, :], products(start, stop))
        own = torch.arange(start, stop, device=squared.device)
        squared[own - start, own] = torch.inf
        chosen.append(_lowest(squared, k).cpu())
    columns = torch.cat(chosen).reshape(-1)
    rows = torch.arange(d).repeat_interleave(k)
    # United and not intersected: so every unit keeps its k neighbours, and none is
    # alone. One key for each pair sorts the edges and drops those that both ends chose.
    low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
    keys = torch.unique(low * d + high)
    return keys // d, keys % d


def neighbors_bytes(units: int, columns: int | None, complete: bool) -> int:
    """Return the most that neighbours and distances take: moments, the same less what all share, a block.

    `columns` are those of a sketch, None for a covariance; `complete`: all pairs are edges, without a block.
    """
    block = min(units, BLOCK)
    if columns is None:
        return DOUBLE * units * (2 * units + (0 if complete else max(units, 3 * block)))
    ends, squared = EDGE_BLOCK * columns, block * units
    return SINGLE * 2 * (units * columns + max(ends, squared))


def edge_distances(moments: Moments, rows: Tensor, cols: Tensor) -> Tensor:
    """Return D² (m,) float64 on the CPU of the edges rows, cols (m,).

    From a sketch by subtraction of the rows; from the covariance after the mean over units was taken
    out of every sample, where rounding (1e-12 of the remaining variances) counts as 0.
    """
    if moments.covariance is not None:
        C = _without_common(moments.covariance)
        norms, variance = C.diagonal(), moments.variance
        rows, cols = rows.to(C.device), cols.to(C.device)
        squared = _squared(norms[rows], norms[cols], C[rows, cols])
        rounding = COMMON_ROUNDING * (variance[rows] + variance[cols])
        return torch.where(squared <= rounding, 0.0, squared).cpu()
    assert moments.sketch is not None
    # Rows are subtracted, for near duplicates keep their digits so; |p|² + |q|²
    # − 2pq would lose them. For all pairs that is too dear, so the neighbours
    # are found by products, and their distances are then taken afresh.
    S, out = moments.sketch, torch.empty(len(rows), dtype=torch.float64)
    # Two buffers for all blocks: what is kept of each would lie in the way of the next one's memory.
    ends = S.new_empty(2, min(EDGE_BLOCK, len(rows)), S.shape[1])
    for start in range(0, len(rows), EDGE_BLOCK):
        block = slice(start, start + EDGE_BLOCK)
        count = len(rows[block])
        p, q = (
            torch.index_select(S, 0, at[block].to(S.device), out=end[:count])
            for at, end in zip((rows, cols), ends, strict=True)
        )
        step = p.sub_(q)
        out[block] = torch.linalg.vecdot(step, step).to(torch.float64).cpu() / moments.samples
    return out


def _without_common(C: Tensor) -> Tensor:
    """Return the covariance (d, d) of the signals less their mean over units: H C H."""
    # What all units share is in no distance. In the products it can be far larger
    # than what sets units apart, and the difference of the products is rounding then.
    mean = C.mean(dim=0)
    return C - mean[:, None] - mean[None, :] + mean.mean()


def _products(moments: Moments) -> tuple[Callable[[int, int], Tensor], Tensor]:
    """Return a function (start, stop) -> Gram rows (stop - start, d), and the squared norms (d,).

    The rows may be written into, and are gone when the next are asked for.
    """
    if moments.covariance is not None:
        C = _without_common(moments.covariance)
        return (lambda start, stop: C[start:stop].clone()), C.diagonal()
    assert moments.sketch is not None
    S = moments.sketch - moments.sketch.mean(dim=0)
    # One buffer for all blocks: fresh pages for each would cost as much as the product.
    block = S.new_empty(min(BLOCK, len(S)), len(S))
    return (lambda start, stop: torch.mm(S[start:stop], S.T, out=block[: stop - start])), _norms(S)


def _squared(p: Tensor, q: Tensor, product: Tensor) -> Tensor:
    """Return p + q − 2 product, where rounding counts as 0."""
    both = p + q
    squared = both - 2 * product
    return torch.where(squared <= ROUNDING[product.dtype] * both, 0.0, squared)


def _squared_in_place(p: Tensor, q: Tensor, product: Tensor) -> Tensor:
    """`_squared`, row by block of rows, written over the product (b, d)."""
    for rows, norms in zip(product.split(ROWS), p.split(ROWS), strict=True):
        both = norms + q
        rows.mul_(-2).add_(both)
        rows.masked_fill_(rows <= both.mul_(ROUNDING[product.dtype]), 0.0)
    return product


def _norms(S: Tensor) -> Tensor:
    """Return the squared norms (d,) of the rows of S (d, r), without a second S."""
    return torch.cat([rows.square().sum(dim=1) for rows in S.split(BLOCK)])


def _lowest(squared: Tensor, k: int) -> Tensor:
    """Return the columns (b, k) of the k lowest entries of each row of (b, d), ties to the lower index."""
    # topk may take any of equal values, and devices differ. One value more than k shows where the bound
    # cuts through equal ones; only these rows are sorted, and the lower index wins on every machine.
    values, indices = squared.topk(k + 1, dim=1, largest=False, sorted=True)
    tied = values[:, k - 1] == values[:, k]
    indices = indices[:, :k]
    if tied.any():
        indices[tied] = squared[tied].sort(dim=1, stable=True).indices[:, :k]
    return indices


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected weighted graph, its ridge and, where grounded, the edges to the removed neuron.

    Its Laplacian is L = diag(W1) − W + e·I + diag(g): positive definite where e > 0 or every piece
    touches the ground (docs/method.md sections 2 and 3).

    Attributes:
        units: d.
        rows, cols: (m,) int64, rows < cols; every edge once.
        weights: (m,) float64, positive, without unit.
        ridge: e, absolute (already multiplied by the mean degree).
        ground: (d,) float64 weights of the edges to the ground, or None.

    Examples:
        >>> Graph(3, torch.tensor([0, 1]), torch.tensor([1, 2]), torch.ones(2, dtype=torch.float64))
        Graph of 3 units: 2 edges, 1 piece, degrees 1 to 2 (weighted 1 to 2), ridge 0
    """

    units: int
    rows: Tensor
    cols: Tensor
    weights: Tensor
    ridge: float = 0.0
    ground: Tensor | None = None

    def laplacian(self) -> sp.csr_matrix:
        """Return L (d, d), SciPy CSR in float64, with ridge and ground."""
        rows, cols, weights = self.rows.numpy(), self.cols.numpy(), self.weights.numpy()
        here = np.arange(self.units)
        values = np.concatenate([self.diagonal().numpy(), -weights, -weights])
        where = (np.concatenate([here, rows, cols]), np.concatenate([here, cols, rows]))
        return sp.csr_matrix((values, where), shape=(self.units, self.units))

    def dense_laplacian(self) -> Tensor:
        """Return L (d, d), dense float64, with ridge and ground."""
        L = torch.zeros(self.units, self.units, dtype=torch.float64)
        L[self.rows, self.cols] = -self.weights
        L[self.cols, self.rows] = -self.weights
        L.diagonal().copy_(self.diagonal())
        return L

    def diagonal(self) -> Tensor:
        """Return the diagonal of L (d,): weighted degree, ridge and ground."""
        extra = self.ridge if self.ground is None else self.ridge + self.ground
        return self.degrees() + extra

    def degrees(self) -> Tensor:
        """Return the weighted degrees W1 (d,), without ridge and ground."""
        return self.sum_over_edges(self.weights)

    def neighbor_counts(self) -> Tensor:
        """Return the numbers of neighbours (d,) float64."""
        return self.sum_over_edges(torch.ones_like(self.weights))

    def sum_over_edges(self, values: Tensor) -> Tensor:
        """Return, for every unit (d,), the sum of `values` (m,) over its edges, always in one order."""
        # NumPy adds in the order of the edges; an index_add of torch may add in any, and give other bits.
        total = np.zeros(self.units)
        for ends in (self.rows, self.cols):
            total += np.bincount(ends.numpy(), weights=values.numpy(), minlength=self.units)
        return torch.from_numpy(total)

    def incidence(self) -> sp.csr_matrix:
        """Return A (d, m + d or m), CSR, with L = A Aᵀ: W^½-weighted edges, then the ridge and ground."""
        edges, root = len(self.rows), self.weights.sqrt().numpy()
        each = np.arange(edges)
        where = (np.concatenate([self.rows.numpy(), self.cols.numpy()]), np.concatenate([each, each]))
        A = sp.csr_matrix((np.concatenate([root, -root]), where), shape=(self.units, edges))
        if self.ridge == 0 and self.ground is None:
            return A
        # Ridge and ground are edges to a node that is left out, so their columns have one entry.
        extra = torch.full((self.units,), self.ridge, dtype=torch.float64)
        extra = extra if self.ground is None else extra + self.ground
        return sp.hstack([A, sp.diags(extra.sqrt().numpy())], format="csr")

    def pieces(self) -> int:
        """Return the number of connected components, before ridge and ground."""
        ones = np.ones(len(self.rows))
        W = sp.csr_matrix((ones, (self.rows.numpy(), self.cols.numpy())), shape=(self.units, self.units))
        return int(connected_components(W, directed=False, return_labels=False))

    def effective_resistances(self) -> Tensor:
        """Return R_e = (e_p − e_q)ᵀ L⁻¹ (e_p − e_q) of every edge (m,), dense; for d up to about 2,048.

        Without ridge and ground the pseudo-inverse is used.
        """
        L = self.dense_laplacian()
        if self.ridge == 0 and self.ground is None:
            K = torch.linalg.pinv(L, hermitian=True)
        else:
            K = torch.cholesky_inverse(torch.linalg.cholesky(L))
        return K.diagonal()[self.rows] + K.diagonal()[self.cols] - 2 * K[self.rows, self.cols]

    def __repr__(self) -> str:
        counts, degrees, pieces = self.neighbor_counts(), self.degrees(), self.pieces()
        span = (
            f"degrees {counts.min():.0f} to {counts.max():.0f} "
            f"(weighted {degrees.min():.3g} to {degrees.max():.3g}), "
            if self.units
            else ""
        )
        ground = "" if self.ground is None else ", grounded"
        return (
            f"Graph of {self.units} units: {len(self.rows)} edges, {pieces} piece{'s' * (pieces != 1)}, "
            f"{span}ridge {self.ridge:.3g}{ground}"
        )


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
    # In units of the median distance the weights have no unit: a factor on all signals changes nothing.
    # The softening keeps the weight of duplicates finite, a thousand times that of a typical edge.
    med = _typical(squared, float(variance.mean()))
    weights = 1 / (squared / med + SOFTENING)
    ground = 1 / (variance / med + SOFTENING) if grounded else None
    # The ridge is a share of the mean degree, so that it bounds the condition number of every
    # layer alike. It also stands in for bridges between pieces: which pair carries a bridge
    # is noise, and that one edge would take the whole score (docs/method.md section 2).
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
    # The gradient of log det Θ − tr(Θ S) along an edge is
    # R_e − d_e², so the weights rest where both are equal.
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
    # A median of 0, where half of the neighbours are duplicates, would make every other weight nothing.
    least = SAME * variance
    med = float(np.median(squared.numpy())) if len(squared) else 0.0
    if med > least:
        return med
    apart = squared[squared > least]
    return float(apart.mean()) if len(apart) else variance or 1.0


KEPT_UNITS = 2048
"""A layer of more units keeps no graph: it would be a blot."""
KEPT_EDGES = 500_000
"""Edges of all graphs of a run together, both sides: 6 MB in a file."""
DRAWN_UNITS = 256
"""Up to here a picture shows single neurons."""


@dataclass(frozen=True, eq=False)
class NeuronGraphs:
    """The graphs of one layer's neurons before and after the activation.

    Attributes:
        units: (live,) int64, which units of the layer the nodes are, ascending.
        input, output: of `live` nodes each.
    """

    units: Tensor
    input: Graph
    output: Graph


def keep_graphs(
    sides: Mapping[str, tuple[Moments, Moments]],
    neighbors: int = 32,
    ridge: float = 1e-2,
    edges: int = KEPT_EDGES,
) -> dict[str, NeuronGraphs]:
    """Return both graphs of as many layers as the bounds allow, those first that can be drawn best.

    That is: the widest of at most 256 units, then the wider ones from the smallest up. A layer of more than
    2,048 live units, or without two live ones, or one that does not fit into what is left, is left out.

    Args:
        sides: group name -> moments of the input side and the output side, of the same d units.
        neighbors: k of the graphs above 64 units.
        ridge: in mean degrees, of both.
        edges: of all graphs together, at most.

    Returns:
        group name -> its graphs, in the order of `sides`.

    Raises:
        SignalError: as in `learn_graph`.
    """
    kept: dict[str, NeuronGraphs] = {}
    # The layers that can be drawn best come first while there
    # is room; what comes back is in the network's order.
    for name in sorted(sides, key=lambda name: _fitness(sides[name][1].units)):
        before, after = sides[name]
        live = (~dead_units(after)).nonzero()[:, 0].cpu()
        if not 2 <= len(live) <= KEPT_UNITS or 2 * most_edges(len(live), neighbors) > edges:
            continue
        kept[name] = NeuronGraphs(
            live, *(learn_graph(part.select(live), neighbors, ridge) for part in (before, after))
        )
        edges -= len(kept[name].input.rows) + len(kept[name].output.rows)
    return {name: kept[name] for name in sides if name in kept}


def worth_keeping(widths: Mapping[str, int], neighbors: int = 32, edges: int = KEPT_EDGES) -> frozenset[str]:
    """Return the layers whose graphs `keep_graphs` has room for, by their units alone; no other is recorded.

    Args:
        widths: name -> units.
        neighbors, edges: as there.
    """
    chosen = set()
    for name in sorted(widths, key=lambda name: _fitness(widths[name])):
        most = 2 * most_edges(widths[name], neighbors)
        if 2 <= widths[name] <= KEPT_UNITS and most <= edges:
            chosen.add(name)
            edges -= most
    return frozenset(chosen)


def choose_layer(widths: Mapping[str, int]) -> str | None:
    """Return the layer of which a picture says most: the widest of at most 256 units, else the smallest.

    Args:
        widths: name -> units; of equals the first is taken. None if there is none.

    Examples:
        >>> choose_layer({"narrow": 16, "right": 200, "wide": 4096})
        'right'
    """
    return min(widths, key=lambda name: _fitness(widths[name]), default=None)


def largest_piece(graph: Graph) -> Tensor:
    """Return the units (n,) int64 of the largest connected component, ascending; of equals the first."""
    where = (graph.rows.numpy(), graph.cols.numpy())
    W = sp.csr_matrix((np.ones(len(graph.rows)), where), shape=(graph.units, graph.units))
    _, labels = connected_components(W, directed=False)
    return torch.from_numpy(np.flatnonzero(labels == np.bincount(labels).argmax()))


def _fitness(units: int) -> tuple[int, int]:
    return (0, -units) if units <= DRAWN_UNITS else (1, units)
