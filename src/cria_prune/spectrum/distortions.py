"""From the moments of a group's sides to one score per unit: distortions, innovation, nuclear norm.

Legend: d = units, M = samples, r = columns of a sketch, or sign vectors; X, Y (d, M) =
the signals before and after the activation; B (d, r) = a sketch over √M, so that B Bᵀ
stands for Y Yᵀ / M of the centred signals; Θ = the precision of the output side, e =
its ridge; F (live, s or r) = an embedding, its squared distances are the distortion.

docs/method.md section 3 has the mathematics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cria_prune.base.errors import SignalError
from cria_prune.graph.graph import (
    COMPLETE_UNITS,
    Graph,
    learn_graph,
    most_edges,
    neighbors_bytes,
)
from cria_prune.graph.moments import BLOCK, DOUBLE, SINGLE, Moments, dead_units, sketch_gram, sketch_rows
from cria_prune.spectrum.importance import Diagnosis, Importance
from cria_prune.spectrum.pcg import (
    distortion_embedding,
    embedding_bytes,
    factor_bytes,
    factor_embedding,
)
from cria_prune.spectrum.pencil import (
    DENSE_UNITS,
    RESIDUAL,
    Pairs,
    count_pairs,
    laplacians_bytes,
    pencil_bytes,
    solve_pencil,
)

SKETCH_RIDGE = 0.1  # of d/r mean variances


def unpredicted(moments: Moments, eps: float) -> Tensor:
    """Return the variance of each unit that the others cannot predict: (d,) float64 on the CPU.

    From a covariance 1 / Θ[p, p], by Cholesky, d³/2 operations. From a sketch, B √M of r < d columns, by
    Woodbury's identity on its (r, r) side, in O(d r²) time and O(r²) memory beside the sketch,

        1 / Θ[p, p] − e = e h_p / (1 − h_p),  h_p = b_pᵀ (BᵀB + eI)⁻¹ b_p,  b_p the rows of B.

    The ridge is the variance of noise that Θ adds to every unit, so 1 / Θ[p, p] never falls below it. For
    a covariance it is too small to matter. A sketch knows at most r directions and needs a large one, or
    every unit is predicted from noise: there it is taken off again, and what is left runs from the bare
    variance (e large) to the innovation (e small). On trained feed-forward layers (MiniLM and a small
    Llama, r of d/2 to d/12) the ranks agree with the exact ones at 0.82 to 0.99; with d/r mean variances
    left in, at 0.07 to 0.96. The size of e matters little: it is a tenth of d/r, the size of the sketch's
    own noise (Marchenko and Pastur).

    Args:
        moments: of d >= 1 units, with covariance or sketch.
        eps: e in mean variances, > 0; with a sketch, at least 0.1 d/r.
    """
    size = float(moments.variance.mean())
    if moments.covariance is not None:
        # A copy, for the ridge goes into the diagonal.
        return _inverse_diagonal(moments.covariance.to(torch.float64).clone(), eps * size)
    assert moments.sketch is not None
    sketch, (d, r) = moments.sketch, moments.sketch.shape
    # A sketch needs a large ridge, or its r columns predict every unit by their noise.
    # What the configuration asks for counts where it is larger (docs/decisions/0015).
    ridge = max(eps, SKETCH_RIDGE * d / r) * size
    # The smaller side is solved: (d, d) here, (r, r) below. Both give the same numbers.
    if d <= r:
        B = torch.cat(list(sketch_rows(sketch, moments.samples)))
        return _inverse_diagonal(B @ B.T, ridge) - ridge
    gram = sketch_gram(sketch, moments.samples)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    parts = []
    for rows in sketch_rows(sketch, moments.samples):
        # With the factor C of BᵀB + eI, ‖C⁻¹ b_p‖² = b_pᵀ (BᵀB + eI)⁻¹ b_p =
        # h_p. It is below 1 as e > 0, so what is divided by below is not 0.
        half = torch.linalg.solve_triangular(factor, rows.T, upper=False)  # (r, block)
        leverage = half.square_().sum(dim=0)
        parts.append(ridge * leverage / (1 - leverage))
        del rows, half  # or they would be held while the next block is made
    return torch.cat(parts).cpu()


def unpredicted_bytes(units: int, columns: int | None) -> int:
    """Return the most that `unpredicted` takes, moments counted in; `columns` is None for a covariance."""
    matrix = DOUBLE * units**2
    if columns is None:
        return 4 * matrix  # the live part, its copy, Cholesky factor and inverse
    live = SINGLE * units * columns
    if units <= columns:
        return live + DOUBLE * units * columns + 3 * matrix
    # A block of rows before and after the solve; the Gram matrix and its factor.
    return live + DOUBLE * (2 * min(units, BLOCK) * columns + 2 * columns**2)


def _inverse_diagonal(S: Tensor, ridge: float) -> Tensor:
    """Return 1 / Θ[p, p] (d,) of S (d, d) float64, which is overwritten."""
    S.diagonal().add_(ridge)
    return 1 / torch.cholesky_inverse(torch.linalg.cholesky(S)).diagonal().cpu()


STEP, REACH = 0.5, 60.0  # of the trapezoidal rule, in log t: its error is below 1e-12 of the largest root


def channel_independence(moments: Moments, *, name: str = "group") -> Tensor:
    """Return (‖Y‖_* − ‖Y without row p‖_*) / √M for every unit p: (d,) float64 on the CPU, >= 0.

    This is the channel independence of CHIP (Sui et al., NeurIPS 2021, arXiv 2110.13981) of
    one matrix that holds all samples; CHIP takes it of each image's feature maps apart and averages. The
    nuclear norm ‖Y‖_* is the sum of the square roots of the eigenvalues λ of G = Y Yᵀ, so the moments
    know it. Without a decomposition for each p: √x = (1/π) ∫ x / (x + t) dt / √t, and
    det(G_p + t I) / det(G + t I) = [(G + t I)⁻¹]_pp for G without row and column p, hence

        ‖Y‖_* − ‖Y_p‖_* = (1/π) ∫₀^∞ B_p(t) / A_p(t) dt / √t,
        A_p = Σ_i v_ip² / (λ_i + t),  B_p = Σ_i v_ip² λ_i / (λ_i + t)²,

    by the trapezoidal rule in log t, which converges exponentially. One eigendecomposition, and two
    products with 241 columns. A sketch S stands in for the centred signals where no covariance was kept.

    Args:
        moments: of the signals that the consumers see.
        name: of the group, for errors.

    Raises:
        SignalError: NaN or infinity, or moments without covariance and sketch.

    Examples:
        >>> Y = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> [round(value, 4) for value in channel_independence(Moments.from_signals(Y)).tolist()]
        [0.5858, 0.5858, 0.7071]
    """
    moments.check_finite(f"{name} after the activation")
    # All units come from one decomposition: without row p the determinant of G + tI changes
    # by a diagonal entry of its inverse, which the eigenvectors give for every p at once.
    values, vectors = _eigenpairs(moments, name)
    if not len(values):
        return torch.zeros(moments.units, dtype=torch.float64)
    square = vectors.square()
    # Directions without signal: v² of λ = 0. With none of them, a rounding error must not stand for one.
    rest = (1 - square.sum(dim=1)).clamp(min=0) if len(values) < moments.units else torch.zeros(1)
    # In units of the largest root one range of t does for
    # signals of every size; the size comes back at the end.
    top = values.max()
    values = (values / top)[:, None]
    t = torch.arange(-REACH, REACH + STEP, STEP, dtype=torch.float64, device=values.device).exp()
    numerator = square @ (values / (values + t).square())
    denominator = square @ (1 / (values + t)) + rest.to(values)[:, None] / t
    # With t = e^u, dt / √t is √t du, and equal steps in u are the trapezoidal rule. At
    # both ends of the range the integrand is nothing, so the ends need no half weight.
    lost = (t.sqrt() * numerator / denominator).sum(dim=1) * STEP / math.pi
    return (lost * top.sqrt()).cpu()


def independence_bytes(units: int, columns: int | None) -> int:
    """Return the most that `channel_independence` takes; `columns` of a sketch, None for a covariance."""
    places = 3 * round(2 * REACH / STEP + 1) * units  # of the integral, in both of its products
    if columns is None:
        return DOUBLE * (6 * units**2 + places)  # the vectors and LAPACK's work space
    return DOUBLE * (3 * units * (columns + 1) + 5 * columns**2 + places)


def _eigenpairs(moments: Moments, name: str) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (k,) > 0 of Y Yᵀ / M and its vectors (d, k), float64; no others."""
    mean = moments.mean.to(torch.float64)
    if moments.covariance is not None:
        # CHIP takes the maps as they are. The moments are centred,
        # so the mean is put back, here and as a column below.
        values, vectors = torch.linalg.eigh(moments.covariance.to(torch.float64) + torch.outer(mean, mean))
        kept = _not_rounding(values)
        return values[kept], vectors[:, kept]
    if moments.sketch is None:
        raise SignalError(
            f"The channel independence of {name}", f"found {moments}", "Keep a covariance or a sketch"
        )
    columns = torch.cat([moments.sketch.to(torch.float64) / math.sqrt(moments.samples), mean[:, None]], dim=1)
    # The (r + 1, r + 1) side has the same eigenvalues but for
    # zeros, and columns v / √λ are the other side's vectors.
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    kept = _not_rounding(values)
    return values[kept], columns @ vectors[:, kept] / values[kept].sqrt()


