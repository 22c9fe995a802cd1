"""What `cria sweep` does: a network in several sizes from one scoring, and the metric against the size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cria_prune.artifact.scores import SCORES, load_scores
from cria_prune.base.errors import TargetError
from cria_prune.base.files import write_json
from cria_prune.base.progress import clock
from cria_prune.base.ranks import world
from cria_prune.cli import show, target
from cria_prune.cli.commands import (
    Steps,
    check_family,
    dense_model,
    job_of,
    member,
    prepared_for,
    saved_as,
)
from cria_prune.cli.folder import interrupts_wait
from cria_prune.cli.job import Job
from cria_prune.cli.output import Output
from cria_prune.cli.report import picture
from cria_prune.cli.scores import config_from, given_scores, keep_scores
from cria_prune.cli.settings import Sweep
from cria_prune.config import PruneConfig
from cria_prune.report.curves import plot_tradeoff
from cria_prune.scores import Scored, hash_of, scored_of
from cria_prune.stages import Prepared

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
RESULT, PICTURE, KEPT_SCORES = "sweep.json", "sweep.png", "scores"


def sweep(request: Sweep, out: Output) -> None:
    """Score once, prune to every share in one round each, save and measure; then table and picture."""
    found = target.find(request.target, request.texts)
    found.check_changeable()
    scored, shares = given_scores(request), request.reductions or SHARES
    defaults = found.prune_defaults()
    configs = [config_from(request, defaults, scored, rounds=1, reduction=share) for share in shares]
    check_family([Steps(config) for config in configs])
    prepared = prepared_for(found, configs[0], request.torch_device)
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
            drawn = here.lead("Keeping the sizes", lambda: keep(job, members))
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
        same = {"record", "score", "compensate"}
        asked = [item.model_dump(include=same) for item in (found.config, config)]
        if found.weights == hash_of(prepared.model) and asked[0] == asked[1]:
            return found
    scored = scored_of(prepared, seconds=job.seconds)
    with clock(job.seconds, "save"):
        keep_scores(folder, scored, {**job.target.named(), "provenance": job.origin})
    job.out.kept = f"the scores are kept (go on with: the same command, --output {job.output} --resume)"
    return scored


def keep(job: Job, members: Sequence[Mapping[str, Any]]) -> str:
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
        write_json(Path(job.output) / RESULT, values)
    return drawn
