"""Solvers of the generalized eigenproblem L_in v = z L_out v, largest z first.

Each returns (values (s,), vectors (d, s), iterations) as they come; `pencil` normalises, measures the
residuals and decides. Legend: d = units, s = pairs.
"""

from __future__ import annotations

import warnings

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import scipy.sparse.linalg as spl
import torch

from cria_prune.spectrum.pcg import pcg

GUARDS = 8

Solved = tuple[np.ndarray, np.ndarray, int]


def solve_dense(L_in: sp.csr_matrix, L_out: sp.csr_matrix) -> Solved:
    """Return all d pairs by LAPACK: Cholesky of L_out, then divide and conquer. Memory 3 d² doubles."""
    values, vectors = scipy.linalg.eigh(L_in.toarray(), L_out.toarray(), overwrite_a=True, overwrite_b=True)
    return values[::-1].copy(), vectors[:, ::-1].copy(), 1


def solve_lobpcg(
    L_in: sp.csr_matrix, L_out: sp.csr_matrix, pairs: int, tolerance: float, seed: int, iterations: int = 300
) -> Solved:
    """Return `pairs` + 8 guard pairs by SciPy's LOBPCG with a Jacobi preconditioner.

    Its warnings are dropped here because the caller measures the residuals of the wanted pairs.
    """
    d = L_in.shape[0]
    start = np.random.default_rng(seed).standard_normal((d, pairs + GUARDS))
    inverse = 1 / L_out.diagonal()
    jacobi = spl.LinearOperator(
        (d, d), matvec=lambda v: inverse * v.ravel(), matmat=lambda V: inverse[:, None] * V
    )
    scale = float(L_in.diagonal().max())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        values, vectors, history = spl.lobpcg(
            L_in,
            start,
            B=L_out,
            M=jacobi,
            tol=tolerance * scale / d**0.5 * 0.1,
            maxiter=iterations,
            largest=True,
            retResidualNormsHistory=True,
        )
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order], len(history)


def solve_lanczos(
    L_in: sp.csr_matrix, L_out: sp.csr_matrix, pairs: int, tolerance: float, seed: int
) -> Solved:
    """Return `pairs` pairs by ARPACK's Lanczos, L_out inverted by preconditioned conjugate gradients.

    Where ARPACK does not converge, the pairs that did are returned, perhaps none.
    """
    d, calls = L_in.shape[0], 0

    def solve(v: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        X, _, _ = pcg(
            L_out, torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64).reshape(d, 1)), 1e-10, 2000
        )
        return X.numpy().reshape(v.shape)

    start = np.random.default_rng(seed).standard_normal(d)
    inverse = spl.LinearOperator((d, d), matvec=solve, dtype=np.float64)
    try:
        values, vectors = spl.eigsh(
            L_in,
            k=min(pairs, d - 1),
            M=L_out,
            Minv=inverse,
            which="LA",
            v0=start,
            ncv=min(d, 4 * pairs + 20),
            tol=tolerance * 1e-1,
        )
    except spl.ArpackNoConvergence as stopped:
        values, vectors = stopped.eigenvalues, stopped.eigenvectors
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order], calls
