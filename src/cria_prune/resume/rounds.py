"""A round, an importance, moments and neuron graphs to and from a file: in this module alone.

Each becomes plain JSON (its facts) and tensors. The files differ in where they put these and in what else
they hold: the states of `prune` and `prune_offloaded`, the scores that are kept, what a run keeps for its
report, a bench's cell. The fields are read off the classes. One that is added to `Round`, `Verification`,
`Repair`, `Diagnosis` or `Moments` is therefore in all of these files without a line here, and where it has a
default, files from before it are still read.

Legend: d = units of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from cria_prune.graph.graph import Graph
from cria_prune.graph.moments import Moments
from cria_prune.graph.sides import NeuronGraphs
from cria_prune.result import Round
from cria_prune.resume.store import State
from cria_prune.spectrum.importance import Diagnosis, Importance

Facts = dict[str, Any]
Some = TypeVar("Some", bound=Round)

NUMBERS = ("scores", "kept")
"""The fields of a round that go to a file as tensors: one number per unit."""
PARTS = tuple(item.name for item in dataclasses.fields(Moments) if item.name != "samples")
"""The fields of `Moments` that are tensors."""
TINY = float(np.finfo(np.float32).tiny)  # a weight below it would come back from 32 bits as none


def facts_of(item: Round, leave_out: Collection[str] = ()) -> Facts:
    """Return what a round says beside its tensors, as plain JSON.

    Args:
        item: the round.
        leave_out: fields that the file has no room for.
    """
    # A whole number in a report is none of the type's `float | str`, and is written as it is.
    facts: Facts = _form(type(item)).dump_python(  # type: ignore[arg-type]
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


def parts_of(rounds: Iterable[Round]) -> tuple[list[Facts], dict[str, State]]:
    """Return the facts of rounds, and their tensors as parts of a state: `scores1`, `kept1`, `scores2`..."""
    rounds = list(rounds)
    parts = {
        f"{key}{item.number}": found for item in rounds for key, found in tensors_of(item).items() if found
    }
    return [facts_of(item) for item in rounds], parts


def rounds_of(facts: Sequence[Facts], parts: Mapping[str, State], kind: type[Some]) -> list[Some]:
    """Return the rounds that `parts_of` was given; errors as in `round_of`."""
    return [
        round_of(known, parts.get(f"scores{number}", {}), parts.get(f"kept{number}", {}), kind)
        for number, known in enumerate(facts, 1)
    ]


def diagnoses_of(found: Mapping[str, Importance]) -> dict[str, Facts]:
    """Return what importances say beside their scores: group name -> plain JSON."""
    return {name: item.diagnosis.to_dict() for name, item in found.items()}


def importances_of(diagnoses: Mapping[str, Facts], scores: Mapping[str, Tensor]) -> dict[str, Importance]:
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
