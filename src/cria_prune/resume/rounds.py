"""A round to and from a file, once; and the finished rounds of a pruning, from which a killed one goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import Batch
from cria_prune.base.errors import CriaError
from cria_prune.base.modules import digest, first_names
from cria_prune.config import PruneConfig
from cria_prune.graph.graph import Graph, NeuronGraphs
from cria_prune.graph.moments import Moments
from cria_prune.planning.plan import Plan, compose
from cria_prune.result import PruneResult, Round
from cria_prune.resume.layers import LayerStore, forget_layers
from cria_prune.resume.store import Facts, State, Store, TypedStore, code_version, weights_of
from cria_prune.spectrum.importance import Diagnosis, Importance
from cria_prune.structure.groups import shrink
from cria_prune.surgery.removal import apply

RoundFacts = dict[str, Any]
Some = TypeVar("Some", bound=Round)

NUMBERS = ("scores", "kept")
"""The fields of a round that go to a file as tensors: one number per unit."""
PARTS = tuple(item.name for item in dataclasses.fields(Moments) if item.name != "samples")
"""The fields of `Moments` that are tensors."""
TINY = float(np.finfo(np.float32).tiny)  # a weight below it would come back from 32 bits as none


def facts_of(item: Round, leave_out: Collection[str] = ()) -> RoundFacts:
    """Return what a round says beside its tensors, as plain JSON.

    Args:
        item: the round.
        leave_out: fields that the file has no room for.
    """
    # A whole number in a report is none of the type's `float | str`, and is written as it is.
    facts: RoundFacts = _form(type(item)).dump_python(  # type: ignore[arg-type]
        item, mode="json", exclude={*NUMBERS, *leave_out}, warnings=False
    )
    return facts


def tensors_of(item: Round) -> dict[str, State]:
    """Return a round's `scores`, group name -> (d,) float64, and `kept`, group name -> (n,) int32."""
    return {
        "scores": {name: torch.tensor(found, dtype=torch.float64) for name, found in item.scores.items()},
        "kept": {name: torch.tensor(found, dtype=torch.int32) for name, found in item.kept.items()},
    }


def round_of(
    facts: Mapping[str, Any], scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], kind: type[Some]
) -> Some:
    """Return the round that `facts_of` and `tensors_of` were given.

    Args:
        facts: may lack fields that have a default, and hold others.
        scores, kept: group name -> tensor.
        kind: `Round`, or the class made from it that was written.

    Raises:
        ValueError: a field is missing or of another type.
    """
    item: Some = _form(kind).validate_python(  # type: ignore[arg-type]
        {**facts, **{key: {} for key in NUMBERS}}
    )
    numbers: dict[str, Any] = {
        key: {name: tuple(units.tolist()) for name, units in found.items()}
        for key, found in (("scores", scores), ("kept", kept))
    }
    return dataclasses.replace(item, **numbers)


def parts_of(rounds: Iterable[Round]) -> tuple[list[RoundFacts], dict[str, State]]:
    """Return the facts of rounds, and their tensors as parts of a state: `scores1`, `kept1`, `scores2`..."""
    rounds = list(rounds)
    parts = {
        f"{key}{item.number}": found for item in rounds for key, found in tensors_of(item).items() if found
    }
    return [facts_of(item) for item in rounds], parts


def rounds_of(facts: Sequence[RoundFacts], parts: Mapping[str, State], kind: type[Some]) -> list[Some]:
    """Return the rounds that `parts_of` was given; errors as in `round_of`."""
    return [
        round_of(known, parts.get(f"scores{number}", {}), parts.get(f"kept{number}", {}), kind)
        for number, known in enumerate(facts, 1)
    ]


def diagnoses_of(found: Mapping[str, Importance]) -> dict[str, RoundFacts]:
    """Return what importances say beside their scores: group name -> plain JSON."""
    return {name: item.diagnosis.to_dict() for name, item in found.items()}


def importances_of(
    diagnoses: Mapping[str, RoundFacts], scores: Mapping[str, Tensor]
) -> dict[str, Importance]:
    """Return the importances of `diagnoses_of` and their scores, group name -> (d,) float64.

    Raises:
        LookupError, TypeError: the diagnoses are of other groups, or hold something else.
        ValueError: the scores are no finite numbers.
    """
    if diagnoses.keys() != scores.keys():
        raise LookupError("scores and diagnoses are of other groups")
    for name, found in scores.items():
        if found.ndim != 1 or found.dtype != torch.float64 or not torch.isfinite(found).all():
            raise ValueError(f"the scores of {name} are no finite float64 (units,)")
    return {name: Importance(found, Diagnosis.from_dict(diagnoses[name])) for name, found in scores.items()}


