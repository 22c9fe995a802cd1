"""What the commands do, on the options as typer parsed them; heavy imports begin here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from cria_prune import pipeline
from cria_prune.artifact.files import write_text
from cria_prune.artifact.report import write_report
from cria_prune.cli import show, target
from cria_prune.cli.flow import Job, prune_stage, recover_stage, rounded, save_and_reload
from cria_prune.cli.folder import REPORT, check_file, claimed
from cria_prune.cli.inventory import inventory
from cria_prune.cli.outline import folded, frozen, outline, shares
from cria_prune.cli.settings import pick_device, prune_config, recover_config
from cria_prune.cli.sources import load_source, parse_shape
from cria_prune.cli.talk import Kept, Talk
from cria_prune.cli.target import Target
from cria_prune.cli.tree import drawn, module_tree
from cria_prune.config import PlanConfig, PruneConfig
from cria_prune.pipeline import PruneResult, clock
from cria_prune.scope import scope

Params = Mapping[str, Any]


def run(params: Params, command: list[str], kept: Kept) -> None:
    """Dense model, pruning, one recovery, checkpoint and report."""
    options = {name: params[name] for name in ("quick", "base") if params[name]}
    found = target.recipe(params["recipe"], **options)
    config = prune_config(params, found.task.prune_defaults)
    tuning = recover_config(params, found.task.recover_defaults)
    check_target(found, config)
    with job_of(found, "", params, command, kept) as job:
        dense = dense_model(job)
        result, plan = prune_stage(job, dense, config, params["watch"])
        show.rounds(job.talk, result, found.metric)
        job.measure(result.model, "pruned")
        described = {"prune": config.model_dump(mode="json"), "recover": tuning.model_dump(mode="json")}
        recovered = recover_stage(job, result.model, plan, tuning, dense, described)
        job.results["best_epoch"] = recovered.best_epoch
        job.talk.say(
            f"recovery: epoch {recovered.best_epoch} of {tuning.epochs} kept, best on the validation split"
        )
        job.measure(recovered.model, "recovered")
        show.outcome(job.talk, job.results, found.metric)
        save_and_reload(job, recovered.model, plan, described, "the recovered model")
        finish(job, result)


def prune(params: Params, command: list[str], kept: Kept) -> None:
    """Pruning without recovery, of a recipe's dense model or of a checkpoint once more."""
    found = target.find(params["target"])
    config = prune_config(params, found.task.prune_defaults)
    check_target(found, config)
    with job_of(found, "-pruned", params, command, kept) as job:
        model = dense_model(job)
        result, plan = prune_stage(job, model, config, params["watch"])
        show.rounds(job.talk, result, found.metric)
        job.measure(result.model, "pruned")
        show.outcome(job.talk, job.results, found.metric)
        described = {"prune": config.model_dump(mode="json")}
        save_and_reload(job, result.model, plan, described, "the pruned model")
        finish(job, result)


def recover(params: Params, command: list[str], kept: Kept) -> None:
    """One fine-tune of a checkpoint."""
    found = target.checkpoint(params["checkpoint"])
    assert found.plan is not None
    tuning = recover_config(params, found.task.recover_defaults)
    inherited = ("dense", "parameters_dense", "parameters", "macs_dense", "macs", "reduction", "asked", "of",
                 "criterion", "scoring_over_forward", "milliseconds_before", "milliseconds")  # fmt: skip
    with job_of(found, "-recovered", params, command, kept) as job:
        job.results |= {name: found.results[name] for name in inherited if name in found.results}
        counts = ("parameters_dense", "parameters", "macs_dense", "macs")
        job.results |= {name: found.plan.report[name] for name in counts if name in found.plan.report}
        model = found.model(job.device, job.seed, job.talk.progress)
        dense = found.teacher(job.device, job.talk.progress) if tuning.distill else None
        job.measure(model, "pruned")
        described = {"recover": tuning.model_dump(mode="json")}
        recovered = recover_stage(job, model, found.plan, tuning, dense, described)
        job.results["best_epoch"] = recovered.best_epoch
        job.talk.say(str(recovered))
        job.measure(recovered.model, "recovered")
        show.outcome(job.talk, job.results, found.metric)
        save_and_reload(job, recovered.model, found.plan, described, "the recovered model")
        finish(job)


def evaluate(params: Params) -> None:
    """The metric on the test split."""
    found, talk = target.find(params["target"]), Talk(params["quiet"])
    seconds: dict[str, float] = {}
    device, seed = pick_device(params["device"]), params["seed"] or 0
    with clock(seconds, "model"):
        model = found.model(device, seed, talk.progress)
    with clock(seconds, "evaluate"):
        value = found.task.evaluate(model, found.task.test_batches(), talk.progress)
        further = found.task.further(model, talk.progress)
    parameters = sum(item.numel() for item in model.parameters())
    talk.table(
        ["target", found.task.metric, "parameters"],
        [[params["target"], found.metric.text(value), f"{parameters:,}"]],
    )
    show.further(talk, "", further)
    talk.answer(
        {
            "target": params["target"],
            "recipe": found.task.name,
            found.task.metric: value,
            **further,
            "parameters": parameters,
            "seed": seed,
            "device": str(device),
            "seconds": rounded(seconds),
        }
    )


