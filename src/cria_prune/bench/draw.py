"""What the cells of one dense model and one draw of calibration examples have in common, found once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.metrics import Loss
from cria_prune.base.progress import Progress, clock
from cria_prune.config import PruneConfig
from cria_prune.measured import measure_losses
from cria_prune.pipeline import prune
from cria_prune.planning.allocation import Losses
from cria_prune.repair.fidelity import AS_CUT, comparable
from cria_prune.result import PruneResult
from cria_prune.scores import Scored, scored_of
from cria_prune.stages import Prepared, prepare

Seconds = dict[str, float]
ASKED = ("reduction", "of", "rounds", "ranking", "speedup")
"""Settings of the plan that say how much is removed where: scores and losses do not depend on them."""


class Draw:
    """A dense model with one draw of calibration examples; its cells are pruned from what is shared.

    The capture serves all cells, scores those of one criterion, measured losses those of one criterion and
    one kind of repair. None of it depends on what else a cell says, so that a cell comes out the same
    whether it is measured alone or after others. Seconds that a stage took once are in every cell.

    Args:
        model: the dense model; it is left as it was.
        batches: the calibration examples.
        loss: for criteria with gradients; cross-entropy if None.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], loss: Loss | None = None) -> None:
        self.model, self._batches, self._loss = model, batches, loss
        self._prepared: Prepared | None = None
        self._scores: dict[str, tuple[Scored, Seconds]] = {}
        self._losses: dict[str, tuple[Losses, Seconds]] = {}

    def ready(self, config: PruneConfig) -> Prepared:
        """Return the model prepared for a configuration; errors as in `prepare`."""
        if self._prepared is None:
            # Under the repair `once` no copy is kept for the cuts to be compared with; the others need it.
            self._prepared = prepare(self.model, self._batches, config.model_copy(update={"repair": "none"}))
        return self._prepared.with_config(config)

    def prune(self, config: PruneConfig, progress: Progress) -> tuple[PruneResult, Seconds]:
        """Prune, and return the result with stage -> seconds; errors as in `prune`."""
        ready = self.ready(config)
        ready.check_reach()
        seconds = Seconds()
        scored = None
        if config.plan.rounds == 1:  # every further round would need scores of its own
            scored, spent = self._scored(ready)
            seconds |= spent
            if config.plan.shared_by == "measured":
                losses, spent = self._measured(ready, scored, progress)
                seconds |= spent
                ready = replace(ready, losses=losses)
        result = prune(
            self.model, ready.batches, config, loss=self._loss, scores=scored, prepared=ready,
            progress=progress,
        )  # fmt: skip
        return result, {**result.seconds_by_stage, **seconds}

    def fidelity(self, smaller: nn.Module, config: PruneConfig) -> dict[str, Any]:
        """Return how far a network that another pruner has cut is from the dense one, as a round says it.

        On the examples that Cria would hold out; empty where no output can be compared.
        """
        found = comparable(self.model, smaller, self.ready(config).held.batches)
        return {} if found is None else {AS_CUT: found.to_dict()}

    def _scored(self, ready: Prepared) -> tuple[Scored, Seconds]:
        moments = ready.config.repair == "once"
        key = _key(ready.config, moments)
        if key not in self._scores:
            seconds = Seconds()
            scored = scored_of(ready, loss=self._loss, seconds=seconds)
            del seconds["structure"]  # the result has it
            self._scores[key] = scored, seconds
        return self._scores[key]

    def _measured(self, ready: Prepared, scored: Scored, progress: Progress) -> tuple[Losses, Seconds]:
        key = _key(ready.config, ready.config.repair)
        if key not in self._losses:
            seconds = Seconds()
            with clock(seconds, "losses"):
                losses = measure_losses(ready, scored.ranking(ready.groups), progress=progress)
            self._losses[key] = losses, seconds
        return self._losses[key]


def _key(config: PruneConfig, repair: object) -> str:
    plan = config.plan.model_dump(mode="json", exclude=set(ASKED))
    values = [config.record.model_dump(mode="json"), config.score.model_dump(mode="json"), plan, repair]
    return json.dumps(values, sort_keys=True)
