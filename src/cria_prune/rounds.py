"""The finished rounds of a pruning on disk, from which a killed one goes on; see `prune(state=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.batches import Batch
from cria_prune.config import PruneConfig
from cria_prune.errors import CriaError
from cria_prune.graph import Graph, NeuronGraphs
from cria_prune.modules import digest
from cria_prune.plan import Plan, compose
from cria_prune.result import PruneResult, Round
from cria_prune.store import State, Store, code_version, weights_of
from cria_prune.structure import shrink
from cria_prune.surgery import Repair, Verification, apply

FORMAT = "cria-rounds-1"
NAME = "rounds.safetensors"

Planner = Callable[[PruneResult, Mapping[str, np.ndarray], int], Plan]
"""(result before, scores by group, number of the round) -> the plan of that round."""


class RoundFacts(BaseModel):
    """What a round says beside its tensors; the fields are those of `Round`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    report: dict[str, float | str]
    seconds: dict[str, float]
    diagnosis: dict[str, dict[str, Any]]
    verification: dict[str, Any] | None
    metric: float | None
    repairs: list[dict[str, Any]]
    batch_norms: int
    batch_norms_kept: str


class Facts(BaseModel):
    """What a state says: whose it is, its rounds, and the ridges of the graphs; None where none are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, Any]
    rounds: list[RoundFacts]
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
        self.store = Store(folder, NAME, FORMAT, "pruning")
        self.identity = {**asked_of(config, example), **further, **weights_of({"model": model}, "pruning")}

    def write(self, result: PruneResult) -> None:
        """Keep the rounds so far; errors as in `Store.write`."""
        parts: dict[str, State] = {"weights": _weights(result.model)}
        for item in result.rounds:
            kept = {name: torch.tensor(found, dtype=torch.int32) for name, found in item.kept.items()}
            parts |= {f"scores{item.number}": scores_of(item), f"kept{item.number}": kept}
        graphs, ridges = result.graphs, dict[str, tuple[float, float]]()
        for number, (name, both) in enumerate((graphs or {}).items()):
            parts[f"graph{number}"] = {"units": both.units, **_sides(both)}
            ridges[name] = (both.input.ridge, both.output.ridge)
        facts = Facts(
            identity=self.identity,
            rounds=[said(item) for item in result.rounds],
            ridges=None if graphs is None else ridges,
        )
        self.store.write(facts.model_dump(mode="json"), parts)

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
            facts = Facts.model_validate(found[0])
        except ValidationError as error:
            raise self.store.damaged(str(error)) from error
        self.store.check(facts.identity, self.identity)
        try:
            return self._restored(start, facts, found[1], planner)
        except (CriaError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise self.store.damaged(f"it does not fit the model: {error}") from error

    def _restored(
        self, start: PruneResult, facts: Facts, parts: Mapping[str, State], planner: Planner
    ) -> PruneResult:
        result = start
        for number, known in enumerate(facts.rounds, 1):
            scores = {name: item.numpy() for name, item in parts[f"scores{number}"].items()}
            step = planner(result, scores, number)
            kept = {name: tuple(item.tolist()) for name, item in parts[f"kept{number}"].items()}
            if kept != dict(step.kept):
                raise ValueError(f"the scores of round {number} do not give the units that it kept")
            item = restored(known, scores, step)
            groups = shrink(result.groups, step.kept)
            result = replace(
                result, plan=compose(result.plan, step), groups=groups, rounds=(*result.rounds, item)
            )
        model = apply(start.model, result.plan)
        _put_back(model, parts["weights"])
        graphs = None if facts.ridges is None else _graphs(parts, facts.ridges)
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


def scores_of(item: Round) -> State:
    """Return a round's scores as tensors."""
    return {name: torch.tensor(found, dtype=torch.float64) for name, found in item.scores.items()}


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


def said(item: Round) -> RoundFacts:
    """Return what a round says beside its tensors."""
    return RoundFacts(
        number=item.number,
        report=dict(item.report),
        seconds=dict(item.seconds),
        diagnosis=dict(item.diagnosis),
        verification=None if item.verification is None else asdict(item.verification),
        metric=item.metric,
        repairs=[asdict(repair) for repair in item.repairs],
        batch_norms=item.batch_norms,
        batch_norms_kept=item.batch_norms_kept,
    )


def restored(found: RoundFacts, scores: Mapping[str, Any], step: Plan) -> Round:
    """Return the round again, from what it said, its scores and its plan."""
    check = found.verification
    return Round(
        number=found.number,
        report=found.report,
        seconds=found.seconds,
        scores={name: tuple(item.tolist()) for name, item in scores.items()},
        kept=dict(step.kept),
        diagnosis=found.diagnosis,
        verification=None if check is None else Verification(**check),
        metric=found.metric,
        repairs=tuple(Repair(**item) for item in found.repairs),
        batch_norms=found.batch_norms,
        batch_norms_kept=found.batch_norms_kept,
    )


def _sides(both: NeuronGraphs) -> State:
    found: State = {}
    for side, graph in (("in", both.input), ("out", both.output)):
        found |= {f"{side} rows": graph.rows, f"{side} cols": graph.cols, f"{side} weights": graph.weights}
    return found


def _graphs(parts: Mapping[str, State], ridges: Mapping[str, tuple[float, float]]) -> dict[str, NeuronGraphs]:
    found = {}
    for number, (name, values) in enumerate(ridges.items()):
        state = parts[f"graph{number}"]
        ends = [
            Graph(
                len(state["units"]), state[f"{side} rows"], state[f"{side} cols"], state[f"{side} weights"], e
            )
            for side, e in zip(("in", "out"), values, strict=True)
        ]
        found[name] = NeuronGraphs(state["units"], *ends)
    return found
