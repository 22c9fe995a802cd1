"""What each group's cut costs alone: the losses by which layers share out what is removed.

The loss of a group at a number of units is the fidelity's (KL of logits, else relative error) between the
dense network and one where only this group is cut to so many, and repaired as the configuration says, on
calibration examples that nothing is fitted on. No labels. `planning.allocation` then chooses.

Most groups are measured in one pass (`repair.levels`). `loss_of` is the general way, and its slow twin: a
cut, a repair and two runs for each level of a group, over the whole network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cria_prune.base.batches import SMALLER, Batch, limited, named_shortage
from cria_prune.base.errors import CaptureError, DataError
from cria_prune.base.events import passed
from cria_prune.base.files import write_json
from cria_prune.base.modules import digest, named_tensors, random_kept
from cria_prune.base.progress import QUIET, Progress
from cria_prune.base.ranks import world
from cria_prune.latency import known_latency
from cria_prune.planning.latency import LatencyTable
from cria_prune.planning.plan import make_plan
from cria_prune.planning.selection import highest
from cria_prune.planning.stairs import Stair, levels, stairs
from cria_prune.repair.fidelity import comparable
from cria_prune.repair.levels import EXAMPLES, Level, losses_of
from cria_prune.stages import Prepared, Ranking, removed
from cria_prune.structure.groups import UnitGroup


def with_latency(
    prepared: Prepared, *, keep: Path | None = None, progress: Progress | None = None
) -> Prepared:
    """Return the same with the seconds that cuts save measured, or read, where they are the cost.

    Args:
        prepared: with the dense network.
        keep: a file for what was measured, where the configuration names none.
        progress: where to show it.

    Raises:
        TargetError: what is asked cannot be reached.
        ArtifactError: see `known_latency`.
    """
    config = prepared.config.plan
    if config.of != "latency":
        return prepared
    if prepared.latency is None:
        found = world().lead(
            "Measuring the latencies",
            lambda: known_latency(
                prepared.model, prepared.groups, config, prepared.batches, allowed=prepared.allowed,
                keep=keep, progress=progress,
            ).model_dump(mode="json"),
        )  # fmt: skip
        prepared = replace(prepared, latency=LatencyTable.model_validate(found))
    prepared.check_reach()
    return prepared


LEAST = 1e-9
"""Loss and error below which nothing is told apart."""
MOST = 1e6
"""Loss of a network that gives NaN or infinity: worse than any that gives numbers."""


def measure_losses(
    prepared: Prepared,
    ranking: Ranking,
    *,
    every: bool = False,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Measure the loss of every group, or class of groups that go down together, cut alone.

    The lowest-scored units leave, to every eighth and to the smallest number that may stay. One level is
    measured of each group, with about half of the units gone; the others follow from it by the error of the
    layers that read the group, which is known in closed form and free of the noise of few examples: on
    ResNet-20 shares chosen so were better than from a table that is measured whole (docs/log.md). The loss
    of a class is shared out evenly, for `allocate` adds the losses of its groups. In several processes all
    make this call, and all get the same.

    Args:
        prepared: its model is left as it was; it has to be the dense one.
        ranking: of that model, with what the repair needs.
        every: measure every level.
        keep: a file for the losses found so far, from which the same call goes on.
        progress: where to show it.

    Returns:
        Group name -> units kept -> loss, at least 0.

    Raises:
        DataError: no output of the cut network can be compared with the dense one's.
        ResourceError: the memory does not suffice.
        CriaError: those of the repair and the surgery.
    """
    whole = stairs(prepared.groups, prepared.config.plan, prepared.allowed)
    made = [stair for stair in whole if len(stair.counts) > 1]  # of the others the number is given
    of = _identity(prepared, ranking, every)
    # Of several processes one may not see the file, and would measure what the others skip.
    losses = _numbered(world().lead("The losses that are kept", lambda: _kept(keep, of)))
    points = [(stair, count) for stair in made for count in levels(stair)]
    done = sum(count in losses.get(stair.names[0], {}) for stair, count in points)
    passed("losses", groups=prepared.groups, levels=len(points), done=done)
    with (
        random_kept(),
        named_shortage("Measuring what cuts cost", SMALLER),
        (progress or QUIET).bar("measure losses", len(points)) as bar,
    ):
        bar.update(done)
        examples = judges(prepared)  # read once: a loader may be slow
        for found in _together(prepared, ranking, made, losses, examples, every):
            losses[found[0].group] = _curve(found)
            world().lead("Keeping the losses", lambda: _keep(keep, of, losses))
            for level in found:
                bar.update(group=level.group)
        for stair, count in points:
            if all(count in losses.get(name, {}) for name in stair.names):
                continue
            loss = loss_of(prepared, ranking, stair, count, examples)
            for name in stair.names:
                losses.setdefault(name, {})[count] = loss / len(stair.groups)
            world().lead("Keeping the losses", lambda: _keep(keep, of, losses))
            bar.update(loss=loss)
    return losses


