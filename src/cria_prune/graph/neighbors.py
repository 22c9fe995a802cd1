"""Exact nearest neighbours between the signals of a group (docs/method.md section 2).

Legend: d = units, M = samples, r = sketch columns, k = neighbours, m = edges.
D²[p, q] = ‖x_p − x_q‖² / M, of the centred rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cria_prune.graph.moments import DOUBLE, SINGLE, Moments

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
    values, indices = squared.topk(k + 1, dim=1, largest=False, sorted=True)
    tied = values[:, k - 1] == values[:, k]
    indices = indices[:, :k]
    if tied.any():
        indices[tied] = squared[tied].sort(dim=1, stable=True).indices[:, :k]
    return indices
