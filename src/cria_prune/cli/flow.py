"""The stages of `run`, `prune` and `recover`, in the order of the recipe, on one `Job`."""

from __future__ import annotations

import shutil
import statistics
import time
from typing import Any

import torch
from torch import nn

from cria_prune.batches import Batch, batch_size, model_inputs, move
from cria_prune.cli.folder import interrupts_wait
from cria_prune.cli.job import Job
from cria_prune.config import PruneConfig, RecoverConfig
from cria_prune.pipeline import prune
from cria_prune.plan import Plan, compose
from cria_prune.progress import clock
from cria_prune.ranks import alone, world
from cria_prune.recover import RecoverResult, recover
from cria_prune.result import PruneResult
from cria_prune.scores import Scored
from cria_prune.stages import Prepared


def prune_stage(
    job: Job, prepared: Prepared, config: PruneConfig, watch: bool, scored: Scored | None = None
) -> tuple[PruneResult, Plan]:
    """Prune, keep every finished round; return the result and the plan relative to the dense network."""
    task, before = job.target.task, job.target.plan
    model, batches = prepared.model, list(prepared.batches)

    def whole(result: PruneResult) -> Plan:
        return result.plan if before is None else compose(before, result.plan)

    def on_round(result: PruneResult) -> None:
        note_costs(job, result, whole(result))
        stage = f"round {len(result.rounds)} of {config.plan.rounds}"
        with clock(job.seconds, "save"):
            job.keep(result.model, whole(result), {"prune": config.model_dump(mode="json")}, stage)
        job.kept.text = f"{stage} is kept (go on with: the same command, --output {job.output} --resume)"

    held = list(task.validation_batches()) if watch else []
    if not job.resume:
        job.forget()
    result = prune(
        model,
        prepared.batches,
        config,
        prepared=prepared,
        evaluate=(lambda smaller: task.evaluate(smaller, held)) if watch else None,
        on_round=on_round,
        progress=job.talk.progress,
        graphs=True,
        state=job.rounds,
        data=job.origin["data"],
        scores=scored,
    )
    stages = result.seconds_by_stage
    job.seconds["structure"] = stages.pop("discover")
    for stage, spent in stages.items():
        job.seconds[stage] = job.seconds.get(stage, 0.0) + spent
    job.seconds["forward"] = forward_seconds(model, batches, job.device)
    milliseconds = 1000 / sum(map(batch_size, batches))
    job.results["milliseconds_before"] = job.seconds["forward"] * milliseconds
    job.results["milliseconds"] = forward_seconds(result.model, batches, job.device) * milliseconds
    if scored is None:
        first = result.rounds[0].seconds
        scoring = first.get("record", 0.0) + first.get("score", 0.0)
        job.results["scoring_over_forward"] = round(scoring / max(job.seconds["forward"], 1e-9), 2)
    return result, whole(result)


def note_costs(job: Job, result: PruneResult, plan: Plan) -> None:
    """Note what was asked and reached; counts of the dense network come from the whole plan."""
    report, said = result.report, plan.report
    job.results |= {
        "criterion": result.config.score.criterion,
        "asked": result.config.plan.reduction,
        "of": result.config.plan.of,
        "reduction": report["reached"],
        "reachable": report["reachable"],
        "parameters_dense": said["parameters_dense"],
        "parameters": said["parameters"],
        "macs_dense": said["macs_dense"],
        "macs": said["macs"],
        "rounds": len(result.rounds),
    }
    earlier = job.target.results.get("changed")
    changed = [result.changed, f"before this cut {earlier}" if earlier else ""]
    if any(changed):
        job.results["changed"] = ", ".join(filter(None, changed))
    checks = [item.verification.difference for item in result.rounds if item.verification is not None]
    if checks:
        job.results["masked_equals_pruned"] = max(checks)
    if job.target.plan is not None:
        job.results["parameters_before"] = report["parameters_dense"]


def forward_seconds(model: nn.Module, batches: list[Batch], device: torch.device) -> float:
    """Return the wall time of a plain forward pass over the batches: the median of three."""

    def passed(items: list[Batch]) -> float:
        start = time.perf_counter()
        for batch in items:
            args, kwargs = model_inputs(move(batch, device))
            model(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        return statistics.median(passed(batches) for _ in range(3))


def recover_stage(
    job: Job, model: nn.Module, plan: Plan, config: RecoverConfig, dense: nn.Module | None, described: Any
) -> RecoverResult:
    """Fine-tune in place; an interruption keeps the best epoch so far and goes on up."""
    task = job.target.task
    here = world()
    if not job.resume:
        here.lead("The recovery", lambda: shutil.rmtree(job.recovery, ignore_errors=True))
    held = list(task.validation_batches())
    try:
        with clock(job.seconds, "recover"):
            return recover(
                model,
                task.train_batches(config.seed, device=job.device),
                config,
                evaluate=lambda network: task.evaluate(network, held),
                teacher=dense if config.distill else None,
                lower_is_better=not job.target.metric.higher_is_better,
                device=job.device,
                progress=job.talk.progress,
                state=job.recovery,
                data=job.origin["data"],
            )
    except Exception:
        if here.first:
            shutil.rmtree(job.recovery, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        if not here.first:
            raise
        with interrupts_wait(), alone():
            job.save(model, plan, described, "the best epoch so far of the interrupted recovery")
        raise