def inspect(params: Params) -> None:
    """The unit groups of a model from anywhere, what they cost and why some are frozen."""
    talk = Talk(params["quiet"] or params["json"])
    floor = PlanConfig(**({} if params["floor"] is None else {"floor": params["floor"]})).floor
    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the answer
        source = load_source(params["model"], parse_shape(params["example"]), params["meta"])
        groups = pipeline.discover(source.model, source.example)
    found = inventory(groups, floor)
    show.model(talk, source, found)
    if params["tree"]:
        talk.tree(drawn(module_tree(source.model, found.rows, params["everything"])))
        frozen(talk, folded(found.rows, params["everything"]))
        shares(talk, found)
    else:
        outline(talk, found, params["everything"])
    answer = {
        "target": source.name,
        "source": source.kind,
        "model": type(source.model).__name__,
        "recipe": None if source.target is None else source.target.task.name,
        **found.to_dict(),
        "prunable_groups": sum(row.status == "prunable" for row in found.rows),
        "residual_groups": sum(row.status == "residual" for row in found.rows),
        "frozen_groups": sum(row.status == "frozen" for row in found.rows),
    }
    talk.answer(answer if params["json"] else {**answer, "groups": len(found.rows)})


def score(params: Params, command: list[str]) -> None:
    """Scores and diagnosis of every group, without cutting."""
    found, talk = target.find(params["target"]), Talk(params["quiet"])
    config, output = prune_config(params, found.task.prune_defaults), params["output"]
    check_file(output, params["overwrite"])
    device, seed = pick_device(params["device"]), params["seed"] or 0
    seconds: dict[str, float] = {}
    with clock(seconds, "model"):
        model = found.model(device, seed, talk.progress)
    batches = found.task.calibration(config.record.examples, config.record.seed)
    with clock(seconds, "structure"):
        groups = scope(model, pipeline.discover(model, found.task.example), config.plan).groups
    needs, states = pipeline.find_criterion(config.score.criterion).needs, None
    if needs:
        with clock(seconds, "record"):
            states = pipeline.record(
                model, groups, batches, config.record, gradients="gradients" in needs, device=device
            )
    with clock(seconds, "score"):
        scores = pipeline.score(model, groups, states, config.score)
    rows = {
        name: {"scores": item.scores.tolist(), "diagnosis": item.diagnosis.to_dict()}
        for name, item in scores.items()
    }
    show.diagnosis(talk, rows)
    head = {"target": params["target"], "recipe": found.task.name, "criterion": config.score.criterion}
    if output is not None:
        write_text(output, json.dumps({**head, "command": command, "groups": rows}, indent=1) + "\n")
        talk.say(f"scores written to {output}")
    units = sum(len(item["scores"]) for item in rows.values())
    talk.answer(
        {
            **head,
            "groups": len(rows),
            "units": units,
            "seed": seed,
            "output": None if output is None else str(output),
            "seconds": rounded(seconds),
        }
    )


@contextmanager
def job_of(found: Target, suffix: str, params: Params, command: list[str], kept: Kept) -> Iterator[Job]:
    """Claim the output folder and begin a job; see `claimed`."""
    device = pick_device(params["device"])
    with claimed(params["output"], found.task.name + suffix, params["overwrite"]) as folder:
        seed = params["seed"] or 0
        job = Job(found, folder, device, seed, Talk(params["quiet"]), kept, command)
        job.begin()
        yield job


def dense_model(job: Job) -> nn.Module:
    """Return the model to prune and print its metric: the recipe's dense one, or the checkpoint's."""
    if job.target.checkpoint is None:
        job.talk.note(f"dense model of {job.target.task.name}: loaded, or trained here")
    with clock(job.seconds, "model"):
        model = job.target.model(job.device, job.seed, job.talk.progress)
    if job.target.checkpoint is None:
        job.measure(model, "dense")
    else:
        job.measure(model, "before")
        if "dense" in job.target.results:
            job.results["dense"] = job.target.results["dense"]
    return model


def finish(job: Job, result: PruneResult | None = None) -> None:
    """Write the report, if there is a pruning to report on, and print the last line."""
    job.results["seconds"] = rounded(job.seconds)
    if result is not None:
        page = show.report(result, job.results, job.target.task.metric, job.origin)
        path = write_report(Path(job.output) / REPORT, page)
        job.talk.say(f"report {path}")
    job.talk.answer(job.results)


def check_target(found: Target, config: PruneConfig) -> None:
    """Refuse a target beyond reach before a dense model is trained or anything is written."""
    model = found.untrained()
    pipeline.check_target(model, pipeline.discover(model, found.task.example), config.plan)
