"""What a killed `prune_offloaded` goes on from: the finished turns of a round, and the finished rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from cria_prune.batches import Batch
from cria_prune.config import PruneConfig
from cria_prune.offload.chain import Chain
from cria_prune.offload.spilled import Spilled
from cria_prune.rounds import RoundFacts, asked_of, said, scores_of
from cria_prune.spectrum import Diagnosis, Importance
from cria_prune.store import State, Store

Known = TypeVar("Known", bound="_Facts")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, Any]


class TurnFacts(_Facts):
    """How many turns are done, what they found beside the scores, and where their files are."""

    turns: int
    diagnosis: dict[str, dict[str, Any]]
    spilled: list[tuple[str, str, str, int]]
    chain: dict[str, Any] | None


class OffloadedFacts(_Facts):
    """The finished rounds, and the turns that each was recorded in."""

    rounds: list[RoundFacts]
    turns: list[int]


def identity_of(
    source: Path, config: PruneConfig, memory: int, device: torch.device, example: Batch, data: str | None
) -> dict[str, Any]:
    """Return what makes a pruning this one; the files of the model are told by name, size and time."""
    files = {path.name: path.stat() for path in sorted(source.iterdir()) if path.is_file()}
    return {
        **asked_of(config, example),
        "memory": memory,
        "device": device.type,
        "data": data,
        "files": {name: f"{found.st_size} {found.st_mtime_ns}" for name, found in files.items()},
    }


class _Kept(Generic[Known]):
    """A state of one kind, of one pruning.

    Args:
        folder: where it is, of this pruning alone.
        identity: see `identity_of`.
    """

    name: str
    layout: str
    facts: type[Known]

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._store = Store(folder, self.name, self.layout, "pruning layer by layer")
        self._identity = dict(identity)

    def _keep(self, parts: Mapping[str, State], **facts: Any) -> None:
        said = self.facts(identity=self._identity, **facts)
        self._store.write(said.model_dump(mode="json"), parts)

    def _kept(self) -> tuple[Known, dict[str, State]] | None:
        found = self._store.read()
        if found is None:
            return None
        try:
            facts = self.facts.model_validate(found[0])
        except ValidationError as error:
            raise self._store.damaged(str(error)) from error
        self._store.check(facts.identity, self._identity)
        return facts, found[1]


class TurnStore(_Kept[TurnFacts]):
    """Keeps what the turns of one round found, in the folder where their files are."""

    name, layout, facts = "turns.safetensors", "cria-turns-1", TurnFacts

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
        self._keep(
            {"scores": {name: item.scores for name, item in found.items()}},
            turns=turns,
            diagnosis={name: item.diagnosis.to_dict() for name, item in found.items()},
            spilled=spilled.said(),
            chain=form or None,
        )

    def read(self, spilled: Spilled, chain: Chain | None) -> tuple[int, dict[str, Importance]]:
        """Return how many turns are done and their importances, and set `spilled` and `chain` to them.

        Raises:
            ArtifactError: the state is damaged, or of another pruning.
        """
        found = self._kept()
        if found is None:
            return 0, {}
        facts, parts = found
        try:
            spilled.take(facts.spilled)
            if chain is not None and facts.chain is not None:
                chain.take(facts.chain)
            scores = parts.get("scores", {})
            return facts.turns, {
                name: Importance(scores[name], Diagnosis.from_dict(values))
                for name, values in facts.diagnosis.items()
            }
        except (LookupError, TypeError, ValueError) as error:
            raise self._store.damaged(str(error)) from error


class FinishedRounds(_Kept[OffloadedFacts]):
    """Keeps the finished rounds of one pruning."""

    name, layout, facts = "rounds.safetensors", "cria-offloaded-rounds-1", OffloadedFacts

    def write(self, rounds: Any) -> None:
        """Keep the rounds so far; errors as in `Store.write`."""
        self._keep(
            {f"scores{item.number}": scores_of(item) for item in rounds},
            rounds=[said(item) for item in rounds],
            turns=[item.turns for item in rounds],
        )

    def read(self) -> list[tuple[RoundFacts, State, int]]:
        """Return what is kept of each finished round, its scores and its turns; none where there is no state.

        Raises:
            ArtifactError: the state is damaged, or of another pruning.
        """
        found = self._kept()
        if found is None:
            return []
        facts, parts = found
        return [
            (item, parts.get(f"scores{item.number}", {}), turns)
            for item, turns in zip(facts.rounds, facts.turns, strict=True)
        ]