def _together(
    prepared: Prepared,
    ranking: Ranking,
    made: Sequence[Stair],
    known: Mapping[str, Mapping[int, float]],
    examples: Sequence[Batch],
    every: bool,
) -> Iterator[list[Level]]:
    """Yield the levels of one group after another, of those that a pass over the network can measure."""
    counts = {name: levels(stair) for stair in made for name in stair.names if name not in known}
    groups = [group for stair in made for group in stair.groups if counts.get(group.name)]
    middle = {group.name: _nearest(counts[group.name], group.size / 2) for group in groups}
    if not groups:
        return
    scores, config = ranking.scores, prepared.config

    def chosen(group: UnitGroup, count: int) -> np.ndarray:
        return highest(scores[group.name], count)

    found = losses_of(
        prepared.model, groups, counts, chosen, [*limited(prepared.batches, config.record.examples)],
        examples, config.record.seed, repaired=config.repair != "none",
        measured=lambda name, count: every or count == middle[name],
    )  # fmt: skip
    try:
        for _, several in groupby(found, key=lambda level: level.group):
            yield list(several)
    except CaptureError:  # then each level is measured by a cut of its own
        return


def _curve(found: Sequence[Level]) -> dict[int, float]:
    """Return units kept -> loss of a group, from the levels that were measured and the errors of all."""
    losses = {
        level.count: MOST if not math.isfinite(level.loss) else level.loss
        for level in found if level.loss is not None
    }  # fmt: skip
    if len(losses) == len(found):
        return losses
    # A loss grows as the squared error that causes it, as long as both are small.
    known = next(level for level in found if level.count in losses)
    assert known.error is not None
    scale = max(losses[known.count], LEAST) / max(known.error, LEAST)
    return {level.count: scale * level.error for level in found if level.error is not None}


def judges(prepared: Prepared) -> list[Batch]:
    """Return the examples that losses are measured on: some of those that nothing is held out of.

    So the held-out ones still say what a cut has done: they have not chosen its shares. More of them than
    are held out, for the losses of small cuts are small: on 102 images the shares of a ResNet-20 at half
    of its MACs gave 85.5 %, on 512 86.6 %.
    """
    return [*limited(prepared.held.fit(), EXAMPLES)]


def loss_of(
    prepared: Prepared, ranking: Ranking, stair: Stair, count: int, examples: Sequence[Batch] | None = None
) -> float:
    """Return the loss when only the groups of a stair are cut, to a number of units each.

    On some examples; by default those of `judges`.
    """
    examples = judges(prepared) if examples is None else examples
    scores = ranking.scores
    kept = {group.name: highest(scores[group.name], count) for group in stair.groups}
    step = make_plan(prepared.groups, kept)
    smaller, _ = removed(prepared, ranking, step)
    found = comparable(prepared.structure, smaller, examples)
    if found is None:
        raise DataError(
            f"Measuring what a cut of {stair.names[0]} costs",
            "no output of the cut network has the shape of the dense one's",
            "Use the ranking uniform, or let the model give out its logits",
        )
    return found.loss if math.isfinite(found.loss) else MOST


def _nearest(counts: Sequence[int], wanted: float) -> int:
    return min(counts, key=lambda count: abs(count - wanted))


def _identity(prepared: Prepared, ranking: Ranking, every: bool) -> str:
    """Return a digest of all that the losses follow from but the data, which the caller's state is of."""
    config = prepared.config.model_dump(mode="json")
    for name in ("reduction", "of", "rounds"):  # what is asked of them, not what they are
        config["plan"].pop(name)
    scores = {f"score {name}": item.scores for name, item in ranking.importances.items()}
    return digest(json.dumps([config, every], sort_keys=True), {**named_tensors(prepared.model), **scores})


def _kept(path: Path | None, of: str) -> dict[str, dict[str, float]]:
    """Return the losses in a file; none where it is not there, damaged or of something else."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return dict(found["losses"]) if found.get("of") == of else {}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}  # it only saves time: what is not there is measured again


def _keep(path: Path | None, of: str, losses: dict[str, dict[int, float]]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": of, "losses": losses})


def _numbered(losses: dict[str, dict[str, float]]) -> dict[str, dict[int, float]]:
    """JSON has texts for keys."""
    return {
        name: {int(count): float(loss) for count, loss in found.items()} for name, found in losses.items()
    }
