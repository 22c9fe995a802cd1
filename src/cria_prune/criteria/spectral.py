"""The spectral criteria: what the graphs of a group's signals say of its units.

Legend: d = units of a group, W_out = its consumers' weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cria_prune.config import ScoreConfig
from cria_prune.criteria.evidence import Evidence
from cria_prune.spectrum import Importance
from cria_prune.spectrum import distortion as spectral_distortion
from cria_prune.spectrum import grounded_distortion as spectral_grounded_distortion
from cria_prune.spectrum import innovation as spectral_innovation


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
        *evidence.both_sides(), ridge=config.ridge, name=f"group {evidence.name!r}", **options
    )


def distortion_weighted(evidence: Evidence, config: ScoreConfig) -> Importance:
    """`distortion` times ‖W_out[:, p]‖²."""
    return spectral_distortion(
        *evidence.both_sides(),
        ridge=config.ridge,
        consumer_norm2=evidence.weights.consumer_norm2,
        name=f"group {evidence.name!r}",
        **spectral_options(config),
    )


def consumed_distortion(evidence: Evidence, config: ScoreConfig) -> Importance:
    """`distortion` with the output side as the consumers take it: each signal times ‖W_out[:, p]‖.

    The weight is inside the output graph, not outside the score: two neurons are far apart where what their
    consumers make of them is.
    """
    before, after = evidence.both_sides()
    return spectral_distortion(
        before,
        after.scaled(evidence.weights.consumer_norm2.sqrt()),
        ridge=config.ridge,
        name=f"group {evidence.name!r}",
        **spectral_options(config),
    )


def grounded_distortion(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Distance to removal between the grounded graphs, times ‖W_out[:, p]‖²; no ridge is needed or used."""
    return spectral_grounded_distortion(
        *evidence.both_sides(),
        consumer_norm2=evidence.weights.consumer_norm2,
        name=f"group {evidence.name!r}",
        **spectral_options(config),
    )


def innovation(evidence: Evidence, config: ScoreConfig) -> Importance:
    """‖W_out[:, p]‖² / Θ[p, p]: what the consumers lose of unit p after the best linear repair."""
    output = evidence.output_side()
    return spectral_innovation(output, evidence.weights.consumer_norm2, name=f"group {evidence.name!r}")


def innovation_magnitude(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Mean of two ranks in (0, 1]: of `innovation`, and of the L2 norm of the unit's group; dead units 0.

    Innovation is what a cut costs before any training; the norm is a stand-in for what the unit can still
    learn in a fine-tune. Their units have nothing to do with one another, so ranks among the live units are
    added, the average rank at ties. The norms do not change with the samples, so halves of them agree better
    than those of `innovation`.
    """
    found = innovation(evidence, config)
    live = torch.ones(evidence.units, dtype=torch.bool)
    live[list(found.diagnosis.dead)] = False
    from scipy.stats import rankdata  # see `rank_correlation`

    ranks = sum(rankdata(item[live].numpy()) for item in (found.scores, evidence.weights.group_norm2)) / (
        2 * max(1, int(live.sum()))
    )
    scores = torch.zeros(evidence.units, dtype=torch.float64)
    scores[live] = torch.as_tensor(ranks)
    return replace(found, scores=scores)
