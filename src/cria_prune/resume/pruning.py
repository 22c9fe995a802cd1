"""The finished rounds of a pruning on disk, from which a killed one goes on; see `prune(state=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import Batch
from cria_prune.base.errors import CriaError
from cria_prune.base.modules import digest
from cria_prune.config import PruneConfig
from cria_prune.planning.plan import Plan, compose
from cria_prune.result import PruneResult, Round
from cria_prune.resume.rounds import graph_tensors, graphs_of, parts_of, ridges_of, rounds_of
from cria_prune.resume.store import Facts, State, Store, TypedStore, code_version, weights_of
from cria_prune.structure.groups import shrink
from cria_prune.surgery.removal import apply

FORMAT = "cria-rounds-1"
NAME = "rounds.safetensors"

Planner = Callable[[PruneResult, Mapping[str, np.ndarray], int], Plan]
"""(result before, scores by group, number of the round) -> the plan of that round."""


class PruningFacts(Facts):
    """What a state says of its rounds, and the ridges of the graphs; None where none are kept."""

    rounds: list[dict[str, Any]]
    ridges: dict[str, tuple[float, float]] | None


class RoundStore:
    """Keeps the finished rounds of one pruning in a folder.

    Args:
        folder: of this pruning alone; made when the first round is over.
        model: the dense model.
        config: what is asked.
        example: the first examples of the calibration data.
        further: what else makes the pruning this one, plain JSON.

    Raises:
        ArtifactError: the state of the model holds something else than tensors.
    """

    def __init__(
        self, folder: str | Path, model: nn.Module, config: PruneConfig, example: Batch, **further: Any
    ) -> None:
        identity = {**asked_of(config, example), **further, **weights_of({"model": model}, "pruning")}
        self.store = TypedStore(Store(folder, NAME, FORMAT, "pruning"), PruningFacts, identity)

    def write(self, result: PruneResult) -> None:
        """Keep the rounds so far; errors as in `Store.write`."""
        facts, parts = parts_of(result.rounds)
        parts["weights"] = _weights(result.model)
        for number, both in enumerate((result.graphs or {}).values()):
            parts[f"graph{number}"] = graph_tensors(both)
        ridges = None
        if result.graphs is not None:
            ridges = {name: ridges_of(both) for name, both in result.graphs.items()}
        self.store.write(parts, rounds=facts, ridges=ridges)

    def resume(self, start: PruneResult, planner: Planner) -> PruneResult:
        """Return the result after the rounds that are kept; `start` itself where there are none.

        Args:
            start: the result before the first round.
            planner: makes the plan of a round again from its scores.

        Raises:
            ArtifactError: the state is damaged, or of another pruning.
        """
        found = self.store.read()
        if found is None:
            return start
        try:
            return _restored(start, *found, planner)
        except (CriaError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise self.store.store.damaged(f"it does not fit the model: {error}") from error


def _restored(
    start: PruneResult, facts: PruningFacts, parts: Mapping[str, State], planner: Planner
) -> PruneResult:
    result = start
    for item in rounds_of(facts.rounds, parts, Round):
        scores = {name: np.array(found) for name, found in item.scores.items()}
        step = planner(result, scores, item.number)
        if item.kept != dict(step.kept):
            raise ValueError(f"the scores of round {item.number} do not give the units that it kept")
        groups = shrink(result.groups, step.kept)
        result = replace(
            result, plan=compose(result.plan, step), groups=groups, rounds=(*result.rounds, item)
        )
    model = apply(start.model, result.plan)
    _put_back(model, parts["weights"])
    if facts.ridges is None:
        return replace(result, model=model, graphs=None)
    graphs = {}
    for number, (name, ridges) in enumerate(facts.ridges.items()):
        # Cria 0.1 wrote "in rows" where it is "in/rows" now.
        tensors = {part.replace(" ", "/"): value for part, value in parts[f"graph{number}"].items()}
        graphs[name] = graphs_of(ridges, tensors)
    return replace(result, model=model, graphs=graphs)


def asked_of(config: PruneConfig, example: Batch) -> dict[str, Any]:
    """Return what is asked, of which data, by which code: part of what makes a pruning this one."""
    leaves = [item for item in tree_leaves(example) if isinstance(item, Tensor)]
    return {
        "config": config.model_dump(mode="json"),
        "first examples": digest("", {str(place): item for place, item in enumerate(leaves)}),
        "torch": torch.__version__,
        "code": code_version(),
    }


def _weights(model: nn.Module) -> State:
    """Return copies of the state, a tensor of several names under the first."""
    seen: set[tuple[Any, ...]] = set()
    found: State = {}
    for name, value in model.state_dict().items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if place not in seen:
            seen.add(place)
            found[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return found


def _put_back(model: nn.Module, state: State) -> None:
    if state.keys() != _weights(model).keys():
        raise LookupError("its weights have other names")
    model.load_state_dict(state, strict=False)  # further names of one tensor are left out