def _not_rounding(values: Tensor) -> Tensor:
    """Return which eigenvalues (n,) of a Gram matrix are above its rounding error: (n,) bool."""
    return values > len(values) * torch.finfo(torch.float64).eps * values.max()


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
    # The setting is checked before anything is computed, and with
    # all units: whether it is valid does not depend on who is dead.
    count_pairs(pairs, max(d, 1))
    moments_in.check_finite(f"{name} before the activation")
    # The output side says who is dead, for that is what the consumers get. The dead
    # leave both graphs before these are learned: a constant row is everybody's
    # neighbour, and takes the place of true ones (docs/method.md section 2).
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
    # Up to 64 units the pairs are solved for one by one, for the sake of the
    # spectrum that reports show. Above, all pairs are wanted for the distances
    # of their rows alone, and these need no eigensolver (docs/decisions/0017).
    if d > SMALL_UNITS and count_pairs(pairs, d) == d:
        # None: L_in or L_out is not positive definite in float64.
        # The eigensolver then says what is wrong with the pair.
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
    # The neighbours are those of the input graph: the score asks what became of units that were alike before
    # the layer. Its edges are taken 4,096 at a time, for at 28,672 units all differences would be 1.9 GB.
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
        # Live units stay above 0, also where their consumers' weights are all 0: the
        # dead are to leave before them. A score of rounding below 0 is lifted as well.
        scores = scores.to("cpu", torch.float64) * weights[live]
        top = float(scores.max())
        all_scores[live] = scores.clamp(min=1e-30 * (top if top > 0 else 1.0))
    dead = torch.ones(units, dtype=torch.bool)
    dead[live] = False
    diagnosis = Diagnosis(dead=tuple(dead.nonzero()[:, 0].tolist()), **found)
    return Importance(all_scores, diagnosis)
