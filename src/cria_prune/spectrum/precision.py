"""What goes with each unit: what the others cannot predict of it, and what the nuclear norm loses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cria_prune.base.errors import SignalError
from cria_prune.graph.moments import BLOCK, DOUBLE, SINGLE, Moments, sketch_gram, sketch_rows

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
        return _inverse_diagonal(moments.covariance.to(torch.float64).clone(), eps * size)
    assert moments.sketch is not None
    sketch, (d, r) = moments.sketch, moments.sketch.shape
    ridge = max(eps, SKETCH_RIDGE * d / r) * size
    if d <= r:
        B = torch.cat(list(sketch_rows(sketch, moments.samples)))
        return _inverse_diagonal(B @ B.T, ridge) - ridge
    gram = sketch_gram(sketch, moments.samples)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    parts = []
    for rows in sketch_rows(sketch, moments.samples):
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
    values, vectors = _eigenpairs(moments, name)
    if not len(values):
        return torch.zeros(moments.units, dtype=torch.float64)
    square = vectors.square()
    # Directions without signal: v² of λ = 0. With none of them, a rounding error must not stand for one.
    rest = (1 - square.sum(dim=1)).clamp(min=0) if len(values) < moments.units else torch.zeros(1)
    top = values.max()
    values = (values / top)[:, None]
    t = torch.arange(-REACH, REACH + STEP, STEP, dtype=torch.float64, device=values.device).exp()
    numerator = square @ (values / (values + t).square())
    denominator = square @ (1 / (values + t)) + rest.to(values)[:, None] / t
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
        values, vectors = torch.linalg.eigh(moments.covariance.to(torch.float64) + torch.outer(mean, mean))
        kept = _not_rounding(values)
        return values[kept], vectors[:, kept]
    if moments.sketch is None:
        raise SignalError(
            f"The channel independence of {name}", f"found {moments}", "Keep a covariance or a sketch"
        )
    columns = torch.cat([moments.sketch.to(torch.float64) / math.sqrt(moments.samples), mean[:, None]], dim=1)
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    kept = _not_rounding(values)
    return values[kept], columns @ vectors[:, kept] / values[kept].sqrt()


def _not_rounding(values: Tensor) -> Tensor:
    """Return which eigenvalues (n,) of a Gram matrix are above its rounding error: (n,) bool."""
    return values > len(values) * torch.finfo(torch.float64).eps * values.max()
