"""Two graphs of the same neurons -> the top of the pencil L_in v = z L_out v (docs/method.md section 3)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import scipy.sparse.linalg as spl
import torch
from torch import Tensor

from cria_prune.base.errors import CriterionError, SignalError
from cria_prune.graph.graph import Graph
from cria_prune.graph.moments import DOUBLE, SINGLE

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


DENSE_UNITS = 1024  # dense at once up to here
FALLBACK_UNITS = 4096  # dense instead of Lanczos where LOBPCG fails, up to here
DENSE_LIMIT = 16384  # three dense matrices are 6 GB here
RESIDUAL = 1e-5  # accepted ‖L_in v − z L_out v‖ / (z ‖L_out v‖)
CLUSTER = 1e-6  # relative distance of eigenvalues that count as equal

Pairs = int | float | str


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """The s dominant pairs of a pencil, with their own diagnosis.

    Attributes:
        values: (s,) float64, descending.
        vectors: (d, s) float64, vᵢᵀ L_out vⱼ = δᵢⱼ, the entry of largest size positive.
        residuals: (s,) ‖L_in v − z L_out v‖ / (z ‖L_out v‖), measured after the solver.
        status: "converged", or "unconverged" where a residual is above 1e-5.
        iterations: of the solver that gave the pairs (1 for dense; for Lanczos its solves).
        solver: "dense", "lobpcg" or "lanczos".
        gap: (z_s − z_{s+1}) / z_s; None where all pairs are here or the next is not known.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    status: str
    iterations: int
    solver: str = "dense"
    gap: float | None = None

    def embedding(self) -> Tensor:
        """Return V_s = [√z₁ v₁, …, √z_s v_s] (d, s)."""
        return self.vectors * self.values.clamp(min=0).sqrt()

    def __repr__(self) -> str:
        top = ", ".join(f"{z:.4g}" for z in self.values[:4].tolist())
        return (
            f"{len(self.values)} pairs of {self.vectors.shape[0]} units, z = {top}"
            f"{', …' if len(self.values) > 4 else ''}; {self.solver}, {self.status}, "
            f"largest residual {float(self.residuals.max()):.1e}"
        )


def count_pairs(pairs: Pairs, units: int) -> int:
    """Return s, between 1 and `units`, for "all", a number of pairs, or a share of the units.

    Raises:
        CriterionError: not one of these, or not positive, or a share above 1.
    """
    if pairs == "all":
        return units
    if isinstance(pairs, int) and not isinstance(pairs, bool) and pairs >= 1:
        return min(pairs, units)
    if isinstance(pairs, float) and 0 < pairs <= 1:
        return min(units, max(1, round(pairs * units)))
    raise CriterionError(
        "The number of eigenpairs", f"found {pairs!r}", 'Use "all", a whole number >= 1 or a share in (0, 1]'
    )


def laplacians_bytes(units: int, edges: int) -> int:
    """Return the bytes of both sparse Laplacians, and of what they are made of."""
    return 3 * 2 * (DOUBLE + SINGLE) * (2 * edges + units)


def pencil_bytes(units: int, edges: int, wanted: int) -> int:
    """Return the most that `solve_pencil` asks for.

    Dense: both matrices, turned for LAPACK, and its work space; else the vectors and their residuals.
    """
    dense = units <= DENSE_UNITS
    return laplacians_bytes(units, edges) + DOUBLE * units * (6 * units if dense else 12 * wanted)


