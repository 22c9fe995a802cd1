"""Scores on the command line: made once and kept, and read again for pruning."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cria_prune.artifact.rebuild import provenance
from cria_prune.artifact.scores import load_scores, save_scores
from cria_prune.base.errors import ConfigError
from cria_prune.base.progress import clock
from cria_prune.base.ranks import world
from cria_prune.cli import show, target
from cria_prune.cli.folder import claimed
from cria_prune.cli.job import rounded
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Score, Scoring, prune_config
from cria_prune.cli.target import own_of
from cria_prune.config import PruneConfig
from cria_prune.scores import Scored, score_once


def score(request: Score, out: Output) -> None:
    """Scores and diagnosis of every group, without cutting; with --output they are kept for pruning."""
    found = target.find(request.target, request.texts, own_of(request))
    config, output = prune_config(request, found.prune_defaults()), request.output
    if output is None:
        config = config.model_copy(update={"repair": "none"})  # its moments would be thrown away
    with nullcontext() if output is None else claimed(output, "", request.overwrite) as folder:
        device, seed, seconds = request.torch_device, request.base_seed, dict[str, float]()
        with clock(seconds, "model"):
            model = found.model(device, seed, out.progress)
        batches = found.task.calibration(config.record.examples, config.record.seed)
        task = found.task
        scored = score_once(model, batches, config, example=task.example, loss=task.loss, seconds=seconds)
        show.diagnosis(out, scored)
        head = {"target": request.target, **found.named(), "criterion": config.score.criterion}
        if folder is not None:
            origin = provenance(seed, request.command, found.task.fingerprint(), device)
            keep_scores(folder, scored, {**head, "provenance": origin})
            out.say(f"scores {folder}: cria prune {request.target} --scores {folder} cuts to any size")
        out.answer({
            **head,
            "groups": len(scored.importances),
            "units": sum(len(item.scores) for item in scored.importances.values()),
            "seed": seed,
            "output": None if folder is None else str(folder),
            "seconds": rounded(seconds),
        })  # fmt: skip


def keep_scores(folder: Path, scored: Scored, said: Mapping[str, Any]) -> None:
    """Write scores in place of those in a folder; of several processes the first does."""
    world().lead(
        "Keeping the scores", lambda: save_scores(folder, scored, overwrite=True, said=said) and None
    )


def config_from(
    request: Scoring, defaults: Mapping[str, Any], scored: Scored | None, **plan: Any
) -> PruneConfig:
    """Return the configuration of a pruning, from scores if there are any: then of one round.

    Settings of the plan that are named here win over what was asked.

    Raises:
        ConfigError: several rounds, or another recording or criterion than the scores', were asked for.
    """
    if scored is None:
        return prune_config(request, defaults, **plan)
    theirs = scored.config.model_dump(include={"record", "score"})
    base = {**defaults, **theirs, "repair": scored.config.repair}
    config = prune_config(request, base, **{"rounds": request.plan.given().get("rounds", 1), **plan})
    for section, values in theirs.items():
        asked = getattr(config, section).model_dump()
        differing = [
            f"{key} {values[key]!r}, asked is {asked[key]!r}" for key in values if values[key] != asked[key]
        ]
        if differing:
            raise ConfigError(
                f"Pruning from scores with another {section}", f"theirs is {differing[0]}",
                "Leave the option out, or score again with it",
            )  # fmt: skip
    return scored.applied(config)


def given_scores(request: Scoring) -> Scored | None:
    """Return the scores that --scores names."""
    return None if request.scores is None else load_scores(request.scores)
