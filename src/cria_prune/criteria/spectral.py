"""The spectral criteria: what the graphs of a group's signals say of its units.

Legend: d = units of a group, W_out = its consumers' weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cria_prune.config import ScoreConfig
from cria_prune.criteria.evidence import Evidence, Sizes, Steps
from cria_prune.graph.moments import DOUBLE, SINGLE
from cria_prune.spectrum.distortions import distortion as spectral_distortion
from cria_prune.spectrum.distortions import distortion_bytes as spectral_bytes
from cria_prune.spectrum.distortions import grounded_distortion as spectral_grounded_distortion
from cria_prune.spectrum.distortions import innovation as spectral_innovation
from cria_prune.spectrum.distortions import unpredicted_bytes
from cria_prune.spectrum.importance import Importance


def _options(evidence: Evidence, config: ScoreConfig) -> dict[str, Any]:
    """Return what the distortions take from the configuration; a ridge where it is given, else their own."""
    return {
        "neighbors": config.neighbors,
        "pairs": config.pairs,
        "sketch": config.sketch,
        "seed": config.seed,
        "name": f"group {evidence.name!r}",
        **({} if config.ridge is None else {"ridge": config.ridge}),
    }


def distortion(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Share in the spectral distortion between the input-side and the output-side graph."""
    return spectral_distortion(*evidence.both_sides(), **_options(evidence, config))


def distortion_bytes(sizes: Sizes, config: ScoreConfig) -> Steps:
    """Graphs, pencil and edges."""
    return spectral_bytes(
        sizes.units, sizes.columns, neighbors=config.neighbors, pairs=config.pairs, sketch=config.sketch
    )


def distortion_weighted(evidence: Evidence, config: ScoreConfig) -> Importance:
    """`distortion` times ‖W_out[:, p]‖²."""
    norm2 = evidence.weights.consumer_norm2
    return spectral_distortion(*evidence.both_sides(), consumer_norm2=norm2, **_options(evidence, config))


def consumed_distortion(evidence: Evidence, config: ScoreConfig) -> Importance:
    """`distortion` with the output side as the consumers take it: each signal times ‖W_out[:, p]‖.

    The weight is inside the output graph, not outside the score: two neurons are far apart where what their
    consumers make of them is.
    """
    before, after = evidence.both_sides()
    taken = after.scaled(evidence.weights.consumer_norm2.sqrt())
    return spectral_distortion(before, taken, **_options(evidence, config))


def consumed_bytes(sizes: Sizes, config: ScoreConfig) -> Steps:
    """The weighted moments stay until the end."""
    d, r = sizes.units, sizes.columns
    taken = DOUBLE * d**2 if r is None else SINGLE * d * r
    return {step: size + taken for step, size in distortion_bytes(sizes, config).items()}


def grounded_distortion(evidence: Evidence, config: ScoreConfig) -> Importance:
    """Distance to removal between the grounded graphs, times ‖W_out[:, p]‖²; no ridge is needed or used."""
    norm2 = evidence.weights.consumer_norm2
    return spectral_grounded_distortion(
        *evidence.both_sides(), consumer_norm2=norm2, **{**_options(evidence, config), "ridge": 0.0}
    )


def innovation(evidence: Evidence, config: ScoreConfig) -> Importance:
    """‖W_out[:, p]‖² / Θ[p, p]: what the consumers lose of unit p after the best linear repair.

    The configuration's ridge is ε: the variance of the noise that Θ adds to every unit, in mean variances.
    """
    return spectral_innovation(
        evidence.output_side(),
        evidence.weights.consumer_norm2,
        name=f"group {evidence.name!r}",
        **({} if config.ridge is None else {"eps": config.ridge}),
    )


def innovation_bytes(sizes: Sizes, config: ScoreConfig) -> Steps:
    """What inverts the second moments."""
    return {"inverse": unpredicted_bytes(sizes.units, sizes.columns)}


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
