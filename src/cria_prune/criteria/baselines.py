"""The criteria without graphs: one function each, from the evidence on a group to a score per unit.

Legend: d = units of a group, W_out = its consumers' weights, Y = its output-side signals (d, M).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from cria_prune.base.errors import CriterionError
from cria_prune.config import ScoreConfig
from cria_prune.criteria.evidence import Evidence, Sizes, Steps
from cria_prune.graph.moments import DOUBLE
from cria_prune.spectrum.distortions import channel_independence, independence_bytes
from cria_prune.spectrum.importance import Diagnosis, Importance

DISTANCE_ROWS = 1024  # units whose distances to all others are held at a time


def plain(scores: Tensor) -> Importance:
    """Return scores (d,) that no solver computed, with an empty diagnosis."""
    return Importance(scores.detach().to("cpu", torch.float64), Diagnosis())


def random(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Uniform scores from a generator seeded by the configuration's seed and the group's name."""
    # Of the name, so that a group's draw does not depend on the others;
    # crc32, for Python's hash of a text differs between processes.
    seed = zlib.crc32(f"{config.seed}/{evidence.name}".encode())
    generator = torch.Generator().manual_seed(seed)
    return plain(torch.rand(evidence.units, dtype=torch.float64, generator=generator))


def l1(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Sum of the absolute weights that produce the unit."""
    return plain(evidence.weights.producer_l1)


def l2(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Euclidean norm of the weights that produce the unit."""
    return plain(evidence.weights.producer_l2)


def group_l2(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Euclidean norm of the weights of a unit's producers, batch norms and consumers together."""
    return plain(evidence.weights.group_norm2.sqrt())


def bn_scale(evidence: Evidence, config: ScoreConfig) -> Importance:
    """|γ|, the scale of the unit's own batch norm: Network Slimming, the criterion only.

    The original trains with an L1 penalty on γ first, which is not part of the score: without it the
    scales say less. Where a unit passes several batch norms (a depthwise convolution, the branches of a
    residual sum, the features of a flattened channel) it is the sum of their |γ|; a branch without a batch
    norm then adds nothing.

    Raises:
        CriterionError: no batch norm with a scale lies in the group.
    """
    scale = evidence.weights.batch_norm_scale
    if scale is None:
        group = evidence.weights.group
        raise CriterionError(
            f"The criterion 'bn-scale' for group {evidence.name!r}",
            f"its {evidence.units} units of kind {group.kind!r} pass no batch norm with a scale",
            "Use a criterion of any layer's weights, such as 'l2' or 'lamp', or freeze the group",
        )
    return plain(scale)


def fpgm(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Σ_q ‖w_p − w_q‖ over all units q of the group: far from the others is kept.

    w_p holds all weights that produce unit p, of all its producers and features, one behind the other. For
    heads the features are compared in the order in which they lie: two heads that do the same with
    features in another order count as far apart. Distances come from inner products in float64, so that
    those of duplicates are about 1e-8 of the weights' norm and not 0.
    """
    units = evidence.units
    total = torch.zeros(units, dtype=torch.float64)
    for start in range(0, units, DISTANCE_ROWS):
        block = slice(start, start + DISTANCE_ROWS)
        square = torch.zeros(len(total[block]), units, dtype=torch.float64)
        for stored in evidence.weights.producer_rows():
            rows = stored.to(torch.float64)
            rows = rows - rows.mean(dim=0)  # what all share is no distance, and costs digits
            norm2 = rows.square().sum(dim=1)
            square += (norm2[block, None] + norm2 - 2 * rows[block] @ rows.T).cpu()
        distances = square.clamp_(min=0).sqrt_()
        own = torch.arange(len(distances))
        distances[own, own + start] = 0
        total[block] = distances.sum(dim=1)
    return plain(total)


def fpgm_bytes(sizes: Sizes, config: ScoreConfig) -> Steps:
    """Rows as they lie, twice as float64, and four blocks of distances."""
    blocks = 4 * DOUBLE * min(sizes.units, DISTANCE_ROWS) * sizes.units
    return {"weights": 2 * sizes.norms("producers") + blocks}


def lamp(evidence: Evidence, config: ScoreConfig) -> Importance:
    """‖w_p‖² / Σ ‖w_q‖² over the units q with ‖w_q‖ >= ‖w_p‖, w_p the weights that produce unit p.

    LAMP scores single weights of a layer; here the units of a group take their place. Within a group the
    order is that of `l2`; against other groups it counts what a unit is among those that would outlive
    it. Units of equal norm get equal scores, where the original, which sorts, puts one above the other; a
    norm of 0 scores 0. Ranking `global` divides by the group's mean score, as for every criterion: the
    layerwise shares of the paper are those of the bare scores.
    """
    square = evidence.weights.producer_l2.square()
    ascending = square.sort().values
    outliving = ascending.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ascending, square)  # of several equal ones the lowest: all are in the sum
    return plain(torch.where(square > 0, square / outliving[first], 0.0))


def activation_norm(evidence: Evidence, config: ScoreConfig) -> Importance:
    """sqrt(mean of Y[p]²) · ‖W_out[:, p]‖, the mean square taken without centring."""
    output = evidence.output_side()
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


def apoz(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Share of the unit's outputs that are above 0: one minus the average percentage of zeros.

    The outputs are what the consumers read, all features and samples of the unit alike, so that a channel
    counts with all its positions as in the original. After a ReLU, above 0 is not 0. Activations that keep
    the sign of what enters them (GELU, SiLU, leaky ReLU, tanh) are never exactly 0: there it is the share
    of samples on the side where a ReLU would let the unit pass. The outputs of gated units and of heads
    have no such side: the share is defined, near one half, and says little; use another criterion there.
    """
    output = evidence.output_side()
    assert output.positive is not None
    return plain(output.positive)


def chip(evidence: Evidence, config: ScoreConfig) -> Importance:
    """(‖Y‖_* − ‖Y without row p‖_*) / √M: what the nuclear norm of the output signals loses with unit p.

    CHIP's channel independence of one matrix of all samples, exact from the moments. It is not the mean
    over images of CHIP, which needs the feature maps of each image whole, and one decomposition for each
    image and unit: a channel that is alike to others within every image but not from image to image is
    independent here and redundant there. A row holds all features of a unit; two heads are compared
    feature by feature, in the order in which they lie. Sketched groups score their sketch.
    """
    output = evidence.output_side()
    return plain(channel_independence(output, name=f"group {evidence.name!r}"))


def chip_bytes(sizes: Sizes, config: ScoreConfig) -> Steps:
    """One eigendecomposition."""
    return {"eigenvectors": independence_bytes(sizes.units, sizes.columns)}


def taylor(evidence: Evidence, config: ScoreConfig) -> Importance:
    """(Σ g·w)² over the parameters of the unit, summed over batches when the signals were recorded."""
    assert evidence.taylor is not None
    return plain(evidence.taylor)


def fisher(evidence: Evidence, config: ScoreConfig) -> Importance:
    """(Σ x · ∂L/∂x)² over the positions and features of the unit's input-side signal x, summed over examples.

    Where `taylor` squares the gradient of a batch, this squares that of each example: gradients of
    opposite signs do not cancel, and the score does not depend on the batches. What is tied to a unit by
    its group (both projections of a gated unit; queries, keys and values of a head) is added before the
    square, as Liu et al. do for coupled layers. Their divisors (twice the examples, the cost that the
    unit frees) are left out: the first changes no order, the second is the planner's.
    """
    assert evidence.fisher is not None
    return plain(evidence.fisher)
