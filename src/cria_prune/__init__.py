"""Cria: makes trained neural networks smaller.

One function per step, in the order of the data: `discover` what may be removed, `record` what the
neurons do, `score` them, `plan` what stays, `apply` the plan, `verify` that masked equals pruned,
`recover` the task, `save` and `load` the result; `save_pretrained` writes what plain transformers
loads. `prune` runs discover to verify, round by round, and takes what `prepare` found once;
`score_once` keeps scores from which it cuts to any size; `prune_offloaded` does without the model in
memory; `ablate` measures whether scores are worth anything.
"""

from importlib.metadata import version

from cria_prune.ablation import ablate
from cria_prune.artifact import (
    LoadedCheckpoint,
    load,
    load_scores,
    save,
    save_padded,
    save_pretrained,
    save_scores,
)
from cria_prune.config import (
    PlanConfig,
    PruneConfig,
    RecordConfig,
    RecoverConfig,
    ScoreConfig,
    preset,
)
from cria_prune.criteria import CRITERIA, score
from cria_prune.errors import CriaError
from cria_prune.memory import predict_memory
from cria_prune.offload import prune_offloaded
from cria_prune.pipeline import prune
from cria_prune.plan import Plan, plan
from cria_prune.record import record
from cria_prune.recover import recover
from cria_prune.result import PruneResult
from cria_prune.scores import Scored, score_once
from cria_prune.stages import Prepared, discover, prepare
from cria_prune.structure import UnitGroup, UnitGroups
from cria_prune.surgery import apply, verify

__version__ = version("cria-prune")

__all__ = [
    "CRITERIA",
    "CriaError",
    "LoadedCheckpoint",
    "Plan",
    "PlanConfig",
    "Prepared",
    "PruneConfig",
    "PruneResult",
    "RecordConfig",
    "RecoverConfig",
    "ScoreConfig",
    "Scored",
    "UnitGroup",
    "UnitGroups",
    "ablate",
    "apply",
    "discover",
    "load",
    "load_scores",
    "plan",
    "predict_memory",
    "prepare",
    "preset",
    "prune",
    "prune_offloaded",
    "record",
    "recover",
    "save",
    "save_padded",
    "save_pretrained",
    "save_scores",
    "score",
    "score_once",
    "verify",
]
