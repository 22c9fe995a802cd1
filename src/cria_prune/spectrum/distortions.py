"""From the moments of both sides of a group to one score per unit (docs/method.md section 3).

Legend: d = units, live = units that are not dead on the output side, s = pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cria_prune.base.errors import SignalError
from cria_prune.graph.graph import COMPLETE_UNITS, Graph, learn_graph, most_edges, neighbors_bytes
from cria_prune.graph.moments import DOUBLE, Moments, dead_units
from cria_prune.spectrum.importance import Diagnosis, Importance
from cria_prune.spectrum.pcg import distortion_embedding, embedding_bytes, factor_bytes, factor_embedding
from cria_prune.spectrum.pencil import (
    DENSE_UNITS,
    RESIDUAL,
    Pairs,
    count_pairs,
    laplacians_bytes,
    pencil_bytes,
    solve_pencil,
)
from cria_prune.spectrum.precision import unpredicted

SHOWN_VALUES = 32
EDGES = 4096  # whose differences are held at a time: 8 MB at 256 columns
INNOVATION_EPS = 1e-4
SMALL_UNITS = 64  # up to here all pairs are solved for one by one, and shown


def distortion(
    moments_in: Moments,
    moments_out: Moments,
    *,
    neighbors: int = 32,
    ridge: float = 1e-2,
    pairs: Pairs = "all",
    sketch: int = 256,
    seed: int = 0,
    consumer_norm2: Tensor | None = None,
    name: str = "group",
) -> Importance:
    """Score units by their share in the spectral distortion between input and output graph.

    score[p] = mean over the neighbours q of p in the input graph of ‖V_sᵀ(e_p − e_q)‖², times
    consumer_norm2[p] if given. A unit without neighbours (the only live one) gets 1.

    Args:
        moments_in, moments_out: of the same d units before and after the activation.
        neighbors: k of the graphs above 64 units.
        ridge: of both Laplacians, in mean degrees, > 0.
        pairs: s: "all", a number, or a share of the live units.
        sketch: sign vectors, where all pairs are scored without eigensolver (above 1,024 units).
        seed: of sign and start vectors.
        consumer_norm2: (d,) ‖W_out[:, p]‖².
        name: of the group, for errors.

    Raises:
        SignalError: NaN or infinity, fewer than 2 samples, or sides that do not fit together.
        CriterionError: `pairs` is not valid.
    """
    return _score(
        moments_in, moments_out, neighbors, ridge, pairs, sketch, seed, consumer_norm2, name, grounded=False
    )


def grounded_distortion(
    moments_in: Moments,
    moments_out: Moments,
    *,
    neighbors: int = 32,
    ridge: float = 0.0,
    pairs: Pairs = "all",
    sketch: int = 256,
    seed: int = 0,
    consumer_norm2: Tensor | None = None,
    name: str = "group",
) -> Importance:
    """Score units by their distance to removal: score[p] = ‖V_sᵀ e_p‖² on grounded Laplacians.

    One more node with the zero signal is joined to every unit in both graphs and its row and column
    deleted: positive definite, so no ridge is needed, and a unit's amplitude counts. Arguments and
    errors as in `distortion`; a ridge, where given, weakens the part of the amplitude.
    """
    return _score(
        moments_in, moments_out, neighbors, ridge, pairs, sketch, seed, consumer_norm2, name, grounded=True
    )


def distortion_bytes(
    units: int, columns: int | None, *, neighbors: int, pairs: Pairs, sketch: int
) -> dict[str, int]:
    """Return step -> the most that it holds, of either distortion of so many live units.

    The graph of one side at a time, then the pencil or what stands in for it, then the edges' differences.
    `columns` are those of the moments' sketch, None where the covariance is kept.
    """
    wanted, edges = count_pairs(pairs, units), most_edges(units, neighbors)
    complete = units <= max(COMPLETE_UNITS, neighbors + 1)
    steps, width = {"graph": neighbors_bytes(units, columns, complete)}, wanted
    if wanted < units or units <= SMALL_UNITS:
        steps["pencil"] = pencil_bytes(units, edges, wanted)
    elif units <= DENSE_UNITS:
        steps["pencil"] = factor_bytes(units)
    else:
        steps["solver"], width = (
            laplacians_bytes(units, edges) + embedding_bytes(units, edges, sketch),
            sketch,
        )
    return steps | {"edges": DOUBLE * width * (3 * min(edges, EDGES) + 2 * units)}


def innovation(
    moments_out: Moments,
    consumer_norm2: Tensor | None = None,
    *,
    name: str = "group",
    eps: float = INNOVATION_EPS,
) -> Importance:
    """Score units by what their neighbours cannot predict: consumer_norm2[p] / Θ[p, p].

    Θ = (Y_c Y_cᵀ/M + εI)⁻¹, ε = `eps` times the mean variance of the live units, raised to d/r of it where
    the moments are a sketch of r columns (`unpredicted` says why). From a sketch the time is linear in d.

    Args:
        moments_out: (d,) units after the activation.
        consumer_norm2: (d,) ‖W_out[:, p]‖²; ones if None.
        name: of the group, for errors.
        eps: relative ridge, > 0.

    Raises:
        SignalError: NaN or infinity, fewer than 2 samples, or eps <= 0.
    """
    if not 0 < eps < math.inf:
        raise SignalError(f"The innovation of {name}", f"found eps={eps}", "Use eps > 0")
    live = _live(moments_out, name)
    weights = _consumer(consumer_norm2, moments_out.units, name)
    part = moments_out.select(live)
    if not len(live):
        return _importance(live, torch.zeros(0, dtype=torch.float64), weights, moments_out.units, {})
    found = {"solver": "cholesky", "status": "converged"}
    return _importance(live, unpredicted(part, eps), weights, moments_out.units, found)


def _score(
    moments_in: Moments,
    moments_out: Moments,
    neighbors: int,
    ridge: float,
    pairs: Pairs,
    sketch: int,
    seed: int,
    consumer_norm2: Tensor | None,
    name: str,
    grounded: bool,
) -> Importance:
    """Check, drop the dead, learn both graphs, embed, and reduce to one score per unit."""
    d = moments_out.units
    if moments_in.units != d:
        raise SignalError(
            f"The two sides of {name}",
            f"found {moments_in.units} units before and {d} after the activation",
            "Record both sides of the same group",
        )
    if not 0 <= ridge < math.inf or (ridge == 0 and not grounded):
        raise SignalError(f"The distortion of {name}", f"found ridge={ridge}", "Use a ridge > 0")
    if sketch < 1:
        raise SignalError(f"The distortion of {name}", f"found sketch={sketch}", "Use at least 1 sign vector")
    count_pairs(pairs, max(d, 1))
    moments_in.check_finite(f"{name} before the activation")
    live = _live(moments_out, name)
    weights = _consumer(consumer_norm2, d, name)
    if not len(live):
        return _importance(live, torch.zeros(0, dtype=torch.float64), weights, d, {})
    graph_in, graph_out = (
        learn_graph(part.select(live), neighbors, ridge, grounded) for part in (moments_in, moments_out)
    )
    F, found = _embed(graph_in, graph_out, pairs, sketch, seed, moments_out.mean.device)
    found |= {"pieces_in": graph_in.pieces(), "pieces_out": graph_out.pieces()}
    scores = F.square().sum(dim=1) if grounded else _mean_over_neighbors(graph_in, F)
    return _importance(live, scores, weights, d, found)


def _embed(
    graph_in: Graph, graph_out: Graph, pairs: Pairs, sketch: int, seed: int, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """Return F (live, s or r) whose squared distances are the distortion, and the solver's diagnosis."""
    d = graph_in.units
    if d > SMALL_UNITS and count_pairs(pairs, d) == d:
        found = _embed_all(graph_in, graph_out, sketch, seed, device)
        if found is not None:
            F, residual, solver = found
            status = "converged" if residual <= RESIDUAL else "unconverged"
            return F, {"solver": solver, "residual": residual, "status": status}
    solved = solve_pencil(graph_in, graph_out, pairs, seed)
    return solved.embedding(), {
        "solver": solved.solver,
        "residual": float(solved.residuals.max()),
        "gap": solved.gap,
        "status": solved.status,
        "values": tuple(solved.values[:SHOWN_VALUES].tolist()),
    }


