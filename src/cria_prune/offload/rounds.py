"""The rounds layer by layer: each from a folder and its structure to a smaller folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from cria_prune.base.dispatched import Weights, structure_of
from cria_prune.base.events import passed
from cria_prune.base.modules import give_back
from cria_prune.base.progress import Progress, clock
from cria_prune.offload.turns import score_in_turns
from cria_prune.offload.walk import Folders
from cria_prune.offload.write import (
    Repaired,
    floats,
    folder_fidelity,
    load_dispatched,
    repair,
    verify_folder,
    write_model,
)
from cria_prune.planning.plan import Plan, compose
from cria_prune.repair.consumers import Repair
from cria_prune.repair.fidelity import Fidelity
from cria_prune.repair.norms import Remeasured
from cria_prune.repair.walk import Walked
from cria_prune.result import OffloadedRound
from cria_prune.resume.layers import LayerStore
from cria_prune.resume.turns import FinishedRounds, Spilled, TurnStore
from cria_prune.stages import InMemory, Prepared, Ranking, cut, plan_cut, said, target_of
from cria_prune.structure.groups import UnitGroups, shrink
from cria_prune.surgery.verify import Verification


@dataclass(frozen=True)
class Standing:
    """The model before a round.

    Attributes:
        folder: where it is.
        model: with all of its weights on disk.
        structure: the same on the meta device, without hooks.
        groups: its unit groups.
        plan: what is gone already, relative to the first model.
    """

    folder: Path
    model: nn.Module
    structure: nn.Module
    groups: UnitGroups
    plan: Plan

    def after(self, step: Plan) -> Standing:
        """Return it with what a cut leaves of the groups; the model is still the one before."""
        return replace(self, groups=shrink(self.groups, step.kept), plan=compose(self.plan, step))


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

    def _progress(self, number: int) -> float:
        return number / self.prepared.config.plan.rounds

    def again(self, before: Standing, known: OffloadedRound) -> tuple[Standing, OffloadedRound]:
        """Return what a finished round left: its plan is made again from its scores."""
        scores = {name: np.array(found) for name, found in known.scores.items()}
        now = replace(self.prepared, groups=before.groups, progress=self._progress(known.number))
        step = plan_cut(now, scores, target_of(now.config, known.number))
        return before.after(step), replace(known, kept=dict(step.kept))

    def cut(
        self, before: Standing, number: int, folder: Path, scratch: Path, seconds: dict[str, float]
    ) -> tuple[Standing, OffloadedRound, nn.Module]:
        """Rank and cut.

        Args:
            before: the model.
            number: of the round, from 1.
            folder: where the smaller model goes; it is there, and empty but for hidden folders.
            scratch: for all else; what is left in it is of no use after the round.
            seconds: stage -> wall time, of what came before.

        Returns:
            What the next round begins with, but for the model; what this one did; the smaller model on the
            meta device.

        Raises:
            CriaError: each stage's own.
        """
        now = replace(
            self.prepared, model=before.model, groups=before.groups, plan=before.plan,
            progress=self._progress(number),
        )  # fmt: skip
        kept = None if self.identity is None else TurnStore(scratch, self.identity)
        with clock(seconds, "score"):
            importances, spilled, turns = score_in_turns(now, scratch, self.memory, self.progress, kept)
        ranking = Ranking(importances, {}, seconds=seconds)  # what the repair needs waits on disk
        # The order is that of memory, by way of the disk: each step reads what the one before it has written.
        hands = OnDisk(self, before, folder, scratch, spilled)
        made = cut(now, ranking, target_of(now.config, number), hands=hands)
        return before.after(made.plan), said(OffloadedRound, number, ranking, made, turns=turns), made.model


class OnDisk(InMemory):
    """How a cut changes a model whose weights stay on disk; batch norms are not measured again.

    Args:
        rounds: what stays the same.
        before: the model, dispatched.
        folder: where the smaller model goes.
        scratch: for repaired weights, what the walk keeps apart, and weights that transformers stores
            otherwise than the model holds them.
        spilled: moments of what the consumers read.
    """

    times: ClassVar = {"repair": "repair", "remove": "save"}

    def __init__(
        self, rounds: Rounds, before: Standing, folder: Path, scratch: Path, spilled: Spilled
    ) -> None:
        self._rounds, self._before, self._folder, self._scratch = rounds, before, folder, scratch
        self._dense, self._spilled = Weights(before.model), spilled
        self._weights = Repaired(self._dense, scratch)
        self._folders = Folders(rounds.source, folder, scratch, rounds.memory, rounds.device)

    def once(self, prepared: Prepared, step: Plan, ranking: Ranking) -> tuple[Any, tuple[Repair, ...]]:
        """Return the weights, some of them repaired, and what became of each consumer."""
        structure, groups = self._before.structure, prepared.groups
        self._weights, repairs = repair(
            structure, groups, step.kept, self._spilled, self._dense, self._scratch
        )
        return self._weights, repairs

    def walk(self, prepared: Prepared, total: Plan, smaller: nn.Module) -> Walked:
        """Refit the layers of the folder towards the first model, both loaded layer by layer."""
        identity = self._rounds.identity
        kept = None if identity is None else LayerStore(self._scratch, identity, total)
        return self._folders.walk(prepared, total, smaller, self._rounds.progress, kept)

    def back(self, smaller: nn.Module) -> nn.Module:
        """Put the folder back as it was cut."""
        self._folders.back()
        return smaller

    def remove(self, source: Any, step: Plan) -> nn.Module:
        """Write the smaller model shard by shard, and return it on the meta device."""
        rounds = self._rounds
        smaller = write_model(
            self._folder, self._before.structure, step, self._weights, rounds.source, rounds.max_shard_size,
            rounds.asked,
        )  # fmt: skip
        # The last weight, and what the C library has kept,
        # would stand beside the two models that are compared.
        self._dense.forget()
        give_back()
        return smaller

    def verify(
        self, prepared: Prepared, step: Plan, total: Plan, source: Any, smaller: nn.Module
    ) -> Verification:
        """Compare the folder with the masked model, both loaded layer by layer."""
        dtype = torch.float64 if floats(self._before.structure) is torch.float64 else torch.float32
        return verify_folder(
            self._before.folder, self._folder, step, self._weights, prepared.example, self._scratch, dtype,
            self._rounds.device,
        )  # fmt: skip

    def measure(self, prepared: Prepared, smaller: nn.Module) -> Fidelity | None:
        """Compare the folder with that of the first model, both loaded layer by layer."""
        return folder_fidelity(
            self._rounds.source, self._folder, prepared.held.batches, self._scratch, self._rounds.device
        )

    def norms(
        self, prepared: Prepared, smaller: nn.Module, before: Fidelity | None
    ) -> tuple[Remeasured, Fidelity | None]:
        """Leave the batch norms as they are."""
        return Remeasured(smaller, 0), None


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
) -> tuple[Plan, list[OffloadedRound], nn.Module]:
    """Do the rounds that are left, of which the last is always one.

    Args:
        before: the model before the first round.
        finished: keeps the rounds, `known` those that it has; None keeps nothing.
        seconds: what the first round to be done took so far.

    Returns:
        What is gone of the first model, what each round did, and the structure of the last model.
    """
    done, last = list[OffloadedRound](), rounds.prepared.config.plan.rounds
    for kept in known:
        # The structure of a round is not kept. Its scores give
        # its plan again, and the plan the groups after it.
        before, item = rounds.again(before, kept)
        done.append(item)
    if done:
        seconds = {}
        before = _standing(places, len(done), before, rounds.device, seconds)
    while True:
        number = len(done) + 1
        after, item, smaller = rounds.cut(
            before, number, places.fresh(number), places.scratch(number), seconds
        )
        done.append(item)
        # Noted before the model before it goes (in `_standing`): a kill between
        # leaves a model too many, never one too few. The last round is never noted:
        # its folder is the result, which stands only when all of it is written.
        if finished is not None and number < last:
            finished.write(done)
        passed("round", number=number, rounds=last)
        if number == last:
            return after.plan, done, smaller
        seconds = {}
        before = _standing(places, number, after, rounds.device, seconds, smaller)


def _standing(
    places: Places,
    number: int,
    after: Standing,
    device: torch.device,
    seconds: dict[str, float],
    structure: nn.Module | None = None,
) -> Standing:
    """Return the model that a round made, ready for the next one, and remove what only that round needed."""
    with clock(seconds, "model"):
        model = load_dispatched(places.model(number), places.scratch(number + 1) / "weights", device)
    places.clear(number)
    structure = structure_of(model) if structure is None else structure
    return replace(after, folder=places.model(number), model=model, structure=structure)
