"""How a command that cuts or trains begins and ends: its folder, its dense model, its report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cria_prune.artifact.files import write_text
from cria_prune.artifact.folder_report import folder_page
from cria_prune.artifact.folders import check_free
from cria_prune.artifact.provenance import peak_memory
from cria_prune.cli import reports, target
from cria_prune.cli.folder import REPORT, claimed
from cria_prune.cli.job import Job, padded_folder, rounded
from cria_prune.cli.request import Resuming
from cria_prune.cli.settings import pick_device
from cria_prune.cli.talk import Kept, Talk
from cria_prune.cli.target import Target
from cria_prune.config import PruneConfig
from cria_prune.errors import ConfigError, PackageError
from cria_prune.progress import clock
from cria_prune.ranks import world
from cria_prune.result import PruneResult
from cria_prune.stages import Prepared, prepare


def saved_as(config: PruneConfig) -> target.Policy:
    """Return how a model of transformers that was pruned like this can be saved."""
    return "vanilla" if config.plan.vanilla else "per-layer"


@contextmanager
def job_of(
    found: Target, suffix: str, request: Resuming, kept: Kept, several: bool = False, padded: bool = False
) -> Iterator[Job]:
    """Claim the output folder, for `several` results a folder of folders, and begin a job; see `claimed`.

    With `padded` the folder beside it is for the padded twin.
    """
    device = pick_device(request.device)
    resume, output = request.resume, request.output
    if resume and output is None:
        raise ConfigError("Resuming", "no --output was given", "Name the folder of the interrupted run")
    job = Job(
        found, output or Path(), device, request.base_seed, Talk(request.quiet), kept, request.command,
        padded, resume, request.overwrite,
    )  # fmt: skip
    left = resume and (several or job.may_replace() or job.holds_result())
    with claimed(output, found.task.name + suffix, request.overwrite or left) as folder:
        job.output = folder
        if found.pretrained and not several and world().first:  # known before the long work
            for path in (folder, *([padded_folder(folder)] if padded else [])):
                check_free(path, job.may_replace() or left)
        job.begin()
        yield job


def dense_model(job: Job) -> nn.Module:
    """Return the model to prune and print its metric: the recipe's dense one, or the checkpoint's."""
    if job.target.recipe and job.target.checkpoint is None:
        job.talk.note(f"dense model of {job.target.task.name}: loaded, or trained here")
    with clock(job.seconds, "model"):
        model = job.target.model(job.device, job.seed, job.talk.progress)
    if job.target.checkpoint is None:
        job.measure(model, "dense")
    else:
        job.measure(model, "before")
        job.inherit_dense()
    return model


def finish(job: Job, result: PruneResult | None = None, before: Any = None) -> None:
    """Keep the run and write its report, if there is a pruning to report on, now or `before`.

    The states of the rounds and the recovery are not needed any more.
    """
    world().lead("The report", lambda: _finish(job, result, before))


def _finish(job: Job, result: PruneResult | None, before: Any) -> None:
    job.forget()
    job.results |= {"seconds": rounded(job.seconds), "memory": peak_memory(job.device)}
    if result is not None:
        reports.keep_run(job, result)
    elif before is not None:
        reports.keep_recovered(job, before)
    else:
        return
    try:
        page = folder_page(job.output).html
    except PackageError as error:
        job.talk.say(f"no report now: {error}, then run cria report {job.output}")
        return
    job.talk.say(f"report {write_text(Path(job.output) / REPORT, page)}")


def prepared_for(
    found: Target, config: PruneConfig, device: torch.device, calibrated: bool = True
) -> Prepared:
    """Prepare a target's network before a dense model is trained, to see what can be reached.

    A network that has to be trained first is prepared untrained, and the trained one takes its place later
    (`Prepared.with_model`).

    Args:
        calibrated: read the calibration batches already, and capture the model with the first of them; else
            the task's example is taken, and there are no batches yet.
    """
    task, model = found.task, found.untrained().to(device)
    if calibrated:
        return prepare(model, task.calibration(config.record.examples, config.record.seed), config)
    return prepare(model, (), config, example=task.example)
