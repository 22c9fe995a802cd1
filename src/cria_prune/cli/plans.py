"""`cria plan`: what a pruning will take and reach; with --dry-run before anything runs. Nothing is cut."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cria_prune.artifact.rebuild import peak_memory
from cria_prune.base.batches import batch_size
from cria_prune.base.errors import ConfigError
from cria_prune.base.files import without_places, write_json
from cria_prune.base.metrics import Loss, percent
from cria_prune.base.progress import Progress, clock
from cria_prune.cli import target
from cria_prune.cli.folder import check_file
from cria_prune.cli.job import rounded
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Plan as Request
from cria_prune.cli.settings import prune_config
from cria_prune.cli.target import Target, own_of
from cria_prune.config import OF, PruneConfig
from cria_prune.measured import measure_losses, with_latency
from cria_prune.memory import (
    MemoryPrediction,
    amount,
    batch_bytes,
    largest_batch,
    predict_memory,
)
from cria_prune.planning.budget import count_macs, count_parameters
from cria_prune.planning.plan import Plan
from cria_prune.planning.selection import reachable
from cria_prune.planning.stairs import fewest, stairs
from cria_prune.stages import Prepared, plan_cut, rank

CGROUP = Path("/sys/fs/cgroup/memory.max")


def plan(request: Request, out: Output) -> None:
    """Show what is reachable and what it takes, or with scores which units would stay."""
    found = target.find(request.target, request.texts, own_of(request))
    config = prune_config(request, found.prune_defaults())
    check_file(request.output, request.overwrite)
    work = _dry if request.dry_run else _scored
    head = {"target": request.target, **found.named(), "criterion": config.score.criterion}
    values, kept = work(request, found, config, out)
    answer = {**head, **values, "seed": request.base_seed}
    if request.output is not None:
        write_json(request.output, kept or without_places({**answer, "command": request.command}))
        out.say(f"plan written to {request.output}")
    out.answer({**answer, "output": None if request.output is None else str(request.output)})


Made = tuple[dict[str, Any], dict[str, Any] | None]
"""What is answered; and what goes into the file in its place."""


def _dry(request: Request, found: Target, config: PruneConfig, out: Output) -> Made:
    """Structure, one batch's shapes, and arithmetic: nothing is trained, recorded or scored."""
    device, seconds = request.torch_device, dict[str, float]()
    if config.plan.of == "latency":
        raise ConfigError(
            "A dry run of a cut of the latency", "how much can go is known once seconds were measured",
            "Run the same without a dry run, or name another cost",
        )  # fmt: skip
    with clock(seconds, "structure"):
        prepared = found.prepared(config, device, calibrated=False).without_reference()
        prepared.check_reach()
    with clock(seconds, "data"):
        batches = found.task.calibration(config.record.examples, config.record.seed)
    with clock(seconds, "predict"):
        memory = predict_memory(prepared.model, prepared.groups, largest_batch(batches), config, graphs=True)
    reach = _reach(prepared)
    here = available_memory(device)
    data = {
        "examples": sum(map(batch_size, batches)),
        "batches": len(batches),
        "bytes": sum(map(batch_bytes, batches)),
    }
    _say_reach(out, reach, config)
    _say_passes(out, memory, config, data)
    _say_memory(out, memory, data["bytes"] if device.type == "cpu" else 0, here)
    values = {
        "dry_run": True,
        **reach,
        "rounds": config.plan.rounds,
        "passes": memory.passes,
        "recording_passes": memory.recorded,
        "repair_passes": memory.walked,
        "measuring_passes": memory.measured,
        "gradients": memory.gradients,
        "data": data,
        "memory": {**memory.to_dict(), "available": here},
        "device": str(device),
        "seconds": rounded(seconds),
    }
    return values, None


def _reach(prepared: Prepared) -> dict[str, Any]:
    """Return what is asked, and what is left at most and at least of the whole."""
    groups, plan = prepared.groups, prepared.config.plan
    least = fewest(stairs(groups, plan, prepared.allowed))
    return {
        "of": plan.of,
        "asked": plan.reduction,
        "reachable": reachable(groups, plan, allowed=prepared.allowed),
        "parameters_dense": count_parameters(groups),
        "parameters_least": count_parameters(groups, least),
        "macs_dense": count_macs(groups),
        "macs_least": count_macs(groups, least),
        "groups": len(groups.prunable),
        "units": sum(group.size for group in groups.prunable),
    }


