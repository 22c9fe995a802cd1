"""The criteria without graphs: one function each, from the evidence on a group to a score per unit.

Legend: d = units of a group, W_out = its consumers' weights, Y = its output-side signals (d, M).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from cria_prune.config import ScoreConfig
from cria_prune.criteria.evidence import Evidence
from cria_prune.spectrum import Diagnosis, Importance


def plain(scores: Tensor) -> Importance:
    """Return scores (d,) that no solver computed, with an empty diagnosis."""
    return Importance(scores.detach().to("cpu", torch.float64), Diagnosis())


def random(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Uniform scores from a generator seeded by the configuration's seed and the group's name."""
    seed = zlib.crc32(f"{config.seed}/{evidence.name}".encode())
    generator = torch.Generator().manual_seed(seed)
    return plain(torch.rand(evidence.units, dtype=torch.float64, generator=generator))


def l1(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Sum of the absolute weights that produce the unit."""
    return plain(evidence.weights.producer_l1)


def l2(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Euclidean norm of the weights that produce the unit."""
    return plain(evidence.weights.producer_l2)


def activation_norm(evidence: Evidence, config: ScoreConfig) -> Importance:
    """sqrt(mean of Y[p]²) · ‖W_out[:, p]‖, the mean square taken without centring."""
    _, output = evidence.both_sides()
    mean_square = (output.variance + output.mean.square()).cpu()
    return plain(mean_square.sqrt() * evidence.weights.consumer_norm2.sqrt())


def wanda_sp(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Σ_f mean over i of |W_out[i, f]| · sqrt(mean of Y[f]²), over the unit's features and its consumers.

    The mean square is taken without centring, the mean over a consumer's output rows (and kernel places).
    The original sums over a head's features too; its mean square is per sequence, one factor for all. It
    prunes a layer before it looks at the next, which is not part of the score.
    """
    total = torch.zeros(evidence.units, dtype=torch.float64)
    for features, weights in evidence.read_features():
        norm = (features.variance + features.mean.square()).sqrt()
        total += (weights.mean_absolute * norm).sum(dim=1)
    return plain(total)


def fluctuation(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Σ_f Var(Y[f]) · ‖W_out[:, f]‖², over the unit's features and its consumers.

    FLAP's "weighted input feature variance", the criterion only: its standardisation of scores per layer
    and the bias that stands in for removed means are not part of it. Its running variance is exact here,
    divides by M and not by M - 1, and a head is the sum of its features, not their mean: one factor for
    all. FLAP's code also squares the values of attention's features before it averages them, which can
    change the order of heads; its paper does not say so, and here they are not squared.
    """
    total = torch.zeros(evidence.units, dtype=torch.float64)
    for features, weights in evidence.read_features():
        total += (weights.square * features.variance).sum(dim=1)
    return plain(total)


def taylor(evidence: Evidence, config: ScoreConfig) -> Importance:
    """(Σ g·w)² over the parameters of the unit, summed over batches when the signals were recorded."""
    assert evidence.taylor is not None
    return plain(evidence.taylor)
