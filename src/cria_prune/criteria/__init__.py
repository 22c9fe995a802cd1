"""Criteria: a table of scores, the spectral family and the baselines."""

from cria_prune.criteria.evidence import Evidence, UnitWeights
from cria_prune.criteria.score import score
from cria_prune.criteria.table import CRITERIA, Criterion

__all__ = ["CRITERIA", "Criterion", "Evidence", "UnitWeights", "score"]
