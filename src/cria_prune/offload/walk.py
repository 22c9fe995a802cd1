"""The rounds of a pruning layer by layer, one after another, and where their files are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from cria_prune.base.events import passed
from cria_prune.dispatched import structure_of
from cria_prune.offload.check import load_dispatched
from cria_prune.offload.rounds import OffloadedRound, Rounds, Standing
from cria_prune.plan import Plan
from cria_prune.progress import clock
from cria_prune.resume.turns import FinishedRounds
from cria_prune.structure import UnitGroups


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
