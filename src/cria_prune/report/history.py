"""What a run keeps so that its report can be made again from files alone, without the model.

`run.json` holds what the page says and what the rounds did; `run.tensors` the scores and kept units of every
round and the neuron graphs of some layers, as safetensors. It is not called *.safetensors because programs
that serve a model read every file of that ending in its folder as weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cria_prune.base.errors import ArtifactError
from cria_prune.base.files import atomic, is_plain_file, reading, refused, sha256, write_text
from cria_prune.graph.sides import NeuronGraphs
from cria_prune.result import Round
from cria_prune.resume.rounds import (
    Facts,
    facts_of,
    graph_tensors,
    graphs_of,
    ridges_of,
    round_of,
    tensors_of,
)
from cria_prune.resume.store import State

FORMAT, VERSION = "cria-run", 1
RUN, TENSORS = "run.json", "run.tensors"
FILES = (RUN, TENSORS)


@dataclass(frozen=True, eq=False)
class History:
    """What a run keeps.

    Attributes:
        page: what `write_report` takes, plain JSON; numbers that are not finite are None.
        rounds: what each round did. Of a run of Cria 0.1 the reports, the verifications and the repairs are
            not known; `page` has the figures of its table.
        graphs: of the dense model's neurons, group name -> both sides.
    """

    page: dict[str, Any]
    rounds: tuple[Round, ...]
    graphs: Mapping[str, NeuronGraphs]


class RunPage(BaseModel):
    """The part of `run.json` that the page reads; further keys are kept as they are."""

    model_config = ConfigDict(extra="allow")

    title: str | None = None
    metric: str | None = None
    rounds: list[dict[str, Any]] = []
    widths: dict[str, tuple[int, int]] = {}
    frozen: dict[str, str] = {}
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    provenance: dict[str, Any] = {}
    earlier: list[dict[str, Any]] = []
    diagnosis: list[dict[str, dict[str, Any]]] = []


def write_run(
    folder: Path, page: Mapping[str, Any], rounds: Sequence[Round], graphs: Mapping[str, NeuronGraphs]
) -> None:
    """Write `run.json` and `run.tensors` into a folder, in place of those there; JSON last.

    Args:
        folder: where.
        page: as in `History`; a row of its `rounds` gets all that the round says.
        rounds, graphs: as in `History`.

    Raises:
        ArtifactError: the system refuses, or something is no JSON.
    """
    names = [name for item in rounds for name in (*item.scores, *item.kept)]
    groups = {name: place for place, name in enumerate(dict.fromkeys([*names, *graphs]))}
    tensors: State = {}
    for item in rounds:
        for key, found in tensors_of(item).items():  # a name may be anything, a number stays one
            tensors |= {f"{item.number}/{groups[name]}/{key}": units for name, units in found.items()}
    for name, both in graphs.items():
        tensors |= graph_tensors(both, f"graph/{groups[name]}/", short=True)
    rows = [*page.get("rounds", ()), *({} for _ in rounds)][: len(rounds)]
    said = {
        "rounds": [{**row, **facts_of(item, ["diagnosis"])} for row, item in zip(rows, rounds, strict=True)],
        "diagnosis": [dict(item.diagnosis) for item in rounds],
    }
    known: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "groups": list(groups),
        "ridges": {name: ridges_of(both) for name, both in graphs.items()},
        "sha256": "",
        "page": _finite({**page, **said}),
    }
    try:
        (folder / RUN).unlink(missing_ok=True)  # an interrupted write leaves no half that looks whole
        with atomic(folder / TENSORS) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
        known["sha256"] = sha256(folder / TENSORS)
        text = json.dumps(known, allow_nan=False)
    except (OSError, SafetensorError) as error:
        raise refused(f"Writing {folder / TENSORS}", error) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"Writing {folder / RUN}", f"something in it is no JSON, {error}", "Pass plain values"
        ) from error
    write_text(folder / RUN, text)


def read_run(folder: Path) -> History | None:
    """Return what `write_run` was given; None where there is no `run.json`.

    Raises:
        ArtifactError: one of the two files is missing, damaged, foreign or of a newer format.
    """
    path, todo = folder / RUN, "Copy the folder again from where it was made, or run the command again"
    if not is_plain_file(path):
        return None
    asked = f"Reading {path}"
    with reading(asked, todo):
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or known.get("format") != FORMAT:
            raise ArtifactError(asked, "it is not what a run of Cria keeps", todo)
        if known.get("version") != VERSION:
            raise ArtifactError(
                asked,
                f"found format version {known.get('version')!r}, this Cria reads {VERSION}",
                "Use the cria-prune that wrote it, or a newer one",
            )
        page = RunPage.model_validate(known["page"])
        groups, ridges = [str(name) for name in known["groups"]], known["ridges"]
        if not is_plain_file(folder / TENSORS) or sha256(folder / TENSORS) != known["sha256"]:
            raise ArtifactError(asked, f"{TENSORS} beside it is missing or another", todo)
        tensors = load_file(folder / TENSORS)
        graphs = {
            name: graphs_of(both, tensors, f"graph/{groups.index(name)}/") for name, both in ridges.items()
        }
        return History(page.model_dump(), _rounds(page, tensors, groups), graphs)


def _rounds(page: RunPage, tensors: State, groups: Sequence[str]) -> tuple[Round, ...]:
    """Return the rounds of which there are tensors, by number."""
    units: dict[int, dict[str, State]] = {}
    for key in sorted(tensors):
        first, _, rest = key.partition("/")
        if first != "graph":
            place, kind = rest.split("/")
            by_kind = units.setdefault(int(first), {"scores": {}, "kept": {}})
            by_kind[kind][groups[int(place)]] = tensors[key]
    unknown: Facts = {"report": {}, "seconds": {}, "verification": None, "metric": None}
    rows, diagnoses = dict(enumerate(page.rounds)), dict(enumerate(page.diagnosis))
    found = []
    for index, number in enumerate(sorted(units)):
        facts = {**unknown, **rows.get(index, {}), "number": number, "diagnosis": diagnoses.get(index, {})}
        numbers = {
            kind: {name: by_name[name] for name in groups if name in by_name}
            for kind, by_name in units[number].items()
        }
        for name, scores in numbers["scores"].items():
            _check_units(name, scores, numbers["kept"][name])
        found.append(round_of(facts, **numbers, kind=Round))
    return tuple(found)


def _check_units(name: str, scores: Tensor, kept: Tensor) -> None:
    """Raise a ValueError where the units that stayed are none of those that had scores."""
    flat = scores.ndim == kept.ndim == 1 and scores.is_floating_point() and not kept.is_floating_point()
    if not flat or (len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(scores)):
        raise ValueError(f"the scores of {name} do not fit the units that stayed")


def _finite(value: Any) -> Any:
    """Return plain JSON values with None for NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