def _say_reach(out: Output, reach: Mapping[str, Any], config: PruneConfig) -> None:
    rows = []
    for name, key in (("parameters", "parameters"), ("MACs per example", "macs")):
        now, least = reach[f"{key}_dense"], reach[f"{key}_least"]
        rows.append([name, f"{now:,.0f}", f"{least:,.0f}", percent(1 - least / max(now, 1))])
    out.table(["what", "now", "left at least", "removed at most"], rows)
    out.say(
        f"asked {percent(reach['asked'])} of the {OF.texts[reach['of']]}, "
        f"at most {percent(reach['reachable'])} can be removed: "
        f"{reach['units']:,} units in {reach['groups']} groups, "
        f"{config.plan.floor * 100:g} % of each always stay (--floor)"
    )


def _say_passes(out: Output, memory: MemoryPrediction, config: PruneConfig, data: Mapping[str, int]) -> None:
    norms = memory.passes - memory.recorded - memory.walked - memory.measured
    how = f", with a backward pass for the gradients of each {memory.gradients}" if memory.gradients else ""
    out.say(
        f"{memory.passes} passes over {data['examples']:,} examples in {data['batches']} batches: "
        f"{memory.recorded} to record{how}"
        + (", 1 to measure losses, and the rest of the network for each" if memory.measured else "")
        + (f", {memory.walked} to repair, of two networks" if memory.walked else "")
        + (", 1 for the batch norms at the end" if norms else "")
        + f"; {config.plan.rounds} rounds of {config.score.criterion}"
    )  # fmt: skip


def _say_memory(out: Output, memory: MemoryPrediction, data: int, here: int | None) -> None:
    rows = []
    for stage in memory.stages:
        parts = {"model": memory.model, "calibration data": data, **stage.parts}
        about = f" ({stage.group})" if stage.group else ""
        rows.append([f"{stage.name}: at most{about}", amount(sum(parts.values()))])
        rows += [[f"    {name}", amount(size)] for name, size in parts.items() if size]
    out.table(["predicted memory", "bytes"], rows)
    largest = memory.largest_group
    if largest is not None:
        kind = "sketches" if largest.sketched else "exact second moments"
        kept = max(largest.while_recording, largest.afterwards)
        out.say(f"the largest group is {largest.name}: {largest.units:,} units, {amount(kept)} as {kind}")
    if memory.savings:
        texts = (f"{text}: {amount(memory.model + data + size)}" for text, size in memory.savings)
        walked = any(stage.name == "repair" for stage in memory.stages)
        more = "" if walked else " (--examples does not change it)"
        out.say("less would be taken with " + "; ".join(texts) + more)
    peak = memory.peak + data
    if here is not None and peak > here:
        out.say(f"warning: {amount(peak)} are needed, and there are {amount(here)}")
    elif here is not None:
        out.say(f"{amount(peak)} of the {amount(here)} that there are")


def _scored(request: Request, found: Target, config: PruneConfig, out: Output) -> Made:
    """Record and score once, and plan one round of the whole reduction."""
    device, seconds, seed = request.torch_device, dict[str, float](), request.base_seed
    # What a repair takes would be thrown away, but for measured shares: their losses are after it.
    shares = config.plan.shared_by == "measured"
    plain = config if shares else config.model_copy(update={"repair": "none"})
    prepared = found.prepared(plain, device, calibrated=False).without_reference()
    prepared.check_reach()  # before a dense model is trained
    with clock(seconds, "model"):
        model = found.model(device, seed, out.progress)
    batches = found.task.calibration(config.record.examples, config.record.seed)
    ready = with_latency(prepared.with_model(model, batches), progress=out.progress)
    made = one_round(ready, seconds, out.progress, found.task.loss)
    report = made.report
    out.say(str(made))
    values = {
        "dry_run": False,
        **report,
        "rounds": 1,
        "groups": len(made.sizes),
        "memory": peak_memory(device),
        "device": str(device),
        "seconds": rounded(seconds),
    }
    return values, made.to_dict()


def one_round(
    prepared: Prepared, seconds: dict[str, float], progress: Progress | None = None, loss: Loss | None = None
) -> Plan:
    """Return the plan of one round at the full reduction; the model is left as it was."""
    ranking = rank(prepared, loss=loss)
    seconds |= {"structure": prepared.seconds, **ranking.seconds}
    if prepared.config.plan.shared_by == "measured":
        with clock(seconds, "losses"):
            prepared = replace(prepared, losses=measure_losses(prepared, ranking, progress=progress))
    with clock(seconds, "plan"):
        return plan_cut(prepared, ranking.scores)


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that there are: free on a GPU; else of the machine, or of this container if less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # this system does not tell
        return None
    try:
        limit = CGROUP.read_text().strip()
    except OSError:
        return there
    return min(there, int(limit)) if limit.isdecimal() else there
