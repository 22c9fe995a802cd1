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

GUARDS = 8

Solved = tuple[np.ndarray, np.ndarray, int]


def solve_dense(L_in: sp.csr_matrix, L_out: sp.csr_matrix) -> Solved:
    """Return all d pairs by LAPACK: Cholesky of L_out, then divide and conquer. Memory 3 d² doubles."""
    values, vectors = scipy.linalg.eigh(L_in.toarray(), L_out.toarray(), overwrite_a=True, overwrite_b=True)
    return values[::-1].copy(), vectors[:, ::-1].copy(), 1


def solve_lobpcg(
    L_in: sp.csr_matrix, L_out: sp.csr_matrix, pairs: int, tolerance: float, seed: int, rounds: int = 8
) -> Solved:
    """Return `pairs` + 8 guard pairs by SciPy's LOBPCG with a Jacobi preconditioner.

    It runs in rounds of 40 iterations until the wanted pairs are good, because SciPy would wait for the
    guards too. Its warnings are dropped here: the caller measures the residuals.
    """
    d = L_in.shape[0]
    vectors = np.random.default_rng(seed).standard_normal((d, pairs + GUARDS))
    inverse = 1 / L_out.diagonal()
    jacobi = spl.LinearOperator(
        (d, d), matvec=lambda v: inverse * v.ravel(), matmat=lambda V: inverse[:, None] * V
    )
    # The residual is about z ‖L_out v‖, and a typical z the ratio of the diagonals.
    scale = float(L_in.diagonal().mean() * L_out.diagonal().mean() ** -0.5)
    taken = 0
    for _ in range(rounds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            values, vectors, history = spl.lobpcg(
                L_in,
                vectors,
                B=L_out,
                M=jacobi,
                tol=0.1 * tolerance * scale,
                maxiter=40,
                largest=True,
                retResidualNormsHistory=True,
            )
        taken += len(history)
        best = np.argsort(values)[::-1][:pairs]
        image = L_out @ vectors[:, best] * values[best]
        residuals = np.linalg.norm(L_in @ vectors[:, best] - image, axis=0)
        if (residuals <= 0.1 * tolerance * np.linalg.norm(image, axis=0)).all():
            break
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order], taken


def solve_lanczos(
    L_in: sp.csr_matrix, L_out: sp.csr_matrix, pairs: int, tolerance: float, seed: int
) -> Solved:
    """Return `pairs` pairs by ARPACK's Lanczos, L_out inverted by preconditioned conjugate gradients.

    Where ARPACK does not converge, the pairs that did are returned, perhaps none.
    """
    d, calls = L_in.shape[0], 0
    jacobi = sp.diags(1 / L_out.diagonal())

    def solve(v: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return spl.cg(L_out, v.ravel(), rtol=1e-10, maxiter=2000, M=jacobi)[0]

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
