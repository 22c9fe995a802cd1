"""Criteria: a table of scores, the spectral family and the baselines."""

from cria_prune.criteria.evidence import Evidence, UnitWeights
from cria_prune.criteria.score import score
from cria_prune.criteria.table import CRITERIA, Criterion, register_criterion, unregister_criterion

__all__ = [
    "CRITERIA",
    "Criterion",
    "Evidence",
    "UnitWeights",
    "register_criterion",
    "score",
    "unregister_criterion",
]
