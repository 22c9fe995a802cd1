"""A group's neurons as a weighted graph.

Legend: d = units, m = edges, e = ridge, g = ground weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor


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
