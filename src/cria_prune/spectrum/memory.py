"""The bytes that scoring one group takes beyond its moments, in closed form, step by step.

Legend: d = units, r = sketch columns, k = neighbours, m = edges, s = pairs. All units count as live. Each
function returns step -> the most that this step holds; one step follows the other.
"""

from __future__ import annotations

from cria_prune.graph.learn import COMPLETE_UNITS
from cria_prune.graph.neighbors import BLOCK, EDGE_BLOCK
from cria_prune.graph.sketch import BLOCK as HELD
from cria_prune.spectrum.pcg import COLUMNS, ROWS
from cria_prune.spectrum.pencil import DENSE_UNITS, Pairs, count_pairs
from cria_prune.spectrum.scoring import EDGES, SMALL_UNITS

DOUBLE, SINGLE = 8, 4
QUADRATURE = 241  # columns of the integral in `channel_independence`

Steps = dict[str, int]


def innovation_bytes(units: int, columns: int | None) -> Steps:
    """Return the steps of `innovation`: the live part, its copy, Cholesky factor and inverse.

    Args:
        units: d.
        columns: r of the sketch; None where the covariance is kept.
    """
    matrix = DOUBLE * units**2
    if columns is None:
        return {"inverse": 4 * matrix}
    live = SINGLE * units * columns
    if units <= columns:
        return {"inverse": live + DOUBLE * units * columns + 3 * matrix}
    # A block of rows as float64, before and after the solve; the Gram matrix and its factor.
    return {"inverse": live + DOUBLE * (2 * min(units, HELD) * columns + 2 * columns**2)}


def distortion_bytes(units: int, columns: int | None, neighbors: int, pairs: Pairs, signs: int) -> Steps:
    """Return the steps of both distortions: the graph of one side, then the pencil.

    Args:
        units: d.
        columns: r of the sketch; None where the covariance is kept.
        neighbors: k.
        pairs: as in `distortion`.
        signs: sign vectors, where all pairs are scored without eigensolver.
    """
    steps = {"graph": _graph(units, columns, neighbors)}
    wanted, edges = count_pairs(pairs, units), _edges(units, neighbors)
    sparse = 2 * (DOUBLE + SINGLE) * (2 * edges + units) * 3  # both Laplacians, and what they are made of
    if SMALL_UNITS < units <= DENSE_UNITS and wanted == units:
        steps["pencil"] = DOUBLE * 7 * units**2  # both matrices and their factors, the solution, its residual
        width = units
    elif units <= DENSE_UNITS or wanted < units:
        # Both matrices, turned for LAPACK, and its work space; then the residuals of the vectors.
        steps["pencil"] = sparse + DOUBLE * (6 * units**2 if units <= DENSE_UNITS else 12 * units * wanted)
        width = wanted
    else:
        steps["solver"] = sparse + _signed(units, edges) + DOUBLE * units * (2 * signs + 6 * COLUMNS)
        width = signs
    steps["edges"] = DOUBLE * (3 * min(edges, EDGES) * width + 2 * units * width)
    return steps


def chip_bytes(units: int, columns: int | None) -> Steps:
    """Return the step of `channel_independence`: one eigendecomposition and its work space."""
    if columns is None:
        return {"eigenvectors": DOUBLE * (6 * units**2 + 3 * QUADRATURE * units)}
    wide = 3 * DOUBLE * units * (columns + 1) + 5 * DOUBLE * columns**2
    return {"eigenvectors": wide + 3 * DOUBLE * QUADRATURE * units}


def _edges(units: int, neighbors: int) -> int:
    """Return the edges of a graph: all pairs, or at most k for each unit."""
    if units <= max(COMPLETE_UNITS, neighbors + 1):
        return units * (units - 1) // 2
    return units * neighbors


def _graph(units: int, columns: int | None, neighbors: int) -> int:
    """Return what the graph of one side takes: its live part, the products less what all share, a block."""
    block, complete = min(units, BLOCK), units <= max(COMPLETE_UNITS, neighbors + 1)
    if columns is None:
        return DOUBLE * units * (2 * units if complete else 2 * units + max(units, 3 * block))
    sketch = SINGLE * units * columns
    ends = 2 * SINGLE * EDGE_BLOCK * columns
    return 2 * sketch + max(ends, 2 * SINGLE * block * units)


def _signed(units: int, edges: int) -> int:
    """Return what the random signs take: all as bytes, a piece and its product as numbers."""
    count = edges + units
    return COLUMNS * (count + DOUBLE * (2 * min(count, ROWS) + 2 * units))