def _embed_all(
    graph_in: Graph, graph_out: Graph, sketch: int, seed: int, device: torch.device
) -> tuple[Tensor, float, str] | None:
    """Return F of all pairs, its residual and the solver; None where a factor would not be exact."""
    if graph_in.units > DENSE_UNITS:
        F, residual, _ = distortion_embedding(graph_in, graph_out, sketch, seed)
        return F, residual, "pcg"
    found = factor_embedding(graph_in, graph_out, device)
    return None if found is None else (*found, "cholesky")


def _mean_over_neighbors(graph: Graph, F: Tensor) -> Tensor:
    """Return, for every unit, the mean of ‖F_p − F_q‖² over its neighbours q; 1 without neighbour."""
    scores = torch.empty(len(graph.rows), dtype=torch.float64)
    rows, cols = graph.rows.to(F.device), graph.cols.to(F.device)
    for start in range(0, len(scores), EDGES):
        block = slice(start, start + EDGES)
        scores[block] = (F[rows[block]] - F[cols[block]]).square_().sum(dim=1).cpu()
    counts = graph.neighbor_counts()
    return torch.where(counts > 0, graph.sum_over_edges(scores) / counts.clamp(min=1), 1.0)


def _live(moments: Moments, name: str) -> Tensor:
    """Return the indices (live,) of the units that are not dead, after the checks on the moments."""
    moments.check_finite(f"{name} after the activation")
    if moments.samples < 2:
        raise SignalError(
            f"The signals of {name}",
            f"found {moments.samples} sample",
            "Record at least 2; a few hundred give sound scores",
        )
    return (~dead_units(moments)).nonzero()[:, 0].cpu()


def _consumer(consumer_norm2: Tensor | None, units: int, name: str) -> Tensor:
    """Return the checked factor (d,) float64 of the scores."""
    if consumer_norm2 is None:
        return torch.ones(units, dtype=torch.float64)
    weights = consumer_norm2.detach().to("cpu", torch.float64)
    if weights.shape != (units,):
        raise SignalError(
            f"The consumer norms of {name}", f"found shape {tuple(weights.shape)}", f"Pass ({units},)"
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise SignalError(
            f"The consumer norms of {name}",
            "found NaN, infinity or a negative square",
            "Check the weights of the consuming layers",
        )
    return weights


def _importance(
    live: Tensor, scores: Tensor, weights: Tensor, units: int, found: dict[str, Any]
) -> Importance:
    """Put the scores of the live units among all d; live ones stay positive, dead ones get 0."""
    all_scores = torch.zeros(units, dtype=torch.float64)
    if len(live):
        scores = scores.to("cpu", torch.float64) * weights[live]
        top = float(scores.max())
        all_scores[live] = scores.clamp(min=1e-30 * (top if top > 0 else 1.0))
    dead = torch.ones(units, dtype=torch.bool)
    dead[live] = False
    diagnosis = Diagnosis(dead=tuple(dead.nonzero()[:, 0].tolist()), **found)
    return Importance(all_scores, diagnosis)
