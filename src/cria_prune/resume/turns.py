"""What a killed `prune_offloaded` goes on from: the finished turns of a round, and the finished rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError
from cria_prune.base.inputs import Inputs, named
from cria_prune.config import PruneConfig
from cria_prune.graph.moments import Moments
from cria_prune.result import OffloadedRound
from cria_prune.resume.rounds import (
    asked_of,
    diagnoses_of,
    importances_of,
    moment_tensors,
    moments_of,
    parts_of,
    rounds_of,
)
from cria_prune.resume.store import Facts, Store, TypedStore
from cria_prune.spectrum.importance import Importance

WORK = "pruning layer by layer"


class TurnFacts(Facts):
    """How many turns are done, what they found beside the scores, and where their files are."""

    turns: int
    diagnosis: dict[str, dict[str, Any]]
    spilled: list[tuple[str, str, str, int]]
    chain: dict[str, Any] | None


class OffloadedFacts(Facts):
    """The finished rounds; and, as Cria 0.1 wrote them apart, the turns that each was recorded in."""

    rounds: list[dict[str, Any]]
    turns: list[int] = Field(default_factory=list)


def identity_of(
    source: Path,
    config: PruneConfig,
    memory: int,
    device: torch.device,
    example: Batch,
    data: str | None,
    inputs: Inputs | None = None,
) -> dict[str, Any]:
    """Return what makes a pruning this one; the files of the model are told by name, size and time."""
    # Not by hashes: to read a model that does not fit into memory takes minutes (docs/decisions/0016).
    files = {path.name: path.stat() for path in sorted(source.iterdir()) if path.is_file()}
    return {
        **asked_of(config, example),
        "memory": memory,
        "device": device.type,
        "data": data,
        "files": {name: f"{found.st_size} {found.st_mtime_ns}" for name, found in files.items()},
        **({} if inputs is None else {"inputs": str(named(inputs))}),  # as in the states of before
    }


class Spilled:
    """Moments that wait on disk until a consumer is repaired.

    Args:
        folder: where they are.
        device: where they go when they are read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._samples: dict[tuple[str, str], tuple[Path, int]] = {}

    def add(self, group: str, consumed: Mapping[str, Moments]) -> None:
        """Write the moments of what a group's consumers read: consumer's weight -> moments."""
        for tensor, moments in consumed.items():
            path = self._folder / f"moments-{len(self._samples)}.safetensors"
            save_file(moment_tensors(moments), path)
            self._samples[group, tensor] = path, moments.samples

    def get(self, group: str, tensor: str) -> Moments | None:
        """Return the moments of what one consumer reads of a group; None where there are none."""
        path, samples = self._samples.get((group, tensor), (None, 0))
        if path is None:
            return None
        try:
            held = load_file(path)
            return moments_of(samples, {name: value.to(self._device) for name, value in held.items()})
        except (OSError, SafetensorError, ValueError) as error:
            todo = "Remove the state to start anew"
            raise ArtifactError(f"Reading the moments of {group!r}", str(error), todo) from error

    def said(self) -> list[tuple[str, str, str, int]]:
        """Return which files there are: group, consumer's weight, name of the file, samples."""
        return [(*key, path.name, samples) for key, (path, samples) in self._samples.items()]

    def take(self, said: Iterable[tuple[str, str, str, int]]) -> None:
        """Take the files for this one's that another said.

        Raises:
            LookupError: one of them is not in the folder.
        """
        for group, tensor, name, samples in said:
            path = self._folder / Path(name).name
            if not path.is_file():
                raise LookupError(f"{path.name} is not there")
            self._samples[group, tensor] = path, samples


class Chain(Protocol):
    """What the blocks of a model give each other from turn to turn; see `offload.turns`."""

    def form(self) -> dict[str, Any] | None:
        """Return as plain JSON what `take` needs to go on; None where it cannot be said so."""

    def take(self, said: dict[str, Any]) -> None:
        """Go on where another chain of the same blocks and folder was."""


class TurnStore:
    """Keeps what the turns of one round found, in the folder where their files are.

    Args:
        folder: where it is, of this pruning alone.
        identity: see `identity_of`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        store = Store(folder, "turns.safetensors", "cria-turns-1", WORK)
        self.store = TypedStore(store, TurnFacts, identity)

    def write(
        self, turns: int, found: Mapping[str, Importance], spilled: Spilled, chain: Chain | None
    ) -> None:
        """Keep the turns so far; where what goes from block to block cannot be told, nothing is kept.

        Raises:
            ArtifactError: the system refuses.
        """
        form = {} if chain is None else chain.form()
        if form is None:
            return
        self.store.write(
            {"scores": {name: item.scores for name, item in found.items()}},
            turns=turns,
            diagnosis=diagnoses_of(found),
            spilled=spilled.said(),
            chain=form or None,
        )

    def read(self, spilled: Spilled, chain: Chain | None) -> tuple[int, dict[str, Importance]]:
        """Return how many turns are done and their importances, and set `spilled` and `chain` to them.

        Raises:
            ArtifactError: the state is damaged, or of another pruning.
        """
        found = self.store.read()
        if found is None:
            return 0, {}
        facts, parts = found
        try:
            spilled.take(facts.spilled)
            if chain is not None and facts.chain is not None:
                chain.take(facts.chain)
            return facts.turns, importances_of(facts.diagnosis, parts.get("scores", {}))
        except (LookupError, TypeError, ValueError) as error:
            raise self.store.damaged(error) from error


class FinishedRounds:
    """Keeps the finished rounds of one pruning; arguments as for `TurnStore`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        store = Store(folder, "rounds.safetensors", "cria-offloaded-rounds-1", WORK)
        self.store = TypedStore(store, OffloadedFacts, identity)

    def write(self, rounds: Sequence[OffloadedRound]) -> None:
        """Keep the rounds so far; errors as in `Store.write`."""
        facts, parts = parts_of(rounds)
        self.store.write(parts, rounds=facts)

    def read(self) -> list[OffloadedRound]:
        """Return the finished rounds; none where there is no state.

        Raises:
            ArtifactError: the state is damaged, or of another pruning.
        """
        found = self.store.read()
        if found is None:
            return []
        facts, parts = found
        for item, turns in zip(facts.rounds, facts.turns, strict=False):
            item.setdefault("turns", turns)
        try:
            return rounds_of(facts.rounds, parts, OffloadedRound)
        except (LookupError, TypeError, ValueError) as error:
            raise self.store.damaged(error) from error
