"""How much a layer loses with a whole expert."""

from __future__ import annotations

import torch
from torch import Tensor

from cria_prune.base.errors import SignalError
from cria_prune.recording.routed import Routed
from cria_prune.spectrum.importance import Diagnosis, Importance, rank_correlation
from cria_prune.structure.groups import UnitGroup


def routed_importance(group: UnitGroup, routed: Routed, *, drop: bool = False) -> Importance:
    """Return the mean, over the tokens that are sent to an expert, of its router weight · ‖its output‖.

    Lasby et al. 2025 (REAP, arXiv 2510.13999). An expert that no token reached has no mean: it is taken
    for a usual one (the median of its layer), unless it is to be dropped. Where the router ranks groups of
    experts, a unit is one expert of each group, and has the mean of theirs.

    Args:
        group: of whole experts; routed: what they did.
        drop: experts that no token reached count as dead, with the score 0.

    Raises:
        SignalError: no token reached any of them, or an output is NaN or infinite.
    """
    if not routed.tokens.sum():
        raise SignalError(
            f"Scoring group {group.name!r}", "no calibration token reached any of its experts",
            "Pass batches that run this layer, or leave out experts",
        )  # fmt: skip
    positions = torch.from_numpy(group.producers[0].positions)
    whole = _scores(routed.tokens.sum(dim=0), routed.given.sum(dim=0), positions, drop)
    if not bool(whole.isfinite().all()):
        raise SignalError(
            f"Scoring group {group.name!r}", "the outputs of its experts hold NaN or infinity",
            "Check the model's weights and the calibration data for NaN",
        )  # fmt: skip
    reached = (routed.tokens.sum(dim=0) > 0)[positions].any(dim=1)
    dead = tuple(torch.nonzero(~reached).ravel().tolist()) if drop else ()
    even, odd = (_scores(*half, positions, drop) for half in zip(routed.tokens, routed.given, strict=True))
    return Importance(whole, Diagnosis(dead=dead, split_half=rank_correlation(even, odd)))


def _scores(tokens: Tensor, given: Tensor, positions: Tensor, drop: bool) -> Tensor:
    """Return (units,) float64 of (E,) sums."""
    means = given / tokens.clamp(min=1)
    reached = tokens > 0
    if not drop and bool(reached.any()):
        means[~reached] = means[reached].median()
    return means[positions].mean(dim=1)
