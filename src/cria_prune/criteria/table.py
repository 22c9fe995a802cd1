"""The criteria: one function each, from the evidence on a group to a score per unit.

Legend: d = units of a group, W_out = its consumers' weights, Y = its output-side signals (d, M).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cria_prune.config import ScoreConfig
from cria_prune.criteria.evidence import Evidence
from cria_prune.graph import Moments
from cria_prune.spectrum import Diagnosis, Importance
from cria_prune.spectrum import distortion as spectral_distortion
from cria_prune.spectrum import grounded_distortion as spectral_grounded_distortion
from cria_prune.spectrum import innovation as spectral_innovation

Need = Literal["states", "gradients"]


@dataclass(frozen=True)
class Criterion:
    """A way to score units: high is kept.

    Attributes:
        name: key in `CRITERIA`.
        function: (evidence, config) to the importance of a group's units.
        source: where it comes from.
        needs: `states` (recorded signals) and `gradients` (recorded with gradients).
        summary: one line.
    """

    name: str
    function: Callable[[Evidence, ScoreConfig], Importance]
    source: str
    needs: frozenset[Need]
    summary: str


def plain(scores: Tensor) -> Importance:
    """Return scores (d,) that no solver computed, with an empty diagnosis."""
    return Importance(scores.detach().to("cpu", torch.float64), Diagnosis())


def both_sides(evidence: Evidence) -> tuple[Moments, Moments]:
    """Return the moments of the input side and the output side; `score` has checked that they are there."""
    assert evidence.input is not None and evidence.output is not None
    return evidence.input, evidence.output


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
    _, output = both_sides(evidence)
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


def spectral_options(config: ScoreConfig) -> dict[str, Any]:
    """Return what both distortions take from the configuration."""
    return {
        "neighbors": config.neighbors,
        "pairs": config.pairs,
        "sketch": config.sketch,
        "seed": config.seed,
    }


def distortion(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Share in the spectral distortion between the input-side and the output-side graph."""
    options = spectral_options(config)
    return spectral_distortion(
        *both_sides(evidence), ridge=config.ridge, name=f"group {evidence.name!r}", **options
    )


def distortion_weighted(evidence: Evidence, config: ScoreConfig) -> Importance:
    """`distortion` times ‖W_out[:, p]‖²."""
    return spectral_distortion(
        *both_sides(evidence),
        ridge=config.ridge,
        consumer_norm2=evidence.weights.consumer_norm2,
        name=f"group {evidence.name!r}",
        **spectral_options(config),
    )


def grounded_distortion(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Distance to removal between the grounded graphs, times ‖W_out[:, p]‖²; no ridge is needed or used."""
    return spectral_grounded_distortion(
        *both_sides(evidence),
        consumer_norm2=evidence.weights.consumer_norm2,
        name=f"group {evidence.name!r}",
        **spectral_options(config),
    )


def innovation(evidence: Evidence, config: ScoreConfig) -> Importance:
    """‖W_out[:, p]‖² / Θ[p, p]: what the consumers lose of unit p after the best linear repair."""
    _, output = both_sides(evidence)
    return spectral_innovation(output, evidence.weights.consumer_norm2, name=f"group {evidence.name!r}")


_STATES: frozenset[Need] = frozenset({"states"})
_WANG = "Wang 2026 (arXiv 2605.18860), after SPADE: Cheng et al., ICML 2021"

CRITERIA: dict[str, Criterion] = {
    item.name: item
    for item in (
        Criterion("random", random, "control", frozenset(), "seeded random scores"),
        Criterion(
            "l1",
            l1,
            "Li et al., ICLR 2017 (arXiv 1608.08710)",
            frozenset(),
            "L1 norm of the producers' weights",
        ),
        Criterion(
            "l2",
            l2,
            "He et al., IJCAI 2018 (arXiv 1808.06866)",
            frozenset(),
            "L2 norm of the producers' weights",
        ),
        Criterion(
            "activation-norm",
            activation_norm,
            "the per-unit form of Wanda: Sun et al., ICLR 2024 (arXiv 2306.11695)",
            _STATES,
            "root mean square of the output signal times the consumers' norm",
        ),
        Criterion(
            "wanda-sp",
            wanda_sp,
            "Wanda, Sun et al., ICLR 2024 (arXiv 2306.11695); structured by An et al. (arXiv 2312.11983)",
            _STATES,
            "mean absolute weight times root mean square, per feature that the consumers read",
        ),
        Criterion(
            "fluctuation",
            fluctuation,
            "FLAP's WIFV, the criterion only: An et al., AAAI 2024 (arXiv 2312.11983)",
            _STATES,
            "variance times the consumers' squared norm, per feature that the consumers read",
        ),
        Criterion(
            "taylor",
            taylor,
            "Molchanov et al., CVPR 2019 (arXiv 1906.10771), group form",
            frozenset({"states", "gradients"}),
            "first-order effect of removal on the loss",
        ),
        Criterion("distortion", distortion, _WANG, _STATES, "spectral distortion between the two graphs"),
        Criterion(
            "distortion-weighted",
            distortion_weighted,
            f"{_WANG}; the consumers' factor is Cria's",
            _STATES,
            "spectral distortion times the consumers' squared norm",
        ),
        Criterion(
            "grounded-distortion",
            grounded_distortion,
            "Cria, METHOD section 3",
            _STATES,
            "spectral distance to the removed neuron times the consumers' squared norm",
        ),
        Criterion(
            "innovation",
            innovation,
            "Cria, METHOD section 3; after the optimal brain surgeon, Hassibi and Stork, NIPS 1992",
            _STATES,
            "what neighbours cannot predict, times the consumers' squared norm",
        ),
    )
}
