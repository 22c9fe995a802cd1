"""prune_offloaded(): the pruning of a folder whose model is larger than the memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from cria_prune.artifact.rebuild import read_manifest, read_plan, render_manifest
from cria_prune.base.batches import Batch, again, first_examples
from cria_prune.base.dispatched import Weights
from cria_prune.base.errors import ArtifactError, ConfigError, CriterionError
from cria_prune.base.files import CERTIFICATE, MANIFEST, hashes, whole_folder, write_json
from cria_prune.base.inputs import Inputs
from cria_prune.base.modules import check_finite
from cria_prune.base.progress import QUIET, Progress, clock
from cria_prune.config import PlanConfig, PruneConfig
from cria_prune.criteria.score import find_criterion
from cria_prune.offload.rounds import Places, Rounds, Standing, all_rounds, work_folder
from cria_prune.offload.write import load_dispatched
from cria_prune.planning.plan import Plan, compose
from cria_prune.result import OffloadedRound, repairs_of, said_of
from cria_prune.resume.turns import FinishedRounds, identity_of
from cria_prune.stages import prepare
from cria_prune.structure.groups import UnitGroups
from cria_prune.surgery.verify import Verification

MEMORY = 2**31
"""Bytes for the moments and weights of a turn of recording, unless other is asked for."""


@dataclass(frozen=True)
class Offloaded:
    """What `prune_offloaded` did.

    Attributes:
        path: the folder.
        plan: what was removed, relative to the dense model; `plan.report` has the counts.
        groups: the structure of the source, with why the frozen groups are frozen.
        rounds: what each round did; their reports have the shares of the source.
    """

    path: Path
    plan: Plan
    groups: UnitGroups = field(repr=False)
    rounds: tuple[OffloadedRound, ...]

    @property
    def difference(self) -> float | None:
        """Largest difference of a round's folder from its masked model; None where that was not asked for."""
        return _largest(self.rounds)

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> wall time, over all rounds."""
        total: dict[str, float] = {}
        for item in self.rounds:
            for stage, spent in item.seconds.items():
                total[stage] = total.get(stage, 0.0) + spent
        return total


def prune_offloaded(
    source: str | Path,
    output: str | Path,
    batches: Iterable[Batch],
    config: PruneConfig,
    *,
    memory: int = MEMORY,
    max_shard_size: int | str = "500MB",
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    state: str | Path | None = None,
    data: str | None = None,
    inputs: Inputs | None = None,
    examples: Sequence[Batch] = (),
) -> Offloaded:
    """Prune the model in a Hugging Face folder, layer by layer, and write the result shard by shard.

    The weights stay on disk: accelerate loads each layer when it runs, and no more than a layer, a shard, and
    the moments of a turn, or what the walk's batches hold, are in memory. The scores, the plan and the
    weights are those that `prune` gives in as many rounds. Plain transformers loads the result.

    Which groups can be cut is seen on shapes alone. Between two rounds the smaller model is a folder in a
    hidden one beside the result. It is removed as soon as the next one stands: of whole models there are at
    most two on disk beside the source. That the folder of a round computes what its masked model does is
    tried on the first two examples, both loaded layer by layer. Batch norms are not measured again.

    With a `state`, the same call in another process goes on after the last finished turn or the last layer
    that was refitted, also after a SIGKILL, and ends with the same bits. That asks of `batches` to be the
    same in every pass, and of the files of the model not to be touched.

    Args:
        source: the folder: config.json and safetensors, in one file or in shards; it is only read.
        output: the folder to write; whole or not there.
        batches: calibration batches; with several turns they are gone through several times.
        config: what to remove and how, in `plan.rounds` rounds (four, unless it says otherwise).
            `plan.vanilla` is set: one configuration has to say all sizes.
        memory: bytes for the moments and weights of a turn. What does not fit is recorded in turns: a few
            blocks at a time where the model is a chain of blocks, else a few groups with a pass each. It is
            also what the batches of the walk may hold between their turns; the rest waits in files.
        max_shard_size: bytes of a file of weights, or a text such as `1GB`; one shard is in memory.
        device: where the layers run, and where the moments of a turn are.
        overwrite: replace a folder that Cria wrote.
        provenance, results: kept in `cria.json`; they must be plain JSON.
        progress: where to show the turns.
        state: a folder for what is kept, of this pruning alone, with room for the model of a round and on the
            file system of the result; removed once the result stands.
        data: fingerprint of the calibration data: a state of other data is refused. The first two examples
            are compared in any case.
        inputs: as in `prune`.
        examples: further batches, for code that the first does not run; cuts are tried on their shapes.

    Raises:
        ConfigError: less residual width was asked for.
        CriterionError: the criterion takes gradients, which need the whole model.
        ArtifactError: the folder cannot be read or written, accelerate is missing, or the state is damaged or
            of another pruning.
        VerificationError: masked and pruned differ; nothing is left behind then, nor after other errors.
    """
    config = checked(config)
    source, target = Path(source), Path(output)
    asked = f"Pruning {source} layer by layer"
    if source.resolve() == target.resolve():
        raise ArtifactError(asked, "the result would take its place", "Name another folder for the result")
    plans = _earlier_plans(source, asked)
    batches = again(batches)
    place = torch.device(device)
    example = first_examples(batches, place)
    identity = None
    if state is not None:
        identity = identity_of(source, config, memory, place, example, data, inputs)
    with whole_folder(target, overwrite) as folder, work_folder(folder, state) as root:
        places = Places(root, folder, config.plan.rounds)
        finished = None if identity is None else FinishedRounds(root, identity)
        known = [] if finished is None else finished.read()
        seconds: dict[str, float] = {}
        with clock(seconds, "model"):
            model = load_dispatched(source, places.scratch(1) / "weights", place)
            check_finite(Weights(model))
        with clock(seconds, "structure"):
            found = prepare(model, batches, config, example=example, inputs=inputs, examples=examples)
            prepared = found.without_reference()
            prepared.check_reach()
            _ = prepared.held.batches  # too few examples to hold any out are told before the work
        first = Standing(source, model, prepared.structure, prepared.dense, prepared.plan)
        rounds = Rounds(
            source, replace(prepared, model=prepared.structure), memory, max_shard_size, place,
            progress or QUIET, asked, identity,
        )  # fmt: skip
        gone, done, smaller = all_rounds(rounds, places, first, finished, known, seconds)
        total = reduce(compose, [*plans, gone])
        said = {**(results or {}), "offloaded": True, "rounds": len(done)}
        if done[-1].fidelity:
            said["fidelity"] = said_of(done[-1])
        said |= repairs_of(done[-1])
        if config.verify:
            said["masked_equals_pruned"] = _largest(done)
        manifest = render_manifest(smaller, total, "vanilla", config, provenance, said)
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        write_json(folder / CERTIFICATE, {"sha256": hashes(folder), **_vouched(done[-1].verification)})
    return Offloaded(target, total, prepared.dense, tuple(done))


def checked(config: PruneConfig) -> PruneConfig:
    """Return a configuration with the policy that a folder of plain transformers needs.

    Raises:
        ConfigError: less residual width, whole experts, latency or measured losses were asked for.
        CriterionError: the criterion takes gradients.
    """
    asked = "Pruning layer by layer"
    if config.plan.residual:
        raise ConfigError(
            f"{asked} with less residual width", "its masked twin runs in memory alone",
            "Leave out residual, or prune in memory",
        )  # fmt: skip
    if config.plan.experts:
        raise ConfigError(
            f"{asked} with fewer experts", "their masked twin runs in memory alone",
            "Leave out experts, or prune in memory",
        )  # fmt: skip
    if config.plan.of == "latency" or config.plan.ranking == "measured":
        raise ConfigError(
            f"{asked} by what is measured", "seconds and losses of layers are measured in memory alone",
            "Name another cost and ranking, or prune in memory",
        )  # fmt: skip
    if "gradients" in find_criterion(config.score).needs:
        raise CriterionError(
            f"{asked} by {config.score.criterion!r}", "it takes gradients, which need all layers at once",
            "Take a criterion that reads signals or weights, such as innovation",
        )  # fmt: skip
    plan = PlanConfig(**{**config.plan.model_dump(), "vanilla": True, "uniform": True})
    return config.model_copy(update={"plan": plan})


def _largest(rounds: Sequence[OffloadedRound]) -> float | None:
    """Return the largest difference of masked from pruned; None where it was not looked at."""
    found = [item.verification.difference for item in rounds if item.verification is not None]
    return max(found, default=None)


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


def _earlier_plans(source: Path, asked: str) -> list[Plan]:
    """Return what was removed before: one plan where Cria has written the folder, else none.

    Raises:
        ArtifactError: plain transformers does not load it, or zeros pad it.
    """
    if not (source / MANIFEST).is_file():
        return []
    policy = read_manifest(source)["policy"]
    if policy != "vanilla":
        raise ArtifactError(
            asked,
            f"Cria saved it {policy}",
            "Give the dense model, or a result that plain transformers loads",
        )
    return [read_plan(source)]
