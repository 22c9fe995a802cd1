"""Scores, groups and a budget -> what stays. Pure: no model, no files."""

from cria_prune.plan.budget import Budget, count_macs, count_parameters, largest_reachable
from cria_prune.plan.make import compose, identity_plan, make_plan, plan
from cria_prune.plan.plan import Plan, TensorCut
from cria_prune.plan.select import check_prunable, check_reachable, check_share, checked_scores, select
from cria_prune.plan.stairs import Allowed, Stair, reachable, stairs

__all__ = [
    "Allowed",
    "Budget",
    "Plan",
    "Stair",
    "TensorCut",
    "check_prunable",
    "check_reachable",
    "check_share",
    "checked_scores",
    "compose",
    "count_macs",
    "count_parameters",
    "identity_plan",
    "largest_reachable",
    "make_plan",
    "plan",
    "reachable",
    "select",
    "stairs",
]
