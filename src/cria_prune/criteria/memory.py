"""The bytes that a criterion takes to score one group beyond the recorded moments."""

from __future__ import annotations

from collections.abc import Mapping

from cria_prune.config import RecordConfig, ScoreConfig
from cria_prune.spectrum.memory import DOUBLE, SINGLE, Steps, chip_bytes, distortion_bytes, innovation_bytes
from cria_prune.structure.groups import ParameterSlice, UnitGroup

Shapes = Mapping[str, tuple[int, ...]]

DISTORTIONS = ("distortion", "distortion-weighted", "consumed-distortion", "grounded-distortion")
PRODUCERS = ("l1", "l2", "lamp", "fpgm")
GROUPS = ("group-l2", "innovation-magnitude")
WEIGHTLESS = ("random", "apoz", "chip", "taylor", "fisher", "distortion", "bn-scale")
"""Criteria that look at no weight, or at vectors alone."""


def score_bytes(group: UnitGroup, shapes: Shapes, score: ScoreConfig, record: RecordConfig) -> Steps:
    """Return step -> the most that scoring a group holds in this step; steps follow one another.

    Args:
        group: d units.
        shapes: of the model's tensors.
        score: the criterion and its numbers; one that is not known here counts as its weights alone.
        record: `exact_units` and `sketch_columns`.
    """
    d, name = group.size, score.criterion
    columns = record.sketch_columns if d > record.exact_units else None
    steps: Steps = {"weights": _norms(group, shapes, name)}
    if name in ("innovation", "innovation-magnitude"):
        steps |= innovation_bytes(d, columns)
    elif name in DISTORTIONS:
        steps |= distortion_bytes(d, columns, score.neighbors, score.pairs, score.sketch)
        if name == "consumed-distortion":  # the weighted moments stay until the end
            extra = SINGLE * d * columns if columns else DOUBLE * d**2
            steps = {step: size + (0 if step == "weights" else extra) for step, size in steps.items()}
    elif name == "chip":
        steps |= chip_bytes(d, columns)
    return steps


def _norms(group: UnitGroup, shapes: Shapes, criterion: str) -> int:
    """Return what the norms of the largest weight take: it is read in float64."""
    if criterion in WEIGHTLESS:
        return 0
    slices = group.producers if criterion in PRODUCERS else group.consumers
    if criterion in GROUPS:
        slices = (*group.producers, *group.consumers)
    most = max((_norm(item, shapes[item.tensor]) for item in slices), default=0)
    if criterion == "fpgm":  # rows as they lie, twice as float64, and four blocks of distances
        return 2 * most + 4 * DOUBLE * min(group.size, 1024) * group.size
    return most


def _norm(item: ParameterSlice, shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    copied = SINGLE * count if item.dim and len(shape) > 2 else 0
    return DOUBLE * count + copied
