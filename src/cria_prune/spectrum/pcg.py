"""Scores over all pairs without an eigensolver (docs/method.md section 3)."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cria_prune.base.events import passed
from cria_prune.graph.graph import Graph
from cria_prune.graph.moments import DOUBLE


def factor_embedding(
    graph_in: Graph, graph_out: Graph, device: torch.device | str = "cpu"
) -> tuple[Tensor, float] | None:
    """Return F = L_out⁻¹ C (d, d) with C Cᵀ = L_in, and the largest relative residual of its columns.

    With all pairs, V Vᵀ = L_out⁻¹ L_in L_out⁻¹ = F Fᵀ for V = [√z₁ v₁, …], so rows of F are as far apart as
    those of V, and what an eigensolver takes is not spent. Two factorisations and two triangular solves.

    Args:
        graph_in, graph_out: of the same units, both positive definite (a ridge > 0, or grounded).
        device: where it is computed, and F is.

    Returns:
        None where one of them is not, in float64.
    """
    L_in, L_out = (graph.dense_laplacian().to(device) for graph in (graph_in, graph_out))
    (C, bad_in), (factor, bad_out) = (torch.linalg.cholesky_ex(L) for L in (L_in, L_out))
    if int(bad_in) or int(bad_out):
        return None
    F = torch.cholesky_solve(C, factor)
    left = torch.linalg.vector_norm(L_out @ F - C, dim=0) / torch.linalg.vector_norm(C, dim=0)
    passed("factored", device=F.device)
    return F, float(left.max())


def factor_bytes(units: int) -> int:
    """Return the most that `factor_embedding` asks for: matrices, their factors, F, its residual and copy."""
    return DOUBLE * 7 * units**2


COLUMNS = 64  # right-hand sides solved at once
ROWS = 2**16  # of the signs, that are held as numbers at once: 32 MB


def pcg(L: sp.csr_matrix, B: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, float, int]:
    """Solve L X = B for all columns at once by conjugate gradients with a Jacobi preconditioner.

    Args:
        L: (d, d) symmetric positive definite, float64.
        B: (d, c) float64.
        tolerance: on ‖B − L X‖ / ‖B‖, each column.
        iterations: at most so many.

    Returns:
        X (d, c), the largest relative residual, measured afresh, and the iterations taken.

    Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., algorithm 9.1.
    """
    A = _torch_csr(L)
    inverse = torch.from_numpy(1 / L.diagonal())[:, None]
    goal = tolerance * B.norm(dim=0)
    X, R = torch.zeros_like(B), B.clone()
    Z = inverse * R
    P, rz = Z.clone(), (R * Z).sum(dim=0)
    step = 0
    while step < iterations and bool((R.norm(dim=0) > goal).any()):
        AP = A @ P
        curvature = (P * AP).sum(dim=0)
        alpha = torch.where(curvature > 0, rz / curvature, 0.0)
        X.addcmul_(P, alpha.expand_as(P))
        R.addcmul_(AP, alpha.expand_as(P), value=-1)
        torch.mul(inverse, R, out=Z)
        fresh = (R * Z).sum(dim=0)
        P.mul_(torch.where(rz > 0, fresh / rz, 0.0)).add_(Z)
        rz, step = fresh, step + 1
    norm = B.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    return X, float(((B - A @ X).norm(dim=0) / norm).max()), step


def distortion_embedding(
    graph_in: Graph,
    graph_out: Graph,
    sketch: int | None = 256,
    seed: int = 0,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> tuple[Tensor, float, int]:
    """Return F (d, r) float64 with ‖F_p − F_q‖² ~ Σᵢ zᵢ (v_i[p] − v_i[q])² over all pairs.

    Args:
        graph_in, graph_out: with a ridge or ground, of the same d units.
        sketch: r; None takes the incidence matrix itself for the signs, so F is exact and wide.
        seed: of the signs.
        tolerance: relative residual of the solves.
        iterations: at most so many.

    Returns:
        F, the largest relative residual and the most iterations.
    """
    A, L = graph_in.incidence(), graph_out.laplacian()
    edges, width = A.T.tocsr(), A.shape[1] if sketch is None else sketch
    generator = np.random.default_rng(seed)
    parts, residual, most = [], 0.0, 0
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        if sketch is None:
            B = A[:, start:stop].toarray()
        else:
            signs = generator.integers(0, 2, size=(A.shape[1], stop - start), dtype=np.int8)
            B = np.zeros((A.shape[0], stop - start))
            for row in range(0, len(signs), ROWS):
                B += edges[row : row + ROWS].T @ ((2.0 * signs[row : row + ROWS] - 1.0) / sketch**0.5)
        X, found, taken = pcg(L, torch.from_numpy(np.ascontiguousarray(B)), tolerance, iterations)
        parts.append(X)
        residual, most = max(residual, found), max(most, taken)
    return torch.cat(parts, dim=1), residual, most


def embedding_bytes(units: int, edges: int, sketch: int) -> int:
    """Return the most that `distortion_embedding` of r signs takes beside both Laplacians."""
    count = edges + units  # columns of the incidence matrix: the ridge has one for each unit
    # All signs of a piece as bytes, some of them and their product as numbers.
    signs = COLUMNS * (count + DOUBLE * (2 * min(count, ROWS) + 2 * units))
    return signs + DOUBLE * units * (2 * sketch + 6 * COLUMNS)  # F twice; X, R, Z, P, AP and B


def _torch_csr(L: sp.csr_matrix) -> Tensor:
    """Return a SciPy CSR matrix as a torch one, whose products run on all cores."""
    L = L.sorted_indices()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(L.indptr.astype(np.int64)),
            torch.from_numpy(L.indices.astype(np.int64)),
            torch.from_numpy(L.data),
            size=L.shape,
            check_invariants=False,
        )
