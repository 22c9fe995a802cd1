"""The state of a fine-tune on disk: what is kept, and how the fine-tune goes on from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cria_prune.recover.guard import generators, put_back, set_generators, trained
from cria_prune.recover.result import Epoch
from cria_prune.recover.schedule import all_of, moments, set_moments
from cria_prune.resume.store import Facts, State, Store, TypedStore, weights_of

if TYPE_CHECKING:
    from cria_prune.recover.run import Run, Source

FORMAT = "cria-recovery-1"
NAME = "recovery.safetensors"
BATCHES = "batches per epoch"


class RecoveryFacts(Facts):
    """What a state says beside its tensors; to its identity belongs the number of batches per epoch.

    Attributes:
        history: the epochs that are over, the first for the model as it came.
        best_epoch: epoch of the weights `best`.
        step: optimizer steps taken.
        finished: nothing is left to do, and only `best` is kept of the tensors.
    """

    history: list[Epoch]
    best_epoch: int
    step: int
    finished: bool


class Keeper(TypedStore[RecoveryFacts]):
    """Keeps the state of one fine-tune in a folder.

    Args:
        folder: made when the first state is written.
        identity: what makes the fine-tune this one.
        every: seconds between two states within an epoch.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], every: float) -> None:
        super().__init__(Store(folder, NAME, FORMAT, "recovery"), RecoveryFacts, identity)
        self.every, self._last = every, time.monotonic()

    def due(self, run: Run) -> bool:
        """Say whether the last state is older than it may become; of several processes the first one's is."""
        late = time.monotonic() - self._last >= self.every
        if run.parallel is None:
            return late
        return bool(run.here.total(torch.tensor(float(late and run.here.first))))

    def keep(self, run: Run) -> None:
        """Write the state of a fine-tune; all processes call it, and the first one writes."""
        parts: dict[str, State] = {"best": run.best_state or {}}
        if not run.finished:
            if run.parallel is not None:
                parts["norms"] = run.parallel.each()
            if run.sharded is not None:
                parts["optimizer"] = run.sharded.whole(moments(run.optimizer))
            elif run.here.first:
                parts["optimizer"] = moments(run.optimizer)
            else:  # it writes nothing
                return
            parts["weights"] = run.copied()
            parts["losses"] = {"epoch": torch.tensor(run.losses, dtype=torch.float64)}
            parts["generators"], parts["opened"] = generators(run.device), run.opened or {}
        if run.here.first:
            self.write(
                parts,
                identity={**self.identity, BATCHES: run.count},
                history=run.history,
                best_epoch=run.best_epoch,
                step=run.step,
                finished=run.finished,
            )
            self._last = time.monotonic()

    def go_on(self, run: Run, source: Source) -> bool:
        """Bring a fine-tune to the state on disk; say whether there was one.

        Raises:
            ArtifactError: it is damaged, or of another fine-tune.
        """

        def batches() -> dict[str, int]:
            run.count = source.sized(0)[1]
            return {BATCHES: run.count}

        found = self.read(batches)
        if found is None:
            return False
        facts, parts = found
        run.history, run.best_epoch, run.step = list(facts.history), facts.best_epoch, facts.step
        run.finished = facts.finished
        share = all_of if run.sharded is None else run.sharded.share
        own = trained(run.model)
        try:
            for part in ("best",) if run.finished else ("best", "weights"):
                if parts[part].keys() != own.keys():
                    raise LookupError("they have other names")
                put_back(run.model, {name: share(value, own[name]) for name, value in parts[part].items()})
            if not run.finished:
                set_moments(run.optimizer, parts.get("optimizer", {}), share)
                if run.parallel is not None:
                    run.parallel.take(parts.get("norms", {}))
                run.losses = parts["losses"]["epoch"].tolist()
                run.opened = parts.get("opened")
                set_generators(parts["generators"], run.device)
        except (LookupError, ValueError, RuntimeError) as error:
            raise self.store.damaged(f"its tensors do not fit the model: {error}") from error
        run.best_state = parts["best"] if run.sharded is None or run.here.first else {}
        return True


def identity(model: nn.Module, teacher: nn.Module | None, **said: Any) -> dict[str, Any]:
    """Return what makes a fine-tune this one: what is `said`, and its networks; errors as in `weights_of`."""
    networks = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    return {**said, **weights_of(networks, "recovery")}
