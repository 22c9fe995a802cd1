"""Two graphs of the same neurons -> the top of the pencil L_in v = z L_out v (docs/method.md section 3).

A large z is a direction along which neurons that were alike before the layer are far apart after it.
Legend: d = units, s = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cria_prune.errors import CriterionError, SignalError
from cria_prune.graph import Graph
from cria_prune.graph.moments import DOUBLE, SINGLE
from cria_prune.spectrum.eigensolve import GUARDS, Solved, solve_dense, solve_lanczos, solve_lobpcg

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
