"""What a killed `prune_offloaded` goes on from: the finished turns of a round, and the finished rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cria_prune.batches import Batch
from cria_prune.config import PruneConfig
from cria_prune.errors import ArtifactError
from cria_prune.modules import digest
from cria_prune.offload.chain import Chain
from cria_prune.offload.spilled import Spilled
from cria_prune.rounds import RoundFacts, said
from cria_prune.spectrum import Diagnosis, Importance
from cria_prune.store import State, Store, code_version

WORK = "pruning layer by layer"
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
    leaves = [item for item in tree_leaves(example) if isinstance(item, Tensor)]
    return {
        "config": config.model_dump(mode="json"),
        "memory": memory,
        "device": device.type,
        "data": data,
        "first examples": digest("", {str(place): item for place, item in enumerate(leaves)}),
        "files": {name: f"{found.st_size} {found.st_mtime_ns}" for name, found in files.items()},
        "torch": torch.__version__,
        "code": code_version(),
    }


class TurnStore:
    """Keeps what the turns of one round found, in the folder where their files are.

    Args:
        folder: of the round alone.
        identity: see `identity_of`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._store = Store(folder, "turns.safetensors", "cria-turns-1", WORK)
        self._identity = dict(identity)

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
        facts = TurnFacts(
            identity=self._identity,
            turns=turns,
            diagnosis={name: item.diagnosis.to_dict() for name, item in found.items()},
            spilled=spilled.said(),
            chain=form or None,
        )
        scores = {name: item.scores for name, item in found.items()}
        self._store.write(facts.model_dump(mode="json"), {"scores": scores})

    def read(self, spilled: Spilled, chain: Chain | None) -> tuple[int, dict[str, Importance]]:
        """Return how many turns are done and their importances, and set `spilled` and `chain` to them.

        Raises:
            ArtifactError: the state is damaged, or of another pruning.
        """
        found = self._store.read()
        if found is None:
            return 0, {}
        facts = _facts(TurnFacts, self._store, found[0], self._identity)
        try:
            spilled.take(facts.spilled)
            if chain is not None and facts.chain is not None:
                chain.take(facts.chain)
            scores = found[1].get("scores", {})
            return facts.turns, {
                name: Importance(scores[name], Diagnosis.from_dict(values))
                for name, values in facts.diagnosis.items()
            }
        except (LookupError, TypeError, ValueError) as error:
            raise self._store.damaged(str(error)) from error


class FinishedRounds:
    """Keeps the finished rounds of one pruning.

    Args:
        folder: of this pruning alone.
        identity: see `identity_of`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._store = Store(folder, "rounds.safetensors", "cria-offloaded-rounds-1", WORK)
        self._identity = dict(identity)

    def write(self, rounds: Any) -> None:
        """Keep the rounds so far; errors as in `Store.write`."""
        parts: dict[str, State] = {}
        for item in rounds:
            values = {name: torch.tensor(found, dtype=torch.float64) for name, found in item.scores.items()}
            parts[f"scores{item.number}"] = values
        facts = OffloadedFacts(
            identity=self._identity,
            rounds=[said(item) for item in rounds],
            turns=[item.turns for item in rounds],
        )
        self._store.write(facts.model_dump(mode="json"), parts)

    def read(self) -> list[tuple[RoundFacts, State, int]]:
        """Return what is kept of each finished round, its scores and its turns; none where there is no state.

        Raises:
            ArtifactError: the state is damaged, or of another pruning.
        """
        found = self._store.read()
        if found is None:
            return []
        facts = _facts(OffloadedFacts, self._store, found[0], self._identity)
        return [
            (item, found[1].get(f"scores{item.number}", {}), turns)
            for item, turns in zip(facts.rounds, facts.turns, strict=True)
        ]

    def damaged(self, text: str) -> ArtifactError:
        """Return the error for a state that cannot be used."""
        return self._store.damaged(text)


def _facts(kind: type[Known], store: Store, found: Any, identity: Mapping[str, Any]) -> Known:
    try:
        facts = kind.model_validate(found)
    except ValidationError as error:
        raise store.damaged(str(error)) from error
    store.check(facts.identity, identity)
    return facts