def moment_tensors(moments: Moments, place: str = "") -> State:
    """Return the tensors of moments, on the CPU; `place` goes before each name."""
    found = {part: getattr(moments, part) for part in PARTS}
    return {f"{place}{part}": value.cpu().contiguous() for part, value in found.items() if value is not None}


def moments_of(samples: int, tensors: Mapping[str, Tensor], place: str = "") -> Moments:
    """Return the moments of `samples` samples that `moment_tensors` was given.

    Raises:
        ValueError: mean or variance is missing, or there is no sample.
    """
    found = {part: tensors.get(f"{place}{part}") for part in PARTS}
    if found["mean"] is None or found["variance"] is None or samples < 1:
        raise ValueError(f"the moments at {place!r} are not whole")
    return Moments(samples, **found)  # type: ignore[arg-type]


def ridges_of(both: NeuronGraphs) -> tuple[float, float]:
    """Return what a layer's graphs say beside their tensors: the ridge of either side."""
    return both.input.ridge, both.output.ridge


def graph_tensors(both: NeuronGraphs, place: str = "", *, short: bool = False) -> State:
    """Return the tensors of a layer's two graphs.

    Args:
        both: the graphs.
        place: goes before each name.
        short: 32 bits for each number, 12 bytes an edge; else the very bits.
    """
    found = {f"{place}units": both.units}
    for side, graph in (("in", both.input), ("out", both.output)):
        found |= {f"{place}{side}/{part}": getattr(graph, part) for part in ("rows", "cols", "weights")}
    if not short:
        return found
    return {
        name: value.clamp(min=TINY).float() if value.is_floating_point() else value.int()
        for name, value in found.items()
    }


def graphs_of(ridges: Sequence[float], tensors: Mapping[str, Tensor], place: str = "") -> NeuronGraphs:
    """Return the graphs that `ridges_of` and `graph_tensors` were given.

    Raises:
        LookupError: a tensor is missing.
        ValueError: the tensors are no graph.
    """
    units = tensors[f"{place}units"].long()
    sides = []
    for side, ridge in zip(("in", "out"), ridges, strict=True):
        rows, cols, weights = (tensors[f"{place}{side}/{part}"] for part in ("rows", "cols", "weights"))
        fits = rows.shape == cols.shape == weights.shape and rows.ndim == 1
        if not fits or ((rows < 0) | (rows >= cols) | (cols >= len(units))).any() or not (weights > 0).all():
            raise ValueError(f"{place}{side} is no graph of {len(units)} units")
        sides.append(Graph(len(units), rows.long(), cols.long(), weights.double(), float(ridge)))
    return NeuronGraphs(units, *sides)


@cache
def _form(kind: Any) -> TypeAdapter[Any]:
    """Return what reads the fields of a class off it and checks them; it takes some milliseconds to make."""
    return TypeAdapter(kind)


FORMAT = "cria-rounds-1"
NAME = "rounds.safetensors"

Planner = Callable[[PruneResult, Round], Plan]
"""(result before, a round) -> the plan of that round."""


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
        forget_layers(self.store.store.folder)

    def layers(self, plan: Plan) -> LayerStore:
        """Return where the layers are kept that are refitted after a cut."""
        return LayerStore(self.store.store.folder, self.store.identity, plan)

    def resume(self, start: PruneResult, planner: Planner) -> PruneResult:
        """Return the result after the rounds that are kept; `start` itself where there are none.

        Args:
            start: the result before the first round.
            planner: makes the plan of a round again from its scores, and the losses of the first.

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
        step = planner(result, item)
        # The plan follows from the scores, so it is made again. That it keeps
        # the same units shows that state, structure and code belong together.
        if item.kept != dict(step.kept):
            raise ValueError(f"the scores of round {item.number} do not give the units that it kept")
        groups = shrink(result.groups, step.kept)
        result = replace(
            result, plan=compose(result.plan, step), groups=groups, rounds=(*result.rounds, item)
        )
    # Shapes and attributes come from the plan, values from the state: repair and batch norms changed them.
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
    state = model.state_dict()
    return {
        name: state[name].detach().clone(memory_format=torch.contiguous_format)
        for name, first in first_names(state).items()
        if name == first
    }


def _put_back(model: nn.Module, state: State) -> None:
    if state.keys() != _weights(model).keys():
        raise LookupError("its weights have other names")
    model.load_state_dict(state, strict=False)  # further names of one tensor are left out
