"""The state of a fine-tune on disk: what a `Store` keeps of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from cria_prune.errors import ArtifactError
from cria_prune.recover.result import Epoch
from cria_prune.store import State, Store, weights_of

FORMAT = "cria-recovery-1"
NAME = "recovery.safetensors"
BATCHES = "batches per epoch"


class Facts(BaseModel):
    """What a state says beside its tensors.

    Attributes:
        identity: what makes the fine-tune this one (`identity`), and its number of batches per epoch.
        history: the epochs that are over, the first for the model as it came.
        best_epoch: epoch of the weights `best`.
        step: optimizer steps taken.
        finished: nothing is left to do, and only `best` is kept of the tensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, Any]
    history: list[Epoch]
    best_epoch: int
    step: int
    finished: bool


class Keeper:
    """Keeps the state of one fine-tune in a folder.

    Args:
        folder: made when the first state is written.
        identity: what makes the fine-tune this one.
        every: seconds between two states within an epoch.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], every: float) -> None:
        self.store = Store(folder, NAME, FORMAT, "recovery")
        self.identity, self.every = identity, every
        self._last = time.monotonic()

    def due(self) -> bool:
        """Say whether the last state is older than it may become."""
        return time.monotonic() - self._last >= self.every

    def write(self, facts: Facts, parts: Mapping[str, State]) -> None:
        """Replace the state; errors as in `Store.write`."""
        self.store.write(facts.model_dump(mode="json"), parts)
        self._last = time.monotonic()

    def read(self) -> tuple[Facts, dict[str, State]] | None:
        """Return the state and its tensors by part, on the CPU; None where there is none.

        Raises:
            ArtifactError: it cannot be read, or is not as it was written.
        """
        found = self.store.read()
        if found is None:
            return None
        try:
            return Facts.model_validate(found[0]), found[1]
        except ValidationError as error:
            raise self.damaged(str(error)) from error

    def check(self, facts: Facts, batches: int) -> None:
        """Compare a state with the fine-tune that was asked for; errors as in `Store.check`."""
        self.store.check(facts.identity, {**self.identity, BATCHES: batches})

    def damaged(self, found: str) -> ArtifactError:
        """Return the error for a state that cannot be used."""
        return self.store.damaged(found)


def identity(model: nn.Module, teacher: nn.Module | None, **said: Any) -> dict[str, Any]:
    """Return what makes a fine-tune this one: what is `said`, and its networks; errors as in `weights_of`."""
    networks = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    return {**said, **weights_of(networks, "recovery")}
