"""The repair of a wide consumer from a sketch of what it reads, without a matrix of features by features.

Legend: K, R = features that stay, that leave; W_K, W_R = the weight along them (features, outputs);
M = samples; B √M = the sketch (n, r), so that B Bᵀ stands in for the second moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cria_prune.graph import Moments
from cria_prune.graph.sketch import BLOCK, sketch_gram, sketch_rows
from cria_prune.surgery.lines import Lines

RIDGES = tuple(10 ** (step / 2) for step in range(-8, 7))
"""What is tried, in |K|/r mean second moments of what stays: the size of the sketch's own noise."""


def repair_from_sketch(
    lines: Lines, moments: Moments, K: Tensor, R: Tensor, centred: bool
) -> tuple[Tensor, float, float]:
    """Give the features that stay what they predict of those that leave, with the ridge that predicts best.

    The update of W_K, (B_K B_Kᵀ + eI)⁻¹ B_K B_Rᵀ W_R, pushed through to the (r, r) side, is
    B_K (B_KᵀB_K + eI)⁻¹ B_Rᵀ W_R. One eigendecomposition of B_KᵀB_K serves every ridge; O(n r (r + outputs))
    time, O(r (r + outputs)) memory beside the sketch, whatever n is.

    A column of a sketch is as good as a sample, and there are fewer of them than features: with a ridge that
    suits exact moments (1e-4) the repair fits the sketch's noise, and can be far worse than none. So the
    ridge is that of the least generalised cross-validation ‖(I − H) B_RᵀW_R‖² / (1 − tr H / r)²,
    H = B_KᵀB_K (B_KᵀB_K + eI)⁻¹, an estimate of the error on other samples (Golub, Heath and Wahba,
    Technometrics 21, 1979); where none is below the error without repair, W_K stays. The fixed d/r of
    Marchenko and Pastur is right within a factor of 1,000 only. docs/decisions/0015 has the numbers.

    Args:
        lines: the weight; it is changed in place.
        moments: of the n features, with a sketch.
        K, R: (|K|,), (|R|,) int64.
        centred: leave the means out; otherwise they are one more column.

    Returns:
        What the bias has to grow by where the moments are centred (outputs,), the energy that the outputs
        lose with R, and the part of it that is expected to stay lost on other samples.
    """
    assert moments.sketch is not None
    sketch, mean, device = moments.sketch, moments.mean, moments.sketch.device
    if not centred:
        column = mean[:, None].to(sketch) * moments.samples**0.5
        sketch = torch.cat([sketch, column], dim=1)
    target = sketch.new_zeros(sketch.shape[1], lines.shape.numel(), dtype=torch.float64)
    step = target.new_zeros(target.shape[1])
    for part, rows in zip(R.split(BLOCK), sketch_rows(sketch, moments.samples, R), strict=True):
        removed = lines.read(part, device)
        target.addmm_(rows.T, removed)
        step += mean[part.to(device)] @ removed
        del removed  # or it would be held while the next block is read
    core, lost, left = _regress(sketch_gram(sketch, moments.samples, K), target)
    if centred:
        lost += float(step.square().sum())
    for part, rows in zip(K.split(BLOCK), sketch_rows(sketch, moments.samples, K), strict=True):
        update = rows @ core
        step -= mean[part.to(device)] @ update
        lines.add(part, update)
        del update
    return step, lost, left


def _regress(gram: Tensor, target: Tensor) -> tuple[Tensor, float, float]:
    """Return (G + eI)⁻¹ T (r, outputs) of the best ridge e or 0, ‖T‖², and what of it is left.

    Columns in which nothing lies, of a sketch of few samples, are no samples.
    """
    core, lost = torch.zeros_like(target), float(target.square().sum())
    alive = (gram.diagonal() > 0).nonzero()[:, 0]
    if not len(alive) or not lost:
        return core, lost, lost
    values, vectors = torch.linalg.eigh(gram[alive][:, alive])
    values = values.clamp(min=0)
    turned = vectors.T @ target[alive]
    energy, size = turned.square().sum(dim=1), float(values.mean())
    apart = max(lost - float(energy.sum()), 0.0)  # in columns without anything that stays
    left, chosen = lost, None
    for ridge in RIDGES:
        residual = ridge * size / (values + ridge * size)  # the eigenvalues of I − H
        error = float((residual.square() * energy).sum() / residual.mean().square()) + apart
        if error < left:
            left, chosen = error, ridge
    if chosen is not None:
        core[alive] = vectors @ (turned / (values + chosen * size)[:, None])
    return core, lost, left
