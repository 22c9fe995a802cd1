"""All pairs of a pencil at once, without an eigensolver.

Legend: d = units, C = Cholesky factor of L_in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cria_prune.base.events import passed
from cria_prune.graph import Graph
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
