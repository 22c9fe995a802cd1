"""What the commands do that cut or train: run, prune, recover; how each begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cria_prune.artifact.rebuild import Policy, peak_memory
from cria_prune.base.batches import model_inputs, move
from cria_prune.base.errors import ArtifactError, ConfigError, PackageError
from cria_prune.base.files import check_free, write_text
from cria_prune.base.metrics import logits_of
from cria_prune.base.progress import clock
from cria_prune.base.ranks import world
from cria_prune.cli import show, target
from cria_prune.cli.folder import REPORT, claimed
from cria_prune.cli.job import (
    COUNTS,
    PRUNED,
    RECOVERED,
    Job,
    padded_folder,
    prune_stage,
    recover_stage,
    rounded,
)
from cria_prune.cli.output import Output
from cria_prune.cli.scores import config_from, given_scores
from cria_prune.cli.settings import (
    Prune,
    Recover,
    Resuming,
    Run,
    prune_config,
    recover_config,
)
from cria_prune.cli.target import Target
from cria_prune.config import PruneConfig, RecoverConfig
from cria_prune.report.folder import History, folder_page, history_of, read_run, write_run
from cria_prune.scores import Scored
from cria_prune.stages import Prepared, prepare


def saved_as(config: PruneConfig) -> Policy:
    """Return how a model of transformers that was pruned like this can be saved."""
    return "vanilla" if config.plan.vanilla else "per-layer"


@dataclass(frozen=True)
class Steps:
    """What is done to a model.

    Attributes:
        config: the pruning.
        tuning: the fine-tune after it, if any.
        watch: evaluate after every round.
        scored: the kept scores to prune by, if any.
    """

    config: PruneConfig
    tuning: RecoverConfig | None = None
    watch: bool = False
    scored: Scored | None = None

    @property
    def result(self) -> str:
        """The stage that its result is of."""
        return PRUNED if self.tuning is None else RECOVERED

    @property
    def described(self) -> dict[str, Any]:
        """The configurations as they are kept with the result."""
        both = {"prune": self.config, "recover": self.tuning}
        return {name: item.model_dump(mode="json") for name, item in both.items() if item is not None}

    @property
    def folder(self) -> str:
        """Name of the folder of one size of a family."""
        return f"reduced-{100 * self.config.plan.reduction:g}"


def check_family(family: Sequence[Steps]) -> None:
    """Raise a ConfigError if two of a family are of one size."""
    names = [steps.folder for steps in family]
    if len(set(names)) < len(names):
        raise ConfigError("A family of reductions", f"found {', '.join(names)}", "Give each share once")


@contextmanager
def job_of(
    found: Target, suffix: str, request: Resuming, out: Output, several: bool = False, padded: bool = False
) -> Iterator[Job]:
    """Claim the output folder, for `several` results a folder of folders, and begin a job; see `claimed`.

    With `padded` the folder beside it is for the padded twin.
    """
    device = request.torch_device
    resume, output = request.resume, request.output
    if resume and output is None:
        raise ConfigError("Resuming", "no --output was given", "Name the folder of the interrupted run")
    job = Job(found, request, output or Path(), device, out, padded)
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
        job.out.note(f"dense model of {job.target.task.name}: loaded, or trained here")
    with clock(job.seconds, "model"):
        model = job.target.model(job.device, job.request.base_seed, job.out.progress)
    if job.target.checkpoint is None:
        job.measure(model, "dense")
    else:
        job.measure(model, "before")
        job.inherit_dense()
    return model


def finish(job: Job, kept: Callable[[], History] | None = None) -> None:
    """Keep the run and write its report, if there is a pruning to report on.

    The states of the rounds and the recovery are not needed any more.
    """
    world().lead("The report", lambda: _finish(job, kept))


def _finish(job: Job, kept: Callable[[], History] | None) -> None:
    job.forget()
    job.results |= {"seconds": rounded(job.seconds), "memory": peak_memory(job.device)}
    if kept is None:
        return
    history = kept()
    write_run(job.output, history.page, history.rounds, history.graphs)
    try:
        page = folder_page(job.output).html
    except PackageError as error:
        job.out.say(f"no report now: {error}, then run cria report {job.output}")
        return
    job.out.say(f"report {write_text(Path(job.output) / REPORT, page)}")


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


HALVES = (torch.float16, torch.bfloat16)


def run(request: Run, out: Output) -> None:
    """Dense model, pruning, one recovery, checkpoint and report; several reductions make a family."""
    options = {name: value for name, value in (("quick", request.quick), ("base", request.base)) if value}
    found = target.recipe(request.recipe, **options)
    usual = () if request.config else found.task.reductions
    asked = [{"reduction": share} for share in request.reductions or usual] or [{}]
    configs = [prune_config(request, found.task.prune_defaults, **plan) for plan in asked]
    tuning = recover_config(request, found.task.recover_defaults)
    family = [Steps(config, tuning, request.watch) for config in configs]
    prepared = prepared_for(found, configs[0], request.torch_device)
    for config in configs:
        prepared.with_config(config).check_reach()
    found.policy = saved_as(configs[0])
    several = len(family) > 1
    check_family(family)
    with job_of(found, "", request, out, several) as job:
        if not several and job.ended(family[0].described, RECOVERED):
            return
        dense = prepared.with_model(dense_model(job))
        if not several:
            out.answer(do(job, dense, family[0]))
            return
        members = [member(job, dense, steps) for steps in family]
        show.family(out, members, found.metric)
        out.answer({**job.results, "output": str(job.output), "family": members})


def member(job: Job, dense: Prepared, steps: Steps) -> Mapping[str, Any]:
    """Return the results of one size of a family; one that is there already is not made again."""
    part = job.part(steps.folder)
    done = part.finished(steps.described, steps.result) if job.request.resume else None
    share = f"{100 * steps.config.plan.reduction:g} % fewer"
    job.out.heading(share + (f": already in {part.output}" if done else ""))
    if done is not None:
        part.forget()
        return done
    if job.target.pretrained and world().first:
        check_free(part.output, part.may_replace())
    return do(part, dense, steps)


def do(job: Job, dense: Prepared, steps: Steps) -> Mapping[str, Any]:
    """Prune a model, recover if that is asked, save and report; return the results."""
    metric, tuning = job.target.metric, steps.tuning
    result, plan = prune_stage(job, dense, steps.config, steps.watch, steps.scored)
    show.rounds(job.out, result.rounds, metric)
    if tuning is None:
        show.left_alone(job.out, result.dense)
    job.measure(result.model, "pruned")
    model = result.model
    if tuning is not None:
        teacher = dense.model if tuning.distill else None
        recovered = recover_stage(job, model, plan, tuning, teacher, steps.described)
        epoch, model = recovered.best_epoch, recovered.model
        job.out.say(f"recovery: epoch {epoch} of {tuning.epochs} kept, best on the validation split")
        job.measure(model, "recovered")
    show.outcome(job.out, job.results, metric)
    job.save(model, plan, steps.described, steps.result)
    finish(job, lambda: history_of(result, job.results, job.target.task.metric, job.origin))
    return job.results


def prune(request: Prune, out: Output) -> None:
    """Pruning without recovery, of a dense model or of a checkpoint once more."""
    if request.offload:
        from cria_prune.cli import offload

        offload.prune(request, out)
        return
    padded = request.export is not None
    found = target.find(request.target, request.texts)
    if padded and not found.pretrained:
        raise ConfigError(
            f"A padded twin of {request.target}", "it is no model of transformers", "Leave out --export"
        )
    found.check_changeable()
    scored = given_scores(request)
    config = config_from(request, found.prune_defaults(), scored)
    if padded and config.plan.residual:
        raise ConfigError(
            "A padded twin of a model with less residual width",
            "zeros under a norm would change what it computes",
            "Leave out --export, or --residual",
        )
    prepared = prepared_for(found, config, request.torch_device)
    prepared.check_reach()
    found.policy = saved_as(config)
    steps = Steps(config, watch=request.watch, scored=scored)
    with job_of(found, "-pruned", request, out, padded=padded) as job:
        if not job.ended(steps.described, PRUNED):
            out.answer(do(job, prepared.with_model(dense_model(job)), steps))


def recover(request: Recover, out: Output) -> None:
    """One fine-tune of a checkpoint; a Hugging Face model of the user on texts of the user."""
    found = target.find(request.checkpoint, request.texts)
    if found.plan is None:
        raise ConfigError(
            f"Recovering {request.checkpoint}",
            "Cria has not pruned it",
            "Give a folder that cria prune made",
        )
    found.check_changeable()
    tuning = recover_config(request, found.task.recover_defaults)
    if request.teacher is not None and not tuning.distill:
        raise ConfigError("A teacher", "nothing is distilled from it", "Give its weight with --distill")
    if not found.task.measured:
        raise ConfigError(
            f"Recovering {request.checkpoint}",
            "the texts have no labels",
            "Give --dataset with a column label",
        )
    inherited = (*COUNTS, "reduction", "asked", "of", "criterion", "changed", "scoring_over_forward")
    described = {"recover": tuning.model_dump(mode="json")}
    with job_of(found, "-recovered", request, out) as job:
        if job.ended(described, RECOVERED):
            return
        job.results |= {name: found.results[name] for name in inherited if name in found.results}
        job.inherit_dense()
        before = earlier_run(job) if world().first else None
        job.results |= {name: found.plan.report[name] for name in COUNTS if name in found.plan.report}
        model = found.model(job.device, job.request.base_seed, job.out.progress)
        teacher = teacher_of(request.teacher, job, model) if tuning.distill else None
        job.measure(model, "pruned")
        with in_float32(model):
            recovered = recover_stage(job, model, found.plan, tuning, teacher, described)
        job.out.say(str(recovered))
        job.measure(recovered.model, "recovered")
        show.outcome(job.out, job.results, found.metric)
        job.save(recovered.model, found.plan, described, RECOVERED)
        finish(job, None if before is None else lambda: recovered_history(job, before))
        out.answer(job.results)


def earlier_run(job: Job) -> History | None:
    """Return what the checkpoint that a job goes on from keeps of its run; None if nothing whole."""
    try:
        return None if job.target.checkpoint is None else read_run(Path(job.target.checkpoint))
    except ArtifactError as error:
        job.out.note(f"the run before is not carried on in the report: {error}")
        return None


def recovered_history(job: Job, before: History) -> History:
    """Return the run that was pruned before, now recovered."""
    page = before.page
    seconds = dict(page.get("seconds", {}))
    for stage, spent in job.results["seconds"].items():
        seconds[stage] = round(seconds.get(stage, 0.0) + spent, 3)
    changed = {**job.results, "seconds": seconds, "rounds": page["rounds"], "provenance": job.origin}
    return replace(
        before, page={**page, **changed, "earlier": [*page.get("earlier", []), page["provenance"]]}
    )


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold parameters of half types in float32 meanwhile: small steps would be rounded away in them."""
    halves = [(item, item.dtype) for item in model.parameters() if item.dtype in HALVES]
    for item, _ in halves:
        item.data = item.data.float()
    try:
        yield
    finally:
        for item, dtype in halves:
            item.data = item.data.to(dtype)


def teacher_of(name: str | None, job: Job, model: nn.Module) -> nn.Module:
    """Return the dense model for distillation: the one that was named, or the recipe's.

    Raises:
        ConfigError: its logits are not those of the model, in number.
    """
    progress = job.out.progress
    if name is None:
        return job.target.teacher(job.device, progress)
    teacher = target.find(name).model(job.device, job.request.base_seed, progress).eval()
    args, kwargs = model_inputs(move(job.target.task.example, job.device))
    with torch.no_grad():
        shapes = [tuple(logits_of(network(*args, **kwargs)).shape) for network in (teacher, model.eval())]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{name} as a teacher",
            f"its logits are {shapes[0]}, those of the model {shapes[1]}",
            "Give the dense model that was pruned",
        )
    return teacher