def solve_pencil(
    graph_in: Graph, graph_out: Graph, pairs: Pairs = "all", seed: int = 0, dense_units: int = DENSE_UNITS
) -> Eigenpairs:
    """Return the dominant pairs of L_in v = z L_out v; vᵢᵀ L_out vⱼ = δᵢⱼ.

    Dense up to `dense_units` units, and where more than a twentieth of the pairs (above 4,096
    units: a fifth) is wanted; LOBPCG otherwise.
    Where LOBPCG's residuals are too large, dense up to 4,096 units and Lanczos with conjugate gradients
    above. A cut at s never splits a cluster: s grows until z_{s+1} < z_s (1 − 1e-6).

    Args:
        graph_in, graph_out: of the same units; graph_out with a ridge or grounded.
        pairs: "all", a number, or a share of the units.
        seed: of the start vectors.
        dense_units: where the dense solver ends.

    Raises:
        CriterionError: `pairs` is not valid, or needs a dense solver above 16,384 units.
        SignalError: the graphs differ in units, have none, or L_out is singular.
    """
    d = graph_in.units
    if d != graph_out.units or d == 0:
        raise SignalError(
            "A pencil of two graphs", f"found {d} and {graph_out.units} units", "Both need the same units"
        )
    if graph_out.ridge <= 0 and graph_out.ground is None:
        raise SignalError(
            "A pencil of two graphs", "found no ridge and no ground on the output side", "Use a ridge > 0"
        )
    L_in, L_out = graph_in.laplacian(), graph_out.laplacian()
    wanted = count_pairs(pairs, d)
    # LOBPCG pays for few pairs only; measured at d = 1,500 on one thread it loses to dense from about d/20.
    share = 20 if d <= FALLBACK_UNITS else 5
    while d > dense_units and share * wanted < d and 5 * (wanted + GUARDS) < d:
        found = _iterative(L_in, L_out, wanted, seed)
        if found is None:
            break
        if found.gap is not None or found.status != "converged":
            return found
        wanted = 2 * wanted  # the cluster at the cut is wider than the guards
    if d > DENSE_LIMIT:
        raise CriterionError(
            f"The {wanted} dominant pairs of {d} units",
            f"found more than iterative solvers carry, and a dense one ends at {DENSE_LIMIT} units",
            'Ask for fewer pairs, or for "all", which needs no eigensolver in `distortion`',
        )
    return _finish(L_in, L_out, solve_dense(L_in, L_out), wanted, "dense")


def _iterative(L_in: sp.csr_matrix, L_out: sp.csr_matrix, wanted: int, seed: int) -> Eigenpairs | None:
    """Return pairs by LOBPCG, else by Lanczos; None where the dense solver is to take over."""
    d = L_in.shape[0]
    found = _finish(L_in, L_out, solve_lobpcg(L_in, L_out, wanted, RESIDUAL, seed), wanted, "lobpcg")
    if found.status == "converged":
        return found
    if d <= FALLBACK_UNITS:
        return None
    solved = solve_lanczos(L_in, L_out, wanted + GUARDS, RESIDUAL, seed)
    if len(solved[0]) < wanted:
        return found
    other = _finish(L_in, L_out, solved, wanted, "lanczos")
    return other if float(other.residuals.max()) < float(found.residuals.max()) else found


def _finish(
    L_in: sp.csr_matrix, L_out: sp.csr_matrix, solved: Solved, wanted: int, solver: str
) -> Eigenpairs:
    """Cut at the cluster, normalise, fix the signs and measure the residuals."""
    values, vectors, iterations = solved
    cut, gap = _cut(values, wanted)
    z, V = values[:cut], vectors[:, :cut]
    V = V / np.sqrt(np.einsum("ij,ij->j", V, L_out @ V))
    V = V * np.where(V[np.abs(V).argmax(axis=0), np.arange(cut)] < 0, -1.0, 1.0)
    image = L_out @ V
    residuals = np.linalg.norm(L_in @ V - image * z, axis=0) / np.maximum(
        np.abs(z) * np.linalg.norm(image, axis=0), np.finfo(float).tiny
    )
    good = bool(np.isfinite(residuals).all()) and float(residuals.max()) <= RESIDUAL
    return Eigenpairs(
        torch.from_numpy(z.copy()),
        torch.from_numpy(np.ascontiguousarray(V)),
        torch.from_numpy(residuals),
        "converged" if good else "unconverged",
        iterations,
        solver,
        gap,
    )


def _cut(values: np.ndarray, wanted: int) -> tuple[int, float | None]:
    """Return where to cut descending `values`, at `wanted` or after its cluster, and the gap there."""
    for cut in range(min(wanted, len(values)), len(values)):
        gap = (values[cut - 1] - values[cut]) / max(abs(values[cut - 1]), np.finfo(float).tiny)
        if gap > CLUSTER:
            return cut, float(gap)
    return len(values), None
