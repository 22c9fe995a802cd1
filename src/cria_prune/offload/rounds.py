"""One round layer by layer: from a folder and its structure to a smaller folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cria_prune.dispatched import Weights
from cria_prune.modules import give_back
from cria_prune.offload.check import verify_folder
from cria_prune.offload.repair import repair
from cria_prune.offload.turns import score_in_turns
from cria_prune.offload.write import floats, write_model
from cria_prune.plan import Plan
from cria_prune.progress import Progress, clock
from cria_prune.result import OffloadedRound
from cria_prune.resume.turns import TurnStore
from cria_prune.stages import Prepared, plan_cut
from cria_prune.structure import UnitGroups, shrink


@dataclass(frozen=True)
class Standing:
    """The model before a round.

    Attributes:
        folder: where it is.
        model: with all of its weights on disk.
        structure: the same on the meta device, without hooks.
        groups: its unit groups.
    """

    folder: Path
    model: nn.Module
    structure: nn.Module
    groups: UnitGroups


@dataclass(frozen=True)
class Cut:
    """What a round leaves to the next one.

    Attributes:
        plan: what was removed, relative to the model before the round.
        structure: the smaller model on the meta device; groups: its unit groups.
        done: what the round did.
    """

    plan: Plan
    structure: nn.Module
    groups: UnitGroups
    done: OffloadedRound


@dataclass(frozen=True)
class Rounds:
    """What stays the same over the rounds.

    Attributes:
        source: folder of the first model, for its tokenizer and generation settings.
        prepared: the first model on the meta device, which the shares count from; batches and configuration.
        memory, max_shard_size, device, progress: see `prune_offloaded`.
        asked: for error texts.
        identity: what makes this pruning this one, where its turns are kept; None keeps nothing.
    """

    source: Path
    prepared: Prepared
    memory: int
    max_shard_size: int | str
    device: torch.device
    progress: Progress
    asked: str
    identity: Mapping[str, Any] | None = None

    def plan(self, groups: UnitGroups, scores: Mapping[str, np.ndarray], number: int) -> Plan:
        """Return the plan of a round from its scores, relative to the model before it."""
        plan = self.prepared.config.plan
        now = replace(self.prepared, groups=groups)
        return plan_cut(now, scores, plan.reduction * number / plan.rounds)

    def again(self, groups: UnitGroups, known: OffloadedRound) -> tuple[Plan, UnitGroups, OffloadedRound]:
        """Return what a finished round left: its plan, made again, the groups after it, what it did."""
        values = {name: np.array(found) for name, found in known.scores.items()}
        step = self.plan(groups, values, known.number)
        return step, shrink(groups, step.kept), replace(known, kept=dict(step.kept))

    def cut(
        self, before: Standing, number: int, folder: Path, scratch: Path, seconds: dict[str, float]
    ) -> Cut:
        """Record, score, plan, repair, write and verify.

        Args:
            before: the model.
            number: of the round, from 1.
            folder: where the smaller model goes; it is there, and empty but for hidden folders.
            scratch: for all else; what is left in it is of no use after the round.
            seconds: stage -> wall time, added to.

        Raises:
            CriaError: each stage's own.
        """
        structure, groups, example = before.structure, before.groups, self.prepared.example
        weights = Weights(before.model)
        kept = None if self.identity is None else TurnStore(scratch, self.identity)
        with clock(seconds, "score"):
            now = replace(self.prepared, model=before.model, groups=groups)
            importances, spilled, turns = score_in_turns(now, scratch, self.memory, self.progress, kept)
        values = {name: item.scores.numpy() for name, item in importances.items()}
        step = self.plan(groups, values, number)
        with clock(seconds, "repair"):
            repaired, repairs = repair(structure, groups, step.kept, spilled, weights, scratch)
        with clock(seconds, "save"):
            smaller = write_model(
                folder, structure, step, repaired, self.source, self.max_shard_size, self.asked
            )
        weights.forget()
        give_back()
        verification = None
        if self.prepared.config.verify:
            with clock(seconds, "verify"):
                dtype = torch.float64 if floats(structure) is torch.float64 else torch.float32
                verification = verify_folder(
                    before.folder, folder, step, repaired, example, scratch, dtype, self.device
                )
        done = OffloadedRound(
            number=number,
            report=step.report,
            seconds=seconds,
            scores={name: tuple(item.tolist()) for name, item in values.items()},
            kept=dict(step.kept),
            diagnosis={name: item.diagnosis.to_dict() for name, item in importances.items()},
            verification=verification,
            metric=None,
            repairs=repairs,
            turns=turns,
        )
        return Cut(step, smaller, shrink(groups, step.kept), done)
