"""The refitted layers of a walk that is not over yet, from which a stopped one goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from cria_prune.base.modules import digest
from cria_prune.planning.plan import Plan
from cria_prune.repair.consumers import Repair
from cria_prune.resume.store import Facts, Store, TypedStore

PREFIX = "walk-"


class LayerFacts(Facts):
    """What a state says of its layer: the weight, and what became of it; None where nothing was missing."""

    weight: str
    repair: dict[str, Any] | None


class LayerStore:
    """Keeps what a walk has changed, one file for each layer, in a folder named after the cut.

    Args:
        folder: where that folder is made, of this pruning alone.
        identity: what makes the pruning this one, plain JSON.
        plan: what was removed; layers that were kept after another cut are nobody's any more.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], plan: Plan) -> None:
        self._parent, self._identity = folder, {**identity, "plan": digest(json.dumps(plan.to_dict()), {})}
        self._folder = folder / f"{PREFIX}{self._identity['plan'][:16]}"

    def write(
        self, number: int, weight: str, repair: Repair | None, changes: Sequence[tuple[str, Tensor]]
    ) -> None:
        """Keep a layer; errors as in `Store.write`.

        Args:
            number: its place among the layers, from 0.
            weight: its name.
            repair: what became of it.
            changes: the tensors that have changed, by name.
        """
        if not number:
            forget_layers(self._parent)
        said = None if repair is None else asdict(repair)
        self._store(number).write({"changes": dict(changes)}, weight=weight, repair=said)

    def read(self, weights: Sequence[str]) -> Iterator[tuple[Repair | None, list[tuple[str, Tensor]]]]:
        """Yield what is kept of the layers, from the first one on.

        Args:
            weights: of all layers, in the order of the walk.

        Raises:
            ArtifactError: a state is damaged, or of another pruning.
        """
        for number, weight in enumerate(weights):
            store = self._store(number)
            found = store.read()
            if found is None:
                return
            facts, parts = found
            if facts.weight != weight:
                raise store.store.damaged(f"it is of {facts.weight!r}, where {weight!r} is due")
            try:
                repair = None if facts.repair is None else Repair(**facts.repair)
            except TypeError as error:
                raise store.damaged(error) from error
            yield repair, [*parts.get("changes", {}).items()]

    def _store(self, number: int) -> TypedStore[LayerFacts]:
        store = Store(self._folder, f"layer-{number}.safetensors", "cria-layer-1", "walk")
        return TypedStore(store, LayerFacts, self._identity)


def forget_layers(folder: Path) -> None:
    """Remove the layers of all walks in a folder, once they are over."""
    for path in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
