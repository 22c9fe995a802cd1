"""The rounds layer by layer: each from a folder and its structure to a smaller folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from cria_prune.base.dispatched import Weights, structure_of
from cria_prune.base.events import passed
from cria_prune.base.modules import give_back
from cria_prune.base.progress import Progress, clock
from cria_prune.offload.turns import score_in_turns
from cria_prune.offload.write import floats, load_dispatched, repair, verify_folder, write_model
from cria_prune.planning.plan import Plan
from cria_prune.result import OffloadedRound
from cria_prune.resume.turns import FinishedRounds, TurnStore
from cria_prune.stages import Prepared, plan_cut
from cria_prune.structure.groups import UnitGroups, shrink


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
        # The order is that of `stages.cut`, by way of the disk:
        # each step reads what the one before it has written.
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
        # The last weight, and what the C library has kept,
        # would stand beside the two models that are compared.
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


@contextmanager
def work_folder(folder: Path, state: str | Path | None) -> Iterator[Path]:
    """Give the folder for what the rounds need: hidden in that of the result, or one that outlives a kill."""
    if state is None:
        with TemporaryDirectory(dir=folder, prefix=".") as name:
            yield Path(name)
        return
    root = Path(state)
    root.mkdir(parents=True, exist_ok=True)
    yield root
    # Not in a `finally`: after an error or a kill the state is what the next call goes on from.
    shutil.rmtree(root, ignore_errors=True)


class Places:
    """Where the rounds put their files: a hidden folder in that of the result, of one file system with it.

    Args:
        root: the hidden folder.
        result: where the last model goes.
        rounds: how many there are.
    """

    def __init__(self, root: Path, result: Path, rounds: int) -> None:
        self._root, self._result, self._rounds = root, result, rounds

    def scratch(self, number: int) -> Path:
        """Return the place of what a round alone needs."""
        return self._made(self._root / f"round-{number}")

    def model(self, number: int) -> Path:
        """Return the folder of the model that a round makes."""
        return self._made(self._result if number == self._rounds else self._root / f"model-{number}")

    def fresh(self, number: int) -> Path:
        """Return the folder of the model that a round makes, without what a killed process left in it."""
        if number < self._rounds:
            shutil.rmtree(self.model(number))
        return self.model(number)

    def clear(self, number: int) -> None:
        """Remove what a round needed, once the next one has begun: its files, and the model before it."""
        for path in (self.scratch(number), self._root / f"model-{number - 1}"):
            shutil.rmtree(path, ignore_errors=True)

    def _made(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        return path


def all_rounds(
    rounds: Rounds,
    places: Places,
    before: Standing,
    finished: FinishedRounds | None,
    known: Sequence[OffloadedRound],
    seconds: dict[str, float],
) -> tuple[list[Plan], list[OffloadedRound], nn.Module]:
    """Do the rounds that are left, of which the last is always one.

    Args:
        before: the model before the first round.
        finished: keeps the rounds, `known` those that it has; None keeps nothing.
        seconds: what the first round to be done took so far.

    Returns:
        The plan of each round, what each did, and the structure of the last model.
    """
    plans, done, last = list[Plan](), list[OffloadedRound](), rounds.prepared.config.plan.rounds
    for kept in known:
        # The structure of a round is not kept. Its scores give
        # its plan again, and the plan the groups after it.
        step, groups, item = rounds.again(before.groups, kept)
        before = replace(before, groups=groups)
        plans.append(step)
        done.append(item)
    if done:
        seconds = {}
        before = _standing(places, len(done), before.groups, rounds.device, seconds)
    while True:
        number = len(done) + 1
        cut = rounds.cut(before, number, places.fresh(number), places.scratch(number), seconds)
        plans.append(cut.plan)
        done.append(cut.done)
        # Noted before the model before it goes (in `_standing`): a kill between
        # leaves a model too many, never one too few. The last round is never noted:
        # its folder is the result, which stands only when all of it is written.
        if finished is not None and number < last:
            finished.write(done)
        passed("round", number=number, rounds=last)
        if number == last:
            return plans, done, cut.structure
        seconds = {}
        before = _standing(places, number, cut.groups, rounds.device, seconds, cut.structure)


def _standing(
    places: Places,
    number: int,
    groups: UnitGroups,
    device: torch.device,
    seconds: dict[str, float],
    structure: nn.Module | None = None,
) -> Standing:
    """Return the model that a round made, ready for the next one, and remove what only that round needed."""
    with clock(seconds, "model"):
        model = load_dispatched(places.model(number), places.scratch(number + 1) / "weights", device)
    places.clear(number)
    return Standing(
        places.model(number), model, structure_of(model) if structure is None else structure, groups
    )
