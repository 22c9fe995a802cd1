"""prune_offloaded(): the order of the stages for a folder whose model is larger than the memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cria_prune import pipeline
from cria_prune.artifact.files import hashes, write_json
from cria_prune.artifact.folders import CERTIFICATE, MANIFEST, whole_folder
from cria_prune.artifact.manifest import read_manifest, read_plan, render_manifest
from cria_prune.batches import Batch
from cria_prune.config import PlanConfig, PruneConfig
from cria_prune.dispatched import Weights, structure_of
from cria_prune.errors import ArtifactError, ConfigError, CriterionError, SignalError
from cria_prune.offload.check import load_dispatched, verify_folder
from cria_prune.offload.repair import repair
from cria_prune.offload.turns import score_in_turns
from cria_prune.offload.write import floats, write_model
from cria_prune.plan import Plan, compose
from cria_prune.plan import plan as make_plan
from cria_prune.progress import QUIET, Progress
from cria_prune.scope import check_target
from cria_prune.spectrum import Importance
from cria_prune.structure import UnitGroups
from cria_prune.surgery import Repair, Verification

MEMORY = 2**31
"""Bytes for the moments and weights of a turn of recording, unless other is asked for."""


@dataclass(frozen=True)
class Offloaded:
    """What `prune_offloaded` did.

    Attributes:
        path: the folder.
        plan: what was removed, relative to the dense model; `plan.report` has the counts.
        groups: the structure before this cut, with why the frozen groups are frozen.
        importances: group name -> importance of its units.
        repairs: what became of the consumers; empty without repair.
        verification: the folder against the masked model; None where that was not asked for.
        turns: in how many parts the groups were recorded; 0 where nothing was.
        seconds: stage -> wall time.
    """

    path: Path
    plan: Plan
    groups: UnitGroups = field(repr=False)
    importances: Mapping[str, Importance] = field(repr=False)
    repairs: tuple[Repair, ...] = field(repr=False)
    verification: Verification | None
    turns: int
    seconds: Mapping[str, float] = field(repr=False)


def prune_offloaded(
    source: str | Path,
    output: str | Path,
    batches: Iterable[Batch],
    config: PruneConfig,
    *,
    memory: int = MEMORY,
    max_shard_size: int | str = "500MB",
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Offloaded:
    """Prune the model in a Hugging Face folder, layer by layer, and write the result shard by shard.

    The weights stay on disk: accelerate loads each layer when it runs, and no more than a layer, a shard, and
    the moments of a turn are in memory. The scores, the plan and the weights are those that `prune` gives in
    one round. Plain transformers loads the result.

    Units are ranked once: `config.plan.rounds` is 1. Which groups can be cut is seen on shapes alone; that
    the saved folder computes what the masked model does is tried on the first two examples, both models
    loaded layer by layer. Batch norms are not measured again.

    Args:
        source: the folder: config.json and safetensors, in one file or in shards; it is only read.
        output: the folder to write; whole or not there.
        batches: calibration batches; with several turns they are gone through several times.
        config: what to remove and how. `plan.vanilla` is set: one configuration has to say all sizes.
        memory: bytes for the moments and weights of a turn. What does not fit is recorded in turns: a few
            blocks at a time where the model is a chain of blocks, else a few groups with a pass each.
        max_shard_size: bytes of a file of weights, or a text such as `1GB`; one shard is in memory.
        overwrite: replace a folder that Cria wrote.
        provenance, results: kept in `cria.json`; they must be plain JSON.
        progress: where to show the turns.

    Raises:
        ConfigError: several rounds, or less residual width, were asked for.
        CriterionError: the criterion takes gradients, which need the whole model.
        ArtifactError: the folder cannot be read or written, or accelerate is missing.
        VerificationError: masked and pruned differ; nothing is left behind then, nor after other errors.
    """
    config = checked(config)
    source, target = Path(source), Path(output)
    asked = f"Pruning {source} layer by layer"
    if source.resolve() == target.resolve():
        raise ArtifactError(asked, "the result would take its place", "Name another folder for the result")
    before = _earlier_plan(source, asked)
    batches = pipeline.again(batches)
    example = pipeline.first_examples(batches, torch.device("cpu"))
    seconds: dict[str, float] = {}
    with whole_folder(target, overwrite) as folder, TemporaryDirectory(dir=folder, prefix=".") as name:
        scratch = Path(name)
        with pipeline.clock(seconds, "model"):
            model = load_dispatched(source, scratch / "weights")
            weights = Weights(model)
            _check_finite(weights)
        with pipeline.clock(seconds, "structure"):
            structure = structure_of(model)
            found = check_target(structure, pipeline.discover(structure, example), config.plan)
        with pipeline.clock(seconds, "score"):
            importances, spilled, turns = score_in_turns(
                model, found.groups, batches, config, scratch, memory, example, progress or QUIET
            )
        values = {name: item.scores.numpy() for name, item in importances.items()}
        step = make_plan(
            found.groups, values, config.plan, dense=found.groups, target=config.plan.reduction,
            allowed=found.allowed,
        )  # fmt: skip
        with pipeline.clock(seconds, "repair"):
            repaired, repairs = repair(structure, found.groups, step.kept, spilled, weights, scratch)
        with pipeline.clock(seconds, "save"):
            smaller = write_model(folder, structure, step, repaired, source, max_shard_size, asked)
        del model
        verification = None
        if config.verify:
            with pipeline.clock(seconds, "verify"):
                dtype = torch.float64 if floats(structure) is torch.float64 else torch.float32
                verification = verify_folder(source, folder, step, repaired, example, scratch, dtype)
        total = step if before is None else compose(before, step)
        said = {**(results or {}), "offloaded": True}
        if verification is not None:
            said["masked_equals_pruned"] = verification.difference
        manifest = render_manifest(smaller, total, "vanilla", config, provenance, said)
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        write_json(folder / CERTIFICATE, {"sha256": hashes(folder), **_vouched(verification)})
    return Offloaded(target, total, found.groups, importances, repairs, verification, turns, seconds)


def checked(config: PruneConfig) -> PruneConfig:
    """Return a configuration with the policy that a folder of plain transformers needs.

    Raises:
        ConfigError: several rounds, or less residual width, were asked for.
        CriterionError: the criterion takes gradients.
    """
    asked = "Pruning layer by layer"
    if config.plan.rounds != 1:
        raise ConfigError(
            f"{asked} in {config.plan.rounds} rounds", "units are ranked once", "Ask for one round (rounds=1)"
        )
    if config.plan.residual:
        raise ConfigError(
            f"{asked} with less residual width", "its masked twin runs in memory alone",
            "Leave out residual, or prune in memory",
        )  # fmt: skip
    if "gradients" in pipeline.find_criterion(config.score.criterion).needs:
        raise CriterionError(
            f"{asked} by {config.score.criterion!r}", "it takes gradients, which need all layers at once",
            "Take a criterion that reads signals or weights, such as innovation",
        )  # fmt: skip
    plan = PlanConfig(**{**config.plan.model_dump(), "vanilla": True, "uniform": True})
    return config.model_copy(update={"plan": plan})


def _vouched(verification: Verification | None) -> dict[str, Any]:
    """Return what the certificate says beside the hashes: no fresh process has loaded the folder."""
    if verification is None:
        return {"checked": "not at all"}
    return {
        "checked": "loaded by transformers layer by layer, outputs compared with those of the masked model",
        "relative": verification.difference,
        "tolerance": verification.tolerance,
        "dtype": verification.dtype,
    }


def _earlier_plan(source: Path, asked: str) -> Plan | None:
    """Return what was removed before, where Cria has written the folder.

    Raises:
        ArtifactError: plain transformers does not load it, or zeros pad it.
    """
    if not (source / MANIFEST).is_file():
        return None
    policy = read_manifest(source)["policy"]
    if policy != "vanilla":
        raise ArtifactError(
            asked,
            f"Cria saved it {policy}",
            "Give the dense model, or a result that plain transformers loads",
        )
    return read_plan(source)


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise a SignalError, naming the tensor, if a parameter or buffer holds NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SignalError(
                f"The weights of {name!r}", "found NaN or infinity", "Prune a model whose weights are finite"
            )
