"""What the commands do that cut or train: run, prune, recover, sweep; how each begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cria_prune.artifact.rebuild import Policy, peak_memory
from cria_prune.artifact.scores import SCORES, load_scores
from cria_prune.base.batches import model_inputs, move
from cria_prune.base.errors import ArtifactError, ConfigError, PackageError, TargetError
from cria_prune.base.files import check_free, without_places, write_json, write_text
from cria_prune.base.metrics import logits_of
from cria_prune.base.progress import clock
from cria_prune.base.ranks import world
from cria_prune.cli import show, target
from cria_prune.cli.folder import REPORT, claimed, interrupts_wait, picture
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
from cria_prune.cli.scores import config_from, given_scores, keep_scores
from cria_prune.cli.settings import (
    Prune,
    Recover,
    Resuming,
    Run,
    Sweep,
    prune_config,
    recover_config,
)
from cria_prune.cli.target import Target, own_of
from cria_prune.config import ABSOLUTE, PruneConfig, RecoverConfig
from cria_prune.report.curves import plot_tradeoff
from cria_prune.report.folder import History, folder_page, history_of, read_run, write_run
from cria_prune.scores import Scored, hash_of, scored_of
from cria_prune.stages import Prepared


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
    left = resume and (several or job.may_replace() or bool(job.there()))
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
    job.target.task.compare_with(model)
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

    def write() -> None:
        job.forget()
        job.results |= {"seconds": rounded(job.seconds), "memory": peak_memory(job.device)}
        if kept is None:
            return
        history = kept()
        write_run(job.output, history.page, history.rounds, history.graphs)
        try:
            page = folder_page(job.output).html
            job.out.say(f"report {write_text(Path(job.output) / REPORT, page)}")
        except PackageError as error:
            job.out.say(f"no report now: {error}, then run cria report {job.output}")

    world().lead("The report", write)


HALVES = (torch.float16, torch.bfloat16)


def run(request: Run, out: Output) -> None:
    """Dense model, pruning, one recovery, checkpoint and report; several reductions make a family."""
    options = {name: value for name, value in (("quick", request.quick), ("base", request.base)) if value}
    found = target.recipe(request.recipe, **options)
    said = request.plan.given().keys() & {"speedup", "share", "keep", *ABSOLUTE}
    usual = () if request.config or said else found.task.reductions
    asked = [{"reduction": share} for share in request.reductions or usual] or [{}]
    configs = [prune_config(request, found.task.prune_defaults, **plan) for plan in asked]
    tuning = recover_config(request, found.task.recover_defaults)
    family = [Steps(config, tuning, request.watch) for config in configs]
    prepared = found.prepared(configs[0], request.torch_device)
    for config in configs:
        prepared.with_config(config).check_reach()
    found.policy = saved_as(configs[0])
    several = len(family) > 1
    check_family(family)
    with job_of(found, "", request, out, several) as job:
        if not several and job.ended(family[0].described, RECOVERED):
            return
        dense = prepared = prepared.with_model(dense_model(job))  # the untrained twin is not held
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
    found = target.find(request.target, request.texts, own_of(request))
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
    if padded and config.plan.experts:
        raise ConfigError(
            "A padded twin of a model with fewer experts",
            "its router could choose an expert of zeros",
            "Leave out --export, or --experts",
        )
    prepared = found.prepared(config, request.torch_device)
    prepared.check_reach()
    found.policy = saved_as(config)
    room = prepared.savable() if found.pretrained else None
    steps = Steps(config, watch=request.watch, scored=scored)
    with job_of(found, "-pruned", request, out, padded=padded) as job:
        if not job.ended(steps.described, PRUNED):
            for line in [] if room is None else str(room).splitlines():
                out.note(line)
            out.answer(do(job, prepared.with_model(dense_model(job)), steps))


def recover(request: Recover, out: Output) -> None:
    """One fine-tune of a checkpoint; a Hugging Face model of the user on texts of the user."""
    found = target.find(request.checkpoint, request.texts, own_of(request))
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
    if found.task.embeds and not (tuning.distill and request.teacher):
        raise ConfigError(
            f"Recovering {request.checkpoint}", "it is an encoder, which learns the dense one's embeddings",
            "Give --distill 1 and name the dense folder with --teacher; labels are not needed",
        )  # fmt: skip
    if not found.task.embeds and not found.task.trainable:
        raise ConfigError(f"Recovering {request.checkpoint}", *found.task.lacking)
    inherited = (
        *COUNTS,
        "reduction",
        "asked",
        "of",
        "criterion",
        "calibration",
        "changed",
        "remarks",
        "repairs",
        "unrepaired",
        "fidelity",
        "scoring_over_forward",
    )
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
    if job.target.task.embeds:
        job.target.task.compare_with(teacher)
        return teacher
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


SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
RESULT, PICTURE, KEPT_SCORES = "sweep.json", "sweep.png", "scores"


def sweep(request: Sweep, out: Output) -> None:
    """Score once, prune to every share in one round each, save and measure; then table and picture."""
    found = target.find(request.target, request.texts, own_of(request))
    found.check_changeable()
    scored, shares = given_scores(request), request.reductions or SHARES
    defaults = found.prune_defaults()
    configs = [config_from(request, defaults, scored, rounds=1, reduction=share) for share in shares]
    check_family([Steps(config) for config in configs])
    prepared = found.prepared(configs[0], request.torch_device)
    configs, beyond = reachable(prepared, configs, asked=bool(request.reductions))
    found.policy = saved_as(configs[0])
    with job_of(found, "-sweep", request, out, several=True) as job:
        if beyond:
            job.out.note(f"left out, beyond what can be removed: {', '.join(beyond)}")
        prepared = prepared.with_model(dense_model(job))
        if scored is None:
            scored = own_scores(job, prepared.with_config(configs[0]))
        members, here, drawn = list[Mapping[str, Any]](), world(), ""
        for config in configs:
            members.append(member(job, prepared, Steps(scored.applied(config), scored=scored)))
            drawn = here.lead("Keeping the sizes", lambda: keep_family(job, members))
        show.family(job.out, members, found.metric)
        job.out.say(f"result {job.output / RESULT}, {drawn}")
        job.out.answer({**job.results, "output": str(job.output), "family": members})


def reachable(
    prepared: Prepared, configs: Sequence[PruneConfig], asked: bool
) -> tuple[list[PruneConfig], list[str]]:
    """Return the configurations that can be reached, and the shares that cannot, of the usual ones.

    Raises:
        TargetError: one that was `asked` for cannot be reached, or none can.
    """
    within, beyond = list[PruneConfig](), list[str]()
    for config in configs:
        try:
            prepared.with_config(config).check_reach()
            within.append(config)
        except TargetError:
            if asked or not within:
                raise
            beyond.append(f"{100 * config.plan.reduction:g} %")
    return within, beyond


def own_scores(job: Job, prepared: Prepared) -> Scored:
    """Return the scores that an earlier run left in the output folder, if they are these; else score."""
    folder, config = job.output / KEPT_SCORES, prepared.config
    if job.request.resume and (folder / SCORES).exists():
        found = load_scores(folder)
        same = {"record", "score", "repair"}
        asked = [item.model_dump(include=same) for item in (found.config, config)]
        if found.weights == hash_of(prepared.model) and asked[0] == asked[1]:
            return found
    scored = scored_of(prepared, loss=job.target.task.loss, seconds=job.seconds)
    with clock(job.seconds, "save"):
        keep_scores(folder, scored, {**job.target.named(), "provenance": job.origin})
    job.out.kept = f"the scores are kept (go on with: the same command, --output {job.output} --resume)"
    return scored


def keep_family(job: Job, members: Sequence[Mapping[str, Any]]) -> str:
    """Write the table and the picture of the sizes so far, each whole or not at all; see `picture`."""
    metric = job.target.metric
    dense = job.results.get("dense", job.results.get("before"))
    points = [(item["parameters"], item["pruned"]) for item in members if "pruned" in item]
    size = members[0]["parameters_dense"]
    title = f"{job.target.task.name}: one scoring ({members[0]['criterion']}), one round, no training"
    series = {"pruned": points} if dense is None else {"dense": [(size, dense)], "pruned": points}
    draw = partial(plot_tradeoff, series, metric=metric.name)
    with interrupts_wait():
        drawn = picture(Path(job.output) / PICTURE, title, (5.4, 3.2), draw)
        values = {**job.results, "metric": metric.name, "family": list(members), "provenance": job.origin}
        write_json(Path(job.output) / RESULT, without_places(values))
    return drawn
