"""Cria: makes trained neural networks smaller.

One function per step, in the order of the data: `discover` what may be removed, `record` what the
neurons do, `score` them, `plan` what stays, `apply` the plan, `verify` that masked equals pruned,
`recover` the task, `save` and `load` the result; `save_pretrained` writes what plain transformers
loads, and `export_onnx` what onnxruntime runs. `prune` runs discover to verify, round by round, and
takes what `prepare` found once; `score_once` keeps scores from which it cuts to any size;
`prune_offloaded` does without the model in memory; `ablate` measures whether scores are worth anything.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from cria_prune.ablation import ablate
    from cria_prune.artifact.checkpoint import LoadedCheckpoint, load, save
    from cria_prune.artifact.pretrained import save_padded, save_pretrained
    from cria_prune.artifact.scores import load_scores, save_scores
    from cria_prune.base.errors import CriaError
    from cria_prune.base.events import watch
    from cria_prune.config import (
        PlanConfig,
        PruneConfig,
        RecordConfig,
        RecoverConfig,
        ScoreConfig,
        preset,
    )
    from cria_prune.criteria.score import score
    from cria_prune.criteria.table import CRITERIA, register_criterion
    from cria_prune.deploy.folder import export_onnx
    from cria_prune.memory import predict_memory
    from cria_prune.offload.prune import prune_offloaded
    from cria_prune.pipeline import prune
    from cria_prune.planning.plan import Plan, plan
    from cria_prune.recording.collect import record
    from cria_prune.recovery.tune import recover
    from cria_prune.repair.fidelity import Fidelity, fidelity
    from cria_prune.result import PruneResult
    from cria_prune.scores import Scored, score_once
    from cria_prune.stages import Prepared, discover, prepare
    from cria_prune.structure.groups import UnitGroup, UnitGroups
    from cria_prune.surgery.removal import apply
    from cria_prune.surgery.verify import verify
    from cria_prune.tasks.given import make_batches

__all__ = [
    "CRITERIA",
    "CriaError",
    "Fidelity",
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
    "export_onnx",
    "fidelity",
    "load",
    "load_scores",
    "make_batches",
    "plan",
    "predict_memory",
    "prepare",
    "preset",
    "prune",
    "prune_offloaded",
    "record",
    "recover",
    "register_criterion",
    "save",
    "save_padded",
    "save_pretrained",
    "save_scores",
    "score",
    "score_once",
    "verify",
    "watch",
]

_HOMES = {
    name: home
    for home, names in {
        "ablation": "ablate",
        "artifact.checkpoint": "LoadedCheckpoint load save",
        "artifact.pretrained": "save_padded save_pretrained",
        "artifact.scores": "load_scores save_scores",
        "base.errors": "CriaError",
        "base.events": "watch",
        "config": "PlanConfig PruneConfig RecordConfig RecoverConfig ScoreConfig preset",
        "criteria.score": "score",
        "criteria.table": "CRITERIA register_criterion",
        "deploy.folder": "export_onnx",
        "memory": "predict_memory",
        "offload.prune": "prune_offloaded",
        "pipeline": "prune",
        "planning.plan": "Plan plan",
        "recording.collect": "record",
        "recovery.tune": "recover",
        "repair.fidelity": "Fidelity fidelity",
        "result": "PruneResult",
        "scores": "Scored score_once",
        "stages": "Prepared discover prepare",
        "structure.groups": "UnitGroup UnitGroups",
        "surgery.removal": "apply",
        "surgery.verify": "verify",
        "tasks.given": "make_batches",
    }.items()
    for name in names.split()
}
"""Public name -> the module under `cria_prune` that it is imported from when it is first asked for."""


def _public(name: str) -> Any:
    """Import a public name: torch takes seconds, and the command line answers many questions without it."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("cria-prune")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # a checker that sees it believes in every name
    __getattr__ = _public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
